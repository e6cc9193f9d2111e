"""A recipe with everything that could make a resume inexact: dropout, shuffling, augmentation from three generators."""

import json
import os
import random
import signal
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import launcher


@dataclass(frozen=True)
class Config:
    steps: int = 12
    batch_size: int = 16
    microbatch_size: int = 4
    samples: int = 50  # not a multiple of the batch, so batches run across epochs
    epochs: int = 0
    optimizer: str = "adamw"
    dropout: float = 0.1
    augment: bool = True
    tokens: bool = False  # divide by uneven token counts, told by the loader
    late: bool = False  # the same, told with the loss
    eval_every: int = 4
    batchnorm: bool = False
    block: int = 2
    clip: float = 1.0
    lr: float = 1e-2
    warmup: int = 3
    ema: bool = False


class Samples(torch.utils.data.Dataset):
    """Inputs with noise from torch, numpy and random; targets with an uneven number of counted places."""

    def __init__(self, cfg: Config, stop=None):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(cfg.samples, 8, generator=generator)
        self.y = torch.randn(cfg.samples, 4, generator=generator)
        self.cfg, self.stop = cfg, stop

    def __len__(self):
        return self.cfg.samples

    def __getitem__(self, index):
        if self.stop is not None:
            self.stop(index)
        x = self.x[index].clone()
        if self.cfg.augment:
            x += 0.1 * torch.randn(8) + 0.1 * float(np.random.randn()) + 0.1 * random.gauss(0, 1)
        mask = torch.zeros(4)
        mask[: index % 4 + 1] = 1
        return {"x": x, "y": self.y[index], "mask": mask, "id": index}


class Model(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.into = nn.Linear(8, 32)
        self.norm = nn.BatchNorm1d(32) if cfg.batchnorm else nn.Identity()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Dropout(cfg.dropout)) for _ in range(cfg.block)
        )
        self.out = nn.Linear(32, 4)
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x):
        x = self.norm(self.into(x))
        for block in self.blocks:
            x = x + block(x)
        return self.out(x) * self.frozen


def train(run: launcher.Run, cfg: Config) -> None:
    # What is done to this process is in the environment, not in the options: a rerun has the same options.
    wanted = os.environ.get("STRIKE", "")

    def strike(where: str, step: int) -> None:
        """Send this process the signal that STRIKE=name:where:step:rank asks for."""
        for number in signal.Signals:
            if wanted == f"{number.name}:{where}:{step}:{run.rank}":
                os.kill(os.getpid(), number)

    attempt = json.loads((run.dir / "run.json").read_text())["attempt"]
    now = [0]
    data = Samples(cfg, stop=lambda _: strike("data", now[0]))

    def counted(batch):
        return int(batch["mask"].sum())

    loader = run.loader(
        data, batch_size=cfg.batch_size, microbatch_size=cfg.microbatch_size, count=counted if cfg.tokens else None
    )
    held_out = run.loader(Samples(cfg), batch_size=8, shuffle=False)
    model = run.build(lambda: Model(cfg))
    trainable = [p for p in model.parameters() if p.requires_grad]
    inner = (
        torch.optim.AdamW(trainable, lr=cfg.lr) if cfg.optimizer == "adamw" else torch.optim.SGD(trainable, lr=cfg.lr)
    )
    optimizer = run.optimizer(inner)
    ema = launcher.EMA(run, model, decay=0.9) if cfg.ema else None
    strike("setup", 0)

    def score(batch):
        strike("evaluation", now[0])
        return {"held_out": (((model(batch["x"]) - batch["y"]) ** 2).sum(), len(batch["x"]))}

    record = open(run.dir / f"ids-{attempt}-{run.rank}.jsonl", "w")  # noqa: SIM115
    ends = {"epochs": cfg.epochs} if cfg.epochs else {"total": cfg.steps}
    for step in run.steps(loader, **ends):
        now[0] = step.index
        if step.every(cfg.eval_every):
            step.log(**run.average(score, held_out))
        launcher.set_lr(optimizer, cfg.lr * launcher.warmup_cosine(step.index, cfg.steps, cfg.warmup))
        for j, batch in enumerate(step):
            if step.local_count:
                index = run.rank + j * run.world_size
                record.write(json.dumps({"step": step.index, "micro": index, "ids": batch["id"].tolist()}) + "\n")
                record.flush()
            strike("body", step.index)
            if cfg.tokens or cfg.late:
                loss = (F.mse_loss(model(batch["x"]), batch["y"], reduction="none") * batch["mask"]).sum()
                step.backward(loss, batch["mask"].sum()) if cfg.late else step.backward(loss)
            else:
                step.backward(F.mse_loss(model(batch["x"]), batch["y"], reduction="sum"))
        step.log(grad_norm=step.clip(cfg.clip) if cfg.clip else 0.0)
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update()
    if ema is not None:
        with ema.swapped():
            run.log(**run.average(score, held_out))
    if cfg.eval_every:
        run.log(**run.average(score, held_out))
    record.close()


if __name__ == "__main__":
    launcher.main(train)
