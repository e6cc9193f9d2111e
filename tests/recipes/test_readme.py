"""What the README shows is what there is: its recipe runs, its commands parse, its table of options is the real one."""

import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import launcher
from launcher.config import RunConfig
from tests.harness import ROOT, losses
from tests.recipes.test_runs import assert_close, launcher_run, run

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_recipe_runs_in_all_three_ways(tmp_path: Path) -> None:
    [source] = blocks("python")
    (tmp_path / "digits.py").write_text(source)
    options = ["--steps", "120", "--run.threads", "1"]
    run(sys.executable, "digits.py", *options, "--run.dir", "python", cwd=tmp_path)
    launcher_run("digits.py", *options, "--run.dir", "launcher", cwd=tmp_path)
    accelerate = [Path(sys.executable).with_name("accelerate"), "launch", "--multi_gpu", "--num_machines", "1"]
    accelerate += ["--num_processes", "2", "--main_process_port", "0", "digits.py", *options, "--run.dir", "accelerate"]
    run(*accelerate, cwd=tmp_path, env={"ACCELERATE_USE_CPU": "true"})
    curves = [losses(tmp_path / name) for name in ("python", "launcher", "accelerate")]
    assert_close(curves[0], curves[1], 1e-4)
    assert_close(curves[0], curves[2], 1e-4)
    assert curves[0][120] < 0.3 < 2 < curves[0][1]


def test_its_commands_name_what_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [line.split("#")[0] for block in blocks("sh") for line in block.splitlines()]
    words = [shlex.split(line) for line in lines]
    assert {line[1] for line in words if line[0] == "make"} == {"demo", "test"} <= targets
    for recipe in {word for line in words for word in line if word.endswith(".py")}:
        assert (ROOT / recipe).is_file()
    for path in re.findall(r"\]\((recipes/\w+\.py)\)", README):
        assert (ROOT / path).is_file()


@pytest.mark.parametrize("name", ["classify", "gpt", "finetune"])
def test_options_of_recipes_that_it_and_they_name(name: str, tmp_path: Path) -> None:
    recipe = ROOT / "recipes" / f"{name}.py"
    known = set(re.findall(r"--[\w.-]+", run(sys.executable, recipe, "--help", cwd=tmp_path, env={"COLUMNS": "200"})))
    [row] = re.findall(rf"^\| \[{name}\.py\].*", README, re.MULTILINE)
    docstring = recipe.read_text().split('"""')[1]
    commands = " ".join(re.findall(rf"{name}\.py(.*)", docstring.replace("\\\n", "")))
    named = set(re.findall(r"--[\w.-]+\w", row + commands))
    assert len(named) >= 3
    assert named <= known


def test_what_it_says_a_recipe_can_use_is_there() -> None:
    named = re.findall(
        r"`(run|step|launcher)\.([A-Za-z_]+)", README.split("What a recipe can use")[1].split("\n## ")[0]
    )
    assert len(named) > 15
    classes = {"run": launcher.Run, "step": launcher.Step, "launcher": launcher}
    missing = [f"{owner}.{name}" for owner, name in named if not hasattr(classes[owner], name) and name != "index"]
    assert not missing


def test_the_table_of_options_is_complete() -> None:
    rows = re.findall(r"^\| `--run\.([\w-]+)([^`]*)` \|([^|]*)\|", README.replace("\\|", "/"), re.MULTILINE)
    shown = {name.replace("-", "_"): default.strip() for name, _, default in rows}
    assert list(shown) == [field.name for field in fields(RunConfig)]
    for field in fields(RunConfig):
        if isinstance(field.default, bool):
            assert shown[field.name] == ("on" if field.default else "off")
        elif isinstance(field.default, int) or field.name == "resume":
            assert shown[field.name] == str(field.default)
