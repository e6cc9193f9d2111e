"""Whatever a person gets wrong is told in one line that names it, with exit code 2 or 1, and nothing is lost."""

import json
import os
import resource
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import launcher
from tests.harness import status, tensors


@dataclass(frozen=True)
class ModelConfig:
    width: int = 8
    kind: Literal["mlp", "linear"] = "linear"


@dataclass(frozen=True)
class Config:
    steps: int = 3
    batch_size: int = 8
    microbatch_size: int = 4
    lr: float = 0.1
    samples: int = 20
    model: ModelConfig = field(default_factory=ModelConfig)


def train(run: launcher.Run, cfg: Config) -> None:
    x = torch.randn(cfg.samples, 3, generator=torch.Generator().manual_seed(0))
    loader = run.loader((x, x), batch_size=cfg.batch_size, microbatch_size=cfg.microbatch_size)
    model = run.build(lambda: nn.Sequential(nn.Linear(3, cfg.model.width), nn.Linear(cfg.model.width, 3)))
    optimizer = run.optimizer(torch.optim.AdamW(model.parameters(), lr=cfg.lr))
    for step in run.steps(loader, total=cfg.steps):
        for batch, target in step:
            step.backward(F.mse_loss(model(batch), target, reduction="sum"))
        optimizer.step()
        optimizer.zero_grad()


def one_line(printed: str) -> str:
    assert "Traceback" not in printed, printed
    said = [line for line in printed.splitlines() if line.startswith("launcher:")]
    lines = [line for line in said if not line.startswith("launcher: first step done")]  # which is no fault
    assert len(lines) == 1, printed
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--stesp", "3"], "--steps"),
        (["--run.dri", "x"], "--run.dir"),
        (["--model.witdh", "3"], "--model.width"),
        (["--lr", "fast"], "fast"),
        (["--steps", "2.5"], "2.5"),
        (["--model.kind", "conv"], "mlp"),
        (["--run.precision", "fp8"], "bf16"),
        (["--run.compile", "yes"], "max-autotune"),
        (["--steps"], "--steps"),
        (["stray"], "stray"),
        (["--config", "missing.toml"], "missing.toml"),
        (["--batch-size", "0"], "batch_size 0"),
        (["--microbatch-size", "9"], "9"),
        (["--microbatch-size", "-1"], "-1"),
        (["--samples", "0"], "empty"),
        (["--steps", "-1"], "-1"),
        (["--run.keep", "0"], "keep"),
        (["--run.log-every", "0"], "log-every"),
        (["--run.workers", "-1"], "workers"),
        (["--run.precision", "fp16"], "CUDA"),
        (["--run.resume", "nowhere"], "nowhere"),
        (["--run.init-from", "nowhere"], "nowhere"),
        (["--run.dir", "/proc/nothing"], "/proc/nothing"),
        (["--run.dir", __file__], "test_bad_inputs.py"),
        (["--run.dir", str(Path(__file__).parent)], "no run"),
        (["--run.allow", "nothing"], "nothing"),
        (["--run.compile", "default", "--run.compile-scope", "block"], "blocks=Block"),
    ],
)
def test_a_bad_option_is_one_line(run_recipe, argv, said):
    assert said in one_line(run_recipe(train, *argv, code=2))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", "lr = 0.1\nsteps = = 3", "line 2"),
        ("a.toml", "[model]\nwitdh = 3", "width"),
        ("a.toml", "steps = 'three'", "three"),
        ("a.json", '{"lr": 0.1,}', "a.json"),
        ("a.yaml", "lr: 0.1", ".toml"),
    ],
)
def test_a_bad_config_file_is_one_line(run_recipe, tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    assert said in one_line(run_recipe(train, "--config", tmp_path / name, code=2))


@pytest.mark.parametrize(
    ("environ", "argv", "said"),
    [
        ({"WORLD_SIZE": "2"}, [], "half distributed"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ["--run.precision", "no"], "accelerate launch says"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, [], "fp8"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], "DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, [], "--fsdp_version 2"),
    ],
)
def test_an_environment_that_says_otherwise_is_one_line(run_recipe, monkeypatch, environ, argv, said):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert said in one_line(run_recipe(train, *argv, code=2))


def test_a_changed_config_is_refused_unless_allowed(run_recipe):
    run_recipe(train)
    before = tensors(run_recipe.dir)
    printed = one_line(run_recipe(train, "--lr", 0.2, "--run.seed", 1, code=2))
    assert "lr was 0.1" in printed
    assert "run.seed" in printed
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(run_recipe.dir).items())
    run_recipe(train, "--lr", 0.2, "--steps", 4, "--run.allow", "lr")


def test_another_models_checkpoint_is_refused(run_recipe, tmp_path):
    run_recipe(train)
    other = ["--run.dir", str(tmp_path / "other"), "--model.width", 9]
    printed = one_line(run_recipe(train, *other, "--run.init-from", run_recipe.dir, code=1))
    assert "model/0.bias is 8 there and 9 here" in printed


def test_a_damaged_checkpoint_is_refused(run_recipe):
    run_recipe(train)
    [file] = run_recipe.dir.glob("checkpoints/step-*/*.safetensors")
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    passed, _, refused = run_recipe(train, "--steps", 5, code=1).splitlines()
    assert file.name in passed
    assert "PASSED OVER step-00000003, which is now step-00000003.bad" in passed
    assert "no checkpoint" in refused
    assert status(run_recipe.dir)["status"] == "failed"
    again = one_line(run_recipe(train, "--steps", 5, code=1))
    assert "step-00000003.bad" in again, "never from the beginning without a word"
    run_recipe(train, "--steps", 5, "--run.resume", "never")
    assert [path.name for path in run_recipe.dir.glob("checkpoints/*")].count("step-00000003.bad") == 1


def test_a_broken_run_json_is_told(run_recipe):
    run_recipe(train)
    (run_recipe.dir / "config.json").write_text("{")
    assert "config.json is broken" in one_line(run_recipe(train, code=1))


def test_a_full_disk_in_the_midst_is_told_and_training_goes_on(run_recipe):
    """A limit on file sizes stands for the full disk: what is written fails with an error of the system's own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(run: launcher.Run, cfg: Config) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            train(run, cfg)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        printed = run_recipe(limited, "--model.width", 64, "--run.save-every", 1, "--steps", 3)
    finally:
        signal.signal(signal.SIGXFSZ, before)
    assert "NOT SAVED, training goes on: step-00000001 could not be saved" in printed
    assert "Traceback" not in printed
    assert status(run_recipe.dir)["status"] == "finished", "the last save, with the disk free again, succeeded"
    assert not list(run_recipe.dir.glob("checkpoints/*partial*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_is_one_line(run_recipe, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "permission" in one_line(run_recipe(train, "--run.dir", tmp_path / "locked", code=2))


def test_the_failure_is_recorded(run_recipe):
    run_recipe(train)
    run_recipe(train, "--run.resume", "never", "--steps", 9, code=2)
    [failed] = run_recipe.dir.glob("attempts/*/failed")
    assert "--run.resume never" in json.loads(failed.read_text())["error"]
