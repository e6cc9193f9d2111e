"""What a run directory holds of its jobs, in its `slurm/`, and how a person's words lead to one.

    job.sh          the batch script, as submitted last        12345.out   what it printed
    request.json    what `launcher submit` was asked for       jobs.jsonl  a line a submission: its job
    cancelled       `launcher cancel` was here: no requeue     verdict     how the last job ended, in a line
    idle            starts in a row without progress           source.json what git said of the code
    started-12345-0 one start of a job: when, where            code/       (beside slurm/) the code that runs

A sweep is a directory of runs, 00000, 00001, ..., with a `slurm/` of its own for the array that they are tasks of.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import LauncherError, UsageError
from launcher.slurm import cluster

__all__ = ["Submission", "add_submission", "find", "is_sweep", "points", "submissions"]

POINT = "[0-9][0-9][0-9][0-9][0-9]"


@dataclass(frozen=True)
class Submission:
    """One call of sbatch for a run or a sweep."""

    job: str
    """The id: of an array the array's."""
    time: float
    """Seconds since 1970."""
    tasks: tuple[int, ...] = ()
    """Of a sweep, the points that are submitted."""


def submissions(path: Path) -> list[Submission]:
    """The jobs of the run or sweep at `path`, in order; of a point of a sweep, the array's."""
    own = path / "slurm" / "jobs.jsonl"
    if not own.exists() and is_sweep(path.parent) and path.name.isdigit():
        number = int(path.name)
        return [Submission(f"{one.job}_{number}", one.time) for one in submissions(path.parent) if number in one.tasks]
    found = []
    with suppress(FileNotFoundError):
        for line in own.read_text(errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a line that was cut
                said: dict[str, Any] = json.loads(line)
                found.append(Submission(str(said["job"]), float(said["time"]), tuple(said.get("tasks", ()))))
    return found


def add_submission(path: Path, job: str, tasks: tuple[int, ...] = ()) -> None:
    """Write down that `job` was submitted for the run or sweep at `path`."""
    with open(path / "slurm" / "jobs.jsonl", "a") as file:
        file.write(json.dumps({"job": job, "time": round(time.time(), 3), "tasks": list(tasks)}) + "\n")


def is_sweep(path: Path) -> bool:
    """Whether `path` is the directory of a sweep."""
    return (path / "slurm" / "sweep.json").exists()


def points(path: Path) -> list[Path]:
    """The runs of a sweep, in order."""
    return sorted(path.glob(POINT))


def find(text: str) -> Path:
    """The directory of the run, or sweep, that a person means: by its path, or by the id of one of its jobs.

    A job is looked for in SLURM's memory (its working directory is the run's), then in the runs under `runs/`. Of one
    task of an array it is that run's: `123_4`, or the number that SLURM_JOB_ID is in it.

    Raises:
        UsageError: there is none, or it may not be read.
    """
    try:
        return _found(text)
    except OSError as error:
        raise UsageError(f"{text}: cannot read {error.filename}: {error.strerror}") from None


def _found(text: str) -> Path:
    path = Path(text).expanduser().absolute()
    if path.is_dir():
        if not any((path / name).exists() for name in ("run.json", "attempts", "slurm")):
            raise UsageError(f"{text} is no run: it has neither run.json nor slurm/")
        return path
    array, _, task = text.partition("_")
    if not array.isdigit() or (task and not task.isdigit()):
        raise UsageError(f"{text}: there is no such run directory, and a job's id is a number (or 123_4)")
    known: cluster.Job | None = None
    with suppress(LauncherError):  # no SLURM here, or it does not answer: the files may still know
        known = cluster.job(text)
    if known is not None:
        directory = Path(known.work_dir)
        if not (directory / "slurm").is_dir():
            raise UsageError(f"job {text} ({known.name}) was not made by launcher submit: its directory is no run")
        own = known.id.partition("_")[2] if text != known.array else ""
        return _point(directory, task or own)
    for slurm in sorted(Path("runs").glob("*/slurm"), reverse=True):
        if any(one.job == array for one in submissions(slurm.parent.absolute())):
            return _point(slurm.parent.absolute(), task)
    raise UsageError(f"job {text}: SLURM does not know it (any more), and no run under ./runs had it: name the run")


def _point(directory: Path, task: str) -> Path:
    return directory / f"{int(task):05d}" if task.isdigit() and is_sweep(directory) else directory
