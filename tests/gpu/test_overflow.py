"""fp16: an overflow skips the update and says so, halves the scale, and training goes on."""

import math
from pathlib import Path

import pytest

from tests.gpu import CUDA
from tests.harness import metrics

pytestmark = CUDA

RECIPE = Path(__file__).parent / "overflow.py"
AT = 25
KINDS = {"foreach": [], "fused": ["--fused"], "two-optimizers": ["--two"], "compiled": ["--run.compile", "default"]}


@pytest.fixture(scope="module")
def runs(begin):
    options = ["--run.precision", "fp16", "--run.log-every", 1, "--overflow-at", AT]
    return {name: begin(RECIPE, *options, *KINDS[name]) for name in KINDS}


@pytest.mark.parametrize("name", KINDS)
def test_an_overflow_skips_one_update(runs, name):
    job, rundir = runs[name]
    said = job.ok(timeout=280)
    lines = metrics(rundir)
    before, struck, after = (lines[step] for step in (AT, AT + 1, AT + 2))  # the line of N completed steps
    assert f"step {AT + 1}: update skipped: fp16 overflow" in said
    assert f"step {AT}: update skipped" not in said, "the recipe should have settled before"
    assert struck["scale"] == before["scale"], "one optimizer or two, the scale moves once a step"
    assert after["scale"] == struck["scale"] / 2
    assert [line["moved"] for line in (before, struck, after)] == [1, 0, 1]
    assert all(math.isfinite(line["loss"]) for line in lines.values())
    assert lines[max(lines)]["loss"] < before["loss"] < lines[1]["loss"]
