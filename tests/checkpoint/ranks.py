"""Starts the ranks of a small job as real processes: `python ranks.py WORLD_SIZE DIRECTORY SCENARIO ARGUMENTS`.

The ranks are forked from one process that has done the imports, which take longer than most of what they do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from launcher.world import World

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SECONDS = 120  # after which a job is taken to hang


def environment() -> dict[str, str]:
    """A child's environment: this one's, the package, one thread."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_ranks(world_size: int, scenario: str, tmp_path: Path, *arguments: object) -> None:
    """Run a function of scenarios.py on `world_size` gloo processes; what they printed is in the failure."""
    directory = tmp_path / f"job-{scenario}"
    directory.mkdir()
    command = [sys.executable, "-W", "error", HERE / "ranks.py", world_size, directory, scenario, *arguments]
    with open(directory / "job.txt", "w") as output:
        job = subprocess.Popen(
            list(map(str, command)), env=environment(), stdout=output, stderr=output, start_new_session=True
        )
        try:
            code: object = job.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = "none: it hangs"
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    said = "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(directory.glob("*.txt")))
    assert code == 0, f"{scenario}: exit code {code}\n{said}"


def main(world_size: int, directory: Path, scenario: str, *arguments: str) -> int:
    """Fork the ranks and wait for them; how many failed."""
    import scenarios
    import torch._dynamo  # noqa: F401 - DTensor imports it, on every rank if not here

    for rank in range(world_size):
        if os.fork() == 0:
            output = os.open(directory / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT)
            os.dup2(output, sys.stdout.fileno())
            os.dup2(output, sys.stderr.fileno())
            code = 1
            try:
                work(getattr(scenarios, scenario), rank, world_size, directory, *arguments)
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
    return sum(os.wait()[1] != 0 for _ in range(world_size))


def work(scenario: object, rank: int, world_size: int, directory: Path, *arguments: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
    scenario(World(rank=rank, world_size=world_size, group=dist.group.WORLD), *arguments)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))
