"""The order of the data: which samples make micro-batch j of step s, by arithmetic alone.

Position p of the run is sample `perm(seed, p // N)(p % N)` of epoch `p // N`. Nothing is stored and nothing is
replayed, so a resumed run, and one on another number of ranks, reads the same samples in the same micro-batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from launcher.seeds import ORDER, mix

__all__ = ["Ints", "Order", "Plan", "Slot", "permute"]

Ints = npt.NDArray[np.int64]

ROUNDS = 8
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # of `mix`
BLOCK = 4096  # positions ordered at once, so that numpy's cost a call is shared by many steps
SPARSE = 128  # positions from one read to the next: a block serves too few reads that lie farther apart


def permute(index: Ints, size: int, key: int) -> Ints:
    """Where `index` (any shape, values in [0, size)) goes in the permutation of [0, size) that `key` names.

    A Feistel network over the smallest even number of bits that holds `size`, walked until it lands inside (Black
    and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): O(1) memory, whatever the size.
    """
    return _walk(index, size, _round_keys(np.array([key], dtype=np.uint64))[:, 0])


def _round_keys(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """`mix(key, round)` of every round and key. Shapes: [n] to [ROUNDS, n]."""
    first = _then(np.uint64(0), keys)
    return np.stack([_then(first, np.uint64(round_)) for round_ in range(ROUNDS)])


def _then(state: Any, word: Any) -> npt.NDArray[np.uint64]:
    """`mix` with one word more, of an array of states, or of words."""
    return _scramble((state ^ word) + GOLDEN)


def _walk(index: Ints, size: int, keys: npt.NDArray[np.uint64]) -> Ints:
    """`permute` by the keys of its rounds: [ROUNDS], or [ROUNDS, *index.shape] where each index has its own."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    value = index.astype(np.uint64).ravel()
    keys = keys.reshape(ROUNDS, -1)
    result, where = value, np.arange(len(value))
    while len(where):  # those that are still outside
        left, right = value >> half, value & low
        for key in keys:
            mixed = _scramble(right ^ key)
            mixed &= low
            mixed ^= left
            left, right = right, mixed
        result[where] = value = (left << half) | right
        outside = value >= np.uint64(size)
        value, where = value[outside], where[outside]
        keys = keys[:, outside] if keys.shape[1] > 1 else keys
    return result.reshape(index.shape).astype(np.int64)


def _scramble(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser, in place: every bit of the result depends on every bit of `value`."""
    value ^= value >> np.uint64(30)
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return value


class Order:
    """The samples of a dataset of `size` in the order a run sees them, epoch after epoch.

    What a read costs depends neither on the size nor on how many ranks there are: what lies close together is ordered
    a block at a time; what a rank of many reads lies far apart at even distances, and its next reads are ordered ahead.
    """

    def __init__(self, size: int, seed: int, *, shuffle: bool) -> None:
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self._block = -1
        self._samples: Ints = np.empty(0, dtype=np.int64)
        self._start, self._first, self._stride = 0, 0, 1
        self._ahead: Ints = np.empty((0, 0), dtype=np.int64)  # row k: what begins at position first + k * stride

    def samples(self, start: int, stop: int) -> Ints:
        """The sample at each position from `start` up to `stop`."""
        apart, self._start = abs(start - self._start), start
        return self._far(start, stop, apart) if apart > SPARSE else self._near(start, stop)

    def epoch(self, position: int) -> int:
        """The epoch that a position is in."""
        return position // self.size

    def _near(self, start: int, stop: int) -> Ints:
        """From a block, or from several."""
        first, last = start // BLOCK, (stop - 1) // BLOCK
        if first == last:
            return self._ordered(first)[start - first * BLOCK : stop - first * BLOCK]
        edges = [start, *((block + 1) * BLOCK for block in range(first, last)), stop]
        return np.concatenate([self._near(a, b) for a, b in itertools.pairwise(edges)])

    def _far(self, start: int, stop: int, apart: int) -> Ints:
        """From what was ordered ahead: twice as many reads each time that all of them came as foreseen."""
        row, rest = divmod(start - self._first, self._stride)
        rows, width = self._ahead.shape
        if rest or not 0 <= row < rows or width != stop - start:
            as_foreseen = not rest and row == rows and width == stop - start
            self._stride = self._stride if as_foreseen else apart
            number = min(2 * rows, max(1, BLOCK // width)) if as_foreseen else 1
            starts = start + self._stride * np.arange(number, dtype=np.int64)
            self._first, self._ahead = start, self._at(starts[:, None] + np.arange(stop - start, dtype=np.int64))
            row = 0
        found: Ints = self._ahead[row]
        return found

    def _ordered(self, block: int) -> Ints:
        if block != self._block:
            self._samples = self._at(np.arange(block * BLOCK, (block + 1) * BLOCK, dtype=np.int64))
            self._block = block
        return self._samples

    def _at(self, positions: Ints) -> Ints:
        """The samples at positions of any shape, in whichever epochs they are."""
        epochs, samples = np.divmod(positions, self.size)
        if not self.shuffle:
            return samples
        here, which = np.unique(epochs, return_inverse=True)
        keys = _round_keys(_then(np.uint64(mix(self.seed, ORDER)), here.astype(np.uint64)))
        return _walk(samples, self.size, keys[:, 0] if len(here) == 1 else keys[:, which.reshape(samples.shape)])


class Slot(NamedTuple):
    """Micro-batch `microbatch` of step `step`: positions `start` up to `stop`.

    `padding` marks a repeat that a rank runs with weight zero, because collectives need every rank to run as many.
    """

    step: int
    microbatch: int
    start: int
    stop: int
    padding: bool = False


@dataclass(frozen=True)
class Plan:
    """How positions become steps, and micro-batches go to ranks: micro-batch j to rank j modulo the world size.

    Step s holds `batch_size` positions from `base + (s - base_step) * batch_size`; the base moves when a resumed run
    changes its batch size, and past the batches that are left out: at each step of `left_out` (one that is there twice
    counts twice), those that the step would have held. With `end`, the last batch is the short one that reaches it.
    """

    batch_size: int
    microbatch_size: int
    end: int | None = None
    base: int = 0
    base_step: int = 0
    left_out: tuple[int, ...] = ()

    def start(self, step: int) -> int:
        """The first position of a step; also the number of samples seen, or left out, before it."""
        return self._clip(self._start(step))

    def stop(self, step: int) -> int:
        """The position behind a step's last."""
        return self._clip(self._start(step) + self.batch_size)

    def size(self, step: int) -> int:
        """Samples in a step: the batch size, less in a last short batch, 0 past the end."""
        return self.batch_size if self.end is None else self.stop(step) - self.start(step)

    def steps(self, known: int | None = None) -> int | None:
        """The number of steps until `end`, None without one; `known`: as it is known at that step, before which
        nobody knows of what is left out later."""
        if self.end is None:
            return None
        gone = sum(known is None or step <= known for step in self.left_out)
        return self.base_step + -(-(self.end - self.base) // self.batch_size) - gone

    def without(self, step: int) -> Plan:
        """The same with the batch that `step` would hold left out: it holds the next."""
        return replace(self, left_out=(*self.left_out, step))

    def share(self, step: int, rank: int, world_size: int) -> list[Slot]:
        """The micro-batches of a step that a rank runs, in order; every rank gets as many."""
        start = self.start(step)
        stop = start + self.size(step)
        total = -(-(stop - start) // self.microbatch_size)
        end = -(-total // world_size) * world_size
        return [self._slot(step, j, total, start, stop) for j in range(rank, end, world_size)]

    def slot(self, step: int, microbatch: int) -> Slot:
        """A micro-batch of a step."""
        start, stop = self.start(step), self.stop(step)
        return self._slot(step, microbatch, -(-(stop - start) // self.microbatch_size), start, stop)

    def microbatches(self, step: int, world_size: int) -> int:
        """Micro-batches that each rank runs in a step, padding included."""
        return -(-self.size(step) // (self.microbatch_size * world_size))

    def shares(self, step: int, rank: int, world_size: int) -> Iterator[Slot]:
        """The micro-batches of every step from `step` on."""
        while share := self.share(step, rank, world_size):
            yield from share
            step += 1

    def _start(self, step: int) -> int:
        gone = sum(one <= step for one in self.left_out) if self.left_out else 0
        return self.base + (step - self.base_step + gone) * self.batch_size

    def _clip(self, position: int) -> int:
        return position if self.end is None else min(position, self.end)

    def _slot(self, step: int, index: int, total: int, start: int, stop: int) -> Slot:
        if index >= total:
            return self._slot(step, 0, total, start, stop)._replace(padding=True)
        first = start + index * self.microbatch_size
        return Slot(step, index, first, min(first + self.microbatch_size, stop))
