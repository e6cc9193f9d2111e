"""Fine-tune a causal language model of transformers: whole, with frozen layers, or with LoRA; samples packed in rows.

$ python recipes/finetune.py                     # a tiny model with random weights, on Python's own documentation
$ python recipes/finetune.py --model.path Qwen/Qwen2.5-0.5B --data.files chats.jsonl --lora.rank 8 --run.precision bf16
$ launcher run --gpus 8 recipes/finetune.py --model.path ./llama --data.name tatsu-lab/alpaca \
    --data.prompt instruction --data.completion output --model.freeze-layers 8 --run.shard full
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import launcher

try:
    import transformers
    from transformers import PreTrainedTokenizerBase
except ImportError:
    raise SystemExit("recipes/finetune.py needs transformers: pip install 'launcher[recipes]'") from None

IGNORED = -100  # the label of a token that is not predicted: of a prompt, or padding


@dataclass(frozen=True)
class ModelConfig:
    path: str | None = None  # a directory, or a model of the Hub, with safetensors; none: a tiny one, random weights
    freeze_embeddings: bool = False  # train neither the embedding nor an output matrix tied to it
    freeze_layers: int = 0  # train none of the first so many blocks
    chunked_loss: bool = False  # logits never exist whole: less memory where the vocabulary is large


@dataclass(frozen=True)
class DataConfig:
    files: tuple[str, ...] = ()  # .txt (a sample a paragraph) or .jsonl (an object a line)
    name: str | None = None  # a text dataset of the Hub; neither: Python's documentation of its language
    text: str = "text"  # the column to learn, where there are no prompts
    prompt: str = "prompt"  # the column that is read but not learnt
    completion: str = "completion"  # the column that is learnt
    max_length: int = 256  # tokens in a row; a longer sample is cut
    pack: bool = True  # a row holds as many samples as it has room for, which do not see each other; else one
    held_out: float = 0.05  # the part of the samples to evaluate on
    cache: str = "~/.cache/launcher/finetune"  # where tokens are kept


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 0  # of the adapters; 0: no LoRA
    alpha: int = 16  # adapters are scaled by alpha / rank
    dropout: float = 0.0


@dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    steps: int = 100
    batch_size: int = 8  # rows per optimizer step, over all GPUs
    microbatch_size: int = 2  # rows per forward pass, on one GPU
    lr: float = 1e-3
    warmup: int = 10  # steps
    weight_decay: float = 0.0
    eval_every: int = 50  # steps


def check(cfg: Config) -> None:
    """Refuse numbers that no run can have."""
    numbers = {
        "model.freeze-layers": (cfg.model.freeze_layers, 0),
        "data.max-length": (cfg.data.max_length, 2),  # a token, and one to learn
        "lora.rank": (cfg.lora.rank, 0),
        "lr": (cfg.lr, 0),
        "warmup": (cfg.warmup, 0),
        "weight-decay": (cfg.weight_decay, 0),
    }
    for option, (value, least) in numbers.items():
        if not value >= least:  # nan is not either
            raise launcher.UsageError(f"--{option} {value}: give at least {least}")
    if not 0 <= cfg.lora.dropout < 1:
        raise launcher.UsageError(f"--lora.dropout {cfg.lora.dropout}: give at least 0 and less than 1")
    if not 0 < cfg.data.held_out < 1:
        raise launcher.UsageError(f"--data.held-out {cfg.data.held_out}: give more than 0 and less than 1")


Batch = dict[str, Tensor]
Ints = npt.NDArray[np.integer[Any]]

# ---- data: samples to tokens, once a machine; tokens to rows, in each process ----

PART = 1 << 16  # samples that are tokenised at a time: what a process loses when it is killed


def default_samples() -> datasets.Dataset:
    """The paragraphs of Python's own documentation of its language, each after the name of its page."""
    from pydoc_data.topics import topics

    paragraphs = ((name, text) for name, page in sorted(topics.items()) for text in page.split("\n\n"))
    return datasets.Dataset.from_list([{"prompt": f"{name}: ", "completion": text} for name, text in paragraphs])


def load_samples(data: DataConfig) -> datasets.Dataset:
    """Samples with a `completion`, and perhaps a `prompt`: of local files, of the Hub, or the default."""
    if data.name is None and not data.files:
        return default_samples()
    kinds = {Path(file).suffix for file in data.files}
    source = data.name or " ".join(data.files)
    if data.files and (kinds - {".txt", ".jsonl"} or len(kinds) > 1):
        raise launcher.UsageError(f"--data.files {source}: give either .txt or .jsonl files")
    try:
        if data.name is not None:
            table = datasets.load_dataset(data.name, split="train")
        elif kinds == {".txt"}:
            table = datasets.load_dataset("text", data_files=list(data.files), split="train", sample_by="paragraph")
            table = table.rename_column("text", data.text) if data.text != "text" else table
        else:
            table = datasets.load_dataset("json", data_files=list(data.files), split="train")
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        fault = str(error) or "no sample"  # of an empty .jsonl
        raise launcher.UsageError(f"cannot load samples from {source}: {fault.splitlines()[0]}") from None
    names = {data.prompt: "prompt", data.completion: "completion"}
    if not set(names) <= set(table.column_names):
        names = {data.text: "completion"}
    if not set(names) <= set(table.column_names):
        columns = ", ".join(table.column_names)
        raise launcher.UsageError(
            f"{source} has the columns {columns}: give --data.text, or --data.prompt and --data.completion"
        )
    return table.select_columns(list(names)).rename_columns(names)


def tokenise(samples: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, path: Path) -> None:
    """Write samples, end to end, as an array [3, tokens]: the tokens, the next where it is learnt, and the places.

    A sample is its prompt, its completion, which is learnt, and an end, cut at `max_length`; one of which nothing is
    learnt is left out. Places count from 0 in each sample.
    """
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    written = [np.empty((3, 0), np.int32)]
    for some in samples.iter(batch_size=1024):
        prompts, completions = some.get("prompt", [""] * len(some["completion"])), some["completion"]
        if not all(isinstance(text, str) for text in (*prompts, *completions)):
            raise launcher.UsageError(
                "a sample holds no text: give --data.text, or --data.prompt and --data.completion"
            )
        pairs = (tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (prompts, completions))
        for prompt, completion in zip(*pairs, strict=True):
            ids = np.array([*begin, *prompt, *completion, tokenizer.eos_token_id][:max_length])
            targets = np.append(ids[1:], IGNORED)
            targets[: max(0, len(begin) + len(prompt) - 1)] = IGNORED
            if (targets != IGNORED).any():
                written.append(np.stack([ids, targets, np.arange(len(ids))]).astype(np.int32))
    try:
        with open(path, "wb") as file:  # a path would be given another ending
            np.save(file, np.concatenate(written, axis=1))
    except OSError as error:  # which does not say where
        raise launcher.UsageError(
            f"cannot write {path} ({error}): make room on the disk, or give another --data.cache"
        ) from None


def prepare(samples: datasets.Dataset, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Ints]:
    """The parts of all samples' tokens, mapped into memory: made once a machine, by all processes together."""
    if not len(samples):
        raise launcher.UsageError("the data holds no sample: give other --data.files, or --data.name")
    parts = {
        f"tokens-{start // PART:05}.npy": partial(
            tokenise, samples.select(range(start, min(start + PART, len(samples)))), tokenizer, data.max_length
        )
        for start in range(0, len(samples), PART)
    }
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    marks = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    settings = {"samples": samples._fingerprint, "tokenizer": [repr(type(tokenizer)), vocabulary, marks]}
    directory = launcher.prepare(data.cache, {"version": 2, "max_length": data.max_length, **settings}, parts)
    return [np.load(directory / name, mmap_mode="r") for name in parts]


def pack(lengths: list[int], width: int) -> list[list[int]]:
    """The samples of each row of `width` tokens, none cut and none left out: the longest first, each to the row where
    it leaves the least room (best-fit decreasing)."""
    rows: list[list[int]] = []
    room: list[list[int]] = [[] for _ in range(width + 1)]  # rows, by the tokens that they have left
    lefts = 0  # bit n is set where a row has n tokens left: the search is a shift, not a loop
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        length = lengths[sample]
        if fitting := lefts >> length:
            left = length + (fitting & -fitting).bit_length() - 1
            row = room[left].pop()
            lefts ^= 0 if room[left] else 1 << left
        else:
            left, row = width, len(rows)
            rows.append([])
        rows[row].append(sample)
        room[left - length].append(row)
        lefts |= 1 << (left - length)
    return rows


class Rows(Dataset[Batch]):
    """Rows of samples as `input_ids`, `targets` and `position_ids`, which begin at 0 in each sample and in the padding.

    Each is [rows, length]: the length of all rows if they are packed, else what the longest of a batch needs.
    """

    def __init__(self, parts: list[Ints], spans: Ints, data: DataConfig, padding: int) -> None:
        """`spans` [samples, 3] has of each sample the number of its part, and where in it begins and ends."""
        self.parts, self.width, self.fixed, self.padding = parts, data.max_length, data.pack, padding
        lengths = spans[:, 2] - spans[:, 1]
        rows = pack(lengths.tolist(), self.width) if data.pack else [[k] for k in range(len(spans))]
        self.rows = [spans[row] for row in rows]
        self.lengths = np.array([lengths[row].sum() for row in rows], np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, rows: list[int]) -> Batch:
        longest = int(self.lengths[rows].max())
        length = self.width if self.fixed else min(-(-longest // 64) * 64, self.width)  # each new one compiles anew
        read = np.empty((3, len(rows), length), np.int64)
        for k, row in enumerate(rows):
            at = 0
            for part, start, stop in self.rows[row].tolist():
                read[:, k, at : at + stop - start] = self.parts[part][:, start:stop]
                at += stop - start
            read[0, k, at:], read[1, k, at:], read[2, k, at:] = self.padding, IGNORED, np.arange(length - at)
        return dict(zip(("input_ids", "targets", "position_ids"), torch.from_numpy(read), strict=True))


def load_rows(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Rows, Rows, int]:
    """Rows to train on, rows to evaluate on, and of how many samples nothing is learnt: they are in neither."""
    samples = load_samples(data)
    parts = prepare(samples, data, tokenizer)
    starts = [np.flatnonzero(part[2] == 0) for part in parts]
    stops = [np.append(start, part.shape[1])[1:] for start, part in zip(starts, parts, strict=True)]
    numbers = np.repeat(np.arange(len(parts)), [len(start) for start in starts])
    spans = np.stack([numbers, np.concatenate(starts), np.concatenate(stops)], axis=1)
    order = torch.randperm(len(spans), generator=torch.Generator().manual_seed(0)).numpy()  # the split never moves
    held_out = max(1, round(data.held_out * len(spans)))
    if held_out >= len(spans):
        raise launcher.UsageError(
            f"the data has {len(spans)} samples of which something is learnt, too few to train on and to hold out: "
            "give more --data.files, a smaller --data.held-out or a larger --data.max-length"
        )
    train, test = (
        Rows(parts, spans[some], data, tokenizer.pad_token_id) for some in (order[held_out:], order[:held_out])
    )
    return train, test, len(samples) - len(spans)


def as_read(batch: Any) -> Batch:
    """What `Rows` gives is a batch already."""
    return batch  # type: ignore[no-any-return]


def learnt(batch: Batch) -> int:
    """Tokens that are predicted: neither of a prompt, nor padding, nor a sample's first."""
    return int((batch["targets"] != IGNORED).sum())


# ---- model ----


def load_tokenizer(path: str | None) -> PreTrainedTokenizerBase:
    """The model's own; or one with a token for every byte, that needs no file."""
    if path is None:
        return transformers.ByT5Tokenizer(extra_ids=0)
    if not Path(path).is_dir() and path.count("/") != 1:
        raise launcher.UsageError(f"--model.path {path}: neither a directory nor owner/name on the Hub")
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise launcher.UsageError(f"--model.path {path}: {str(error).splitlines()[0]}") from None
    if tokenizer.eos_token_id is None:
        raise launcher.UsageError(
            f"--model.path {path}: the tokenizer has no token that ends a sample: name its eos_token in "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def load_model(cfg: Config, vocab_size: int) -> nn.Module:
    """The model in fp32, with what is not trained frozen: a checkpoint holds only what is trained."""
    model: transformers.PreTrainedModel
    if cfg.model.path is None:
        tiny = transformers.LlamaConfig(
            vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
        )
        model = transformers.LlamaForCausalLM(tiny)
    else:
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                cfg.model.path, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise launcher.UsageError(f"--model.path {cfg.model.path}: {str(error).splitlines()[0]}") from None
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    if cfg.model.freeze_layers > len(layers):
        raise launcher.UsageError(
            f"--model.freeze-layers {cfg.model.freeze_layers}: the model has {len(layers)} layers"
        )
    adapted = add_lora(model, cfg.lora) if cfg.lora.rank else model
    if cfg.model.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    for layer in layers[: cfg.model.freeze_layers]:
        layer.requires_grad_(False)  # nor its adapters
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise launcher.UsageError(
            f"--model.freeze-layers {cfg.model.freeze_layers} leaves nothing to train: freeze fewer"
        )
    return adapted


def add_lora(model: nn.Module, lora: LoraConfig) -> nn.Module:
    """Low-rank adapters beside every linear layer, which alone are trained; Hu et al., "LoRA" (2021)."""
    try:
        import peft
    except ImportError:
        raise launcher.UsageError("--lora.rank needs peft: pip install 'launcher[recipes]'") from None
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, settings)


def alike(logits: Callable[[], Tensor], wanted: Tensor) -> bool:
    """Whether a model can compute these logits, and to what rounding leaves."""
    try:
        return bool((logits() - wanted).abs().max() <= 1e-3 * wanted.abs().max())
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False


def apart(model: Any, row: dict[str, Any], start: int, alone: Tensor) -> bool:
    """Whether a row's samples, of which the second begins at `start`, have the logits that each has alone.

    A little that the second sees of the first would pass for rounding, but not in its derivative, which is exactly 0.
    """
    embedded: list[Tensor] = []
    slopes: list[Tensor] = []

    def cut(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        embedded.append(out.detach().requires_grad_())
        return embedded[-1].clone()  # which a model may scale in place

    def logits() -> Tensor:
        found: Tensor = model(**row).logits
        slopes.extend(torch.autograd.grad(found[:, start:].square().sum(), embedded))
        return found.detach()

    with torch.enable_grad(), model.get_input_embeddings().register_forward_hook(cut):
        return alike(logits, alone) and all(bool((slope[:, :start] == 0).all()) for slope in slopes)


def plain(model: Any, ids: Tensor, alone: Tensor) -> bool:
    """Whether logits are hidden states times the head's weight: no bias, and neither cap nor scale behind the head."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    ramp = torch.linspace(-1000, 1000, alone.numel()).view_as(alone)  # small logits would not show a cap
    with head.register_forward_hook(lambda *_: ramp):
        passed = bool(model(input_ids=ids, use_cache=False).logits.float().equal(ramp))
    bare = passed and getattr(head, "bias", None) is None
    return bare and alike(lambda: decoder(ids).last_hidden_state @ head.weight.T, alone)


def with_loss(model: Any, cfg: Config) -> nn.Module:
    """The model, whose forward now gives the sum of the losses of a batch's learnt tokens.

    Within the forward the loss has the model's precision, and weights are whole where they are sharded. The forward is
    replaced in place, so the weights keep their names.

    Raises:
        UsageError: with these options the model's losses would be others.
    """
    model.eval()
    forward, decoder, config = model.forward, model.get_decoder(), model.config.get_text_config()
    head = model.get_output_embeddings()  # whose weight is another tensor once it is sharded
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    # transformers finds samples by their places, for which a GPU has to stop: only if its masks are more than that
    masked = config._attn_implementation == "sdpa" and all(not n or n >= cfg.data.max_length for n in windows)

    def inputs(input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
        sample, given = (position_ids == 0).cumsum(-1), {"input_ids": input_ids, "use_cache": False}
        if not cfg.data.pack:
            return given | {"attention_mask": (sample == 1).long()}
        mask = (sample[:, None, :, None] == sample[:, None, None, :]).tril() if masked else None
        return given | {"position_ids": position_ids, "attention_mask": mask}

    def loss_sum(input_ids: Tensor, targets: Tensor, position_ids: Tensor) -> Tensor:
        given = inputs(input_ids, position_ids)
        if cfg.model.chunked_loss:
            hidden = decoder(**given).last_hidden_state
            return launcher.linear_cross_entropy(hidden, head.weight, targets, ignore_index=IGNORED)
        logits = forward(**given).logits.flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")

    with torch.no_grad():
        ids = torch.arange(16)[None] % head.weight.shape[0]
        alone = torch.cat(
            [forward(input_ids=part, use_cache=False).logits for part in ids.split((5, 11), dim=1)], dim=1
        )
        places = torch.cat([torch.arange(5), torch.arange(11)])[None]
        if cfg.data.pack and not apart(model, inputs(ids, places), 5, alone):
            raise launcher.UsageError(
                f"{type(model).__name__} lets samples of a row see each other: add --data.no-pack"
            )
        if cfg.model.chunked_loss and not plain(model, ids[:, :5], alone[:, :5]):
            raise launcher.UsageError(f"{type(model).__name__} does more for its logits: drop --model.chunked-loss")
    model.forward = loss_sum
    trained: nn.Module = model.train()  # from_pretrained gives it in evaluation mode
    return trained


def train(run: launcher.Run, cfg: Config) -> None:
    check(cfg)
    tokenizer = load_tokenizer(cfg.model.path)
    train_set, test_set, left_out = load_rows(cfg.data, tokenizer)
    if left_out:
        run.print(
            f"{left_out:,} samples are left out, of which nothing is learnt: empty, or cut at --data.max-length "
            f"{cfg.data.max_length} before their completion"
        )
    rows = run.loader(
        train_set,
        batch_size=cfg.batch_size,
        microbatch_size=cfg.microbatch_size,
        collate=as_read,
        count=learnt,
        unit="tokens",
    )
    held_out = run.loader(test_set, batch_size=cfg.microbatch_size, shuffle=False, collate=as_read)
    model = run.build(lambda: with_loss(load_model(cfg, len(tokenizer)), cfg))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = run.optimizer(torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True))
    whole = sum(parameter.numel() for parameter in model.parameters())
    full = train_set.lengths.mean() / cfg.data.max_length
    run.print(
        f"{sum(p.numel() for p in trained):,} of {whole:,} parameters train, on {len(rows):,} rows, {full:.1%} full"
    )

    def score(batch: Batch) -> dict[str, tuple[Tensor, int]]:
        return {"val_loss": (model(**batch), learnt(batch))}

    for step in run.steps(rows, total=cfg.steps):
        if step.every(cfg.eval_every):
            step.log(**run.average(score, held_out))
        launcher.set_lr(optimizer, cfg.lr * launcher.warmup_linear(step.index, cfg.steps, cfg.warmup))
        for batch in step:
            step.backward(model(**batch))
        step.log(grad_norm=step.clip(1.0))
        optimizer.step()
        optimizer.zero_grad()
    scores = run.average(score, held_out)
    run.log(**scores)
    run.print(f"held-out loss {scores['val_loss']:.3f}")


if __name__ == "__main__":
    launcher.main(train)
