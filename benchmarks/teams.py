"""The loops that ddp.py compares, two ranks each: one model, data and optimizer, and each contender's own way.

Started by ddp.py, a process a rank: `python teams.py NAME SOCKET DIRECTORY DATA SAVE_EVERY`. The model is where the
clock is: a step lasts from its first forward pass to that of the next, whoever owns the loop.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from ddp import ACCUMULATION, COMPARED, LENGTH, LOG_EVERY, MODEL, RANKS, ROWS, SAMPLES, VOCABULARY
from torch import Tensor, nn
from turns import Clock

from recipes.gpt import GPT, ModelConfig

TOKENS = ROWS * LENGTH
"""That a micro-batch predicts."""
BATCH = ROWS * ACCUMULATION * RANKS
LR, CLIP = 1e-3, 1.0
FOREVER = 1_000_000  # steps: ddp.py ends the processes


class Timed(nn.Module):
    """The recipe's model, with the clock in it; it writes down the losses of the first steps."""

    def __init__(self, clock: Clock, losses: Path) -> None:
        super().__init__()
        self.clock, self.file = clock, losses
        self.losses: list[Tensor] = []
        self.gpt = GPT(ModelConfig(**MODEL), VOCABULARY, LENGTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """The sum of the losses over rows of `LENGTH + 1` tokens."""
        self.clock.tick()
        loss: Tensor = self.gpt(tokens[:, :-1], tokens[:, 1:])
        if len(self.losses) < COMPARED * ACCUMULATION:
            self.losses.append(loss.detach())
            if len(self.losses) == COMPARED * ACCUMULATION:
                self.file.write_text(json.dumps([one.item() / TOKENS for one in self.losses]))
        return loss


@dataclass
class Job:
    clock: Clock
    directory: Path
    tokens: Tensor
    """[SAMPLES, LENGTH + 1]"""
    save_every: int
    rank: int

    def model(self) -> Timed:
        torch.manual_seed(0)
        return Timed(self.clock, self.directory / f"losses-{self.rank}.json")

    def loader(self) -> torch.utils.data.DataLoader:
        """The fastest that a peer can be given: a DataLoader whose dataset reads a micro-batch in one slice."""
        return torch.utils.data.DataLoader(Rows(self.tokens), batch_size=ROWS, drop_last=True, collate_fn=as_is)


class Rows(torch.utils.data.Dataset):
    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        return {"tokens": self.tokens.index_select(0, torch.tensor(rows))}


def as_is(batch):
    return batch


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, fused=True)


def microbatches(job: Job) -> Iterator[list[Tensor]]:
    """Of each step, this rank's rows: micro-batch j belongs to rank j modulo the number of ranks."""
    for step in itertools.count():
        start = step * BATCH % SAMPLES
        yield list(job.tokens[start : start + BATCH].split(ROWS)[job.rank :: RANKS])


def bare(job: Job) -> None:
    """DDP by hand over slices of the tensor: gradients live in DDP's buckets, and are reduced once a step."""
    torch.distributed.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(job.model(), gradient_as_bucket_view=True, broadcast_buffers=False)
    parameters = list(model.parameters())
    optimizer = adamw(model)
    for first, *others in (reversed(rows) for rows in microbatches(job)):  # the last one apart: it reduces
        with model.no_sync():
            for tokens in reversed(others):
                (model(tokens) / (ACCUMULATION * TOKENS)).backward()
        (model(first) / (ACCUMULATION * TOKENS)).backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()


def ours(job: Job) -> None:
    """A recipe: metrics.jsonl and a progress line every 5 steps, whole checkpoints, the last two kept."""
    import launcher

    def train(run: launcher.Run) -> None:
        rows = run.loader(
            {"tokens": job.tokens},
            batch_size=BATCH,
            microbatch_size=ROWS,
            shuffle=False,
            count=lambda batch: batch["tokens"][:, 1:].numel(),
            unit="tokens",
        )
        model = run.build(job.model)
        optimizer = run.optimizer(adamw(model))
        for step in run.steps(rows, total=FOREVER):
            for batch in step:
                step.backward(model(batch["tokens"]))
            step.log(grad_norm=step.clip(CLIP))
            optimizer.step()
            optimizer.zero_grad()

    options = {"dir": job.directory / "run", "log-every": LOG_EVERY, "save-every": job.save_every, "threads": 1}
    sys.argv[1:] = [str(word) for name, value in options.items() for word in (f"--run.{name}", value)]
    launcher.main(train)


def accelerate(job: Job) -> None:
    """The loop of its documentation for gradient accumulation: no log, no save."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    assert accelerator.num_processes == RANKS
    model = job.model()
    model, optimizer, loader = accelerator.prepare(model, adamw(model), job.loader())
    while True:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(batch["tokens"]) / TOKENS
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()


def hf(job: Job) -> None:
    """Trainer with its log and progress bar every 5 steps, and whole checkpoints, the last two kept."""
    import transformers

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model()

        def forward(self, tokens):
            return {"loss": self.model(tokens) / TOKENS}

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self):
            return self.accelerator.prepare(job.loader())

    model = Model()
    optimizer = adamw(model)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    options = transformers.TrainingArguments(
        output_dir=str(job.directory),
        use_cpu=True,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
        max_steps=FOREVER,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=ACCUMULATION,
        max_grad_norm=CLIP,
        logging_steps=LOG_EVERY,
        save_steps=job.save_every,
        save_total_limit=2,
        report_to="none",
        remove_unused_columns=False,
    )
    Trainer(model, options, train_dataset=Rows(job.tokens), optimizers=(optimizer, constant)).train()


TEAMS = {"bare": bare, "control": bare, "launcher": ours, "accelerate": accelerate, "hf": hf}


def main() -> None:
    name, number, directory, data, save_every = sys.argv[1:]
    torch.set_num_threads(1)
    tokens = torch.from_file(data, shared=True, size=SAMPLES * (LENGTH + 1), dtype=torch.int64).view(SAMPLES, -1)
    clock = Clock(socket.socket(fileno=int(number)), ACCUMULATION)
    TEAMS[name](Job(clock, Path(directory), tokens, int(save_every), int(os.environ["RANK"])))


if __name__ == "__main__":
    main()
