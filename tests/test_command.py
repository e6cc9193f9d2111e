"""Which command line a launch on this machine stands for."""

import shlex
import sys
from pathlib import Path

import pytest

from launcher.command import Command, local_command, visible_gpus
from launcher.errors import UsageError

CPU = {"ACCELERATE_USE_CPU": "true"}


@pytest.fixture
def recipe(tmp_path) -> str:
    (tmp_path / "a recipe.py").write_text("")
    return str(tmp_path / "a recipe.py")


def command(
    recipe: str, *arguments: str, gpus: int | None = None, nproc: int | None = None, visible: int = 0
) -> Command:
    return local_command(recipe, arguments, gpus=gpus, nproc=nproc, visible=visible)


def processes(made: Command) -> str:
    return made.argv[made.argv.index("--num_processes") + 1]


@pytest.mark.parametrize("wanted", [{}, {"visible": 1}, {"gpus": 1, "visible": 8}])
def test_one_process_is_plain_python(recipe: str, wanted: dict[str, int]) -> None:
    made = command(recipe, "--lr", "1", **wanted)
    assert made == Command((sys.executable, recipe, "--lr", "1"))


@pytest.mark.parametrize("wanted", [{"nproc": 1, "visible": 8}, {"gpus": 0, "visible": 8}, {"gpus": 0}])
def test_one_cpu_process_sees_no_gpu(recipe: str, wanted: dict[str, int]) -> None:
    assert command(recipe, **wanted) == Command((sys.executable, recipe), CPU)


@pytest.mark.parametrize(
    ("wanted", "number", "variables"),
    [
        ({"visible": 8}, "8", {}),
        ({"gpus": 2, "visible": 8}, "2", {}),
        ({"nproc": 3}, "3", CPU),
        ({"nproc": 3, "visible": 8}, "3", CPU),
    ],
)
def test_many_processes_are_accelerate_launch(
    recipe: str, wanted: dict[str, int], number: str, variables: dict
) -> None:
    made = command(recipe, "--lr", "1", **wanted)
    assert processes(made) == number
    assert made.variables == variables
    assert made.argv[-3:] == (recipe, "--lr", "1")
    assert Path(made.argv[0]) == Path(sys.executable).with_name("accelerate")
    assert made.argv[1] == "launch"


def test_without_the_accelerate_script_its_module_is_run(recipe: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    made = command(recipe, nproc=2)
    assert made.argv[:3] == (str(tmp_path / "python"), "-m", "accelerate.commands.launch")


def test_more_gpus_than_there_are_is_refused(recipe: str) -> None:
    with pytest.raises(UsageError, match=r"--gpus 3: this machine shows 2 \(--nproc 3 runs CPU processes\)"):
        command(recipe, gpus=3, visible=2)


def test_what_is_no_recipe_is_refused(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UsageError, match=r"no/such\.py: there is no such recipe"):
        command("no/such.py")
    with pytest.raises(UsageError, match="is a directory: name the recipe's file"):
        command(str(tmp_path))
    with pytest.raises(UsageError, match=r"notes\.txt is no Python file: a recipe's name ends in \.py"):
        command(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize(
    ("shown", "number"),
    [
        (None, 2),
        ("", 0),
        ("-1", 0),
        ("NoDevFiles", 0),
        ("0", 1),
        ("3, 1,2", 3),
        ("0,-1,1", 1),
        ("GPU-8a7c,MIG-77f1/1/0", 2),
    ],
)
def test_visible_gpus(tmp_path, shown: str | None, number: int) -> None:
    for name in ("nvidia0", "nvidia12", "nvidiactl", "nvidia-uvm", "nvidia-caps", "null"):
        (tmp_path / name).touch()
    environ = {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}
    assert visible_gpus(environ, devices=tmp_path) == number


def test_the_printed_line_is_what_a_shell_would_take() -> None:
    made = Command(("python", "a b.py", "it's", '"$HOME"', ""), {"A": "x y"})
    assert shlex.split(str(made)) == ["env", "A=x y", *made.argv]
    assert str(Command(("python", "x.py"))) == "python x.py"
