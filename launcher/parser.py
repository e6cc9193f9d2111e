"""Command lines that complain in one line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import NoReturn

from launcher.errors import UsageError

__all__ = ["Parser", "recipe_index"]


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line, and which takes no abbreviations."""

    def __init__(self, **settings: str) -> None:
        super().__init__(**settings, allow_abbrev=False)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Raise `message` as a UsageError."""
        raise UsageError(f"{message.removeprefix('argument ')} ({self.prog} --help)")


def recipe_index(argv: Sequence[str], flags: Mapping[str, int], command: str) -> int:
    """Where the recipe's path stands: behind the command's own options and their values.

    Args:
        argv: what stands behind the command.
        flags: its options, each with how many values it takes.
        command: what it is called: `launcher run`.

    Raises:
        UsageError: it has no such option.
    """
    index = 0
    while index < len(argv) and argv[index].startswith("-"):
        name, equals, _ = argv[index].partition("=")
        if name not in flags:
            *others, last = [flag for flag in flags if flag.startswith("--") and flag != "--help"]
            own = f"{', '.join(others)} and {last}"
            raise UsageError(
                f"{command} has no option {name}: before RECIPE stand {own}, after it the recipe's own options"
            )
        index += 1 if equals else 1 + flags[name]
    return min(index, len(argv))
