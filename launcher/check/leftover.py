"""Objects of a recipe's own that change as it trains and that no checkpoint holds: an average of the weights, say."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from launcher.check.digest import digest
from launcher.sharded import local

if TYPE_CHECKING:
    from launcher.run import Run

__all__ = ["Leftovers"]

OURS = str(Path(__file__).parent.parent)
DEPTH = 3  # of objects of the recipe's own classes, one in another


class Leftovers:
    """Looks, at steps' edges, into the variables of the recipe's functions that are being run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._first: dict[str, tuple[Any, str]] = {}  # name -> object and digest, as first seen
        self._changed: dict[str, str] = {}

    def look(self) -> None:
        """Compare what there is with what there was; called from a generator that the recipe advances."""
        known = self._known()
        for name, value, state in _candidates(inspect.currentframe(), known):
            now = digest(state)
            first, before = self._first.setdefault(name, (value, now))
            if first is value and before != now:
                self._changed[name] = type(value).__name__

    def changed(self) -> dict[str, str]:
        """The names of those that have changed and stayed the same object, with their types."""
        return dict(self._changed)

    def _known(self) -> set[int]:
        """What a checkpoint holds, or what stands for it."""
        run = self._run
        known: set[int] = {id(run), *(id(obj) for obj, _ in run.tracked.values())}
        for loader in run.loaders:
            known |= {id(loader)} | ({id(loader.stream.data)} if loader.stream is not None else set())
        for model in run.models.values():
            known |= {id(module) for module in (model, *model.modules())}
            known |= {_memory(tensor) for tensor in (*model.parameters(), *model.buffers())}
        for optimizer in run.optimizers:
            known |= {id(optimizer), id(optimizer.inner)}
            moments = [moment for moments in optimizer.inner.state.values() for moment in moments.values()]
            known |= {_memory(moment) for moment in moments if isinstance(moment, torch.Tensor)}
        return known - {0}


def _candidates(frame: FrameType | None, known: set[int]) -> Iterator[tuple[str, Any, Any]]:
    """Name, object and state of what could be a state, in the recipe's functions from the inmost out."""
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith((OURS, sys.prefix, sys.base_prefix, "<")):
            for name, value in frame.f_locals.items():
                yield from _states(name, value, known, DEPTH)
        frame = frame.f_back


def _states(name: str, value: Any, known: set[int], depth: int) -> Iterator[tuple[str, Any, Any]]:
    if id(value) in known or isinstance(value, type) or name.startswith("__"):
        return
    state = _state(value)
    if state is not None:
        if not _held(state, known):
            yield name, value, state
    elif depth and type(value).__module__ == "__main__" and hasattr(value, "__dict__"):
        for key, part in vars(value).items():
            yield from _states(f"{name}.{key}", part, known, depth - 1)


def _state(value: Any) -> Any:
    """What could change of an object; None where it has no state that is known of."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if callable(getattr(value, "state_dict", None)):
        return value.state_dict()
    if isinstance(value, dict | list | tuple) and value:
        tensors = list(value.values() if isinstance(value, dict) else value)
        return tensors if all(isinstance(one, torch.Tensor) for one in tensors) else None
    return None


def _held(state: Any, known: set[int]) -> bool:
    """Whether some of it is in a checkpoint: parameters in a list, a wrapper of a model."""
    if isinstance(state, torch.Tensor):
        return _memory(state) in known
    if isinstance(state, Mapping):
        return any(_held(value, known) for value in state.values())
    return isinstance(state, list | tuple) and any(_held(value, known) for value in state)


def _memory(tensor: torch.Tensor) -> int:
    """Where a tensor's numbers are; 0 where they are nowhere."""
    return local(tensor).untyped_storage().data_ptr()
