"""`launcher cancel`: the marker first, then what ends the job; and nothing is left of it where SLURM refuses."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.slurm import cancel
from tests.slurm_unit.conftest import Run, Slurm

Make = Callable[..., Run]
Cancel = Callable[..., str]


@pytest.fixture
def cancelled(capsys: pytest.CaptureFixture[str]) -> Cancel:
    """What `launcher cancel ...` says."""

    def run(*argv: object, code: int = 0) -> str:
        capsys.readouterr()
        left = cancel.main(list(map(str, argv)))
        printed = capsys.readouterr()
        assert left == code, printed
        return printed.out + printed.err

    return run


def is_marked(path: Path) -> bool:
    return (path / "slurm" / "cancelled").exists()


def status(path: Path) -> str:
    return json.loads((path / "run.json").read_text())["status"]


def test_a_job_that_waits(make: Make, slurm: Slurm, cancelled: Cancel) -> None:
    run = make().facts("pending").job("7")
    slurm.job("7", "PENDING")
    assert cancelled("runs/a") == "runs/a: job 7 cancelled\n"
    assert slurm.calls("scancel") == ["scancel 7"]
    assert is_marked(run.path)
    assert status(run.path) == "cancelled"


def test_a_job_that_trains_is_told_by_its_steps(make: Make, slurm: Slurm, cancelled: Cancel) -> None:
    run = make().facts("running").job("7")
    slurm.job("7", "RUNNING")
    slurm.says("steps", "7.batch\n7.extern\n7.0\n7.1")
    assert cancelled("runs/a") == "runs/a: job 7 is told to end, and saves first\n"
    assert slurm.calls("scancel") == ["scancel --signal=TERM 7.0 7.1"]
    assert is_marked(run.path)
    assert status(run.path) == "running"  # its own to change
    cancelled("runs/a")  # nobody has seen the first signal yet
    assert len(slurm.calls("scancel")) == 2
    run.write("attempts/1/signal-00000.json", "{}")
    assert cancelled("runs/a") == "runs/a: job 7 has been told before, and saves (--now does not wait)\n"
    assert len(slurm.calls("scancel")) == 2
    assert cancelled("runs/a", "--now") == "runs/a: job 7 is ended, within SLURM's KillWait\n"
    assert slurm.calls("scancel")[2:] == ["scancel 7"]


def test_a_job_without_ranks_yet(make: Make, slurm: Slurm, cancelled: Cancel) -> None:
    run = make().facts("pending").job("7")
    slurm.job("7", "RUNNING")
    slurm.says("steps", "7.batch")
    assert cancelled("runs/a") == "runs/a: job 7 is ended, within SLURM's KillWait\n"
    assert slurm.calls("scancel") == ["scancel 7"]
    assert status(run.path) == "cancelled"


def test_a_chain(make: Make, slurm: Slurm, cancelled: Cancel) -> None:
    make().facts("running").job("5", "6", "7")
    for id_, state in (("5", "COMPLETED"), ("6", "RUNNING"), ("7", "PENDING")):
        slurm.job(id_, state, run=Path("runs/a").absolute())
    slurm.says("steps", "6.0")
    assert cancelled("6") == "runs/a: job 6 is told to end, and saves first; job 7 cancelled\n"
    assert slurm.calls("scancel") == ["scancel 7", "scancel --signal=TERM 6.0"]


def test_slurm_refuses(make: Make, slurm: Slurm, cancelled: Cancel) -> None:
    run = make().facts("pending").job("7")
    slurm.job("7", "PENDING")
    slurm.fails("scancel", "scancel: error: Kill job error on job id 7: Access/permission denied")
    said = cancelled("runs/a", code=1)
    assert said == "launcher: scancel says: Kill job error on job id 7: Access/permission denied\n"
    assert not is_marked(run.path)
    assert status(run.path) == "pending"
    run.write("slurm/cancelled", "by somebody before")
    cancelled("runs/a", code=1)
    assert is_marked(run.path)


def test_a_job_that_ends_meanwhile(make: Make, slurm: Slurm, cancelled: Cancel) -> None:
    make().facts("pending").job("7")
    slurm.job("7", "PENDING")
    slurm.fails("scancel", "scancel: error: Kill job error on job id 7: Invalid job id specified")
    assert cancelled("runs/a") == "runs/a: job 7 cancelled\n"


@pytest.mark.parametrize("state", ["finished", "failed", "preempted", "cancelled", "pending"])
def test_nothing_to_cancel(state: str, make: Make, slurm: Slurm, cancelled: Cancel) -> None:
    run = make().facts(state).job("7")
    slurm.job("7", "COMPLETED")
    assert cancelled("runs/a", code=1).startswith("launcher: runs/a: nothing to cancel: ")
    assert not is_marked(run.path)
    assert not slurm.calls("scancel")


def test_a_finished_run_whose_job_still_ends(make: Make, slurm: Slurm, cancelled: Cancel) -> None:
    run = make().facts("finished").job("7")
    slurm.job("7", "RUNNING")
    assert cancelled("runs/a", code=1) == "launcher: runs/a: nothing to cancel: it has finished\n"
    assert not is_marked(run.path)


def test_no_slurm_and_a_controller_that_is_away(make: Make, slurm: Slurm, cancelled: Cancel) -> None:
    run = make().facts("running").job("7").start(job="7")
    slurm.fails("squeue", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    assert "Unable to contact slurm controller" in cancelled("runs/a", code=1)
    assert not is_marked(run.path)


def test_several_of_which_one_is_none(make: Make, slurm: Slurm, cancelled: Cancel) -> None:
    make().facts("pending").job("7")
    slurm.job("7", "PENDING")
    said = cancelled("nothing", "runs/a", code=2)
    assert said.startswith("runs/a: job 7 cancelled\n")
    assert "launcher: nothing: there is no such run directory" in said


def test_a_sweep(sweep: Callable[[int], Path], slurm: Slurm, cancelled: Cancel) -> None:
    path = sweep(4)
    for number, state in enumerate(("COMPLETED", "RUNNING", "PENDING", "PENDING")):
        slurm.job(f"20_{number}", state, number="20" if state == "PENDING" else f"{21 + number}", run=path)
    (path / "00001" / "run.json").write_text('{"status": "running"}')
    slurm.says("steps", "20_1.batch\n20_1.0")
    assert cancelled(path) == (
        "runs/sweep/00001: job 20_1 is told to end, and saves first\n"
        "runs/sweep/00002: job 20_2 cancelled\nruns/sweep/00003: job 20_3 cancelled\n"
    )
    assert slurm.calls("scancel") == ["scancel --state=PENDING 20", "scancel --signal=TERM 20_1.0"]
    assert [is_marked(path / f"{number:05d}") for number in range(4)] == [False, True, True, True]
    assert status(path / "00002") == "cancelled"
    cancelled("20", "--now")
    assert slurm.calls("scancel")[2:] == ["scancel 20"]


def test_a_point_of_a_sweep_is_cancelled_alone(sweep: Callable[[int], Path], slurm: Slurm, cancelled: Cancel) -> None:
    path = sweep(3)
    for number, state in enumerate(("RUNNING", "PENDING", "PENDING")):
        slurm.job(f"20_{number}", state, number="20" if state == "PENDING" else "21", run=path)
    slurm.says("steps", "20_0.0")
    assert cancelled("20_2") == "runs/sweep/00002: job 20_2 cancelled\n"
    # with --state=PENDING it would end every task that waits
    assert slurm.calls("scancel") == ["scancel 20_2"]
    assert cancelled("21") == "runs/sweep/00000: job 20_0 is told to end, and saves first\n"  # as SLURM_JOB_ID names it
    assert slurm.calls("scancel")[1:] == ["scancel --signal=TERM 20_0.0"]
    assert [is_marked(path / f"{number:05d}") for number in range(3)] == [True, False, True]


SLEEPER = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print(flush=True); time.sleep(60)"
)


def test_a_run_by_hand(make: Make, slurm: Slurm, cancelled: Cancel, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(SLEEPER)
    process = subprocess.Popen([sys.executable, str(recipe), "--steps", "3"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        run = make().facts("running", command=["elsewhere/other.py"]).start(host=socket.gethostname(), pid=process.pid)
        assert f"process {process.pid} is none of this run" in cancelled("runs/a", code=1)
        assert not is_marked(run.path)
        run.facts("running", command=["recipe.py", "--steps", "3"])
        assert cancelled("runs/a") == f"runs/a: process {process.pid} is told to end: it saves first\n"
        assert process.wait(10) == 7
        assert is_marked(run.path)
        assert "nothing to cancel" in cancelled("runs/a", code=1)
    finally:
        process.kill()
        process.communicate()


def test_a_run_by_hand_elsewhere(make: Make, slurm: Slurm, cancelled: Cancel) -> None:
    run = make().facts("running", command=["x.py"]).start(host="elsewhere", pid=12)
    said = cancelled("runs/a", code=1)
    assert said == "launcher: runs/a runs on elsewhere, by launcher run: there, kill 12 lets it save and end\n"
    assert not is_marked(run.path)


def test_names_do_not_play_with_the_terminal(make: Make, slurm: Slurm, cancelled: Cancel) -> None:
    run = make("a\x1b[2J\nb").facts("pending").job("7")
    slurm.job("7", "PENDING")
    said = cancelled(run.path)
    assert said == "runs/a\\x1b[2J\\nb: job 7 cancelled\n"
