"""`launcher submit` and `launcher resume` on a real cluster: what arrives, what is refused, what goes on."""

import json
import os
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness import ROOT, losses, status
from tests.slurm.nasty import NAMES, VALUES

PACED = Path(__file__).with_name("paced.py")
NASTY = Path(__file__).with_name("nasty.py")
ONE = ("--gpus", "0", "--time", "5", "--json")
TWO = ("--nodes", "2", *ONE)
QUICK = ("--run.log-every", "1", "--run.threads", "1")


def submit(lab, *argv, command="submit", **settings):
    """Queue something; the ids of its jobs."""
    told = json.loads(lab.command("launcher", command, *argv, **settings))
    return told["jobs"]


def ended(lab, jobs, timeout=200):
    """Wait until jobs have left the queue."""
    deadline = time.monotonic() + timeout
    while left := lab.command("squeue", "-h", "-o", "%A %T %r", "-j", ",".join(jobs), check=False):
        assert time.monotonic() < deadline, f"not at an end after {timeout} s: {left}\n{lab.logs()}"
        time.sleep(0.1)  # polling the controller


def told(path):
    """What a run's jobs and ranks have printed."""
    files = [*sorted(path.glob("slurm/*.out")), *sorted(path.glob("logs/*"))]
    return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')}" for file in files)


def verdict(path):
    file = path / "slurm" / "verdict"
    return file.read_text() if file.exists() else f"none:\n{told(path)}"


def options():
    """The command line of nasty.py that gives it every value, and what its config is then."""
    words = [value for value in VALUES if not value.startswith("-")]
    argv = [f"--v{number:03d}={value}" for number, value in enumerate(VALUES)]
    config = {f"v{number:03d}": value for number, value in enumerate(VALUES)}
    path = "$(touch x) '\n\"é"
    return [*argv, "--words", *words, f"--nested.path={path}"], {**config, "words": words, "nested": {"path": path}}


def test_nasty_values_arrive_unchanged_and_run_nothing(lab, tmp_path):
    argv, config = options()
    everything = tmp_path / "everything"
    several = ["a b,'c'", '$(touch x);"`', "@RUN@\n%j"]  # a double quote is written twice
    quoted = ",".join('"' + value.replace('"', '""') + '"' for value in several)
    grid = "'v000=" + quoted.replace("'", "'\\''") + "'"

    def around(number):
        """A recipe, a directory, a run directory and a site file with a nasty name."""
        name = NAMES[number]
        place = tmp_path / f"around-{number}" / name
        place.mkdir(parents=True)
        (place / f"{name}.py").write_bytes(NASTY.read_bytes())
        text = "\n".join(f"N{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in enumerate(NAMES))
        (place / f"{name}.toml").write_text(f"[environment]\n{text}\n")
        flags = [*ONE, "--no-check", "--cluster", f"./{name}.toml", f"./{name}.py"]
        return submit(lab, *flags, "--v000", "x", "--run.dir", place / f"run {name}", cwd=place)

    queue = [
        lambda: submit(lab, *TWO, NASTY, *argv, "--run.dir", everything, cwd=tmp_path, timeout=120),
        lambda: submit(lab, *ONE, "--sweep", grid, NASTY, "--run.dir", tmp_path / "sw eep", cwd=tmp_path, timeout=120),
        *(lambda number=number: around(number) for number in range(len(NAMES))),
    ]
    with ThreadPoolExecutor(4) as pool:
        jobs = [job for future in [pool.submit(one) for one in queue] for job in future.result()]
    ended(lab, jobs)

    assert verdict(everything).startswith("finished"), verdict(everything)
    arrived = json.loads((everything / "config.json").read_text())
    assert {key: arrived[key] for key in config} == config
    assert (everything / "seen-1.json").exists()
    for number, value in enumerate(several):
        point = tmp_path / "sw eep" / f"{number:05d}"
        assert json.loads((point / "config.json").read_text())["v000"] == value
        assert status(point)["status"] == "finished"
    for number, name in enumerate(NAMES):
        place = tmp_path / f"around-{number}" / name
        run = place / f"run {name}"
        assert verdict(run).startswith("finished"), verdict(run)
        seen = json.loads((run / "seen-0.json").read_text())
        assert (seen["cwd"], seen["file"]) == (str(place), str(run / "code" / f"{name}.py"))
        assert {seen["environment"][f"N{key}"] == value for key, value in enumerate(NAMES)} == {True}
        assert [path.suffix for path in run.glob("slurm/*.out")] == [".out"]
    ran = (*tmp_path.rglob("x"), *lab.directory.rglob("x"), Path("x"), Path.home() / "x")
    assert not [path for path in ran if path.exists()]


def test_what_cannot_be_is_refused_before_it_is_queued(lab, tmp_path):
    (tmp_path / "own.sh").write_text((ROOT / "slurm/job.sh").read_text() + "@NODES@\n")
    lab.command("scontrol", "update", "PartitionName=high", "MaxTime=10", "MaxNodes=1")
    held = submit(lab, *ONE, "--no-check", "--sbatch", "hold", PACED, "--run.dir", "held", cwd=tmp_path)
    before = sorted(tmp_path.rglob("*"))
    cases = [
        (["--partition", "gpu", PACED], "--partition gpu: no such partition; there are batch, low, grace, "),
        (["--gpus", "3", PACED], "--gpus 3: a node of partition batch has 2 GPUs at most"),
        (["--nodes", "3", PACED], "--nodes 3: partition batch has 2"),
        (["--nodes", "2", "--partition", "high", PACED], "--nodes 2: partition high allows 1 at most"),
        (["--tasks", "9", PACED], "9 processes: a node of partition batch has 8 cores at most"),
        (["--time", "11", "--partition", "high", PACED], "--time 11: partition high allows 0:10:00 at most"),
        (["--nodes", "2", "--exclude", "node1", PACED], "sbatch would refuse this: Requested node configuration"),
        (["--mem", "1T", PACED], "sbatch would refuse this: "),
        (["--sbatch", "bogus=1", PACED], "sbatch would refuse this: unrecognized option '--bogus=1'"),
        (["--sbatch", "begin=never", PACED], "sbatch would refuse this: Invalid --begin specification"),
        (["--array", "0-9999", PACED], "sbatch would refuse this: Invalid job array specification"),
        (["--reservation", "none", PACED], "sbatch would refuse this: Requested reservation is invalid"),
        (["--after", "99999", PACED], "--after 99999: SLURM does not know that job"),
        (["--template", "own.sh", PACED], "own.sh: @NODES@ is not known"),
        (["none.py"], "none.py: there is no such recipe"),
        ([PACED, "--run.dir", "held"], f"held has job {held[0]}, pending: launcher cancel {held[0]}"),
    ]
    if lab.accounting:
        cases.append((["--account", "none", PACED], "--account none: you have no such account"))

    def refuse(flags, said):
        count = ("--gpus", "0") if "--gpus" not in flags else ()
        return said, lab.run("launcher", "submit", *count, "--no-check", *flags, cwd=tmp_path)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda case: refuse(*case), cases))
    found.append(("unknown option --stps", lab.run("launcher", "submit", *ONE, PACED, "--stps", "3", cwd=tmp_path)))
    for said, done in found:
        assert done.returncode == 2, done
        assert re.fullmatch(r"launcher: [^\n]+\n", done.stderr), done.stderr
        assert said in done.stderr
    assert lab.command("squeue", "-h", "-o", "%A").split() == held
    assert sorted(tmp_path.rglob("*")) == before
    lab.command("scontrol", "update", "PartitionName=high", "MaxTime=UNLIMITED", "MaxNodes=UNLIMITED")


def test_ten_jobs_at_once(lab, tmp_path):
    lab.command("scontrol", "update", "PartitionName=batch", "OverSubscribe=FORCE:4")
    try:
        runs = [tmp_path / f"run-{letter}" for letter in "abcdefghij"]
        argv = ["--steps", "4", *QUICK]

        def one(run):
            return submit(lab, *TWO, "--no-check", PACED, *argv, "--run.dir", run, cwd=tmp_path, env={"PACE": "0.1"})

        with ThreadPoolExecutor(4) as pool:
            jobs = [job for queued in pool.map(one, runs) for job in queued]
        ended(lab, jobs)
        for run, job in zip(runs, jobs, strict=True):
            assert verdict(run).startswith("finished"), verdict(run)
            assert (status(run)["world_size"], status(run)["restarts"]) == (2, 0)
            assert losses(run) == losses(runs[0])
            named = {*re.findall(r"run-[a-j]\b", told(run))}
            assert named == {run.name}
            assert sorted(path.name for path in run.glob("logs/*")) == ["rank-00000.txt", "rank-00001.txt"]
            assert [path.name for path in run.glob("slurm/*.out")] == [f"{job}.out"]
    finally:
        lab.command("scontrol", "update", "PartitionName=batch", "OverSubscribe=NO")


def test_jobs_that_have_to_do_with_others(lab, tmp_path):
    """A chain, one after another, agents of accelerate, an array; and what a dry run prints, submitted by hand."""
    steps = ["--steps", "3", *QUICK]
    chain = submit(lab, *ONE, "--no-check", "--chain", "3", PACED, *steps, "--run.dir", "chain", cwd=tmp_path)
    after = [*ONE, "--no-check", "--after", chain[0], PACED, *steps, "--run.dir", "after"]
    last = submit(lab, *after, cwd=tmp_path)
    agents = [*TWO, "--no-check", "--via", "accelerate", PACED, *steps, "--run.dir", "agents"]
    many = [*ONE, "--no-check", "--array", "0-1", PACED, *steps, "--run.dir", "array"]
    jobs = [*chain, *last, *submit(lab, *agents, cwd=tmp_path), *submit(lab, *many, cwd=tmp_path)]

    dry = ["--nodes", "1", "--gpus", "0", "--time", "5", "--no-check", "--dry-run", PACED, *steps, "--run.dir", "dry"]
    printed = lab.run("launcher", "submit", *dry, cwd=tmp_path)
    assert not (tmp_path / "dry").exists()
    (tmp_path / "dry/slurm").mkdir(parents=True)
    (tmp_path / "dry/run.json").write_text("{}\n")
    (tmp_path / "dry/slurm/job.sh").write_text(printed.stdout)
    jobs.append(lab.command("bash", "-c", printed.stderr.removeprefix("+ "), cwd=tmp_path).strip())
    ended(lab, jobs)

    for name in ("chain", "after", "agents", "array/00000", "array/00001", "dry"):
        assert status(tmp_path / name)["status"] == "finished", told(tmp_path / name)
        assert sorted(losses(tmp_path / name)) == [1, 2, 3]
    for later in chain[1:]:
        assert "the run has finished before" in (tmp_path / f"chain/slurm/{later}.out").read_text()
        assert lab.job(later)["JobState"] == "COMPLETED"
    assert status(tmp_path / "chain")["attempt"] == 1
    begun = [(tmp_path / name / "slurm").glob("started-*") for name in ("chain", "after")]
    first, second = (min(int(path.read_text().split()[0]) for path in some) for some in begun)
    assert first < second
    facts = status(tmp_path / "agents")
    assert (facts["world_size"], facts["hosts"]) == (2, ["node1", "node2"])
    assert sorted(path.name for path in (tmp_path / "agents/logs").iterdir()) == ["node-00000.txt", "node-00001.txt"]
    for index in (0, 1):
        environment = json.loads((tmp_path / f"array/{index:05d}/attempts/1/started.json").read_text())["environment"]
        assert environment["SLURM_ARRAY_TASK_ID"] == str(index)


def test_a_sweep_and_runs_that_are_resumed(lab, tmp_path):
    """Of a sweep only what has failed runs again; a run goes on with other nodes; a finished one does not."""
    steps = ["--steps", "3", *QUICK]
    grid = "batch-size=4,8 microbatch-size=4,8"  # 8 of 4 is refused by the loader
    sweep = submit(lab, *ONE, "--sweep", grid, PACED, *steps, "--run.dir", "sweep", cwd=tmp_path, timeout=120)
    long = [*TWO, "--no-check", PACED, "--steps", "400", *QUICK, "--run.dir", "long"]
    stopped = submit(lab, *long, cwd=tmp_path, env={"PACE": "0.2"})
    deadline = time.monotonic() + 150
    while not (tmp_path / "long/attempts/1/stepped").exists():
        assert time.monotonic() < deadline, told(tmp_path / "long")
        time.sleep(0.1)  # polling a file that another process writes
    lab.command("scancel", *stopped)
    ended(lab, [*sweep, *stopped])
    states = [status(tmp_path / "sweep" / f"0000{number}")["status"] for number in range(4)]
    assert states == ["finished", "failed", "finished", "finished"]
    assert "batch_size 4 in micro-batches of 8" in verdict(tmp_path / "sweep/00001")
    assert status(tmp_path / "long")["status"] == "cancelled", told(tmp_path / "long")
    reached = status(tmp_path / "long")["global_step"]
    assert reached >= 1

    refused = lab.run("launcher", "resume", "sweep/00000", cwd=tmp_path)
    assert (refused.returncode, "is one run of a sweep" in refused.stderr) == (2, True)
    again = submit(lab, "--json", "sweep", command="resume", cwd=tmp_path)
    assert status(tmp_path / "sweep/00001")["status"] == "pending"
    assert status(tmp_path / "sweep/00000")["status"] == "finished"
    alone = ["--nodes", "1", "--json", "--time", "6", stopped[0], "--run.log-every", "2"]
    alone = submit(lab, *alone, command="resume", cwd=tmp_path, env={"PACE": "0"}, timeout=120)
    ended(lab, [*again, *alone])
    assert (tmp_path / "sweep/00001/attempts").is_dir()
    attempts = [status(tmp_path / "sweep" / f"0000{number}")["attempt"] for number in range(4)]
    assert attempts == [1, 2, 1, 1]
    facts = status(tmp_path / "long")
    assert (facts["status"], facts["world_size"], facts["global_step"]) == ("finished", 1, 400), told(tmp_path / "long")
    assert facts["restarts"] == 1
    assert min(losses(tmp_path / "long")) == 1
    lines = [json.loads(line) for line in (tmp_path / "long/metrics.jsonl").read_text().splitlines()]
    assert min(line["step"] for line in lines if line["attempt"] == 2) > reached

    refused = lab.run("launcher", "resume", "long", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "long: the run has finished: launcher resume long --steps N goes on" in refused.stderr


CODE = '''"""A recipe."""
from pathlib import Path
import launcher
import outside
import package

def train(run: launcher.Run) -> None:
    (run.dir / "seen").write_text(f"{package.VERSION} {package.__file__} {outside.__file__} LATER")

if __name__ == "__main__":
    launcher.main(train)
'''


@pytest.fixture
def checkout(tmp_path):
    """A repository with a package in src/ that its recipe imports, and another module from outside of it."""
    path = tmp_path / "checkout"
    (path / "src/package").mkdir(parents=True)
    (path / "recipes").mkdir()
    (path / "src/package/__init__.py").write_text("VERSION = 'old'\n")
    (path / "recipes/r.py").write_text(CODE)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/outside.py").write_text("")
    subprocess.run(["git", "-C", path, "init", "-q"], check=True)
    return path


def test_the_code_that_was_submitted_runs(lab, tmp_path, checkout):
    env = {"PYTHONPATH": os.pathsep.join(["src", str(tmp_path / "elsewhere"), str(ROOT)])}
    flags = [*ONE, "--sbatch", "hold", "recipes/r.py", "--run.dir", "run"]
    held = submit(lab, *flags, cwd=checkout, env=env, timeout=120)
    (checkout / "src/package/__init__.py").write_text("VERSION = 'new'\n")
    (checkout / "recipes/r.py").write_text(CODE.replace("LATER", "EVEN LATER"))
    lab.command("scontrol", "release", *held)
    ended(lab, held)
    code, outside = checkout / "run/code", tmp_path / "elsewhere/outside.py"
    assert verdict(checkout / "run").startswith("finished"), verdict(checkout / "run")
    assert (checkout / "run/seen").read_text() == f"old {code}/src/package/__init__.py {outside} LATER"
    source = json.loads((checkout / "run/slurm/source.json").read_text())
    assert source["imported_from_elsewhere"]["outside"] == str(outside)
    assert "package" not in source["imported_from_elsewhere"]

    again = [*ONE, "recipes/r.py", "--run.dir", "again"]  # the first run is no code: it is not copied with it
    ended(lab, submit(lab, *again, cwd=checkout, env=env, timeout=120))
    code = checkout / "again/code"
    assert (checkout / "again/seen").read_text() == f"new {code}/src/package/__init__.py {outside} EVEN LATER"
    assert not (code / "run").exists()
