"""The checkpoints of a run: a directory of directories, in which a final name means a finished checkpoint.

    step-00001000                a checkpoint
    step-00001000.partial-3      being written by attempt 3, or left over from it
    step-00001000.replaced       the former checkpoint of this step; it counts while the new one has no name yet
    step-00001000.pruned         on its way out

Every change is one rename between these, so a process that is killed at any moment leaves either the old or the new
state, and the rest is cleaned at the next save. Only rank 0 changes anything.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from launcher.checkpoint.files import fsync_directory
from launcher.errors import CheckpointError, UsageError

__all__ = ["Store", "step_name"]

_NAME = re.compile(r"(step-([0-9]{8,18}))(?:\.(replaced|pruned|partial-([0-9]{1,18})))?", re.ASCII)


def step_name(step: int) -> str:
    """The directory name of a step's checkpoint."""
    return f"step-{step:08d}"


class Store:
    """The checkpoints under `root`, of which the last `keep` are kept.

    `attempt_is_current(A)` tells whether attempt A is still the run's latest: an incarnation that was cut off and
    has been replaced must neither publish nor remove anything.

    Raises:
        UsageError: `keep` is no number of checkpoints that keeps any.
    """

    def __init__(
        self, root: Path, keep: int = 2, attempt_is_current: Callable[[int], bool] = lambda attempt: True
    ) -> None:
        if keep < 1:
            raise UsageError(f"--run.keep {keep} would keep no checkpoint: give 1 or more")
        self.root = root
        self.keep = keep
        self._attempt_is_current = attempt_is_current

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        return sorted({step for step, kind, _ in self._entries() if kind in (None, "replaced")})

    def newest(self) -> Path | None:
        """The checkpoint of the latest step, or None where there is none."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is, or will be."""
        final = self.root / step_name(step)
        replaced = _replaced(final)
        return replaced if replaced.is_dir() and not os.path.lexists(final) else final

    def partial(self, step: int, attempt: int) -> Path:
        """Where `attempt` writes the checkpoint of `step`."""
        return self.root / f"{step_name(step)}.partial-{attempt}"

    def begin(self, step: int, attempt: int) -> Path:
        """A new directory to write the checkpoint of `step` into; leftovers of this and older attempts are removed.

        Raises:
            CheckpointError: the attempt is no longer current.
            OSError: it cannot be made.
        """
        self._check_current(attempt)
        self.root.mkdir(parents=True, exist_ok=True)
        fsync_directory(self.root.parent)
        self._clean(attempt)
        partial = self.partial(step, attempt)
        partial.mkdir()
        return partial

    def publish(self, partial: Path, attempt: int) -> Path:
        """Give a complete directory its final name, durably. A former checkpoint of the step goes only after that.

        Raises:
            CheckpointError: the attempt is no longer current.
            OSError: it cannot be renamed; what was there is still there.
        """
        final = self.root / partial.name.partition(".")[0]
        fsync_directory(partial)
        self._check_current(attempt)
        if os.path.lexists(final):
            _discard(_replaced(final))
            final.rename(_replaced(final))
        partial.rename(final)
        fsync_directory(self.root)
        return final

    def prune(self, attempt: int, spare: int | None = None) -> None:
        """Remove all but the last `keep` checkpoints, and leftovers of this and older attempts; never step `spare`.

        Raises:
            CheckpointError: the attempt is no longer current.
        """
        self._check_current(attempt)
        self._clean(attempt)
        for step in self.steps()[: -self.keep]:
            if step != spare:
                _removing(_discard, self.path(step))

    def _clean(self, attempt: int) -> None:
        """Remove what is no checkpoint (but a later attempt's: it may be writing it), and finish a replacement."""
        for step, kind, writer in self._entries():
            final = self.root / step_name(step)
            path = final.with_name(f"{final.name}.{kind}")
            if kind == "replaced" and not os.path.lexists(final):
                path.rename(final)
            elif kind in ("replaced", "pruned"):
                _removing(_discard, path)
            elif writer is not None and writer <= attempt:
                _removing(shutil.rmtree, path)

    def _entries(self) -> list[tuple[int, str | None, int | None]]:
        """The step, the kind (None: final) and the attempt of each directory that is ours."""
        try:
            found = [
                _NAME.fullmatch(entry.name) for entry in os.scandir(self.root) if entry.is_dir(follow_symlinks=False)
            ]
        except FileNotFoundError:
            return []
        matches = [match for match in found if match and match[1] == step_name(int(match[2]))]
        return [(int(m[2]), m[3], int(m[4]) if m[4] else None) for m in matches]

    def _check_current(self, attempt: int) -> None:
        if not self._attempt_is_current(attempt):
            raise CheckpointError(
                f"attempt {attempt} of this run has been replaced by a newer one: it saves nothing more"
            )


def _replaced(final: Path) -> Path:
    return final.with_name(f"{final.name}.replaced")


def _discard(path: Path) -> None:
    """Remove a checkpoint, if there is one, by way of a name that is none: half of it must not look like all of it."""
    pruned = path.with_name(f"{path.name.partition('.')[0]}.pruned")
    if path != pruned and path.is_dir():
        if os.path.lexists(pruned):
            shutil.rmtree(pruned)
        path.rename(pruned)
    if os.path.lexists(pruned):
        shutil.rmtree(pruned)


def _removing(remove: Callable[[Path], object], path: Path) -> None:
    """Remove something; a failure is told and tried again at the next save, since training need not end for it."""
    try:
        remove(path)
    except OSError as error:
        warnings.warn(f"{path} could not be removed: {error.strerror}", stacklevel=4)
