"""A checkpoint that is not what was written is refused in one line, and nothing has been changed by it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import same, sample, write_checkpoint, write_index

from launcher.checkpoint import State, TensorSpec, load, read_index, verify
from launcher.checkpoint.files import header, write_file
from launcher.checkpoint.layout import Plan
from launcher.errors import CheckpointError
from launcher.world import World

SPECS = {
    "model/w": TensorSpec((6, 4), "F32", (2,), ("S(0)",)),
    "model/b": TensorSpec((5,), "BF16"),
    "model/n": TensorSpec((), "I64", rank0=True),
}
TENSORS = {
    "model/w": sample("w", (6, 4)),
    "model/b": sample("b", (5,), torch.bfloat16),
    "model/n": sample("n", (), torch.int64),
}
FILES = ("rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "step-00000040"
    write_checkpoint(path, TENSORS, SPECS, 2, values={"lr": 0.5}, aliases={"model/tied": "model/w"})
    return path


def read(path: Path) -> None:
    """Load it, and find all of it right; else nothing of it has been loaded."""
    live = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    try:
        load(path, World(), State(live, aliases={"model/tied": "model/w"}))
    except BaseException:
        assert not any(tensor.any() for tensor in live.values())
        raise
    for name, tensor in TENSORS.items():
        assert same(live[name], tensor)


def refused(path: Path, message: str = "") -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=message):
        verify(path)


def members(path: Path) -> dict[str, Any]:
    return json.loads((path / "index.json").read_bytes())["index"]


def rewrite(path: Path, index: object) -> None:
    """Put a forged index in place, with the digest that it then has."""
    body = index if isinstance(index, bytes) else json.dumps(index).encode()
    digest = xxhash.xxh3_128_hexdigest(body).encode()
    (path / "index.json").write_bytes(b'{"digest": "' + digest + b'", "index": ' + body + b"}\n")


def test_it_is_read_as_it_was_written(path: Path) -> None:
    read(path)
    verify(path)
    rewrite(path, members(path))
    read(path)


@pytest.mark.parametrize("name", [*FILES, "index.json"])
def test_every_flipped_bit_is_found(path: Path, name: str) -> None:
    """One bit of each byte in turn: of the safetensors header, of the data, of the index and its digest."""
    right = (path / name).read_bytes()
    for place in range(len(right)):
        wrong = bytearray(right)
        wrong[place] ^= 1 << place % 8
        (path / name).write_bytes(wrong)
        refused(path, name)


@pytest.mark.parametrize("name", [*FILES, "index.json"])
def test_every_truncation_is_found(path: Path, name: str) -> None:
    size = (path / name).stat().st_size
    for length in reversed(range(size)):
        os.truncate(path / name, length)
        refused(path, name)


@pytest.mark.parametrize("name", [*FILES, "index.json"])
def test_a_longer_file_is_found(path: Path, name: str) -> None:
    with open(path / name, "ab") as file:
        file.write(b"\0")
    refused(path, name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found_also_by_ranks_that_do_not_need_it(path: Path, name: str) -> None:
    (path / name).unlink()
    refused(path, f"step-00000040/{name} is missing")
    with pytest.raises(CheckpointError, match="is missing"):
        load(path, World(), State({"model/n": torch.zeros((), dtype=torch.int64)}), only="model/n")


def test_swapped_files_are_found(path: Path) -> None:
    first, second = (path / name for name in FILES)
    spare = path / "spare"
    first.rename(spare)
    second.rename(first)
    spare.rename(second)
    refused(path, "step-00000040/rank-0000")


def to_link(file: Path) -> None:
    target = file.parent.parent / "elsewhere"
    file.rename(target)
    file.symlink_to(target)


def to_dangling_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("/nowhere")


def to_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def to_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("name", [FILES[1], "index.json"])
@pytest.mark.parametrize("change", [to_link, to_dangling_link, to_pipe, to_directory])
def test_only_ordinary_files_are_read(path: Path, name: str, change: Callable[[Path], None]) -> None:
    change(path / name)
    refused(path, f"step-00000040/{name} is (a link|no ordinary file)")


HUGE = 10**400


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("format", 2, "its format is 2, newer than this launcher's 1: update the launcher"),
        ("plan", 2, "its plan is 2, newer"),
        ("format", "1", "format is no int"),
        ("format", True, "format is no int"),
        ("format", 0, "format cannot be 0"),
        ("step", -1, "step cannot be -1"),
        ("step", 40.0, "step is no int"),
        ("step", None, "step is missing"),
        ("world_size", HUGE, "world_size cannot be"),
        ("world_size", 3, "model/w is on mesh"),
        ("tensors", [], "tensors is no dict"),
        ("tensors.model/w", 3, "model/w: is not described"),
        ("tensors.model/w.shape", [6, -4], "model/w: shape .* is impossible"),
        ("tensors.model/w.shape", [HUGE, 4], "model/w: shape .* is impossible"),
        ("tensors.model/w.shape", [6, 4.0], "model/w: shape has something else"),
        ("tensors.model/w.shape", [2**40, 2**20], "is 1099511627776x1048576 there and 6x4 here|too short|contradict"),
        ("tensors.model/w.dtype", "F31", "model/w: dtype 'F31' is unknown"),
        ("tensors.model/w.dtype", [], "model/w: dtype is no str"),
        ("tensors.model/w.placements", ["S(7)"], "model/w: placements .* do not fit"),
        ("tensors.model/w.placements", ["_S(0,999999)"], "model/w: placements .* do not fit"),
        ("tensors.model/w.placements", [], "model/w: placements .* do not fit"),
        ("tensors.model/w.mesh", [2, 2], "model/w: placements .* do not fit"),
        ("tensors.model/w.mesh", [HUGE], "model/w is on mesh"),
        ("tensors.model/n.rank0", 1, "model/n: rank0 is no bool"),
        ("tensors.model/extra", {"dtype": "F32", "shape": [2]}, "model/extra|contradict"),
        ("aliases.model/tied", "model/x", "model/tied cannot be tied to 'model/x'"),
        ("aliases.model/tied", {}, "model/tied cannot be tied"),
        ("aliases.model/w", "model/b", "model/w cannot be tied"),
        ("files.1.name", "../step-00000040/rank-00001-of-00002.safetensors", "is no file name of a checkpoint"),
        ("files.1.name", "/etc/passwd", "is no file name of a checkpoint"),
        ("files.1.name", "..safetensors", "is no file name of a checkpoint"),
        ("files.1.name", "a\0.safetensors", "is no file name of a checkpoint"),
        ("files.1.name", "a" * 300 + ".safetensors", "is no file name of a checkpoint"),
        ("files.1.name", FILES[0], "two of its files have one name"),
        ("files.1.size", HUGE, "size cannot be"),
        ("files.1.size", -1, "size cannot be -1"),
        ("files.1.size", 2**50, "does not have 1 blocks"),
        ("files.1.size", 100, "there is no part"),
        ("files.1.digests", "", "does not have 0 blocks"),
        ("files.1.digests", "*" * 24, "index.json is broken"),
        ("files.1.digests", "A" * 22 + "==", "fail their digest"),
        ("files", [], "there is no part"),
        ("parts", [[0, 0]], "2 ranks and has 1 parts"),
        ("parts.1", [1, 2**62], "there is no part at"),
        ("parts.1", [1, -1], "there is no part at"),
        ("parts.1", [2, 8], "there is no part at"),
        ("parts.1", [-1, 8], "there is no part at"),
        ("parts.1", [1, True], "is no part"),
        ("parts.1", [1], "is no part"),
        ("rank_values", [{}], "1 rank_values"),
        ("rank_values", [{}, 3], "rank_values has something else"),
        ("values", 3, "values is no dict"),
        ("exceptions", [3], "exceptions has something else"),
        ("facts", None, "facts is missing"),
    ],
)
def test_a_forged_index_is_refused(path: Path, place: str, value: object, message: str) -> None:
    index = members(path)
    *outer, last = place.split(".")
    inner: Any = index
    for key in outer:
        inner = inner[int(key) if isinstance(inner, list) else key]
    inner[int(last) if isinstance(inner, list) else last] = value
    rewrite(path, index)
    refused(path, message)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[]", "it is no JSON object"),
        (b"{}", "format is missing"),
        (b'{"format": NaN}', "NaN is no JSON"),
        (b'{"format": -Infinity}', "-Infinity is no JSON"),
        (b'{"format": 1e999}', "1e999 is no number"),
        (b'{"format": ' + b"9" * 5000 + b"}", "index.json is broken"),
        (b"[" * 200_000, "it is nested too deeply"),
        (b'{"format": 1', "index.json is broken"),
        (b"\xff\xfe", "index.json is broken"),
        (b"", "index.json is broken"),
    ],
    ids=["list", "empty", "nan", "infinity", "float", "integer", "deep", "cut", "encoding", "nothing"],
)
def test_text_that_is_no_index_is_refused(path: Path, body: bytes, message: str) -> None:
    rewrite(path, body)
    refused(path, message)


def test_an_index_of_absurd_size_is_not_read(path: Path) -> None:
    os.truncate(path / "index.json", 1 << 40)  # sparse: it takes no space
    refused(path, "no index is that large")


ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.sampled_from([HUGE, 2**63, 0.5, "", "F32", "S(0)", "R"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["shape", "dtype", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def places(value: object, place: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, item in inner for found in places(item, (*place, key)))]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared") / "step-00000040"
    write_checkpoint(path, TENSORS, SPECS, 2, values={"lr": 0.5}, aliases={"model/tied": "model/w"})
    return path


@settings(deadline=None, database=None, derandomize=True, max_examples=500)
@given(st.data())
def test_no_forgery_ends_in_a_traceback(shared: Path, data: st.DataObject) -> None:
    """Anything in place of any part of the index: refused in a line, or what it says of the tensors is still so."""
    right = (shared / "index.json").read_bytes()
    index = members(shared)
    *outer, last = data.draw(st.sampled_from(places(index)[1:]))
    inner: Any = index
    for key in outer:
        inner = inner[key]
    inner[last] = data.draw(ODD)
    rewrite(shared, index)
    try:
        with contextlib.suppress(CheckpointError):
            verify(shared)
            read(shared)
    finally:
        (shared / "index.json").write_bytes(right)


def test_a_part_beyond_its_file_is_refused(path: Path) -> None:
    index = members(path)
    index["parts"][1][1] += 8
    rewrite(path, index)
    refused(path, "is too short for model/b|contradict")


def forged_heads() -> dict[str, bytes]:
    right = header(Plan(SPECS, 2)[0], SPECS)
    entries = json.loads(right[8:])

    def head(change: object) -> bytes:
        text = change if isinstance(change, bytes) else json.dumps(change).encode()
        return len(text).to_bytes(8, "little") + text

    def changed(**members: object) -> bytes:
        return head(entries | {"model/w[0:3,0:4]": entries["model/w[0:3,0:4]"] | members})

    return {
        "huge": (2**60).to_bytes(8, "little") + right[8:],
        "past the end": (len(right) + 1000).to_bytes(8, "little") + right[8:],
        "no JSON": head(b"{"),
        "no text": head(b"\xff" * 16),
        "a list": head([]),
        "deep": head(b"[" * 200_000),
        "nothing": head({}),
        "overlap": changed(data_offsets=[0, 48]),
        "backwards": changed(data_offsets=[56, 8]),
        "negative": changed(shape=[-3, -4]),
        "NaN": head(json.dumps(entries).replace("F32", "NaN").encode()),
        "dtype": changed(dtype="I32"),
        "extra": head(entries | {"model/x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
        "missing": head({name: entry for name, entry in entries.items() if name != "model/w[0:3,0:4]"}),
    }


@pytest.mark.parametrize("kind", forged_heads())
def test_a_forged_safetensors_header_is_refused_and_never_followed(path: Path, kind: str) -> None:
    """With the size and the digests that it then has in the index."""
    head = forged_heads()[kind]
    data = (path / FILES[0]).read_bytes()[len(header(Plan(SPECS, 2)[0], SPECS)) :]
    (path / FILES[0]).unlink()
    file = write_file(path / FILES[0], head, memoryview(data))
    index = read_index(path)
    write_index(path, replace(index, files=[file, index.files[1]], parts=[(0, len(head)), index.parts[1]]))
    with pytest.raises(CheckpointError, match=r"broken safetensors header|contradict each other") as caught:
        verify(path)
    assert "\n" not in str(caught.value)
    read(path)


def test_data_that_no_tensor_owns_is_found(path: Path) -> None:
    whole = (path / FILES[0]).read_bytes()
    (path / FILES[0]).unlink()
    file = write_file(path / FILES[0], whole, memoryview(b"hidden"))
    index = read_index(path)
    write_index(path, replace(index, files=[file, index.files[1]]))
    with pytest.raises(CheckpointError, match="bytes of data, not"):
        verify(path)
