"""What the loops of gpu.py have in common: the model and the rows of recipes/gpt.py, the clock, the optimizer.

    python gpt_common.py OPTIONS...     make the rows, and print the model's facts as JSON

Every contender reads the same rows: those that the recipe packs; who maps them into memory, as a plain array.
"""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
RECIPE = ROOT / "recipes" / "gpt.py"
FOREVER = 1_000_000  # steps: gpu.py ends the process
LOG_EVERY = 10


def load_recipe() -> ModuleType:
    """recipes/gpt.py as a module."""
    spec = importlib.util.spec_from_file_location("gpt_recipe", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpt_recipe"] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


@dataclass
class Job:
    """A contender's work, and how it is told to do it."""

    recipe: ModuleType
    cfg: Any
    settings: Any
    device: torch.device
    directory: Path

    @property
    def accumulate(self) -> int:
        """Micro-batches a step."""
        return self.cfg.batch_size // self.cfg.microbatch_size

    def model(self) -> nn.Module:
        """The recipe's model, in fp32, on the CPU."""
        torch.manual_seed(0)
        tokenizer = self.recipe.Tokenizer.from_file(str(self.prepared / "tokenizer.json"))
        end = tokenizer.token_to_id(self.cfg.data.end_of_text)
        sizes = tokenizer.get_vocab_size(), self.cfg.data.seq_len
        model: nn.Module = self.recipe.GPT(self.cfg.model, *sizes, end_of_text=end, compiled=self.compiled)
        return model

    @property
    def prepared(self) -> Path:
        """The directory with the recipe's rows, which are there by now."""
        path: Path = self.recipe.prepare(self.cfg.data)
        return path

    def rows(self) -> np.ndarray[Any, Any]:
        """Rows of tokens [n, seq_len + 1], mapped into memory."""
        path = self.prepared / "train.npy"
        if not path.exists():
            tokens = self.recipe.load(self.prepared, "train").with_format("numpy")[:]["tokens"]
            partial = path.with_suffix(".partial.npy")
            np.save(partial, tokens.astype(np.uint16 if tokens.max() < 1 << 16 else np.int32))
            partial.rename(path)
        mapped: np.ndarray[Any, Any] = np.load(path, mmap_mode="r")
        return mapped

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The recipe's AdamW, fused."""
        wide, narrow = ([p for p in model.parameters() if (p.dim() >= 2) == large] for large in (True, False))
        decayed = {"params": wide, "weight_decay": self.cfg.weight_decay}
        groups = [decayed, {"params": narrow, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.cfg.lr, betas=(0.9, 0.95), fused=True)

    @property
    def compiled(self) -> bool:
        """Whether the model is to be compiled, whole."""
        return self.settings.compile not in (None, "off")


class Rows(torch.utils.data.Dataset[Any]):
    """The rows for a DataLoader, read a micro-batch at a time: the fastest that a peer can be given."""

    def __init__(self, rows: np.ndarray[Any, Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, samples: list[int]) -> dict[str, torch.Tensor]:
        return {"tokens": torch.from_numpy(self.rows[samples].astype(np.int64))}


def as_is(batch: Any) -> Any:
    """A batch that is one already."""
    return batch


class Scored(nn.Module):
    """The recipe's model as a Trainer wants it: rows in, the mean loss out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tokens [rows, seq_len + 1]."""
        return {"loss": self.model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()}


def start() -> Job:
    """This process's job, by its arguments SOCKET DIRECTORY OPTIONS...; the clock is set on every optimizer."""
    from gpu_turns import Clock
    from torch.optim.optimizer import register_optimizer_step_post_hook

    number, directory, *options = sys.argv[1:]
    cuda = torch.cuda.is_available()
    wait = torch.cuda.synchronize if cuda else lambda: None
    clock = Clock(socket.socket(fileno=int(number)), wait, _memory if cuda else dict)
    register_optimizer_step_post_hook(clock.tick)
    recipe = load_recipe()
    cfg, settings = read(recipe, options)
    if settings.precision == "bf16":
        torch.set_float32_matmul_precision("high")  # as the launcher sets it
    return Job(recipe, cfg, settings, torch.device("cuda" if cuda else "cpu"), Path(directory))


def read(recipe: ModuleType, options: list[str]) -> tuple[Any, Any]:
    """The recipe's config and the run's."""
    from launcher.config import parse

    return parse(recipe.Config, options, prog="gpt.py", description=None)


def _memory() -> dict[str, Any]:
    return {
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "reserved_gb": round(torch.cuda.memory_reserved() / 1e9, 2),
    }


def main() -> None:
    recipe = load_recipe()
    cfg, settings = read(recipe, sys.argv[1:])
    job = Job(recipe, cfg, settings, torch.device("meta"), Path())
    rows = job.rows()
    with torch.device("meta"):
        model = job.model()
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "rows": len(rows)}
    print(json.dumps(facts | {"flops_per_token": model.flops_per_token(cfg.data.seq_len)}))


if __name__ == "__main__":
    main()
