"""Compiled and eager agree, accumulation compiles nothing anew, and names stay the plain module's."""

from pathlib import Path

import pytest

from tests.forked import jobs
from tests.harness import losses, tensors

RECIPE = Path(__file__).parent / "exact.py"
OPTIONS = ["--steps", 5, "--run.log-every", 1, "--dropout", 0, "--eval-every", 0, "--samples", 64]


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    path = tmp_path_factory.mktemp("eager")
    with jobs(path) as start:
        start(1, RECIPE, *OPTIONS, "--run.dir", path / "run").ok()
    return path / "run"


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, ["--run.compile", "default"]),
        (1, ["--run.compile", "reduce-overhead", "--run.compile-scope", "block"]),
        (2, ["--run.compile", "default"]),
        (2, ["--run.compile", "default", "--run.compile-scope", "block", "--run.shard", "full"]),
    ],
    ids=["1", "1-reduce-overhead-block", "2-ddp", "2-fsdp-block"],
)
def test_compiled_agrees_with_eager(start, tmp_path, eager, world_size, options):
    job = start(
        world_size,
        RECIPE,
        *OPTIONS,
        *options,
        "--run.dir",
        tmp_path / "run",
        env={"TORCH_LOGS": "recompiles,graph_breaks"},
    )
    said = job.ok(timeout=240)
    ours, theirs = losses(tmp_path / "run"), losses(eager)
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[step] - theirs[step]) for step in ours) < 1e-4
    assert "Recompiling" not in said, said
    assert "Graph break" not in said, said
    assert tensors(tmp_path / "run").keys() == tensors(eager).keys()
    assert not any("_orig_mod" in name or "module." in name for name in tensors(eager))


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (2, ["--run.precision", "bf16"]),
        (2, ["--run.precision", "bf16", "--run.shard", "full", "--run.activation-checkpointing", "full"]),
    ],
    ids=["ddp", "fsdp-recomputing"],
)
def test_bf16_stays_near_fp32(start, tmp_path, eager, world_size, options):
    start(world_size, RECIPE, *OPTIONS, *options, "--run.dir", tmp_path / "run").ok()
    ours, theirs = losses(tmp_path / "run"), losses(eager)
    assert 0 < max(abs(ours[step] - theirs[step]) for step in ours) < 2e-2
    assert all(t.dtype.itemsize == 4 for t in tensors(tmp_path / "run").values()), "master weights stay fp32"
