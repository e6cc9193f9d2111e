"""A signal to one rank stops all of them at one step; the rerun ends like the straight run."""

from pathlib import Path

import pytest

from tests.forked import jobs
from tests.harness import assert_same, losses, status, tensors

RECIPE = Path(__file__).parent / "exact.py"
OPTIONS = ["--steps", 10, "--run.log-every", 1]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    path = tmp_path_factory.mktemp("straight")
    with jobs(path) as start:
        start(2, RECIPE, *OPTIONS, "--run.dir", path / "run").ok()
    return path / "run"


@pytest.mark.parametrize(
    ("name", "where", "step"),
    [
        ("SIGTERM", "body", 5),
        ("SIGUSR2", "evaluation", 4),
        ("SIGINT", "data", 3),
        ("SIGTERM", "setup", 0),
        ("SIGUSR2", "body", 0),
    ],
)
def test_all_ranks_stop_at_one_step(start, tmp_path, straight, name, where, step):
    rundir = tmp_path / "run"
    job = start(2, RECIPE, *OPTIONS, "--run.dir", rundir, env={"STRIKE": f"{name}:{where}:{step}:1"})
    job.ok()
    stopped = status(rundir)
    assert stopped["status"] == "preempted", job.output()
    assert stopped["global_step"] <= step + 2
    assert (step == 0) == (stopped["global_step"] == 0)  # before the first step there is nothing to wait for
    assert (rundir / "checkpoints").exists() == (step > 0)
    start(2, RECIPE, *OPTIONS, "--run.dir", rundir).ok()
    assert status(rundir)["status"] == "finished"
    assert losses(rundir) == losses(straight)
    assert_same(tensors(rundir), tensors(straight))


def test_a_second_interrupt_leaves_at_once(start, tmp_path):
    import signal
    import time

    rundir = tmp_path / "run"
    job = start(1, Path(__file__).parent / "stuck.py", "--run.dir", rundir)
    job.when(lambda: "stuck now" in job.output())
    job.kill(number=signal.SIGINT)
    time.sleep(1.2)  # two presses within a second count as one
    job.kill(number=signal.SIGINT)
    assert job.wait(20) == [130], job.output()
    assert status(rundir)["status"] == "cancelled"
