"""Every error that a person can cause, each told in one line that names the fault and the fix.

    LauncherError         exit 1
    |- UsageError         exit 2: a wrong option, file or combination; nothing has been touched
    |- RecipeError        the recipe breaks a contract: a loss that is no sum, a step without a backward
    |- CheckpointError    a checkpoint that is foreign, or cannot be written
    |  |- DamagedError    its bytes are not those that were written; an older one may be whole
    |  `- ReplacedError   a newer start of the run has taken over: this one may write nothing more
    |- NumbersError       a loss or a gradient is not finite, or a loss leaps: the update was not made
    `- WorldError         the processes, devices or precision asked for are not the ones there are

`launcher.main` prints the line and exits with the code; anything else that escapes a recipe is shown
with its traceback, because then the traceback is the recipe's own.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "DamagedError",
    "LauncherError",
    "NumbersError",
    "RecipeError",
    "ReplacedError",
    "UsageError",
    "WorldError",
]


class LauncherError(Exception):
    """What went wrong and what to do about it, in one line."""

    exit_code = 1
    kind = "code"
    """What kind of failure it is: see launcher/failure.py."""


class UsageError(LauncherError):
    """A wrong option, file or combination of settings."""

    exit_code = 2


class RecipeError(LauncherError):
    """The recipe uses the run or the step in a way that would train something else than it says."""


class CheckpointError(LauncherError):
    """A checkpoint is broken, belongs to something else, or cannot be written."""


class DamagedError(CheckpointError):
    """The bytes of a checkpoint are not those that were written, or cannot be read: an older one may be whole."""


class ReplacedError(CheckpointError):
    """A newer start of the run has taken it over, and this one may write nothing more."""


class NumbersError(LauncherError):
    """A loss or a gradient is not finite, or a loss leaps, and the run is to stop there."""

    kind = "numbers"


class WorldError(LauncherError):
    """The world that was asked for is not the world there is."""
