"""The command lines of `launcher submit` and `launcher resume`: flags, then the recipe (or run), then its options."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any

from launcher.errors import UsageError
from launcher.parser import Parser
from launcher.slurm.request import FLAGS

__all__ = ["split"]


def split(
    argv: Sequence[str], parser: Parser, *, what: str, without: Sequence[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """The flags that stand before the recipe's path, and the rest from that on.

    Args:
        argv: the command line behind the command.
        parser: takes the flags that are added here, beside its own.
        what: what stands behind the flags: RECIPE or RUN.
        without: flags that this command has not.

    Raises:
        UsageError: a flag is unknown or has no such value, or there is no recipe.
    """
    for name, flag in FLAGS.items():
        if name not in without:
            _add(parser, name, flag.metadata["help"], flag.metadata["metavar"], str(flag.type))
    actions = {option: action for action in parser._actions for option in action.option_strings}
    end = 0
    while end < len(argv) and argv[end].startswith("-") and argv[end] != "-":
        name, equals, _ = argv[end].partition("=")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, 1)
            hint = f": did you mean {near[0]}?" if near else f" ({parser.prog} --help lists them)"
            raise UsageError(f"unknown flag {name}{hint}; the recipe's own options stand behind its path")
        end += 1 if equals or actions[name].nargs == 0 else 2
    given = vars(parser.parse_args(argv[:end]))
    if end >= len(argv):
        raise UsageError(f"{parser.prog} needs a {what} ({parser.prog} --help)")
    return given, list(argv[end:])


def _add(parser: Parser, name: str, said: str, metavar: str, kind: str) -> None:
    if kind.startswith("bool"):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=said)
    elif kind.startswith("tuple"):
        parser.add_argument(f"--{name}", action="append", metavar=metavar, help=said)
    else:
        of = int if kind.startswith("int") else str
        parser.add_argument(f"--{name}", type=of, metavar=metavar or name.upper(), help=said)
