"""recipes/finetune.py: samples, batches, and what of a model trains; its runs are in test_runs.py."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import launcher
from recipes import finetune
from recipes.finetune import IGNORED, Config, DataConfig, LoraConfig, ModelConfig

TOKENIZER = finetune.load_tokenizer(None)
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_prompts_and_padding_are_not_learnt() -> None:
    collate = finetune.Collate(TOKENIZER, max_length=256)
    batch = collate([{"prompt": "ab", "completion": "cde"}, {"completion": "f" * 70}])
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(batch, (2, 128))
    letters = [TOKENIZER.encode(letter, add_special_tokens=False)[0] for letter in "abcdef"]
    assert batch["input_ids"][0, :7].tolist() == [*letters[:5], EOS, PAD]
    assert batch["labels"][0, :7].tolist() == [IGNORED, IGNORED, *letters[2:5], EOS, IGNORED]
    assert batch["attention_mask"].sum(dim=1).tolist() == [6, 71]
    assert finetune.learnt(batch) == 4 + 70  # nothing stands before the first token of a sample without a prompt


def test_long_samples_are_cut() -> None:
    collate = finetune.Collate(TOKENIZER, max_length=10)
    batch = collate([{"prompt": "abc", "completion": "x" * 50}, {"prompt": "y" * 50, "completion": "z"}])
    assert batch["input_ids"].shape == (2, 10)
    assert finetune.learnt(batch) == 7  # and none of the sample whose prompt alone is too long


def test_the_loss_is_that_of_the_learnt_tokens() -> None:
    model = finetune.load_model(Config(), len(TOKENIZER)).eval()
    collate = finetune.Collate(TOKENIZER, max_length=256)
    samples = [{"prompt": "ab", "completion": "cde"}, {"prompt": "", "completion": "f" * 70}]
    alone = [finetune.loss_sum(model, collate([sample])).item() for sample in samples]
    assert finetune.loss_sum(model, collate(samples)).item() == pytest.approx(sum(alone), rel=1e-5)
    logits = model(input_ids=collate(samples[:1])["input_ids"][:, :6]).logits.log_softmax(-1)[0]
    targets = collate(samples[:1])["input_ids"][0, 2:6]
    assert alone[0] == pytest.approx(-logits[1:5].gather(1, targets[:, None]).sum().item(), rel=1e-5)


def test_text_files_give_a_sample_a_paragraph(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n\nfour")
    train, test = finetune.load_samples(DataConfig(files=(str(tmp_path / "a.txt"),)))
    assert sorted(row["completion"] for part in (train, test) for row in part) == ["four", "one\ntwo", "three"]
    assert len(test) == 1


@pytest.mark.parametrize("names", [("prompt", "completion"), ("question", "answer")])
def test_json_lines_give_prompts_and_completions(tmp_path: Path, names: tuple[str, str]) -> None:
    lines = [{names[0]: f"q{k}", names[1]: f"a{k}", "unused": k} for k in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = DataConfig(files=(str(tmp_path / "a.jsonl"),), prompt=names[0], completion=names[1])
    train, test = finetune.load_samples(data)
    assert (len(train), len(test)) == (38, 2)
    assert all(row == {"prompt": "q" + row["completion"][1:], "completion": row["completion"]} for row in train)


def test_default_samples() -> None:
    train, test = finetune.load_samples(DataConfig())
    assert len(train) > 1000
    assert all(row["prompt"].endswith(": ") for row in test)


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
def test_lora_trains_the_adapters_alone() -> None:
    names = trained(Config(lora=LoraConfig(rank=2)))
    assert len(names) == 2 * 4 * 7  # two matrices for each of a block's seven
    assert all("lora_" in name for name in names)


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
    ],
)
def test_wrong_data_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: DataConfig, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.jsonl").write_text('{"a": "1", "b": "2"}\n')
    Path("broken.jsonl").write_text("no json\n")
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
