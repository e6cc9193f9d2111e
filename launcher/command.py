"""The command line that `launcher run` stands for: plain `python` for one process, `accelerate launch` for more."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.errors import UsageError

__all__ = ["Command", "check_recipe", "local_command", "visible_gpus"]

DEVICES = Path("/dev")


@dataclass(frozen=True)
class Command:
    """A program with its arguments, and the environment variables that are set for it."""

    argv: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    processes: int = 1
    """How many ranks it starts."""

    def __str__(self) -> str:
        """The line that does the same in a shell."""
        setting = ["env", *(f"{name}={value}" for name, value in self.variables.items())] if self.variables else []
        return shlex.join([*setting, *self.argv])


def local_command(
    recipe: str, arguments: Sequence[str], *, gpus: int | None, nproc: int | None, visible: int
) -> Command:
    """How to run a recipe on this machine.

    Args:
        recipe: the path of its file.
        arguments: the recipe's own options, passed on as they are.
        gpus: how many GPUs, a process each; 0: one CPU process; None: all, or one CPU process where there is none.
        nproc: how many CPU processes; not together with `gpus`.
        visible: how many GPUs there are.

    Raises:
        UsageError: the recipe is no Python file, or there are not as many GPUs.
    """
    check_recipe(recipe)
    if gpus is not None and gpus > visible:
        raise UsageError(f"--gpus {gpus}: this machine shows {visible} (--nproc {gpus} runs CPU processes)")
    on_cpu = nproc is not None or gpus == 0
    processes = nproc if nproc is not None else visible if gpus is None else gpus
    variables = {"ACCELERATE_USE_CPU": "true"} if on_cpu else {}
    starter = [sys.executable] if processes <= 1 else [*_accelerate(), *_many(processes)]
    return Command((*starter, recipe, *arguments), variables, max(1, processes))


def visible_gpus(environ: Mapping[str, str], devices: Path = DEVICES) -> int:
    """The number of NVIDIA GPUs that a process here would see, without asking the driver."""
    shown = environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return sum(1 for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    names = [name.strip() for name in shown.split(",")]
    for number, name in enumerate(names):
        if not re.fullmatch(r"\d+|(GPU|MIG)-\S+", name):  # CUDA stops reading at the first that is none, such as -1
            return number
    return len(names)


def _many(processes: int) -> list[str]:
    # Everything that accelerate would warn of when unsaid, or take from the user's default config file. On a CPU
    # machine --multi_gpu stands for many processes too: with --cpu Accelerate starts one, whatever it is told.
    return [
        *("--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--gpu_ids", "all"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ]


def _accelerate() -> list[str]:
    """This Python's `accelerate launch`, by its script: with -m a folder `datasets` in here would be imported."""
    script = Path(sys.executable).with_name("accelerate")
    return [str(script), "launch"] if script.is_file() else [sys.executable, "-m", "accelerate.commands.launch"]


def check_recipe(recipe: str) -> None:
    """Refuse what is no recipe's path.

    Raises:
        UsageError: there is no such file, or it is no Python file.
    """
    path = Path(recipe)
    if path.is_dir():
        raise UsageError(f"{recipe} is a directory: name the recipe's file")
    if not path.is_file():
        raise UsageError(f"{recipe}: there is no such recipe")
    if path.suffix != ".py":
        raise UsageError(f"{recipe} is no Python file: a recipe's name ends in .py")
