"""Two live copies of one run: the old one, which comes back from wherever it was, can neither publish nor remove.

The old copy is stopped (SIGSTOP) within a save; a new one takes the run over and is within a save of its own when the
old one wakes. Where the old one stops is the worst place of each kind: while it writes, after its last look at the
attempt number, and with its choice of what to remove made.
"""

import json
import signal

import pytest

from launcher.checkpoint import Store, verify
from tests.distributed.campaign import RECIPE
from tests.forked import jobs
from tests.harness import assert_same, status, tensors

STEPS = 64


class Copy:
    """One copy of a run, led by the files in a directory of its own."""

    def __init__(self, start, world_size, rundir, control, **env):
        control.mkdir()
        self.control, self.rundir, self.world_size = control, rundir, world_size
        options = ["--run.save-every", 10, "--run.keep", 2, "--run.log-every", 1, "--run.threads", 1]
        command = ["--steps", STEPS, "--width", 64, *options, "--run.dir", rundir]
        self.job = start(world_size, RECIPE, *command, env={"CONTROL": str(control), "PACE": "0.005", **env})

    def reached(self, name, ranks=None):
        """Wait until ranks wait at a place."""
        self.job.when(lambda: all((self.control / f"{name}.{r}").exists() for r in range(ranks or self.world_size)))

    def go(self, name):
        (self.control / f"{name}.go").touch()

    def saves(self, step):
        """Let it go on behind a step, once the step is saved."""
        self.reached(f"at-{step}")
        path = self.rundir / "checkpoints" / f"step-{step:08d}"
        self.job.when(lambda: path.exists() and status(self.rundir)["global_step"] == step)
        self.go(f"at-{step}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The losses and tensors of a run to which nothing happens, by world size."""
    known = {}

    def of(world_size):
        if world_size not in known:
            path = tmp_path_factory.mktemp("undisturbed")
            with jobs(path) as start:
                Copy(start, world_size, path / "run", path / "control").job.ok()
            known[world_size] = losses(path / "run"), tensors(path / "run")
        return known[world_size]

    return of


@pytest.mark.parametrize("world_size", [pytest.param(1, id="1"), pytest.param(2, id="2")])
@pytest.mark.parametrize("place", ["write", "publish", "prune"])
def test_an_old_copy_that_wakes_changes_nothing(start, undisturbed, tmp_path, place, world_size):
    rundir = tmp_path / "run"
    store = Store(rundir / "checkpoints")
    there = {"write": [10, 20], "publish": [10, 20], "prune": [10, 20, 30]}[place]

    old = Copy(start, world_size, rundir, tmp_path / "old", HOLD=f"{place}:3:0", WAIT="10,20,32")
    old.saves(10)
    old.saves(20)
    old.reached(f"{place}-3", 1)  # within the save of step 30
    old.reached("at-32")
    assert store.steps() == there
    old.job.kill(number=signal.SIGSTOP)

    new = Copy(start, world_size, rundir, tmp_path / "new", HOLD=f"write:{5 - len(there)}:0", WAIT="30,40,50,60")
    new.saves(30)
    new.saves(40)
    new.reached(f"write-{5 - len(there)}", 1)  # within the save of step 50
    new.reached("at-50")
    assert f"checkpoints/step-000000{there[-1]} at step {there[-1]}\n" in new.job.output()
    found, facts = names(store), (rundir / "run.json").read_bytes()
    assert found == {"step-00000030", "step-00000040", "step-00000050.partial-2"}

    old.job.kill(number=signal.SIGCONT)
    old.go(f"{place}-3")
    old.go("at-32")
    assert old.job.wait() == [1] * world_size, old.job.output()
    assert "attempt 1 of this run has been replaced by a newer one: it saves nothing more" in old.job.output()
    assert "Traceback" not in old.job.output()
    assert names(store) == found, old.job.output()
    assert (rundir / "run.json").read_bytes() == facts, old.job.output()
    assert all(verify(store.path(step)) for step in store.steps())

    new.go(f"write-{5 - len(there)}")
    new.saves(50)
    new.saves(60)
    assert "NOT SAVED" not in new.job.ok()
    assert names(store) == {"step-00000060", "step-00000064"}
    assert all(verify(store.path(step)).attempt == 2 for step in store.steps())
    assert {name: status(rundir)[name] for name in ("status", "attempt")} == {"status": "finished", "attempt": 2}
    right = undisturbed(world_size)
    assert losses(rundir) == right[0]
    assert_same(tensors(rundir), right[1])


def names(store):
    return {path.name for path in store.root.iterdir()}


def losses(rundir):
    """By step, of the latest attempt, wherever its line is: the lines of two live copies come in any order."""
    lines = [json.loads(line) for line in (rundir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in sorted(lines, key=lambda line: line["attempt"])}
