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

# The job ended by itself meanwhile.
ENDED = ("Invalid job id specified", "already completing or completed")


@dataclass
class Target:
    """A run that is to end, with its jobs that wait or run."""

    facts: Facts
    jobs: list[cluster.Job] = field(default_factory=list)

    @property
    def marker(self) -> Path:
        """What tells the batch script and the ranks."""
        return self.facts.path / "slurm" / "cancelled"


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
        if not targets[0].jobs:
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
    return [Target(gather(path / name), jobs) for name, jobs in sorted(found.items()) if (path / name).is_dir()]


def _active(facts: Facts) -> list[cluster.Job]:
    try:
        return [job for job in cluster.jobs(*facts.jobs[-20:]) if job.active] if facts.jobs else []
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
        now: what runs is not to be waited for.

    Raises:
        LauncherError: SLURM refuses.
    """
    jobs = [job for target in targets for job in target.jobs]
    waiting = [job for job in jobs if _waits(job)]
    if now:
        _scancel(jobs, whole)
        running, training = [job for job in jobs if not _waits(job)], []
    else:
        if waiting:
            _scancel(waiting, whole, "--state=PENDING")  # one that starts at this moment is among those below
        left = [job for job in cluster.jobs(*{_call_it(job, whole) for job in jobs}) if job.active and not _waits(job)]
        running = [job for job in left if job.id in {one.id for one in jobs}]
        training = _with_ranks(running)
        if starting := [job for job in running if job not in training]:
            _scancel(starting, False)
        if training:
            _scancel(training, whole and training == left, "--signal=TERM")
    return [_told(target, {job.id for job in running}, {job.id for job in training}) for target in targets]


def _told(target: Target, running: set[str], training: set[str]) -> str:
    """What became of a run; one that waited is marked as cancelled, because nothing of it is left to do so."""
    ids = [job.id for job in target.jobs]
    if not running & set(ids) and target.facts.status in ("pending", "preempted", "running"):
        with suppress(LauncherError):
            RunDir(target.facts.path).update(status="cancelled")
    saves = [f"job {id_} is told to end, and saves first" for id_ in ids if id_ in training]
    killed = [f"job {id_} is ended, within SLURM's KillWait" for id_ in ids if id_ in running - training]
    return "; ".join([*saves, *killed, *(f"job {id_} cancelled" for id_ in ids if id_ not in running)])


def _waits(job: cluster.Job) -> bool:
    """Whether nothing of it runs; COMPLETING, it ends, or is on its way back into the queue."""
    return job.state in WAITING or job.state == "COMPLETING"


def _with_ranks(jobs: Sequence[cluster.Job]) -> list[cluster.Job]:
    """Those whose batch script has started the ranks: before that a signal to a job's steps would reach nobody."""
    if not jobs:
        return []
    steps = cluster.ask(["squeue", "-h", "-s", "-j", ",".join(job.id for job in jobs), "-o", "%i"]).split()
    started = {id_ for id_, _, step in (word.rpartition(".") for word in steps) if step.isdigit()}
    return [job for job in jobs if job.id in started]


def _scancel(jobs: Sequence[cluster.Job], whole: bool, *options: str) -> None:
    ids = list(dict.fromkeys(_call_it(job, whole) for job in jobs))
    try:
        cluster.ask(["scancel", *options, *ids])
    except LauncherError as error:
        if not any(ended in str(error) for ended in ENDED):
            raise


def _call_it(job: cluster.Job, whole: bool) -> str:
    return job.array if whole else job.id


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
