"""The `launcher` command. It answers in a blink: nothing heavy is imported for it."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from launcher.errors import LauncherError, UsageError
from launcher.parser import Parser, recipe_index
from launcher.show import printable

__all__ = ["main"]

COMMANDS = {
    "run": "run a recipe on this machine",
    "submit": "queue a recipe as a SLURM job",
    "status": "runs and jobs: state and why, step, loss, rate",
    "logs": "what a rank, or the batch script, has printed",
    "cancel": "end runs, with a checkpoint",
    "resume": "queue a run's job again",
    "drill": "a real preemption of a running job, timed",
    "check": "prove a recipe distributed-correct",
    "doctor": "can this machine or cluster do it",
    "ckpt": "look at checkpoints, compare, export, import and prune them",
}
# Where a command's function is; imported when it is called, so that `launcher --help` need not wait for all of them.
FUNCTIONS = {
    "submit": "launcher.slurm.submit:submit",
    "status": "launcher.slurm.status:main",
    "logs": "launcher.slurm.logs:main",
    "cancel": "launcher.slurm.cancel:main",
    "resume": "launcher.slurm.submit:resume",
    "drill": "launcher.slurm.drill:main",
    "check": "launcher.check.command:main",
    "doctor": "launcher.doctor.command:main",
    "ckpt": "launcher.ckpt:main",
}


RUN_FLAGS = {"--gpus": 1, "--nproc": 1, "--dry-run": 0, "--help": 0, "-h": 0}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of a command line (default: this process's): 0 done, 2 usage, 1 failed."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except LauncherError as error:
        print(f"launcher: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    except SystemExit as done:  # argparse, after --help and --version
        return int(done.code or 0)
    except BrokenPipeError:  # `launcher ckpt ls | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else it is told of again at exit
        return 1
    except KeyboardInterrupt:
        return 130


def _dispatch(argv: list[str]) -> int:
    parser = Parser(
        prog="launcher",
        description="Run one training recipe, unmodified: as a debug run, on many GPUs, on a cluster.",
        epilog="`launcher COMMAND --help` says more of one.",
    )
    parser.add_argument("--version", action="store_true", help="say which version this is")
    listed = ", ".join(f"{name} ({what})" for name, what in COMMANDS.items())
    parser.add_argument("command", metavar="COMMAND", nargs="?", help=listed)
    options = parser.parse_args(argv[:1])
    command = options.command
    if options.version:
        print(f"launcher {_version()}")
    elif command == "run":
        return _run(argv[1:])
    elif command in FUNCTIONS:
        module, _, function = FUNCTIONS[command].partition(":")
        return int(getattr(import_module(module), function)(argv[1:]))
    elif command is None:
        raise UsageError(f"name a command: {', '.join(COMMANDS)} (launcher --help)")
    elif command.endswith(".py"):
        raise UsageError(f"unknown command {command}: did you mean launcher run {command}?")
    else:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        raise UsageError(
            f"unknown command {command}: " + (f"did you mean {near[0]}?" if near else "see launcher --help")
        )
    return 0


def _run(argv: list[str]) -> int:
    """`launcher run [options] RECIPE [the recipe's options]`; the exit code."""
    parser = Parser(
        prog="launcher run",
        usage="launcher run [--gpus N | --nproc N] [--dry-run] RECIPE [recipe options]",
        description="Run a recipe on this machine: plain python for one process, accelerate launch for more.",
        epilog="What stands after RECIPE is the recipe's own: `launcher run RECIPE --help` lists it.",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpus", type=int, metavar="N", help="GPUs, a process each; 0: one CPU process (default: all)")
    where.add_argument("--nproc", type=int, metavar="N", help="CPU processes, in place of GPUs")
    parser.add_argument("--dry-run", action="store_true", help="only print the command line that this stands for")
    from launcher.command import local_command, visible_gpus

    end = recipe_index(argv, RUN_FLAGS, "launcher run")
    options = parser.parse_args(argv[:end])
    for name, least in (("gpus", 0), ("nproc", 1)):
        number = getattr(options, name)
        if number is not None and number < least:
            raise UsageError(f"--{name} {number}: at least {least}")
    if end == len(argv):
        raise UsageError("launcher run needs a RECIPE: the path of a Python file")
    recipe, *arguments = argv[end:]
    command = local_command(recipe, arguments, gpus=options.gpus, nproc=options.nproc, visible=visible_gpus(os.environ))
    if options.dry_run:
        print(command)
        return 0
    from launcher.parent import run

    print(f"+ {command}", file=sys.stderr)
    return run(command)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("launcher")
    except PackageNotFoundError:
        return "(not installed)"
