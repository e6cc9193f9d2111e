"""A recipe whose loss is made to overflow fp16 in one step."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import launcher


@dataclass(frozen=True)
class Config:
    steps: int = 40
    overflow_at: int = 25  # by then the scale has found its level
    fused: bool = False
    two: bool = False  # a second optimizer, which shares the scaler


def train(run: launcher.Run, cfg: Config) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 16, generator=generator)
    loader = run.loader((x, x @ torch.randn(16, 4, generator=generator)), batch_size=32, microbatch_size=16)
    model = run.build(lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)))
    parts = [model[0], model[2]] if cfg.two else [model]
    inner = [torch.optim.AdamW(part.parameters(), lr=1e-2, fused=cfg.fused) for part in parts]
    optimizers = [run.optimizer(optimizer) for optimizer in inner]
    for step in run.steps(loader, total=cfg.steps):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        scale = run.scaler.get_scale()
        for images, targets in step:
            loss = F.mse_loss(model(images), targets, reduction="sum")
            step.backward(loss * 1e9 if step.index == cfg.overflow_at else loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        step.log(scale=scale, moved=float(moved))


if __name__ == "__main__":
    launcher.main(train)
