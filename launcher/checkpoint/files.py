"""One file of a checkpoint: safetensors, written by the ranks of a node together, read by blocks verified first.

A file is a sequence of segments: its header, then a part for each rank that wrote into it. A segment's bytes are
digested in blocks of `BLOCK` bytes from its own start, the last may be shorter; so no rank needs another's bytes. A
digest is the 16 bytes of xxh3_128 in canonical (big-endian) order.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from launcher.checkpoint.layout import TensorSpec, Write
from launcher.errors import CheckpointError, DamagedError

__all__ = [
    "ALIGNMENT",
    "BLOCK",
    "DIGEST",
    "METADATA",
    "FileEntry",
    "FileReader",
    "Segment",
    "create_file",
    "digest_count",
    "entries",
    "fsync_directory",
    "header",
    "key",
    "open_file",
    "part_sizes",
    "write_file",
    "write_part",
]

BLOCK = 8 << 20
"""Bytes that are digested together, and read at once."""

DIGEST = 16
"""Bytes of a digest."""

MOST_PLACES = 1000
"""Into which one call reads; Linux takes 1,024."""

METADATA = "__metadata__"
"""The entry of a safetensors header that is no tensor."""

PADDING = "__padding__"

ALIGNMENT = 8
"""Bytes, the largest element's: other readers of safetensors map a tensor where it stands."""


@dataclass(frozen=True)
class Segment:
    """Bytes of a file that were written by one rank, and their digests."""

    offset: int
    """Bytes from the start of the file."""
    size: int
    digests: bytes
    """The digests of its blocks, joined."""


@dataclass(frozen=True)
class FileEntry:
    """What the index says of a file; its parts follow the header without a gap."""

    name: str
    size: int
    """Bytes, header included."""
    header: Segment


def digest_count(size: int) -> int:
    """How many bytes the digests of `size` bytes take."""
    return DIGEST * -(-size // BLOCK)


def key(write: Write, spec: TensorSpec) -> str:
    """How a box is called in its file: the tensor's name, and which part of it where it is not whole: `w[0:8,0:4]`."""
    if write.box.sizes == spec.shape:
        return write.name
    ranges = (f"{start}:{start + size}" for start, size in zip(write.box.offsets, write.box.sizes, strict=True))
    return f"{write.name}[{','.join(ranges)}]"


def entries(writes: Sequence[Write], specs: Mapping[str, TensorSpec], start: int, size: int) -> dict[str, Any]:
    """What a safetensors header says of a part of `size` bytes that begins `start` bytes after the header.

    Bytes that only align the next part are a tensor too, since the format knows no gaps: `__padding__[48]`, by where
    they are.

    Raises:
        CheckpointError: two names would be one in the file.
    """
    found: dict[str, Any] = {}
    for write in writes:
        name = key(write, specs[write.name])
        if name in found or name.startswith((METADATA, PADDING)):
            raise CheckpointError(f"two entries of the checkpoint would be called {name}: rename the tensor")
        extent = [start + write.offset, start + write.offset + write.nbytes]
        found[name] = {"dtype": specs[write.name].dtype, "shape": list(write.box.sizes), "data_offsets": extent}
    used = sum(write.nbytes for write in writes)
    if used < size:
        extent = [start + used, start + size]
        found[f"{PADDING}[{start + used}]"] = {"dtype": "U8", "shape": [size - used], "data_offsets": extent}
    return found


def part_sizes(nbytes: Sequence[int]) -> list[int]:
    """The sizes of one file's parts, whose data takes `nbytes`: all but the last end where an element may start."""
    return [-(-size // ALIGNMENT) * ALIGNMENT for size in nbytes[:-1]] + list(nbytes[-1:])


def header(parts: Sequence[Sequence[Write]], specs: Mapping[str, TensorSpec]) -> bytes:
    """The head of a safetensors file of several ranks' parts: its length (8 bytes, little-endian), JSON, spaces that
    align the data.

    Raises:
        CheckpointError: two names would be one in the file.
    """
    described: dict[str, Any] = {METADATA: {"format": "pt"}}
    start = 0
    for writes, size in zip(parts, part_sizes([sum(w.nbytes for w in writes) for writes in parts]), strict=True):
        found = entries(writes, specs, start, size)
        if twice := described.keys() & found.keys():
            raise CheckpointError(f"two entries of the checkpoint would be called {min(twice)}: rename the tensor")
        described |= found
        start += size
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def create_file(path: Path, head: bytes, size: int) -> Segment:
    """Make a file of `size` bytes that begins with `head`; ranks then write their parts into it.

    Its blocks are allocated at once: a full disk is found before gigabytes have been written, and ranks that extend
    one file together would wait for each other.

    Raises:
        OSError: it cannot be; the error names it.
    """
    with _open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        return Segment(0, len(head), _write(fd, 0, memoryview(head)))


def write_part(path: Path, offset: int, data: memoryview, size: int) -> Segment:
    """Write a rank's part into a file that is there, zeros behind it up to `size` bytes, and fsync it.

    Raises:
        OSError: it cannot be written; the error names it.
    """
    whole, rest = len(data) // BLOCK * BLOCK, bytes(size - len(data))
    with _open(path, os.O_WRONLY) as fd:
        digests = _write(fd, offset, data[:whole])
        if whole < size:
            digests += _write(fd, offset + whole, memoryview(bytes(data[whole:]) + rest))
        os.fsync(fd)
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)
    return Segment(offset, size, digests)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and fsync it.

    Raises:
        OSError: it cannot be written; the error names it.
    """
    with _open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
        _write(fd, 0, memoryview(data))
        os.fsync(fd)


def open_file(path: Path) -> tuple[int, int]:
    """A descriptor for reading an ordinary file of a checkpoint, and the file's size.

    Raises:
        DamagedError: it is missing, or something else than an ordinary file: a link could lead anywhere, and a pipe
            would never end.
        CheckpointError: it cannot be read here, which says nothing of what it holds.
    """
    where = f"{path.parent.name}/{path.name}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise DamagedError(f"{where} is missing") from None
    except OSError as error:
        if path.is_symlink():
            raise DamagedError(f"{where} is a link: a checkpoint is read from ordinary files only") from None
        raise _unreadable(where, error) from None
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise DamagedError(f"{where} is no ordinary file")
    return fd, found.st_size


class FileReader:
    """A file of a checkpoint, open. No byte of it is handed out before its block's digest has been verified.

    Raises:
        DamagedError: from the start, that the file is missing or not of the size it was written with.
    """

    def __init__(self, directory: Path, entry: FileEntry) -> None:
        self._where = f"{directory.name}/{entry.name}"
        self._held = (-1, -1)  # the segment and the block in `_scratch`
        self._scratch = bytearray()
        self._fd, size = open_file(directory / entry.name)
        if size != entry.size:
            os.close(self._fd)
            raise DamagedError(f"{self._where} has {size} bytes and was written with {entry.size}: it is damaged")

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._fd)

    def read(self, segment: Segment, start: int, out: memoryview) -> None:
        """Fill `out` with the segment's bytes from `start` on.

        Raises:
            DamagedError: a block is not what was written, or cannot be read.
        """
        self.scatter(segment, [(start, out)])

    def scatter(self, segment: Segment, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """Fill several ranges of a segment, each given by its start; ascending, and apart from each other.

        A block that they fill goes straight to their places. Of others the latest is kept, so that ranges read in
        ascending order, also by several calls, read each block once.

        Raises:
            DamagedError: as `read`.
        """
        for block, outs in _by_block(ranges):
            size = min(BLOCK, segment.size - block * BLOCK)
            if sum(len(out) for _, out in outs) == size and len(outs) <= MOST_PLACES:
                self._fetch(segment, block, [out for _, out in outs])
                continue
            if self._held != (segment.offset, block):
                self._held, self._scratch = (-1, -1), self._scratch or bytearray(BLOCK)
                self._fetch(segment, block, [memoryview(self._scratch)[:size]])
                self._held = (segment.offset, block)
            for skip, out in outs:
                out[:] = memoryview(self._scratch)[skip : skip + len(out)]

    def verify(self, segment: Segment) -> None:
        """Read every block of a segment.

        Raises:
            DamagedError: as `read`.
        """
        scratch = memoryview(bytearray(min(BLOCK, segment.size)))
        for start in range(0, segment.size, BLOCK):
            self.read(segment, start, scratch[: segment.size - start])
        os.posix_fadvise(self._fd, segment.offset, segment.size, os.POSIX_FADV_DONTNEED)

    def _fetch(self, segment: Segment, block: int, outs: Sequence[memoryview]) -> None:
        """Read a block, all of it, into places that it fills one after another."""
        start = at = segment.offset + block * BLOCK
        left = list(outs)
        while left:
            try:
                count = os.preadv(self._fd, left, at)
            except OSError as error:
                raise _unreadable(self._where, error) from None
            if count == 0:
                raise DamagedError(f"{self._where} ends at byte {at}: it was cut while being read")
            at += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if left:
                left[0] = left[0][count:]
        digest = xxhash.xxh3_128()
        for out in outs:
            digest.update(out)
        if digest.digest() != segment.digests[block * DIGEST : (block + 1) * DIGEST]:
            raise DamagedError(f"{self._where} is damaged: bytes {start} to {at} fail their digest")


def _unreadable(where: str, error: OSError) -> CheckpointError:
    """What the system says of a file: a bad disk is damage, all else is of this machine, or of this moment."""
    kind = DamagedError if error.errno == errno.EIO else CheckpointError
    return kind(f"{where} cannot be read here: {error.strerror}")


def _by_block(ranges: Sequence[tuple[int, memoryview]]) -> list[tuple[int, list[tuple[int, memoryview]]]]:
    """The ranges, cut at the blocks' edges: for each block what is wanted of it, by its place in the block."""
    blocks: list[tuple[int, list[tuple[int, memoryview]]]] = []
    for first, whole in ranges:
        start, out = first, whole
        while len(out):
            block, skip = divmod(start, BLOCK)
            if not blocks or blocks[-1][0] != block:
                blocks.append((block, []))
            count = min(BLOCK - skip, len(out))
            blocks[-1][1].append((skip, out[:count]))
            start, out = start + count, out[count:]
    return blocks


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _open(path: Path, flags: int) -> Iterator[int]:
    """A descriptor of a file that is written; an error names the file."""
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            yield fd
        finally:
            os.close(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(fd: int, offset: int, data: memoryview) -> bytes:
    """Write a segment; its digests, each taken while the block is at hand."""
    digests = []
    for start in range(0, len(data), BLOCK):
        block = data[start : start + BLOCK]
        digests.append(xxhash.xxh3_128_digest(block))
        written = 0
        while written < len(block):
            written += os.pwrite(fd, block[written:], offset + start + written)
        # Linux begins to write the dirty pages back at once, so that the fsync finds little left to do; and what is
        # on the disk leaves the cache, where the data loader's pages are worth more.
        os.posix_fadvise(fd, offset + start, len(block), os.POSIX_FADV_DONTNEED)
    return b"".join(digests)
