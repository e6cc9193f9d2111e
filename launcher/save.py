"""A run's checkpoints: what goes into one, what a start takes out of one, and where the data goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from launcher import checkpoint
from launcher.config import check_resume
from launcher.data import Loader
from launcher.errors import CheckpointError, UsageError
from launcher.order import Plan
from launcher.parallel import reshard
from launcher.rundir import RunDir
from launcher.state import (
    add_module,
    add_optimizer,
    add_tracked,
    parameter_names,
    restore_optimizer,
    restore_tracked,
)
from launcher.world import World

if TYPE_CHECKING:
    from launcher.loop import Loop
    from launcher.run import Run

__all__ = ["Saver"]

T = TypeVar("T")


class Saver:
    """Saves and restores one run."""

    def __init__(self, run: Run, rundir: RunDir, attempt: int, settings: Mapping[str, Any]) -> None:
        self.cursors: dict[str, Any] = {}
        """Where each stream goes on, on this rank."""
        self.metrics: dict[str, Any] = {}
        """The metrics line of the step that was restored."""
        self._run, self._rundir, self._attempt, self._settings = run, rundir, attempt, settings
        self._store = checkpoint.Store(
            rundir.path / "checkpoints",
            keep=run.config.keep,
            attempt_is_current=lambda number: rundir.current_attempt() == number,
        )
        self._saved: int | None = None

    def plans(self, loaders: Mapping[str, Loader[Any]], total: int | None, epochs: int | None) -> dict[str, Plan]:
        """How each loader's data becomes steps on this world, from the start of the run."""
        if total is not None and epochs is not None:
            raise UsageError("run.steps takes total= or epochs=, not both")
        if total is None and epochs is None and not any(loader.stream for loader in loaders.values()):
            raise UsageError("run.steps needs total= (steps) or epochs=")
        if epochs is not None and (len(loaders) != 1 or any(loader.stream for loader in loaders.values())):
            raise UsageError("epochs= needs one loader of a dataset with a length")
        plans = {}
        for name, loader in loaders.items():
            check_batch(
                loader.batch_size, loader.microbatch_size, self._run.world_size, stream=loader.stream is not None
            )
            end = None if epochs is None else epochs * len(loader)
            plans[name] = Plan(loader.batch_size, loader.microbatch_size, end)
        numbers = {name: -(-plan.batch_size // plan.microbatch_size) for name, plan in plans.items()}
        if len(set(numbers.values())) > 1:
            raise UsageError(f"the loaders of one step need as many micro-batches each, not {numbers}")
        return plans

    def initialise(self, name: str, model: nn.Module) -> None:
        """Start a model (on the CPU, not yet wrapped) from the weights of `--run.init-from`."""
        source = self._run.config.init_from
        if source is None or self._store.newest() is not None:
            return  # a run that has checkpoints goes on from them
        state = checkpoint.State()
        add_module(state, name, model)
        path = _checkpoint_path(source, "--run.init-from")
        checkpoint.load(path, World(), state, only=f"{name}/")

    def restore(self, plans: dict[str, Plan], loaders: Mapping[str, Loader[Any]]) -> int:
        """Take over the checkpoint that `--run.resume` names, if any; returns the completed steps.

        `plans` are moved to go on behind the samples it has seen.
        """
        path = self._source()
        if path is None:
            return 0
        run = self._run
        index = _agreed(run.world, lambda: checkpoint.read_index(path))
        sizes = {name: loader.size for name, loader in loaders.items()}
        _agreed(run.world, lambda: self._check(index, path, sizes))
        state = self._state()
        names = parameter_names(run.models)
        for key, optimizer in zip(_optimizer_names(run), run.optimizers, strict=True):
            restore_optimizer(state, key, optimizer, names, index)
        finish = [
            restore_tracked(state, key, obj, index) for key, (obj, per_rank) in run.tracked.items() if not per_rank
        ]
        checkpoint.load(path, run.world, state)
        for then in finish:
            then()
        if index.world_size == run.world_size:
            self._restore_rank(index)
        if run.scaler is not None and "scaler" in index.values:
            run.scaler.load_state_dict(index.values["scaler"])
        for name, plan in plans.items():
            seen = index.values["loaders"][name]["samples_seen"]
            plans[name] = Plan(plan.batch_size, plan.microbatch_size, plan.end, base=seen, base_step=index.step)
        line = index.facts.get("metrics")
        self.metrics = line if isinstance(line, dict) else {}
        run.print(f"resumed from {path} at step {index.step}")
        self._saved = index.step
        return index.step

    def save(self, loop: Loop | None) -> None:
        """Write a checkpoint of the completed steps, unless there are none or it is there already."""
        run = self._run
        if loop is None or run.completed in (0, self._saved):
            return
        state = self._state()
        names = parameter_names(run.models)
        for key, optimizer in zip(_optimizer_names(run), run.optimizers, strict=True):
            add_optimizer(state, key, optimizer, names)
        for key, (obj, per_rank) in run.tracked.items():
            if per_rank:
                state.rank_values[f"track/{key}"] = obj.state_dict()
            else:
                add_tracked(state, key, obj)
        state.rank_values |= {f"stream/{name}": cursor for name, cursor in loop.cursors().items()}
        state.values |= {
            "loaders": loop.positions(run.completed),
            "frozen": run.frozen,
            "batch_coupled": self._batch_coupled(),
        }
        state.exceptions = tuple(self._exceptions())
        if run.scaler is not None:
            state.values["scaler"] = run.scaler.state_dict()
        line = {key: value for key, value in loop.metrics.line(run.completed).items() if _finite(value)}
        facts = {"seed": run.seed, "config": self._settings, "metrics": line}
        path = checkpoint.save(self._store, run.world, run.completed, state, attempt=self._attempt, facts=facts)
        self._saved = run.completed
        if run.is_main:
            self._rundir.update(global_step=run.completed, checkpoint=path.name)

    def _source(self) -> Path | None:
        """The checkpoint to go on from."""
        run = self._run
        choice = run.config.resume
        newest: Path | None = run.world.broadcast(self._store.newest() if run.is_main else None)
        if choice == "auto":
            return newest
        if choice == "never":
            if newest is not None:
                raise UsageError(
                    f"--run.resume never, but {self._rundir.path} holds {newest.name}: take another --run.dir"
                )
            return None
        given = _checkpoint_path(choice, "--run.resume")
        if newest is None or newest.samefile(given):
            return given
        if given.parent.samefile(newest.parent):
            raise UsageError(
                f"--run.resume {choice} goes back behind {newest.name} of the same run: give it a fresh --run.dir"
            )
        run.print(f"launcher: the run goes on from its own {newest.name}: --run.resume {choice} was where it began")
        return newest

    def _check_data(self, index: checkpoint.Index, sizes: Mapping[str, int | None]) -> None:
        """Positions mean other samples in data of another length."""
        saved = index.values["loaders"]
        if saved.keys() != sizes.keys():
            raise UsageError(
                f"the run has read from {', '.join(saved)}, not {', '.join(sizes)}: give run.steps the same loaders, "
                "made in the same order"
            )
        for name, size in sizes.items():
            if size != saved[name]["size"] and "data" not in self._run.config.allow:
                raise UsageError(
                    f"the data of {name!r} had {saved[name]['size']} samples and has {size}: give the same, or accept "
                    "another order with --run.allow data"
                )

    def _check(self, index: checkpoint.Index, path: Path, sizes: Mapping[str, int | None]) -> None:
        run = self._run
        saved = index.facts.get("config")
        if isinstance(saved, dict):
            check_resume(saved, self._settings, run.config.allow)
        self._check_data(index, sizes)
        gone = [key.removeprefix("track/") for key in index.values if key.startswith("track/")]
        if gone := sorted(set(gone) - set(run.tracked)):
            raise CheckpointError(f"{path} has {gone[0]!r}, which is no longer given to run.track")
        if index.values.get("frozen", {}) != run.frozen:
            raise CheckpointError(
                f"{path}: the frozen parameters are not those it was trained with: give the same base weights"
            )
        if index.world_size == run.world_size:
            return
        per_rank = sorted(key for ranks in index.rank_values for key in ranks)
        if per_rank:
            raise UsageError(
                f"{path} was saved by {index.world_size} ranks, each with its own {per_rank[0]}: resume with as many, "
                f"not {run.world_size}"
            )
        if index.values.get("batch_coupled") and "world" not in run.config.allow:
            raise UsageError(
                f"{path} was trained with BatchNorm on {index.world_size} ranks; on {run.world_size} its statistics "
                "differ: resume with as many, or accept it with --run.allow world"
            )

    def _restore_rank(self, index: checkpoint.Index) -> None:
        """What is each rank's own: stream cursors, and objects tracked per rank."""
        for key, value in index.rank_values[self._run.rank].items():
            kind, _, name = key.partition("/")
            if kind == "stream":
                self.cursors[name] = value
            elif name in self._run.tracked:
                self._run.tracked[name][0].load_state_dict(value)
            else:
                raise CheckpointError(f"the checkpoint has {name!r}, which is no longer given to run.track")

    def _state(self) -> checkpoint.State:
        state = checkpoint.State()
        for name, model in self._run.models.items():
            reshard(model)
            add_module(state, name, model)
        return state

    def _batch_coupled(self) -> bool:
        modules = [module for model in self._run.models.values() for module in model.modules()]
        return any(isinstance(m, _BatchNorm) and not isinstance(m, SyncBatchNorm) for m in modules)

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


def check_batch(batch_size: int, microbatch_size: int, world_size: int, *, stream: bool = False) -> None:
    """Refuse a batch that cannot be dealt out, naming the nearest that can.

    Raises:
        UsageError: fewer micro-batches than ranks; or, of a stream, a number that does not divide evenly.
    """
    number = -(-batch_size // microbatch_size)
    uneven = stream and batch_size % (microbatch_size * world_size) > 0
    if number >= world_size and not uneven:
        return
    smaller = batch_size // world_size
    fixes = [f"batch_size {-(-number // world_size) * world_size * microbatch_size}"]
    if smaller and not (stream and batch_size % world_size):
        fixes.insert(0, f"microbatch_size {smaller}")
    why = "and a stream is dealt out evenly to" if number >= world_size else "too few for"
    raise UsageError(
        f"batch_size {batch_size} in micro-batches of {microbatch_size} makes {number}, {why} {world_size} ranks: "
        f"take {' or '.join(fixes)}"
    )


def _finite(value: Any) -> bool:
    """Whether JSON has a number for it; a loss that is NaN must not keep a checkpoint from being written."""
    return not isinstance(value, float) or math.isfinite(value)


def _optimizer_names(run: Run) -> list[str]:
    return [f"optimizer_{k}" if k else "optimizer" for k in range(len(run.optimizers))]


def _checkpoint_path(given: str, option: str) -> Path:
    """A checkpoint's directory, from its own path or that of a run (its newest)."""
    path = Path(given)
    if (path / "checkpoints").is_dir():
        newest = checkpoint.Store(path / "checkpoints").newest()
        if newest is None:
            raise UsageError(f"{option} {given}: the run has no checkpoint")
        return newest
    if not (path / "index.json").is_file():
        raise UsageError(f"{option} {given}: no checkpoint (step-N with an index.json) and no run directory")
    return path


def _agreed(world: World, check: Callable[[], T]) -> T:
    """`check()`, failing on every rank where it fails on one."""
    try:
        result, error = check(), None
    except (CheckpointError, UsageError) as failure:
        result, error = None, failure
    for other in world.gather(error):
        if other is not None:
            raise other
    return result  # type: ignore[return-value]
