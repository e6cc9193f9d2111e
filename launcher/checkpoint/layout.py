"""Where the elements of a distributed tensor are: on which ranks, and in which rank's part of a checkpoint.

Arithmetic on descriptions that all ranks share: no tensors, no files, no collectives, no torch. A tensor is described
once (`TensorSpec`); from that every rank derives what any rank holds (`boxes`) and who writes what (`Plan`). The
index of a checkpoint therefore lists tensors, never shards.

A plan is part of the file format: a change of its rule needs another `PLAN`.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, product

__all__ = ["ITEMSIZE", "PLAN", "Box", "Plan", "TensorSpec", "Write", "boxes", "local_shape", "parts", "plan"]

PLAN = 1
"""The version of the rule by which writing is shared out."""

PIECE = 1 << 20
"""Bytes: data that several ranks hold is shared out among them in pieces no smaller than this."""

ITEMSIZE = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
"""Bytes an element, by safetensors' name of the dtype."""

_PLACEMENT = re.compile(r"R|S\(([0-9]{1,3})\)|_S\(([0-9]{1,3}),([0-9]{1,6})\)")
_MOST_DIMENSIONS = 64  # of numpy and of torch
_MOST_MESH = 16
_MOST_BYTES = 2**62

Runs = list[tuple[int, int]]  # (first index, count), in the order in which a rank holds them


@dataclass(frozen=True)
class Box:
    """A part of a global tensor: per dimension where it starts and how much it takes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements it has; one for a 0-d tensor's."""
        return math.prod(self.sizes)

    def overlap(self, other: Box) -> Box | None:
        """What both have, or None."""
        starts = tuple(map(max, self.offsets, other.offsets))
        stops = (
            min(a + n, b + m) for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        sizes = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        return Box(starts, sizes) if all(size > 0 for size in sizes) else None


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as all ranks together hold it.

    Raises:
        ValueError: the description contradicts itself.
    """

    shape: tuple[int, ...]
    """Of the global tensor."""
    dtype: str
    """safetensors' name: F32, BF16, ..."""
    mesh: tuple[int, ...] | None = None
    """Shape of the device mesh, whose ranks are 0, 1, ... in row-major order; None: whole on every rank."""
    placements: tuple[str, ...] = ()
    """One for each dimension of the mesh: "R", "S(0)", "_S(0,4)" (_StridedShard with split_factor 4)."""
    rank0: bool = False
    """Only rank 0's copy counts: the others may differ from it, as the buffers of DDP ranks do."""

    def __post_init__(self) -> None:
        if self.dtype not in ITEMSIZE:
            raise ValueError(f"dtype {self.dtype!r} is unknown")
        possible = len(self.shape) <= _MOST_DIMENSIONS and all(0 <= size <= _MOST_BYTES for size in self.shape)
        if not possible or self.nbytes > _MOST_BYTES:
            raise ValueError(f"shape {list(self.shape)} is impossible")
        mesh = self.mesh or ()
        if len(mesh) > _MOST_MESH:
            raise ValueError(f"a mesh has {_MOST_MESH} dimensions at most, not {len(mesh)}")
        if len(mesh) != len(self.placements) or any(size < 1 for size in mesh) or (self.rank0 and mesh):
            raise ValueError(f"placements {list(self.placements)} do not fit mesh {list(mesh)}")
        for shard in _shards(self.placements):
            if shard is not None and (shard[0] >= len(self.shape) or not 1 <= shard[1] <= math.prod(mesh)):
                raise ValueError(f"placements {list(self.placements)} do not fit shape {list(self.shape)}")

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the global tensor."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class Write:
    """One box in the part of the checkpoint that a rank writes."""

    name: str
    box: Box
    offset: int
    """Bytes from the start of the rank's part."""
    nbytes: int


def boxes(spec: TensorSpec, rank: int) -> list[Box]:
    """What `rank` holds, in the order in which its local tensor holds it; nothing of a tensor without elements."""
    return [box for box, _ in parts(spec, rank)]


def parts(spec: TensorSpec, rank: int) -> list[tuple[Box, tuple[int, ...]]]:
    """The boxes that `rank` holds, each with its offsets in the rank's local tensor."""
    axes = _axes(spec, rank)
    return list(zip(_grid(axes), product(*map(_positions, axes)), strict=True))


@lru_cache(maxsize=65536)
def local_shape(spec: TensorSpec, rank: int) -> tuple[int, ...]:
    """The shape of the local tensor of `rank`."""
    return tuple(_count(axis) for axis in _axes(spec, rank))


def plan(specs: Mapping[str, TensorSpec], world_size: int) -> Plan:
    """Who writes what: see `Plan`."""
    return Plan(specs, world_size)


class Plan:
    """Per rank, the boxes it writes, in the order of its part: each element of each tensor exactly once.

    The rule: what several ranks hold (replicas) is cut along dimension 0 into as many pieces as there are replicas,
    but of at least `PIECE` bytes; tensors taken by size, each piece goes to the replica with the fewest bytes so far.
    That is decided once for all shards of a tensor, so a rank's list costs a pass over what its replica writes. Within
    a part larger dtypes come first, then names in order: no element is misaligned, and a model's weights lie together.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], world_size: int) -> None:
        self.world_size = world_size
        self.specs = dict(sorted(specs.items(), key=lambda item: (-item[1].itemsize, item[0])))
        self._writers = _share_out(self.specs, world_size)
        self._shares = _shares(self.specs, self._writers)
        self._writes: dict[int, list[Write]] = {}
        self._by_name: dict[int, dict[str, list[Write]]] = {}

    def __len__(self) -> int:
        return self.world_size

    def __iter__(self) -> Iterator[list[Write]]:
        return map(self.__getitem__, range(self.world_size))

    def __getitem__(self, rank: int) -> list[Write]:
        if rank not in self._writes:
            self._writes[rank] = self._part(rank)
        return self._writes[rank]

    def nbytes(self, rank: int) -> int:
        """The size of the rank's part."""
        return sum(write.nbytes for write in self[rank])

    def sources(self, name: str, box: Box) -> Iterator[tuple[int, Write, Box]]:
        """Who wrote what of `box` of a tensor: the rank, its write, and what of the box that has."""
        spec, writers = self.specs[name], sorted(set(self._writers[name]))
        for rank in writers if spec.mesh is None else _holders(spec, box, writers):
            for write in self._named(rank).get(name, ()):
                if overlap := write.box.overlap(box):
                    yield rank, write, overlap

    def _named(self, rank: int) -> dict[str, list[Write]]:
        if rank not in self._by_name:
            named: dict[str, list[Write]] = {}
            for write in self[rank]:
                named.setdefault(write.name, []).append(write)
            self._by_name[rank] = named
        return self._by_name[rank]

    def _part(self, rank: int) -> list[Write]:
        writes: list[Write] = []
        offset = 0
        alike: dict[object, list[Box]] = {}  # the layers of a model are
        for _, name in sorted(chain.from_iterable(of.get(_replica(spec, rank), ()) for spec, of in self._shares)):
            spec = self.specs[name]
            key = (spec, self._writers[name])
            if key not in alike:
                alike[key] = list(self._written(name, spec, rank))
            for box in alike[key]:
                writes.append(Write(name, box, offset, nbytes := box.numel * spec.itemsize))
                offset += nbytes
        return writes

    def _written(self, name: str, spec: TensorSpec, rank: int) -> Iterator[Box]:
        writers = self._writers[name]
        replica = _replica(spec, rank)
        if replica not in writers:
            return
        if spec.nbytes == 0:  # nobody holds any of it, yet it is there
            if rank == 0:
                yield Box((0,) * len(spec.shape), spec.shape)
            return
        axes = _axes(spec, rank)
        if not axes:
            yield Box((), ())
            return
        rows = _count(axes[0])
        for piece, writer in enumerate(writers):
            if writer == replica:
                start, stop = rows * piece // len(writers), rows * (piece + 1) // len(writers)
                yield from _grid([_cut(axes[0], start, stop), *axes[1:]])


def _share_out(specs: Mapping[str, TensorSpec], world_size: int) -> dict[str, tuple[int, ...]]:
    """For each tensor, which replica writes each of its pieces."""
    buffers = sum(spec.nbytes for spec in specs.values() if spec.rank0)
    heaps: dict[int, list[tuple[int, int]]] = {}  # by number of replicas: (bytes so far, replica)
    writers: dict[str, tuple[int, ...]] = {}
    for name, spec in sorted(specs.items(), key=lambda item: (-item[1].nbytes, item[0])):
        shards, replicas = _division(spec, world_size)
        if replicas not in heaps:
            heaps[replicas] = [(buffers * (replicas == world_size and not r), r) for r in range(replicas)]
            heapq.heapify(heaps[replicas])
        if spec.rank0 or not spec.nbytes:
            writers[name] = (0,)
            continue
        size = spec.nbytes // shards
        pieces = max(1, min(replicas, size // PIECE, *spec.shape[:1]))
        chosen = []
        for _ in range(pieces):
            load, replica = heaps[replicas][0]
            heapq.heapreplace(heaps[replicas], (load + size // pieces, replica))
            chosen.append(replica)
        writers[name] = tuple(chosen)
    return writers


Share = dict[int, list[tuple[int, str]]]  # by replica: the tensors of which it writes some, and their places in a part


def _shares(specs: Mapping[str, TensorSpec], writers: Mapping[str, tuple[int, ...]]) -> list[tuple[TensorSpec, Share]]:
    """What each replica writes, for each way in which tensors lie on a mesh; with a spec of those that do so.

    Of thousands of replicas each writes some of a few tensors: who wants to know the part of one need not ask all.
    """
    found: dict[object, tuple[TensorSpec, Share]] = {}
    for place, (name, spec) in enumerate(specs.items()):
        _, share = found.setdefault((spec.mesh, spec.placements), (spec, defaultdict(list)))
        for replica in dict.fromkeys(writers[name]):
            share[replica].append((place, name))
    return list(found.values())


def _holders(spec: TensorSpec, box: Box, replicas: list[int]) -> list[int]:
    """The ranks of a mesh that hold some of `box`, of these replicas."""
    mesh, shards = spec.mesh or (), _shards(spec.placements)
    ranks = []
    for shard in _shards_with(spec, box):
        for replica in replicas:
            rank, stride, left = 0, 1, list(shard)
            for size, sharded in zip(reversed(mesh), reversed(shards), strict=True):
                if sharded:
                    at = left.pop()
                else:
                    replica, at = divmod(replica, size)
                rank, stride = rank + at * stride, stride * size
            ranks.append(rank)
    return sorted(ranks)


@lru_cache(maxsize=4096)
def _shards_with(spec: TensorSpec, box: Box) -> tuple[tuple[int, ...], ...]:
    """Where the shards that have some of `box` stand in the mesh, by its dimensions that shard.

    Found by arithmetic, not among all ranks; and cached, since the layers of a model are alike.
    """
    found: list[tuple[tuple[int, ...], list[Runs]]] = [((), [[(0, size)] if size else [] for size in spec.shape])]
    for size, shard in zip(spec.mesh or (), _shards(spec.placements), strict=True):
        if shard is None:
            continue
        dimension, split_factor = shard
        start, stop = box.offsets[dimension], box.offsets[dimension] + box.sizes[dimension]
        narrower = []
        for place, axes in found:
            for at in _chunks_with(axes[dimension], start, stop, split_factor, size):
                kept = _held(axes[dimension], split_factor, size, at)
                narrower.append(((*place, at), [*axes[:dimension], kept, *axes[dimension + 1 :]]))
        found = narrower
    return tuple(place for place, _ in found)


def _chunks_with(held: Runs, start: int, stop: int, split_factor: int, size: int) -> list[int]:
    """Which of `size` chunks of the indices in `held` (of each of its splits) have some from `start` to `stop`."""
    chunks: set[int] = set()
    length = _count(held)
    at = 0
    for first, count in held:
        low, high = at + max(start - first, 0), at + min(stop - first, count)
        at += count
        for split in range(split_factor):
            begin, end = _chunk(length, split_factor, split)
            if max(low, begin) < min(high, end):
                most = -(-(end - begin) // size)
                chunks.update(range((max(low, begin) - begin) // most, (min(high, end) - 1 - begin) // most + 1))
    return sorted(chunks)


@lru_cache(maxsize=4096)
def _shards(placements: tuple[str, ...]) -> tuple[tuple[int, int] | None, ...]:
    """Per dimension of the mesh the tensor's dimension and the split factor; None where it is replicated."""
    matches = [_PLACEMENT.fullmatch(placement) for placement in placements]
    if None in matches:
        raise ValueError(f"placements {list(placements)} are unknown")
    found = [[int(group) for group in match.groups() if group] for match in matches if match]
    return tuple((numbers[0], numbers[1] if len(numbers) > 1 else 1) if numbers else None for numbers in found)


def _coordinates(mesh: tuple[int, ...], rank: int) -> list[int]:
    """Where `rank` stands in the mesh, whose ranks are numbered in row-major order."""
    coordinates = []
    for size in reversed(mesh):
        rank, coordinate = divmod(rank, size)
        coordinates.append(coordinate)
    return coordinates[::-1]


def _division(spec: TensorSpec, world_size: int) -> tuple[int, int]:
    """Into how many shards a tensor is cut, and how many replicas there are of each."""
    if spec.mesh is None:
        return 1, world_size
    sharded = [size for size, shard in zip(spec.mesh, _shards(spec.placements), strict=True) if shard]
    return math.prod(sharded), math.prod(spec.mesh) // math.prod(sharded)


def _replica(spec: TensorSpec, rank: int) -> int:
    """Which of the replicas of its shard `rank` holds."""
    if spec.mesh is None:
        return rank
    replica = 0
    for size, shard, at in zip(spec.mesh, _shards(spec.placements), _coordinates(spec.mesh, rank), strict=True):
        if shard is None:
            replica = replica * size + at
    return replica


def _axes(spec: TensorSpec, rank: int) -> list[Runs]:
    """Per dimension of the tensor, the indices that `rank` holds.

    The mesh is gone through from left to right; each shard takes its chunk of what is left, as
    torch.distributed.tensor does. A _StridedShard chunks what is left `split_factor` times first, and takes its
    chunk of each: so FSDP over a tensor-parallel dimension holds interleaved rows.
    """
    axes: list[Runs] = [[(0, size)] if size else [] for size in spec.shape]
    mesh = spec.mesh or ()
    for size, shard, at in zip(mesh, _shards(spec.placements), _coordinates(mesh, rank), strict=True):
        if shard is None:
            continue
        dimension, split_factor = shard
        axes[dimension] = _held(axes[dimension], split_factor, size, at)
    return axes


def _held(held: Runs, split_factor: int, size: int, at: int) -> Runs:
    """Chunk `at` of `size` of each split of the indices in `held`."""
    kept: Runs = []
    for split in range(split_factor):
        start, stop = _chunk(_count(held), split_factor, split)
        first, last = _chunk(stop - start, size, at)
        kept += _cut(held, start + first, start + last)
    return _joined(kept)


def _chunk(size: int, chunks: int, index: int) -> tuple[int, int]:
    """torch.chunk's rule: all chunks but the last ones are of ceil(size / chunks); those may be short or empty."""
    most = -(-size // chunks)
    return min(size, most * index), min(size, most * (index + 1))


def _cut(runs: Runs, start: int, stop: int) -> Runs:
    """Positions `start` to `stop` of the indices in `runs`."""
    kept: Runs = []
    at = 0
    for first, count in runs:
        low, high = max(start - at, 0), min(stop - at, count)
        if low < high:
            kept.append((first + low, high - low))
        at += count
    return kept


def _joined(runs: Runs) -> Runs:
    """The same indices with neighbouring runs made one."""
    joined: Runs = []
    for first, count in runs:
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((first, count))
    return joined


def _count(runs: Runs) -> int:
    return sum(count for _, count in runs)


def _positions(runs: Runs) -> list[int]:
    """Where each run starts in the local tensor."""
    return [_count(runs[:k]) for k in range(len(runs))]


def _grid(axes: list[Runs]) -> Iterator[Box]:
    """The boxes that the runs of all dimensions span together."""
    for runs in product(*axes):
        yield Box(tuple(first for first, _ in runs), tuple(count for _, count in runs))
