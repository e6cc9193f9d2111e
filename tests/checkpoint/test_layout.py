"""Every element is written exactly once, and is where torch puts it, for any shape, mesh and placement."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import held, same, sample, write_checkpoint

from launcher.checkpoint import Box, Index, Plan, TensorSpec, boxes, plan
from launcher.checkpoint.buffer import Buffer
from launcher.checkpoint.files import FileEntry, Segment, digest_count, header, part_sizes
from launcher.checkpoint.index import encode
from launcher.checkpoint.layout import PIECE, local_shape, parts
from launcher.checkpoint.loading import Stage

MESHES = [None, (1,), (2,), (3,), (4,), (6,), (2, 2), (2, 3), (3, 1), (2, 2, 2)]
relaxed = settings(deadline=None, database=None, derandomize=True)


@st.composite
def specs(draw: st.DrawFn, shape: tuple[int, ...] | None = None) -> TensorSpec:
    if shape is None:
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    mesh = draw(st.sampled_from(MESHES))
    if mesh is None:
        return TensorSpec(shape, "I32", rank0=draw(st.booleans()))
    dimension = st.integers(0, len(shape) - 1)
    kinds = [st.just("R")]
    if shape:
        split_factor = st.integers(1, math.prod(mesh))
        kinds += [dimension.map("S({})".format), st.builds("_S({},{})".format, dimension, split_factor)]
    return TensorSpec(shape, "I32", mesh, tuple(draw(st.one_of(kinds)) for _ in mesh))


def ranks(spec: TensorSpec) -> int:
    return math.prod(spec.mesh) if spec.mesh else 3


def small_pieces(size: int) -> mock._patch[int]:
    return mock.patch("launcher.checkpoint.layout.PIECE", size)


def at(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True))


@relaxed
@given(specs())
def test_boxes_are_what_torch_chunk_gives(spec: TensorSpec) -> None:
    whole = torch.arange(math.prod(spec.shape)).view(spec.shape)
    for rank in range(ranks(spec)):
        expected = held(whole, spec, rank)
        assert local_shape(spec, rank) == tuple(expected.shape)
        local = torch.full_like(expected, -1)
        for box, place in parts(spec, rank):
            local[at(Box(place, box.sizes))] = whole[at(box)]
        assert torch.equal(local, expected)
        assert boxes(spec, rank) == [box for box, _ in parts(spec, rank)]


@relaxed
@given(specs(), st.sampled_from([4, 16, PIECE]))
def test_every_element_is_written_once_by_a_rank_that_holds_it(spec: TensorSpec, piece: int) -> None:
    with small_pieces(piece):
        written = plan({"t": spec}, ranks(spec))
    times = torch.zeros(spec.shape, dtype=torch.int64)
    for rank, writes in enumerate(written):
        offset = 0
        for write in writes:
            assert write.offset == offset
            offset += write.nbytes
            assert write.nbytes == write.box.numel * 4
            times[at(write.box)] += 1
            assert any(box.overlap(write.box) == write.box for box in boxes(spec, rank)) or not write.nbytes
        assert written.nbytes(rank) == offset
        assert not writes or not spec.rank0 or rank == 0
    assert torch.equal(times, torch.ones_like(times))
    assert sum(map(len, written)) > 0


@relaxed
@given(st.data())
def test_any_placement_is_read_into_any_other(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=3)))
    there, here = data.draw(specs(shape)), data.draw(specs(shape))
    whole = sample("t", shape, torch.int32)
    with tempfile.TemporaryDirectory() as directory, small_pieces(data.draw(st.sampled_from([4, 16, PIECE]))):
        path = Path(directory, "step-00000001")
        index = write_checkpoint(path, {"t": whole}, {"t": there}, ranks(there))
        for rank in range(ranks(here)):
            stage = Stage(path, index, {"t": here}, rank, Buffer())
            stage.fill({"t": "t"})
            ((name, staged),) = stage.tensors()
            assert name == "t"
            assert same(staged, held(whole, here, rank))


def test_replicated_data_is_shared_out_evenly() -> None:
    sizes = [3 * PIECE, 300, 7 * PIECE, 10 * PIECE, 5, 2 * PIECE]
    specs = {f"w{k}": TensorSpec((size // 4, 1), "F32") for k, size in enumerate(sizes)}
    specs["buffer"] = TensorSpec((4 * PIECE,), "U8", rank0=True)
    loads = [plan(specs, 4).nbytes(rank) for rank in range(4)]
    assert sum(loads) == sum(spec.nbytes for spec in specs.values())
    assert max(loads) - min(loads) <= PIECE


def test_replicas_of_a_sharded_tensor_share_it() -> None:
    specs = {"w": TensorSpec((1024, 1024), "F32", (2, 2), ("R", "S(0)"))}
    assert [plan(specs, 4).nbytes(rank) for rank in range(4)] == [PIECE] * 4


def test_a_plan_does_not_depend_on_the_order_of_the_tensors() -> None:
    specs = {f"w{k}": TensorSpec((k, 3 * PIECE), ["F32", "BF16", "U8", "F64"][k % 4]) for k in range(9)}
    assert list(plan(specs, 3)) == list(plan(dict(reversed(specs.items())), 3))


def test_no_element_is_misaligned() -> None:
    specs = {f"w{k}": TensorSpec((k,), dtype) for k, dtype in enumerate(["U8", "F64", "BF16", "F32", "I8", "I64"])}
    for write in plan(specs, 1)[0]:
        assert write.offset % specs[write.name].itemsize == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "F31"},
        {"shape": (-1, 4)},
        {"shape": (2**40, 2**40)},
        {"shape": (1,) * 65},
        {"mesh": (2, 2)},
        {"mesh": (0,)},
        {"mesh": (-2,)},
        {"mesh": None},
        {"placements": ("S(2)",)},
        {"placements": ("S(-1)",)},
        {"placements": ("_S(0,0)",)},
        {"placements": ("_S(0,3)",)},
        {"placements": ("P",)},
        {"placements": ("S(\u0661)",)},
        {"placements": ("S(0) ",)},
        {"rank0": True},
    ],
)
def test_a_description_that_contradicts_itself_is_refused(wrong: dict[str, object]) -> None:
    right = {"shape": (4, 4), "dtype": "F32", "mesh": (2,), "placements": ("S(0)",)}
    TensorSpec(**right)
    with pytest.raises(ValueError, match=r"unknown|impossible|do not fit"):
        TensorSpec(**right | wrong)


def shapes_of_70b() -> dict[str, tuple[int, ...]]:
    layer = {
        "attention.q": (8192, 8192),
        "attention.k": (1024, 8192),
        "attention.v": (1024, 8192),
        "attention.o": (8192, 8192),
        "mlp.gate": (28672, 8192),
        "mlp.up": (28672, 8192),
        "mlp.down": (8192, 28672),
        "norm1": (8192,),
        "norm2": (8192,),
    }
    shapes = {f"layers.{k}.{name}.weight": shape for k in range(80) for name, shape in layer.items()}
    return shapes | {"embed.weight": (128256, 8192), "head.weight": (128256, 8192)}


def specs_of_70b(mesh: tuple[int, ...], placements: tuple[str, ...]) -> dict[str, TensorSpec]:
    kinds = ("model", "optimizer/0/exp_avg", "optimizer/0/exp_avg_sq")
    return {
        f"{kind}/{name}": TensorSpec(shape, "F32", mesh, placements)
        for kind in kinds
        for name, shape in shapes_of_70b().items()
    }


@pytest.mark.parametrize(("mesh", "placements"), [((4096,), ("S(0)",)), ((8, 512), ("R", "S(0)"))])
def test_a_large_job_is_planned_by_every_rank_alone(mesh: tuple[int, ...], placements: tuple[str, ...]) -> None:
    """70 B parameters with AdamW's moments on 4,096 ranks of 512 nodes, saved, then read by a rank of 2,048.

    Each is told by what is counted, not by a clock: `benchmarks/checkpoint.py` times it.
    """
    specs = specs_of_70b(mesh, placements)
    assert sum(spec.nbytes for spec in specs.values()) > 3 * 4 * 70e9
    plan = Plan(specs, 4096)
    mates = range(8, 16)
    sizes = part_sizes([plan.nbytes(rank) for rank in mates])
    head = header([plan[rank] for rank in mates], specs)
    assert len(head) < 8e6
    blank = Segment(0, len(head), bytes(digest_count(len(head))))
    files = [FileEntry(f"node-{k:05d}-of-00512.safetensors", len(head) + sum(sizes), blank) for k in range(512)]
    parts = [
        (rank // 8, Segment(len(head) + sum(sizes[: rank % 8]), sizes[rank % 8], bytes(digest_count(sizes[rank % 8]))))
        for rank in range(4096)
    ]
    index = Index(1, 1, 4096, specs, {}, files, parts, {}, [{}] * 4096, [], {})
    assert len(encode(index)) < 10e6

    here = specs_of_70b((4, 512), ("R", "S(0)"))
    there = Plan(specs, 4096)
    needed = {
        name: sum(overlap.numel for box in boxes(spec, 100) for _, _, overlap in there.sources(name, box))
        for name, spec in here.items()
    }
    assert needed == {name: math.prod(local_shape(spec, 100)) for name, spec in here.items()}
    assert len(there._by_name) <= 8 * 16  # plans of a few ranks were made, not of all
