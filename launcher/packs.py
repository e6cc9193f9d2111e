"""Packs: many small files in one, whose bytes are checked before one of them is used.

A shared file system takes as long for a small file as for a large one, and a compiled model is hundreds of them. A pack
is a line of JSON (what it was made for; each file's name, size and digest), the files, and a digest of the whole.
It appears whole or not at all, under the digest of what its files are called: who writes the same files writes the same
name, so that many nodes need not agree.
"""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

__all__ = ["LIMIT", "DamagedError", "names", "pack", "unpack"]

LIMIT = 1 << 30  # bytes of a pack: it is held in memory
SUFFIX = ".pack"
DIGEST = 16  # bytes, of xxh3's 128 bits


class DamagedError(Exception):
    """A pack is not what was written."""


def pack(root: Path, files: Iterable[str], store: Path, *, key: str, about: Mapping[str, Any]) -> tuple[str, ...]:
    """Write some files (relative to `root`) to a new pack in `store`; those that are in it, or in an equal one.

    A file that changes meanwhile, or that would make the pack larger than `LIMIT`, is left out. `key` goes into the
    pack's name, with what the files are called.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    found = _read(root, sorted(files))
    if not found:
        return ()
    store.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = store / (xxhash.xxh3_128_hexdigest("\n".join([key, *map(_entry, found)]).encode()) + SUFFIX)
    if not path.exists():
        header = {"files": [[name, len(data)] for name, data in found.items()], "about": dict(about)}
        parts = [json.dumps(header).encode() + b"\n", *found.values()]
        _store(path, parts)
    return tuple(found)


def unpack(path: Path, root: Path) -> list[str]:
    """Put a pack's files below `root`, where they are missing; their names.

    Raises:
        DamagedError: it is cut off, changed, or names files outside `root`; nothing is put anywhere.
        OSError: it cannot be read, or a file cannot be written.
    """
    with open(path, "rb") as file:
        _check_owner(file.fileno())
        whole = file.read()
    body, digest = memoryview(whole)[:-DIGEST], whole[-DIGEST:]
    if xxhash.xxh3_128_digest(body) != digest:
        raise DamagedError("its digest is another")
    begin, written = whole.find(b"\n") + 1, []
    for name, size in _listed(whole[:begin]):
        _write(root / name, body[begin : begin + size])
        begin += size
        written.append(name)
    return written


def names(path: Path) -> list[str]:
    """What a pack's files are called, by its first line alone.

    Raises:
        DamagedError: that cannot be read.
        OSError: the pack cannot.
    """
    with open(path, "rb") as file:
        return [name for name, _ in _listed(file.readline(LIMIT))]


def _listed(line: bytes) -> list[tuple[str, int]]:
    try:
        listed = [(str(name), int(size)) for name, size in json.loads(line)["files"]]
    except (ValueError, TypeError, KeyError):
        raise DamagedError("its first line is no list of files") from None
    for name, _ in listed:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise DamagedError(f"it names {name!r}")
    return listed


def _read(root: Path, files: Iterable[str]) -> dict[str, bytes]:
    """The files that stay as they are while they are read."""
    found: dict[str, bytes] = {}
    total = 0
    for name in files:
        with suppress(OSError), open(root / name, "rb") as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode) or total + before.st_size > LIMIT:
                continue
            data = file.read()
            after = os.stat(root / name)
            same = (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, len(data), before.st_mtime_ns)
            if same and data:  # an empty one is about to be written
                found[name] = data
                total += len(data)
    return found


def _entry(name: str) -> str:
    """What a file holds, by its name: inductor's last part is the digest of bytes with times in them."""
    path = PurePosixPath(name)
    return str(path.parent) if path.parts[0] in ("fxgraph", "aotautograd") else name


def _store(path: Path, parts: Iterable[bytes]) -> None:
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    digest = xxhash.xxh3_128()
    try:
        with open(partial, "xb") as file:
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
    if about.st_uid not in (os.geteuid(), 0) or about.st_mode & 0o002:
        raise DamagedError("it belongs to another user, or anybody may write it")
