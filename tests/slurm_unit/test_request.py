"""What a job asks for: flags over a site's defaults, and what a cluster can never give."""

import pytest

from launcher.errors import UsageError
from launcher.parser import Parser
from launcher.slurm import cluster
from launcher.slurm.flags import split
from launcher.slurm.request import (
    FLAGS,
    Request,
    Site,
    allocation,
    as_dict,
    check,
    check_accounts,
    check_job,
    inside,
    read_flags,
    with_shares,
)
from tests.slurm_unit.fakes import Fakes


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    fakes = Fakes(tmp_path / "fakes")
    monkeypatch.setenv("PATH", fakes.search)
    return fakes


def read(*argv, site=None):
    given, _ = split([*argv, "recipe.py"], Parser(prog="launcher submit"), what="RECIPE")
    return read_flags(given, site or Site())


def checked(*argv):
    """The request as the cluster takes it."""
    partitions, nodes = cluster.partitions(), cluster.nodes()
    request = read(*argv)
    request = with_shares(request, inside(request, partitions, nodes))
    check(request, partitions, nodes)
    return request


def refusal(call, *argv):
    with pytest.raises(UsageError) as refused:
        call(*argv)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_flags_end_at_the_recipe():
    parser = Parser(prog="launcher submit")
    given, rest = split(
        ["--nodes", "2", "--gpus=4", "--no-requeue", "--setup", "a", "--setup=-b", "r.py", "--nodes", "9"],
        parser,
        what="RECIPE",
    )
    assert (given["nodes"], given["gpus"], given["requeue"], given["setup"]) == (2, 4, False, ["a", "-b"])
    assert rest == ["r.py", "--nodes", "9"]
    assert parser.format_help()  # every % in a help text is escaped


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--node", "2", "r.py"], "unknown flag --node: did you mean --nodes?"),
        (["--zzz", "r.py"], "unknown flag --zzz (launcher submit --help lists them)"),
        (["--nodes", "2"], "launcher submit needs a RECIPE"),
        (["--nodes"], "--nodes: expected one argument"),
        (["--nodes", "many", "r.py"], "--nodes: invalid int value: 'many'"),
        ([], "launcher submit needs a RECIPE"),
    ],
)
def test_wrong_flags(argv, said):
    assert said in refusal(lambda: split(argv, Parser(prog="launcher submit"), what="RECIPE"))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "say --gpus N"),
        (["--gpus", "0", "--nodes", "0"], "--nodes 0: at least 1"),
        (["--gpus", "-1"], "--gpus -1: at least 0"),
        (["--gpus", "0", "--signal-lead", "0"], "--signal-lead 0: at least 1"),
        (["--gpus", "2", "--tasks", "2"], "--tasks 2 is for CPU processes"),
        (["--gpus", "0", "--via", "mpi"], "--via mpi: srun or accelerate"),
        (["--gpus", "0", "--array", "0-3", "--chain", "2"], "--array, --sweep and --chain exclude each other"),
        (["--gpus", "0", "--parallel", "2"], "--parallel limits a --sweep"),
        (["--gpus", "0", "--array", "a-b"], "--array a-b: indices such as"),
        (["--gpus", "0", "--array", "1,"], "--array 1,: indices such as"),
        (["--gpus", "0", "--time", "soon"], "--time soon: minutes, HH:MM:SS"),
        (["--gpus", "0", "--partition", ""], "--partition is empty"),
        (["--gpus", "0", "--account="], "--account is empty"),
        (["--gpus", "0", "--sbatch", "nodes=2"], "--nodes is a flag here"),
        (["--gpus", "0", "--sbatch=--output=x"], "the batch script rests on it"),
        (["--gpus", "0", "--sbatch=-N 2"], "a long option of sbatch as KEY=VALUE"),
        (["--gpus", "0", "--sbatch", "comment=a\n#SBATCH --uid=0"], None),
        (["--gpus", "0", "--sbatch", "a b=c"], "a long option of sbatch as KEY=VALUE"),
    ],
)
def test_impossible_flags(argv, said):
    if said is None:  # taken here: script.header refuses the value
        assert read(*argv).sbatch
    else:
        assert said in refusal(read, *argv)


def test_flags_win_over_a_sites_defaults_and_lists_add_up():
    site = Site("s", {"gpus": 0, "tasks": 4, "nodes": 2, "time": "60", "setup": ("first",), "sbatch": ("a=1",)})
    request = read("--nodes", "3", "--setup", "second", site=site)
    assert (request.nodes, request.gpus, request.tasks, request.time) == (3, 0, 4, "60")
    assert (request.setup, request.sbatch) == (("first", "second"), ("a=1",))
    assert read("--gpus", "2", site=site).tasks is None  # those were of its CPU jobs
    assert read("--requeue", site=Site("s", {"gpus": 0, "requeue": False})).requeue is True
    assert read(site=Site("s", {"gpus": 0, "requeue": False})).requeue is False


def test_what_sbatch_is_asked(slurm):
    gpu = allocation(checked("--nodes", "2", "--gpus", "4", "--mem", "0", "--sbatch", "hold", "--sbatch=--comment=x"))
    assert gpu == [
        *("--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=4", "--gpus-per-node=4", "--mem=0", "--requeue"),
        *("--hold", "--comment=x"),
    ]
    cpu = allocation(checked("--gpus", "0", "--tasks", "3", "--cpus", "2", "--no-requeue"))
    assert cpu == ["--nodes=1", "--ntasks-per-node=3", "--cpus-per-task=2", "--no-requeue"]
    agents = allocation(checked("--gpus", "2", "--cpus", "3", "--via", "accelerate"))
    assert agents[:4] == ["--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=6", "--gpus-per-node=2"]


def test_a_processs_share_of_the_cores_is_of_the_nodes_that_fit(slurm):
    assert checked("--gpus", "2").cpus == 4  # 16 cores, 4 GPUs; 8 cores, 2 GPUs
    assert checked("--gpus", "4", "--partition", "small").cpus == 4
    slurm.say(nodes="NodeName=n CPUTot=2 Gres=gpu:4 Partitions=batch State=IDLE")
    assert with_shares(read("--gpus", "4"), cluster.nodes()).cpus == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--gpus", "0", "--partition", "gpu"], "--partition gpu: no such partition; there are batch, small, closed"),
        (["--gpus", "0", "--partition", "closed"], "--partition closed: it is not up now"),
        (["--gpus", "5"], "--gpus 5: a node of partition batch has 4 GPUs at most"),
        (["--gpus", "4", "--nodes", "3"], "--nodes 3: only 2 of partition batch have 4 GPUs"),
        (["--gpus", "0", "--nodes", "5"], "--nodes 5: partition batch has 4"),
        (["--gpus", "0", "--nodes", "2", "--partition", "small"], "--nodes 2: partition small allows 1 at most"),
        (["--gpus", "0", "--tasks", "17"], "17 processes: a node of partition batch has 16"),
        (["--gpus", "4", "--cpus", "5"], "--cpus 5 for each of 4 processes: a node of partition batch has 16 cores"),
        (["--gpus", "0", "--time", "1-00:00:01"], "--time 1-00:00:01: partition batch allows 1-00:00:00 at most"),
        (["--gpus", "0", "--time", "1441"], "--time 1441: partition batch allows"),
        (["--gpus", "0", "--time", "UNLIMITED"], "--time UNLIMITED: partition batch allows"),
        (["--gpus", "0", "--constraint", "h100"], "no node of partition batch has it; there are a100, ib, v100"),
        (["--gpus", "0", "--partition", "small", "--account", "x"], "--account x: partition small allows lab, guest"),
        (["--gpus", "0", "--partition", "small", "--qos", "x"], "--qos x: partition small allows normal, high"),
    ],
)
def test_what_the_cluster_can_never_give(slurm, argv, said):
    message = refusal(checked, *argv)
    assert said in message
    assert "None" not in message


def test_what_it_can(slurm):
    checked("--gpus", "2", "--nodes", "3", "--time", "1-00:00:00", "--constraint", "a100&ib")
    checked("--gpus", "0", "--partition", "small", "--account", "lab", "--qos", "high", "--time", "9-0")


def test_a_cluster_without_a_default_partition(slurm):
    slurm.say(partitions="PartitionName=a Default=NO State=UP\nPartitionName=b Default=NO State=UP")
    assert "say --partition: the cluster has no default one; there are a, b" in refusal(checked, "--gpus", "0")


def test_accounts(slurm):
    asked = read("--gpus", "0", "--account", "x", "--qos", "y")
    check_accounts(asked)  # no accounting: sbatch decides
    slurm.say(sacctmgr="0 lab|normal,high|normal\\nguest|low|low")
    assert "--account x: you have no such account; you have guest, lab" in refusal(check_accounts, asked)
    assert "--qos y: you may not use it; you may use high, low, normal" in refusal(check_accounts, Request(qos="y"))
    assert "you may use low" in refusal(check_accounts, Request(qos="high", account="guest"))
    check_accounts(Request(qos="high", account="lab"))
    slurm.say(calls=None)
    check_accounts(Request())
    assert not slurm.calls("sacctmgr")


def test_a_job_to_wait_for(slurm):
    check_job(Request())
    assert "a job's id is a number" in refusal(check_job, Request(after="run-1"))
    assert "--after 12: SLURM does not know that job" in refusal(check_job, Request(after="12"))
    slurm.squeue("12:FAILED:/tmp")
    assert "--after 12: that job has ended, FAILED" in refusal(check_job, Request(after="12"))
    for state in ("PENDING", "RUNNING", "COMPLETED"):
        slurm.squeue(f"12:{state}:/tmp")
        check_job(Request(after="12"))


def test_every_flag_is_kept_for_resume():
    said = {name: "x" for name, flag in FLAGS.items() if "str" in str(flag.type) and "tuple" not in str(flag.type)}
    request = Request(**{name.replace("-", "_"): value for name, value in said.items()}, gpus=0, requeue=False)
    assert Request(**as_dict(request)) == request
    assert as_dict(Request()) == {}
