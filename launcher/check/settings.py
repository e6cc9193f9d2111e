"""What a run of the check is to do otherwise than the recipe says, and what it is to write down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Kill", "Settings"]


@dataclass(frozen=True)
class Kill:
    """When ranks end with SIGKILL: so many seconds after they have come to a place of a step, or have begun a save."""

    place: Literal["microbatch", "edge", "save"]
    seconds: float
    step: int = 0
    """Of a save it does not matter."""
    rank: int | None = None
    """None: every rank."""
    saved: bool = False
    """Not before there is a whole checkpoint: small steps are faster than a disk, and a start from 0 proves nothing."""


@dataclass(frozen=True)
class Settings:
    """One run of the check."""

    out: str
    """The directory of what it writes down."""
    steps: int
    """Optimizer steps, in place of the recipe's."""
    batch_size: int
    """Samples a step, in place of the recipe's."""
    microbatch_size: int
    even: tuple[int, int] = (1, 1)
    """Batch and micro-batch of a stream, which is dealt out evenly."""
    descent: bool = False
    """Plain gradient descent in place of the recipe's optimizers, and no clipping: both hide a gradient's scale."""
    rates: tuple[tuple[int, float], ...] = ()
    """Of that descent, for each optimizer; empty: 1 % of the weights' norm over the gradients', as first seen."""
    double: bool = False
    """Compute in float64."""
    modules: bool = False
    """Write down a digest of every module's output, and of every gradient."""
    unused: bool = False
    """Write down which parameters take part on which rank; those that do not must not hang the others."""
    state: bool = False
    """Look for objects of the recipe's own that change and are not saved."""
    kill: Kill | None = None
