"""Tensors of a checkpoint, whole and in this process, a few at a time: to look at them, not to go on from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from launcher.checkpoint.buffer import Buffer
from launcher.checkpoint.files import FileReader
from launcher.checkpoint.index import Index
from launcher.checkpoint.layout import TensorSpec
from launcher.checkpoint.loading import Stage

__all__ = ["as_written", "read_tensors"]

_ROOM = 64 << 20
"""Bytes read at once: small tensors share blocks, and a block should not be read for each of them."""


def read_tensors(path: Path, index: Index, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors (or what they are tied to) of the checkpoint in directory `path`, verified, in that order.

    Memory is that of the largest, or `_ROOM`: each is good until the next is asked for. Names in the order of
    `as_written` are read in long stretches.

    Raises:
        DamagedError: a file is not what was written.
        MemoryError: there is no room for a tensor.
    """
    for entry in index.files:  # so that no room is made for what the files are too short to hold
        FileReader(path, entry).__exit__(None, None, None)
    buffer = Buffer()
    for group in _groups(index, names):
        held = {name: index.tensors[index.holder(name)] for name in group}
        whole = {name: TensorSpec(spec.shape, spec.dtype) for name, spec in held.items()}
        stage = Stage(path, index, whole, 0, buffer)
        stage.fill({name: index.holder(name) for name in group})
        for name, bits in stage.tensors():
            yield name, bits.view(index.dtype(name))


def as_written(index: Index, names: Iterable[str]) -> list[str]:
    """Names in the order in which their data lies in the files."""
    return sorted(names, key=lambda name: (-index.tensors[index.holder(name)].itemsize, name))


def _groups(index: Index, names: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name in names:
        nbytes = index.tensors[index.holder(name)].nbytes
        if group and size + nbytes > _ROOM:
            yield group
            group, size = [], 0
        group.append(name)
        size += nbytes
    if group:
        yield group
