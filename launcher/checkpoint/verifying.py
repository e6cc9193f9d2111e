"""Reading a checkpoint for its own sake: is every byte of it what was written, and every file what it says it is?"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launcher.checkpoint.files import (
    ALIGNMENT,
    BLOCK,
    DIGEST,
    METADATA,
    FileEntry,
    FileReader,
    Segment,
    entries,
)
from launcher.checkpoint.index import Index, read_index
from launcher.checkpoint.store import VERIFIED, Store
from launcher.errors import DamagedError

__all__ = ["verify", "verify_and_mark"]

_PIECE = 8 * BLOCK
"""Bytes that a thread reads before it takes the next ones: little enough to stop soon after Ctrl-C."""

_THREADS = 4  # reading and digesting both let go of the interpreter


def verify(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Index:
    """Read all files of the checkpoint in directory `path`, and return its index.

    `load` goes by the index alone. Here the safetensors headers are compared with it too, so that other readers of
    the files find in them what `load` does. `progress(bytes read, of all)` is called now and then.

    Raises:
        DamagedError: something is missing, damaged, or contradicts the index; it is named.
        CheckpointError: it is of another version of the launcher.
    """
    index = read_index(path)
    _read_all(path, index, progress)
    for number in range(len(index.files)):
        _compare_header(path, index, number)
    return index


def verify_and_mark(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Index:
    """As `verify`, and leave a note of it beside the checkpoint's files; of one that is damaged, take it away.

    Raises:
        DamagedError, CheckpointError: as `verify`.
    """
    marker = path / VERIFIED
    try:
        index = verify(path, progress)
    except DamagedError:
        _remove(marker)
        raise
    if marker.is_symlink():  # a link could have us touch any file
        _remove(marker)
    Store(path.parent).mark_verified(path)
    return index


def _read_all(path: Path, index: Index, progress: Callable[[int, int], None]) -> None:
    """Verify every block, in several threads; of several faults the first is raised."""
    pieces = list(_pieces(index))
    read = 0

    def check(piece: tuple[FileEntry, Segment]) -> int:
        entry, segment = piece
        with FileReader(path, entry) as reader:
            reader.verify(segment)
        return segment.size

    if index.nbytes <= _PIECE:  # threads would take longer than the reading
        for piece in pieces:
            check(piece)
        return
    pool = ThreadPoolExecutor(_THREADS)
    try:
        for size in pool.map(check, pieces):
            read += size
            progress(read, index.nbytes)
    finally:
        pool.shutdown(cancel_futures=True)


def _pieces(index: Index) -> Iterator[tuple[FileEntry, Segment]]:
    """All bytes of all files, file by file, in segments of whole blocks."""
    for number, entry in enumerate(index.files):
        yield from ((entry, piece) for piece in _cut(entry.header))
        for file, part in index.parts:
            if file == number:
                yield from ((entry, piece) for piece in _cut(part))


def _cut(segment: Segment) -> Iterator[Segment]:
    for start in range(0, segment.size, _PIECE):
        size = min(_PIECE, segment.size - start)
        first, last = start // BLOCK, -(-(start + size) // BLOCK)
        yield Segment(segment.offset + start, size, segment.digests[first * DIGEST : last * DIGEST])


def _compare_header(path: Path, index: Index, number: int) -> None:
    """Compare a file's safetensors header with the index.

    Raises:
        DamagedError: they contradict each other.
    """
    entry = index.files[number]
    with FileReader(path, entry) as reader:
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


def _remove(marker: Path) -> None:
    try:
        os.unlink(marker)
    except OSError:  # there is none, or it may not be removed: the fault is told all the same
        return
