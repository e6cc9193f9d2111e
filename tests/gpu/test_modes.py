"""One recipe in every mode of a GPU: the CPU's losses, compiled, sharded and in half precision."""

import math

import pytest

from tests.distributed.test_compile import OPTIONS, RECIPE
from tests.gpu import CUDA
from tests.harness import losses, tensors

pytestmark = CUDA

EXACT = ["--run.no-tf32"]
MODES = {
    "cpu": [],
    "eager": EXACT,
    "default": [*EXACT, "--run.compile", "default"],
    "default-block": [*EXACT, "--run.compile", "default", "--run.compile-scope", "block"],
    "reduce-overhead": [*EXACT, "--run.compile", "reduce-overhead"],
    "reduce-overhead-block": [*EXACT, "--run.compile", "reduce-overhead", "--run.compile-scope", "block"],
    "reduce-overhead-fsdp": [*EXACT, "--run.compile", "reduce-overhead", "--run.shard", "full"],
    "max-autotune": [*EXACT, "--run.compile", "max-autotune"],
    "fsdp": [*EXACT, "--run.shard", "full"],
    "bf16": ["--run.precision", "bf16"],
    "bf16-fsdp": ["--run.precision", "bf16", "--run.shard", "full", "--run.activation-checkpointing", "full"],
    "bf16-compiled": ["--run.precision", "bf16", "--run.compile", "default"],
}


@pytest.fixture(scope="module")
def runs(begin):
    """Every mode's job, all at once."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    return {name: begin(RECIPE, *OPTIONS, *MODES[name], env=hidden if name == "cpu" else None) for name in MODES}


def differences(runs, name, other):
    for job, _ in (runs[name], runs[other]):
        job.ok(timeout=280)
    ours, theirs = (losses(runs[each][1]) for each in (name, other))
    assert ours.keys() == theirs.keys()
    return [abs(ours[step] - theirs[step]) for step in ours]


@pytest.mark.parametrize(
    ("name", "other", "tolerance"),
    [
        ("eager", "cpu", 1e-4),
        ("default", "eager", 1e-4),
        ("default-block", "eager", 1e-4),
        ("reduce-overhead", "eager", 1e-4),  # its micro-batches' gradients add up, in whose memory they may be
        ("reduce-overhead-block", "eager", 1e-4),
        ("reduce-overhead-fsdp", "eager", 1e-4),
        ("max-autotune", "eager", 1e-4),
        ("fsdp", "eager", 1e-5),
    ],
)
def test_a_mode_has_the_losses_of_the_plain_run(runs, name, other, tolerance):
    assert max(differences(runs, name, other)) < tolerance
    assert tensors(runs[name][1]).keys() == tensors(runs[other][1]).keys()


@pytest.mark.parametrize("name", ["bf16", "bf16-fsdp", "bf16-compiled"])
def test_bf16_stays_near_fp32_and_keeps_fp32_weights(runs, name):
    assert 0 < max(differences(runs, name, "eager")) < 3e-2
    assert all(math.isfinite(loss) for loss in losses(runs[name][1]).values())
    assert all(tensor.dtype.itemsize == 4 for tensor in tensors(runs[name][1]).values())
