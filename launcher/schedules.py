"""Schedules as functions of the step: nothing to save, nothing to restore, right after any resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from launcher.optim import Optimizer

__all__ = ["set_lr", "warmup_cosine", "warmup_linear"]


def warmup_cosine(step: int, total: int, warmup: int, floor: float = 0.0) -> float:
    """A factor that rises linearly over `warmup` steps to 1, then falls along a half cosine to `floor` at `total`.

    Step 0 already moves: it gets 1 / (warmup + 1). Loshchilov and Hutter, "SGDR" (2017), without restarts.
    """
    return _after_warmup(step, total, warmup, lambda left: floor + (1 - floor) * 0.5 * (1 - math.cos(math.pi * left)))


def warmup_linear(step: int, total: int, warmup: int, floor: float = 0.0) -> float:
    """A factor that rises linearly over `warmup` steps to 1, then falls linearly to `floor` at `total`."""
    return _after_warmup(step, total, warmup, lambda left: floor + (1 - floor) * left)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group.

    A group's own `lr_scale`, where it has one, multiplies it. A learning rate that is a tensor (compiled
    optimizers, CUDA graphs) is filled in place, so that nothing recompiles.
    """
    for group in optimizer.param_groups:
        value = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def _after_warmup(step: int, total: int, warmup: int, fall: Callable[[float], float]) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return fall(1 - min(1.0, (step - warmup) / max(1, total - warmup)))
