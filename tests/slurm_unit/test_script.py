"""The batch script: how values get into it, and what it decides. Plain bash runs it, with fakes of SLURM's commands."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from launcher.errors import LauncherError, UsageError
from launcher.rundir import RunDir
from launcher.slurm.request import Request
from launcher.slurm.script import Script, check_rendered, header, render, shipped
from tests.slurm.nasty import VALUES
from tests.slurm_unit.fakes import REALLY, Fakes, facts, read_nul


def script(tmp_path, *, arguments=(), **changes):
    request = Request(nodes=1, tasks=1, cpus=1, gpus=0, python="/usr/bin/python3")
    request = replace(request, **{key: changes.pop(key) for key in [*changes] if hasattr(request, key)})
    values = {"name": "x", "run": str(tmp_path / "run"), "cwd": str(tmp_path), "recipe": "/r.py"}
    values |= {"arguments": arguments, "signal_lead": 0, "grace": 30} | changes
    return Script(request=request, **values)


# ---- rendering ----


def test_what_it_is_filled_in_with(tmp_path):
    text = render(script(tmp_path, arguments=["--lr", "1e-3"], environment={"A": "b c"}, setup=("module load cuda",)))
    assert text.startswith("#!/bin/bash\n#SBATCH --job-name=x\n#SBATCH --nodes=1\n")
    assert f"command=(/usr/bin/python3 -u /r.py --lr 1e-3 --run.dir {tmp_path}/run)\n" in text
    assert "export A='b c'\nmodule load cuda\n" in text
    assert not re.search(r"@[A-Z_]+@", text)
    check_rendered(text)


@pytest.mark.parametrize(
    "value", ["a b", "a'b", 'a"b', "a\nb", "a\\b", "a#b", "a\tb", "é", "a;b", "$(x)", "`x`", "a<b"]
)
def test_what_an_sbatch_line_cannot_hold_is_refused(tmp_path, value):
    with pytest.raises(UsageError, match=r"^--comment .* cannot be given$"):
        render(script(tmp_path, sbatch=(f"comment={value}",)))


def test_slurms_own_characters_are_taken(tmp_path):
    wanted = {"constraint": "[a100&ib|h100*2]", "exclude": "node[3,7-9]", "mem": "64G", "time": "1-00:00:00"}
    options = header(script(tmp_path, **wanted, sbatch=("hold", "gres=gpu:a100:2", "mail-user=a+b@x.org")))
    assert {f"--{key}={value}" for key, value in wanted.items()} <= {*options}
    assert {"--hold", "--gres=gpu:a100:2", "--mail-user=a+b@x.org", "--output=slurm/%j.out"} <= {*options}


def test_a_directory_in_which_slurm_would_not_find_its_output(tmp_path):
    assert "--output=/dev/null" in header(script(tmp_path, run="/a%jb"))
    assert "--output=/dev/null" in header(script(tmp_path, run="/a\\b"))
    assert "--output=slurm/%A_%a.out" in header(script(tmp_path, points={0: []}))


def test_templates_of_ones_own(tmp_path):
    own = tmp_path / "own.sh"
    own.write_text("#!/bin/bash\n@SBATCH@\nrun=@RUN@ me@example.com @x@\n@COMMAND@\n")
    assert "me@example.com @x@" in render(script(tmp_path, template=str(own)))
    own.write_bytes(b"#!/bin/bash\n@SBATCH@\n# \xe9\nrun=@RUN@\n@COMMAND@\n")  # no UTF-8
    assert "# \udce9\n" in render(script(tmp_path, template=str(own)))
    own.write_text("@SBATCH@ @RUN@ @COMMAND@ @NODES@")
    with pytest.raises(UsageError, match=r"own.sh: @NODES@ is not known: there are AFTER_KILL, CHAIN, "):
        render(script(tmp_path, template=str(own)))
    own.write_text("@SBATCH@ @RUN@")
    with pytest.raises(UsageError, match=r"own.sh: @COMMAND@ is missing: copy .*job.sh and change that"):
        render(script(tmp_path, template=str(own)))
    with pytest.raises(UsageError, match=r"--template .*none.sh: No such file or directory"):
        render(script(tmp_path, template=str(tmp_path / "none.sh")))


def test_what_bash_cannot_read_is_refused(tmp_path):
    with pytest.raises(LauncherError, match=r"the batch script is no bash: .* \(a --setup line or the --template\?\)"):
        check_rendered(render(script(tmp_path, setup=("if true; then (",))))


def test_mounts_need_a_container(tmp_path):
    with pytest.raises(UsageError, match="--mounts /data is for a --container"):
        render(script(tmp_path, mounts="/data"))


def test_the_template_is_found():
    assert (shipped() / "job.sh").is_file()


# ---- running: what arrives ----


@dataclass
class Outcome:
    code: int
    verdict: str
    output: str


class Job:
    """One job, whose starts are played."""

    def __init__(self, tmp_path, run=None, **changes):
        self.fakes = Fakes(tmp_path / "fakes")
        self.script = script(tmp_path, **({} if run is None else {"run": str(run)}), **changes)
        self.home = Path(self.script.run)
        (self.home / "slurm").mkdir(parents=True)
        self.run = RunDir(self.home / "00003" if self.script.is_array else self.home)
        (self.run.path / "slurm").mkdir(parents=True, exist_ok=True)
        self.run.update(status="pending")
        self.scene = RunDir(self.fakes.path / "scene")
        self.restarts = 0
        self.tmp = tmp_path
        self.fakes.say(job="JobId=55 JobName=x JobState=RUNNING Reason=None Requeue=1 Restarts=0 BatchFlag=1")

    def environment(self):
        own = {"JOB_ID": 55, "JOB_NODELIST": "node1", "NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NTASKS_PER_NODE": 1}
        own |= {"CPUS_PER_TASK": 1, "JOB_NUM_NODES": 2, "JOB_PARTITION": "batch", "NNODES": 1, "NODEID": 0}
        own |= {"ARRAY_JOB_ID": 55, "ARRAY_TASK_ID": 3, "JOB_ID": 58} if self.script.is_array else {}
        own |= {"RESTART_COUNT": self.restarts} if self.restarts else {}
        return {**os.environ, "PATH": self.fakes.search, **{f"SLURM_{key}": str(value) for key, value in own.items()}}

    def begin(self):
        self.fakes.say(calls=None)
        (self.fakes.path / "ran").unlink(missing_ok=True)
        file = self.home / "slurm" / "job.sh"
        file.write_bytes(os.fsencode(render(self.script)))
        return subprocess.Popen(
            ["bash", file],
            cwd=self.home,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def end(self, process):
        try:
            said, _ = process.communicate(timeout=30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        verdict = self.run.path / "slurm" / "verdict"
        outputs = sorted(self.home.glob("slurm/*.out"))
        told = said + b"".join(path.read_bytes() for path in outputs)
        return Outcome(
            process.returncode, verdict.read_text().strip() if verdict.exists() else "", told.decode(errors="replace")
        )

    def play(self):
        """One start, from the first line to the last."""
        ended = self.end(self.begin())
        self.restarts += 1
        return ended

    def attempt(self, **facts):
        """Let the ranks have begun one start, and have written into run.json what they do."""
        number = self.run.current_attempt() + 1
        self.scene.path.joinpath("attempts", str(number)).mkdir(parents=True)
        self.scene.update(**(self.run.read() | {"status": "running"} | facts))
        if "checkpoint" in facts:
            self.scene.path.joinpath("checkpoints", facts["checkpoint"]).mkdir(parents=True, exist_ok=True)
        return number

    @property
    def ran(self):
        return (self.fakes.path / "ran").exists()

    @property
    def requeued(self):
        return [call[1] for call in self.fakes.calls("scontrol") if call[0] == "requeue"]


@pytest.mark.parametrize("via", ["srun", "accelerate"])
@pytest.mark.parametrize("array", [False, True])
def test_values_arrive_unchanged(tmp_path, via, array):
    python = tmp_path / "py thon'"
    python.write_text('#!/bin/bash\nprintf \'%s\\0\' "$@" > "$GIVEN"\nprintf \'%s\\0\' "$E" "$PWD" > "$GIVEN.more"\n')
    python.chmod(0o755)
    cwd = tmp_path / "c w'd $(touch x)\n@RUN@%j"
    cwd.mkdir()
    points = {3: ["--point=$(touch x) 'a'"], 4: ["--point=other"]} if array else {}
    job = Job(
        *(tmp_path, tmp_path / "r un\n'$(touch x)\";%j\\@CWD@"),
        **{"cwd": str(cwd), "recipe": "/re cipe$(touch x).py", "arguments": VALUES, "python": str(python)},
        **{"environment": {"GIVEN": str(tmp_path / "given"), "E": "".join(VALUES[:70])}, "via": via, "points": points},
    )
    job.fakes.say(during=REALLY)
    ended = job.play()
    assert (tmp_path / "given").exists(), ended.output + "".join(p.read_text() for p in job.run.path.glob("logs/*"))
    given = read_nul(tmp_path / "given")
    own = ["/re cipe$(touch x).py", *VALUES, *(points.get(3, [])), "--run.dir", str(job.run.path)]
    assert given[given.index(own[0]) :] == own
    if via == "accelerate":
        before = given[: given.index(own[0])]
        assert before[:2] == ["-m", "accelerate.commands.launch"]
        assert before[-12:] == [
            *("--main_process_ip", "127.0.0.1", "--main_process_port", str(10000 + 55 + 3 * array)),
            *("--gpu_ids", "all", "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--num_cpu_threads_per_process", "1"),
        ]
    else:
        assert given[: given.index(own[0])] == ["-u"]
    assert read_nul(tmp_path / "given.more") == ["".join(VALUES[:70]), str(cwd)]
    assert not list(tmp_path.rglob("x"))
    assert ended.verdict.startswith("lost: a rank was killed, or could not start"), ended.output


@pytest.mark.parametrize("image", ["/images/a b'$(touch x).sif", "/INSIDE MANY.sif"])
def test_inside_an_image_of_apptainers(tmp_path, image):
    job = Job(tmp_path, arguments=["a 'b'"], container=image, mounts="/data set:/data", python="python3")
    job.fakes.say(during=REALLY)
    tool = job.fakes.path / "bin" / "apptainer"
    tool.write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" > '{tmp_path}/given'\n")
    tool.chmod(0o755)
    for via in ("srun", "accelerate"):
        job.script = replace(job.script, request=replace(job.script.request, via=via))
        ended = job.play()
        given = read_nul(tmp_path / "given")
        assert given[:8] == [
            "exec",
            "--bind",
            "/data set:/data",
            "--bind",
            str(job.home),
            "--bind",
            str(tmp_path),
            image,
        ]
        assert given[-3:] == ["a 'b'", "--run.dir", str(job.home)], ended.output
    assert not (tmp_path / "x").exists()


def test_inside_an_image_of_pyxis(tmp_path):
    job = Job(tmp_path, run=tmp_path / "r un", container="nvcr.io#x:1 2", mounts="/data:/d")
    job.play()
    [call] = job.fakes.calls("srun")
    assert "--container-image=nvcr.io#x:1 2" in call
    assert f"--container-mounts={job.home}:{job.home},{tmp_path}:{tmp_path},/data:/d" in call


def test_how_srun_is_called(tmp_path):
    job = Job(tmp_path, gpus=1)
    job.fakes.say(end="2030-01-01T00:00:00")
    job.play()
    [call] = job.fakes.calls("srun")
    assert call[:4] == ["--kill-on-bad-exit=1", "--cpus-per-task=1", "--gpu-bind=none", "bash"]
    started = (job.home / "slurm" / "started-55-0").read_text().split()
    assert started[0].isdigit()
    assert started[1:] == ["node1"]


def test_ranks_and_rendezvous(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\nenv -0 > "$LAUNCHER_RUN/env"\n')
    python.chmod(0o755)
    job = Job(tmp_path, python=str(python))
    end = int(time.time()) + 3600
    with socket.socket() as taken:  # by a job with another id
        taken.bind(("127.0.0.1", 10055))
        taken.listen()
        job.fakes.say(end=time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(end)))
        many = "export SLURM_NTASKS=4 SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS_PER_NODE=2"
        job.fakes.say(during=f"{many}\n{REALLY}")
        job.play()
    seen = dict(pair.split("=", 1) for pair in read_nul(job.home / "env"))
    ranks = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "10056", "LAUNCHER_JOB_END": str(end - 20)}
    own |= {"LAUNCHER_RUN": str(job.home), "LAUNCHER_CWD": str(tmp_path), "LAUNCHER_GRACE": "30"}
    expected = {**ranks, **own, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    assert {key: seen.get(key) for key in expected} == expected
    assert (job.home / "logs/rank-00003.txt").read_text().startswith("--- job 55 start 0 rank 3 on ")


def test_one_task_is_no_rank(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\nenv -0 > "$LAUNCHER_RUN/env"\n')
    python.chmod(0o755)
    job = Job(tmp_path, python=str(python))
    job.fakes.say(during=REALLY)
    job.play()
    names = {pair.partition("=")[0] for pair in read_nul(job.home / "env")}
    assert not names & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LAUNCHER_JOB_END"}


# ---- running: what is decided ----


def test_finished(tmp_path):
    job = Job(tmp_path)
    job.attempt(status="finished")
    ended = job.play()
    assert (ended.code, ended.verdict) == (0, "finished: in 1 starts")
    assert not job.requeued
    assert facts(job.home)["status"] == "finished"
    # once more, of a chain: nothing runs
    job.fakes.say(calls=None)
    assert "the run has finished before" in job.play().output
    assert not job.ran


def test_a_code_error(tmp_path):
    job = Job(tmp_path)
    number = job.attempt(status="failed")
    job.scene.failed(number, rank=1, step=3, error='ValueError: a "quoted" error')
    job.scene.record_exit(number, rank=0, status="preempted", step=3)
    ended = job.play()
    assert (ended.code, ended.verdict) == (1, 'failed: ValueError: a \\"quoted\\" error')
    assert not job.requeued
    assert facts(job.home)["status"] == "failed"


def test_options_that_every_start_would_refuse(tmp_path):
    job = Job(tmp_path)
    (job.scene.path / "slurm").mkdir()
    (job.scene.path / "slurm/refused").write_text("unknown option --lt\n")
    ended = job.play()
    assert (ended.code, ended.verdict) == (1, "failed: unknown option --lt")
    assert not job.requeued


def test_preempted_by_a_signal(tmp_path):
    job = Job(tmp_path)
    number = job.attempt(status="preempted", checkpoint="step-00000005")
    job.scene.record_step(number, 5, {})
    job.scene.record_exit(number, rank=0, status="preempted", step=5)
    ended = job.play()
    assert ended.verdict.startswith("preempted: ")
    assert job.requeued == ["55"]
    assert facts(job.home)["status"] == "preempted"
    assert (job.home / "slurm/idle").read_text() == "0\n"


def test_cancelled_by_its_marker(tmp_path):
    job = Job(tmp_path)
    number = job.attempt(status="cancelled")
    job.scene.record_exit(number, rank=0, status="cancelled", step=5)
    (job.scene.path / "slurm").mkdir()
    (job.scene.path / "slurm/cancelled").touch()
    ended = job.play()
    assert (ended.code, ended.verdict) == (0, "cancelled: by a person")
    assert not job.requeued
    assert facts(job.home)["status"] == "cancelled"
    assert "the run is cancelled" in job.play().output
    assert not job.ran


@pytest.mark.parametrize(
    ("state", "preempted", "verdict", "asks"),
    [
        ("JobState=CANCELLED Reason=None Restarts=0", "N/A", "cancelled", False),  # scancel
        ("JobState=COMPLETING Reason=None Restarts=0", "N/A", "cancelled", False),
        ("JobState=COMPLETING Reason=None Restarts=0", "2026-01-01T00:00:00", "preempted", True),
        ("JobState=PREEMPTED Reason=None Restarts=0", "2026-01-01T00:00:00", "preempted", True),
        ("JobState=COMPLETING Reason=TimeLimit Restarts=0", "N/A", "preempted", True),
        ("JobState=TIMEOUT Reason=TimeLimit Restarts=0", "N/A", "preempted", True),
        ("JobState=COMPLETING Reason=BeginTime Restarts=1", "N/A", "preempted", False),  # SLURM has requeued it itself
        ("JobState=RUNNING Reason=None Restarts=0", "N/A", "preempted", True),  # a node is drained, a person's kill
    ],
)
def test_who_has_ended_it(tmp_path, state, preempted, verdict, asks):
    job = Job(tmp_path)
    number = job.attempt(status="preempted")
    job.scene.record_step(number, 5, {})
    job.scene.record_exit(number, rank=0, status="preempted", step=5)
    job.fakes.say(job=f"JobId=55 JobName=x {state} BatchFlag=1", preempted=preempted)
    ended = job.play()
    assert ended.verdict.startswith(f"{verdict}: "), ended.output
    assert bool(job.requeued) == asks
    assert facts(job.home)["status"] == verdict


def test_waits_for_a_controller_that_is_away(tmp_path):
    job = Job(tmp_path)
    said = (job.fakes.path / "job").read_text()
    job.fakes.say(job=None)
    process = job.begin()
    deadline = time.monotonic() + 20
    while len(job.fakes.calls("scontrol")) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)  # polling what the fake writes
    assert not job.requeued
    (job.fakes.path / "there").write_text(said)
    (job.fakes.path / "there").rename(job.fakes.path / "job")
    assert job.end(process).verdict.startswith("lost: ")
    assert job.requeued == ["55"]


def test_lost(tmp_path):
    job = Job(tmp_path)
    job.fakes.say(srun="137 killed")
    ended = job.play()
    assert ended.verdict == "lost: a rank was killed, or could not start (exit code 137)"
    assert job.requeued == ["55"]
    assert facts(job.home)["status"] == "preempted"
    number = job.attempt()
    job.scene.failed(number, rank=0, step=1, error="RuntimeError: Connection closed", kind="peer", retry=True)
    assert job.play().verdict == "lost: RuntimeError: Connection closed"
    assert job.requeued == ["55"]


@pytest.mark.parametrize("broken", [False, True])
def test_a_failure_is_told_in_a_paragraph_on_which_nothing_hangs(tmp_path, broken):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\n{"exit 9" if broken else f"exec {sys.executable}"} "$@"\n')
    python.chmod(0o755)
    job = Job(tmp_path, python=str(python), environment={"PYTHONPATH": str(Path(__file__).parents[2])})
    number = job.attempt(status="failed")
    job.scene.failed(number, rank=1, step=3, error="ValueError: mine", kind="code")
    ended = job.play()
    assert (ended.code, ended.verdict) == (1, "failed: ValueError: mine")
    assert ("launcher: rank 1 failed first at step 3: ValueError: mine." in ended.output) != broken
    job.attempt(status="finished")
    assert "failed first" not in job.play().output.partition("finished: ")[2]


def test_an_older_starts_facts_are_not_this_ones(tmp_path):
    job = Job(tmp_path)
    number = job.attempt(status="failed")
    job.scene.failed(number, rank=0, step=1, error="old")
    job.play()
    RunDir(job.home, number + 1).update(status="pending")  # launcher resume
    (job.scene.path / "run.json").unlink()
    assert job.play().verdict.startswith("lost: a rank was killed")


def test_what_gets_nowhere_is_requeued_three_times(tmp_path):
    rows = (("preempted", False, "a signal"), ("preempted", True, "a signal"), ("lost", True, "killed"))
    for name, stepped, why in rows:
        job = Job(tmp_path / f"{name} {stepped}")
        for expected in (name, name, name, "failed"):
            number = job.attempt(status="preempted")
            if name == "preempted":
                job.scene.record_exit(number, rank=0, status="preempted", step=None)
            if stepped:
                job.scene.record_step(number, 5, {})  # no checkpoint: the step is trained again
            ended = job.play()
            assert ended.verdict.startswith(f"{expected}: "), ended.output
        assert ended.code == 1
        assert ended.verdict.startswith("failed: 4 starts in a row got nowhere: ")
        assert why in ended.verdict
        assert not job.requeued
        assert facts(job.home)["status"] == "failed"


def test_progress_is_counted_from_the_last(tmp_path):
    job = Job(tmp_path)
    for start in range(6):
        job.attempt(checkpoint=f"step-{start // 2:08d}")
        assert job.play().verdict.startswith("lost: ")
    assert (job.home / "slurm/idle").read_text() == "1\n"


def test_starts_that_go_down_with_their_node_are_counted_by_the_next(tmp_path):
    job = Job(tmp_path)
    (job.run.path / "slurm" / "saved").write_text("step-00000005\n")
    (job.run.path / "checkpoints" / "step-00000005").mkdir(parents=True)
    (job.run.path / "slurm" / "idle").write_text("2\n")
    job.restarts = 1  # and no verdict of the start before
    job.attempt(status="finished")
    assert job.play().verdict.startswith("finished: ")
    (job.scene.path / "run.json").unlink()
    job.run.update(status="running")
    (job.run.path / "slurm" / "verdict").unlink()
    (job.run.path / "slurm" / "idle").write_text("3\n")
    (job.fakes.path / "ran").unlink()
    ended = job.play()
    assert ended.verdict == "failed: 4 starts in a row got nowhere: the last was killed, or its node was lost"
    assert (ended.code, job.ran, facts(job.home)["status"]) == (1, False, "failed")
    job.run.update(status="running")
    (job.run.path / "slurm" / "verdict").unlink()
    (job.run.path / "checkpoints" / "step-00000010").mkdir()  # it had saved before it went down
    job.attempt(status="finished")
    assert job.play().verdict.startswith("finished: ")


def test_starts_that_cannot_be_counted_are_not_repeated(tmp_path):
    job = Job(tmp_path)
    job.attempt()
    (job.run.path / "slurm" / ".idle").mkdir()  # what a full disk does to every write
    ended = job.play()
    assert ended.verdict.startswith(f"failed: {job.run.path}/slurm cannot be written: ")
    assert not job.requeued


def test_a_job_that_is_cancelled_while_the_controller_is_away_stays_so(tmp_path):
    job = Job(tmp_path)
    cancelled = "JobId=55 JobName=x JobState=COMPLETING Reason=None Requeue=1 Restarts=0 BatchFlag=1"
    meanwhile = f'echo "{cancelled}" > "$here/job"; echo N/A > "$here/preempted"'
    job.fakes.say(requeue="1 slurm_load_jobs error: Unable to contact slurm controller", meanwhile=meanwhile)
    ended = job.play()
    assert (ended.code, ended.verdict) == (0, "cancelled: by a person")
    assert len(job.requeued) == 1
    assert facts(job.home)["status"] == "cancelled"


def test_what_the_setup_sets_does_not_end_the_script(tmp_path):
    job = Job(tmp_path, setup=("set -euo pipefail",))
    job.attempt(status="finished")
    assert job.play().verdict.startswith("finished: ")


def test_the_last_words_of_a_rank_that_never_came_to_launcher_main(tmp_path):
    job = Job(tmp_path)
    (job.scene.path / "logs").mkdir(parents=True)
    (job.scene.path / "logs" / "rank-00000.txt").write_text("Traceback:\nModuleNotFoundError: No module named 'mine'\n")
    assert job.play().verdict == "lost: ModuleNotFoundError: No module named 'mine'"


def test_a_requeue_that_is_refused(tmp_path):
    job = Job(tmp_path)
    job.fakes.say(requeue="1 Requested operation is presently disabled for job 55")
    ended = job.play()
    assert ended.code == 1
    assert "launcher: Requested operation is presently disabled" in ended.output
    assert len(job.requeued) == 1
    assert facts(job.home)["status"] == "preempted"


def test_a_controller_that_is_away(tmp_path):
    job = Job(tmp_path)
    away = "1 slurm_requeue: Unable to contact slurm controller (connect failure)"
    job.fakes.say(requeue=f"{away}\n1 Socket timed out on send/recv operation\n0 ")
    assert job.play().code == 0
    assert len(job.requeued) == 3


def test_no_requeue_was_asked_for(tmp_path):
    job = Job(tmp_path, requeue=False)
    ended = job.play()
    assert ended.code == 1
    assert ended.verdict.endswith("; no requeue was asked for: launcher resume")
    assert not job.requeued


@pytest.mark.parametrize(
    ("idle", "kind", "excluded"),
    [
        ("node1\nnode2\nnode3", "hardware", True),
        ("node2\nnode3", "hardware", True),  # it is already down
        ("node1\nnode2", "hardware", False),  # two are needed
        ("node1\nnode2\nnode3\nnode10", "peer", False),
    ],
)
def test_a_broken_node_is_excluded_where_enough_are_left(tmp_path, idle, kind, excluded):
    job = Job(tmp_path)
    number = job.attempt()
    job.scene.failed(number, rank=0, step=1, error="CUDA error: ECC", kind=kind, retry=True)
    file = job.scene.path / f"attempts/{number}/failed"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"host": "node1"}, indent=2))
    job.fakes.say(idle=idle)
    job.play()
    updates = [call for call in job.fakes.calls("scontrol") if call[0] == "update"]
    assert updates == ([["update", "JobId=55", "ExcNodeList=node1"]] if excluded else [])
    assert job.requeued == ["55"]


def test_links_of_a_chain(tmp_path):
    job = Job(tmp_path, chain=3)
    number = job.attempt(status="preempted", checkpoint="step-00000005")
    job.scene.record_exit(number, rank=0, status="preempted", step=5)
    ended = job.play()
    assert (ended.code, job.requeued) == (1, [])  # the next link goes on
    assert ended.verdict.startswith("preempted: ")
    number = job.attempt(status="failed")
    job.scene.failed(number, rank=0, step=6, error="ValueError")
    assert job.play().verdict == "failed: ValueError"
    ended = job.play()  # the third
    assert not job.ran
    assert (ended.code, ended.verdict) == (1, "failed: ValueError")
    assert "launcher: not tried again: failed: ValueError" in ended.output


def test_a_task_of_an_array(tmp_path):
    job = Job(tmp_path, points={3: [], 4: []})
    ended = job.play()
    assert ended.verdict.startswith("lost: ")
    assert job.requeued == ["55_3"]
    assert job.run.path.name == "00003"
    assert facts(job.run.path)["status"] == "preempted"
    assert (job.home / "slurm/55_3.out").exists()
    assert (job.run.path / "slurm/started-58-0").exists()
    assert not (job.home / "00004").exists()


def test_a_signal_does_not_break_off_the_wait(tmp_path):
    job = Job(tmp_path)
    job.attempt(status="finished")
    job.fakes.say(during="/bin/sleep 0.7")
    process = job.begin()
    for number in (signal.SIGTERM, signal.SIGUSR2):
        time.sleep(0.25)
        process.send_signal(number)
    ended = job.end(process)
    assert (ended.code, ended.verdict) == (0, "finished: in 1 starts")


def test_ranks_that_do_not_stop_before_the_limit(tmp_path):
    job = Job(tmp_path)
    job.fakes.say(during="exec /bin/sleep 20")
    job.fakes.say(end=time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 11.5)))
    process = job.begin()
    ended = job.end(process)
    os.killpg(process.pid, signal.SIGKILL)
    assert ended.verdict == "lost: the ranks had not stopped 10 s before the time limit"
    assert job.requeued == ["55"]


def test_a_directory_that_is_called_like_a_state(tmp_path):
    job = Job(tmp_path)
    number = job.attempt(status="preempted")
    job.scene.record_step(number, 5, {})
    job.scene.record_exit(number, rank=0, status="preempted", step=5)
    job.fakes.say(job="JobId=55 JobState=RUNNING Reason=None Restarts=0 WorkDir=/a JobState=CANCELLED b")
    assert job.play().verdict.startswith("preempted: ")


def test_a_squeue_that_says_nothing_sets_no_limit(tmp_path):
    job = Job(tmp_path)
    job.fakes.say(during='echo "${LAUNCHER_JOB_END-none}" > "$here/end-seen"')
    job.attempt(status="finished")
    job.fakes.say(end=None)
    job.play()
    assert (job.fakes.path / "end-seen").read_text() == "none\n"
