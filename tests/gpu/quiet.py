"""A recipe in which any operation that makes the host wait for the GPU is an error, for most of its steps."""

from dataclasses import dataclass
from typing import Literal

import datasets
import torch
import torch.nn.functional as F
from torch import nn

import launcher


@dataclass(frozen=True)
class Config:
    steps: int = 30
    first: int = 5  # steps that may wait: allocators and compilers settle
    last: int = 25
    fused: bool = False
    source: Literal["tensors", "arrow", "items"] = "tensors"
    wait: bool = False  # wait after all, to see that this is noticed


class Items(torch.utils.data.Dataset):
    def __init__(self, tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors["y"])

    def __getitem__(self, index):
        return {name: tensor[index] for name, tensor in self.tensors.items()}


def source(cfg: Config):
    generator = torch.Generator().manual_seed(1)
    tensors = {"x": torch.randn(100, 32, generator=generator), "y": torch.randint(10, (100,), generator=generator)}
    if cfg.source == "items":
        return Items(tensors)
    if cfg.source == "arrow":
        columns = {"x": datasets.Sequence(datasets.Value("float32"), length=32), "y": datasets.Value("int64")}
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        return datasets.Dataset.from_dict(arrays, features=datasets.Features(columns))
    return tensors


def train(run: launcher.Run, cfg: Config) -> None:
    loader = run.loader(source(cfg), batch_size=24, microbatch_size=8, count=lambda batch: int((batch["y"] > 0).sum()))
    model = run.build(
        lambda: nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 10))
    )
    optimizer = run.optimizer(torch.optim.AdamW(model.parameters(), fused=cfg.fused))
    for step in run.steps(loader, total=cfg.steps):
        if step.index == cfg.first:
            torch.cuda.set_sync_debug_mode("error")
        if step.index == cfg.last:
            torch.cuda.set_sync_debug_mode("default")
        launcher.set_lr(optimizer, 1e-3 * launcher.warmup_cosine(step.index, cfg.steps, 5))
        for batch in step:
            loss = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none") * (batch["y"] > 0)
            step.backward(loss.sum())
        norm = step.clip(1.0)
        step.log(grad_norm=norm.item() if cfg.wait else norm)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    launcher.main(train)
