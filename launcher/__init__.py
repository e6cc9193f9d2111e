"""Run one training recipe, unmodified: as a debug run, under `accelerate launch`, and on SLURM; exactly resumable."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from launcher.errors import CheckpointError, LauncherError, NumbersError, RecipeError, UsageError, WorldError

if TYPE_CHECKING:
    from launcher.attempt import main
    from launcher.config import RunConfig
    from launcher.data import Loader
    from launcher.ema import EMA
    from launcher.losses import linear_cross_entropy
    from launcher.optim import Optimizer
    from launcher.preparation import prepare
    from launcher.run import Run
    from launcher.schedules import set_lr, warmup_cosine, warmup_linear
    from launcher.step import Step

__all__ = [
    "EMA",
    "CheckpointError",
    "LauncherError",
    "Loader",
    "NumbersError",
    "Optimizer",
    "RecipeError",
    "Run",
    "RunConfig",
    "Step",
    "UsageError",
    "WorldError",
    "linear_cross_entropy",
    "main",
    "prepare",
    "set_lr",
    "warmup_cosine",
    "warmup_linear",
]

# Loaded when first used: the command line must answer before torch would be imported.
LAZY = {
    "EMA": "ema",
    "Loader": "data",
    "Optimizer": "optim",
    "Run": "run",
    "RunConfig": "config",
    "Step": "step",
    "linear_cross_entropy": "losses",
    "main": "attempt",
    "prepare": "preparation",
    "set_lr": "schedules",
    "warmup_cosine": "schedules",
    "warmup_linear": "schedules",
}


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"launcher.{LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
