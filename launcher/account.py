"""What a person is told of a bad step: which samples, on which rank, and where in the model it began."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from launcher.data import Loader
from launcher.errors import NumbersError
from launcher.examine import Examination, Finding
from launcher.order import Plan, Slot
from launcher.world import World

if TYPE_CHECKING:
    from launcher.numbers import Bad

__all__ = ["Account"]

SHOWN = 8  # sample ids


class Account:
    """Of one bad step, the same on all ranks, which make it together."""

    def __init__(self, bad: Bad, plans: Mapping[str, Plan], loaders: Mapping[str, Loader[Any]], world: World) -> None:
        self._bad, self._plans, self._loaders, self._world = bad, plans, loaders, world
        self._losses = _together(bad.body.bad_losses(), world)
        self._origin: list[Finding] | None = None

    @property
    def told(self) -> str:
        """What is wrong, and in which samples."""
        if self._losses:
            first = self._losses[0]
            return f"{first.what} in {self._place(first)} ({self._samples(first)}){_more(len(self._losses) - 1)}"
        why = self._bad.why if self._bad.leap else f"{self._bad.why}, though every loss is"
        return f"{why} ({self._samples(None)})"

    def examined(self, examination: Examination) -> None:
        """The step was run once more, and looked into."""
        self._origin = _together(examination.findings, self._world)

    def error(self) -> NumbersError:
        """What a run stops with."""
        bad = self._bad
        done = "the update was made, and nothing is saved" if bad.applied else "the update was not made"
        parts = [f"step {bad.step + 1}: {self.told}", *self._where(), done + self._why_stop()]
        spike = ", raise --run.spike," if bad.leap else ","
        fix = f"look at the samples{spike} or leave such updates out with --run.bad-numbers skip"
        return NumbersError(f"{'; '.join(parts)}: {fix if bad.in_a_row == 1 else 'look at the samples and the model'}")

    def _where(self) -> list[str]:
        if self._bad.applied:
            return ["where it began cannot be seen any more (with fused=True in the optimizer it can)"]
        if self._origin is None:
            return []
        if not self._origin:
            return ["run once more, all of it was finite"]
        first = self._origin[0]
        there = self._losses[:1] and (first.slot, first.rank) == (self._losses[0].slot, self._losses[0].rank)
        where = [] if first.slot is None or there else [f"in {self._place(first)}"]
        which = [f"for {self._samples(first)}"] if first.slot is not None and (first.rows or not there) else []
        return [f"first, {', '.join([first.what, *where, *which])}"]

    def _why_stop(self) -> str:
        if self._bad.in_a_row > 1:
            return f", nor were the {self._bad.in_a_row - 1} before it (--run.bad-numbers-limit)"
        return "" if self._bad.answer == "stop" else ", and there is no checkpoint to go back to"

    def _place(self, finding: Finding) -> str:
        again = f", pass {finding.iteration + 1}" if finding.iteration else ""
        rank = f" on rank {finding.rank}" if self._world.world_size > 1 else ""
        return f"micro-batch {finding.microbatch}{rank}{again}"

    def _samples(self, finding: Finding | None) -> str:
        """The samples of a micro-batch, or of the step, by the loaders' own numbers."""
        parts = []
        for name, loader in self._loaders.items():
            of = f" of {name!r}" if len(self._loaders) > 1 else ""
            parts.append(self._ids(self._plans[name], loader, finding) + of)
        if not parts:
            return "made by the recipe" if finding is None else _rows(finding)
        return ", ".join(parts)

    def _ids(self, plan: Plan, loader: Loader[Any], finding: Finding | None) -> str:
        step = self._bad.step
        slot = Slot(step, 0, plan.start(step), plan.stop(step))
        if finding is not None and finding.slot is not None:
            slot = plan.slot(step, finding.slot.microbatch)
        if loader.order is None:
            return self._of_stream(plan, slot, finding)
        ids = loader.order.samples(slot.start, slot.stop).tolist()
        if finding is not None and finding.rows:
            ids = [ids[row] for row in finding.rows]
        return f"sample{'s' * (len(ids) > 1)} {', '.join(map(str, ids[:SHOWN]))}{_more(len(ids) - SHOWN)}"

    def _of_stream(self, plan: Plan, slot: Slot, finding: Finding | None) -> str:
        """Where in a rank's own part of a stream: its samples have no other numbers."""
        ranks = self._world.world_size
        first, size = plan.start(slot.step) // ranks, plan.size(slot.step) // ranks
        if finding is not None:
            first, size = first + slot.microbatch // ranks * plan.microbatch_size, plan.microbatch_size
        whose = "each rank's part" if finding is None else f"rank {finding.rank}'s part"
        return f"samples {first} to {first + size - 1} of {whose + ' of ' if ranks > 1 else ''}the stream"


def _together(mine: list[Finding], world: World) -> list[Finding]:
    """Every rank's, in the order of the step."""
    return sorted(finding for found in world.gather(mine) for finding in found)


def _rows(finding: Finding) -> str:
    """Of what the recipe made on that rank."""
    slot = finding.slot or Slot(0, 0, 0, 1)
    rows = [slot.start + row for row in finding.rows]
    which = ", ".join(map(str, rows[:SHOWN])) + _more(len(rows) - SHOWN) if rows else f"{slot.start} to {slot.stop - 1}"
    return f"rows {which} of what step.split got"


def _more(number: int) -> str:
    return f" and {number} more" if number > 0 else ""
