"""recipes/gpt.py: preparing text, and the model; its runs are in test_runs.py."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch._dynamo.testing import CompileCounter

import launcher
from recipes import gpt
from tests.harness import ROOT

WORDS = "the quick brown fox jumps over the lazy dog and naïve cafés stay open\n"


@pytest.fixture
def data(tmp_path: Path) -> gpt.DataConfig:
    """Two files: one of several documents, one of a single short one."""
    (tmp_path / "long.txt").write_text("".join(f"{k} {WORDS}" for k in range(1200)))
    (tmp_path / "short.txt").write_text("one short document, without a newline at its end")
    files = (str(tmp_path / "long.txt"), str(tmp_path / "short.txt"))
    return gpt.DataConfig(files=files, seq_len=32, cache=str(tmp_path / "cache"))


def tokens(directory: Path, split: str) -> list[int]:
    """The packed tokens in order, each once."""
    rows = gpt.load(directory / f"{split}.arrow").with_format("numpy")[:]["tokens"]
    assert (rows[1:, 0] == rows[:-1, -1]).all()  # a row begins where the one before ends
    return [*rows[0].tolist(), *rows[1:, 1:].reshape(-1).tolist()]


def in_a_process(source: str, data: gpt.DataConfig) -> subprocess.Popen[str]:
    """Python that has `gpt` and `data`."""
    head = f"import os, signal, time\nfrom recipes import gpt\nfrom recipes.gpt import DataConfig\ndata = {data!r}\n"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", head + source], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_rows_are_the_documents_joined(data: gpt.DataConfig, tokenizer: str) -> None:
    data = replace(data, tokenizer=tokenizer, vocab_size=300)
    directory = gpt.prepare(data)
    made = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert made.get_vocab_size() == (257 if tokenizer == "byte" else 300)
    end = made.token_to_id(data.end_of_text)
    texts: dict[str, list[str]] = {}
    for split in ("train", "held_out"):
        texts[split] = list(gpt.documents(gpt.text_files(data), held_out=split == "held_out"))
        expected = [token for text in texts[split] for token in [*made.encode(text).ids, end]]
        packed = tokens(directory, split)
        assert packed == expected[: len(packed)]
        assert len(expected) - len(packed) < data.seq_len  # an incomplete row, no more
        assert texts[split][0].startswith(made.decode(packed[:100]))
    whole = "".join(Path(file).read_text() for file in data.files)
    assert sum(map(len, texts["train"])) + sum(map(len, texts["held_out"])) == len(whole)
    assert not set(texts["train"]) & set(texts["held_out"])


def test_default_text_is_the_standard_library() -> None:
    files = gpt.text_files(gpt.DataConfig())
    size = sum(file.stat().st_size for file in files)
    assert 0.9 * gpt.STDLIB_BYTES < size <= gpt.STDLIB_BYTES
    assert not any({"test", "tests", "site-packages"} & set(file.parts) for file in files)
    assert files == gpt.text_files(gpt.DataConfig())


def test_two_processes_prepare_once(data: gpt.DataConfig, tmp_path: Path) -> None:
    source = """
pack = gpt.pack
def slow(path, *rest):
    with open({log!r}, "a") as log:
        log.write(path.name + "\\n")
    time.sleep(0.5)
    pack(path, *rest)
gpt.pack = slow
print(gpt.prepare(data))
""".format(log=str(tmp_path / "log"))
    outputs = [process.communicate() for process in [in_a_process(source, data) for _ in range(2)]]
    assert outputs[0][0] == outputs[1][0] == f"{gpt.prepare(data)}\n", outputs
    assert (tmp_path / "log").read_text().split() == ["train.arrow", "held_out.arrow"]


def test_interrupted_preparation_leaves_nothing_that_is_read(data: gpt.DataConfig, tmp_path: Path) -> None:
    source = """
pack = gpt.pack
def die(path, *rest):
    pack(path, *rest)
    if path.name == "held_out.arrow":
        os.kill(os.getpid(), signal.SIGKILL)
gpt.pack = die
gpt.prepare(data)
"""
    process = in_a_process(source, data)
    output = process.communicate()
    assert process.returncode == -9, output
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [".partial"]
    (tmp_path / "cache" / next((tmp_path / "cache").glob("*.partial")) / "stray").touch()
    directory = gpt.prepare(data)
    other = gpt.prepare(replace(data, cache=str(tmp_path / "fresh")))
    names = ["held_out.arrow", "tokenizer.json", "train.arrow"]
    assert sorted(path.name for path in directory.iterdir()) == names
    assert all((directory / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_rows_are_packed_anew_when_what_they_depend_on_changes(data: gpt.DataConfig) -> None:
    first = gpt.prepare(data)
    assert gpt.prepare(data) == first
    keys = {first}
    keys.add(gpt.prepare(replace(data, seq_len=16)))
    keys.add(gpt.prepare(replace(data, tokenizer="bpe", vocab_size=280)))
    keys.add(gpt.prepare(replace(data, tokenizer="bpe", vocab_size=281)))
    keys.add(gpt.prepare(replace(data, files=data.files[:1])))
    text = Path(data.files[0]).read_text()
    Path(data.files[0]).write_text(text.replace("fox", "cat"))  # of the same size
    os.utime(data.files[0], ns=(1, 1))
    keys.add(gpt.prepare(data))
    assert len(keys) == 6


def test_a_tokenizer_file_is_used_as_it_is(data: gpt.DataConfig) -> None:
    trained = gpt.prepare(replace(data, tokenizer="bpe", vocab_size=290)) / "tokenizer.json"
    directory = gpt.prepare(replace(data, tokenizer=str(trained)))
    assert Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab_size() == 290


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": ("missing.txt",)}, "cannot prepare the text: missing.txt: No such file"),
        ({"files": (".",)}, r"cannot prepare the text: \.: Is a directory"),
        ({"tokenizer": "missing.json"}, "cannot prepare the text: missing.json: No such file"),
        ({"cache": "latin.txt"}, "cannot prepare the text: latin.txt: File exists"),
        ({"tokenizer": "words"}, "--data.tokenizer words: not byte, bpe or the path"),
        ({"seq_len": 100_000}, "too little text for train rows"),
        ({"files": ("latin.txt",)}, "latin.txt is not UTF-8"),
        ({"tokenizer": "broken.json"}, "--data.tokenizer broken.json: not byte"),
    ],
)
def test_what_a_person_can_get_wrong_is_one_line(
    data: gpt.DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes("café".encode("latin-1"))
    Path("broken.json").write_text("{}")
    with pytest.raises(launcher.UsageError, match=message) as raised:
        gpt.load(gpt.prepare(replace(data, **change)) / "train.arrow")
    assert "\n" not in str(raised.value)


def test_a_tokenizer_needs_the_end_of_text(data: gpt.DataConfig) -> None:
    path = gpt.prepare(data) / "tokenizer.json"
    with pytest.raises(launcher.UsageError, match=r"--data\.end-of-text </s>: no token of"):
        gpt.prepare(replace(data, tokenizer=str(path), end_of_text="</s>"))


def small(**changes: object) -> gpt.GPT:
    torch.manual_seed(0)
    return gpt.GPT(replace(gpt.ModelConfig(depth=2, width=64), **changes), vocab_size=257, seq_len=16)  # type: ignore[arg-type]


@pytest.mark.parametrize(("tie", "mlp"), [(True, "swiglu"), (False, "gelu")])
def test_shapes_and_the_loss_of_an_untrained_model(tie: bool, mlp: str) -> None:
    model = small(tie=tie, mlp=mlp)
    batch = torch.randint(0, 257, (3, 17))
    assert model(batch[:, :16]).shape == (3, 16, 320)  # 257 padded to a multiple of 64
    loss = model(batch[:, :-1], batch[:, 1:])
    assert loss.dtype == torch.float32
    assert abs(loss.item() / (3 * 16) - np.log(320)) < 0.1
    assert (model.head.weight is model.embedding.weight) == tie


def test_gpt2_has_124_million_parameters() -> None:
    with torch.device("meta"):
        model = gpt.GPT(gpt.ModelConfig(depth=12, width=768, heads=12, mlp="gelu"), vocab_size=50257, seq_len=1024)
    # GPT-2's 124.4 million, without its biases and learnt positions, with a padded vocabulary
    assert sum(parameter.numel() for parameter in model.parameters()) == 123_587_328
    assert model.flops_per_token(1024) == 6 * (12 * 12 * 768**2 + 50304 * 768) + 12 * 12 * 768 * 1024


def test_a_token_sees_only_those_before_it() -> None:
    model = small().eval()
    batch = torch.randint(0, 257, (1, 16))
    changed = batch.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 257
    before, after = model(batch), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10], rtol=0, atol=1e-6)
    assert (before[0, 10] - after[0, 10]).abs().max() > 1e-3


def test_rotation_makes_products_depend_on_distance_alone() -> None:
    model = small()
    q, k = torch.randn(2, 1, 16).expand(2, 16, 16)  # one vector at each of 16 places
    products = gpt.rotate(q, model.cos, model.sin) @ gpt.rotate(k, model.cos, model.sin).T
    for distance in range(-15, 16):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    assert products.diagonal(1)[0] != products.diagonal(2)[0]


def test_compiles_whole_and_once() -> None:
    model = small(dropout=0.1)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        batch = torch.randint(0, 257, (2, 17))
        compiled(batch[:, :-1], batch[:, 1:]).backward()
    assert counter.frame_count == 1


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(launcher.UsageError, match=r"--model\.width 64 must be a multiple of twice --model\.heads 3"):
        small(heads=3)
