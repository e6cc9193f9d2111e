"""Saving in the background: training waits for a copy of the state, not for the disk.

One save at a time. A thread writes, over a group of its own: on the training's group two threads of a rank would issue
collectives in another order than its peers do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from launcher.checkpoint.buffer import Buffer
from launcher.checkpoint.index import Json
from launcher.checkpoint.saving import Snapshot, Stager, node_files, write
from launcher.checkpoint.state import State
from launcher.checkpoint.store import Store, step_name
from launcher.errors import CheckpointError, ReplacedError
from launcher.world import World

__all__ = ["Outcome", "Writer"]


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same on all ranks."""

    step: int
    path: Path | None
    error: str | None
    """Why there is no checkpoint, in a line."""
    blocked: float
    """Seconds for which this rank's training waited."""
    seconds: float
    """Seconds from the start until the checkpoint was durable and verified, and older ones pruned."""
    broken: bool = False
    """Whether this rank alone has ended like this."""
    replaced: bool = False
    """Whether that is because a newer start of the run has taken over."""


@dataclass(frozen=True)
class _Job:
    step: int
    take: Callable[[], Snapshot]
    before: Callable[[], None]
    tell: Callable[[Outcome], None]
    begun: float
    blocked: float
    world: World


class Writer:
    """Writes the checkpoints of one attempt at a run; all its methods are called by all ranks together."""

    def __init__(self, store: Store, world: World, *, attempt: int) -> None:
        self.outcome: Outcome | None = None
        """Of the save that ended last."""
        self._store, self._attempt = store, attempt
        self._stager, self._files = Stager(world), node_files(world)
        self._world = world.another()
        self._inline = False
        self._job: _Job | None = None
        self._thread: threading.Thread | None = None

    @property
    def buffer(self) -> Buffer:
        """The host memory that snapshots go through; a load may use it while nothing is being written."""
        return self._stager.buffer

    @property
    def busy(self) -> bool:
        """Whether this rank is writing."""
        return self._job is not None

    @property
    def broken(self) -> bool:
        """Whether this rank's thread ended in a way that its peers cannot know of: then call `fall_back` on all."""
        return not self._inline and self.outcome is not None and self.outcome.broken

    def prepare(self, state: State, *, warm: bool) -> None:
        """Find out whether such a state can be saved, and make the memory for its saves warm, beside training.

        Memory that is being written from is left alone: it is warm.

        Raises:
            CheckpointError: it cannot be.
        """
        touch = self._stager.prepare(state)
        if warm and not self._inline and not self.busy:
            self._thread = threading.Thread(target=self._on_device, args=(touch,), name="launcher-warm", daemon=True)
            self._thread.start()

    def start(
        self,
        step: int,
        state: State,
        *,
        facts: Mapping[str, Json] | None = None,
        before: Callable[[], None] = lambda: None,
        tell: Callable[[Outcome], None] = lambda outcome: None,
    ) -> None:
        """Copy the state and return; a thread writes it. No rank may be writing.

        Args:
            step: the completed steps.
            state: what to save; free to change on return.
            facts: what else the index is to say.
            before: called on rank 0, in the thread, before the checkpoint is published.
            tell: called on every rank, in the thread, when the save has ended, before `busy` says so.
        """
        assert not self.busy
        self.wait()
        begun = time.monotonic()
        take = _taken(lambda: self._stager.take(step, state, attempt=self._attempt, facts=facts))
        self._job = job = _Job(step, take, before, tell, begun, time.monotonic() - begun, self._world)
        if self._inline:
            self._run(job)
        else:
            write_it = partial(self._on_device, partial(self._run, job))
            self._thread = threading.Thread(target=write_it, name="launcher-writer", daemon=True)
            self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until this rank writes nothing, for `timeout` seconds at most; whether that is so."""
        if self._thread is not None:
            self._thread.join(timeout)
        return not self.busy

    def fall_back(self, world: World) -> None:
        """Give up on the thread: a save in progress is lost, and from now on a save is written before `start` returns.

        `world`'s group may be the training's, since the saves now take their turn with it.
        """
        self._inline, self._world = True, world
        self._job = self._thread = None
        self._stager = Stager(world)  # a thread that hangs still has the old buffer

    def _on_device(self, work: Callable[[], None]) -> None:
        """In a new thread, whose current GPU is the first: on this rank's."""
        if self._world.device.type == "cuda":
            torch.cuda.set_device(self._world.device)
        work()

    def _run(self, job: _Job) -> None:
        path: Path | None = None
        error: str | None = None
        broken = replaced = False
        try:
            path = write(self._store, job.world, self._files, job.step, job.take, job.before)
        except CheckpointError as failure:
            error, replaced = str(failure), isinstance(failure, ReplacedError)
        except BaseException as failure:
            if self._inline:  # the loop's own failure, which its peers see when this rank ends
                raise
            error = f"{step_name(job.step)} could not be saved: {type(failure).__name__}: {failure}"
            broken = True  # its peers may be waiting for it
        if self._job is not job:
            return
        outcome = Outcome(job.step, path, error, job.blocked, time.monotonic() - job.begun, broken, replaced)
        try:
            job.tell(outcome)
        finally:
            self.outcome, self._job = outcome, None


def _taken(take: Callable[[], Snapshot]) -> Callable[[], Snapshot]:
    """Take it now; the result, or the error, is had by calling what this returns."""
    try:
        snapshot = take()
    except Exception as error:
        failure = error

        def fail() -> Snapshot:
            raise failure

        return fail
    return lambda: snapshot
