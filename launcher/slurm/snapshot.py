"""The code a job runs: a copy made when it is submitted, so that the checkout stays free to edit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import LauncherError
from launcher.source import git

__all__ = ["Snapshot", "take"]

FILE_LIMIT = 10 * 2**20  # bytes: a larger file is data or a model, which options name by their path
LIMIT = 200 * 2**20  # bytes, of all files
SLOW = 120.0  # seconds that git may take to list a large repository


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
        name = _name(path, self.source)
        return self.target / name if name is not None and (self.target / name).exists() else None


def take(recipe: Path, target: Path, needed: Sequence[Path] = ()) -> Snapshot:
    """Copy the code that a recipe belongs to, into the new directory `target`.

    In a git repository these are its files, tracked or not, that are not ignored; elsewhere the Python files of the
    recipe's directory and below. Other runs that lie there are no code. Links are copied as links where they lead to a
    directory, else as what they lead to.

    Args:
        recipe: the recipe's file.
        target: the directory of the copy, which is not there yet.
        needed: files that it imports: of these, what lies inside is copied also where git ignores it.

    Raises:
        LauncherError: the copy cannot be written.
    """
    top = _repository(recipe.parent)
    source = Path(os.path.realpath(top or recipe.parent))
    names = _python_files(source) if top is None else _listed(source)
    first = {name for name in (_name(path, source) for path in (recipe, *needed)) if name is not None}
    others = _without_runs([name for name in names if name not in first], source, [source / name for name in first])
    left_out: list[str] = []
    size = copied = 0
    for name in (*sorted(first), *sorted(others)):
        path = source / name
        if not os.path.lexists(path):  # deleted, and not yet committed
            continue
        if why := _unfit(path):
            left_out.append(f"{name} ({why})")
            continue
        try:
            bytes_ = 0 if path.is_dir() else path.stat().st_size
            if name not in first and (bytes_ > FILE_LIMIT or size + bytes_ > LIMIT):
                left_out.append(f"{name} ({bytes_ / 2**20:.1f} MiB)")
                continue
            _copy(path, target / name, source)
        except OSError as error:
            raise LauncherError(f"cannot copy {path} to {target}: {error.strerror or error}") from None
        size, copied = size + bytes_, copied + 1
    return Snapshot(source, target, copied, size, tuple(left_out))


def _name(path: Path, source: Path) -> str | None:
    """What a file is called inside `source`, by whatever way it was reached; None outside."""
    for way in (Path(os.path.realpath(path.parent), path.name), Path(os.path.realpath(path))):
        if way.is_relative_to(source):
            return way.relative_to(source).as_posix()
    return None


def _without_runs(names: Sequence[str], source: Path, ours: Sequence[Path]) -> list[str]:
    """The files that are of no run: copies of code in copies of code would fill the disk. `ours` are of none."""
    known = {parent: False for path in ours for parent in path.parents} | {source: False}

    def of_run(directory: Path) -> bool:
        if directory not in known:
            started = (directory / "run.json").exists() and (directory / "attempts").is_dir()
            submitted = (directory / "slurm" / "jobs.jsonl").exists()
            known[directory] = started or submitted or of_run(directory.parent)
        return known[directory]

    return [name for name in names if not of_run((source / name).parent)]


def _unfit(path: Path) -> str | None:
    """Why something cannot be copied."""
    if path.is_dir():
        return None if path.is_symlink() else "a repository of its own"
    if not path.is_file():
        return "no file"
    return None if os.access(path, os.R_OK) else "it may not be read"


def _copy(path: Path, copy: Path, source: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_dir():
        shutil.copy2(path, copy)
        return
    real = path.resolve()
    inside = real.is_relative_to(source)  # then to the copy of what it leads to
    copy.symlink_to(os.path.relpath(real, path.parent) if inside else real)


def _repository(directory: Path) -> Path | None:
    top = git(directory, "rev-parse", "--show-toplevel")
    return None if not top else Path(os.fsdecode(top.removesuffix(b"\n")))


def _listed(source: Path) -> list[str]:
    said = git(source, "ls-files", "-co", "--exclude-standard", "-z", timeout=SLOW) or b""
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
