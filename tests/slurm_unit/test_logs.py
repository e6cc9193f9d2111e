"""`launcher logs`: which log, from where, byte for byte; and following one until the run is over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.errors import LauncherError, UsageError
from launcher.slurm import logs
from tests.slurm_unit.conftest import Run, Slurm

Make = Callable[..., Run]
Read = Callable[..., bytes]


@pytest.fixture
def read(capfdbinary: pytest.CaptureFixture[bytes]) -> Read:
    """What `launcher logs ...` prints."""

    def run(*argv: object) -> bytes:
        assert logs.main(list(map(str, argv))) == 0
        return capfdbinary.readouterr().out

    return run


def log(run: Run, data: bytes, name: str = "logs/rank-00000.txt") -> Path:
    path = run.write(name, "")
    path.write_bytes(data)
    return path


NASTY = b"\x00\xff\xfe\x1b[31mred\x1b[0m\rbar 10%\rbar 20%\r\n\xc3\x28 not utf-8\nno end"


def test_bytes_go_through_unchanged(make: Make, read: Read) -> None:
    log(make().facts("running"), NASTY)
    assert read("runs/a") == NASTY


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"])
@pytest.mark.parametrize("wide", [1, 100, 70_000, 200_000])
def test_the_last_lines(wide: int, end: bytes, make: Make, read: Read) -> None:
    lines = [b"%d" % number + b"x" * wide for number in range(12)]
    data = b"\n".join(lines) + end
    log(make().facts("running"), data)
    pieces = data.splitlines(keepends=True)
    for count in (0, 1, 2, 5, 11, 12, 13, 99):
        assert read("runs/a", "-n", count) == b"".join(pieces[max(0, len(pieces) - count) :]), count
    assert read("runs/a", "-n", "all") == data


def test_a_line_without_end_is_not_read_whole(make: Make, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "FARTHEST", 200_000)
    log(make().facts("running"), b"first\n" + b"bar\r" * 100_000)
    assert 200_000 <= len(read("runs/a")) <= 200_000 + logs.BLOCK


def test_which_log(make: Make, read: Read) -> None:
    run = make().facts("running").job("5", "6")
    for rank in (0, 1, 3):
        log(run, b"of %d\n" % rank, f"logs/rank-{rank:05d}.txt")
    log(run, b"script\n", "slurm/6.out")
    assert read("runs/a", "--rank", 3) == b"of 3\n"
    assert read("runs/a", "--job") == b"script\n"
    assert read("runs/a", "--all") == b"[rank 0] of 0\n[rank 1] of 1\n[rank 3] of 3\n"
    with pytest.raises(LauncherError, match=r"has no log of rank 2: there are 0-1, 3$"):
        logs.main(["runs/a", "--rank", "2"])


def test_agents_logs_are_of_nodes(make: Make, read: Read) -> None:
    run = make().facts("running")
    log(run, b"of 1", "logs/node-00001.txt")
    log(run, b"of 0", "logs/node-00000.txt")
    assert read("runs/a") == b"of 0"
    assert read("runs/a", "--all") == b"[node 0] of 0\n[node 1] of 1\n"


def test_a_prefix_stays_before_a_progress_bar(make: Make, read: Read) -> None:
    log(make().facts("running"), b"10%\r20%\r\nend\n")
    assert read("runs/a", "--all") == b"[rank 0] 10%\r[rank 0] 20%\n[rank 0] end\n"


def test_a_point_of_a_sweep(sweep: Callable[[int], Path], read: Read) -> None:
    path = sweep(2)
    (path / "slurm" / "20_1.out").write_bytes(b"of the second\n")
    assert read(path / "00001", "--job") == b"of the second\n"
    with pytest.raises(UsageError, match="is a sweep: name one of its runs"):
        logs.main([str(path)])


def test_what_is_not_there(make: Make) -> None:
    run = make().facts("pending")
    for argv in ([], ["-f"]):
        with pytest.raises(LauncherError, match="has no logs: no start of it has come as far"):
            logs.main(["runs/a", *argv])
    with pytest.raises(LauncherError, match="has had no job"):
        logs.main(["runs/a", "--job"])
    run.job("5")
    with pytest.raises(LauncherError, match="has no logs yet"):
        logs.main(["runs/a"])
    with pytest.raises(LauncherError, match="the job has not started yet"):
        logs.main(["runs/a", "--job"])
    with pytest.raises(UsageError, match="-n some: a number of lines, or all"):
        logs.main(["runs/a", "-n", "some"])


class Follower:
    """A `launcher logs -f` that runs."""

    def __init__(self, directory: Path, *argv: str) -> None:
        # a shell's background jobs, and what they start, ignore SIGINT
        code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        code += "from launcher.slurm import logs; sys.exit(logs.main(sys.argv[1:]))"
        self.out = directory / "followed"
        with open(self.out, "wb") as out:
            command = [sys.executable, "-c", code, "-f", *argv]
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE)

    def until(self, data: bytes) -> None:
        deadline = time.monotonic() + 20
        while self.out.read_bytes() != data:
            assert time.monotonic() < deadline, self.out.read_bytes()
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)  # polling a file that another process writes

    def end(self) -> tuple[int, bytes]:
        _, err = self.process.communicate(timeout=20)
        return self.process.returncode, err


@contextmanager
def following(directory: Path, *argv: str) -> Iterator[Follower]:
    follower = Follower(directory, *argv)
    try:
        yield follower
    finally:
        if follower.process.poll() is None:
            follower.process.kill()
        follower.process.communicate()


def test_follow_until_the_run_is_over(make: Make, slurm: Slurm, tmp_path: Path) -> None:
    run = make().facts("pending").job("7")
    slurm.job("7", "PENDING")
    with following(tmp_path, "runs/a", "-n", "1") as follower:
        deadline = time.monotonic() + 30
        while not slurm.calls("squeue"):  # it has begun to look
            assert time.monotonic() < deadline
            time.sleep(0.02)  # polling a file that another process writes
        time.sleep(0.5)
        run.facts("running")
        slurm.job("7", "RUNNING")
        path = log(run, b"one\ntwo\n")
        follower.until(b"one\ntwo\n")  # a log that comes later is told from its beginning
        with open(path, "ab") as file:
            file.write(b"three")
        follower.until(b"one\ntwo\nthree")
        path.write_bytes(b"new\n")
        follower.until(b"one\ntwo\nthreenew\n")
        path.rename(path.with_name("old"))
        log(run, b"replaced\n")
        follower.until(b"one\ntwo\nthreenew\nreplaced\n")
        run.facts("finished")
        time.sleep(2.5)
        assert follower.process.poll() is None  # its job is still there
        with open(path, "ab") as file:
            file.write(b"last\n")
        slurm.job("7", "COMPLETED")
        assert follower.end() == (0, b"launcher: finished\n")
        assert follower.out.read_bytes().endswith(b"replaced\nlast\n")


def test_follow_goes_on_through_a_requeue_and_ends_when_it_is_lost(make: Make, slurm: Slurm, tmp_path: Path) -> None:
    run = make().facts("preempted").job("7").start(job="7")
    path = log(run, b"one\ntwo\n")
    slurm.job("7", "PENDING", "BeginTime")
    with following(tmp_path, "runs/a", "-n", "1") as follower:
        follower.until(b"two\n")
        time.sleep(2.5)
        assert follower.process.poll() is None
        with open(path, "ab") as file:
            file.write(b"again\n")
        follower.until(b"two\nagain\n")
    run.facts("running")
    slurm.job("7", "TIMEOUT")
    with following(tmp_path, "runs/a") as follower:
        assert follower.end() == (0, b"launcher: lost: TIMEOUT\n")
        assert follower.out.read_bytes() == b"one\ntwo\nagain\n"


def test_follow_all_ranks_and_the_newest_job(make: Make, slurm: Slurm, tmp_path: Path) -> None:
    run = make().facts("running").job("7")
    log(run, b"a0\n")
    log(run, b"old\n", "slurm/7.out")
    slurm.job("7", "RUNNING")
    with following(tmp_path, "runs/a", "--all") as follower:
        follower.until(b"[rank 0] a0\n")
        log(run, b"a1\nhalf", "logs/rank-00001.txt")
        follower.until(b"[rank 0] a0\n[rank 1] a1\n")
    with following(tmp_path, "runs/a", "--job") as follower:
        follower.until(b"old\n")
        run.job("7", "8")
        log(run, b"new\n", "slurm/8.out")
        follower.until(b"old\nnew\n")


def test_ctrl_c_ends_it_quietly(make: Make, slurm: Slurm, tmp_path: Path) -> None:
    log(make().facts("running").job("7"), b"one\n")
    slurm.job("7", "RUNNING")
    with following(tmp_path, "runs/a") as follower:
        follower.until(b"one\n")
        os.kill(follower.process.pid, signal.SIGINT)
        assert follower.end() == (130, b"")


def test_follow_a_rank_that_never_comes(make: Make, slurm: Slurm) -> None:
    log(make().facts("running", world_size=2).job("7"), b"one\n")
    slurm.job("7", "RUNNING")
    with pytest.raises(LauncherError, match=r"has no log of rank 2: there are 0$"):
        logs.main(["runs/a", "-f", "--rank", "2"])
