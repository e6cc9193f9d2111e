"""Markdown tables, and the numbers in them, for the results page and the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; None is a dash."""
    lines = [header, ["---"] * len(header), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: Any) -> str:
    """A value as it stands in a table: yes, no, a dash for nothing, thousands with commas."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def target(found: float, *, most: float | None = None, least: float | None = None) -> dict[str, Any]:
    """What was found where `most` or `least` was the aim, and whether it is met: a value of `targets(result)`."""
    met = (most is None or found <= most) and (least is None or found >= least)
    return {"found": found, "met": met}


def spread(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """The median of ratios and their quartiles."""
    if len(values) == 1:
        values = [*values, *values]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"ratio": round(middle, digits), "quartiles": [round(low, digits), round(high, digits)]}


def quartiles(pair: Sequence[float], digits: int = 3) -> str:
    """Quartiles in words."""
    low, high = pair
    return f"{low:.{digits}f} to {high:.{digits}f}"
