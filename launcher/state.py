"""A run's state as names and tensors: what a checkpoint holds, and how a new process takes it over.

Names are the plain module's: `model/blocks.0.weight`, `optimizer/exp_avg/model/blocks.0.weight`, `track/ema/weight`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import xxhash
from torch import nn

from launcher.checkpoint import Index, State
from launcher.checkpoint.state import SUBCLASSES
from launcher.errors import CheckpointError, RecipeError
from launcher.optim import Optimizer, hyperparameters
from launcher.parallel import plain_name

__all__ = [
    "ExtraState",
    "add_module",
    "add_optimizer",
    "add_tracked",
    "add_tracked_here",
    "frozen_digest",
    "optimizer_names",
    "parameter_names",
    "restore_optimizer",
    "restore_tracked",
    "tracked_here",
]

# Stand in a tracked object's JSON for what JSON has not: a tensor, by its name; a tuple; keys that are no text; an
# infinite number, or none.
TENSOR, TUPLE, ITEMS, FLOAT = "$tensor", "$tuple", "$items", "$float"


def add_module(state: State, name: str, model: nn.Module, *, frozen: bool = False) -> None:
    """Add what a model's checkpoint holds: trainable parameters and persistent buffers, ties as aliases.

    Frozen parameters are not in it, unless asked for: `run.build` makes them anew, and a resume compares their digest.
    """
    first: dict[int, str] = {}
    buffers = dict(model.named_buffers(remove_duplicate=False))
    persistent = set(model.state_dict(keep_vars=True))
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad or frozen:
            _add(state, f"{name}/{plain_name(key)}", parameter.detach(), first, id(parameter))
    for key, buffer in buffers.items():
        if key in persistent:
            full = f"{name}/{plain_name(key)}"
            _add(state, full, buffer, first, id(buffer))
            state.rank0 |= {full}


def add_optimizer(state: State, name: str, optimizer: Optimizer, names: Mapping[int, str]) -> None:
    """Add an optimizer's moments, by parameter, and its groups' hyperparameters; `names` maps id(parameter) to name."""
    scalars: dict[str, dict[str, Any]] = {}
    for parameter, moments in optimizer.inner.state.items():
        for key, value in moments.items():
            full = names.get(id(parameter))
            if full is None:
                whose = f"{type(optimizer.inner).__name__} keeps {key!r} under {str(parameter)[:40]!r}"
                raise CheckpointError(f"{whose}, which is no parameter of the model: a checkpoint has no place for it")
            if isinstance(value, torch.Tensor):
                state.tensors[f"{name}/{key}/{full}"] = value
            else:
                scalars.setdefault(full, {})[key] = value
    state.values[name] = {
        "groups": [_jsonable(hyperparameters(group)) for group in optimizer.param_groups],
        "initial_groups": [_jsonable(group) for group in optimizer.initial_groups],
        "scalars": scalars,
    }


def restore_optimizer(
    state: State, name: str, optimizer: Optimizer, names: Mapping[int, str], index: Index
) -> Callable[[], None]:
    """Make room in `state` for the moments that a checkpoint holds; call the result once they are read.

    It takes over the groups' hyperparameters too. One that the config has changed since (which the resume had to be
    allowed) keeps its new value.
    """
    saved = index.values.get(name)
    if not isinstance(saved, dict) or len(saved["groups"]) != len(optimizer.param_groups):
        raise CheckpointError(f"the checkpoint has no {name} with {len(optimizer.param_groups)} parameter groups")
    groups = list(
        zip(optimizer.param_groups, optimizer.initial_groups, saved["initial_groups"], saved["groups"], strict=True)
    )
    for _, initial, then, now in groups:
        _check_hyperparameters(_jsonable(initial), then)
        _check_hyperparameters(_jsonable(initial), now)
    by_name = {
        names[id(parameter)]: (parameter, group) for group in optimizer.param_groups for parameter in group["params"]
    }
    moments: dict[nn.Parameter, dict[str, Any]] = {
        parameter: dict(saved["scalars"].get(full, {})) for full, (parameter, _) in by_name.items()
    }
    subclasses = [entry for entry in index.values.get(SUBCLASSES, {}) if entry.startswith(f"{name}/")]
    if subclasses:
        _make_moments(optimizer)
    for entry in [*index.tensors, *subclasses]:
        key, _, full = entry.removeprefix(f"{name}/").partition("/")
        if entry.startswith(f"{name}/") and full in by_name:
            parameter, group = by_name[full]
            made = optimizer.inner.state[parameter].get(key) if entry in subclasses else None
            state.tensors[entry] = _room(index, entry, key, parameter, group) if made is None else made
            moments[parameter][key] = state.tensors[entry]

    def take_over() -> None:
        for group, initial, then, now in groups:
            for key, value in now.items():
                if key in initial and _jsonable(initial)[key] == then.get(key):
                    _set_hyperparameter(group, key, value)
        for parameter, values in moments.items():
            optimizer.inner.state[parameter].update(values)

    return take_over


def add_tracked(state: State, name: str, tracked: Any) -> None:
    """Add an object with `state_dict`: its tensors under their names, the rest as JSON."""
    state.values[f"track/{name}"] = _flatten(tracked.state_dict(), f"track/{name}", state.tensors)


def add_tracked_here(state: State, name: str, tracked: Any) -> None:
    """Add an object of which each rank keeps its own.

    Raises:
        RecipeError: it holds tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    state.rank_values[f"track/{name}"] = _flatten(tracked.state_dict(), f"track/{name}", tensors)
    if tensors:
        raise RecipeError(f"run.track(..., {name!r}, per_rank=True): {min(tensors)} is a tensor; give numbers and text")


class ExtraState:
    """What modules keep beside parameters and buffers (`get_extra_state`), to be tracked like any other object."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = {
            plain_name(key): module
            for key, module in model.named_modules()
            if type(module).get_extra_state is not nn.Module.get_extra_state
        }

    def __bool__(self) -> bool:
        return bool(self._modules)

    def state_dict(self) -> dict[str, Any]:
        """By the module's name."""
        return {key: module.get_extra_state() for key, module in self._modules.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give every module its own."""
        for key, module in self._modules.items():
            module.set_extra_state(state[key])


def tracked_here(value: Any) -> Any:
    """The state dict that `add_tracked_here` took."""
    return _unflatten(value, {})


def restore_tracked(state: State, name: str, tracked: Any, index: Index) -> Any:
    """Make room for an object's tensors; its state dict, to be loaded once they are read."""
    if f"track/{name}" not in index.values:
        raise CheckpointError(f"the checkpoint has nothing for run.track(..., {name!r}): it was saved without it")
    live: dict[str, torch.Tensor] = {}
    _flatten(tracked.state_dict(), f"track/{name}", live)
    rooms: dict[str, torch.Tensor] = {}
    for entry, spec in index.tensors.items():
        if entry.startswith(f"track/{name}/"):
            like = live.get(entry)
            same = like is not None and tuple(like.shape) == tuple(spec.shape)
            rooms[entry] = torch.zeros_like(like) if same and like is not None else _empty(index, entry)
    state.tensors |= rooms
    return _unflatten(index.values[f"track/{name}"], rooms)


def optimizer_names(optimizers: Sequence[Optimizer]) -> list[str]:
    """What the optimizers are called in a checkpoint, in the order in which the recipe made them."""
    return [f"optimizer_{k}" if k else "optimizer" for k in range(len(optimizers))]


def parameter_names(models: Mapping[str, nn.Module]) -> dict[int, str]:
    """The full name of every parameter, by id; a tied one has its first."""
    names: dict[int, str] = {}
    for name, model in models.items():
        for key, parameter in model.named_parameters():
            names.setdefault(id(parameter), f"{name}/{plain_name(key)}")
    return names


def frozen_digest(model: nn.Module) -> str:
    """A digest of the parameters that are not trained, names and bytes; "" without any. For a model on the CPU."""
    digest = xxhash.xxh3_128()
    frozen = {key: p for key, p in model.named_parameters() if not p.requires_grad}
    for key, parameter in frozen.items():
        digest.update(key.encode())
        digest.update(parameter.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest() if frozen else ""


def _add(state: State, name: str, tensor: torch.Tensor, first: dict[int, str], key: int) -> None:
    if key in first:
        state.aliases[name] = first[key]
    else:
        first[key] = name
        state.tensors[name] = tensor


def _room(index: Index, entry: str, key: str, parameter: nn.Parameter, group: Mapping[str, Any]) -> torch.Tensor:
    """A tensor for a moment: like its parameter where it has its shape; the count of steps where torch keeps it."""
    spec = index.tensors[entry]
    if key == "step" and not spec.shape:
        on_device = group.get("fused") or group.get("capturable")
        return _empty(index, entry).to(parameter.device if on_device else torch.device("cpu"))
    if tuple(spec.shape) == tuple(parameter.shape):
        return torch.zeros_like(parameter.detach(), dtype=index.dtype(entry))
    return _empty(index, entry).to(parameter.device)


def _empty(index: Index, entry: str) -> torch.Tensor:
    return torch.zeros(tuple(index.tensors[entry].shape), dtype=index.dtype(entry))


def _check_hyperparameters(live: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse values that the optimizer could not have had.

    Raises:
        TypeError: a saved one is of another kind than the live one.
    """
    for key, value in saved.items():
        if key in live and not _alike(live[key], value):
            raise TypeError(f"{key} is {str(value)[:30]}")


def _alike(live: Any, saved: Any) -> bool:
    if isinstance(live, list):
        return isinstance(saved, list) and len(live) == len(saved) and all(map(_alike, live, saved))
    if isinstance(live, bool | None):  # foreach, fused: unsaid may become said
        return isinstance(saved, bool | None)
    if isinstance(live, int | float):
        return isinstance(saved, float) or (type(saved) is int and abs(saved) < 2**63)
    return isinstance(saved, type(live))


def _make_moments(optimizer: Optimizer) -> None:
    """Let an optimizer make its moments, whose kind only it knows: by a step with no gradient and no learning rate."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
    for parameter in optimizer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.inner.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _set_hyperparameter(group: dict[str, Any], key: str, value: Any) -> None:
    current = group.get(key)
    if isinstance(current, torch.Tensor):
        current.fill_(value)
    else:
        group[key] = tuple(value) if isinstance(current, tuple) else value


def _jsonable(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.item() if isinstance(value, torch.Tensor) else list(value) if isinstance(value, tuple) else value
        for key, value in group.items()
        if isinstance(value, int | float | str | list | tuple | torch.Tensor | None)
    }


def _flatten(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON that `_unflatten` makes equal again, its tensors moved to `tensors` under their paths."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach()
        return {TENSOR: path}
    if isinstance(value, Mapping):
        inner = [(key, _flatten(item, f"{path}/{key}", tensors)) for key, item in value.items()]
        if all(isinstance(key, str) for key, _ in inner) and not {TENSOR, TUPLE, ITEMS, FLOAT} & set(value):
            return dict(inner)
        return {ITEMS: [[_flatten(key, path, tensors), item] for key, item in inner]}
    if isinstance(value, list | tuple):
        items = [_flatten(item, f"{path}/{k}", tensors) for k, item in enumerate(value)]
        return {TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, float) and not math.isfinite(value):
        return {FLOAT: repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise RecipeError(f"run.track: {path} is a {type(value).__name__}; a state_dict holds tensors, numbers and text")


def _unflatten(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {TENSOR}:
        return tensors[value[TENSOR]]
    if set(value) == {FLOAT}:
        return float(value[FLOAT])
    if set(value) == {TUPLE}:
        return tuple(_unflatten(item, tensors) for item in value[TUPLE])
    if set(value) == {ITEMS}:
        return {_unflatten(key, tensors): _unflatten(item, tensors) for key, item in value[ITEMS]}
    return {key: _unflatten(item, tensors) for key, item in value.items()}
