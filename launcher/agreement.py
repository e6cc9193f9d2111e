"""What all ranks must know of each other at a step's edge, in one tiny reduction hidden behind the last backward.

It has a host group to itself: ranks may issue it in another order than the gradients' collectives, and a stop flag
must not wait for a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from launcher.errors import RecipeError
from launcher.world import World

__all__ = ["Agreement", "Ballot"]


class Ballot(NamedTuple):
    """What a rank brings; after the reduction, the sum over ranks. Flags are 0 or 1."""

    stop: float = 0
    """A signal was seen."""
    exhausted: float = 0
    """The data ends before the next step."""
    finish: float = 0
    """The recipe asked to end here."""
    loss: float = 0
    """The sum of the finished step's losses, where its metrics line wants it, and their count if it came with them."""
    loss_count: float = 0
    left: float = 0
    """This rank's recipe has left its loop by itself."""
    writing: float = 0
    """A checkpoint is being written."""
    broken: float = 0
    """The thread that writes them has ended."""
    counts: tuple[float, ...] = ()
    """What the next step's losses are divided by, for each loader that counts."""


class Agreement:
    """One reduction in flight at a time: `issue`, then `result`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._ballot = Ballot()
        self._votes = torch.zeros(0)
        self._work: dist.Work | None = None
        self.pending = False

    def issue(self, ballot: Ballot) -> None:
        """Send this rank's ballot; returns at once."""
        self._ballot, self.pending = ballot, True
        if self._world.group is not None:
            values = (
                ballot.stop,
                ballot.exhausted,
                ballot.finish,
                ballot.loss,
                ballot.loss_count,
                ballot.left,
                ballot.writing,
                ballot.broken,
                *ballot.counts,
            )
            self._votes = torch.tensor(values, dtype=torch.float64)  # exact for counts up to 2**53
            self._work = dist.all_reduce(self._votes, group=self._world.group, async_op=True)

    def result(self) -> Ballot:
        """Wait for every rank's ballot and return their sum."""
        self.pending = False
        if self._work is None:
            return self._ballot
        self._work.wait()
        self._work = None
        stop, exhausted, finish, loss, loss_count, left, writing, broken, *counts = self._votes.tolist()
        if 0 < left < self._world.world_size:
            raise RecipeError(
                f"{left:.0f} of {self._world.world_size} ranks left the loop over the steps alone: break where all "
                "ranks do (on run.mean of a value), or call run.finish"
            )
        return Ballot(stop, exhausted, finish, loss, loss_count, left, writing, broken, tuple(counts))

    def reduce(self, ballot: Ballot) -> Ballot:
        """`issue` and `result` in one, where nothing can hide the wait."""
        self.issue(ballot)
        return self.result()
