"""What an earlier run tells of the next: the size of its checkpoints, the time of its saves and steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.checkpoint.listing import CHECKPOINTS, Row, rows
from launcher.errors import LauncherError
from launcher.rundir import RunDir
from launcher.scores import scores

__all__ = ["Measured", "measure"]

KEEP = 2  # checkpoints, as `--run.keep` has it


@dataclass(frozen=True)
class Measured:
    """What is known of a run; None where nothing is."""

    path: Path | None = None
    keep: int = KEEP
    keep_every: int = 0
    size: int | None = None
    """Bytes of its newest checkpoint."""
    held: int = 0
    """Checkpoints that it has, of those that it keeps."""
    save: float | None = None
    """Seconds of its last save."""
    step: float | None = None
    """Seconds of the slowest of its last steps."""
    world_size: int | None = None

    @property
    def need(self) -> float | None:
        """Seconds that it takes at most to stop with a checkpoint: two saves and two steps, without evaluations."""
        return None if self.save is None else 2 * self.save + 2 * (self.step or 0.0)

    @property
    def stop(self) -> str:
        """What it takes to stop, in words; nothing where it is not known."""
        if self.least is None or self.need is None:
            return ""
        return f"a stop with a save takes {_seconds(self.least)} to {_seconds(self.need)}, evaluations on top"

    @property
    def least(self) -> float | None:
        """Seconds that it takes at least: a save and a step."""
        return None if self.save is None else self.save + (self.step or 0.0)


def measure(path: Path, keep: int | None = None) -> Measured:
    """What the run at `path` tells; `keep` in place of how many checkpoints it keeps.

    Raises:
        LauncherError: its files cannot be read.
    """
    rundir = RunDir(path)
    facts, settings = rundir.read(), (rundir.config() or {}).get("run")
    settings = settings if isinstance(settings, dict) else {}
    kept = keep if keep is not None else int(_number(settings, "keep") or KEEP)
    there = _checkpoints(path)
    steps = [value for _, value in sorted(scores(path / "metrics.jsonl", "step_s").items())][-20:]
    world_size = _number(facts, "world_size")
    return Measured(
        path=path,
        keep=kept,
        keep_every=int(_number(settings, "keep_every") or 0),
        size=there[-1].size if there else None,
        held=min(len(there), kept),
        save=_number(facts, "save_seconds"),
        step=max(steps, default=None),
        world_size=None if world_size is None else int(world_size),
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _checkpoints(path: Path) -> list[Row]:
    try:
        return [row for row in rows(path / CHECKPOINTS) if not row.kind]
    except OSError as error:
        raise LauncherError(f"cannot read {path / CHECKPOINTS}: {error.strerror}") from None


def _number(facts: Mapping[str, Any], key: str) -> float | None:
    value = facts.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 else None
