"""recipes/gpt.py itself, unmodified, with its log and its checkpoints."""

from __future__ import annotations

import runpy
import sys

import gpt_common


def main() -> None:
    job = gpt_common.start()
    options = ["--run.dir", job.directory / "run", "--run.log-every", gpt_common.LOG_EVERY]
    options += ["--steps", gpt_common.FOREVER]
    sys.argv[:] = [str(gpt_common.RECIPE), *sys.argv[3:], *map(str, options)]
    runpy.run_path(str(gpt_common.RECIPE), run_name="__main__")


if __name__ == "__main__":
    main()
