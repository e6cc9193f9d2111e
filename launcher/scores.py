"""The values of one metric by step, read back from metrics.jsonl: what decides which checkpoint is the best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.errors import LauncherError

__all__ = ["scores"]

REWOUND = '"rewound_from"'


def scores(path: Path, metric: str) -> dict[int, float]:
    """The values of `metric` in the metrics file at `path`, by step; none where there is no file.

    Of one step the latest attempt that tells the metric counts, and of its lines the last. What an attempt told of
    steps behind the one from which a later attempt went on counts for nothing: the later one trains them anew. So it is
    with what was told before a line that says `rewound_from`, of steps behind that line's own. A line that was cut by a
    kill, and a value that is no number, are passed over.

    Raises:
        LauncherError: the file is there and cannot be read.
    """
    needle = json.dumps(metric)  # as it stands in a line, so that most lines need not be parsed
    found: dict[int, tuple[int, float]] = {}
    begun: dict[str, tuple[int, int]] = {}  # a line's beginning -> its attempt, and the first step of that
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            for text in lines:
                head = text.partition(",")[0]
                if head not in begun and (first := _parsed(text, None)) is not None:
                    begun[head] = (first[1], first[0])
                if REWOUND in text and (back := _parsed(text, "rewound_from")) is not None:
                    found = {step: one for step, one in found.items() if step <= back[0] or one[0] > back[1]}
                if needle in text and (line := _parsed(text, metric)) is not None:
                    step, attempt, value = line
                    if attempt >= found.get(step, (attempt, value))[0]:
                        found[step] = (attempt, value)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise LauncherError(f"cannot read {path}: {error.strerror}") from None
    return {
        step: value
        for step, (attempt, value) in found.items()
        if not any(later > attempt and first < step for later, first in begun.values())
    }


def _parsed(text: str, metric: str | None) -> tuple[int, int, float] | None:
    """Step, attempt and value of a line (0 where no metric is asked for); None where it has none."""
    try:
        line: Any = json.loads(text)
        step, attempt, value = line["step"], line["attempt"], 0 if metric is None else line[metric]
        numbers = type(step) is int and type(attempt) is int and type(value) in (int, float)
        return (step, attempt, float(value)) if numbers else None
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return None
