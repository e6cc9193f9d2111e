"""launcher/arrow.py: what `datasets` gives in torch format, whatever the table looks like; else `datasets` itself."""

import itertools
import pickle
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.arrow import Rows
from tests.test_data import read

KINDS = [pa.bool_(), pa.int8(), pa.uint16(), pa.int32(), pa.uint32(), pa.int64(), pa.float16(), pa.float32()]
SHAPES = [(), (), (1,), (5,), (2, 3)]


def values(kind, shape, length, draws):
    """A column of any numbers of a kind, as lists of lists of a shape."""
    size = length * int(np.prod(shape, dtype=int))
    dtype = np.dtype(kind.to_pandas_dtype())
    if kind == pa.bool_():
        numbers = draws.integers(0, 2, size).astype(bool)
    elif dtype.kind == "f":
        with np.errstate(all="ignore"):  # infinite ones too
            numbers = (draws.normal(size=size) * 10.0 ** draws.integers(-50, 50, size)).astype(dtype)
    else:
        numbers = draws.integers(0, 256, size * dtype.itemsize, dtype=np.uint8).view(dtype)
    column = pa.array(numbers, kind)
    for width in reversed(shape):
        column = pa.FixedSizeListArray.from_arrays(column, width)
    return column


@st.composite
def tables(draw):
    """Columns of several kinds and shapes, each in chunks that begin anywhere, rows perhaps selected."""
    length = draw(st.integers(1, 30))
    draws = np.random.default_rng(draw(st.integers(0, 2**32)))
    columns = {}
    for number in range(draw(st.integers(1, 3))):
        kind, shape = draw(st.sampled_from([*KINDS, pa.float64()])), draw(st.sampled_from(SHAPES))
        whole = values(kind, shape, length + 3, draws).slice(3)
        cuts = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=3))})
        chunks = [whole.slice(a, b - a) for a, b in itertools.pairwise(cuts)]
        columns[f"column {number}"] = pa.chunked_array([*chunks, whole.slice(0, 0)], whole.type)
    table = datasets.Dataset(datasets.table.InMemoryTable(pa.table(columns)))
    change = draw(st.sampled_from(["none", "shuffled", "selected", "sliced", "twice", "a column"]))
    if change == "shuffled":
        table = table.shuffle(seed=draw(st.integers(0, 99)))
    elif change == "selected":
        table = table.select(draw(st.lists(st.integers(0, length - 1), min_size=1)))
    elif change == "sliced":
        table = table.select(range(length // 2, length))
    elif change == "twice":
        table = datasets.concatenate_datasets([table.shuffle(seed=0), table])
    elif change == "a column":
        table = table.with_format("torch", columns=["column 0"])
    return table


@given(table=tables(), data=st.data())
@settings(max_examples=80, deadline=None)
def test_rows_are_those_of_torch_format(table, data):
    samples = data.draw(st.lists(st.integers(0, len(table) - 1)))
    expected = (table if table.format["type"] else table.with_format("torch"))[samples]
    for rows in (Rows(table), pickle.loads(pickle.dumps(Rows(table)))):
        found = rows(np.array(samples, np.int64))
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            assert type(found[name]) is type(tensor)
            if isinstance(tensor, torch.Tensor):
                torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", "b"]),
        pa.array([[1], [2, 3]]),
        pa.array([1, None]),
        pa.array([[1, 2], None], pa.list_(pa.int64(), 2)),
        pa.array([[1, None], [2, 3]], pa.list_(pa.int64(), 2)),
        pa.array([[], []], pa.list_(pa.int64(), 0)),
        pa.array([1, 2], pa.uint64()),
        pa.array([1, 2], pa.timestamp("s")),
        pa.array([{"a": 1}, {"a": 2}]),
    ],
    ids=lambda column: str(column.type),
)
def test_what_is_no_plain_number_is_left_to_datasets(column):
    table = datasets.Dataset(datasets.table.InMemoryTable(pa.table({"x": column, "y": pa.array([1, 2])})))
    with pytest.raises(TypeError):
        Rows(table)
    if column.type != pa.timestamp("s"):  # which torch's collate knows not
        [batch] = read(table, steps=1, batch_size=2, shuffle=False)
        assert str(batch) == str(table.with_format("torch")[[0, 1]])


def test_other_formats_are_left_to_datasets():
    table = datasets.Dataset.from_dict({"x": [1, 2], "y": [3, 4]})
    asked = [
        table.with_format("numpy"),
        table.with_format("torch", dtype=torch.int32),
        table.with_format("torch", columns=["x"], output_all_columns=True),
        table.with_transform(lambda rows: rows),
    ]
    for one in asked:
        with pytest.raises(TypeError):
            Rows(one)
        [batch] = read(one, steps=1, batch_size=2, shuffle=False)
        assert str(batch) == str(one[[0, 1]])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mapped_file_is_read_where_it_lies(tmp_path: Path, workers: int):
    numbers = np.arange(40_000, dtype=np.uint16).reshape(-1, 8)
    column = pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), 8)
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as file:
        whole = pa.table({"tokens": column})
        with pa.ipc.new_stream(file, whole.schema) as writer:
            writer.write_table(whole, max_chunksize=999)
    table = datasets.Dataset.from_file(str(tmp_path / "rows.arrow"))
    assert len(pickle.dumps(Rows(table))) < 5_000, "of 80,000 bytes of rows: they are mapped anew, not copied"
    batches = read(table, batch_size=1000, microbatch_size=500, workers=workers)
    seen = torch.cat([batch["tokens"] for batch in batches])
    assert seen.dtype == torch.int64
    assert torch.equal(seen[seen[:, 0].argsort()], torch.from_numpy(numbers.astype(np.int64)))
    again = read(table.select(range(5000)), batch_size=1000, microbatch_size=500)
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(batches, again, strict=True))


@pytest.mark.parametrize("again_first", [False, True])
def test_rows_that_a_table_holds_twice(again_first: bool):
    """Upsampling: the chunks of the second part lie within those of the first."""
    data = datasets.Dataset.from_dict({"y": [float(number) for number in range(40)]})
    again = data.select(range(0 if again_first else 10, 15))
    table = datasets.concatenate_datasets([again, data] if again_first else [data, again])
    samples = np.arange(len(table))
    assert torch.equal(Rows(table)(samples)["y"], table.with_format("torch")[:]["y"])
