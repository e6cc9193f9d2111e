"""The checkpoints of a run: a directory of directories, in which a final name means a finished checkpoint.

    step-00001000                a checkpoint
    step-00001000.partial-3      being written by attempt 3, or left over from it
    step-00001000.replaced       the former checkpoint of this step; it counts while the new one has no name yet, and
                                 goes when that is verified
    step-00001000.pruned         on its way out
    step-00001000.bad            found damaged; never touched again, a second one of the step is .bad-2

Every change is one rename between these, so a process that is killed at any moment leaves either the old or the new
state, and the rest is cleaned at the next start or save. Only rank 0 changes anything.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from launcher.checkpoint.files import fsync_directory
from launcher.checkpoint.retention import Retention
from launcher.errors import ReplacedError

__all__ = ["VERIFIED", "Store", "step_name"]

VERIFIED = "verified"
"""An empty file beside a checkpoint's own: all of it was read and found whole when that was made."""

_NAME = re.compile(r"(step-([0-9]{8,18}))(?:\.(replaced|pruned|bad(?:-[0-9]{1,18})?|partial-([0-9]{1,18})))?", re.ASCII)


def step_name(step: int) -> str:
    """The directory name of a step's checkpoint."""
    return f"step-{step:08d}"


class Store:
    """The checkpoints under `root`, of which those stay that `retention` keeps.

    `attempt_is_current(A)` tells whether attempt A is still the run's latest: an incarnation that was cut off and
    has been replaced must neither publish nor remove anything. `scores()` are the values, by step, of the metric that
    `retention.best` names.
    """

    def __init__(
        self,
        root: Path,
        retention: Retention | None = None,
        attempt_is_current: Callable[[int], bool] = lambda attempt: True,
        scores: Callable[[], Mapping[int, float]] = dict,
    ) -> None:
        self.root = root
        self.retention = retention or Retention()
        self._attempt_is_current = attempt_is_current
        self._scores = scores

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        return sorted({step for step, kind, _ in self.entries() if kind in (None, "replaced")})

    def bad(self) -> list[Path]:
        """What was set aside as damaged, in order."""
        found = [(step, kind) for step, kind, _ in self.entries() if kind is not None and kind.startswith("bad")]
        return [self.root / f"{step_name(step)}.{kind}" for step, kind in sorted(found)]

    def entries(self) -> list[tuple[int, str | None, int | None]]:
        """The step, the kind (None: final) and the attempt of each directory that is ours."""
        try:
            found = [
                _NAME.fullmatch(entry.name) for entry in os.scandir(self.root) if entry.is_dir(follow_symlinks=False)
            ]
        except FileNotFoundError:
            return []
        matches = [match for match in found if match and match[1] == step_name(int(match[2]))]
        return [(int(m[2]), m[3], int(m[4]) if m[4] else None) for m in matches]

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
            ReplacedError: the attempt is no longer current.
            OSError: it cannot be made.
        """
        self.check_current(attempt)
        self.root.mkdir(parents=True, exist_ok=True)
        fsync_directory(self.root.parent)
        self._clean(attempt)
        partial = self.partial(step, attempt)
        partial.mkdir()
        return partial

    def set_aside(self, path: Path) -> Path:
        """Rename a damaged checkpoint, so that nothing takes it for one or writes over it; its new path.

        Raises:
            OSError: it cannot be renamed.
        """
        base = self.root / f"{path.name.partition('.')[0]}.bad"
        names = itertools.chain([base], (base.with_name(f"{base.name}-{k}") for k in itertools.count(2)))
        aside = next(name for name in names if not os.path.lexists(name))
        path.rename(aside)
        fsync_directory(self.root)
        return aside

    def mark_verified(self, path: Path) -> None:
        """Leave a note that a checkpoint was read and found whole; where that cannot be written, there is none."""
        with suppress(OSError):
            (path / VERIFIED).touch()

    def publish(self, partial: Path, attempt: int) -> Path:
        """Give a complete directory its final name, durably. A former checkpoint of the step goes only after that.

        Raises:
            ReplacedError: the attempt is no longer current.
            OSError: it cannot be renamed; what was there is still there.
        """
        final = self.root / partial.name.partition(".")[0]
        fsync_directory(partial)
        self.check_current(attempt)
        former = os.path.lexists(final)
        if former:
            _discard(_replaced(final))
            final.rename(_replaced(final))
        try:
            partial.rename(final)
        except OSError:  # a newer attempt has removed it: what was there must stay
            if former:
                _replaced(final).rename(final)
            raise
        fsync_directory(self.root)
        return final

    def clean(self, attempt: int) -> None:
        """Remove what killed saves and prunes have left behind, but for a newer attempt's.

        Raises:
            ReplacedError: the attempt is no longer current.
        """
        self.check_current(attempt)
        self._clean(attempt)

    def prune(self, attempt: int, spare: int | None = None) -> None:
        """Remove what `retention` does not keep, and leftovers of this and older attempts; never step `spare`.

        Raises:
            ReplacedError: the attempt is no longer current.
        """
        self.clean(attempt)
        for step in self.surplus():
            if step != spare:
                self.remove(step)

    def surplus(self) -> list[int]:
        """The steps whose checkpoints `retention` does not keep."""
        steps, best = self.steps(), self.retention.best
        values = self._scores() if best else {}
        kept = self.retention.kept(steps, values)
        if best and len(kept) < len(steps) and values.keys().isdisjoint(steps):
            warnings.warn(
                f"no step of the checkpoints has a {best.metric}, so the best is not known and not kept: log it for "
                "the steps that are saved",
                stacklevel=2,
            )
        return [step for step in steps if step not in kept]

    def remove(self, step: int) -> None:
        """Remove a checkpoint; a failure is told and tried again at the next save."""
        _removing(_replaced(self.root / step_name(step)))
        _removing(self.root / step_name(step))

    def _clean(self, attempt: int) -> None:
        """Remove what is no checkpoint (but a later attempt's: it may be writing it), and finish a replacement."""
        for step, kind, writer in self.entries():
            final = self.root / step_name(step)
            path = final.with_name(f"{final.name}.{kind}")
            if kind == "replaced" and not os.path.lexists(final):
                path.rename(final)
                continue
            if kind == "replaced":
                over = (final / VERIFIED).exists()
            else:
                over = kind == "pruned" or (writer is not None and writer <= attempt)
            if over:
                _removing(path)

    def check_current(self, attempt: int) -> None:
        """Look whether an attempt may still change anything.

        Raises:
            ReplacedError: a newer one has begun.
        """
        if not self._attempt_is_current(attempt):
            raise ReplacedError(
                f"attempt {attempt} of this run has been replaced by a newer one: it saves nothing more"
            )


def _replaced(final: Path) -> Path:
    return final.with_name(f"{final.name}.replaced")


def _discard(path: Path) -> None:
    """Remove a directory, if it is there, by way of a name that is none: half of it must not look like all of it.

    A partial one may have a writer that is still alive, cut off and about to publish it: its rename then finds
    nothing, or comes first and publishes all of it.
    """
    pruned = path.with_name(f"{path.name.partition('.')[0]}.pruned")
    if path != pruned and path.is_dir():
        if os.path.lexists(pruned):
            shutil.rmtree(pruned)
        with suppress(FileNotFoundError):
            path.rename(pruned)
    if os.path.lexists(pruned):
        shutil.rmtree(pruned)


def _removing(path: Path) -> None:
    """Remove something; a failure is told and tried again at the next save, since training need not end for it."""
    try:
        _discard(path)
    except OSError as error:
        warnings.warn(f"{path} could not be removed: {error.strerror}", stacklevel=4)
