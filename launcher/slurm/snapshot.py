"""The code a job runs: a copy made when it is submitted, so that the checkout stays free to edit."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import LauncherError

__all__ = ["Snapshot", "take"]

FILE_LIMIT = 10 * 2**20  # bytes: a larger file is data or a model, which options name by their path
LIMIT = 200 * 2**20  # bytes, of all files


@dataclass(frozen=True)
class Snapshot:
    """A copy of the files of a repository, or of a recipe's directory."""

    source: Path
    """Where they were."""
    target: Path
    copied: int
    size: int
    """Bytes."""
    left_out: tuple[str, ...]
    """Files that were too large, with their sizes, and whatever could not be read."""

    def inside(self, path: Path) -> Path | None:
        """The copy of `path`; None where that was not copied."""
        try:
            copy = self.target / path.relative_to(self.source)
        except ValueError:
            return None
        return copy if copy.exists() else None


def take(recipe: Path, target: Path) -> Snapshot:
    """Copy the code that a recipe belongs to, into the new directory `target`.

    In a git repository these are its files, tracked or not, that are not ignored; elsewhere the Python files of the
    recipe's directory and below. Links are copied as links where they lead inside, else as what they lead to.

    Raises:
        LauncherError: the copy cannot be written.
    """
    source = _repository(recipe.parent)
    names = _python_files(recipe.parent) if source is None else _listed(source)
    source = source or recipe.parent
    left_out: list[str] = []
    size = copied = 0
    own = recipe.relative_to(source).as_posix()
    for name in sorted(names, key=lambda name: (name != own, name)):  # the recipe first: it is never left out
        path = source / name
        try:
            if path.is_dir():  # a submodule, or a link to a directory
                if path.is_symlink():
                    copied += _link(path, target / name)
                else:
                    left_out.append(f"{name}/ (a repository of its own)")
                continue
            bytes_ = path.stat().st_size
            if name != own and (bytes_ > FILE_LIMIT or size + bytes_ > LIMIT):
                left_out.append(f"{name} ({bytes_ / 2**20:.1f} MiB)")
                continue
            _make(target / name)
            shutil.copy2(path, target / name)
        except FileNotFoundError:  # deleted, and not yet committed
            continue
        except PermissionError as error:
            if error.filename != str(path):
                raise LauncherError(f"cannot copy {path} to {target}: {error.strerror}") from None
            left_out.append(f"{name} ({error.strerror})")
            continue
        except OSError as error:
            raise LauncherError(f"cannot copy {path} to {target}: {error.strerror}") from None
        size, copied = size + bytes_, copied + 1
    return Snapshot(source, target, copied, size, tuple(left_out))


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)


def _link(path: Path, copy: Path) -> int:
    _make(copy)
    copy.symlink_to(os.readlink(path) if not os.path.isabs(os.readlink(path)) else path.resolve())
    return 1


def _repository(directory: Path) -> Path | None:
    top = _git(directory, "rev-parse", "--show-toplevel")
    return None if not top else Path(os.fsdecode(top.removesuffix(b"\n")))


def _listed(source: Path) -> list[str]:
    said = _git(source, "ls-files", "-co", "--exclude-standard", "-z") or b""
    return sorted({os.fsdecode(name).rstrip("/") for name in said.split(b"\0") if name})


def _python_files(directory: Path) -> Sequence[str]:
    found = []
    for root, directories, files in os.walk(directory):
        directories[:] = [d for d in directories if not d.startswith(".") and d not in ("runs", "__pycache__")]
        directories[:] = [d for d in directories if not (Path(root) / d / "pyvenv.cfg").exists()]
        found += [os.path.relpath(os.path.join(root, name), directory) for name in files if name.endswith(".py")]
        if len(found) > 10_000:
            raise LauncherError(
                f"{directory} is in no git repository and has more than 10,000 Python files below it: put the recipe "
                "in a repository, or in a directory of its own"
            )
    return found


def _git(directory: Path, *arguments: str) -> bytes | None:
    command = ["git", "-C", str(directory), *arguments]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
