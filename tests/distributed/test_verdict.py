"""The failure drill: real deaths on four ranks. The verdict names the rank and the kind, soon, as the last line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.checkpoint.test_disks import mounted
from tests.harness import ROOT, clean_environment, launch, status

RECIPE = Path(__file__).parent / "dying.py"
HANG = 3  # seconds
SOON = 10  # seconds from a death (of a hang: from its limit) to the verdict
RANKS = 4


@dataclass
class Died:
    code: int
    out: str
    err: str
    seconds: float
    """From the death to the end of `launcher run`."""

    @property
    def verdict(self) -> str:
        last = self.err.rstrip().rpartition("\n")[2]
        assert last.startswith("launcher: "), self.err
        return last.removeprefix("launcher: ")


class Drill:
    """One run that dies as it is told to."""

    def __init__(self, rundir: Path, death: str, *options: object, nproc: int = RANKS, **env: str) -> None:
        self.rundir = rundir
        given = ["--run.dir", rundir, "--run.hang-after", HANG, *options]
        command = [sys.executable, "-m", "launcher", "run", "--nproc", nproc, RECIPE, *given]
        environ = clean_environment() | {"PYTHONPATH": str(ROOT), "DEATH": death} | env
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environ,
            start_new_session=True,
        )

    def dying(self) -> list[float]:
        """When each rank came to where it is to die."""
        return [path.stat().st_mtime for path in self.rundir.glob("death-*")]

    def ends(self) -> Died:
        try:
            out, err = self.process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            out, err = self.process.communicate()
            raise AssertionError(f"it does not end:\n{out}\n{err}") from None
        died = Died(self.process.returncode, out, err, time.time() - max(self.dying(), default=0.0))
        logs = "\n".join(path.read_text(errors="replace") for path in sorted(self.rundir.glob("logs/*")))
        print(f"{out}\n{err}\n{died.seconds:.1f} s after it\n{logs}")  # of a test that fails
        return died


def failed(drill: Drill, *, within: float = SOON) -> Died:
    """It failed, said so once, soon, and says the same when it is asked later."""
    died = drill.ends()
    assert died.code == 1
    assert died.seconds < within
    assert died.err.count("Traceback") <= 1
    assert "ChildFailedError" not in died.err
    code, said, _ = launch("status", "--json", drill.rundir)
    assert code == 0
    [row] = json.loads(said)
    assert row["state"] == "failed"
    assert row["verdict"].removesuffix(".") in died.verdict
    return died


def place(line: str) -> str:
    """Where dying.py has a line, as a verdict tells it."""
    number = RECIPE.read_text().splitlines().index(line) + 1
    return f"dying.py:{number} in "


def test_an_exception(tmp_path):
    drill = Drill(tmp_path / "run", "raise")
    died = failed(drill)
    assert died.verdict.startswith("rank 2 failed first at step 2: ValueError: the recipe's own (")
    assert place("""        raise ValueError("the recipe's own")""") in died.verdict
    assert "`raise ValueError(" in died.verdict
    assert died.verdict.endswith(" A code error: it will fail the same way again.")
    assert re.search(r"rank 2:\nTraceback .*\n(.*\n)+ValueError: the recipe's own\nlauncher: ", died.err)
    own = (tmp_path / "run" / "logs" / "rank-00002.txt").read_text()
    assert own.startswith("--- attempt 1 rank 2 of 4 on ")
    assert "ValueError: the recipe's own" in own
    code, said, _ = launch("logs", "--rank", 2, tmp_path / "run")
    assert (code, said) == (0, own)


def test_sigkill(tmp_path):
    died = failed(Drill(tmp_path / "run", "kill"))
    assert died.verdict.startswith("rank 3 was killed by SIGKILL at step 2.")
    assert "Traceback" not in died.err  # that a peer is gone is no fault of the code


def test_a_rank_that_leaves_by_itself(tmp_path):
    died = failed(Drill(tmp_path / "run", "exit"))
    assert died.verdict.startswith("rank 1 failed first at step 2: the recipe left by itself, with 0: return from ")
    assert " A code error: " in died.verdict


def test_an_extra_collective(tmp_path):
    died = failed(Drill(tmp_path / "run", "extra"), within=SOON + HANG)
    assert died.verdict.startswith("the run hung at step 2: rank 2 on ")
    assert "called all_reduce of 3 elements" in died.verdict


def test_a_stuck_data_worker(tmp_path):
    drill = Drill(tmp_path / "run", "worker-hangs", "--run.workers", 1)
    died = failed(drill, within=SOON + HANG)
    assert died.verdict.startswith("the run hung at step 2: rank 1 on ")
    assert "for the next micro-batch of loader 'loader', from worker process " in died.verdict
    assert place("                time.sleep(600)") in died.verdict


def test_a_full_disk(tmp_path):
    with mounted(tmp_path / "disk"):
        drill = Drill(tmp_path / "disk" / "run", "disk")
        died = drill.ends()
        assert died.code == 1
        assert died.seconds < SOON
        assert died.verdict.startswith("rank 1 failed first at step 2: OSError: [Errno 28] No space left on device (")
        assert " The disk takes no more" in died.verdict


def test_a_nan_from_one_sample(tmp_path):
    died = failed(Drill(tmp_path / "run", "nan"))
    assert "on rank 1 (samples 18, 19)" in died.verdict
    assert " Bad numbers: " in died.verdict


def test_memory_that_is_used_up(tmp_path):
    group = memory_group(f"launcher-test-{os.getpid()}")
    if group is None:
        died = failed(Drill(tmp_path / "run", "memory"))
        assert died.verdict.startswith("rank 2 failed first at step 2: RuntimeError: DefaultCPUAllocator")
        assert " Out of memory: the rank held " in died.verdict
    else:
        procs, used, limit = group
        drill = Drill(tmp_path / "run", "oom-killer", GROUP=f"{used}:{limit}")
        procs.write_text(str(drill.process.pid))  # long before it has started others
        try:
            died = failed(drill)
        finally:
            remove(procs.parent)
        assert died.verdict.startswith("rank 2 was killed by the kernel because the host's memory was used up (")
        assert " Out of host memory." in died.verdict
    assert "--microbatch-size 1 (now 2)" in died.verdict


def memory_group(name: str) -> tuple[Path, Path, Path] | None:
    """A fresh memory control group: its processes, what it uses and its limit; None where none can be made."""
    for root, used, limit in (
        ("/sys/fs/cgroup/memory", "memory.usage_in_bytes", "memory.limit_in_bytes"),
        ("/sys/fs/cgroup", "memory.current", "memory.max"),
    ):
        group = Path(root, name)
        with suppress(OSError):
            group.mkdir()
            if (group / limit).exists():
                return group / "cgroup.procs", group / used, group / limit
            group.rmdir()
    return None


def remove(group: Path) -> None:
    deadline = time.monotonic() + 20
    while group.exists() and time.monotonic() < deadline:
        with suppress(OSError):  # processes in it are still ending
            group.rmdir()
        time.sleep(0.05)  # polling


def test_another_shape_in_a_collective(tmp_path):
    died = failed(Drill(tmp_path / "run", "shape"))
    assert died.verdict.startswith("rank 2 failed first at step 2: called all_reduce of 100003 elements (")
    assert " where 2 others called all_reduce of 100000 elements" in died.verdict
    assert " A code error: " in died.verdict


def test_sigterm(tmp_path):
    drill = Drill(tmp_path / "run", "term")
    deadline = time.monotonic() + 60
    while len(drill.dying()) < RANKS and time.monotonic() < deadline:
        time.sleep(0.02)  # polling
    drill.process.send_signal(signal.SIGTERM)
    died = drill.ends()
    assert died.code == 0  # it has done what it was asked to
    assert died.seconds < SOON
    step = status(tmp_path / "run")["global_step"]
    assert f"stopped at step {step} (SIGTERM); run it again to go on" in died.out
    code, said, _ = launch("status", "--json", tmp_path / "run")
    [row] = json.loads(said)
    assert (code, row["state"]) == (0, "preempted")
    assert row["verdict"] == f"stopped by SIGTERM at step {step} and saved; run it again to go on"


def test_a_crash_in_one_process(tmp_path):
    drill = Drill(tmp_path / "run", "segv", nproc=1)
    died = drill.ends()
    assert died.code == 1
    assert died.verdict.startswith("the process crashed in native code (SIGSEGV) after step 1 (")
    assert place("        ctypes.string_at(0)") in died.verdict


def test_a_sample_that_cannot_be_read_in_one_process(tmp_path):
    drill = Drill(tmp_path / "run", "sample", "--run.workers", 1, nproc=1)
    died = drill.ends()
    assert died.code == 1
    assert died.verdict.startswith("the run failed at step 2: ValueError: the row is broken (")
    assert place("""                raise ValueError("the row is broken")""") in died.verdict
    assert " A data error (sample 19 of loader 'loader')" in died.verdict
    assert "is killed by signal" not in died.err  # torch's word for a worker that goes with the process
    again = Drill(tmp_path / "run", "sample", nproc=1).ends()
    assert again.verdict.endswith(" The start before it ended alike, at the same step.")
