"""One step of a small model, as each contender's user writes it: `python start.py NAME`; see startup.py.

Rank 0 writes down when the step is done, in the file that STEPPED names.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def stepped() -> None:
    if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
        Path(os.environ["STEPPED"]).write_text(str(time.time()))


def data():
    import torch

    return torch.randn(64, 8), torch.randint(0, 2, (64,))


def ours() -> None:
    import torch
    import torch.nn.functional as F
    from torch import nn

    import launcher

    def train(run: launcher.Run) -> None:
        loader = run.loader(data(), batch_size=32 * run.world_size, microbatch_size=32)
        model = run.build(lambda: nn.Linear(8, 2))
        optimizer = run.optimizer(torch.optim.AdamW(model.parameters()))
        for step in run.steps(loader, total=1):
            for x, y in step:
                step.backward(F.cross_entropy(model(x), y, reduction="sum"))
            optimizer.step()
            optimizer.zero_grad()
            stepped()

    sys.argv[1:] = ["--run.dir", os.environ["STEPPED"] + "-run"]
    launcher.main(train)


def accelerate() -> None:
    import torch
    import torch.nn.functional as F
    from accelerate import Accelerator
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    accelerator = Accelerator(cpu=True)
    model = nn.Linear(8, 2)
    loader = DataLoader(TensorDataset(*data()), batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
    for x, y in loader:
        accelerator.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        break
    stepped()
    accelerator.end_training()


def bare() -> None:
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import nn

    model = nn.Linear(8, 2)
    if many := "RANK" in os.environ:
        dist.init_process_group("gloo")
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    x, y = data()
    F.cross_entropy(model(x[:32]), y[:32]).backward()
    optimizer.step()
    optimizer.zero_grad()
    stepped()
    if many:
        dist.destroy_process_group()


def lightning() -> None:
    import lightning as L
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(8, 2)

        def training_step(self, batch, _):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def on_train_batch_end(self, *_) -> None:
            stepped()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    number = int(os.environ["PROCESSES"])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="cpu", devices=number, strategy="ddp" if number > 1 else "auto", max_steps=1, **quiet
    )
    trainer.fit(Module(), DataLoader(TensorDataset(*data()), batch_size=32, shuffle=True))


if __name__ == "__main__":
    {"launcher": ours, "accelerate": accelerate, "bare": bare, "lightning": lightning}[os.environ["CONTENDER"]]()
