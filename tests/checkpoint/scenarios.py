"""What the ranks of a job do; each function is run on all of them by ranks.py."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from samples import same, sample
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from launcher.checkpoint import Retention, State, Store, describe, load, read_index, save, verify
from launcher.checkpoint.layout import Box, local_shape, parts
from launcher.errors import CheckpointError
from launcher.world import World

ANY = 0
EXTRAS = {
    "optimizer/0/step": ((), torch.float32),
    "optimizer/0/f8": ((3, 5), torch.float8_e4m3fn),
    "optimizer/0/count": ((7,), torch.int64),
    "optimizer/0/nothing": ((0, 3), torch.bfloat16),
    "track/large": ((700, 1000), torch.float32),  # large enough for replicas to share
}


class Net(nn.Module):
    """Uneven and empty shards, a tie, a buffer, two dtypes, and a parameter that replicas share the writing of."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 40, bias=False)
        self.large = nn.Linear(700, 1500, bias=False)
        self.small = nn.Linear(4, 1, dtype=torch.bfloat16)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mean", torch.zeros(5))
        for name, tensor in self.truth().items():
            with torch.no_grad():
                self.get_parameter(name).copy_(tensor)

    def truth(self) -> dict[str, torch.Tensor]:
        return {name: sample(name, tuple(p.shape), p.dtype) for name, p in self.named_parameters()}


def state_of(net: Net, rank: int) -> State:
    """The state of a run as it stands: parameters, a moment for each, buffers and a few odd tensors."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in net.named_parameters():
        tensors[f"model/{name}"] = parameter
        moment = sample(f"moment/{name}", tuple(parameter.shape), parameter.dtype)
        if isinstance(parameter, DTensor):
            moment = distribute_tensor(moment, parameter.device_mesh, parameter.placements, src_data_rank=None)
        tensors[f"optimizer/0/exp_avg/{name}"] = moment
    tensors["model/mean"] = sample(f"mean of rank {rank}", (5,))
    tensors |= {name: sample(name, shape, dtype) for name, (shape, dtype) in EXTRAS.items()}
    return State(
        tensors,
        rank0=frozenset({"model/mean"}),
        aliases={"model/head.weight": "model/embed.weight"},
        values={"step": 3, "rank": rank},
        rank_values={"cursor": rank},
    )


def plain() -> Net:
    return Net()


def fsdp() -> Net:
    """FSDP2 over all ranks; `small` alone is cut along its second dimension."""
    net = Net()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    fully_shard(net.small, mesh=mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    return fully_shard(net, mesh=mesh)


def hsdp() -> Net:
    net = Net()
    return fully_shard(net, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def check(world: World, path: Path, net: Net, saved_world_size: int) -> State:
    """Load into a state whose tensors are all something else, and compare every bit with what was saved."""
    state = state_of(net, world.rank)
    expected = state_of(Net(), 0).tensors
    with torch.no_grad():
        for tensor in state.tensors.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
    index = load(path, world, state)
    for name, tensor in state.tensors.items():
        full = gathered(tensor) if isinstance(tensor, DTensor) else tensor
        assert same(full, expected[name]), name
    assert same(gathered(net.head.weight), gathered(net.embed.weight))
    assert index.values == {"step": 3, "rank": 0}
    assert saved_world_size in (ANY, index.world_size)
    assert index.rank_values == [{"cursor": rank} for rank in range(index.world_size)]
    return state


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor; as integers over the wire, where a reduction or a cast could change a NaN's bits."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def save_two_ways(world: World, root: str) -> None:
    """On 2 ranks: as DDP holds a state, and as FSDP2 does."""
    save(Store(Path(root, "plain")), world, 3, state_of(plain(), world.rank), attempt=1)
    save(Store(Path(root, "fsdp")), world, 3, state_of(fsdp(), world.rank), attempt=1)
    if world.is_main:  # what DDP replicates is written once, by all ranks together
        [path] = Path(root, "plain").glob("step-*")
        assert [file.name for file in path.glob("*.safetensors")] == ["node-00000-of-00001.safetensors"]
        sizes = [part.size for _, part in read_index(path).parts]
        assert max(sizes) - min(sizes) < 1.1 * 2**20, sizes


def reshard(world: World, root: str) -> None:
    """On 4 ranks: what 2 and 1 saved, into every layout; and each saved again."""
    layouts(world)
    for source, size in (("plain", 2), ("fsdp", 2), ("one", 1)):
        for make in (plain, fsdp, hsdp):
            state = check(world, Store(Path(root, source)).path(3), make(), size)
            if source == "fsdp":
                save(Store(Path(root, f"four-{make.__name__}")), world, 3, state, attempt=1)
    check(world, Store(Path(root, "four-hsdp")).path(3), fsdp(), 4)


def onwards(world: World, source: str, target: str, layout: str) -> None:
    """On any number of ranks: load one checkpoint in a layout, and save what was loaded as another."""
    state = check(world, Store(Path(source)).path(3), {"ddp": plain, "fsdp2": fsdp, "hsdp": hsdp}[layout](), ANY)
    save(Store(Path(target)), world, 3, state, attempt=1)


def layouts(world: World) -> None:
    """DTensors of 4 ranks hold what `parts` says they do."""
    mesh = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for shape in ((8, 6), (5, 3), (1, 9), (3,), (2, 3, 5), (0, 4)):
        full = sample("full", shape, torch.int32)
        for dimension in range(len(shape)):
            agree(world, full, distribute_tensor(full, mesh, [Shard(dimension)], src_data_rank=None))
            for placements in (
                [Replicate(), Shard(dimension)],
                [Shard(dimension), Replicate()],
                [Shard(0), Shard(dimension)],
                [_StridedShard(dimension, split_factor=2), Shard(dimension)],
                [Replicate(), Replicate()],
            ):
                agree(world, full, distribute_tensor(full, grid, placements, src_data_rank=None))
    tensor_parallel_and_fsdp(world, grid)
    for tensor, message in (
        (DTensor.from_local(torch.ones(2), mesh, [Partial()]), "w is placed P"),
        (DTensor.from_local(torch.ones(2), grid["tp"], [Shard(0)]), "w is on 2 of 4 ranks"),
        (DTensor.from_local(torch.ones(1 + world.rank), mesh, [Shard(0)], shape=(10,), stride=(1,)), "placements give"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save(Store(Path("never")), world, 1, State({"w": tensor}), attempt=1)
    sharded = distribute_tensor(torch.ones(8), mesh, [Shard(0)], src_data_rank=None)
    with pytest.raises(CheckpointError, match="w is a DTensor, so no one rank"):
        save(Store(Path("never")), world, 1, State({"w": sharded}, rank0=frozenset({"w"})), attempt=1)


def tensor_parallel_and_fsdp(world: World, grid: DeviceMesh) -> None:
    """The real thing that makes a _StridedShard: FSDP2 over a tensor-parallel layer."""
    layer = nn.Linear(6, 24, bias=False)
    full = sample("layer", (24, 6))
    with torch.no_grad():
        layer.weight.copy_(full)
    parallelize_module(layer, grid["tp"], ColwiseParallel())
    fully_shard(layer, mesh=grid["dp"])
    assert describe(layer.weight).placements == ("_S(0,2)", "S(0)")
    agree(world, full, layer.weight)


def agree(world: World, full: torch.Tensor, tensor: DTensor) -> None:
    spec, local = describe(tensor), tensor.to_local().detach()
    assert tuple(local.shape) == local_shape(spec, world.rank), spec
    for box, place in parts(spec, world.rank):
        assert same(local[at(Box(place, box.sizes))], full[at(box)]), spec


def at(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True))


def faults(world: World, root: str) -> None:
    """On 2 ranks: whatever fails on one, both are told the same, and the older checkpoint is as it was."""
    store = Store(Path(root), Retention(1))
    tensors = {name: sample(name, (1, 1 << 20)) for name in "ab"}  # one row: 4 MiB of a on rank 0, of b on rank 1
    save(store, world, 1, State(tensors), attempt=1)

    with limited_file_size(1 << 20 if world.rank == 1 else None):
        failed(world, store, State(tensors), "rank 1: ", "node-00000-of-00001.safetensors: File too large")
    with limited_file_size(1 << 20):
        failed(world, store, State(tensors), "could not be saved: ", "node-0000", "File too large")
    failed(world, store, State({"a": tensors["a"][:, : 9 - world.rank]}), "rank 1 and", "on rank 0", "a is")
    failed(world, store, State(tensors if world.is_main else {"a": tensors["a"]}), "b is missing on rank 1")
    failed(world, store, State(values={"loss": [1.0, float("nan")][world.rank]}), "rank 1: loss is nan")

    with pytest.raises(CheckpointError if world.is_main else TypeError, match="'NoneType'"):  # a bug of the code's
        save(store, world, 2, State(tensors, aliases={} if world.is_main else None), attempt=1)

    told(world, lambda: save(store, world, 2 + world.rank, State(tensors), attempt=1), "(step) is 3 on rank 1 and 2 on")

    path = store.path(1)
    short = {"a": torch.zeros(1, 1 << 20), "b": torch.zeros(1, (1 << 20) - world.rank)}
    unloaded(world, path, State(short), "rank 1: step-00000001: b is 1x1048576 there and 1x1048575 here")
    world.barrier()
    file, [_, (_, second)] = path / "node-00000-of-00001.safetensors", read_index(path).parts
    if world.is_main:
        flip(file, second.offset + 3_000_000)
    world.barrier()
    blank = {name: torch.zeros(1, 1 << 20) for name in tensors}
    unloaded(world, path, State(blank), f"node-00000-of-00001.safetensors is damaged: bytes {second.offset} to")
    mine = "ab"[world.rank]  # rank 0 does not need the broken file, and must not load either
    unloaded(world, path, State({mine: torch.zeros(1, 1 << 20)}), "rank 1: step-00000001/node-00000", only=mine)
    world.barrier()
    if world.is_main:
        flip(file, second.offset + 3_000_000)
        verify(path)
    world.barrier()
    load(path, world, State(blank))
    assert all(same(blank[name], tensor) for name, tensor in tensors.items())


def failed(world: World, store: Store, state: State, *messages: str) -> None:
    """A save fails on all ranks with one line, and only the first checkpoint is there."""
    told(world, lambda: save(store, world, 2, state, attempt=1), *messages)
    assert [path.name for path in store.root.iterdir()] == ["step-00000001"]


def unloaded(world: World, path: Path, state: State, message: str, only: str = "") -> None:
    told(world, lambda: load(path, world, state, only=only), message)
    assert not any(tensor.any() for tensor in state.tensors.values())


def told(world: World, work: Callable[[], object], *messages: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        work()
    line = str(caught.value)
    assert all(message in line for message in messages), line
    assert "\n" not in line
    reason = line.partition("could not be saved: ")[2] or line  # before it, what each rank was asked to save
    assert world.gather(reason) == [reason] * world.world_size


@contextmanager
def limited_file_size(size: int | None) -> Iterator[None]:
    """A rank whose files cannot grow, as on a full disk; without a size, nothing is limited."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size or soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def flip(path: Path, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
