"""The benchmarks run: every contender of overhead.py trains and is timed, and gpu.sh does all it does, small."""

import importlib
import json
import os
import subprocess
import sys
import time

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


@pytest.mark.slow
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
    phase = result["phases"]["124m"]
    assert phase["rounds"] == 2
    assert phase["parameters"] > 0
    assert phase["contenders"].keys() == {"bare", "launcher"}
    assert all(row["tokens_per_s"] > 0 for row in phase["contenders"].values())
    assert phase["contenders"]["launcher"]["save_blocked_seconds"] > 0
    assert "| launcher |" in said
    assert os.uname().nodename not in (tmp_path / "gpu-dry-run.json").read_text()


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


def test_a_gpu_ratio_is_of_turns_side_by_side_without_those_that_save(module, tmp_path):
    gpu, phases = module("gpu"), module("gpu_phases")
    bench = gpu.Bench(tmp_path / "gpu.json", {"limits": {"datasheet_tflops": 990.0}}, 100, tmp_path, dry_run=False)
    phase = phases.PHASES["124m"]
    every, (settle, steps) = phase.save_every(False), phase.turn(False)

    def turn(number, seconds):
        end = 1 + (number + 1) * (settle + steps)
        return {"seconds": seconds, "from": end - steps, "to": end, "peak_gb": 9.0}

    times = [(1.0, 1.1), (2.0, 2.2), (4.0, 4.4), (1.0, 9.0)]
    rounds = [{"bare": turn(k, bare), "launcher": turn(k, ours)} for k, (bare, ours) in enumerate(times)]
    assert [gpu.saves(one["launcher"], every) for one in rounds] == [False, False, False, True]
    found = gpu.summary(rounds, {"flops_per_token": 10**9}, phase, bench)
    assert found["launcher"]["of_bare"]["ratio"] == round(1 / 1.1, 4)
    assert found["launcher"]["save_ms"] == pytest.approx(6800)
    assert found["launcher"]["tokens_per_s"] == round(32 * 1024 * steps / 2.2)
    assert found["launcher"]["mfu"] == pytest.approx(32 * 1024 * steps / 2.2 / 990e3, rel=1e-3)
    result = {"phases": {"124m": {"contenders": found}}}
    assert gpu.targets(result)["124 M: at least 0.99 of the hand-written loop"] == {"found": 0.9091, "met": False}


def test_a_gpu_contender_that_fails_is_told_and_the_others_go_on(module, tmp_path, monkeypatch):
    turns = module("gpu_turns")
    monkeypatch.setattr(turns, "HERE", tmp_path)
    (tmp_path / "peers").mkdir()
    works = f"""
import socket, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
from gpu_turns import Clock
clock = Clock(socket.socket(fileno=int(sys.argv[1])), lambda: None, dict)
optimizer = object()
while True:
    clock.tick(optimizer)
"""
    (tmp_path / "peers" / "works.py").write_text(works)
    (tmp_path / "peers" / "breaks.py").write_text("raise SystemExit('out of memory')")
    (tmp_path / "peers" / "hangs.py").write_text("import time; time.sleep(600)")
    hangs = turns.Contender("hangs", tmp_path / "hangs", [], {})
    assert hangs.ready(0.1) is None
    assert hangs.failed == "not done after 0 s"
    group = turns.Group({kind: turns.Contender(kind, tmp_path / kind, [], {}) for kind in ("works", "breaks")})
    try:
        group.settle(time.monotonic() + 60)
        rounds = list(group.rounds(1, 3, 2, time.monotonic() + 60))
    finally:
        group.close()
    assert [[*one] for one in rounds] == [["works"], ["works"]]
    assert [one["works"]["to"] - one["works"]["from"] for one in rounds] == [3, 3]
    assert group.failures() == {"breaks": {"failed": "exit code 1", "said": ["out of memory"]}}


def test_a_gpu_with_little_memory_leaves_out_the_last(module):
    phase = module("gpu_phases").PHASES["124m"]
    names, left_out = phase.fitting(40.0, ["lightning"], module("gpu").PEERS)
    assert names == ["bare", "launcher"]
    assert left_out.keys() == {"hf", "lightning"}


@pytest.mark.slow
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


@pytest.mark.slow
def test_ddp_trains_alike_on_two_ranks(tmp_path):
    out = tmp_path / "result.json"
    sizes = ["--launches", 1, "--rounds", 1, "--steps", 2]
    code, said = run(sys.executable, BENCHMARKS / "ddp.py", *sizes, "--only", "launcher", "--out", out)
    assert code == 0, said
    rows = json.loads(out.read_text())["contenders"]
    assert rows.keys() == {"bare", "launcher"}
    assert rows["launcher"]["tokens_per_s"] > 0
    assert rows["launcher"]["loss_apart"] < 1e-4, said


def test_scale_of_few_ranks(tmp_path):
    out = tmp_path / "result.json"
    code, said = run(sys.executable, BENCHMARKS / "scale.py", "--ranks", 4, "--samples", 1000, "--out", out)
    assert code == 0, said
    result = json.loads(out.read_text())
    assert [row["ranks"] for row in result["checkpoint"]] == [4]
    assert result["order"][0]["us"] > 0


def test_the_page_is_what_the_results_make(module):
    page = module("page")
    assert page.PAGE.read_text() == page.page(), "python benchmarks/page.py"
