"""The steps of a run: what happens at a step's edges, so that the body between them is the recipe's alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from launcher.agreement import Agreement, Ballot
from launcher.data import Feed, Fetched, Loader
from launcher.metrics import Metrics
from launcher.order import Plan
from launcher.parallel import set_gradient_sync
from launcher.signals import Stopped
from launcher.step import Step
from launcher.world import World

if TYPE_CHECKING:
    from launcher.run import Run

__all__ = ["Loop"]


class Loop:
    """Drives `run.steps`: agrees at every edge, feeds every step, saves where it is due."""

    def __init__(
        self,
        run: Run,
        loaders: dict[str, Loader[Any]],
        plans: dict[str, Plan],
        total: int | None,
        metrics: Metrics,
        *,
        single: bool,
    ) -> None:
        self.run, self.metrics, self.single = run, metrics, single
        self.world: World = run.world
        self.total = total
        self.first = next(iter(loaders), "")
        self.batch_size = loaders[self.first].batch_size if loaders else None
        self.keep_batches = any(loader.stream is not None for loader in loaders.values())
        """Whether a step holds on to its micro-batches, because the recipe goes through them more than once."""
        self.counts: dict[str, float] = {}
        self.agreement = Agreement(run.world)
        self.feeds: dict[str, Feed] = {}
        self._loaders, self._plans = loaders, plans
        self._cursors: dict[str, Any] = {}
        self._step: Step | None = None
        self._synced = True
        self._left = self._ended = False
        self._constant: tuple[tuple[float, torch.dtype], torch.Tensor] | None = None

    def steps(self) -> Iterator[Step]:
        """The steps from where the run stands. Raises `Stopped` at the edge where the ranks agree to stop."""
        start = index = self.run.completed
        self._open(start)
        self.issue(index - 1)
        while True:
            ballot = self.agreement.result()
            self.metrics.settle(ballot)
            self.run.clock.edge(self.metrics.paused)
            last = bool(ballot.exhausted or ballot.finish) or (self.total is not None and index >= self.total)
            save = not last and self.run.saver.due(index, ballot)
            if last or save or ballot.stop:
                self.flush()
            if ballot.stop:
                raise Stopped
            if last:
                break
            if save:
                self.run.save()
            yield self._begin(index, ballot)
            self._end(index)
            index += 1
            if index == start + 1:
                self.run.saver.prepare(self)
        self._ended = True
        self.close()

    def broken_off(self) -> None:
        """The recipe's `train` has returned, perhaps out of a body: one that had stepped its optimizer is whole.

        Raises:
            RecipeError: on some ranks alone.
        """
        self._left = not self._ended
        if self.run.mid_step:
            self._end(self.run.completed)
        self.flush()

    def flush(self) -> None:
        """Bring the metrics up to date: a line must be on disk before a checkpoint of its step is."""
        if self.agreement.pending:
            self.metrics.settle(self.agreement.result())
        self.metrics.settle(self.agreement.reduce(self._ballot(self.run.completed, ahead=False)))

    def issue(self, index: int) -> None:
        """Tell the other ranks what they must know before the step that follows step `index`."""
        self.agreement.issue(self._ballot(index + 1, ahead=True))

    def close(self) -> None:
        """Let the data workers go."""
        for feed in self.feeds.values():
            feed.close()

    @property
    def in_step(self) -> bool:
        """Whether a body has taken micro-batches and not ended: its data is spent, its update not made."""
        return self._step is not None and self._step.taken > 0

    def cursors(self) -> dict[str, Any]:
        """Where each stream stood on this rank at the last edge."""
        return self._cursors

    def positions(self, step: int) -> dict[str, dict[str, int | None]]:
        """The samples seen before `step` of every loader, and those of an epoch."""
        return {
            name: {"samples_seen": plan.start(step), "size": self._loaders[name].size}
            for name, plan in self._plans.items()
        }

    def microbatches(self, index: int) -> int:
        """Micro-batches that every rank runs in a step."""
        return self._plans[self.first].microbatches(index, self.world.world_size)

    def refetch(self, index: int) -> Iterator[tuple[Fetched, ...]]:
        """A step's micro-batches once more: reading by position has no side effects."""
        rank, world_size = self.world.rank, self.world.world_size
        feeds = [
            Feed(loader, iter(self._plans[name].share(index, rank, world_size)), self.world)
            for name, loader in self._loaders.items()
        ]
        for _ in range(self.microbatches(index)):
            yield tuple(feed.take(index) for feed in feeds)

    def sync_gradients(self, last: bool) -> None:
        """Reduce gradients over ranks in the coming backward, or (before the last micro-batch) only add them up."""
        sync = last or self.run.config.sync == "every"
        if sync != self._synced:
            set_gradient_sync(self.run.models.values(), sync)
            self._synced = sync

    def constant(self, value: float, like: torch.Tensor) -> torch.Tensor:
        """A 0-d tensor of `value`, remembered as long as it stays the same."""
        key = (value, like.dtype)
        if self._constant is None or self._constant[0] != key:
            self._constant = (key, torch.full((), value, dtype=like.dtype, device=like.device))
        return self._constant[1]

    def _open(self, start: int) -> None:
        rank, world_size = self.world.rank, self.world.world_size
        for name, loader in self._loaders.items():
            slots = self._plans[name].shares(start, rank, world_size)
            self.feeds[name] = Feed(loader, slots, self.world, self.run.cursor(name))
        self._cursors = self._feed_cursors()

    def _feed_cursors(self) -> dict[str, Any]:
        return {name: feed.cursor for name, feed in self.feeds.items() if self._loaders[name].stream is not None}

    def _begin(self, index: int, ballot: Ballot) -> Step:
        counted = iter(ballot.counts)
        for name, loader in self._loaders.items():
            self.counts[name] = self._plans[name].size(index) if loader.count is None else next(counted)
        self._step = self.run.step_type(self, index)
        return self._step

    def _end(self, index: int) -> None:
        step, self._step = self._step, None
        assert step is not None
        for _ in range(self.microbatches(index) - step.taken if self.feeds else 0):
            for feed in self.feeds.values():
                feed.take(index)  # a body that left its micro-batches early must not shift the next step's
        self._cursors = self._feed_cursors()
        if not self.agreement.pending:  # a body without a backward
            self.issue(index)
        self.run.end_step(index)
        samples = sum(plan.size(index) for plan in self._plans.values())
        self.metrics.finished(index + 1, step.loss_sum, step.loss_count, step.count, samples)

    def _ballot(self, index: int, *, ahead: bool) -> Ballot:
        """This rank's ballot before step `index`; `ahead`: with what the next step's data must tell."""
        counts: list[float] = []
        exhausted = False
        wanted = ahead and (self.total is None or index < self.total)
        for name, loader in self._loaders.items():
            if loader.count is None and loader.stream is None:
                continue
            number = self._plans[name].microbatches(index, self.world.world_size) if wanted else 0
            count = self.feeds[name].look_ahead(number)
            exhausted = exhausted or count is None
            if loader.count is not None:
                counts.append(count or 0)
        loss, loss_count = self.metrics.loss()
        run = self.run
        stop, finish, writer = run.must_stop(), run.finish_reason is not None, run.saver.writer
        return Ballot(stop, exhausted, finish, loss, loss_count, self._left, writer.busy, writer.broken, tuple(counts))
