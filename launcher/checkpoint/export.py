"""A model's weights as plain safetensors files, named and listed as transformers expects them.

    model.safetensors                                             what fits one file
    model-00001-of-00003.safetensors, model.safetensors.index.json    what does not

Tensors go from file to file a few at a time, whatever their number. Files are written under names that nobody reads,
and get their own once all are whole, the list last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from launcher.checkpoint.files import ALIGNMENT, METADATA, fsync_directory
from launcher.checkpoint.foreign import INDEX, SINGLE, SafetensorsFiles, read_json
from launcher.checkpoint.index import Index, read_index
from launcher.checkpoint.layout import TensorSpec
from launcher.checkpoint.reading import read_tensors
from launcher.checkpoint.state import DTYPES
from launcher.errors import CheckpointError, UsageError

__all__ = ["DTYPE_OPTIONS", "Exported", "export"]

DTYPE_OPTIONS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
CONFIG = "config.json"

_CAST = ("F64", "F32", "BF16", "F16")  # what --dtype changes; 8-bit floats mean nothing without their scales
_COMPANIONS = (
    *(CONFIG, "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*"),
    *("merges.txt", "*.model", "chat_template*", "preprocessor_config.json", "processor_config.json"),
)
"""What stands beside the weights in a directory that transformers loads."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    files: list[str]
    """Of tensors; without the list of them."""
    tensors: int
    nbytes: int
    """Of the tensors."""
    from_base: int
    """Tensors that came from the base."""
    copied: list[str]
    """Other files that came from the base."""
    dtypes: list[str]
    """Of floating-point tensors: with several, from_pretrained casts to what the configuration says."""
    frozen: bool
    """Whether the model has frozen parameters, which no checkpoint holds."""


@dataclass(frozen=True)
class _Tensor:
    """One tensor to be written."""

    name: str
    """In the new file."""
    held: str | None
    """In the checkpoint; None: it is the base's."""
    spec: TensorSpec


def export(
    path: Path,
    output: Path,
    *,
    name: str = "model",
    shard_size: int = 5_000_000_000,
    dtype: str | None = None,
    base: Path | None = None,
    copy_ties: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Write the model `name` of the checkpoint in directory `path` to the directory `output`.

    Args:
        path: the checkpoint.
        output: made if it is missing; what is in it stays, and no weights may be.
        name: what `run.build` called the model.
        shard_size: bytes after which another file is begun; a larger tensor has one of its own.
        dtype: safetensors' name of a dtype to cast floating-point tensors to.
        base: safetensors, or a directory of them, with what the checkpoint lacks (frozen parameters); of a directory
            the configuration and the tokenizer are copied too.
        copy_ties: write tied tensors under each of their names; else under the one that holds the data, as
            transformers does.
        progress: called with the bytes written, of all.

    Raises:
        UsageError: the output holds weights already, or there is no such model or base.
        CheckpointError: a file is damaged or broken; or a value does not fit the dtype.
        OSError: it cannot be written. Nothing half-written is left.
    """
    index = read_index(path)
    chosen = _chosen(path, index, name, copy_ties)
    _check_output(output)
    with ExitStack() as stack:
        files = stack.enter_context(SafetensorsFiles(base)) if base is not None else None
        lacking = _lacking(path, index, name, chosen, files)
        tensors = [_cast(tensor, dtype) for tensor in sorted([*chosen, *lacking], key=lambda tensor: tensor.name)]
        _check_names(tensor.name for tensor in tensors)
        shards = _shards(tensors, shard_size)
        job = _Job(path, index, files, sum(tensor.spec.nbytes for tensor in tensors), progress)
        copied = _companions(base, output, tensors)
        _write_all(output, job, shards, copied)
    frozen = index.values.get("frozen")
    return Exported(
        [*shards],
        len(tensors),
        job.total,
        len(lacking),
        [*copied],
        _float_dtypes(tensors),
        isinstance(frozen, dict) and bool(frozen.get(name)),
    )


def _chosen(path: Path, index: Index, name: str, copy_ties: bool) -> list[_Tensor]:
    """The model's tensors in the checkpoint.

    Raises:
        UsageError: there are none.
    """
    prefix = f"{name}/"
    names = [*index.tensors, *index.aliases] if copy_ties else [*index.tensors]
    found = [full for full in names if full.startswith(prefix)]
    if not found:
        there = sorted({full.partition("/")[0] for full in index.tensors} - {"track"})
        there = [one for one in there if not one.startswith("optimizer")]
        raise UsageError(f"{path} has no model {name}: --name takes one of {', '.join(there) or 'none'}")
    plain = [(full, index.tensors[index.holder(full)]) for full in found]
    return [_Tensor(full.removeprefix(prefix), full, TensorSpec(spec.shape, spec.dtype)) for full, spec in plain]


def _lacking(
    path: Path, index: Index, name: str, chosen: Sequence[_Tensor], base: SafetensorsFiles | None
) -> list[_Tensor]:
    """What the base has and the checkpoint has not.

    Raises:
        CheckpointError: they are of different models.
    """
    if base is None:
        return []
    tied = {full.removeprefix(f"{name}/") for full in index.aliases}
    ours = {tensor.name: tensor.spec for tensor in chosen}
    common = base.specs.keys() & (ours.keys() | tied)
    if not common:
        raise CheckpointError(f"{path} and the base have no tensor's name in common: the base is another model's")
    for key in sorted(common & ours.keys()):
        if base.specs[key].shape != ours[key].shape:
            raise CheckpointError(
                f"{key} is {list(ours[key].shape)} in {path} and {list(base.specs[key].shape)} in the base: the base "
                "is another model's"
            )
    return [_Tensor(key, None, spec) for key, spec in base.specs.items() if key not in common]


def _check_names(names: Iterable[str]) -> None:
    """Other readers take names for what they are: text."""
    for name in names:
        if name in ("", METADATA) or not name.isprintable():
            raise CheckpointError(f"a safetensors file cannot hold a tensor called {name!r}")


def _cast(tensor: _Tensor, dtype: str | None) -> _Tensor:
    if dtype is None or tensor.spec.dtype not in _CAST:
        return tensor
    return _Tensor(tensor.name, tensor.held, TensorSpec(tensor.spec.shape, dtype))


def _shards(tensors: Sequence[_Tensor], most: int) -> dict[str, list[_Tensor]]:
    """File names, and what goes into each: neighbours by name, larger elements first, so that none is misaligned."""
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.spec.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.spec.nbytes
    names = [f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
    ordered = [sorted(shard, key=lambda tensor: (-tensor.spec.itemsize, tensor.name)) for shard in shards]
    return dict(zip(names if len(shards) > 1 else [SINGLE], ordered, strict=True))


class _Job:
    """Where tensors come from, and how far the writing is."""

    def __init__(
        self, path: Path, index: Index, base: SafetensorsFiles | None, total: int, progress: Callable[[int, int], None]
    ) -> None:
        self.total = total
        self._path, self._index, self._base = path, index, base
        self._progress, self._done = progress, 0

    def read(self, tensors: Sequence[_Tensor]) -> Iterator[tuple[_Tensor, torch.Tensor]]:
        """The tensors in their new dtype, in that order."""
        ours = read_tensors(self._path, self._index, [tensor.held for tensor in tensors if tensor.held is not None])
        for tensor in tensors:
            if tensor.held is not None:
                value = next(ours)[1]
            else:
                assert self._base is not None
                value = self._base.read(tensor.name)
            yield tensor, _converted(tensor, value)
            self._done += tensor.spec.nbytes
            self._progress(self._done, self.total)


def _converted(tensor: _Tensor, value: torch.Tensor) -> torch.Tensor:
    dtype = DTYPES[tensor.spec.dtype]
    if value.dtype == dtype:
        return value
    cast = value.to(dtype)
    if not cast.isfinite().equal(value.isfinite()):
        raise CheckpointError(
            f"{tensor.name} has values up to {value[value.isfinite()].abs().max().item():.3g}, too large for "
            f"{tensor.spec.dtype}: export it as another --dtype"
        )
    return cast


def _check_output(output: Path) -> None:
    """Weights that are there are not written over, nor mixed with others."""
    if os.path.lexists(output) and not output.is_dir():
        raise UsageError(f"{output} is no directory")
    if output.is_dir():
        there = [name for name in os.listdir(output) if fnmatchcase(name, "model*.safetensors") or name == INDEX]
        if there:
            raise UsageError(f"{output} holds {min(there)} already: name another directory, or remove it first")


def _companions(base: Path | None, output: Path, tensors: Sequence[_Tensor]) -> dict[str, Path | bytes]:
    """The files beside the base's weights, by name, that the output has not; the configuration names the new dtype."""
    if base is None or not base.is_dir():
        return {}
    found: dict[str, Path | bytes] = {}
    for file in sorted(base.iterdir()):
        wanted = any(fnmatchcase(file.name, pattern) for pattern in _COMPANIONS) and file.suffix != ".safetensors"
        if wanted and file.is_file() and not os.path.lexists(output / file.name):
            found[file.name] = file
    dtypes = _float_dtypes(tensors)
    if CONFIG in found and len(dtypes) == 1:  # from_pretrained casts to what the configuration says
        config = read_json(base / CONFIG)
        said = str(DTYPES[dtypes[0]]).removeprefix("torch.")
        config |= {"torch_dtype" if "torch_dtype" in config else "dtype": said}
        found[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    return found


def _float_dtypes(tensors: Sequence[_Tensor]) -> list[str]:
    return sorted({tensor.spec.dtype for tensor in tensors if tensor.spec.dtype in _CAST})


def _write_all(
    output: Path, job: _Job, shards: Mapping[str, Sequence[_Tensor]], companions: Mapping[str, Path | bytes]
) -> None:
    """Write every file under a name that nobody reads, then give all of them their own."""
    made = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    written: list[tuple[Path, Path]] = []

    def partial(name: str) -> Path:
        written.append((output / f".{name}.partial", output / name))
        return written[-1][0]

    try:
        for name, tensors in shards.items():
            _write_shard(partial(name), tensors, job)
        for name, source in companions.items():
            _write(partial(name), [source if isinstance(source, bytes) else source.read_bytes()])
        if len(shards) > 1:
            _write(partial(INDEX), [_list(shards, job.total)])
        for unfinished, final in written:
            unfinished.rename(final)
        fsync_directory(output)
    except BaseException:
        for unfinished, _ in written:
            with suppress(OSError):
                unfinished.unlink()
        if made:
            with suppress(OSError):
                output.rmdir()
        raise


def _write_shard(path: Path, tensors: Sequence[_Tensor], job: _Job) -> None:
    """Write a safetensors file, tensor by tensor."""
    described: dict[str, Any] = {METADATA: {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.spec.nbytes
        described[tensor.name] = {
            "dtype": tensor.spec.dtype,
            "shape": list(tensor.spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)

    def parts() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for _, value in job.read(tensors):
            yield value.contiguous().flatten().view(torch.uint8).numpy().data

    _write(path, parts())


def _list(shards: Mapping[str, Sequence[_Tensor]], total: int) -> bytes:
    weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    listed = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(listed, indent=2) + "\n").encode()


def _write(path: Path, parts: Sequence[bytes] | Iterator[bytes | memoryview]) -> None:
    """Write a file and fsync it; one that a killed export has left is written over, a link is not followed."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with open(fd, "wb", buffering=0) as file:
        for part in parts:
            left = memoryview(part)
            try:
                while len(left):
                    left = left[file.write(left) :]
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from None
        os.fsync(fd)
