"""Reading a checkpoint for its own sake: is every byte of it what was written, and every file what it says it is?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.checkpoint.files import ALIGNMENT, METADATA, FileEntry, FileReader, entries
from launcher.checkpoint.index import Index, read_index
from launcher.errors import DamagedError

__all__ = ["verify", "verify_file"]


def verify(path: Path) -> Index:
    """Read all files of the checkpoint in directory `path`, and return its index.

    `load` goes by the index alone. Here the safetensors headers are compared with it too, so that other readers of
    the files find in them what `load` does.

    Raises:
        DamagedError: something is missing, damaged, or contradicts the index; it is named.
        CheckpointError: it is of another version of the launcher.
    """
    index = read_index(path)
    for number in range(len(index.files)):
        verify_file(path, index, number)
    return index


def verify_file(path: Path, index: Index, number: int) -> None:
    """Read a file of a checkpoint, and compare its safetensors header with the index.

    Raises:
        DamagedError: it is missing, damaged, or contradicts the index.
    """
    entry = index.files[number]
    with FileReader(path, entry) as reader:
        for file, part in index.parts:
            if file == number:
                reader.verify(part)
        try:
            found = _header(reader, entry)
        except (ValueError, RecursionError):
            raise DamagedError(f"{path.name}/{entry.name} has a broken safetensors header") from None
    wanted = _wanted(index, number)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise DamagedError(f"{path.name}/{entry.name} and the index contradict each other about {name!r}")


def _header(reader: FileReader, entry: FileEntry) -> dict[str, Any]:
    """The tensors that a safetensors header describes."""
    text = bytearray(entry.header.size)
    reader.read(entry.header, 0, memoryview(text))
    if len(text) < 8 or 8 + int.from_bytes(text[:8], "little") != len(text):
        raise ValueError("it is not as long as it says")
    found = json.loads(text[8:])
    if type(found) is not dict:
        raise ValueError("it is no object")
    found.pop(METADATA, None)
    return found


def _wanted(index: Index, file: int) -> dict[str, Any]:
    """What the header of a file must say, by the index."""
    wanted: dict[str, Any] = {}
    length = index.files[file].header.size
    for rank, (number, part) in enumerate(index.parts):
        if number == file:
            if not 0 <= part.size - index.plan.nbytes(rank) < ALIGNMENT:
                raise DamagedError(f"the part of rank {rank} has {part.size} bytes, not {index.plan.nbytes(rank)}")
            wanted |= entries(index.plan[rank], index.tensors, part.offset - length, part.size)
    return wanted
