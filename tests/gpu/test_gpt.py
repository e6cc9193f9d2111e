"""The GPT recipe on a GPU, small: its kernels and their alternatives come to the same losses."""

import math

import pytest

from tests.gpu import CUDA
from tests.harness import ROOT, losses

pytestmark = CUDA

RECIPE = ROOT / "recipes" / "gpt.py"
SIZES = {"model.depth": 2, "model.width": 64, "model.heads": 4, "data.seq-len": 128, "batch-size": 8, "steps": 6}
SIZES |= {"microbatch-size": 4, "eval-every": 0, "eval-rows": 8, "sample-tokens": 2, "run.log-every": 1}
OPTIONS = [word for name, value in SIZES.items() for word in (f"--{name}", value)]
EXACT = ["--run.no-tf32"]
COMPILED = [*EXACT, "--run.compile", "default", "--run.compile-scope", "block"]
KINDS = {
    "eager": EXACT,
    "chunk": [*EXACT, "--model.loss-chunk", 100],
    "compiled": [*COMPILED, "--model.loss-chunk", 100],
    "selective": [*COMPILED, "--run.activation-checkpointing", "selective"],
    "dropout": [*EXACT, "--model.dropout", 0.1],
    "dropout-selective": [*EXACT, "--model.dropout", 0.1, "--run.activation-checkpointing", "selective"],
    "flex-cpu": ["--model.attention", "flex"],
    "flex": [*EXACT, "--model.attention", "flex"],
    "flex-compiled": [*EXACT, "--model.attention", "flex", "--run.compile", "default"],
    "bf16": ["--run.precision", "bf16", "--run.compile", "default", "--model.kv-heads", 2],
    "muon": ["--optimizer", "muon", "--run.precision", "bf16"],
}


@pytest.fixture(scope="module")
def runs(begin, tmp_path_factory):
    cache = tmp_path_factory.mktemp("data")
    files = ["--data.files", *sorted((ROOT / "launcher").glob("*.py"))]
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    return {
        name: begin(
            *(RECIPE, *OPTIONS, "--data.cache", cache, *KINDS[name], *files),
            env=hidden if name == "flex-cpu" else None,
        )
        for name in KINDS
    }


@pytest.mark.parametrize(
    ("name", "other", "tolerance"),
    [
        ("chunk", "eager", 1e-4),
        ("compiled", "eager", 1e-4),
        ("selective", "eager", 1e-4),
        ("dropout-selective", "dropout", 1e-4),
        ("flex", "flex-cpu", 1e-3),
        ("flex-compiled", "flex-cpu", 1e-3),
    ],
)
def test_a_kernel_has_the_losses_of_the_plain_one(runs, name, other, tolerance):
    for job, _ in (runs[name], runs[other]):
        job.ok(timeout=280)
    ours, theirs = losses(runs[name][1]), losses(runs[other][1])
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[step] - theirs[step]) for step in ours) < tolerance


@pytest.mark.parametrize("name", ["bf16", "muon"])
def test_it_learns(runs, name):
    job, rundir = runs[name]
    job.ok(timeout=280)
    found = losses(rundir)
    assert all(math.isfinite(loss) for loss in found.values())
    assert found[max(found)] < found[1]
