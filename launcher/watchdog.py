"""Finds out that a run makes no progress, writes down where every rank stands, and ends it.

The training loop says that it is alive by counting (`Pulse`); a thread of each rank looks at the count now and then.
What it counts as standing still is time in which it could run itself: a job that was suspended as a whole has not hung.
"""

from __future__ import annotations

import faulthandler
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Any, Literal

from launcher.clock import Clock
from launcher.errors import LauncherError
from launcher.flight import collectives
from launcher.hang import Judgement, Standing, judge
from launcher.stacks import Place, data_wait, dump, main_stack, places, read_places, worker_stack

if TYPE_CHECKING:
    from launcher.run import Run
    from launcher.rundir import RunDir

__all__ = ["Idle", "Phase", "Pulse", "Watchdog", "limit"]

Phase = Literal["start", "restore", "first step", "step", "scoring", "evaluation", "save", "end"]
"""`scoring` is inside `run.average`, which counts micro-batches; `evaluation` a recipe's own, which counts nothing."""

STEP = 600.0  # seconds, as NCCL's own time-out: what lives under torch's defaults is never called a hang
LONG = 1800.0  # of what moves much data, or is the recipe's own beside the steps
FIRST = 3600.0  # of the first step, which compiles
TIMES = 10  # a step this much longer than the longest seen is none any more
GATHER = 5.0  # seconds for the other ranks to say where they stand, once they have looked
LOOK = 5.0  # seconds between two looks at most


class Pulse:
    """What the main thread does, as the watchdog sees it: a phase, and a count that grows while there is progress."""

    def __init__(self) -> None:
        self.phase: Phase = "start"
        self.beats = 0

    def enter(self, phase: Phase) -> None:
        """Progress: something else begins."""
        self.phase = phase
        self.beats += 1

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Progress at both ends; the phase before goes on afterwards."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)


class Idle:
    """Seconds without a beat. Of the time between two looks, no more than twice `every` seconds counts."""

    def __init__(self, every: float, now: float) -> None:
        self._every, self._before = every, now
        self._beats = -1
        self.seconds = 0.0

    def look(self, beats: int, now: float) -> float:
        """The seconds without progress, at a look that finds so many beats."""
        passed, self._before = min(now - self._before, 2 * self._every), now
        self.seconds = self.seconds + passed if beats == self._beats else 0.0
        self._beats = beats
        return self.seconds


def limit(phase: Phase, hang_after: float | Literal["auto", "off"], clock: Clock, *, compiled: bool) -> float:
    """Seconds without progress in a phase from which on it is a hang; infinite where it is none of the launcher's.

    Seconds that a person gives hold for a step and for a micro-batch of `run.average`, and ten times as many for
    whatever may take long once. Else the limit is generous, and longer where the run's own steps, evaluations or saves
    take long.
    """
    if phase == "start" or hang_after == "off":
        return math.inf
    usual = phase in ("step", "scoring")
    if hang_after != "auto":
        return hang_after if usual else TIMES * hang_after
    floor = FIRST if phase == "first step" else LONG if compiled or not usual else STEP
    seen = {"evaluation": clock.evaluation_seconds, "save": clock.save_seconds or 0.0, "end": clock.save_seconds or 0.0}
    return max(floor, TIMES * seen.get(phase, clock.step_seconds))


class Watchdog:
    """Watches one rank from a thread of its own, until it is stopped."""

    def __init__(self, run: Run, rundir: RunDir, attempt: int, leave: Callable[[Judgement], None]) -> None:
        """`leave` is called, in the watching thread, with what is to be told of a hang; it ends the process."""
        self._run, self._rundir, self._attempt, self._leave = run, rundir, attempt, leave
        self._stopped = threading.Event()
        self._stacks: IO[str] | None = None
        self._thread: threading.Thread | None = None
        hang_after = run.config.hang_after
        if hang_after == "off" or (hang_after == "auto" and run.world_size == 1):
            return  # a person may sit at a breakpoint, and hinders nobody
        self.every = LOOK if hang_after == "auto" else min(LOOK, hang_after / 20)
        self._thread = threading.Thread(target=self._watch, name="launcher-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """What comes now is not watched any more."""
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)  # it may be about to leave

    def _watch(self) -> None:
        idle, hung = Idle(self.every, time.monotonic()), False
        while not self._stopped.wait(self.every):
            seconds, most = idle.look(self._run.pulse.beats, time.monotonic()), self._limit()
            self._backstop(most)
            # a long listing on a shared disk: only for who may be part of a hang that another rank has found
            if seconds > most or (seconds > min(most, STEP) / 2 and self._rundir.hanging(self._attempt)):
                hung = True
                self._hung(seconds)
                break
        self._backstop(math.inf)
        if self._stacks is not None:
            self._stacks.close()
            if not hung:
                with suppress(OSError):
                    os.unlink(self._path("stacks"))

    def _limit(self) -> float:
        run = self._run
        return limit(run.pulse.phase, run.config.hang_after, run.clock, compiled=run.config.compile != "off")

    def _backstop(self, seconds: float) -> None:
        """Have the stacks written if this thread cannot run for so long: native code holds Python's lock then."""
        if math.isinf(seconds):
            if self._stacks is not None:
                faulthandler.cancel_dump_traceback_later()
            return
        with suppress(OSError):
            if self._stacks is None:
                self._stacks = open(self._path("stacks"), "w", encoding="utf-8")  # noqa: SIM115 - for as long as it watches
            self._forget()
            faulthandler.dump_traceback_later(max(seconds - self.every, self.every), file=self._stacks)

    def _forget(self) -> None:
        """Stacks were written, and yet this thread runs: the lock was held for long, and is not any more."""
        assert self._stacks is not None
        fd = self._stacks.fileno()
        if os.fstat(fd).st_size:
            faulthandler.cancel_dump_traceback_later()
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)

    def _hung(self, seconds: float) -> None:
        """Say where this rank stands, wait for the others to, and leave with what that shows."""
        self._backstop(math.inf)
        run, mine = self._run, self._standing(seconds)
        with suppress(LauncherError):  # a full disk: then this rank has its own words alone
            self._rundir.record_hang(self._attempt, run.rank, mine)
        self._until(lambda: len(self._rundir.hanging(self._attempt)) == run.world_size)
        if run.rank != min(self._rundir.hanging(self._attempt), default=run.rank):  # one reads what all have written
            self._until(lambda: self._rundir.failure(self._attempt) is not None)
        if not self._stopped.is_set():
            found = self._rundir.hangs(self._attempt) if self._rundir.failure(self._attempt) is None else {}
            self._leave(self._judge({**found, run.rank: mine}))

    def _until(self, happened: Callable[[], bool]) -> None:
        """Wait for what the other ranks do, as long as one that lives can take to see a file and to write its own."""
        deadline = time.monotonic() + self.every + GATHER
        while not happened() and time.monotonic() < deadline and not self._stopped.is_set():
            time.sleep(0.1)

    def _standing(self, seconds: float) -> dict[str, Any]:
        """What attempts/A/hang-R.json holds."""
        run, frames = self._run, main_stack()
        own, inner = places(frames)
        waits = data_wait(frames)
        data = None
        if waits is not None:
            stack = worker_stack(waits.worker) if waits.worker is not None else ""
            at = next(filter(None, read_places(stack)), stack.strip() or None)
            data = {"loader": waits.loader, "worker": waits.worker, "worker_at": at and str(at), "worker_stack": stack}
        try:
            stack = dump(self._path("stacks"))
        except OSError:
            stack = ""
        return {
            **{"rank": run.rank, "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(), "pid": os.getpid()},
            **{"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "step": run.completed},
            **{"phase": run.pulse.phase, "seconds": round(seconds, 1)},
            "where": {"own": _place(own), "inner": _place(inner)},
            **{"data": data, "collectives": collectives(), "stack": stack},
        }

    def _judge(self, found: dict[int, dict[str, Any]]) -> Judgement:
        standings = {}
        for rank, facts in found.items():
            with suppress(TypeError, ValueError, KeyError):
                standings[rank] = Standing.read(facts)
        world = self._run.world
        stacks = {}
        for rank in set(range(world.world_size)) - set(standings):
            with suppress(OSError):
                stacks[rank] = self._path("stacks", rank).read_text(errors="replace")
        return judge(standings, world.world_size, hosts=world.hosts, stacks=stacks)

    def _path(self, name: str, rank: int | None = None) -> Any:
        rank = self._run.rank if rank is None else rank
        return self._rundir.path / "attempts" / str(self._attempt) / f"{name}-{rank:05d}.txt"


def _place(place: Place | None) -> dict[str, Any] | None:
    return None if place is None else dict(vars(place))
