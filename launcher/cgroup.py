"""The memory control group of this process: what it may use, what it uses, and whether the kernel has killed in it.

Sources: the kernel's Documentation/admin-guide/cgroup-v2.rst (memory.max, memory.current, memory.events) and
cgroup-v1/memory.rst (memory.limit_in_bytes, memory.usage_in_bytes, memory.oom_control).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["groups", "kills", "limit", "used"]

UNLIMITED = 2**60  # bytes: version 1 says "none" with a number near 2**63


def groups(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[Path]:
    """The directories of this process's memory control group and of those that it is in, the innermost first.

    None where they cannot be seen. A container often shows its own group as the root.
    """
    try:
        lines = [line.split(":", 2) for line in proc.read_text().splitlines()]
    except OSError:
        return []
    own = {names: path for _, names, path in (line for line in lines if len(line) == 3)}
    found = next((path for names, path in own.items() if "memory" in names.split(",")), None)
    top = root / "memory"
    if found is None:
        found, top = own.get("", "/"), root
    inner = top / found.lstrip("/")
    if not inner.is_dir():
        inner = top
    return [path for path in (inner, *inner.parents) if path.is_relative_to(top) and _kills(path) is not None]


def kills(seen: Sequence[Path]) -> dict[str, int]:
    """How many processes the kernel has killed in each group because its memory was used up."""
    return {str(path): number for path in seen if (number := _kills(path)) is not None}


def limit(seen: Sequence[Path]) -> int | None:
    """Bytes that this process and those in its groups may use together; None: as many as there are."""
    limits = [_number(path, "memory.max", "memory.limit_in_bytes") for path in seen]
    return min((number for number in limits if number is not None and number < UNLIMITED), default=None)


def used(seen: Sequence[Path]) -> int | None:
    """Bytes that are in use in the group whose limit is the least; None where there is no limit."""
    least = limit(seen)
    for path in seen:
        if least is not None and _number(path, "memory.max", "memory.limit_in_bytes") == least:
            return _number(path, "memory.current", "memory.usage_in_bytes")
    return None


def _kills(path: Path) -> int | None:
    for name in ("memory.events", "memory.oom_control"):
        with suppress(OSError, ValueError):
            said = dict(line.split() for line in (path / name).read_text().splitlines())
            if "oom_kill" in said:
                return int(said["oom_kill"])
    return None


def _number(path: Path, *names: str) -> int | None:
    for name in names:
        with suppress(OSError, ValueError):
            return int((path / name).read_text())
    return None
