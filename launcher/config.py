"""The options of a run: the recipe's own at the top level, the launcher's under ``--run.*``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["RunConfig"]


@dataclass(frozen=True)
class RunConfig:
    """How the launcher runs a recipe; what it learns is the recipe's own config."""

    dir: str | None = None
    """Run directory; with one that holds a run, the run goes on. Unset: a fresh one under runs/."""
    name: str | None = None
    """What a fresh run directory is called; unset: the recipe's file name."""
    seed: int = 0
    """Fixes the initial weights, the data order and every random draw."""
    precision: Literal["no", "bf16", "fp16"] | None = None
    """Mixed precision; unset: what `accelerate launch` said, else no."""
    tf32: bool = True
    """Let fp32 matrix products on a GPU use TF32."""
    compile: Literal["off", "default", "reduce-overhead", "max-autotune"] | None = None
    """torch.compile mode; unset: what `accelerate launch` said, else off."""
    compile_scope: Literal["model", "block"] = "model"
    """Compile the model whole, or each of its repeated blocks (a faster start)."""
    shard: Literal["none", "full", "hybrid"] | None = None
    """FSDP2: over all ranks, or within a node and replicated between nodes; unset: as accelerate said."""
    activation_checkpointing: bool = False
    """Recompute each repeated block in the backward pass instead of keeping its activations."""
    sync: Literal["last", "every"] = "last"
    """Reduce gradients on the last micro-batch of a step, or on every one (less memory when sharded)."""
    save_every: int = 0
    """Steps between checkpoints; 0: only at the end, and when stopped."""
    keep: int = 2
    """Checkpoints kept; older ones go once a newer one is published."""
    log_every: int = 10
    """Steps between metrics lines."""
    workers: int = 0
    """Data worker processes a rank; they cannot change the data."""
    threads: int | None = None
    """CPU threads a rank; unset: OMP_NUM_THREADS if you set it, else this machine's cores shared out."""
    deterministic: bool = False
    """Only deterministic kernels, so that losses repeat bit for bit on a GPU."""
    resume: str = "auto"
    """auto: go on from the run's newest checkpoint; never: refuse a run that has one; or a checkpoint's path."""
    init_from: str | None = None
    """A checkpoint whose weights (alone) to start from."""
    allow: tuple[str, ...] = ()
    """Changes to accept on resume, by option name (`lr`, `run.precision`), or `world` for batch-coupled models."""
    tracker: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also send metrics to these trackers, through Accelerate."""
