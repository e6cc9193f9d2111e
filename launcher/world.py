"""The processes of a run: who is here, on which device, and small exchanges between hosts.

Exchanges of Python values go over a gloo group of their own, never over the group that carries gradients:
two threads of a rank, or two ranks that issue in another order, would deadlock or crash on a shared one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

__all__ = ["World"]

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One rank's view of all ranks; `group` is the host-side gloo group (None in a single process)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that speaks and writes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's `value` (picklable between our own processes), in rank order, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's `value` on every rank."""
        if self.group is None:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]  # type: ignore[no-any-return]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.group is not None:
            dist.barrier(group=self.group)


def env_int(name: str, default: int) -> int:
    """An integer from the environment, as torchrun, Accelerate and our SLURM jobs set them."""
    return int(os.environ.get(name, default))
