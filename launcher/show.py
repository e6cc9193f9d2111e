"""What a person is shown: tables, sizes, and text that others wrote, which must not play with the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

__all__ = ["human", "print_json", "print_table", "printable"]


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[str] = ()) -> None:
    """Print rows under their headers, nothing cut short; the columns named in `right` stand to the right."""
    from tabulate import tabulate

    text = [[printable(str(cell)) for cell in row] for row in rows]
    align = ["right" if header in right else "left" for header in headers]
    for line in tabulate(text, headers, tablefmt="plain", disable_numparse=True, colalign=align).splitlines():
        print(line.rstrip())


def print_json(value: Any) -> None:
    """Print a value for scripts."""
    print(json.dumps(value, indent=2, allow_nan=False))


def printable(text: str) -> str:
    """The text on one line, with what could move a terminal's cursor, or cannot be printed at all, spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def human(size: int) -> str:
    """Bytes as a person says them: `1.2 GB`."""
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 999.5:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 99.95 else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
