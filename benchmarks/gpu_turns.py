"""Training loops on one GPU that take turns: what gpu.py measures with. Both ends of the line are here.

The contenders of a group are alive together, their memory on the same GPU, and one at a time trains while the others
sleep on a socket: a turn is compared with another one's of the same seconds, at the same clocks and temperature. One
that fails, or is not ready in time, is left out and told; the others go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import machine

HERE = Path(__file__).resolve().parent
TOLD = 15  # lines that a contender which fails has said


class Contender:
    """A process that trains while it has the turn: `python peers/SCRIPT.py SOCKET DIRECTORY OPTIONS...`."""

    def __init__(self, script: str, directory: Path, options: list[str], environ: Mapping[str, str]) -> None:
        directory.mkdir(parents=True)
        self.directory, self.failed = directory, ""
        self._output = directory / "output.txt"
        self._line, theirs = socket.socketpair()
        self._unread = b""
        command = [sys.executable, str(HERE / "peers" / f"{script}.py"), str(theirs.fileno()), str(directory), *options]
        with theirs, open(self._output, "w") as said:
            self.process = subprocess.Popen(
                command,
                env={**machine.environ(), **environ},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,  # with its compilers, to be ended together
            )

    def turn(self, settle: int, steps: int, seconds: float) -> dict[str, Any] | None:
        """Let it train: `settle` steps that are not timed, then `steps` that are; None if it has failed."""
        with contextlib.suppress(OSError):  # if it has ended, `ready` tells
            self._line.sendall(f"{settle} {steps}\n".encode())
        return self.ready(seconds)

    def ready(self, seconds: float) -> dict[str, Any] | None:
        """Wait for the end of its turn, `seconds` at most; what it reports, None if it has failed."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._line], [], [], left)[0]:
                self.give_up(f"not done after {seconds:.0f} s")
                return None
            try:
                read = self._line.recv(1 << 16)
            except OSError:
                read = b""
            if not read:
                self.give_up(f"exit code {self._code()}")
                return None
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        report: dict[str, Any] = json.loads(line)
        return report

    def poll(self, seconds: float) -> bool:
        """Whether it has reported within `seconds`, or ended."""
        return bool(self._unread or select.select([self._line], [], [], seconds)[0])

    def give_up(self, why: str) -> None:
        """End it, and remember why."""
        self.failed = why
        self.close(grace=0)

    def said(self) -> list[str]:
        """The end of what it printed."""
        return self._output.read_text(errors="replace").splitlines()[-TOLD:]

    def hang_up(self) -> None:
        """Close the line, which ends a process that waits for its turn."""
        self._line.close()

    def close(self, grace: float) -> None:
        """End it; what is still there after `grace` seconds is killed, with all that it has started."""
        self.hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _code(self) -> int | str:
        try:
            return self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "none: it closed its line"


class Group:
    """Contenders that are alive together, by name; those that fail leave it."""

    def __init__(self, contenders: Mapping[str, Contender]) -> None:
        self.begun = time.monotonic()
        self.alive, self.ready_s = dict(contenders), dict[str, float]()
        self._all = dict(contenders)

    def settle(self, until: float) -> None:
        """Wait for everyone's first step, with its compilation, until `until` on the monotonic clock."""
        for name, contender in list(self.alive.items()):
            report = contender.ready(max(0.0, until - time.monotonic()))
            if report is None:
                del self.alive[name]
            else:
                self.ready_s[name] = round(time.monotonic() - self.begun, 1)

    def rounds(self, settle: int, steps: int, most: int, until: float) -> Iterator[dict[str, Any]]:
        """Rounds of a turn each, in a new order each time; none begins that would not end by `until`."""
        longest = 0.0
        for _ in range(most):
            begun = time.monotonic()
            if not self.alive or begun + longest > until:
                return
            found = {}
            for name in random.sample(list(self.alive), len(self.alive)):
                report = self.alive[name].turn(settle, steps, max(1.0, until + 5 - time.monotonic()))
                if report is None:
                    del self.alive[name]
                else:
                    found[name] = report
            longest = max(longest, time.monotonic() - begun)
            yield found

    def failures(self) -> dict[str, dict[str, Any]]:
        """Why those left that did, and what they said."""
        return {name: {"failed": c.failed, "said": c.said()} for name, c in self._all.items() if c.failed}

    def close(self) -> None:
        """End them all."""
        for contender in self.alive.values():
            contender.hang_up()
        until = time.monotonic() + 2
        for contender in self.alive.values():
            contender.close(grace=max(0.0, until - time.monotonic()))
        self.alive = {}


class Clock:
    """The other end: it is ticked by the optimizer, once a step, so that whoever owns the loop is timed alike.

    Told "3 20", it lets 3 steps pass and times the 20 after them, from a GPU that has done its work to one that has.
    Between turns the process sleeps on the socket. The first turn is the first step: with it a contender is ready.
    """

    def __init__(
        self, connection: socket.socket, wait: Callable[[], None], facts: Callable[[], dict[str, Any]]
    ) -> None:
        self._file = connection.makefile("rw")
        self._wait, self._facts = wait, facts
        self._first: int | None = None
        self._begin, self._end, self._steps, self._started = 0, 1, 0, time.perf_counter()

    def tick(self, optimizer: Any, *_: object) -> None:
        """An optimizer has stepped; where there are several, the one that was first counts."""
        self._first = self._first or id(optimizer)
        if id(optimizer) != self._first:
            return
        self._steps += 1
        if self._steps == self._end:
            self._wait()
            self._report(time.perf_counter() - self._started)
        if self._steps == self._begin:
            self._wait()
            self._started = time.perf_counter()

    def _report(self, seconds: float) -> None:
        told = {"seconds": seconds, "from": self._begin, "to": self._end, **self._facts()}
        order: list[str] = []
        with contextlib.suppress(OSError):
            print(json.dumps(told), file=self._file, flush=True)
            order = self._file.readline().split()
        if not order:
            os._exit(0)  # there are loops that nothing else ends
        settle, steps = map(int, order)
        self._begin = self._steps + settle
        self._end = self._begin + steps
