"""What a check has found: one row of its table."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """A row: what was looked at, whether it holds, and what to do where it does not."""

    group: str
    """`parity`, `resume`, `elastic`, `determinism` or `ranks`."""
    what: str
    holds: bool | None
    """None: for information, or it could not be looked at."""
    told: str
    advice: str = ""
