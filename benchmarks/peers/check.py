"""Which files below a directory look like a checkpoint that was not written to its end: `check.py DIRECTORY`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

UNFINISHED = (".partial", ".tmp", ".new", ".save_tmp")


def readable(path: Path) -> bool:
    """Whether a file can be loaded as what its name says."""
    try:
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix in (".pt", ".ckpt", ".bin") or path.name.startswith("random_states"):
            torch.load(path, weights_only=False)
    except Exception:
        return False
    return True


def main() -> None:
    """Print them, as JSON."""
    directory = Path(sys.argv[1])
    found = []
    for path in sorted(directory.rglob("*")):
        if path.is_file() and (path.name.endswith(UNFINISHED) or not readable(path)):
            found.append(str(path.relative_to(directory)))
    complete: set[str] = set()
    states = sorted(directory.glob("accelerate/step_*"))
    for state in states:  # every state of one run has the same files
        complete |= {path.name for path in state.iterdir()}
    for state in states:
        found += [f"{state.name} without {name}" for name in sorted(complete - {path.name for path in state.iterdir()})]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
