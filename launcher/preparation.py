"""Work that is done once and kept: text made into tokens, images made small, whatever a recipe prepares.

It consists of parts, each a file that some function writes, and every process that wants the result takes part: a
part is made by whoever claims it first. Nobody waits in a collective, where a long preparation would time out, and
what a killed process had finished is not made again.

A part is written beside its place, flushed to the disk, and linked to its name: it is whole or not there, whoever is
killed when. A claim is a lock on the part's record in the file `claims`, held by the process alone: a POSIX record
lock, which a child does not inherit (an orphan would hold on to a `flock`) and which NFS knows. Where a file system
knows no locks, two nodes may make the same part, and the first one's stands.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from launcher.errors import RecipeError, UsageError

__all__ = ["prepare"]

Make = Callable[[Path], object]

FORM = 1  # of the directory
SAY_EVERY = 5.0  # seconds between two lines that say what goes on, and before the first
POLL = 0.02, 1.0  # seconds between two looks at parts that others make: at first, at most
RECORD = 128  # bytes of a claim: who holds it
MANIFEST, CLAIMS, PARTIAL = "manifest.json", "claims", ".partial"
OWN = (MANIFEST, CLAIMS, "", "..")  # what a part cannot be called
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV}


def prepare(cache: str | Path, settings: Mapping[str, Any], *stages: Mapping[str, Make]) -> Path:
    """Make the parts that are not there yet, together with everybody else who calls this; their directory.

    Args:
        cache: where prepared directories are kept; each is named after a digest of its settings.
        settings: everything that the parts depend on, in what JSON can hold; a `Path` stands for that file's path,
            size and time of change. A version of the code that makes the parts belongs here too.
        stages: functions by the name of the part, each of which writes the file whose path it is given and may read
            the parts of earlier stages beside it. A stage begins when the one before is whole; its own parts are made
            in order, at the same time by as many processes as call.

    A part of another size than it was made is made anew; what else a disk does to it is not looked for. One thread of
    a process may call this at a time: record locks do not keep threads apart.

    Raises:
        RecipeError: a part's name is there twice, or is not one for a file.
        UsageError: a file cannot be read or written.
    """
    names = [name for stage in stages for name in stage]
    _check(names)
    try:
        facts = json.loads(json.dumps(settings, default=_facts))
        digest = xxhash.xxh3_64_hexdigest(json.dumps([FORM, facts], sort_keys=True).encode())
        directory = Path(cache).expanduser() / digest
        directory.mkdir(parents=True, exist_ok=True)
        work = _Work(directory, facts, names)
        if work.missing(names):
            with work:
                for stage in stages:
                    work.finish(stage)
    except OSError as error:
        fault = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise UsageError(f"cannot prepare the data: {fault}") from None
    return directory


def _check(names: Iterable[str]) -> None:
    """Refuse names that two parts, or a part and what is kept beside it, would share."""
    for name, number in Counter(names).items():
        if number > 1:
            raise RecipeError(f"launcher.prepare: two parts are called {name!r}: each needs a name of its own")
        if name in OWN or name.endswith(PARTIAL) or Path(name).name != name:
            raise RecipeError(f"launcher.prepare: a part cannot be called {name!r}: give it another name for a file")


def _facts(value: Any) -> Any:
    if isinstance(value, Path):
        stat = value.stat()
        return [str(value.resolve()), stat.st_size, stat.st_mtime_ns]
    raise TypeError(f"{type(value).__name__}: not for JSON")


class _Work:
    """A directory that is being prepared, as one of those at work in it sees it.

    A part counts from the moment on at which manifest.json records it; whoever records it holds its claim.
    """

    def __init__(self, directory: Path, settings: Any, names: Iterable[str]) -> None:
        self._directory, self._settings = directory, settings
        self._numbers = {name: number for number, name in enumerate(names, 1)}  # of claims: 0 is the manifest's
        self._host = socket.gethostname()
        self._claims = -1
        self._locks = True
        self._said = time.monotonic()

    def missing(self, names: Iterable[str]) -> list[str]:
        """Which of the parts are not there, or not of their size."""
        parts = self._parts()
        return [name for name in names if name not in parts or self._size(name) != parts[name]["size"]]

    def __enter__(self) -> None:
        self._claims = os.open(self._directory / CLAIMS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def __exit__(self, *_: object) -> None:
        os.close(self._claims)  # and with it goes every lock

    def finish(self, stage: Mapping[str, Make]) -> None:
        """Make what nobody else makes, and wait for what others do."""
        pause, longest = POLL
        while left := self.missing(stage):
            others = [name for name in left if not self._make(name, stage[name])]
            if len(others) == len(left):
                self._say(f"waiting for {others[0]} in {self._directory}, which {self._holder(others[0])} makes")
                time.sleep(pause)
                pause = min(2 * pause, longest)

    def _make(self, name: str, make: Make) -> bool:
        """Make a part, unless another process is at it."""
        if not self._lock(self._numbers[name], wait=False):
            return False
        try:
            if self.missing([name]):
                self._write(name, make)
                self._record(name)
                self._say(f"{len(self._parts())} of {len(self._numbers)} parts in {self._directory} are made")
        finally:
            self._unlock(self._numbers[name])
        return True

    def _write(self, name: str, make: Make) -> None:
        path = self._directory / name
        if name in self._parts() and path.exists():
            print(f"launcher: {path} is damaged, of another size than it was made: making it anew", file=sys.stderr)
            path.unlink()
        if path.exists():  # whoever linked it was killed before it was recorded
            return
        self._sweep(name)
        partial = self._partial(name)
        try:
            make(partial)
            _flush(partial)
            _link(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        _flush(self._directory)

    def _record(self, name: str) -> None:
        with open(self._directory / name, "rb") as file:
            digest = hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()
            size = os.fstat(file.fileno()).st_size
        self._lock(0, wait=True)
        try:
            parts = self._parts() | {name: {"size": size, "xxh3": digest}}
            done = self._numbers.keys() <= parts.keys()
            manifest = {"done": done, "settings": self._settings, "parts": dict(sorted(parts.items()))}
            self._sweep(MANIFEST)
            partial = self._partial(MANIFEST)
            try:
                partial.write_text(json.dumps(manifest, indent=1) + "\n")
                partial.replace(self._directory / MANIFEST)
            finally:
                partial.unlink(missing_ok=True)
        finally:
            self._unlock(0)

    def _sweep(self, name: str) -> None:
        """Remove what processes of this host have left of a file whose lock is now held here: they are dead.

        Not this process's own: locks do not keep its threads apart.
        """
        for left in self._directory.glob(f"{glob.escape(f'{name}.{self._host}')}-*{PARTIAL}") if self._locks else ():
            if not left.name.startswith(f"{name}.{self._host}-{os.getpid()}-"):
                left.unlink(missing_ok=True)

    def _parts(self) -> dict[str, dict[str, Any]]:
        """What is recorded; nothing if the record is damaged: what is there is recorded anew."""
        try:
            parts = json.loads((self._directory / MANIFEST).read_bytes())["parts"]
            return {name: {"size": int(part["size"]), "xxh3": str(part["xxh3"])} for name, part in parts.items()}
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
            return {}

    def _size(self, name: str) -> int:
        try:
            return (self._directory / name).stat().st_size
        except FileNotFoundError:
            return -1

    def _partial(self, name: str) -> Path:
        return self._directory / f"{name}.{self._host}-{os.getpid()}-{secrets.token_hex(2)}{PARTIAL}"

    def _lock(self, number: int, *, wait: bool) -> bool:
        start = number * RECORD
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), RECORD, start)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in NO_LOCKS:
                raise
            self._locks = False
        os.pwrite(self._claims, f"{self._host}, pid {os.getpid()}".encode()[:RECORD].ljust(RECORD), start)
        return True

    def _unlock(self, number: int) -> None:
        with suppress(OSError):  # where there are no locks
            fcntl.lockf(self._claims, fcntl.LOCK_UN, RECORD, number * RECORD)

    def _holder(self, name: str) -> str:
        record = os.pread(self._claims, RECORD, self._numbers[name] * RECORD)
        return record.decode(errors="replace").strip() or "another process"

    def _say(self, text: str) -> None:
        """Say something on standard error, unless something was said just now."""
        if time.monotonic() - self._said >= SAY_EVERY:
            print(f"launcher: {text}", file=sys.stderr, flush=True)
            self._said = time.monotonic()


def _flush(path: Path) -> None:
    """Have the disk keep a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(partial: Path, path: Path) -> None:
    """Give a whole file its name, unless another has it: that one may be in use."""
    try:
        os.link(partial, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        partial.replace(path)
