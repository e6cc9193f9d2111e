"""Signals raise a flag and nothing else; ranks agree on the flag at a step's edge and stop there together.

A Python handler only runs when the main thread next executes bytecode, which inside a collective or a compile can be
minutes away. The interpreter's C handler writes to a wakeup descriptor at once, whatever the main thread does, and a
thread reads it here. SIGUSR2 is blocked in the main thread, after that thread exists: children that are exec'd later
(compile workers) inherit the block, and live through a signal sent to the whole job.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable

__all__ = ["Signals", "Stopped", "ignore_signals"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
# Seconds within which a signal that comes again is the same one: the terminal and a launcher's agent both deliver one
# Ctrl-C; SLURM sends SIGTERM to a task twice in some preemptions, and an agent forwards it too.
SAME = {signal.SIGINT: 1.0, signal.SIGTERM: 5.0, signal.SIGUSR2: 5.0}


class Stopped(BaseException):
    """All ranks have agreed to stop, at a step's edge or inside an evaluation; the state is whole.

    Not an Exception, so that a recipe's `except Exception` lets it pass.
    """


class Signals:
    """Watches for the stop signals of this process. `stop` is the first one's name, or None."""

    def __init__(self, on_stop: Callable[[str], None], on_again: Callable[[str], None]) -> None:
        """Both are called, in the watching thread, with a signal's name.

        Args:
            on_stop: the first stop signal has come.
            on_again: one that had come before says not to wait for an edge.
        """
        self.stop: str | None = None
        self._on_stop, self._on_again = on_stop, on_again
        self._seen_at: dict[int, float] = {}
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        threading.Thread(target=self._watch, name="launcher-signals", daemon=True).start()
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        self._writer.close()  # ends the thread

    def _handle(self, number: int, _frame: object) -> None:
        """Present so that the interpreter's C handler is installed; the thread does the work."""

    def _watch(self) -> None:
        while data := self._reader.recv(64):
            for number in data:
                if number in STOP_SIGNALS:
                    self._seen(number)
        self._reader.close()

    def _seen(self, number: int) -> None:
        now = time.monotonic()
        name = signal.Signals(number).name
        before = self._seen_at.setdefault(number, now)
        first, self.stop = self.stop is None, self.stop or name
        if first:
            self._on_stop(name)
        elif now - before > SAME[signal.Signals(number)]:
            self._on_again(name)


def ignore_signals() -> None:
    """For data workers: a stop signal sent to the whole job is their parent's to answer."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
