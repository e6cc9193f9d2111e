"""Disks that fill up or turn read-only, directories that vanish, writers that hang or die, in runs of real processes.

Training goes on, the last good checkpoint stays good, and the person is told in a line.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from launcher.checkpoint import Store, verify
from tests.forked import Job, jobs
from tests.harness import status

RECIPE = Path(__file__).parent.parent / "distributed" / "saving.py"
SIZES = [pytest.param(1, id="1"), pytest.param(2, id="2")]


class Trial:
    """A run that waits where it is asked to, and what it has written so far."""

    def __init__(self, start: Callable[..., Job], directory: Path, rundir: Path) -> None:
        self.rundir, self.control = rundir, directory / "control"
        self.control.mkdir()
        self.store = Store(rundir / "checkpoints")
        self._start = start

    def start(self, world_size: int, *options: object, steps: int, every: int, **env: str) -> None:
        saving = ["--run.save-every", every, "--run.log-every", 1, "--run.keep", 2, "--run.threads", 1]
        command = ["--steps", steps, "--width", 64, *saving, "--run.dir", self.rundir, *options]
        self.steps, self.world_size = steps, world_size
        self.job = self._start(world_size, RECIPE, *command, env={"CONTROL": str(self.control), "PACE": "0.005", **env})

    def reached(self, name: str, ranks: str | None = None) -> None:
        """Wait until ranks wait at a place."""
        ranks = ranks or "".join(map(str, range(self.world_size)))
        self.job.when(lambda: all((self.control / f"{name}.{rank}").exists() for rank in ranks))

    def go(self, name: str) -> None:
        (self.control / f"{name}.go").touch()

    def saved(self, step: int) -> None:
        """Wait until the save of a step has ended well."""
        path = self.store.root / f"step-{step:08d}" / "verified"
        self.job.when(lambda: path.exists() and status(self.rundir)["global_step"] == step)

    def told(self, text: str) -> None:
        self.job.when(lambda: text in self.job.output() + self.logs())

    def logs(self) -> str:
        """What all ranks have printed; others than 0 print nowhere else."""
        return "".join(path.read_text() for path in self.rundir.glob("logs/*"))

    def ends_well(self) -> str:
        """Let it finish: saved, whole, with all of its metrics and without a traceback; what it has printed."""
        printed = self.job.ok()
        assert "Traceback" not in printed
        steps = self.store.steps()
        assert steps[-1] == self.steps, printed
        assert len(steps) == 2, printed
        self.whole(*steps)
        assert {path.name for path in self.store.root.iterdir()} == {f"step-{step:08d}" for step in steps}, printed
        assert status(self.rundir)["status"] == "finished"
        assert told_steps(self.rundir) == list(range(1, self.steps + 1)), printed
        return printed

    def whole(self, *steps: int) -> None:
        for step in steps:
            assert verify(self.store.path(step)).step == step


def told_steps(rundir: Path) -> list[int]:
    """The steps that have a line; what a start that ended on a full disk left of one is none."""
    steps = set()
    for text in (rundir / "metrics.jsonl").read_text().splitlines():
        with suppress(ValueError):
            steps.add(json.loads(text)["step"])
    return sorted(steps)


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Trial]:
    with jobs(tmp_path) as start:
        yield Trial(start, tmp_path, tmp_path / "run")


@contextmanager
def mounted(path: Path) -> Iterator[None]:
    """A file system of 4 MiB at `path`."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    path.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)  # a job that a failed test has left has it open


def fill(path: Path) -> None:
    """Take all the space there is."""
    with open(path, "xb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


@pytest.mark.parametrize("world_size", SIZES)
def test_a_disk_that_fills_up(trial: Trial, tmp_path: Path, world_size: int) -> None:
    trial.rundir = tmp_path / "disk" / "run"
    trial.store = Store(trial.rundir / "checkpoints")
    with mounted(tmp_path / "disk"):
        trial.start(world_size, steps=150, every=40, WAIT="40,80,81")
        trial.reached("at-40")
        trial.saved(40)
        fill(tmp_path / "disk" / "ballast")
        trial.go("at-40")
        trial.told("NOT SAVED, training goes on: step-00000080 could not be saved: ")
        trial.reached("at-80")
        trial.whole(40)
        (tmp_path / "disk" / "ballast").unlink()
        trial.go("at-80")
        trial.go("at-81")
        printed = trial.ends_well()
        assert printed.count("No space left on device") == 2
        assert printed.count("metrics are not written, training goes on: ") == 1


def test_a_disk_that_stays_full(trial: Trial, tmp_path: Path) -> None:
    """The run cannot end well, nor another start begin; with room again, it goes on from the last good checkpoint."""
    trial.rundir = tmp_path / "disk" / "run"
    trial.store = Store(trial.rundir / "checkpoints")
    with mounted(tmp_path / "disk"):
        trial.start(2, steps=90, every=40, WAIT="40")
        trial.reached("at-40")
        trial.saved(40)
        fill(tmp_path / "disk" / "ballast")
        trial.go("at-40")
        for message in ("step-00000090 could not be saved: ", "cannot write"):
            assert set(trial.job.wait()) <= {1, 2}, trial.job.output()
            assert message in trial.job.output(), trial.job.output()
            assert "No space left on device" in trial.job.output()
            assert "Traceback" not in trial.job.output(), trial.job.output()
            assert trial.store.steps() == [40]
            trial.whole(40)
            trial.start(2, steps=90, every=40)
        trial.job.wait()
        (tmp_path / "disk" / "ballast").unlink()
        trial.start(2, steps=90, every=40)
        assert "checkpoints/step-00000040 at step 40\n" in trial.ends_well()


@pytest.mark.parametrize("world_size", SIZES)
def test_a_disk_that_turns_read_only(trial: Trial, world_size: int) -> None:
    with ExitStack() as stack:
        trial.start(world_size, steps=34, every=10, WAIT="2,10,20")
        trial.reached("at-2")
        stack.enter_context(mounted(trial.store.root))
        trial.go("at-2")
        trial.reached("at-10")
        trial.saved(10)
        remount(trial.store.root, "ro")
        trial.go("at-10")
        trial.told("NOT SAVED, training goes on: step-00000020 could not be saved: ")
        trial.reached("at-20")
        trial.whole(10)
        remount(trial.store.root, "rw")
        trial.go("at-20")
        printed = trial.ends_well()
        assert printed.count("Read-only file system") == printed.count("NOT SAVED") == 1


def remount(path: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(path)], check=True)


@pytest.mark.parametrize("world_size", SIZES)
def test_all_checkpoints_removed_underneath(trial: Trial, world_size: int) -> None:
    trial.start(world_size, steps=34, every=10, WAIT="10")
    trial.reached("at-10")
    trial.saved(10)
    shutil.rmtree(trial.store.root)
    trial.go("at-10")
    assert "NOT SAVED" not in trial.ends_well()


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("what", ["checkpoints", "checkpoints/step-00000020.partial-1"])
def test_a_directory_removed_while_a_save_writes_there(trial: Trial, world_size: int, what: str) -> None:
    trial.start(world_size, steps=34, every=10, WAIT="10,20", HOLD=f"write:2:{world_size - 1}")
    trial.saved(10)
    trial.go("at-10")
    trial.reached("write-2", str(world_size - 1))
    trial.reached("at-20")
    shutil.rmtree(trial.rundir / what)
    trial.go("write-2")
    trial.told("NOT SAVED, training goes on: step-00000020 could not be saved: ")
    if what != "checkpoints":
        trial.whole(10)
    trial.go("at-20")
    printed = trial.ends_well()
    assert printed.count("NOT SAVED") == printed.count("No such file or directory") == 1


@pytest.mark.parametrize("held", [pytest.param((1, 0), id="1"), pytest.param((2, 1), id="2")])
def test_a_slow_disk_delays_saves_and_not_the_loop(trial: Trial, held: tuple[int, int]) -> None:
    world_size, rank = held
    trial.start(world_size, steps=64, every=10, WAIT="35,45", HOLD=f"write:1:{rank},write:2:{rank}")
    trial.reached("write-1", str(rank))
    trial.reached("at-35")
    assert [path.name for path in trial.store.root.iterdir()] == ["step-00000010.partial-1"]
    assert begun(trial) == [10]
    trial.told("launcher: no save at step 30: step 10 is being written")
    trial.go("write-1")
    trial.saved(10)
    trial.go("at-35")
    trial.reached("write-2", str(rank))
    trial.reached("at-45")
    [_, second] = begun(trial)
    assert 35 < second <= 45
    assert {path.name for path in trial.store.root.iterdir()} == {"step-00000010", f"step-{second:08d}.partial-1"}
    trial.told(f"launcher: the save of step 20 is that of step {second}: the disk was not done before")
    trial.go("write-2")
    trial.saved(second)
    trial.go("at-45")
    printed = trial.job.ok()
    assert "NOT SAVED" not in printed
    assert "Traceback" not in printed
    trial.whole(*trial.store.steps())
    assert trial.store.steps()[-1] == 64


def begun(trial: Trial) -> list[int]:
    return [int(line.split()[1]) for line in (trial.control / "begun").read_text().splitlines()]


@pytest.mark.parametrize(
    ("world_size", "rank"),
    [pytest.param(1, 0, id="1"), pytest.param(2, 0, id="2, rank 0"), pytest.param(2, 1, id="2, rank 1")],
)
def test_a_writer_that_dies(trial: Trial, world_size: int, rank: int) -> None:
    """The others wait for it in vain, in their threads; from then on the loop writes, and takes its time for it."""
    trial.start(world_size, steps=34, every=10, WAIT="11", BREAK=f"1:{rank}")
    trial.reached("at-11")
    trial.told("step-00000010 could not be saved: SystemExit: the thread is ended")
    trial.go("at-11")
    trial.told("launcher: the thread that writes checkpoints has ended; training waits for saves from now on")
    trial.ends_well()
    assert begun(trial)[0] == 10
    assert begun(trial)[-2:] == [30, 34]  # none is late: the loop waits for them


@pytest.mark.parametrize("world_size", SIZES)
def test_a_writer_that_dies_in_the_last_save(trial: Trial, world_size: int) -> None:
    trial.start(world_size, steps=4, every=10, BREAK=f"1:{world_size - 1}")
    trial.job.ok()
    assert "step-00000004 could not be saved: SystemExit: the thread is ended" in trial.logs()
    assert begun(trial) == [4, 4]
    trial.whole(4)


@pytest.mark.parametrize("world_size", SIZES)
def test_a_writer_that_dies_every_time_ends_the_run(trial: Trial, world_size: int) -> None:
    rank = world_size - 1
    trial.start(world_size, steps=4, every=10, BREAK=",".join(f"{k}:{rank}" for k in range(1, 9)))
    assert trial.job.wait() == [1] * world_size, trial.job.output()
    assert begun(trial) == [4, 4]
    assert status(trial.rundir)["status"] == "failed"
    assert trial.store.steps() == []


@pytest.mark.parametrize(
    ("world_size", "who"),
    [pytest.param(1, "*", id="1"), pytest.param(2, "*", id="2, both"), pytest.param(2, "1", id="2, rank 1")],
)
def test_a_save_in_progress_outlives_a_recipe_that_raises(trial: Trial, world_size: int, who: str) -> None:
    trial.start(world_size, steps=34, every=10, HOLD="write:1:*", RAISE=f"12:{who}")
    trial.reached("write-1")
    trial.job.when(lambda: status(trial.rundir)["status"] == "failed")
    trial.go("write-1")
    assert trial.job.wait() == [1] * world_size, trial.job.output()
    assert [path.name for path in trial.store.root.iterdir()] == ["step-00000010"], trial.job.output()
    trial.whole(10)
    assert trial.job.output().count("Traceback") == 1, trial.job.output()
    assert status(trial.rundir)["status"] == "failed"
    first = json.loads((trial.rundir / "attempts" / "1" / "failed").read_text())
    assert first["error"] == "ValueError: the recipe's own"


def test_a_rank_that_is_killed_within_a_save_takes_the_others_along(trial: Trial) -> None:
    trial.start(2, steps=34, every=10, HOLD="write:2:1", WAIT="10,22")
    trial.saved(10)
    trial.go("at-10")
    trial.reached("write-2", "1")
    trial.reached("at-22")
    trial.job.kill(1, signal.SIGKILL)
    trial.go("at-22")
    assert trial.job.wait(20) == [1, -9], trial.job.output()
    assert trial.store.steps() == [10]
    trial.whole(10)
    assert status(trial.rundir)["status"] == "failed"
