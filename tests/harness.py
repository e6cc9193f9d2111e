"""Starts recipes as real processes and says what a failed one printed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


class Ranks:
    """The processes of one job; rank r's output goes to a file, shown when something fails."""

    def __init__(self, world_size: int, recipe: Path, *args: str, cwd: Path, env: dict[str, str] | None = None) -> None:
        self.args = [sys.executable, str(recipe), *map(str, args)]
        self.processes = []
        port = free_port()
        for rank in range(world_size):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            variables = {key: str(value) for key, value in ranks.items()} if world_size > 1 else {}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
            output = open(cwd / f"out-{time.monotonic_ns()}-{rank}", "w+")  # noqa: SIM115 - closed with the process
            full = {**clean_environment(), **variables, **(env or {})}
            process = subprocess.Popen(self.args, stdout=output, stderr=subprocess.STDOUT, cwd=cwd, env=full)
            self.processes.append((process, output))

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes, in rank order; a job that hangs is killed and told."""
        deadline = time.monotonic() + timeout
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process, _ in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"hangs after {timeout} s:\n{self.output()}") from None

    def ok(self, timeout: float = 120) -> str:
        """Wait for a job that must succeed; returns what it printed."""
        codes = self.wait(timeout)
        assert codes == [0] * len(codes), f"exit codes {codes} of {' '.join(self.args)}\n{self.output()}"
        return self.output()

    def kill(self, rank: int | None = None, number: int = signal.SIGKILL) -> None:
        """Send a signal to one rank, or to all."""
        for process, _ in self.processes if rank is None else [self.processes[rank]]:
            process.send_signal(number)

    def close(self) -> None:
        """Kill what is left, and close the files."""
        for process, output in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            output.close()

    def output(self) -> str:
        """What every rank printed."""
        parts = []
        for rank, (_, output) in enumerate(self.processes):
            parts.append(f"--- rank {rank}\n{Path(output.name).read_text()}")
        return "\n".join(parts)

    def when(self, happened: Callable[[], bool], timeout: float = 60) -> None:
        """Wait until something has happened."""
        deadline = time.monotonic() + timeout
        while not happened():
            assert time.monotonic() < deadline, f"it did not happen in {timeout} s:\n{self.output()}"
            assert any(process.poll() is None for process, _ in self.processes), f"all ended before:\n{self.output()}"
            time.sleep(0.01)  # polling a file that another process writes


def clean_environment() -> dict[str, str]:
    """This process's environment without what could make a child think it is part of a job."""
    prefixes = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "FSDP_", "SLURM_", "TORCHELASTIC_", "OMP_")
    return {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def metrics(rundir: Path) -> dict[int, dict[str, Any]]:
    """Lines by step; of one step the latest attempt's count, and of steps that were gone back from what came after."""
    lines: dict[int, dict[str, Any]] = {}
    for text in (rundir / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line.pop("rewound_from", None):
            lines = {step: one for step, one in lines.items() if step <= line["step"]}
        if line["attempt"] != lines.get(line["step"], {}).get("attempt"):
            lines[line["step"]] = {}
        lines[line["step"]] |= line
    return lines


def losses(rundir: Path) -> dict[int, float]:
    return {step: line["loss"] for step, line in metrics(rundir).items() if "loss" in line}


def status(rundir: Path) -> dict[str, Any]:
    return json.loads((rundir / "run.json").read_text())


def tensors(rundir: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint (the newest), read by the package itself in one process."""
    from launcher import checkpoint
    from launcher.world import World

    store = checkpoint.Store(rundir / "checkpoints")
    path = store.newest() if step is None else store.path(step)
    assert path is not None, f"no checkpoint in {rundir}"
    index = checkpoint.read_index(path)
    state = checkpoint.State()
    state.tensors = {name: torch.zeros(spec.shape, dtype=index.dtype(name)) for name, spec in index.tensors.items()}
    checkpoint.load(path, World(), state)
    return state.tensors


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    """Equal names, and tensors equal bit for bit, or within a tolerance."""
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        difference = (tensor.double() - b[name].double()).abs().max().item() if tensor.numel() else 0.0
        assert difference <= tolerance, f"{name} differs by {difference}"


def samples(rundir: Path) -> dict[tuple[int, int], list[int]]:
    """The sample ids of every (step, micro-batch) that the recipe wrote down; of one the latest attempt counts."""
    seen: dict[tuple[int, int], list[int]] = {}
    for path in sorted(rundir.glob("ids-*.jsonl"), key=lambda path: int(path.stem.split("-")[1])):
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # the line that a SIGKILL cut
            seen[line["step"], line["micro"]] = line["ids"]
    return seen


def launch(*words: object, cwd: Path | None = None, timeout: float = 240) -> tuple[int, str, str]:
    """Run the `launcher` command; exit code, output and errors."""
    command = [sys.executable, "-m", "launcher", *map(str, words)]
    environ = clean_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environ, timeout=timeout)
    return done.returncode, done.stdout, done.stderr
