"""Digests of whatever a batch, a module's output or a state is made of: equal bits, equal digests."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
import xxhash

__all__ = ["digest"]


def digest(value: Any) -> str:
    """A digest of whatever a batch is made of: tensors and arrays by their bits, containers by what is in them."""
    state = xxhash.xxh3_64()
    for piece in _pieces(value):
        state.update(piece)
    return state.hexdigest()


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        tensor = (value.detach().to_dense() if value.layout != torch.strided else value.detach()).to("cpu").contiguous()
        yield f"{tuple(tensor.shape)} {tensor.dtype}".encode()
        yield tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield f"{value.shape} {value.dtype}".encode()
        yield value.tobytes()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _pieces(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield type(value).__name__.encode()
        yield from _pieces({field.name: getattr(value, field.name) for field in fields(value)})
    elif isinstance(value, list | tuple | deque):
        yield f"{len(value)}".encode()
        for item in value:
            yield from _pieces(item)
    elif isinstance(value, str | bytes | int | float | bool | np.generic | None):
        yield repr(value).encode()
    else:
        yield type(value).__name__.encode()  # its repr may be an address
