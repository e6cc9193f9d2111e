"""What a start takes over from a checkpoint: the run's own newest whole one, a given one, or another run's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import nn

from launcher import checkpoint
from launcher.checkpoint.agree import agreed
from launcher.checkpoint.listing import one_checkpoint
from launcher.checkpoint.state import check_state, flattened
from launcher.config import check_resume
from launcher.data import Loader
from launcher.errors import CheckpointError, DamagedError, LauncherError, UsageError
from launcher.numbers import check_state as check_numbers
from launcher.order import Plan
from launcher.rundir import RunDir
from launcher.save import state_of_models
from launcher.state import (
    add_module,
    add_tracked,
    add_tracked_here,
    optimizer_names,
    parameter_names,
    restore_optimizer,
    restore_tracked,
    tracked_here,
)
from launcher.world import World

if TYPE_CHECKING:
    from launcher.run import Run

__all__ = ["Restorer"]

T = TypeVar("T")


class Restorer:
    """Restores one run, at its start."""

    def __init__(
        self, run: Run, rundir: RunDir, store: checkpoint.Store, attempt: int, settings: Mapping[str, Any]
    ) -> None:
        self.cursors: dict[str, Any] = {}
        """Where each stream goes on, on this rank."""
        self.metrics: dict[str, Any] = {}
        """The metrics line of the step that was restored."""
        self.numbers: dict[str, Any] = {}
        """What it keeps of bad numbers."""
        self.own = False
        """Whether that is of this run's own checkpoints."""
        self._matched: set[str] = set()
        """The patterns of `--run.init-only` that name weights."""
        self._run, self._rundir, self._store = run, rundir, store
        self._attempt, self._settings = attempt, settings

    def initialise(self, name: str, model: nn.Module) -> None:
        """Start a model (on the CPU, not yet wrapped) from the weights of `--run.init-from`.

        A run that goes on takes from there only what its own checkpoints do not hold: frozen parameters.
        """
        run = self._run
        frozen = {f"{name}/{key}" for key, parameter in model.named_parameters() if not parameter.requires_grad}
        goes_on = self._store.newest() is not None
        if run.config.init_from is None or (goes_on and not frozen):
            return
        path = _checkpoint_path(run.config.init_from, "--run.init-from")
        index = checkpoint.read_index(path)
        state = checkpoint.State()
        add_module(state, name, model, frozen=True)
        chosen = self._named(name, state)
        there = {key for key in (*index.tensors, *index.aliases) if key.startswith(f"{name}/")}
        left = sorted(there - chosen - {key for key, holder in state.aliases.items() if holder in chosen})
        missing = sorted(chosen - frozen - there)
        if missing or (left and not run.config.init_only):
            raise CheckpointError(
                f"--run.init-from {path} is of another model: "
                + "; ".join([*_listed(f"of {name!r} it lacks", missing), *_listed("it also has", left)])
                + " (--run.init-only 'blocks.*' takes a part of it by name)"
            )
        _check_ties(path, index, state, chosen & there)
        wanted = chosen & there & frozen if goes_on else chosen & there
        if run.config.init_only and not goes_on:
            rest = [*_listed("as built", sorted(state.tensors.keys() - wanted)), *_listed("not taken", left)]
            run.print("; ".join([f"{name!r} begins with {len(wanted)} weights of {path}", *rest]))
        if wanted:
            checkpoint.load(path, World(), state, only=wanted)

    def restore(self, plans: dict[str, Plan], loaders: Mapping[str, Loader[Any]]) -> int:
        """Take over the checkpoint that `--run.resume` names, if any; returns the completed steps.

        `plans` are moved to go on behind the samples it has seen. Of the run's own checkpoints the newest that is whole
        is taken; damaged ones are told, and set aside.

        Raises:
            CheckpointError: all that there are are damaged, or one is of something else.
        """
        run = self._run
        agreed(run.world, self._begin)
        given = self._given()
        if given is not None:
            return self._load(given, plans, loaders)
        if run.config.resume == "never":
            return 0
        if (step := self.restore_newest(plans, loaders)) is not None:
            return step
        if bad := self._damaged():
            raise CheckpointError(
                f"no checkpoint in {self._store.root} is whole, damaged: {', '.join(bad)}: bring one back (one that is "
                "renamed to step-N counts again), or begin again with --run.resume never"
                + ("" if run.config.resume == "auto" else ", or with a fresh --run.dir from --run.resume PATH")
            )
        if self._attempt > 1:
            run.print("launcher: the run has no checkpoint yet: it begins with step 0")
        return 0

    def restore_newest(self, plans: dict[str, Plan], loaders: Mapping[str, Loader[Any]]) -> int | None:
        """Take over the run's own newest checkpoint that is whole; the completed steps, None if there is none."""
        run = self._run
        while (path := self.newest()) is not None:
            try:
                return self._load(path, plans, loaders)
            except DamagedError as error:
                damage = error
            [aside, *_] = agreed(run.world, partial(self._set_aside, path, damage))
            run.print(f"launcher: PASSED OVER {path.name}, which is now {aside}: {damage}")
        return None

    def newest(self) -> Path | None:
        """The run's newest checkpoint, as rank 0 sees it."""
        newest: Path | None = self._run.world.broadcast(self._store.newest() if self._run.is_main else None)
        return newest

    def _named(self, name: str, state: checkpoint.State) -> set[str]:
        """The model's tensors that `--run.init-only` names, themselves or by what is tied to them; all without it."""
        patterns = [f"{name}/{pattern}" for pattern in self._run.config.init_only]
        if not patterns:
            return set(state.tensors)
        found = [(key, p) for key in (*state.tensors, *state.aliases) for p in patterns if fnmatchcase(key, p)]
        self._matched |= {pattern.removeprefix(f"{name}/") for _, pattern in found}
        return {state.aliases.get(key, key) for key, _ in found}

    def _begin(self) -> None:
        """Refuse before the first step what could not be saved after it; remove what killed saves have left."""
        unknown = [p for p in self._run.config.init_only if p not in self._matched]
        if unknown and self._store.newest() is None:
            raise UsageError(f"--run.init-only {' '.join(unknown)}: no weight has such a name")
        state = state_of_models(self._run)
        for key, (obj, per_rank) in self._run.tracked.items():
            (add_tracked_here if per_rank else add_tracked)(state, key, obj)
        check_state(flattened(state), self._run.world)
        if self._run.is_main:
            self._store.clean(self._attempt)

    def _set_aside(self, path: Path, damage: DamagedError) -> str:
        """On rank 0, rename what is damaged, if it is so there too: what one machine cannot see may be whole.

        Raises:
            CheckpointError: it is whole here.
        """
        if not self._run.is_main:
            return ""
        try:
            checkpoint.verify(path)
        except DamagedError:
            return self._store.set_aside(path).name
        raise CheckpointError(f"{damage}; but rank 0 finds {path.name} whole: look at the other machine's disks")

    def _damaged(self) -> list[str]:
        """What was set aside, as rank 0 sees it."""
        return self._run.world.broadcast([path.name for path in self._store.bad()] if self._run.is_main else [])

    def _given(self) -> Path | None:
        """The checkpoint that `--run.resume` names, where the run does not go on from one of its own."""
        run, choice, newest = self._run, self._run.config.resume, self.newest()
        if choice == "never" and newest is not None:
            raise UsageError(f"--run.resume never, but {self._rundir.path} holds {newest.name}: take another --run.dir")
        if choice in ("auto", "never") or (newest is None and self._damaged()):
            return None
        given = _checkpoint_path(choice, "--run.resume")
        if newest is None or newest.samefile(given):
            return given
        if given.parent.samefile(newest.parent):
            raise UsageError(
                f"--run.resume {choice} goes back behind {newest.name} of the same run: give it a fresh --run.dir"
            )
        run.print(f"launcher: the run goes on from its own {newest.name}: --run.resume {choice} was where it began")
        return None

    def _load(self, path: Path, plans: dict[str, Plan], loaders: Mapping[str, Loader[Any]]) -> int:
        """Take over one checkpoint: nothing is changed before all of it has been read and found right."""
        run = self._run
        sizes = {name: loader.size for name, loader in loaders.items()}

        def prepare() -> _Prepared:
            index = checkpoint.read_index(path)
            self._check(index, path, sizes)
            check_numbers(index.values.get("numbers"))
            return self._prepare(index)

        mine: list[_Prepared] = []
        agreed(run.world, lambda: mine.append(_understood(path, prepare)))
        [prepared] = mine
        index = checkpoint.load(path, run.world, prepared.state, buffer=run.saver.writer.buffer)
        if run.is_main:
            self._store.mark_verified(path)
        for take_over in prepared.finish:
            take_over()
        if index.world_size == run.world_size:
            self._restore_rank(path, index)
        if run.scaler is not None and "scaler" in index.values:
            run.scaler.load_state_dict(index.values["scaler"])
        for name, plan in plans.items():
            seen = index.values["loaders"][name]["samples_seen"]
            plans[name] = Plan(plan.batch_size, plan.microbatch_size, plan.end, base=seen, base_step=index.step)
        self.own = path.parent.samefile(self._store.root) if self._store.root.exists() else False
        self.numbers = index.values.get("numbers", {})
        line = index.facts.get("metrics")
        self.metrics = line if isinstance(line, dict) else {}
        run.print(f"resumed from {path} at step {index.step}")
        return index.step

    def _prepare(self, index: checkpoint.Index) -> _Prepared:
        """What is to be filled, and what is then to be done."""
        run = self._run
        state = state_of_models(run)
        names = parameter_names(run.models)
        finish = [
            restore_optimizer(state, key, optimizer, names, index)
            for key, optimizer in zip(optimizer_names(run.optimizers), run.optimizers, strict=True)
        ]
        for key, (obj, per_rank) in run.tracked.items():
            if not per_rank:
                finish.append(partial(_take_over, key, obj, restore_tracked(state, key, obj, index)))
        return _Prepared(state, finish)

    def _check(self, index: checkpoint.Index, path: Path, sizes: Mapping[str, int | None]) -> None:
        run = self._run
        saved = index.facts.get("config")
        if isinstance(saved, dict):
            check_resume(saved, self._settings, run.config.allow)
        self._check_data(index, path, sizes)
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

    def _check_data(self, index: checkpoint.Index, path: Path, sizes: Mapping[str, int | None]) -> None:
        """Positions mean other samples in data of another length."""
        saved = index.values.get("loaders")
        if not isinstance(saved, dict):
            raise CheckpointError(f"{path} holds weights and no run: start from them with --run.init-from")
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
            seen = saved[name]["samples_seen"]
            if type(seen) is not int or not 0 <= seen < 2**63:
                raise TypeError(f"samples_seen is {str(seen)[:30]}")

    def _restore_rank(self, path: Path, index: checkpoint.Index) -> None:
        """What is each rank's own: stream cursors, and objects tracked per rank."""
        for key, value in index.rank_values[self._run.rank].items():
            kind, _, name = key.partition("/")
            if kind == "stream":
                self.cursors[name] = value
            elif name in self._run.tracked:
                _take_over(name, self._run.tracked[name][0], tracked_here(value))
            else:
                raise CheckpointError(f"{path} has {name!r}, which is no longer given to run.track")


class _Prepared(NamedTuple):
    """A state to fill, and what takes over the rest once that is done."""

    state: checkpoint.State
    finish: list[Callable[[], None]]


def _understood(path: Path, work: Callable[[], T]) -> T:
    """Whatever else than a run has saved may be in a checkpoint that is whole."""
    try:
        return work()
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold what a run saves ({type(error).__name__}: {error})") from error


def _take_over(name: str, tracked: Any, saved: Any) -> None:
    """Give a tracked object what was saved of it."""
    try:
        tracked.load_state_dict(saved)
    except Exception as error:  # of the recipe's own code, or ours: it may be anything
        raise CheckpointError(
            f"run.track(..., {name!r}): its load_state_dict does not take what was saved: "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_ties(path: Path, index: checkpoint.Index, state: checkpoint.State, wanted: set[str]) -> None:
    """Of tensors that are one here, a checkpoint that has two would lose one."""
    for tied, holder in state.aliases.items():
        both = holder in wanted and (tied in index.tensors or tied in index.aliases)
        if both and index.holder(tied) != index.holder(holder):
            raise CheckpointError(
                f"--run.init-from {path}: {tied} is tied to {holder} here and has data of its own there"
            )


def _listed(what: str, names: Sequence[str], most: int = 10) -> list[str]:
    """`what`, with as many names as a person reads; nothing where there are none."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{what} {', '.join(names[:most])}{more}"] if names else []


def _checkpoint_path(given: str, option: str) -> Path:
    """The checkpoint that an option names, by its own path or by its run's (then the newest)."""
    try:
        return one_checkpoint(Path(given))
    except LauncherError as error:
        raise UsageError(f"{option} {error}") from None
