"""What followed on a signal: read from the files of a run and from SLURM's answers, told as it happens and in the end.

The times are those that the files have, by the clocks of the nodes that wrote them; when a file is looked at decides
only when a person hears of it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher.errors import LauncherError
from launcher.evidence import Exit, Sight, load, read_of_ranks, tail, when
from launcher.rundir import RunDir
from launcher.slurm import cluster

__all__ = [
    *("Aftermath", "Drill", "Event", "Queue"),
    *("events", "newest_attempt", "observe", "ranks"),
]

_PUBLISHED = re.compile(r"step-([0-9]{8,18})", re.ASCII)
_HELD = re.compile(r"JobHeld|.*requeued_held")


@dataclass(frozen=True)
class Drill:
    """What was sent to which start of a run."""

    path: Path
    job: str
    """As a person names it."""
    number: str
    """As SLURM_JOB_ID has it."""
    restart: int
    """How often SLURM had restarted the job."""
    attempt: int
    ranks: int
    newest: int | None
    """The step of the newest checkpoint before."""
    signal: str
    """`preemption`, `limit` or `requeue`."""
    kill_wait: int
    """Seconds from SLURM's first signal to its last."""
    struck: float = 0.0
    """When; seconds since 1970."""
    agents: bool = False
    """Whether agents of accelerate stand between SLURM and the ranks."""


@dataclass(frozen=True)
class Queue:
    """What SLURM says of the job."""

    state: str = ""
    """Empty: SLURM has forgotten it."""
    reason: str = ""
    restarts: int = 0
    submitted: float | None = None
    """When it came into the queue last, in whole seconds."""
    eligible: float | None = None
    """When it may start, at the earliest."""
    expected: float | None = None
    """When SLURM expects it to start."""

    @property
    def ended(self) -> bool:
        """Whether it is over, for good."""
        return not self.state or self.state in cluster.ENDED

    @property
    def waits(self) -> bool:
        """Whether it is in the queue."""
        return self.state in ("PENDING", "REQUEUE_HOLD", "SPECIAL_EXIT")

    @property
    def held(self) -> bool:
        """Whether it stays there until somebody releases it."""
        return self.waits and (self.state != "PENDING" or _HELD.match(self.reason) is not None)


@dataclass(frozen=True)
class Aftermath:
    """What is known so far; None and empty: it has not happened, or nobody has written it down."""

    seen: Mapping[int, Sight] = field(default_factory=dict)
    """By rank."""
    saving: int | None = None
    """The step that was being saved when this was looked at last."""
    checkpoint: tuple[int, float, Path] | None = None
    """The one that the ranks saved before they left: its step, when, where."""
    left: Mapping[int, Exit] = field(default_factory=dict)
    failure: str = ""
    """What the first rank to fail said."""
    trained: int | None = None
    """The last step that the start is known to have completed."""
    verdict: tuple[str, str, float] | None = None
    """What job.sh decided: a word, why, when."""
    queue: Queue | None = None
    queued: float | None = None
    """When it was in the queue again."""
    waited: tuple[str, ...] = ()
    """The reasons why it waited, in order."""
    eligible: float | None = None
    """Until when SLURM let it wait at least."""
    began: tuple[tuple[int, float, str], ...] = ()
    """The starts after it: which, when, on which nodes."""
    ended: str = ""
    """How the newest of these ended, as job.sh says."""
    attempt: int | None = None
    """The newest attempt after it."""
    stepped: tuple[int, float] | None = None
    """The first step completed after it, and when."""
    finished: float | None = None
    """When the run finished."""

    @property
    def agreed(self) -> int | None:
        """The step at which all ranks that have left stopped; None where they differ, or nobody says."""
        steps = {exit_.step for exit_ in self.left.values()}
        return steps.pop() if len(steps) == 1 else None

    @property
    def resumed(self) -> int | None:
        """The step that the start after it went on from."""
        return None if self.stepped is None else self.stepped[0] - 1

    @property
    def lost(self) -> int | None:
        """How many steps were trained in vain, at least; None: not known."""
        if self.finished is not None and self.stepped is None:
            return 0
        if self.trained is None or self.resumed is None:
            return None
        lost = max(0, self.trained - self.resumed)
        return lost if lost or self.told else None

    @property
    def told(self) -> bool:
        """Whether a rank has said how far it was: metrics come late, and not of every step."""
        return any(exit_.step is not None for exit_ in self.left.values())

    @property
    def went_on(self) -> bool:
        """Whether there is nothing more to wait for."""
        return self.stepped is not None or self.finished is not None

    @property
    def over(self) -> bool:
        """Whether it will not go on by itself."""
        return self.queue is not None and (self.queue.ended or self.queue.held)


@dataclass(frozen=True)
class Event:
    """Something that has happened."""

    time: float
    text: str


def observe(drill: Drill, before: Aftermath, queue: Queue | None = None) -> Aftermath:
    """What is known now. Files go again (a verdict, an old checkpoint): what was known `before` stays known."""
    root = drill.path / "attempts" / str(drill.attempt)
    _, _, seen, left = read_of_ranks(root)
    seen, left = {**seen, **before.seen}, {**left, **before.left}
    began = _began(drill)
    attempt, stepped, finished = _after(drill)
    verdict = _verdict(drill.path)
    now = replace(
        before,
        seen=seen,
        left=left,
        failure=before.failure or _failure(root),
        queue=queue or before.queue,
        verdict=before.verdict or (None if began else verdict),
        began=began,
        ended=f"{verdict[0]}: {verdict[1]}" if began and verdict is not None else "",
        attempt=attempt,
        stepped=stepped,
        finished=finished or max((e.time for e in left.values() if e.status == "finished"), default=None),
    )
    saving = None if began else _saving(drill)
    now = replace(now, checkpoint=_checkpoint(drill, now), saving=before.saving if saving is None else saving)
    if queue is not None and queue.waits and queue.restarts > drill.restart and not began:
        known = queue.reason in ("", *now.waited)
        waited = now.waited if known else (*now.waited, queue.reason)
        queued, eligible = queue.submitted or now.queued, queue.eligible or now.eligible
        now = replace(now, waited=waited, queued=queued, eligible=eligible)
    return replace(now, trained=_trained(drill, now))


def events(drill: Drill, old: Aftermath, new: Aftermath, at: float) -> list[Event]:
    """What is known in `new` and was not in `old`, by time; `at` is when it was looked at."""
    found = [*_ranks_events(drill, old, new), *_saving_events(old, new, at), *_queue_events(drill, old, new, at)]
    for restart, time, nodes in new.began[len(old.began) :]:
        found.append(Event(time, f"start {restart} begins on {nodes}"))
    if new.attempt is not None and new.attempt != old.attempt:
        found.append(Event(at, f"attempt {new.attempt} has opened the run"))
    if new.stepped is not None and old.stepped is None:
        step, time = new.stepped
        found.append(Event(time, f"step {step} is complete: resumed at step {step - 1}"))
    if new.finished is not None and old.finished is None:
        found.append(Event(new.finished, "the run has finished"))
    return sorted(found, key=lambda event: event.time)


def ranks(numbers: Mapping[int, Any] | list[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    named = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {named}" if len(numbers) == 1 else f"ranks {named}"


def _failure(root: Path) -> str:
    said = load(root / "failed")
    return f"rank {said.get('rank')} on {said.get('host')}: {said.get('error')}" if said else ""


def _verdict(path: Path) -> tuple[str, str, float] | None:
    file = path / "slurm" / "verdict"
    with suppress(OSError):
        word, colon, why = file.read_text(errors="replace").strip().partition(":")
        return (word, why.strip(), file.stat().st_mtime) if colon else None
    return None


def _began(drill: Drill) -> tuple[tuple[int, float, str], ...]:
    found = []
    for name in _names(drill.path / "slurm"):
        match = re.fullmatch(rf"started-{drill.number}-(\d+)", name, re.ASCII)
        if match is None or int(match[1]) <= drill.restart:
            continue
        with suppress(OSError, ValueError):
            file = drill.path / "slurm" / name
            second, _, nodes = file.read_text(errors="replace").strip().partition(" ")
            changed = file.stat().st_mtime  # finer, if nothing has touched the file since
            time = changed if 0 <= changed - int(second) < 2 else float(second)
            found.append((int(match[1]), time, nodes))
    return tuple(sorted(found))


def _after(drill: Drill) -> tuple[int | None, tuple[int, float] | None, float | None]:
    """The newest attempt after the drill; the first step completed in one; when one finished the run."""
    numbers = sorted(int(name) for name in _names(drill.path / "attempts") if name.isdigit())
    later = [number for number in numbers if number > drill.attempt]
    stepped = finished = None
    for number in later:
        root = drill.path / "attempts" / str(number)
        said, exit_ = load(root / "stepped"), load(root / "exit-00000.json")
        step, time = _whole(said.get("step")), when(said.get("time"))
        if stepped is None and step is not None and time is not None:
            stepped = (step, time)
        if exit_.get("status") == "finished":
            finished = when(exit_.get("time"))
    return (later[-1] if later else None), stepped, finished


def _checkpoint(drill: Drill, now: Aftermath) -> tuple[int, float, Path] | None:
    """The checkpoint that the ranks saved before they left.

    Its time is that of its index, which is written last: the directory's own changes when it is verified.
    """
    known = now.checkpoint
    if known is not None and (known[0] == now.agreed or now.began):
        return known
    root = drill.path / "checkpoints"
    steps = {int(match[1]): name for name in _names(root) if (match := _PUBLISHED.fullmatch(name))}
    if now.agreed is None:
        fresh = [step for step in steps if drill.newest is None or step > drill.newest]
        step = max((step for step in fresh if now.resumed is None or step <= now.resumed), default=None)
    else:
        step = now.agreed if now.agreed in steps else None
    with suppress(OSError):
        if step is not None:
            path = root / steps[step]
            return step, (path / "index.json").stat().st_mtime, path
    return known


def _saving(drill: Drill) -> int | None:
    """The step that the drilled attempt is writing a checkpoint of."""
    pattern = re.compile(rf"step-([0-9]{{8,18}})\.partial-{drill.attempt}", re.ASCII)
    steps = [int(match[1]) for name in _names(drill.path / "checkpoints") if (match := pattern.fullmatch(name))]
    return max(steps, default=None)


def _trained(drill: Drill, now: Aftermath) -> int | None:
    stepped = _whole(load(drill.path / "attempts" / str(drill.attempt) / "stepped").get("step"))
    steps = [step for step in (stepped, *(exit_.step for exit_ in now.left.values())) if step is not None]
    for text in tail(drill.path / "metrics.jsonl"):
        with suppress(ValueError, RecursionError):  # torn by a kill
            line = json.loads(text)
            step = _whole(line.get("step")) if isinstance(line, dict) else None
            if step is not None and line.get("attempt") == drill.attempt:
                steps.append(step)
    return max([*steps, *([now.trained] if now.trained is not None else [])], default=None)


def _ranks_events(drill: Drill, old: Aftermath, new: Aftermath) -> Iterator[Event]:
    def grouped(now: Mapping[int, Any], was: Mapping[int, Any], key: Callable[[Any], str]) -> Iterator[Event]:
        groups: dict[str, list[int]] = {}
        for rank in now.keys() - was.keys():
            groups.setdefault(key(now[rank]), []).append(rank)
        for said, members in groups.items():
            verb = "has" if len(members) == 1 else "have"
            time = max(now[rank].time for rank in members)
            yield Event(time, f"{ranks(members)} {verb} {said} ({len(now)} of {drill.ranks})")

    yield from grouped(new.seen, old.seen, lambda sight: f"seen {sight.signal}")
    yield from grouped(new.left, old.left, lambda exit_: f"left: {exit_.status}{_at_step(exit_.step)}")
    if new.failure and not old.failure:
        yield Event(max((exit_.time for exit_ in new.left.values()), default=drill.struck), f"failed: {new.failure}")


def _saving_events(old: Aftermath, new: Aftermath, at: float) -> Iterator[Event]:
    published = new.checkpoint[0] if new.checkpoint is not None else None
    if new.saving is not None and new.saving not in (old.saving, published):
        yield Event(at, f"step {new.saving} is being saved")
    if new.checkpoint is not None and published != (old.checkpoint[0] if old.checkpoint is not None else None):
        _, time, path = new.checkpoint
        yield Event(time, f"checkpoint of step {published}: {path}")


def _queue_events(drill: Drill, old: Aftermath, new: Aftermath, at: float) -> Iterator[Event]:
    if new.verdict is not None and old.verdict is None:
        word, why, time = new.verdict
        yield Event(time, f"job.sh: {word}: {why}")
    before, now = old.queue, new.queue
    if now is None or new.began:
        return
    if now.restarts > drill.restart and (before is None or before.restarts <= drill.restart):
        yield Event(at, f"requeued (restart {now.restarts})")
    for reason in new.waited[len(old.waited) :]:
        until = f", eligible at {datetime.fromtimestamp(new.eligible):%H:%M:%S}" if new.eligible else ""
        yield Event(at, f"waits in the queue: {reason}{until}")
    if now.ended and (before is None or not before.ended):
        yield Event(at, f"SLURM: the job is {now.state.lower() or 'gone'}")


def _at_step(step: int | None) -> str:
    return "" if step is None else f", at step {step}"


def _names(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def newest_attempt(path: Path) -> int:
    """The number of a run's newest start."""
    with suppress(LauncherError):
        return RunDir(path).current_attempt()
    return 0
