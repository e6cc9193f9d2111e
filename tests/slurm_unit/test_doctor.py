"""`launcher doctor`: what it finds, on fake SLURM commands, real files and real processes."""

import json
import os
import resource
import shlex
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest

from launcher.doctor import command as doctor
from launcher.doctor import disk, machine, probing
from launcher.doctor.disk import check_disk, mount_of
from launcher.doctor.hub import Door, Hub, LostError, candidates, listen
from launcher.doctor.judging import judge
from launcher.doctor.machine import Software, check_machine
from launcher.doctor.measured import Measured, measure
from launcher.doctor.preemption import check_preemption, span
from launcher.doctor.probe import MARK
from launcher.doctor.probing import Heard
from launcher.doctor.site import Described, check_site
from launcher.errors import UsageError
from launcher.slurm.cluster import Node, Partition
from launcher.slurm.request import Request

SOFTWARE = Software(torch="2.13.0+cpu", packages={"accelerate": "1.10.0"})
PYTHON = sys.version.split()[0]
SETTINGS = {
    "SLURM_VERSION": "22.05.8",
    "ClusterName": "lab",
    "JobRequeue": "1",
    "KillWait": "30 sec",
    "ProctrackType": "proctrack/cgroup",
    "TaskPlugin": "task/cgroup,task/affinity",
    "AccountingStorageType": "accounting_storage/slurmdbd",
    "JobAcctGatherType": "jobacct_gather/cgroup",
    "MinJobAge": "300 sec",
    "SlurmdTimeout": "300 sec",
    "AuthInfo": "(null)",
    "PrologFlags": "Alloc,Contain",
    "MpiParams": "(null)",
    "SrunPortRange": "0-0",
    "SelectType": "select/cons_tres",
    "GresTypes": "gpu",
    "MaxArraySize": "1001",
    "OverTimeLimit": "0 min",
    "PreemptType": "preempt/none",
    "RequeueExit": "(null)",
    "RequeueExitHold": "(null)",
    "PropagateResourceLimits": "ALL",
    "PropagateResourceLimitsExcept": "(null)",
}
BATCH = Partition("batch", True, True, 2, None, 86400, 600, "REQUEUE", 0, 1, None, None)
HIGH = replace(BATCH, name="high", default=False, preempt_mode="OFF", priority_tier=10)
NODES = [Node(f"node{i}", ("batch", "high"), "IDLE", 8, 8192, 2, ()) for i in (1, 2)]
PARTITION = (
    "PartitionName=batch AllowAccounts=ALL AllowQos=ALL Default=YES DefaultTime=00:10:00 GraceTime=0 "
    "MaxNodes=UNLIMITED MaxTime=1-00:00:00 PriorityTier=1 PreemptMode=OFF State=UP TotalNodes=2"
)
NODE = "NodeName=node{} CPUTot=8 Gres=gpu:2 RealMemory=8192 State=IDLE Partitions=batch ActiveFeatures=(null)"


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Writes commands that come first on PATH, and which alone are there besides the system's own."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    for name in ("LAUNCHER_CLUSTER", "SLURM_CONF"):
        monkeypatch.delenv(name, raising=False)

    def write(**scripts):
        for name, text in scripts.items():
            (directory / name).write_text(f"#!/bin/bash\n{text}\n")
            (directory / name).chmod(0o755)

    return write


@pytest.fixture
def slurm(commands):
    """A cluster of two nodes with two GPUs each, whose settings a test may change."""

    def write(**settings):
        config = "\n".join(f"{key} = {value}" for key, value in (SETTINGS | settings).items())
        nodes = "\n".join(NODE.format(number) for number in (1, 2))
        commands(
            scontrol=f"""case "$*" in
              *config) echo '{config}';;
              *partition) echo '{PARTITION}';;
              *node) echo '{nodes}';;
              *hostnames*) printf '%s\\n' 127.0.0.1 127.0.0.2;;
            esac""",
            squeue="exit 0",
            sacctmgr="exit 1",
            scancel="exit 0",
        )

    write()
    return write


@pytest.fixture
def quick(monkeypatch):
    """Nobody imports torch to look at it."""
    monkeypatch.setattr(doctor, "look_at_software", lambda: SOFTWARE)


def told(capsys, *argv):
    """Exit code and findings of a command line, by group and check."""
    code = doctor.main([*argv, "--json"])
    lines = json.loads(capsys.readouterr().out)
    assert all(set(line) == {"group", "check", "state", "found", "fix"} for line in lines)
    assert all(bool(line["fix"]) == (line["state"] != "ok") for line in lines), lines
    return code, {(line["group"], line["check"]): line for line in lines}


def one(findings, check):
    found = [finding for finding in findings if finding.check == check]
    assert len(found) == 1, findings
    return found[0]


def described(request=Request(), measured=Measured(), partitions=(BATCH, HIGH), nodes=NODES, **settings):  # noqa: B008
    return Described(SETTINGS | settings, partitions, nodes, request, "", measured)


# ---- the command ----


@pytest.mark.usefixtures("quick")
def test_without_slurm_there_is_one_line_of_it(commands, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    code, lines = told(capsys, str(tmp_path))
    assert code == 0
    assert [line for line in lines.values() if line["group"] != "machine"] == [lines["cluster", "slurm"]]
    assert (lines["cluster", "slurm"]["state"], lines["cluster", "slurm"]["found"]) == ("ok", "none here")


@pytest.mark.usefixtures("quick")
def test_cluster_without_slurm_is_bad(commands, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, lines = told(capsys, str(tmp_path), "--cluster")
    assert code == 1
    assert "there is no scontrol here" in lines["cluster", "slurm"]["found"]


@pytest.mark.usefixtures("quick")
def test_a_good_cluster_is_ok(slurm, capsys, tmp_path):
    code, lines = told(capsys, str(tmp_path), "--cluster")
    assert code == 0
    assert {check for (group, check), line in lines.items() if group == "cluster" and line["state"] != "ok"} == set()


@pytest.mark.usefixtures("quick")
def test_something_bad_is_exit_code_1_and_the_table_names_the_fix(slurm, capsys, tmp_path):
    slurm(ProctrackType="proctrack/pgid")
    assert doctor.main([str(tmp_path), "--cluster"]) == 1
    printed = capsys.readouterr().out
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("bad")] == ["process"]
    assert "fix: have ProctrackType=proctrack/cgroup set" in printed
    assert [line.split()[0] for line in printed.splitlines() if "check" in line.split()] == ["machine", "cluster"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--keep", "0"], "--keep 0: at least 1"),
        (["--nodes", "0"], "--nodes 0: at least 1"),
        (["--gpus", "-1"], "--gpus -1: at least 0"),
        (["--nodes", "x"], "--nodes"),
        (["--frobnicate"], "--frobnicate"),
        (["--cluster", "nosuch"], "--cluster nosuch"),
        (["--cluster", "/"], "DIR stands before"),
        (["--cluster", "--partition", "x"], "no such partition; there are batch"),
        (["--nodes", "3"], "partition batch has 2 usable ones"),
        (["--run", "/nosuch"], "/nosuch"),
        (["/dev/null"], "is a file"),
    ],
)
def test_usage(slurm, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words) as caught:
        doctor.main(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("quick")
def test_a_site_file_that_asks_for_too_much_is_bad(slurm, capsys, tmp_path):
    (tmp_path / "site.toml").write_text('[submit]\npartition = "batch"\ngpus = 4\n')
    code, lines = told(capsys, str(tmp_path), "--cluster", str(tmp_path / "site.toml"))
    assert code == 1
    assert "--gpus 4" in lines["cluster", "site file"]["found"]


def test_torch_is_not_imported():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import launcher.doctor.command"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()} & {
        "torch",
        "numpy",
        "accelerate",
    } == set()


# ---- this machine ----


def test_this_machine_is_looked_at_for_real():
    found = check_machine(machine.look_at_software(), world_size=8)
    assert [finding.check for finding in found if finding.state == "bad"] == []
    assert one(found, "python").found.startswith(PYTHON)
    assert one(found, "torch").state == "ok"


@pytest.mark.parametrize(
    ("software", "here", "check", "state", "words"),
    [
        (Software(fault="ImportError: no"), 0, "torch", "bad", "cannot be imported: ImportError: no"),
        (Software(torch="2.5.0"), 0, "torch", "bad", "tried with torch>=2.11"),
        (Software(torch="2.14.0"), 0, "torch", "bad", "2.14.0"),
        (Software(torch="2.13.1+cu130", cuda="13.0"), 0, "torch", "ok", "built for CUDA 13.0"),
        (Software(torch="2.13.0", seconds=50), 0, "torch", "warning", "50 s"),
        (Software(torch="2.13.0"), 8, "gpus", "bad", "a build for CPUs"),
        (Software(torch="2.13.0", cuda="13.0"), 8, "gpus", "bad", "sees none"),
        (Software(torch="2.13.0", cuda="13.0", gpus=["H100"]), 2, "gpus", "warning", "1 of 2"),
        (Software(torch="2.13.0", cuda="13.0", gpus=["H100"] * 2), 2, "gpus", "ok", "2 x H100"),
        (
            Software(torch="2.13.0", cuda="13.0", gpus=["V100"], capabilities=["sm_70"], kernels=["sm_80", "sm_90"]),
            *(1, "gpus", "bad", "no kernels for sm_70"),
        ),
        (
            Software(torch="2.13.0", cuda="13.0", gpus=["A10"], capabilities=["sm_86"], kernels=["sm_80", "sm_90"]),
            *(1, "gpus", "ok", "A10"),
        ),
        (Software(torch="2.13.0", cuda="13.0", driver=(12, 4)), 0, "gpu driver", "bad", "takes CUDA 12.4"),
        (Software(torch="2.13.0", cuda="13.2", driver=(13, 0)), 0, "gpu driver", "warning", "built with 13.2"),
        (Software(torch="2.13.0", cuda="12.8", driver=(13, 0)), 0, "gpu driver", "ok", "13.0"),
        (Software(torch="2.13.0", packages={"datasets": "3.0"}), 0, "datasets", "bad", "tried with datasets>=4"),
        (Software(torch="2.13.0", packages={"datasets": "!ImportError: x"}), 0, "datasets", "bad", "ImportError"),
    ],
)
def test_software(monkeypatch, software, here, check, state, words):
    monkeypatch.setattr(machine, "visible_gpus", lambda environ: here)
    found = one(check_machine(software, world_size=1), check)
    assert (found.state, words in found.found) == (state, True), found


@pytest.mark.parametrize(
    ("soft", "hard", "state"), [(1024, 1024, "bad"), (1024, 65536, "warning"), (65536, 65536, "ok"), (-1, -1, "ok")]
)
def test_open_files_against_the_world(monkeypatch, soft, hard, state):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    assert one(check_machine(SOFTWARE, world_size=1024), "open files").state == state


def test_shared_memory_that_is_too_small(monkeypatch):
    real = os.statvfs("/")
    small = os.statvfs_result([4096, 4096, 16384, 16384, 16384, *list(real)[5:]])
    monkeypatch.setattr(machine.os, "statvfs", lambda path: small)
    assert one(check_machine(SOFTWARE, world_size=1), "shared memory").state == "warning"


# ---- the directory ----


def test_the_disk_is_tried_for_real_and_left_clean(tmp_path):
    found = check_disk(tmp_path / "not" / "yet", Measured(), many=False)
    assert one(found, "files").state == "ok", found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["_try_fsync", "_try_rename", "_try_exclusive", "_try_mmap"])
def test_what_a_filesystem_cannot_do_is_named(tmp_path, monkeypatch, name):
    def refuse(directory):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(disk, name, refuse)
    found = one(check_disk(tmp_path, Measured(), many=False), "files")
    assert (found.state, found.found.count("Operation not supported")) == ("bad", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_file_clock_that_is_off(tmp_path, monkeypatch):
    now = time.time
    monkeypatch.setattr(disk.time, "time", lambda: now() - 100)
    found = one(check_disk(tmp_path, Measured(), many=False), "file clock")
    assert (found.state, "100 s ahead" in found.found) == ("warning", True)


@pytest.mark.parametrize(
    ("line", "kind", "many", "state"),
    [
        ("1 0 0:1 / {} rw - nfs4 server:/x rw,hard", "nfs4", True, "ok"),
        ("1 0 0:1 / {} rw - nfs server:/x rw,soft", "nfs", True, "warning"),
        ("1 0 0:1 / {} rw - lustre mgs:/x rw", "lustre", True, "ok"),
        ("1 0 0:1 / {} rw - tmpfs none rw", "tmpfs", False, "warning"),
        ("1 0 0:1 / {} rw - overlay overlay rw", "overlay", False, "warning"),
        ("1 0 0:1 / {} rw shared:3 - ext4 /dev/a rw", "ext4", False, "ok"),
        ("1 0 0:1 / {} rw - ext4 /dev/a rw", "ext4", True, "warning"),
        ("1 0 0:1 / {} rw - fuse.s3fs s3fs rw", "fuse.s3fs", True, "bad"),
    ],
)
def test_the_filesystem(tmp_path, monkeypatch, line, kind, many, state):
    inside = tmp_path / "a b" / "c"
    inside.mkdir(parents=True)
    table = tmp_path / "mounts"
    point = str(tmp_path / "a b").replace(" ", "\\040")
    table.write_text(
        f"0 0 0:0 / / rw - xfs /dev/root rw\n{line.format(point)}\n2 0 0:2 / {tmp_path}/a rw - proc x rw\n"
    )
    mount = mount_of(inside, table)
    assert (mount.kind, mount.point) == (kind, str(tmp_path / "a b"))
    monkeypatch.setattr(disk, "mount_of", lambda path: mount)
    assert one(check_disk(inside, Measured(), many=many), "filesystem").state == state


@pytest.mark.parametrize(
    ("free", "keep", "held", "state"),
    [
        (100, 2, 0, "ok"),
        (35, 2, 0, "warning"),
        (25, 2, 0, "bad"),
        (25, 2, 2, "ok"),
        (5, 2, 2, "bad"),
        (35, 4, 0, "bad"),
    ],
)
def test_space_for_the_checkpoints_and_one_more(tmp_path, monkeypatch, free, keep, held, state):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=free * 10**9))
    measured = Measured(path=tmp_path, keep=keep, size=10 * 10**9, held=held)
    found = one(check_disk(tmp_path, measured, many=False), "space")
    assert found.state == state, found


@pytest.mark.parametrize(
    ("row", "state", "words"),
    [
        ("50000000 90000000 100000000 12 0 0", "ok", "51.2 GB left of 102 GB"),
        ("99000000* 90000000 100000000 6days 12 0 0", "bad", "1.0 GB left"),
        ("0 0 0 950 900 1000", None, ""),
    ],
)
def test_quota(commands, tmp_path, monkeypatch, row, state, words):
    head = "Filesystem blocks quota limit grace files quota limit grace"
    commands(quota=f"printf '%s\\n' 'Disk quotas for user x (uid 7):' '  {head}' '  /dev/a {row}'")
    monkeypatch.setattr(disk, "mount_of", lambda path: disk.Mount("/", "ext4", "/dev/a"))
    found = check_disk(tmp_path, Measured(size=10 * 10**9), many=False)
    if state is None:
        assert [finding.check for finding in found if finding.check.startswith("quota")] == ["quota of files"]
    else:
        assert (one(found, "quota").state, words in one(found, "quota").found) == (state, True), found


def test_an_earlier_run_is_measured(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"save_seconds": 12.5, "world_size": 16}))
    (tmp_path / "config.json").write_text(json.dumps({"run": {"keep": 3, "keep_every": 100}}))
    lines = [{"attempt": 1, "step": step, "step_s": seconds} for step, seconds in ((10, 9.0), (20, 2.0), (30, 3.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (10, 20):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "a").write_bytes(bytes(100 * step))
    (tmp_path / "checkpoints" / "step-00000030.partial-1").mkdir()
    found = measure(tmp_path)
    assert (found.keep, found.keep_every, found.size, found.held, found.world_size) == (3, 100, 2000, 2, 16)
    assert (found.save, found.step, found.need, found.least) == (12.5, 9.0, 43.0, 21.5)
    assert measure(tmp_path, keep=5).keep == 5


def test_a_run_without_a_checkpoint_measures_nothing(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"status": "running", "save_seconds": None}))
    found = measure(tmp_path)
    assert (found.size, found.save, found.need, found.stop, found.held) == (None, None, None, "", 0)


# ---- the cluster ----


@pytest.mark.parametrize(
    ("key", "value", "check", "state", "words"),
    [
        ("SLURM_VERSION", "19.05.2", "slurm", "warning", "older than 22.05"),
        ("JobRequeue", "0", "requeue", "ok", "launcher submit does"),
        ("KillWait", "5 sec", "KillWait", "warning", "5 s from SIGTERM"),
        ("ProctrackType", "proctrack/linuxproc", "process tracking", "warning", "may live on"),
        ("ProctrackType", "proctrack/pgid", "process tracking", "bad", "pgid"),
        ("TaskPlugin", "task/none", "task plugin", "warning", "none"),
        ("AccountingStorageType", "accounting_storage/none", "accounting", "warning", "300 s after"),
        ("JobAcctGatherType", "jobacct_gather/none", "accounting", "ok", "no memory use"),
        ("MinJobAge", "20 sec", "MinJobAge", "warning", "20 s"),
        ("MinJobAge", "0 sec", "MinJobAge", "ok", "for good"),
        ("SlurmdTimeout", "0 sec", "lost node", "bad", "never missed"),
        ("SlurmdTimeout", "3600 sec", "lost node", "warning", "3600 s"),
        ("AuthInfo", "(null)", "requeue delay", "ok", "120 s later"),
        ("AuthInfo", "socket=/x,cred_expire=600", "requeue delay", "warning", "600 s later"),
        ("PrologFlags", "Alloc,Serial", "prolog", "warning", "Serial"),
        ("MpiParams", "ports=12000-12999", "ports", "ok", "MpiParams 12000-12999"),
        ("SrunPortRange", "60001-63000", "ports", "ok", "takes none"),
        ("SelectType", "select/cons_res", "gpus of nodes", "bad", "cons_tres"),
        ("GresTypes", "(null)", "gpus of nodes", "bad", "GresTypes"),
        ("MaxArraySize", "1", "sweeps", "warning", "no job arrays"),
        ("RequeueExit", "2-4", None, "ok", ""),
        ("RequeueExit", "1-4,9", "requeue by exit code", "warning", "RequeueExit=1-4,9"),
        ("OverTimeLimit", "5 min", "time limit", "ok", "5 min over"),
        ("PropagateResourceLimits", "NONE", "ulimits", "ok", "their nodes"),
    ],
)
def test_a_setting(key, value, check, state, words):
    found = check_site(described(**{key: value}, request=Request(partition="batch")))
    if check is None:
        assert all(finding.state == "ok" for finding in found), found
    else:
        assert (one(found, check).state, words in one(found, check).found) == (state, True), one(found, check)


@pytest.mark.parametrize(
    ("mode", "grace", "save", "state", "words"),
    [
        ("REQUEUE", 0, None, "ok", "30 s after the first signal (KillWait; GraceTime is 0)"),
        ("REQUEUE", 60, None, "ok", "90 s after the first signal"),
        ("REQUEUE", 0, 40.0, "bad", "a stop with a save takes 40 s to 80 s"),
        ("REQUEUE", 0, 20.0, "warning", "20 s to 40 s"),
        ("REQUEUE", 60, 20.0, "ok", "20 s to 40 s"),
        ("CANCEL", 0, None, "warning", "not requeued"),
        ("GANG,SUSPEND", 0, None, "warning", "stays in memory"),
        ("OFF", 0, 500.0, "ok", "not preempted"),
    ],
)
def test_preemption_by_partition(mode, grace, save, state, words):
    settings = SETTINGS | {"PreemptType": "preempt/partition_prio"}
    low = replace(BATCH, preempt_mode=mode, grace_time=grace)
    found = check_preemption(settings, [low, HIGH], [low], NODES, Measured(save=save))
    rule = found[0]
    assert (rule.state, words in rule.found) == (state, True), rule
    if mode == "CANCEL":
        assert "--chain" in rule.fix


def test_partitions_that_nobody_stands_above_are_not_preempted():
    settings = SETTINGS | {"PreemptType": "preempt/partition_prio"}
    apart = [replace(node, partitions=("batch",)) for node in NODES]
    [found] = check_preemption(settings, [BATCH, HIGH], [BATCH], apart, Measured())
    assert found.found == "batch: jobs are not preempted"


def test_alike_partitions_are_told_together_and_the_signal_once():
    settings = SETTINGS | {"PreemptType": "preempt/partition_prio", "SlurmctldParameters": "preempt_send_user_signal"}
    other = replace(BATCH, name="other")
    nodes = [replace(node, partitions=("batch", "other", "high")) for node in NODES]
    found = check_preemption(settings, [BATCH, other, HIGH], [BATCH, other, HIGH], nodes, Measured())
    assert [finding.found.partition(":")[0] for finding in found[:2]] == ["batch, other", "high"]
    assert "SIGUSR2 comes first" in found[2].found


def test_preemption_by_qos(commands):
    settings = SETTINGS | {"PreemptType": "preempt/qos", "PreemptMode": "REQUEUE"}
    rows = ["normal||cluster|00:00:00", "low||cluster|00:01:00", "scav||cancel|", "high|low,scav|cluster|"]
    commands(sacctmgr=f"printf '%s\\n' {shlex.join(rows)}")
    found = check_preemption(settings, [BATCH], [BATCH], NODES, Measured())
    said = [finding.found for finding in found]
    assert said[0] == "QOS normal, QOS high: jobs are not preempted"
    assert said[1].startswith("QOS low: requeued, 90 s after")
    assert said[2].startswith("QOS scav: a preempted job is cancelled")
    only = check_preemption(settings, [BATCH], [BATCH], NODES, Measured(), qos="scav")
    assert [finding.state for finding in only] == ["warning", "ok"]
    commands(sacctmgr="exit 1")
    [unknown] = check_preemption(settings, [BATCH], [BATCH], NODES, Measured())
    assert unknown.state == "warning"


def test_saves_against_the_times_that_a_cluster_gives():
    found = check_site(described(measured=Measured(save=70.0, step=5.0), request=Request(partition="batch")))
    assert one(found, "KillWait").state == "warning"
    assert "--signal-lead 225" in one(found, "signal lead").fix
    assert one(found, "time limit").state == "ok"
    short = replace(BATCH, max_time=240)
    found = check_site(described(measured=Measured(save=70.0), partitions=[short]))
    assert one(found, "time limit").state == "warning"


def test_nodes_and_partitions_that_are_down():
    broken = [replace(NODES[0], state="DOWN*", reason="no power"), NODES[1]]
    found = check_site(described(nodes=broken))
    assert (one(found, "nodes").state, "node1 DOWN* (no power)" in one(found, "nodes").found) == ("warning", True)
    down = replace(BATCH, up=False)
    assert one(check_site(described(partitions=[down, HIGH])), "partition").state == "warning"
    chosen = check_site(described(partitions=[down, HIGH], request=Request(partition="batch")))
    assert one(chosen, "partition").state == "bad"
    drained = [replace(NODES[0], state="IDLE+DRAIN")]
    chosen = check_site(described(nodes=drained, request=Request(partition="batch")))
    assert one(chosen, "partition").found == "batch has no usable node"


def test_a_cluster_without_gpus():
    bare = [replace(node, gpus=0) for node in NODES]
    assert one(check_site(described(nodes=bare, GresTypes="(null)")), "gpus of nodes").state == "ok"
    assert one(check_site(described(nodes=bare, request=Request(gpus=2))), "gpus of nodes").state == "bad"


def test_times_as_people_say_them():
    assert [span(seconds) for seconds in (None, 30, 60, 5400, 7200, 86400, 90000)] == [
        *("unlimited", "30 s", "1 min", "1 h 30 min", "2 h", "1 d", "1 d 1 h")
    ]


# ---- processes that meet ----


def gathered(count, *, token="t", patience=5.0, come=None):
    ports = [_free_port()]

    def join(rank):
        try:
            hub = Hub(
                *(rank, count, "127.0.0.1", ports), token=token, deadline=time.monotonic() + 10, patience=patience
            )
            values = [hub.gather(rank * 10), hub.gather(f"{rank}")]
            hub.close()
            return values
        except LostError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(join, range(count) if come is None else come))


def _free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def test_processes_meet_and_exchange_values():
    assert gathered(4) == [[[0, 10, 20, 30], ["0", "1", "2", "3"]]] * 4


def test_who_never_comes_is_named_and_the_others_do_not_hang():
    start = time.monotonic()
    first, other = gathered(3, patience=1.0, come=[0, 2])
    assert (first.ranks, str(first)) == ([1], "never came")
    assert other.ranks == [0]
    assert time.monotonic() - start < 5


def test_nobody_listens():
    [alone] = gathered(2, patience=0.5, come=[1])
    assert alone.ranks == [0]
    assert "127.0.0.1 cannot be reached" in str(alone)


def test_a_stranger_on_the_port_is_passed_over():
    ports = [_free_port(), _free_port()]
    with socket.create_server(("", ports[0])):  # takes the first port, and says nothing
        with ThreadPoolExecutor(2) as pool:
            hubs = [
                pool.submit(Hub, rank, 2, "127.0.0.1", ports, token="t", deadline=time.monotonic() + 20, patience=15)
                for rank in (0, 1)
            ]
            values = list(pool.map(lambda hub: hub.result().gather(1), hubs))
        for hub in hubs:
            hub.result().close()
    assert values == [[1, 1], [1, 1]]


def test_one_that_goes_is_missed():
    ports = [_free_port()]
    with ThreadPoolExecutor(2) as pool:
        made = [
            pool.submit(Hub, rank, 2, "127.0.0.1", ports, token="t", deadline=time.monotonic() + 5, patience=5)
            for rank in (0, 1)
        ]
        first, second = (one.result() for one in made)
    second.close()
    with pytest.raises(LostError) as caught:
        first.gather(1)
    assert caught.value.ranks == [1]


def test_doors():
    door = Door("token", [_free_port()])
    assert Door.knock("127.0.0.1", door.port, "token") == ""
    assert Door.knock("127.0.0.1", door.port, "other") == "somebody else answers there"
    door.close()
    assert "refused" in Door.knock("127.0.0.1", door.port, "token").lower()
    assert len({candidates(job)[0] for job in range(22000)}) == 22000
    with listen([0]) as first, pytest.raises(OSError, match="in use"):
        listen([first.getsockname()[1]])


# ---- nodes ----

SRUN = """
echo 'srun: job 7 queued and waiting for resources' >&2
while [[ $1 == --* ]]; do [[ $1 == --nodes=* ]] && count=${1#*=}; shift; done
export SLURM_NTASKS=$count SLURM_JOB_ID=$((RANDOM % 20000)) SLURM_JOB_NODELIST=x SLURM_CPUS_ON_NODE=1
"""


@pytest.mark.usefixtures("quick")
def test_two_nodes_for_real(slurm, commands, capsys, tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    commands(srun=f'echo "$@" > {tmp_path}/argv\n{SRUN}\nfor i in 0 1; do SLURM_PROCID=$i "$@" & done; wait')
    code, lines = told(capsys, str(runs), "--nodes", "--gpus", "0", "--partition", "batch")
    nodes = {check: line for (group, check), line in lines.items() if group == "nodes"}
    assert nodes["nodes"]["found"] == "127.0.0.1, 127.0.0.2", nodes
    for check in ("python", "run directory", "clocks", "ports"):
        assert nodes[check]["state"] == "ok", nodes[check]
    assert "2 nodes" in nodes["all-reduce between nodes"]["found"]
    assert "gloo" in nodes["all-reduce between nodes"]["found"]
    assert "TFLOP/s" in nodes["matmul"]["found"]
    assert list(runs.iterdir()) == []
    argv = (tmp_path / "argv").read_text()
    assert "--nodes=2 --ntasks-per-node=1 --time=5 --partition=batch" in argv
    assert "gpus" not in argv
    bad = [line for line in nodes.values() if line["state"] == "bad" and line["check"] != "torch"]
    assert bad == [], code


def test_a_partner_that_never_comes_is_named(slurm, commands, tmp_path):
    commands(srun=f'{SRUN}\nSLURM_PROCID=0 "$@" --patience 1')
    heard = probing.probe(Request(), tmp_path, nodes=2, gpus=0)
    assert heard.missing == ["127.0.0.2"]
    found = judge(heard, SOFTWARE, PYTHON, world_size=2)
    assert [one.found for one in found if one.check == "nodes"] == ["127.0.0.2 never came; 127.0.0.1 did"]
    assert any(one.check == "matmul" for one in found)


def test_what_srun_complains_of_is_a_line_each(slurm, commands, tmp_path):
    commands(
        srun="""for i in 1 2; do echo "srun: error: node$i: task $i: Exited with exit code 2" >&2
        echo "slurmstepd-node$i: error: execve(): /x/python: No such file or directory" >&2; done; exit 2"""
    )
    heard = probing.probe(Request(), tmp_path, nodes=2, gpus=0)
    assert heard.failures == ["execve(): /x/python: No such file or directory"]
    [found] = judge(heard, SOFTWARE, PYTHON, world_size=2)
    assert (found.check, found.state, "environment" in found.fix) == ("srun", "bad", True)


def test_nodes_that_do_not_come_in_time(slurm, commands, tmp_path, monkeypatch):
    monkeypatch.setattr(probing, "QUEUE", 1.0)
    fields = ["7", "7", "NAME", "u", "batch", "PENDING", "Resources", "2", "x", "N/A", "2030-01-01T00:00:00", "N/A"]
    (tmp_path / "job").write_text("\x1e" + "\x1f".join([*fields, "5:00", "/x"]) + "\n")
    commands(
        srun=f"echo $$ > {tmp_path}/pid; sed -i s/NAME/${{1#*=}}/ {tmp_path}/job; exec sleep 60",
        squeue=f"cat {tmp_path}/job",
        scancel=f'echo "$@" > {tmp_path}/cancelled; kill $(cat {tmp_path}/pid)',
    )
    heard = probing.probe(Request(), tmp_path, nodes=2, gpus=0)
    assert "pending (Resources)" in heard.waited
    assert "expected to start" in heard.waited
    assert "--name=launcher-doctor-" in (tmp_path / "cancelled").read_text()
    [found] = judge(heard, SOFTWARE, PYTHON, world_size=2)
    assert found.state == "warning"


def heard_of(*kinds, count=3, gpus=0, **changes):
    """What three good nodes say, with lines that a test puts in their place."""
    names = [f"n{rank}" for rank in range(count)]
    heard = Heard(count, gpus)
    heard.written = dict.fromkeys(range(count), True)
    good = {
        "here": {
            **{"nodes": names, "time": 0, "python": PYTHON, "same": True, "writable": True, "tmp": 1 << 40},
            **{"shm": 1 << 40, "nofile": -1, "memlock": -1, "infiniband": False, "ports_from": 32768},
        },
        "torch": {"version": "2.13.0+cpu", "cuda": None, "gpus": gpus, "seconds": 1.0},
        "matmul": {"seconds": [0.01], "flops": [1e12], "device": "cpu"},
        "ports": {"port": 1, "refused": {}},
        "between": {"backend": "gloo", "seconds": 0.1, "bytes": 1 << 24},
        "end": {},
    }
    for rank, name in enumerate(names):
        for kind, facts in good.items():
            mine = {**facts, **(changes.get(f"{kind}_{name}") or {})}
            if kind == "between":
                mine.setdefault("neighbours", {str(other): 0.1 for other in range(count) if other != rank})
            if changes.get(f"{kind}_{name}", {}) is not None:
                heard.lines.append({"kind": kind, "rank": rank, "host": name, **mine})
    heard.lines += [{"kind": kind, **facts} for kind, facts in kinds]
    return heard


@pytest.mark.parametrize(
    ("heard", "check", "state", "words"),
    [
        (heard_of(), "nodes", "ok", "n0, n1, n2"),
        (heard_of(here_n1=None, torch_n1=None, end_n1=None), "nodes", "bad", "n1 never came"),
        (heard_of(end_n1=None), "nodes", "bad", "n1 broke off"),
        (
            heard_of(("stuck", {"rank": 2, "host": "n2", "phase": "the matrix products"}), end_n2=None),
            *("nodes", "bad", "n2 hung in the matrix products"),
        ),
        (
            heard_of(
                ("apart", {"rank": 0, "host": "n0", "ranks": [2], "why": "never came", "phase": "p"}),
                ("apart", {"rank": 2, "host": "n2", "ranks": [0], "why": "no route", "phase": "p"}),
            ),
            *("nodes", "bad", "n2 and n0 did not meet (p): no route"),
        ),
        (heard_of(("fault", {"rank": 1, "host": "n1", "phase": "p", "why": "E: x"})), "nodes", "bad", "n1, in p: E: x"),
        (heard_of(here_n1={"python": "3.9.1"}), "python", "bad", "3.9.1 on n1"),
        (heard_of(torch_n1={"version": "2.11.0"}), "torch", "bad", "2.11.0, without CUDA on n1"),
        (heard_of(torch_n1={"cuda": "13.0"}), "torch", "bad", "CUDA 13.0 on n1"),
        (heard_of(torch_n1={"seconds": 40}), "import of torch", "warning", "40 s on n1"),
        (heard_of(here_n1={"same": False}), "run directory", "bad", "n1 sees another one"),
        (
            heard_of(here_n1={"writable": False, "directory": "Read-only: /x"}),
            "run directory",
            "bad",
            "n1 cannot write",
        ),
        (heard_of(("clocks", {"rank": 0, "host": "n0", "times": [5.0, 5.01, 5.0]})), "clocks", "ok", "10 ms"),
        (heard_of(("clocks", {"rank": 0, "host": "n0", "times": [5.0, 9.0, 5.0]})), "clocks", "warning", "n1 by +4 s"),
        (heard_of(("clocks", {"rank": 0, "host": "n0", "times": [5.0, 5.0, 65.0]})), "clocks", "bad", "n2 by +60 s"),
        (heard_of(ports_n1={"refused": {"n2": "no route"}}), "ports", "bad", "n1 to n2: no route"),
        (heard_of(here_n1={"ports_from": 1024}), "free ports", "warning", "n1"),
        (heard_of(here_n1={"tmp": 10}), "/tmp", "warning", "10 B on n1"),
        (heard_of(here_n1={"shm": None}), "/dev/shm", "ok", "or more"),
        (heard_of(here_n1={"nofile": 64}), "open files", "warning", "64 on n1"),
        (heard_of(here_n1={"infiniband": True, "memlock": 65536}), "locked memory", "warning", "n1"),
        (heard_of(here_n1={"scontrol": False}), "scontrol", "bad", "n1"),
        (heard_of(matmul_n1={"seconds": [0.02]}), "matmul", "warning", "n1 takes 2.0 x the median"),
        (heard_of(matmul_n1={"seconds": [0.012]}), "matmul", "ok", "TFLOP/s"),
        (heard_of(gpus=8), "gpus", "ok", "8 asked for and seen"),
        (heard_of(gpus=8, torch_n2={"gpus": 7}), "gpus", "bad", "n2 sees 7"),
        (
            heard_of(("within", {"rank": 0, "host": "n0", "right": False, "seconds": 1, "bytes": 1})),
            "all-reduce in a node",
            "bad",
            "",
        ),
        (
            heard_of(between_n1={"neighbours": {"0": 0.4, "2": 0.4}}),
            "all-reduce between nodes",
            "warning",
            "n1 takes 4.0",
        ),
        (heard_of(between_n1={"neighbours": {"0": 0.1, "2": 0.4}}), "all-reduce between nodes", "ok", "3 nodes"),
    ],
)
def test_judging(heard, check, state, words):
    found = [one for one in judge(heard, SOFTWARE, PYTHON, world_size=8) if one.check == check]
    assert found, check
    assert (found[0].state, words in found[0].found) == (state, True), found


def test_clocks_against_this_machine():
    heard = heard_of()
    heard.offsets = {"n0": -0.5, "n1": 30.0, "n2": -60.0}
    [found] = [one for one in judge(heard, SOFTWARE, PYTHON, world_size=8) if one.check == "clocks"]
    assert (found.state, found.found) == ("warning", "against this machine's: n1 +30 s, n2 -60 s")


def test_a_node_that_srun_reports_lost_is_told_once():
    heard = heard_of(end_n0=None, end_n1=None, end_n2=None)
    heard.failures = ["Node failure on n1"]
    found = judge(heard, SOFTWARE, PYTHON, world_size=8)
    assert [one.found for one in found if one.state == "bad"] == ["Node failure on n1"]


def test_a_probe_that_hangs_ends_and_says_in_what(tmp_path):
    script = (
        "import time; from launcher.doctor.probe import Tell\n"
        "tell = Tell(1, 'n1'); tell.phase = 'the ports'; tell.end_at(0.3); time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20)
    assert done.returncode == 4
    assert json.loads(done.stdout.removeprefix(MARK)) == {
        "kind": "stuck",
        "rank": 1,
        "host": "n1",
        "phase": "the ports",
    }


def test_lines_that_are_cut_or_forged_are_passed_over():
    heard = Heard(1, 0)
    for text in ("", "{", "[]", '{"a": 1}', '{"kind": "here"}', "null", '{"kind": "here", "host": "n", "time": "x"}'):
        probing._take(text, heard)
    assert heard.lines == []
