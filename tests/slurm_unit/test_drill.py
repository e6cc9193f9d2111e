"""`launcher drill`: what it makes of the files of a run and of SLURM's answers, and what it refuses."""

import json
import os
import pwd
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from launcher.errors import LauncherError, UsageError
from launcher.slurm import drill as command
from launcher.slurm.aftermath import Aftermath, Drill, Queue, events, observe, ranks
from launcher.slurm.debrief import as_dict, judge, lines

STRUCK = 1_700_000_000.0
PENDING = Queue("PENDING", "BeginTime", restarts=1, submitted=STRUCK + 3, eligible=STRUCK + 8)
COMPLETED = Queue("COMPLETED", restarts=0)
UID = os.getuid()
ME = pwd.getpwuid(UID).pw_name


def iso(seconds, struck=STRUCK):
    return datetime.fromtimestamp(struck + seconds, UTC).isoformat(timespec="milliseconds")


class Run:
    """A run directory whose files a test writes; seconds are since the signal."""

    def __init__(self, path: Path, struck: float = STRUCK) -> None:
        self.path, self.struck = path, struck
        for name in ("slurm", "attempts/1", "checkpoints", "logs"):
            (path / name).mkdir(parents=True)
        self.drill = Drill(path, "12", "12", 0, 1, 2, 10, "preemption", 30, struck)
        self.checkpoint(10, -5)
        self.write("logs/rank-00000.txt", "")
        self.write("logs/rank-00001.txt", "")

    def write(self, name, said, seconds=0.0):
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(said if isinstance(said, str) else json.dumps(said))
        os.utime(path, (self.struck + seconds, self.struck + seconds))
        return self

    def seen(self, rank, seconds, signal="SIGTERM", attempt=1):
        said = {"rank": rank, "signal": signal, "host": "node1", "time": iso(seconds, self.struck)}
        return self.write(f"attempts/{attempt}/signal-{rank:05d}.json", said)

    def left(self, rank, seconds, step=17, status="preempted", reason="SIGTERM", attempt=1):
        said = {"rank": rank, "status": status, "step": step, "reason": reason, "host": "node1"}
        return self.write(f"attempts/{attempt}/exit-{rank:05d}.json", {**said, "time": iso(seconds, self.struck)})

    def checkpoint(self, step, seconds):
        return self.write(f"checkpoints/step-{step:08d}/index.json", "{}", seconds)

    def verdict(self, said, seconds):
        return self.write("slurm/verdict", said + "\n", seconds)

    def began(self, restart, seconds, nodes="node[1-2]"):
        (self.path / "slurm" / "verdict").unlink(missing_ok=True)
        return self.write(f"slurm/started-12-{restart}", f"{int(self.struck + seconds)} {nodes}\n", seconds)

    def started(self, attempt, restart="0"):
        around = {"SLURM_JOB_ID": "12", **({"SLURM_RESTART_COUNT": restart} if restart != "0" else {})}
        return self.write(f"attempts/{attempt}/started.json", {"world_size": 2, "environment": around})

    def stepped(self, attempt, step, seconds=0.0):
        return self.write(f"attempts/{attempt}/stepped", {"step": step, "time": iso(seconds, self.struck)})

    def stopped(self):
        """Both ranks have seen it, saved and left."""
        self.seen(0, 0.1).seen(1, 0.4).checkpoint(17, 1.5)
        return self.left(0, 1.75).left(1, 1.5).verdict("preempted: stopped by a signal", 2.5)

    def look(self, before=None, queue=None, **changed):
        return observe(replace(self.drill, **changed), before or Aftermath(), queue)

    def report(self, found, waited=None, **changed):
        drill = replace(self.drill, **changed)
        return as_dict(drill, found, judge(drill, found, waited))


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


def test_tells_a_drill_that_went_well(run):
    found = run.stopped().look(queue=PENDING)
    found = run.began(1, 10.5).started(2, "1").stepped(2, 18, 14.25).look(found)
    report = run.report(found)
    assert report["seen"] == {"0": 0.1, "1": 0.4}
    assert report["not_seen"] == report["not_left"] == report["look"] == []
    assert report["agreed_step"] == report["resumed_step"] == 17
    path = str(run.path / "checkpoints" / "step-00000017")
    assert report["checkpoint"] == {"step": 17, "seconds": 1.5, "path": path}
    assert report["left"] == {"0": 1.75, "1": 1.5}
    assert report["verdict"] == {"word": "preempted", "why": "stopped by a signal", "seconds": 2.5}
    assert report["requeued_by"] == "job.sh"
    assert report["waited"] == ["BeginTime"]
    assert report["eligible"]["seconds"] == 8
    assert report["starts"] == [{"start": 1, "seconds": 10.5, "nodes": "node[1-2]"}]
    assert report["first_step"] == {"step": 18, "seconds": 14.25}
    spent = {"seconds": 14.25, "stopping": 2.5, "queue": 8.0, "starting": 3.75}
    assert report["lost"] == {**spent, "steps": 0, "exact": True}
    assert report["good"]
    told = dict(lines(report))
    assert told["flag seen"] == "2 of 2: rank 0 +0.1 s; rank 1 +0.4 s"
    assert told["checkpoint"] == f"step 17, +1.5 s: {path}"
    assert told["time lost"] == "14.2 s: stopping and saving 2.5, in the queue 8.0, starting 3.8"
    assert told["steps lost"] == "0"
    assert "clocks" not in told
    json.dumps(report, allow_nan=False)


def test_tells_each_thing_once_and_in_order(run):
    steps = [
        lambda: run.seen(1, 0.4),
        lambda: run.seen(0, 0.1).write("checkpoints/step-00000017.partial-1/a", ""),
        lambda: run.checkpoint(17, 1.5).left(1, 1.5).left(0, 1.75).verdict("preempted: why", 2.5),
        lambda: None,
        lambda: run.began(1, 10.5),
        lambda: run.started(2, "1"),
        lambda: run.stepped(2, 18, 14.2),
    ]
    queues = [None, Queue("RUNNING"), Queue("RUNNING"), PENDING, None, Queue("RUNNING", restarts=1), None]
    found, told = Aftermath(), []
    for second, (step, queue) in enumerate(zip(steps, queues, strict=True)):
        step()
        new = run.look(found, queue)
        told += [event.text for event in events(run.drill, found, new, STRUCK + second)]
        assert events(run.drill, new, run.look(new, queue), STRUCK) == []
        found = new
    waits = datetime.fromtimestamp(STRUCK + 8)
    assert told == [
        "rank 1 has seen SIGTERM (1 of 2)",
        "rank 0 has seen SIGTERM (2 of 2)",
        "step 17 is being saved",
        f"checkpoint of step 17: {run.path}/checkpoints/step-00000017",
        "ranks 0-1 have left: preempted, at step 17 (2 of 2)",
        "job.sh: preempted: why",
        "requeued (restart 1)",
        f"waits in the queue: BeginTime, eligible at {waits:%H:%M:%S}",
        "start 1 begins on node[1-2]",
        "attempt 2 has opened the run",
        "step 18 is complete: resumed at step 17",
    ]


def test_what_was_seen_stays_known(run):
    before = run.stopped().look()
    for name in ("index.json", ""):
        path = run.path / "checkpoints/step-00000017" / name
        path.unlink() if name else path.rmdir()  # pruned by the start after it
    run.began(1, 10).checkpoint(18, 15)
    found = run.look(before)
    assert found.checkpoint == before.checkpoint
    assert found.verdict == ("preempted", "stopped by a signal", STRUCK + 2.5)


def test_the_verdict_of_a_later_start_is_not_that_of_the_drilled_one(run):
    run.seen(0, 0.1).left(0, 1).left(1, 1).began(1, 10).verdict("failed: ValueError", 12)
    found = run.look(queue=Queue("FAILED", restarts=1))
    assert found.verdict is None
    assert found.over
    judgement = judge(run.drill, found)
    assert judgement.said == "start 1 ended without a new step: failed: ValueError"
    assert not judgement.good


def test_names_ranks_that_did_not_see_it(run):
    run.seen(0, 0.1).checkpoint(17, 1.5).left(0, 1.7).left(1, 1.5, reason="another rank").verdict("preempted: x", 2.5)
    found = run.began(1, 10).started(2, "1").stepped(2, 18, 14).look()
    report = run.report(found)
    assert report["not_seen"] == [1]
    assert dict(lines(report))["flag seen"] == "1 of 2: rank 0 +0.1 s; rank 1 has not seen it"
    assert report["good"]  # one flag is enough for all to stop


def test_tells_what_a_kill_in_a_save_has_cost(run):
    run.write("metrics.jsonl", "".join(f'{{"attempt": 1, "step": {step}, "loss": 1.0}}\n' for step in range(1, 16)))
    run.seen(0, 0.1).seen(1, 0.1).write("checkpoints/step-00000017.partial-1/a", "")
    before = run.look(queue=replace(PENDING, reason="Priority"))
    found = run.began(1, 50).started(2, "1").stepped(2, 11, 55).look(before)
    report = run.report(found, signal="requeue")
    assert report["checkpoint"] is None
    assert report["agreed_step"] is None
    assert report["requeued_by"] == "SLURM"
    assert (report["lost"]["steps"], report["lost"]["exact"]) == (5, False)  # two more, of which nothing was written
    assert report["lost"]["stopping"] == 3  # SLURM says when it was in the queue again
    assert not report["good"]
    assert report["said"] == (
        "it went on by itself, and lost at least 5 steps: ranks 0-1 ended while step 17 was being saved"
    )
    assert report["fix"].startswith("the rest of a step and a save must fit into KillWait, which is 30 s")
    assert str(run.path / "slurm" / "12.out") in report["look"]
    told = dict(lines(report))
    assert told["steps lost"] == "at least 5"
    assert told["time lost"] == "55.0 s: stopping and saving 3.0, in the queue 47.0, starting 5.0"


def test_does_not_call_steps_saved_of_which_nobody_has_told(run):
    run.write("metrics.jsonl", '{"attempt": 1, "step": 10, "loss": 1.0}\n{"attempt": 1, "st')
    found = run.began(1, 50).started(2, "1").stepped(2, 11, 55).look()
    report = run.report(found)
    assert report["lost"]["steps"] is None
    assert not report["good"]


def test_ranks_that_leave_without_a_save(run):
    for rank in (0, 1):
        run.seen(rank, 0.1).left(rank, 120, step=16, reason="SIGTERM, and no step's edge came in 120 s")
    found = run.began(1, 130).started(2, "1").stepped(2, 11, 140).look()
    judgement = judge(run.drill, found)
    assert judgement.said == (
        "it went on by itself, and lost 6 steps: the ranks left without a save "
        "(SIGTERM, and no step's edge came in 120 s)"
    )


def test_a_run_that_finishes_after_it_went_on_has_lost_nothing(run):
    found = run.stopped().began(1, 10).started(2, "1").left(0, 14, status="finished", attempt=2).look()
    report = run.report(found)
    assert report["good"]
    assert report["lost"]["seconds"] == 14
    assert dict(lines(report))["finished"] == "+14.0 s"


def test_a_run_that_finishes_before_it_stops_was_not_drilled(run):
    found = run.left(0, 0.3, status="finished").left(1, 0.3, status="finished").look()
    assert found.went_on
    judgement = judge(run.drill, found)
    assert not judgement.good
    assert judgement.said == "no rank saw the signal, and the run has finished"
    assert "accelerate" in judge(replace(run.drill, signal="limit", agents=True), found).fix
    found = run.seen(0, 0.2).look()
    report = run.report(found)
    assert report["said"].startswith("the run finished before")
    assert report["lost"]["seconds"] is None


@pytest.mark.parametrize(
    ("prepare", "queue", "said"),
    [
        (lambda run: run, Queue("RUNNING"), "no rank saw the signal within 9 s"),
        (lambda run: run.seen(0, 1), Queue("RUNNING"), "rank 0 saw the signal, and no rank left within 9 s"),
        (lambda run: run.seen(0, 1).left(0, 2), Queue("RUNNING"), "rank 1 did not leave within 9 s"),
        (lambda run: run.stopped(), Queue("RUNNING"), "the job was not requeued within 9 s"),
        (
            lambda run: run.stopped(),
            replace(PENDING, reason="Resources"),
            "it still waits in the queue (Resources), and did not start within 9 s",
        ),
        (
            lambda run: run.stopped(),
            replace(PENDING, reason="JobHeldUser"),
            "it is requeued and held (JobHeldUser)",
        ),
        (lambda run: run.stopped(), Queue("REQUEUE_HOLD", "job requeued", 1), "it is requeued and held (job requeued)"),
        (
            lambda run: run.stopped().began(1, 5),
            Queue("RUNNING"),
            "start 1 began on node[1-2], and no rank opened the run within 9 s",
        ),
        (
            lambda run: run.stopped().began(1, 5).started(2, "1"),
            Queue("RUNNING"),
            "attempt 2 completed no step within 9 s",
        ),
        (
            lambda run: run.left(0, 2, None, "failed").write(
                "attempts/1/failed", {"rank": 0, "host": "node2", "error": "ValueError: x"}
            ),
            COMPLETED,
            "a rank failed: rank 0 on node2: ValueError: x",
        ),
        (
            lambda run: run.stopped().verdict("cancelled: by a person", 2),
            COMPLETED,
            "it was not requeued: job.sh said cancelled: by a person",
        ),
        (lambda run: run, Queue("CANCELLED"), "it ended without a verdict (SLURM says CANCELLED)"),
        (lambda run: run, Queue(), "it ended without a verdict (SLURM has forgotten it)"),
    ],
)
def test_says_why_it_did_not_go_on(run, prepare, queue, said):
    found = prepare(run).look(queue=queue)
    judgement = judge(run.drill, found, 9)
    assert judgement.said == said
    assert not judgement.good
    assert judgement.fix
    assert judgement.look
    list(lines(as_dict(run.drill, found, judgement)))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"rank": "x", "time": 3}', "\0"])
def test_lives_with_broken_files(run, text):
    for name in ("signal-00000.json", "exit-00000.json", "failed"):
        run.write(f"attempts/1/{name}", text)
    for name in ("slurm/verdict", "slurm/started-12-1", "metrics.jsonl", "attempts/2/stepped"):
        run.write(name, text)
    found = run.look(queue=PENDING)
    assert not found.went_on
    list(lines(run.report(found)))


def test_says_where_clocks_differ(run):
    found = run.seen(0, -3).look()
    assert "3.0 s behind" in dict(lines(run.report(found)))["clocks"]


def test_names_many_ranks_in_short():
    assert ranks([3]) == "rank 3"
    assert ranks([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


# ---- the command, on fake SLURM commands ----


class Fake:
    """SLURM's commands, whose answers are files that a test changes; what is sent to a job is written down."""

    def __init__(self, directory: Path, run: Run) -> None:
        self.run, self.sent, self.after = run, directory / "sent", directory / "after"
        self.fields, self.bin = directory / "fields", directory / "bin"
        self.bin.mkdir()
        self.says()
        config = "echo 'KillWait = 30 sec'"
        self._command("squeue", f'cat "{directory}/job"')
        self._command(
            "scontrol", f'case "$*" in *config) {config};; requeue*) {self._send};; *) cat "{self.fields}";; esac'
        )
        self._command("scancel", self._send)
        run.write("slurm/jobs.jsonl", '{"job": "12", "time": 1}\n').write("slurm/request.json", {"request": {}})
        run.started(1).stepped(1, 1)

    @property
    def _send(self) -> str:
        return f'echo "$0 $*" >> "{self.sent}"; [ ! -e "{self.after}" ] || cp -rp "{self.after}/." "{self.run.path}"'

    def says(self, state="RUNNING", user=ME, uid=UID, requeue=1, restarts=0, reason="None"):
        job = ("12", "12", "x", user, "batch", state, reason, "1", "n", "N/A", "N/A", "N/A", "1:00", str(self.run.path))
        (self.fields.parent / "job").write_text("\x1e" + "\x1f".join(job) + "\n")
        said = f"JobId=12 JobName=x UserId={user}({uid}) JobState={state} Reason={reason} Requeue={requeue}"
        self.fields.write_text(f"{said} Restarts={restarts} WorkDir=/x Restarts=77\n")

    def _command(self, name, text):
        (self.bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (self.bin / name).chmod(0o755)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "SETTLE", 0.0)
    fake = Fake(tmp_path, Run(tmp_path / "run", time.time()))
    monkeypatch.setenv("PATH", f"{fake.bin}:/usr/bin:/bin")
    return fake


def refused(*argv):
    with pytest.raises(UsageError) as told:
        command.main([str(arg) for arg in argv])
    assert "\n" not in str(told.value)
    return str(told.value)


def test_sends_the_signal_and_reports(fake, capsys):
    after = Run(fake.after, fake.run.struck)
    after.seen(0, 0.1).seen(1, 0.1).checkpoint(17, 0.5).left(0, 0.6).left(1, 0.6)
    after.began(1, 2).started(2, "1").stepped(2, 18, 4)
    assert command.main([str(fake.run.path)]) == 0
    told = capsys.readouterr().out
    assert told.startswith(
        f"launcher drill: job 12 ({fake.run.path}) gets SIGTERM to its 2 ranks, as a preemption with grace does: "
        "scancel --signal=TERM 12\n"
    )
    assert "ranks 0-1 have seen SIGTERM (2 of 2)" in told
    assert told.endswith("it went on by itself, and lost no step\n")
    assert fake.sent.read_text().split("/")[-1] == "scancel --signal=TERM 12\n"


@pytest.mark.parametrize(
    ("signal", "sent"),
    [
        ("preemption", "scancel --signal=TERM 12"),
        ("limit", "scancel --signal=USR2 12"),
        ("requeue", "scontrol requeue 12"),
    ],
)
def test_sends_what_slurm_would(fake, capsys, signal, sent):
    assert command.main([str(fake.run.path), "--signal", signal, "--wait", "0.1", "--json"]) == 1
    assert fake.sent.read_text().split("/")[-1] == f"{sent}\n"
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["said"] == "no rank saw the signal within 0.1 s"
    assert report["not_seen"] == [0, 1]
    assert sent in printed.err


def test_a_dry_run_sends_nothing(fake, capsys):
    assert command.main(["--dry-run", "12"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert command.main(["--dry-run", "--json", "12"]) == 0
    assert json.loads(capsys.readouterr().out)["command"] == ["scancel", "--signal=TERM", "12"]
    assert not fake.sent.exists()


def test_a_job_that_ends_is_not_waited_for(fake, capsys, monkeypatch):
    send = command.cluster.ask

    def ask(argv, **settings):
        if argv[0] == "scancel":
            fake.says("COMPLETED")
        return send(argv, **settings)

    monkeypatch.setattr(command.cluster, "ask", ask)
    assert command.main([str(fake.run.path)]) == 1
    assert "it ended without a verdict (SLURM says COMPLETED)" in capsys.readouterr().out


def test_ctrl_c_ends_the_watching_alone(fake, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "observe", interrupted)
    assert command.main([str(fake.run.path)]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_a_controller_that_is_away_is_told_of_once(fake, capsys, monkeypatch):
    monkeypatch.setattr(command, "ASK", 0.0)
    monkeypatch.setattr(command, "_ask", lambda _: (_ for _ in ()).throw(LauncherError("scontrol says: no")))
    assert command.main([str(fake.run.path), "--wait", "0.5"]) == 1
    assert capsys.readouterr().out.count("scontrol says: no") == 1


def test_refuses_what_does_not_run(fake):
    fake.says("PENDING", reason="Resources")
    assert refused(fake.run.path) == "job 12 is pending (Resources): drill it when it has completed a step"
    fake.says("COMPLETED")
    assert "launcher resume" in refused(fake.run.path)
    fake.run.write("run.json", {"status": "finished"})
    assert "has finished" in refused("12")


def test_refuses_what_has_not_completed_a_step(fake):
    (fake.run.path / "attempts/1/stepped").unlink()
    assert "has not completed a step" in refused(fake.run.path)
    fake.run.stepped(1, 1)
    fake.says(restarts=1)  # that was the start before this one
    assert "has not completed a step" in refused(fake.run.path)
    fake.run.started(2, "1").stepped(2, 5)
    assert command.main([str(fake.run.path), "--dry-run"]) == 0


@pytest.mark.parametrize("name", ["signal-00001.json", "exit-00000.json", "failed"])
def test_refuses_what_is_stopping(fake, name):
    fake.run.write(f"attempts/1/{name}", {})
    assert f"is stopping already ({name})" in refused(fake.run.path)


def test_refuses_what_would_not_go_on(fake):
    fake.run.write("slurm/cancelled", "")
    assert "is being cancelled" in refused(fake.run.path)
    (fake.run.path / "slurm/cancelled").unlink()
    fake.says(requeue=0)
    assert "--no-requeue: it would stop, and not go on" in refused(fake.run.path)
    assert "--no-requeue: SLURM refuses to requeue it" in refused("--signal", "requeue", fake.run.path)
    fake.says()
    fake.run.write("slurm/request.json", {"request": {"requeue": False}})
    assert "--no-requeue" in refused(fake.run.path)
    fake.run.write("slurm/request.json", {"request": {"chain": 3}})
    assert "is of a chain" in refused(fake.run.path)


def test_refuses_the_job_of_somebody_else(fake):
    fake.says(user="alice", uid=UID + 1)
    assert "alice's" in refused(fake.run.path)


def test_refuses_what_was_not_submitted(fake, tmp_path):
    (fake.run.path / "slurm/jobs.jsonl").unlink()
    assert "was not submitted" in refused(fake.run.path)
    assert "no such run directory" in refused(tmp_path / "none")
    fake.run.write("slurm/sweep.json", {})
    assert "is a sweep" in refused(fake.run.path)


@pytest.mark.parametrize("wait", ["0", "-1", "nan", "inf", "x"])
def test_refuses_a_wait_that_is_none(wait):
    assert "--wait" in refused("12", f"--wait={wait}")


def test_does_not_import_torch():
    script = "import sys; import launcher.slurm.drill; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0, shlex.join([script])
