"""Kills one run again and again at random moments, and holds what is left after each kill against what was promised.

A kill comes at one of three moments: `inside` a save (once the directory that it writes is seen), in `training` (some
steps after the first that the start has told), or in the `start` itself, which is not counted as one of the kills that
were asked for. It takes all ranks, or one of two: the other must then end by itself. In the start it takes all: ranks
that have not met yet wait for each other for minutes, as they should.

What must hold after every kill:

    (a) every checkpoint that has a final name is whole
    (b) none that was seen before the kill is gone, unless a newer one is there
    (c) the newest is at least the one before the save that was begun last: only what was being written is lost
    (d) where no save was late, fewer than two intervals of steps are lost: the one whose save was being written, and
        the one that had not ended. A late save, behind a slow disk, is told by the run, and adds what it was late by.

The next start must say that it goes on from the newest. When the run has ended, the losses of all its steps and all of
its tensors are those of a straight run.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from launcher.checkpoint import Store, verify
from launcher.rundir import RunDir
from tests.forked import Job
from tests.harness import assert_same, losses, status, tensors

RECIPE = Path(__file__).parent / "saving.py"
SETTINGS = {"1": (1, []), "2-ddp": (2, []), "2-fsdp": (2, ["--run.shard", "full"])}
EVERY = 3  # steps between saves
SECONDS = 60.0  # in which what a rank's death leaves over must have ended


@dataclass
class Tally:
    """What a campaign has seen."""

    setting: str
    seed: int
    kills: dict[str, int] = field(default_factory=lambda: {"inside": 0, "training": 0, "start": 0})
    of_one_rank: int = 0
    within_a_save: int = 0
    """After how many kills an unfinished save was found, wherever the kill was aimed."""
    resumed: int = 0
    from_step_0: int = 0
    """Restarts before which there was no checkpoint yet."""
    cut: int = 0
    """Restarts that were killed before they could say where they go on."""
    late: int = 0
    """Kills after a start in which the last saves were late, where (d) says nothing."""
    most_lost: int = 0
    """Steps, of the kills for which (d) was held to."""
    most_lost_late: int = 0
    longest_end: float = 0.0
    """Seconds until the other rank had ended."""
    runs: int = 0
    verified: int = 0
    seconds: float = 0.0

    @property
    def counted(self) -> int:
        """The kills that were asked for."""
        return self.kills["inside"] + self.kills["training"]


class Campaign:
    """One setting's kills."""

    def __init__(self, start: Callable[..., Job], path: Path, setting: str, *, steps: int, seed: int) -> None:
        self.tally = Tally(setting, seed)
        self._start, self._path, self._steps = start, path, steps
        self._world_size, self._options = SETTINGS[setting]
        self._random = random.Random(f"{seed} {setting}")

    def run(self, kills: int) -> Tally:
        """Kill until there were `kills`, in as many runs as that takes, each brought to its end."""
        begun = time.monotonic()
        straight = self._path / "straight"
        self._launch(straight).ok()
        while self.tally.counted < kills:
            self.tally.runs += 1
            killed = self._path / f"killed-{self.tally.runs}"
            _Run(self, killed).kill(kills)
            assert losses(killed) == losses(straight)
            assert sorted(losses(killed)) == list(range(1, self._steps + 1))
            assert_same(tensors(killed), tensors(straight))
        restarts = self.tally.resumed + self.tally.from_step_0 + self.tally.cut
        assert restarts == sum(self.tally.kills.values()), self.tally
        self.tally.seconds = round(time.monotonic() - begun, 1)
        return self.tally

    def _launch(self, rundir: Path) -> Job:
        control = rundir.with_name(f"{rundir.name}-control")
        control.mkdir(exist_ok=True)
        options = ["--run.log-every", 1, "--run.save-every", EVERY, "--run.keep", 2, "--run.threads", 1, "--run.dir"]
        command = ["--steps", self._steps, *options, rundir, *self._options]
        return self._start(self._world_size, RECIPE, *command, env={"CONTROL": str(control), "PACE": "0.02"})


class _Run:
    """One run that is killed until there were enough kills, or it has ended."""

    def __init__(self, campaign: Campaign, rundir: Path) -> None:
        self._campaign, self._rundir = campaign, rundir
        self._tally, self._random = campaign.tally, campaign._random
        self._store = Store(rundir / "checkpoints")
        self._attempt = 0
        self._resumed: int | None = None
        """The step from which this start goes on; None where it has not said so."""
        self._killed = False
        """Whether there was a kill before this start."""
        self._newest: Path | None = None
        """The newest checkpoint that the last kill has left."""
        self._seen: list[int] = []
        """The steps that had a checkpoint just before a kill."""

    def kill(self, kills: int) -> None:
        while self._tally.counted < kills:
            job = self._launch()
            kind = "inside" if self._tally.counted % 3 == 0 else "training"
            kind = "start" if self._random.random() < 0.1 else kind
            if not self._strike(job, kind):
                break
            self._look_after(job)
            self._killed = True
        else:
            job = self._launch()
        job.ok()
        self._look_at_start(job)
        facts = {name: status(self._rundir)[name] for name in ("status", "attempt", "global_step")}
        wanted = {"status": "finished", "attempt": self._attempt, "global_step": self._campaign._steps}
        assert facts == wanted, f"{facts}, not {wanted}\n{job.output()}"

    def _launch(self) -> Job:
        """Start the run again; a start that was killed before it took a number has left that to this one."""
        self._attempt, self._resumed = RunDir(self._rundir).current_attempt() + 1, None
        return self._campaign._launch(self._rundir)

    def _strike(self, job: Job, kind: str) -> bool:
        """Kill at such a moment; whether the run was still there to be killed."""
        one = kind != "start" and self._campaign._world_size > 1 and self._random.random() < 0.5
        victim = self._random.randrange(self._campaign._world_size) if one else None
        if kind == "start":
            _sleep(self._random.uniform(0.05, 0.6))
        else:
            self._await(job, lambda: self._lines() > 0)
            self._look_at_start(job)
            count = self._random.randrange(1, 25)
            self._await(job, lambda: self._lines() >= count)
            if kind == "inside":
                self._await(job, lambda: any(self._store.root.glob(f"step-*.partial-{self._attempt}")))
            _sleep(self._random.uniform(0.0, 0.01 if kind == "inside" else 0.03))
        self._seen = self._store.steps()
        if job.over:
            return False
        job.kill(victim)
        struck = time.monotonic()
        codes = job.wait(SECONDS)
        if -9 not in codes:
            assert set(codes) == {0}, job.output()
            return False
        if one:
            self._tally.longest_end = max(self._tally.longest_end, round(time.monotonic() - struck, 1))
        else:
            assert set(codes) == {-9}, job.output()
            assert "Traceback" not in job.output()
        if kind == "start":
            self._look_at_start(job, cut=True)
        self._tally.kills[kind] += 1
        self._tally.of_one_rank += one
        return True

    def _await(self, job: Job, happened: Callable[[], bool]) -> None:
        """Wait for it, or for the end of the run; closely, since a save takes some milliseconds."""
        job.when(lambda: happened() or job.over, every=0.001)

    def _look_at_start(self, job: Job, *, cut: bool = False) -> None:
        """It has gone on from the newest checkpoint that the kill before has left; if it was `cut`, it may not yet."""
        if self._resumed is not None:  # looked at before
            return
        output, newest = job.output(0), self._newest
        found = re.search(r"^resumed from (.*) at step (\d+)$", output, re.MULTILINE)
        if found is None:
            if (cut or self._attempt > 1) and "the run has no checkpoint yet" not in output:
                assert cut, job.output()
                self._tally.cut += self._killed
                return
            assert newest is None, job.output()
            self._tally.from_step_0 += self._killed
            self._resumed = 0
            return
        assert newest is not None, job.output()
        assert Path(found[1]).name.removesuffix(".replaced") == newest.name.removesuffix(".replaced"), job.output()
        assert int(found[2]) == int(newest.name.partition(".")[0].removeprefix("step-")), job.output()
        assert "PASSED OVER" not in output
        self._tally.resumed += 1
        self._resumed = int(found[2])

    def _look_after(self, job: Job) -> None:
        """What a kill has left."""
        steps, self._newest = self._store.steps(), self._store.newest()
        for step in steps:  # (a)
            assert verify(self._store.path(step)).step == step
        self._tally.verified += len(steps)
        assert not self._store.bad()
        self._tally.within_a_save += any(writer == self._attempt for _, _, writer in self._store.entries())
        last = steps[-1] if steps else 0
        assert not self._seen or last >= self._seen[-1]  # (b)
        if self._resumed is None:
            return
        begun = [self._resumed, *self._begun()]
        if len(begun) > 1:
            assert last >= begun[-2], f"{steps} are there; begun were {begun}\n{job.output()}"  # (c)
        completed = self._completed()
        lost = completed - last
        due = list(range(self._resumed // EVERY * EVERY + EVERY, completed + 1, EVERY))
        if begun[1:][-2:] == due[-2:] or begun[1:-1][-2:] == due[-2:]:  # the newest line may be older than a save
            assert lost < 2 * EVERY, f"{lost} steps of {completed} are lost, {steps} are there\n{job.output()}"  # (d)
            self._tally.most_lost = max(self._tally.most_lost, lost)
        else:
            self._tally.late += 1
            self._tally.most_lost_late = max(self._tally.most_lost_late, lost)

    def _lines(self) -> int:
        """Steps that this start has told."""
        return sum(line["attempt"] == self._attempt for line in self._metrics())

    def _completed(self) -> int:
        """The newest step that this start has told, or went on from."""
        told = [line["step"] for line in self._metrics() if line["attempt"] == self._attempt]
        return max([self._resumed or 0, *told])

    def _metrics(self) -> list[dict[str, object]]:
        try:
            text = (self._rundir / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines(keepends=True)[-60:] if line.endswith("\n")]

    def _begun(self) -> list[int]:
        """The steps whose saves this start has begun."""
        path = self._rundir.with_name(f"{self._rundir.name}-control") / "begun"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [int(step) for attempt, step in lines if int(attempt) == self._attempt]


def _sleep(seconds: float) -> None:
    """A moment of chance, not of waiting for something."""
    time.sleep(seconds)
