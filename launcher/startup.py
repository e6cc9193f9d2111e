"""Where the time to the first step goes: told in one line once it is done, and recorded with the run.

The stages follow each other, from the moment that the kernel started the process; one within another takes its time
away from that. What torch spends on compiling counts as `compile`, in whatever stage it happens.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["Startup"]

LEAST = 0.05  # seconds of a stage that is worth a person's reading


class Startup:
    """The stages of one start; `seconds` holds those that have ended. Does nothing after `end`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = _process_start()
        self._last, self._compiled = self._began, _compile_seconds()
        self._stages = ["imports"]
        self._ended = False

    def enter(self, stage: str) -> None:
        """The stage before is over, and this one begins."""
        if not self._ended:
            self._lap()
            self._stages[-1] = stage

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """A stage within the one that goes on around it."""
        if self._ended:
            yield
            return
        self._lap()
        self._stages.append(stage)
        try:
            yield
        finally:
            if not self._ended:
                self._lap()
            self._stages.pop()

    def end(self, waited: float) -> dict[str, float]:
        """The first step is done, which has waited for data for so many seconds; all stages and their `total`."""
        self._lap()
        self._ended = True
        waited = min(waited, self.seconds.get("step", 0.0))
        self._add("first batch", waited)
        self._add("step", -waited)
        total = sum(self.seconds.values())
        return {stage: round(seconds, 3) for stage, seconds in self.seconds.items()} | {"total": round(total, 3)}

    def _lap(self) -> None:
        now, compiled = time.monotonic(), _compile_seconds()
        compiling = min(max(0.0, compiled - self._compiled), now - self._last)
        self._add(self._stages[-1], now - self._last - compiling)
        if compiling:
            self._add("compile", compiling)
        self._last, self._compiled = now, compiled

    def _add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


def line(seconds: dict[str, float]) -> str:
    """What `end` gave, for a person."""
    stages = [
        f"{stage} {told:.1f}" + (_graphs() if stage == "compile" else "")
        for stage, told in seconds.items()
        if stage != "total" and told >= LEAST
    ]
    return f"first step done {seconds['total']:.1f} s after the start: {', '.join(stages)}"


def _graphs() -> str:
    """How many graphs came from the cache, where that is known."""
    with suppress(Exception):  # counters are private
        counters = sys.modules["torch._dynamo.utils"].counters["inductor"]
        hits, misses = counters["fxgraph_cache_hit"], counters["fxgraph_cache_miss"]
        if hits or misses:
            return f" ({hits} of {hits + misses} graphs from the cache)"
    return ""


def _compile_seconds() -> float:
    """What this process has spent on compiling so far, as torch counts it."""
    module = sys.modules.get("torch._dynamo.utils")
    with suppress(Exception):  # not imported yet, or a torch that counts otherwise: then it is the step's
        spent = module.cumulative_time_spent_ns  # type: ignore[union-attr]
        return (spent["entire_frame_compile"] + spent["entire_backward_compile"]) / 1e9  # type: ignore[no-any-return]
    return 0.0


def _process_start() -> float:
    """When the kernel started this process, on the monotonic clock; now, where it does not say. See proc(5)."""
    now = time.monotonic()
    with suppress(OSError, ValueError, IndexError):
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return now - age if age >= 0 else now
    return now
