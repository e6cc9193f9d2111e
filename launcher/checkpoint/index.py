"""The index of a checkpoint, `index.json`: what it holds, described once, and where.

    {"digest": "<32 hex digits>", "index": <body>}

and a line feed. The digest is xxh3_128 of the body's bytes exactly as they stand in the file. The body is a JSON
object (no NaN, no infinity) with these members:

    format        2; a reader refuses any other
    plan          1; the rule by which the ranks shared out the writing (`launcher.checkpoint.layout.Plan`)
    step, attempt, world_size
    tensors       name -> {dtype, shape, and where they apply mesh, placements, rank0}: see `TensorSpec`
    aliases       tied name -> the name in `tensors` that holds its data
    files         [{name, size, header}]; the header is a segment
    parts         for each rank {file, offset, size, digests}: a segment of a file, laid out as the plan says
    values        name -> JSON, the same on every rank
    rank_values   for each rank name -> JSON
    exceptions    names of what is no pure function of (config, step)
    facts         name -> JSON: loss, time, versions; never needed to go on

A segment is {offset, size, digests}: bytes, and base64 of the joined digests of its blocks (see `files`). The parts of
a file follow its header and one another in rank order, and fill it.

No shard is listed: a reader derives from `tensors` and the plan which bytes of which part hold what. So the index
grows with the tensors, the ranks and the blocks, not with their product. It is written last, and read with distrust.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import xxhash

from launcher.checkpoint.files import ALIGNMENT, DIGEST, FileEntry, Segment, digest_count, open_file
from launcher.checkpoint.layout import PLAN, Plan, TensorSpec
from launcher.errors import CheckpointError, DamagedError

if TYPE_CHECKING:
    import torch

__all__ = ["FORMAT", "INDEX", "Index", "Json", "check_json", "decode", "encode", "read_index"]

FORMAT = 2
INDEX = "index.json"

Json: TypeAlias = Any
"""None, bool, int, float, str, and lists and string-keyed dicts of these. A tuple comes back as a list."""

T = TypeVar("T")

_HEAD, _MIDDLE, _TAIL = b'{"digest": "', b'", "index": ', b"}\n"
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}\.safetensors")
_LARGEST = 1 << 30  # bytes; the index of 70 B parameters on 4,096 ranks has 4 MB
_MOST_BITS = 4096  # of an integer


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds, and where."""

    step: int
    attempt: int
    world_size: int
    tensors: Mapping[str, TensorSpec]
    aliases: Mapping[str, str]
    files: Sequence[FileEntry]
    parts: Sequence[tuple[int, Segment]]
    """For each rank its file and where in it."""
    values: Mapping[str, Json]
    rank_values: Sequence[Mapping[str, Json]]
    exceptions: Sequence[str]
    facts: Mapping[str, Json]

    @cached_property
    def plan(self) -> Plan:
        """Who wrote what."""
        return Plan(self.tensors, self.world_size)

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return sum(file.size for file in self.files)

    def holder(self, name: str) -> str:
        """The name under which a tensor's data is: its own, or what it is tied to."""
        return self.aliases.get(name, name)

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype."""
        from launcher.checkpoint.state import DTYPES  # looking at an index needs no torch

        return DTYPES[self.tensors[self.holder(name)].dtype]


def read_index(path: Path) -> Index:
    """The index of the checkpoint in directory `path`.

    Raises:
        DamagedError: there is none, or it is damaged, or not what an index can be.
        CheckpointError: it is of another version of the launcher.
    """
    if not path.is_dir():
        raise DamagedError(f"{path} is no checkpoint: there is no such directory")
    if not os.path.lexists(path / INDEX):
        raise DamagedError(f"{path} is no checkpoint: it has no {INDEX}, so it was never finished")
    fd, size = open_file(path / INDEX)
    with open(fd, "rb") as file:
        if size > _LARGEST:
            raise DamagedError(f"{path.name}/{INDEX} has {size} bytes: no index is that large")
        try:
            data = file.read(size)
        except OSError as error:
            raise CheckpointError(f"{path.name}/{INDEX} cannot be read here: {error.strerror}") from None
    try:
        return decode(data)
    except OtherVersion as error:
        raise CheckpointError(f"{path.name}/{INDEX} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise DamagedError(f"{path.name}/{INDEX} is broken: {reason}") from None


def encode(index: Index) -> bytes:
    """The bytes of `index.json`; the values must have passed `check_json`."""
    members: dict[str, Json] = {
        "format": FORMAT,
        "plan": PLAN,
        "step": index.step,
        "attempt": index.attempt,
        "world_size": index.world_size,
        "tensors": {name: _spec_to_json(spec) for name, spec in index.tensors.items()},
        "aliases": dict(index.aliases),
        "files": [
            {"name": file.name, "size": file.size, "header": _segment_to_json(file.header)} for file in index.files
        ],
        "parts": [{"file": file, **_segment_to_json(part)} for file, part in index.parts],
        "values": dict(index.values),
        "rank_values": list(index.rank_values),
        "exceptions": list(index.exceptions),
        "facts": dict(index.facts),
    }
    lines = (f'"{name}": {json.dumps(value, allow_nan=False)}' for name, value in members.items())
    body = ("{\n" + ",\n".join(lines) + "\n}").encode()
    return _HEAD + xxhash.xxh3_128_hexdigest(body).encode() + _MIDDLE + body + _TAIL


def decode(data: bytes) -> Index:
    """What `encode` made.

    Raises:
        ValueError: it did not make these bytes; RecursionError for absurd nesting.
        OtherVersion: a ValueError too: another version of it did.
    """
    start = len(_HEAD) + 2 * DIGEST
    digest, middle = data[len(_HEAD) : start], data[start : start + len(_MIDDLE)]
    if not data.startswith(_HEAD) or middle != _MIDDLE or not data.endswith(_TAIL):
        raise ValueError("it was cut, or is no index")
    body = data[start + len(_MIDDLE) : -len(_TAIL)]
    if xxhash.xxh3_128_hexdigest(body).encode() != digest:
        raise ValueError("it fails its own digest")
    members = json.loads(body, parse_constant=_no_constant, parse_float=_finite)
    if type(members) is not dict:
        raise ValueError("it is no JSON object")
    for name, known in (("format", FORMAT), ("plan", PLAN)):
        if (version := _integer(members, name, 1)) != known:
            age, fix = ("newer", "update the launcher") if version > known else ("older", "use the one that wrote it")
            raise OtherVersion(f"its {name} is {version}, {age} than this launcher's {known}: {fix}")
    return _index_from_json(members)


def check_json(value: Json, where: str) -> None:
    """Refuse what JSON would lose or change; `where` names the value.

    Raises:
        CheckpointError: it holds something else than JSON does.
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise CheckpointError(f"{where} has the key {name!r}: a checkpoint's keys are text")
            check_json(inner, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            check_json(inner, f"{where}[{place}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise CheckpointError(f"{where} is {value}, which JSON has no number for")
    elif isinstance(value, int):
        if value.bit_length() > _MOST_BITS:
            raise CheckpointError(f"{where} is an integer of more than {_MOST_BITS} bits")
    elif value is not None and not isinstance(value, str):
        raise CheckpointError(f"{where} is a {type(value).__name__}: a checkpoint holds tensors, numbers and text")


def _spec_to_json(spec: TensorSpec) -> Json:
    described: dict[str, Json] = {"dtype": spec.dtype, "shape": spec.shape}
    if spec.mesh is not None:
        described |= {"mesh": spec.mesh, "placements": spec.placements}
    return described | ({"rank0": True} if spec.rank0 else {})


def _index_from_json(members: dict[str, Json]) -> Index:
    """The index, everything in it checked against the rest: whatever it says has been found possible."""
    world_size = _integer(members, "world_size", 1)
    tensors = {name: _spec_from_json(name, spec) for name, spec in _typed(members, "tensors", dict).items()}
    for name, spec in tensors.items():
        if spec.mesh is not None and math.prod(spec.mesh) != world_size:
            raise ValueError(f"{name} is on mesh {list(spec.mesh)} of a world of {world_size}")
    aliases = _typed(members, "aliases", dict)
    for name, holder in aliases.items():
        if type(holder) is not str or holder not in tensors or name in tensors:
            raise ValueError(f"{name} cannot be tied to {holder!r}")
    files = [_file_from_json(file) for file in _items(members, "files", dict)]
    if len({file.name for file in files}) != len(files):
        raise ValueError("two of its files have one name")
    parts = [_part_from_json(part, files) for part in _items(members, "parts", dict)]
    _check_extents(files, parts)
    rank_values = _items(members, "rank_values", dict)
    if not len(parts) == len(rank_values) == world_size:
        raise ValueError(f"it is of {world_size} ranks and has {len(parts)} parts and {len(rank_values)} rank_values")
    excess = sum(part.size for _, part in parts) - sum(spec.nbytes for spec in tensors.values())
    if not 0 <= excess < ALIGNMENT * world_size:
        raise ValueError(f"its parts hold {excess} bytes more than its tensors take")
    return Index(
        step=_integer(members, "step", 0),
        attempt=_integer(members, "attempt", 0),
        world_size=world_size,
        tensors=tensors,
        aliases=aliases,
        files=files,
        parts=parts,
        values=_typed(members, "values", dict),
        rank_values=rank_values,
        exceptions=_items(members, "exceptions", str),
        facts=_typed(members, "facts", dict),
    )


def _spec_from_json(name: str, spec: Json) -> TensorSpec:
    try:
        if type(spec) is not dict:
            raise ValueError("is not described")
        mesh = tuple(_items(spec, "mesh", int)) if "mesh" in spec else None
        placements = tuple(_items(spec, "placements", str)) if "placements" in spec else ()
        rank0 = _typed(spec, "rank0", bool) if "rank0" in spec else False
        return TensorSpec(tuple(_items(spec, "shape", int)), _typed(spec, "dtype", str), mesh, placements, rank0)
    except ValueError as error:
        raise ValueError(f"tensor {name}: {error}") from None


def _file_from_json(file: dict[str, Json]) -> FileEntry:
    name, size = _typed(file, "name", str), _integer(file, "size", 0)
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no file name of a checkpoint")
    return FileEntry(name, size, _segment_from_json(name, _typed(file, "header", dict)))


def _part_from_json(part: dict[str, Json], files: list[FileEntry]) -> tuple[int, Segment]:
    file = _integer(part, "file", 0)
    if file >= len(files):
        raise ValueError(f"it has a part in file {file} of {len(files)}")
    return file, _segment_from_json(files[file].name, part)


def _segment_to_json(segment: Segment) -> dict[str, Json]:
    return {
        "offset": segment.offset,
        "size": segment.size,
        "digests": base64.b64encode(segment.digests).decode(),
    }


def _segment_from_json(where: str, segment: dict[str, Json]) -> Segment:
    offset, size = _integer(segment, "offset", 0), _integer(segment, "size", 0)
    digests = base64.b64decode(_typed(segment, "digests", str), validate=True)
    if len(digests) != digest_count(size):
        raise ValueError(f"{size} bytes of {where} do not have {len(digests) // DIGEST} blocks")
    return Segment(offset, size, digests)


def _check_extents(files: list[FileEntry], parts: list[tuple[int, Segment]]) -> None:
    """A file is its header and then its parts, in rank order, without a gap or an overlap."""
    ends = [0] * len(files)
    headers = [(number, file.header) for number, file in enumerate(files)]
    for number, segment in [*headers, *parts]:
        if segment.offset != ends[number]:
            raise ValueError(f"a part of {files[number].name} begins at byte {segment.offset}, not {ends[number]}")
        ends[number] += segment.size
    for file, end in zip(files, ends, strict=True):
        if end != file.size:
            raise ValueError(f"the parts of {file.name} end at byte {end} of {file.size}")


def _typed(members: dict[str, Json], name: str, kind: type[T]) -> T:
    value = members.get(name)
    if type(value) is not kind:
        raise ValueError(f"{name} is {'missing' if value is None else f'no {kind.__name__}'}")
    return value


def _items(members: dict[str, Json], name: str, kind: type[T]) -> list[T]:
    values = _typed(members, name, list)
    if any(type(value) is not kind for value in values):
        raise ValueError(f"{name} has something else in it than {kind.__name__}")
    return values


def _integer(members: dict[str, Json], name: str, least: int) -> int:
    value = _typed(members, name, int)
    if not least <= value < 2**63:
        raise ValueError(f"{name} cannot be {value}")
    return value


class OtherVersion(ValueError):  # noqa: N818 - it names what was found
    """An index of another version of this format."""


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is no number that a float holds")
    return number
