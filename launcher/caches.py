"""Compile caches that outlive a job: kept beside the runs, used on the node's own disk.

torch compiles into /tmp, which a cluster empties, or gives to each job anew. Here what a start has compiled is kept in
packs in `runs/.cache/compile/KEY`; the next start of the recipe, a requeued job's for one, finds it there and takes a
copy to its node. Inductor keys every graph by its content and its settings, so that an edited recipe misses only
what it has changed. KEY separates what it does not look at: torch, Python and CUDA, the processor (C++ is compiled with
-march=native), the threads and the GPU; and recipes, so that a start copies its own graphs alone.

One process of a node (the first to make the node's directory) copies and keeps; the others wait for a file, outside
collectives. Nothing here may end a run: what goes wrong is told in a line, and the model is compiled anew.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import xxhash

from launcher.errors import UsageError
from launcher.packs import SUFFIX, DamagedError, ForeignError, names, pack, unpack
from launcher.turns import take_turns

__all__ = ["Caches", "check_choice", "environment", "open_caches"]

BOUND = 5 << 30  # bytes of all packs beside the runs; the least recently used go first
STAGED = 1 << 30  # bytes of the packs that a start copies to its node: a few of packs.LIMIT each
PATIENCE = 120.0  # seconds to wait for the process that copies
FINISH = 20.0  # seconds that keeping the last entries may hold up a process's end
SETTLED = 10.0  # seconds from the first step until what it has compiled is kept
WRITTEN = 5.0  # seconds without a change after which an entry is whole, while another one may be being compiled
STALE = 60.0  # seconds after which a node's directory that nobody uses has been left by a process that was killed
ABANDONED = 3600.0  # seconds without a change after which half a pack has been left by one
POLL = 0.02
HEADERS = "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

Say = Callable[[str], None]


def check_choice(choice: str) -> None:
    """Refuse a `--run.cache` that can be no directory; one that is only full, or read-only, is told of when used.

    Raises:
        UsageError: it is empty, no path, or leads through a file.
    """
    if choice in ("auto", "off"):
        return
    fix = "give auto, off or a directory"
    if not choice.strip():
        raise UsageError(f"--run.cache {choice!r}: no directory is named: {fix}")
    try:
        fault = _fault(Path(choice).expanduser().absolute())
    except RuntimeError:
        fault = f"{Path(choice).parts[0]} is nobody's home directory"
    if fault:
        raise UsageError(f"--run.cache {choice}: {fault}: {fix}")


def open_caches(choice: str, runs: Path, name: str, token: str, say: Say, *, is_main: bool = True) -> Caches | None:
    """Set up the caches of this start, before anything more is compiled; None where there are none to keep.

    Args:
        choice: `auto`: below `runs`; `off`: torch's own default; or a directory (`check_choice` knows which).
        runs: the directory that holds the run's.
        name: what the recipe is called.
        token: what this start alone is called; the same on all its ranks.
        say: told in one line of what goes wrong.
        is_main: whether this rank tells what holds for all of them.
    """
    if choice == "off":
        return None
    if named := _named():  # who names a place keeps it
        if choice != "auto" and is_main:
            say(f"compile cache: {VARIABLE} is set, and wins over --run.cache {choice}: compiled code is in {named}")
        return None
    store = (runs / ".cache" / "compile" if choice == "auto" else Path(choice).expanduser().absolute()) / _key(name)
    try:
        return Caches(store, _room() / f"{token}-{xxhash.xxh3_64_hexdigest(str(store).encode())[:6]}", say)
    except OSError as error:
        say(f"compile cache: {error.filename or store}: {error.strerror}: nothing is kept for the next start")
        return None


class Caches:
    """The caches of one process: `store` holds packs, `node` is the directory that the node's ranks compile in."""

    def __init__(self, store: Path, node: Path, say: Say) -> None:
        """Raises OSError where the node has no room for it."""
        self._store, self._node, self._say = store, node, say
        self._path = node / "inductor"
        self._known: set[str] = set()
        """The entries that the next start will find: staged here, or kept since by this process or another."""
        self._old: set[Path] = set()
        """The packs that were there before; of an entry in one that was not staged, the next start has nothing."""
        self._told = False
        self._thread: threading.Thread | None = None
        self._undo: Callable[[], None] | None = None
        self._keeping = threading.Lock()
        self._ended = threading.Event()
        try:
            node.mkdir(mode=0o700)
            self.keeps = True
            """Whether this process is the node's one that copies and keeps."""
        except FileExistsError:
            self.keeps = False
        self._lock = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        try:
            self._stage() if self.keeps else self._wait()
        except OSError:
            self._leave()
            raise
        os.environ[VARIABLE] = str(self._path)

    def set_up_compiler(self) -> None:
        """From now on the node's ranks take turns at compiling, and no header is precompiled."""
        undo = ExitStack()
        undo.callback(take_turns(self._node))
        undo.enter_context(_without_precompiled_headers())
        self._undo = undo.close

    def stepped(self, *, first_node: bool) -> None:
        """The first step is done: keep what it has compiled, on one node, beside the training.

        Another graph may be being compiled by then (an evaluation's, for one): what is new is kept at the end. The
        other nodes have the same, and keep at the end what is missing then.
        """
        if self.keeps and first_node and self._thread is None:
            self._thread = threading.Thread(target=self._keep_soon, name="launcher-caches", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Keep what is new, and leave nothing on the node; a store that does not answer is waited for only so long."""
        self._ended.set()
        if self._undo is not None:
            self._undo()
        if os.environ.get(VARIABLE) == str(self._path):
            del os.environ[VARIABLE]
        if self.keeps:
            last = threading.Thread(target=self._keep, name="launcher-caches", daemon=True)
            last.start()
            last.join(FINISH)
        self._leave()

    def _stage(self) -> None:
        """Copy the packs to the node, the newest first; those beyond the bound are too many to be worth it.

        What they hold is compiled and kept anew, and they grow old, until they are thrown away.
        """
        try:
            self._path.mkdir(mode=0o700)
            packs, total, taken = _packs(self._store), 0, []
            self._old = {path for path, _ in packs}
            for path, size in reversed(packs):
                if total + size > STAGED:
                    continue
                total += size
                if self._take(path):
                    taken.append(path)
            for path in reversed(taken):  # used: the last to be thrown away
                with suppress(OSError):
                    os.utime(path)
        finally:
            (self._node / "ready").touch()
        _sweep(self._node.parent)
        _sweep_partials(self._store.parent)

    def _take(self, path: Path) -> bool:
        """Copy one pack; whether it was whole."""
        try:
            self._known.update(unpack(path, self._path))
            return True
        except DamagedError as fault:
            self._tell(f"{path} is left out, {fault}: compiled anew")
            with suppress(OSError):
                path.unlink()  # else what replaces it would have its name
        except ForeignError as fault:
            self._tell(f"{path} is passed over, {fault}: compiled anew")
        except OSError as error:
            if error.filename is not None and Path(error.filename).is_relative_to(self._node):
                raise
            self._tell(f"{path} cannot be read ({error.strerror}): compiled anew")
        return False

    def _wait(self) -> None:
        until = time.monotonic() + PATIENCE
        while not (self._node / "ready").exists() and time.monotonic() < until:
            time.sleep(POLL)
        self._path.mkdir(mode=0o700, exist_ok=True)

    def _keep_soon(self) -> None:
        if not self._ended.wait(SETTLED):
            self._keep(WRITTEN)

    def _keep(self, age: float = 0.0) -> None:
        """Put the new entries, unchanged for `age` seconds, into packs beside the runs."""
        with self._keeping:
            new = {name for name in _entries(self._path, age) if name not in self._known}
            if not new:
                return
            try:
                for path, _ in _packs(self._store):  # of other nodes, or other runs
                    if path not in self._old:
                        with suppress(DamagedError, ForeignError, OSError):
                            self._known.update(names(path))
                about = environment()
                while kept := pack(self._path, new - self._known, self._store, key=self._store.name, about=about):
                    self._known.update(kept)
                _prune(self._store.parent)
            except OSError as error:
                self._tell(f"{self._store}: {error.strerror}: nothing is kept for the next start")

    def _tell(self, line: str) -> None:
        if not self._told:
            self._told = True
            self._say(f"compile cache: {line}")

    def _leave(self) -> None:
        """Let go of the node's directory; the last to do so removes it."""
        if self._lock >= 0:
            _remove_unused(self._node, self._lock)
            os.close(self._lock)
            self._lock = -1


def environment() -> dict[str, Any]:
    """What compiled code depends on that inductor's own keys do not hold."""
    gpus = sorted({_gpu(index) for index in range(torch.cuda.device_count())}) if torch.cuda.is_available() else []
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "gpus": gpus,
        "python": f"{platform.python_implementation()} {platform.python_version()} {sys.abiflags}",
        "system": f"{platform.system()} {platform.machine()} {' '.join(platform.libc_ver())}",
        "processor": _processor(),
        "threads": torch.get_num_threads(),  # C++ kernels are written for a number, which torch 2.11 does not key
    }


def _gpu(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} {major}.{minor}"


def _processor() -> str:
    """The model and its extensions."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        found = re.findall(r"^(?:model name|flags|Features|CPU part)\s*:\s*(.*)$", text, re.MULTILINE)
        return " | ".join(found)
    return platform.processor()


def _key(name: str) -> str:
    facts = xxhash.xxh3_64_hexdigest(repr(sorted(environment().items())).encode())[:10]
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}-torch{torch.__version__}-{facts}"


def _room() -> Path:
    """This user's directory on the node's own disk, where programs may be run from.

    Raises:
        OSError: there is none.
    """
    choices = [os.environ.get("SLURM_TMPDIR"), tempfile.gettempdir(), "/tmp", "/var/tmp"]
    fault: OSError | None = None
    for choice in dict.fromkeys(filter(None, choices)):
        try:
            if os.statvfs(choice).f_flag & os.ST_NOEXEC:
                raise OSError(0, "nothing may be run from there (noexec)", choice)
            room = Path(choice, f"launcher-{os.geteuid()}")
            room.mkdir(mode=0o700, exist_ok=True)
            about = room.lstat()
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o022:
                raise OSError(0, "somebody else's, or open to others", str(room))
            return room
        except OSError as error:
            fault = error
    assert fault is not None
    raise fault


def _without_precompiled_headers() -> AbstractContextManager[Any]:
    """torch precompiles its C++ header in /tmp before it looks whether a kernel is there already.

    On a fresh node that is most of a warm start's compile, and saves a cold one next to nothing. Who sets torch's
    variable is obeyed.
    """
    config: Any = sys.modules.get("torch._inductor.config")
    if HEADERS in os.environ or not hasattr(config, "cpp_cache_precompile_headers"):
        return nullcontext()
    return config.patch(cpp_cache_precompile_headers=False)  # type: ignore[no-any-return]


def _named() -> str | None:
    """The directory that the user has named; a recipe that compiles as it is imported has torch name its own there."""
    named = os.environ.get(VARIABLE)
    default = getattr(sys.modules.get("torch._inductor.runtime.cache_dir_utils"), "default_cache_dir", None)
    if not named or (default is not None and named == os.path.abspath(default())):
        return None
    return named


def _fault(place: Path) -> str | None:
    """Why `place` cannot be made a directory, whoever may write there."""
    for path in (place, *place.parents):
        try:
            if not stat.S_ISDIR(os.stat(path).st_mode):
                return f"{path} is no directory"
        except FileNotFoundError:
            if path.is_symlink():
                return f"{path} is a link to nothing"
        except NotADirectoryError:
            pass
        except ValueError:
            return "no path has a NUL in it"
        except OSError as error:
            return error.strerror if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else None
        else:
            return None
    return None


def _entries(path: Path, age: float = 0.0) -> Iterator[str]:
    """The files of a cache that are worth keeping and were not changed for `age` seconds, relative to it."""
    until = time.time() - age
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if name != "locks" and not name.startswith((".", "tmp"))]
        for name in files:
            if not name.startswith(".") and not name.endswith((".lock", ".gch", ".tmp", ".turn")):
                with suppress(OSError):
                    if not age or os.stat(os.path.join(folder, name)).st_mtime <= until:
                        yield str(Path(folder, name).relative_to(path))


def _packs(store: Path) -> list[tuple[Path, int]]:
    """The packs in a directory with their sizes, the least recently used first."""
    found = []
    with suppress(OSError):
        for entry in os.scandir(store):
            with suppress(OSError):
                if entry.name.endswith(SUFFIX) and not entry.name.startswith("."):
                    about = entry.stat()
                    found.append((about.st_mtime, Path(entry.path), about.st_size))
    return [(path, size) for _, path, size in sorted(found)]


def _prune(stores: Path) -> None:
    """Throw away the packs that were not used for longest, beyond the bound."""
    packs = []
    for path in stores.glob(f"*/*{SUFFIX}"):
        with suppress(OSError):  # another start throws away too
            about = path.stat()
            packs.append((about.st_mtime, path, about.st_size))
    total = sum(size for _, _, size in packs)
    for _, path, size in sorted(packs):
        if total <= BOUND:
            break
        total -= size
        path.unlink(missing_ok=True)


def _sweep_partials(stores: Path) -> None:
    """Remove the halves of packs whose writers were killed."""
    with suppress(OSError):
        for path in stores.glob(f"*/.*{SUFFIX}.*.partial"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()


def _sweep(room: Path) -> None:
    """Remove what processes that were killed have left on this node."""
    with suppress(OSError):
        for path in room.iterdir():
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE:
                    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                    try:
                        _remove_unused(path, descriptor)
                    finally:
                        os.close(descriptor)


def _remove_unused(path: Path, descriptor: int) -> None:
    """Remove a node's directory unless another process holds its lock."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
