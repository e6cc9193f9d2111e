"""Bad numbers: a loss or a gradient that is not finite, a loss that leaps; found before they are applied.

A loss that is not finite sends NaN through its own backward. After the reduction the gradients then tell every rank of
any rank's loss, at no cost, and one number decides: the gradients' norm, which clipping has mostly computed. On a CPU
it is looked at before the update. On a GPU that would make the host wait: a flag on the device keeps a fused optimizer
from applying anything, and the host reads it while the next step runs.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from launcher.parallel import plain_name
from launcher.sharded import local

if TYPE_CHECKING:
    from launcher.optim import Optimizer
    from launcher.run import Run
    from launcher.step import Step

__all__ = ["Bad", "Guard"]

WINDOW = 50  # step losses whose median the next is held against
LEAST = 10  # of them before there is a rule


@dataclass(frozen=True)
class Bad:
    """A step whose update must not count, and what is to follow."""

    step: int
    """The steps completed before it."""
    answer: Literal["stop", "skip", "rewind"]
    why: str
    """What is wrong, where no loss says it better."""
    leap: bool
    """Whether that is a finite loss, too large."""
    in_a_row: int
    """How many there have been in a row, with this one."""
    body: Step
    applied: bool
    """Whether the update was made: found too late, by an optimizer that is not fused."""


class Guard:
    """Looks at the numbers of every update of a run, and keeps count of the bad ones."""

    def __init__(self, run: Run) -> None:
        config = run.config
        self._run, self._policy, self._limit, self._factor = (
            run,
            config.bad_numbers,
            config.bad_numbers_limit,
            config.spike,
        )
        self.bad: Bad | None = None
        """What the run must stop for, or go back from, at this edge."""
        self.left_out: Bad | None = None
        """A skipped step that nobody has been told of."""
        self.skipped = 0
        """Updates skipped, over all attempts."""
        self.refused = False
        """Whether an update of this step was refused."""
        self.examining = False
        """Whether a bad step runs once more, to be looked into: it makes no update."""
        self._in_a_row, self._last = 0, -1
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._late: bool | None = None
        self._judged: tuple[int, int] | None = None
        self._verdict: bool | torch.Tensor = True
        self._loss: float | None = None
        self._flag: torch.Tensor | None = None
        self._reading: tuple[Step, torch.Tensor, torch.cuda.Event | None] | None = None
        self._statistics: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    def begin(self) -> None:
        """A body begins."""
        self.refused, self._judged, self._loss = False, None, None
        if self._policy == "skip":
            self._flag = None
            self._keep_statistics()

    def judge(self, step: Step) -> bool | torch.Tensor:
        """Whether the gradients at hand may be applied: all of a pass, or none, and none after one that was refused.

        Where the host does not wait for the answer, it is a flag on the device: 1.0 where they must not be.
        """
        if self.refused or self.examining:
            return False
        if self._judged != step.progress:
            self._judged = step.progress
            self._verdict = self._look(step)
        return self._verdict

    def end(self, step: Step) -> None:
        """A body has ended."""
        if self.examining or self._judged is None:
            return
        if self._flag is not None:
            self._restore_statistics(self._flag)
            self._reading = (step, *_read_back(self._flag))
        elif self.refused:
            self._restore_statistics(None)
        else:
            self._good(step.index)
            if self._loss is not None:
                self._losses.append(self._loss)

    def read(self) -> None:
        """Read the flag of the step before, whose kernels are behind those already queued."""
        if self._reading is None or self.bad is not None:
            return
        step, flag, event = self._reading
        self._reading = None
        if event is not None:
            event.synchronize()
        if flag.item():
            self._note(step, "a gradient is not finite", applied=not _fused(self._run.optimizers))
        else:
            self._good(step.index)

    def forget(self) -> None:
        """Go on behind a bad step that has had its answer."""
        self.bad = self.left_out = self._flag = self._reading = None
        self.refused = False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; empty while there is nothing to keep."""
        kept = {"skipped": self.skipped, "in_a_row": self._in_a_row, "last": self._last, "losses": list(self._losses)}
        return kept if self.skipped or self._in_a_row or self._losses else {}

    def restore(self, state: Mapping[str, Any], *, rewind: bool = False) -> None:
        """Take over what a checkpoint has kept; after a rewind, what was counted since goes on counting."""
        self._losses = deque(state.get("losses", ()), maxlen=WINDOW)
        if not rewind:
            self.skipped, self._in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)
            self._last = state.get("last", -1)

    def _look(self, step: Step) -> bool | torch.Tensor:
        late = self._looks_late()
        norm = soundness([one for one in self._run.optimizers if one.pending], wait=not late)
        if isinstance(norm, torch.Tensor):
            flag = (~torch.isfinite(norm)).to(torch.float32)
            # once bad, nothing is applied until the host knows, or its weights would not be those to look into
            self._flag = flag if self._flag is None else torch.maximum(flag, self._flag)
            return self._flag
        if not math.isfinite(norm):
            if self._run.scaler is not None and self._overflows(step):
                return True  # the scaler skips it
            self._refuse(step, "a gradient is not finite")
        elif self._factor is not None and self._loss is None and (said := self._leaps(step)):
            self._refuse(step, said, leap=True)
        return not self.refused

    def _looks_late(self) -> bool:
        """Whether the host looks a step late: on a GPU, where nothing needs its answer before the update."""
        if self._late is None:
            run = self._run
            waits = self._factor is not None or run.scaler is not None
            unfused = self._policy == "skip" and not _fused(run.optimizers)
            self._late = run.device.type == "cuda" and not waits and not unfused
            if unfused and run.device.type == "cuda":
                run.print(
                    "launcher: --run.bad-numbers skip makes the GPU wait in every step, because an optimizer is not "
                    "fused: give it fused=True"
                )
        return self._late

    def _overflows(self, step: Step) -> bool:
        """Whether fp16's range is to blame, and not a loss: then the scale goes down, as long as it can."""
        scaler = self._run.scaler
        assert scaler is not None
        [bad] = self._run.world.sum(float(bool(step.bad_losses())))
        return not bad and scaler.get_scale() > 1.0

    def _leaps(self, step: Step) -> str:
        """What is wrong with the step's loss, over all ranks; nothing if it is one among the others."""
        if step.loss_sum is None:
            return ""
        total, count = self._run.world.sum(step.loss_sum.item(), step.loss_count or 0.0)
        self._loss = loss = total / ((step.count if step.loss_count is None else count) or 1.0)
        median = statistics.median(self._losses) if len(self._losses) >= LEAST else 0.0
        if self._factor is None or median <= 0 or loss <= self._factor * median:
            return ""
        return f"the loss {loss:.4g} is {loss / median:.3g} times the median of the last {len(self._losses)}"

    def _refuse(self, step: Step, why: str, *, leap: bool = False) -> None:
        self.refused = True
        self._note(step, why, leap=leap)

    def _note(self, step: Step, why: str, *, leap: bool = False, applied: bool = False) -> None:
        self._in_a_row, self._last = self._in_a_row + 1, max(self._last, step.index)
        answer = "stop" if self._in_a_row > self._limit else self._policy
        bad = Bad(step.index, answer, why, leap, self._in_a_row, step, applied)
        if answer == "skip":
            self.skipped += 1
            self.left_out = bad
        else:
            self.bad = bad

    def _good(self, index: int) -> None:
        if index >= self._last:  # after a rewind, those before it are good once more
            self._in_a_row = 0

    def _keep_statistics(self) -> None:
        """BatchNorm has seen what a skipped step was given, and would remember it."""
        if self._statistics is None:
            modules = [module for model in self._run.models.values() for module in model.modules()]
            live = [b for m in modules if isinstance(m, _NormBase) for b in m.buffers(recurse=False)]
            self._statistics = [(buffer, buffer.clone()) for buffer in live]
        for buffer, kept in self._statistics:
            kept.copy_(buffer)

    def _restore_statistics(self, flag: torch.Tensor | None) -> None:
        for buffer, kept in self._statistics or ():
            buffer.copy_(kept if flag is None else torch.where(flag > 0, kept, buffer))


def soundness(optimizers: Sequence[Optimizer], *, wait: bool) -> torch.Tensor | float:
    """A number, alike on all ranks, that is finite if all gradients of some optimizers are.

    With `wait` the host has it; else it is a 0-d tensor on the device.
    """
    norms = {id(one.norm): one.norm for one in optimizers if one.norm is not None}
    gradients: list[torch.Tensor] = []
    sharded = False  # each rank has seen its shards alone
    for one in optimizers:
        if one.norm is None:
            gradients += one.gradients()
            sharded = sharded or one.sharded
    if wait and not sharded and not (gradients and gradients[0].is_cuda):
        return sum([abs(norm.item()) for norm in norms.values()] + [abs(_sum(gradient)) for gradient in gradients])
    parts = [norm.double() for norm in norms.values()]
    if gradients:
        parts.append(_total(gradients, sharded=sharded))
    total = parts[0] if len(parts) == 1 else torch.stack(parts).sum()
    return total.item() if wait else total


def spoiled(models: Mapping[str, nn.Module]) -> str:
    """A buffer that a forward pass has left NaN in, by its full name; "" if there is none."""
    for name, model in models.items():
        for key, buffer in model.named_buffers():
            if buffer.is_floating_point() and bool(local(buffer).isnan().any()):
                return f"{name}/{plain_name(key)}"
    return ""


def check_state(state: Any) -> None:
    """Refuse what `Guard.state` has not made.

    Raises:
        TypeError: it is something else.
    """
    numbers = [] if state is None else [state["skipped"], state["in_a_row"], state["last"]]
    losses = [] if state is None else state["losses"]
    if not all(type(number) is int for number in numbers) or not all(type(loss) is float for loss in losses):
        raise TypeError(f"numbers is {str(state)[:30]}")


def _total(gradients: list[torch.Tensor], *, sharded: bool) -> torch.Tensor:
    """Finite on every rank if all gradients are; on a GPU their norm, which is fewer kernels than sums."""
    if gradients[0].is_cuda:
        total = torch.nn.utils.get_total_norm([_values(gradient) for gradient in gradients]).double()
    else:
        total = torch.tensor(sum([abs(_sum(gradient)) for gradient in gradients]), dtype=torch.float64)
    if sharded:
        flag = (~torch.isfinite(total)).to(torch.float32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        total = torch.where(flag > 0, torch.nan, total)
    return total


def _sum(gradient: torch.Tensor) -> float:
    """Finite if its elements are, on a CPU: a sum costs half of a norm."""
    here = _values(gradient)
    return float(here.sum(dtype=torch.float32) if here.dtype == torch.float16 else here.sum())  # fp16 would overflow


def _values(gradient: torch.Tensor) -> torch.Tensor:
    here = local(gradient) if type(gradient) is not torch.Tensor else gradient
    return here._values() if here.is_sparse else here


def _fused(optimizers: Iterable[Optimizer]) -> bool:
    return all(optimizer.fused for optimizer in optimizers)


def _read_back(flag: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """The flag on its way to the host, behind the work that computes it."""
    if not flag.is_cuda:
        return flag, None
    host = torch.empty((), dtype=flag.dtype, pin_memory=True).copy_(flag, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event
