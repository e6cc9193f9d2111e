"""Two checkpoints side by side: what is only in one, what is described otherwise, and by how much numbers differ.

Tensors are compared by their bits first: equal ones are equal whatever they mean, NaNs too. Only of others the numbers
are looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from launcher.checkpoint.index import Index, Json, read_index
from launcher.checkpoint.layout import TensorSpec
from launcher.checkpoint.reading import as_written, read_tensors
from launcher.checkpoint.state import bits
from launcher.errors import CheckpointError

__all__ = ["ABSENT", "Comparison", "Difference", "Numbers", "compare", "numbers"]

_CHUNK = 1 << 20  # elements, of which copies in float64 are made
ABSENT = object()
"""Stands for a member that one of two values has not."""


@dataclass(frozen=True)
class Numbers:
    """By how much the elements of two tensors of one shape and dtype differ."""

    elements: int
    differing: int
    """How many have other bits."""
    not_finite: int
    """How many of these are NaN or infinite in either; the largest differences are those of the others."""
    largest_abs: float
    largest_rel: float
    """Of |a - b| / max(|a|, |b|)."""


@dataclass(frozen=True)
class Difference:
    """What differs about one tensor, and what each checkpoint says of it."""

    name: str
    what: str
    """`only in A`, `only in B`, `shape`, `dtype`, `tied` or `numbers`."""
    a: str
    b: str
    numbers: Numbers | None = None


@dataclass(frozen=True)
class Comparison:
    """All differences, and what was compared."""

    facts: list[tuple[str, Json, Json]]
    """Names of what differs beside tensors (`step`, `values.loaders.loader.samples_seen`), with both values, or
    `ABSENT`."""
    tensors: list[Difference]
    """The largest differences first."""
    compared: int
    """Names that both have."""

    @property
    def same(self) -> bool:
        """Whether they are alike, bit for bit."""
        return not self.facts and not self.tensors


def compare(
    a: Path, b: Path, *, only: str | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Comparison:
    """Compare the checkpoints in two directories, tensor by tensor, in the memory of two of the largest.

    With `only`, a pattern as the shell's (`model/*`), nothing but the tensors whose names match it.
    `progress(bytes compared, of all)` is called now and then.

    Raises:
        DamagedError: one of them is damaged.
        CheckpointError: it cannot be read here, or no name matches.
    """
    first, second = read_index(a), read_index(b)
    names_a, names_b = _names(first, only), _names(second, only)
    if only is not None and not names_a | names_b:
        raise CheckpointError(f"no tensor is called {only}: launcher ckpt diff without --only lists what differs")
    found = [Difference(name, "only in A", _said(first, name), "", None) for name in sorted(names_a - names_b)]
    found += [Difference(name, "only in B", "", _said(second, name), None) for name in sorted(names_b - names_a)]
    common = sorted(names_a & names_b)
    found += _described_otherwise(first, second, common, names_a | names_b)
    found += sorted(_numbers(a, b, first, second, common, progress), key=_size)
    facts = [] if only is not None else list(_facts(first, second))
    return Comparison(facts, found, len(common))


def numbers(a: torch.Tensor, b: torch.Tensor) -> Numbers | None:
    """By how much two tensors of one shape and dtype differ; None where they are alike bit for bit."""
    all_a, all_b = (bits(tensor.contiguous().flatten(), tensor.element_size()) for tensor in (a, b))
    if torch.equal(all_a, all_b):
        return None
    differing = not_finite = 0
    largest_abs = largest_rel = 0.0
    for bits_a, bits_b in zip(all_a.split(_CHUNK), all_b.split(_CHUNK), strict=True):
        other = bits_a != bits_b
        x, y = (part[other].view(a.dtype).to(torch.float64) for part in (bits_a, bits_b))
        finite = x.isfinite() & y.isfinite()
        differing += len(x)
        not_finite += len(x) - int(finite.sum())
        x, y = x[finite], y[finite]
        if len(x):
            distance = (x - y).abs().clamp(max=torch.finfo(torch.float64).max)
            if not a.dtype.is_floating_point:
                distance = distance.clamp(min=1)  # float64 takes large integers for their neighbours
            scale = torch.maximum(x.abs(), y.abs())
            largest_abs = max(largest_abs, distance.max().item())
            largest_rel = max(largest_rel, (distance / scale.where(scale > 0, 1)).max().item())
    return Numbers(a.numel(), differing, not_finite, largest_abs, largest_rel)


def _names(index: Index, only: str | None) -> set[str]:
    names = {*index.tensors, *index.aliases}
    return names if only is None else {name for name in names if fnmatchcase(name, only)}


def _said(index: Index, name: str) -> str:
    spec = index.tensors[index.holder(name)]
    return f"{spec.dtype} {_shape(spec)}"


def _shape(spec: TensorSpec) -> str:
    return "x".join(map(str, spec.shape)) or "scalar"


def _described_otherwise(a: Index, b: Index, names: list[str], within: set[str]) -> Iterator[Difference]:
    """Tensors of another shape or dtype, and those that share their data with others of `within` in one alone."""
    ties_a, ties_b = _ties(a), _ties(b)
    for name in names:
        spec_a, spec_b = a.tensors[a.holder(name)], b.tensors[b.holder(name)]
        if spec_a.shape != spec_b.shape:
            yield Difference(name, "shape", _shape(spec_a), _shape(spec_b))
        if spec_a.dtype != spec_b.dtype:
            yield Difference(name, "dtype", spec_a.dtype, spec_b.dtype)
        others_a, others_b = (ties.get(name, set()) & within - {name} for ties in (ties_a, ties_b))
        if others_a != others_b:
            yield Difference(name, "tied", _tied(others_a), _tied(others_b))


def _tied(others: set[str]) -> str:
    return f"to {', '.join(sorted(others))}" if others else "to none"


def _ties(index: Index) -> dict[str, set[str]]:
    """For each name that shares its data the names that do, whichever of them holds it."""
    groups: dict[str, set[str]] = {}
    for name, holder in index.aliases.items():
        groups.setdefault(holder, {holder}).add(name)
    return {name: group for group in groups.values() for name in group}


def _numbers(
    path_a: Path, path_b: Path, a: Index, b: Index, names: list[str], progress: Callable[[int, int], None]
) -> Iterator[Difference]:
    """Tensors that are described alike and differ; those that share their data on both sides once."""
    pairs: dict[tuple[str, str], str] = {}
    for name in names:
        spec_a, spec_b = a.tensors[a.holder(name)], b.tensors[b.holder(name)]
        if (spec_a.shape, spec_a.dtype) == (spec_b.shape, spec_b.dtype):
            pairs.setdefault((a.holder(name), b.holder(name)), name)
    order = as_written(a, pairs.values())
    total, done = sum(a.tensors[a.holder(name)].nbytes for name in order), 0
    for (name, x), (_, y) in zip(read_tensors(path_a, a, order), read_tensors(path_b, b, order), strict=True):
        found = numbers(x, y)
        if found is not None:
            yield Difference(name, "numbers", _said(a, name), _said(b, name), found)
        done += x.nbytes
        progress(done, total)


def _size(difference: Difference) -> tuple[bool, float, str]:
    """Sorts what is not finite first, then the largest difference, then names."""
    found = difference.numbers
    assert found is not None
    return not found.not_finite, -found.largest_abs, difference.name


def _facts(a: Index, b: Index) -> Iterator[tuple[str, Json, Json]]:
    """What differs beside tensors."""
    for name in ("step", "world_size", "exceptions", "values"):
        yield from _json_differences(name, getattr(a, name), getattr(b, name))
    if a.world_size == b.world_size:
        yield from _json_differences("rank_values", a.rank_values, b.rank_values)
    elif any(a.rank_values) or any(b.rank_values):  # each rank's own, of other ranks
        yield "rank_values", f"of {a.world_size} ranks", f"of {b.world_size} ranks"


def _json_differences(name: str, a: Json, b: Json) -> Iterator[tuple[str, Json, Json]]:
    """The members in which two JSON values differ, each by its path."""
    try:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted(a.keys() | b.keys()):
                yield from _json_differences(f"{name}.{key}", a.get(key, ABSENT), b.get(key, ABSENT))
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            for place, (x, y) in enumerate(zip(a, b, strict=True)):
                yield from _json_differences(f"{name}[{place}]", x, y)
        elif a is ABSENT or b is ABSENT or json.dumps(a) != json.dumps(b):
            yield name, a, b
    except RecursionError:
        raise CheckpointError(f"{name[:40]}... is nested too deeply to be compared") from None
