"""Rows of a `datasets.Dataset`, read straight from the memory that its Arrow table is mapped to.

What `dataset.with_format("torch")[samples]` gives, value for value, dtype for dtype, without what it does on the way:
a table of the rows, a Python list of arrays, and two more copies of it all. A row goes from the page cache into the
batch, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from launcher.order import Ints

__all__ = ["Rows"]

Array = npt.NDArray[Any]


class Rows:
    """The rows of a dataset by number. Pickled or forked, it maps the same files and copies no row."""

    def __init__(self, data: Any) -> None:
        """`data` is a `datasets.Dataset` in the format torch, or in none.

        Raises:
            TypeError: a column is no number, bool or list of one size of them, or holds nulls, or the format asks for
                more: only `datasets` itself can read it.
        """
        self._table = data if data.format["type"] else data.with_format("torch")
        form = self._table.format
        if form["type"] != "torch" or form["format_kwargs"] or form["output_all_columns"]:
            raise TypeError(f"the format {form['type']}, or what it is told")
        shown, indices = set(form["columns"]), self._table._indices
        table: pa.Table = self._table.data.table
        self._columns = {name: _Column(table[name]) for name in table.column_names if name in shown}
        self._indices = None if indices is None else _Column(indices.table[0], indices=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return Rows, (self._table,)

    def __call__(self, samples: Ints, *, pinned: bool = False) -> dict[str, Any]:
        """A tensor a column, of shape [samples, ...], in page-locked memory if `pinned`; `samples` count from 0."""
        if not len(samples):
            return self._table[[]]  # type: ignore[no-any-return]  # its idea of the dtypes of nothing
        if self._indices is not None:
            samples = self._indices.read(samples, pinned=False).numpy()
        return {name: column.read(samples, pinned=pinned) for name, column in self._columns.items()}


class _Column:
    """A column as views of its chunks, each [rows, ...] in the type that is stored."""

    def __init__(self, column: pa.ChunkedArray, *, indices: bool = False) -> None:
        """`indices` are unsigned 64-bit numbers, but rows of a dataset: they fit.

        Raises:
            TypeError: it holds something else than numbers, or nulls.
        """
        kind = column.type
        self._shape: tuple[int, ...] = ()
        while pa.types.is_fixed_size_list(kind):
            kind, self._shape = kind.value_type, (*self._shape, kind.list_size)
        self._dtype = torch.int64 if indices else _dtype(kind)
        if 0 in self._shape:
            raise TypeError("lists of nothing")
        view = _bits if pa.types.is_boolean(kind) else _view
        self._chunks: Sequence[Any] = [view(chunk, self._shape) for chunk in column.chunks if len(chunk)]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])[:-1]
        self._width = int(np.prod(self._shape, dtype=np.int64))
        if len(self._chunks) > 1 and view is _view:
            self._rows, offsets = _spanned(self._chunks, self._width)
            self._bases = offsets - self._starts * self._width

    def read(self, samples: Ints, *, pinned: bool) -> torch.Tensor:
        """The rows `samples`, at least one."""
        rows = torch.empty((len(samples), *self._shape), dtype=self._dtype, pin_memory=pinned)
        if self._dtype == torch.float32:
            with np.errstate(over="ignore"):  # a double beyond single precision is infinite, and nobody is told
                self._copy(samples, rows.numpy())
        else:
            self._copy(samples, rows.numpy())
        return rows

    def _copy(self, samples: Ints, out: Array) -> None:
        if len(self._chunks) == 1:
            out[...] = self._chunks[0].take(samples, axis=0)
            return
        chunks = self._starts[1:].searchsorted(samples, "right")
        if isinstance(self._chunks[0], np.ndarray):
            out.reshape(len(out), self._width)[...] = self._rows[self._bases.take(chunks) + samples * self._width]
            return
        places = samples - self._starts[chunks]
        for k, (chunk, place) in enumerate(zip(chunks.tolist(), places.tolist(), strict=True)):
            out[k] = self._chunks[chunk][place]


def _spanned(chunks: Sequence[Array], width: int) -> tuple[Array, Ints]:
    """All chunks as one array, to be indexed in one call: row i is the `width` numbers from number i on.

    It begins where the first in memory begins, and its row offsets[k] is the first of chunk k. What lies between two
    chunks belongs to somebody else, or to nobody: no row that is asked for touches it.
    """
    item = chunks[0].itemsize
    addresses = np.array([chunk.__array_interface__["data"][0] for chunk in chunks])
    first = int(addresses.argmin())
    offsets, rest = np.divmod(addresses - addresses[first], item)
    if rest.any():
        raise TypeError("numbers that lie askew")
    end = max(int(offset) + chunk.size for offset, chunk in zip(offsets, chunks, strict=True))
    rows = end - width + 1  # chunks may overlap: a table can hold the same rows twice
    view = np.lib.stride_tricks.as_strided(chunks[first], (rows, width), (item, item), writeable=False)
    return view, offsets


class _Bits:
    """Rows of bools, of which Arrow keeps eight in a byte."""

    def __init__(self, packed: npt.NDArray[np.uint8], first: int, rows: int, shape: tuple[int, ...]) -> None:
        self._packed, self._first, self._rows, self._shape = packed, first, rows, shape
        self._row = np.arange(np.prod(shape, dtype=np.int64)).reshape(shape)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> Array:
        return self._read(self._first + row * self._row.size + self._row)

    def take(self, rows: Ints, axis: int) -> Array:
        """Rows, as numpy's take along axis 0."""
        starts = (self._first + rows * self._row.size).reshape(-1, *(1 for _ in self._shape))
        return self._read(starts + self._row)

    def _read(self, places: Array) -> Array:
        found: Array = (self._packed[places >> 3] >> (places & 7).astype(np.uint8)) & 1
        return found


def _dtype(kind: pa.DataType) -> torch.dtype:
    """What `datasets` makes of a stored type."""
    if pa.types.is_boolean(kind):
        return torch.bool
    if pa.types.is_floating(kind):
        return torch.float32
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return torch.int64
    raise TypeError(str(kind))


def _values(chunk: pa.Array, shape: tuple[int, ...]) -> pa.Array:
    """All numbers of a chunk of lists in lists, in a row."""
    for _ in shape:
        _whole(chunk)
        chunk = chunk.flatten()
    return _whole(chunk)


def _whole(chunk: pa.Array) -> pa.Array:
    if chunk.null_count:
        raise TypeError("nulls")
    return chunk


def _view(chunk: pa.Array, shape: tuple[int, ...]) -> Array:
    view: Array = _values(chunk, shape).to_numpy(zero_copy_only=True).reshape(-1, *shape)
    return view


def _bits(chunk: pa.Array, shape: tuple[int, ...]) -> _Bits:
    values = _values(chunk, shape)
    return _Bits(np.frombuffer(values.buffers()[1], np.uint8), values.offset, len(chunk), shape)
