"""Which checkpoints of a run are kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from launcher.errors import UsageError

__all__ = ["Best", "Retention"]


@dataclass(frozen=True)
class Best:
    """The checkpoint with the least, or the greatest, value of a metric."""

    metric: str
    greatest: bool = False

    @classmethod
    def parse(cls, text: str) -> Best:
        """From `val_loss:min` or `accuracy:max`.

        Raises:
            UsageError: it is neither.
        """
        metric, _, mode = text.rpartition(":")
        if not metric or mode not in ("min", "max"):
            raise UsageError(f"--run.keep-best {text}: give METRIC:min or METRIC:max, such as val_loss:min")
        return cls(metric, mode == "max")

    def step(self, values: Mapping[int, float]) -> int | None:
        """The step with the best value, of equal ones the first; None where none has a number."""
        numbers = {step: value for step, value in sorted(values.items()) if not math.isnan(value)}
        if not numbers:
            return None
        return (max if self.greatest else min)(numbers, key=numbers.__getitem__)


@dataclass(frozen=True)
class Retention:
    """The last ones, and for ever the first of every so many steps, and the best.

    Raises:
        UsageError: it would keep none.
    """

    last: int = 2
    every: int = 0
    """Steps; of each multiple of them the first checkpoint at or after it stays for ever, since a save may have had to
    wait for the one before it. 0: none for ever."""
    best: Best | None = None

    def __post_init__(self) -> None:
        if self.last < 1:
            raise UsageError(f"--run.keep {self.last} would keep no checkpoint: give 1 or more")
        if self.every < 0:
            raise UsageError(f"--run.keep-every {self.every}: give a number of steps, or 0")

    def milestones(self, steps: Iterable[int]) -> set[int]:
        """Those of `steps` that stay for ever."""
        first: dict[int, int] = {}
        for step in sorted(steps) if self.every else ():
            first.setdefault(step // self.every, step)
        return {step for multiple, step in first.items() if multiple}

    def kept(self, steps: Iterable[int], values: Mapping[int, float]) -> set[int]:
        """Which of `steps` stay; `values` are those of the metric that `best` names, by step."""
        there = sorted(steps)
        kept = set(there[-self.last :]) | self.milestones(there)
        if self.best is not None:
            best = self.best.step({step: values[step] for step in there if step in values})
            kept |= {best} if best is not None else set()
        return kept
