"""How a rank dies, in the way that DEATH names."""

from __future__ import annotations

import mmap
import os
import resource
import signal
from pathlib import Path

import torch
import torch.distributed as dist


def die(rank: int) -> None:
    """Die, or hang, if this is the rank to."""
    death = os.environ["DEATH"]
    if death == "exception" and rank == 2:
        raise ValueError("label 1009 of 1000 classes")
    if death == "kill" and rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if death == "memory" and rank == 2:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
        torch.ones(512 << 20)
    if death == "hang" and rank == 2:
        dist.barrier()  # which the other ranks do not come to
