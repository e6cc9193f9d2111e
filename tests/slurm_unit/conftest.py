"""Run directories made by hand, and SLURM's commands as scripts that say what a test tells them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

SCRIPT = r"""#!/bin/bash
name=${0##*/}
line=$name
for argument in "$@"; do line+=" $argument"; done
printf '%s\n' "$line" | while IFS= read -r first; do printf '%s\n' "$first" >> "$FAKE/calls"; break; done
[ "$name $2" != "squeue -s" ] || name=steps
[ ! -e "$FAKE/$name.says" ] || { printf '%s\n' "$(<"$FAKE/$name.says")" >&2; exit 1; }
[ ! -e "$FAKE/$name.out" ] || printf '%s\n' "$(<"$FAKE/$name.out")"
"""


class Slurm:
    """A cluster that only talks."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._jobs: dict[str, str] = {}
        for name in ("squeue", "scancel", "sacct", "scontrol"):
            script = directory / "bin" / name
            script.parent.mkdir(exist_ok=True)
            script.write_text(SCRIPT)
            script.chmod(0o755)
        self.fails("sacct", "Slurm accounting storage is disabled")

    def job(
        self,
        id_: str,
        state: str,
        reason: str = "None",
        *,
        run: Path = Path("/"),
        start: float | None = None,
        end: float | None = None,
        number: str = "",
        nodes: str = "node[1-2]",
    ) -> None:
        """A job that squeue knows; a later call changes it."""
        when = ["N/A" if at is None else datetime.fromtimestamp(at).isoformat()[:19] for at in (start, end)]
        fields = [id_, number or id_, "name", "me", "batch", state, reason, "2", nodes, "N/A", *when, "1:00:00", run]
        self._jobs[id_] = "\x1e" + "\x1f".join(map(str, fields))
        self.says("squeue", "\n".join(self._jobs.values()))

    def forget(self) -> None:
        """No job is known any more."""
        self._jobs = {}
        self.says("squeue", "")

    def says(self, name: str, text: str) -> None:
        (self.directory / f"{name}.says").unlink(missing_ok=True)
        (self.directory / f"{name}.out").write_text(text)

    def fails(self, name: str, text: str) -> None:
        (self.directory / f"{name}.says").write_text(text)

    def calls(self, name: str) -> list[str]:
        path = self.directory / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(f"{name} ")]


class Run:
    """A run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)

    def write(self, name: str, value: Any) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    def facts(self, status: str, **facts: Any) -> Run:
        self.write("run.json", {"status": status, "attempt": 1, "restarts": 0, **facts})
        return self

    def job(self, *ids: str) -> Run:
        self.write(
            "slurm/jobs.jsonl", "".join(json.dumps({"job": id_, "time": 1.0, "tasks": []}) + "\n" for id_ in ids)
        )
        return self

    def start(self, attempt: int = 1, *, host: str = "node1", pid: int = 1, job: str = "", when: float = 0) -> Run:
        said = {
            "started": datetime.fromtimestamp(when or time.time(), UTC).isoformat(timespec="seconds"),
            "host": host,
            "pid": pid,
            "environment": {"SLURM_JOB_ID": job} if job else {},
        }
        self.write(f"attempts/{attempt}/started.json", said)
        return self

    def metrics(self, *lines: tuple[int, int, float]) -> Run:
        """Lines of attempt, step and loss."""
        text = "".join(
            json.dumps({"attempt": a, "step": s, "loss": x, "samples_per_s": 10.0 * s}) + "\n" for a, s, x in lines
        )
        self.write("metrics.jsonl", text)
        return self


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    directory = tmp_path / "fake"
    directory.mkdir()
    monkeypatch.setenv("FAKE", str(directory))
    monkeypatch.setenv("PATH", f"{directory / 'bin'}:{os.environ['PATH']}")
    return Slurm(directory)


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Makes a run under ./runs; the tests run beside it."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    return lambda name="a": Run(home / "runs" / name)


@pytest.fixture
def sweep(make: Callable[..., Run]) -> Callable[[int], Path]:
    """Makes a sweep of some points, submitted as array 20."""

    def made(number: int) -> Path:
        top = make("sweep")
        named = {f"{n:05d}": {"lr": f"1e-{n}"} for n in range(number)}
        top.write("slurm/sweep.json", {"parameters": ["lr"], "points": named})
        line = {"job": "20", "time": 1.0, "tasks": list(range(number))}
        top.write("slurm/jobs.jsonl", json.dumps(line) + "\n")
        for name in named:
            make(f"sweep/{name}").facts("pending").write("slurm/idle", "0")
        return top.path

    return made
