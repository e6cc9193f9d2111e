"""No step makes the host wait for the GPU: neither its body nor its edges, whether its line is due or not."""

from pathlib import Path

import pytest

from tests.gpu import CUDA
from tests.harness import losses

pytestmark = CUDA

RECIPE = Path(__file__).parent / "quiet.py"
KINDS = {
    "no-line-due": ["--run.log-every", 100],
    "every-line-due": ["--run.log-every", 1],
    "bf16-fused": ["--run.precision", "bf16", "--fused"],
    "compiled": ["--run.compile", "default"],
    "cuda-graphs": ["--run.compile", "reduce-overhead"],
    "arrow": ["--source", "arrow"],
    "items": ["--source", "items"],
    "workers": ["--source", "items", "--run.workers", 2],
    "saves": ["--run.save-every", 7],
    "skip": ["--run.bad-numbers", "skip", "--fused"],
    "fsdp": ["--run.shard", "full"],
}


@pytest.fixture(scope="module")
def runs(begin):
    jobs = {name: begin(RECIPE, *KINDS[name]) for name in KINDS}
    return jobs | {"waits": begin(RECIPE, "--wait")}


@pytest.mark.parametrize("name", KINDS)
def test_no_step_waits_for_the_gpu(runs, name):
    job, rundir = runs[name]
    job.ok(timeout=280)
    assert 30 in losses(rundir)


def test_a_wait_is_noticed(runs):
    job, _ = runs["waits"]
    assert job.wait(280) == [1], job.output()
    assert "synchronizing CUDA operation" in job.output()
