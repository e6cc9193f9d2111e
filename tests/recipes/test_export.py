"""A model that was fine-tuned here is one that transformers loads, and that can be fine-tuned on."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from launcher.checkpoint import State, Store, read_index, save
from launcher.checkpoint.reading import read_tensors
from launcher.cli import main
from launcher.state import add_module
from launcher.world import World
from recipes import finetune

TOKENIZER = finetune.load_tokenizer(None)
QUICK = ("--data.held-out", "0.002", "--data.max-length", "64", "--run.threads", "1", "--batch-size", "4")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def llama(**settings: Any) -> transformers.LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(TOKENIZER), **sizes, **settings))


def from_pretrained(path: Path) -> transformers.PreTrainedModel:
    """The model in a directory, which must hold all of its weights and no others."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return model


def save_model(model: torch.nn.Module, root: Path) -> Path:
    state = State()
    add_module(state, "model", model)
    return save(Store(root), World(), 1, state, attempt=1)


def test_a_trained_model_is_loaded_by_transformers_and_trained_on(tmp_path: Path, run_recipe: Any) -> None:
    run_recipe(finetune.train, "--steps", 2, "--run.dir", tmp_path / "run", *QUICK)
    output = tmp_path / "exported"
    assert main(["ckpt", "export", str(tmp_path / "run"), "-o", str(output), "--shard-size", "200kB"]) == 0
    finetune.load_model(finetune.Config(), len(TOKENIZER)).config.save_pretrained(output)
    TOKENIZER.save_pretrained(output)
    assert len(list(output.glob("model-*.safetensors"))) > 1

    path = Store(tmp_path / "run" / "checkpoints").newest()
    index = read_index(path)
    weights = from_pretrained(output).state_dict()
    saved = {name for name in index.tensors if name.startswith("model/")}
    assert {f"model/{name}" for name in weights} == saved
    for name, tensor in read_tensors(path, index, saved):
        assert tensor.equal(weights[name.removeprefix("model/")])

    said = run_recipe(finetune.train, "--steps", 1, "--model.path", output, "--run.dir", tmp_path / "next", *QUICK)
    assert "held-out loss" in said


def test_a_tied_model(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    path = save_model(model, tmp_path / "c")
    assert len(read_index(path).aliases) == 1
    for options in ([], ["--copy-ties"]):
        output = tmp_path / f"out{len(options)}"
        assert main(["ckpt", "export", str(path), "-o", str(output), *options]) == 0
        model.config.save_pretrained(output)
        loaded = from_pretrained(output)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert all(a.equal(b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_frozen_parameters_come_from_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = llama().to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    TOKENIZER.save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model.model.layers[0].requires_grad_(False)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.001)  # as training does: bf16 cannot hold it
    path = save_model(model, tmp_path / "c")
    output = tmp_path / "out"
    assert main(["ckpt", "export", str(path), "-o", str(output), "--base", str(tmp_path / "base")]) == 0
    said = capsys.readouterr()
    assert ", 9 of them and 3 other files from " in said.out
    assert "launcher: the tensors are BF16 and F32, which from_pretrained makes one: --dtype does it" in said.err
    found = from_pretrained(output)
    wanted = dict(model.named_parameters())
    assert all(tensor.float().equal(wanted[name]) for name, tensor in found.named_parameters() if ".0." in name)
    single = tmp_path / "fp32"
    assert main(["ckpt", "export", str(path), "-o", str(single), "--base", str(tmp_path / "base"), "--dtype=fp32"]) == 0
    found = from_pretrained(single)
    assert found.dtype == torch.float32
    assert all(tensor.equal(wanted[name]) for name, tensor in found.named_parameters())
