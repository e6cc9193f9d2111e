"""A checkpoint made of weights that others wrote."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import torch

from launcher.checkpoint.files import fsync_directory
from launcher.checkpoint.foreign import TORCH, SafetensorsFiles, read_torch
from launcher.checkpoint.index import Index, read_index
from launcher.checkpoint.saving import save
from launcher.checkpoint.state import State
from launcher.checkpoint.store import Store
from launcher.errors import CheckpointError, UsageError
from launcher.world import World

__all__ = ["import_weights"]


def import_weights(
    source: Path, output: Path, *, name: str = "model", key: str | None = None, ties: Mapping[str, str] | None = None
) -> Index:
    """Make the directory `output` a checkpoint, of step 0, that holds the weights of `source` as the model `name`.

    Args:
        source: a safetensors file, a directory as transformers makes it, or a state dict that `torch.save` wrote.
        output: a directory that is not there yet, or is empty.
        name: what `run.build` calls the model.
        key: where in a nested torch file the state dict is.
        ties: tied name -> the name that holds its data: files of transformers leave tied weights out.

    Raises:
        UsageError: the source is no such thing, or the output is in use.
        CheckpointError: the source is broken, or holds what a checkpoint cannot.
    """
    if not name or "/" in name:
        raise UsageError(f"--name {name}: what run.build calls the model, a word without a slash")
    if not source.exists():
        raise UsageError(f"{source}: there is no such file or directory")
    if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} is there already: name a directory that is not")
    with ExitStack() as stack:
        tensors = _read(source, key, stack)
        aliases = {f"{name}/{tied}": f"{name}/{holder}" for tied, holder in (ties or {}).items()}
        for tied, holder in (ties or {}).items():
            if holder not in tensors or tied in tensors:
                missing = f"has no {holder}" if holder not in tensors else f"has data of its own for {tied}"
                raise UsageError(f"--tie {tied}={holder}: {source} {missing}")
        state = State({f"{name}/{tensor}": value for tensor, value in tensors.items()}, aliases=aliases)
        return _save(state, output, {"imported_from": source.name, "time": datetime.now(UTC).isoformat("T", "seconds")})


def _read(source: Path, key: str | None, stack: ExitStack) -> dict[str, torch.Tensor]:
    """The tensors of a foreign file, mapped from it; safetensors stay open until `stack` is closed."""
    if source.suffix in TORCH and not source.is_dir():
        return read_torch(source, key)
    if key is not None:
        raise UsageError(f"--key {key}: only a torch file ({', '.join(TORCH)}) is nested, and {source} is none")
    if source.suffix != ".safetensors" and not source.is_dir():
        raise UsageError(f"{source}: give a .safetensors file, a directory of them, or {', '.join(TORCH)}")
    files = stack.enter_context(SafetensorsFiles(source))
    if not files.specs:
        raise CheckpointError(f"{source} holds no tensors")
    return {name: files.read(name) for name in files.specs}


def _save(state: State, output: Path, facts: Mapping[str, str]) -> Index:
    """Write the checkpoint beside its place, and move it there once it is whole."""
    output = output.absolute()
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        path = save(Store(partial), World(), 0, state, attempt=0, facts=facts)
        path.rename(output)  # an empty directory gives way
        fsync_directory(output.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return read_index(output)
