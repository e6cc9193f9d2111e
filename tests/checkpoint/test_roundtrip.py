"""One process: what goes in comes out bit for bit, or is refused by name before anything has changed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from samples import raw, same, sample

from launcher.checkpoint import Retention, State, Store, load, read_index, save, verify
from launcher.checkpoint.files import BLOCK
from launcher.checkpoint.state import DTYPES
from launcher.errors import CheckpointError
from launcher.world import World

WORLD = World()


def odd_tensors() -> dict[str, torch.Tensor]:
    tensors = {f"model/{name}": sample(name, (3, 5), dtype) for name, dtype in DTYPES.items()}
    tensors |= {f"scalar/{name}": sample(name, (), dtype) for name, dtype in DTYPES.items()}
    tensors |= {
        "empty": torch.zeros(0),
        "empty2": torch.zeros(4, 0, 3, dtype=torch.bfloat16),
        "transposed": sample("transposed", (7, 5)).t(),
        "every_other": sample("every_other", (9, 8))[::2, 1::3],
        "expanded": torch.tensor([3.5]).expand(4, 6),
        "channels_last": sample("conv", (2, 3, 4, 5)).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(sample("parameter", (4,))),
        "name with spaces, \u00fc and [0:2]": sample("u", (2, 2)),
    }
    return tensors


def blank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors to load into, with the strides of the originals where they can be written."""
    return {
        name: torch.zeros_like(tensor, memory_format=torch.preserve_format)
        .detach()
        .requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }


def refused(state: State, path: Path, message: str, **options: str) -> None:
    """The load is refused in one line that contains `message`, and no tensor has changed."""
    before = {name: raw(tensor).clone() for name, tensor in state.tensors.items() if not tensor.is_meta}
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path, WORLD, state, **options)
    assert "\n" not in str(caught.value)
    for name, bytes_before in before.items():
        assert torch.equal(raw(state.tensors[name]), bytes_before)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "checkpoints", Retention(3))


def test_every_dtype_shape_and_stride(store: Store) -> None:
    tensors = odd_tensors()
    path = save(store, WORLD, 40, State(tensors), attempt=1)
    assert path == store.path(40) == store.newest()
    live = blank(tensors)
    strides = {name: tensor.stride() for name, tensor in live.items()}
    load(path, WORLD, State(live))
    for name, tensor in tensors.items():
        assert same(live[name], tensor), name
        assert live[name].stride() == strides[name], name
    verify(path)


def test_other_readers_of_safetensors_read_it(store: Store) -> None:
    tensors = odd_tensors()
    path = save(store, WORLD, 1, State(tensors), attempt=1)
    with safe_open(path / "node-00000-of-00001.safetensors", "pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert same(file.get_tensor(name), tensor), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_a_gpu(store: Store) -> None:
    tensors = odd_tensors()
    path = save(store, WORLD, 1, State({name: tensor.cuda() for name, tensor in tensors.items()}), attempt=1)
    live = {name: tensor.cuda() for name, tensor in blank(tensors).items()}
    load(path, WORLD, State(live))
    for name, tensor in tensors.items():
        assert live[name].is_cuda
        assert same(live[name].cpu(), tensor), name


def test_an_empty_state(store: Store) -> None:
    path = save(store, WORLD, 0, State(), attempt=1)
    assert load(path, WORLD, State()).step == 0
    verify(path)
    with safe_open(path / "node-00000-of-00001.safetensors", "pt") as file:
        assert list(file.keys()) == []


def test_more_than_a_block(store: Store) -> None:
    tensors = {f"w{k}": sample(f"w{k}", (BLOCK // 16 + 100_000 * k, 3)) for k in range(4)}
    path = save(store, WORLD, 1, State(tensors), attempt=1)
    live = blank(tensors)
    load(path, WORLD, State(live))
    assert all(same(live[name], tensor) for name, tensor in tensors.items())
    verify(path)
    with safe_open(path / "node-00000-of-00001.safetensors", "pt") as file:
        assert same(file.get_tensor("w3"), tensors["w3"])


def test_values_come_back_as_they_were(store: Store) -> None:
    values = {
        "step": 40,
        "lr": 0.1 + 0.2,
        "tiny": 5e-324,
        "big": 2**128 + 1,
        "none": None,
        "on": True,
        "text": "\u00fc\n",
    }
    values["groups"] = [{"betas": [0.9, 0.999], "names": []}, {}]
    state = State(values=values, rank_values={"cursor": {"shard": 3}}, exceptions=("scaler", "stream"))
    index = load(save(store, WORLD, 40, state, attempt=7, facts={"loss": -0.0}), WORLD, State())
    assert index.values == values
    assert json.dumps(index.values) == json.dumps(values)
    assert index.rank_values == [{"cursor": {"shard": 3}}]
    assert index.exceptions == ["scaler", "stream"]
    assert (index.step, index.attempt, index.world_size) == (40, 7, 1)
    assert str(index.facts["loss"]) == "-0.0"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "lr is nan"),
        ({"a": [1.0, float("inf")]}, r"lr\.a\[1\] is inf"),
        ({3: 1}, "lr has the key 3"),
        (torch.zeros(2), "lr is a Tensor"),
        ([{1, 2}], r"lr\[0\] is a set"),
        (b"x", "lr is a bytes"),
        (1 << 5000, "lr is an integer of more than 4096 bits"),
    ],
    ids=["nan", "infinity", "key", "tensor", "set", "bytes", "integer"],
)
def test_values_that_json_would_change_are_refused(store: Store, value: object, message: str) -> None:
    for state in (State(values={"lr": value}), State(rank_values={"lr": value})):
        with pytest.raises(CheckpointError, match=message):
            save(store, WORLD, 1, state, attempt=1)
    with pytest.raises(CheckpointError, match=message.replace("lr", r"facts\.lr")):
        save(store, WORLD, 1, State(), attempt=1, facts={"lr": value})
    assert list(store.root.glob("*")) == []


class Odd(torch.Tensor):
    """A subclass that may keep its data elsewhere."""


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda: torch.zeros(2, dtype=torch.complex64), "w is torch.complex64"),
        (lambda: torch.zeros(2, dtype=torch.complex128), "w is torch.complex128"),
        (lambda: torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "w is torch.float4_e2m1fn_x2"),
        (lambda: torch.zeros(2, 2).to_sparse(), "w is torch.sparse_coo"),
        (lambda: torch.zeros(2, device="meta"), "w is on the meta device"),
        (lambda: torch.zeros(2).as_subclass(Odd), "w is a Odd"),
    ],
)
def test_tensors_that_cannot_be_saved_exactly_are_refused(
    store: Store, tensor: Callable[[], torch.Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(store, WORLD, 1, State({"w": tensor()}), attempt=1)
    assert store.steps() == []


class Quantised(torch.Tensor):
    """A tensor of whole numbers times a scale, as 8-bit moments are."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, unit: float) -> Quantised:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, unit: float) -> None:
        self.codes, self.scale, self.unit = codes, scale, unit

    def __tensor_flatten__(self) -> tuple[list[str], list[float]]:
        return ["codes", "scale"], [self.unit]

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], context: list[float], *_: object) -> Quantised:
        return cls(inner["codes"], inner["scale"], *context)

    @classmethod
    def __torch_dispatch__(cls, function: object, types: object, args: tuple = (), kwargs: object = None) -> object:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale, args[0].unit)
        raise NotImplementedError(f"{function}: nothing is computed with it here")


def quantised(name: str, scale: torch.Tensor | None = None, unit: float = 0.5) -> Quantised:
    codes = sample(name, (6, 4), torch.int8)
    return Quantised(codes, sample("scale", (6,)) if scale is None else scale, unit)


def test_subclasses_are_flattened(store: Store) -> None:
    saved = State(
        {"w": quantised("w"), "nested": quantised("n", quantised("inner")), "b": sample("b", (3,))},
        aliases={"tied": "w"},
    )
    path = save(store, WORLD, 1, saved, attempt=1)
    index = verify(path)
    assert {"w:codes", "w:scale", "nested:codes", "nested:scale:codes", "nested:scale:scale", "b"} == set(index.tensors)
    assert index.aliases == {"tied:codes": "w:codes", "tied:scale": "w:scale"}

    def live(unit: float = 0.5) -> State:
        return State(
            {"w": quantised("?", torch.zeros(6), unit), "nested": quantised("?", quantised("?")), "b": torch.zeros(3)},
            aliases={"tied": "w"},
        )

    state = live()
    load(path, WORLD, state)
    assert same(state.tensors["w"].codes, saved.tensors["w"].codes)
    assert same(state.tensors["w"].scale, saved.tensors["w"].scale)
    assert same(state.tensors["nested"].scale.codes, saved.tensors["nested"].scale.codes)
    with pytest.raises(CheckpointError, match=r"w is .*Quantised\(\[0\.5\]\) there and .*Quantised\(\[0\.25\]\) here"):
        load(path, WORLD, live(unit=0.25))
    with pytest.raises(CheckpointError, match="has no w, which is here"):
        load(path, WORLD, State({"w": torch.zeros(6, 4), "nested": live().tensors["nested"], "b": torch.zeros(3)}))


@pytest.mark.parametrize("names", [("w[0:2]", "__metadata__"), ("__metadata__",)])
def test_a_name_that_means_something_else_in_a_file_is_refused(store: Store, names: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError, match="would be called __metadata__"):
        save(store, WORLD, 1, State({name: torch.zeros(2) for name in names}), attempt=1)
    assert list(store.root.glob("*")) == []


def test_ties_are_saved_once_and_loaded_into_ties(store: Store) -> None:
    weight = sample("weight", (50, 40))
    state = State(
        {"embed": weight, "head": weight, "view": weight.view(50, 40), "part": weight[:25]}, aliases={"old": "head"}
    )
    path = save(store, WORLD, 1, state, attempt=1)
    index = read_index(path)
    assert index.aliases == {"head": "embed", "view": "embed", "old": "embed"}
    assert set(index.tensors) == {"embed", "part"}
    assert index.dtype("old") is torch.float32
    live = torch.zeros(50, 40)
    load(
        path,
        WORLD,
        State({"head": live, "view": live, "part": torch.zeros(25, 40)}, aliases={"embed": "head", "old": "view"}),
    )
    assert same(live, weight)


def test_a_tie_loads_into_tensors_of_their_own_but_not_the_other_way(store: Store) -> None:
    weight = sample("weight", (5, 4))
    tied = save(store, WORLD, 1, State({"embed": weight}, aliases={"head": "embed"}), attempt=1)
    own = State({"embed": torch.zeros(5, 4), "head": torch.zeros(5, 4)})
    load(tied, WORLD, own)
    assert same(own.tensors["embed"], weight)
    assert same(own.tensors["head"], weight)
    free = save(store, WORLD, 2, own, attempt=1)
    assert read_index(free).aliases == {}
    refused(State({"embed": weight.clone()}, aliases={"head": "embed"}), free, "head is tied to embed here")


def test_a_tie_to_nothing_is_refused(store: Store) -> None:
    with pytest.raises(CheckpointError, match="head is tied to embed, which the state does not hold"):
        save(store, WORLD, 1, State(aliases={"head": "embed"}), attempt=1)


def test_another_models_checkpoint_is_refused_by_name(store: Store) -> None:
    saved = {"model/a": sample("a", (64, 32)), "model/b": sample("b", (3,)), "optimizer/a": sample("c", (64, 32))}
    path = save(store, WORLD, 40, State(saved), attempt=1)
    where = "step-00000040"

    def live(**changes: torch.Tensor | None) -> State:
        tensors = {**blank(saved), **{name.replace("_", "/"): tensor for name, tensor in changes.items()}}
        return State({name: tensor for name, tensor in tensors.items() if tensor is not None})

    refused(live(model_c=torch.ones(1)), path, f"{where} has no model/c, which is here")
    refused(live(model_c=torch.ones(1), model_d=torch.ones(1)), path, r"has no model/c \(and 1 more\)")
    refused(live(model_b=None), path, f"{where} has model/b, which is not here")
    refused(live(model_a=torch.ones(64, 48)), path, f"{where}: model/a is 64x32 there and 64x48 here")
    refused(live(model_b=torch.ones(())), path, f"{where}: model/b is 3 there and a scalar here")
    refused(live(model_b=torch.ones(3).double()), path, f"{where}: model/b is F32 there and F64 here")
    refused(live(model_b=torch.ones(3, device="meta")), path, "model/b is on the meta device")
    refused(live(model_b=torch.ones(1).expand(3)), path, "model/b is expanded")
    refused(live(), path, "nothing here begins with modle/", only="modle/")


def test_weights_alone(store: Store) -> None:
    saved = {"model/a": sample("a", (4, 3)), "model/b": sample("b", (3,)), "optimizer/a": sample("c", (4, 3))}
    path = save(store, WORLD, 40, State(saved, values={"step": 40}), attempt=1)
    live = State({"model/a": torch.zeros(4, 3), "model/b": torch.zeros(3), "track/x": torch.ones(2)})
    index = load(path, WORLD, live, only="model/")
    assert same(live.tensors["model/a"], saved["model/a"])
    assert same(live.tensors["model/b"], saved["model/b"])
    assert torch.equal(live.tensors["track/x"], torch.ones(2))
    assert index.values == {"step": 40}
    del live.tensors["model/b"]
    refused(live, path, "has model/b, which is not here", only="model/")


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_what_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    refused(State(), tmp_path / name, "is no checkpoint: there is no such directory")


def test_an_unfinished_checkpoint(tmp_path: Path) -> None:
    refused(State(), tmp_path, re.escape("it has no index.json, so it was never finished"))
