"""Processes that take turns: what overhead.py and ddp.py measure with. Both ends of the line are here.

The contenders of a launch are alive together, and one at a time trains while the others sleep on a socket, so that a
turn is compared with another one's of the same second. A contender may have several ranks: each has a line of its own,
gets its word at the same time, and the turn is over with the last of them.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import machine

HERE = Path(__file__).resolve().parent
THRESHOLD = str(100 << 20)
PINNED = {
    "MALLOC_TRIM_THRESHOLD_": THRESHOLD,
    "MALLOC_MMAP_THRESHOLD_": THRESHOLD,
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(HERE.parent),
}
"""malloc's thresholds alone move a step of a few milliseconds by 8 %."""


class Contender:
    """A job that trains while it has the turn: `python SCRIPT NAME SOCKET DIRECTORY ARGUMENTS...`, once a rank."""

    def __init__(
        self, name: str, script: str, directory: Path, arguments: Sequence[Any], ranks: Sequence[Mapping[str, str]]
    ) -> None:
        self.name, self.directory = name, directory
        directory.mkdir()
        self.processes: list[subprocess.Popen[bytes]] = []
        self._lines: list[socket.socket] = []
        self._files: list[Any] = []
        for rank, environ in enumerate(ranks):
            mine, theirs = socket.socketpair()
            command = [sys.executable, script, name, theirs.fileno(), directory, *arguments]
            with theirs, open(self._output(rank), "w") as said:
                process = subprocess.Popen(
                    list(map(str, command)),
                    cwd=HERE,
                    env={**machine.environ(), **PINNED, **environ},
                    pass_fds=[theirs.fileno()],
                    stdout=said,
                    stderr=said,
                )
            self.processes.append(process)
            self._lines.append(mine)
            self._files.append(mine.makefile("rw"))

    def ready(self) -> tuple[float, float]:
        """Wait for the end of its turn: seconds of wall clock (of the slowest rank) and of CPU (of all)."""
        waiting = dict(zip(self._lines, range(len(self._lines)), strict=True))
        times = []
        while waiting:  # whichever rank comes first: where one has died, the others may wait for it for long
            for line in select.select(list(waiting), [], [])[0]:
                times.append(tuple(map(float, self._read(waiting.pop(line)).split())))
        return max(wall for wall, _ in times), sum(cpu for _, cpu in times)

    def turn(self, settle: int, steps: int) -> tuple[float, float]:
        """Let it train: `settle` steps that are not timed, then `steps` that are."""
        for file in self._files:
            file.write(f"{settle} {steps}\n")
            file.flush()
        return self.ready()

    def close(self) -> None:
        """End it."""
        for file, line in zip(self._files, self._lines, strict=True):
            file.close()
            line.close()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _read(self, rank: int) -> str:
        line: str = self._files[rank].readline()
        if not line:
            code = self.processes[rank].wait()
            raise SystemExit(f"{self.name} ended with exit code {code}:\n{self._output(rank).read_text()}")
        return line

    def _output(self, rank: int) -> Path:
        return self.directory / ("output.txt" if not rank else f"output-{rank}.txt")


class Clock:
    """The other end: times the turns that are asked for. Told "10 40", it lets 10 steps pass and times the next 40.

    It is ticked by the model, once a forward pass, so that whoever owns the loop is timed alike; a step has
    `microbatches` of them.
    """

    def __init__(self, connection: socket.socket, microbatches: int = 1) -> None:
        self.file = connection.makefile("rw")
        self.microbatches = microbatches
        self.begin = self.end = self.calls = 0
        self.wall = self.cpu = 0.0

    def tick(self) -> None:
        """A forward pass begins."""
        if self.calls == self.end:
            self.turn()
        if self.calls == self.begin:
            self.cpu, self.wall = time.process_time(), time.perf_counter()
        self.calls += 1

    def turn(self) -> None:
        """Report the turn that has ended, and wait for the next one."""
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        self.file.write(f"{wall} {cpu}\n")
        self.file.flush()
        order = self.file.readline().split()
        if not order:
            os._exit(0)  # there are loops that nothing else ends
        settle, steps = (self.microbatches * int(number) for number in order)
        self.begin, self.end = self.calls + settle, self.calls + settle + steps
