"""What a run of the check writes down while it trains, a line an event, and how it is read back.

A line is whole as soon as it is written, so that a SIGKILL costs one at most.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Batch", "Event", "Trace", "Writer", "read_trace"]

Event = dict[str, Any]


class Writer:
    """Appends one rank's events."""

    def __init__(self, directory: str, attempt: int, rank: int) -> None:
        self._file = open(Path(directory) / f"trace-{attempt:04d}-{rank:05d}.jsonl", "a", buffering=1)  # noqa: SIM115

    def write(self, what: str, **facts: Any) -> None:
        """Add an event."""
        self._file.write(json.dumps({"what": what, **facts}) + "\n")

    def close(self) -> None:
        """Write no more."""
        self._file.close()


@dataclass(frozen=True)
class Batch:
    """A micro-batch as a rank has read it."""

    rank: int
    ids: tuple[int, ...]
    """Samples, by their place in the dataset; empty where it has no places."""
    digest: str
    padding: bool


@dataclass
class Trace:
    """What all ranks of a run have written; of a step that was trained twice the last attempt's counts."""

    events: dict[int, list[Event]] = field(default_factory=dict)
    """By rank, in order, of all attempts."""

    def of(self, what: str, rank: int | None = None) -> list[Event]:
        """The events of a kind, of one rank or of all."""
        ranks = self.events if rank is None else [rank]
        return [event for one in ranks for event in self.events.get(one, ()) if event["what"] == what]

    def batches(self) -> dict[tuple[str, int, int], Batch]:
        """Every micro-batch, by (loader, step, number); what only pads is left out."""
        found = {}
        for rank in self.events:
            for event in self.of("batch", rank):
                if not event["padding"]:
                    key = (event["loader"], event["step"], event["microbatch"])
                    found[key] = Batch(rank, tuple(event["ids"]), event["digest"], event["padding"])
        return dict(sorted(found.items(), key=lambda item: (item[0][1], item[0][2], item[0][0])))

    def weights(self, rank: int = 0) -> dict[str, str]:
        """The digest of every parameter as it was built on a rank, by name."""
        return {
            f"{event['name']}/{name}": value
            for event in self.of("build", rank)
            for name, value in event["weights"].items()
        }

    def loaders(self, rank: int = 0) -> dict[str, int | None]:
        """The loaders of the steps, with the samples that they have; None of a stream."""
        return next((event["loaders"] for event in self.of("steps", rank)), {})

    def coupled(self) -> list[str]:
        """The modules that normalise over a micro-batch."""
        return [name for event in self.of("coupled", 0) for name in event["names"]]

    def groups(self) -> dict[int, Any]:
        """The numbers that the optimizers were given for their groups, by step."""
        return {event["step"]: event["groups"] for event in self.of("step", 0)}


def read_trace(directory: Path) -> Trace:
    """The events of all attempts and ranks; a line that a kill has cut is passed over."""
    trace = Trace()
    for path in sorted(directory.glob("trace-*.jsonl")):
        trace.events.setdefault(int(path.stem.split("-")[2]), []).extend(_lines(path))
    return trace


def _lines(path: Path) -> Iterator[Event]:
    for line in path.read_text().splitlines():
        with suppress(ValueError):
            yield json.loads(line)
