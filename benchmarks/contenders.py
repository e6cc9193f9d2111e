"""The loops that overhead.py compares: one model, data and optimizer, and each contender's own way to train them.

Started by overhead.py, a process each: `python contenders.py NAME SOCKET DIRECTORY DATA SAVE_EVERY`. The model is
where the clock is: a step is from one forward pass to the next, whoever owns the loop.
"""

from __future__ import annotations

import gc
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from turns import Clock

BATCH, LOG_EVERY = 64, 10
SAMPLES, INPUTS, CLASSES = 32_768, 784, 10
FOREVER = 1_000_000  # steps: overhead.py ends the process


class MLP(nn.Module):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.layers = nn.Sequential(
            nn.Linear(INPUTS, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.tick()
        return self.layers(x)


@dataclass
class Job:
    clock: Clock
    directory: Path
    x: torch.Tensor
    y: torch.Tensor
    save_every: int

    def model(self) -> MLP:
        torch.manual_seed(0)
        return MLP(self.clock)

    def loader(self) -> torch.utils.data.DataLoader:
        """The fastest that a peer can be given: a DataLoader whose dataset reads a batch in one slice."""
        data = Slices(self.x, self.y)
        return torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True, drop_last=True, collate_fn=as_is)


class Slices(torch.utils.data.Dataset):
    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, samples: list[int]) -> dict[str, torch.Tensor]:
        index = torch.tensor(samples)
        return {"x": self.x.index_select(0, index), "labels": self.y.index_select(0, index)}


def as_is(batch):
    return batch


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def bare(job: Job, collect_every: int = FOREVER) -> None:
    """A plain torch loop over slices of the tensors: no log, no save."""
    model = job.model()
    optimizer = adamw(model)
    while True:
        order = torch.randperm(len(job.x))
        for step, index in enumerate(order[: len(job.x) // BATCH * BATCH].split(BATCH), 1):
            if step % collect_every == 0:
                gc.collect()
            x, y = job.x.index_select(0, index), job.y.index_select(0, index)  # a fifth of the time of x[index]
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def collecting(job: Job) -> None:
    """The bare loop with the `gc.collect()` every 10 steps that is found in many: what that costs."""
    bare(job, collect_every=LOG_EVERY)


def ours(job: Job) -> None:
    """A recipe: metrics.jsonl and a progress line every 10 steps, whole checkpoints, the last two kept."""
    import launcher

    def train(run: launcher.Run) -> None:
        loader = run.loader((job.x, job.y), batch_size=BATCH)
        model = run.build(job.model)
        optimizer = run.optimizer(adamw(model))
        for step in run.steps(loader, total=FOREVER):
            for x, y in step:
                step.backward(F.cross_entropy(model(x), y, reduction="sum"))
            optimizer.step()
            optimizer.zero_grad()

    options = {"dir": job.directory / "run", "log-every": LOG_EVERY, "save-every": job.save_every, "threads": 1}
    sys.argv[1:] = [str(word) for name, value in options.items() for word in (f"--run.{name}", value)]
    launcher.main(train)


def accelerate(job: Job) -> None:
    """The loop of its documentation: no log, no save."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = job.model()
    model, optimizer, loader = accelerator.prepare(model, adamw(model), job.loader())
    while True:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(batch["x"]), batch["labels"])
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()


def fabric(job: Job) -> None:
    """The loop of its documentation: no log, no save."""
    from lightning.fabric import Fabric

    handle = Fabric(accelerator="cpu", devices=1)
    model = job.model()
    model, optimizer = handle.setup(model, adamw(model))
    loader = handle.setup_dataloaders(job.loader())
    while True:
        for batch in loader:
            loss = F.cross_entropy(model(batch["x"]), batch["labels"])
            handle.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


def lightning(job: Job) -> None:
    """Trainer with a CSV log and a progress bar every 10 steps, and whole checkpoints, the last one kept."""
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
    from lightning.pytorch.loggers import CSVLogger

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model()

        def training_step(self, batch, _):
            loss = F.cross_entropy(self.model(batch["x"]), batch["labels"])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return adamw(self)

    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=FOREVER,
        log_every_n_steps=LOG_EVERY,
        logger=CSVLogger(job.directory),
        callbacks=[
            TQDMProgressBar(refresh_rate=LOG_EVERY),
            ModelCheckpoint(job.directory / "checkpoints", every_n_train_steps=job.save_every),
        ],
    )
    trainer.fit(Module(), job.loader())


def hf(job: Job) -> None:
    """Trainer with its log and progress bar every 10 steps, and whole checkpoints, the last two kept."""
    import transformers

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model()

        def forward(self, x, labels):
            return {"loss": F.cross_entropy(self.model(x), labels)}

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self):
            return self.accelerator.prepare(job.loader())

    model = Model()
    optimizer = adamw(model)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    options = transformers.TrainingArguments(
        output_dir=str(job.directory),
        use_cpu=True,
        max_steps=FOREVER,
        per_device_train_batch_size=BATCH,
        max_grad_norm=0.0,
        logging_steps=LOG_EVERY,
        save_steps=job.save_every,
        save_total_limit=2,
        report_to="none",
    )
    Trainer(model, options, train_dataset=Slices(job.x, job.y), optimizers=(optimizer, constant)).train()


CONTENDERS = {
    "bare": bare,
    "control": bare,
    "collecting": collecting,
    "launcher": ours,
    "accelerate": accelerate,
    "fabric": fabric,
    "lightning": lightning,
    "hf": hf,
}


def main() -> None:
    name, number, directory, data, save_every = sys.argv[1:]
    train = CONTENDERS[name]
    torch.set_num_threads(1)
    x = torch.from_file(data, shared=True, size=SAMPLES * INPUTS).view(SAMPLES, INPUTS)
    y = torch.arange(SAMPLES) % CLASSES
    clock = Clock(socket.socket(fileno=int(number)))
    train(Job(clock, Path(directory), x, y, int(save_every)))


if __name__ == "__main__":
    main()
