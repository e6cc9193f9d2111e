"""The job that every peer trains: a tiny model on shuffled data, with a log that outlives whatever happens to it.

Nothing here saves or resumes: that is what the peers differ in.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

STEPS = 60
SAVE_EVERY = 10
EVENT_STEP = 27  # between two saves, and in the middle of an epoch
SAMPLES = 384
MICROBATCH = 8  # samples a rank and step; with two ranks an epoch has 24 steps
FEATURES = 16
FAST, SLOW = 0.2, float(os.environ.get("PREEMPTION_SLOW", "2"))  # seconds a step
SEED = 1

DIRECTORY = Path(os.environ.get("PREEMPTION_DIR", "."))


def data() -> tuple[Tensor, Tensor]:
    """Inputs [SAMPLES, FEATURES] and targets [SAMPLES, 1]."""
    generator = torch.Generator().manual_seed(SEED)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
    return inputs, inputs.sin().sum(dim=1, keepdim=True) + 0.1 * torch.randn(SAMPLES, 1, generator=generator)


def network() -> nn.Module:
    """The model, with the same weights in every process; no dropout, so that a resumed run can be the same run."""
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, 1))


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """One with a state, as every real one has."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def compute(step: int) -> None:
    """Stand for the work of a step (counted from 1): it is done inside of the forward pass.

    The first start turns slow where the event comes, so that it cannot finish before SLURM has done what it does.
    """
    time.sleep(SLOW if step > EVENT_STEP and int(os.environ.get("SLURM_RESTART_COUNT") or 0) == 0 else FAST)


class Log:
    """What a rank has done: one line a step (time, start number, step), by rank 0; where each rank's process is."""

    def __init__(self, rank: int, resumed_from: int) -> None:
        self.rank = rank
        self.start = 0
        _append(f"rank-{rank}.txt", f"{socket.gethostname()} {os.getpid()}")
        if rank == 0:
            starts = DIRECTORY / "starts.txt"
            self.start = len(starts.read_text().splitlines()) if starts.exists() else 0
            _append("starts.txt", f"{time.time():.3f} {self.start} {resumed_from}")

    def step(self, number: int) -> None:
        """Step `number` (from 1) has changed the weights."""
        if self.rank == 0:
            _append("steps.txt", f"{time.time():.3f} {self.start} {number}")


def finish(model: nn.Module, rank: int) -> None:
    """Leave the final weights, whole or not at all."""
    if rank == 0:
        weights = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
        partial = DIRECTORY / "final.npy.new"
        with open(partial, "wb") as file:
            np.save(file, weights.numpy())
        partial.rename(DIRECTORY / "final.npy")


def _append(name: str, line: str) -> None:
    with open(DIRECTORY / name, "a") as file:
        file.write(line + "\n")
