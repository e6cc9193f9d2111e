"""Option values as JSON and back: which types an option may have, and how a file says them.

A table (a TOML table, a JSON object) stands for a dataclass, a list for a tuple, list or set, a string for a path or an
enum's member. JSON has no word for a float that is not finite: it is the string "inf", "-inf" or "nan".
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any, Literal, TypeGuard, Union

__all__ = ["decode", "default_of", "describe", "encode", "init_fields", "is_table", "option_types"]

SCALARS = (bool, int, float, str)
NOT_FINITE = ("inf", "-inf", "nan")


def is_table(kind: Any) -> TypeGuard[type]:
    """Whether a type is a dataclass, whose fields are options of their own."""
    return isinstance(kind, type) and is_dataclass(kind)


def init_fields(config: type) -> dict[str, tuple[Field[Any], Any]]:
    """The fields of a dataclass that are options, with their types, by name.

    Raises:
        NameError: an annotation names what its module does not have.
    """
    hints = typing.get_type_hints(config)
    return {field.name: (field, hints[field.name]) for field in fields(config) if field.init}


def default_of(field: Field[Any]) -> Any:
    """A field's default, `dataclasses.MISSING` where it has none."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


def option_types(config: type, prefix: str = "") -> dict[str, Any]:
    """The type of every option of a dataclass and of those nested in it, by dotted key."""
    found: dict[str, Any] = {}
    for name, (_, kind) in init_fields(config).items():
        found |= option_types(kind, f"{prefix}{name}.") if is_table(kind) else {prefix + name: kind}
    return found


def describe(kind: Any) -> str:
    """A type in a reader's words.

    Raises:
        TypeError: no option can have this type, as it has no plain form in a file.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is type(None):
        return "None"
    if origin in (Union, types.UnionType):
        return " | ".join(map(describe, args))
    if origin is Literal:
        return " | ".join(str(encode(value)) for value in args)
    if origin is tuple and args and args[-1] is not Ellipsis:
        return f"[{', '.join(map(describe, args))}]"
    if origin in (tuple, list, set, frozenset) and args:
        return f"list of {describe(args[0])}"
    if origin is dict and args[0] is str:
        return f"table of {describe(args[1])}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " | ".join(kind.__members__)
    if isinstance(kind, type) and issubclass(kind, PurePath):
        return "path"
    if kind in SCALARS:
        return str(kind.__name__)
    raise TypeError(getattr(kind, "__name__", str(kind)))


def encode(value: Any) -> Any:
    """A value of an option, or a whole config, as what JSON can hold.

    Raises:
        TypeError: a value of a type that no option can have.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in fields(value) if field.init}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, SCALARS):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(map(encode, value), key=str)
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    raise TypeError(type(value).__name__)


def decode(kind: Any, value: Any) -> Any:
    """The option value of type `kind` that `value`, read from a file, stands for: the inverse of `encode`.

    Nothing is converted that a reader would not expect: an int is a float's value too, "3" is no int.

    Raises:
        ValueError: it stands for none; the caller knows which option of which file to name.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _decode_union(args, value)
    if origin is Literal:
        return _matching([(encode(choice), choice) for choice in args], value)
    if origin in (tuple, list, set, frozenset):
        return _decode_items(origin, args, value)
    if origin is dict and isinstance(value, dict):
        return {key: decode(args[1], item) for key, item in value.items()}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _matching(kind.__members__.items(), value)
    if isinstance(kind, type) and issubclass(kind, PurePath) and isinstance(value, str):
        return kind(value)
    if kind is float and (type(value) is int or value in NOT_FINITE):
        return float(value)
    if type(value) is kind:  # exactly: a bool is no int
        return value
    raise ValueError


def _decode_union(members: tuple[Any, ...], value: Any) -> Any:
    found = []
    for member in members:
        try:
            found.append(decode(member, value))
        except ValueError:
            continue
    if not found:
        raise ValueError
    return next((result for result in found if type(result) is type(value)), found[0])


def _matching(choices: Iterable[tuple[Any, Any]], value: Any) -> Any:
    for written, choice in choices:
        if type(written) is type(value) and written == value:
            return choice
    raise ValueError


def _decode_items(origin: Any, args: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, list):
        raise ValueError
    fixed = origin is tuple and args[-1] is not Ellipsis
    if fixed and len(args) != len(value):
        raise ValueError
    kinds = args if fixed else (args[0],) * len(value)
    return origin(decode(kind, item) for kind, item in zip(kinds, value, strict=True))
