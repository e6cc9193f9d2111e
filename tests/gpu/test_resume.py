"""A run that was killed on a GPU ends bit-identical, with deterministic kernels."""

import pytest

from tests.distributed.test_resume import RECIPE
from tests.gpu import CUDA
from tests.harness import assert_same, losses, tensors

pytestmark = CUDA

STEPS = 20
OPTIONS = ["--steps", STEPS, "--run.log-every", 1, "--run.save-every", 5, "--ema", "--run.deterministic"]
KINDS = {
    "fp32": [],
    "bf16": ["--run.precision", "bf16"],
    "fp16": ["--run.precision", "fp16"],
    "compiled": ["--run.compile", "default"],
    "fsdp": ["--run.shard", "full", "--run.precision", "bf16"],
}


@pytest.fixture(scope="module")
def runs(begin):
    """Of every kind a straight run and one that was killed and went on, with workers where it had none."""
    straight = {name: begin(RECIPE, *OPTIONS, *KINDS[name]) for name in KINDS}
    strike = {"STRIKE": "SIGKILL:body:18:0"}  # late: saves are written in the background
    killed = {name: begin(RECIPE, *OPTIONS, *KINDS[name], env=strike) for name in KINDS}
    for name, (job, _) in killed.items():
        assert job.wait(280) == [-9], f"{name}: {job.output()}"
    resumed = {
        name: begin(RECIPE, *OPTIONS, *KINDS[name], "--run.workers", 2, rundir=rundir)
        for name, (_, rundir) in killed.items()
    }
    return straight, resumed


@pytest.mark.parametrize("name", KINDS)
def test_a_killed_run_ends_bit_identical(runs, name):
    (straight, one), (resumed, other) = runs[0][name], runs[1][name]
    straight.ok(timeout=280)
    assert "resumed from" in resumed.ok(timeout=280)
    assert sorted(losses(one)) == list(range(1, STEPS + 1))
    assert losses(other) == losses(one)
    assert_same(tensors(other), tensors(one))
