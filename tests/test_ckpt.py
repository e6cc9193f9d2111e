"""`launcher ckpt`: what it lists, finds, compares and removes; and that every fault is one line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoint import State, Store, read_index, save, verifying
from launcher.checkpoint.files import BLOCK
from launcher.cli import main
from launcher.errors import LauncherError
from launcher.world import World

ROOT = Path(__file__).parent.parent
Ckpt = Callable[..., tuple[str, str]]


@pytest.fixture
def ckpt(capsys: pytest.CaptureFixture[str]) -> Ckpt:
    """Run `launcher ckpt ARGV`; what it printed, and the lines of its error. `code` is the exit code it must have."""

    def run(*argv: object, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        left = main(["ckpt", *map(str, argv)])
        printed = capsys.readouterr()
        assert left == code, printed
        if printed.err:
            assert printed.err.startswith("launcher: ")
            assert printed.err.count("\n") == 1
        return printed.out, printed.err

    return run


def weights(step: int) -> State:
    tensors = {"model/w": torch.full((3, 4), float(step)), "model/n": torch.tensor(step), "optimizer/m": torch.ones(5)}
    return State(tensors, aliases={"model/tied": "model/w"}, values={"loaders": {"seen": step * 8}})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with three checkpoints and what kills and damage have left."""
    path = tmp_path / "run"
    root = path / "checkpoints"
    for step in (10, 20, 30):
        facts = {"time": f"2026-01-02T03:04:{step}+00:00", "metrics": {"loss": 1 / step, "val": step % 30}}
        save(Store(root, attempt_is_current=lambda _: True), World(), step, weights(step), attempt=1, facts=facts)
        keep = root / f"keep-{step}"  # out of the reach of the store's own pruning
        (root / f"step-{step:08d}").rename(keep)
    for step in (10, 20, 30):
        (root / f"keep-{step}").rename(root / f"step-{step:08d}")
    for name in ("step-00000005.bad", "step-00000040.partial-2", "step-00000008.pruned"):
        (root / name).mkdir()
        (root / name / "node.safetensors").write_bytes(bytes(1000))
    (path / "config.json").write_text('{"run": {"keep": 2}}')
    lines = [{"attempt": 1, "step": step, "val": value} for step, value in ((10, 0.1), (20, 0.2), (30, 0.3))]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def damage(checkpoint: Path) -> None:
    """Flip a bit of the last byte of its tensors."""
    (file,) = checkpoint.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_ls_tells_what_there_is(run: Path, ckpt: Ckpt) -> None:
    (step(run, 20) / "index.json").write_text("nothing")
    (step(run, 30) / "verified").unlink()
    found = {row["name"]: row for row in json.loads(ckpt("ls", run, "--json")[0])}
    assert list(found) == [
        "step-00000005.bad",
        "step-00000008.pruned",
        "step-00000010",
        "step-00000020",
        "step-00000030",
        "step-00000040.partial-2",
    ]
    whole = found["step-00000010"]
    assert (whole["step"], whole["world_size"], whole["attempt"], whole["loss"]) == (10, 1, 1, 0.1)
    assert whole["time"] == "2026-01-02T03:04:10+00:00"
    assert whole["bytes"] == sum(file.stat().st_size for file in step(run, 10).iterdir())
    states = [row["state"] for row in found.values()]
    assert states == ["bad", "pruned", "verified", "broken", "unverified", "partial-2"]
    assert found["step-00000020"]["fault"].endswith("index.json is broken: it was cut, or is no index")
    assert whole["verified"] is not None
    assert found["step-00000030"]["verified"] is None


def test_ls_prints_a_row_each_and_nothing_is_cut(run: Path, ckpt: Ckpt) -> None:
    lines = ckpt("ls", run / "checkpoints")[0].splitlines()
    assert lines[0].split() == ["checkpoint", "step", "size", "world", "when", "loss", "state"]
    row = next(line for line in lines if line.startswith("step-00000010 "))
    assert row.split()[1:3] == ["10", "1.0"]
    assert row.endswith("0.1  verified")
    assert "attempt 2 writes it, or has left it" in lines[-1]
    several = ckpt("ls", run, step(run, 30))[0].splitlines()
    assert several[0].startswith("run ")
    assert len(several) == 1 + 6 + 1
    assert several[-1].startswith(str(step(run, 30)))


def test_ls_of_a_run_without_checkpoints(tmp_path: Path, ckpt: Ckpt) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert ckpt("ls", tmp_path) == ("no checkpoints\n", "")
    assert ckpt("ls", "--json", tmp_path) == ("[]\n", "")
    assert "has no checkpoint yet" in ckpt("verify", tmp_path, code=1)[1]


@pytest.mark.parametrize("facts", [{}, {"time": "yesterday", "metrics": [1]}, {"time": 5, "metrics": {"loss": "x"}}])
def test_facts_of_any_kind_are_listed(tmp_path: Path, ckpt: Ckpt, facts: dict[str, Any]) -> None:
    path = save(Store(tmp_path / "checkpoints"), World(), 7, weights(7), attempt=1, facts=facts)
    os.utime(path, (1e9, 1e9))
    (found,) = json.loads(ckpt("ls", "--json", tmp_path)[0])
    assert (found["time"], found["loss"]) == ("2001-09-09T01:46:40+00:00", None)


def test_verify_goes_on_behind_a_damaged_one_and_names_it(run: Path, ckpt: Ckpt) -> None:
    damage(step(run, 20))
    (step(run, 30) / "verified").unlink()
    out, err = ckpt("verify", run, code=1)
    lines = out.splitlines()
    assert [line.split()[1] for line in lines] == ["ok,", "DAMAGED:", "ok,"]
    assert "step-00000020/node-00000-of-00001.safetensors is damaged: bytes" in lines[1]
    assert f"not whole: {step(run, 20)} (1 of 3)" in err
    assert [(step(run, number) / "verified").exists() for number in (10, 20, 30)] == [True, False, True]
    outcomes = json.loads(ckpt("verify", "--json", step(run, 10), step(run, 20), code=1)[0])
    assert [outcome["ok"] for outcome in outcomes] == [True, False]


def test_a_foreign_version_keeps_its_mark(run: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.checkpoint.index.FORMAT", 1)
    assert "newer than this launcher's 1" in ckpt("verify", step(run, 10), code=1)[0]
    assert (step(run, 10) / "verified").exists()


def test_the_mark_is_never_written_through_a_link(run: Path, ckpt: Ckpt, tmp_path: Path) -> None:
    (step(run, 10) / "verified").unlink()
    (step(run, 10) / "verified").symlink_to(tmp_path / "elsewhere")
    ckpt("verify", step(run, 10))
    assert not (tmp_path / "elsewhere").exists()
    assert (step(run, 10) / "verified").is_file()


def test_large_files_are_read_in_pieces_of_which_every_byte_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "_PIECE", BLOCK)
    state = State({"model/w": torch.arange(2 * BLOCK // 4 + 100, dtype=torch.int32)})
    path = save(Store(tmp_path), World(), 1, state, attempt=1)
    told: list[tuple[int, int]] = []
    index = verifying.verify(path, lambda done, total: told.append((done, total)))
    assert told[-1] == (index.nbytes, index.nbytes)
    assert len(told) == 4  # the header, two whole blocks and a short one
    (file,) = path.glob("*.safetensors")
    for place in (3, index.files[0].header.size, BLOCK + 4000, 2 * BLOCK + 300, index.nbytes - 1):
        with open(file, "r+b") as opened:
            opened.seek(place)
            right = opened.read(1)
            opened.seek(place)
            opened.write(bytes([right[0] ^ 4]))
            opened.flush()
            with pytest.raises(LauncherError, match="fail their digest"):
                verifying.verify(path)
            opened.seek(place)
            opened.write(right)
    verifying.verify(path)


def test_diff_of_the_same_is_0_and_of_others_is_1(run: Path, ckpt: Ckpt) -> None:
    assert ckpt("diff", step(run, 30), run)[0] == "the same, bit for bit: 4 tensors, and all values\n"
    out, _ = ckpt("diff", step(run, 10), run, code=1)
    assert "values.loaders.seen  80   240" in out
    assert out.splitlines()[-1] == "2 of the 4 tensors that both have differ"
    found = json.loads(ckpt("diff", step(run, 10), run, "--json", code=1)[0])
    assert [(fact["name"], fact["a"], fact["b"]) for fact in found["facts"]] == [
        ("step", 10, 30),
        ("values.loaders.seen", 80, 240),
    ]
    told = {one["name"]: (one["differing"], one["elements"], one["largest_abs"]) for one in found["tensors"]}
    assert told == {"model/n": (1, 1, 20), "model/tied": (12, 12, 20)}
    assert ckpt("diff", step(run, 10), run, "--only", "optimizer/*")[0] == "the same, bit for bit: 1 tensors\n"
    assert "no tensor is called x*" in ckpt("diff", step(run, 10), run, "--only", "x*", code=1)[1]


def test_diff_says_what_cannot_be_compared_in_numbers(tmp_path: Path, ckpt: Ckpt) -> None:
    nan = float("nan")
    a = {
        "model/x": torch.ones(3),
        "model/s": torch.ones(2),
        "model/d": torch.ones(2),
        "model/v": torch.tensor([nan, 1]),
    }
    b = {"model/y": torch.ones(()), "model/s": torch.ones(2, 1), "model/d": torch.ones(2).bfloat16()}
    b |= {"model/v": torch.tensor([nan, nan])}
    first = save(Store(tmp_path / "a"), World(), 1, State(a), attempt=1)
    second = save(Store(tmp_path / "b"), World(), 1, State(b, aliases={"model/t": "model/v"}), attempt=1)
    out = " ".join(ckpt("diff", first, second, code=1)[0].split())
    for said in (
        "model/x only in A (F32 3)",
        "model/y only in B (F32 scalar)",
        "model/t only in B (F32 2)",
        "model/s shape: 2 | 2x1",
        "model/d dtype: F32 | BF16",
        "model/v tied: to none | to model/t",
        "model/v F32 2 1 of 2 (1 NaN or infinite) 0 0",
        "3 of the 3 tensors that both have differ",
    ):
        assert said in out
    damage(second)
    assert "is damaged" in ckpt("diff", first, second, code=1)[1]


def test_prune_keeps_what_the_run_says(run: Path, ckpt: Ckpt) -> None:
    before = names(run)
    out, _ = ckpt("prune", run, "--dry-run")
    assert names(run) == before
    assert "step-00000010            would go  1.0 kB" in out
    assert out.splitlines()[-1] == "2 would go (2.0 kB), 4 stay"
    done = json.loads(ckpt("prune", run, "--json")[0])
    assert {one["name"] for one in done["removed"]} == {"step-00000010", "step-00000008.pruned"}
    assert names(run) == ["step-00000005.bad", "step-00000020", "step-00000030", "step-00000040.partial-2"]
    ckpt("prune", run, "--bad")
    assert names(run) == ["step-00000020", "step-00000030", "step-00000040.partial-2"]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--keep", "1"], [30]),
        (["--keep", "1", "--keep-every", "20"], [20, 30]),
        (["--keep", "1", "--keep-best", "val:min"], [10, 30]),
        (["--keep", "1", "--keep-best", "val:max"], [30]),
        (["--keep", "5"], [10, 20, 30]),
    ],
)
def test_prune_keeps_the_last_the_regular_and_the_best(
    run: Path, ckpt: Ckpt, options: list[str], left: list[int]
) -> None:
    ckpt("prune", run, *options)
    assert Store(run / "checkpoints").steps() == left


def test_prune_never_leaves_only_what_may_be_damaged(run: Path, ckpt: Ckpt) -> None:
    (step(run, 30) / "index.json").write_text("nothing")
    (step(run, 20) / "verified").unlink()
    kept = {one["name"]: one["why"] for one in json.loads(ckpt("prune", run, "--keep", "1", "--json")[0])["kept"]}
    assert kept["step-00000030"].startswith("broken: ")
    assert kept["step-00000020"] == "the last"
    assert kept["step-00000010"] == "the newest that is verified"


def test_prune_without_knowing_which_is_the_best(run: Path, ckpt: Ckpt) -> None:
    (run / "config.json").write_text('{"run": {"keep": 1, "keep_best": "accuracy:max"}}')
    assert "has no accuracy of a step that has a checkpoint" in ckpt("prune", run, code=2)[1]
    assert Store(run / "checkpoints").steps() == [10, 20, 30]
    ckpt("prune", run, "--keep-best", "no")
    assert Store(run / "checkpoints").steps() == [30]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "name what to do: ls, verify"),
        (["lss"], "invalid choice: 'lss'"),
        (["ls"], "RUN_OR_DIR"),
        (["ls", "nowhere"], "nowhere: there is no such directory"),
        (["ls", "file"], "file: is no directory"),
        (["ls", "."], " is neither a run (it has no checkpoints/) nor a checkpoint (it has no index.json)"),
        (["verify", "empty"], "empty is neither a run"),
        (["diff", "run"], "the following arguments are required: B"),
        (["diff", "run", "nowhere"], "nowhere: there is no such directory"),
        (["prune", "run/checkpoints/step-00000010"], "is one checkpoint: prune takes a run"),
        (["prune", "run", "--keep", "0"], "--keep 0 would keep no checkpoint: give 1 or more"),
        (["prune", "run", "--keep-every", "-1"], "--keep-every -1: give a number of steps, or 0"),
        (["prune", "run", "--keep-best", "val"], "--keep-best val: give METRIC:min or METRIC:max"),
        (["prune", "bare"], "has no config.json that says how many checkpoints it keeps: give --keep K"),
        (["prune", "odd"], "odd/config.json: what it says of run.keep cannot be"),
        (["export", "run"], "-o/--output"),
        (["export", "run", "-o", "out", "--shard-size", "5 apples"], "--shard-size 5 apples: give a size such as 5GB"),
        (["export", "run", "-o", "out", "--shard-size", "0"], "--shard-size 0: give a size"),
        (["export", "run", "-o", "out", "--dtype", "int4"], "invalid choice: 'int4'"),
        (["export", "run", "-o", "out", "--name", "gan"], "has no model gan: --name takes one of model"),
        (["export", "run", "-o", "out", "--base", "empty"], "empty has neither model.safetensors nor"),
        (["import", "nowhere", "-o", "out"], "nowhere: there is no such file or directory"),
        (["import", "file", "-o", "out"], "file: give a .safetensors file"),
        (["import", "empty", "-o", "out", "--key", "model"], "--key model: only a torch file"),
        (["import", "empty", "-o", "run"], "run is there already"),
        (["import", "empty", "-o", "out", "--tie", "a"], "--tie a: give NAME=HOLDER"),
    ],
)
def test_a_usage_error_is_one_line_and_exit_code_2(
    run: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch, argv: list[str], words: str
) -> None:
    monkeypatch.chdir(run.parent)
    Path("file").touch()
    Path("empty").mkdir()
    Path("bare/checkpoints").mkdir(parents=True)
    Path("odd/checkpoints").mkdir(parents=True)
    Path("odd/config.json").write_text('{"run": {"keep": "all"}}')
    assert words in ckpt(*argv, code=2)[1]
    assert not Path("out").exists()


def test_names_that_others_wrote_do_not_play_with_the_terminal(tmp_path: Path, ckpt: Ckpt) -> None:
    named = {"model/\x1b[2J\ud800": torch.ones(2), "model/ok": torch.ones(1)}
    path = save(Store(tmp_path / "a"), World(), 1, State(named), attempt=1)
    other = save(Store(tmp_path / "b"), World(), 1, State({"model/ok": torch.ones(1)}), attempt=1)
    assert "model/\\x1b[2J\\ud800  only in A (F32 2)" in ckpt("diff", path, other, code=1)[0]
    assert "cannot hold a tensor called '\\x1b[2J\\ud800'" in ckpt("export", path, "-o", tmp_path / "o", code=1)[1]


def test_a_reader_that_leaves_early_is_no_error(run: Path) -> None:
    command = f"{sys.executable} -m launcher ckpt ls {run} | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


@pytest.mark.parametrize("argv", [["--help"], ["ls", "run"], ["verify", "run"], ["prune", "run"], ["export", "--help"]])
def test_it_answers_without_importing_anything_heavy(run: Path, argv: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "launcher", "ckpt", *argv]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=run.parent, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported, "the listing was read wrongly"
    assert not imported & {"torch", "numpy", "safetensors", "accelerate", "tyro", "datasets", "rich"}
    assert read_index(step(run, 30)).step == 30
