"""Where a process stands in its code: a rank's threads, and the data worker that it waits for."""

from __future__ import annotations

import faulthandler
import linecache
import os
import re
import signal
import sys
import sysconfig
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = [
    *("Place", "Wait", "answer", "data_wait", "dump", "is_own", "main_stack", "places", "read_places", "worker_stack"),
]

ASK = signal.SIGRTMIN + 6  # a data worker answers it with its stack; NCCL and schedulers use other signals
ANSWER = "launcher-stack"  # the name of the memory that a worker writes its answer to
PATIENCE = 1.0  # seconds for a worker's answer
FRAME = re.compile(r'File "(.+)", line (\d+) in (.+)')  # as faulthandler writes one
LIBRARIES = ("/site-packages/", "/dist-packages/", "<frozen", f"{Path(__file__).parent}/")


@dataclass(frozen=True)
class Place:
    """A line of code."""

    path: str
    line: int
    function: str

    def __str__(self) -> str:
        source = self.source
        return f"{self.path}:{self.line} in {self.function}" + (f": `{source}`" if source else "")

    @property
    def source(self) -> str:
        """The line as the file has it now, cut at 80 characters; nothing where there is no such file."""
        line = linecache.getline(self.path, self.line).strip()
        return line if len(line) <= 80 else f"{line[:79]}…"


@dataclass(frozen=True)
class Wait:
    """A rank that waits for a loader's next micro-batch, and the worker process that is to bring it, if one is."""

    loader: str
    worker: int | None = None


def main_stack() -> list[FrameType]:
    """The main thread's frames, the innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def places(frames: list[FrameType]) -> tuple[Place | None, Place | None]:
    """The innermost frame in the person's own code, and the innermost of all."""
    return _own([Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name) for frame in frames])


def read_places(text: str) -> tuple[Place | None, Place | None]:
    """The same of the main thread in what faulthandler wrote: it stands last."""
    block = re.split(r"^(?:Current thread|Thread) ", text, flags=re.MULTILINE)[-1]
    return _own([Place(path, int(line), name.strip()) for path, line, name in FRAME.findall(block)])


def _own(found: list[Place]) -> tuple[Place | None, Place | None]:
    return next(filter(is_own, found), None), found[0] if found else None


def is_own(place: Place) -> bool:
    """Whether it is neither Python's, nor an installed package's, nor the launcher's."""
    standard = sysconfig.get_path("stdlib")
    return not any(part in place.path for part in LIBRARIES) and not place.path.startswith((standard, "<"))


def dump(path: Path) -> str:
    """Write every thread's stack to a file, and return it."""
    with open(path, "w+", encoding="utf-8", errors="replace") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def data_wait(frames: list[FrameType]) -> Wait | None:
    """What loader, and what worker of it, the main thread waits for; None where it does something else."""
    worker: int | None = None
    for frame in frames:
        owner: Any = frame.f_locals.get("self")
        kind = type(owner).__name__
        if frame.f_code.co_name == "_next_data" and kind == "_MultiProcessingDataLoaderIter":
            with suppress(AttributeError, KeyError, IndexError, TypeError):  # names of torch's own
                worker = owner._workers[owner._task_info[owner._rcvd_idx][0]].pid
        if frame.f_code.co_name == "_fetch" and kind == "Feed" and frame.f_code.co_filename.endswith("data.py"):
            return Wait(str(getattr(owner, "_name", "loader")), worker)
    return None


def answer() -> None:
    """For data workers: answer the rank that asks where this process stands, whatever it does at the time."""
    with suppress(OSError, AttributeError):  # no such memory here: then nothing can be told
        faulthandler.register(ASK, file=os.memfd_create(ANSWER), all_threads=True)


def worker_stack(pid: int) -> str:
    """The stack of a data worker that has called `answer`, or else the state that the kernel has it in; else nothing.

    Linux only: a worker's answer is read from its memory under /proc, so nothing is left on a disk.
    """
    process = Path("/proc", str(pid))
    with suppress(OSError):
        for link in (process / "fd").iterdir():
            if ANSWER in os.readlink(link):
                os.kill(pid, ASK)
                if text := _written(link):
                    return text
        state = re.search(r"^State:\s+(.+)$", (process / "status").read_text(), flags=re.MULTILINE)
        return f"no answer; state {state[1]}" if state else ""
    return ""


def _written(path: Path) -> str:
    """What a file holds once it has stopped to grow; nothing if it stays empty."""
    deadline, text = time.monotonic() + PATIENCE, ""
    while time.monotonic() < deadline:
        before, text = text, path.read_text(errors="replace")
        if text and text == before:
            return text
        time.sleep(0.02)
    return text
