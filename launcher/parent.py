"""`launcher run` beside the processes that it has started: it passes signals on, and in the end says why they failed.

Its child is in the same process group on the same terminal, so that Ctrl-C, Ctrl-Z and a debugger find it as if it had
been started by hand. The ranks write down in a directory, named in their environment, which run they are.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from launcher.command import Command
from launcher.errors import LauncherError, UsageError
from launcher.evidence import load, tail, text, whole
from launcher.rundir import RunDir
from launcher.verdict import Verdict, judged
from launcher.witness import PARENT

__all__ = ["run"]

PR_SET_PDEATHSIG = 1  # prctl(2)
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
FAILURE = re.compile(r"rank +: (\d+) \(local_rank: \d+\)\s+exitcode +: (-?\d+)")  # in torch's table of failed ranks


def run(command: Command) -> int:
    """Run a command line to its end, and tell why it failed, if it did; the exit code.

    That of a process which a signal has ended is 1; of a run that has finished, or was stopped and saved, 0, though an
    agent may say 1.

    Raises:
        UsageError: it cannot be run.
    """
    room = Path(tempfile.mkdtemp(prefix="launcher-"))
    try:
        code = _wait(command, room)
        if code:
            return _tell(command, code, room)
        if not (room / "run").exists():  # no recipe of ours, or --help
            _show_errors(room, "*")
        return 0
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _wait(command: Command, room: Path) -> int:
    """Start the command, and wait for its end; its exit code, negative for a signal."""
    many = command.processes > 1
    argv = _quietly(command.argv, room) if many else list(command.argv)
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        if child is None:
            early.append(number)
            return
        if number == signal.SIGINT and _in_foreground():
            return  # the terminal has sent it to the child as well
        # an agent passes on SIGTERM, to which ranks answer alike; SIGUSR2 would end it and leave them behind
        child.send_signal(signal.SIGTERM if many and number != signal.SIGINT else number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON if not _is_ignored(number)}
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        environ = {**os.environ, **command.variables, **(_redirects(command.processes) if many else {})}
        child = subprocess.Popen(argv, env={**environ, PARENT: str(room)}, preexec_fn=_with_parent(os.getpid()))
        for number in early:
            pass_on(number, None)
        return child.wait()
    except OSError as error:
        raise UsageError(f"cannot run {argv[0]}: {error.strerror}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_foreground() -> bool:
    """Whether this process belongs to those that Ctrl-C on its terminal reaches."""
    with suppress(OSError):
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
        try:
            return os.tcgetpgrp(terminal) == os.getpgrp()
        finally:
            os.close(terminal)
    return False


def _is_ignored(number: int) -> bool:
    """Whether whoever started this wants a signal to be ignored, by what it starts as well: nohup."""
    return signal.getsignal(number) == signal.SIG_IGN


def _with_parent(parent: int) -> Callable[[], None]:
    """For the child, before it becomes the program: what was killed must not leave it behind; it stops and saves."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def prepare() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    return prepare


def _quietly(argv: Sequence[str], room: Path) -> list[str]:
    """The agent's command line, with what it says itself in a file in `room`."""
    quiet = Path(__file__).with_name("quiet.py")
    script = argv[1:] if argv[0] == sys.executable else argv
    return [sys.executable, "-P", str(quiet), str(room), *script]


def _redirects(processes: int) -> dict[str, str]:
    """Until they have opened the run directory, the errors of ranks other than 0 go to files: of all, one is enough.

    torch's agent takes it from its environment: torch/distributed/run.py, --redirects; 2 is stderr.
    """
    return {"PET_REDIRECTS": ",".join(f"{rank}:2" for rank in range(1, processes))}


def _tell(command: Command, code: int, room: Path) -> int:
    """Say why it failed, as the last thing there is to read; the exit code."""
    said = load(room / "run")
    path, attempt = Path(text(said, "path")), whole(said, "attempt")
    agent = "\n".join(tail(room / "agent.txt")).strip()
    codes = {int(rank): int(number) for rank, number in FAILURE.findall(agent)}
    if command.processes == 1:
        codes = {0: code}
    if attempt is None:
        return _tell_beginning(command, code, codes, agent, room)
    (room / "codes.json").write_text(json.dumps({"codes": codes}))
    with suppress(LauncherError):  # a full disk
        RunDir(path).record_end(attempt, codes, f"{agent}\n" if agent else "")
    found = judged(path, attempt, room)
    if found.kind == "finished" or (found.kind == "stopped" and " and saved;" in found.text and code > 0):
        return 0
    _print(found, command, load(room / f"error-{found.rank or 0:05d}.json").get("launcher") is True)
    return _plain(code)


def _print(found: Verdict, command: Command, is_line: bool) -> None:
    """The traceback of the rank that failed first, and the paragraph; `is_line`: it was an error of the launcher's."""
    if command.processes == 1 and is_line:
        return  # it has told the line itself, with the fix
    if command.processes > 1 and found.traceback and found.kind != "peer" and not is_line:
        print(f"\nrank {found.rank}:\n{found.traceback.rstrip()}", file=sys.stderr)
    print(f"launcher: {found.text}", file=sys.stderr, flush=True)


def _tell_beginning(command: Command, code: int, codes: Mapping[int, int], agent: str, room: Path) -> int:
    """It failed before a run directory was open: rank 0 has told the terminal, another rank a file; the exit code."""
    if command.processes == 1:
        return _plain(code)
    if UsageError.exit_code in codes.values():
        return UsageError.exit_code  # a wrong option is wrong on every rank, and rank 0 has said so
    root = re.findall(FAILURE, agent.rpartition("Root Cause")[2])
    if not root:  # it is the agent that failed
        print(agent, file=sys.stderr)
        return _plain(code)
    first, number = (int(one) for one in root[-1])
    _show_errors(room, str(first))
    how = f"was ended by signal {-number}" if number < 0 else f"failed (exit code {number})"
    print(f"launcher: rank {first} {how} before the run began", file=sys.stderr, flush=True)
    return _plain(code)


def _show_errors(room: Path, ranks: str) -> None:
    """What ranks have printed to stderr before they had a run directory."""
    for log in sorted(room.glob(f"torchelastic_*/*/attempt_0/{ranks}/stderr.log")):
        print("\n".join(tail(log)), end="", file=sys.stderr)


def _plain(code: int) -> int:
    return 1 if code < 0 else code
