"""Streams: an IterableDataset dealt out to ranks, with a cursor that a resumed run goes on from.

A rank reads its own part of the stream, so what it sees depends on the world size: a resume on another is refused.
One worker process at most reads a stream, because splitting it further would let the worker count change the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from launcher.errors import UsageError
from launcher.order import Slot
from launcher.signals import ignore_signals
from launcher.stacks import answer
from launcher.world import World

__all__ = ["Stream", "is_stream"]


def is_stream(data: Any) -> bool:
    """Whether `data` is read from front to back: iterable and without indexing."""
    return isinstance(data, IterableDataset) or (hasattr(data, "__iter__") and not hasattr(data, "__getitem__"))


class Stream:
    """Micro-batches of `size` samples from an iterable dataset."""

    def __init__(self, data: Any, size: int, collate: Callable[[list[Any]], Any]) -> None:
        self.data, self.size, self._collate = data, size, collate

    def caveats(self) -> list[str]:
        """What a resume of this stream cannot restore exactly, to be said at the start and kept in checkpoints."""
        said = ["its order depends on the world size: a resume needs the same number of ranks"]
        if not self._has_cursor:
            said.append("it has no state_dict: a resume reads it again from the front up to where it was")
        if _shuffles(self.data):
            said.append(
                "its shuffle buffer is not saved: a resume loses what was in it (some samples lost, some repeated)"
            )
        return said

    def batches(
        self, slots: Iterable[Slot], world: World, cursor: Any, *, workers: int
    ) -> Iterator[tuple[Slot, Any, Any]]:
        """A batch and the cursor after it for every slot, until the stream ends; a last partial batch is left out."""
        if workers > 1:
            raise UsageError(f"a stream is read by one worker process at most, not {workers}: --run.workers 1")
        reader = _Reader(self, world.rank, world.world_size, cursor)
        if not workers:
            return ((slot, batch, after) for slot, (batch, after) in zip(slots, reader, strict=False))
        loader: DataLoader[Any] = DataLoader(
            reader,
            batch_size=None,
            num_workers=1,
            collate_fn=lambda item: item,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),
        )
        return ((slot, batch, after) for slot, (batch, after) in zip(slots, loader, strict=False))

    @property
    def _has_cursor(self) -> bool:
        return hasattr(self.data, "state_dict") and hasattr(self.data, "load_state_dict")

    def read(self, rank: int, world_size: int, cursor: Any) -> Iterator[tuple[Any, Any]]:
        """Micro-batches of this rank's part, each with the cursor after it."""
        data, part = self._part(rank, world_size)
        seen = 0
        if cursor is not None:
            seen = cursor["samples"]
            if cursor["state"] is not None:
                data.load_state_dict(cursor["state"])
        samples = iter(data)
        if part is not None:
            samples = islice(samples, *part)
        if cursor is not None and cursor["state"] is None:
            for _ in islice(samples, seen):
                pass
        while len(batch := list(islice(samples, self.size))) == self.size:
            seen += self.size
            yield self._collate(batch), {"samples": seen, "state": data.state_dict() if self._has_cursor else None}

    def _part(self, rank: int, world_size: int) -> tuple[Any, tuple[int, None, int] | None]:
        """The dataset that this rank reads, and how it must still be sliced."""
        if world_size == 1:
            return self.data, None
        if type(self.data).__module__.startswith("datasets."):
            from datasets.distributed import split_dataset_by_node

            return split_dataset_by_node(self.data, rank, world_size), None
        if self._has_cursor:
            raise UsageError(
                f"{type(self.data).__name__} has its own state and cannot be dealt out to {world_size} ranks here: "
                "give a datasets.IterableDataset, or one without state_dict"
            )
        return self.data, (rank, None, world_size)


class _Reader(IterableDataset[Any]):
    """A rank's part of a stream, as something that a worker process can read."""

    def __init__(self, stream: Stream, rank: int, world_size: int, cursor: Any) -> None:
        self._stream, self._rank, self._world_size, self._cursor = stream, rank, world_size, cursor

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return self._stream.read(self._rank, self._world_size, self._cursor)


def _shuffles(data: Any) -> bool:
    """Whether a `datasets` stream draws from a shuffle buffer; its chain of sources is private, so it is searched."""
    node, depth = getattr(data, "_ex_iterable", None), 0
    while node is not None and depth < 50:
        if "BufferShuffled" in type(node).__name__:
            return True
        node, depth = getattr(node, "ex_iterable", None), depth + 1
    return False


def _start_worker(_: int) -> None:
    ignore_signals()
    answer()
