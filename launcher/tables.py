"""Options from a file: a TOML or JSON table, nested as the options are, checked key by key."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from launcher.errors import UsageError
from launcher.options import meant
from launcher.values import decode, default_of, describe, init_fields, is_table

__all__ = ["overlay", "read_table"]


def read_table(path: str) -> dict[str, Any]:
    """The table that a TOML or JSON file holds.

    Raises:
        UsageError: there is no such file, or it is broken: with the line, where the parser tells.
    """
    suffix = Path(path).suffix
    if suffix not in (".toml", ".json"):
        raise UsageError(f"--config {path}: neither .toml nor .json")
    try:
        text = Path(path).read_bytes().decode()
        table = tomllib.loads(text) if suffix == ".toml" else json.loads(text, object_pairs_hook=_once)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from None
    except ValueError as error:  # broken TOML or JSON, or not UTF-8
        raise UsageError(f"--config {path}: {error}") from None
    if not isinstance(table, dict):
        raise UsageError(f"--config {path}: holds a {type(table).__name__}, not a table of options")
    return table


def overlay(
    config: type, table: Any, prefix: str, known: Mapping[str, Any], faults: list[str], base: Any = None
) -> Any:
    """An instance of the dataclass `config` with the values of `table`, and for the rest those of `base`.

    It has not been through `__init__`: a recipe's own check must see the final values, and there may be required ones
    that only the command line gives (`tyro.MISSING` until then).

    Args:
        config: a dataclass, whose options have types that `decode` knows.
        table: what the file says; keys with dashes or underscores.
        prefix: of the options' dotted keys: "" or "model.".
        known: the types of all options, by dotted key.
        faults: gains a line for everything that is wrong.
        base: an instance to start from; None: the fields' defaults.
    """
    if not isinstance(table, dict):
        faults.append(f"{prefix[:-1]} = {_shown(table)}: expected a table")
        table = {}
    given = {key.replace("-", "_"): value for key, value in table.items()}
    instance: Any = object.__new__(config)
    for name, (field, kind) in init_fields(config).items():
        value = default_of(field) if base is None else getattr(base, name)
        if is_table(kind):
            under = None if value is MISSING else value
            value = overlay(kind, given.pop(name, {}), f"{prefix}{name}.", known, faults, under)
        elif name in given:
            value = _value(kind, given.pop(name), prefix + name, faults)
        object.__setattr__(instance, name, _tyro_missing() if value is MISSING else value)
    faults += [f"unknown key {prefix}{key}{meant(prefix + key, known)}" for key in given]
    return instance


def _value(kind: Any, written: Any, key: str, faults: list[str]) -> Any:
    try:
        return decode(kind, written)
    except ValueError:
        faults.append(f"{key} = {_shown(written)}: expected {describe(kind)}")
        return None


def _tyro_missing() -> Any:
    import tyro

    return tyro.MISSING


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is given twice")
    return table
