"""`launcher drill`: a running job gets the real signal, and what follows is told as it happens and summed up."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launcher.errors import LauncherError, UsageError
from launcher.evidence import load, newest_checkpoint, when
from launcher.parser import Parser
from launcher.show import print_json, print_table, printable
from launcher.slurm import cluster, record
from launcher.slurm.aftermath import Aftermath, Drill, Event, Queue, events, newest_attempt, observe
from launcher.slurm.debrief import as_dict, judge, lines

__all__ = ["main"]

SIGNALS = {
    "preemption": ("scancel", "--signal=TERM"),
    "limit": ("scancel", "--signal=USR2"),
    "requeue": ("scontrol", "requeue"),
}
WAIT = 900.0  # seconds
KILL_WAIT = 30  # seconds, SLURM's own default
TICK = 0.2  # seconds between looks at the files
ASK = 1.0  # seconds between questions to SLURM
SETTLE = 3.0  # seconds after which a job that has ended is believed to have


def main(argv: Sequence[str]) -> int:
    """`launcher drill RUN|JOB`: 0 where the run went on by itself and lost no step.

    Raises:
        LauncherError: it cannot be drilled; nothing was sent.
    """
    given = _options(argv)
    drill = _aim(given.run, given.signal)
    command = [*SIGNALS[drill.signal], drill.job]
    out = sys.stderr if given.json else sys.stdout
    print(f"launcher drill: {printable(_announced(drill, command))}", file=out, flush=True)
    if given.dry_run:
        if given.json:
            print_json({"run": str(drill.path), "job": drill.job, "signal": drill.signal, "command": command})
        return 0

    def show(event: Event) -> None:
        print(f"{event.time - drill.struck:+8.1f} s  {printable(event.text)}", file=out, flush=True)

    drill = replace(drill, struck=time.time())
    cluster.ask(command)
    show(Event(drill.struck, shlex.join(command)))
    try:
        found, in_time = _watch(drill, given.wait, show)
    except KeyboardInterrupt:
        print("launcher: no longer watched; what was sent takes its course: launcher status", file=sys.stderr)
        return 130
    judgement = judge(drill, found, None if in_time else given.wait)
    report = as_dict(drill, found, judgement)
    if given.json:
        print_json(report)
    else:
        print()
        print_table(("", ""), list(lines(report)))
        print(f"\n{printable(judgement.said)}")
        if judgement.fix:
            print(f"fix: {printable(judgement.fix)}")
        for path in judgement.look:
            print(f"look at {printable(str(path))}")
    return 0 if judgement.good else 1


def _options(argv: Sequence[str]) -> Namespace:
    parser = Parser(
        prog="launcher drill",
        usage="launcher drill [--signal preemption|limit|requeue] [--wait SECONDS] [--dry-run] [--json] RUN|JOB",
        description="Send a running job the signal that SLURM would, and tell what follows until it trains again.",
        epilog="preemption: SIGTERM to the ranks, as with a GraceTime. limit: SIGUSR2 to the ranks, as ahead of the "
        "time limit. requeue: scontrol requeue, SIGTERM to all that is in the job and SIGKILL after KillWait.",
    )
    parser.add_argument("run", metavar="RUN|JOB", help="a run directory, or a job's id")
    parser.add_argument("--signal", choices=list(SIGNALS), default="preemption", help="which (default: preemption)")
    parser.add_argument("--wait", type=float, default=WAIT, metavar="SECONDS", help=f"default: {WAIT:.0f}")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be sent")
    parser.add_argument("--json", action="store_true", help="print the report for scripts; what happens to stderr")
    given = parser.parse_args(list(argv))
    if not (given.wait > 0 and math.isfinite(given.wait)):
        raise UsageError(f"--wait {given.wait:g}: a number of seconds above 0")
    return given


def _aim(text: str, signal: str) -> Drill:
    """The start that is to be drilled.

    Raises:
        UsageError: there is none, or it would not go on.
    """
    path = record.find(text)
    if record.is_sweep(path):
        raise UsageError(f"{text} is a sweep: name one of its runs, {path.name}/00000 or a job's id like 123_0")
    job = _running(path, text)
    said = _said(cluster.ask(["scontrol", "-o", "show", "job", job.id]))
    owner = re.search(r"\((\d+)\)$", said("UserId"))
    if owner is None or int(owner[1]) != os.getuid():
        raise UsageError(f"job {job.id} is {job.user}'s: only the one who submitted it may drill it")
    request = _request(path)
    _refuse_not_requeued(request, job, said("Requeue"), signal)
    restart = _number(said("Restarts"))
    attempt = newest_attempt(path)
    started = load(path / "attempts" / str(attempt) / "started.json")
    _refuse_not_training(path, attempt, started, job, restart)
    wait = re.match(r"\d+", cluster.configuration().get("KillWait", ""))
    world = started.get("world_size")
    return Drill(
        path=path,
        job=job.id,
        number=job.number,
        restart=restart,
        attempt=attempt,
        ranks=world if type(world) is int else 1,
        newest=newest_checkpoint(path),
        signal=signal,
        kill_wait=int(wait[0]) if wait else KILL_WAIT,
        agents=request.get("via") == "accelerate",
    )


def _running(path: Path, text: str) -> cluster.Job:
    submitted = record.submissions(path)
    if not submitted:
        raise UsageError(f"{path} was not submitted: only a run that launcher submit has queued can be drilled")
    jobs = cluster.jobs(*(one.job for one in submitted[-20:]))
    if not Path(text).expanduser().is_dir():
        jobs = [job for job in jobs if text in (job.id, job.number)]
    running = [job for job in jobs if job.state == "RUNNING"]
    if running:
        return running[-1]
    active = [job for job in jobs if job.active]
    if active:
        job = active[-1]
        why = f" ({job.reason})" if job.reason else ""
        raise UsageError(f"job {job.id} is {job.state.lower()}{why}: drill it when it has completed a step")
    if load(path / "run.json").get("status") == "finished":
        raise UsageError(f"{path}: the run has finished: there is nothing to drill")
    raise UsageError(f"{path} has no running job: launcher resume queues it again")


def _request(path: Path) -> Mapping[str, object]:
    """The flags that the run, or the sweep that it is of, was submitted with."""
    home = path if (path / "slurm" / "request.json").exists() else path.parent
    said = load(home / "slurm" / "request.json").get("request")
    return said if isinstance(said, dict) else {}


def _refuse_not_requeued(asked: Mapping[str, object], job: cluster.Job, requeue: str, signal: str) -> None:
    if requeue == "0" or asked.get("requeue") is False:
        refused = "SLURM refuses to requeue it" if signal == "requeue" else "it would stop, and not go on"
        raise UsageError(f"job {job.id} was submitted with --no-requeue: {refused}")
    if asked.get("chain"):
        raise UsageError(
            f"job {job.id} is of a chain, which is not requeued: its next job goes on, and no drill shows it"
        )


def _refuse_not_training(path: Path, attempt: int, started: dict[str, object], job: cluster.Job, restart: int) -> None:
    """Refuse a start that has not completed a step (nothing to save: it leaves at once), and one that is stopping."""
    root = path / "attempts" / str(attempt)
    around = started.get("environment")
    own = around if isinstance(around, dict) else {}
    is_this = (own.get("SLURM_JOB_ID"), own.get("SLURM_RESTART_COUNT", "0")) == (job.number, str(restart))
    if not is_this or not (root / "stepped").exists():
        raise UsageError(f"job {job.id} has not completed a step since it started: there is nothing to drill yet")
    if (path / "slurm" / "cancelled").exists():
        raise UsageError(f"job {job.id} is being cancelled")
    for pattern in ("failed", "exit-*", "signal-*"):
        if any(root.glob(pattern)):
            raise UsageError(
                f"job {job.id} is stopping already ({next(root.glob(pattern)).name}): drill its next start"
            )


def _announced(drill: Drill, command: Sequence[str]) -> str:
    whose = "its rank" if drill.ranks == 1 else f"its {drill.ranks} ranks"
    what = {
        "preemption": f"SIGTERM to {whose}, as a preemption with grace does",
        "limit": f"SIGUSR2 to {whose}, as SLURM does ahead of the time limit",
        "requeue": f"SIGTERM to all of it and SIGKILL {drill.kill_wait} s later, as a preemption without grace does",
    }[drill.signal]
    return f"job {drill.job} ({drill.path}) gets {what}: {shlex.join(command)}"


def _watch(drill: Drill, wait: float, show: Callable[[Event], None]) -> tuple[Aftermath, bool]:
    """Look until it trains again, or will not, or nobody waits for longer; whether it came to an end."""
    found, begun, asked = Aftermath(), time.monotonic(), -math.inf
    over: float | None = None
    silent = False
    while True:
        queue, now = None, time.monotonic()
        if now - asked >= ASK:
            try:
                queue, silent = _ask(drill.job), False
            except LauncherError as error:
                if not silent:
                    show(Event(time.time(), str(error)))
                silent = True
            asked = time.monotonic()
        new = observe(drill, found, queue)
        for event in events(drill, found, new, time.time()):
            show(event)
        found = new
        over = None if not found.over else over or now
        if found.went_on or (over is not None and now - over >= SETTLE):
            return found, True
        if now - begun >= wait:
            return found, False
        time.sleep(TICK)


def _ask(job: str) -> Queue:
    try:
        said = _said(cluster.ask(["scontrol", "-o", "show", "job", job]))
    except LauncherError as error:
        if "Invalid job id" in str(error):
            return Queue()
        raise
    reason = said("Reason")
    return Queue(
        state=said("JobState"),
        reason="" if reason == "None" else reason,
        restarts=_number(said("Restarts")),
        submitted=when(said("SubmitTime")),
        eligible=when(said("EligibleTime")),
        expected=when(said("StartTime")),
    )


def _said(line: str) -> Callable[[str], str]:
    """What `scontrol -o show job` says under a key; of a key that a job's own text repeats the first counts."""

    def value(key: str) -> str:
        match = re.search(rf"(?:^| ){key}=(\S*)", line)
        return match[1] if match else ""

    return value


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0
