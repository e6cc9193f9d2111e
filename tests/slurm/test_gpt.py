"""The main recipe on two nodes, as a person would submit it."""

import json
from pathlib import Path

from tests.harness import ROOT, losses, metrics, status

PACED = Path(__file__).with_name("paced.py")
RECIPE = ROOT / "recipes" / "gpt.py"
OPTIONS = [
    *("--steps", "12", "--batch-size", "8", "--microbatch-size", "1", "--eval-every", "6", "--eval-rows", "16"),
    *(
        "--model.depth",
        "1",
        "--model.width",
        "32",
        "--model.heads",
        "2",
        "--data.seq-len",
        "32",
        "--sample-tokens",
        "5",
    ),
    *("--run.log-every", "1", "--run.save-every", "5", "--run.threads", "1"),
]
MEASURED = {"attempt", "step_s", "samples_per_s", "tokens_per_s", "data_wait", "memory_gb"}


def test_four_ranks_on_two_nodes_learn_what_four_processes_here_do(lab, tmp_path, start):
    there, here = tmp_path / "there", tmp_path / "here"
    flags = ["--nodes", "2", "--gpus", "0", "--tasks", "2", "--time", "10", "--json"]
    said = lab.command("launcher", "submit", *flags, RECIPE, *OPTIONS, "--run.dir", there, cwd=tmp_path)
    job = json.loads(said)["job"]
    start(4, RECIPE, *OPTIONS, "--run.dir", here).ok()
    ended = lab.wait_for(job, ("COMPLETED", "FAILED"), timeout=120)
    printed = (there / "slurm" / f"{job}.out").read_text()
    assert ended["JobState"] == "COMPLETED", printed
    facts = status(there)
    assert (facts["status"], facts["world_size"], facts["hosts"]) == ("finished", 4, ["node1", "node2"])
    assert losses(there) == losses(here)
    assert _learnt(there) == _learnt(here)
    lab.command("launcher", "ckpt", "diff", there, here)  # fails where a tensor differs
    assert sorted(path.name for path in (there / "logs").iterdir()) == [f"rank-{rank:05d}.txt" for rank in range(4)]
    assert "step 12/12" in printed  # rank 0 is to be seen in the job's own output


def test_inside_salloc_a_plain_python_is_one_process(lab, tmp_path):
    rundir = tmp_path / "run"
    options = ["--steps", "2", "--run.dir", rundir]
    lab.command("salloc", "--nodes=1", "--ntasks=2", "python", PACED, *options, cwd=tmp_path)
    assert status(rundir)["world_size"] == 1


def _learnt(rundir):
    lines = metrics(rundir).values()
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]
