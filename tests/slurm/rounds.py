"""Rounds: a run is submitted to the cluster, something happens to it, and what is left is held against the promises.

    lossless    a signal comes in time: the run stops at an agreed step, saves, goes on by itself; no step is lost
    lossy       a rank or a node is gone: the run goes on by itself, from at most one save interval before
    over        the run has ended for good: it is not requeued

Whatever happened, a run that ends has the weights and the losses of one that was not disturbed, bit for bit; no process
of it is left on any node, and no half-written checkpoint.
"""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.harness import assert_same, losses, status, tensors
from tests.slurm.lab import Lab

RECIPE = Path(__file__).with_name("paced.py")
EVERY = 10  # steps between saves
PACE = 0.2  # seconds a step
STEPS = 50
LONG = 220  # steps of a run that reaches its time limit of one minute
OPTIONS = ["--run.log-every", "1", "--run.save-every", str(EVERY), "--run.threads", "1"]


@dataclass(frozen=True)
class Kind:
    """Something that happens to a run."""

    strike: Callable[[Round], None]
    loses: int | None = 0
    """Steps that may be trained twice; None: the run is over."""
    status: str = "finished"
    flags: tuple[str, ...] = ()
    steps: int = STEPS
    env: dict[str, str] = field(default_factory=dict)
    restarts: bool = True
    """Whether a new start is needed."""
    early: bool = False
    """Whether it happens before the first step."""


class Round:
    """One run on the cluster."""

    def __init__(self, lab: Lab, path: Path, name: str, seed: int = 0) -> None:
        self.lab, self.kind, self.name = lab, KINDS[name], name
        self.random = random.Random(f"{seed} {name}")
        self.path = path
        self.job = ""

    def start(self) -> Round:
        """Submit the run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = ["--nodes", "2", "--gpus", "0", "--tasks", "1", "--time", "10", "--json"]  # the last word counts
        command = ["launcher", "submit", *flags, *self.kind.flags, str(RECIPE)]
        options = ["--steps", str(self.kind.steps), *OPTIONS, "--run.dir", str(self.path)]
        env = {"PACE": str(PACE), **self.kind.env}
        said = json.loads(self.lab.command(*command, *options, cwd=self.path.parent, env=env, timeout=240))
        assert said["run"] == str(self.path)
        self.job = said["job"]
        return self

    def play(self) -> Round:
        """All of it."""
        self.start().strike().end()
        return self

    def ready(self) -> Round:
        """Wait for the moment: a random one in training, or before the first step."""
        if self.kind.early:
            self.until(lambda: list(self.path.glob("attempts/1/started.json")), "it did not start")
        elif self.kind.strike is not nothing:
            self.until_step(self.random.randint(3, 2 * EVERY + 3))
            time.sleep(self.random.random() * PACE)
        return self

    def strike(self) -> Round:
        """Let it happen."""
        self.ready()
        self.kind.strike(self)
        return self

    def end(self) -> dict[str, Any]:
        """Wait for its end, and look at what is left."""
        states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
        try:
            job = self.lab.wait_for(self.job, states, timeout=240)
            self._look(job)
        except AssertionError as error:
            raise AssertionError(f"{self.name}: {error}\n{self.told()}") from None
        return {"kind": self.name, "restarts": status(self.path)["restarts"], "lost": self.lost()}

    def _look(self, job: dict[str, str]) -> None:
        facts = status(self.path)
        assert facts["status"] == self.kind.status, facts["status"]
        verdict = (self.path / "slurm" / "verdict").read_text()
        assert verdict.startswith(f"{self.kind.status}:"), verdict
        if self.kind.loses is None:
            assert job["Restarts"] == "0"
            assert facts["attempt"] == 1
        else:
            assert facts["global_step"] == self.kind.steps
            assert (facts["restarts"] >= 1) == self.kind.restarts, facts["restarts"]
            assert max(self.lost(), default=0) <= self.kind.loses, f"lost {self.lost()} steps"
            assert sorted(losses(self.path)) == list(range(1, self.kind.steps + 1))
        if self.name == "hardware error":
            first, second = sorted(self.path.glob("slurm/started-*"), key=lambda path: int(path.name.split("-")[2]))
            assert first.read_text().split()[1] != second.read_text().split()[1], "the bad node was not avoided"
        assert not list(self.path.glob("checkpoints/*.partial*")), "half a checkpoint is left"
        for node in self.lab.nodes:
            left = [line for _, line in self.lab.processes(node) if self._is_of(line)]
            assert not left, f"left on {node}: {left}"

    def compare(self, straight: Path) -> None:
        """Hold the run against one that was not disturbed."""
        assert losses(self.path) == losses(straight)
        assert_same(tensors(self.path), tensors(straight))

    def lost(self) -> list[int]:
        """For every new start, how many steps it had to train again."""
        lines = [json.loads(text) for text in (self.path / "metrics.jsonl").read_text().splitlines() if text]
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for line in lines:
            first[line["attempt"]] = min(line["step"], first.get(line["attempt"], line["step"]))
            last[line["attempt"]] = max(line["step"], last.get(line["attempt"], 0))
        attempts = sorted(first)
        return [max(last[a] for a in attempts if a < b) - first[b] + 1 for b in attempts[1:]]

    def until_step(self, step: int, timeout: float = 90) -> None:
        """Wait until the run has told of a step."""
        self.until(lambda: self.step() >= step, f"step {step} was not reached", timeout)

    def step(self) -> int:
        """The last step that it has told of."""
        try:
            text = (self.path / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return 0
        return max(map(int, re.findall(r'"step": (\d+)', text)), default=0)

    def until(self, happened: Callable[[], object], otherwise: str, timeout: float = 60) -> None:
        """Wait until something has happened."""
        deadline = time.monotonic() + timeout
        while not happened():
            assert time.monotonic() < deadline, f"{self.name}: {otherwise} in {timeout} s\n{self.told()}"
            time.sleep(0.05)  # polling files that other processes write

    def told(self) -> str:
        """What the job and its ranks have printed."""
        files = [*sorted(self.path.glob("slurm/*.out")), *sorted(self.path.glob("logs/*"))]
        parts = [
            f"--- {file.name}\n" + "\n".join(file.read_text(errors="replace").splitlines()[-40:]) for file in files
        ]
        return "\n".join([f"{self.name} in {self.path}, job {self.job}", *parts])

    def _is_of(self, line: str) -> bool:
        """Whether a command line names this run: another one's path may begin alike."""
        return re.search(rf"{re.escape(str(self.path))}(?![\w.-])", line) is not None

    def ranks(self) -> list[int]:
        """The pids of the run's ranks, on this machine."""
        found = [found for node in self.lab.nodes for found in self.lab.processes(node)]
        return [pid for pid, line in found if self._is_of(line) and "python" in line.split(" ", 1)[0]]


def left_behind(lab: Lab) -> list[str]:
    """What ended jobs have left running on the nodes; their scripts get a moment to end."""
    deadline = time.monotonic() + 15
    while left := [line for node in lab.nodes for _, line in lab.processes(node)]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.1)  # polling processes
    return []


def straight(start: Callable[..., Any], path: Path, steps: int = STEPS) -> Path:
    """The run that nothing happens to: two processes on this machine."""
    start(2, RECIPE, "--steps", steps, *OPTIONS, "--run.dir", path).ok()
    return path


def nothing(round_: Round) -> None:
    """Only wait."""


def _preempt(round_: Round) -> None:
    round_.lab.submit("sleep 2", "-N2", "--exclusive", "--partition=high", cwd=round_.path)


def _requeue(round_: Round) -> None:
    round_.lab.command("scontrol", "requeue", round_.job)


def _crash(round_: Round) -> None:
    node = round_.random.choice(round_.lab.nodes)
    round_.lab.crash(node)
    time.sleep(1)
    round_.lab.start(node)


def _restart_controller(round_: Round) -> None:
    round_.lab.restart_controller()


def _kill(round_: Round) -> None:
    import os

    os.kill(round_.random.choice(round_.ranks()), signal.SIGKILL)


def _drain(round_: Round) -> None:
    for node in round_.lab.nodes:
        round_.lab.drain(node)


def _cancel(round_: Round) -> None:
    round_.lab.command("scancel", round_.job)


KINDS = {
    "preemption": Kind(_preempt, flags=("--partition", "low")),
    "preemption with grace": Kind(_preempt, flags=("--partition", "grace")),
    "preemption that cancels": Kind(_preempt, flags=("--partition", "cancel")),
    "time limit": Kind(nothing, flags=("--time", "1"), steps=LONG),
    "scontrol requeue": Kind(_requeue),
    "scontrol requeue before the first step": Kind(_requeue, early=True),
    "hardware error": Kind(nothing, loses=2 * EVERY - 1, flags=("--nodes", "1", "--tasks", "2"), env={"BREAK": "17:1"}),
    "node crash": Kind(_crash, loses=2 * EVERY - 1),
    "slurmctld restart": Kind(_restart_controller, restarts=False),
    "SIGKILL of a rank": Kind(_kill, loses=2 * EVERY - 1),
    "drain": Kind(_drain, restarts=False),
    "scancel": Kind(_cancel, loses=None, status="cancelled"),
    "code error": Kind(nothing, loses=None, status="failed", env={"RAISE": "17:1"}),
    "finished": Kind(nothing, restarts=False),
}
