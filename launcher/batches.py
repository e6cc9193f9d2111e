"""How the data of a run's loaders becomes its steps, and what cannot: refused before anything has been started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.data import Loader
from launcher.errors import UsageError
from launcher.order import Plan

__all__ = ["check_batch", "plan_steps"]


def plan_steps(
    loaders: Mapping[str, Loader[Any]], world_size: int, *, total: int | None, epochs: int | None
) -> dict[str, Plan]:
    """How each loader's data becomes steps on this world, from the start of the run.

    Raises:
        UsageError: the length of the run is not clear, or a batch cannot be dealt out to these ranks.
    """
    if total is not None and epochs is not None:
        raise UsageError("run.steps takes total= or epochs=, not both")
    if total is None and epochs is None and not any(loader.stream for loader in loaders.values()):
        raise UsageError("run.steps needs total= (steps) or epochs=")
    if epochs is not None and (len(loaders) != 1 or any(loader.stream for loader in loaders.values())):
        raise UsageError("epochs= needs one loader of a dataset with a length")
    plans = {}
    for name, loader in loaders.items():
        check_batch(loader.batch_size, loader.microbatch_size, world_size, stream=loader.stream is not None)
        end = None if epochs is None else epochs * len(loader)
        plans[name] = Plan(loader.batch_size, loader.microbatch_size, end)
    numbers = {name: -(-plan.batch_size // plan.microbatch_size) for name, plan in plans.items()}
    if len(set(numbers.values())) > 1:
        raise UsageError(f"the loaders of one step need as many micro-batches each, not {numbers}")
    return plans


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
