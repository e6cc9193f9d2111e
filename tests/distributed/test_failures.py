"""When one rank fails, all end soon, the first failure is told once, and nothing is saved."""

import json
from pathlib import Path

import pytest

from tests.harness import status

RECIPE = Path(__file__).parent / "failing.py"


@pytest.mark.parametrize(
    ("how", "codes", "said"),
    [
        ("raise", [1, 1], "ValueError: the recipe's own"),
        ("kill", [1, -9], "rank 0: has lost its peer: "),
        ("part", [1, 1], "call model(...)"),
    ],
)
def test_the_first_failure_is_told_once(start, tmp_path, how, codes, said):
    rundir = tmp_path / "run"
    job = start(2, RECIPE, "--run.dir", rundir, env={"FAIL": how})
    assert job.wait(60) == codes, job.output()
    assert job.output().count(said) == 1, job.output()
    assert job.output().count("Traceback") == (how == "raise"), job.output()
    assert status(rundir)["status"] == "failed"
    failed = json.loads((rundir / "attempts" / "1" / "failed").read_text())
    assert failed["rank"] in {"raise": {1}, "kill": {0}, "part": {0, 1}}[how]
    assert not (rundir / "checkpoints").exists()
