"""Writing a checkpoint, in two steps: a rank takes a `Snapshot` of its state, and all ranks `write` theirs together.

Only the first needs the state to hold still, and it exchanges nothing; the second may run beside training, over a
group of its own (`launcher.checkpoint.writer`).
"""

from __future__ import annotations

import json
import shutil
import socket
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from launcher.checkpoint.agree import agreed
from launcher.checkpoint.buffer import Buffer
from launcher.checkpoint.files import (
    FileEntry,
    FileReader,
    Segment,
    create_file,
    header,
    part_sizes,
    write_file,
    write_part,
)
from launcher.checkpoint.index import INDEX, Index, Json, check_json, encode, read_index
from launcher.checkpoint.layout import Box, Plan, TensorSpec, parts
from launcher.checkpoint.state import State, bits, check_state, flattened, local_bits
from launcher.checkpoint.store import Store, step_name
from launcher.errors import CheckpointError, DamagedError, LauncherError, ReplacedError
from launcher.world import World

__all__ = ["Snapshot", "Stager", "node_files", "save", "write"]

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Snapshot:
    """A rank's state as it was: its part of the tensors in host memory, everything else in full."""

    step: int
    attempt: int
    plan: Plan
    aliases: Mapping[str, str]
    values: Mapping[str, Json]
    rank_values: Mapping[str, Json]
    exceptions: tuple[str, ...]
    facts: Mapping[str, Json]
    buffer: Buffer
    data: torch.Tensor
    """Bytes, shape (size of the part,): the part as it stands in the file, once `buffer` is settled."""


class Stager:
    """Takes snapshots, one at a time, into a buffer that is used again; what does not change is derived once."""

    def __init__(self, world: World) -> None:
        self.buffer = Buffer(world.device)
        self._world = world
        self._plan = Plan({}, world.world_size)
        self._places: list[tuple[int, int, str, tuple[slice, ...]]] = []

    def take(self, step: int, state: State, *, attempt: int, facts: Mapping[str, Json] | None = None) -> Snapshot:
        """Copy what this rank will write. On a GPU the copies are queued, in order with whatever changes the state.

        The last snapshot's data is overwritten.

        Raises:
            CheckpointError: something cannot be saved exactly.
            MemoryError: there is no room for a copy.
        """
        state = flattened(state)
        check_json(facts or {}, "facts")
        specs, aliases = check_state(state, self._world)
        self._derive(specs)
        return Snapshot(
            step=step,
            attempt=attempt,
            plan=self._plan,
            aliases=aliases,
            values=deepcopy(state.values),
            rank_values=deepcopy(state.rank_values),
            exceptions=state.exceptions,
            facts=deepcopy(dict(facts or {})),
            buffer=self.buffer,
            data=self._copy(state),
        )

    def prepare(self, state: State) -> Callable[[], None]:
        """Derive what a snapshot of such a state takes; the result, called in any thread, makes its memory warm.

        Raises:
            CheckpointError: it cannot be saved.
        """
        specs, _ = check_state(flattened(state), self._world)
        self._derive(specs)
        size = self._plan.nbytes(self._world.rank)
        return lambda: self.buffer.warm(size)

    def _derive(self, specs: Mapping[str, TensorSpec]) -> None:
        if specs == self._plan.specs:
            return
        self._plan = Plan(specs, self._world.world_size)
        rank = self._world.rank
        self._places = [
            (write.offset, write.nbytes, write.name, _place(specs[write.name], rank, write.box))
            for write in self._plan[rank]
            if write.nbytes
        ]

    @torch.no_grad()
    def _copy(self, state: State) -> torch.Tensor:
        """This rank's part, as bytes in the order of the plan."""
        data = self.buffer.room(self._plan.nbytes(self._world.rank))
        for offset, nbytes, name, place in self._places:
            source = local_bits(state.tensors[name])[place]
            room = bits(data[offset : offset + nbytes], source.element_size()).view(source.shape)
            room.copy_(source, non_blocking=True)
        self.buffer.copied()
        return data


def save(
    store: Store, world: World, step: int, state: State, *, attempt: int, facts: Mapping[str, Json] | None = None
) -> Path:
    """Write, publish, verify and prune: on return the checkpoint of `step` is durable. Called by all ranks together.

    A former checkpoint of the same step is replaced: an allowed change of the config may have led elsewhere.

    Raises:
        CheckpointError: on every rank, the same; older checkpoints are untouched, and nothing half is left behind.
    """
    taken = Stager(world)
    return write(store, world, node_files(world), step, lambda: taken.take(step, state, attempt=attempt, facts=facts))


def node_files(world: World) -> tuple[int, ...]:
    """For each rank the file that it writes into: one for the ranks that share a kernel, and so its view of a file.

    Ranks of two machines never write into one file, which a network filesystem need not keep coherent.
    """
    try:
        kernel = BOOT_ID.read_text()
    except OSError:
        kernel = ""
    nodes = world.gather((socket.gethostname(), kernel))
    numbers = {node: number for number, node in enumerate(dict.fromkeys(nodes))}
    return tuple(numbers[node] for node in nodes)


def write(
    store: Store,
    world: World,
    files: Sequence[int],
    step: int,
    take: Callable[[], Snapshot],
    before: Callable[[], None] = lambda: None,
) -> Path:
    """Write what every rank has taken as the checkpoint of `step`, publish it, verify it, and prune older ones.

    Args:
        store: where to.
        world: the ranks, with a group that nobody else uses meanwhile.
        files: for each rank the number of its file, as `node_files` gives them.
        step: what all ranks are about to save.
        take: this rank's snapshot, or whatever error it ended with.
        before: what must be durable before the checkpoint is, on rank 0.

    Raises:
        CheckpointError: on every rank, the same.
    """
    job = _Save(store, world, files)
    try:
        job.agree(take)
        job.write()
        path = job.publish(before)
        job.verify(path)
    except LauncherError as error:
        kind = ReplacedError if isinstance(error, ReplacedError) else CheckpointError
        raise kind(f"{step_name(step)} could not be saved: {error}") from None
    finally:
        job.clean()
    if world.is_main:
        _prune(store, job.taken)
    return path


def _prune(store: Store, taken: Snapshot) -> None:
    """Remove older checkpoints; that they stay is no reason to call the new one lost."""
    try:
        store.prune(taken.attempt, spare=taken.step)
    except (LauncherError, OSError) as error:
        warnings.warn(f"older checkpoints were not removed: {error}", stacklevel=2)


class _Save:
    """One save, on one rank; every method is called by all ranks together."""

    taken: Snapshot

    def __init__(self, store: Store, world: World, files: Sequence[int]) -> None:
        self._store, self._world, self._files = store, world, files
        self._mates = [rank for rank, file in enumerate(files) if file == files[world.rank]]
        """The ranks that write into the same file, this one among them."""
        self._partial: Path | None = None
        self._entries: list[FileEntry] = []
        self._parts: list[tuple[int, Segment]] = []
        self._rank_values: list[Mapping[str, Json]] = []

    def agree(self, take: Callable[[], Snapshot]) -> None:
        """Find out whether all ranks have taken the same state."""

        def work() -> tuple[str, Mapping[str, Json]]:
            self.taken = take()
            described = json.dumps(_description(self.taken)).encode()
            return xxhash.xxh3_128_hexdigest(described), self.taken.rank_values

        outcomes = agreed(self._world, work)
        if any(digest != outcomes[0][0] for digest, _ in outcomes):
            raise CheckpointError(_difference(self._world.gather(_description(self.taken))))
        self._rank_values = [values for _, values in outcomes]

    def write(self) -> None:
        """Write every rank's part, in a directory that is no checkpoint yet."""
        store, world, taken = self._store, self._world, self.taken
        agreed(world, lambda: store.begin(taken.step, taken.attempt) if world.is_main else None)
        self._partial = partial = store.partial(taken.step, taken.attempt)
        count = max(self._files) + 1
        path = partial / f"node-{self._files[world.rank]:05d}-of-{count:05d}.safetensors"
        sizes = part_sizes([taken.plan.nbytes(rank) for rank in self._mates])
        place = self._mates.index(world.rank)

        def create() -> FileEntry | None:
            if place:
                return None
            head = header([taken.plan[rank] for rank in self._mates], taken.plan.specs)
            size = len(head) + sum(sizes)
            return FileEntry(path.name, size, create_file(path, head, size))

        created = agreed(world, create)
        self._entries = [entry for entry in created if entry is not None]

        def fill() -> Segment:
            taken.buffer.settle()
            start = self._entries[self._files[world.rank]].header.size + sum(sizes[:place])
            return write_part(path, start, taken.data.numpy().data, sizes[place])

        self._parts = list(zip(self._files, agreed(world, fill), strict=True))

    def publish(self, before: Callable[[], None]) -> Path:
        """Complete the directory with its index, and give it its final name."""
        taken, world = self.taken, self._world

        def work() -> None:
            assert self._partial is not None
            before()
            index = Index(
                step=taken.step,
                attempt=taken.attempt,
                world_size=world.world_size,
                tensors=taken.plan.specs,
                aliases=taken.aliases,
                files=self._entries,
                parts=self._parts,
                values=taken.values,
                rank_values=self._rank_values,
                exceptions=taken.exceptions,
                facts=taken.facts,
            )
            write_file(self._partial / INDEX, encode(index))
            self._store.publish(self._partial, taken.attempt)

        agreed(world, lambda: work() if world.is_main else None)
        self._partial = None
        return self._store.path(taken.step)

    def verify(self, path: Path) -> None:
        """Read everything back; older checkpoints go only when this one is known to be whole."""
        file, part = self._parts[self._world.rank]

        def work() -> None:
            with FileReader(path, self._entries[file]) as reader:
                reader.verify(part)
                if self._world.rank == self._mates[0]:
                    reader.verify(self._entries[file].header)
            if self._world.is_main:
                read_index(path)

        try:
            agreed(self._world, work)
        except DamagedError as error:
            [aside, *_] = agreed(self._world, lambda: self._set_aside(path) if self._world.is_main else None)
            raise CheckpointError(f"what was written cannot be read back ({error}); it is {aside} now") from None
        agreed(self._world, lambda: self._store.mark_verified(path) if self._world.is_main else None)

    def _set_aside(self, path: Path) -> Path:
        self._store.check_current(self.taken.attempt)  # else it may be a newer attempt's
        return self._store.set_aside(path)

    def clean(self) -> None:
        """Leave nothing half behind; what cannot be removed is no checkpoint, and the next save tries again."""
        if self._world.is_main and self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)


def _place(spec: TensorSpec, rank: int, box: Box) -> tuple[slice, ...]:
    """Where a box is in the local tensor of a rank that holds all of it."""
    for held, at in parts(spec, rank):
        if held.overlap(box) == box:
            starts = (there + start - first for there, start, first in zip(at, box.offsets, held.offsets, strict=True))
            return tuple(slice(start, start + size) for start, size in zip(starts, box.sizes, strict=True))
    raise AssertionError(f"rank {rank} is to write {box}, which it does not hold")


def _description(taken: Snapshot) -> dict[str, Json]:
    """What all ranks must have alike."""
    specs = sorted(taken.plan.specs.items())
    tensors = {name: [spec.dtype, spec.shape, spec.mesh, spec.placements, spec.rank0] for name, spec in specs}
    tied = {name: f"tied to {holder}" for name, holder in sorted(taken.aliases.items())}
    return {"(step)": taken.step, "(attempt)": taken.attempt, **tensors, **tied}


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
