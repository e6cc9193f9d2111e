"""What a rank prints: who sees it, and what its log keeps."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import output
from launcher.output import Output, log_path

ROOT = Path(__file__).parent.parent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def attach(monkeypatch):
    """Puts a terminal in the place of both streams; called in a test, because pytest changes them after set-up."""

    def made() -> Terminal:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        return terminal

    return made


def test_rank_0_prints_to_the_terminal_and_into_its_log(tmp_path, attach):
    terminal = attach()
    path = log_path(tmp_path, 0)
    out = Output(path, "attempt 1", shown=True)
    assert sys.stdout.isatty()
    print("one")
    print("two", end="", file=sys.stderr)
    out.show(" three\n")
    out.note("for the log\n")
    print("four", end="")
    out.close()
    print(" five")
    assert terminal.getvalue() == "one\ntwo three\nfour five\n"
    assert path.read_text() == "--- attempt 1\none\ntwo three\nfor the log\nfour\n"
    assert sys.stdout is terminal
    Output(path, "attempt 2", shown=True).close()
    assert path.read_text().endswith("four\n--- attempt 2\n")
    assert path.stat().st_mode & 0o777 == 0o600


def test_of_a_progress_bar_a_state_now_and_then_is_kept(tmp_path, attach, monkeypatch):
    terminal = attach()
    path = log_path(tmp_path, 0)
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    out = Output(path, "attempt 1", shown=True)
    for step in range(40):
        now[0] = step
        sys.stderr.write(f"\rstep {step}")
    sys.stderr.write("\r" + " " * 20 + "\rabove it\nwindows\r\n\rstep 40")
    out.close()
    assert path.read_text() == "--- attempt 1\nstep 11\nstep 22\nstep 33\nabove it\nwindows\nstep 40\n"
    assert terminal.getvalue().startswith("\rstep 0\rstep 1\r")


def test_somebody_elses_stream_is_left_alone(tmp_path, attach):
    terminal = attach()
    out = Output(log_path(tmp_path, 0), "attempt 1", shown=True)
    other = sys.stdout = io.StringIO()
    out.close()
    assert sys.stdout is other
    assert sys.stderr is terminal


def test_a_log_that_is_full_stops_nobody(tmp_path, attach):
    terminal = attach()
    (tmp_path / "logs").mkdir()
    os.symlink("/dev/full", log_path(tmp_path, 0))
    out = Output(log_path(tmp_path, 0), "attempt 1", shown=True)
    print("one")
    out.close()
    assert terminal.getvalue() == "one\n"


def test_other_ranks_print_into_their_logs_alone(tmp_path):
    path = log_path(tmp_path, 3)
    code = f"""
import os, subprocess
from pathlib import Path
from launcher.output import Output
print("before")
out = Output(Path({str(path)!r}), "attempt 1", shown=False)
print("one")
os.write(2, b"two\\n")
subprocess.run(["echo", "three"])
out.show("the first to fail\\n")
out.close()
print("four")
os._exit(0)
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("before\n", "the first to fail\n")
    assert path.read_text() == "--- attempt 1\none\ntwo\nthree\nthe first to fail\nfour\n"
