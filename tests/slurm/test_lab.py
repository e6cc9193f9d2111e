"""The cluster itself: what the other tests take for granted; by hand, as those would fail without it."""

import os
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.slurm.lab import SCRIPT, Lab

pytestmark = pytest.mark.slow


def commands(lab, node):
    return [line for _, line in lab.processes(node)]


def test_a_job_runs_on_two_nodes(lab):
    job = lab.submit(
        "srun sh -c 'hostname; echo gpus $CUDA_VISIBLE_DEVICES'", "-J", "two nodes", "-N2", "--gpus-per-node=2"
    )
    told = lab.wait_for(job, "COMPLETED")
    assert (told["NumNodes"], told["JobName"], told["Partition"]) == ("2", "two nodes", "batch")
    assert sorted(lab.output(job).splitlines()) == ["gpus 0,1", "gpus 0,1", "node1", "node2"]
    if lab.accounting:
        recorded = ("sacct", "-n", "-P", "-X", "-j", job, "-o", "State,NNodes")
        lab.wait_for(job, lambda _: lab.command(*recorded) == "COMPLETED|2\n", timeout=20)


def test_a_failed_command_is_told(lab):
    with pytest.raises(AssertionError, match=r"(?s)sbatch --no-such-option.*unrecognized option"):
        lab.command("sbatch", "--no-such-option")
    with pytest.raises(AssertionError, match=r"no end after 0\.1 s: sleep 10"):
        lab.command("sleep", "10", timeout=0.1)
    assert lab.command("sh", "-c", "echo so; exit 3", check=False) == "so\n"


def test_a_crash_requeues_jobs_or_ends_them(lab):
    again = lab.submit("sleep 100", "-w", "node1")
    lost = lab.submit("sleep 100", "-w", "node1", "--no-requeue")
    lab.wait_for(lost, lambda _: commands(lab, "node1").count("sleep 100") == 2)
    lab.crash("node1")
    assert lab.processes("node1") == []
    lab.start("node1", rebooted=True)
    lab.wait_for(lost, "NODE_FAIL")
    assert lab.node("node1")["State"] == "DOWN"
    lab.undrain("node1")
    lab.wait_for(again, lambda job: job["Restarts"] == "1" and job["JobState"] in ("PENDING", "RUNNING"))


def test_a_job_outlives_the_controller(lab):
    job = lab.submit("sleep 100")
    lab.wait_for(job, "RUNNING")
    lab.restart_controller()
    assert (lab.job(job)["JobState"], lab.job(job)["Restarts"]) == ("RUNNING", "0")
    assert "sleep 100" in commands(lab, "node1")


def test_high_preempts_low_at_once_and_grace_in_time(lab):
    low = lab.submit("sleep 100", "-p", "low", "-w", "node1", "--exclusive")
    # where every process is told, `sleep 100` may go first
    script = "srun sh -c 'trap \"echo told; exit 0\" TERM; sleep 100 & wait; sleep 1'"
    grace = lab.submit(script, "-p", "grace", "-w", "node2", "--exclusive")
    lab.wait_for(low, lambda _: all("sleep 100" in commands(lab, node) for node in lab.nodes))
    urgent = lab.submit("sleep 100", "-p", "high", "-N2", "--exclusive")
    lab.wait_for(urgent, "RUNNING", timeout=20)
    assert lab.job(low)["Restarts"] == "1"
    assert "told" in lab.output(grace).splitlines()
    assert lab.job(grace)["Restarts"] == "0"  # who ends in time is not requeued


def test_what_a_test_leaves_is_cleared_away(lab):
    lab.submit("trap '' TERM; while :; do sleep 1; done")
    lab.submit("sleep 100", "--hold")
    lab.drain("node1")
    lab.cut("node2")
    lab.stop_controller(hard=False)
    lab.reset()
    assert lab.command("squeue", "-h") == ""
    assert lab.node("node1")["State"] == lab.node("node2")["State"] == "IDLE"


def test_another_cluster_with_orphans(lab):
    """Under linuxproc what leaves its process tree outlives its job; it ends with the cluster."""
    directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    other = Lab(directory, track="linuxproc", nodes=1, gpus=0, extra="KillWait=4")
    try:
        other.up()
        assert "KillWait                = 4 sec" in other.command("scontrol", "show", "config")
        job = other.submit("srun sh -c 'setsid sleep 12345 >/dev/null 2>&1 & sleep 0.1'")
        other.wait_for(job, "COMPLETED")
        [(pid, line)] = other.processes("node1")
        assert line == "sleep 12345"
        assert lab.processes("node1") == []
    finally:
        other.down()
    assert not directory.exists()
    assert not Path(f"/proc/{pid}").exists()
    lab.wait_for(lab.submit("hostname"), "COMPLETED")


def test_a_cluster_does_not_outlive_its_owner():
    directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    owner = subprocess.Popen(["sleep", "100"])
    settings = {"SLURMLAB_DIR": str(directory), "SLURMLAB_NODES": "1", "SLURMLAB_OWNER": str(owner.pid)}
    subprocess.run(["bash", SCRIPT, "up"], env=os.environ | settings, check=True)
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 10
    while directory.exists():
        assert time.monotonic() < deadline, f"{directory} is still there"
        time.sleep(0.05)  # polling what another process removes
