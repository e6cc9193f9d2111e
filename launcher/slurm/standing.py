"""Where a run stands: what its files say first, what SLURM says of its jobs second, and why."""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher.errors import LauncherError
from launcher.slurm import cluster, record
from launcher.slurm.facts import Facts, gather

__all__ = ["ACTIVE", "Heard", "Standing", "Sweep", "ask", "clock", "judge", "stand", "stand_of_sweep"]

ACTIVE = ("running", "requeued", "pending")
# The one state that tells most of several runs is the first of these that one of them has.
STATES = (*ACTIVE, "lost", "failed", "broken", "preempted", "cancelled", "finished")
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}
# SLURM's words that do not explain themselves.
REASONS = {
    "Priority": "Priority: others come first",
    "Dependency": "Dependency: waits for another job",
    "DependencyNeverSatisfied": "DependencyNeverSatisfied: what it waits for has failed, it will never start",
    "JobHeldUser": "JobHeldUser: held, scontrol release lets it go",
    "JobHeldAdmin": "JobHeldAdmin: held by an administrator",
    "JobArrayTaskLimit": "JobArrayTaskLimit: as many of the array run as may at once",
    "PartitionTimeLimit": "PartitionTimeLimit: it asks for more time than the partition allows",
    "PartitionNodeLimit": "PartitionNodeLimit: it asks for more nodes than the partition allows",
    "PartitionDown": "PartitionDown: the partition starts no jobs",
    "PartitionInactive": "PartitionInactive: the partition takes no jobs",
    "ReqNodeNotAvail": "ReqNodeNotAvail: nodes that it asks for are down, drained or reserved",
    "NodeDown": "NodeDown: a node that it asks for is down",
    "BadConstraints": "BadConstraints: no nodes are as it asks",
    "AssociationJobLimit": "AssociationJobLimit: the account runs as many jobs as it may",
}


@dataclass
class Heard:
    """What SLURM has said of jobs."""

    jobs: Mapping[str, cluster.Job] = field(default_factory=dict)
    """By id."""
    answered: bool = False
    fault: str = ""
    """Why it has not answered; empty where there is no SLURM."""
    _silent: bool = False

    def of(self, id_: str) -> cluster.Job | None:
        """A job that it still knows.

        Tasks of an array that were cancelled while they waited are one entry, the array's.
        """
        array = self.jobs.get(id_.partition("_")[0])
        return self.jobs.get(id_) or (array if array is not None and not array.active else None)

    def ending(self, id_: str) -> str | None:
        """How a job ended, `TIMEOUT` for one, by what it remembers, else by its accounting."""
        if (job := self.of(id_)) is not None:
            return job.state
        if self._silent or not self.answered:
            return None
        begun = time.monotonic()
        found = cluster.accounted(id_)
        self._silent = time.monotonic() - begun > 5  # a database that is down keeps everybody waiting, each time
        return None if found is None else found[0]


@dataclass(frozen=True)
class Standing:
    """A run as a person is to see it."""

    facts: Facts
    state: str
    why: str
    job: cluster.Job | None = None
    """The job that waits or runs."""

    @property
    def job_id(self) -> str | None:
        """The job that waits or runs, else the last one."""
        return self.job.id if self.job is not None else self.facts.jobs[-1] if self.facts.jobs else None

    def seconds_left(self) -> int | None:
        """Of the job's limit."""
        running = self.job is not None and self.job.state not in {*WAITING, "COMPLETING"}
        end = self.job.end if self.job is not None and running and self.job.limit is not None else None
        return None if end is None else max(0, round(end - time.time()))


@dataclass(frozen=True)
class Sweep:
    """A sweep as a person is to see it."""

    path: Path
    points: tuple[Standing, ...]
    options: tuple[Mapping[str, str], ...] = ()
    """Of each point, what differs."""

    @property
    def state(self) -> str:
        """The one that tells most."""
        return min((one.state for one in self.points), key=STATES.index, default="broken")

    @property
    def counts(self) -> dict[str, int]:
        """How many points are in which state."""
        counted = Counter(one.state for one in self.points)
        return {state: counted[state] for state in reversed(STATES) if counted[state]}

    def __str__(self) -> str:
        return ", ".join(f"{number} {state}" for state, number in self.counts.items()) or "no points"


def ask(ids: Collection[str] | None = None, *, mine: bool = False) -> Heard:
    """Ask SLURM once: of these jobs; without them of this user's (`mine`), or of everybody's."""
    if ids is not None and not ids:
        return Heard(answered=True)
    if shutil.which("squeue") is None:
        return Heard()
    try:
        found = cluster.jobs(*dict.fromkeys(id_.partition("_")[0] for id_ in ids or ()), mine=mine)
    except (LauncherError, ValueError) as error:
        return Heard(fault=str(error))
    return Heard({job.id: job for job in found}, answered=True)


def stand(path: Path, heard: Heard) -> Standing:
    """Where the run at `path` stands."""
    return judge(gather(path), heard)


def stand_of_sweep(path: Path, heard: Heard) -> Sweep:
    """Where the runs of the sweep at `path` stand."""
    submitted = [(one, set(one.tasks)) for one in record.submissions(path)]
    named = _sweep_file(path)
    standings, options = [], []
    for point in record.points(path):
        number = int(point.name)
        own = [record.Submission(f"{one.job}_{number}", one.time) for one, tasks in submitted if number in tasks]
        standings.append(judge(gather(point, own), heard))
        said = named.get(point.name)
        options.append({str(k): str(v) for k, v in said.items()} if isinstance(said, dict) else {})
    return Sweep(path, tuple(standings), tuple(options))


def judge(facts: Facts, heard: Heard) -> Standing:
    """Where a run stands, from what its files and SLURM say."""
    found = [job for id_ in facts.jobs if (job := heard.jobs.get(id_)) is not None and job.active]
    job = next((job for job in found if job.state not in WAITING), found[0] if found else None)
    state, why = _judged(facts, job, heard)
    notes = [facts.fault]
    if state == "running":
        loss = facts.progress.loss
        notes.append(f"the last save failed: {facts.not_saved}" if facts.not_saved else "")
        notes.append(f"the loss is {loss}" if loss is not None and not math.isfinite(loss) else "")
    why = "; ".join(filter(None, [*notes, why]))
    return Standing(facts, state, why, job)


def clock(when: float) -> str:
    """A moment as a person says it: `14:05`, or with the day where that is another one."""
    then = datetime.fromtimestamp(when)
    return then.strftime("%H:%M" if then.date() == datetime.now().date() else "%m-%d %H:%M")


def _judged(facts: Facts, job: cluster.Job | None, heard: Heard) -> tuple[str, str]:
    if facts.status == "finished":
        return "finished", ""
    goes_on = job is not None and facts.failure is not None and facts.failure.retry
    if facts.status == "failed" and not goes_on:
        was_to_go_on = facts.failure is not None and facts.failure.retry
        return ("cancelled" if facts.cancelled and was_to_go_on else "failed"), _failed(facts)
    if facts.status == "cancelled":
        return "cancelled", _by_whom(facts)
    if job is not None:
        return _waiting(facts, job) if job.state in WAITING else _running(facts, job)
    if not facts.status and not facts.attempt and not facts.jobs:
        return "broken", "" if facts.fault else "there is no run.json"
    return _local(facts) if facts.is_local else _gone(facts, heard)


def _failed(facts: Facts) -> str:
    verdict = facts.verdict[1] if facts.verdict is not None and facts.verdict[0] == "failed" else ""
    if facts.failure is not None and "starts in a row" not in verdict:
        return str(facts.failure)
    return verdict or facts.reason or "it does not say why"


def _by_whom(facts: Facts) -> str:
    told = facts.verdict[1] if facts.verdict is not None else facts.reason
    return told or ("by launcher cancel" if facts.cancelled else "")


def _waiting(facts: Facts, job: cluster.Job) -> tuple[str, str]:
    """The job waits: for its first start, or for one that goes on."""
    state = "pending" if facts.status in ("pending", "") else "requeued"
    if facts.cancelled:
        return state, "is being cancelled"
    word, comma, rest = job.reason.partition(",")
    why = REASONS.get(word, word) + comma + rest or "SLURM has not looked at it yet"
    if job.state != "PENDING":
        why = f"{job.state}, {why}"
    if job.start is not None and job.start > time.time() - 60:
        why += f", starts about {clock(job.start)}"
    return state, why


def _running(facts: Facts, job: cluster.Job) -> tuple[str, str]:
    if facts.cancelled:
        return "running", "is being cancelled: it saves first"
    if facts.status == "preempted" and (facts.verdict is not None or job.state == "COMPLETING"):
        return "requeued", "on its way back into the queue" if facts.verdict is not None else "its processes end"
    if job.state == "COMPLETING":
        return "running", "SLURM ends its processes"
    if facts.status == "failed":
        return "running", f"starts again after a failure, {facts.failure}"
    if facts.status != "running":
        return "running", "starts again" if facts.status == "preempted" else "starts"
    return "running", "" if job.state == "RUNNING" else f"its job is {job.state}"


def _local(facts: Facts) -> tuple[str, str]:
    """A run that somebody started by hand."""
    start = facts.start
    if facts.status == "preempted":
        return "preempted", facts.reason
    if facts.status == "pending":
        return "pending", "no job was queued for it"
    if start is None or not start.is_here:
        return "running", f"run.json says so{f', on {start.host}' if start else ''}"
    if start.is_alive():
        return "running", "is being cancelled: it saves first" if facts.cancelled else ""
    gone = f"the process is gone ({start.pid} on {start.host})"
    return ("cancelled" if facts.cancelled else "lost"), gone


def _gone(facts: Facts, heard: Heard) -> tuple[str, str]:
    """A run with jobs of which none waits or runs any more."""
    word, text = facts.verdict or ("", "")
    if word in ("finished", "failed", "cancelled"):
        return word, _failed(facts) if word == "failed" else text
    if facts.cancelled:
        return "cancelled", _by_whom(facts)
    if not heard.answered:
        asked = "SLURM does not answer" if heard.fault else "there is no SLURM here to ask"
        said = text if facts.status == "preempted" and text else "run.json says so"
        return facts.status or "pending", f"{said} ({asked})"
    id_ = facts.start.job if facts.start is not None and facts.status != "pending" else ""
    id_ = id_ if id_ in facts.jobs else facts.jobs[-1]
    ending = heard.ending(id_)
    if ending == "CANCELLED":
        reason = "" if (job := heard.of(id_)) is None else job.reason
        late = " before it had saved" if facts.status == "running" else ""
        return "cancelled", REASONS[reason] if reason.startswith("Dependency") else f"by scancel{late}"
    if facts.status == "preempted":
        told = "" if ending in (None, "COMPLETED", "FAILED") else f"the job ended: {ending}"
        return ("lost" if word == "lost" else "preempted"), "; ".join(filter(None, [text or facts.reason, told]))
    array = id_.partition("_")[0]
    if ending is None and facts.status == "pending" and any(key.startswith(f"{array}_") for key in heard.jobs):
        return "cancelled", "by scancel, while it waited"  # SLURM drops such a task while the array's others go on
    if ending is None:
        return "lost", f"SLURM has forgotten the job, run.json says {facts.status or 'nothing'}"
    if facts.status in ("pending", "") and ending in ("COMPLETED", "FAILED"):
        return "failed", f"the job ended before a rank had started: {ending} (launcher logs --job)"
    return "lost", f"{ending}, run.json says {facts.status}" if ending in ("COMPLETED", "FAILED") else ending


def _sweep_file(path: Path) -> Mapping[str, Any]:
    """The options of each point, by its name."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        import json

        points = json.loads((path / "slurm" / "sweep.json").read_bytes())["points"]
        return dict(_numbered(points)) if isinstance(points, list) else dict(points)
    return {}


def _numbered(points: list[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{number:05d}", options) for number, options in enumerate(points))
