"""`launcher status`: what it makes of a run's files and of what SLURM says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import UsageError
from launcher.slurm import status
from launcher.slurm.facts import gather
from tests.slurm_unit.conftest import Run, Slurm

Make = Callable[..., Run]
Told = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """What `launcher status ... --json` says; it must say nothing else."""

    def said(*targets: object, code: int = 0, err: str = "") -> list[dict[str, Any]]:
        capsys.readouterr()
        assert status.main([*map(str, targets), "--json"]) == code
        printed = capsys.readouterr()
        assert err in printed.err if err else not printed.err, printed.err
        return json.loads(printed.out)

    return said


def shown(capsys: pytest.CaptureFixture[str], *targets: object) -> str:
    capsys.readouterr()
    assert status.main(list(map(str, targets))) == 0
    return capsys.readouterr().out


PENDING = {"status": "pending"}
RUNNING = {"status": "running"}
PREEMPTED = {"status": "preempted"}
FAILED = {"status": "failed"}
CASES: dict[str, tuple[dict[str, str], tuple[str, ...] | None, dict[str, str], str, str]] = {
    "waits": (PENDING, ("PENDING", "Resources"), {}, "pending", "Resources"),
    "just queued": (PENDING, ("PENDING",), {}, "pending", "SLURM has not looked at it yet"),
    "reason with a list": (
        PENDING,
        ("PENDING", "ReqNodeNotAvail, UnavailableNodes:node1"),
        {},
        "pending",
        "ReqNodeNotAvail: nodes that it asks for are down, drained or reserved, UnavailableNodes:node1",
    ),
    "starts": (PENDING, ("RUNNING",), {}, "running", "starts"),
    "runs": (RUNNING, ("RUNNING",), {}, "running", ""),
    "suspended": (RUNNING, ("SUSPENDED",), {}, "running", "its job is SUSPENDED"),
    "being cancelled": (RUNNING, ("RUNNING",), {"cancelled": ""}, "running", "is being cancelled: it saves first"),
    "waits to go on": (PREEMPTED, ("PENDING", "BeginTime"), {"verdict": "preempted: x"}, "requeued", "BeginTime"),
    "node lost": (RUNNING, ("PENDING", "BeginTime"), {}, "requeued", "BeginTime"),
    "requeue comes": (
        *(PREEMPTED, ("RUNNING",), {"verdict": "preempted: x"}),
        *("requeued", "on its way back into the queue"),
    ),
    "boots again": (PREEMPTED, ("RUNNING",), {}, "running", "starts again"),
    "finished": ({"status": "finished"}, ("COMPLETING",), {}, "finished", ""),
    "cancelled": ({"status": "cancelled"}, None, {"verdict": "cancelled: by a person"}, "cancelled", "by a person"),
    "cancelled in the queue": (PENDING, ("CANCELLED",), {"cancelled": ""}, "cancelled", "by launcher cancel"),
    "scancelled": (PENDING, ("CANCELLED",), {}, "cancelled", "by scancel"),
    "killed": (RUNNING, ("CANCELLED",), {}, "cancelled", "by scancel before it had saved"),
    "dependency": (
        *(PENDING, ("CANCELLED", "DependencyNeverSatisfied"), {}, "cancelled"),
        "DependencyNeverSatisfied: what it waits for has failed, it will never start",
    ),
    "failed by verdict": (
        FAILED,
        None,
        {"verdict": "failed: 4 starts in a row got nowhere"},
        "failed",
        "4 starts in a row",
    ),
    "failed without a word": (FAILED, None, {}, "failed", "it does not say why"),
    "timeout": (RUNNING, ("TIMEOUT",), {}, "lost", "TIMEOUT"),
    "out of memory": (RUNNING, ("OUT_OF_MEMORY",), {}, "lost", "OUT_OF_MEMORY"),
    "batch script broke": (PENDING, ("FAILED",), {}, "failed", "the job ended before a rank had started: FAILED"),
    "odd end": (RUNNING, ("COMPLETED",), {}, "lost", "COMPLETED, run.json says running"),
    "not requeued": (
        PREEMPTED,
        ("FAILED",),
        {"verdict": "preempted: no requeue was asked for"},
        "preempted",
        "no requeue",
    ),
    "lost, not requeued": (PREEMPTED, ("FAILED",), {"verdict": "lost: a rank was killed"}, "lost", "a rank was killed"),
    "forgotten": (RUNNING, None, {}, "lost", "SLURM has forgotten the job, run.json says running"),
    "forgotten in the queue": (PENDING, None, {}, "lost", "SLURM has forgotten the job, run.json says pending"),
}


@pytest.mark.parametrize("case", CASES)
def test_states(case: str, make: Make, slurm: Slurm, told: Told) -> None:
    facts, job, files, state, why = CASES[case]
    run = make().facts(**facts).job("7").start(job="7")
    if job is None:
        slurm.fails("squeue", "slurm_load_jobs error: Invalid job id specified")
    else:
        slurm.job("7", *job)
    for name, text in files.items():
        run.write(f"slurm/{name}", text)
    (one,) = told(run.path)
    assert one["state"] == state
    assert (one["why"] or "").startswith(why)
    assert why or one["why"] is None
    assert one["job"] == "7"


def test_accounting_knows_what_squeue_has_forgotten(make: Make, slurm: Slurm, told: Told) -> None:
    make().facts("running").job("7").start(job="7")
    slurm.forget()
    slurm.says("sacct", "NODE_FAIL|0:0\nOUT_OF_MEMORY|0:125")
    (one,) = told("runs/a")
    assert (one["state"], one["why"]) == ("lost", "OUT_OF_MEMORY")


def test_a_pending_job_tells_when_it_starts(make: Make, slurm: Slurm, told: Told) -> None:
    make().facts("pending").job("7")
    start = time.time() + 60
    slurm.job("7", "PENDING", "Resources", start=start)
    (one,) = told("runs/a")
    assert one["why"].startswith("Resources, starts about ")
    assert one["why"].endswith(time.strftime("%H:%M", time.localtime(start)))
    assert one["starts"] is not None
    assert one["seconds_left"] is None


def test_a_failure_is_told_with_rank_host_and_step(
    make: Make, slurm: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make().facts("failed").job("7").start(job="7")
    run.write("attempts/1/failed", {"rank": 3, "step": 12, "error": "ValueError: \x1b[31mno\nsecond", "host": "node2"})
    run.write("slurm/verdict", "failed: ValueError")
    run.write("logs/rank-00003.txt", "first\nprogress 1\rprogress 2\r\n\x1b]0;title\x07last\n")
    slurm.forget()
    assert "rank 3 on node2 at step 12: ValueError: \\x1b[31mno  " in shown(capsys)
    said = shown(capsys, "runs/a")
    assert "\nwhy           rank 3 on node2 at step 12: ValueError: \\x1b[31mno\\nsecond\n" in said
    assert said.endswith("  first\n  progress 2\n  \\x1b]0;title\\x07last\n")
    assert "\x1b" not in said


def test_a_failure_that_may_pass_goes_on(make: Make, slurm: Slurm, told: Told) -> None:
    run = make().facts("failed").job("7").start(job="7")
    run.write("attempts/1/failed", {"rank": 0, "step": 3, "error": "lost a peer", "retry": True, "host": "node1"})
    slurm.job("7", "PENDING", "BeginTime")
    assert told("runs/a")[0]["state"] == "requeued"
    run.write("slurm/cancelled", "")
    slurm.forget()
    assert told("runs/a")[0]["state"] == "cancelled"


def test_numbers(make: Make, slurm: Slurm, told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    run = make().facts(
        "running", attempt=2, restarts=1, world_size=4, global_step=100, total_steps=600, hosts=["node1"]
    )
    run.job("7").start(2, job="7").metrics((1, 100, 2.0), (1, 130, 9.0), (2, 101, 1.9), (2, 120, 1.5))
    lines = (run.path / "metrics.jsonl").read_text()
    run.write("metrics.jsonl", lines + '{"attempt": 2, "step": 120, "tokens_per_s": 12345.6}\n{"attempt": 2, "st')
    for step in (50, 100):
        run.write(f"checkpoints/step-{step:08d}/index.json", "{}")
    (run.path / "checkpoints" / "step-00000120.partial-2").mkdir()
    now = time.time()
    os.utime(run.path / "checkpoints/step-00000100/index.json", (now - 200, now - 200))
    slurm.job("7", "RUNNING", end=now + 3700)
    (one,) = told("runs/a")
    assert (one["step"], one["total"], one["loss"], one["rate"], one["rate_unit"]) == (
        120,
        600,
        1.5,
        12345.6,
        "tokens/s",
    )
    assert (one["restarts"], one["attempt"], one["checkpoint"], one["nodes"]) == (1, 2, 100, 2)
    assert abs(one["seconds_left"] - 3700) < 5
    table = shown(capsys)
    for cell in ("120/600", "1.5", "12,346 tokens/s", "100, 3 min ago", "1:01:", "2: node[1-2]"):
        assert cell in table
    block = shown(capsys, "runs/a")
    assert "ranks         4 on node1" in block
    assert "left          1:01:" in block
    assert "of 1:00:00" in block


def test_steps_that_a_later_attempt_trains_anew_do_not_count(make: Make) -> None:
    run = make().facts("running", attempt=2, global_step=100)
    (run.path / "attempts" / "2").mkdir(parents=True)
    run.metrics((1, 100, 2.0), (1, 130, 9.0))  # the newest start has no line yet
    assert (gather(run.path).step, gather(run.path).progress.loss) == (100, 2.0)
    run.metrics((1, 90, 3.0), (2, 101, 1.0), (1, 130, 9.0), (2, 100, 2.0))
    assert (gather(run.path).step, gather(run.path).progress.loss) == (101, 1.0)


def test_steps_that_the_run_has_gone_back_from_do_not_count(make: Make) -> None:
    run = make().facts("running", attempt=1, global_step=100)
    run.metrics((1, 100, 2.0), (1, 130, 9.0))
    lines = (run.path / "metrics.jsonl").read_text() + '{"attempt": 1, "step": 100, "rewound_from": 131}\n'
    run.write("metrics.jsonl", lines)
    assert (gather(run.path).step, gather(run.path).progress.loss) == (100, 2.0)
    run.write("metrics.jsonl", lines + '{"attempt": 1, "step": 110}\n')
    assert gather(run.path).step == 110


def test_only_the_end_of_long_metrics_is_read(make: Make) -> None:
    run = make().facts("running", global_step=0)
    run.metrics(*((1, step, 1.0) for step in range(1, 5001)))
    with open(run.path / "metrics.jsonl", "r+b") as file:
        file.write(b"\xff" * 100)
    assert gather(run.path).step == 5000


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"x"', "1" * 5000, "null", "[" * 20_000])
def test_numbers_that_are_none(value: str, make: Make, slurm: Slurm, told: Told) -> None:
    run = make().facts("running").job("7").start(job="7").metrics((1, 5, 0.5))
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write(f'{{"attempt": 1, "step": 6, "loss": {value}, "samples_per_s": {value}}}\n')
    slurm.job("7", "RUNNING")
    (one,) = told("runs/a")
    bad = value in ("NaN", "Infinity")
    assert one["loss"] == (None if bad else 0.5)
    assert one["why"] == (f"the loss is {value[:3].lower()}" if bad else None)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", '{"status": 3}', '{"status": "on fire"}', "[" * 100_000])
def test_a_broken_run_json_is_told(text: str, make: Make, slurm: Slurm, told: Told) -> None:
    make().job("7").write("run.json", text)
    slurm.forget()
    (one,) = told("runs/a")
    assert one["state"] == "lost"
    assert "run.json" in one["why"]
    slurm.job("7", "RUNNING")
    (one,) = told("runs/a")
    assert one["state"] == "running"


def test_hostile_files(make: Make, no_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    run = make("b\x1b[2Jad").facts("failed", total_steps="many", hosts=7, command="x", restarts=-1, world_size=10**30)
    run.write("attempts/1/started.json", {"host": [], "pid": "x", "environment": 3, "started": 5})
    run.write("attempts/1/failed", "{")
    run.write("attempts/1/exit-00000.json", "[]")
    run.write("slurm/verdict", "failed: \x1b[2J")
    run.write("slurm/jobs.jsonl", "[]\n{}\n3\n")
    run.write("metrics.jsonl", '[]\n3\n{"step": -1}\n{"step": true}\n')
    for said in (shown(capsys), shown(capsys, run.path)):
        assert "failed" in said
        assert "\x1b" not in said


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "attempts/1/failed", "attempts/1/started.json"])
def test_a_pipe_in_place_of_a_file_keeps_nobody_waiting(name: str, make: Make, slurm: Slurm, told: Told) -> None:
    run = make().facts("failed").start()
    (run.path / name).unlink(missing_ok=True)
    os.mkfifo(run.path / name)
    (one,) = told("runs/a")
    assert one["state"] in ("failed", "running")
    assert name != "run.json" or "run.json cannot be read: it is no regular file" in one["why"]


def test_the_verdict_is_told_of_one_run(
    make: Make, slurm: Slurm, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make().facts("failed", world_size=2).start()
    said = {"rank": 1, "step": 3, "kind": "code", "type": "ValueError", "message": "mine", "time": "2026-01-01"}
    run.write("attempts/1/error-00001.json", said)
    run.write("attempts/1/error-00000.json", said | {"rank": 0, "kind": "peer", "message": "closed"})
    paragraph = "rank 1 failed first at step 3: ValueError: mine. 1 rank then lost its peer. A code error: "
    (one,) = told("runs/a")
    assert one["verdict"] == f"{paragraph}it will fail the same way again."
    assert f"verdict       {paragraph}" in shown(capsys, run.path)
    make("b").facts("running").start()
    assert [row["verdict"] for row in told()] == [None, None]
    (one,) = told("runs/b")
    assert one["verdict"] is None or one["state"] != "running"


def test_the_list(make: Make, slurm: Slurm, told: Told, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = time.time() - 2 * 86_400
    for name, age, state in (("old", old, "finished"), ("lost", old, "failed"), ("new", 0, "finished")):
        path = make(name).facts(state).path / "run.json"
        os.utime(path, (age or time.time(), age or time.time()))
    (make("none").path / "notes").mkdir()
    make("mine").facts("running").job("7").start(job="7")
    elsewhere = Run(tmp_path / "elsewhere").facts("running").job("8").start(job="8")
    elsewhere.write("slurm/job.sh", "")
    slurm.job("7", "RUNNING")
    slurm.job("8", "RUNNING", run=elsewhere.path)
    slurm.job("9", "RUNNING", run=tmp_path)
    names = [Path(one["run"]).name for one in told()]
    assert names[0] in ("mine", "elsewhere")
    assert sorted(names) == ["elsewhere", "lost", "mine", "new"]
    assert names[-1] == "lost"
    assert len(slurm.calls("squeue")) == 1
    assert f" -u {os.getuid()} " in slurm.calls("squeue")[0]
    assert len(told("--all")) == 5
    assert shown(capsys).endswith("and 1 that ended more than a day ago: launcher status --all\n")


def test_nothing_there(make: Make, slurm: Slurm, capsys: pytest.CaptureFixture[str], told: Told) -> None:
    assert shown(capsys) == "no runs under ./runs, and no jobs of yours\n"
    assert told() == []


def test_without_slurm(make: Make, no_slurm: None, told: Told) -> None:
    make("a").facts("running").job("7").start(job="7")
    make("b").facts("preempted").job("8").write("slurm/verdict", "preempted: stopped")
    said = {Path(one["run"]).name: (one["state"], one["why"]) for one in told()}
    assert said == {
        "a": ("running", "run.json says so (there is no SLURM here to ask)"),
        "b": ("preempted", "stopped (there is no SLURM here to ask)"),
    }


def test_a_controller_that_does_not_answer(make: Make, slurm: Slurm, told: Told) -> None:
    for name in "ab":
        make(name).facts("running").job("7").start(job="7")
    slurm.fails("squeue", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    one, _ = told(err="launcher: by the files alone: squeue says: Unable to contact")
    assert (one["state"], one["why"]) == ("running", "run.json says so (SLURM does not answer)")
    assert len(slurm.calls("squeue")) == 1
    assert not slurm.calls("sacct")


def test_a_run_by_hand(make: Make, slurm: Slurm, told: Told) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        here = socket.gethostname()
        run = make().facts("running").start(host=here, pid=sleeper.pid)
        assert told("runs/a")[0]["state"] == "running"
        run.start(host=here, pid=sleeper.pid, when=time.time() - 1000)  # another process has got the number since
        assert told("runs/a")[0]["state"] == "lost"
    finally:
        sleeper.kill()
        sleeper.wait()
    run.start(host=here, pid=sleeper.pid)
    (one,) = told("runs/a")
    assert (one["state"], one["why"]) == ("lost", f"the process is gone ({sleeper.pid} on {here})")
    assert one["job"] is None
    run.start(host="elsewhere", pid=1)
    assert told("runs/a")[0]["why"] == "run.json says so, on elsewhere"
    assert not slurm.calls("squeue")
    run.facts("preempted").write("attempts/1/exit-00000.json", {"status": "preempted", "reason": "SIGTERM"})
    (one,) = told("runs/a")
    assert (one["state"], one["why"]) == ("preempted", "SIGTERM")


def test_a_chain_shows_the_job_that_runs(make: Make, slurm: Slurm, told: Told) -> None:
    make().facts("running").job("5", "6", "7").start(job="6")
    slurm.job("5", "COMPLETED")
    slurm.job("6", "RUNNING")
    slurm.job("7", "PENDING", "Dependency", run=Path("runs/a").absolute())
    (one,) = told("7")
    assert (one["job"], one["state"], one["jobs"]) == ("6", "running", ["5", "6", "7"])


def test_a_sweep(
    sweep: Callable[[int], Path], make: Make, slurm: Slurm, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sweep(4)
    for number, state in enumerate(("finished", "failed", "running")):
        (path / f"{number:05d}" / "run.json").write_text(json.dumps({"status": state, "attempt": 1}))
    slurm.job("20_2", "RUNNING", number="22", run=path)
    slurm.job("20_3", "PENDING", "Priority", number="20")
    lines = shown(capsys, path).splitlines()
    assert lines[0].split() == [
        "POINT",
        "lr",
        "STATE",
        "WHY",
        "STEP",
        "LOSS",
        "RATE",
        "RESTARTS",
        "CHECKPOINT",
        "LEFT",
        "JOB",
    ]
    assert [line.split()[:3] for line in lines[1:5]] == [
        ["00000", "1e-0", "finished"],
        ["00001", "1e-1", "failed"],
        ["00002", "1e-2", "running"],
        ["00003", "1e-3", "pending"],
    ]
    assert lines[-1] == "1 finished, 1 failed, 1 pending, 1 running"
    points = told(path)
    assert [one["job"] for one in points] == ["20_0", "20_1", "20_2", "20_3"]
    assert points[2]["options"] == {"lr": "1e-2"}
    make("other").facts("finished")
    one = next(one for one in told() if one["points"])
    assert one["points"] == {"finished": 1, "failed": 1, "pending": 1, "running": 1}
    assert (one["state"], one["job"]) == ("running", "20")
    assert one.keys() == points[0].keys()
    assert told("20_2")[0]["state"] == "running"
    slurm.forget()
    slurm.job("20_2", "CANCELLED", number="22")
    slurm.job("20", "CANCELLED")  # what is left of all tasks that were cancelled while they waited
    assert [one["state"] for one in told(path)] == ["finished", "failed", "cancelled", "cancelled"]
    assert shown(capsys, path).endswith(f"1 finished, 2 cancelled, 1 failed: launcher resume runs/{path.name}\n")


def test_what_is_no_run(make: Make, slurm: Slurm, told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    make("a").facts("finished")
    slurm.fails("squeue", "slurm_load_jobs error: Invalid job id specified")
    said = told("runs/a", "123", "nothing", code=2, err="launcher: nothing: there is no such run directory")
    assert [one["state"] for one in said] == ["finished"]
    with pytest.raises(UsageError, match="--all is of the list"):
        status.main(["--all", "runs/a"])


def test_nothing_heavy_is_imported() -> None:
    for name in ("status", "logs", "cancel"):
        code = (
            f"import sys, launcher.slurm.{name}; print(*{{'torch', 'numpy', 'xxhash', 'tabulate'}} & {{*sys.modules}})"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "\n"
