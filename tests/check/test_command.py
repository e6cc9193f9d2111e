"""What `launcher check` refuses, and the words that it finds for a ratio."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from launcher.check import advice
from launcher.check.command import main
from launcher.check.parity import Shape
from launcher.check.trace import Trace, Writer, read_trace
from launcher.errors import UsageError
from tests.harness import ROOT, clean_environment, launch


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "needs a RECIPE"),
        (["--only", "parity,foo", "r.py"], "--only parity,foo|--only foo: there are parity"),
        (["--only", ",", "r.py"], "--only names nothing"),
        (["--nproc", "0", "r.py"], "--nproc 0: at least 1"),
        (["--gpus", "99", "r.py"], "--gpus 99: this machine shows"),
        (["--steps", "3", "r.py"], "has no option --steps"),
        (["nope.py"], "there is no such recipe"),
        (["r.py", "--run.workers", "2"], "--run.workers: launcher check sets it"),
        (["r.py", "--run.save_every=2"], "--run.save_every: launcher check sets it"),
        (["--keep", "full", "r.py"], "--keep full is not empty"),
        (["--nproc", "1", "--only", "ddp", "r.py"], "--only ddp: that needs two processes"),
        (["r.py", "--help"], "launcher run RECIPE --help"),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UsageError) as error:
        main(argv)
    assert any(one in str(error.value) for one in said.split("|"))


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("def x(:", 1, "does not run in one process: SyntaxError"),
        ("print('hi')", 1, "ends without a step: its last line is launcher.main(train)"),
        ("import launcher\ndef train(run: launcher.Run): 1 / 0\nlauncher.main(train)", 1, "ZeroDivisionError"),
        ("import launcher\ndef train(run: launcher.Run): ...\nlauncher.main(train)", 2, "unknown option --bogus"),
    ],
    ids=["syntax", "no main", "raises", "option"],
)
def test_what_does_not_train_is_told_in_a_line(tmp_path, text, code, said):
    recipe = tmp_path / "broken.py"
    recipe.write_text(text)
    options = ("--bogus",) if code == 2 else ()
    exit_code, output, errors = launch("check", "--keep", tmp_path / "runs", recipe, *options)
    assert (exit_code, output) == (code, "")
    assert errors.startswith("launcher: ")
    assert errors.count("\n") == 1, errors
    assert said in errors


def test_its_help_imports_no_torch():
    program = "import sys, launcher.cli as c; c.main(['check', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_its_batches_are_uneven(world_size):
    """One rank has more micro-batches than another, and the last one fewer samples than the others."""
    shape = Shape(world_size)
    full, rest = divmod(shape.batch_size, shape.microbatch_size)
    assert (full + 1, rest) == (shape.microbatches, 2)
    assert world_size == 1 or shape.microbatches % world_size


@pytest.mark.parametrize(
    ("ratio", "rest", "microbatches", "world_size", "said"),
    [
        (2.0, 0.0, 3, 2, "2 = world size: the loss is multiplied by it"),
        (0.5, 0.0, 3, 2, "1/2 = 1 / world size: the loss is divided by it"),
        (3.1, 0.1, 3, 2, "about 3 = the step's micro-batches: the loss is averaged"),
        (1 / 3, 0.0, 3, 1, "1/3 = 1 / the step's micro-batches"),
        (0.98, 0.2, 3, 2, "no sum over samples"),
        (1.0, 0.0, 1, 1, "the numbers are rounded otherwise"),
    ],
)
def test_a_ratio_is_explained(ratio, rest, microbatches, world_size, said):
    assert said in advice.of_ratio(ratio, rest, microbatches, world_size, Trace())


def test_a_line_that_a_kill_has_cut_is_passed_over(tmp_path):
    for attempt, micro in ((1, "old"), (2, "new")):
        writer = Writer(str(tmp_path), attempt, 0)
        writer.write("batch", loader="loader", step=0, microbatch=0, ids=[1], digest=micro, padding=False)
        writer.close()
    with open(tmp_path / "trace-0002-00000.jsonl", "a") as file:
        file.write('{"what": "bat')
    [batch] = read_trace(tmp_path).batches().values()
    assert batch.digest == "new"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_it(tmp_path, number):
    recipe, room = tmp_path / "slow.py", tmp_path / "runs"
    recipe.write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)\n")
    command = [sys.executable, "-m", "launcher", "check", "--keep", str(room), str(recipe)]
    with subprocess.Popen(command, env=clean_environment() | {"PYTHONPATH": str(ROOT)}) as process:
        until(lambda: (room / "reference" / "rank-0.txt").exists() and running(room))
        process.send_signal(number)
        assert process.wait(60) == (130 if number == signal.SIGINT else -9)
    until(lambda: not running(room))


def running(room):
    """The processes that have a file open in a directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/fd/1"):
        with suppress(OSError):  # it has ended meanwhile
            found += [path.parts[2]] if os.readlink(path).startswith(str(room)) else []
    return found


def until(happened, timeout=60):
    deadline = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)  # polling what other processes do
