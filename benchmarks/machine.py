"""What a result must say of where it was measured; of the host itself, no name."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "accelerate", "lightning", "transformers", "datasets")
JOB = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "FSDP_", "SLURM_", "TORCHELASTIC_")


def environ(*less: str) -> dict[str, str]:
    """This process's environment without a job's variables, and without what begins like one of `less`.

    Python may keep what it compiles: pip has done that for the peers, which are installed as wheels.
    """
    without = (*JOB, "PYTHONDONTWRITEBYTECODE", *less)
    return {key: value for key, value in os.environ.items() if not key.startswith(without)}


def facts() -> dict[str, Any]:
    """The date, the machine and the versions of what was compared."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "cpu": cpu(),
            "cores": len(os.sched_getaffinity(0)),
        },
        "versions": {"python": platform.python_version()}
        | {name: found for name in PACKAGES if (found := installed(name)) is not None},
    }


def cpu() -> str:
    """The processor's model, as the kernel tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown"
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or "unknown"


def installed(name: str) -> str | None:
    """A package's version, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def slug(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.rename(path)
