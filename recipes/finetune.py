"""Fine-tune a causal language model of transformers: whole, with frozen layers, or with LoRA.

$ python recipes/finetune.py                     # a tiny model with random weights, on Python's own documentation
$ python recipes/finetune.py --model.path Qwen/Qwen2.5-0.5B --data.files chats.jsonl --lora.rank 8 --run.precision bf16
$ launcher run --gpus 8 recipes/finetune.py --model.path ./llama --data.name tatsu-lab/alpaca \
    --data.prompt instruction --data.completion output --model.freeze-layers 8 --run.shard full
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

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


@dataclass(frozen=True)
class DataConfig:
    files: tuple[str, ...] = ()  # .txt (a sample a paragraph) or .jsonl (an object a line)
    name: str | None = None  # a text dataset of the Hub; neither: Python's documentation of its language
    text: str = "text"  # the column to learn, where there are no prompts
    prompt: str = "prompt"  # the column that is read but not learnt
    completion: str = "completion"  # the column that is learnt
    max_length: int = 256  # tokens; a longer sample is cut
    held_out: float = 0.05  # the part of the samples to evaluate on


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
    batch_size: int = 16  # samples per optimizer step, over all GPUs
    microbatch_size: int = 4  # samples per forward pass, on one GPU
    lr: float = 1e-3
    warmup: int = 10  # steps
    weight_decay: float = 0.0
    eval_every: int = 50  # steps


Sample = dict[str, str]
Batch = dict[str, Tensor]


def load_samples(data: DataConfig) -> tuple[Subset[Sample], Subset[Sample]]:
    """Samples to train on and samples to evaluate on: rows with a `completion`, and perhaps a `prompt`."""
    rows: Sequence[Sample] = default_samples() if data.name is None and not data.files else read_samples(data)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()  # the split never moves
    held_out = max(1, round(data.held_out * len(rows)))
    return Subset(rows, order[held_out:]), Subset(rows, order[:held_out])  # type: ignore[arg-type]  # rows are map-style


def default_samples() -> list[Sample]:
    """The paragraphs of Python's own documentation of its language, each after the name of its page."""
    from pydoc_data.topics import topics

    paragraphs = ((name, text) for name, page in sorted(topics.items()) for text in page.split("\n\n"))
    return [{"prompt": f"{name}: ", "completion": text} for name, text in paragraphs]


def read_samples(data: DataConfig) -> Sequence[Sample]:
    """Samples of local files, or of a dataset of the Hub."""
    import datasets

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
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise launcher.UsageError(f"cannot load samples from {source}: {str(error).splitlines()[0]}") from None
    names = {data.prompt: "prompt", data.completion: "completion"}
    if not set(names) <= set(table.column_names):
        names = {data.text: "completion"}
    if not set(names) <= set(table.column_names):
        columns = ", ".join(table.column_names)
        raise launcher.UsageError(
            f"{source} has the columns {columns}: give --data.text, or --data.prompt and --data.completion"
        )
    table = table.select_columns(list(names)).rename_columns(names)
    return table  # type: ignore[no-any-return]


class Collate:
    """Samples to a padded batch of `input_ids`, `attention_mask` and `labels`, each [samples, length]."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, samples: list[Sample]) -> Batch:
        encoded = [self.encode(sample) for sample in samples]
        longest = max(len(ids) for ids, _ in encoded)
        length = min(-(-longest // 64) * 64, self.max_length)  # few lengths: each one compiles anew
        ids = torch.full((len(samples), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(samples), length), IGNORED)
        mask = torch.zeros((len(samples), length), dtype=torch.long)
        for row, (tokens, learnt_from) in enumerate(encoded):
            ids[row, : len(tokens)] = tokens
            labels[row, learnt_from : len(tokens)] = tokens[learnt_from:]
            mask[row, : len(tokens)] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def encode(self, sample: Sample) -> tuple[Tensor, int]:
        """Prompt and completion as tokens, and where the completion begins."""
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        prompt = start + self.tokenizer.encode(sample.get("prompt", ""), add_special_tokens=False)
        completion = self.tokenizer.encode(sample["completion"], add_special_tokens=False)
        tokens = [*prompt, *completion, self.tokenizer.eos_token_id]
        return torch.tensor(tokens[: self.max_length]), min(len(prompt), self.max_length)


def learnt(batch: Batch) -> int:
    """Tokens that are predicted: those after the first that are neither of a prompt nor padding."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


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
    if cfg.model.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    if cfg.model.freeze_layers > len(layers):
        raise launcher.UsageError(
            f"--model.freeze-layers {cfg.model.freeze_layers}: the model has {len(layers)} layers"
        )
    for layer in layers[: cfg.model.freeze_layers]:
        layer.requires_grad_(False)
    return add_lora(model, cfg.lora) if cfg.lora.rank else model


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


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of the losses of the tokens that are learnt."""
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def train(run: launcher.Run, cfg: Config) -> None:
    tokenizer = load_tokenizer(cfg.model.path)
    train_set, test_set = load_samples(cfg.data)
    collate = Collate(tokenizer, cfg.data.max_length)
    samples = run.loader(
        train_set,
        batch_size=cfg.batch_size,
        microbatch_size=cfg.microbatch_size,
        collate=collate,
        count=learnt,
        unit="tokens",
    )
    held_out = run.loader(test_set, batch_size=cfg.microbatch_size, shuffle=False, collate=collate)
    model = run.build(lambda: load_model(cfg, len(tokenizer)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = run.optimizer(torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True))
    whole = sum(parameter.numel() for parameter in model.parameters())
    run.print(f"{sum(p.numel() for p in trained):,} of {whole:,} parameters train, on {len(train_set):,} samples")

    def score(batch: Batch) -> dict[str, tuple[Tensor, int]]:
        return {"val_loss": (loss_sum(model, batch), learnt(batch))}

    for step in run.steps(samples, total=cfg.steps):
        if step.every(cfg.eval_every):
            step.log(**run.average(score, held_out))
        launcher.set_lr(optimizer, cfg.lr * launcher.warmup_linear(step.index, cfg.steps, cfg.warmup))
        for batch in step:
            step.backward(loss_sum(model, batch))
        step.log(grad_norm=step.clip(1.0))
        optimizer.step()
        optimizer.zero_grad()
    scores = run.average(score, held_out)
    run.log(**scores)
    run.print(f"held-out loss {scores['val_loss']:.3f}")


if __name__ == "__main__":
    launcher.main(train)
