"""A recipe that dies in step 2 in the way that DEATH names, mostly on rank 2."""

import ctypes
import mmap
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

import launcher

DEATH = os.environ["DEATH"]
STEP = 2


@dataclass(frozen=True)
class Config:
    steps: int = 6
    batch_size: int = 8
    microbatch_size: int = 2


class Rows(Dataset):
    """Of which number 19 is as DEATH says."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> torch.Tensor:
        row = torch.full((3,), float(index))
        if index == 19:
            if DEATH == "sample":
                raise ValueError("the row is broken")
            if DEATH == "worker-hangs":
                time.sleep(600)
            if DEATH == "nan":
                row[1] = float("nan")
        return row


def die(run: launcher.Run, how: str) -> None:
    (run.dir / f"death-{run.rank}").touch()
    if how == "raise" and run.rank == 2:
        raise ValueError("the recipe's own")
    if how == "kill" and run.rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit" and run.rank == 1:
        sys.exit(0)
    if how == "segv" and run.rank == run.world_size - 1:
        ctypes.string_at(0)
    if how == "extra" and run.rank == 2:
        dist.all_reduce(torch.ones(3))
    if how == "shape":
        dist.all_reduce(torch.ones(100_003 if run.rank == 2 else 100_000))
    if how == "disk" and run.rank == 1:
        with open(run.dir / "notes", "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
    if how == "memory" and run.rank == 2:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
        torch.ones(512 << 20)
    if how == "oom-killer" and run.rank == 2:
        used, limit = map(Path, os.environ["GROUP"].split(":"))
        limit.write_text(str(int(used.read_text()) + (64 << 20)))
        print(len([bytearray(64 << 20) for _ in range(32)]))
    if how == "term":
        time.sleep(0.2)


def train(run: launcher.Run, cfg: Config) -> None:
    model = run.build(lambda: torch.nn.Linear(3, 1))
    optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=1e-4))
    rows = run.loader(Rows(), batch_size=cfg.batch_size, microbatch_size=cfg.microbatch_size, shuffle=False)
    steps = 1000 if DEATH == "term" else cfg.steps
    for step in run.steps(rows, total=steps):
        if step.index == STEP or (DEATH == "term" and step.index > STEP):
            die(run, DEATH)
        for row in step:
            step.backward(model(row).square().sum())
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    launcher.main(train)
