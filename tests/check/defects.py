"""Copies of the shipped recipes with one mistake planted in each, of the kinds that people make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.harness import ROOT

__all__ = ["DEFECTS", "SMALL", "Defect", "plant"]

# Options that make a recipe small enough for a test.
SMALL = {
    "classify": ("--width", "4"),
    "finetune": ("--data.max-length", "64"),
    "gpt": (
        *("--model.depth", "2", "--model.width", "32", "--model.heads", "2", "--data.seq-len", "32"),
        *("--sample-tokens", "2"),
    ),
}


@dataclass(frozen=True)
class Defect:
    """A mistake, what finds it, and the words that a person must be told."""

    recipe: str
    edits: tuple[tuple[str, str], ...]
    """What stands in the recipe, and what is put in its place."""
    only: str
    """What of the check is run."""
    row: str
    """The row that fails."""
    told: str
    advice: str


CONVOLUTION = "            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),\n"
DROP = "        optimizer.zero_grad()\n"
LOADER = "    images: launcher.Loader"
LOOP = "        for image, label in step:\n"
IMAGE = "        row = self.rows[index]\n"

DEFECTS = {
    "a loss averaged": Defect(
        "gpt",
        ((', reduction="sum")\n', ").mean()\n"),),
        "accumulation",
        "3 uneven micro-batches",
        "of the reference",
        "about 3 = the step's micro-batches: the loss is averaged over its micro-batch: return the SUM",
    ),
    "a mean over the tokens of a padded micro-batch": Defect(
        "finetune",
        ((', reduction="sum")\n', ") * 1.0\n"),),
        "ddp",
        "2 processes (DDP)",
        "of the reference",
        "the loss is averaged over its micro-batch: return the SUM",
    ),
    "reduction forgotten": Defect(
        "classify",
        (
            (
                'step.backward(F.cross_entropy(model(image), label, reduction="sum"))',
                "step.backward(F.cross_entropy(model(image), label))",
            ),
        ),
        "accumulation",
        "3 uneven micro-batches",
        "of the reference",
        "return the SUM (reduction='sum')",
    ),
    "weights that depend on the rank": Defect(
        "classify",
        (
            (
                "    model = run.build(lambda: Classifier(cfg, classes))\n",
                "    model = run.build(lambda: (torch.manual_seed(run.rank), Classifier(cfg, classes))[1])\n",
            ),
        ),
        "ranks",
        "initial weights",
        "model/layers.0.weight begins with other values on rank 1",
        "the weights depend on the rank",
    ),
    "BatchNorm that is not synchronised": Defect(
        "classify",
        (
            (
                CONVOLUTION,
                CONVOLUTION + "            nn.BatchNorm2d(2 * width),\n",
            ),
        ),
        "ranks,accumulation",
        "buffers",
        "model/layers.3.running_mean drifts apart",
        "layers.3 is a BatchNorm that is not synchronised",
    ),
    "Python's random in the dataset": Defect(
        "classify",
        (
            (
                "            image = shift(image, random.randint(-most, most)",
                "            image = shift(image, random.Random().randint(-most, most)",
            ),
        ),
        "determinism",
        "the same run twice",
        "holds other data each time",
        "a generator of the dataset's own",
    ),
    "a stateful sampler": Defect(
        "classify",
        (
            (
                IMAGE,
                "        self.at = getattr(self, 'at', -1) + 1\n        row = self.rows[self.at % len(self.rows)]\n",
            ),
        ),
        "ddp,resume",
        "2 processes (DDP)",
        "holds other data on rank",
        "a position that it keeps",
    ),
    "an average of the weights that is not saved": Defect(
        "classify",
        (
            (
                "    for step in run.steps(",
                "    ema = {name: p.detach().clone() for name, p in model.named_parameters()}\n"
                "    for step in run.steps(",
            ),
            (
                DROP,
                DROP
                + "        for name, p in model.named_parameters():\n            ema[name].lerp_(p.detach(), 0.1)\n",
            ),
        ),
        "resume",
        "what the recipe holds",
        "ema (dict) is not what it was, after a resume",
        "run.track(obj), an average of weights as launcher.EMA(run, model)",
    ),
    "a parameter that some ranks do not use": Defect(
        "classify",
        (
            (
                "        self.head = nn.Linear",
                "        self.extra = nn.Linear(4 * width, classes)\n        self.head = nn.Linear",
            ),
            (
                "        return self.head(self.dropout(features))",
                "        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 0:\n"
                "            return self.head(self.dropout(features)) + self.extra(features)\n"
                "        return self.head(self.dropout(features))",
            ),
        ),
        "ranks",
        "gradients",
        "model/extra.bias takes no part on rank 1",
        "find_unused_parameters=True",
    ),
    "data split by rank on top of the launcher's deal": Defect(
        "classify",
        (
            (
                LOADER,
                "    mine = train_set.rows[run.rank :: run.world_size]\n"
                "    train_set = Images(mine, cfg.data, augment=True)\n" + LOADER,
            ),
        ),
        "ddp",
        "2 processes (DDP)",
        "'loader' has 719 samples on rank 0 of 2, and 1437 alone",
        "the recipe splits the data by rank",
    ),
    "a learning rate from a clock": Defect(
        "classify",
        (
            ("cfg.lr * launcher.warmup_cosine(", "cfg.lr * (time.time() % 1.0) * launcher.warmup_cosine("),
            ("import random\n", "import random\nimport time\n"),
        ),
        "determinism",
        "the same run twice",
        "the optimizer is given lr",
        "a pure function of step.index",
    ),
    "zero_grad within the accumulation": Defect(
        "classify",
        ((LOOP, LOOP + "            optimizer.zero_grad()\n"),),
        "accumulation",
        "3 uneven micro-batches",
        "the gradients of earlier micro-batches are gone",
        "call it after the loop",
    ),
    "zero_grad between backward and step": Defect(
        "classify",
        (
            (
                "        optimizer.step()\n        optimizer.zero_grad()\n",
                "        optimizer.zero_grad()\n        optimizer.step()\n",
            ),
        ),
        "accumulation",
        "1 process, 1 micro-batch",
        "no parameter has a gradient at optimizer.step",
        "call it after optimizer.step()",
    ),
}


def plant(defect: Defect, directory: Path) -> Path:
    """A copy of the recipe with the mistake in it."""
    text = (ROOT / "recipes" / f"{defect.recipe}.py").read_text()
    for old, new in defect.edits:
        assert text.count(old) == 1, f"{defect.recipe}.py has {text.count(old)} times {old!r}"
        text = text.replace(old, new)
    path = directory / f"{defect.recipe}.py"
    path.write_text(text)
    return path
