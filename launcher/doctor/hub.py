"""A few processes of one job that find each other over plain sockets, exchange values, and say who never came.

No torch, no shared file: this is what looks whether those work. The first node's process listens, on one of a few
ports that follow from the job's number, and the others look for it there.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

__all__ = ["Door", "Hub", "LostError", "candidates", "listen"]

FIRST, MANY = 10000, 22000  # below the ports that the kernel deals out, as in the batch script


class LostError(Exception):
    """Some of the others never came, or went; `ranks` are theirs."""

    def __init__(self, ranks: Sequence[int], why: str) -> None:
        super().__init__(why)
        self.ranks = sorted(ranks)


def candidates(job: int, number: int = 5) -> list[int]:
    """Ports for a job, in the order in which they are tried; no two jobs have the same first."""
    return [FIRST + (job + 4001 * index) % MANY for index in range(number)]


def listen(ports: Sequence[int]) -> socket.socket:
    """A socket that listens on the first of these ports that is free.

    Raises:
        OSError: none of them is.
    """
    for port in ports[:-1]:
        with suppress(OSError):
            return socket.create_server(("", port), backlog=256)
    return socket.create_server(("", ports[-1]), backlog=256)


class Hub:
    """All processes of the job; each calls `gather` in turn, and gets what each has brought."""

    def __init__(
        self, rank: int, count: int, host: str, ports: Sequence[int], *, token: str, deadline: float, patience: float
    ) -> None:
        """Wait for the others, or look for the first, for `patience` seconds.

        `deadline`, on `time.monotonic`'s clock, ends every later wait.

        Raises:
            LostError: some did not come, or the first cannot be reached.
        """
        self.rank, self.count = rank, count
        self._deadline, self._token = deadline, token
        self._lines: dict[int, _Lines] = {}
        until = min(deadline, time.monotonic() + patience)
        if count > 1:
            self._await(ports, until) if rank == 0 else self._seek(host, ports, until)

    def gather(self, value: Any) -> list[Any]:
        """What every process brings, in rank order.

        Raises:
            LostError: some have gone, or did not come in time.
        """
        if self.rank:
            try:
                self._lines[0].send(value)
                return self._hear(0)  # type: ignore[no-any-return]
            except (LostError, OSError) as error:
                self.close()
                raise LostError([0], str(error)) from None
        values, lost = {0: value}, []
        for rank in self._lines:
            try:
                values[rank] = self._hear(rank)
            except LostError:
                lost.append(rank)
        if lost:
            self.close()  # the others hear of it by that
            raise LostError(lost, "gone, or too slow")
        everything = [values[rank] for rank in range(self.count)]
        for line in self._lines.values():
            with suppress(OSError):
                line.send(everything)
        return everything

    def close(self) -> None:
        """Leave."""
        for line in self._lines.values():
            line.close()

    def _await(self, ports: Sequence[int], until: float) -> None:
        with listen(ports) as server:
            while len(self._lines) < self.count - 1 and (left := until - time.monotonic()) > 0:
                server.settimeout(left)
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    break
                line = _Lines(connection)
                with suppress(OSError, ValueError, TypeError, IndexError):
                    said = line.receive(min(until, time.monotonic() + 2))
                    if said[0] == self._token and said[1] in range(1, self.count):
                        line.send(self._token)
                        self._lines[said[1]] = line
                        continue
                line.close()  # somebody else's, who looks for something else
        missing = set(range(1, self.count)) - self._lines.keys()
        if missing:
            self.close()
            raise LostError(sorted(missing), "never came")

    def _seek(self, host: str, ports: Sequence[int], until: float) -> None:
        why = "no answer"
        while time.monotonic() < until:
            for port in ports:
                try:
                    line = _Lines(socket.create_connection((host, port), timeout=2))
                except OSError as error:
                    why = str(error)
                    continue
                with suppress(OSError, ValueError):
                    line.send([self._token, self.rank])
                    if line.receive(time.monotonic() + 3) == self._token:
                        self._lines[0] = line
                        return
                line.close()  # somebody else's port
                why = "somebody else answers there"
            time.sleep(0.2)  # it may not listen yet
        raise LostError([0], f"{host} cannot be reached on ports {', '.join(map(str, ports))}: {why}")

    def _hear(self, rank: int) -> Any:
        try:
            return self._lines[rank].receive(self._deadline)
        except (OSError, ValueError) as error:
            raise LostError([rank], str(error)) from None


class Door:
    """A port of this process that answers whoever knocks, for the others to try."""

    def __init__(self, token: str, ports: Sequence[int]) -> None:
        """Listen.

        Raises:
            OSError: all of the ports are taken.
        """
        self._token = token
        self._server = listen(ports)
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._answer, daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._server.close()

    @staticmethod
    def knock(host: str, port: int, token: str) -> str:
        """Why another's door cannot be reached; nothing where it can."""
        try:
            with socket.create_connection((host, port), timeout=3) as connection:
                said = _Lines(connection).receive(time.monotonic() + 3)
        except (OSError, ValueError) as error:
            return str(error) or type(error).__name__
        return "" if said == token else "somebody else answers there"

    def _answer(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                with connection, suppress(OSError):
                    connection.sendall(json.dumps(self._token).encode() + b"\n")


class _Lines:
    """A connection that carries a JSON value a line."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._rest = b""

    def send(self, value: Any) -> None:
        self._connection.settimeout(10)
        self._connection.sendall(json.dumps(value).encode() + b"\n")

    def receive(self, until: float) -> Any:
        """The next value; ValueError where the other is gone."""
        while b"\n" not in self._rest:
            self._connection.settimeout(max(0.01, until - time.monotonic()))
            data = self._connection.recv(65536)
            if not data:
                raise ValueError("gone")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        self._connection.close()
