"""`launcher submit`: a recipe as a SLURM job, checked before it is queued; `launcher resume`: the same once more."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.command import check_recipe
from launcher.errors import LauncherError, UsageError
from launcher.parser import Parser
from launcher.rundir import RunDir
from launcher.show import print_json, printable
from launcher.slurm import record, sweep
from launcher.slurm.flags import split
from launcher.slurm.order import (
    Code,
    Order,
    Settled,
    UnansweredError,
    copy_code,
    free,
    load,
    queue,
    sbatch,
    settle,
    try_out,
)
from launcher.slurm.rehearsal import Answer, Modules, rehearse
from launcher.slurm.request import Request, Site, as_dict, read_flags, read_site
from launcher.slurm.script import shipped

__all__ = ["resume", "submit"]


@dataclass(frozen=True)
class Asked:
    """What a command line asks for, read and rehearsed."""

    order: Order
    recipe: Path
    directory: str | None
    """What it calls the run directory; None: a fresh one."""
    modules: Modules
    grid: list[dict[str, str]]
    """Of a sweep, the options of each point."""


def submit(argv: Sequence[str]) -> int:
    """`launcher submit [flags] RECIPE [the recipe's options]`."""
    parser = _parser("submit", "RECIPE [recipe options]", "Queue a recipe as a SLURM job that survives preemption.")
    parser.add_argument("--cluster", metavar="NAME", help="the site's file of defaults; default: LAUNCHER_CLUSTER")
    parser.add_argument("--no-check", action="store_true", help="do not start the recipe here to check its options")
    given, (name, *options) = split(argv, parser, what="RECIPE")
    if {"--help", "-h"} & {*options}:
        return subprocess.run([given["python"] or sys.executable, str(_recipe(name)), "--help"]).returncode
    dry_run, as_json = given.pop("dry_run"), given.pop("json")
    asked = _asked(given, _recipe(name), options)
    here = shutil.which("scontrol") is not None or not dry_run
    if not here:
        print("launcher: there is no SLURM here: the request is not checked against a cluster", file=sys.stderr)
    settled, tasks = settle(asked.order, here=here), tuple(asked.order.points)
    draft = Path(asked.directory or f"runs/{asked.order.name}-MMDD-HHMM-xyz").expanduser().absolute()
    if here:
        try_out(settled, draft, tasks)
    if dry_run:
        _show(settled, draft, tasks, as_json)
        return 0
    missing = [place for place in (draft, *draft.parents) if not place.exists()]
    path = _directory(settled, asked.directory)
    try:
        jobs = _write_and_queue(settled, path, asked)
    except UnansweredError:
        raise
    except BaseException:
        if missing:  # nothing of it is anybody's yet
            shutil.rmtree(path, ignore_errors=True)
        for parent in missing[1:]:
            with suppress(OSError):  # another run's by now
                parent.rmdir()
        raise
    _tell(path, jobs, as_json)
    return 0


def resume(argv: Sequence[str]) -> int:
    """`launcher resume [flags] RUN [further options of the recipe]`."""
    parser = _parser("resume", "RUN [recipe options]", "Queue a run's job again: it goes on from its last checkpoint.")
    parser.add_argument("--new-code", action="store_true", help="run the code as it is now, not as it was submitted")
    given, (name, *options) = split(argv, parser, what="RUN", without=("array", "sweep"))
    dry_run, as_json, new_code = given.pop("dry_run"), given.pop("json"), given.pop("new_code")
    path = record.find(name)
    if record.is_sweep(path.parent) and not (path / "slurm" / "request.json").exists():
        raise UsageError(f"{name} is one run of a sweep: launcher resume {path.parent} resumes all that have not ended")
    before = load(path)
    old = {key: value for key, value in as_dict(before.request).items() if key not in ("chain", "after")}
    changed = {key: value for key, value in given.items() if value not in (None, [])}
    if "gpus" in changed or "tasks" in changed:
        old.pop("tasks", None)
        old.pop("cpus", None)
    request = _anywhere(read_flags({**old, **changed}, Site()))
    order = replace(before, request=request, arguments=[*before.arguments, *_own(options)[0]])
    tasks = _unfinished(path) if before.points else ()
    _refuse_finished(path, order, options)
    free(path)
    recipe = _recipe(before.recipe) if new_code else Path(before.code.recipe)
    if not recipe.is_file():
        raise UsageError(f"{recipe}, the copy of the code, is gone: --new-code takes it from {before.recipe} again")
    modules = _rehearsed_again(order, path, recipe, new_code) if new_code or options else Modules((), {})
    settled = settle(order)
    try_out(settled, path, tasks)
    if dry_run:
        _show(settled, path, tasks, as_json)
        return 0
    if new_code:
        settled = replace(settled, order=replace(settled.order, code=copy_code(path, recipe, modules)[0]))
    settled = replace(settled, order=replace(settled.order, arguments=_with_config(settled.order, path)))
    _tell(path, queue(settled, path, tasks), as_json)
    return 0


def _asked(given: dict[str, Any], recipe: Path, options: list[str]) -> Asked:
    """What flags and a recipe's options come to."""
    unchecked, site = given.pop("no_check"), read_site(given.pop("cluster"), shipped() / "clusters")
    request = _anywhere(read_flags(given, site))
    grid = sweep.grid(request.sweep) if request.sweep is not None else []
    argvs = [[*options, *sweep.options(point)] for point in grid] or [options]
    environment = dict(site.environment or {})
    if unchecked:
        answers, modules = [Answer({}, _own(argv)[1], recipe.stem, argv) for argv in argvs], Modules((), {})
    else:
        answers, modules = _rehearsed(request, recipe, argvs, environment)
    common, directory = _own(answers[0].argv[: len(options)])
    indices, limit = sweep.indices(request.array) if request.array is not None else (list(range(len(grid))), None)
    points = {index: answers[index].argv[len(options) :] if grid else [] for index in indices}
    order = Order(
        replace(request, parallel=limit) if limit is not None else request,
        *(str(recipe), common, answers[0].name, os.getcwd(), site.name, environment, points, Code(str(recipe))),
    )
    return Asked(order, recipe, answers[0].dir or directory, modules, grid)


def _rehearsed_again(order: Order, path: Path, recipe: Path, new_code: bool) -> Modules:
    """Let the recipe say whether the run may go on with its options; with the code that it has, if that is not new."""
    argvs = [[*order.arguments, *point] for point in order.points.values()]
    argvs = argvs or [[*order.arguments, "--run.dir", str(path)]]
    code = {"PYTHONPATH": ":".join([*order.code.path, *filter(None, [os.environ.get("PYTHONPATH")])])}
    environment = order.environment if new_code else {**order.environment, **code}
    return _rehearsed(order.request, recipe, argvs, environment)[1]


def _parser(command: str, behind: str, said: str) -> Parser:
    parser = Parser(
        prog=f"launcher {command}",
        usage=f"launcher {command} [flags] {behind}",
        description=said,
        epilog="Defaults come from a site's file, slurm/clusters/NAME.toml: --cluster NAME, or LAUNCHER_CLUSTER.",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the sbatch line and the batch script")
    parser.add_argument("--json", action="store_true", help="print the job and the run directory for scripts")
    return parser


def _anywhere(request: Request) -> Request:
    """The request with a template that is found from any directory: the run may be resumed from another."""
    if request.template is None:
        return request
    return replace(request, template=str(Path(request.template).expanduser().absolute()))


def _recipe(name: str) -> Path:
    check_recipe(name)
    return Path(name).absolute()


def _rehearsed(
    request: Request, recipe: Path, asked: list[list[str]], environment: Mapping[str, str]
) -> tuple[list[Answer], Modules]:
    python = request.python if request.python is not None and request.container is None else sys.executable
    cpu = {} if request.gpus else {"ACCELERATE_USE_CPU": "true"}
    return rehearse(recipe, asked, python=python, environment={**cpu, **environment})


def _own(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """The recipe's options without `--run.dir`, and what that said."""
    left: list[str] = []
    directory = None
    tokens = iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if name == "--run.dir":
            directory = value if equals else next(tokens, None)
        else:
            left.append(token)
    return left, directory


def _directory(settled: Settled, given: str | None) -> Path:
    """The run's directory (or the sweep's), made where it is missing."""
    many = bool(settled.order.points)
    if given is not None and (path := Path(given).expanduser().absolute()).is_dir():
        free(path)
        if many and any(path.iterdir()):
            raise UsageError(f"{path} is not empty: a sweep takes a directory of its own (launcher resume goes on)")
    rundir = RunDir.open(given, name=f"{settled.order.name}-sweep" if many else settled.order.name)
    if not many and rundir.read().get("status") == "finished" and not settled.order.arguments:
        raise UsageError(f"{rundir.path}: the run has finished: ask for more --steps, or name another --run.dir")
    (rundir.path / "slurm").mkdir(exist_ok=True)
    return rundir.path


def _write_and_queue(settled: Settled, path: Path, asked: Asked) -> list[str]:
    code, copy = copy_code(path, asked.recipe, asked.modules)
    if copy.left_out:
        listed = "\n".join(f"  {printable(name)}" for name in copy.left_out[:10])
        more = f"\n  and {len(copy.left_out) - 10} more" if len(copy.left_out) > 10 else ""
        print(f"launcher: not in the copy of the code:\n{listed}{more}", file=sys.stderr)
    order = replace(settled.order, code=code, arguments=_with_config(settled.order, path))
    settled = replace(settled, order=order)
    tasks = tuple(order.points)
    for task in tasks:
        (path / f"{task:05d}" / "slurm").mkdir(mode=0o700, parents=True)
    if tasks:
        parameters = list(asked.grid[0]) if asked.grid else []
        named = {f"{task:05d}": asked.grid[task] if asked.grid else {} for task in tasks}
        (path / "slurm" / "sweep.json").write_text(
            json.dumps({"parameters": parameters, "points": named}, indent=2) + "\n"
        )
    return queue(settled, path, tasks)


def _with_config(order: Order, path: Path) -> list[str]:
    """The options, with a copy of the file that `--config` names: a run goes on with what it was started with."""
    arguments = list(order.arguments)
    for index, token in enumerate(arguments):
        name, equals, value = token.partition("=")
        if name != "--config" or (not equals and index + 1 == len(arguments)):
            continue
        source = Path(value if equals else arguments[index + 1])
        copy = path / "slurm" / f"config{source.suffix}"
        try:
            if source.absolute() != copy:
                shutil.copyfile(source, copy)
        except OSError as error:
            raise UsageError(f"--config {source}: {error.strerror}") from None
        arguments[index : index + (1 if equals else 2)] = [f"--config={copy}"]
        break
    return arguments


def _unfinished(path: Path) -> tuple[int, ...]:
    """The points of a sweep that have not ended well."""
    tasks = []
    for point in record.points(path):
        with suppress(LauncherError):
            if RunDir(point).read().get("status") == "finished":
                continue
        tasks.append(int(point.name))
    if not tasks:
        raise UsageError(f"{path}: all runs of the sweep have finished")
    return tuple(tasks)


def _refuse_finished(path: Path, order: Order, options: Sequence[str]) -> None:
    if not order.points and not options and RunDir(path).read().get("status") == "finished":
        near = shlex.quote(os.path.relpath(path))
        raise UsageError(f"{path}: the run has finished: launcher resume {near} --steps N goes on")


def _show(settled: Settled, path: Path, tasks: Sequence[int], as_json: bool) -> None:
    """What `--dry-run` prints; the code would be copied, and stands there where it is."""
    text, line = settled.text(path), sbatch(settled, path, tasks)
    if as_json:
        print_json({"sbatch": line, "script": text})
        return
    print(f"+ {shlex.join(line)}", file=sys.stderr)
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(text))


def _tell(path: Path, jobs: Sequence[str], as_json: bool) -> None:
    if as_json:
        print_json({"job": jobs[0], "jobs": list(jobs), "run": str(path)})
        return
    near = os.path.relpath(path)
    shown = shlex.quote(near if not near.startswith("..") else str(path))
    print(f"{'job' if len(jobs) == 1 else 'jobs'} {' '.join(jobs)}: {printable(str(path))}")
    print(f"  launcher status {printable(shown)}\n  launcher logs -f {printable(shown)}")
