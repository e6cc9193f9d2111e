"""Weights out to plain safetensors and in from foreign files: bit for bit, whole or not at all, and never trusted."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import same, sample, write_checkpoint

from launcher.checkpoint import State, Store, TensorSpec, load, read_index, save, verify
from launcher.checkpoint.buffer import Buffer
from launcher.checkpoint.comparing import compare, numbers
from launcher.checkpoint.export import export
from launcher.checkpoint.importing import import_weights
from launcher.checkpoint.reading import read_tensors
from launcher.checkpoint.state import DTYPES
from launcher.errors import CheckpointError, LauncherError, UsageError
from launcher.world import World

WORLD = World()
TENSORS = {
    "model/a.weight": sample("a", (6, 4)),
    "model/b.weight": sample("b", (5,), torch.bfloat16),
    "model/c.steps": sample("c", (), torch.int64),
    "model/d.mask": sample("d", (3,), torch.bool),
    "model/e.none": torch.zeros(0, 3),
    "optimizer/exp_avg/model/a.weight": sample("m", (6, 4)),
}
SPECS = {
    name: TensorSpec(tuple(tensor.shape), next(key for key, dtype in DTYPES.items() if dtype == tensor.dtype))
    for name, tensor in TENSORS.items()
} | {"model/a.weight": TensorSpec((6, 4), "F32", (2, 2), ("S(0)", "S(1)"))}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint of four ranks, one of its tensors sharded."""
    path = tmp_path / "step-00000040"
    write_checkpoint(path, TENSORS, SPECS, 4, aliases={"model/z.tied": "model/a.weight"})
    return path


def model() -> dict[str, torch.Tensor]:
    return {name.removeprefix("model/"): tensor for name, tensor in TENSORS.items() if name.startswith("model/")}


def loaded(output: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in output.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert same(found[name], tensor), name


def refused(act: Callable[[], object], message: str, kind: type[LauncherError] = CheckpointError) -> None:
    with pytest.raises(kind, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_tensors_are_read_whole_in_any_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = read_index(path)
    order = ["model/z.tied", *reversed(TENSORS)]
    for room in (1 << 20, 1):
        monkeypatch.setattr("launcher.checkpoint.reading._ROOM", room)
        found = [(name, tensor.clone()) for name, tensor in read_tensors(path, index, order)]
        assert [name for name, _ in found] == order
        assert_same(dict(found), TENSORS | {"model/z.tied": TENSORS["model/a.weight"]})


def test_the_placement_of_tensors_makes_no_difference(path: Path, tmp_path: Path) -> None:
    whole = {name: TensorSpec(spec.shape, spec.dtype) for name, spec in SPECS.items()}
    write_checkpoint(tmp_path / "other", TENSORS, whole, 1, aliases={"model/z.tied": "model/a.weight"})
    found = compare(path, tmp_path / "other")
    assert (found.facts, found.tensors, found.compared) == ([("world_size", 4, 1)], [], 7)


def test_no_more_is_held_than_the_largest_tensor(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[int] = []

    class Watched(Buffer):
        def room(self, size: int) -> torch.Tensor:
            rooms.append(size)
            return super().room(size)

    monkeypatch.setattr("launcher.checkpoint.reading.Buffer", Watched)
    monkeypatch.setattr("launcher.checkpoint.reading._ROOM", 20)
    list(read_tensors(path, read_index(path), TENSORS))
    assert (len(rooms), max(rooms)) == (4, 128)  # of 96 bytes, each tensor rounded up to 64: b and c and d share one


def test_bits_are_compared_before_numbers() -> None:
    nan = sample("nan", (500,), torch.bfloat16)
    assert nan.isnan().any()
    assert numbers(nan, nan.clone()) is None
    found = numbers(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    assert found is not None
    assert (found.differing, found.largest_abs, found.largest_rel) == (1, 0, 0)
    found = numbers(torch.tensor([2**62, 5]), torch.tensor([2**62 + 1, 5]))  # alike in float64
    assert found is not None
    assert (found.differing, found.largest_abs) == (1, 1)


def test_one_file_as_transformers_names_it(path: Path, tmp_path: Path) -> None:
    done = export(path, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == done.files == ["model.safetensors"]
    assert_same(loaded(tmp_path / "out"), model())
    head = (tmp_path / "out" / "model.safetensors").read_bytes()
    described = json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])
    assert described.pop("__metadata__") == {"format": "pt"}
    start = len(head) - done.nbytes
    for name, entry in described.items():  # other readers map a tensor where it stands
        assert (start + entry["data_offsets"][0]) % model()[name].element_size() == 0
    assert done.nbytes == sum(tensor.nbytes for tensor in model().values())


def test_shards_and_their_list(path: Path, tmp_path: Path) -> None:
    done = export(path, tmp_path / "out", shard_size=100)
    listed = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert listed["metadata"] == {"total_size": done.nbytes}
    assert done.files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert listed["weight_map"]["a.weight"] == done.files[0]  # with 96 bytes
    assert {listed["weight_map"][name] for name in model().keys() - {"a.weight"}} == {done.files[1]}
    assert sorted(os.listdir(tmp_path / "out")) == [*done.files, "model.safetensors.index.json"]
    for name, file in listed["weight_map"].items():
        assert same(load_file(tmp_path / "out" / file)[name], model()[name])
    assert_same(loaded(tmp_path / "out"), model())
    back = tmp_path / "back"
    import_weights(tmp_path / "out", back)
    assert compare(path, back, only="model/[a-e]*").same


def test_ties_are_left_out_or_copied(path: Path, tmp_path: Path) -> None:
    export(path, tmp_path / "out", copy_ties=True)
    assert_same(loaded(tmp_path / "out"), model() | {"z.tied": TENSORS["model/a.weight"]})


def test_a_cast_is_torchs_and_never_makes_an_infinity(tmp_path: Path) -> None:
    tensors = {"model/w": torch.tensor([1.1, -2.7, float("inf")]), "model/n": torch.tensor([3])}
    path = save(Store(tmp_path / "a"), WORLD, 1, State(tensors), attempt=1)
    export(path, tmp_path / "out", dtype="BF16")
    assert_same(loaded(tmp_path / "out"), {"w": tensors["model/w"].bfloat16(), "n": tensors["model/n"]})
    large = save(Store(tmp_path / "b"), WORLD, 1, State({"model/w": torch.tensor([1.0, 7e4])}), attempt=1)
    refused(lambda: export(large, tmp_path / "half", dtype="F16"), "w has values up to 7e.04, too large for F16")
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
)
def test_weights_that_are_there_are_not_written_over(path: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("{}")
    (output / name).write_text("mine")
    refused(lambda: export(path, output), f"out holds {name} already", UsageError)
    (output / name).unlink()
    export(path, output)
    assert sorted(os.listdir(output)) == ["config.json", "model.safetensors"]


def test_nothing_half_written_is_left(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file, *_) = sorted(path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    output = tmp_path / "out"
    refused(lambda: export(path, output, shard_size=100), "is damaged")
    assert not output.exists()
    output.mkdir()
    (output / "config.json").write_text("{}")
    refused(lambda: export(path, output, shard_size=100), "is damaged")
    assert os.listdir(output) == ["config.json"]


def test_the_base_gives_what_the_checkpoint_lacks(path: Path, tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    frozen = {"f.weight": sample("f", (2, 2), torch.float16), "a.weight": torch.zeros(6, 4), "z.tied": torch.ones(1)}
    save_file(frozen, base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "x", "dtype": "float16"}')
    (base / "tokenizer.json").symlink_to(base / "config.json")
    (base / "README.md").write_text("not copied")
    done = export(path, output, base=base, dtype="F32")
    assert (done.tensors, done.from_base, done.copied) == (6, 1, ["config.json", "tokenizer.json"])
    found = loaded(output)
    assert same(found["f.weight"], frozen["f.weight"].float())
    assert same(found["a.weight"], TENSORS["model/a.weight"])
    assert json.loads((output / "config.json").read_text()) == {"model_type": "x", "dtype": "float32"}
    assert (output / "tokenizer.json").read_text() == (base / "config.json").read_text()
    assert not (output / "tokenizer.json").is_symlink()


def test_another_models_base_is_refused(path: Path, tmp_path: Path) -> None:
    save_file({"other": torch.ones(1)}, tmp_path / "x.safetensors")
    refused(lambda: export(path, tmp_path / "out", base=tmp_path / "x.safetensors"), "no tensor's name in common")
    save_file({"a.weight": torch.ones(6, 5)}, tmp_path / "y.safetensors")
    refused(lambda: export(path, tmp_path / "out", base=tmp_path / "y.safetensors"), "a.weight is .6, 4. in")


# --- import ---


def test_a_state_dict_comes_in_with_its_ties(tmp_path: Path) -> None:
    tensors = model() | {"t": torch.ones(3, 2).t()}
    torch.save(tensors | {"tied": tensors["a.weight"], "p": torch.nn.Parameter(torch.ones(2))}, tmp_path / "x.pt")
    index = import_weights(tmp_path / "x.pt", tmp_path / "c")
    assert (index.step, index.world_size) == (0, 1)
    assert dict(index.aliases) == {"model/tied": "model/a.weight"}
    verify(tmp_path / "c")
    found = {name.removeprefix("model/"): t.clone() for name, t in read_tensors(tmp_path / "c", index, index.tensors)}
    assert_same(found, tensors | {"p": torch.ones(2)})
    assert sorted(os.listdir(tmp_path)) == ["c", "x.pt"]


def test_what_is_imported_starts_a_model(tmp_path: Path) -> None:
    save_file({"embed": sample("e", (4, 3))}, tmp_path / "x.safetensors")
    import_weights(tmp_path / "x.safetensors", tmp_path / "c", name="net", ties={"head": "embed"})
    live = torch.zeros(4, 3)
    load(tmp_path / "c", WORLD, State({"net/embed": live}, aliases={"net/head": "net/embed"}), only="net/")
    assert same(live, sample("e", (4, 3)))
    refused(
        lambda: import_weights(tmp_path / "x.safetensors", tmp_path / "d", ties={"head": "body"}),
        "--tie head=body: .* has no body",
        UsageError,
    )


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ({"model": {"w": torch.ones(1)}, "epoch": 3}, None, "is nested: .* --key; its keys are model, epoch"),
        ({"model": {"w": torch.ones(1)}}, "net", "has no net: its keys are model"),
        (torch.ones(1), "net", "has no net: it holds a Tensor"),
        (torch.ones(1), None, "holds a Tensor, and no state dict"),
        ({}, None, "holds nothing, and no state dict"),
        ({"w": torch.ones(1), "lr": 0.1}, None, "'lr' is a float: a state dict holds tensors by name"),
        ({3: torch.ones(1)}, None, "3 is a Tensor: a state dict holds tensors by name"),
        ({"a": {"b": {"w": torch.ones(1)}}}, "a", "'b' is a dict: a state dict holds tensors by name"),
        ({"w": torch.ones(1, dtype=torch.complex64)}, None, "model/w is torch.complex64, which a checkpoint cannot"),
        ({"w": torch.eye(2).to_sparse()}, None, "model/w is torch.sparse_coo"),
        ({"w": torch.ones(1).expand(1 << 40)}, None, r"its tensors take 4398046511104 bytes and the file has \d+:"),
    ],
)
def test_what_is_no_state_dict_is_named(tmp_path: Path, content: Any, key: str | None, message: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    refused(lambda: import_weights(tmp_path / "x.pt", tmp_path / "c", key=key), message, LauncherError)
    assert os.listdir(tmp_path) == ["x.pt"]


def test_a_nested_state_dict_by_its_key(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(1)}, "epoch": 3}, tmp_path / "x.bin")
    assert list(import_weights(tmp_path / "x.bin", tmp_path / "c", key="model").tensors) == ["model/w"]


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("pwned",))


def test_code_in_a_torch_file_is_told_of(tmp_path: Path) -> None:
    torch.save({"w": Evil()}, tmp_path / "x.pt")
    refused(
        lambda: import_weights(tmp_path / "x.pt", tmp_path / "c"), "it holds more than tensors, which could run code"
    )


def test_a_compressed_torch_file_is_never_unpacked(tmp_path: Path) -> None:
    torch_files()["compressed"](tmp_path / "x.pt")
    refused(lambda: import_weights(tmp_path / "x.pt", tmp_path / "c"), "is compressed, which torch.save never does")


def torch_files() -> dict[str, Callable[[Path], None]]:
    def pickled(path: Path) -> None:
        path.write_bytes(pickle.dumps({"w": Evil()}))

    def legacy(path: Path) -> None:
        torch.save({"w": torch.ones(1)}, path, _use_new_zipfile_serialization=False)

    def cut(path: Path) -> None:
        torch.save({"w": torch.ones(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])

    def compressed(path: Path) -> None:
        torch.save({"w": torch.zeros(1000)}, path)
        with zipfile.ZipFile(path) as archive:
            held = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in held.items():
                archive.writestr(name, data)

    def too_large(path: Path) -> None:
        """As if a tensor of four elements had 2**40."""
        torch.save({"w": torch.zeros(4)}, path)
        with zipfile.ZipFile(path) as archive:
            held = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        huge = b"\x8a\x06" + (2**40).to_bytes(6, "little")
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in held.items():
                wrong = data.replace(b"K\x04", huge) if name.endswith("data.pkl") else data
                archive.writestr(name, wrong)

    return {
        "code": lambda path: torch.save({"w": Evil()}, path),
        "pickle": pickled,
        "legacy": legacy,
        "cut": cut,
        "compressed": compressed,
        "too large": too_large,
        "empty": lambda path: path.write_bytes(b""),
        "zeros": lambda path: path.write_bytes(bytes(100)),
        "zip": lambda path: zipfile.ZipFile(path, "w").close(),
        "pipe": os.mkfifo,
    }


@pytest.mark.parametrize("kind", torch_files())
def test_a_crafted_torch_file_is_refused_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch_files()[kind](tmp_path / "x.pt")
    refused(lambda: import_weights(tmp_path / "x.pt", tmp_path / "c"), "x.pt")
    assert os.listdir(tmp_path) == ["x.pt"]


def forged(header: object, data: int = 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def entry(**members: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | members


HEADERS = {
    "huge length": (2**60).to_bytes(8, "little") + b"{}",
    "past the end": (10**6).to_bytes(8, "little") + b"{}",
    "empty": b"",
    "short": b"\x01\x00",
    "overlap": forged({"a": entry(), "b": entry(shape=[1], data_offsets=[0, 4])}),
    "gap": forged({"a": entry(shape=[1], data_offsets=[0, 4]), "b": entry(shape=[1], data_offsets=[12, 16])}),
    "past the data": forged({"a": entry(shape=[400], data_offsets=[0, 1600])}),
    "backwards": forged({"a": entry(data_offsets=[16, 0])}),
    "negative": forged({"a": entry(shape=[-4])}),
    "negative pair": forged({"a": entry(shape=[-2, -2])}),
    "overflow": forged({"a": entry(shape=[2**40, 2**40])}),
    "lies": forged({"a": entry(shape=[5])}),
    "NaN": forged(b'{"a": NaN}'),
    "dtype": forged({"a": entry(dtype="X9")}),
    "complex": forged({"a": entry(dtype="C64", shape=[2])}),
    "list": forged(b"[]"),
    "deep": forged(b"[" * 100_000),
    "none": forged({}, 0),
    "hidden data": forged({"a": entry()}, 64),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_crafted_safetensors_file_is_refused(path: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(HEADERS[kind])
    refused(lambda: import_weights(file, tmp_path / "c"), "x.safetensors")
    refused(lambda: export(path, tmp_path / "out", base=file), "x.safetensors|in common")
    assert sorted(os.listdir(tmp_path)) == ["step-00000040", "x.safetensors"]


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"weight_map": {"a": "../x.safetensors"}}, "'../x.safetensors' is no plain name"),
        ({"weight_map": {"a": "/etc/passwd"}}, "'/etc/passwd' is no plain name"),
        ({"weight_map": {"a": ".safetensors"}}, "'.safetensors' is no plain name"),
        ({"weight_map": {"a": "x\0.safetensors"}}, "is no plain name"),
        ({"weight_map": {"a": 3}}, "3 is no plain name"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors is missing"),
        ({"weight_map": {"b": "there.safetensors"}}, "there.safetensors has no b, which"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ([], "holds no object"),
        ("{", "is no JSON"),
        ("[" * 200_000, "is no JSON"),
    ],
)
def test_a_crafted_list_of_files_is_refused(tmp_path: Path, listed: object, message: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    save_file({"a": torch.ones(1)}, source / "there.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    text = listed if isinstance(listed, str) else json.dumps(listed)
    (source / "model.safetensors.index.json").write_text(text)
    refused(lambda: import_weights(source, tmp_path / "c"), message)
    assert not (tmp_path / "c").exists()


def test_a_cache_of_links_comes_in(tmp_path: Path) -> None:
    """As the Hub's: the snapshot's names are links to blobs."""
    (tmp_path / "snapshot").mkdir()
    save_file({"a": sample("a", (3,))}, tmp_path / "blob")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blob")
    index = import_weights(tmp_path / "snapshot", tmp_path / "c")
    ((_, found),) = read_tensors(tmp_path / "c", index, ["model/a"])
    assert same(found, sample("a", (3,)))


def test_every_truncation_of_an_export_is_refused(path: Path, tmp_path: Path) -> None:
    export(path, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    right = file.read_bytes()
    for length in range(0, len(right), 7):
        file.write_bytes(right[:length])
        refused(lambda: import_weights(tmp_path / "out", tmp_path / "c"), "model.safetensors")
    assert not (tmp_path / "c").exists()


def test_a_full_disk_leaves_no_half_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "node")

    monkeypatch.setattr("launcher.checkpoint.saving.write_part", full)
    refused(lambda: import_weights(tmp_path / "x.safetensors", tmp_path / "c"), "No space left on device")
    assert os.listdir(tmp_path) == ["x.safetensors"]
