"""A run's saves: when one is due, what goes into it, and who is told how it ended."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from launcher import checkpoint
from launcher.agreement import Ballot
from launcher.errors import CheckpointError, LauncherError, ReplacedError
from launcher.parallel import reshard
from launcher.rundir import RunDir
from launcher.scores import scores
from launcher.state import add_module, add_optimizer, add_tracked, add_tracked_here, optimizer_names, parameter_names

if TYPE_CHECKING:
    from launcher.loop import Loop
    from launcher.run import Run

__all__ = ["Saver", "state_of_models"]

GRACE = 30.0  # seconds that a run which fails gives to the save in progress


class Saver:
    """Saves one run: in the background while it trains, and at its end before it leaves."""

    def __init__(self, run: Run, rundir: RunDir, attempt: int, settings: Mapping[str, Any]) -> None:
        self._run, self._rundir, self._settings = run, rundir, settings
        config = run.config
        best = None if config.keep_best is None else checkpoint.Best.parse(config.keep_best)
        self.store = checkpoint.Store(
            rundir.path / "checkpoints",
            checkpoint.Retention(config.keep, config.keep_every, best),
            attempt_is_current=lambda number: rundir.current_attempt() == number,
            scores=lambda: scores(rundir.path / "metrics.jsonl", best.metric) if best is not None else {},
        )
        self.writer = checkpoint.Writer(self.store, run.world, attempt=attempt)
        self.published: int | None = None
        """The newest step of which a checkpoint is known to be there."""
        self._waiting: int | None = None
        """The step at which a save was due that has not begun."""
        self._saving, self._started = 0, 0.0
        """The step whose save was begun last, and when, on `time.monotonic`'s clock."""
        self._final = False
        self._begun = 0

    def begin(self, step: int, *, own: bool) -> None:
        """The run goes on from `step`; if that is of another run's checkpoint, it is to have one of its own at once."""
        self._begun = step
        self.published = step if own else None
        self._waiting = step if step and not own else None

    def prepare(self, loop: Loop) -> None:
        """After the first step, when the optimizers have their moments: get ready for the first save.

        Raises:
            CheckpointError: something cannot be saved exactly: better now than after the last step.
        """
        self.writer.prepare(self._state(loop), warm=self._run.config.save_every > 0)

    def due(self, step: int, ballot: Ballot) -> bool:
        """Whether to save at this edge; a save that is due while another is being written waits for its end.

        The same on all ranks: `ballot` says what they were doing a moment ago.

        Raises:
            ReplacedError: a newer start of the run has taken over.
        """
        run = self._run
        if ballot.broken:
            run.print("launcher: the thread that writes checkpoints has ended; training waits for saves from now on")
            self.writer.fall_back(run.world)
        free = bool(ballot.broken) or not ballot.writing
        outcome = self.writer.outcome
        if free and outcome is not None and outcome.replaced:  # as all ranks know, now that none is writing
            raise ReplacedError(outcome.error)
        if run.config.save_every and step % run.config.save_every == 0 and step > self._begun:
            if not free and self._waiting is not None:
                seconds = time.monotonic() - self._started
                run.print(
                    f"launcher: no save at step {step}: step {self._saving} is being written, for {seconds:.0f} s"
                )
            self._waiting = self._waiting or step
        if self._waiting is not None and free and self._waiting != step:
            run.print(
                f"launcher: the save of step {self._waiting} is that of step {step}: the disk was not done before"
            )
        return self._waiting is not None and free

    def start(self, loop: Loop) -> None:
        """Copy the state of the completed steps; it is written while training goes on."""
        run = self._run
        self._waiting, self._saving, self._started = None, run.completed, time.monotonic()
        state = self._state(loop)
        line = {key: value for key, value in loop.metrics.line(run.completed).items() if _finite(value)}
        facts = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": run.seed,
            "config": self._settings,
            "metrics": line,
        }
        self.writer.start(run.completed, state, facts=facts, before=loop.metrics.sync, tell=self._tell)

    def finish(self, loop: Loop | None) -> None:
        """Wait for the save in progress, then save the completed steps, unless there are none or they are saved.

        Raises:
            CheckpointError: they could not be.
        """
        self._settle()
        run = self._run
        if loop is None or run.completed == 0:
            return
        self._final = True
        lost = True
        while lost:  # once more where the thread of a rank was lost, and not for a disk that is full
            [missing] = run.world.sum(float(self.published != run.completed))
            if not missing:
                return
            self.start(loop)
            lost = self._settle()
        outcome = self.writer.outcome
        if self.published != run.completed:
            raise CheckpointError(outcome.error if outcome is not None and outcome.error else "the save was lost")

    def settle(self) -> None:
        """Wait for the save in progress, on all ranks."""
        self._settle()

    def close(self) -> None:
        """A run that leaves by a failure lets the save in progress end: its state was whole."""
        self.writer.wait(GRACE)

    def _settle(self) -> bool:
        """Wait until no rank is writing; whether the thread of a rank was lost meanwhile."""
        world = self._run.world
        while True:
            self._run.pulse.beats += 1  # however slow the disk is
            self.writer.wait(1.0)
            busy, broken = world.sum(float(self.writer.busy), float(self.writer.broken))
            if broken:
                self.writer.fall_back(world)
            if broken or not busy:
                return bool(broken)

    def _tell(self, outcome: checkpoint.Outcome) -> None:
        """A save has ended; told at once, from the thread that wrote it."""
        if outcome.path is not None:
            self.published = outcome.step
            warning = self._run.clock.saved(outcome.seconds)
            if warning is not None and self._run.is_main:
                self._run.print(f"launcher: {warning}")
        elif outcome.broken and not self._run.is_main:
            print(f"launcher: rank {self._run.rank}: {outcome.error}", file=sys.stderr, flush=True)
        elif outcome.broken or not (self._final or outcome.replaced):  # else it is the run's failure, and told as that
            self._run.print(f"launcher: NOT SAVED, training goes on: {outcome.error}")
        if not self._run.is_main:
            return
        facts: dict[str, Any] = {"save_error": outcome.error}
        if outcome.path is not None:
            facts |= {"global_step": outcome.step, "checkpoint": outcome.path.name}
            facts |= {"save_seconds": round(outcome.seconds, 3), "save_blocked_seconds": round(outcome.blocked, 3)}
        try:
            self._rundir.update(**facts)
        except LauncherError as error:
            if outcome.path is not None:  # else the save has failed of the same
                self._run.print(f"launcher: {error}")

    def _state(self, loop: Loop) -> checkpoint.State:
        run = self._run
        state = state_of_models(run)
        names = parameter_names(run.models)
        for key, optimizer in zip(optimizer_names(run.optimizers), run.optimizers, strict=True):
            add_optimizer(state, key, optimizer, names)
        for key, (obj, per_rank) in run.tracked.items():
            if per_rank:
                add_tracked_here(state, key, obj)
            else:
                add_tracked(state, key, obj)
        state.rank_values |= {f"stream/{name}": cursor for name, cursor in loop.cursors().items()}
        state.values |= {
            "loaders": loop.positions(run.completed),
            "frozen": run.frozen,
            "batch_coupled": _batch_coupled(run.models),
        }
        if numbers := run.numbers.state():
            state.values["numbers"] = numbers
        state.exceptions = tuple(self._exceptions())
        if run.scaler is not None:
            state.values["scaler"] = run.scaler.state_dict()
        return state

    def _exceptions(self) -> list[str]:
        """What of this state is not a pure function of the config and the step."""
        run = self._run
        named = [f"tracked object {name!r}" for name in run.tracked]
        named += [
            f"cursor of stream {loader.name!r}: {said}"
            for loader in run.loaders
            if loader.stream
            for said in loader.stream.caveats()
        ]
        return named + (["the gradient scaler's scale"] if run.scaler is not None else [])


def state_of_models(run: Run) -> checkpoint.State:
    """What of the models a checkpoint holds."""
    state = checkpoint.State()
    for name, model in run.models.items():
        reshard(model)
        add_module(state, name, model)
    return state


def _batch_coupled(models: Mapping[str, nn.Module]) -> bool:
    modules = [module for model in models.values() for module in model.modules()]
    return any(isinstance(m, _BatchNorm) and not isinstance(m, SyncBatchNorm) for m in modules)


def _finite(value: Any) -> bool:
    """Whether JSON has a number for it; a loss that is NaN must not keep a checkpoint from being written."""
    return not isinstance(value, float) or math.isfinite(value)
