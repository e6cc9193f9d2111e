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


def test_checkpoint_compares_with_the_raw_disk_and_a_peer(tmp_path):
    out = tmp_path / "result.json"
    names = ["launcher", "dcp async"]
    sizes = ["--gigabytes", 0.004, "--rounds", 1, "--dir", tmp_path]
    code, said = run(sys.executable, BENCHMARKS / "checkpoint.py", *sizes, "--only", *names, "--out", out)
    assert code == 0, said
    result = json.loads(out.read_text())
    rows = result["contenders"]
    assert rows.keys() == {"raw", "control", *names}
    assert rows["raw"]["durable"]["ratio"] == rows["raw"]["cold"]["ratio"] == 1
    for name in names:
        assert 0 < rows[name]["blocked"]["s"] < rows[name]["durable"]["s"]
        assert rows[name]["cold"]["s"] > 0
        assert rows[name]["memory_to_save_gb"] >= 0
        assert rows[name]["first_load_s"] > 0
        assert result["beside_training"][name]["median"]["ratio"] > 0
    assert rows["launcher"]["verified"]["s"] > rows["launcher"]["durable"]["s"]
    assert rows["dcp async"]["durable"]["of_the_launchers"]["ratio"] > 0
    assert all(plan["files"] <= plan["nodes"] for plan in result["large_job"])
    targets = result["targets"]
    assert {"blocked at most 1.2 of the measure", "cold ahead of dcp async"} <= targets.keys()
    assert all(f"{'met   ' if target['met'] else 'MISSED'} {name}" in said for name, target in targets.items())
    assert os.uname().nodename not in out.read_text()
    assert not [path for path in tmp_path.iterdir() if path != out], "nothing is left behind"


def test_a_contender_of_checkpoints_that_fails_is_told_with_what_it_said(tmp_path):
    job = f"checkpoint.start('times', Path({str(tmp_path / 'job')!r}), 0.001, 1, ['nobody'])"
    script = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import checkpoint; from pathlib import Path; {job}"
    code, said = run(sys.executable, "-c", script)
    assert code == 1
    assert "times 0.001 1 ['nobody'] failed" in said
    assert "KeyError: 'nobody'" in said
