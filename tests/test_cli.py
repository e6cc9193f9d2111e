"""The `launcher` command: what it prints, what it becomes, and how fast it answers."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import main

ROOT = Path(__file__).parent.parent
PRINTS = """
import json, os, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "MASTER_PORT")
said = {"argv": sys.argv[1:], "file": sys.argv[0]} | {name: os.environ.get(name) for name in names}
print(json.dumps(said) + "\\n", end="")
sys.exit(int(os.environ.get("EXIT_WITH", "0")))
"""
AWKWARD = ["a b", "it's", '"q"', "$HOME", "*", "", "--gpus", "9", "--dry-run", "--help", "ü\n"]


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "my recipe.py"
    path.write_text(PRINTS)
    return path


def launcher(*argv: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    prefixes = ("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "CUDA_VISIBLE_DEVICES")
    environ = {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}
    environ |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(cwd)} | env
    command = [sys.executable, "-m", "launcher", *argv]
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=120)


def printed(done: subprocess.CompletedProcess[str], code: int = 0) -> list[dict[str, Any]]:
    """What every rank printed, in rank order."""
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return sorted(lines, key=lambda line: line["RANK"] or "")


def test_one_process_is_plain_python_with_its_arguments_untouched(recipe: Path) -> None:
    done = launcher("run", recipe.name, *AWKWARD, cwd=recipe.parent)
    (line,) = printed(done)
    assert line["argv"] == AWKWARD
    assert line["file"] == recipe.name
    assert (line["RANK"], line["ACCELERATE_USE_CPU"]) == (None, None)
    assert done.stderr.startswith("+ ")
    assert shlex.split(done.stderr[2:]) == [sys.executable, recipe.name, *AWKWARD]


def test_two_cpu_processes_are_two_ranks_with_their_arguments_untouched(recipe: Path) -> None:
    done = launcher("run", "--nproc", "2", recipe.name, *AWKWARD, cwd=recipe.parent)
    lines = printed(done)
    assert [line["RANK"] for line in lines] == ["0", "1"]
    assert {line["WORLD_SIZE"] for line in lines} == {"2"}
    assert all(line["argv"] == AWKWARD for line in lines)
    assert {line["ACCELERATE_USE_CPU"] for line in lines} == {"true"}
    assert done.stderr.splitlines()[0].startswith("+ env ACCELERATE_USE_CPU=true ")
    assert shlex.split(done.stderr)[-len(AWKWARD) - 1 :] == [recipe.name, *AWKWARD]
    assert "were not passed" not in done.stderr, done.stderr  # accelerate warns of what it has to guess


def test_the_users_accelerate_config_does_not_leak_in(recipe: Path) -> None:
    config = recipe.parent / "accelerate" / "default_config.yaml"
    config.parent.mkdir()
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: bf16\nnum_processes: 5\n"
        "num_machines: 2\nmachine_rank: 1\nmain_process_ip: 10.0.0.1\nmain_process_port: 29500\ngpu_ids: '3'\n"
        "dynamo_config:\n  dynamo_backend: INDUCTOR\nuse_cpu: false\n"
    )
    lines = printed(launcher("run", "--nproc=2", recipe.name, cwd=recipe.parent))
    assert [line["RANK"] for line in lines] == ["0", "1"]
    assert {line["ACCELERATE_MIXED_PRECISION"] for line in lines} == {"no"}
    assert {line["MASTER_PORT"] for line in lines} != {"29500"}


def test_it_becomes_the_process_and_its_exit_code(recipe: Path) -> None:
    printed(launcher("run", recipe.name, cwd=recipe.parent, EXIT_WITH="7"), code=7)


def test_a_dry_run_prints_the_line_that_does_the_same(recipe: Path) -> None:
    done = launcher("run", "--nproc", "1", "--dry-run", recipe.name, *AWKWARD, cwd=recipe.parent)
    assert (done.returncode, done.stderr) == (0, "")
    again = subprocess.run(["bash", "-c", done.stdout], cwd=recipe.parent, capture_output=True, text=True, timeout=60)
    (line,) = printed(again)
    assert line["argv"] == AWKWARD
    assert line["ACCELERATE_USE_CPU"] == "true"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "name a command: run"),
        (["rnu", "x.py"], "unknown command rnu: did you mean run?"),
        (["zzz"], "unknown command zzz: see launcher --help"),
        (["recipes/gpt.py"], "unknown command recipes/gpt.py: did you mean launcher run recipes/gpt.py?"),
        (["--verson"], "--verson"),
        (["run"], "needs a RECIPE"),
        (["run", "--dry-run"], "needs a RECIPE"),
        (["run", "--gpus"], "--gpus: expected one argument"),
        (["run", "--gpus", "x", "r.py"], "--gpus: invalid int value: 'x'"),
        (["run", "--gpus", "-1", "r.py"], "--gpus -1: at least 0"),
        (["run", "--nproc", "0", "r.py"], "--nproc 0: at least 1"),
        (["run", "--gpus", "9", "r.py"], "--gpus 9: this machine shows 0"),
        (["run", "--gpus", "0", "--nproc", "2", "r.py"], "--nproc: not allowed with argument --gpus"),
        (["run", "--steps", "3", "r.py"], "no option --steps: before RECIPE stand --gpus, --nproc and --dry-run"),
        (["run", "--gpu", "3", "r.py"], "no option --gpu"),
        (["run", "no.py"], "no.py: there is no such recipe"),
        (["run", "."], ". is a directory"),
        (["run", "notes.txt"], "notes.txt is no Python file"),
    ],
)
def test_a_usage_error_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, argv: list[str], words: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "r.py").touch()
    (tmp_path / "notes.txt").touch()
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("launcher: ")
    assert words in said.err
    assert said.err.count("\n") == 1


def test_help_and_version(capsys) -> None:
    assert main(["--help"]) == 0
    assert "run (run a recipe on this machine)" in capsys.readouterr().out
    assert main(["run", "--nproc", "2", "--help"]) == 0
    assert "--nproc N" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("launcher ")


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["--version"], ["run", "--dry-run", "r.py"]])
def test_it_answers_without_importing_anything_heavy(tmp_path, argv: list[str]) -> None:
    (tmp_path / "r.py").touch()
    command = [sys.executable, "-X", "importtime", "-m", "launcher", *argv]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    imported = {module.partition(".")[0] for module in modules}
    assert "argparse" in imported, "the listing was read wrongly"
    assert not imported & {"torch", "numpy", "accelerate", "tyro", "datasets", "rich"}
    assert not modules & {"launcher.parent", "launcher.verdict", "launcher.rundir"}, "only once something is started"
    if argv == ["--help"]:
        assert not modules & {"dataclasses", "inspect", "subprocess", "importlib.metadata"}
