"""One optimizer step, as the recipe's loop body sees it: its micro-batches, its backward, its clipping."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from launcher.data import Fetched
from launcher.errors import RecipeError
from launcher.examine import Examination, Finding
from launcher.optim import Optimizer, clip_gradients
from launcher.order import Slot
from launcher.seeds import seed_microbatch, step_state

if TYPE_CHECKING:
    from launcher.loop import Loop

__all__ = ["Step"]


class Step:
    """Step `index` of a run: iterate it for its micro-batches, on the device, gradients reduced on the last one."""

    local_count = 0
    """The count of the current micro-batch on this rank: 0 for a micro-batch that only pads."""
    loss_sum: torch.Tensor | None = None
    """This rank's sum of losses in the first pass; `loss_count` is its count, where it came with them."""
    loss_count: float | None = None

    taken = 0
    """Micro-batches of this step that were taken from the data."""

    _current: Fetched | None = None
    _last = False
    _passes = 0
    _backwards = 0
    _examination: Examination | None = None
    _split_count = 0.0
    _synced = False  # whether this pass had its synchronised backward
    _told: bool | None = None  # whether the losses of this pass bring their counts
    _late: float | None = None  # the counts that came with them, on this rank
    _late_total: float | None = None  # and on all ranks

    def __init__(self, loop: Loop, index: int) -> None:
        self.index = index
        """Completed optimizer steps so far; the weights have seen this many updates."""
        self._loop = loop
        self._kept: list[tuple[Fetched, ...]] = []
        self._doubts: list[tuple[int, Slot, torch.Tensor]] = []  # losses that are, or on a GPU may be, not finite
        for optimizer in loop.run.optimizers:
            optimizer.begin(self.factor, self.judge)
        self._seed = step_state(loop.run.seed, index)
        # what a body draws before its micro-batches; data that it generates is each rank's own
        seed_microbatch(self._seed, -1 if loop.feeds else loop.world.rank, loop.world.device)

    @property
    def count(self) -> float:
        """What this step's losses are divided by: samples, or what the loader counts, over all ranks."""
        return self._count_of(None)

    @property
    def total(self) -> int:
        """The steps of the whole run, for a schedule; with `epochs=` those that end the data.

        Raises:
            RecipeError: nobody knows, because a stream's end decides.
        """
        total = self._loop.total(self.index)
        if total is None:
            raise RecipeError("step.total: run.steps was given no total=, and a stream's end is not known")
        return total

    def every(self, steps: int) -> bool:
        """Whether this step's index is a multiple of `steps` (0: never); what it logs is then always written."""
        due = steps > 0 and self.index % steps == 0 and self._examination is None
        if due:
            self._loop.metrics.mark(self.index + bool(self._passes))
        return due

    def log(self, **values: float | torch.Tensor) -> None:
        """Add to the metrics line of this step; rank 0's values count (`run.mean(x)` for the ranks' mean).

        Before the first micro-batch that is the line of the weights as they are, after it the line of this update.
        Lines are written every `--run.log-every` steps, and where `every` was true. Tensors are read a step late.
        """
        self._loop.metrics.add(self.index + bool(self._passes), values)

    def __iter__(self) -> Iterator[Any]:
        """The micro-batches of this step on this rank; with several loaders a dict of them.

        Raises:
            RecipeError: there is no loader.
        """
        if not self._loop.feeds:
            raise RecipeError("run.steps() was given no loader: use `for batch in step.split(batch, microbatch_size)`")
        loop = self._loop
        number = loop.microbatches(self.index)
        again = self._again() if self._passes or self._examination is not None else None
        self._begin_pass()
        for k in range(number):
            entry = self._take() if again is None else again[k]
            self._enter(entry[0], last=k == number - 1)
            if loop.single:
                yield entry[0].batch
            else:
                yield {name: fetched.batch for name, fetched in zip(loop.feeds, entry, strict=True)}
            self._current = None

    def split(self, batch: Any, microbatch_size: int) -> Iterator[Any]:
        """Micro-batches of data that this rank made itself: a tensor, or a tuple or dict of equally long ones.

        Ranks may bring batches of different length; the loss is divided by the sum of them.

        Shapes: `batch` [n, ...] gives pieces of [<= microbatch_size, ...].
        """
        length = _length(batch)
        if not length:
            raise RecipeError("step.split() got an empty batch: every rank needs at least one sample")
        world = self._loop.world
        lengths = world.gather(length)
        self._split_count = float(sum(lengths))
        number = -(-max(lengths) // microbatch_size)
        self._begin_pass()
        for k in range(number):
            start = k * microbatch_size if k * microbatch_size < length else 0
            stop = min(start + microbatch_size, length)
            slot = Slot(
                self.index, k * world.world_size + world.rank, start, stop, padding=k * microbatch_size >= length
            )
            piece = _slice(batch, start, stop)
            self._enter(Fetched(slot, piece, None, 0 if slot.padding else stop - start), last=k == number - 1)
            yield piece
            self._current = None

    def backward(self, loss: torch.Tensor, count: float | torch.Tensor | None = None, *, of: str | None = None) -> None:
        """Add the gradient of `loss` to the step's: `loss` is the SUM over this micro-batch, in fp32.

        It is divided by the step's global count. With `count`, this micro-batch's own (an int; a tensor on a GPU makes
        the host wait), gradients are divided once, by the sum of all counts, before they are clipped or applied. With
        several loaders `of` names the one whose count divides.

        Raises:
            RecipeError: no scalar, half precision, or outside of the step's micro-batches.
        """
        current = self._current
        if current is None:
            raise RecipeError("step.backward() outside of the loop over the step's micro-batches")
        _check_loss(loss)
        padding, value = current.slot.padding, loss.detach()
        scale = self._scale(padding, count, of)
        if self._passes == 1 and not padding and of in (None, self._loop.first):
            self._add_loss(value)
        if self._last and not self._loop.agreement.pending:
            self._loop.issue(self.index)
        gradient = self._loop.constant(scale, value)  # cheaper than a multiplication, which autograd would record too
        gradient = self._doubted(value, gradient) if scale else gradient
        scaler = self._loop.run.scaler
        loss.backward(gradient if scaler is None else scaler.scale(gradient))
        if not self._last:
            self._loop.keep_gradients()
        self._synced = self._synced or self._last
        self._backwards += 1
        if self._last and self._examination is not None:
            self._examination.gradients()

    def clip(self, max_norm: float, model: nn.Module | None = None) -> torch.Tensor:
        """Scale the gradients (of one model, or of all) to a 2-norm of at most `max_norm`; returns the norm before.

        The norm is a 0-d tensor on the device: reading it makes the host wait, logging it does not.

        Raises:
            RecipeError: `max_norm` is no norm to clip to; infinity only measures.
        """
        if not max_norm > 0:
            raise RecipeError(f"step.clip({max_norm}): give a norm above 0, or infinity to measure without clipping")
        chosen = None if model is None else {id(parameter) for parameter in model.parameters()}
        parameters: list[nn.Parameter] = []
        clipped: list[Optimizer] = []
        for optimizer in self._loop.run.optimizers:
            everything = optimizer.parameters()
            mine = everything if chosen is None else [p for p in everything if id(p) in chosen]
            if not optimizer.spent and any(parameter.grad is not None for parameter in mine):
                optimizer.finish_gradients()
                parameters += mine
                clipped += [optimizer] if len(mine) == len(everything) else []
        norm = clip_gradients(parameters, max_norm)
        for optimizer in clipped:
            optimizer.norm = norm
        return norm

    def factor(self) -> float | None:
        """What the gradients must still be multiplied with before they are applied; None: skip the update."""
        if not self._synced:
            raise RecipeError(
                f"step {self.index}: optimizer.step() or step.clip() before the last micro-batch's backward, when the "
                "gradients are not whole: call it after the loop over the step's micro-batches"
            )
        if self._late is None:
            return None if self.count == 0 else 1.0
        if self._late_total is None:
            [self._late_total] = self._loop.world.sum(self._late)
        return self._prescale() / self._late_total if self._late_total else None

    def judge(self) -> bool | torch.Tensor:
        """Whether the gradients may be applied, or a flag on the device: see `Guard.judge`."""
        return self._loop.run.numbers.judge(self)

    @property
    def progress(self) -> tuple[int, int]:
        """How far the body has come: passes begun, backwards made."""
        return self._passes, self._backwards

    def bad_losses(self) -> list[Finding]:
        """The losses on this rank that are not finite; makes the host wait."""
        found = []
        for iteration, slot, loss in self._doubts:
            if not math.isfinite(value := loss.item()):
                what = "the loss is not finite" if loss.is_cuda else f"the loss is {value}"
                found.append(Finding(False, iteration, slot.microbatch, self._loop.world.rank, what, slot))
        return found

    def examine(self, examination: Examination, kept: list[tuple[Fetched, ...]]) -> None:
        """Look into this step, which runs once more on the micro-batches that it had; nothing may stop it midway."""
        self._examination, self._kept = examination, kept
        self.taken = 1

    @property
    def kept(self) -> list[tuple[Fetched, ...]]:
        """The micro-batches taken so far, where the loop keeps them."""
        return self._kept

    def _doubted(self, loss: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient that a loss is to begin with: NaN for one that is not finite, so that all ranks get to know.

        Shapes: both 0-d. On a GPU that is for the GPU to see.
        """
        assert self._current is not None
        place = (self._passes - 1, self._current.slot)
        if self._examination is not None:
            self._examination.loss(loss)
        if loss.is_cuda:
            doubt = loss - loss
            self._doubts.append((*place, doubt))
            return gradient + doubt
        if math.isfinite(loss.item()):
            return gradient
        self._doubts.append((*place, loss))
        return gradient * torch.nan

    def _count_of(self, name: str | None) -> float:
        return self._loop.counts[name or self._loop.first] if self._loop.feeds else self._split_count

    def _prescale(self) -> float:
        """A constant that keeps gradients near their final size until a late count is known."""
        return float(self._loop.batch_size or 1)

    def _scale(self, padding: bool, count: float | torch.Tensor | None, of: str | None) -> float:
        """The weight of this micro-batch's loss; DDP and FSDP2 average over ranks, so the world size undoes that."""
        if of is not None and of not in self._loop.feeds:
            raise RecipeError(f"step.backward(of={of!r}): the loaders are {', '.join(map(repr, self._loop.feeds))}")
        total = self._count_of(of)
        if self._told not in (None, count is not None):
            raise RecipeError("step.backward() with a count and without one in the same step: give it always or never")
        self._told = count is not None
        if count is not None:
            count = 0.0 if padding else float(count)
            self._late = (self._late or 0.0) + count
            if self._passes == 1:
                self.loss_count = self._late
            total = self._prescale()
        return 0.0 if padding or total == 0 else self._loop.world.world_size / total

    def _add_loss(self, loss: torch.Tensor) -> None:
        if self.loss_sum is not None:
            self.loss_sum = self.loss_sum + loss
        else:  # what a CUDA graph returns is overwritten by its next replay
            self.loss_sum = loss.clone() if loss.is_cuda else loss

    def _begin_pass(self) -> None:
        """Go through the micro-batches; a step may be gone through again (a GAN's second player)."""
        self._passes += 1
        self._synced, self._told, self._late, self._late_total = False, None, None, None
        for optimizer in self._loop.run.optimizers:
            optimizer.begin(self.factor, self.judge)

    def _take(self) -> tuple[Fetched, ...]:
        """The next micro-batch of every loader."""
        loop = self._loop
        start = time.perf_counter()
        entry = tuple(feed.take(self.index) for feed in loop.feeds.values())
        loop.metrics.waited += time.perf_counter() - start
        self.taken += 1
        if loop.keep_batches:
            self._kept.append(entry)
        return entry

    def _again(self) -> list[tuple[Fetched, ...]]:
        """The same micro-batches once more: fetched anew the first time, kept at hand in every step after that."""
        if not self._loop.keep_batches and self._examination is None:
            self._loop.keep_batches = True
            self._kept = list(self._loop.refetch(self.index))
        return self._kept

    def _enter(self, fetched: Fetched, *, last: bool) -> None:
        """Make this the current micro-batch; what is drawn in it depends on its place, not on its rank."""
        loop = self._loop
        self._current, self.local_count, self._last = fetched, fetched.local_count, last
        loop.run.pulse.beats += 1
        if self._examination is not None:
            self._examination.enter(self._passes - 1, fetched.slot, fetched.batch)
        loop.sync_gradients(last)
        seed_microbatch(self._seed, fetched.slot.microbatch, loop.world.device, iteration=self._passes - 1)


def _check_loss(loss: torch.Tensor) -> None:
    if loss.dim():
        raise RecipeError(f"step.backward() needs one number, not shape {tuple(loss.shape)}: use reduction='sum'")
    if loss.dtype not in (torch.float32, torch.float64):
        raise RecipeError(f"step.backward() got a sum in {loss.dtype}, which loses counts: sum the loss in fp32")
    if not loss.requires_grad:
        raise RecipeError("step.backward() got a loss without a gradient: detached, or no parameter trains")


def _length(batch: Any) -> int:
    return len(
        next(iter(batch.values())) if isinstance(batch, dict) else batch[0] if isinstance(batch, tuple) else batch
    )


def _slice(batch: Any, start: int, stop: int) -> Any:
    if isinstance(batch, dict):
        return {key: value[start:stop] for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(value[start:stop] for value in batch)
    return batch[start:stop]
