"""A run that trains as any other and writes down what it does, for `launcher check` to compare."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.numpy import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from launcher.check.digest import digest
from launcher.check.leftover import Leftovers
from launcher.check.settings import Kill, Settings
from launcher.check.trace import Writer
from launcher.data import Fetched, Loader
from launcher.optim import Optimizer, hyperparameters
from launcher.parallel import Blocks, plain_name
from launcher.run import Run
from launcher.sharded import local, whole
from launcher.state import parameter_names
from launcher.step import Step

if TYPE_CHECKING:
    from launcher.loop import Loop

__all__ = ["TracedRun"]

FEW = 8  # samples of an evaluation: that it runs, and alike, is to be seen, not how good the model is
PATIENCE = 30.0  # seconds for a checkpoint to become whole
RATE = 0.01  # of a descent's first step: the gradients' norm becomes this part of the weights'


class TracedStep(Step):
    """A step that writes down its micro-batches and their losses."""

    def __init__(self, loop: Loop, index: int) -> None:
        super().__init__(loop, index)
        assert isinstance(loop.run, TracedRun)
        self._run = loop.run
        self._backwards = 0
        self._dropped = False

    def split(self, batch: Any, microbatch_size: int) -> Iterator[Any]:
        """Pieces of the size that the check asks for."""
        asked = self._run.asked
        length = len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0] if _is_tuple(batch) else batch)
        parts = -(-asked.batch_size // asked.microbatch_size)
        return super().split(batch, min(microbatch_size, length) if parts > 1 else length)

    def backward(self, loss: torch.Tensor, count: float | torch.Tensor | None = None, *, of: str | None = None) -> None:
        """`Step.backward`, with the loss written down."""
        if self._dropped:
            self._run.trace.write("dropped", step=self.index)
        drawn = not torch.equal(self._seeded, _generator(self._run.device))
        super().backward(loss, count, of=of)
        self._backwards += 1
        self._run.trace.write("loss", step=self.index, loss=float(loss.detach()), drawn=drawn)

    def zeroed(self) -> None:
        """Gradients are dropped: of a pass that goes on, that is a mistake."""
        self._dropped = self._backwards > 0

    def _begin_pass(self) -> None:
        super()._begin_pass()
        self._backwards, self._dropped = 0, False

    def _take(self) -> tuple[Fetched, ...]:
        entry = super()._take()
        for name, fetched in zip(self._loop.feeds, entry, strict=True):
            self._run.saw(name, self.index, fetched)
            if self._run.asked.double:
                fetched.batch = _doubled(fetched.batch)
        return entry

    def _again(self) -> list[tuple[Fetched, ...]]:
        kept = super()._again()
        for fetched in (one for entry in kept for one in entry if self._run.asked.double):
            fetched.batch = _doubled(fetched.batch)
        return kept

    def _enter(self, fetched: Fetched, *, last: bool) -> None:
        if not self._loop.feeds:
            self._run.saw("split", self.index, fetched)
        self._run.come_to(self.index, "microbatch")
        super()._enter(fetched, last=last)
        self._seeded = _generator(self._run.device)


class TracedRun(Run):
    """A run whose steps are few and small, and written down."""

    step_type = TracedStep

    def __init__(self, asked: Settings, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked = asked
        self.trace = Writer(asked.out, self._attempt, self.rank)
        self._used: set[str] = set()
        self._microbatches = 0
        self._first: dict[tuple[str, int], str] = {}
        """Digests of the first step's micro-batches, by loader and number."""
        self._measured: set[int] = set()
        """The optimizers whose first gradients have been written down."""
        self._edge = time.monotonic()
        self._dying: threading.Thread | None = None

    def build(
        self,
        make: Callable[[], Any],
        *,
        frozen: bool = False,
        name: str | None = None,
        blocks: Blocks = None,
        find_unused_parameters: bool = False,
    ) -> Any:
        """`Run.build`, with the weights written down as they were made."""
        before = set(self.models)

        def made() -> nn.Module:
            model: nn.Module = make()
            self._made(model, name or (f"model_{self._builds}" if self._builds else "model"), find_unused_parameters)
            return model.double() if self.asked.double else model

        model = super().build(
            made,
            frozen=frozen,
            name=name,
            blocks=blocks,
            find_unused_parameters=find_unused_parameters or self.asked.unused,
        )
        for key in set(self.models) - before:
            for full, parameter in self._parameters(key).items():
                if self.asked.unused:
                    parameter.register_post_accumulate_grad_hook(lambda _, full=full: self._used.add(full))
        return model

    def optimizer(self, inner: torch.optim.Optimizer) -> Optimizer:
        """`Run.optimizer`, of plain gradient descent where the check asks for that."""
        number = len(self.optimizers)
        if self.asked.descent and not isinstance(inner, torch.optim.LBFGS):  # which is refused
            inner = Descent(inner, dict(self.asked.rates).get(number))
        optimizer = super().optimizer(inner)
        names = parameter_names(self.models)  # as they are now: FSDP2 puts others in their place in a step
        inner.register_step_pre_hook(lambda *_: self._updating(optimizer, number, names))
        self._watch_zeroing(inner)
        return optimizer

    def steps(
        self,
        data: Loader[Any] | Mapping[str, Loader[Any]] | None = None,
        *,
        total: int | None = None,
        epochs: int | None = None,
        flops: float | None = None,
    ) -> Iterator[Step]:
        """`Run.steps`, as few and as small as the check asks for."""
        loaders = dict(data) if isinstance(data, Mapping) else {} if data is None else {data.name: data}
        streamed = any(loader.stream is not None for loader in loaders.values())
        sizes = self.asked.even if streamed else (self.asked.batch_size, self.asked.microbatch_size)
        for loader in loaders.values():
            loader.batch_size, loader.microbatch_size = sizes
            if loader.stream is not None:
                loader.stream.size = loader.microbatch_size
        self._loaders = loaders
        steps = super().steps(data, total=self.asked.steps, flops=flops)
        sizes_of = {name: loader.size for name, loader in loaders.items()}
        self.trace.write("steps", loaders=sizes_of, start=self.completed)
        return self._watched(steps)

    def average(self, score: Callable[[Any], Mapping[str, tuple[Any, Any]]], data: Loader[Any]) -> dict[str, float]:
        """`Run.average` over a few samples, never compiled: another mode and shape would be compiled for it."""

        def scored(batch: Any) -> Mapping[str, tuple[Any, Any]]:
            return score(_doubled(batch) if self.asked.double else batch)

        with _eager(self.config.compile):
            return super().average(scored, data.head(FEW))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """`Run.evaluating`, not compiled."""
        with _eager(self.config.compile), super().evaluating():
            yield

    def end_step(self, index: int) -> None:
        """`Run.end_step`, with the learning rates that it was made with."""
        groups = [[_numbers(group) for group in optimizer.param_groups] for optimizer in self.optimizers]
        super().end_step(index)
        now = time.monotonic()
        unused = sorted(self._all_parameters() - self._used)
        self.trace.write("step", step=index, groups=groups, unused=unused, seconds=now - self._edge)
        if self.asked.unused:  # an evaluation gives all ranks those of rank 0
            self.trace.write("buffers", step=index, buffers=self._buffers())
        self._edge = now
        self._used.clear()
        if not index:
            self.trace.write("coupled", names=self._coupled())
        self.come_to(self.completed, "edge")

    def returned(self) -> None:
        """`Run.returned`, with how much was read."""
        super().returned()
        if self._dying is not None:
            self._dying.join()  # however late it is: a kill that was begun comes
        if self.asked.state:
            self._read_again()
        self.trace.write("end", microbatches=self._microbatches)

    def close(self) -> None:
        """`Run.close`, and of what is written down."""
        super().close()
        self.trace.close()

    def _read_again(self) -> None:
        """Read the first step's micro-batches once more: a sample is to be the same each time."""
        if self._loop is None or any(loader.stream is not None for loader in self._loaders.values()):
            return
        for entry in self._loop.refetch(0) if self._loaders and self._first else ():
            for name, fetched in zip(self._loaders, entry, strict=True):
                before = self._first.get((name, fetched.slot.microbatch))
                if before not in (None, digest(fetched.batch)):
                    self.trace.write("changed", loader=name, microbatch=fetched.slot.microbatch)

    def saw(self, loader: str, step: int, fetched: Fetched) -> None:
        """A micro-batch is at hand."""
        slot, source = fetched.slot, self._loaders.get(loader)
        order = None if source is None else source.order
        self._microbatches += 1
        content = digest(fetched.batch)
        if not step:
            self._first[loader, slot.microbatch] = content
        self.trace.write(
            "batch",
            loader=loader,
            step=step,
            microbatch=slot.microbatch,
            ids=[] if order is None else order.samples(slot.start, slot.stop).tolist(),
            digest=content,
            padding=slot.padding,
        )

    def come_to(self, step: int, place: str) -> None:
        """Kill this process from here on, if it is to be."""
        kill: Kill | None = self.asked.kill
        if kill is None or (kill.step, kill.place) != (step, place) or kill.rank not in (None, self.rank):
            return
        if kill.saved:
            self._wait_for_checkpoint()
        self._dying = threading.Thread(target=self._die, args=(kill.seconds,), daemon=True)
        self._dying.start()

    def _wait_for_checkpoint(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.saver.store.newest() is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def _die(self, seconds: float) -> None:
        """Wait, then end this process as a lost machine would."""
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    def _watched(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps, with a look at what the recipe holds at each edge."""
        leftovers = Leftovers(self) if self.asked.state and self.is_main else None
        self._used.clear()  # wrapping has sent a gradient through all parameters
        for step in steps:
            if leftovers is not None:
                self.trace.write("held", step=self.completed, found=leftovers.look())
            yield step
        if leftovers is not None:
            self.trace.write("held", step=self.completed, found=leftovers.look())

    def _made(self, model: nn.Module, name: str, unused: bool) -> None:
        self.trace.write(
            "build",
            name=name,
            unused=unused,
            weights={key: digest(parameter) for key, parameter in model.named_parameters()},
            eps=max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0),
            buffers={key: digest(buffer) for key, buffer in model.named_buffers()},
        )
        for module in model.modules():
            if self.asked.descent and isinstance(module, nn.RNNBase):
                module.dropout = 0.0  # which draws in its own kernel
        if self.asked.modules:
            for key, module in model.named_modules():
                module.register_forward_hook(
                    lambda module, _, output, key=key: self.trace.write(
                        "module", name=key, type=type(module).__name__, digest=digest(output)
                    )
                )

    def _watch_zeroing(self, inner: torch.optim.Optimizer) -> None:
        """Hear of `zero_grad`, also of one that is called on the torch optimizer itself."""
        zero_grad = inner.zero_grad

        def zeroing(set_to_none: bool = True) -> None:
            step = None if self._loop is None else self._loop.step
            held = any(p.grad is not None for group in inner.param_groups for p in group["params"])
            if isinstance(step, TracedStep) and held:
                step.zeroed()
            zero_grad(set_to_none=set_to_none)

        setattr(inner, "zero_grad", zeroing)  # noqa: B010 - mypy would have no method assigned to

    def _updating(self, optimizer: Optimizer, number: int, names: Mapping[int, str]) -> None:
        """The gradients are whole, and about to be applied."""
        if self.asked.modules:
            for parameter in optimizer.parameters():
                if parameter.grad is not None:
                    self.trace.write("gradient", name=names[id(parameter)], digest=digest(local(parameter.grad)))
        if not isinstance(optimizer.inner, Descent) or number in self._measured:
            return
        self._measured.add(number)  # its first update: a GAN's second player may begin steps later
        gradients = {names[id(p)]: _array(whole(p.grad)) for p in optimizer.parameters() if p.grad is not None}
        if self.is_main:
            save_file(gradients, Path(self.asked.out) / f"gradients-{number}.safetensors")
        if optimizer.inner.rate is None:
            norms = [torch.stack([tensor.norm() for tensor in tensors]).norm() for tensors in _pairs(optimizer)]
            optimizer.inner.rate = RATE * float(norms[0] / norms[1]) if norms[1] > 0 else 0.0
            self.trace.write("rate", optimizer=number, rate=optimizer.inner.rate)

    def _parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of a model that train, by full name."""
        named = self.models[name].named_parameters()
        return {f"{name}/{plain_name(key)}": parameter for key, parameter in named if parameter.requires_grad}

    def _coupled(self) -> list[str]:
        """The modules that normalise over a micro-batch."""
        return [
            plain_name(f"{key}.").rstrip(".")
            for model in self.models.values()
            for key, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.training and not isinstance(module, nn.SyncBatchNorm)
        ]

    def _buffers(self) -> dict[str, str]:
        return {
            f"{name}/{plain_name(key)}": digest(local(buffer))
            for name, model in self.models.items()
            for key, buffer in model.named_buffers()
        }

    def _all_parameters(self) -> set[str]:
        return {full for name in self.models for full in self._parameters(name)} if self.asked.unused else set()


class Descent(torch.optim.Optimizer):
    """w <- w - rate * gradient, whatever the learning rate says: a constant scale of a gradient shows in the losses."""

    def __init__(self, like: torch.optim.Optimizer, rate: float | None) -> None:
        """`like` has the parameter groups; without a rate it is set at the first step."""
        super().__init__(
            [{**hyperparameters(group), "params": group["params"]} for group in like.param_groups], dict(like.defaults)
        )
        self.rate = rate

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-(self.rate or 0.0))


@contextmanager
def _eager(mode: str | None) -> Iterator[None]:
    """Nothing is compiled in here."""
    if mode in (None, "off"):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _pairs(optimizer: Optimizer) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The weights that have gradients, and those, whole."""
    having = [p for p in optimizer.parameters() if p.grad is not None]
    return [whole(p).detach() for p in having], [whole(p.grad) for p in having if p.grad is not None]


def _doubled(batch: Any) -> Any:
    """A batch with its floating tensors in float64."""
    if isinstance(batch, torch.Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: _doubled(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(_doubled, batch))
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{one.name: _doubled(getattr(batch, one.name)) for one in fields(batch) if one.init})
    if isinstance(batch, list | tuple):
        return type(batch)(map(_doubled, batch))
    return batch


def _array(gradient: torch.Tensor) -> Any:
    """A gradient for numpy, which has no bfloat16 and nothing sparse."""
    gradient = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
    narrow = gradient.dtype in (torch.bfloat16, torch.float16)
    return (gradient.float() if narrow else gradient).cpu().numpy()


def _numbers(group: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that an optimizer was given for a group of parameters: its learning rate, and others."""
    kept = {key: value for key, value in group.items() if isinstance(value, int | float | torch.Tensor)}
    return {key: float(value) for key, value in kept.items()}


def _generator(device: torch.device) -> torch.Tensor:
    """The state of the generator that a forward pass draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _is_tuple(batch: Any) -> bool:
    return isinstance(batch, tuple)
