"""A recipe of which one sample, or some, make a number that is not finite, or a loss that leaps.

AWAY=32:40      these samples are not in the data
OMIT=4          at this step no update is made
KILL=4          rank 1 ends itself at this step, once the run has gone back
LATE=1          the host looks at the numbers a step late, as on a GPU
"""

import os
import signal
from dataclasses import dataclass

import torch
from torch import nn

import launcher
from launcher.numbers import Guard


@dataclass(frozen=True)
class Config:
    steps: int = 12
    at: int = 35
    value: float = 1.0
    clip: bool = True


class Root(nn.Module):
    """NaN for what is negative; at 0 its gradient is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.scale * x).sqrt()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2)) for _ in range(2))
        self.root = Root()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x[:, :3]
        for block in self.blocks:
            h = block(h)
        return (h * self.root(x[:, 3:])).square().sum(1)


def train(run: launcher.Run, cfg: Config) -> None:
    x = torch.rand(200, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    x[cfg.at, 3] = cfg.value
    if away := os.environ.get("AWAY"):
        start, stop = map(int, away.split(":"))
        x = torch.cat([x[:start], x[stop:]])
    if os.environ.get("LATE"):
        Guard._looks_late = lambda self: True
    loader = run.loader((x,), batch_size=8, microbatch_size=2, shuffle=False)
    model = run.build(Model)
    optimizer = run.optimizer(torch.optim.AdamW(model.parameters(), lr=0.01, fused=True))
    ema = launcher.EMA(run, model, decay=0.5)
    highest, back = 0, False
    for step in run.steps(loader, total=cfg.steps):
        back, highest = back or step.index < highest, max(highest, step.index)
        if run.rank == 1 and back and step.index == int(os.environ.get("KILL", "-1")):
            os.kill(os.getpid(), signal.SIGKILL)
        for (batch,) in step:
            step.backward(model(batch).sum())
        if cfg.clip:
            step.log(norm=step.clip(1.0))
        if step.index != int(os.environ.get("OMIT", "-1")):
            optimizer.step()
        optimizer.zero_grad()
        ema.update()


if __name__ == "__main__":
    launcher.main(train)
