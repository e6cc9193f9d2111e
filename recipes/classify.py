"""Classify images: scikit-learn's digits by default, any labelled images by options.

$ python recipes/classify.py
$ python recipes/classify.py --data.name zalando-datasets/fashion_mnist --data.size 28 --epochs 5
$ accelerate launch recipes/classify.py --data.folder photos --data.size 64 --data.channels 3
$ launcher run --nproc 2 recipes/classify.py
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import launcher


@dataclass(frozen=True)
class DataConfig:
    name: str | None = None  # an image dataset on the Hugging Face Hub, with a train and a test split
    folder: str | None = None  # local images, folder/train/LABEL/*.png and folder/test/LABEL/*.png
    size: int = 8  # pixels a side; images are scaled to it
    channels: int = 1  # 1: grey, 3: colour
    shift: int = 1  # pixels, up or down and sideways, by which training images are moved at most
    noise: float = 0.05  # its standard deviation, on training images with values in [0, 1]


@dataclass(frozen=True)
class Config:
    data: DataConfig = DataConfig()
    epochs: int = 20
    batch_size: int = 64  # images per optimizer step, over all GPUs
    microbatch_size: int = 32  # images per forward pass, on one GPU
    lr: float = 1e-2
    warmup: int = 20  # steps
    weight_decay: float = 0.05
    width: int = 32  # channels of the first convolution
    dropout: float = 0.1
    eval_every: int = 100  # steps


def check(cfg: Config) -> None:
    """Refuse numbers that no run can have."""
    numbers = {
        "data.size": (cfg.data.size, 1),
        "data.shift": (cfg.data.shift, 0),
        "data.noise": (cfg.data.noise, 0),
        "lr": (cfg.lr, 0),
        "warmup": (cfg.warmup, 0),
        "weight-decay": (cfg.weight_decay, 0),
        "width": (cfg.width, 1),
    }
    for option, (value, least) in numbers.items():
        if not value >= least:  # nan is not either
            raise launcher.UsageError(f"--{option} {value}: give at least {least}")
    if cfg.data.channels not in (1, 3):
        raise launcher.UsageError(f"--data.channels {cfg.data.channels}: give 1 (grey) or 3 (colour)")
    if not 0 <= cfg.dropout < 1:
        raise launcher.UsageError(f"--dropout {cfg.dropout}: give at least 0 and less than 1")


Batch = tuple[Tensor, Tensor]  # images [n, channels, size, size], labels [n]


class Images(Dataset[tuple[Tensor, int]]):
    """Images [channels, size, size] with values in [0, 1] and labels, from rows that have `image` and `label`."""

    def __init__(self, rows: Sequence[dict[str, Any]], data: DataConfig, *, augment: bool) -> None:
        self.rows, self.data, self.augment = rows, data, augment

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]
        image = torch.from_numpy(pixels(row["image"], self.data))
        if self.augment:  # the launcher seeds every sample's draws, so any generator will do
            most = self.data.shift
            image = shift(image, random.randint(-most, most), int(np.random.randint(-most, most + 1)))
            image = image + self.data.noise * torch.randn(image.shape)
        return image, row["label"]


def pixels(image: Any, data: DataConfig) -> np.ndarray[Any, Any]:
    """An array as it is, or a PIL image scaled to the size asked for."""
    if isinstance(image, np.ndarray):
        return image
    scaled = image.convert("L" if data.channels == 1 else "RGB").resize((data.size, data.size))
    return np.asarray(scaled, np.float32).reshape(data.size, data.size, -1).transpose(2, 0, 1) / 255


def shift(image: Tensor, down: int, right: int) -> Tensor:
    """An image [channels, height, width] moved, black where nothing is left."""
    height, width = image.shape[1:]
    most = max(abs(down), abs(right))
    padded = F.pad(image, [most] * 4)
    return padded[:, most - down : most - down + height, most - right : most - right + width]


def digits(data: DataConfig) -> tuple[Images, Images, int]:
    """1,797 digits of 8 x 8, of which 360 are held out, always the same."""
    if (data.size, data.channels) != (8, 1):
        raise launcher.UsageError(
            "the digits have 8 x 8 grey pixels: drop --data.size and --data.channels, or name data"
        )
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise launcher.UsageError("the digits need scikit-learn: pip install 'launcher[recipes]'") from None
    loaded = load_digits()
    images = (loaded.images[:, None] / 16).astype(np.float32)
    rows = [{"image": image, "label": int(label)} for image, label in zip(images, loaded.target, strict=True)]
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    train, test = [rows[k] for k in order[360:]], [rows[k] for k in order[:360]]
    return Images(train, data, augment=True), Images(test, data, augment=False), 10


def labelled(data: DataConfig) -> tuple[Images, Images, int]:
    """The train and test split of a dataset of the Hub, or of a folder, and its number of classes."""
    import datasets

    source = data.folder or data.name
    try:
        if data.folder is not None:
            splits = datasets.load_dataset("imagefolder", data_dir=data.folder)
        else:
            splits = datasets.load_dataset(data.name)
    except (OSError, ValueError) as error:  # not found, not reachable, or no images: datasets says which, at length
        raise launcher.UsageError(f"cannot load images from {source}: {str(error).splitlines()[0]}") from None
    if not {"train", "test"} <= set(splits):
        raise launcher.UsageError(f"{source} has the splits {', '.join(splits)}: a train and a test split are needed")
    columns = splits["train"].features
    image = next((name for name, kind in columns.items() if isinstance(kind, datasets.Image)), None)
    label = next((name for name, kind in columns.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image is None or label is None:
        raise launcher.UsageError(f"{source} needs a column of images and one of labels: it has {', '.join(columns)}")
    classes = columns[label].num_classes
    splits = splits.rename_columns({image: "image", label: "label"}).select_columns(["image", "label"])
    return Images(splits["train"], data, augment=True), Images(splits["test"], data, augment=False), classes


class Classifier(nn.Module):
    """Three convolutions, averaged over the image, and a linear layer. No BatchNorm: it would couple a micro-batch."""

    def __init__(self, cfg: Config, classes: int) -> None:
        super().__init__()
        width = cfg.width
        self.layers = nn.Sequential(
            nn.Conv2d(cfg.data.channels, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
            nn.GELU(),
        )
        self.dropout = nn.Dropout(cfg.dropout)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, image: Tensor) -> Tensor:
        features = self.layers(image).mean(dim=(2, 3))
        return self.head(self.dropout(features))  # type: ignore[no-any-return]


def evaluate(run: launcher.Run, model: Classifier, held_out: launcher.Loader[Batch]) -> dict[str, float]:
    """Loss and accuracy over all test images."""

    def score(batch: Batch) -> dict[str, tuple[Tensor, int]]:
        image, label = batch
        logits = model(image)
        loss = F.cross_entropy(logits, label, reduction="sum")
        right = (logits.argmax(-1) == label).sum()
        return {"test_loss": (loss, len(label)), "test_accuracy": (right, len(label))}

    return run.average(score, held_out)


def train(run: launcher.Run, cfg: Config) -> None:
    check(cfg)
    default = cfg.data.name is None and cfg.data.folder is None
    train_set, test_set, classes = digits(cfg.data) if default else labelled(cfg.data)
    images: launcher.Loader[Batch] = run.loader(
        train_set, batch_size=cfg.batch_size, microbatch_size=cfg.microbatch_size
    )
    held_out: launcher.Loader[Batch] = run.loader(test_set, batch_size=cfg.batch_size, shuffle=False)
    model = run.build(lambda: Classifier(cfg, classes))
    optimizer = run.optimizer(
        torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    )

    for step in run.steps(images, epochs=cfg.epochs):
        if step.every(cfg.eval_every):
            step.log(**evaluate(run, model, held_out))
        launcher.set_lr(optimizer, cfg.lr * launcher.warmup_cosine(step.index, step.total, cfg.warmup))
        for image, label in step:
            step.backward(F.cross_entropy(model(image), label, reduction="sum"))
        step.log(grad_norm=step.clip(1.0))
        optimizer.step()
        optimizer.zero_grad()
    scores = evaluate(run, model, held_out)
    run.log(**scores)
    run.print(f"test accuracy {scores['test_accuracy']:.1%}, loss {scores['test_loss']:.3f}")


if __name__ == "__main__":
    launcher.main(train)
