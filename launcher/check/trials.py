"""Runs of the recipe in processes of their own, forked from one that has imported torch already.

That makes a dozen runs affordable: importing takes longer than a few steps. The server is the standard library's
(`multiprocessing`, forkserver); a run's ranks are real processes that find each other as any others do.
"""

from __future__ import annotations

import ast
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

from launcher.check.settings import Settings
from launcher.check.trace import Trace, read_trace
from launcher.output import log_path
from launcher.verdict import judged

__all__ = ["Bench", "Outcome", "Trial", "bench", "partial_saves"]

ALWAYS = (
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "accelerate", "safetensors.numpy"),
    *("launcher.attempt", "launcher.run", "launcher.check.child"),
)
# Imported ahead where a recipe imports them: they take seconds, and touch no device when they are imported.
OFTEN = ("datasets", "numpy", "peft", "sklearn", "tokenizers", "torchvision", "transformers")
# Of every run, whatever a file of options says; what is given behind wins.
PLAIN = (
    *("--run.log-every", "1", "--run.no-tf32", "--run.precision", "no", "--run.shard", "none", "--run.compile", "off"),
    *("--run.workers", "0", "--run.save-every", "0", "--run.hang-after", "120"),
)
POLL = 0.01  # seconds
STRIKE = 0.0005  # seconds between looks for a save, which takes a few milliseconds
ROOM = 2**20  # bytes without which nothing can be written any more
LONGEST = 200  # characters of what a run says of its failure
GRACE = 20.0  # seconds that the ranks left have when one has ended badly


@dataclass(frozen=True)
class Trial:
    """One run to be made: what it is called, on how many ranks, with which `--run.*` options."""

    name: str
    world_size: int
    settings: Settings
    options: tuple[str, ...] = ()
    rundir: str = ""
    """Of a run that goes on; default: a fresh one."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and what it has written down."""

    trial: Trial
    codes: tuple[int, ...]
    trace: Trace
    rundir: Path
    out: Path
    """What it has written down."""
    log: Path
    """What the rank that failed first has printed, else rank 0."""
    fault: str = ""
    """Why it failed, in a line; empty where it has not."""

    @property
    def ok(self) -> bool:
        """Whether it finished."""
        return not self.fault

    def metrics(self) -> dict[int, dict[str, float]]:
        """Logged values by step; of a step the latest attempt's count, and rates do not."""
        return _metrics(self.rundir / "metrics.jsonl")


@dataclass(frozen=True)
class Bench:
    """What the runs of one check have in common."""

    context: ForkServerContext
    recipe: str
    options: tuple[str, ...]
    """The person's own, behind the recipe."""
    room: Path
    cuda: bool
    slots: int
    """Ranks that may run at once."""
    patience: float
    """Seconds that a run may take."""

    def run(self, trials: Sequence[Trial]) -> Iterator[Outcome]:
        """Make runs, as many at once as there is room for; yields each as it ends."""
        waiting, running = list(trials), list[_Running]()
        try:
            while waiting or running:
                while waiting and (not running or self._busy(running) + waiting[0].world_size <= self.slots):
                    running.append(self._start(waiting.pop(0)))
                for one in [one for one in running if one.over()]:
                    running.remove(one)
                    yield one.outcome()
                time.sleep(POLL)  # between looks at processes
        finally:
            for one in running:
                one.kill()

    def _busy(self, running: Sequence[_Running]) -> int:
        return sum(len(one.processes) for one in running)

    def _start(self, trial: Trial) -> _Running:
        out = self.room / trial.name
        out.mkdir(exist_ok=True)
        settings = replace(trial.settings, out=str(out))
        rundir = trial.rundir or str(out / "run")
        argv = [*self.options, "--run.dir", rundir, *PLAIN, *trial.options]
        argv += ["--run.deterministic"] if self.cuda else ["--run.threads", "1"]
        port = str(_free_port())
        processes = []
        for rank in range(trial.world_size):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": trial.world_size}
            environ = {key: str(value) for key, value in ranks.items()} if trial.world_size > 1 else {}
            if environ:
                environ |= {"LOCAL_WORLD_SIZE": str(trial.world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environ["WANDB_MODE"] = "disabled"
            if not self.cuda:
                environ["ACCELERATE_USE_CPU"] = "true"
            process = self.context.Process(
                target=_rank, args=(settings, self.recipe, argv, environ, str(out / f"rank-{rank}.txt"))
            )
            process.start()
            processes.append(process)
        return _Running(trial, processes, Path(rundir), out, time.monotonic() + self.patience)


class _Running:
    """A run that is going on."""

    def __init__(
        self, trial: Trial, processes: list[ForkServerProcess], rundir: Path, out: Path, deadline: float
    ) -> None:
        self.trial, self.processes, self._rundir, self._out = trial, processes, rundir, out
        self._deadline = deadline
        self._late = False
        kill = trial.settings.kill
        if kill is not None and kill.place == "save":
            threading.Thread(target=self._strike, args=(kill.seconds,), daemon=True).start()

    def over(self) -> bool:
        """Whether all ranks have ended; those that hang are killed."""
        codes = [process.exitcode for process in self.processes]
        if None not in codes:
            return True
        if any(code not in (None, 0) for code in codes):
            self._deadline = min(self._deadline, time.monotonic() + GRACE)
        if time.monotonic() > self._deadline:
            self._late = all(code in (None, 0) for code in codes)
            self.kill()
        return False

    def kill(self) -> None:
        """Kill every rank, with its data workers, and wait for their end."""
        self._signal()
        for process in self.processes:
            process.join()

    def _strike(self, seconds: float) -> None:
        """Kill every rank within the first save. From outside: a thread within would wait for the one that trains."""
        before = set(partial_saves(self._rundir))
        while not set(partial_saves(self._rundir)) - before:
            if time.monotonic() > self._deadline:
                return
            time.sleep(STRIKE)
        time.sleep(seconds)
        self._signal()

    def _signal(self) -> None:
        for process in self.processes:
            if process.pid is not None:
                with suppress(ProcessLookupError, PermissionError):  # it may not have a session of its own yet
                    os.killpg(process.pid, signal.SIGKILL)
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    def outcome(self) -> Outcome:
        """What has come of it."""
        codes = tuple(process.exitcode or 0 for process in self.processes)
        trace, rank, fault = read_trace(self._out), 0, ""
        if any(codes):
            rank, fault = _fault(self._rundir, self._out, codes)
        elif trace.of("steps") and len(trace.of("end")) < len(codes):
            fault = "it ended before its train function returned"
        if self._late:
            fault = f"it did not end in time: {fault}"
        kept = log_path(self._rundir, rank)  # from when the run directory was open
        log = kept if kept.exists() else self._out / f"rank-{rank}.txt"
        return Outcome(self.trial, codes, trace, self._rundir, self._out, log, fault)


@contextmanager
def bench(
    recipe: str, options: Sequence[str], room: Path, *, cuda: bool, slots: int, patience: float
) -> Iterator[Bench]:
    """A server of processes for runs of `recipe`."""
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")  # of ranks that leave without a teardown
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*ALWAYS, *_imports(recipe)])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it inherits that: Ctrl-C is this process's
    ensure_running()  # it imports while this process does
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    yield Bench(context, recipe, tuple(options), room, cuda, slots, patience)


def partial_saves(rundir: Path) -> list[str]:
    """The saves of a run that have no final name, yet or for ever."""
    return [path.name for path in (rundir / "checkpoints").glob("*.partial-*")]


def _rank(settings: Settings, recipe: str, argv: Sequence[str], environ: Mapping[str, str], log: str) -> None:
    from launcher.check.child import rank_main

    rank_main(settings, recipe, argv, environ, log)


def _imports(recipe: str) -> list[str]:
    """The modules of OFTEN's packages that a recipe's file imports; none where it is no Python."""
    try:
        tree = ast.parse(Path(recipe).read_text())
    except (OSError, SyntaxError, ValueError):
        return []  # its own run will say so
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    beside = {path.stem for path in Path(recipe).absolute().parent.iterdir()}  # a person's own module of that name
    return sorted(name for name in names if name.partition(".")[0] in {*OFTEN} - beside)


def _fault(rundir: Path, out: Path, codes: Sequence[int]) -> tuple[int, str]:
    """Which rank of a run failed first, and why, in a line: by its verdict, else by the last words of one."""
    if shutil.disk_usage(out).free < ROOM:
        return 0, f"the disk of {out} is full: give --keep DIR on another"
    found = judged(rundir)
    if found.rank is not None:
        return found.rank, _cut(found.text)
    for rank in range(len(codes)):
        path = out / f"rank-{rank}.txt"
        lines = (
            [line for line in path.read_text(errors="replace").splitlines() if line.strip()] if path.exists() else []
        )
        told = [line for line in lines if line.startswith("launcher: ")] or lines[-1:]
        if told:
            return rank, _cut(told[-1].removeprefix("launcher: "))
    return 0, f"exit codes {', '.join(map(str, codes))}"


def _cut(text: str) -> str:
    """The first line, or as much of it as a table takes; the rest is in the run's output."""
    line = text.partition("\n")[0]
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def _metrics(path: Path) -> dict[int, dict[str, float]]:
    found: dict[int, tuple[int, dict[str, float]]] = {}
    with suppress(OSError):
        for text in path.read_text().splitlines():
            with suppress(ValueError):
                line: dict[str, Any] = json.loads(text)
                attempt, step = line.pop("attempt"), line.pop("step")
                if attempt != found.get(step, (attempt, {}))[0]:
                    found[step] = (attempt, {})
                values = {key: value for key, value in line.items() if not _is_rate(key)}
                found.setdefault(step, (attempt, {}))[1].update(values)
    return {step: values for step, (_, values) in sorted(found.items())}


def _is_rate(key: str) -> bool:
    return key.endswith(("_per_s", "step_s")) or key in ("data_wait", "memory_gb", "mfu")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
