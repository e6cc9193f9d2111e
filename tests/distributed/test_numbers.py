"""Bad numbers of one rank: all ranks do the same at the same step, and the run is what it says, bit for bit."""

from pathlib import Path

import pytest

from tests.forked import jobs
from tests.harness import assert_same, losses, metrics, status, tensors

RECIPE = Path(__file__).parent / "bad.py"
SHARDS = [[], ["--run.shard", "full"]]
LOG = ["--run.log-every", 1]
SKIP = ["--run.bad-numbers", "skip"]
REWIND = ["--run.bad-numbers", "rewind", "--run.save-every", 3]
NAN, ROOT_OF_ZERO = ["--value", -1.0], ["--value", 0.0]
THERE = "the loss is nan in micro-batch 1 on rank 1 (samples 34, 35)"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    with jobs(tmp_path_factory.mktemp("jobs")) as begin:
        yield begin


def same(a, b):
    assert_same(tensors(a), tensors(b))
    assert {k: v for k, v in losses(a).items() if k != 5} == {k: v for k, v in losses(b).items() if k != 5}


@pytest.mark.parametrize("shard", SHARDS, ids=["ddp", "fsdp"])
def test_stop_names_the_rank_and_the_sample(start, tmp_path, shard):
    job = start(2, RECIPE, *NAN, *shard, *LOG, "--run.save-every", 3, "--run.dir", tmp_path / "run")
    assert job.wait() == [1, 1], job.output()
    told = f"step 5: {THERE}; first, the output of model.root (Root) is nan, for sample 35; the update was not made"
    assert job.output().count(told) == 1, job.output()
    assert "Traceback" not in job.output()
    assert status(tmp_path / "run")["status"] == "failed"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]


@pytest.mark.parametrize("shard", SHARDS, ids=["ddp", "fsdp"])
@pytest.mark.parametrize("late", [{}, {"LATE": "1"}], ids=["now", "late"])
def test_skip_is_a_run_whose_update_was_left_out(start, tmp_path, shard, late):
    """Without clipping, the ranks of a sharded model have seen the gradients of their shards alone."""
    options = [*shard, *LOG, "--no-clip"]
    skips = start(2, RECIPE, *ROOT_OF_ZERO, *options, *SKIP, "--run.dir", tmp_path / "a", env=late)
    omits = start(2, RECIPE, *options, "--run.dir", tmp_path / "b", env={"OMIT": "4"})
    said = skips.ok()
    assert said.count("step 5: update skipped: a gradient is not finite, though every loss is (samples 32, 33,") == 1
    omits.ok()
    same(tmp_path / "a", tmp_path / "b")
    assert metrics(tmp_path / "a")[5]["skipped"] == 1


@pytest.mark.parametrize(
    ("shard", "late"), [([], {}), (SHARDS[1], {}), (SHARDS[1], {"LATE": "1"})], ids=["ddp", "fsdp", "fsdp-late"]
)
def test_a_rewind_that_was_killed_is_a_run_without_the_samples(start, tmp_path, shard, late):
    options = [*NAN, *shard, *LOG, *REWIND]
    never = start(2, RECIPE, *options, "--run.dir", tmp_path / "never", env={"AWAY": "32:40"})
    killed = start(2, RECIPE, *options, "--run.dir", tmp_path / "killed", env={"KILL": "4", **late})
    assert killed.wait() == [1, -9], killed.output()
    assert f"step 5: {THERE}; back to step-00000003, and on without the samples of this step" in killed.output()
    again = start(2, RECIPE, *options, "--run.dir", tmp_path / "killed", env=late)
    said = again.ok()
    assert "step-00000003 at step 3" in said
    assert said.count("; back to step-00000003,") == 1, said
    never.ok()
    same(tmp_path / "killed", tmp_path / "never")
    assert losses(tmp_path / "killed")[5] == losses(tmp_path / "never")[5]


def test_what_comes_after_a_rewind_is_in_the_checkpoint(start, tmp_path):
    """Killed behind the next checkpoint, it does not meet the bad step again."""
    options = [*NAN, *LOG, *REWIND]
    never = start(2, RECIPE, *options, "--run.dir", tmp_path / "never", env={"AWAY": "32:40"})
    killed = start(2, RECIPE, *options, "--steps", 8, "--run.dir", tmp_path / "killed")
    assert "; back to step-00000003," in killed.ok()
    assert "back to" not in start(2, RECIPE, *options, "--run.dir", tmp_path / "killed").ok()
    never.ok()
    same(tmp_path / "killed", tmp_path / "never")


def test_a_leap_is_of_the_loss_of_all_ranks(start, tmp_path):
    """Sample 99 is rank 1's, in step 13."""
    options = ["--steps", 15, *LOG, "--at", 99, "--run.spike", 100]
    skips = start(2, RECIPE, *options, "--value", 1e7, *SKIP, "--run.dir", tmp_path / "a")
    omits = start(2, RECIPE, *options, "--run.dir", tmp_path / "b", env={"OMIT": "12"})
    assert skips.ok().count("times the median of the last 12 (samples 96, 97, 98, 99, 100, 101, 102, 103)") == 1
    omits.ok()
    assert_same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    assert metrics(tmp_path / "a")[13]["skipped"] == 1
