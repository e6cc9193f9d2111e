"""Shared fixtures."""

import pytest

from tests.harness import Ranks


@pytest.fixture
def start(tmp_path):
    """Start a recipe on some ranks in a directory of the test's own; what is still alive at its end is killed."""
    jobs = []

    def run(world_size, recipe, *args, env=None):
        jobs.append(Ranks(world_size, recipe, *args, cwd=tmp_path, env=env))
        return jobs[-1]

    yield run
    for job in jobs:
        job.close()
