"""Shared fixtures."""

import os
import signal
from unittest.mock import patch

import pytest

import launcher
from launcher.signals import STOP_SIGNALS
from tests.forked import jobs


@pytest.fixture(autouse=True)
def signals_are_given_back():
    """What a test begins in this process takes the stop signals; its end leaves them as they were."""
    before = {number.name: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    assert {number.name: signal.getsignal(number) for number in STOP_SIGNALS} == before


@pytest.fixture(autouse=True)
def environment_is_given_back():
    """A run in this process sets what its libraries read (OMP_NUM_THREADS); the next test finds none of it."""
    with patch.dict(os.environ):
        yield


@pytest.fixture
def start(tmp_path):
    """Start a recipe on some ranks in a directory of the test's own; what is still alive at its end is killed."""
    with jobs(tmp_path) as start:
        yield start


@pytest.fixture
def run_recipe(tmp_path, monkeypatch, capfd):
    """Run a train function in this process; returns what it printed. `code` is the exit code that it must have."""

    def run(train, *argv, code=0):
        given = [] if "--run.dir" in argv else ["--run.dir", str(tmp_path / "run")]
        monkeypatch.setattr("sys.argv", ["recipe.py", *given, *map(str, argv)])
        left = 0
        try:
            launcher.main(train)
        except SystemExit as exit_:
            left = exit_.code
        printed = capfd.readouterr()
        assert left == code, printed.err
        return printed.out + printed.err

    run.dir = tmp_path / "run"
    return run
