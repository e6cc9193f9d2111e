"""Ranks of one node take turns: the first to need a compiled graph compiles it, the others take it from the cache.

Every rank of a data-parallel job compiles the same graphs. Inductor looks a graph up in its cache once, before it
compiles; two ranks that start together both miss. Here a miss takes a lock file of that graph, on the node's own disk,
and looks again where another rank has had it. The rank that holds the lock is compiling, which needs no other rank: it
waits for no collective, so that nobody can wait for ever, and each rank holds one lock at most.

torch keys a graph by its device's index too: GPUs of a node that are numbered cuda:0 to cuda:7 have graphs of their
own, and compile them side by side, as before; ranks that see one GPU each, and ranks on a CPU, share theirs.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["take_turns"]

PATIENCE = 600.0  # seconds to wait for another rank's compile; then this rank compiles too
POLL = 0.02


class Turns:
    """The locks of one process, a file for each graph in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._held: int | None = None
        self._inside = 0

    def compiling(self, compile_graph: Callable[..., Any]) -> Callable[..., Any]:
        """`compile_graph`, after which the lock is given back that a look-up within it has taken."""

        def compile_in_turn(*args: Any, **kwargs: Any) -> Any:
            self._inside += 1
            try:
                return compile_graph(*args, **kwargs)
            finally:
                self._inside -= 1
                self.give_back()

        return compile_in_turn

    def looking_up(self, look_up: Callable[..., Any]) -> Callable[..., Any]:
        """`look_up(key, ...)`, None in front for a miss, which looks again where another rank had its turn."""

        def look_up_in_turn(key: Any, *args: Any, **kwargs: Any) -> Any:
            found = look_up(key, *args, **kwargs)
            if self._inside and self._held is None and found[0] is None and self.take(str(key)):
                found = look_up(key, *args, **kwargs)
            return found

        return look_up_in_turn

    def take(self, key: str) -> bool:
        """Take a graph's lock; whether another rank had it before. Without a lock, where files cannot be locked."""
        path, until, taken_before = self._directory / f"{key}.turn", time.monotonic() + PATIENCE, False
        try:
            try:
                self._held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except FileExistsError:
                self._held, taken_before = os.open(path, os.O_RDWR | os.O_CLOEXEC), True
            while not _locked(self._held) and time.monotonic() < until:
                taken_before = True
                time.sleep(POLL)
        except OSError:
            self.give_back()
        return taken_before

    def give_back(self) -> None:
        """Give back the lock that is held, if there is one."""
        held, self._held = self._held, None
        if held is not None:
            with suppress(OSError):
                fcntl.flock(held, fcntl.LOCK_UN)  # a forked compile worker may have a copy of the descriptor
            os.close(held)


def take_turns(directory: Path) -> Callable[[], None]:
    """Let the ranks that call this with the same `directory` take turns from now on; what undoes it.

    The two places are inductor's own, and private: where a torch has them no more, ranks compile as they did before.
    torch's tests wrap the first of them too (torch/_dynamo/testing.py).
    """
    try:
        from torch._inductor import compile_fx, config
        from torch._inductor.codecache import FxGraphCache

        compile_graph, look_up = compile_fx._compile_fx_inner, FxGraphCache.load_with_key
        together = getattr(config, "distributed_max_autotune_gemm", False)  # then a compile waits for other ranks
    except (ImportError, AttributeError):
        return _nothing
    if together:
        return _nothing
    turns = Turns(directory)
    compile_fx._compile_fx_inner = turns.compiling(compile_graph)
    FxGraphCache.load_with_key = staticmethod(turns.looking_up(look_up))  # type: ignore[method-assign]

    def undo() -> None:
        compile_fx._compile_fx_inner = compile_graph
        FxGraphCache.load_with_key = staticmethod(look_up)  # type: ignore[method-assign]

    return undo


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _nothing() -> None:
    pass
