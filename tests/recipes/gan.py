"""A GAN that learns points on a circle: two players, an average, and a step that is gone through twice."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import launcher


@dataclass(frozen=True)
class Config:
    steps: int = 300
    batch_size: int = 128  # points per optimizer step
    microbatch_size: int = 32
    lr: float = 2e-3
    noise: int = 4  # dimensions of the generator's input
    width: int = 64
    decay: float = 0.98  # of the generator's average


def circle(number: int) -> Tensor:
    """Points [number, 2] on a circle of radius 2."""
    angle = 2 * math.pi * torch.rand(number, generator=torch.Generator().manual_seed(0))
    return 2 * torch.stack([angle.cos(), angle.sin()], dim=-1)


def network(inputs: int, width: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs)
    )


def off_circle(generator: nn.Module, noise: int) -> float:
    """The mean distance of generated points from the circle."""
    with torch.no_grad():
        points = generator(torch.randn(1024, noise, generator=torch.Generator().manual_seed(1)))
    return float((points.norm(dim=-1) - 2).abs().mean())


def train(run: launcher.Run, cfg: Config) -> None:
    points = run.loader((circle(4096),), batch_size=cfg.batch_size, microbatch_size=cfg.microbatch_size)
    generator = run.build(lambda: network(cfg.noise, cfg.width, 2), name="generator")
    critic = run.build(lambda: network(2, cfg.width, 1), name="critic")
    make = run.optimizer(torch.optim.Adam(generator.parameters(), lr=cfg.lr, betas=(0.5, 0.99)))
    judge = run.optimizer(torch.optim.Adam(critic.parameters(), lr=cfg.lr, betas=(0.5, 0.99)))
    ema = launcher.EMA(run, generator, decay=cfg.decay)

    for step in run.steps(points, total=cfg.steps):
        for (real,) in step:
            with torch.no_grad():
                fake = generator(torch.randn(len(real), cfg.noise))
            scores = critic(torch.cat([real, fake]))[:, 0]
            is_real = torch.cat([torch.ones(len(real)), torch.zeros(len(fake))])
            step.backward(F.binary_cross_entropy_with_logits(scores, is_real, reduction="sum"))
        step.log(critic_norm=step.clip(1.0, critic))
        judge.step()
        judge.zero_grad()

        for (real,) in step:
            scores = critic(generator(torch.randn(len(real), cfg.noise)))
            step.backward(F.softplus(-scores).sum())
        step.log(generator_norm=step.clip(1.0, generator))
        make.step()
        make.zero_grad()
        judge.zero_grad()  # the generator's loss went through the critic
        ema.update()

    with ema.swapped():
        averaged = off_circle(generator, cfg.noise)
    run.log(off_circle=off_circle(generator, cfg.noise), off_circle_ema=averaged)


if __name__ == "__main__":
    launcher.main(train)
