"""What the files of one start of a run say of how it ended. Whatever is broken in them stops nobody.

started.json    by rank 0: where, when, how many        failed        by the first rank to say that it fails
rank-R.json     each rank, at its start                  error-R.json  each rank that fails: launcher/witness.py
signal-R.json   a rank has seen a stop signal            exit-R.json   a rank has left, and how
hang-R.json     where a rank stands that gets no further codes.json    by the parent of local ranks: exit codes
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher.output import log_path
from launcher.rundir import open_regular
from launcher.stacks import Place

__all__ = [
    *("Evidence", "Exit", "Rank", "Sight", "Word"),
    *("failure", "load", "newest_checkpoint", "numbered", "read_evidence", "read_of_ranks", "read_word"),
    *("tail", "text", "when", "whole"),
]

TAIL = 64 * 1024  # bytes
_PUBLISHED = re.compile(r"step-([0-9]{8,18})", re.ASCII)
_COUNTED = re.compile(r"(rank|error|signal|exit)-([0-9]{5,9})\.json", re.ASCII)
_SRUN = re.compile(r"^srun: error: \S+: tasks? ([\d,-]+): (.+)$", re.MULTILINE)
_STARTS = re.compile(r"^(--- |launcher: .* job \S+ start \d+ on )", re.MULTILINE)  # where a log begins to be of a start


@dataclass(frozen=True)
class Rank:
    """A rank, at its start."""

    host: str = ""
    pid: int | None = None
    oom_kills: Mapping[str, int] = field(default_factory=dict)
    """How many processes the kernel had killed for their memory, in each control group that the rank is in."""
    time: float | None = None


@dataclass(frozen=True)
class Word:
    """Why a rank failed, as it said."""

    rank: int
    """Below 0: it does not say."""
    kind: str = "code"
    type: str = ""
    message: str = ""
    step: int | None = None
    host: str = ""
    time: float | None = None
    place: Place | None = None
    source: str = ""
    is_own: bool = False
    """Whether it is one of the launcher's errors, whose message names the fault and the fix."""
    loader: str = ""
    sample: str = ""
    """What was read of the loader: `sample 17`."""
    path: str = ""
    memory: Mapping[str, Any] = field(default_factory=dict)
    oom_kills: Mapping[str, int] = field(default_factory=dict)
    collectives: tuple[Mapping[str, Any], ...] = ()
    traceback: str = ""
    retry: bool = False
    """Whether another start may go better, by the rank that failed."""


@dataclass(frozen=True)
class Sight:
    """A rank has seen the signal."""

    signal: str
    host: str
    time: float


@dataclass(frozen=True)
class Exit:
    """A rank has left, and why."""

    status: str
    step: int | None
    """The steps that it had completed."""
    reason: str
    host: str
    time: float
    collectives: tuple[Mapping[str, Any], ...] = ()
    """Those it had called, where another rank's failure has ended it."""
    place: Place | None = None
    """Where it then stood in the person's own code."""


@dataclass(frozen=True)
class Evidence:
    """One start of a run, as it ended."""

    path: Path
    attempt: int
    world_size: int = 1
    started: float | None = None
    status: str = ""
    """As run.json has it."""
    ranks: Mapping[int, Rank] = field(default_factory=dict)
    words: Mapping[int, Word] = field(default_factory=dict)
    marked: Word | None = None
    """What the first rank said that failed, or that found another one hanging."""
    seen: Mapping[int, Sight] = field(default_factory=dict)
    left: Mapping[int, Exit] = field(default_factory=dict)
    codes: Mapping[int, int] = field(default_factory=dict)
    """Exit codes of ranks; -9 for one that SIGKILL has ended."""
    srun: Mapping[int, str] = field(default_factory=dict)
    """What srun has told of a rank: `Killed`."""
    stepped: int | None = None
    """The last step that the start is known to have completed."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: int | None = None
    """The newest one's step."""
    job: tuple[str, str] | None = None
    """What the batch script decided: a word and why."""
    is_job: bool = False

    @property
    def silent(self) -> list[int]:
        """The ranks that have not said how they ended."""
        told = {*self.words, *self.left}
        return [rank for rank in range(self.world_size) if rank not in told]

    def host(self, rank: int) -> str:
        """Where a rank was; empty where nobody knows."""
        named = (self.words.get(rank), self.ranks.get(rank), self.left.get(rank))
        return next((one.host for one in named if one is not None and one.host), "")

    def last_words(self, rank: int) -> str:
        """The end of what a rank has printed in this start."""
        said = "\n".join(tail(log_path(self.path, rank), TAIL // 4))
        starts = list(_STARTS.finditer(said))
        return said[starts[-1].start() :] if starts else ""


def read_evidence(path: Path, attempt: int, beside: Path | None = None) -> Evidence:
    """Read what start `attempt` of the run at `path` left.

    `beside` is the directory in which the ranks tell their parent of their errors, also when the disk is full.
    """
    root = path / "attempts" / str(attempt)
    started, said = load(root / "started.json"), load(path / "run.json")
    around = started.get("environment")
    job = text(around, "SLURM_JOB_ID") if isinstance(around, dict) else ""
    ranks, words, seen, left = read_of_ranks(root)
    if beside is not None:
        words = {**read_of_ranks(beside)[1], **words}
    codes = load((root if beside is None else beside) / "codes.json").get("codes")
    marked = failure(path, attempt)
    known = max([0, *ranks, *words, *left, *([marked.rank] if marked is not None else [])])
    return Evidence(
        path=path,
        attempt=attempt,
        world_size=whole(started, "world_size") or whole(said, "world_size") or known + 1,
        started=when(started.get("started")),
        status=text(said, "status"),
        ranks=ranks,
        words=words,
        marked=marked,
        seen=seen,
        left=left,
        codes={int(rank): code for rank, code in codes.items() if rank.isdigit() and type(code) is int}
        if isinstance(codes, dict)
        else {},
        srun=_told_by_srun(path, job),
        stepped=_stepped(path, attempt, [*words.values(), *left.values()]),
        settings=load(root / "config.json"),
        checkpoint=newest_checkpoint(path),
        job=_job(path),
        is_job=bool(job) and (path / "slurm").is_dir(),
    )


def read_of_ranks(root: Path) -> tuple[dict[int, Rank], dict[int, Word], dict[int, Sight], dict[int, Exit]]:
    """The files of a start that are one a rank: what each is, why it failed, that it saw a signal, how it left."""
    ranks, words, seen, left = dict[int, Rank](), dict[int, Word](), dict[int, Sight](), dict[int, Exit]()
    for kind, rank, said in numbered(root):
        host, time = text(said, "host"), when(said.get("time"))
        if kind == "rank":
            ranks[rank] = Rank(host, whole(said, "pid"), _counts(said.get("oom_kills")), time)
        elif kind == "error":
            words[rank] = read_word(rank, said)
        elif time is None:
            continue
        elif kind == "signal":
            seen[rank] = Sight(text(said, "signal") or "a signal", host, time)
        else:
            status, reason, called = text(said, "status"), text(said, "reason"), _objects(said.get("collectives"))
            left[rank] = Exit(status, whole(said, "step"), reason, host, time, called, _place(said))
    return ranks, words, seen, left


def failure(path: Path, attempt: int) -> Word | None:
    """What the first rank to fail in a start said; None where none did."""
    root = path / "attempts" / str(attempt)
    if not os.path.lexists(root / "failed"):
        return None
    said = load(root / "failed")
    error = text(said, "error") or "it does not say why"  # a full disk, perhaps
    rank = whole(said, "rank")
    return read_word(-1 if rank is None else rank, {**said, "message": error, "type": ""})


def read_word(rank: int, said: Mapping[str, Any]) -> Word:
    """What a rank's error-R.json says."""
    place, data = said.get("place"), said.get("data")
    data = data if isinstance(data, dict) else {}
    memory = said.get("memory")
    return Word(
        rank=rank,
        kind=text(said, "kind") or "code",
        type=text(said, "type"),
        message=text(said, "message"),
        step=whole(said, "step"),
        host=text(said, "host"),
        time=when(said.get("time")),
        place=_place(said),
        source=text(place, "source") if isinstance(place, dict) else "",
        is_own=said.get("launcher") is True,
        loader=text(data, "loader"),
        sample=text(data, "what"),
        path=text(said, "path"),
        memory=memory if isinstance(memory, dict) else {},
        oom_kills=_counts(said.get("oom_kills")),
        collectives=_objects(said.get("collectives")),
        traceback=text(said, "traceback"),
        retry=said.get("retry") is True,
    )


def _place(said: Mapping[str, Any]) -> Place | None:
    place = said.get("place")
    if not isinstance(place, dict) or not place:
        return None
    return Place(text(place, "path"), whole(place, "line") or 0, text(place, "function"))


def newest_checkpoint(path: Path) -> int | None:
    """The step of a run's newest checkpoint."""
    steps = [int(match[1]) for name in _names(path / "checkpoints") if (match := _PUBLISHED.fullmatch(name))]
    return max(steps, default=None)


def numbered(root: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """The files of a start that are one a rank: of what kind, the rank, what it holds; nothing of broken ones."""
    for name in _names(root):
        if (match := _COUNTED.fullmatch(name)) and (said := load(root / name)):
            yield match[1], int(match[2]), said


def load(path: Path, faults: list[str] | None = None) -> dict[str, Any]:
    """A file's JSON object; empty where there is none, with a line in `faults` where it is broken."""
    try:
        with open_regular(path) as file:
            said = json.loads(file.read())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        fault = f"{path.name} cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        fault = f"{path.name} is broken: {error}"
    else:
        if isinstance(said, dict):
            return said
        fault = f"{path.name} is broken: it holds no object"
    if faults is not None:
        faults.append(fault)
    return {}


def tail(path: Path, size: int = TAIL) -> list[str]:
    """The last lines of a file, out of its last `size` bytes; none where there is no file."""
    try:
        with open_regular(path) as file:
            start = max(0, os.fstat(file.fileno()).st_size - size)
            file.seek(start)
            lines = file.read(size).decode(errors="replace").split("\n")
    except OSError:
        return []
    return lines[1:] if start else lines


def when(said: Any) -> float | None:
    """Seconds since 1970 of an ISO time; None where it is none."""
    with suppress(TypeError, ValueError, OverflowError):
        return datetime.fromisoformat(said).timestamp()
    return None


def whole(said: Mapping[str, Any], key: str) -> int | None:
    """A whole number from 0 on; None where it is none."""
    value = said.get(key)
    return value if type(value) is int and 0 <= value < 2**63 else None


def text(said: Mapping[str, Any], key: str) -> str:
    """A text; empty where it is none."""
    value = said.get(key)
    return value if isinstance(value, str) else ""


def _objects(said: Any) -> tuple[dict[str, Any], ...]:
    return tuple(one for one in said if isinstance(one, dict)) if isinstance(said, list) else ()


def _counts(said: Any) -> dict[str, int]:
    return {str(k): v for k, v in said.items() if type(v) is int} if isinstance(said, dict) else {}


def _stepped(path: Path, attempt: int, told: Sequence[Word | Exit]) -> int | None:
    """The last step that the start is known to have completed: metrics come late, and not of every step."""
    steps = [whole(load(path / "attempts" / str(attempt) / "stepped"), "step"), *(one.step for one in told)]
    for line in tail(path / "metrics.jsonl"):
        with suppress(ValueError, RecursionError):  # torn by a kill
            said = json.loads(line)
            if isinstance(said, dict) and said.get("attempt") == attempt:
                steps.append(whole(said, "step"))
    return max((step for step in steps if step is not None), default=None)


def _job(path: Path) -> tuple[str, str] | None:
    word, colon, why = next(iter(tail(path / "slurm" / "verdict")), "").partition(":")
    return (word, why.strip()) if colon else None


def _told_by_srun(path: Path, job: str) -> dict[int, str]:
    """By rank, what srun has told of the newest start of a job."""
    if not job or not job.isdigit():
        return {}
    said = "\n".join(tail(path / "slurm" / f"{job}.out"))
    starts = list(_STARTS.finditer(said))
    found = {}
    for match in _SRUN.finditer(said, starts[-1].start() if starts else 0):
        for span in match[1].split(","):
            first, _, last = span.partition("-")
            if first.isdigit() and (last or first).isdigit():
                last_rank = min(int(last or first), int(first) + 10**5)
                found.update(dict.fromkeys(range(int(first), last_rank + 1), match[2]))
    return found


def _names(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []
