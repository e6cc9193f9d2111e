"""A checkpoint that is not what was written is refused in one line, and nothing has been changed by it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import same, sample, write_checkpoint, write_index

from launcher.checkpoint import State, TensorSpec, load, read_index, verify
from launcher.checkpoint.files import FileEntry, create_file, header, write_part
from launcher.checkpoint.layout import Plan
from launcher.errors import CheckpointError
from launcher.world import World
from tests.checkpoint_files import rewrite

SPECS = {
    "model/w": TensorSpec((6, 4), "F32", (4,), ("S(0)",)),
    "model/b": TensorSpec((5,), "BF16"),
    "model/n": TensorSpec((), "I64", rank0=True),
}
TENSORS = {
    "model/w": sample("w", (6, 4)),
    "model/b": sample("b", (5,), torch.bfloat16),
    "model/n": sample("n", (), torch.int64),
}
FILES = ("node-00000-of-00002.safetensors", "node-00001-of-00002.safetensors")  # of two ranks each


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "step-00000040"
    write_checkpoint(path, TENSORS, SPECS, 4, values={"lr": 0.5}, aliases={"model/tied": "model/w"})
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
    refused(path, "step-00000040/node-0000")


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
        ("format", 3, "its format is 3, newer than this launcher's 2: update the launcher"),
        ("format", 1, "its format is 1, older than this launcher's 2: use the one that wrote it"),
        ("plan", 2, "its plan is 2, newer"),
        ("format", "1", "format is no int"),
        ("format", True, "format is no int"),
        ("format", 0, "format cannot be 0"),
        ("step", -1, "step cannot be -1"),
        ("step", 40.0, "step is no int"),
        ("step", None, "step is missing"),
        ("world_size", HUGE, "world_size cannot be"),
        ("world_size", 5, "model/w is on mesh"),
        ("tensors", [], "tensors is no dict"),
        ("tensors.model/w", 3, "model/w: is not described"),
        ("tensors.model/w.shape", [6, -4], "model/w: shape .* is impossible"),
        ("tensors.model/w.shape", [HUGE, 4], "model/w: shape .* is impossible"),
        ("tensors.model/w.shape", [6, 4.0], "model/w: shape has something else"),
        ("tensors.model/w.shape", [2**40, 2**20], "bytes more than its tensors take"),
        ("tensors.model/w.dtype", "F31", "model/w: dtype 'F31' is unknown"),
        ("tensors.model/w.dtype", [], "model/w: dtype is no str"),
        ("tensors.model/w.placements", ["S(7)"], "model/w: placements .* do not fit"),
        ("tensors.model/w.shape", [2, 12], "is 2x12 there and 6x4 here|bytes, not|contradict"),
        ("tensors.model/w.placements", ["_S(0,999999)"], "model/w: placements .* do not fit"),
        ("tensors.model/w.placements", [], "model/w: placements .* do not fit"),
        ("tensors.model/w.mesh", [2, 2], "model/w: placements .* do not fit"),
        ("tensors.model/w.mesh", [HUGE], "model/w is on mesh"),
        ("tensors.model/w.mesh", [1] * 60_000, "model/w: a mesh has 16 dimensions at most, not 60000"),
        ("tensors.model/w.shape", [0, HUGE], "model/w: shape .* is impossible"),
        ("tensors.model/n.rank0", 1, "model/n: rank0 is no bool"),
        ("tensors.model/extra", {"dtype": "F32", "shape": [0]}, "model/extra|contradict"),
        ("tensors.model/extra", {"dtype": "F32", "shape": [2**40]}, "bytes more than its tensors take"),
        ("aliases.model/tied", "model/x", "model/tied cannot be tied to 'model/x'"),
        ("aliases.model/tied", {}, "model/tied cannot be tied"),
        ("aliases.model/w", "model/b", "model/w cannot be tied"),
        ("files.1.name", "../step-00000040/node-00001-of-00002.safetensors", "is no file name of a checkpoint"),
        ("files.1.name", "/etc/passwd", "is no file name of a checkpoint"),
        ("files.1.name", "..safetensors", "is no file name of a checkpoint"),
        ("files.1.name", "a\0.safetensors", "is no file name of a checkpoint"),
        ("files.1.name", "a" * 300 + ".safetensors", "is no file name of a checkpoint"),
        ("files.1.name", FILES[0], "two of its files have one name"),
        ("files.1.size", HUGE, "size cannot be"),
        ("files.1.size", -1, "size cannot be -1"),
        ("files.1.size", 2**50, "end at byte"),
        ("files.1.size", 100, "end at byte"),
        ("files.1.header.size", 2**50, "do not have"),
        ("files.1.header.digests", "", "do not have 0 blocks"),
        ("files.1.header", None, "header is missing"),
        ("parts.1.digests", "", "do not have 0 blocks"),
        ("parts.1.digests", "*" * 24, "index.json is broken"),
        ("parts.1.digests", "A" * 22 + "==", "fail their digest"),
        ("files", [], "in file 0 of 0"),
        ("parts.1.offset", 2**62, "begins at byte"),
        ("parts.1.offset", -1, "offset cannot be -1"),
        ("parts.1.file", 2, "in file 2 of 2"),
        ("parts.1.file", -1, "file cannot be -1"),
        ("parts.1.file", True, "file is no int"),
        ("parts.1", [1], "parts has something else"),
        ("rank_values", [{}], "4 parts and 1 rank_values"),
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
    write_checkpoint(path, TENSORS, SPECS, 4, values={"lr": 0.5}, aliases={"model/tied": "model/w"})
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


@pytest.mark.parametrize(("rank", "member"), [(0, "size"), (1, "offset"), (2, "size")])
def test_parts_that_overlap_or_leave_a_gap_are_refused(path: Path, rank: int, member: str) -> None:
    right = members(path)
    for change in (8, -8):
        index = deepcopy(right)
        index["parts"][rank][member] += change
        rewrite(path, index)
        refused(path, "begins at byte|end at byte|do not have")


def right_head() -> bytes:
    plan = Plan(SPECS, 4)
    return header([plan[0], plan[1]], SPECS)


def forged_heads() -> dict[str, bytes]:
    right = right_head()
    entries = json.loads(right[8:])

    def head(change: object) -> bytes:
        text = change if isinstance(change, bytes) else json.dumps(change).encode()
        return len(text).to_bytes(8, "little") + text

    def changed(**members: object) -> bytes:
        return head(entries | {"model/w[0:2,0:4]": entries["model/w[0:2,0:4]"] | members})

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
        "padding": head(entries | {"__padding__[99]": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
        "missing": head({name: entry for name, entry in entries.items() if name != "model/w[0:2,0:4]"}),
    }


@pytest.mark.parametrize("kind", forged_heads())
def test_a_forged_safetensors_header_is_refused_and_never_followed(path: Path, kind: str) -> None:
    """With the sizes and the digests that it then has in the index."""
    replace_head(path, forged_heads()[kind])
    with pytest.raises(CheckpointError, match=r"broken safetensors header|contradict each other") as caught:
        verify(path)
    assert "\n" not in str(caught.value)
    read(path)


def replace_head(path: Path, head: bytes) -> None:
    """Put another header before the parts of the first file."""
    data = (path / FILES[0]).read_bytes()[len(right_head()) :]
    (path / FILES[0]).unlink()
    segment = create_file(path / FILES[0], head, len(head))
    with open(path / FILES[0], "ab") as file:
        file.write(data)
    index = read_index(path)
    moved = len(head) - len(right_head())
    parts = [(f, replace(part, offset=part.offset + moved * (f == 0))) for f, part in index.parts]
    files = [FileEntry(FILES[0], len(head) + len(data), segment), index.files[1]]
    write_index(path, replace(index, files=files, parts=parts))


def test_data_that_no_tensor_owns_is_found(path: Path) -> None:
    with open(path / FILES[1], "ab") as file:
        file.write(b"hidden")
    index = read_index(path)
    (f, last), name = index.parts[-1], FILES[1]
    part = write_part(path / name, last.offset, memoryview((path / name).read_bytes()[last.offset :]), last.size + 6)
    grown = replace(index.files[1], size=index.files[1].size + 6)
    write_index(path, replace(index, files=[index.files[0], grown], parts=[*index.parts[:-1], (f, part)]))
    with pytest.raises(CheckpointError, match="contradict each other about '__padding__"):
        verify(path)
