"""Sweeps: the combinations of options that one job array runs, with a run directory each."""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Mapping

from launcher.errors import UsageError

__all__ = ["grid", "indices", "options"]

MOST = 10_000
HIGHEST = 99_999


def grid(text: str) -> list[dict[str, str]]:
    """The points of `lr=1e-3,3e-4 model.depth=8,12`: every combination, the last parameter fastest.

    A value that holds a comma or a blank is quoted, as in a shell: `prompt='"a, b",c'` has two. Inside double quotes
    two of them stand for one.

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
    number = math.prod(map(len, axes.values()))
    if number > MOST:
        raise UsageError(f"--sweep has {number:,} combinations: {MOST:,} at most")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def options(point: Mapping[str, str]) -> list[str]:
    """A point as options of the recipe; joined by `=`, so that a value may begin with a dash."""
    return [f"--{name}={value}" for name, value in point.items()]


def indices(text: str) -> tuple[list[int], int | None]:
    """The indices of an `--array` (`0-9`, `1,5,7`, `0-99:10%4`), in order, and how many may run at once (4).

    Raises:
        UsageError: they are too many, or none.
    """
    ranges, percent, limit = text.partition("%")
    found: set[int] = set()
    for part in ranges.split(","):
        span, colon, step = part.partition(":")
        first, _, last = span.partition("-")
        some = range(int(first), int(last or first) + 1, max(1, int(step or 1)))
        if not some or some[-1] > HIGHEST or (colon and int(step) == 0):
            raise UsageError(f"--array {part}: written FIRST-LAST:STEP, with indices up to {HIGHEST:,}")
        found |= set(some)
    if len(found) > MOST:
        raise UsageError(f"--array {text}: {MOST:,} indices at most")
    if percent and int(limit) == 0:
        raise UsageError(f"--array {text}: at least one must run at once")
    return sorted(found), int(limit) if percent else None


def _values(text: str) -> list[str]:
    """The values between commas; a part in double quotes may hold commas, and two double quotes for one."""
    if text.count('"') % 2:
        raise UsageError(f'--sweep {text}: a double quote is not closed (inside of them, "" stands for one)')
    values = [""]
    for part in re.findall(r'"(?:[^"]|"")*"|,|[^",]+', text):
        if part == ",":
            values.append("")
        else:
            values[-1] += part[1:-1].replace('""', '"') if part[0] == '"' else part
    return values
