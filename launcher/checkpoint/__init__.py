"""Checkpoints: safetensors files and JSON, verified block by block, readable at any world size and placement.

    path = save(Store(root), world, step, state, attempt=1)    # on all ranks; durable on return
    Writer(Store(root), world, attempt=1).start(step, state)   # the same in the background
    index = load(path, world, state)                           # on all ranks; all of them load, or none

A checkpoint exists once its directory has its final name; nothing on the way in or out is a pickle. `Store`,
`read_index` and `verify` look at checkpoints without torch, a process group or a GPU.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from launcher.checkpoint.index import Index, Json, read_index
from launcher.checkpoint.layout import Box, Plan, TensorSpec, boxes, plan
from launcher.checkpoint.retention import Best, Retention
from launcher.checkpoint.store import Store
from launcher.checkpoint.verifying import verify

if TYPE_CHECKING:
    from launcher.checkpoint.loading import load
    from launcher.checkpoint.saving import save
    from launcher.checkpoint.state import State, describe, describe_all
    from launcher.checkpoint.writer import Outcome, Writer

__all__ = [
    "Best",
    "Box",
    "Index",
    "Json",
    "Outcome",
    "Plan",
    "Retention",
    "State",
    "Store",
    "TensorSpec",
    "Writer",
    "boxes",
    "describe",
    "describe_all",
    "load",
    "plan",
    "read_index",
    "save",
    "verify",
]

_LAZY = {
    "Outcome": "writer",
    "State": "state",
    "Writer": "writer",
    "describe": "state",
    "describe_all": "state",
    "load": "loading",
    "save": "saving",
}


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is asked for: to look at checkpoints takes milliseconds."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
