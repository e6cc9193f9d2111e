"""The run directory: what a run is, kept beside what it learns, so that a person or a script can read it without us.

    config.json      recipe and run settings of the newest start     recipe.py, code.patch   the code as it ran
    run.json         the command, the versions, how far it is        attempts/A/             one start each

Every start takes the next attempt number, by making its directory: two that start at once get different ones, and only
the highest may write. Files appear whole or not at all.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import secrets
import socket
import stat
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, Literal

from launcher.errors import LauncherError, UsageError
from launcher.source import code_patch, describe_code, strip_credentials

__all__ = ["RunDir", "Status", "here", "open_regular"]

Status = Literal["pending", "running", "finished", "preempted", "failed", "cancelled"]
"""`pending`: submitted, and never started since."""

PACKAGES = ("launcher", "torch", "accelerate", "datasets", "numpy", "safetensors", "tokenizers", "transformers", "peft")
# Nothing else of the environment is recorded: it holds tokens.
ENVIRONMENT = (
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE"),
    *("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_PARTITION"),
    *("SLURM_RESTART_COUNT", "TORCHINDUCTOR_CACHE_DIR", "HF_HOME", "HF_HUB_OFFLINE"),
)
LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # without those that look alike


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read; what else has its name (a pipe, say, which waits for its other end) is refused.

    Raises:
        OSError: it cannot be read.
    """
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115 - the caller's to close
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return file


def here() -> dict[str, str]:
    """This host and the time."""
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()  # as SLURM names it, to be excluded by
    return {"host": host, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}


class RunDir:
    """One run's directory, at `path`."""

    def __init__(self, path: Path, attempt: int | None = None) -> None:
        """`attempt` is the start that this process belongs to: once there is a newer one, it writes no status."""
        self.path = path
        self.attempt = attempt
        self._lock = threading.Lock()  # the thread that writes checkpoints updates facts too

    @classmethod
    def open(cls, given: str | None, *, name: str) -> RunDir:
        """The directory `given`, made if it is missing; or a fresh `runs/<name>-<MMDD-HHMM>-<xyz>`.

        Raises:
            UsageError: it cannot be made or written, or it holds files and no run.
        """
        if given is None:
            return cls(_fresh(name))
        path = Path(given).expanduser().absolute()
        rundir = cls(path)
        with _usage(path):
            if path.exists() and not path.is_dir():
                raise UsageError(f"{path} is a file: name a directory as --run.dir")
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(path.iterdir()) and not rundir.holds_run():
                raise UsageError(f"{path} holds files and no run: name another --run.dir, or an empty one")
        return rundir

    def holds_run(self) -> bool:
        """Whether a run was ever started here."""
        return (self.path / "run.json").exists() or (self.path / "attempts").is_dir()

    def config(self) -> dict[str, Any] | None:
        """The settings of the newest start, as `to_dict` made them; None before the first."""
        return self._load("config.json")

    def read(self) -> dict[str, Any]:
        """What run.json says; nothing before the first start."""
        return self._load("run.json") or {}

    def start_attempt(self, world_size: int) -> int:
        """Take the next attempt number, from 1; no other process gets the same."""
        attempts = self.path / "attempts"
        with _writing(attempts):
            attempts.mkdir(mode=0o700, exist_ok=True)
            while True:
                number = self.current_attempt() + 1
                with suppress(FileExistsError):
                    (attempts / str(number)).mkdir(mode=0o700)
                    break
        started = {
            "started": _now(),
            "world_size": world_size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        }
        self._store(f"attempts/{number}/started.json", _json(started))
        self.attempt = number
        return number

    def current_attempt(self) -> int:
        """The number of the newest start, 0 before the first."""
        attempts = self.path / "attempts"
        try:
            names = os.listdir(attempts)
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise LauncherError(f"cannot read {attempts}: {error.strerror}") from None
        return max((int(name) for name in names if name.isdigit()), default=0)

    def record(
        self,
        settings: Mapping[str, Any],
        recipe: Path,
        *,
        command: Sequence[str],
        attempt: int,
        world_size: int,
        hosts: Sequence[str] = (),
    ) -> None:
        """Write down what is started: the settings, the code, the command, the versions; the status is `running`.

        Args:
            settings: the resolved settings, as `to_dict` makes them.
            recipe: the recipe's file, copied; a later start's other version goes under its attempt.
            command: the program and its arguments.
            attempt: the number that `start_attempt` gave.
            world_size: the number of ranks.
            hosts: the names of their machines; default: this one.
        """
        config = _json(settings)
        self._store("config.json", config)
        self._store(f"attempts/{attempt}/config.json", config)
        if recipe.is_file():
            self._keep("recipe.py", recipe.read_bytes(), attempt)
        submitted = self._load("slurm/source.json")  # this is a copy of the code, made when the run was submitted
        patch = code_patch(recipe.parent) if submitted is None else None
        if patch is not None:
            self._keep("code.patch", patch, attempt)
        before = self.read()
        self.update(
            **{"status": "running", "attempt": attempt, "restarts": attempt - 1, "world_size": world_size},
            **{"global_step": before.get("global_step", 0), "total_steps": before.get("total_steps")},
            id=before.get("id") or "".join(secrets.choice(LETTERS) for _ in range(8)),
            command=[strip_credentials(word) for word in command],
            git=describe_code(recipe.parent) if submitted is None else submitted.get("git"),
            versions=_versions(),
            python=f"{platform.python_version()} {sys.executable}",
            hosts=list(hosts) or [socket.gethostname()],
            started=before.get("started", _now()),
        )

    def identity(self) -> str:
        """What tells this run from all others, also of its name: eight letters, drawn at its first start."""
        return str(self.read().get("id", ""))

    def update(self, **facts: Any) -> bool:
        """Change what run.json says; False, and nothing written, where a newer attempt has taken over.

        A failed rank and rank 0 may both write, without a lock, which a shared filesystem need not have: what stands
        in the end is `failed`, because its marker is there before it, and is looked at after every write.

        Raises:
            LauncherError: it cannot be written. Of a failure, no more is told than that.
        """
        if self.attempt is not None and self.attempt < self.current_attempt():
            return False
        try:
            failed: bool | None = None
            with self._lock:
                while failed is not (now := self._has_failed()):
                    failed = now
                    self._write_facts({**facts, "status": "failed"} if failed else facts)
        except LauncherError:
            if facts.get("status") != "failed":
                raise
        return True

    def failed(
        self, attempt: int, *, rank: int, step: int | None, error: str, kind: str = "code", retry: bool = False
    ) -> bool:
        """Mark an attempt as failed; whether this rank is the first to say so, whose error is the one to tell."""
        facts = {"rank": rank, "step": step, "error": strip_credentials(error), "kind": kind, "retry": retry}
        try:
            _claim(self.path / "attempts" / str(attempt) / "failed", _json({**facts, **here()}))
        except FileExistsError:
            return False
        except OSError:  # a full disk, perhaps the very failure: then every rank tells its own
            pass
        return True

    def failure(self, attempt: int) -> dict[str, Any] | None:
        """What the first rank to fail in an attempt said (rank, step, error); None where none did."""
        try:
            return self._load(f"attempts/{attempt}/failed")
        except LauncherError:  # cut off while it was written
            return {}

    def record_exit(
        self, attempt: int, *, rank: int, status: Status, step: int | None, reason: str = "", **more: Any
    ) -> None:
        """Write down why a rank leaves: an exit code cannot say it."""
        facts = {"rank": rank, "status": status, "step": step, "reason": strip_credentials(reason), **more}
        self._store(f"attempts/{attempt}/exit-{rank:05d}.json", _json({**facts, **here()}))

    def record_rank(self, attempt: int, rank: int, facts: Mapping[str, Any]) -> None:
        """Write down what a rank is, at its start: see launcher/witness.py."""
        self._store(f"attempts/{attempt}/rank-{rank:05d}.json", _json(facts))

    def record_error(self, attempt: int, rank: int, facts: Mapping[str, Any]) -> None:
        """Write down why a rank fails: see launcher/witness.py."""
        self._store(f"attempts/{attempt}/error-{rank:05d}.json", _json(facts))

    def record_end(self, attempt: int, codes: Mapping[int, int], said: str) -> None:
        """Write down what the parent of local ranks has seen: exit codes by rank, and what accelerate printed."""
        codes_by_rank = {str(rank): code for rank, code in codes.items()}
        self._store(f"attempts/{attempt}/codes.json", _json({"codes": codes_by_rank, **here()}))
        if said:
            self._store(f"attempts/{attempt}/agent.txt", said.encode(errors="replace"))

    def record_signal(self, attempt: int, *, rank: int, name: str) -> None:
        """Write down that a rank has seen its first stop signal."""
        self._store(f"attempts/{attempt}/signal-{rank:05d}.json", _json({"rank": rank, "signal": name, **here()}))

    def record_step(self, attempt: int, step: int, startup: Mapping[str, float]) -> None:
        """Write down that an attempt has completed its first step, and the seconds that led to it, by stage."""
        self._store(f"attempts/{attempt}/stepped", _json({"step": step, **here(), "startup": startup}))
        self.update(startup=startup)

    def record_hang(self, attempt: int, rank: int, facts: Mapping[str, Any]) -> None:
        """Write down where a rank stands that makes no progress."""
        self._store(f"attempts/{attempt}/hang-{rank:05d}.json", _json(facts))

    def hanging(self, attempt: int) -> list[int]:
        """The ranks that have written that; by a listing, which a shared filesystem has fresher than a look-up."""
        try:
            names = os.listdir(self.path / "attempts" / str(attempt))
        except OSError:
            return []
        return [int(name[5:-5]) for name in names if name.startswith("hang-") and name[5:-5].isdigit()]

    def hangs(self, attempt: int) -> dict[int, dict[str, Any]]:
        """What they have written, by rank."""
        found = {}
        for rank in self.hanging(attempt):
            with suppress(LauncherError):
                found[rank] = self._load(f"attempts/{attempt}/hang-{rank:05d}.json") or {}
        return found

    def left(self, attempt: int, status: Status) -> bool:
        """Whether a rank of an attempt has left with this status."""
        for path in (self.path / "attempts" / str(attempt)).glob("exit-*.json"):
            with suppress(LauncherError):
                if (self._load(str(path.relative_to(self.path))) or {}).get("status") == status:
                    return True
        return False

    @property
    def is_cancelled(self) -> bool:
        """Whether `launcher cancel` has asked the run to end."""
        return (self.path / "slurm" / "cancelled").exists()

    def _has_failed(self) -> bool:
        """Whether the start that this process belongs to has failed; who is of none says what comes next."""
        return self.attempt is not None and os.path.exists(self.path / "attempts" / str(self.attempt) / "failed")

    def _write_facts(self, facts: Mapping[str, Any]) -> None:
        self._store("run.json", _json({**self.read(), **facts, "updated": _now()}))

    def _keep(self, name: str, data: bytes, attempt: int) -> None:
        """Keep a file as the first start has it, and as a later one has it where that differs."""
        path = self.path / name
        with _writing(path):
            if not path.exists():
                self._store(name, data)
            elif path.read_bytes() != data:
                self._store(f"attempts/{attempt}/{name}", data)

    def _load(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        try:
            with open_regular(path) as file:
                loaded = json.loads(file.read())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LauncherError(f"cannot read {path}: {error.strerror}") from None
        except ValueError as error:
            raise LauncherError(f"{path} is broken ({error}): put it right, or name another --run.dir") from None
        if not isinstance(loaded, dict):
            raise LauncherError(f"{path} is broken (no object): put it right, or name another --run.dir")
        return loaded

    def _store(self, name: str, data: bytes) -> None:
        """Write a file whole and durable: readers see the old one or the new one, also after a power cut."""
        path = self.path / name
        partial = _partial(path)
        with _writing(path):
            try:
                with open(partial, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path)
            except OSError:
                partial.unlink(missing_ok=True)
                raise


def _fresh(name: str) -> Path:
    if "/" in name or name.startswith(".") or not name:
        raise UsageError(f"--run.name {name}: a name, not a path; --run.dir names the whole directory")
    runs = Path("runs").absolute()
    with _usage(runs):
        runs.mkdir(exist_ok=True)
        while True:
            tail = "".join(secrets.choice(LETTERS) for _ in range(3))
            path = runs / f"{name}-{datetime.now().strftime('%m%d-%H%M')}-{tail}"
            with suppress(FileExistsError):
                path.mkdir(mode=0o700)
                return path


@contextmanager
def _usage(path: Path) -> Iterator[None]:
    """A directory that cannot be used is a usage error."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot use {path} as a run directory: {error.strerror}") from None


def _partial(path: Path) -> Path:
    """The name of a file while it is written."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(3)}")


def _claim(path: Path, data: bytes) -> None:
    """Make a file whole under a name that nobody has.

    Raises:
        FileExistsError: somebody has it.
        OSError: it cannot be written whole; it may be there, cut short.
    """
    partial = _partial(path)
    try:
        partial.write_bytes(data)
        os.link(partial, path)
    except FileExistsError:
        if not partial.samefile(path):  # NFS may ask twice, and be told so of its own first try
            raise
    except OSError:  # a full disk, or one without links: the name alone says the most
        with open(path, "xb") as file:
            file.write(data)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LauncherError(f"cannot write {path}: {error.strerror}") from None


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
