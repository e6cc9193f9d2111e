"""The recipe's optimizer, stepped only on gradients that are whole: synchronised, unscaled, normalised."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from launcher.errors import RecipeError
from launcher.parallel import Replica
from launcher.sharded import is_sharded, local, whole

__all__ = ["Optimizer", "clip_gradients", "update_scaler"]


class Optimizer:
    """A torch optimizer that refuses to step on half a gradient, and skips what must be skipped.

    `inner` is the torch optimizer itself (for a torch LR scheduler, say). With fp16 all optimizers of a run share one
    gradient scaler, because one loss may feed several of them; its scale moves once a step, at the step's end.
    """

    def __init__(
        self, inner: torch.optim.Optimizer, models: list[nn.Module], scaler: torch.amp.GradScaler | None
    ) -> None:
        self.inner, self.scaler = inner, scaler
        self.spent = False
        """Whether the gradients of this pass have been applied; a step may be gone through again, and apply more."""
        self.stepped = self.skipped = False
        """Whether this step has called `step`, and whether it was skipped: nothing counted, an fp16 overflow, or bad
        numbers."""
        self.norm: torch.Tensor | None = None
        """The norm of this pass's gradients, or of more, where they were all clipped by it."""
        self.initial_groups = [hyperparameters(group) for group in inner.param_groups]
        self._replicas = [model for model in models if isinstance(model, Replica)]
        self._factor: Callable[[], float | None] = _outside
        self._judge: Callable[[], bool | torch.Tensor] = _trusting
        self._finished = False
        self.sharded = any(is_sharded(parameter) for parameter in self.parameters())
        """Whether each rank holds, and sees, a part of the gradients."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The torch optimizer's parameter groups."""
        return self.inner.param_groups

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter this optimizer updates."""
        return [parameter for group in self.inner.param_groups for parameter in group["params"]]

    def gradients(self) -> list[torch.Tensor]:
        """The gradients that there are."""
        every = [parameter.grad for group in self.inner.param_groups for parameter in group["params"]]
        return [gradient for gradient in every if gradient is not None]

    @property
    def fused(self) -> bool:
        """Whether a flag on the device can keep it from applying anything, as a GradScaler's does."""
        return bool(getattr(self.inner, "_step_supports_amp_scaling", False))

    @property
    def pending(self) -> bool:
        """Whether its gradients, if it has any, are whole and not applied."""
        return not self.spent and all(replica.synced for replica in self._replicas)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        zero_grad = self.inner.zero_grad  # torch's own costs more than it does; any other is somebody's
        if set_to_none and getattr(zero_grad, "__func__", None) is torch.optim.Optimizer.zero_grad:
            for group in self.inner.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        else:
            zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """Update the parameters, or skip the update where nothing was counted, fp16 overflowed or numbers are bad.

        Raises:
            RecipeError: no synchronised backward stands behind the gradients.
        """
        sound = self.finish_gradients() and self._judge()
        self.stepped = self.spent = True
        self.skipped = sound is False
        if sound is False:
            return
        if self.scaler is not None:
            self.scaler.step(self.inner)
            # a fused optimizer is called all the same, and skips in its kernel
            found = self.scaler._per_optimizer_states[id(self.inner)]["found_inf_per_device"]
            self.skipped = any(flag.item() for flag in found.values())
        elif sound is not True and self.fused:
            self.inner.found_inf = sound  # type: ignore[attr-defined]  # what its kernel is to look at
            try:
                self.inner.step()
            finally:
                del self.inner.found_inf  # type: ignore[attr-defined]
        else:
            self.inner.step()

    def begin(self, factor: Callable[[], float | None], judge: Callable[[], bool | torch.Tensor]) -> None:
        """Begin a pass over a step's micro-batches.

        Args:
            factor: what its gradients must be multiplied with at the end, None where there is nothing to apply.
            judge: whether they may be applied, once they are whole; or a flag on the device, 1.0 where not.
        """
        self._factor, self._judge, self._finished, self.norm = factor, judge, False, None
        self.spent = False
        for replica in self._replicas:
            replica.synced = False

    def finish_gradients(self) -> bool:
        """Unscale and normalise the gradients, once; False where there is nothing to apply."""
        factor, gradients = self._factor(), self.gradients()
        if factor is None or not gradients:
            return False
        if not self._finished:
            self._check_synced()
            if self.scaler is not None:
                self.scaler.unscale_(self.inner)
                self._agree_on_overflow(self.scaler)
            if factor != 1.0:
                torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
            self._finished = True
        return True

    def _check_synced(self) -> None:
        for replica in self._replicas:
            if not replica.synced:
                raise RecipeError(
                    f"{type(replica.module).__name__} was trained without a forward pass through it: call model(...), "
                    "not one of its methods or parts, or the ranks' gradients differ"
                )

    def _agree_on_overflow(self, scaler: torch.amp.GradScaler) -> None:
        """A shard sees only its own overflow; all ranks must skip, or none."""
        if self.sharded:
            for found in scaler._per_optimizer_states[id(self.inner)]["found_inf_per_device"].values():
                dist.all_reduce(local(found), op=dist.ReduceOp.MAX)


def update_scaler(scaler: torch.amp.GradScaler, *, moves: bool = True) -> None:
    """Move the scale, at a step's end, by what the gradients were found to be; none may have been looked at.

    Without `moves` it stays: what was found is not for the scale to mend.

    The scaler's own `update` wants every optimizer unscaled and stepped; a step may have skipped one after clipping.
    """
    states = scaler._per_optimizer_states
    if moves and any(state["found_inf_per_device"] for state in states.values()):
        scaler.update()
    states.clear()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale gradients so that their total 2-norm is at most `max_norm`; returns the norm before, a 0-d tensor."""
    return whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm))


def hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters."""
    return {key: value for key, value in group.items() if key != "params"}


def _trusting() -> bool:
    return True


def _outside() -> float | None:
    raise RecipeError("optimizer.step() outside of a step: it belongs in the body of `for step in run.steps(...)`")
