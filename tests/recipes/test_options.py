"""recipes/gpt.py with every option that is off by default, at once: sharded, resumed, and in one process."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.harness import ROOT, assert_same, losses, metrics

RECIPE = ROOT / "recipes" / "gpt.py"
OPTIONS = """
    --optimizer muon --model.attention flex --model.loss-chunk 96 --model.kv-heads 2 --model.hidden 48
    --model.rope-base 5e4 --run.activation-checkpointing selective
    --model.depth 2 --model.width 32 --data.seq-len 64 --microbatch-size 4 --steps 6 --eval-rows 8
    --eval-every 0 --sample-tokens 4 --warmup 2 --data.cache cache --run.threads 1 --run.log-every 1
"""


def shards(rundir: Path) -> dict[str, torch.Tensor]:
    """What both ranks have saved at the end."""
    files = sorted((rundir / "checkpoints" / "step-00000006").glob("*.safetensors"))
    return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def test_all_options_at_once_sharded_resumed_and_in_one_process(start: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {k} says {k * k}\n" for k in range(4000)))
    options = [*OPTIONS.split(), "--data.files", text]
    whole = start(1, RECIPE, *options, "--run.dir", tmp_path / "one")
    sharded = start(2, RECIPE, *options, "--run.dir", tmp_path / "two", "--run.shard", "full", "--run.save-every", 3)
    whole.ok()
    sharded.ok()
    # Muon's products are in bf16: how a sum is ordered shows in the fifth digit
    ours, theirs = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert max(abs(ours[step] - theirs[step]) for step in theirs) < 1e-3
    assert ours[6] < ours[1] - 0.3
    saved = shards(tmp_path / "two")
    assert any("momentum_buffer" in name and "blocks.0.mlp.up" in name for name in saved)
    checkpoint = tmp_path / "two" / "checkpoints" / "step-00000003"
    resumed = ["--run.dir", tmp_path / "again", "--run.shard", "full", "--run.resume", checkpoint]
    start(2, RECIPE, *options, *resumed).ok()
    assert min(metrics(tmp_path / "again")) > 3
    assert_same(shards(tmp_path / "again"), saved)
