"""Train a decoder-only language model on text: small by default, of GPT-2's shape by options.

$ python recipes/gpt.py
$ python recipes/gpt.py --data.files shakespeare.txt --prompt "ROMEO:"
$ accelerate launch recipes/gpt.py --data.tokenizer bpe
$ launcher run --gpus 8 recipes/gpt.py --model.depth 12 --model.width 768 --model.heads 12 --data.seq-len 1024 \
    --data.tokenizer bpe --data.vocab-size 50257 --batch-size 512 --microbatch-size 32 --lr 6e-4 --run.precision bf16
"""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
import xxhash
from filelock import FileLock
from torch import Tensor, nn

import launcher

try:
    import tokenizers
    from tokenizers import Tokenizer
except ImportError:
    raise SystemExit("recipes/gpt.py needs tokenizers: pip install 'launcher[recipes]'") from None


@dataclass(frozen=True)
class ModelConfig:
    depth: int = 4  # blocks
    width: int = 128  # of the residual stream
    heads: int = 4  # of attention, each of width / heads
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    tie: bool = True  # one matrix for the embedding and the output
    dropout: float = 0.0
    vocab_multiple: int = 64  # the vocabulary is padded to a multiple of this: odd sizes are slow on a GPU


@dataclass(frozen=True)
class DataConfig:
    files: tuple[str, ...] = ()  # text files in UTF-8; none: the source of Python's standard library
    tokenizer: str = "byte"  # byte, bpe (trained on the text), or the path of a tokenizer.json
    vocab_size: int = 4096  # of a trained bpe
    end_of_text: str = "<|endoftext|>"  # the token between two documents, in a bpe or a tokenizer.json
    seq_len: int = 128  # tokens in a row
    cache: str = "~/.cache/launcher/gpt"  # where packed rows are kept


@dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    steps: int = 600
    batch_size: int = 16  # rows per optimizer step, over all GPUs
    microbatch_size: int = 2  # rows per forward pass, on one GPU
    lr: float = 5e-3
    warmup: int = 60  # steps
    weight_decay: float = 0.1  # on matrices alone
    clip: float = 1.0  # the gradient's largest norm
    eval_every: int = 100  # steps
    eval_rows: int = 128  # held-out rows to evaluate on
    prompt: str = "def "
    sample_tokens: int = 200  # that follow the prompt at the end
    temperature: float = 0.8


# ---- data: documents, joined by an end-of-text token, cut into rows of seq_len + 1 tokens ----

STDLIB_BYTES = 4_000_000  # of the default text
DOCUMENT = 16_384  # bytes: a longer file counts as several documents, so that a single file has a held-out part too
HELD_OUT = 20  # every 20th document, from the first


def text_files(data: DataConfig) -> list[Path]:
    """The files to learn from; by default some of the standard library's, in an order that mixes its packages."""
    if data.files:
        return [Path(name).expanduser() for name in data.files]
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    found = [file for file in root.rglob("*.py") if not left_out & set(file.relative_to(root).parts)]
    found.sort(key=lambda file: xxhash.xxh3_64_hexdigest(file.relative_to(root).as_posix().encode()))
    ends = np.cumsum([file.stat().st_size for file in found])
    return found[: int(np.searchsorted(ends, STDLIB_BYTES))]


def documents(files: list[Path], *, held_out: bool) -> Iterator[str]:
    """The held-out documents of the files, or all others."""
    number = 0
    for file in files:
        try:
            with open(file, encoding="utf-8") as opened:
                while lines := opened.readlines(DOCUMENT):
                    if (number % HELD_OUT == 0) == held_out:
                        yield "".join(lines)
                    number += 1
        except UnicodeDecodeError as error:
            raise launcher.UsageError(f"{file} is not UTF-8 ({error.reason}): convert it") from None


def make_tokenizer(data: DataConfig, files: list[Path]) -> Tokenizer:
    """A byte-level BPE, which without merges has a token for every byte; or the one given."""
    if data.tokenizer not in ("byte", "bpe"):
        try:
            tokenizer = Tokenizer.from_file(data.tokenizer)
        except Exception as error:  # the library raises nothing narrower
            message = f"--data.tokenizer {data.tokenizer}: not byte, bpe or the path of a tokenizer.json ({error})"
            raise launcher.UsageError(message) from None
        if tokenizer.token_to_id(data.end_of_text) is None:
            raise launcher.UsageError(f"--data.end-of-text {data.end_of_text}: no token of {data.tokenizer}")
        return tokenizer
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=data.vocab_size if data.tokenizer == "bpe" else 257,
        special_tokens=[data.end_of_text],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(files, held_out=False) if data.tokenizer == "bpe" else [], trainer)
    return tokenizer


def pack(path: Path, texts: Iterator[str], tokenizer: Tokenizer, data: DataConfig) -> None:
    """Write rows as an Arrow stream. A row begins with the last token of the one before: each is predicted once.

    Attention sees across the end of a document within a row, as in GPT-2; a last incomplete row is dropped.
    """
    end, width = tokenizer.token_to_id(data.end_of_text), data.seq_len + 1
    kind = pa.uint16() if tokenizer.get_vocab_size() <= 1 << 16 else pa.int32()
    schema = pa.schema([("tokens", pa.list_(kind, width))])
    stream = np.empty(0, np.int32)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while batch := list(islice(texts, 256)):
            encoded = tokenizer.encode_batch(batch, add_special_tokens=False)
            stream = np.concatenate([stream, *(np.array([*one.ids, end], np.int32) for one in encoded)])
            number = max(0, (len(stream) - 1) // data.seq_len)
            if number:
                rows = np.lib.stride_tricks.sliding_window_view(stream, width)[:: data.seq_len][:number]
                column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)).cast(kind), width)
                writer.write_batch(pa.record_batch([column], schema=schema))
            stream = stream[number * data.seq_len :]


def prepare(data: DataConfig) -> Path:
    """The directory with train.arrow, held_out.arrow and tokenizer.json, made once, by whichever process comes first.

    The others wait on a file lock, not in a collective, which would time out. A directory has its final name only
    when it is complete: what an interrupted preparation left behind is thrown away.
    """
    try:
        files = text_files(data)
        facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        given = Path(data.tokenizer)
        tokens = given.read_text() if given.suffix else (data.tokenizer, data.vocab_size)
        key = xxhash.xxh3_64_hexdigest(json.dumps([1, facts, tokens, data.end_of_text, data.seq_len]).encode())
        ready = Path(data.cache).expanduser() / key
        ready.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{ready}.lock"):
            if not ready.is_dir():
                partial = ready.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                tokenizer = make_tokenizer(data, files)
                tokenizer.save(str(partial / "tokenizer.json"))
                for split in ("train", "held_out"):
                    texts = documents(files, held_out=split == "held_out")
                    pack(partial / f"{split}.arrow", texts, tokenizer, data)
                partial.rename(ready)
    except OSError as error:
        raise launcher.UsageError(f"cannot prepare the text: {error.filename}: {error.strerror}") from None
    return ready


def load(path: Path) -> datasets.Dataset:
    """Rows, mapped into memory."""
    rows = datasets.Dataset.from_file(str(path))
    if not len(rows):
        raise launcher.UsageError(
            f"too little text for {path.stem} rows: more --data.files, or a smaller --data.seq-len"
        )
    return rows


# ---- model ----


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.heads, self.dropout = cfg.heads, cfg.dropout
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width, bias=False)
        self.out = nn.Linear(cfg.width, cfg.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).reshape(rows, length, width))  # type: ignore[no-any-return]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [..., length, head width]; Su et al., "RoFormer" (2021)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x)


class MLP(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        # SwiGLU (Shazeer, 2020) has three matrices for two: two thirds of the width keep the parameters
        hidden = 4 * cfg.width if cfg.mlp == "gelu" else -(-8 * cfg.width // 3 // 64) * 64
        self.gate = nn.Linear(cfg.width, hidden, bias=False) if cfg.mlp == "swiglu" else None
        self.up = nn.Linear(cfg.width, hidden, bias=False)
        self.out = nn.Linear(hidden, cfg.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        return self.out(hidden)  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(cfg.width), Attention(cfg)
        self.mlp_norm, self.mlp = nn.RMSNorm(cfg.width), MLP(cfg)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))  # type: ignore[no-any-return]


class GPT(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, cfg: ModelConfig, vocab_size: int, seq_len: int) -> None:
        super().__init__()
        if cfg.width % (2 * cfg.heads):
            raise launcher.UsageError(
                f"--model.width {cfg.width} must be a multiple of twice --model.heads {cfg.heads}"
            )
        padded = -(-vocab_size // cfg.vocab_multiple) * cfg.vocab_multiple
        self.embedding = nn.Embedding(padded, cfg.width)
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm = nn.RMSNorm(cfg.width)
        self.head = nn.Linear(cfg.width, padded, bias=False)
        for name, parameter in self.named_parameters():  # as in GPT-2: depth must not make the residual stream grow
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02 / ((2 * cfg.depth) ** 0.5 if name.endswith("out.weight") else 1))
        if cfg.tie:
            self.head.weight = self.embedding.weight
        half = cfg.width // cfg.heads // 2
        angles = torch.outer(torch.arange(seq_len), 10_000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Tokens [rows, length] to logits [rows, length, vocabulary]; with targets, alike, to the sum of the loss."""
        length = tokens.shape[1]
        x = self.dropout(self.embedding(tokens))
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length])
        logits: Tensor = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")

    def flops_per_token(self, seq_len: int) -> int:
        """Forward and backward: 6 a weight of a matrix product, and attention's; Chowdhery et al., "PaLM" (2022), B."""
        weights = sum(p.numel() for p in chain(self.blocks.parameters(), self.head.parameters()) if p.dim() == 2)
        return 6 * weights + 12 * len(self.blocks) * self.embedding.embedding_dim * seq_len


# ---- training ----


def targets(batch: dict[str, Tensor]) -> int:
    """Tokens that are predicted."""
    return batch["tokens"][:, 1:].numel()


def train(run: launcher.Run, cfg: Config) -> None:
    directory = prepare(cfg.data)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts, others = load(directory / "train.arrow"), load(directory / "held_out.arrow")
    others = others.select(range(min(cfg.eval_rows, len(others))))
    rows = run.loader(
        texts, batch_size=cfg.batch_size, microbatch_size=cfg.microbatch_size, count=targets, unit="tokens"
    )
    held_out = run.loader(others, batch_size=cfg.microbatch_size, shuffle=False, count=targets)
    model = run.build(lambda: GPT(cfg.model, tokenizer.get_vocab_size(), cfg.data.seq_len), blocks=Block)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = run.optimizer(torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True))
    run.print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(rows):,} rows of {cfg.data.seq_len}")

    def score(batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
        tokens = batch["tokens"]
        return {"val_loss": (model(tokens[:, :-1], tokens[:, 1:]), targets(batch))}

    for step in run.steps(rows, total=cfg.steps, flops=model.flops_per_token(cfg.data.seq_len)):
        if step.every(cfg.eval_every):
            step.log(**run.average(score, held_out))
        lr = cfg.lr * launcher.warmup_cosine(step.index, cfg.steps, cfg.warmup, floor=0.1)
        launcher.set_lr(optimizer, lr)
        for batch in step:
            tokens = batch["tokens"]
            step.backward(model(tokens[:, :-1], tokens[:, 1:]))
        step.log(lr=lr, grad_norm=step.clip(cfg.clip))
        optimizer.step()
        optimizer.zero_grad()
    run.log(**run.average(score, held_out))
    run.print(sample(run, model, tokenizer, cfg))


def sample(run: launcher.Run, model: GPT, tokenizer: Tokenizer, cfg: Config) -> str:
    """A text that begins with the prompt. All ranks compute the same one: a sharded model's passes are collective."""
    generator = torch.Generator().manual_seed(run.seed)
    tokens = tokenizer.encode(cfg.prompt or cfg.data.end_of_text).ids
    window = torch.zeros(1, cfg.data.seq_len, dtype=torch.long, device=run.device)  # one shape: compiled once
    with run.evaluating():
        for _ in range(cfg.sample_tokens):
            recent = torch.tensor(tokens[-cfg.data.seq_len :])
            window[0, : len(recent)] = recent
            logits = model(window)[0, len(recent) - 1, : tokenizer.get_vocab_size()]
            chances = torch.softmax(logits.float().cpu() / cfg.temperature, dim=-1)
            tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
    return str(tokenizer.decode(tokens))


if __name__ == "__main__":
    launcher.main(train)
