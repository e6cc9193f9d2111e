"""A run that makes no progress ends itself, and names the rank that the others wait for, and where it stands."""

import json
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.forked import jobs
from tests.harness import status

RECIPE = Path(__file__).parent / "hanging.py"
LIMIT = 1.0
OPTIONS = ["--run.hang-after", LIMIT]


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    with jobs(tmp_path_factory.mktemp("jobs")) as start:
        yield start


def check_ended(job, rundir, *, rank, said, files=(0, 1)):
    """All ends within the limit and 10 s, a word of it once, nothing saved, and every rank's stacks at hand."""
    attempt = rundir / "attempts" / "1"
    job.when(lambda: (attempt / "failed").exists())
    told = time.monotonic()
    failed = json.loads((attempt / "failed").read_text())
    assert (failed["kind"], failed["rank"], failed["step"], failed["retry"]) == ("hang", rank, 2, True), job.output()
    assert said in failed["error"], failed["error"]
    assert job.wait(10)[files[0]] == 1, job.output()
    assert time.monotonic() - told < 10
    assert job.output().count("the run hangs") == 1, job.output()
    assert "Traceback" not in job.output()
    assert status(rundir)["status"] == "failed"
    assert not list(rundir.glob("checkpoints/*"))
    assert sorted(path.name for path in attempt.glob("hang-*.json")) == [f"hang-{r:05d}.json" for r in files]
    for path in attempt.glob("hang-*.json"):
        facts = json.loads(path.read_text())
        assert facts["seconds"] <= LIMIT + 3
        assert "hanging.py" in facts["stack"]
        assert facts["where"]["own"]["path"] == str(RECIPE)
        assert {call for group in facts["collectives"] for _, call, _ in group["calls"]} >= {"all_reduce"}


def is_alive(pid):
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return "State:\tZ" not in Path("/proc", str(pid), "status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize(
    ("how", "rank", "said"),
    [
        ("spin", 1, "in spin: `while True: pass  # noqa: E701  # fmt: skip`; 1 rank waits for it in all_reduce"),
        ("collective", 1, "in train: `dist.barrier()`) where 1 other called all_reduce, as number"),
        ("first", 0, "in train: `time.sleep(600)`; 1 rank waits for it in all_reduce"),
    ],
)
def test_the_rank_that_the_others_wait_for(begin, tmp_path, how, rank, said):
    rundir = tmp_path / "run"
    job = begin(2, RECIPE, *OPTIONS, "--run.dir", rundir, env={"HANG": how})
    if how == "spin":
        job.when((rundir / "stands").exists)
        job.kill(0, signal.SIGTERM)  # no edge comes to stop at
    check_ended(job, rundir, rank=rank, said=said)


def test_a_rank_that_cannot_say_a_word(begin, tmp_path):
    host = socket.gethostname()
    told = {
        "stop": f"rank 1 on {host} gives no sign of life: stopped, frozen, or its node gone; 1 rank waits for it in",
        "hold": f"rank 1 on {host} is in native code that holds Python's lock at {RECIPE}:",
    }
    started = {how: begin(2, RECIPE, *OPTIONS, "--run.dir", tmp_path / how, env={"HANG": how}) for how in told}
    for how, job in started.items():
        job.when((tmp_path / how / "attempts" / "1" / "failed").exists)
        job.kill(1)  # as srun and torchrun do
        check_ended(job, tmp_path / how, rank=1, said=told[how], files=(0,))


def test_a_data_worker_that_is_stuck(begin, tmp_path):
    rundir = tmp_path / "run"
    job = begin(2, RECIPE, *OPTIONS, "--run.workers", 1, "--run.dir", rundir, env={"HANG": "data"})
    said = "for the next micro-batch of loader 'loader', from worker process "
    check_ended(job, rundir, rank=0, said=said)
    data = json.loads((rundir / "attempts" / "1" / "hang-00000.json").read_text())["data"]
    assert data["worker_at"].endswith("in __getitem__: `time.sleep(600)`")
    deadline = time.monotonic() + 10
    while is_alive(data["worker"]):
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.01)


def test_a_long_evaluation_and_a_slow_disk_are_no_hang(begin, tmp_path):
    rundir = tmp_path / "run"
    job = begin(2, RECIPE, *OPTIONS, "--run.save-every", 3, "--run.dir", rundir, env={"HANG": "slow"})
    job.ok()
    assert status(rundir)["status"] == "finished"
    assert status(rundir)["save_seconds"] > LIMIT
    assert not list((rundir / "attempts" / "1").glob("stacks-*"))


def test_a_rank_that_never_comes(begin, tmp_path):
    job = begin(3, RECIPE, "--run.join-within", 1, "--run.dir", tmp_path / "run", env={"HANG": "absent"})
    assert job.wait(30) == [1, 1, 9], job.output()
    assert job.output().count("1 of 3 ranks has not come in 1 s: rank 2 on ") == 1, job.output()
    assert job.output().count("not all ranks have come, as rank ") == 1, job.output()
    assert "Traceback" not in job.output()
    assert not (tmp_path / "run").exists()


def test_a_rank_that_has_come_and_ended(begin, tmp_path):
    env = {"HANG": "gone"}
    job = begin(2, RECIPE, "--run.join-within", 1, "--run.dir", tmp_path / "run", env=env)
    assert job.wait(30) == [1, 9], job.output()
    assert job.output().count("and cannot connect to rank 1 on ") == 1, job.output()
    assert "Traceback" not in job.output()
