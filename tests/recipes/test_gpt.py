"""recipes/gpt.py: preparing text, and the model; its runs are in test_runs.py."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

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
    rows = gpt.load(directory, split).with_format("numpy")[:]["tokens"]
    assert (rows[1:, 0] == rows[:-1, -1]).all()  # a row begins where the one before ends
    return [*rows[0].tolist(), *rows[1:, 1:].reshape(-1).tolist()]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_rows_are_the_documents_joined(data: gpt.DataConfig, tokenizer: str) -> None:
    data = replace(data, tokenizer=tokenizer, vocab_size=300)
    directory = gpt.prepare(data)
    made = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert made.get_vocab_size() == (257 if tokenizer == "byte" else 300)
    end = made.token_to_id(data.end_of_text)
    texts: dict[str, list[str]] = {}
    for split in ("train", "held_out"):
        [part] = gpt.cut(gpt.text_files(data))
        texts[split] = list(gpt.documents(part, held_out=split == "held_out"))
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


@pytest.mark.parametrize("size", [1, 37, 1000, 30_000])
def test_parts_hold_every_line_once(data: gpt.DataConfig, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    files = [Path(name) for name in data.files]
    files[0].write_bytes(files[0].read_bytes()[:2500])
    monkeypatch.setattr(gpt, "PART", size)
    parts = gpt.cut(files)
    assert all(sum(stop - start for _, start, stop in part) == size for part in parts[:-1])
    for file in files:
        spans = [span for part in parts for span in part if span[0] == file]
        assert "".join(gpt.lines(*span).read() for span in spans) == file.read_text()


def test_parts_are_packed_by_several_processes(data: gpt.DataConfig, tmp_path: Path) -> None:
    source = f"""
from recipes import gpt
from recipes.gpt import DataConfig
gpt.PART, gpt.DOCUMENT = 10_000, 500
print(gpt.prepare({data!r}))
"""
    command, env = [sys.executable, "-c", source], {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=env, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    outputs = [process.communicate() for process in processes]
    assert len({out for out, _ in outputs}) == 1, outputs
    directory = Path(outputs[0][0].strip())
    whole = "".join(Path(file).read_text() for file in data.files)
    assert len(list(directory.glob("train-*.arrow"))) == -(-len(whole.encode()) // 10_000)
    made = Tokenizer.from_file(str(directory / "tokenizer.json"))
    rows = [*gpt.load(directory, "train").with_format("numpy")[:]["tokens"]]
    texts = [made.decode(row.tolist()) for row in rows]
    assert sum(text.count("quick") for text in texts) > 0.7 * whole.count("quick")
    assert sum(map(len, texts)) < 1.1 * len(whole), "nothing twice"


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


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer"])
def test_rows_are_packed_anew_when_a_tokenizer_file_changes(data: gpt.DataConfig, tmp_path: Path, name: str) -> None:
    given, sizes = tmp_path / name, []
    for size in (290, 280):
        made = gpt.prepare(replace(data, tokenizer="bpe", vocab_size=size)) / "tokenizer.json"
        given.write_bytes(made.read_bytes())
        directory = gpt.prepare(replace(data, tokenizer=str(given)))
        sizes.append(Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab_size())
    assert sizes == [290, 280]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": ("missing.txt",)}, "--data.files missing.txt: no such file"),
        ({"files": (".",)}, r"--data.files \.: no such file"),
        ({"tokenizer": "missing.json"}, "--data.tokenizer missing.json: not byte, bpe or the path"),
        ({"tokenizer": "."}, r"--data.tokenizer \.: not byte, bpe or the path"),
        ({"cache": "latin.txt"}, "cannot prepare the data: latin.txt/.*: Not a directory"),
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
        gpt.load(gpt.prepare(replace(data, **change)), "train")
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


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"attention": "flex", "loss_chunk": 8, "kv_heads": 2}])
def test_compiles_whole_and_once(changes: dict[str, object]) -> None:
    model = small(**changes)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        batch = torch.randint(0, 257, (2, 17))
        compiled(batch[:, :-1], batch[:, 1:]).backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "--model.width 128 must be a multiple of twice --model.heads 3"),
        ({"kv_heads": 3}, "--model.heads 4 must be a multiple of --model.kv-heads 3"),
        ({"attention": "flex", "dropout": 0.1}, "--model.attention flex has no dropout of attention"),
        ({"depth": 0}, "--model.depth 0: give at least 1"),
        ({"width": 0}, "--model.width 0: give at least 1"),
        ({"heads": 0}, "--model.heads 0: give at least 1"),
        ({"kv_heads": -2}, "--model.kv-heads -2: give at least 0"),
        ({"rope_base": 0.0}, "--model.rope-base 0.0: give at least 1"),
        ({"rope_base": float("nan")}, "--model.rope-base nan: give at least 1"),
        ({"hidden": -5}, "--model.hidden -5: give at least 0"),
        ({"vocab_multiple": 0}, "--model.vocab-multiple 0: give at least 1"),
        ({"loss_chunk": -1}, "--model.loss-chunk -1: give at least 0"),
        ({"dropout": 1.5}, "--model.dropout 1.5: give at least 0 and less than 1"),
        ({"data": gpt.DataConfig(vocab_size=10)}, "--data.vocab-size 10: give at least 257"),
        ({"data": gpt.DataConfig(seq_len=0)}, "--data.seq-len 0: give at least 1"),
        ({"data": gpt.DataConfig(seq_len=-4)}, "--data.seq-len -4: give at least 1"),
        ({"lr": -1.0}, "--lr -1.0: give at least 0"),
        ({"warmup": -1}, "--warmup -1: give at least 0"),
        ({"weight_decay": -0.5}, "--weight-decay -0.5: give at least 0"),
        ({"eval_rows": 0}, "--eval-rows 0: give at least 1"),
        ({"temperature": 0.0}, "--temperature 0.0: give at least 0.01"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_all_else(changes: dict[str, object], message: str) -> None:
    whole = {name: changes[name] for name in changes.keys() & {one.name for one in fields(gpt.Config)}}
    model = gpt.ModelConfig(**{name: changes[name] for name in changes.keys() - whole})  # type: ignore[arg-type]
    with pytest.raises(launcher.UsageError) as raised:
        gpt.train(None, gpt.Config(model=model, **whole))  # type: ignore[arg-type]
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_products_in_8_bits_need_a_gpu_and_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(launcher.UsageError, match=r"--model\.fp8 needs ") as raised:
        small(fp8=True)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("cfg", "vocab_size", "parameters"),
    [
        (gpt.ModelConfig(depth=22, width=2048, heads=32, kv_heads=4, hidden=5632, tie=False), 32_000, 1_100_048_384),
        (gpt.ModelConfig(depth=16, width=2048, heads=32, kv_heads=8, hidden=8192), 128_256, 1_235_814_400),
    ],
    ids=["TinyLlama", "Llama 3.2 1B"],
)
def test_llamas_have_their_parameters(cfg: gpt.ModelConfig, vocab_size: int, parameters: int) -> None:
    with torch.device("meta"):
        model = gpt.GPT(cfg, vocab_size=vocab_size, seq_len=2048)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp": "gelu"},
        {"tie": False, "loss_chunk": 64},
        {"kv_heads": 1, "hidden": 96, "attention": "flex"},
    ],
    ids=str,
)
def test_flops_are_those_that_are_counted(changes: dict[str, object]) -> None:
    model = gpt.GPT(replace(gpt.ModelConfig(depth=2, width=64), **changes), vocab_size=257, seq_len=128)  # type: ignore[arg-type]
    batch = torch.randint(0, 257, (2, 129))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # others compute scores twice
        model(batch[:, :-1], batch[:, 1:]).backward()
    assert counter.get_total_flops() / (2 * 128) == pytest.approx(model.flops_per_token(128), rel=0.01)


def test_shared_keys_are_keys_that_are_repeated() -> None:
    shared, full = small(kv_heads=2).eval(), small().eval()
    state = shared.state_dict()
    for name in [name for name in state if "qkv" in name]:
        q, k, v = state[name].split([64, 32, 32])
        wide = [one.view(2, 16, 64).repeat_interleave(2, dim=0).reshape(64, 64) for one in (k, v)]
        state[name] = torch.cat([q, *wide])
    full.load_state_dict(state)
    batch = torch.randint(0, 257, (2, 16))
    torch.testing.assert_close(shared(batch), full(batch))


END = 256


def two_documents() -> tuple[torch.Tensor, torch.Tensor]:
    """A row of 16 with a document that begins at 6, and the row with another document before that one."""
    row = torch.randint(0, END, (1, 16))
    other = torch.randint(0, END, (1, 16))
    row[0, 6], other[0, 6:] = END, row[0, 6:]
    other[0, 6] = END
    return row, other


def test_a_document_does_not_see_the_one_before_it() -> None:
    model = small(attention="flex").eval()
    model.end_of_text = END
    row, other = two_documents()
    before, after = model(row), model(other)
    assert before[:, 6:].equal(after[:, 6:])
    assert not before[:, :6].equal(after[:, :6])
    # nor does it begin elsewhere: it is what it would be alone
    torch.testing.assert_close(before[:, 6:], model(row[:, 6:]))
    plain = small().eval()
    assert not plain(row)[:, 6:].equal(plain(other)[:, 6:])
    torch.testing.assert_close(before[:, :6], plain(row)[:, :6])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_dense_mask_is_the_blocks_mask() -> None:
    row, other = two_documents()
    batch = torch.cat([row, other])
    dense = gpt.document_mask(batch, END)
    assert isinstance(dense, torch.Tensor)
    # what a GPU does with these tokens, without a compiler
    mask = gpt.block_mask((batch == END).cumsum(1), create_block_mask)
    q, k, v = torch.randn(3, 2, 4, 16, 8)
    with torch.no_grad():
        flex = flex_attention(q, k[:, :2], v[:, :2], block_mask=mask, enable_gqa=True)
    torch.testing.assert_close(flex, gpt.attend(q, k[:, :2], v[:, :2], dense, 0.0))


def test_chunks_of_the_loss_change_nothing_but_memory() -> None:
    batch = torch.randint(0, 257, (3, 17))
    found = []
    for chunk in (0, 7):
        model = small(loss_chunk=chunk)
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        found.append((loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
    torch.testing.assert_close(found[0], found[1])


class Casts(TorchDispatchMode):
    """How often each shape is cast to bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is torch.bfloat16:
            self.shapes[tuple(args[0].shape)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunk", [0, 16])
def test_in_half_precision_weights_gradients_and_residuals_are_fp32(chunk: int) -> None:
    model = small(loss_chunk=chunk, tie=False, depth=1, hidden=100)
    seen: dict[str, torch.dtype] = {}
    model.blocks[0].register_forward_hook(lambda module, args, out: seen.update(residual=out.dtype))
    model.blocks[0].mlp.up.register_forward_hook(lambda module, args, out: seen.update(product=out.dtype))
    batch = torch.randint(0, 257, (3, 17))
    with Casts() as casts:
        for _ in range(2):  # micro-batches: what autocast keeps of weights does not outlive its context
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(batch[:, :-1], batch[:, 1:])
            loss.backward()
    assert seen == {"residual": torch.float32, "product": torch.bfloat16}
    matrices = Counter(tuple(p.shape) for p in [*model.blocks.parameters(), model.head.weight] if p.dim() == 2)
    assert {shape: casts.shapes[shape] for shape in matrices} == {shape: 2 * n for shape, n in matrices.items()}
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    model = small(tie=False)
    muon, adamw = gpt.make_optimizers(model, gpt.Config(optimizer="muon"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    own = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert own == {name for name, p in model.blocks.named_parameters(prefix="blocks") if p.dim() == 2}
    decayed, plain = ([names[id(p)] for p in group["params"]] for group in adamw.param_groups)
    assert decayed == ["embedding.weight", "head.weight"]
    assert all("norm" in name for name in plain)
    assert own.isdisjoint(decayed + plain)
    assert len(own) + len(decayed) + len(plain) == len(names)
