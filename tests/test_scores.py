"""The values of a metric by step, from a file that kills and later attempts have left their marks on."""

import json
import math
from pathlib import Path

import pytest

from launcher.errors import LauncherError
from launcher.scores import scores


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def line(attempt: int, step: int, **values: object) -> dict[str, object]:
    return {"attempt": attempt, "step": step, **values}


def test_of_a_step_the_latest_attempt_and_its_last_line_count(tmp_path: Path) -> None:
    path = write(
        tmp_path / "metrics.jsonl",
        line(1, 10, loss=1.0, val=0.5),
        line(1, 20, loss=0.9, val=0.4),
        line(2, 20, val=0.3),
        line(2, 20, val=0.2),
        line(1, 20, val=9.0),  # an incarnation that was cut off, and still writes
        line(2, 30, loss=0.1),
    )
    assert scores(path, "val") == {10: 0.5, 20: 0.2}
    assert scores(path, "loss") == {10: 1.0, 20: 0.9, 30: 0.1}
    assert scores(path, "va") == {}


def test_what_was_told_before_the_run_went_back_counts_for_nothing(tmp_path: Path) -> None:
    path = write(
        tmp_path / "metrics.jsonl",
        line(1, 10, val=1.0),
        line(1, 20, val=0.1),
        line(2, 30, val=0.2),
        line(2, 10, rewound_from=31),
        line(2, 20, val=0.5),
    )
    assert scores(path, "val") == {10: 1.0, 20: 0.5}


def test_lines_that_are_cut_or_no_numbers_are_passed_over(tmp_path: Path) -> None:
    path = write(
        tmp_path / "metrics.jsonl",
        '{"attempt": 1, "step": 10, "val": 0.\n',
        '{"attempt": 1, "step": 20, "val": 0.1{"attempt": 2, "step": 20, "val": 0.2}\n',
        *(line(1, 30, val=value) for value in (None, True, "0.1", [0.1], 10**400)),
        '["val"]\n',
        '"val"\n',
        '{"val": 1}\n',
        "[" * 100_000 + '"val"\n',
        line(1, "40", val=1),
        line(1, 50, val=3),
        line(1, 60, val=math.nan),
        line(1, 70, **{"vál": 2.0}),
        '{"attempt": 1, "step": 80, "val": 4.0',
    )
    found = scores(path, "val")
    assert math.isnan(found.pop(60))
    assert found == {50: 3.0}
    assert scores(path, "vál") == {70: 2.0}


def test_no_file_has_no_scores_and_an_unreadable_one_is_told(tmp_path: Path) -> None:
    assert scores(tmp_path / "metrics.jsonl", "val") == {}
    with pytest.raises(LauncherError, match=r"cannot read .*: Is a directory"):
        scores(tmp_path, "val")
