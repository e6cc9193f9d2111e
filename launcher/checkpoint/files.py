"""One file of a checkpoint: safetensors, written in one pass and read by whole blocks that are verified first.

A file's bytes, header included, are digested in blocks of `BLOCK` bytes from its start; the last may be shorter.
A digest is the 16 bytes of xxh3_128 in canonical (big-endian) order.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from launcher.checkpoint.layout import TensorSpec, Write
from launcher.errors import CheckpointError

__all__ = [
    "BLOCK",
    "DIGEST",
    "METADATA",
    "FileEntry",
    "FileReader",
    "entries",
    "fsync_directory",
    "header",
    "key",
    "open_file",
    "write_file",
]

BLOCK = 8 << 20
"""Bytes that are digested together, and read at once."""

DIGEST = 16
"""Bytes of a digest."""

METADATA = "__metadata__"
"""The entry of a safetensors header that is no tensor."""


@dataclass(frozen=True)
class FileEntry:
    """What the index says of a file."""

    name: str
    size: int
    """Bytes, header included."""
    digests: bytes
    """The digests of its blocks, joined."""


def key(write: Write, spec: TensorSpec) -> str:
    """How a box is called in its file: the tensor's name, and which part of it where it is not whole: `w[0:8,0:4]`."""
    if write.box.sizes == spec.shape:
        return write.name
    ranges = (f"{start}:{start + size}" for start, size in zip(write.box.offsets, write.box.sizes, strict=True))
    return f"{write.name}[{','.join(ranges)}]"


def entries(writes: Sequence[Write], specs: Mapping[str, TensorSpec], start: int = 0) -> dict[str, Any]:
    """What a safetensors header says of a part that begins `start` bytes after the header.

    Raises:
        CheckpointError: two names would be one in the file.
    """
    found: dict[str, Any] = {}
    for write in writes:
        name = key(write, specs[write.name])
        if name in found or name == METADATA:
            raise CheckpointError(f"two entries of the checkpoint would be called {name}: rename the tensor")
        extent = [start + write.offset, start + write.offset + write.nbytes]
        found[name] = {"dtype": specs[write.name].dtype, "shape": list(write.box.sizes), "data_offsets": extent}
    return found


def header(writes: Sequence[Write], specs: Mapping[str, TensorSpec]) -> bytes:
    """The head of a safetensors file of one part: its length (8 bytes, little-endian), JSON, spaces to align the data.

    Raises:
        CheckpointError: two names would be one in the file.
    """
    described = {METADATA: {"format": "pt"}} | entries(writes, specs)
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, head: bytes, data: memoryview) -> FileEntry:
    """Write a new file of `head` and `data` and fsync it; a block is digested while it is at hand.

    Raises:
        OSError: it cannot be written; the error names it.
    """
    digests = []
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for views in _blocks(memoryview(head), data):
            digest = xxhash.xxh3_128()
            for view in views:
                digest.update(view)
                _write_all(fd, view)
            digests.append(digest.digest())
        os.fsync(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)
    return FileEntry(path.name, len(head) + len(data), b"".join(digests))


def open_file(path: Path) -> tuple[int, int]:
    """A descriptor for reading an ordinary file of a checkpoint, and the file's size.

    Raises:
        CheckpointError: it is missing, unreadable, or something else than an ordinary file: a link could lead
            anywhere, and a pipe would never end.
    """
    where = f"{path.parent.name}/{path.name}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"{where} is missing") from None
    except OSError as error:
        if path.is_symlink():
            raise CheckpointError(f"{where} is a link: a checkpoint is read from ordinary files only") from None
        raise CheckpointError(f"{where} cannot be read: {error.strerror}") from None
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise CheckpointError(f"{where} is no ordinary file")
    return fd, found.st_size


class FileReader:
    """A file of a checkpoint, open. No byte of it is handed out before its block's digest has been verified.

    Raises:
        CheckpointError: from the start, that the file is missing or not of the size it was written with.
    """

    def __init__(self, directory: Path, entry: FileEntry) -> None:
        self._where = f"{directory.name}/{entry.name}"
        self._entry = entry
        self._held = -1  # the block in `_scratch`
        self._scratch = bytearray()
        self._fd, size = open_file(directory / entry.name)
        if size != entry.size:
            os.close(self._fd)
            raise CheckpointError(f"{self._where} has {size} bytes and was written with {entry.size}: it is damaged")

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._fd)

    def read(self, start: int, out: memoryview) -> None:
        """Fill `out` with the file's bytes from `start` on.

        A whole block goes straight to its place. Of others the latest is kept, so that ranges read in ascending
        order read each block once.

        Raises:
            CheckpointError: a block is not what was written, or cannot be read.
        """
        while len(out):
            block, skip = divmod(start, BLOCK)
            size = min(BLOCK, self._entry.size - block * BLOCK)
            count = min(size - skip, len(out))
            if count == size:
                self._fetch(block, out[:count])
            else:
                if self._held != block:
                    self._held, self._scratch = -1, self._scratch or bytearray(min(BLOCK, self._entry.size))
                    self._fetch(block, memoryview(self._scratch)[:size])
                    self._held = block
                out[:count] = memoryview(self._scratch)[skip : skip + count]
            start, out = start + count, out[count:]

    def verify(self) -> None:
        """Read every block.

        Raises:
            CheckpointError: as `read`.
        """
        scratch = memoryview(bytearray(min(BLOCK, self._entry.size)))
        for start in range(0, self._entry.size, BLOCK):
            self.read(start, scratch[: self._entry.size - start])

    def _fetch(self, block: int, out: memoryview) -> None:
        start, filled = block * BLOCK, 0
        while filled < len(out):
            try:
                count = os.preadv(self._fd, [out[filled:]], start + filled)
            except OSError as error:
                raise CheckpointError(f"{self._where} cannot be read: {error.strerror}") from None
            if count == 0:
                raise CheckpointError(f"{self._where} ends at byte {start + filled}: it was cut while being read")
            filled += count
        if xxhash.xxh3_128_digest(out) != self._entry.digests[block * DIGEST : (block + 1) * DIGEST]:
            raise CheckpointError(f"{self._where} is damaged: bytes {start} to {start + len(out)} fail their digest")


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _blocks(*sources: memoryview) -> Iterator[list[memoryview]]:
    """The sources one after another, in blocks; a block may be in several pieces."""
    block: list[memoryview] = []
    room = BLOCK
    for source in sources:
        while len(source):
            block.append(source[:room])
            source, room = source[room:], room - len(block[-1])
            if not room:
                yield block
                block, room = [], BLOCK
    if block:
        yield block


def _write_all(fd: int, view: memoryview) -> None:
    while len(view):
        view = view[os.write(fd, view) :]
