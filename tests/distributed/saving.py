"""A recipe whose state takes some megabytes, and which a test can hold at a step or within a save, by the environment.

CONTROL=DIR             where the files lie by which the test and the ranks know of each other
WAIT=4,9                every rank waits at the bodies of these steps: it makes `at-4.RANK`, and goes on at `at-4.go`
HOLD=write:2:0,...      rank 0 waits in its 2nd save before it writes its part: `write-2.0`, `write-2.go`
     publish:2:0        between the look at the attempt number and the rename
     prune:2:0          between the choice of what is to go and its removal
BREAK=2:1               the thread that writes rank 1's part of the 2nd save is ended
RAISE=7:1               rank 1 raises in the body of step 7; 7:* is all ranks, in HOLD and BREAK too
PACE=0.01               a step takes some seconds more: what computes longer leaves the disk more time
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import launcher
from launcher.checkpoint import Store, saving
from launcher.save import Saver


@dataclass(frozen=True)
class Config:
    steps: int = 20
    width: int = 512
    batch_size: int = 8
    microbatch_size: int = 4


class Samples(torch.utils.data.Dataset):
    def __init__(self):
        self.x = torch.randn(101, 64, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.randn(64)


class Model(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(64, width), nn.Linear(width, width)])
        self.out = nn.Linear(width, 8)

    def forward(self, x):
        for block in self.blocks:
            x = F.dropout(F.gelu(block(x)), 0.1)
        return self.out(x)


class Progress:
    """Counts with the recipe: tracked, it must come back as it was."""

    def __init__(self):
        self.seen, self.sums = 0, {0: (0.0, torch.zeros(3))}

    def state_dict(self):
        return {"seen": self.seen, "sums": self.sums}

    def load_state_dict(self, state):
        self.seen, self.sums = state["seen"], state["sums"]


class Draws:
    """Each rank's own count."""

    def __init__(self, rank):
        self.drawn = [rank]

    def state_dict(self):
        return {"drawn": self.drawn}

    def load_state_dict(self, state):
        self.drawn = [int(number) for number in state["drawn"]]


class Control:
    """What the test has asked for."""

    def __init__(self, rank):
        self.rank = rank
        self.directory = Path(os.environ.get("CONTROL", ""))
        self.waits = [int(step) for step in os.environ.get("WAIT", "").split(",") if step]
        self.saves = 0

    def asked(self, variable, what):
        return not {f"{what}:{self.rank}", f"{what}:*"}.isdisjoint(os.environ.get(variable, "").split(","))

    def wait(self, name):
        (self.directory / f"{name}.{self.rank}").touch()
        while not (self.directory / f"{name}.go").exists():
            time.sleep(0.005)

    def point(self, name):
        if self.asked("HOLD", f"{name}:{self.saves}"):
            self.wait(f"{name}-{self.saves}")

    def install(self, attempt):
        """Put the holds where they belong."""
        start, write_part, check, surplus = Saver.start, saving.write_part, Store.check_current, Store.surplus

        def counted(saver, loop):
            self.saves += 1
            if self.rank == 0:
                with open(self.directory / "begun", "a") as file:
                    file.write(f"{attempt} {saver._run.completed}\n")
            start(saver, loop)

        def held_write(*arguments):
            self.point("write")
            if self.asked("BREAK", self.saves):
                sys.exit("the thread is ended")
            return write_part(*arguments)

        def held_check(store, number):
            check(store, number)
            if sys._getframe(1).f_code.co_name == "publish":
                self.point("publish")

        def held_surplus(store):
            steps = surplus(store)
            self.point("prune")
            return steps

        Saver.start, saving.write_part = counted, held_write
        Store.check_current, Store.surplus = held_check, held_surplus


def train(run: launcher.Run, cfg: Config) -> None:
    control = Control(run.rank)
    if "CONTROL" in os.environ:
        control.install(max(int(path.name) for path in (run.dir / "attempts").iterdir()))
    loader = run.loader(Samples(), batch_size=cfg.batch_size, microbatch_size=cfg.microbatch_size)
    model = run.build(lambda: Model(cfg.width))
    optimizer = run.optimizer(torch.optim.AdamW(model.parameters(), lr=1e-3))
    ema = launcher.EMA(run, model, decay=0.9)
    progress = Progress()
    run.track(progress, "progress")
    run.track(Draws(run.rank), "draws", per_rank=True)
    for step in run.steps(loader, total=cfg.steps):
        if step.index in control.waits:
            control.wait(f"at-{step.index}")
        time.sleep(float(os.environ.get("PACE", "0")))
        if control.asked("RAISE", step.index):
            raise ValueError("the recipe's own")
        for x in step:
            step.backward((model(x) ** 2).sum())
        step.log(grad_norm=step.clip(1.0))
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        progress.seen += cfg.batch_size
        total, last = progress.sums[0]
        progress.sums[0] = (total + 0.5, last + step.index)


if __name__ == "__main__":
    launcher.main(train)
