"""What the files of a run directory say of the run. Whatever is broken in them is told, and stops nobody."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher import evidence
from launcher.errors import LauncherError
from launcher.evidence import load, tail, text, whole
from launcher.rundir import RunDir
from launcher.slurm import record

__all__ = ["Facts", "Failure", "Progress", "Start", "gather", "job_output", "near", "rank_logs"]

RATES = ("tokens_per_s", "samples_per_s")
STATUSES = ("pending", "running", "finished", "preempted", "failed", "cancelled")
_CHECKPOINT = re.compile(r"step-([0-9]{8,18})", re.ASCII)
_LOG = re.compile(r"(?:rank|node)-([0-9]{5,9})\.txt", re.ASCII)


@dataclass(frozen=True)
class Start:
    """The newest start of a run, by its rank 0."""

    host: str
    pid: int
    time: float
    """Seconds since 1970."""
    job: str
    """The job that it belongs to, `123` or `123_4`; empty outside of SLURM."""

    @property
    def is_here(self) -> bool:
        """Whether it was on this machine."""
        return self.host == socket.gethostname()

    def is_alive(self) -> bool:
        """Whether its process is still there, on this machine; one that has got its number since is not it."""
        with suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, 0)
        try:
            said = Path(f"/proc/{self.pid}/stat").read_bytes().rpartition(b")")[2].split()
            booted = float(re.findall(r"^btime (\d+)", Path("/proc/stat").read_text(), re.MULTILINE)[0])
        except (OSError, IndexError):
            return False
        began = booted + int(said[19]) / os.sysconf("SC_CLK_TCK")
        return said[0] not in (b"Z", b"X") and began < self.time + 5


@dataclass(frozen=True)
class Failure:
    """What the first rank to fail in the newest start said."""

    error: str
    rank: int | None = None
    step: int | None = None
    host: str = ""
    kind: str = ""
    retry: bool = False
    """Whether another start may go better."""

    def __str__(self) -> str:
        where = [] if self.rank is None else [f"rank {self.rank}"]
        where += [f"on {self.host}"] if self.host else []
        where += [] if self.step is None else [f"at step {self.step}"]
        return f"{' '.join(where)}: {self.error}" if where else self.error


@dataclass(frozen=True)
class Progress:
    """What the end of metrics.jsonl says."""

    attempt: int = 0
    step: int | None = None
    loss: float | None = None
    rate: float | None = None
    unit: str | None = None
    """What the rate counts: `tokens` or `samples`, a second."""


@dataclass(frozen=True)
class Facts:
    """One run, by its files; None and empty: they do not say it."""

    path: Path
    fault: str = ""
    """Which file is broken, and how."""
    status: str = ""
    """As run.json has it."""
    attempt: int = 0
    restarts: int | None = None
    world_size: int | None = None
    step: int | None = None
    total: int | None = None
    progress: Progress = Progress()
    checkpoint: int | None = None
    """The newest one's step."""
    checkpoint_time: float | None = None
    hosts: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    changed: float = 0.0
    """When it last gave a sign of life."""
    start: Start | None = None
    failure: Failure | None = None
    reason: str = ""
    """Why rank 0 of the newest start left."""
    not_saved: str = ""
    """Why the last save failed."""
    verdict: tuple[str, str] | None = None
    """How the last start of its job ended, by the batch script: a word and why."""
    cancelled: bool = False
    """Whether `launcher cancel` was called for what is, or was, going on."""
    submissions: tuple[record.Submission, ...] = ()

    @property
    def jobs(self) -> list[str]:
        """The ids of its jobs, in order."""
        return [one.job for one in self.submissions]

    @property
    def is_local(self) -> bool:
        """Whether its newest start belongs to no job that was submitted for it."""
        return not self.submissions or (
            self.status != "pending" and self.start is not None and self.start.job not in self.jobs
        )


def gather(path: Path, submissions: Sequence[record.Submission] | None = None) -> Facts:
    """Read the files of the run at `path`; `submissions` are its jobs, where they have been read already."""
    faults: list[str] = []
    said = load(path / "run.json", faults)
    attempt = whole(said, "attempt") or 0
    with suppress(LauncherError):
        attempt = max(attempt, RunDir(path).current_attempt())
    start = _start(path, attempt, faults)
    jobs = tuple(_submissions(path, faults) if submissions is None else submissions)
    global_step = whole(said, "global_step")
    progress = _progress(path / "metrics.jsonl", attempt, global_step)
    step = progress.step if progress.attempt == attempt else global_step
    checkpoint, checkpoint_time = _checkpoint(path)
    status = text(said, "status")
    if status and status not in STATUSES:
        faults.append(f"run.json has a status that is none: {status}")
        status = ""
    return Facts(
        path=path,
        fault="; ".join(faults),
        status=status,
        attempt=attempt,
        restarts=whole(said, "restarts"),
        world_size=whole(said, "world_size"),
        step=step if global_step is None or step is None else max(step, global_step),
        total=whole(said, "total_steps"),
        not_saved=text(said, "save_error"),
        progress=progress,
        checkpoint=checkpoint,
        checkpoint_time=checkpoint_time,
        hosts=_words(said, "hosts"),
        command=_words(said, "command"),
        changed=max(_mtime(path / name) for name in ("run.json", "metrics.jsonl")) or _mtime(path),
        start=start,
        failure=_failure(path, attempt),
        reason=text(load(path / f"attempts/{attempt}/exit-00000.json"), "reason"),
        verdict=_verdict(path),
        cancelled=_cancelled(path, None if jobs else start),
        submissions=jobs,
    )


def rank_logs(path: Path) -> dict[int, Path]:
    """The logs of a run's ranks (of its nodes, where agents start them), by number."""
    found: dict[str, dict[int, Path]] = {"rank": {}, "node": {}}
    with suppress(OSError):
        for name in os.listdir(path / "logs"):
            if match := _LOG.fullmatch(name):
                found[name[:4]][int(match[1])] = path / "logs" / name
    return dict(sorted((found["rank"] or found["node"]).items()))


def job_output(path: Path, job: str) -> Path:
    """Where the batch script of a job of this run prints to; of a point of a sweep beside those of the others."""
    owner = path.parent if "_" in job and record.is_sweep(path.parent) else path
    return owner / "slurm" / f"{job}.out"


def near(path: Path) -> str:
    """The path as a person here would write it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _progress(path: Path, attempt: int, global_step: int | None) -> Progress:
    """The newest lines that count: see launcher/scores.py.

    What an earlier attempt wrote of steps that the newest one has not come to counts only as far as that went on from.
    """
    lines: list[tuple[int, int, Mapping[str, Any]]] = []
    for number, step, line in _lines(path):
        if "rewound_from" in line:
            lines = [one for one in lines if one[0] > number or one[1] <= step]
        lines.append((number, step, line))
    first: dict[int, int] = {}
    for number, step, _ in lines:
        first[number] = min(step, first.get(number, step))
    if attempt not in first and global_step is not None:
        first[attempt] = global_step
    counted = sorted(
        (step, number, order)
        for order, (number, step, _) in enumerate(lines)
        if not any(later > number and begun < step for later, begun in first.items())
    )
    if not counted:
        return Progress()
    newest = [lines[order][2] for _, _, order in reversed(counted)]
    rate, unit = next(((line[key], key) for line in newest for key in RATES if _is_number(line.get(key))), (None, None))
    return Progress(
        attempt=counted[-1][1],
        step=counted[-1][0],
        loss=next((float(line["loss"]) for line in newest if _is_number(line.get("loss"))), None),
        rate=None if rate is None else float(rate),
        unit=None if unit is None else unit.removesuffix("_per_s"),
    )


def _lines(path: Path) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
    for written in tail(path):
        with suppress(ValueError, RecursionError):  # torn by a kill
            line = json.loads(written)
            if isinstance(line, dict) and (step := whole(line, "step")) is not None:
                yield whole(line, "attempt") or 0, step, line


def _checkpoint(path: Path) -> tuple[int | None, float | None]:
    with suppress(OSError):
        found = [match for name in os.listdir(path / "checkpoints") if (match := _CHECKPOINT.fullmatch(name))]
        if found:
            newest = max(found, key=lambda match: int(match[1]))
            return int(newest[1]), _mtime(path / "checkpoints" / newest[0] / "index.json") or None
    return None, None


def _start(path: Path, attempt: int, faults: list[str]) -> Start | None:
    said = load(path / f"attempts/{attempt}/started.json", faults)
    host, pid = text(said, "host"), whole(said, "pid")
    around = said.get("environment")
    names = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
    job, array, task = (text(around, name) if isinstance(around, dict) else "" for name in names)
    try:
        when = datetime.fromisoformat(text(said, "started")).timestamp()
    except (ValueError, OverflowError):
        when = _mtime(path / f"attempts/{attempt}/started.json")
    return Start(host, pid, when, f"{array}_{task}" if array and task else job) if host and pid else None


def _failure(path: Path, attempt: int) -> Failure | None:
    said = evidence.failure(path, attempt)
    if said is None:
        return None
    return Failure(said.message, said.rank if said.rank >= 0 else None, said.step, said.host, said.kind, said.retry)


def _verdict(path: Path) -> tuple[str, str] | None:
    line = next(iter(tail(path / "slurm" / "verdict")), "")
    word, colon, why = line.partition(":")
    return (word, why.strip()) if colon else None


def _cancelled(path: Path, start: Start | None) -> bool:
    """Whether the marker is there; a run that was started by hand after it (`start`) has gone on since."""
    marker = path / "slurm" / "cancelled"
    return os.path.exists(marker) and (start is None or _mtime(marker) >= start.time)


def _submissions(path: Path, faults: list[str]) -> list[record.Submission]:
    try:
        return record.submissions(path)
    except (OSError, TypeError) as error:
        faults.append(f"slurm/jobs.jsonl cannot be read: {getattr(error, 'strerror', None) or error}")
        return []


def _words(said: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = said.get(key)
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
