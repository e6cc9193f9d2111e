"""`launcher cancel`: a run ends for good, with a checkpoint where it trains; nothing requeues it.

The marker RUN/slurm/cancelled comes first: the batch script and the ranks look at it when a signal ends them. What runs
is then signalled step by step, not ended as a job: SLURM would give it only KillWait (30 s) to save.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from launcher.errors import LauncherError
from launcher.parser import Parser
from launcher.rundir import RunDir
from launcher.show import printable
from launcher.slurm import cluster, record
from launcher.slurm.facts import Facts, gather, near
from launcher.slurm.standing import WAITING, Heard, judge

__all__ = ["main"]

# The job ended by itself meanwhile; scancel keeps quiet about ESLURM_ALREADY_DONE (2021, of which 229 is left).
ENDED = ("Invalid job id specified", "already completing or completed", "step not running", "exit code 229")


@dataclass
class Target:
    """A run that is to end, with its jobs that wait or run."""

    facts: Facts
    jobs: list[cluster.Job] = field(default_factory=list)

    @property
    def marker(self) -> Path:
        """What tells the batch script and the ranks."""
        return self.facts.path / "slurm" / "cancelled"

    @property
    def is_over(self) -> bool:
        """Whether the run has finished, and its job only ends."""
        return self.facts.status == "finished" and not any(job.state in WAITING for job in self.jobs)

    @property
    def is_told(self) -> bool:
        """Whether its ranks have been told before: a second signal would make them leave without a save."""
        attempt = self.facts.path / "attempts" / str(self.facts.attempt)
        return self.facts.cancelled and any(attempt.glob("signal-*.json"))


def main(argv: Sequence[str]) -> int:
    """`launcher cancel RUN|JOB|SWEEP ...`; the exit code."""
    parser = Parser(
        prog="launcher cancel",
        usage="launcher cancel [--now] RUN|JOB|SWEEP ...",
        description="End runs for good: a run that trains saves first, and nothing requeues it.",
    )
    parser.add_argument("targets", metavar="RUN|JOB|SWEEP", nargs="+", help="run directories, sweeps', or jobs' ids")
    parser.add_argument(
        "--now", action="store_true", help="leave it only SLURM's KillWait (30 s by default) to save in"
    )
    options = parser.parse_args(list(argv))
    worst = 0
    for target in dict.fromkeys(options.targets):
        try:
            _cancel(target, now=options.now)
        except LauncherError as error:
            print(f"launcher: {printable(str(error))}", file=sys.stderr)
            worst = max(worst, error.exit_code)
    return worst


def _cancel(text: str, *, now: bool) -> None:
    """Cancel what a person has named.

    Raises:
        LauncherError: there is nothing to cancel, or SLURM refuses.
    """
    path = record.find(text)
    if record.is_sweep(path):
        targets = _of_sweep(path)
        if not targets:
            raise LauncherError(f"{text}: nothing to cancel: none of its runs has a job that waits or runs")
    else:
        facts = gather(path)
        targets = [Target(facts, _active(facts))]
        if not targets[0].jobs or targets[0].is_over:
            _without_job(text, facts, now=now)
            return
    made = [target for target in targets if _mark(target)]
    try:
        said = _end(targets, whole=record.is_sweep(path), now=now)
    except LauncherError:
        for target in made:
            target.marker.unlink(missing_ok=True)
        raise
    for target, line in zip(targets, said, strict=True):
        print(printable(f"{near(target.facts.path)}: {line}"))


def _of_sweep(path: Path) -> list[Target]:
    """The runs of a sweep that have a job."""
    arrays = [one.job for one in record.submissions(path)]
    found: dict[str, list[cluster.Job]] = {}
    for job in cluster.jobs(*arrays) if arrays else []:
        task = job.id.partition("_")[2]
        if job.active and task.isdigit():
            found.setdefault(f"{int(task):05d}", []).append(job)
    targets = [Target(gather(path / name), jobs) for name, jobs in sorted(found.items()) if (path / name).is_dir()]
    return [target for target in targets if not target.is_over]


def _active(facts: Facts) -> list[cluster.Job]:
    try:
        found = cluster.jobs(*facts.jobs[-20:]) if facts.jobs else []
        return [job for job in found if job.active and job.id in facts.jobs]
    except LauncherError:
        if facts.is_local:  # it goes on by hand; that it once had jobs, perhaps elsewhere, is no matter
            return []
        raise


def _mark(target: Target) -> bool:
    """Write the marker; False where it was there.

    Raises:
        LauncherError: it cannot be written.
    """
    try:
        target.marker.parent.mkdir(mode=0o700, exist_ok=True)
        with open(target.marker, "x") as file:
            file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} by uid {os.getuid()}\n")
    except FileExistsError:
        return False
    except OSError as error:
        raise LauncherError(f"cannot write {target.marker}: {error.strerror}") from None
    return True


def _end(targets: Sequence[Target], *, whole: bool, now: bool) -> list[str]:
    """End the jobs of the targets; what became of each target.

    Args:
        targets: the runs.
        whole: they are all that is left of a sweep: its array is ended in one call.
        now: do not wait for what runs.

    Raises:
        LauncherError: SLURM refuses.
    """
    jobs = [job for target in targets for job in target.jobs]
    waiting = [job for job in jobs if _waits(job)]
    if now:
        _scancel(_ids(jobs, whole))
        running = [job for job in jobs if not _waits(job)]
        busy = {job.id for job in running}
    else:
        # One that starts at this moment has nothing to save yet. (With a state and a task's id scancel would end all
        # tasks of the array that wait: only a whole array may be told so.)
        if waiting:
            _scancel(_ids(waiting, whole), *(["--state=PENDING"] if whole else []))
        ours = {job.id for job in jobs}
        running = [job for job in cluster.jobs(*_ids(jobs, whole)) if job.id in ours and job.active and not _waits(job)]
        steps = _steps(running)
        if starting := [job.id for job in running if job.id not in steps]:
            _scancel(starting)
        told = {job.id for target in targets for job in target.jobs if target.is_told}
        if new := [step for id_, own in steps.items() for step in own if id_ not in told]:
            _scancel(new, "--signal=TERM")
        busy = set(steps)
    return [_told(target, {job.id for job in running}, busy, now=now) for target in targets]


def _told(target: Target, running: set[str], busy: set[str], *, now: bool) -> str:
    """What became of a run; where nothing of it runs that could say so itself, its status is written here."""
    ids = [job.id for job in target.jobs]
    if not busy & set(ids) and target.facts.status in ("pending", "preempted", "running"):
        with suppress(LauncherError):
            RunDir(target.facts.path).update(status="cancelled")
    told = (
        "has been told before, and saves (--now does not wait)" if target.is_told else "is told to end, and saves first"
    )
    saves = [f"job {id_} {told}" for id_ in ids if id_ in busy and not now]
    killed = [
        f"job {id_} is ended, within SLURM's KillWait" for id_ in ids if id_ in running and (now or id_ not in busy)
    ]
    return "; ".join([*saves, *killed, *(f"job {id_} cancelled" for id_ in ids if id_ not in running)])


def _waits(job: cluster.Job) -> bool:
    """Whether nothing of it runs; COMPLETING, it ends, or is on its way back into the queue."""
    return job.state in WAITING or job.state == "COMPLETING"


def _steps(jobs: Sequence[cluster.Job]) -> dict[str, list[str]]:
    """The steps of jobs, those that have any: before its batch script has started the ranks, a job has none.

    A signal goes to steps by their names. Sent to a running task of an array of which others wait, scancel takes it
    for not delivered, and sends it again every 5 s: the run would take the second for a person who cannot wait.
    """
    if not jobs:
        return {}
    found: dict[str, list[str]] = {}
    for step in cluster.ask(["squeue", "-h", "-s", "-j", ",".join(job.id for job in jobs), "-o", "%i"]).split():
        id_, _, number = step.rpartition(".")
        if number.isdigit():  # others are the batch script's, and SLURM's own
            found.setdefault(id_, []).append(step)
    return {job.id: found[job.id] for job in jobs if job.id in found}


def _scancel(ids: Sequence[str], *options: str) -> None:
    try:
        cluster.ask(["scancel", *options, *ids])
    except LauncherError as error:
        if not any(ended in str(error) for ended in ENDED):
            raise


def _ids(jobs: Sequence[cluster.Job], whole: bool) -> list[str]:
    return list(dict.fromkeys(job.array if whole else job.id for job in jobs))


def _without_job(text: str, facts: Facts, *, now: bool) -> None:
    """End a run that was started by hand.

    Raises:
        LauncherError: there is none, or not here.
    """
    standing, start = judge(facts, Heard()), facts.start
    if not facts.is_local or standing.state != "running" or start is None:
        said = (
            f"it has {facts.status}" if facts.status in ("finished", "failed") else "it has no job, and no process here"
        )
        raise LauncherError(f"{text}: nothing to cancel: {said}")
    if not start.is_here:
        raise LauncherError(
            f"{text} runs on {start.host}, by launcher run: there, kill {start.pid} lets it save and end"
        )
    if not _is_of(facts):
        raise LauncherError(f"{text}: process {start.pid} is none of this run: nothing to cancel")
    target = Target(facts)
    if target.is_told:
        print(printable(f"{near(facts.path)}: process {start.pid} has been told before, and saves"))
        return
    made = _mark(target)
    try:
        os.kill(start.pid, signal.SIGTERM)
    except OSError as error:
        if made:
            target.marker.unlink(missing_ok=True)
        raise LauncherError(f"{text}: cannot signal process {start.pid}: {error.strerror}") from None
    at_once = f" (--now is for jobs: kill -KILL {start.pid} ends it as it is)" if now else ""
    print(printable(f"{near(facts.path)}: process {start.pid} is told to end: it saves first{at_once}"))


def _is_of(facts: Facts) -> bool:
    """Whether the process that started the run still is one of that recipe."""
    if facts.start is None or not facts.start.is_alive() or not facts.command:
        return False
    try:
        words = Path(f"/proc/{facts.start.pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return os.path.basename(os.fsencode(facts.command[0])) in {os.path.basename(word) for word in words}
