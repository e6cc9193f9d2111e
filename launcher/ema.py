"""An exponential moving average of a model's weights, right under sharding and in checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from launcher.parallel import plain_name, reshard
from launcher.sharded import local

if TYPE_CHECKING:
    from launcher.run import Run

__all__ = ["EMA"]


class EMA:
    """Averages the trainable weights of `model`, which `run.build` made; saved and restored with the run.

    Call `update` after `optimizer.step()`. Each rank averages what it holds, so a sharded model costs a shard.
    """

    def __init__(self, run: Run, model: nn.Module, decay: float = 0.999, name: str = "ema") -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"an EMA's decay lies in [0, 1), not {decay}")
        self._decay, self._model = decay, model
        self._parameters = {plain_name(key): p for key, p in model.named_parameters() if p.requires_grad}
        self._average = {key: parameter.detach().clone() for key, parameter in self._parameters.items()}
        run.track(self, name)

    @torch.no_grad()
    def update(self) -> None:
        """average = decay * average + (1 - decay) * weights."""
        average, weights = self._pairs()
        torch._foreach_lerp_(average, weights, 1 - self._decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model has the averaged weights in here, and its own again afterwards, also after an exception."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages by parameter name."""
        return dict(self._average)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take the averages over, in place.

        Raises:
            ValueError: they are not of this model.
        """
        if state.keys() != self._average.keys():
            raise ValueError(f"it is of other weights: {', '.join(sorted(state.keys() ^ self._average.keys()))}")
        for key, average in self._average.items():
            if (state[key].shape, state[key].dtype) != (average.shape, average.dtype):
                raise ValueError(f"{key} is {state[key].dtype} {list(state[key].shape)}")
            average.copy_(state[key])

    @torch.no_grad()
    def _swap(self) -> None:
        reshard(self._model)
        average, weights = self._pairs()
        kept = [weight.clone() for weight in weights]
        torch._foreach_copy_(weights, average)
        torch._foreach_copy_(average, kept)

    def _pairs(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What this rank holds of the averages and of the weights."""
        weights = [local(self._parameters[key].detach()) for key in self._average]
        return [local(average) for average in self._average.values()], weights
