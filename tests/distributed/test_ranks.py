"""Ranks that see different things: what they draw and average agrees, and one that leaves alone ends the job."""

import json
from pathlib import Path

from tests.harness import status

RECIPE = Path(__file__).parent / "ranks.py"


def test_ranks_draw_alike_and_average_what_one_of_them_saw(start, tmp_path):
    rundir = tmp_path / "run"
    start(2, RECIPE, "--run.dir", rundir).ok()
    first, second = (json.loads((rundir / f"told-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert len({tuple(numbers) for numbers in (first["train"], first["make"])}) == 2
    assert first["mean"] == {"all": 6.5, "first": 0.5, "second": 2.5}
    assert status(rundir)["status"] == "finished"


def test_a_rank_that_leaves_the_loop_alone_ends_the_job(start, tmp_path):
    rundir = tmp_path / "run"
    job = start(2, RECIPE, "--what", "leave", "--run.dir", rundir)
    job.when((rundir / "told-1.json").exists)
    assert job.wait(20) == [1, 1], job.output()
    assert "left the loop" in job.output(), job.output()
    assert "Traceback" not in job.output(), job.output()
    assert status(rundir)["status"] == "failed"
