"""`launcher run` as a parent: signals, the terminal, exit codes, and what it says of what did not begin."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from launcher.command import Command
from launcher.errors import UsageError
from launcher.parent import run
from tests.harness import ROOT, clean_environment, launch

SIGNALS = """
import os, signal, sys, time
from pathlib import Path
seen = Path(sys.argv[1])
def note(number, frame):
    with open(seen, "a") as file:
        file.write(signal.Signals(number).name + "\\n")
for name in ("SIGINT", "SIGTERM", "SIGUSR2", "SIGHUP"):
    signal.signal(getattr(signal, name), note)
seen.write_text(f"{os.getpid()} {os.getpgrp()}\\n")
while "SIGTERM" not in seen.read_text():
    time.sleep(0.02)
"""
RECIPE = """
import launcher, torch

def train(run: launcher.Run) -> None:
    model = run.build(lambda: torch.nn.Linear(2, 1))
    optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for step in run.steps(run.loader((torch.ones(4, 2),), batch_size=2), total=3):
        if step.index == 1:
            breakpoint()
        for (x,) in step:
            step.backward(model(x).sum())
        optimizer.step()
        optimizer.zero_grad()

if __name__ == "__main__":
    launcher.main(train)
"""
ONE = [sys.executable, "-m", "launcher", "run", "--nproc", "1"]


@pytest.fixture
def environ():
    return clean_environment() | {"PYTHONPATH": str(ROOT)}


@pytest.fixture
def script(tmp_path):
    def write(text: str) -> Path:
        (tmp_path / "script.py").write_text(text)
        return tmp_path / "script.py"

    return write


def lines(path: Path, number: int) -> list[str]:
    """Wait until a file has so many lines."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists() and len(found := path.read_text().splitlines()) >= number:
            return found
        time.sleep(0.02)  # polling
    raise AssertionError(f"{path} does not come to {number} lines")


def hear_all_signals():
    """Also where the tests themselves were started by `nohup`, or in the background of a shell."""
    for name in (signal.SIGHUP, signal.SIGINT):
        signal.signal(name, signal.SIG_DFL)


def test_signals_are_passed_on(tmp_path, script, environ):
    seen = tmp_path / "seen"
    process = subprocess.Popen(
        [*ONE, script(SIGNALS), seen], env=environ, start_new_session=True, preexec_fn=hear_all_signals
    )
    _, group = lines(seen, 1)[0].split()
    assert int(group) == process.pid  # as if it had been started by hand
    for count, name in enumerate(("SIGUSR2", "SIGHUP", "SIGINT", "SIGTERM"), 2):
        process.send_signal(getattr(signal, name))
        assert lines(seen, count)[-1] == name
    assert process.wait(30) == 0


def test_what_is_killed_leaves_nothing_behind(tmp_path, script, environ):
    seen = tmp_path / "seen"
    process = subprocess.Popen([*ONE, script(SIGNALS), seen], env=environ)
    lines(seen, 1)
    process.kill()
    assert lines(seen, 2)[-1] == "SIGTERM"
    assert process.wait(30) == -signal.SIGKILL


def test_nothing_heavy_is_imported_beside_the_ranks(script, environ):
    command = [sys.executable, "-X", "importtime", "-m", "launcher", "run", "--nproc", "1", script("print('ran')\n")]
    done = subprocess.run(list(map(str, command)), env=environ, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "launcher.parent" in modules, "the listing was read wrongly"
    assert not {name.partition(".")[0] for name in modules} & {"torch", "numpy", "accelerate", "tyro", "datasets"}


def test_what_a_signal_ends_has_failed(script, environ):
    path = script("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    code, _, said = launch("run", "--nproc", 1, path)
    assert code == 1
    assert said.count("\n") == 1  # it was no run: nothing is known of it


def test_a_program_that_cannot_be_run_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"cannot run .*python: No such file or directory"):
        run(Command((str(tmp_path / "python"), "x.py")))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class Terminal:
    """A program on a terminal of its own, in its foreground."""

    def __init__(self, command: list[object], cwd: Path, environ: dict[str, str]) -> None:
        self.pid, self._fd = pty.fork()
        if not self.pid:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
            os.chdir(cwd)
            os.execvpe(str(command[0]), list(map(str, command)), environ)
        self.said = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def until(self, text: str, timeout: float = 60) -> None:
        """Read until the program has said something new."""
        start, deadline = len(self.said), time.monotonic() + timeout
        while text not in self.said[start:]:
            assert time.monotonic() < deadline, self.said
            self._read()

    def ends(self) -> int:
        while self._read():
            pass
        _, status = os.waitpid(self.pid, 0)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(status)

    def _read(self) -> bool:
        if select.select([self._fd], [], [], 30)[0]:
            try:
                data = os.read(self._fd, 4096)
            except OSError:  # the other side is closed
                return False
            self.said += data.decode(errors="replace")
            return bool(data)
        return True


def test_ctrl_c_reaches_it_once(tmp_path, script, environ):
    seen = tmp_path / "seen"
    terminal = Terminal([*ONE, script(SIGNALS), seen], tmp_path, environ)
    lines(seen, 1)
    terminal.type("\x03")
    lines(seen, 2)
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.ends() == 0
    assert lines(seen, 3)[1:] == ["SIGINT", "SIGTERM"]


def test_a_debugger_has_the_terminal(tmp_path, script, environ):
    terminal = Terminal([*ONE, script(RECIPE), "--run.dir", "run"], tmp_path, environ)
    terminal.until("(Pdb) ")
    terminal.type("p 20 + step.index\n")
    terminal.until("21")
    terminal.type("c\n")
    assert terminal.ends() == 0, terminal.said
    assert "step/s" in terminal.said  # a progress bar, as on any terminal
    kept = (tmp_path / "run" / "logs" / "rank-00000.txt").read_text()
    assert "21\n" in kept
    assert "\r" not in kept


def test_an_error_in_all_ranks_before_the_run_is_shown_once(script):
    code, _, said = launch("run", "--nproc", 2, script("import no_such_module\n"))
    assert code == 1
    assert said.count("Traceback") == 1
    assert "ModuleNotFoundError: No module named 'no_such_module'" in said
    assert "before the run began\n" in said


def test_an_error_in_another_rank_before_the_run_is_shown(script):
    path = script("import os, time\nif os.environ['RANK'] == '1':\n    raise ValueError('mine')\ntime.sleep(60)\n")
    code, _, said = launch("run", "--nproc", 2, path)
    assert code == 1
    assert said.count("ValueError: mine") == 1
    assert said.endswith("launcher: rank 1 failed (exit code 1) before the run began\n")


def test_a_wrong_option_is_one_line_for_all_ranks(script):
    code, _, said = launch("run", "--nproc", 2, script(RECIPE), "--run.kep", 3)
    assert code == 2
    command, line = said.splitlines()
    assert command.startswith("+ ")
    assert line == "launcher: unknown option --run.kep: did you mean --run.keep?"


def test_accelerates_own_table_holds_the_verdict(tmp_path, environ):
    recipe = ROOT / "tests" / "distributed" / "failing.py"
    command = [Path(sys.executable).with_name("accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [recipe, "--run.dir", tmp_path / "run"]
    full = environ | {"FAIL": "raise", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=full, timeout=120)
    assert done.returncode == 1
    assert "launcher: rank 1: the recipe failed\nTraceback (most recent call last):\n" in done.stderr
    root = done.stderr.partition("Root Cause")[2]
    assert "rank      : 1 (local_rank: 1)" in root
    assert "traceback : rank 1 failed first at step 2: ValueError: the recipe's own (" in root
