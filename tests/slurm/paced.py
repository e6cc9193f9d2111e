"""A recipe for the cluster: dropout and a shuffled order, steps of a chosen length, and faults that a test asks for."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import launcher


@dataclass(frozen=True)
class Config:
    steps: int = 20
    batch_size: int = 8
    microbatch_size: int = 4
    lr: float = 1e-2
    eval_every: int = 0
    note: str = ""  # arrives as it was given
    path: Path = Path()
    numbers: tuple[float, ...] = ()


def train(run: launcher.Run, cfg: Config) -> None:
    # What is done to this process is in the environment, not in the options: a rerun has the same options.
    pace = float(os.environ.get("PACE", "0"))
    raises = os.environ.get("RAISE", "")  # step:rank, in every start
    breaks = os.environ.get("BREAK", "")  # step:rank, in the first start: as a GPU does
    generator = torch.Generator().manual_seed(1)
    data = (torch.randn(50, 8, generator=generator), torch.randn(50, 4, generator=generator))
    loader = run.loader(data, batch_size=cfg.batch_size, microbatch_size=cfg.microbatch_size)
    model = run.build(lambda: nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.1), nn.Linear(32, 4)))
    optimizer = run.optimizer(torch.optim.AdamW(model.parameters(), lr=cfg.lr))

    def score(batch):
        time.sleep(pace)
        return {"held_out": (F.mse_loss(model(batch[0]), batch[1], reduction="sum"), len(batch[0]))}

    for step in run.steps(loader, total=cfg.steps):
        time.sleep(pace)
        if raises == f"{step.index}:{run.rank}":
            raise ValueError(f"planted at step {step.index}")
        if breaks == f"{step.index}:{run.rank}" and "SLURM_RESTART_COUNT" not in os.environ:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        if step.every(cfg.eval_every):
            step.log(**run.average(score, loader))
        for x, y in step:
            step.backward(F.mse_loss(model(x), y, reduction="sum"))
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    launcher.main(train)
