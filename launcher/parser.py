"""Command lines that complain in one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from launcher.errors import UsageError

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line, and which takes no abbreviations."""

    def __init__(self, **settings: str) -> None:
        super().__init__(**settings, allow_abbrev=False)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Raise `message` as a UsageError."""
        raise UsageError(f"{message.removeprefix('argument ')} ({self.prog} --help)")
