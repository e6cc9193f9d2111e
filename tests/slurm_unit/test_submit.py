"""`launcher submit` and `launcher resume`, with fakes of SLURM's commands: what is written, queued and refused."""

import json
import os
import re
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.rundir import RunDir
from launcher.slurm import order, record
from launcher.slurm.order import load
from tests.harness import ROOT
from tests.slurm_unit.fakes import Fakes, bash, facts

RECIPE = '''"""A recipe."""
from dataclasses import dataclass
import launcher
import package

@dataclass(frozen=True)
class Config:
    steps: int = 3
    lr: float = 0.1
    note: str = ""

def train(run: launcher.Run, cfg: Config) -> None: ...

if __name__ == "__main__":
    launcher.main(train)
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A directory with a recipe that needs its src/ on the path."""
    path = tmp_path / "project"
    (path / "src/package").mkdir(parents=True)
    (path / "src/package/__init__.py").write_text("")
    (path / "r.py").write_text(RECIPE)
    subprocess.run(["git", "-C", path, "init", "-q"], check=True)
    monkeypatch.chdir(path)
    monkeypatch.setenv("PYTHONPATH", f"src:{ROOT}")
    return path


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    fakes = Fakes(tmp_path / "fakes")
    monkeypatch.setenv("PATH", fakes.search)
    monkeypatch.delenv("LAUNCHER_CLUSTER", raising=False)
    for name in [name for name in os.environ if name.startswith(("SBATCH_", "SLURM_"))]:
        monkeypatch.delenv(name)
    return fakes


@pytest.fixture
def call(project, slurm, capsys):
    """Call the command; returns what it printed. A refusal is one line, and queues nothing."""

    def called(command, *argv, code=0):
        slurm.say(calls=None)
        before = sorted(path for path in project.rglob("*") if ".git/" not in str(path))
        left = main([command, *map(str, argv)])
        said = capsys.readouterr()
        assert left == code, said.err
        if code:
            assert re.fullmatch(r"launcher: [^\n]+\n", said.err), said.err
            assert sorted(path for path in project.rglob("*") if ".git/" not in str(path)) == before
        return said.out if not code else said.err.removeprefix("launcher: ").rstrip("\n")

    return called


@pytest.fixture
def submit(call):
    return lambda *argv, **settings: call("submit", "--gpus", "0", "--no-check", *argv, **settings)


def queued(slurm):
    return [call for call in slurm.calls("sbatch") if "--test-only" not in call]


def refused(slurm, said, expected):
    assert expected in said
    assert not queued(slurm)


# ---- what is written and queued ----


def test_a_run(project, slurm, call):
    flags = ["--gpus", "2", "--nodes", "2", "--time", "60", "--json", "r.py", "--lr", "1", "--note", "$(touch x)"]
    said = json.loads(call("submit", *flags))
    path = Path(said["run"])
    assert path.parent == project / "runs"
    assert re.fullmatch(r"r-\d{4}-\d{4}-\w{3}", path.name)
    assert (said["job"], said["jobs"]) == ("101", ["101"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert queued(slurm) == [["--parsable", f"--chdir={path}", f"{path}/slurm/job.sh"]]
    assert facts(path)["status"] == "pending"
    text = (path / "slurm/job.sh").read_text()
    assert f"command=({sys.executable} -u {path}/code/r.py --lr 1 --note '$(touch x)' --run.dir {path})\n" in text
    assert f"export PYTHONPATH={path}/code/src:{ROOT}$" not in text  # that one is no copy
    assert f"export PYTHONPATH={path}/code/src${{PYTHONPATH:+:$PYTHONPATH}}\n" in text
    assert "\ncwd=" + str(project) + "\n" in text
    assert {"#SBATCH --gpus-per-node=2", "#SBATCH --cpus-per-task=4", "#SBATCH --time=60"} <= {*text.splitlines()}
    assert [one.job for one in record.submissions(path)] == ["101"]
    kept = load(path)
    assert (kept.recipe, kept.arguments, kept.cwd) == (str(project / "r.py"), flags[-4:], str(project))
    source = json.loads((path / "slurm/source.json").read_text())
    assert (source["directory"], source["files"], source["left_out"]) == (str(project), 2, [])
    assert source["imported_from_elsewhere"]["launcher"] == str(ROOT / "launcher/__init__.py")
    assert "torch==" in (path / "slurm/packages.txt").read_text()
    assert not (project / "x").exists()


def test_what_it_tells(submit, project):
    said = submit("r.py", "--run.dir", "a b")
    assert said == f"job 101: {project}/a b\n  launcher status 'a b'\n  launcher logs -f 'a b'\n"


def test_a_job_inherits_no_other_jobs_place(submit, slurm, monkeypatch):
    gone = {"SLURM_JOB_ID": "9", "SLURM_NTASKS": "3", "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    gone |= {"MASTER_ADDR": "x", "LAUNCHER_JOB_END": "5", "SBATCH_OUTPUT": "x", "SBATCH_TIMELIMIT": "5"}
    gone |= {"SQUEUE_STATES": "PD", "SINFO_FORMAT": "%N", "SBATCH_EXPORT": "NONE", "TORCHELASTIC_RUN_ID": "x"}
    kept = {"LOCAL_SCRATCH": "/scratch", "HF_HOME": "/hf", "SLURM_CONF": "/etc/slurm.conf", "SBATCH_WCKEY": "k"}
    for name, value in (gone | kept).items():
        monkeypatch.setenv(name, value)
    submit("--time", "60", "r.py")
    seen = slurm.environment()
    assert not gone.keys() & seen.keys()
    assert kept.items() <= seen.items()


def test_what_the_environment_says_to_sbatch_is_checked_too(submit, slurm, monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")
    refused(slurm, submit("r.py", code=2), "--partition nowhere: no such partition")
    monkeypatch.setenv("SBATCH_PARTITION", "small")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "100")
    submit("r.py", "--run.dir", "r")
    assert {"#SBATCH --partition=small", "#SBATCH --time=100"} <= {*Path("r/slurm/job.sh").read_text().splitlines()}


def test_a_sites_file(call, slurm, tmp_path):
    site = tmp_path / "site.toml"
    site.write_text("[submit]\ngpus = 0\ntasks = 2\nsetup = ['module load a']\n[environment]\nA = '$(touch x) é'\n")
    call("submit", "--no-check", "--cluster", site, "--setup", "module load b", "r.py", "--run.dir", "r")
    text = Path("r/slurm/job.sh").read_text()
    assert "export A='$(touch x) é'\n" in text
    assert "module load a\nmodule load b\n" in text
    assert "#SBATCH --ntasks-per-node=2" in text
    assert load(Path("r")).site == "site"
    call("resume", "r")  # which reads no site file
    assert "export A='$(touch x) é'\n" in Path("r/slurm/job.sh").read_text()


@pytest.mark.parametrize("argv", [("--nodes", "2"), ("--array", "0-3%2"), ("--chain", "2", "--after", "7")])
def test_a_dry_run_prints_what_bash_takes_and_leaves_nothing(submit, slurm, project, capsys, argv):
    slurm.squeue("7:RUNNING:/tmp")
    before = sorted(project.rglob("*"))
    capsys.readouterr()
    assert main(["submit", "--gpus", "0", "--no-check", "--dry-run", *argv, "r.py", "--note", "$(touch x)\n'é'"]) == 0
    said = capsys.readouterr()
    line = said.err.removeprefix("+ ")
    assert line.startswith(f"sbatch --parsable --chdir={project}/runs/r-MMDD-HHMM-xyz ")
    assert bash(f"set -n; {line}").returncode == 0
    assert bash(said.out.partition("\n# ----")[0].replace("cd -- ", ": ") + "\necho ${#command[@]}").returncode == 0
    assert "-u " + str(project / "r.py") in said.out
    assert not queued(slurm)
    assert sorted(project.rglob("*")) == before


def test_a_dry_run_where_there_is_no_slurm(project, monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert main(["submit", "--gpus", "1", "--no-check", "--dry-run", "r.py"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(
        "launcher: there is no SLURM here: the request is not checked against a cluster\n+ sbatch"
    )
    assert said.out.startswith("#!/bin/bash\n#SBATCH ")


def test_a_chain_that_waits_for_a_job(submit, slurm):
    slurm.squeue("7:RUNNING:/tmp")
    submit("--chain", "3", "--after", "7", "r.py", "--run.dir", "r", "--json")
    calls = queued(slurm)
    assert len(calls) == 3
    assert calls[0][2:4] == ["--dependency=afterok:7,singleton", "--kill-on-invalid-dep=yes"]
    assert [one.job for one in record.submissions(Path("r"))] == ["101", "102", "103"]
    names = re.findall("--job-name=(.*)", Path("r/slurm/job.sh").read_text())
    assert re.fullmatch(r"r-[0-9a-f]{6}", names[0])


def test_half_a_chain_is_none(submit, slurm):
    slurm.say(most="2")
    assert "sbatch says: no more" in submit("--chain", "3", "r.py", "--run.dir", "a/b/r", code=1)
    assert slurm.calls("scancel") == [["101", "102"]]


def test_nobody_knows_whether_sbatch_has_queued_it(submit, slurm, monkeypatch, project, capsys):
    def silent(argv, *arguments):
        if "--test-only" in argv:
            return subprocess.CompletedProcess(argv, 0, "", "")
        raise order.UnansweredError("sbatch has not answered for 60 s")

    monkeypatch.setattr(order, "_call", silent)
    assert main(["submit", "--gpus", "0", "--no-check", "r.py", "--run.dir", "r"]) == 1
    assert (project / "r/slurm/job.sh").exists()  # a job may need it


# ---- sweeps and arrays ----


def test_a_sweep(submit, call, slurm, project):
    grid = "lr=1e-3,3e-4 note='a b','$(touch x)'"
    submit("--sweep", grid, "--parallel", "3", "r.py", "--steps", "9", "--run.dir", "s")
    assert queued(slurm)[0][2] == "--array=0-3%3"
    text = Path("s/slurm/job.sh").read_text()
    assert "  1) command+=(--lr=1e-3 '--note=$(touch x)');;\n" in text
    assert "r.py --steps 9)\n" in text
    assert "#SBATCH --output=slurm/%A_%a.out" in text
    assert json.loads(Path("s/slurm/sweep.json").read_text()) == {
        "parameters": ["lr", "note"],
        "points": {
            "00000": {"lr": "1e-3", "note": "a b"},
            "00001": {"lr": "1e-3", "note": "$(touch x)"},
            "00002": {"lr": "3e-4", "note": "a b"},
            "00003": {"lr": "3e-4", "note": "$(touch x)"},
        },
    }
    for point in record.points(project / "s"):
        assert facts(point)["status"] == "pending"
        [one] = record.submissions(point)
        assert one.job == f"101_{int(point.name)}"
    RunDir(project / "s/00000").update(status="finished")
    RunDir(project / "s/00003").update(status="finished")
    (project / "s/00001/slurm/cancelled").touch()
    slurm.say(calls=None)
    call("resume", "s")
    assert queued(slurm)[0][2] == "--array=1-2%3"
    assert [facts(point)["status"] for point in record.points(project / "s")] == [
        *("finished", "pending", "pending", "finished")
    ]
    assert not (project / "s/00001/slurm/cancelled").exists()
    assert "launcher resume" in call("resume", "s/00001", code=2)
    for name in ("00001", "00002"):
        RunDir(project / "s" / name).update(status="finished")
    assert "all runs of the sweep have finished" in call("resume", "s", code=2)


def test_a_sweep_that_would_be_refused(call, slurm):
    said = call("submit", "--gpus", "0", "--sweep", "lr=1,x", "r.py", code=2)
    refused(slurm, said, "--lr x: expected float")


def test_an_array(submit, slurm, project):
    submit("--array", "3,5-6%2", "r.py", "--run.dir", "s")
    assert queued(slurm)[0][2] == "--array=3,5-6%2"
    assert [point.name for point in record.points(project / "s")] == ["00003", "00005", "00006"]
    assert "case $SLURM_ARRAY_TASK_ID in" not in Path("s/slurm/job.sh").read_text()


def test_a_sweep_takes_a_directory_of_its_own(submit, slurm, project):
    (project / "s").mkdir()
    submit("--array", "0-1", "r.py", "--run.dir", "s")
    refused(
        slurm.say(calls=None), submit("--array", "0-1", "r.py", "--run.dir", "s", code=2), "s is not empty: a sweep"
    )


# ---- what is refused ----


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["none.py"], "none.py: there is no such recipe"),
        (["src"], "src is a directory: name the recipe's file"),
        (["src/package"], "src/package is a directory"),
        (["--partition", "x", "r.py"], "--partition x: no such partition"),
        (["--nodes", "9", "r.py"], "--nodes 9: partition batch has 4"),
        (["--time", "2-0", "r.py"], "--time 2-0: partition batch allows"),
        (["--after", "7", "r.py"], "--after 7: SLURM does not know that job"),
        (["--template", "t.sh", "r.py"], "--template"),
        (["--sbatch", "comment=a b", "r.py"], "cannot be given"),
        (["--setup", "if", "r.py"], "the batch script is no bash"),
        (["--signal-lead", "600", "r.py"], "--signal-lead 600: with a limit of 600 s the job would stop at once"),
        (["r.py", "--run.dir", "r.py"], "r.py is a file: name a directory"),
        (["r.py", "--run.dir", "src"], "src holds files and no run"),
        (["--cluster", "x", "r.py"], "--cluster x: no such file"),
        (["r.py", "--config", "none.toml"], "--config none.toml: No such file"),
    ],
)
def test_refused(submit, slurm, argv, said):
    code = 1 if "--setup" in argv else 2
    refused(slurm, submit(*argv, code=code), said)


def test_what_sbatch_would_refuse(submit, slurm):
    slurm.say(tested="1 sbatch: error: x\\nallocation failure: Invalid qos specification")
    refused(slurm, submit("r.py", code=2), "sbatch would refuse this: Invalid qos specification")
    slurm.say(tested="1 sbatch: unrecognized option '--bogus=1'\\nTry \"sbatch --help\" for more information")
    refused(slurm, submit("r.py", code=2), "sbatch would refuse this: unrecognized option '--bogus=1'")
    slurm.say(tested="1 ")
    refused(slurm, submit("r.py", code=2), "sbatch would refuse this: it does not say why")


def test_what_sbatch_refuses_in_the_end(submit, slurm, project):
    slurm.say(most="0")
    assert "sbatch says: no more" in submit("r.py", "--run.dir", "r", code=1)
    assert not (project / "r").exists()


def test_a_run_that_sbatch_refuses_to_go_on_with_is_as_it_was(submit, call, slurm, project):
    submit("r.py", "--run.dir", "r")
    RunDir(project / "r").update(status="preempted")
    slurm.say(most="0")
    assert main(["resume", "r"]) == 1
    assert facts(project / "r")["status"] == "preempted"


def test_a_run_that_has_a_job(submit, call, slurm, project):
    submit("r.py", "--run.dir", "r")
    slurm.squeue(f"101:PENDING:{project}/r")
    message = "r has job 101, pending: launcher cancel 101, or another --run.dir"
    refused(slurm.say(calls=None), submit("r.py", "--run.dir", "r", code=2), message)
    refused(slurm.say(calls=None), call("resume", "r", code=2), message)
    slurm.squeue(f"101:FAILED:{project}/r")
    call("resume", "r")


def test_a_colon_in_a_directory_that_goes_on_pythonpath(call, slurm, project):
    said = call("submit", "--gpus", "0", "r.py", "--run.dir", "at 12:30", code=2)
    refused(slurm, said, "PYTHONPATH cannot hold a colon: name another --run.dir")
    (project / "r.py").write_text(RECIPE.replace("import package\n", ""))
    call("submit", "--gpus", "0", "--no-check", "r.py", "--run.dir", "12:30")  # the recipe's own directory does not


# ---- resume ----


def test_resume(submit, call, slurm, project, monkeypatch):
    template = project / "own.sh"
    template.write_text((ROOT / "slurm/job.sh").read_text() + "# my own\n")
    flags = ["--time", "60", "--tasks", "3", "--cpus", "2", "--setup", "a", "--template", "own.sh"]
    submit(*flags, "r.py", "--lr", "1", "--run.dir", "r")
    first = (project / "r/slurm/job.sh").read_text()
    (project / "r/slurm/idle").write_text("2\n")
    (project / "r/slurm/verdict").write_text("failed: x\n")
    run = RunDir(project / "r")
    run.failed(run.start_attempt(3), rank=0, step=1, error="x")
    run.update(status="failed")
    monkeypatch.chdir(project / "src")
    slurm.say(calls=None)
    call("resume", project / "r")
    assert (project / "r/slurm/job.sh").read_text() == first
    assert facts(project / "r")["status"] == "pending"  # though its newest start has failed
    assert not (project / "r/slurm/idle").exists()
    assert not (project / "r/slurm/verdict").exists()
    assert [one.job for one in record.submissions(project / "r")] == ["101", "102"]
    call("resume", "--nodes", "2", "--tasks", "1", "--setup", "b", "--chain", "2", project / "r")
    lines = (project / "r/slurm/job.sh").read_text().splitlines()
    assert {"#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --cpus-per-task=1", "b"} <= {*lines}
    assert "a" not in lines
    slurm.say(calls=None)
    call("resume", project / "r")  # the chain was of that time only
    assert len(queued(slurm)) == 1


def test_resume_with_other_options_checks_them(submit, call, slurm, project):
    submit("r.py", "--steps", "5", "--run.dir", "r")
    said = call("resume", "r", "--lrr", "1", code=2)
    refused(slurm, said, "unknown option --lrr")
    call("resume", "r", "--steps", "9")
    assert load(project / "r").arguments == ["--steps", "5", "--steps", "9"]
    assert (project / "r/code").exists()
    assert not (project / "r/code-2").exists()
    (project / "r.py").write_text(RECIPE + "# new\n")
    call("resume", "--new-code", "r")
    assert (project / "r/code-2/r.py").read_text().endswith("# new\n")
    assert f"{project}/r/code-2/r.py" in (project / "r/slurm/job.sh").read_text()


def test_resume_refuses(submit, call, slurm, project):
    assert "no such run directory" in call("resume", "nothing", code=2)
    (project / "plain/attempts").mkdir(parents=True)
    assert "plain was not submitted: launcher submit [flags] RECIPE" in call("resume", "plain", code=2)
    assert "unknown flag --array" in call("resume", "--array", "0-3", "plain", code=2)
    submit("r.py", "--run.dir", "r")
    RunDir(project / "r").update(status="finished")
    message = "r: the run has finished: launcher resume r --steps N goes on"
    refused(slurm.say(calls=None), call("resume", "r", code=2), message)
    RunDir(project / "r").update(status="preempted")
    (project / "r/code/r.py").unlink()
    assert "the copy of the code, is gone: --new-code takes it from" in call("resume", "r", code=2)
    (project / "r/slurm/request.json").write_text('{"request": {"noodles": 3}}')
    assert re.search(r"request.json is broken \(.*\): submit the run again", call("resume", "r", code=2))
    for text in ("", "[]", "null", "{", '{"request": null}'):
        (project / "r/slurm/request.json").write_text(text)
        assert "is broken" in call("resume", "r", code=2)


def test_a_config_file_is_kept(submit, call, slurm, project):
    (project / "c.toml").write_text("steps = 7\n")
    submit("r.py", "--config", "c.toml", "--run.dir", "r")
    copy = project / "r/slurm/config.toml"
    assert copy.read_text() == "steps = 7\n"
    assert load(project / "r").arguments == [f"--config={copy}"]
    (project / "c.toml").write_text("steps = 8\n")
    call("resume", "r", "--lr", "0.1")
    assert copy.read_text() == "steps = 7\n"


# ---- code ----


def test_other_ways_to_a_recipes_modules(call, slurm, project, tmp_path, monkeypatch):
    """A recipe that is a link finds its modules where it leads to; what it imports and git ignores comes along."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "r.py").write_text(RECIPE.replace("import package", "import beside"))
    (elsewhere / "beside.py").write_text("")
    (project / "linked.py").symlink_to(elsewhere / "r.py")
    call("submit", "--gpus", "0", "linked.py", "--run.dir", "one")
    assert load(project / "one").code.path[-1] == str(elsewhere)
    source = json.loads((project / "one/slurm/source.json").read_text())
    assert source["imported_from_elsewhere"]["beside"] == str(elsewhere / "beside.py")
    (project / ".gitignore").write_text("_version.py\nignored.py\n/one/\n")
    (project / "src/package/_version.py").write_text("")
    (project / "src/package/__init__.py").write_text("from package import _version")
    (project / "ignored.py").write_text(RECIPE)
    call("submit", "--gpus", "0", "ignored.py", "--run.dir", "two")
    assert (project / "two/code/ignored.py").exists()
    assert (project / "two/code/src/package/_version.py").exists()
    assert load(project / "two").code == replace(load(project / "two").code, path=(str(project / "two/code/src"),))


def test_help_is_the_recipes(project, slurm, capfd):
    assert main(["submit", "r.py", "--help"]) == 0
    assert "--note STR" in capfd.readouterr().out
    assert main(["submit", "--help"]) == 0
    said = capfd.readouterr().out
    assert "--signal-lead S" in said
    assert "1,5,7%2" in said


def test_nothing_heavy_is_imported_for_it(project, slurm):
    code = "import sys; from launcher.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    argv = ["submit", "--gpus", "0", "--no-check", "r.py"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "False"
