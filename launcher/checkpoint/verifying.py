"""Reading a checkpoint for its own sake: is every byte of it what was written, and every file what it says it is?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.checkpoint.files import METADATA, FileReader, entries
from launcher.checkpoint.index import Index, read_index
from launcher.errors import CheckpointError

__all__ = ["verify"]


def verify(path: Path) -> Index:
    """Read all files of the checkpoint in directory `path`, and return its index.

    `load` goes by the index alone. Here the safetensors headers are compared with it too, so that other readers of
    the files find in them what `load` does.

    Raises:
        CheckpointError: something is missing, damaged, or contradicts the index; it is named.
    """
    index = read_index(path)
    for number, entry in enumerate(index.files):
        with FileReader(path, entry) as reader:
            reader.verify()
            try:
                length, found = _header(reader, entry.size)
            except (ValueError, RecursionError):
                raise CheckpointError(f"{path.name}/{entry.name} has a broken safetensors header") from None
        wanted = _wanted(index, number, length)
        for name in found.keys() | wanted.keys():
            if found.get(name) != wanted.get(name):
                raise CheckpointError(f"{path.name}/{entry.name} and the index contradict each other about {name!r}")
        held = sum(index.plan.nbytes(rank) for rank, (file, _) in enumerate(index.parts) if file == number)
        if length + held != entry.size:
            raise CheckpointError(f"{path.name}/{entry.name} holds {entry.size - length} bytes of data, not {held}")
    return index


def _header(reader: FileReader, size: int) -> tuple[int, dict[str, Any]]:
    """The length of a safetensors header with the eight bytes before it, and the tensors it describes."""
    start = bytearray(min(8, size))
    reader.read(0, memoryview(start))
    length = 8 + int.from_bytes(start, "little")
    if length > size:
        raise ValueError("it does not fit into the file")
    text = bytearray(length - 8)
    reader.read(8, memoryview(text))
    found = json.loads(text)
    if type(found) is not dict:
        raise ValueError("it is no object")
    found.pop(METADATA, None)
    return length, found


def _wanted(index: Index, file: int, length: int) -> dict[str, Any]:
    """What the header of a file must say, by the index."""
    wanted: dict[str, Any] = {}
    for rank, (number, offset) in enumerate(index.parts):
        if number == file:
            wanted |= entries(index.plan[rank], index.tensors, offset - length)
    return wanted
