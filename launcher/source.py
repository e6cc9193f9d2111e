"""The code that runs, as git knows it: commit, uncommitted changes, where it came from."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from pathlib import Path
from typing import Any

__all__ = ["code_patch", "describe_code", "git", "strip_credentials"]

PATCH_LIMIT = 10 * 2**20  # bytes: more than this is data that got into the working tree
TIMEOUT = 20.0  # seconds: a start does not wait longer for a slow filesystem


def describe_code(directory: Path) -> dict[str, Any] | None:
    """Commit, branch, remote and whether tracked files are changed; None where `directory` is in no git repository."""
    commit = git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    remote = git(directory, "remote", "get-url", "origin") or b""
    return {
        "commit": _line(commit),
        "branch": _line(git(directory, "rev-parse", "--abbrev-ref", "HEAD") or b""),
        "dirty": bool(git(directory, "status", "--porcelain", "--untracked-files=no")),
        "remote": strip_credentials(_line(remote)) or None,
    }


def code_patch(directory: Path) -> bytes | None:
    """The changes to tracked files since the commit, for `git apply`; empty without any; None without a repository."""
    plain = ("-c", "diff.relative=false", "-c", "diff.noprefix=false", "-c", "diff.mnemonicPrefix=false")
    diff = ("diff", "HEAD", "--binary", "--no-color", "--no-ext-diff", "--no-textconv")
    patch = git(directory, *plain, *diff, limit=PATCH_LIMIT + 1)
    if patch is None or len(patch) <= PATCH_LIMIT:
        return patch
    return f"# Not kept: the uncommitted changes are more than {PATCH_LIMIT} bytes.\n".encode()


def strip_credentials(text: str) -> str:
    """`text` with user names, passwords and tokens taken out of its URLs."""
    return re.sub(r"(?<=://)[^/\s@]+(?:@[^/\s@]+)*@", "", text)


def git(directory: Path, *arguments: str, limit: int = -1, timeout: float | None = None) -> bytes | None:
    """What git prints, at most `limit` bytes; None where there is no git, no repository, no commit, or no answer."""
    command = ["git", "-C", str(directory), *arguments]
    others = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # of the hook that this may run in
    environment = {key: value for key, value in os.environ.items() if key not in others}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}  # someone may be committing in there
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
    except OSError:
        return None
    too_slow = threading.Timer(TIMEOUT if timeout is None else timeout, process.kill)
    too_slow.start()
    with process:
        assert process.stdout is not None
        output = process.stdout.read(limit)
        if len(output) == limit:
            process.kill()
    too_slow.cancel()
    return output if process.returncode == 0 or len(output) == limit else None


def _line(output: bytes) -> str:
    return output.decode(errors="replace").strip()
