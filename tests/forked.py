"""Starts recipes as real processes, forked from one that has done the imports: those take most of a short run's time.

To a test it makes no difference: a rank has a process, an environment, an output and a directory of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.forkserver import ensure_running
from pathlib import Path

from launcher.check.trials import ALWAYS, OFTEN
from tests.harness import clean_environment, free_port

CONTEXT = multiprocessing.get_context("forkserver")
IMPORTS = (
    *ALWAYS,
    *OFTEN,
    *("torch.distributed.tensor", "torch.nn.parallel", "accelerate.utils", "sklearn.datasets"),
    *("launcher.checkpoint.loading", "launcher.checkpoint.verifying", "launcher.checkpoint.writer"),
    *("tests.forked", "pytest"),
)


class Job:
    """The processes of one job; rank r's output goes to a file, shown when something fails."""

    def __init__(
        self, world_size: int, recipe: Path, *args: object, cwd: Path, env: dict[str, str] | None = None
    ) -> None:
        self.args = [str(recipe), *map(str, args)]
        self._name = f"out-{time.monotonic_ns()}"
        self._cwd, self._env = cwd, {**clean_environment(), **(env or {})}
        self._port = free_port()
        serve()
        self.processes = [self._start(rank, world_size) for rank in range(world_size)]

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes, in rank order; a job that hangs is killed and told."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            self.kill()
            raise AssertionError(f"exit codes {codes} after {timeout:.0f} s: it hangs\n{self.output()}")
        return codes

    def ok(self, timeout: float = 120) -> str:
        """Wait for a job that must succeed; returns what it printed."""
        codes = self.wait(timeout)
        assert codes == [0] * len(codes), f"exit codes {codes} of {' '.join(self.args)}\n{self.output()}"
        return self.output()

    def kill(self, rank: int | None = None, number: int = signal.SIGKILL) -> None:
        """Send a signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def close(self) -> None:
        """Kill what is left."""
        self.kill()
        for process in self.processes:
            process.join()
            process.close()

    @property
    def over(self) -> bool:
        """Whether all ranks have ended."""
        return len(wait([process.sentinel for process in self.processes], 0)) == len(self.processes)

    def output(self, rank: int | None = None) -> str:
        """What a rank, or every rank, has printed."""
        if rank is not None:
            return self._path(rank).read_text()
        return "\n".join(f"--- rank {rank}\n{self.output(rank)}" for rank in range(len(self.processes)))

    def when(self, happened: Callable[[], bool], timeout: float = 60, every: float = 0.01) -> None:
        """Wait until something has happened."""
        deadline = time.monotonic() + timeout
        while not happened():
            assert time.monotonic() < deadline, f"it did not happen in {timeout} s:\n{self.output()}"
            assert not self.over or happened(), f"all ended before:\n{self.output()}"
            time.sleep(every)  # polling a file that another process writes

    def _start(self, rank: int, world_size: int) -> multiprocessing.process.BaseProcess:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        variables = {key: str(value) for key, value in ranks.items()} if world_size > 1 else {}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._port)}
        self._path(rank).touch()
        environment = {**self._env, **variables}
        process = CONTEXT.Process(target=_work, args=(self.args, environment, self._cwd, self._path(rank)))
        process.start()
        return process

    def _path(self, rank: int) -> Path:
        return self._cwd / f"{self._name}-{rank}"


def serve() -> None:
    """Have the one server of this process run, with all that the recipes of all tests import."""
    CONTEXT.set_forkserver_preload([*IMPORTS])
    ensure_running()


@contextmanager
def jobs(cwd: Path) -> Iterator[Callable[..., Job]]:
    """A function that starts jobs in a directory; what is still alive at the end is killed."""
    started: list[Job] = []

    def start(world_size: int, recipe: Path, *args: object, env: dict[str, str] | None = None) -> Job:
        started.append(Job(world_size, recipe, *args, cwd=cwd, env=env))
        return started[-1]

    try:
        yield start
    finally:
        for job in started:
            job.close()


def _work(args: list[str], environment: dict[str, str], cwd: Path, output: Path) -> None:
    """Be what `python recipe.py ...` would be."""
    fd = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(fd, stream.fileno())
    os.close(fd)
    multiprocessing.set_start_method(None, force=True)  # the platform's: its data workers are a matter of its own
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = args
    sys.path.insert(0, str(Path(args[0]).parent))
    runpy.run_path(args[0], run_name="__main__")
