"""`launcher logs`: what a run's ranks, or its batch script, have printed, byte for byte; with -f as it comes."""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from launcher.errors import LauncherError, UsageError
from launcher.parser import Parser
from launcher.show import printable
from launcher.slurm import record
from launcher.slurm.facts import gather, job_output, rank_logs
from launcher.slurm.standing import ACTIVE, Standing, ask, judge

__all__ = ["main"]

BLOCK = 64 * 1024
FARTHEST = 16 * 2**20  # bytes from the end in which lines are looked for: a progress bar can be one line of any length
LINES = 100
LINES_EACH = 10  # with --all
PAUSE = 0.2  # seconds between two looks at a file that is followed
LOOK_AROUND = 1.0  # seconds between two looks at whether the run is over
ASK_AGAIN = 30.0  # seconds between two questions to SLURM about a run whose files say that it goes on

ENDED = ("finished", "failed", "cancelled")
Logs = dict[str, Path]
"""What each line is to begin with, and the file; without a prefix for one alone."""


def main(argv: Sequence[str]) -> int:
    """`launcher logs RUN|JOB`; the exit code."""
    parser = Parser(
        prog="launcher logs",
        usage="launcher logs [-f] [-n LINES] [--rank N | --job | --all] RUN|JOB",
        description="What rank 0 of a run has printed: by default its last lines.",
    )
    parser.add_argument("target", metavar="RUN|JOB", help="a run directory, or a job's id (123_4 of an array)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, metavar="N", help="rank N's output (of agents: node N's)")
    which.add_argument("--job", action="store_true", help="the batch script's output, of the newest job")
    which.add_argument("--all", action="store_true", help="all ranks' last lines, each with its rank")
    parser.add_argument("-f", "--follow", action="store_true", help="go on as more comes, until the run is over")
    parser.add_argument(
        "-n", "--lines", metavar="LINES", help=f"how many of the last lines, or all; default {LINES}, of --all 10 each"
    )
    options = parser.parse_args(list(argv))
    path = record.find(options.target)
    if record.is_sweep(path):
        raise UsageError(f"{options.target} is a sweep: name one of its runs, {path / '00000'} or JOB_4 for the fifth")
    count = _count(options)
    sys.stdout.flush()
    try:
        if options.follow:
            return _follow(path, options, count)
        for prefix, file in _logs(path, options).items():
            with suppress(FileNotFoundError), _open(file) as source:  # removed since it was listed
                source.seek(_beginning(source.fileno(), count))
                sink = _Sink(prefix)
                _pour(source, sink)
                sink.close()
        sys.stdout.buffer.flush()
    except KeyboardInterrupt:
        return 130
    return 0


def _count(options: Namespace) -> int | None:
    """How many lines; None: all."""
    if options.lines is None:
        return LINES_EACH if options.all else LINES
    if options.lines == "all":
        return None
    if not (options.lines.isdecimal() and len(options.lines) < 10):
        raise UsageError(f"-n {options.lines}: a number of lines, or all")
    return int(options.lines)


def _logs(path: Path, options: Namespace) -> Logs:
    """The logs that are asked for, of those there are.

    Raises:
        LauncherError: there is none, with what there is.
    """
    if options.job:
        output = _output(path)
        if output is None:
            raise LauncherError(f"{path} has had no job, only starts by hand: leave out --job")
        if not output.exists():
            raise LauncherError(f"{output} is not there: the job has not started yet (-f waits for it)")
        return {"": output}
    logs = rank_logs(path)
    if not logs:
        if _output(path) is None:
            raise LauncherError(f"{path} has no logs: no start of it has come as far as to open the run directory")
        raise LauncherError(f"{path} has no logs yet (-f waits for them)")
    if options.all:
        return {f"[{next(iter(logs.values())).name[:4]} {number}] ": file for number, file in logs.items()}
    number = options.rank or 0
    if number not in logs:
        raise LauncherError(f"{path} has no log of rank {number}: there are {_ranges(logs)}")
    return {"": logs[number]}


def _output(path: Path) -> Path | None:
    """What the newest job of a run prints to."""
    jobs = record.submissions(path)
    return job_output(path, jobs[-1].job) if jobs else None


def _ranges(numbers: Iterable[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


class _Sink:
    """Standard output; with a prefix it takes whole lines, so that those of several ranks do not mix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = os.fsencode(prefix)
        self._rest = b""

    def write(self, data: bytes) -> None:
        if not self._prefix:
            sys.stdout.buffer.write(data)
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > BLOCK:  # a line that does not end
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            sys.stdout.buffer.write(self._prefix + self._redrawn(line) + b"\n")

    def close(self) -> None:
        """Write what no line break has ended."""
        if self._rest:
            self.write(b"\n")

    def _redrawn(self, line: bytes) -> bytes:
        """A progress bar returns to the line's beginning, where the prefix is to stay."""
        return line.removesuffix(b"\r").replace(b"\r", b"\r" + self._prefix)


class _Tail:
    """A file that is followed by its name, as `tail -F` does: it may come later, be cut, or be replaced."""

    def __init__(self, path: Path, sink: _Sink, count: int | None) -> None:
        self._path, self._sink, self._count = path, sink, count
        self._file: BinaryIO | None = None

    def look(self) -> None:
        """Pass on what is new; at the first look no more than the last lines of what is there."""
        if self._file is None:
            with suppress(FileNotFoundError):
                self._file = _open(self._path)
                self._file.seek(_beginning(self._file.fileno(), self._count))
            self._count = None  # what appears from now on is new, all of it
        if self._file is not None:
            self._pour(self._file)

    def close(self) -> None:
        """Pass on the rest, and close the file."""
        self.look()
        self._sink.close()
        if self._file is not None:
            self._file.close()

    def _pour(self, file: BinaryIO) -> None:
        if os.fstat(file.fileno()).st_size < file.tell():
            file.seek(0)
        _pour(file, self._sink)
        with suppress(FileNotFoundError):  # it has been renamed, and the new one is to come
            if not os.path.samestat(os.stat(self._path), os.fstat(file.fileno())):
                file.close()
                self._file = None


class _Watch:
    """Whether the run is over: its files say so and it has no job, or no job of it is left; seen twice in a row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked = self._asked = -ASK_AGAIN
        self._before = False
        self.standing: Standing | None = None

    def is_over(self) -> bool:
        """Whether nothing more can come; it looks now and then only."""
        now = time.monotonic()
        if now - self._looked < LOOK_AROUND:
            return False
        self._looked = now
        facts = gather(self._path)
        if facts.status not in ENDED and not self._before and now - self._asked < ASK_AGAIN:
            return False
        self._asked = now
        heard = ask(facts.jobs[-20:])
        self.standing = judge(facts, heard)
        over = facts.status in ENDED if not heard.answered else self.standing.job is None
        over = over and self.standing.state not in ACTIVE
        before, self._before = self._before, over
        return over and before


def _follow(path: Path, options: Namespace, count: int | None) -> int:
    """Pass on what comes, until the run is over."""
    watch = _Watch(path)
    tails: dict[tuple[str, Path], _Tail] = {}
    missing = _unless_to_come(path, options)
    listed = 0.0
    while True:
        over = watch.is_over()
        if (now := time.monotonic()) - listed > LOOK_AROUND or not tails:
            listed, logs = now, {}
            try:
                logs = _logs(path, options)
            except LauncherError as error:
                missing = error
            for prefix, file in logs.items():
                tails.setdefault((prefix, file), _Tail(file, _Sink(prefix), count))
        for tail in tails.values():
            tail.look()
        sys.stdout.buffer.flush()
        if over:
            break
        count = None  # of a log that comes later nothing is passed over
        time.sleep(PAUSE)
    for tail in tails.values():
        tail.close()
    sys.stdout.buffer.flush()
    if not tails and missing is not None:
        raise missing
    if watch.standing is not None:
        told = ": ".join(filter(None, [watch.standing.state, watch.standing.why]))
        print(f"launcher: {printable(told)}", file=sys.stderr)
    return 0


def _unless_to_come(path: Path, options: Namespace) -> LauncherError | None:
    """Why there is no such log yet, where it can still come.

    Raises:
        LauncherError: it cannot.
    """
    try:
        _logs(path, options)
    except LauncherError as error:
        facts = gather(path)
        few = options.rank is not None and facts.world_size is not None and options.rank >= facts.world_size
        if not facts.jobs or (few and rank_logs(path)):
            raise
        return error
    return None


def _open(file: Path) -> BinaryIO:
    """The file, unbuffered.

    Raises:
        FileNotFoundError: it is not there (any more).
        LauncherError: it may not be read.
    """
    try:
        return open(file, "rb", buffering=0)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise LauncherError(f"cannot read {file}: {error.strerror}") from None


def _beginning(descriptor: int, count: int | None) -> int:
    """Where the last `count` lines of a file begin."""
    position = size = os.fstat(descriptor).st_size
    if count is None or not size:
        return 0
    if not count:
        return size
    missing = count + (os.pread(descriptor, 1, size - 1) == b"\n")  # line breaks back to the one before those lines
    while position > max(0, size - FARTHEST):
        start = max(0, position - BLOCK)
        pieces = os.pread(descriptor, position - start, start).split(b"\n")
        if len(pieces) > missing:
            return position - len(b"\n".join(pieces[-missing:]))
        missing -= len(pieces) - 1
        position = start
    return position


def _pour(source: BinaryIO, sink: _Sink) -> None:
    """Pass on what there is from here to the end."""
    while data := source.read(BLOCK):
        sink.write(data)
