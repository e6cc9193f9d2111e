"""Which checkpoints of a run go and which stay, and why, before anything is removed."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.checkpoint.listing import Row, rows
from launcher.checkpoint.retention import Retention
from launcher.checkpoint.store import Store
from launcher.errors import CheckpointError

__all__ = ["Pruning", "carry_out", "choose"]


@dataclass(frozen=True)
class Pruning:
    """What is to be done with each directory."""

    root: Path
    kept: dict[str, str]
    """Names and why."""
    removed: dict[str, Row]
    """Names of what goes."""

    @property
    def nbytes(self) -> int:
        """What the removal gives back."""
        return sum(row.size for row in self.removed.values())


def choose(root: Path, retention: Retention, values: Mapping[int, float], *, bad: bool = False) -> Pruning:
    """What `retention` keeps under `root`; `values` are those of its best metric, by step.

    A checkpoint whose index cannot be read stays and counts for none, and the newest that is known to be whole stays
    in any case: so what is left is never only what is damaged. What is being written, or was left half, stays: the
    run's next start knows which of these it is. With `bad`, what was set aside as damaged goes.

    Raises:
        OSError: the directory cannot be read.
    """
    found = rows(root)
    sound = [row for row in found if not row.kind and row.index is not None]
    stays = _reasons(sound, retention, values)
    kept: dict[str, str] = {}
    removed: dict[str, Row] = {}
    for row in found:
        why = _why_other(row, bad) if row.kind else stays.get(row.step, "") if row.index else f"broken: {row.fault}"
        if why:
            kept[row.path.name] = why
        else:
            removed[row.path.name] = row
    return Pruning(root, kept, removed)


def carry_out(pruning: Pruning) -> None:
    """Remove what was chosen.

    Raises:
        CheckpointError: something is still there.
    """
    store = Store(pruning.root)
    for name, row in pruning.removed.items():
        if row.kind:
            shutil.rmtree(row.path, ignore_errors=True)
            fault = ""
        else:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                store.remove(row.step)
            fault = f": {caught[0].message}" if caught else ""
        if row.path.exists() or fault:
            raise CheckpointError(f"{name} could not be removed{fault}")


def _reasons(sound: list[Row], retention: Retention, values: Mapping[int, float]) -> dict[int, str]:
    """Why each of the steps that stay does."""
    steps = [row.step for row in sound]
    reasons: dict[int, list[str]] = {}
    for step in Retention(retention.last).kept(steps, {}):
        reasons.setdefault(step, []).append(f"of the last {retention.last}" if retention.last > 1 else "the last")
    for step in retention.milestones(steps):
        reasons.setdefault(step, []).append(f"every {retention.every} steps")
    if retention.best is not None:
        best = retention.best.step({step: values[step] for step in steps if step in values})
        if best is not None:
            reasons.setdefault(best, []).append(f"best {retention.best.metric} ({values[best]:.6g})")
    whole = [row.step for row in sound if row.verified is not None]
    if whole and max(whole) not in reasons:
        reasons[max(whole)] = ["the newest that is verified"]
    return {step: ", ".join(said) for step, said in reasons.items()}


def _why_other(row: Row, bad: bool) -> str:
    """Why something that is no checkpoint stays, or nothing where it goes."""
    if row.kind == "pruned" or (bad and row.kind.startswith("bad")):
        return ""
    if row.kind.startswith("bad"):
        return "damaged, set aside (--bad removes it)"
    return "being replaced" if row.kind == "replaced" else "being written, or left by a start that was killed"
