"""The job as a recipe of this project: the launcher saves, resumes and requeues."""

from __future__ import annotations

from dataclasses import dataclass

import common
import torch

import launcher


@dataclass(frozen=True)
class Config:
    """What the others have as constants."""

    steps: int = common.STEPS
    batch_size: int = 2 * common.MICROBATCH
    microbatch_size: int = common.MICROBATCH


def train(run: launcher.Run, cfg: Config) -> None:
    """The same loop as everybody's."""
    loader = run.loader(common.data(), batch_size=cfg.batch_size, microbatch_size=cfg.microbatch_size)
    model = run.build(common.network)
    optimizer = run.optimizer(common.optimizer(model))
    log = None
    for step in run.steps(loader, total=cfg.steps):
        log = log or common.Log(run.rank, step.index)
        for inputs, targets in step:
            common.compute(step.index + 1)
            step.backward(torch.nn.functional.mse_loss(model(inputs), targets, reduction="sum"))
        optimizer.step()
        optimizer.zero_grad()
        log.step(step.index + 1)
    common.finish(model, run.rank)


if __name__ == "__main__":
    launcher.main(train)
