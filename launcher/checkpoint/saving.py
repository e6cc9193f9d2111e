"""Writing a checkpoint, in three steps: `snapshot` the state into one flat buffer a rank, `write` it, `publish` it.

Only the first needs the state to hold still. Each takes the world whose group carries its exchanges, so that the
other two can run beside training on a group of their own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash

from launcher.checkpoint.agree import agreed
from launcher.checkpoint.files import FileEntry, header, write_file
from launcher.checkpoint.index import INDEX, Index, Json, check_json, encode
from launcher.checkpoint.layout import Box, Plan, TensorSpec, parts
from launcher.checkpoint.state import State, bits, describe_all, host_buffer, local_bits
from launcher.checkpoint.store import Store
from launcher.errors import CheckpointError
from launcher.world import World

__all__ = ["Snapshot", "Written", "publish", "save", "snapshot", "write"]


@dataclass(frozen=True)
class Snapshot:
    """A state as it was: this rank's part of the tensors in host memory, everything else in full."""

    step: int
    attempt: int
    plan: Plan
    aliases: Mapping[str, str]
    values: Mapping[str, Json]
    rank_values: Sequence[Mapping[str, Json]]
    exceptions: tuple[str, ...]
    facts: Mapping[str, Json]
    data: torch.Tensor
    """Bytes, shape (size of the part,): the part as it stands in the file."""


class Written(NamedTuple):
    """A rank's file, and where its part starts in it."""

    file: FileEntry
    offset: int


def save(
    store: Store, world: World, step: int, state: State, *, attempt: int, facts: Mapping[str, Json] | None = None
) -> Path:
    """Write, publish and prune: on return the checkpoint of `step` is durable. Called by all ranks together.

    A former checkpoint of the same step is replaced: an allowed change of the config may have led elsewhere.

    Raises:
        CheckpointError: on every rank, the same; older checkpoints are untouched, and nothing half is left behind.
    """
    taken = snapshot(world, step, state, attempt=attempt, facts=facts or {})
    return publish(store, world, taken, write(store, world, taken))


def snapshot(world: World, step: int, state: State, *, attempt: int, facts: Mapping[str, Json]) -> Snapshot:
    """Copy what this rank will write into one buffer, in the layout of the file.

    Raises:
        CheckpointError: something cannot be saved exactly, or the ranks hold different states.
    """
    copied: list[tuple[Plan, dict[str, str], dict[str, Json], torch.Tensor]] = []

    def work() -> tuple[str, dict[str, Json]]:
        for name, value in (*state.values.items(), *state.rank_values.items(), ("facts", facts)):
            check_json(value, name)
        specs, aliases = describe_all(state, world)
        plan = Plan(specs, world.world_size)
        description = _description(step, attempt, specs, aliases)
        copied.append((plan, aliases, description, _copy(plan, state, world.rank)))
        return xxhash.xxh3_128_hexdigest(json.dumps(description).encode()), deepcopy(state.rank_values)

    outcomes = agreed(world, work)
    plan, aliases, description, data = copied[0]
    if any(digest != outcomes[0][0] for digest, _ in outcomes):
        raise CheckpointError(_difference(world.gather(description)))
    rank_values = [values for _, values in outcomes]
    values = deepcopy(state.values)
    return Snapshot(step, attempt, plan, aliases, values, rank_values, state.exceptions, dict(facts), data)


def write(store: Store, world: World, taken: Snapshot) -> list[Written]:
    """Write and fsync the file of every rank, in a directory that is no checkpoint yet; what came of it, by rank.

    Raises:
        CheckpointError: a rank could not; the directory is gone again.
    """
    partial = store.partial(taken.step, taken.attempt)
    name = f"rank-{world.rank:05d}-of-{world.world_size:05d}.safetensors"

    def work() -> Written:
        head = header(taken.plan[world.rank], taken.plan.specs)
        return Written(write_file(partial / name, head, taken.data.numpy().data), len(head))

    with _abandoning(partial, world):
        agreed(world, lambda: store.begin(taken.step, taken.attempt) if world.is_main else None)
        return agreed(world, work)


def publish(store: Store, world: World, taken: Snapshot, written: list[Written]) -> Path:
    """Complete the directory with its index, give it its final name, and remove what is then too old.

    Raises:
        CheckpointError: it could not be; the directory is gone again.
    """
    partial = store.partial(taken.step, taken.attempt)

    def work() -> None:
        index = Index(
            step=taken.step,
            attempt=taken.attempt,
            world_size=world.world_size,
            tensors=taken.plan.specs,
            aliases=taken.aliases,
            files=[rank.file for rank in written],
            parts=[(rank, offset) for rank, (_, offset) in enumerate(written)],
            values=taken.values,
            rank_values=taken.rank_values,
            exceptions=taken.exceptions,
            facts=taken.facts,
        )
        write_file(partial / INDEX, b"", memoryview(encode(index)))
        store.publish(partial, taken.attempt)
        store.prune(taken.attempt, spare=taken.step)

    with _abandoning(partial, world):
        agreed(world, lambda: work() if world.is_main else None)
    return store.path(taken.step)


@contextmanager
def _abandoning(partial: Path, world: World) -> Iterator[None]:
    """Leave nothing half behind when a save fails."""
    try:
        yield
    except CheckpointError as error:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)  # what cannot be removed is no checkpoint, and tried again
        raise CheckpointError(f"{partial.stem} could not be saved: {error}") from None


def _copy(plan: Plan, state: State, rank: int) -> torch.Tensor:
    """This rank's part, as bytes in the order of the plan."""
    data = host_buffer(plan.nbytes(rank))
    for write in plan[rank]:
        if write.nbytes:
            spec = plan.specs[write.name]
            room = bits(data[write.offset : write.offset + write.nbytes], spec.itemsize).view(write.box.sizes)
            room.copy_(local_bits(state.tensors[write.name])[_place(spec, rank, write.box)])
    return data


def _place(spec: TensorSpec, rank: int, box: Box) -> tuple[slice, ...]:
    """Where a box is in the local tensor of a rank that holds all of it."""
    for held, at in parts(spec, rank):
        if held.overlap(box) == box:
            starts = (there + start - first for there, start, first in zip(at, box.offsets, held.offsets, strict=True))
            return tuple(slice(start, start + size) for start, size in zip(starts, box.sizes, strict=True))
    raise AssertionError(f"rank {rank} is to write {box}, which it does not hold")


def _description(
    step: int, attempt: int, specs: Mapping[str, TensorSpec], aliases: Mapping[str, str]
) -> dict[str, Json]:
    """What all ranks must have alike."""
    tensors = {name: asdict(spec) for name, spec in sorted(specs.items())}
    tied = {name: f"tied to {holder}" for name, holder in sorted(aliases.items())}
    return {"(step)": step, "(attempt)": attempt, **tensors, **tied}


def _difference(descriptions: list[dict[str, Json]]) -> str:
    """Which rank holds what else than rank 0, in a line."""
    for rank, description in enumerate(descriptions):
        for name in sorted(description.keys() | descriptions[0].keys()):
            if description.get(name) != descriptions[0].get(name):
                return (
                    f"the ranks hold different states: {name} is {_said(description.get(name))} on rank {rank} "
                    f"and {_said(descriptions[0].get(name))} on rank 0"
                )
    raise AssertionError("the descriptions are alike")


def _said(description: Json) -> str:
    return "missing" if description is None else str(description)
