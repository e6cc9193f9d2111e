"""Sweeps: the combinations of options that one job array runs, with a run directory each."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping

from launcher.errors import UsageError

__all__ = ["grid", "indices", "options"]

MOST = 10_000


def grid(text: str) -> list[dict[str, str]]:
    """The points of `lr=1e-3,3e-4 model.depth=8,12`: every combination, the last parameter fastest.

    A value that holds a comma or a blank is quoted, as in a shell: `prompt='"a, b",c'` has two.

    Raises:
        UsageError: it is no such list.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--sweep {text}: {error}") from None
    axes: dict[str, list[str]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        name = name.removeprefix("--")
        if not equals or not name:
            raise UsageError(f"--sweep {word}: written name=value,value with the option's name, such as lr=1e-3,3e-4")
        if name in axes:
            raise UsageError(f"--sweep: {name} stands there twice")
        if name in ("run.dir", "run.resume"):
            raise UsageError(f"--sweep {name}: every run has a directory of its own")
        axes[name] = _values(values)
        if len(set(axes[name])) < len(axes[name]):
            raise UsageError(f"--sweep {word}: a value stands there twice")
    if not axes:
        raise UsageError("--sweep is empty: written 'lr=1e-3,3e-4 model.depth=8,12'")
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if len(points) > MOST:
        raise UsageError(f"--sweep has {len(points):,} combinations: {MOST:,} at most")
    return points


def options(point: Mapping[str, str]) -> list[str]:
    """A point as options of the recipe; joined by `=`, so that a value may begin with a dash."""
    return [f"--{name}={value}" for name, value in point.items()]


def indices(text: str) -> tuple[list[int], str]:
    """The indices of an `--array` (`0-9`, `1,5,7`, `0-99:10%4`), in order, and its limit (`%4`)."""
    ranges, percent, limit = text.partition("%")
    found: set[int] = set()
    for part in ranges.split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        found |= set(range(int(first), int(last or first) + 1, int(step or 1) or 1))
    if not found or len(found) > MOST or max(found) > 99_999:
        raise UsageError(f"--array {text}: from 1 to {MOST:,} indices, none above 99,999")
    return sorted(found), f"%{limit}" if percent else ""


def _values(text: str) -> list[str]:
    """The values between commas; a part in double quotes may hold commas."""
    values, quoted = [""], False
    for character in text:
        if character == '"':
            quoted = not quoted
        elif character == "," and not quoted:
            values.append("")
        else:
            values[-1] += character
    return values
