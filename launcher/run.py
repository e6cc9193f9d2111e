"""The handle that a recipe's `train(run, cfg)` is given."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from typing_extensions import TypeVar

from launcher.average import average, evaluating
from launcher.batches import plan_steps
from launcher.caches import Caches
from launcher.clock import Clock
from launcher.config import RunConfig
from launcher.data import Loader
from launcher.errors import CheckpointError, LauncherError, RecipeError, UsageError
from launcher.garbage import Garbage
from launcher.loop import Loop
from launcher.metrics import Bar, Metrics, checked
from launcher.numbers import Guard
from launcher.optim import Optimizer, update_scaler
from launcher.order import Plan
from launcher.parallel import Blocks, all_gather, wrap
from launcher.restore import Restorer
from launcher.rundir import RunDir
from launcher.save import Saver
from launcher.seeds import WEIGHTS, kept_host_generators, mix, seed_host
from launcher.signals import Signals, Stopped
from launcher.startup import Startup, line
from launcher.state import ExtraState, frozen_digest, parameter_names
from launcher.step import Step
from launcher.watchdog import Pulse
from launcher.world import World

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Run"]

M = TypeVar("M", bound=nn.Module)
B = TypeVar("B", default=Any)


class Run:
    """One attempt at a run: the world it has, what the recipe registered, and how far it is."""

    step_type: type[Step] = Step

    def __init__(
        self,
        config: RunConfig,
        settings: Mapping[str, Any],
        world: World,
        accelerator: Accelerator,
        rundir: RunDir,
        attempt: int,
        signals: Signals,
    ) -> None:
        """`settings` is the resolved config, the recipe's options and the run's, as config.json has it."""
        self.config, self.world, self.signals = config, world, signals
        self.models: dict[str, nn.Module] = {}
        self.frozen: dict[str, str] = {}
        """The digest of each model's frozen parameters, as built."""
        self.optimizers: list[Optimizer] = []
        self.tracked: dict[str, tuple[Any, bool]] = {}
        self.loaders: list[Loader[Any]] = []
        self.scaler = torch.amp.GradScaler(world.device.type) if config.precision == "fp16" else None
        self.completed = 0
        """Optimizer steps completed, over all attempts."""
        self.stepped = False
        """Whether this start has completed a step."""
        self.finish_reason: str | None = None
        self.numbers = Guard(self)
        self.pulse = Pulse()
        self.garbage = Garbage(every=config.gc_every, empty_cache_every=config.empty_cache_every)
        self.startup = Startup()
        self.caches: Caches | None = None
        self.clock = Clock(os.environ, save_seconds=rundir.read().get("save_seconds") if world.is_main else None)
        self._accelerator, self._rundir, self._attempt = accelerator, rundir, attempt
        self.saver = Saver(self, rundir, attempt, settings)
        self._restorer = Restorer(self, rundir, self.saver.store, attempt, settings)
        self._metrics: Metrics | None = None
        self._loop: Loop | None = None
        self._bar: Bar | None = None
        self._builds = 0

    @property
    def rank(self) -> int:
        """This process among all of the run's."""
        return self.world.rank

    @property
    def world_size(self) -> int:
        """The number of processes of the run."""
        return self.world.world_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.world.is_main

    @property
    def device(self) -> torch.device:
        """The device this rank computes on."""
        return self.world.device

    @property
    def dir(self) -> Path:
        """The run directory."""
        return self._rundir.path

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.seed

    def build(
        self,
        make: Callable[[], M],
        *,
        frozen: bool = False,
        name: str | None = None,
        blocks: Blocks = None,
        find_unused_parameters: bool = False,
    ) -> M:
        """The module that `make` returns, initialised alike on every rank, on the device, compiled and parallel.

        `make` runs on the CPU under a seed of its own, so the weights are the same for every number of ranks. What
        comes back is to be called as the module (`model(x)`); under DDP it lends the module's attributes. The forward
        runs under autocast where a precision is set, and returns fp32.

        Args:
            make: builds and initialises the module; called once.
            frozen: a reference that is not trained, not replicated and not saved.
            name: what it is called in checkpoints; the first is `model`.
            blocks: the class (or classes) of the blocks that repeat, for compiling, sharding and recomputation; found
                by itself in a transformers model and in `nn.ModuleList`s of one class.
            find_unused_parameters: DDP's, for a model whose parameters do not all take part in every step.

        Raises:
            RecipeError: built after the steps began, or a name used twice.
            UsageError: an option asks for blocks and the model has none.
        """
        name = name or ("model" if not self._builds else f"model_{self._builds}")
        self._before_steps(f"run.build(name={name!r})", name, self.models)
        with self.startup.during("weights"):
            return self._build(make, name, frozen=frozen, blocks=blocks, unused=find_unused_parameters)

    def _build(self, make: Callable[[], M], name: str, *, frozen: bool, blocks: Blocks, unused: bool) -> M:
        with kept_host_generators(), torch.device("cpu"):
            seed_host(mix(self.seed, WEIGHTS, self._builds))
            model = make()
        self._builds += 1
        if frozen:
            model.requires_grad_(False).eval()
        else:
            self._restorer.initialise(name, model)
            self.frozen[name] = frozen_digest(model)
        wrapped = wrap(model, self.config, self.world, self._accelerator, blocks=blocks, unused=unused)
        if not frozen:
            self.models[name] = wrapped
            if extra := ExtraState(wrapped):
                self.track(extra, f"{name}, extra state")
        return wrapped  # type: ignore[return-value]  # under DDP a Replica, which lends M's attributes

    def optimizer(self, inner: torch.optim.Optimizer) -> Optimizer:
        """The optimizer, stepped on whole gradients only, and saved with the run."""
        self._before_steps("run.optimizer", "", {})
        if isinstance(inner, torch.optim.LBFGS):
            raise RecipeError("LBFGS evaluates the loss several times a step, which run.optimizer does not offer")
        ids = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
        unknown = ids - set(parameter_names(self.models))
        if unknown:
            raise RecipeError(
                f"{type(inner).__name__} has {len(unknown)} parameters that are in no model of run.build: make the "
                "optimizer from the model that run.build returned"
            )
        models = [m for m in self.models.values() if any(id(parameter) in ids for parameter in m.parameters())]
        self.optimizers.append(Optimizer(inner, models, self.scaler))
        return self.optimizers[-1]

    def loader(
        self,
        data: Any,
        *,
        batch_size: int,
        microbatch_size: int | None = None,
        shuffle: bool = True,
        collate: Callable[[list[Any]], B] | None = None,
        count: Callable[[B], int] | None = None,
        unit: str | None = None,
    ) -> Loader[B]:
        """Batches of `data`: a map-style dataset, a tuple or dict of tensors, a `datasets` table, or a stream.

        Args:
            data: what to read. `__getitems__` is used where there is one; a `datasets` table is read a micro-batch at
                a time as a dict of stacked tensors, unless `collate` is given.
            batch_size: samples an optimizer step, over the whole job.
            microbatch_size: samples a forward pass; the default is the whole batch in one.
            shuffle: a new order every epoch, from the run's seed.
            collate: from a list of samples to a batch; the default is torch's.
            count: what a micro-batch adds to what the loss is divided by (its unmasked tokens, say); the default is
                its samples.
            unit: what `count` counts, for the metrics: `tokens`.
        """
        microbatch_size = batch_size if microbatch_size is None else microbatch_size
        if batch_size < 1 or not 1 <= microbatch_size <= batch_size:
            raise UsageError(
                f"batch_size {batch_size} in micro-batches of {microbatch_size}: both at least 1, the second no larger"
            )
        loader = Loader(
            data,
            name=f"loader_{len(self.loaders)}" if self.loaders else "loader",
            batch_size=batch_size,
            microbatch_size=microbatch_size,
            seed=self.seed,
            shuffle=shuffle,
            collate=collate,
            count=count,
            unit=unit or ("samples" if count is None else "counts"),
            workers=self.config.workers,
        )
        self.loaders.append(loader)
        return loader

    def steps(
        self,
        data: Loader[Any] | Mapping[str, Loader[Any]] | None = None,
        *,
        total: int | None = None,
        epochs: int | None = None,
        flops: float | None = None,
    ) -> Iterator[Step]:
        """The optimizer steps of the run, from where it stands: resumes, saves, logs and stops at their edges.

        Args:
            data: a loader, a dict of them (a step then yields dicts), or None for data that the recipe generates.
            total: optimizer steps.
            epochs: passes over the data instead; they end in one short batch.
            flops: the model's FLOPs, forward and backward, for each thing that is counted, to report MFU.

        Raises:
            RecipeError: used a second time: one run has one loop.
            UsageError: the batch size cannot be dealt out to this world.
            Stopped: (through the recipe) all ranks have agreed to stop.
        """
        if self._loop is not None:
            raise RecipeError(
                "run.steps was used before, and one run has one loop: make the second stage a run of its own, with "
                "--run.init-from"
            )
        loaders = dict(data) if isinstance(data, Mapping) else {} if data is None else {data.name: data}
        plans = plan_steps(loaders, self.world_size, total=total, epochs=epochs)
        self._say_caveats(loaders)
        self._check_rewind(loaders)
        with self.pulse.during("restore"), self.startup.during("weights"):
            self.completed = self._restorer.restore(plans, loaders)
        self.numbers.restore(self._restorer.numbers)
        self.saver.begin(self.completed, own=self._restorer.own)
        if epochs is not None:
            total = plans[next(iter(plans))].steps()
        if total is not None and self.completed > total:
            raise UsageError(
                f"the run is at step {self.completed}, past the {total} asked for: ask for more, or a fresh run"
            )
        first = next(iter(loaders.values()), None)
        self._bar = Bar(total, self.completed) if self.is_main else None
        self._metrics = Metrics(
            self._rundir.path / "metrics.jsonl",
            self.world,
            attempt=self._attempt,
            log_every=self.config.log_every,
            total=total,
            unit=first.unit if first is not None else "samples",
            flops=flops,
            bar=self._bar,
            track=self._tracker() if self.config.tracker else None,
        )
        self._metrics.remember(self.completed, self._restorer.metrics)
        if self.is_main:
            self._rundir.update(status="running", global_step=self.completed, total_steps=total)
        self._loop = Loop(self, loaders, plans, total, self._metrics, single=not isinstance(data, Mapping))
        return self._loop.steps()

    def average(self, score: Callable[[Any], Mapping[str, tuple[Any, Any]]], data: Loader[Any]) -> dict[str, float]:
        """Exact means over a whole dataset and all ranks.

        `score(batch)` gives, for each name, a sum and the count to divide it by. Models are in evaluation mode and no
        gradients are kept in here; both are restored, also when the ranks agree to stop inside.
        """
        begun = time.perf_counter()
        paused = self._metrics.pause() if self._metrics is not None else nullcontext()
        with self.startup.during("evaluation"), self.pulse.during("scoring"), self.garbage.automatic(), paused:
            means = average(self, score, data)
        self.clock.evaluated(time.perf_counter() - begun)
        return means

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients, rank 0's buffers on every rank; restored afterwards. For sampling, say."""
        with self.pulse.during("evaluation"), self.garbage.automatic(), evaluating(self):
            yield

    def mean(self, value: torch.Tensor | float) -> torch.Tensor:
        """The mean of a value over ranks, without gradient, on the device."""
        total = torch.as_tensor(value, dtype=torch.float32, device=self.device).detach().clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total / self.world_size

    def all_gather(self, value: torch.Tensor) -> torch.Tensor:
        """Every rank's rows in rank order, with gradients (Accelerate's gather has none); sizes may differ.

        A micro-batch that only pads (`step.local_count` is 0) brings its rows too: give no rows then (`value[:0]`).

        Shapes: [n_rank, ...] on each rank gives [sum of n_rank, ...].
        """
        return value if self.world_size == 1 else all_gather(value, self.world)

    def track(self, obj: Any, name: str | None = None, *, per_rank: bool = False) -> None:
        """Save and restore an object of the recipe's own through its `state_dict` and `load_state_dict`.

        With `per_rank` each rank keeps its own (numbers and text only), and a resume needs the same world size.
        """
        name = name or f"object_{len(self.tracked)}"
        self._before_steps(f"run.track(name={name!r})", name, self.tracked)
        self.tracked[name] = (obj, per_rank)

    def log(self, **values: float | torch.Tensor) -> None:
        """Write a metrics line of the weights as they are, now; rank 0's values."""
        if self._metrics is None:
            raise RecipeError("run.log before run.steps: there is no step yet to log for")
        self._metrics.write(self.completed + self.mid_step, checked(values))

    def print(self, *values: object) -> None:
        """Print on rank 0, without breaking the progress bar."""
        text = " ".join(map(str, values))
        if self._bar is not None:
            self._bar.print(text)
        elif self.is_main:
            print(text, flush=True)

    def finish(self, reason: str) -> None:
        """End the steps on all ranks: after this step if said before its last backward, else one later."""
        self.finish_reason = reason

    def returned(self) -> None:
        """The recipe's `train` has returned: save what it has learnt."""
        if self._loop is not None:
            self._loop.broken_off()
        self._finish_saving()

    def stopped(self) -> None:
        """All ranks have agreed to stop here: save, to go on from here."""
        if self._loop is not None:
            self._loop.flush()
        if self.numbers.bad is not None:  # found while stopping: the next start meets it again, and answers
            self.saver.settle()
        else:
            self._finish_saving()

    def save(self) -> None:
        """Begin to write a checkpoint of the completed steps; training goes on, whatever becomes of it."""
        assert self._loop is not None
        with self.pulse.during("save"), self._loop.metrics.pause():
            self.saver.start(self._loop)

    def newest_checkpoint(self) -> str | None:
        """The name of the run's newest checkpoint, after the save in progress; None if there is none."""
        self.saver.settle()
        newest = self._restorer.newest()
        return None if newest is None else newest.name

    def rewind(self, plans: dict[str, Plan], loaders: Mapping[str, Loader[Any]]) -> int:
        """Go back to the newest checkpoint that is whole; the completed steps. `plans` are moved to go on from there.

        Raises:
            CheckpointError: none is.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            optimizer.inner.state.clear()  # a moment that the checkpoint does not have was made since
            optimizer.stepped = optimizer.skipped = False
        self.finish_reason = None
        with self.pulse.during("restore"):
            step = self._restorer.restore_newest(plans, loaders)
        if step is None:
            raise CheckpointError(f"no checkpoint of {self.dir} is whole any more: there is none to go back to")
        self.numbers.restore(self._restorer.numbers, rewind=True)
        self.saver.begin(step, own=True)
        self.completed = step
        return step

    @property
    def restored_line(self) -> Mapping[str, Any]:
        """The metrics line of the step that was restored last."""
        return self._restorer.metrics

    def _finish_saving(self) -> None:
        self.pulse.enter("end")
        with self._metrics.pause() if self._metrics is not None else nullcontext():
            self.saver.finish(self._loop)

    def cursor(self, name: str) -> Any:
        """Where a restored stream goes on."""
        return self._restorer.cursors.get(name)

    def check_stop(self) -> None:
        """Where the state is whole, let all ranks agree whether to stop here; raises `Stopped` if they do."""
        [stop] = self.world.sum(float(self.must_stop()))
        if stop and not (self._loop is not None and self._loop.in_step):
            raise Stopped

    def must_stop(self) -> bool:
        """Whether this rank has seen a signal, or rank 0's clock says that the job's end is near."""
        signals = self.signals
        if signals.stop is None and self.is_main and self.stepped and self.clock.due():
            signals.stop = "the job's time limit"
        return signals.stop is not None

    @property
    def mid_step(self) -> bool:
        """Whether an optimizer has stepped in a body that has not ended: nothing may be saved then."""
        return any(optimizer.stepped for optimizer in self.optimizers)

    def end_step(self, index: int) -> None:
        """A body has ended: the state is whole again."""
        for optimizer in self.optimizers:
            if optimizer.skipped and not self.numbers.refused:
                self.print(
                    f"step {index + 1}: update skipped: {'fp16 overflow' if self.scaler else 'nothing was counted'}"
                )
        if self.scaler is not None:
            update_scaler(self.scaler, moves=not self.numbers.refused)
        for optimizer in self.optimizers:
            optimizer.stepped = optimizer.skipped = False
        self.completed = index + 1
        if not self.stepped:
            self.stepped = True
            self._started()

    def close(self) -> None:
        """Stop the workers, the metrics and the trackers; a save in progress may end first."""
        self.saver.close()
        if self._loop is not None:
            self._loop.close()
        for loader in self.loaders:
            loader.close()
        if self.config.tracker:
            self._accelerator.end_training()
        if self._metrics is not None:
            unwritten = self._metrics.close()
            if unwritten and self.is_main:
                print(
                    f"launcher: never in a metrics line that was due: {', '.join(sorted(unwritten))}: use step.every()"
                )

    def _started(self) -> None:
        """This start has completed its first step."""
        startup = self.startup.end(0.0 if self._metrics is None else self._metrics.waited)
        if self.caches is not None:
            self.caches.stepped(first_node=self.rank < self.world.local_world_size)
        if self.is_main:
            print(f"launcher: {line(startup)}", file=sys.stderr, flush=True)
            with suppress(LauncherError):  # a full disk is the next save's to tell
                self._rundir.record_step(self._attempt, self.completed, startup)

    def _check_rewind(self, loaders: Mapping[str, Loader[Any]]) -> None:
        """Samples can only be left out where they have places of their own."""
        if self.config.bad_numbers != "rewind":
            return
        streams = [name for name, loader in loaders.items() if loader.stream is not None]
        if streams or not loaders:
            what = (
                f"{streams[0]!r} is a stream, which is read forward" if streams else "the recipe makes its data itself"
            )
            raise UsageError(f"--run.bad-numbers rewind leaves samples out, and {what}: take skip, or stop")

    def _say_caveats(self, loaders: Mapping[str, Loader[Any]]) -> None:
        for name, loader in loaders.items():
            for caveat in loader.stream.caveats() if loader.stream is not None else ():
                self.print(f"launcher: stream {name!r}: {caveat}")

    def _tracker(self) -> Callable[[Mapping[str, float], int], None]:
        """Accelerate's trackers, one run of theirs for all starts of this one."""
        from accelerate.utils import ProjectConfiguration

        name = self.dir.name
        project = re.sub(r"-\d{4}-\d{4}-[a-z2-9]{3}$", "", name)  # what a fresh run directory adds to its name
        goes_on = {"id": self._rundir.identity(), "name": name, "resume": "allow"}
        self._accelerator.project_configuration = ProjectConfiguration(logging_dir=str(self.dir / "trackers"))
        self._accelerator.log_with = list(self.config.tracker)
        self._accelerator.init_trackers(project, init_kwargs={"wandb": goes_on})
        return lambda values, step: self._accelerator.log(dict(values), step=step)

    def _before_steps(self, what: str, name: str, taken: Mapping[str, Any]) -> None:
        if self._loop is not None:
            raise RecipeError(f"{what} after run.steps: what a checkpoint holds must be known before the first step")
        if name in taken:
            raise RecipeError(f"{what}: the name is taken")
