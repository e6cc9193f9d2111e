"""Jobs side by side: a GPU has room for many small ones, and most of their time is start-up and compilation."""

import os

import pytest

from tests.harness import ROOT, Ranks


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    """Start a recipe in one process, in a run directory that is new unless given; returns the job and the directory."""
    jobs = []

    def run(recipe, *args, rundir=None, env=None):
        rundir = rundir or tmp_path_factory.mktemp("job") / "run"
        env = {"PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)), **(env or {})}  # with what gpu.sh was given
        jobs.append(Ranks(1, recipe, *args, "--run.dir", rundir, cwd=rundir.parent, env=env))
        return jobs[-1], rundir

    yield run
    for job in jobs:
        job.close()
