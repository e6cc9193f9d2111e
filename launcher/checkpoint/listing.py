"""What checkpoints there are, and which of them a person means by a path; nothing but indices is read."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from launcher.checkpoint.index import INDEX, Index, read_index
from launcher.checkpoint.store import VERIFIED, Store, step_name
from launcher.errors import CheckpointError, UsageError

__all__ = ["CHECKPOINTS", "Row", "checkpoints", "is_checkpoint", "one_checkpoint", "root_of", "row", "rows"]

CHECKPOINTS = "checkpoints"
"""What the directory of a run's checkpoints is called."""

_OURS = re.compile(r"step-[0-9]{8,18}(\..+)?", re.ASCII)


@dataclass(frozen=True)
class Row:
    """One directory that is a checkpoint, or was to be one."""

    path: Path
    kind: str
    """Empty for a checkpoint, else what its name says: `partial-3`, `bad`, `replaced`, `pruned`."""
    step: int
    size: int
    """Bytes that its files take."""
    changed: float
    """When the directory was last written to, in seconds since 1970."""
    index: Index | None
    """None where it cannot be read, or there need not be one."""
    fault: str = ""
    """Why the index of a checkpoint cannot be read."""
    verified: float | None = None
    """When all of it was last read and found whole, in seconds since 1970."""


def rows(root: Path) -> list[Row]:
    """All that is in a directory of checkpoints, in step order.

    Raises:
        OSError: it cannot be read.
    """
    found = sorted((step, kind or "") for step, kind, _ in Store(root).entries())
    return [row(root / (f"{step_name(step)}.{kind}" if kind else step_name(step)), kind, step) for step, kind in found]


def row(path: Path, kind: str = "", step: int | None = None) -> Row:
    """What can be said of one directory without reading its tensors; `step` is its name's, by default its index's."""
    index, fault = None, ""
    if not kind.startswith(("partial", "pruned")):  # these may have half an index, or none yet
        try:
            index = read_index(path)
        except CheckpointError as error:
            fault = str(error)
    try:
        changed = path.stat().st_mtime
    except OSError:  # it has just been renamed or removed
        changed = 0.0
    if step is None:
        step = index.step if index else 0
    return Row(path, kind, step, _size(path), changed, index, fault, _verified(path))


def checkpoints(path: Path) -> list[Path]:
    """The checkpoint at `path`, or those of the run there, in step order.

    Raises:
        UsageError: it is neither.
        CheckpointError: there is none.
    """
    if is_checkpoint(path):
        return [path]
    store = Store(root_of(path))
    if not (steps := store.steps()):
        raise CheckpointError(f"{path} has no checkpoint yet")
    return [store.path(step) for step in steps]


def one_checkpoint(path: Path) -> Path:
    """The checkpoint at `path`, or the newest of the run there.

    Raises:
        UsageError: it is neither.
        CheckpointError: there is none.
    """
    return checkpoints(path)[-1]


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a checkpoint, or by its name was to be one: what is wrong with it is told later."""
    return path.is_dir() and (os.path.lexists(path / INDEX) or _OURS.fullmatch(path.name) is not None)


def root_of(path: Path) -> Path:
    """The directory of checkpoints that a person means: of a run, or itself. It may be missing: then there are none.

    Raises:
        UsageError: there is no such thing.
    """
    if not path.is_dir():
        raise UsageError(f"{path}: {'is no directory' if os.path.lexists(path) else 'there is no such directory'}")
    if (path / CHECKPOINTS).is_dir() or (path / "run.json").is_file():
        return path / CHECKPOINTS
    if path.name == CHECKPOINTS or Store(path).entries():
        return path
    raise UsageError(f"{path} is neither a run (it has no {CHECKPOINTS}/) nor a checkpoint (it has no {INDEX})")


def _verified(path: Path) -> float | None:
    try:
        return os.lstat(path / VERIFIED).st_mtime
    except OSError:
        return None


def _size(path: Path) -> int:
    """Bytes of the files in a directory; of one that vanishes meanwhile, less."""
    size = 0
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                size += entry.stat(follow_symlinks=False).st_size
    except OSError:
        return size
    return size
