"""The benchmarks run: every contender of overhead.py trains and is timed, and gpu.sh does all it does, small."""

import importlib
import json
import os
import statistics
import subprocess
import sys

import pytest

from tests.harness import ROOT, clean_environment

BENCHMARKS = ROOT / "benchmarks"


def run(*command, timeout=120, **environ):
    done = subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env=clean_environment() | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return done.returncode, done.stdout


def test_overhead_compares_with_the_bare_loop(tmp_path):
    out = tmp_path / "result.json"
    names = ["launcher", "accelerate"]
    sizes = ["--launches", 1, "--rounds", 4, "--steps", 5]
    code, said = run(sys.executable, BENCHMARKS / "overhead.py", *sizes, "--only", *names, "--out", out)
    assert code == 0, said
    result = json.loads(out.read_text())
    assert result["contenders"].keys() == {"bare", *names}
    assert result["contenders"]["bare"]["ratio"] == 1
    assert all(result["contenders"][name]["step_us"] > 0 for name in names)
    assert result["contenders"]["launcher"]["save_ms"] is not None
    assert os.uname().nodename not in out.read_text(), "a result names the machine's model, not the machine"
    assert "launcher" in said, "a table for a person"


def test_a_contender_that_fails_is_told_with_what_it_said(module, tmp_path):
    overhead = module("overhead")
    with pytest.raises(SystemExit, match=r"(?s)nobody ended with exit code 1.*KeyError: 'nobody'"):
        overhead.launch(["nobody"], 1, 1, tmp_path / "jobs", tmp_path / "data")


def test_gpu_dry_run(tmp_path):
    code, said = run(BENCHMARKS / "gpu.sh", "--out", tmp_path, "--dry-run", PYTHON=sys.executable)
    assert code == 0, said
    assert "skipped" in (tmp_path / "tests.txt").read_text()
    result = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert result["dry_run"] is True
    [row] = result["variants"].values()
    assert row["tokens_per_s"] > 0
    assert row["peak_memory_gb"] > 0
    assert row["parameters"] > 0


@pytest.mark.parametrize(("arguments", "fault"), [([], "--out DIR"), (["--fast"], "unknown option --fast")])
def test_gpu_sh_names_what_is_wrong(arguments, fault):
    code, said = run(BENCHMARKS / "gpu.sh", *arguments)
    assert code == 2
    assert fault in said
    assert len(said.splitlines()) == 1, said


@pytest.fixture
def module(monkeypatch):
    """A benchmark, imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_rates_leave_out_the_warm_up(module):
    gpu = module("gpu")

    def line(step, rate):
        same = {"data_wait": 0.0, "loss": 1.0}
        return {"step": step, "step_s": 1 / rate, "tokens_per_s": rate, "memory_gb": step, **same}

    lines = [line(1, 1.0), line(10, 5.0), *(line(step, rate) for step, rate in ((20, 10.0), (30, 12.0), (40, 20.0)))]
    found = gpu.rates([{"step": 0, "val_loss": 3.0}, *lines])
    assert found["tokens_per_s"] == statistics.median([10.0, 12.0, 20.0])
    assert found["first_step_s"] == 1
    assert found["mfu"] is None
    assert found["peak_memory_gb"] == 40


@pytest.mark.parametrize(("seconds", "told"), [(0.0, "no time left"), (0.1, "not done after 0.1 s")])
def test_a_variant_that_runs_out_of_time_is_told(module, tmp_path, seconds, told):
    gpu = module("gpu")
    assert gpu.measure("eager", gpu.TINY, tmp_path, seconds, dry_run=True) == {"failed": told}
