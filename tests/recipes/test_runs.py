"""The recipes in one process and in two, replicated and sharded; and a GAN."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ROOT, clean_environment, losses, metrics, status, tensors

RECIPES = ROOT / "recipes"
TINY = """
    --model.depth 2 --model.width 32 --model.heads 2 --data.seq-len 64 --data.cache cache --microbatch-size 8
    --eval-rows 16 --sample-tokens 20 --warmup 4 --lr 2e-2 --run.threads 1 --run.log-every 1
"""


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """What a command that must succeed printed."""
    full = {**clean_environment(), "PYTHONPATH": str(ROOT), "HF_HOME": str(cwd / "hf"), **(env or {})}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=full, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"exit code {done.returncode} of {command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def launcher_run(*command: str | Path, cwd: Path) -> str:
    """`launcher run --nproc 2`, by this Python."""
    return run(sys.executable, "-m", "launcher", "run", "--nproc", "2", *command, cwd=cwd)


def assert_close(a: dict[int, float], b: dict[int, float], tolerance: float) -> None:
    assert a.keys() == b.keys()
    differences = {step: abs(a[step] - b[step]) for step in a}
    assert max(differences.values()) <= tolerance, differences


def test_classify_learns_alike_on_one_process_and_on_two(start: Any, tmp_path: Path) -> None:
    options = ["--epochs", "10", "--run.threads", "1"]
    recipe = RECIPES / "classify.py"
    jobs = [start(world_size, recipe, *options, "--run.dir", name) for world_size, name in ((1, "one"), (2, "two"))]
    for job in jobs:
        job.ok()
    assert_close(losses(tmp_path / "one"), losses(tmp_path / "two"), 1e-4)
    for name in ("one", "two"):
        steps = status(tmp_path / name)["global_step"]
        assert steps == -(-10 * 1437 // 64)
        assert metrics(tmp_path / name)[steps]["test_accuracy"] >= 0.95


def test_gpt_replicated_and_sharded(start: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {k} says {k * k}\n" for k in range(4000)))
    options = [*TINY.split(), "--data.files", text, "--steps", "12", "--eval-every", "6", "--prompt", "line 1"]
    replicated = launcher_run(RECIPES / "gpt.py", *options, "--run.dir", "ddp", cwd=tmp_path)
    ranks = start(2, RECIPES / "gpt.py", *options, "--run.dir", "fsdp", "--run.shard", "full")
    sharded = ranks.ok().split("--- rank 1")[0]
    assert_close(losses(tmp_path / "ddp"), losses(tmp_path / "fsdp"), 1e-5)
    lines = metrics(tmp_path / "ddp")
    assert lines[12]["loss"] < lines[1]["loss"] - 1
    assert lines[12]["val_loss"] < lines[6]["val_loss"] < lines[0]["val_loss"]
    sample = replicated[replicated.index("line 1") :].strip()
    assert len(sample) > 20
    assert sample in sharded
    files = sorted(path.name for path in (tmp_path / "ddp" / "checkpoints" / "step-00000012").iterdir())
    assert files == ["index.json", "node-00000-of-00001.safetensors", "verified"]


def test_finetune_by_default(tmp_path: Path) -> None:
    options = ["--steps", "5", "--data.held-out", "0.01", "--run.threads", "1", "--run.dir", "run"]
    printed = run(sys.executable, RECIPES / "finetune.py", *options, cwd=tmp_path)
    assert "held-out loss" in printed
    lines = metrics(tmp_path / "run")
    assert lines[5]["val_loss"] < lines[0]["val_loss"]


@pytest.mark.slow
def test_finetune_compiles_its_packed_rows_once(start: Any, tmp_path: Path) -> None:
    options = ["--steps", "5", "--data.held-out", "0.01", "--eval-every", "0", "--run.threads", "1"]
    start(1, RECIPES / "finetune.py", *options, "--run.log-every", "1", "--run.dir", "eager").ok()
    compiled = [*options, "--run.log-every", "1", "--run.compile", "default", "--run.dir", "compiled"]
    said = start(1, RECIPES / "finetune.py", *compiled, env={"TORCH_LOGS": "recompiles,graph_breaks"}).ok()
    recompiled = said.count("Recompiling")
    assert recompiled == said.count("GLOBAL_STATE changed: grad_mode"), said  # an evaluation has no gradients
    assert "Graph break" not in said, said
    assert_close(losses(tmp_path / "eager"), losses(tmp_path / "compiled"), 1e-4)


def test_finetune_with_lora_saves_the_adapters_alone(start: Any, tmp_path: Path) -> None:
    rows = [f'{{"prompt": "{k} + {k} =", "completion": " {2 * k}"}}' for k in range(200)]
    (tmp_path / "sums.jsonl").write_text("\n".join(rows))
    options = ["--steps", "2", "--data.files", "sums.jsonl", "--lora.rank", "2", "--run.threads", "1"]
    start(2, RECIPES / "finetune.py", *options, "--run.dir", "run", env={"HF_HOME": str(tmp_path / "hf")}).ok()
    saved = tensors(tmp_path / "run")
    assert len([name for name in saved if name.startswith("model/")]) == 56
    assert all("lora_" in name or name.startswith("optimizer/") for name in saved)


def test_finetune_sharded_with_frozen_layers(start: Any, tmp_path: Path) -> None:
    options = [
        "--steps",
        "2",
        "--data.held-out",
        "0.01",
        "--model.freeze-embeddings",
        "--model.freeze-layers",
        "3",
        "--run.shard",
        "full",
    ]
    start(2, RECIPES / "finetune.py", *options, "--run.dir", "run").ok()
    names = [name.removeprefix("model/") for name in tensors(tmp_path / "run") if name.startswith("model/")]
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"3"}
    assert not any("embed_tokens" in name for name in names)


def test_a_gan_with_two_optimizers_and_an_average(start: Any, tmp_path: Path) -> None:
    recipe, options = Path(__file__).with_name("gan.py"), ["--steps", "200", "--run.threads", "1"]
    jobs = [start(world_size, recipe, *options, "--run.dir", name) for world_size, name in ((1, "one"), (2, "two"))]
    for job in jobs:
        job.ok()
    assert_close(losses(tmp_path / "one"), losses(tmp_path / "two"), 1e-4)
    first, second = metrics(tmp_path / "one")[200], metrics(tmp_path / "two")[200]
    for name in ("off_circle", "off_circle_ema"):
        assert first[name] < 0.5  # it begins at 2, the radius
        assert second[name] == pytest.approx(first[name], abs=1e-3)
    saved = tensors(tmp_path / "two")
    averaged = {name: tensor for name, tensor in saved.items() if "ema" in name}
    assert len(averaged) == 6
    assert any(not tensor.equal(saved[f"generator/{name.rsplit('/', 1)[1]}"]) for name, tensor in averaged.items())
