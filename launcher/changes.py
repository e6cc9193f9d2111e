"""What a run may go on with: the options that differ from those it was started with, and which of them need leave."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.errors import UsageError
from launcher.options import meant

__all__ = ["OF_ONE_START", "Change", "changes", "check_resume"]

# These belong to one start of a run, not to the run: a saved config does not hold them, so that running it again takes
# a fresh directory. The command of every start is in run.json.
OF_ONE_START = ("dir", "resume", "allow")
# A run may go on with other values of these: they change where and how fast it learns, not what.
FREE = {
    *(f"run.{name}" for name in OF_ONE_START),
    *("run.name", "run.save_every", "run.keep", "run.keep_every", "run.keep_best", "run.log_every", "run.tracker"),
    *("run.workers", "run.threads", "run.shard", "run.sync", "run.activation_checkpointing"),
    *("run.hang_after", "run.join_within", "run.cache", "run.gc_every", "run.empty_cache_every"),
    *("run.bad_numbers", "run.bad_numbers_limit", "run.spike"),  # what a run that they stopped goes on with
}
MAY_GROW = ("steps", "epochs")
ALLOWED_WORDS = ("world", "data")
ABSENT = object()


@dataclass(frozen=True)
class Change:
    """An option that differs between two configs; `old` or `new` is `ABSENT` where one does not have it."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        if self.old is ABSENT:
            return f"{self.key} is new ({json.dumps(self.new)})"
        if self.new is ABSENT:
            return f"{self.key} is gone (was {json.dumps(self.old)})"
        return f"{self.key} was {json.dumps(self.old)}, now {json.dumps(self.new)}"


def changes(saved: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """The options that differ between two configs as `to_dict` makes them, in their order."""
    before, after = _flat(saved), _flat(new)
    pairs = {key: (before.get(key, ABSENT), after.get(key, ABSENT)) for key in {**before, **after}}
    return [Change(key, old, now) for key, (old, now) in pairs.items() if old != now]


def check_resume(saved: Mapping[str, Any], new: Mapping[str, Any], allow: Sequence[str]) -> None:
    """Refuse to go on with a run as something else than it was started as.

    Free to change is what alters where and how fast it learns, not what; `steps` and `epochs` may grow. Everything else
    needs leave: `allow` names options (`lr`, `run.precision`).

    Raises:
        UsageError: options changed without leave, or `allow` names one that does not exist.
    """
    known = [*_flat(new), *_flat(saved), *ALLOWED_WORDS]
    allowed = [key.replace("-", "_") for key in allow]
    for key in allowed:
        if key not in known:
            raise UsageError(f"--run.allow {key}: no such option{meant(key, known)}")
    refused = [
        change
        for change in changes(saved, new)
        if change.key not in FREE and change.key not in allowed and not _grows(change)
    ]
    if refused:
        raise UsageError(
            f"the run goes on with other options than before: {'; '.join(map(str, refused))} "
            f"(put them back, or accept with --run.allow {' '.join(change.key for change in refused)})"
        )


def _grows(change: Change) -> bool:
    old, new = change.old, change.new
    return change.key in MAY_GROW and all(type(value) in (int, float) for value in (old, new)) and bool(new >= old)


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
