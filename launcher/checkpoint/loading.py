"""Reading a checkpoint into live tensors, from any world size and placement to any other, bit for bit.

Each rank derives from the index which bytes of which files it needs, reads their blocks, verifies each, and puts the
bytes together in a buffer of its own. Only when every rank has all of its bytes are the live tensors changed, by a
copy that cannot fail: so all ranks load, or none has changed anything.

The buffer costs as much host memory as a rank's tensors; saves use it again. The alternative, to verify in a first pass
and to read into the live tensors in a second, would read everything twice, and the second could still fail half way.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from launcher.checkpoint.agree import agreed
from launcher.checkpoint.buffer import Buffer
from launcher.checkpoint.files import FileReader, Segment
from launcher.checkpoint.index import Index, read_index
from launcher.checkpoint.layout import Box, TensorSpec, Write, local_shape, parts
from launcher.checkpoint.state import SUBCLASSES, State, bits, describe_all, flattened, local_bits
from launcher.errors import CheckpointError, DamagedError
from launcher.world import World

__all__ = ["Stage", "load"]

_ALIGNMENT = 64  # bytes


def load(
    path: Path, world: World, state: State, *, only: str | Collection[str] = "", buffer: Buffer | None = None
) -> Index:
    """Fill the tensors of `state` in place from the checkpoint in directory `path`. Called by all ranks together.

    Names, shapes and dtypes must be the checkpoint's, and all of them: nothing is cast, skipped or left as it was.
    With `only` (a prefix: "model/"; or names) that holds for those alone, and no other tensor is touched.
    What the values mean is the caller's business: they are in the index that is returned. `buffer` is host memory to
    read into first, kept for later.

    Raises:
        DamagedError: on every rank, the same: its bytes are not what was written; no tensor has been changed.
        CheckpointError: likewise: it is of another model, or cannot be read here.
    """
    room = buffer or Buffer()
    state = flattened(state)
    staged: list[tuple[Index, Stage]] = []

    def work() -> None:
        index = read_index(path)
        specs, tied = describe_all(state, world)
        wanted = _match(path.name, index, specs, tied, only)
        _check_subclasses(path.name, index, state, only)
        _check_room(state, wanted)
        stage = Stage(path, index, {name: specs[name] for name in wanted}, world.rank, room)
        _check_files(path, index, world)
        stage.fill(wanted)
        staged.append((index, stage))

    agreed(world, work)
    index, stage = staged[0]
    for name, staged_bits in stage.tensors():
        local_bits(state.tensors[name]).copy_(staged_bits, non_blocking=True)
    room.copied()
    room.settle()
    return index


def _match(
    where: str,
    index: Index,
    specs: Mapping[str, TensorSpec],
    tied: Mapping[str, str],
    only: str | Collection[str],
) -> dict[str, str]:
    """For each live tensor the name in the checkpoint that holds its data."""
    there = {name for name in (*index.tensors, *index.aliases) if _within(name, only)}
    here = {name for name in (*specs, *tied) if _within(name, only)}
    if only and not here:
        raise CheckpointError(f"nothing here begins with {only}, so {where} would change nothing")
    if missing := here - there:
        raise CheckpointError(f"{where} has no {_first(missing)}, which is here: another model's checkpoint")
    if left := there - here:
        raise CheckpointError(f"{where} has {_first(left)}, which is not here: another model's checkpoint")
    for name, holder in tied.items():
        if name in here and index.holder(name) != index.holder(holder):
            raise CheckpointError(f"{where}: {name} is tied to {holder} here and has data of its own there")
    for name in sorted(here):
        live, saved = specs[tied.get(name, name)], index.tensors[index.holder(name)]
        if live.shape != saved.shape:
            raise CheckpointError(
                f"{where}: {name} is {_said(saved.shape)} there and {_said(live.shape)} here: "
                "another model's checkpoint"
            )
        if live.dtype != saved.dtype:
            raise CheckpointError(f"{where}: {name} is {saved.dtype} there and {live.dtype} here; nothing is cast")
    return {name: index.holder(name) for name in specs if name in here}


def _check_subclasses(where: str, index: Index, state: State, only: str | Collection[str]) -> None:
    """Flattened tensors of another kind may look alike and mean something else."""
    there, here = index.values.get(SUBCLASSES, {}), state.values.get(SUBCLASSES, {})
    for name, kind in here.items():
        saved = there.get(name) if isinstance(there, dict) else None
        if saved != kind and (not isinstance(only, str) or name.startswith(only)):
            raise CheckpointError(f"{where}: {name} is {saved or 'a plain tensor'} there and {kind} here")


def _within(name: str, only: str | Collection[str]) -> bool:
    return name.startswith(only) if isinstance(only, str) else name in only


def _first(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return f"{first} (and {len(others)} more)" if others else first


def _said(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _check_room(state: State, names: Iterable[str]) -> None:
    """A tensor whose elements share their memory can be saved, but not filled."""
    for name in names:
        local = local_bits(state.tensors[name])
        if any(size > 1 and not stride for size, stride in zip(local.shape, local.stride(), strict=True)):
            raise CheckpointError(f"{name} is expanded, so it cannot be loaded into: clone it")


def _check_files(path: Path, index: Index, world: World) -> None:
    """Every file is there, has its size and a sound header; the ranks share the looking."""
    for entry in index.files[world.rank :: world.world_size]:
        with FileReader(path, entry) as reader:
            reader.verify(entry.header)


@dataclass(frozen=True)
class _Piece:
    """A box that a file holds and a staged tensor needs."""

    rank: int
    """Who wrote it."""
    start: int
    """Byte of that rank's part at which its first element is."""
    stop: int
    """Byte after its last element; what lies between may belong to other boxes."""
    sizes: tuple[int, ...]
    itemsize: int
    source_strides: tuple[int, ...]
    target: int
    """Byte of the stage at which its first element goes."""
    target_strides: tuple[int, ...]

    @property
    def straight(self) -> bool:
        """Whether it is one range of bytes both there and here."""
        dense = _strides(self.sizes, self.itemsize)
        return all(
            size == 1 or there == here == want
            for size, there, here, want in zip(self.sizes, self.source_strides, self.target_strides, dense, strict=True)
        )


class Stage:
    """A rank's local tensors in one buffer, and what of the checkpoint goes where in it."""

    def __init__(self, path: Path, index: Index, specs: Mapping[str, TensorSpec], rank: int, buffer: Buffer) -> None:
        self._path, self._index, self._specs, self._rank = path, index, specs, rank
        self._shapes = {name: local_shape(spec, rank) for name, spec in specs.items()}
        self._offsets: dict[str, int] = {}
        size = 0
        for name, spec in specs.items():
            self._offsets[name] = size
            size += -(-self._nbytes(name, spec) // _ALIGNMENT) * _ALIGNMENT
        self._flat = buffer.room(size)
        self._buffer: npt.NDArray[np.uint8] = self._flat.numpy()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The staged local tensors, as integers of their element size."""
        for name, spec in self._specs.items():
            start = self._offsets[name]
            room = self._flat[start : start + self._nbytes(name, spec)]
            yield name, bits(room, spec.itemsize).view(self._shapes[name])

    def fill(self, wanted: Mapping[str, str]) -> None:
        """Read everything; each block of a part once.

        Raises:
            DamagedError: a file is damaged, or shorter than its part.
        """
        parts = self._index.parts
        pieces = sorted(self._pieces(wanted), key=lambda piece: (parts[piece.rank][0], piece.rank, piece.start))
        for file, of_file in groupby(pieces, key=lambda piece: parts[piece.rank][0]):
            with FileReader(self._path, self._index.files[file]) as reader:
                for rank, of_part in groupby(of_file, key=lambda piece: piece.rank):
                    straight: list[tuple[int, memoryview]] = []
                    for joined in _joined(of_part):
                        if len(joined) == 1 and joined[0].straight:
                            piece, size = joined[0], joined[0].stop - joined[0].start
                            straight.append((piece.start, self._buffer.data[piece.target : piece.target + size]))
                        else:
                            self._read(reader, parts[rank][1], joined)
                    reader.scatter(parts[rank][1], straight)

    def _read(self, reader: FileReader, part: Segment, pieces: list[_Piece]) -> None:
        """Read pieces whose ranges overlap, or have gaps."""
        start, stop = pieces[0].start, max(piece.stop for piece in pieces)
        scratch = np.empty(stop - start, dtype=np.uint8)
        reader.read(part, start, scratch.data)
        for piece in pieces:
            source = _view(scratch, piece, piece.start - start, piece.source_strides)
            _view(self._buffer, piece, piece.target, piece.target_strides)[...] = source

    def _pieces(self, wanted: Mapping[str, str]) -> Iterator[_Piece]:
        for name, holder in wanted.items():
            for box, at in parts(self._specs[name], self._rank):
                for rank, write, overlap in self._index.plan.sources(holder, box):
                    place = [
                        first + inner for first, inner in zip(at, _minus(overlap.offsets, box.offsets), strict=True)
                    ]
                    yield self._piece(name, rank, write, overlap, place)

    def _piece(self, name: str, rank: int, write: Write, box: Box, place: Sequence[int]) -> _Piece:
        """What `rank` wrote of a box that this rank holds at `place` of its local tensor."""
        if write.offset + write.nbytes > self._index.parts[rank][1].size:
            raise DamagedError(
                f"{self._path.name}: the part of rank {rank} is too short for {name}: its index is wrong"
            )
        itemsize = self._specs[name].itemsize
        there, here = _strides(write.box.sizes, itemsize), _strides(self._shapes[name], itemsize)
        start = write.offset + _dot(_minus(box.offsets, write.box.offsets), there)
        stop = start + _dot([size - 1 for size in box.sizes], there) + itemsize
        return _Piece(rank, start, stop, box.sizes, itemsize, there, self._offsets[name] + _dot(place, here), here)

    def _nbytes(self, name: str, spec: TensorSpec) -> int:
        return math.prod(self._shapes[name]) * spec.itemsize


def _joined(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces in ascending order, those whose ranges overlap together: as columns of the same rows do."""
    joined: list[_Piece] = []
    end = 0
    for piece in pieces:
        if joined and piece.start >= end:
            yield joined
            joined = []
        joined.append(piece)
        end = max(end, piece.stop)
    if joined:
        yield joined


def _view(buffer: npt.NDArray[np.uint8], piece: _Piece, offset: int, strides: tuple[int, ...]) -> npt.NDArray[Any]:
    """The piece's elements in a buffer, as integers of their size."""
    return np.ndarray(piece.sizes, dtype=f"u{piece.itemsize}", buffer=buffer.data, offset=offset, strides=strides)


def _strides(sizes: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Bytes from one index to the next, per dimension, of a dense array."""
    strides = [itemsize]
    for size in reversed(sizes[1:]):
        strides.append(strides[-1] * size)
    return tuple(strides[::-1][: len(sizes)])


def _dot(places: Iterable[int], strides: Iterable[int]) -> int:
    return sum(place * stride for place, stride in zip(places, strides, strict=True))


def _minus(a: Iterable[int], b: Iterable[int]) -> list[int]:
    return [x - y for x, y in zip(a, b, strict=True)]
