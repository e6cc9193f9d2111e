"""What is saved: tensors by name, and values that are JSON. Described once for all ranks, taken from torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from launcher.checkpoint.index import Json, check_json
from launcher.checkpoint.layout import TensorSpec, local_shape
from launcher.errors import CheckpointError
from launcher.sharded import is_sharded, local
from launcher.world import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

__all__ = [
    "DTYPES",
    "SUBCLASSES",
    "State",
    "bits",
    "check_state",
    "describe",
    "describe_all",
    "flattened",
    "local_bits",
]

SUBCLASSES = "subclasses"
"""The value that says which tensors were flattened, and what they are."""

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
"""torch's dtypes by safetensors' names."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # dtypes that move any bits unchanged
_PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass
class State:
    """A run's state: what `save` writes, and whose tensors `load` fills in place."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Plain tensors (whole on every rank) or DTensors, by name: `model/blocks.0.weight`."""
    rank0: frozenset[str] = frozenset()
    """Names of which rank 0's copy counts: buffers, which differ between DDP's ranks."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Tied name -> the name in `tensors` that holds the data. Ties of whole tensors are also found by themselves."""
    values: dict[str, Json] = field(default_factory=dict)
    """The same on every rank (step, parameter groups, ...): rank 0's are written."""
    rank_values: dict[str, Json] = field(default_factory=dict)
    """A rank's own (a stream's cursor): every rank's are written."""
    exceptions: tuple[str, ...] = ()
    """Names of what in here is no pure function of (config, step)."""


def describe(tensor: torch.Tensor, *, rank0: bool = False) -> TensorSpec:
    """A tensor as all ranks together hold it; the same on every rank.

    Raises:
        ValueError: it cannot be saved exactly; the text goes on from its name ("is sparse").
    """
    held = local(tensor)
    if type(held) not in _PLAIN:
        what = f"sharded {type(held).__name__}" if is_sharded(tensor) else type(held).__name__
        raise ValueError(f"is a {what}: a checkpoint holds plain tensors, DTensors of them, and what can be flattened")
    if held.layout != torch.strided or held.is_quantized or held.device.type == "meta":
        kind = "on the meta device" if held.device.type == "meta" else f"{held.layout}, {held.dtype}"
        raise ValueError(f"is {kind}: a checkpoint holds dense tensors that have data")
    if tensor.dtype not in _NAMES:
        raise ValueError(f"is {tensor.dtype}, which a checkpoint cannot hold")
    shape, dtype = tuple(tensor.shape), _NAMES[tensor.dtype]
    if not is_sharded(tensor):
        return TensorSpec(shape, dtype, rank0=rank0)
    if rank0:
        raise ValueError("is a DTensor, so no one rank has a copy that counts")
    sharded = cast("DTensor", tensor)
    placements = tuple(_placement(placement, tensor.dim()) for placement in sharded.placements)
    return TensorSpec(shape, dtype, _mesh_shape(sharded.device_mesh), placements)


@torch.no_grad()
def describe_all(state: State, world: World) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """The specs of what is to be written or filled, by name, and the names that are tied to others of them.

    Raises:
        CheckpointError: a tensor cannot be saved exactly; it is named.
    """
    specs: dict[str, TensorSpec] = {}
    tied = dict(state.aliases)
    first: dict[object, str] = {}
    for name in sorted(state.tensors.keys() - tied.keys()):
        tensor = state.tensors[name]
        try:
            spec = describe(tensor, rank0=name in state.rank0)
            _check_place(tensor, spec, world)
        except ValueError as error:
            raise CheckpointError(f"{name} {error}") from None
        holder = first.setdefault(_identity(tensor, spec), name)
        if holder == name:
            specs[name] = spec
        else:
            tied[name] = holder
    for name, holder in tied.items():
        tied[name] = tied.get(holder, holder)
        if tied[name] not in specs:
            raise CheckpointError(f"{name} is tied to {holder}, which the state does not hold")
    return specs, tied


def check_state(state: State, world: World) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """As `describe_all`, of a flattened state, whose values are looked at too.

    Raises:
        CheckpointError: something in it cannot be saved exactly; it is named.
    """
    for name, value in (*state.values.items(), *state.rank_values.items()):
        check_json(value, name)
    return describe_all(state, world)


def flattened(state: State) -> State:
    """The state with tensor subclasses (quantised weights, 8-bit moments) as the plain tensors that they are made of.

    `w` of two is `w:codes` and `w:scale`; what it is, is in the values. Filling those in place fills the subclass.
    """
    inner: dict[str, tuple[str, ...]] = {}
    kinds: dict[str, Json] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.tensors.items():
        if _is_subclass(tensor) and not is_sharded(tensor):
            kinds[name], parts = _taken_apart(name, tensor)
            inner[name] = tuple(parts)
            tensors |= parts
        else:
            tensors[name] = tensor
    if not kinds:
        return state
    aliases: dict[str, str] = {}
    for name, holder in state.aliases.items():
        parts_of = [part.removeprefix(holder) for part in inner.get(holder, (holder,))]
        aliases |= {name + part: holder + part for part in parts_of}
    return replace(
        state,
        tensors=tensors,
        aliases=aliases,
        rank0=frozenset(part for name in state.rank0 for part in inner.get(name, (name,))),
        values=state.values | {SUBCLASSES: kinds},
    )


def _is_subclass(tensor: torch.Tensor) -> bool:
    """Whether it is made of other tensors, and says of which."""
    return type(tensor) not in _PLAIN and bool(is_traceable_wrapper_subclass(tensor))


def _taken_apart(name: str, tensor: torch.Tensor) -> tuple[str, dict[str, torch.Tensor]]:
    """What a subclass is, and its inner tensors by name; those may be subclasses themselves."""
    flatten: Any = tensor
    names, context = flatten.__tensor_flatten__()
    kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}({_shown(context)})"
    parts: dict[str, torch.Tensor] = {}
    for inner in names:
        part = getattr(tensor, inner)
        if _is_subclass(part):
            inner_kind, inner_parts = _taken_apart(f"{name}:{inner}", part)
            kind += f", {inner}: {inner_kind}"
            parts |= inner_parts
        else:
            parts[f"{name}:{inner}"] = part
    return kind, parts


def _shown(context: Any) -> str:
    """What a subclass keeps beside its tensors, as text that is the same in every process."""
    if isinstance(context, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(value)}" for key, value in context.items()) + "}"
    if isinstance(context, list | tuple):
        return "[" + ", ".join(map(_shown, context)) + "]"
    plain = isinstance(context, bool | int | float | str | torch.dtype | torch.device | None)
    return repr(context) if plain else type(context).__qualname__


def local_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The local tensor, viewed as integers of its element size: copies of these keep every bit, NaNs' too."""
    held = local(tensor).detach()
    return held.view(_BITS[held.element_size()])


def bits(flat: torch.Tensor, itemsize: int) -> torch.Tensor:
    """Bytes, viewed as integers of `itemsize` bytes."""
    return flat.view(_BITS[itemsize])


@lru_cache(maxsize=64)
def _mesh_shape(device_mesh: DeviceMesh) -> tuple[int, ...]:
    """The shape of a mesh of all ranks in order; the tensors of a model share one."""
    mesh = device_mesh.mesh
    if mesh.flatten().tolist() != list(range(mesh.numel())):
        raise ValueError(f"is on a mesh of ranks {mesh.tolist()}: a checkpoint knows meshes of all ranks in order")
    return tuple(mesh.shape)


def _placement(placement: Placement, dimensions: int) -> str:
    from torch.distributed.tensor import Replicate, Shard  # there is a DTensor, so it has been imported
    from torch.distributed.tensor.placement_types import _StridedShard

    if isinstance(placement, Replicate):
        return "R"
    if isinstance(placement, _StridedShard):
        return f"_S({placement.dim % dimensions},{placement.split_factor})"
    if isinstance(placement, Shard):
        return f"S({placement.dim % dimensions})"
    raise ValueError(f"is placed {placement}: reduce it first")


def _check_place(tensor: torch.Tensor, spec: TensorSpec, world: World) -> None:
    """A DTensor made by hand may claim a layout that it does not have."""
    if spec.mesh is None:
        return
    if math.prod(spec.mesh) != world.world_size:
        raise ValueError(f"is on {math.prod(spec.mesh)} of {world.world_size} ranks: a checkpoint knows meshes of all")
    shape, wanted = tuple(local(tensor).shape), local_shape(spec, world.rank)
    if shape != wanted:
        raise ValueError(f"holds {list(shape)} on rank {world.rank}, where its placements give {list(wanted)}")


def _identity(tensor: torch.Tensor, spec: TensorSpec) -> object:
    """Equal for tensors that are one: the same view of one storage."""
    held = local(tensor)
    storage = held.untyped_storage().data_ptr()
    return (storage, held.storage_offset(), held.stride(), spec) if storage else id(tensor)
