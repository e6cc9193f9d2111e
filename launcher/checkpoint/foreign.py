"""Weights that others wrote: safetensors files, directories of them as transformers makes them, torch state dicts.

They are read with distrust. Of safetensors the library checks that the header fits the file; of a torch file its zip
directory is looked at first, it is unpickled with `weights_only`, and what its tensors claim must fit the file. So
nothing in them can run code, and none makes us allocate more than it holds.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open

from launcher.checkpoint.index import Json
from launcher.checkpoint.layout import TensorSpec
from launcher.checkpoint.state import describe
from launcher.errors import CheckpointError, UsageError

__all__ = ["INDEX", "SINGLE", "TORCH", "SafetensorsFiles", "read_json", "read_torch"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""What transformers calls the file of a model, or the list of its files."""

TORCH = (".pt", ".pth", ".bin")

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}\.safetensors")
_LARGEST_JSON = 256 << 20  # bytes; the list of a million tensors has 100 MB


class SafetensorsFiles:
    """The tensors of a safetensors file, or of a directory of them, read from the disk when they are asked for.

    Raises:
        UsageError: there is nothing of the kind.
        CheckpointError: it is broken; or a tensor's dtype is one that a checkpoint cannot hold.
    """

    def __init__(self, path: Path) -> None:
        self._stack = ExitStack()
        self._files: dict[str, tuple[Path, Any]] = {}
        self.specs: dict[str, TensorSpec] = {}
        try:
            for file, names in _files(path).items():
                self._open(file, names)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> SafetensorsFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def read(self, name: str) -> torch.Tensor:
        """A tensor, mapped from its file.

        Raises:
            CheckpointError: it cannot be read.
        """
        path, file = self._files[name]
        with _told(path):
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def _open(self, path: Path, names: set[str] | None) -> None:
        """Open a file, of which `names` are wanted; None: all."""
        _check_file(path)
        with _told(path):
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            described = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in found.items()}
        if names is not None and (missing := names - described.keys()):
            raise CheckpointError(f"{path} has no {min(missing)}, which {INDEX} says is in it")
        for name in sorted(described if names is None else names):
            try:
                self.specs[name] = TensorSpec(*described[name])
            except ValueError as error:
                raise CheckpointError(f"{path}: {name}: {error}") from None
            self._files[name] = (path, file)


def read_torch(path: Path, key: str | None) -> dict[str, torch.Tensor]:
    """The state dict in a file that `torch.save` wrote, its tensors mapped from the file; `key`: where in it.

    Raises:
        CheckpointError: it is broken, or holds something else than tensors.
        UsageError: `key` is wrong, or needed.
    """
    _check_zip(path)
    with _told(path):
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if key is not None:
        if not isinstance(loaded, Mapping) or key not in loaded:
            raise UsageError(f"{path} has no {key}: {_keys(loaded)}")
        loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        kind = "nothing" if isinstance(loaded, Mapping) else f"a {_kind(loaded)}"
        raise CheckpointError(f"{path} holds {kind}, and no state dict")
    for name, value in loaded.items():
        if isinstance(value, Mapping) and key is None:
            raise UsageError(f"{path} is nested: say which part is the state dict with --key; {_keys(loaded)}")
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: {name!r} is a {_kind(value)}: a state dict holds tensors by name")
    tensors = {name: value.detach() for name, value in loaded.items()}
    _check_extent(path, tensors)
    return tensors


def read_json(path: Path) -> dict[str, Json]:
    """An object in a JSON file.

    Raises:
        CheckpointError: it is no such thing.
    """
    _check_file(path)
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, which is too large for what it is")
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is no JSON: it is broken, or something else") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no object: it is something else")
    return found


def _files(path: Path) -> dict[Path, set[str] | None]:
    """The files of a model, and which tensors are wanted of each (None: all)."""
    if not path.is_dir():
        return {path: None}
    if (path / SINGLE).exists():
        return {path / SINGLE: None}
    if not (path / INDEX).exists():
        raise UsageError(f"{path} has neither {SINGLE} nor {INDEX}: name the file itself")
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX} has no weight_map: it is broken")
    files: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
            raise CheckpointError(f"{path / INDEX}: {file!r} is no plain name of a safetensors file")
        of_file = files.setdefault(path / file, set())
        assert of_file is not None
        of_file.add(name)
    return files


def _check_file(path: Path) -> None:
    """A directory cannot be read, and a pipe would never end. Links are followed: the Hub's cache is made of them."""
    if not path.exists():
        raise CheckpointError(f"{path} is missing")
    if not path.is_file():
        raise CheckpointError(f"{path} is no ordinary file")


def _check_zip(path: Path) -> None:
    """torch's files are zip archives without compression: a small one can then not become a large one."""
    _check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_size != entry.file_size]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except Exception:  # zipfile raises BadZipFile, and much else for what is broken
        raise CheckpointError(
            f"{path} is no file that torch.save has written since torch 1.6, or is broken: save it anew"
        ) from None
    if packed:
        raise CheckpointError(f"{path}: {packed[0]} is compressed, which torch.save never does")


def _check_extent(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Tensors that are expanded, or overlap, could take more room than the file has."""
    sizes: dict[object, int] = {}
    for tensor in tensors.values():
        try:
            spec = describe(tensor)
        except ValueError:
            continue  # told by name when it is saved
        view = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.stride(), spec)
        sizes[view] = spec.nbytes
    total, held = sum(sizes.values()), path.stat().st_size
    if total > held:
        raise CheckpointError(f"{path}: its tensors take {total} bytes and the file has {held}: it is broken")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What is wrong with a foreign file, in a line: its library may raise anything for it."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        kind = _kind(error)
        first = str(error).strip().partition("\n")[0]
        reason = f"{first or kind}" if kind == "SafetensorError" else f"it is broken ({kind}: {first})"
        if kind == "UnpicklingError":  # torch's text goes on for a page
            reason = "weights_only refuses it: it holds more than tensors, which could run code, or is broken"
        raise CheckpointError(f"{path} cannot be read: {reason}") from None


def _keys(loaded: object) -> str:
    if not isinstance(loaded, Mapping):
        return f"it holds a {_kind(loaded)}"
    names = [str(name) for name in loaded]
    return f"its keys are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


def _kind(value: object) -> str:
    return type(value).__name__
