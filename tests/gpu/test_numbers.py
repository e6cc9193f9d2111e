"""Bad numbers on a GPU, where the host looks at them a step late: a fused update is left out by its kernel."""

from pathlib import Path

import pytest

from tests.gpu import CUDA
from tests.harness import assert_same, losses, metrics, tensors

pytestmark = CUDA

RECIPE = Path(__file__).parent.parent / "distributed" / "bad.py"
OPTIONS = ["--run.log-every", 1, "--run.deterministic"]
SKIP = ["--run.bad-numbers", "skip"]
REWIND = ["--run.bad-numbers", "rewind", "--run.save-every", 3]


@pytest.fixture(scope="module")
def runs(begin):
    return {
        "stop": begin(RECIPE, *OPTIONS, "--value", -1.0),
        "skip": begin(RECIPE, *OPTIONS, *SKIP, "--value", -1.0),
        "gradient": begin(RECIPE, *OPTIONS, *SKIP, "--value", 0.0, "--no-clip"),
        "omit": begin(RECIPE, *OPTIONS, env={"OMIT": "4"}),
        "omit-no-clip": begin(RECIPE, *OPTIONS, "--no-clip", env={"OMIT": "4"}),
        "rewind": begin(RECIPE, *OPTIONS, *REWIND, "--value", -1.0),
        "never": begin(RECIPE, *OPTIONS, *REWIND, env={"AWAY": "32:40"}),
    }


def test_stop_names_the_sample_and_the_module(runs):
    job, rundir = runs["stop"]
    assert job.wait(280) == [1], job.output()
    assert "step 5: the loss is not finite in micro-batch 1 (samples 34, 35); first, the output of" in job.output()
    assert "first, the output of model.root (Root) is nan, for sample 35; the update was not made" in job.output()
    assert sorted(losses(rundir)) == [1, 2, 3, 4]


@pytest.mark.parametrize(("name", "like"), [("skip", "omit"), ("gradient", "omit-no-clip"), ("rewind", "never")])
def test_it_is_the_run_that_it_says(runs, name, like):
    (job, rundir), (other, its) = runs[name], runs[like]
    job.ok(timeout=280)
    other.ok(timeout=280)
    assert_same(tensors(rundir), tensors(its))
    if name != "rewind":
        assert metrics(rundir)[5]["skipped"] == 1
