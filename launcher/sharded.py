"""DTensors, told by what they have: importing torch's takes a second, which an unsharded run need not pay."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["is_sharded", "local", "whole"]


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this is a DTensor, of which each rank holds a part."""
    return hasattr(tensor, "placements")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    shard: Any = tensor
    return shard.to_local() if is_sharded(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor; of a DTensor gathered, on every rank."""
    shard: Any = tensor
    return shard.full_tensor() if is_sharded(tensor) else tensor
