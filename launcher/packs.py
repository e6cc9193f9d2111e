"""Packs: many small files in one, whose bytes are checked before one of them is used.

A shared file system takes as long for a small file as for a large one, and a compiled model is hundreds of them. A pack
is a line of JSON (what it was made for; each file's name, size and digest), the files, and a digest of the whole.
It appears whole or not at all, under the digest of what its files are called: who writes the same files writes the same
name, so that many nodes need not agree.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import stat
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

__all__ = ["LIMIT", "SUFFIX", "DamagedError", "ForeignError", "names", "pack", "unpack"]

LIMIT = 1 << 28  # bytes of a pack's files and their names: it is held in memory
SUFFIX = ".pack"
DIGEST = 16  # bytes, of xxh3's 128 bits
PART = 255  # bytes of a file's or a folder's name


class DamagedError(Exception):
    """A pack is not what was written."""


class ForeignError(Exception):
    """A pack is another user's, or open to others."""


def pack(root: Path, files: Iterable[str], store: Path, *, key: str, about: Mapping[str, Any]) -> tuple[str, ...]:
    """Write some files (relative to `root`) to a new pack in `store`; those that are in it, or in an equal one.

    A file that changes meanwhile, that is half a library, or that would make the pack larger than `LIMIT`, is left out.
    `key` goes into the pack's name, with the user and what the files are called. An equal pack becomes the newest.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    found = _read(root, sorted(files))
    if not found:
        return ()
    store.mkdir(mode=0o700, parents=True, exist_ok=True)
    called = "\n".join([key, str(os.geteuid()), *map(_entry, found)])
    path = store / (xxhash.xxh3_128_hexdigest(called.encode()) + SUFFIX)
    if path.exists():
        with suppress(OSError):
            os.utime(path)
    else:
        header = {"files": [[name, len(data)] for name, data in found.items()], "about": dict(about)}
        parts = [json.dumps(header).encode() + b"\n", *found.values()]
        _store(path, parts)
    return tuple(found)


def unpack(path: Path, root: Path) -> list[str]:
    """Put a pack's files below `root`, where they are missing; their names.

    Raises:
        DamagedError: it is cut off, changed, or holds what `pack` would not have written; nothing is put anywhere.
        ForeignError: it is not this user's to trust.
        OSError: it cannot be read, or a file cannot be written.
    """
    with open(path, "rb") as file:
        _check_owner(file.fileno())
        whole = file.read()
    body, digest = memoryview(whole)[:-DIGEST], whole[-DIGEST:]
    if xxhash.xxh3_128_digest(body) != digest:
        raise DamagedError("its digest is another")
    begin, files = whole.find(b"\n") + 1, {}
    for name, size in _listed(whole[:begin], len(body) - begin):
        files[name] = body[begin : begin + size]
        begin += size
        if _is_cut_off(name, files[name]):
            raise DamagedError(f"it holds half of {name!r}")
    for name, data in files.items():
        _write(root / name, data)
    return list(files)


def names(path: Path) -> list[str]:
    """What a pack's files are called, by its first line alone.

    Raises:
        DamagedError: that cannot be read.
        ForeignError: the pack is not this user's to trust.
        OSError: the pack cannot be read.
    """
    with open(path, "rb") as file:
        _check_owner(file.fileno())
        line = file.readline(LIMIT)
        return [name for name, _ in _listed(line, os.fstat(file.fileno()).st_size - len(line) - DIGEST)]


def _listed(line: bytes, total: int) -> list[tuple[str, int]]:
    """The names and sizes that a first line gives to the `total` bytes behind it."""
    try:
        listed = [(name, size) for name, size in json.loads(line)["files"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DamagedError("its first line is no list of files") from None
    if not all(type(name) is str and type(size) is int and size >= 0 for name, size in listed):
        raise DamagedError("its first line is no list of names and sizes")
    if sum(size for _, size in listed) != total:
        raise DamagedError("its files have other sizes")
    called: set[str] = set()
    for name, _ in listed:
        if not _may_be_called(name) or name in called:
            raise DamagedError(f"it names {name!r}")
        called.add(name)
    if clash := called.intersection(str(folder) for name in called for folder in PurePosixPath(name).parents):
        raise DamagedError(f"it names {min(clash)!r}, and files in it")
    return listed


def _may_be_called(name: str) -> bool:
    """Whether a pack may hold a file of this name: any file system can, and it stays where it is put."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or str(path) != name or "\0" in name:
        return False
    try:
        return all(len(part.encode()) <= PART for part in path.parts)
    except UnicodeEncodeError:
        return False


def _read(root: Path, files: Iterable[str]) -> dict[str, bytes]:
    """The files that stay as they are while they are read, and are whole."""
    found: dict[str, bytes] = {}
    total = 0
    for name in filter(_may_be_called, files):
        with suppress(OSError), open(root / name, "rb") as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode) or total + len(name) + before.st_size > LIMIT:
                continue
            data = file.read()
            after = os.stat(root / name)
            same = (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, len(data), before.st_mtime_ns)
            if same and data and not _is_cut_off(name, data):  # an empty one is about to be written
                found[name] = data
                total += len(name) + len(data)
    return found


def _is_cut_off(name: str, data: bytes | memoryview) -> bool:
    """Whether this is half a library, which would end the process that loads it.

    Compilers link straight to the final name, and a killed one leaves what there was. The linker writes an ELF file's
    first bytes and its table of sections last; they say where that table lies, and it is the file's end.
    """
    if data[:4] != b"\x7fELF":
        return name.endswith(".so")
    if len(data) < 64:
        return True
    place, layout = (40, "Q10xHH") if data[4] == 2 else (32, "I10xHH")  # in 64 and in 32 bits
    begin, size, number = struct.unpack_from((">" if data[5] == 2 else "<") + layout, data, place)
    return bool(len(data) < begin + size * number)


def _entry(name: str) -> str:
    """What a file holds, by its name: inductor's last part is the digest of bytes with times in them."""
    path = PurePosixPath(name)
    return str(path.parent) if path.parts[0] in ("fxgraph", "aotautograd") else name


def _store(path: Path, parts: Iterable[bytes]) -> None:
    writer = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"  # containers share the first two
    partial = path.with_name(f".{path.name}.{writer}.partial")
    digest = xxhash.xxh3_128()
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            for part in parts:
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def _write(path: Path, data: memoryview) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o700), "wb") as file:
            file.write(data)
    except FileExistsError:
        pass
    except OSError:
        path.unlink(missing_ok=True)  # half a file must not be taken for a whole one
        raise


def _check_owner(descriptor: int) -> None:
    """A pack holds code that will run: it must be this user's own, as a program in one's path would be."""
    about = os.fstat(descriptor)
    if about.st_uid not in (os.geteuid(), 0):
        raise ForeignError("it belongs to another user")
    if about.st_mode & 0o002:
        raise ForeignError("anybody may write it (remove it)")
