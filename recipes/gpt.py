"""Train a decoder-only language model on text: small by default, of GPT-2's shape by options.

$ python recipes/gpt.py
$ python recipes/gpt.py --data.files shakespeare.txt --prompt "ROMEO:"
$ accelerate launch recipes/gpt.py --data.tokenizer bpe

GPT-2's 124 million parameters, and a Llama of 1.1 billion (TinyLlama; Llama 3.2's 1 B has --model.depth 16,
--model.kv-heads 8, --model.hidden 8192, --model.rope-base 5e5, tied, and a vocabulary of 128,256), on eight GPUs:

$ launcher run --gpus 8 recipes/gpt.py --model.depth 12 --model.width 768 --model.heads 12 --model.mlp gelu \
    --model.loss-chunk 8192 --data.seq-len 1024 --data.tokenizer bpe --data.vocab-size 50257 --batch-size 512 \
    --microbatch-size 32 --lr 6e-4 --run.precision bf16 --run.compile default --run.compile-scope block
$ launcher run --gpus 8 recipes/gpt.py --model.depth 22 --model.width 2048 --model.heads 32 --model.kv-heads 4 \
    --model.hidden 5632 --model.no-tie --model.attention flex --model.loss-chunk 4096 --data.seq-len 2048 \
    --data.tokenizer tokenizer.json --batch-size 1024 --microbatch-size 8 --lr 4e-4 --run.precision bf16 \
    --run.compile default --run.compile-scope block --run.shard full --run.activation-checkpointing selective
"""

from __future__ import annotations

import io
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

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
    kv_heads: int = 0  # of keys and values, each shared by heads / kv_heads queries; 0: as many as heads
    attention: Literal["sdpa", "flex"] = "sdpa"  # to all that came before, or (flex) within a token's own document
    rope_base: float = 10_000.0  # larger for longer rows
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    hidden: int = 0  # width within the MLP; 0: 4 widths (gelu), 8 / 3 (swiglu)
    tie: bool = True  # one matrix for the embedding and the output
    dropout: float = 0.0
    vocab_multiple: int = 64  # the vocabulary is padded to a multiple of this: odd sizes are slow on a GPU
    loss_chunk: int = 0  # tokens whose logits exist at a time, to save memory; 0: all of a micro-batch's
    fp8: bool = False  # products within the blocks in 8 bits, by torchao, on a GPU that has them


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
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks, AdamW for all others
    lr: float = 5e-3
    warmup: int = 60  # steps
    weight_decay: float = 0.1  # on matrices alone
    clip: float = 1.0  # the gradient's largest norm
    eval_every: int = 100  # steps
    eval_rows: int = 128  # held-out rows to evaluate on
    prompt: str = "def "
    sample_tokens: int = 200  # that follow the prompt at the end
    temperature: float = 0.8


def check(cfg: Config) -> None:
    """Refuse numbers that no run can have, and a shape that no model can have."""
    model = cfg.model
    numbers = {
        "model.depth": (model.depth, 1),
        "model.width": (model.width, 1),
        "model.heads": (model.heads, 1),
        "model.kv-heads": (model.kv_heads, 0),
        "model.rope-base": (model.rope_base, 1),
        "model.hidden": (model.hidden, 0),
        "model.vocab-multiple": (model.vocab_multiple, 1),
        "model.loss-chunk": (model.loss_chunk, 0),
        "data.vocab-size": (cfg.data.vocab_size, 257),  # every byte, and the end of text
        "data.seq-len": (cfg.data.seq_len, 1),
        "lr": (cfg.lr, 0),
        "warmup": (cfg.warmup, 0),
        "weight-decay": (cfg.weight_decay, 0),
        "eval-rows": (cfg.eval_rows, 1),
        "temperature": (cfg.temperature, 0.01),  # with which the likeliest token follows, nearly always
    }
    for option, (value, least) in numbers.items():
        if not value >= least:  # nan is not either
            raise launcher.UsageError(f"--{option} {value}: give at least {least}")
    if not 0 <= model.dropout < 1:
        raise launcher.UsageError(f"--model.dropout {model.dropout}: give at least 0 and less than 1")
    if model.width % (2 * model.heads):
        raise launcher.UsageError(
            f"--model.width {model.width} must be a multiple of twice --model.heads {model.heads}"
        )
    if model.kv_heads and model.heads % model.kv_heads:
        raise launcher.UsageError(
            f"--model.heads {model.heads} must be a multiple of --model.kv-heads {model.kv_heads}"
        )
    if model.attention == "flex" and model.dropout:
        raise launcher.UsageError("--model.attention flex has no dropout of attention: drop --model.dropout")


# ---- data: documents, joined by an end-of-text token, cut into rows of seq_len + 1 tokens ----

STDLIB_BYTES = 4_000_000  # of the default text
DOCUMENT = 16_384  # bytes: a longer file counts as several documents, so that a single file has a held-out part too
HELD_OUT = 20  # every 20th document of a part, from the first
PART = 1 << 26  # bytes of text in a part: what one process packs at a time, and what it loses when it is killed

Span = tuple[Path, int, int]  # of a file, the lines that begin from one byte up to another


def text_files(data: DataConfig) -> list[Path]:
    """The files to learn from; by default some of the standard library's, in an order that mixes its packages."""
    if data.files:
        files = [Path(name).expanduser() for name in data.files]
        if missing := [str(file) for file in files if not file.is_file()]:
            raise launcher.UsageError(f"--data.files {' '.join(missing)}: no such file")
        return files
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    found = []
    for directory, inner, names in os.walk(root):
        inner[:] = set(inner) - left_out  # not even walked through
        found += [Path(directory, name) for name in names if name.endswith(".py")]
    found.sort(key=lambda file: xxhash.xxh3_64_hexdigest(file.relative_to(root).as_posix().encode()))
    ends = np.cumsum([file.stat().st_size for file in found])
    return found[: int(np.searchsorted(ends, STDLIB_BYTES))]


def cut(files: list[Path]) -> list[list[Span]]:
    """The files in parts of PART bytes."""
    parts: list[list[Span]] = [[]]
    room = PART
    for file in files:
        start, size = 0, file.stat().st_size
        while start < size:
            if not room:
                parts.append([])
                room = PART
            stop = min(size, start + room)
            parts[-1].append((file, start, stop))
            start, room = stop, room - (stop - start)
    return parts


def lines(file: Path, start: int, stop: int) -> io.TextIOWrapper:
    """The lines that begin in a span."""
    with open(file, "rb") as opened:
        places = []
        for place in (start, stop):
            opened.seek(max(0, place - 1))
            if place:
                opened.readline()  # a line that began before
            places.append(opened.tell())
        opened.seek(places[0])
        return io.TextIOWrapper(io.BytesIO(opened.read(places[1] - places[0])), encoding="utf-8")


def documents(part: list[Span], *, held_out: bool) -> Iterator[str]:
    """The held-out documents of a part, or all others."""
    number = 0
    for file, start, stop in part:
        try:
            text = lines(file, start, stop)
            while document := text.readlines(DOCUMENT):
                if (number % HELD_OUT == 0) == held_out:
                    yield "".join(document)
                number += 1
        except UnicodeDecodeError as error:
            raise launcher.UsageError(f"{file} is not UTF-8 ({error.reason}): convert it") from None


def tokenizer_file(data: DataConfig) -> Path | None:
    """The tokenizer.json that is given, or none where one is made."""
    if data.tokenizer in ("byte", "bpe"):
        return None
    file = Path(data.tokenizer)
    if not file.is_file():
        raise launcher.UsageError(
            f"--data.tokenizer {file}: not byte, bpe or the path of a tokenizer.json (no such file)"
        )
    return file


def make_tokenizer(data: DataConfig, parts: list[list[Span]]) -> Tokenizer:
    """A byte-level BPE, which without merges has a token for every byte; or the one given."""
    if file := tokenizer_file(data):
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            message = f"--data.tokenizer {file}: not byte, bpe or the path of a tokenizer.json ({error})"
            raise launcher.UsageError(message) from None
        if tokenizer.token_to_id(data.end_of_text) is None:
            raise launcher.UsageError(f"--data.end-of-text {data.end_of_text}: no token of {file}")
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
    texts = chain.from_iterable(documents(part, held_out=False) for part in parts)
    tokenizer.train_from_iterator(texts if data.tokenizer == "bpe" else [], trainer)
    return tokenizer


def pack(part: list[Span], data: DataConfig, held_out: bool, path: Path) -> None:
    """Write rows as an Arrow stream. A row begins with the last token of the one before: each is predicted once.

    A row may hold several documents: whether attention sees across their ends is --model.attention's. A part's last
    incomplete row is dropped.
    """
    tokenizer = Tokenizer.from_file(str(path.parent / "tokenizer.json"))
    end, width = tokenizer.token_to_id(data.end_of_text), data.seq_len + 1
    kind = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.int32
    schema = pa.schema([("tokens", pa.list_(pa.from_numpy_dtype(kind), width))])
    texts, rest = documents(part, held_out=held_out), np.empty(0, kind)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while batch := list(islice(texts, 256)):
            encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            stream = np.concatenate([rest, *(np.array([*one.ids, end], kind) for one in encoded)])
            number = max(0, (len(stream) - 1) // data.seq_len)
            if number:
                rows = np.lib.stride_tricks.sliding_window_view(stream, width)[:: data.seq_len][:number]
                column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), width)
                writer.write_batch(pa.record_batch([column], schema=schema))
            rest = stream[number * data.seq_len :]


def prepare(data: DataConfig) -> Path:
    """The directory with tokenizer.json and packed rows, made once, by all processes that come, a part at a time."""
    files = text_files(data)
    parts = cut(files)
    tokenizer = tokenizer_file(data) or [data.tokenizer, data.vocab_size]
    options = {"end_of_text": data.end_of_text, "seq_len": data.seq_len, "part": PART}
    packed = {
        f"{split}-{number:05}.arrow": partial(pack, part, data, split == "held_out")
        for split in ("train", "held_out")
        for number, part in enumerate(parts)
    }
    return launcher.prepare(
        data.cache,
        {"version": 2, "files": files, "tokenizer": tokenizer, **options},
        {"tokenizer.json": lambda path: make_tokenizer(data, parts).save(str(path))},
        packed,
    )


def load(directory: Path, split: str) -> datasets.Dataset:
    """The rows of a split, train or held_out, mapped into memory."""
    parts = sorted(directory.glob(f"{split}-*.arrow"))
    rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(part)) for part in parts])
    if not len(rows):
        raise launcher.UsageError(f"too little text for {split} rows: more --data.files, or a smaller --data.seq-len")
    return rows


# ---- model ----

compiling, compiled_once = torch.compiler.is_compiling, cache(torch.compile)


def document_mask(tokens: Tensor, end_of_text: int) -> BlockMask | Tensor:
    """Who attends to whom: a token to those before it in its own document. Tokens [rows, length].

    An end-of-text token begins the document after it, so that this one's first token is predicted from nothing else.
    Positions go on counting: rotary attention sees distances, which are the same within a document. On a CPU, where
    FlexAttention cannot train, the mask is dense: [rows, 1, length, length].
    """
    documents = (tokens == end_of_text).cumsum(1)
    if not tokens.is_cuda:
        return (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    return block_mask(documents, create_block_mask if compiling() else compiled_once(create_block_mask))


def block_mask(documents: Tensor, make: Any) -> BlockMask:
    """The mask as FlexAttention takes it, which leaves out blocks of pairs of which none is attended to."""

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[row, query] == documents[row, key])

    rows, length = documents.shape
    return make(sees, rows, None, length, length, device=documents.device)  # type: ignore[no-any-return]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | Tensor | None, dropout: float) -> Tensor:
    """Attention of [rows, heads, length, head width], by the mask or to all before; keys may have fewer heads."""
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):  # without a compiler it would hold a score for every pair of tokens
        flex: Any = flex_attention if compiling() else compiled_once(flex_attention)
        return flex(q, k, v, block_mask=mask, enable_gqa=grouped)  # type: ignore[no-any-return]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, enable_gqa=grouped
    )


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dropout = cfg.heads, cfg.kv_heads or cfg.heads, cfg.dropout
        self.qkv = nn.Linear(cfg.width, cfg.width // cfg.heads * (self.heads + 2 * self.kv_heads), bias=False)
        self.out = nn.Linear(cfg.width, cfg.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: BlockMask | Tensor | None) -> Tensor:
        rows, length, width = x.shape
        heads = self.qkv(x).view(rows, length, -1, width // self.heads).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.out(mixed.transpose(1, 2).reshape(rows, length, width))  # type: ignore[no-any-return]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [..., length, head width]; Su et al., "RoFormer" (2021)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x)


class MLP(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        # SwiGLU (Shazeer, 2020) has three matrices for two: two thirds of the width keep the parameters
        hidden = cfg.hidden or (4 * cfg.width if cfg.mlp == "gelu" else -(-8 * cfg.width // 3 // 64) * 64)
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: BlockMask | Tensor | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin, mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))  # type: ignore[no-any-return]


class GPT(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(
        self, cfg: ModelConfig, vocab_size: int, seq_len: int, *, end_of_text: int = 0, compiled: bool = False
    ) -> None:
        super().__init__()
        self.cfg, self.end_of_text, self.compiled = cfg, end_of_text, compiled
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
        if cfg.fp8:
            use_fp8(self.blocks)
        half = cfg.width // cfg.heads // 2
        angles = torch.outer(torch.arange(seq_len), cfg.rope_base ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Tokens [rows, length] to logits [rows, length, vocabulary]; with targets, alike, to the sum of the loss."""
        length = tokens.shape[1]
        mask = document_mask(tokens, self.end_of_text) if self.cfg.attention == "flex" else None
        x = self.dropout(self.embedding(tokens))
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length], mask)
        x = self.norm(x)
        if targets is not None and self.cfg.loss_chunk:
            return launcher.linear_cross_entropy(
                x, self.head.weight, targets, chunk=self.cfg.loss_chunk, compile=self.compiled
            )
        logits: Tensor = self.head(x)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")

    def flops_per_token(self, seq_len: int) -> int:
        """Forward and backward: 6 a weight of a matrix product, and attention's; Chowdhery et al., "PaLM" (2022), B.

        Attention counts as if to the whole row, and what is computed twice to save memory counts once.
        """
        weights = sum(p.numel() for p in chain(self.blocks.parameters(), self.head.parameters()) if p.dim() == 2)
        return 6 * weights + 12 * len(self.blocks) * self.embedding.embedding_dim * seq_len


def use_fp8(blocks: nn.Module) -> None:
    """Let the linear layers compute in 8 bits, each tensor scaled by its largest value; weights stay in fp32."""
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError:
        raise launcher.UsageError("--model.fp8 needs torchao: pip install torchao") from None
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise launcher.UsageError("--model.fp8 needs a GPU with 8-bit products (Ada, Hopper or newer): drop it")
    sizes = {"module_filter_fn": lambda layer, name: not (layer.in_features % 16 or layer.out_features % 16)}
    convert_to_float8_training(blocks, **sizes)


# ---- training ----


def targets(batch: dict[str, Tensor]) -> int:
    """Tokens that are predicted."""
    return batch["tokens"][:, 1:].numel()


def make_optimizers(model: GPT, cfg: Config) -> list[torch.optim.Optimizer]:
    """AdamW, with weight decay on matrices alone; or Muon before it, which makes a matrix's update orthogonal.

    Jordan et al., "Muon" (2024). Its updates are scaled to the size of AdamW's, as in Liu et al., "Muon is Scalable for
    LLM Training" (2025), so that one learning rate and one weight decay serve both.
    """
    own = [p for p in model.blocks.parameters() if p.dim() == 2] if cfg.optimizer == "muon" else []
    rest = [p for p in model.parameters() if not any(p is one for one in own)]
    matrices, vectors = ([p for p in rest if (p.dim() >= 2) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)
    if not own:
        return [adamw]
    muon = torch.optim.Muon(own, lr=cfg.lr, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def train(run: launcher.Run, cfg: Config) -> None:
    check(cfg)
    directory = prepare(cfg.data)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts, others = load(directory, "train"), load(directory, "held_out")
    others = others.select(range(min(cfg.eval_rows, len(others))))
    rows = run.loader(
        texts, batch_size=cfg.batch_size, microbatch_size=cfg.microbatch_size, count=targets, unit="tokens"
    )
    held_out = run.loader(others, batch_size=cfg.microbatch_size, shuffle=False, count=targets)
    end, compiled = tokenizer.token_to_id(cfg.data.end_of_text), run.config.compile != "off"
    assert end is not None  # there is none without one
    model = run.build(
        lambda: GPT(cfg.model, tokenizer.get_vocab_size(), cfg.data.seq_len, end_of_text=end, compiled=compiled),
        blocks=Block,
    )
    optimizers = [run.optimizer(one) for one in make_optimizers(model, cfg)]
    run.print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(rows):,} rows of {cfg.data.seq_len}")

    def score(batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
        tokens = batch["tokens"]
        return {"val_loss": (model(tokens[:, :-1], tokens[:, 1:]), targets(batch))}

    for step in run.steps(rows, total=cfg.steps, flops=model.flops_per_token(cfg.data.seq_len)):
        if step.every(cfg.eval_every):
            step.log(**run.average(score, held_out))
        lr = cfg.lr * launcher.warmup_cosine(step.index, cfg.steps, cfg.warmup, floor=0.1)
        for optimizer in optimizers:
            launcher.set_lr(optimizer, lr)
        for batch in step:
            tokens = batch["tokens"]
            step.backward(model(tokens[:, :-1], tokens[:, 1:]))
        step.log(lr=lr, grad_norm=step.clip(cfg.clip))
        for optimizer in optimizers:
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
