"""Python's garbage collector, taken out of the steps: one that runs when it likes stops one rank, and so all of them.

What the start has made (modules, functions, the model: hundreds of thousands of objects) is frozen once the first steps
are over, so that no collection looks at it again; what comes later is collected at the same steps on all ranks.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Garbage"]

WARM = 2  # steps of a start after which nothing more is made that stays


class Garbage:
    """Collects at set steps, from the second step of a start on; before that, Python's own collector does.

    A recipe that has switched that off before its steps, or switches it on within them, keeps it so.
    """

    def __init__(self, *, every: int, empty_cache_every: int) -> None:
        """Args:
        every: steps between collections; 0: Python's own collector goes on.
        empty_cache_every: steps between two times that torch gives a GPU's unused memory back; 0: never.
        """
        self._every, self._empty_cache_every = every, empty_cache_every
        self._steps = 0
        self._holds = self._froze = False

    def edge(self, step: int) -> None:
        """`step` steps of the run are complete."""
        self._steps += 1
        if self._every and self._steps == WARM and gc.isenabled():
            self._hold()
        elif self._holds and gc.isenabled():
            self.release()
        elif self._holds and step % self._every == 0:
            gc.collect()
        if self._empty_cache_every and step % self._empty_cache_every == 0 and torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def automatic(self) -> Iterator[None]:
        """In here, where no step ends (an evaluation, say), Python collects when it likes."""
        if not self._holds or gc.isenabled():
            yield
            return
        gc.enable()
        try:
            yield
        finally:
            gc.disable()

    def _hold(self) -> None:
        gc.collect()
        if not gc.get_freeze_count():  # else the recipe has frozen what it likes, and may thaw it
            gc.freeze()
            self._froze = True
        gc.disable()
        self._holds = True

    def release(self) -> None:
        """Let go: as Python has it by itself."""
        if self._froze:
            gc.unfreeze()
        if self._holds:
            gc.enable()
        self._holds = self._froze = False
