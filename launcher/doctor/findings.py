"""What `launcher doctor` finds: one thing a finding, and for what is not well how to mend it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "bad", "ok", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    state: Literal["ok", "warning", "bad"]
    found: str
    fix: str = ""
    """What to do; nothing of what is ok."""


def ok(check: str, found: str) -> Finding:
    """This is as it should be."""
    return Finding(check, "ok", found)


def warning(check: str, found: str, fix: str) -> Finding:
    """Runs go on with this, and lose something by it."""
    return Finding(check, "warning", found, fix)


def bad(check: str, found: str, fix: str) -> Finding:
    """Runs fail of this, or cannot go on."""
    return Finding(check, "bad", found, fix)
