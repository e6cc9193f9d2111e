"""What a recipe holds in its own variables at a step's edge: what a resume must not change, and no checkpoint may hold.

An average of the weights, a counter, a scheduler: whatever it is, after a resume it must be what it was in a run that
was never stopped.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from launcher.check.digest import digest
from launcher.stacks import Place, is_own

if TYPE_CHECKING:
    from launcher.run import Run

__all__ = ["Leftovers"]

DEPTH = 3  # of objects and containers, one in another
MANY = 1000  # members of a container; one that has more is data


class Leftovers:
    """Looks into the variables of the recipe's functions that are being run."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def look(self) -> dict[str, tuple[str, str]]:
        """By name, the type and a digest of each; called from a generator that the recipe advances."""
        known, found = self._known(), dict[str, tuple[str, str]]()
        frame: FrameType | None = inspect.currentframe()
        while frame is not None:
            if _is_recipes(frame.f_code.co_filename):
                for name, value in frame.f_locals.items():
                    for full, part, state in _states(name, value, known, DEPTH):
                        found.setdefault(full, (type(part).__name__, digest(state)))
            frame = frame.f_back
        return found

    def _known(self) -> set[int]:
        """What the launcher looks after."""
        run = self._run
        known = {id(run), *map(id, run.loaders), *(id(loader.stream.data) for loader in run.loaders if loader.stream)}
        known |= {id(module) for model in run.models.values() for module in (model, *model.modules())}
        return known | {id(one) for optimizer in run.optimizers for one in (optimizer, optimizer.inner)}


def _states(name: str, value: Any, known: set[int], depth: int) -> Iterator[tuple[str, Any, Any]]:
    """Name, object and state of what has one, in an object and in those that it is made of."""
    if id(value) in known or isinstance(value, type | torch.nn.Parameter) or name.startswith("__"):
        return
    state = _state(value, depth)
    if state is not None:
        yield name, value, state
    elif depth and hasattr(value, "__dict__") and _is_recipes(_source(type(value))):
        for key, part in vars(value).items():
            yield from _states(f"{name}.{key}", part, known, depth - 1)


def _state(value: Any, depth: int) -> Any:
    """What could change of an object; None where that is nothing, or not known."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) or type(value) in (int, float):
        return value
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, dict | list | tuple | deque):
        if not depth or not 0 < len(value) <= MANY:
            return None
        states = [_state(one, depth - 1) for one in (value.values() if isinstance(value, dict) else value)]
        return [state for state in states if state is not None] or None
    try:
        state = value.state_dict() if callable(getattr(value, "state_dict", None)) else None
    except Exception:  # of the recipe's own, or of a library's: it has none at this time
        return None
    return state if isinstance(state, Mapping) else None


def _is_recipes(path: str) -> bool:
    """Whether a file is the person's own."""
    return bool(path) and is_own(Place(path, 0, ""))


def _source(kind: type) -> str:
    return getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
