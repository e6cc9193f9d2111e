"""recipes/finetune.py: samples, batches, and what of a model trains; its runs are in test_runs.py."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import launcher
from recipes import finetune
from recipes.finetune import IGNORED, Config, DataConfig, LoraConfig, ModelConfig

TOKENIZER = finetune.load_tokenizer(None)
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of matrices this small, more only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


Sample = dict[str, str]


def rows_of(samples: list[Sample], path: Path, **options: Any) -> finetune.Rows:
    """Rows of all these samples."""
    data = DataConfig(**options)
    finetune.tokenise(datasets.Dataset.from_list(samples), TOKENIZER, data.max_length, path / "tokens.npy")
    part = np.load(path / "tokens.npy")
    starts = np.flatnonzero(part[2] == 0)
    spans = np.stack([np.zeros_like(starts), starts, np.append(starts[1:], part.shape[1])], axis=1)
    return finetune.Rows([part], spans, data, PAD)


def every(rows: finetune.Rows) -> finetune.Batch:
    return rows.__getitems__(list(range(len(rows))))


def test_prompts_and_padding_are_not_learnt(tmp_path: Path) -> None:
    batch = every(
        rows_of([{"prompt": "ab", "completion": "cde"}, {"prompt": "", "completion": "f" * 70}], tmp_path, pack=False)
    )
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(batch, (2, 128))
    letters = [TOKENIZER.encode(letter, add_special_tokens=False)[0] for letter in "abcdef"]
    assert batch["input_ids"][0, :7].tolist() == [*letters[:5], EOS, PAD]
    assert batch["targets"][0, :7].tolist() == [IGNORED, *letters[2:5], EOS, IGNORED, IGNORED]
    assert (batch["position_ids"] == 0).nonzero().tolist() == [[0, 0], [0, 6], [1, 0], [1, 71]]
    assert finetune.learnt(batch) == 4 + 70  # nothing stands before the first token of a sample without a prompt


def test_long_samples_are_cut(tmp_path: Path) -> None:
    samples = [{"prompt": "abc", "completion": "x" * 50}, {"prompt": "y" * 50, "completion": "z"}]
    batch = every(rows_of(samples, tmp_path, max_length=10))
    assert batch["input_ids"].shape == (1, 10)  # none of the sample whose prompt alone is too long
    assert finetune.learnt(batch) == 7


def write(path: Path, samples: list[Sample]) -> str:
    path.write_text("\n".join(map(json.dumps, samples)))
    return str(path)


def test_samples_of_which_nothing_is_learnt_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_recipe: Any
) -> None:
    long, empty = {"prompt": "p" * 50, "completion": "c"}, {"prompt": "", "completion": ""}
    samples = [{"prompt": f"q{k}", "completion": f"a{k}"} for k in range(40)]
    file = write(tmp_path / "a.jsonl", [*samples[:20], *[long] * 16, *[empty] * 8, *samples[20:]])
    monkeypatch.setattr(finetune, "PART", 8)
    data = DataConfig(files=(file,), cache=str(tmp_path / "tokens"), max_length=32, pack=False)
    train, test, left_out = finetune.load_rows(data, TOKENIZER)
    assert (len(train), len(test), left_out) == (38, 2, 24)
    assert any(part.shape == (3, 0) for part in train.parts)  # a part with no sample
    read = sorted(tuple(ids[: ids.index(EOS)]) for rows in (train, test) for ids in every(rows)["input_ids"].tolist())
    assert read == sorted(tuple(TOKENIZER.encode(f"q{k}a{k}", add_special_tokens=False)) for k in range(40))
    options = ("--data.files", file, "--data.max-length", "32", "--data.cache", tmp_path / "tokens")
    said = run_recipe(finetune.train, "--steps", "1", "--run.dir", tmp_path / "run", *options)
    assert "24 samples are left out, of which nothing is learnt" in said


@pytest.mark.parametrize(
    ("samples", "options", "number"),
    [
        ([{"prompt": "p" * 300, "completion": "c"}] * 20, {}, 0),
        ([{"text": ""}] * 20, {}, 0),
        ([{"text": "a"}], {}, 1),
        ([{"text": "a"}] * 10, {"held_out": 0.99}, 10),
    ],
)
def test_too_little_to_learn_is_one_line(
    tmp_path: Path, samples: list[Sample], options: dict[str, float], number: int
) -> None:
    data = DataConfig(files=(write(tmp_path / "a.jsonl", samples),), cache=str(tmp_path / "tokens"), **options)  # type: ignore[arg-type]
    with pytest.raises(launcher.UsageError, match=f"the data has {number} samples of which something is learnt, too"):
        finetune.load_rows(data, TOKENIZER)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    samples = datasets.Dataset.from_list([{"completion": "a" * 5000}] * 10)
    with pytest.raises(launcher.UsageError, match=r"cannot write /dev/full \(.*\): make room on the disk"):
        finetune.tokenise(samples, TOKENIZER, 4096, Path("/dev/full"))


@given(st.integers(1, 100).flatmap(lambda width: st.tuples(st.just(width), st.lists(st.integers(1, width)))))
def test_packing_loses_and_cuts_nothing(case: tuple[int, list[int]]) -> None:
    width, lengths = case
    rows = finetune.pack(lengths, width)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    used = sorted(sum(lengths[sample] for sample in row) for row in rows)
    assert not used or used[-1] <= width
    assert len(used) < 2 or used[0] + used[1] > width  # no two rows have room for each other
    assert finetune.pack(lengths, width) == rows


def test_packed_rows_hold_the_samples_and_little_else(tmp_path: Path) -> None:
    draw = random.Random(0)
    samples = [{"prompt": "p" * draw.randint(0, 30), "completion": "c" * draw.randint(1, 150)} for _ in range(400)]
    packed, alone = rows_of(samples, tmp_path), rows_of(samples, tmp_path, pack=False)
    assert packed.lengths.sum() == alone.lengths.sum()
    assert packed.lengths.mean() > 0.97 * 256
    assert finetune.learnt(every(packed)) == finetune.learnt(every(alone))
    batch = packed.__getitems__([3])
    assert batch["input_ids"].shape == (1, 256)
    pieces = batch["input_ids"][0].tensor_split((batch["position_ids"][0] == 0).nonzero().flatten()[1:])
    wanted = [np.concatenate([packed.parts[part][0, a:b] for part, a, b in [span]]).tolist() for span in packed.rows[3]]
    assert [piece.tolist() for piece in pieces[: len(wanted)]] == wanted


MODELS = {
    "llama": lambda: finetune.load_model(Config(), len(TOKENIZER)),
    "windows": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1, sliding_window=8)
    ),
    "learnt positions": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=300, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    ),
}
SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("name", "chunked"), [("llama", False), ("llama", True), ("windows", False), ("learnt positions", True)]
)
def test_packed_losses_and_gradients_are_those_of_the_samples(tmp_path: Path, name: str, chunked: bool) -> None:
    samples = [{"prompt": "p" * (k % 5), "completion": "abcdefgh"[k % 8 :] * (k % 7 + 1)} for k in range(16)]
    packed, alone = rows_of(samples, tmp_path, max_length=96), rows_of(samples, tmp_path, max_length=96, pack=False)
    assert len(packed) < 8
    torch.manual_seed(0)
    plain = MODELS[name]()
    torch.manual_seed(0)
    cfg = Config(model=ModelConfig(chunked_loss=chunked), data=DataConfig(max_length=96))
    ours = finetune.with_loss(MODELS[name](), cfg)
    losses = {}
    for row in range(len(alone)):
        batch = alone.__getitems__([row])
        length = int(alone.lengths[row])
        logits = plain(input_ids=batch["input_ids"][:, :length]).logits[0]
        targets = batch["targets"][0, :length]
        losses[row] = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
    for row, spans in enumerate(packed.rows):
        batch, at = packed.__getitems__([row]), 0
        for span in spans.tolist():  # one sample's targets at a time: its loss, in the company of the others
            end = at + span[2] - span[1]
            targets = torch.full_like(batch["targets"], IGNORED)
            targets[:, at:end] = batch["targets"][:, at:end]
            number = next(k for k, [one] in enumerate(alone.rows) if one.tolist() == span)
            with torch.no_grad():
                loss = ours(**batch | {"targets": targets})
            assert loss.item() == pytest.approx(losses[number].item(), rel=1e-5, abs=1e-5)
            at = end
    total = ours(**every(packed))
    assert total.item() == pytest.approx(sum(loss.item() for loss in losses.values()), rel=1e-5)
    total.backward()
    sum(losses.values()).backward()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert (mine.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max().clamp(min=1)


def test_unpacked_losses_are_those_of_the_samples(tmp_path: Path) -> None:
    samples = [{"prompt": "ab", "completion": "cde"}, {"prompt": "", "completion": "f" * 70}]
    rows = rows_of(samples, tmp_path, pack=False)
    model = finetune.with_loss(MODELS["llama"](), Config(data=DataConfig(pack=False)))
    alone = [model(**rows.__getitems__([row])).item() for row in range(2)]
    assert model(**every(rows)).item() == pytest.approx(sum(alone), rel=1e-5)


def bloom() -> transformers.PreTrainedModel:
    sizes = {"vocab_size": 300, "hidden_size": 32, "n_layer": 1, "n_head": 2}
    return transformers.BloomForCausalLM(transformers.BloomConfig(**sizes))


def granite() -> transformers.PreTrainedModel:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, **heads, logits_scaling=8.0))


def lfm2() -> transformers.PreTrainedModel:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.Lfm2Config(**SIZES, **heads, layer_types=["conv", "full_attention"])
    return transformers.Lfm2ForCausalLM(config)


def gemma2() -> transformers.PreTrainedModel:
    """Its logits are capped at 30, which small ones hardly show."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, **heads))


def phi() -> transformers.PreTrainedModel:
    """Its head has a bias, which is 0 at first."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES, **heads))


def llama4() -> transformers.PreTrainedModel:
    """Its decoder is not the one of the library's other models."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    experts = {"intermediate_size_mlp": 64, "num_local_experts": 2}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**SIZES, **heads, **experts, pad_token_id=0))


@pytest.mark.parametrize(
    ("make", "chunked", "message"),
    [
        (bloom, False, "BloomForCausalLM lets samples of a row see each other: add --data.no-pack"),
        (lfm2, False, "Lfm2ForCausalLM lets samples of a row see each other: add --data.no-pack"),
        (granite, True, "GraniteForCausalLM does more for its logits: drop --model.chunked-loss"),
        (gemma2, True, "Gemma2ForCausalLM does more for its logits: drop --model.chunked-loss"),
        (phi, True, "PhiForCausalLM does more for its logits: drop --model.chunked-loss"),
        (llama4, True, "Llama4ForCausalLM does more for its logits: drop --model.chunked-loss"),
    ],
)
def test_what_would_change_the_losses_is_refused(make: Any, chunked: bool, message: str) -> None:
    torch.manual_seed(0)
    model = make()
    with pytest.raises(launcher.UsageError, match=message):
        finetune.with_loss(model, Config(model=ModelConfig(chunked_loss=chunked)))
    finetune.with_loss(model, Config(data=DataConfig(pack=False)))


def test_tokens_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"prompt": f"q{k}", "completion": f"a{k}"}) for k in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(finetune, "PART", 16)
    data = DataConfig(files=(str(tmp_path / "a.jsonl"),), cache=str(tmp_path / "tokens"), max_length=16)
    train, test, _ = finetune.load_rows(data, TOKENIZER)
    assert [part.shape[0] for part in train.parts] == [3, 3, 3]
    assert (sum(map(len, train.rows)), sum(map(len, test.rows))) == (38, 2)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "tokenise", lambda *_: pytest.fail("tokenised again"))
        again, *_ = finetune.load_rows(data, TOKENIZER)
        finetune.load_rows(replace(data, pack=False), TOKENIZER)
    assert all(a.equal(b) for a, b in zip(every(train).values(), every(again).values(), strict=True))
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:20]))
    assert sum(map(len, finetune.load_rows(data, TOKENIZER)[0].rows)) == 19


def test_text_files_give_a_sample_a_paragraph(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n\nfour")
    samples = finetune.load_samples(DataConfig(files=(str(tmp_path / "a.txt"),)))
    assert list(samples) == [{"completion": text} for text in ("one\ntwo", "three", "four")]


@pytest.mark.parametrize("names", [("prompt", "completion"), ("question", "answer")])
def test_json_lines_give_prompts_and_completions(tmp_path: Path, names: tuple[str, str]) -> None:
    lines = [{names[0]: f"q{k}", names[1]: f"a{k}", "unused": k} for k in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = DataConfig(files=(str(tmp_path / "a.jsonl"),), prompt=names[0], completion=names[1])
    assert list(finetune.load_samples(data)) == [{"prompt": f"q{k}", "completion": f"a{k}"} for k in range(40)]


def test_default_samples() -> None:
    samples = finetune.load_samples(DataConfig())
    assert len(samples) > 1000
    assert all(prompt.endswith(": ") for prompt in samples["prompt"])
    assert samples._fingerprint == finetune.load_samples(DataConfig())._fingerprint  # by which tokens are kept


def trained(cfg: Config) -> list[str]:
    model = finetune.load_model(cfg, len(TOKENIZER))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_freezing() -> None:
    names = trained(Config(model=ModelConfig(freeze_embeddings=True, freeze_layers=3)))
    assert {name.split(".")[0] for name in names} == {"model", "lm_head"}
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"3"}
    assert not any("embed" in name for name in names)
    with pytest.raises(launcher.UsageError, match=r"--model\.freeze-layers 5: the model has 4 layers"):
        trained(Config(model=ModelConfig(freeze_layers=5)))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("frozen", [0, 3])
def test_lora_trains_the_adapters_alone_and_none_of_frozen_layers(frozen: int) -> None:
    names = trained(Config(model=ModelConfig(freeze_layers=frozen), lora=LoraConfig(rank=2)))
    assert len(names) == 2 * (4 - frozen) * 7  # two matrices for each of a block's seven
    assert all("lora_" in name for name in names)
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == set(range(frozen, 4))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_something_must_be_left_to_train() -> None:
    with pytest.raises(launcher.UsageError, match=r"--model\.freeze-layers 4 leaves nothing to train: freeze fewer"):
        trained(Config(model=ModelConfig(freeze_layers=4), lora=LoraConfig(rank=2)))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (Config(model=ModelConfig(freeze_layers=-1)), "--model.freeze-layers -1: give at least 0"),
        (Config(data=DataConfig(max_length=0)), "--data.max-length 0: give at least 2"),
        (Config(data=DataConfig(max_length=1)), "--data.max-length 1: give at least 2"),
        (Config(data=DataConfig(max_length=-3)), "--data.max-length -3: give at least 2"),
        (Config(data=DataConfig(held_out=0.0)), "--data.held-out 0.0: give more than 0 and less than 1"),
        (Config(data=DataConfig(held_out=1.0)), "--data.held-out 1.0: give more than 0 and less than 1"),
        (Config(lora=LoraConfig(rank=-1)), "--lora.rank -1: give at least 0"),
        (Config(lora=LoraConfig(dropout=1.5)), "--lora.dropout 1.5: give at least 0 and less than 1"),
        (Config(lr=-1e-3), "--lr -0.001: give at least 0"),
        (Config(weight_decay=float("nan")), "--weight-decay nan: give at least 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_all_else(cfg: Config, message: str) -> None:
    with pytest.raises(launcher.UsageError) as raised:
        finetune.train(None, cfg)  # type: ignore[arg-type]
    assert str(raised.value) == message


def test_weights_of_a_local_directory(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = finetune.load_model(Config(), len(TOKENIZER))
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()
    cfg = Config(model=ModelConfig(path=str(tmp_path / "model")))
    torch.manual_seed(2)
    loaded = finetune.load_model(cfg, 0)
    assert all(a.equal(b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert isinstance(finetune.load_tokenizer(cfg.model.path), transformers.PreTrainedTokenizerBase)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataConfig(files=("a.txt", "b.jsonl")), "give either .txt or .jsonl files"),
        (DataConfig(files=("a.csv",)), "give either .txt or .jsonl files"),
        (DataConfig(files=("missing.txt",)), "cannot load samples from missing.txt: "),
        (DataConfig(files=("other.jsonl",)), "other.jsonl has the columns a, b: give --data.text"),
        (DataConfig(files=("broken.jsonl",)), "cannot load samples from broken.jsonl: "),
        (DataConfig(files=("empty.jsonl",)), "cannot load samples from empty.jsonl: no sample"),
    ],
)
def test_wrong_data_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: DataConfig, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.jsonl").write_text('{"a": "1", "b": "2"}\n')
    Path("broken.jsonl").write_text("no json\n")
    Path("empty.jsonl").touch()
    with pytest.raises(launcher.UsageError, match=message) as raised:
        finetune.load_samples(data)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", ["missing", "./missing", "empty"])
def test_a_wrong_model_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    cfg = replace(Config(), model=ModelConfig(path=path))
    with pytest.raises(launcher.UsageError, match=f"--model.path {path}: ") as raised:
        finetune.load_model(cfg, len(finetune.load_tokenizer(path)))
    assert "\n" not in str(raised.value)


def test_a_tokenizer_needs_an_end(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "fox": 1}, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path / "model")
    with pytest.raises(
        launcher.UsageError, match="the tokenizer has no token that ends a sample: name its eos_token in"
    ):
        finetune.load_tokenizer(str(tmp_path / "model"))
