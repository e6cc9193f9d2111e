"""A recipe in which each rank does a little otherwise than its peer, as `--what` says."""

import json
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import launcher


@dataclass(frozen=True)
class Config:
    what: Literal["draw", "leave"] = "draw"


def draw() -> list[float]:
    """One number from each of the host's generators."""
    return [random.random(), float(np.random.rand()), torch.rand(1).item()]


def train(run: launcher.Run, cfg: Config) -> None:
    told = {"train": draw()}

    def make() -> torch.nn.Linear:
        linear = torch.nn.Linear(1, 1)
        with torch.no_grad():
            linear.bias.copy_(torch.from_numpy(np.random.rand(1)))
        told["make"] = draw()
        return linear

    model = run.build(make)
    told["bias"] = model.bias.tolist()
    optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=1e-4))
    numbers = run.loader((torch.arange(14.0)[:, None],), batch_size=4, microbatch_size=2, shuffle=False)
    if cfg.what == "draw":  # rank 0 reads 0 1, 4 5, 8 9, 12 13; rank 1 the others
        told["mean"] = run.average(lambda batch: score(batch[0]), numbers)
    for step in run.steps(numbers, total=20):
        for (x,) in step:
            step.backward(model(x).sum())
        optimizer.step()
        optimizer.zero_grad()
        if step.index == 2 and (cfg.what == "draw" or run.rank == 1):
            (run.dir / f"told-{run.rank}.json").write_text(json.dumps(told))
            break


def score(x: torch.Tensor) -> dict[str, tuple[torch.Tensor, int]]:
    """A mean of all, one that rank 0 alone sees, and one that rank 1 alone sees."""
    seen = {"all": (x.sum(), len(x))}
    if x.max() < 2:
        seen["first"] = (x.sum(), len(x))
    if 2 <= x.min() < 4:
        seen["second"] = (x.sum(), len(x))
    return seen


if __name__ == "__main__":
    launcher.main(train)
