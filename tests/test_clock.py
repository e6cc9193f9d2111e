"""The job's end, known ahead: when a run must stop."""

import math

import pytest

from launcher import clock
from launcher.clock import Clock


class Time:
    """A watch that the test winds."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now)

    def clock(self, **settings):
        end = {"LAUNCHER_JOB_END": "1600"} | settings.pop("environ", {})
        return Clock(end, now=lambda: self.now, **settings)

    def steps(self, clock, *seconds, paused=0.0):
        for length in seconds:
            self.now += length
            clock.edge(paused)


@pytest.fixture
def time(monkeypatch):
    return Time(monkeypatch)


@pytest.mark.parametrize("said", [None, "", "soon", "nan", "inf", "-5", "0"])
def test_without_an_end_nothing_is_ever_due(said):
    endless = Clock({} if said is None else {"LAUNCHER_JOB_END": said})
    assert endless.left == math.inf
    assert not endless.due()
    assert endless.patience == 120
    assert endless.need == 2 * clock.FIRST_SAVE


def test_needs_two_steps_an_evaluation_and_two_saves(time):
    watch = time.clock(save_seconds=10)
    time.steps(watch, 0, 5, 5)
    watch.evaluated(7)
    watch.evaluated(3)
    assert watch.need == pytest.approx(2 * 5 + 7 + 2 * 10)
    time.now = 1600 - 37.5
    assert not watch.due()
    time.now = 1600 - 36.5
    assert watch.due()


def test_the_longest_step_counts_and_is_forgotten_slowly(time):
    watch = time.clock(save_seconds=0)
    time.steps(watch, 0, 100)  # it compiles
    assert watch.need == pytest.approx(200)
    time.steps(watch, 1)
    assert watch.need == pytest.approx(180)
    time.steps(watch, *[1] * 60)
    assert watch.need == pytest.approx(2, abs=0.4)


def test_what_evaluations_and_saves_take_is_no_step(time):
    watch = time.clock(save_seconds=0)
    time.steps(watch, 0, 2)
    time.steps(watch, 52, paused=50)
    time.steps(watch, 2, paused=50)
    assert watch.need == pytest.approx(2 * 2)


def test_a_save_that_was_never_measured(time):
    assert time.clock().need == 2 * 60  # of 600 s a tenth
    time.now = 1500
    assert time.clock().need == 2 * 10
    watch = time.clock()
    watch.saved(3)
    assert watch.need == 2 * 3
    watch.saved(5)
    assert watch.need == 2 * 5


def test_patience_is_no_longer_than_the_job_has(time):
    watch = time.clock()
    assert watch.patience == 120
    time.steps(watch, 0, 50)
    assert watch.patience == 200
    time.now = 1570
    assert watch.patience == 30
    time.now = 1700
    assert watch.patience == 0
    assert watch.due()


def test_too_short_a_lead_is_told_once(time):
    environ = {"LAUNCHER_SIGNAL_LEAD": "30", "LAUNCHER_GRACE": "45"}
    watch = time.clock(environ=environ)
    time.steps(watch, 0, 5)
    said = watch.saved(20)
    assert said is not None
    assert said.startswith("to stop and save takes up to 50 s; --signal-lead 30 is less: submit with --signal-lead 50")
    assert "a preemption here leaves 45 s" in said
    assert watch.saved(500) is None
    assert time.clock(environ=environ, save_seconds=20).saved(20) is None  # told in an earlier start
    assert time.clock(environ=environ).saved(1) is None
    assert time.clock(environ={"LAUNCHER_SIGNAL_LEAD": "0", "LAUNCHER_GRACE": "0"}).saved(99) is None


def test_a_limit_that_was_raised_meanwhile_is_found_out_before_a_stop(time):
    ends = [1900.0, 1900.0]  # a job that ended at 1620
    asked = []
    watch = time.clock(save_seconds=10, ask=lambda environ: asked.append(time.now) or ends.pop(0))
    time.now = 1540
    assert not watch.due()
    assert not asked, "SLURM is left alone until the end is near"
    time.now = 1590
    assert not watch.due()
    assert watch.left == 290
    time.now = 1875
    assert watch.due()
    assert watch.due()
    assert asked == [1590, 1875]


def test_a_limit_that_nobody_tells_stays(time):
    watch = time.clock(save_seconds=10, ask=lambda environ: None)
    time.now = 1590
    assert watch.due()
