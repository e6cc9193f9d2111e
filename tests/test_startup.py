"""Where the time to the first step goes."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from launcher import startup
from launcher.startup import Startup, line
from tests.harness import status


@pytest.fixture
def clock(monkeypatch):
    """Time that a test moves on, by what passes and what of it is compiling; the process started at 0."""
    now = SimpleNamespace(time=0.0, compiled=0.0)

    def move(seconds, compiling=0.0):
        now.time += seconds
        now.compiled += compiling

    monkeypatch.setattr(startup, "_process_start", lambda: 0.0)
    monkeypatch.setattr(startup, "_compile_seconds", lambda: now.compiled)
    monkeypatch.setattr(startup.time, "monotonic", lambda: now.time)
    return move


def test_the_stages_add_up(clock):
    stages = Startup()
    clock(2.0)
    stages.enter("data")
    clock(1.0)
    with stages.during("weights"):
        clock(0.5)
    clock(0.25)
    stages.enter("step")
    clock(8.0, compiling=7.0)
    seconds = stages.end(waited=0.5)
    assert seconds == {
        **{"imports": 2.0, "data": 1.25, "weights": 0.5, "compile": 7.0, "first batch": 0.5, "step": 0.5},
        "total": 11.75,
    }
    assert line(seconds).startswith("first step done 11.8 s after the start: imports 2.0, data 1.2, weights 0.5, ")


def test_nothing_is_counted_after_the_first_step(clock):
    stages = Startup()
    clock(1.0)
    before = stages.end(0.0)
    clock(1.0)
    stages.enter("step")
    with stages.during("evaluation"):
        clock(1.0)
    assert before == {"imports": 1.0, "first batch": 0.0, "step": 0.0, "total": 1.0}
    assert stages.seconds.keys() == before.keys() - {"total"}


def test_a_stage_that_fails_is_over(clock):
    stages = Startup()

    def build():
        with stages.during("weights"):
            clock(1.0)
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        build()
    clock(2.0)
    assert stages.end(0.0)["imports"] == 2.0


def test_the_kernel_knows_when_this_process_started():
    age = time.monotonic() - startup._process_start()
    assert 0 < age < 86_400


def test_torch_counts_what_it_compiles():
    """The names are private: the stage `compile` hangs on them."""
    import torch._dynamo.utils

    before = startup._compile_seconds()
    for name in ("entire_frame_compile", "entire_backward_compile"):
        torch._dynamo.utils.cumulative_time_spent_ns[name] += 1e9
    assert startup._compile_seconds() - before == pytest.approx(2.0)


def test_a_run_tells_and_records_them(run_recipe):
    def train(run):
        model = run.build(lambda: torch.nn.Linear(2, 1))
        optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        for step in run.steps(run.loader((torch.ones(8, 2),), batch_size=4), total=2):
            for (x,) in step:
                step.backward(model(x).sum())
            optimizer.step()
            optimizer.zero_grad()

    said = run_recipe(train)
    [told] = [text for text in said.splitlines() if "first step done" in text]
    assert told.startswith("launcher: first step done ")
    seconds = status(run_recipe.dir)["startup"]
    assert {"imports", "options", "rendezvous", "run directory", "weights", "first batch", "step"} <= seconds.keys()
    assert sum(seconds.values()) == pytest.approx(2 * seconds["total"], abs=0.02)
    assert json.loads((run_recipe.dir / "attempts" / "1" / "stepped").read_text())["startup"] == seconds
