"""Where what a rank prints goes: rank 0's to the person, and everybody's to logs/rank-NNNNN.txt.

Under SLURM the batch script has made that so before Python begins, and nothing is done here.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

__all__ = ["Output", "log_path"]

BAR = 10.0  # seconds between two states of a progress bar that a log keeps


def log_path(run: Path, rank: int) -> Path:
    """The file that keeps what a rank prints."""
    return run / "logs" / f"rank-{rank:05d}.txt"


class Output:
    """This process's output, from now on until it is closed."""

    def __init__(self, path: Path, heading: str, *, shown: bool) -> None:
        """`path` takes what is printed, behind a line that says of what start it is; `shown`: the person sees it too.

        Raises:
            OSError: the log cannot be written.
        """
        path.parent.mkdir(mode=0o700, exist_ok=True)
        self._log: IO[bytes] | None = open(  # noqa: SIM115 - until this is closed
            os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb", buffering=0
        )
        self._terminal: int | None = None
        self._before: tuple[Any, Any] | None = None
        self._catches = not faulthandler.is_enabled()
        self.note(f"--- {heading}\n")
        if self._catches:  # of a crash in native code, nothing else tells where Python stood
            faulthandler.enable(self._log)
        if shown:
            self._before = sys.stdout, sys.stderr
            sys.stdout, sys.stderr = _Tee(sys.stdout, self), _Tee(sys.stderr, self)
        else:
            self._redirect(self._log.fileno())

    def note(self, text: str) -> None:
        """Write into the log alone; where that is full, nowhere."""
        if self._log is not None:
            with suppress(OSError):
                self._log.write(text.encode(errors="backslashreplace"))

    def show(self, text: str) -> None:
        """Show the person something, whatever else this rank prints, and keep it in the log."""
        if self._terminal is None:
            sys.stderr.write(text)
            sys.stderr.flush()
            return
        self.note(text)
        with suppress(OSError):
            os.write(self._terminal, text.encode(errors="backslashreplace"))

    def close(self) -> None:
        """Give back what was taken; of a redirection nothing: what a process prints at its very end is kept too."""
        if self._before is None:
            return
        if self._catches:
            faulthandler.disable()
        for name, before in zip(("stdout", "stderr"), self._before, strict=True):
            tee = getattr(sys, name)
            if isinstance(tee, _Tee):  # else somebody has put another in its place since
                tee.end()
                setattr(sys, name, before)
        if self._log is not None:
            self._log.close()
            self._log = None

    def _redirect(self, log: int) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        self._terminal = os.dup(2)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(line_buffering=True)  # a kill must not take what was printed before it


class _Tee:
    """A text stream whose lines are kept too; in all else the stream that it stands for.

    Of a progress bar, which draws a line over and over, a state now and then is kept.
    """

    def __init__(self, stream: Any, output: Output) -> None:
        self._stream, self._output = stream, output
        self._rest, self._kept = "", time.monotonic()

    def write(self, text: str) -> int:
        written: int = self._stream.write(text)
        *lines, rest = (self._rest + text).replace("\r\n", "\n").split("\n")
        for line in lines:
            self._output.note(f"{_last(line)}\n")
        if "\r" in rest:
            rest = f"\r{_last(rest)}"
            if time.monotonic() - self._kept > BAR and (drawn := _last(rest).strip()):
                self._kept = time.monotonic()
                self._output.note(f"{drawn}\n")
        self._rest = rest
        return written

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def end(self) -> None:
        """Keep what no line break has ended."""
        if drawn := _last(self._rest).strip():
            self._output.note(f"{drawn}\n")
        self._rest = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Any:
        return iter(self._stream)


def _last(line: str) -> str:
    """What stands there in the end of a line that was drawn over; as it was, of one that was not."""
    drawn = [part for part in line.split("\r") if part.strip()]
    return drawn[-1] if drawn else ""
