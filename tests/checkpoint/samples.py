"""Tensors whose bits follow from their names, what ranks hold of them, and checkpoints made without the ranks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from launcher.checkpoint import Index, Plan, State, TensorSpec
from launcher.checkpoint.files import FileEntry, create_file, header, part_sizes, write_part
from launcher.checkpoint.index import INDEX, encode
from launcher.checkpoint.saving import Stager
from launcher.world import World

NODE = 2  # ranks that write into one file


def sample(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of random bits (NaNs and infinities among them), the same for a name wherever it is made."""
    return _sample(name, shape, dtype).clone()


@cache
def _sample(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * dtype.itemsize
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    return torch.randint(256, (count,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes: what equal bits can be told by, when NaNs are among them."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(raw(a), raw(b))


def held(tensor: torch.Tensor, spec: TensorSpec, rank: int) -> torch.Tensor:
    """What `rank` holds of a tensor, by torch.chunk itself: the oracle for `boxes`."""
    coordinates, rest = [], rank
    for size in reversed(spec.mesh or ()):
        rest, coordinate = divmod(rest, size)
        coordinates.insert(0, coordinate)
    for placement, size, at in zip(spec.placements, spec.mesh or (), coordinates, strict=True):
        if placement != "R":
            dimension, *split_factor = (int(number) for number in placement.strip("_S()").split(","))
            splits = chunked(tensor, split_factor[0] if split_factor else 1, dimension)
            tensor = torch.cat([chunked(split, size, dimension)[at] for split in splits], dimension)
    return tensor


def chunked(tensor: torch.Tensor, count: int, dimension: int) -> list[torch.Tensor]:
    """torch.chunk, with the empty chunks it leaves out."""
    chunks = list(torch.chunk(tensor, count, dimension))
    return chunks + [tensor.narrow(dimension, 0, 0)] * (count - len(chunks))


def write_checkpoint(
    path: Path, tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec], world_size: int, **members: object
) -> Index:
    """A checkpoint as `world_size` ranks would write it."""
    path.mkdir()
    plan = Plan(specs, world_size)
    files, parts = [], []
    for first in range(0, world_size, NODE):
        mates = range(first, min(first + NODE, world_size))
        number, head = len(files), header([plan[rank] for rank in mates], specs)
        file = path / f"node-{number:05d}-of-{-(-world_size // NODE):05d}.safetensors"
        sizes = part_sizes([plan.nbytes(rank) for rank in mates])
        total = len(head) + sum(sizes)
        files.append(FileEntry(file.name, total, create_file(file, head, total)))
        start = len(head)
        for rank, size in zip(mates, sizes, strict=True):
            stager = Stager(World(rank=rank, world_size=world_size))
            state = State({name: held(tensor, specs[name], rank) for name, tensor in tensors.items()})
            stager._derive(specs)
            parts.append((number, write_part(file, start, stager._copy(state).numpy().data, size)))
            start += size
    empty = Index(1, 1, world_size, specs, {}, files, parts, {}, [{}] * world_size, [], {})
    index = replace(empty, **members)
    write_index(path, index)
    return index


def write_index(path: Path, index: Index) -> None:
    (path / INDEX).write_bytes(encode(index))
