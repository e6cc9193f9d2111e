"""A recipe's options, checked by starting it as far as its config."""

import json
import sys

import pytest

from launcher.errors import LauncherError, UsageError
from launcher.rehearse import answer
from launcher.slurm import rehearsal
from launcher.slurm.rehearsal import rehearse
from tests.harness import ROOT

RECIPE = '''"""A recipe."""
import os
import sys
from dataclasses import dataclass
import beside
import package
import launcher

@dataclass(frozen=True)
class Config:
    steps: int = 3
    lr: float = 0.1
    tie: bool = True
    note: str = ""
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ValueError("lr is negative")

def train(run: launcher.Run, cfg: Config) -> None:
    open("ran", "w").close()

if __name__ == "__main__":
    print("noise", os.environ.get("SITE"), os.environ.get("RANK"))
    launcher.main(train)
'''


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    path = tmp_path / "re cipe;'.py"
    path.write_text(RECIPE)
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "src/package").mkdir(parents=True)
    (tmp_path / "src/package/__init__.py").write_text("from package import deep")
    (tmp_path / "src/package/deep.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'src'}:{ROOT}")
    monkeypatch.chdir(tmp_path)
    return path


def rehearsed(recipe, *argvs):
    return rehearse(recipe, argvs, python=sys.executable, environment={"ACCELERATE_USE_CPU": "true"})


def test_what_it_was_asked_for(recipe, tmp_path):
    asked = [["--lr", "1", "--run.dir", "~/a b"], ["--tie=false", "--note=tie=false", "--run.name", "n"]]
    (first, second), modules = rehearsed(recipe, *asked)
    assert (first.settings["lr"], first.settings["run"]["precision"]) == (1.0, "no")
    assert (first.dir, first.name, first.argv) == ("~/a b", "re cipe;'", asked[0])
    assert (second.dir, second.name) == (None, "n")
    assert second.argv == ["--no-tie", "--note=tie=false", "--run.name", "n"]
    assert (second.settings["tie"], second.settings["note"]) == (False, "tie=false")
    assert modules.roots[:3] == (str(tmp_path), str(tmp_path / "src"), str(ROOT))
    assert {"beside": str(tmp_path / "beside.py")}.items() <= modules.files.items()
    assert not {"json", "torch", "package.deep", "__main__"} & {*modules.files}
    assert str(tmp_path / "src/package/deep.py") in modules.all
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside.py", "re cipe;'.py", "src"]  # nothing has run


def test_what_it_refuses_in_one_line(recipe):
    with pytest.raises(UsageError, match=r"^unknown option --stps: did you mean --steps\?$"):
        rehearsed(recipe, ["--stps", "3"])
    with pytest.raises(UsageError, match=r"^these options are refused: lr is negative$"):
        rehearsed(recipe, [], ["--lr=-1"])


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("print('hello')", UsageError, "ended without launcher.main"),
        ("import no_such_module", LauncherError, "No module named 'no_such_module' (--no-check queues it anyway)"),
        ("import sys; sys.exit(3)", LauncherError, "cannot be started here, so it was not queued: exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", LauncherError, "exit code -9"),
        ("def f(:", LauncherError, "SyntaxError"),
        ("import time; time.sleep(60)", UsageError, "did not get to launcher.main in 1 s"),
    ],
)
def test_what_is_no_recipe(tmp_path, monkeypatch, capfd, text, kind, said):
    path = tmp_path / "r.py"
    path.write_text(text)
    if "sleep" in text:
        monkeypatch.setattr(rehearsal, "PATIENCE", 1.0)
    with pytest.raises(kind) as refused:
        rehearsed(path, [])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert ("Traceback" in capfd.readouterr().err) == ("module" in said)


def test_a_python_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"--python /no/python: No such file or directory"):
        rehearse(tmp_path / "r.py", [[]], python="/no/python", environment={})


def test_its_environment(tmp_path, monkeypatch):
    path = tmp_path / "r.py"
    path.write_text('import os, sys; sys.exit(f\'{os.environ.get("SITE")} {os.environ.get("RANK")}\')')
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(LauncherError, match=r": a b None \(--no-check"):
        rehearse(path, [[]], python=sys.executable, environment={"SITE": "a b"})


# ---- the recipe's side ----


def answered(tmp_path, *argvs):
    (tmp_path / "asked.json").write_text(json.dumps(argvs))
    answer(tmp_path / "asked.json", None, prog="r.py", description=None)
    return json.loads((tmp_path / "answered.json").read_text())["points"]


def test_other_options_than_the_run_was_started_with(tmp_path):
    run = tmp_path / "run"
    [first] = answered(tmp_path, ["--run.dir", str(run), "--run.seed", "1"])
    run.mkdir()
    (run / "config.json").write_text(json.dumps(first["settings"]))
    (tmp_path / "answered.json").unlink()
    with pytest.raises(UsageError, match=r"run.seed was 1, now 2"):
        answered(tmp_path, ["--run.dir", str(run), "--run.seed", "2"])
    assert not (tmp_path / "answered.json").exists()
    answered(tmp_path, ["--run.dir", str(run), "--run.seed", "2", "--run.allow", "run.seed"])


def test_flags_of_a_sweep_in_the_recipes_own_words(tmp_path):
    given = ["--run.tf32=FALSE", "--run.deterministic=true", "--run.name=a=true", "--run.init-from", "run.tf32=false"]
    [point] = answered(tmp_path, given)
    assert point["argv"] == ["--run.no-tf32", "--run.deterministic", *given[2:]]
