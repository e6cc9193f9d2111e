"""A recipe whose rank 1 stands still in step 2 in the way that HANG names."""

import ctypes
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

import launcher
from launcher.checkin import CheckIn

HANG = os.environ.get("HANG", "")


class Rows(torch.utils.data.Dataset):
    """Sample 17 is never read to its end."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 17 and HANG == "data":
            time.sleep(600)
        return torch.ones(3)


def spin() -> None:
    while True: pass  # noqa: E701  # fmt: skip


def hold(rundir: Path) -> None:
    """Native code that keeps Python's lock: no thread of this process runs."""
    while not list(
        rundir.glob("attempts/1/stacks-*1.txt")
    ):  # its watchdog is at work, as after some steps of a real run
        time.sleep(0.01)
    time.sleep(0.3)
    ctypes.PyDLL(None).sleep(600)


def slow_disk() -> None:
    """Every write to this disk takes longer than a step may."""
    written = os.fsync

    def fsync(fd: int) -> None:
        time.sleep(0.2)
        written(fd)

    os.fsync = fsync


def slow_score(batch: torch.Tensor) -> dict[str, tuple[float, float]]:
    time.sleep(0.1)
    return {"score": (1.0, 1.0)}


def train(run: launcher.Run) -> None:
    model = run.build(lambda: torch.nn.Linear(3, 1))
    optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    rows = run.loader(Rows(), batch_size=8, microbatch_size=2, shuffle=False)
    mine = run.rank == run.world_size - 1
    for step in run.steps(rows, total=4):
        if step.index == 2:
            (run.dir / "stands").touch()
            if HANG == "slow":
                slow_disk()
                step.log(**run.average(slow_score, run.loader(Rows(), batch_size=2, shuffle=False)))
            elif mine and HANG == "spin":
                spin()
            elif mine and HANG == "hold":
                hold(run.dir)
            elif run.is_main and HANG == "first":
                time.sleep(600)
            elif mine and HANG == "collective":
                dist.barrier()
            elif mine and HANG == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
        for x in step:
            step.backward(model(x).sum())
        optimizer.step()
        optimizer.zero_grad()


def come_and_go() -> None:
    """A rank that ends between its coming and the others' connecting to it."""
    CheckIn(1, 2, 2, os.environ).come(60)
    os._exit(9)


if __name__ == "__main__":
    if HANG == "absent" and os.environ["RANK"] == "2":
        os._exit(9)
    if HANG == "gone" and os.environ["RANK"] == "1":
        come_and_go()
    launcher.main(train)
