"""The steps of a run: what happens at a step's edges, so that the body between them is the recipe's alone."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from launcher.account import Account
from launcher.agreement import Agreement, Ballot
from launcher.data import Feed, Fetched, Loader
from launcher.errors import NumbersError
from launcher.examine import Examination
from launcher.metrics import Metrics
from launcher.numbers import Bad, spoiled
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
        self.guard = run.numbers
        self.first = next(iter(loaders), "")
        self.batch_size = loaders[self.first].batch_size if loaders else None
        self.keep_batches = any(loader.stream is not None for loader in loaders.values())
        """Whether a step holds on to its micro-batches, because the recipe goes through them more than once."""
        self.counts: dict[str, float] = {}
        self.agreement = Agreement(run.world)
        self.feeds: dict[str, Feed] = {}
        self._loaders, self._plans, self._asked = loaders, plans, total
        self._streams = [name for name, loader in loaders.items() if loader.stream is not None]
        self._looked_at = [name for name, loader in loaders.items() if loader.stream is not None or loader.count]
        """The loaders that are read a step ahead, for a count or to find their end."""
        self._cursors: dict[str, Any] = {}
        self._step: Step | None = None
        self._synced = True
        self._left = self._ended = False
        self._own: dict[int, int] = {}  # by parameter: where the gradient is that was taken out of a CUDA graph
        self._constant: tuple[tuple[float, torch.dtype], torch.Tensor] | None = None

    def steps(self) -> Iterator[Step]:
        """The steps from where the run stands. Raises `Stopped` at the edge where the ranks agree to stop."""
        start = index = self.run.completed
        self.run.pulse.enter("first step")
        self.run.startup.enter("first batch")
        try:
            self._open(start)
            self.issue(index - 1)
            while True:
                last = self._edge(index)
                if self.guard.bad is not None:
                    index = yield from self._answer(self.guard.bad)
                    continue
                if last:
                    break
                self.run.startup.enter("step")
                yield self._begin(index)
                index = self._conclude(index)
                self.run.garbage.edge(index)
                if index == start + 1:
                    self.run.saver.prepare(self)
        finally:
            self.run.pulse.enter("end")
            self.run.garbage.release()
        self._ended = True
        self.close()

    def broken_off(self) -> None:
        """The recipe's `train` has returned, perhaps out of a body: one that had stepped its optimizer is whole.

        Raises:
            RecipeError: on some ranks alone.
        """
        self._left = not self._ended
        if self.run.mid_step and self.guard.bad is None:
            self._conclude(self.run.completed)
        self.flush()
        if self.guard.bad is not None:
            raise self._account(self.guard.bad).error()

    def flush(self) -> None:
        """Bring the metrics up to date: a line must be on disk before a checkpoint of its step is."""
        if self.agreement.pending:
            self._settle(self.agreement.result())
        self._settle(self.agreement.reduce(self._ballot(self.run.completed, ahead=False)))
        self._tell()

    def issue(self, index: int) -> None:
        """Tell the other ranks what they must know before the step that follows step `index`."""
        self.agreement.issue(self._ballot(index + 1, ahead=True))

    def close(self) -> None:
        """Let the data workers go."""
        for feed in self.feeds.values():
            feed.close()

    @property
    def step(self) -> Step | None:
        """The step whose body is being run."""
        return self._step

    @property
    def in_step(self) -> bool:
        """Whether a body has begun its micro-batches, the data's or its own, and not ended: its update may be made."""
        step = self._step
        return self.guard.bad is not None or (step is not None and (step.taken > 0 or step.progress[0] > 0))

    def total(self, index: int) -> int | None:
        """The steps of the whole run, as they are known at step `index`: bad numbers may leave data out."""
        plan = self._plans.get(self.first)
        return self._asked if plan is None or plan.end is None else plan.steps(index)

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
        config = self.run.config
        # FSDP2 would add up the gradients of whole parameters, in a CUDA graph's memory, where no one can take them out
        graphs = config.cuda_graphs and config.shard != "none" and self.run.device.type == "cuda"
        sync = last or config.sync == "every" or graphs
        if sync != self._synced:
            set_gradient_sync(self.run.models.values(), sync)
            self._synced = sync

    def keep_gradients(self) -> None:
        """More micro-batches follow: take gradients out of a CUDA graph's memory, which its next replay writes anew.

        torch lets a parameter keep what the graph has made, and sees to that only while it records: after it, what was
        accumulated would be lost without a word.
        """
        if not self.run.config.cuda_graphs or self.run.device.type != "cuda":
            return
        if self._synced and self.world.world_size > 1:
            return  # reduced, they are in DDP's or FSDP2's own memory
        for optimizer in self.run.optimizers:
            for parameter in optimizer.parameters():
                gradient = parameter.grad
                if gradient is not None and self._own.get(id(parameter)) != gradient.data_ptr():
                    parameter.grad = gradient.clone()
                    self._own[id(parameter)] = parameter.grad.data_ptr()

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
        return {name: self.feeds[name].cursor for name in self._streams}

    def _edge(self, index: int) -> bool:
        """What happens between two bodies; whether the one before was the last. Bad numbers that came to light are the
        guard's to tell, and keep what is due otherwise from happening.

        Raises:
            Stopped: the ranks agree to stop.
        """
        self.run.pulse.enter("step" if self.run.stepped else "first step")
        ballot = self._told = self.agreement.result()
        self._tell()
        self._settle(ballot)
        if self.guard.bad is not None:
            return False
        self.run.clock.edge(self.metrics.paused)
        total = self.total(index)
        last = bool(ballot.exhausted or ballot.finish) or (total is not None and index >= total)
        save = not last and self.run.saver.due(index, ballot)
        if last or save or ballot.stop:
            self.flush()
            if self.guard.bad is not None:
                return False
        if ballot.stop:
            raise Stopped
        if save:
            self.run.save()
        return last

    def _begin(self, index: int) -> Step:
        counted = iter(self._told.counts)
        for name, loader in self._loaders.items():
            self.counts[name] = self._plans[name].size(index) if loader.count is None else next(counted)
        self.guard.begin()
        self._step = self.run.step_type(self, index)
        return self._step

    def _conclude(self, index: int) -> int:
        """A body has ended; the steps completed by then: one more, unless its numbers are bad."""
        assert self._step is not None
        self.guard.end(self._step)
        if self.guard.bad is not None:
            return index
        self._mark()
        self._tell()
        self._end(index)
        return index + 1

    def _settle(self, ballot: Ballot) -> None:
        if self.guard.bad is not None:
            self.metrics.forget(self.guard.bad.step)
        self.metrics.settle(ballot)

    def _mark(self) -> None:
        """The line of a step whose update was skipped is written, and says how many there have been."""
        if self.guard.left_out is not None:
            step = self.guard.left_out.step + 1
            self.metrics.mark(step)
            self.metrics.add(step, {"skipped": self.guard.skipped})

    def _tell(self) -> None:
        """Tell of an update that was skipped, once all ranks know of it."""
        bad, self.guard.left_out = self.guard.left_out, None
        if bad is None:
            return
        self.run.print(f"step {bad.step + 1}: update skipped: {self._account(bad).told}")
        found = [buffer for buffer in self.world.gather(spoiled(self.run.models)) if buffer]
        if found:
            raise NumbersError(
                f"step {bad.step + 1}: it cannot be skipped: its forward pass has left NaN in {found[0]}; go on from "
                "the last checkpoint with --run.bad-numbers rewind"
            )

    def _answer(self, bad: Bad) -> Generator[Step, None, int]:
        """Stop at a bad step, or go back; the step that the run then stands at.

        Raises:
            NumbersError: it stops.
        """
        self.run.completed = bad.step
        account = self._account(bad)
        there = self.run.newest_checkpoint() if bad.answer == "rewind" else None
        if there is None:
            yield from self._examine(bad, account)
            raise account.error()
        self.run.print(f"step {bad.step + 1}: {account.told}; back to {there}, and on without the samples of this step")
        return self._rewind(bad.step)

    def _account(self, bad: Bad) -> Account:
        return Account(bad, self._plans, self._loaders, self.world)

    def _examine(self, bad: Bad, account: Account) -> Iterator[Step]:
        """The bad step once more, with a look into every module on every rank, where the weights are still its own."""
        kept = bad.body.kept
        if bad.leap or bad.applied or (self._streams and len(kept) < self.microbatches(bad.step)):
            return
        if self.feeds and not self._streams:
            kept = list(self.refetch(bad.step))
        run = self.run
        for optimizer in run.optimizers:
            optimizer.zero_grad()
            optimizer.stepped = optimizer.skipped = False
        examination = Examination(run.models, self.world.rank)
        self.guard.examining = True
        try:
            with examination.attached(eager=run.config.compile != "off"):
                self._step = run.step_type(self, bad.step)
                self._step.examine(examination, kept)
                yield self._step
        finally:
            self.guard.examining = False
        account.examined(examination)

    def _rewind(self, bad: int) -> int:
        """Back to the newest checkpoint; the step of it. What step `bad` would read is left out from now on."""
        with self.metrics.pause():
            self.close()
            ours = {name: plan.without(bad) for name, plan in self._plans.items()}
            index = self.run.rewind(self._plans, self._loaders)
            for name, plan in ours.items():
                # a checkpoint may have been saved before the batches that this start has left out at its step
                if index >= plan.base_step:
                    self._plans[name] = plan
                else:
                    self._plans[name] = replace(self._plans[name], left_out=plan.left_out)
            self.guard.forget()
            self._step = None
            with self.run.garbage.automatic():  # workers are forked here, and go on with it
                self._open(index)
        self.metrics.rewind(index, bad, self.total(bad), self.run.restored_line)
        self.issue(index - 1)
        return index

    def _end(self, index: int) -> None:
        step, self._step = self._step, None
        assert step is not None
        for _ in range(self.microbatches(index) - step.taken if self.feeds else 0):
            for feed in self.feeds.values():
                feed.take(index)  # a body that left its micro-batches early must not shift the next step's
        if self._streams:
            self._cursors = self._feed_cursors()
        if not self.agreement.pending:  # a body without a backward
            self.issue(index)
        self.run.end_step(index)
        samples = sum([plan.size(index) for plan in self._plans.values()])
        self.metrics.finished(index + 1, step.loss_sum, step.loss_count, step.count, samples)

    def _ballot(self, index: int, *, ahead: bool) -> Ballot:
        """This rank's ballot before step `index`; `ahead`: with what the next step's data must tell."""
        counts: list[float] = []
        exhausted = False
        total = self.total(index)
        wanted = ahead and (total is None or index < total)
        for name in self._looked_at:
            number = self._plans[name].microbatches(index, self.world.world_size) if wanted else 0
            count = self.feeds[name].look_ahead(number)
            exhausted = exhausted or count is None
            if self._loaders[name].count is not None:
                counts.append(count or 0)
        self.guard.read()
        self._mark()
        loss, loss_count = self.metrics.loss(ahead=ahead)
        run = self.run
        stop, finish, writer = run.must_stop(), run.finish_reason is not None, run.saver.writer
        return Ballot(stop, exhausted, finish, loss, loss_count, self._left, writer.busy, writer.broken, tuple(counts))
