"""Where a number that is not finite comes from: a bad step run once more, with a look at all that its modules make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from launcher.order import Slot
from launcher.parallel import plain_name
from launcher.sharded import local

__all__ = ["Examination", "Finding"]


class Finding(NamedTuple):
    """A number that is not finite, in the order in which those of a step come about."""

    reduced: bool
    """Whether it is of the gradients of all ranks, and no micro-batch's."""
    iteration: int
    """The pass over the step's micro-batches, from 0."""
    microbatch: int
    rank: int
    what: str
    """`the output of model.blocks.2 (Block) is nan`."""
    slot: Slot | None = None
    rows: tuple[int, ...] = ()
    """The samples of the micro-batch that it is of, where they can be told apart."""


class Examination:
    """Looks at the data, the modules, the loss and the gradients of one step, on this rank."""

    def __init__(self, models: Mapping[str, nn.Module], rank: int) -> None:
        self.findings: list[Finding] = []
        """The first of each pass over a micro-batch, and then the first parameter."""
        self._models, self._rank = models, rank
        self._iteration, self._slot = 0, Slot(0, 0, 0, 0)
        self._quiet = True
        self._gradient: torch.Tensor | None = None

    @contextmanager
    def attached(self, *, eager: bool) -> Iterator[None]:
        """The modules are watched in here; `eager`: compiled ones as they were written, or nothing in them is seen."""
        handles = []
        for name, model in self._models.items():
            for key, module in model.named_modules():
                label = f"{'.'.join(filter(None, (name, plain_name(f'{key}.').rstrip('.'))))} ({type(module).__name__})"
                handles.append(module.register_forward_pre_hook(self._entering(label), with_kwargs=True))
                handles.append(module.register_forward_hook(self._leaving(label), with_kwargs=True))
        try:
            with torch.compiler.set_stance("force_eager") if eager else nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def enter(self, iteration: int, slot: Slot, batch: Any) -> None:
        """A micro-batch begins."""
        self._iteration, self._slot, self._quiet, self._gradient = iteration, slot, slot.padding, None
        for tensor in tree_leaves(batch):
            self._see(tensor, "the data itself has {}")

    def loss(self, loss: torch.Tensor) -> None:
        """Its loss is there."""
        self._see(loss, "the loss is {}, of outputs that are finite")

    def gradients(self) -> None:
        """The gradients are whole."""
        for name, model in self._models.items():
            for key, parameter in model.named_parameters():
                if parameter.grad is not None and (said := _said(local(parameter.grad))):
                    what = f"the gradient of {name}.{plain_name(key)} is {said}"
                    self.findings.append(Finding(True, self._iteration, 0, self._rank, what))
                    return

    def _see(self, value: Any, what: str) -> None:
        if self._quiet or not isinstance(value, torch.Tensor) or not (said := _said(value)):
            return
        self._quiet = True
        self._found(what.format(said), value)

    def _found(self, what: str, value: torch.Tensor) -> None:
        slot = self._slot
        rows = _rows(value, slot.stop - slot.start)
        self.findings.append(Finding(False, self._iteration, slot.microbatch, self._rank, what, slot, rows))

    def _entering(self, label: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            for tensor in tree_leaves((args, kwargs)):
                self._watch(tensor, f"the gradient that {label} gives its input is {{}}")

        return hook

    def _leaving(self, label: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            for tensor in tree_leaves(output):
                self._see(tensor, f"the output of {label} is {{}}")
                self._watch(tensor, f"the gradient of the output of {label} is {{}}")

        return hook

    def _watch(self, tensor: Any, what: str) -> None:
        """Look at the gradient that comes back to a tensor. Of one that two modules share, the last to take it tells:
        it is nearer to the loss than the one that made it."""
        if self._quiet or not isinstance(tensor, torch.Tensor) or not tensor.requires_grad:
            return

        def hook(gradient: torch.Tensor) -> None:
            if self._gradient is gradient:
                self.findings.pop()
            elif self._quiet or not _said(gradient):
                return
            self._quiet, self._gradient = True, gradient
            self._found(what.format(_said(gradient)), gradient)

        tensor.register_hook(hook)


def _said(value: torch.Tensor) -> str:
    """`nan` or `inf`, if a tensor has one."""
    if not (value.is_floating_point() or value.is_complex()) or bool(value.isfinite().all()):
        return ""
    return "nan" if bool(value.isnan().any()) else "inf"


def _rows(value: torch.Tensor, samples: int) -> tuple[int, ...]:
    """Which of a micro-batch's samples a tensor's bad rows are of, where it has a row a sample and some are good."""
    if value.dim() < 1 or value.shape[0] != samples:
        return ()
    bad = (~value.detach().isfinite()).reshape(samples, -1).any(1).nonzero().flatten().tolist()
    return tuple(bad) if len(bad) < samples else ()
