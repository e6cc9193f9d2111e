"""Exact means over a whole dataset, whatever the number of ranks and the size of the last batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from launcher.data import Feed, Loader
from launcher.errors import RecipeError
from launcher.order import Plan
from launcher.parallel import broadcast_buffers, reshard
from launcher.seeds import kept_generators, seed_microbatch, step_state

if TYPE_CHECKING:
    from launcher.run import Run

__all__ = ["average", "evaluating"]

CHECK_EVERY = 16  # micro-batches between two agreements on stopping


def average(run: Run, score: Callable[[Any], Mapping[str, tuple[Any, Any]]], data: Loader[Any]) -> dict[str, float]:
    """What `Run.average` promises.

    Every rank runs as many forward passes, because a sharded model's are collective; what only pads is not counted.
    """
    if data.stream is not None:
        raise RecipeError("run.average needs a dataset with a length: a stream's end differs between ranks")
    world = run.world
    plan = Plan(len(data), data.microbatch_size, end=len(data))
    slots = plan.share(0, world.rank, world.world_size)
    sums: dict[str, float | torch.Tensor] = {}
    counts: dict[str, float | torch.Tensor] = {}
    with evaluating(run), kept_generators(run.device):  # what the body draws next is its step's
        feed = Feed(data, slots, world)
        for k in range(len(slots)):
            if k % CHECK_EVERY == 0:
                run.check_stop()
            run.pulse.beats += 1
            fetched = feed.take(0)
            seed_microbatch(step_state(run.seed, -2), fetched.slot.start, run.device)
            for name, (total, count) in score(fetched.batch).items():
                sums[name] = sums.get(name, 0.0) + (0.0 if fetched.slot.padding else _double(total))
                counts[name] = counts.get(name, 0.0) + (0.0 if fetched.slot.padding else _double(count))
    names = sorted({name for seen in world.gather(sorted(sums)) for name in seen})  # a rank may not have seen them all
    totals = world.sum(*(float(part.get(name, 0.0)) for part in (sums, counts) for name in names))
    return {name: totals[k] / (totals[len(names) + k] or math.nan) for k, name in enumerate(names)}


def _double(value: float | torch.Tensor) -> float | torch.Tensor:
    """Summed in double, on the device where it is: fp32 loses counts from 2**24 on."""
    return value.detach().double() if isinstance(value, torch.Tensor) else value


@contextmanager
def evaluating(run: Run) -> Iterator[None]:
    """Evaluation mode, without gradients, with rank 0's buffers on every rank; training modes restored afterwards."""
    models: list[nn.Module] = list(run.models.values())
    training = {module: module.training for model in models for module in model.modules()}
    broadcast_buffers(models, run.world)
    # without gradients torch takes each block's call for a new step, whose CUDA graph may overwrite the last one's
    eager = run.config.cuda_graphs and run.config.compile_scope == "block" and run.device.type == "cuda"
    try:
        for model in models:
            model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if eager else nullcontext():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for model in models:
            reshard(model)
