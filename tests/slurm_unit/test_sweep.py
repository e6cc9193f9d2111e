"""Sweeps: their points, their options, and the indices of arrays."""

import shlex
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import UsageError
from launcher.slurm.sweep import grid, indices, options


def test_every_combination_the_last_fastest():
    assert grid("lr=1e-3,3e-4 model.depth=8,12") == [
        {"lr": "1e-3", "model.depth": "8"},
        {"lr": "1e-3", "model.depth": "12"},
        {"lr": "3e-4", "model.depth": "8"},
        {"lr": "3e-4", "model.depth": "12"},
    ]
    assert grid("--lr=1") == [{"lr": "1"}]
    assert options({"lr": "-1", "note": "a b"}) == ["--lr=-1", "--note=a b"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("""note='"a, b",c'""", ["a, b", "c"]),
        ("note='$(touch x);`y`'", ["$(touch x);`y`"]),
        ("note='a=b'", ["a=b"]),
        ("note=", [""]),
        ("note=,x", ["", "x"]),
        ("""note='"",x'""", ["", "x"]),
        ("""note='say ""'""", ["say "]),
        ("""note='"say ""hi"", or not",b' """, ['say "hi", or not', "b"]),
        ("note='a\nb',c", ["a\nb", "c"]),
        (r"note='a\n'", [r"a\n"]),
    ],
)
def test_values(text, values):
    assert [point["note"] for point in grid(text)] == values


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1, unique=True))
def test_any_values_can_be_written(values):
    written = ",".join('"' + value.replace('"', '""') + '"' for value in values)
    assert [point["x"] for point in grid(shlex.quote(f"x={written}"))] == values


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "--sweep is empty"),
        ("lr", "--sweep lr: written name=value,value"),
        ("=3", "--sweep =3: written name=value,value"),
        ("lr=1 lr=2", "--sweep: lr stands there twice"),
        ("lr=1 --lr=2", "--sweep: lr stands there twice"),
        ("lr=1,1", "a value stands there twice"),
        ("run.dir=a,b", "every run has a directory of its own"),
        ("lr='1", "No closing quotation"),
        ("""note='"a,b'""", "a double quote is not closed"),
    ],
)
def test_what_is_no_sweep(text, said):
    with pytest.raises(UsageError) as refused:
        grid(text)
    assert said in str(refused.value)


def test_one_that_is_too_large_is_not_built():
    many = ",".join(map(str, range(1000)))
    begun = time.monotonic()
    with pytest.raises(UsageError, match="1,000,000,000,000 combinations: 10,000 at most"):
        grid(f"a={many} b={many} c={many} d={many}")
    with pytest.raises(UsageError, match="up to 99,999"):
        indices("0-99999999999999")
    with pytest.raises(UsageError, match="10,000 indices at most"):
        indices("0-99999")
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", ([3], None)),
        ("0-4", ([0, 1, 2, 3, 4], None)),
        ("1,5,7%2", ([1, 5, 7], 2)),
        ("0-9:4", ([0, 4, 8], None)),
        ("7,0-2,1", ([0, 1, 2, 7], None)),
    ],
)
def test_indices(text, expected):
    assert indices(text) == expected


@pytest.mark.parametrize("text", ["5-3", "7,5-3", "0-9:0", "100000", "0-3%0"])
def test_no_indices(text):
    with pytest.raises(UsageError, match=r"^--array "):
        indices(text)
