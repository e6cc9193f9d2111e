"""A recipe's options checked before a job is queued: the recipe is started here, and says what it was asked for.

`launcher submit` starts the recipe with LAUNCHER_REHEARSE set to a file of questions; `launcher.main` then reads the
options as a run would, answers into the file, and leaves before anything else is done.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import LauncherError, UsageError

__all__ = ["VARIABLE", "Answer", "Modules", "rehearse"]

VARIABLE = "LAUNCHER_REHEARSE"
PATIENCE = 600.0  # seconds; a recipe's imports on a cold network disk


@dataclass(frozen=True)
class Modules:
    """Where the recipe's imports came from, apart from the standard library and installed packages."""

    roots: tuple[str, ...]
    """Directories on the search path, in its order."""
    files: Mapping[str, str]
    """The file of each top-level module."""
    all: tuple[str, ...] = ()
    """The files of all modules."""


@dataclass(frozen=True)
class Answer:
    """What a recipe made of its options."""

    settings: dict[str, Any]
    dir: str | None
    name: str
    argv: list[str]
    """The options as the recipe takes them; of a sweep's flags (`--tie=false`) in its own words (`--no-tie`)."""


def rehearse(
    recipe: Path, argvs: Sequence[Sequence[str]], *, python: str, environment: Mapping[str, str]
) -> tuple[list[Answer], Modules]:
    """Start a recipe for each list of options, in one process, only as far as its config.

    Args:
        recipe: its file.
        argvs: lists of options.
        python: the Python to start it with.
        environment: what its job will have beside this process's own environment.

    Raises:
        UsageError: it refuses them, or cannot be imported here; what it said stands above on stderr.
    """
    with tempfile.TemporaryDirectory(prefix="launcher-") as directory:
        asked = Path(directory, "asked.json")
        asked.write_text(json.dumps([list(argv) for argv in argvs]))
        own = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        try:
            done = subprocess.run(
                [python, str(recipe)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env={**own, **environment, VARIABLE: str(asked)},
                timeout=PATIENCE,
            )
        except OSError as error:
            raise UsageError(f"--python {python}: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise UsageError(
                f"{recipe} did not get to launcher.main in {PATIENCE:.0f} s: see why with --help"
            ) from None
        said = done.stderr.decode(errors="replace").strip()
        answered = Path(directory, "answered.json")
        if not answered.exists():
            _refused(recipe, done.returncode, said)
        answers = json.loads(answered.read_text())
    found = [Answer(**answer) for answer in answers["points"]]
    return found, Modules(tuple(answers["roots"]), answers["files"], tuple(answers["all"]))


def _refused(recipe: Path, code: int, said: str) -> None:
    lines = said.splitlines()
    if code == 2 and lines and lines[-1].startswith("launcher: "):
        raise UsageError(lines[-1].removeprefix("launcher: "))
    if code == 0:
        raise UsageError(f"{recipe} ended without launcher.main(train): is it a recipe? (last line of its file)")
    last = lines[-1] if lines else f"exit code {code}"
    if len(lines) > 1:
        print(said, file=sys.stderr)
    raise LauncherError(f"{recipe} cannot be started here, so it was not queued: {last} (--no-check queues it anyway)")
