"""A killed run goes on as if nothing had happened: bit for bit at the same size, the same samples at any other."""

import random
import shutil
from pathlib import Path

import pytest

from tests.forked import jobs
from tests.harness import assert_same, losses, samples, status, tensors

RECIPE = Path(__file__).parent / "exact.py"
STEPS = 40
OPTIONS = ["--steps", STEPS, "--run.log-every", 1, "--run.save-every", 5, "--ema", "--batch-size", 16]


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, []),
        (2, []),
        (4, []),
        (2, ["--run.shard", "full"]),
        (2, ["--batchnorm"]),
    ],
    ids=["1", "2-ddp", "4-ddp", "2-fsdp", "2-batchnorm"],
)
def test_a_killed_run_ends_bit_identical(start, tmp_path, world_size, options):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    start(world_size, RECIPE, *OPTIONS, *options, "--run.dir", straight).ok()
    moment = random.randrange(6, STEPS - 3)  # unseeded: every run of this test tries another moment
    print(f"killed when step {moment} was logged")
    job = start(world_size, RECIPE, *OPTIONS, *options, "--run.dir", killed)
    job.when(lambda: (killed / "metrics.jsonl").exists() and len(losses(killed)) >= moment)
    job.kill()
    assert set(job.wait()) == {-9}, job.output()
    start(world_size, RECIPE, *OPTIONS, *options, "--run.dir", killed, "--run.workers", 2).ok()
    assert losses(killed) == losses(straight)
    assert sorted(losses(straight)) == list(range(1, STEPS + 1))
    assert_same(tensors(killed), tensors(straight))
    assert (status(killed)["attempt"], status(killed)["restarts"], status(killed)["status"]) == (2, 1, "finished")


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    """A straight run on two ranks, and one that was killed there."""
    path = tmp_path_factory.mktemp("two")
    with jobs(path) as start:
        for name, env in (("straight", {}), ("killed", {"STRIKE": "SIGKILL:body:17:1"})):
            start(2, RECIPE, *OPTIONS, "--run.dir", path / name, env=env).wait()
    return path / "straight", path / "killed"


@pytest.mark.parametrize(
    ("world_size", "options"),
    [(1, []), (4, []), (2, ["--run.shard", "full"]), (4, ["--run.shard", "hybrid"])],
    ids=["1", "4-ddp", "2-fsdp", "4-hybrid"],
)
def test_another_world_sees_the_same_samples(start, tmp_path, on_two, world_size, options):
    straight, killed = on_two[0], shutil.copytree(on_two[1], tmp_path / "killed")
    nodes_of_two = {"LOCAL_WORLD_SIZE": "2"} if world_size == 4 else {}
    start(world_size, RECIPE, *OPTIONS, *options, "--run.dir", killed, env=nodes_of_two).ok()
    assert samples(killed) == samples(straight), "every micro-batch of every step has the same samples"
    ours, theirs = losses(killed), losses(straight)
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[step] - theirs[step]) for step in ours) < 1e-5


def test_a_longer_run_is_an_extension(start, tmp_path):
    options = ["--run.log-every", 1, "--lr", 0.01, "--warmup", 0]
    start(1, RECIPE, *options, "--steps", 5, "--run.dir", tmp_path / "a").ok()
    start(1, RECIPE, *options, "--steps", 8, "--run.dir", tmp_path / "a").ok()
    assert sorted(losses(tmp_path / "a")) == list(range(1, 9))
    again = start(1, RECIPE, *options, "--steps", 8, "--run.dir", tmp_path / "a").ok()
    assert "resumed" in again
    assert status(tmp_path / "a")["status"] == "finished"
    less = start(1, RECIPE, *options, "--steps", 4, "--run.dir", tmp_path / "a")
    assert less.wait() == [2], less.output()
    assert "Traceback" not in less.output()


def test_another_world_with_batchnorm_is_refused(start, tmp_path):
    options = ["--steps", 3, "--batchnorm", "--run.dir", tmp_path / "a"]
    start(2, RECIPE, *options).ok()
    options[1] = 5
    refused = start(1, RECIPE, *options)
    assert refused.wait() == [2], refused.output()
    assert "BatchNorm" in refused.output()
    assert "Traceback" not in refused.output()
    start(1, RECIPE, *options, "--run.allow", "world").ok()
