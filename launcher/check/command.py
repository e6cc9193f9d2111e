"""`launcher check`: what it runs, in which order, and how it tells what it has found."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.check.finding import Finding
from launcher.command import check_recipe, visible_gpus
from launcher.errors import LauncherError, UsageError
from launcher.parser import Parser, recipe_index
from launcher.show import print_json, print_table

if TYPE_CHECKING:
    from launcher.check.trials import Bench, Outcome

__all__ = ["GROUPS", "WAYS", "check", "chosen", "main"]

GROUPS = ("parity", "resume", "elastic", "determinism", "ranks")
WAYS = ("accumulation", "ddp", "fsdp", "compiled", "workers", "bf16")
SLOTS = 8  # ranks at once, at most: each holds the recipe's data and model
PATIENCE = 600.0  # seconds that one run may take
# What a check decides itself for each of its runs.
OWN = (
    *("dir", "name", "resume", "save-every", "keep", "keep-every", "keep-best", "log-every", "precision", "shard"),
    *("compile", "workers", "threads", "tracker", "allow", "deterministic", "hang-after"),
)
FLAGS = {"--only": 1, "--nproc": 1, "--gpus": 1, "--seed": 1, "--keep": 1, "--json": 0, "--help": 0, "-h": 0}


def main(argv: Sequence[str]) -> int:
    """`launcher check [options] RECIPE [recipe options]`: 0 where everything holds, 1 where something does not."""
    parser = _parser()
    end = recipe_index(argv, FLAGS, "launcher check")
    options = parser.parse_args(argv[:end])
    if end == len(argv):
        raise UsageError("launcher check needs a RECIPE: the path of a Python file")
    recipe, *own = argv[end:]
    check_recipe(recipe)
    _check_options(own)
    groups, ways = chosen(options.only)
    cuda, world_size = _world(options.gpus, options.nproc)
    if world_size == 1 and options.only is not None and {*groups, *ways} <= {"parity", "ranks", "ddp", "fsdp"}:
        raise UsageError(f"--only {options.only}: that needs two processes, --nproc 2")
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    room = _room(options.keep)
    try:
        findings = check(recipe, own, room, groups, ways, cuda=cuda, world_size=world_size, seed=seed)
    except KeyboardInterrupt:
        _remove(room, options.keep)
        raise
    failed = any(one.holds is False for one in findings)
    if not failed:
        _remove(room, options.keep)
    if options.json:
        print_json(
            {"holds": not failed, "seed": seed, "runs": str(room) if room.exists() else None, "rows": _rows(findings)}
        )
    else:
        _print(findings, room)
    return int(failed)


def check(
    recipe: str,
    own: Sequence[str],
    room: Path,
    groups: Sequence[str],
    ways: Sequence[str],
    *,
    cuda: bool,
    world_size: int,
    seed: int,
) -> list[Finding]:
    """Run a recipe in all ways that are asked for.

    Args:
        recipe: the path of its file.
        own: the recipe's options.
        room: an empty directory for the runs.
        groups: of GROUPS, those to be looked at.
        ways: of WAYS, those that `parity` is to try.
        cuda: on GPUs, a process each; else on the CPU.
        world_size: the processes where there are several.
        seed: of the kills.

    Raises:
        LauncherError: it does not train in one process.
    """
    from launcher.check.trials import bench

    slots = world_size if cuda else max(world_size, min(SLOTS, len(os.sched_getaffinity(0))))
    expected = 1 + (1 + len(ways)) * ("parity" in groups) + 3 * ("resume" in groups) + ("elastic" in groups)
    expected += ("ranks" in groups) + bool({"determinism", "resume"} & set(groups))
    expected += bool({"determinism", "resume", "elastic"} & set(groups))
    with (
        bench(recipe, own, room, cuda=cuda, slots=slots, patience=PATIENCE) as runs,
        _progress(expected) as told,
    ):
        return _findings(runs, groups, ways, world_size, seed, told)


def _findings(
    runs: Bench,
    groups: Sequence[str],
    ways: Sequence[str],
    world_size: int,
    seed: int,
    told: Callable[[Outcome], None],
) -> list[Finding]:
    from launcher.check.determinism import determinism
    from launcher.check.parity import Shape, parity, reference_trial
    from launcher.check.ranks import ranks
    from launcher.check.resume import SAVING, STEPS, elastic, resume
    from launcher.check.trials import Trial

    shape = Shape(world_size)
    settings = replace(shape.settings(steps=STEPS), state=True)
    findings: list[Finding] = []
    [reference] = _each(runs.run([reference_trial(shape)]), told)
    _check_runs(reference)
    if "ranks" in groups and world_size > 1:
        trial = Trial("ranks", world_size, replace(shape.settings(), unused=True))
        findings += [row for outcome in _each(runs.run([trial]), told) for row in ranks(outcome)]
    if "parity" in groups:
        findings += parity(runs, shape, ways, reference, told)
    twice = [Trial("once", world_size, replace(settings, modules=True), SAVING)]
    if {"determinism", "resume"} & set(groups):
        twice.append(replace(twice[0], name="again"))
    found: dict[str, Outcome] = {}
    if {"determinism", "resume", "elastic"} & set(groups):
        found = {outcome.trial.name: outcome for outcome in _each(runs.run(twice), told)}
    if "determinism" in groups:
        findings.append(determinism(found["once"], found["again"]))
    if "resume" in groups:
        findings += resume(runs, found["once"], found["again"], settings, world_size, seed, told)
    if "elastic" in groups:
        findings += elastic(runs, found["once"], settings, world_size - 1 or 2, told)
    return findings


def _check_runs(reference: Outcome) -> None:
    """Refuse what does not train at all, in one process.

    Raises:
        LauncherError: with what its run has said.
    """
    if not reference.ok:
        kind = UsageError if reference.codes == (UsageError.exit_code,) else LauncherError
        raise kind(f"the recipe does not run in one process: {reference.fault} (all of it: {reference.log})")
    if not reference.trace.of("step", 0):
        raise LauncherError(
            "the recipe ends without a step: its last line is launcher.main(train), and train loops over run.steps"
        )


def _parser() -> Parser:
    parser = Parser(
        prog="launcher check",
        usage="launcher check [--only NAMES] [--nproc N | --gpus N] [--json] RECIPE [recipe options]",
        description="Prove a recipe distributed-correct: run it in a dozen ways, for a few small steps, and compare.",
        epilog="What stands after RECIPE is the recipe's own: options that make it small make the check quick.",
    )
    known = ", ".join((*GROUPS, *WAYS))
    parser.add_argument("--only", metavar="NAMES", help=f"what to check, by commas: {known}; default: all")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--nproc", type=int, metavar="N", help="CPU processes; default: 2, where there are no two GPUs")
    where.add_argument("--gpus", type=int, metavar="N", help="GPUs; default: 2, where there are as many")
    parser.add_argument("--seed", type=int, metavar="N", help="of the kills; default: another one each time")
    parser.add_argument("--keep", metavar="DIR", help="where the runs go, and stay; default: they stay if one fails")
    parser.add_argument("--json", action="store_true", help="for scripts")
    return parser


def _check_options(own: Sequence[str]) -> None:
    """Refuse options that each run of the check would set otherwise."""
    if {"--help", "-h"} & set(own):
        raise UsageError(
            "--help behind the recipe lists its options, and is not to be checked: launcher run RECIPE --help"
        )
    for word in own:
        name = word.partition("=")[0].removeprefix("--run.").removeprefix("no-").replace("_", "-")
        if word.startswith("--run.") and name in OWN:
            raise UsageError(f"{word.partition('=')[0]}: launcher check sets it for each of its runs, drop it")


def chosen(only: str | None) -> tuple[list[str], list[str]]:
    """The groups and the ways of parity that are asked for."""
    if only is None:
        return list(GROUPS), list(WAYS)
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in (*GROUPS, *WAYS):
            raise UsageError(f"--only {name}: there are {', '.join((*GROUPS, *WAYS))}")
    if not names:
        raise UsageError(f"--only names nothing: there are {', '.join((*GROUPS, *WAYS))}")
    ways = [way for way in WAYS if way in names]
    groups = [group for group in GROUPS if group in names or (group == "parity" and ways)]
    return groups, list(WAYS) if "parity" in names else ways


def _world(gpus: int | None, nproc: int | None) -> tuple[bool, int]:
    """Whether to use GPUs, and the number of processes."""
    visible = visible_gpus(os.environ)
    for name, number in (("--gpus", gpus), ("--nproc", nproc)):
        if number is not None and number < 1:
            raise UsageError(f"{name} {number}: at least 1")
    if gpus is not None and gpus > visible:
        raise UsageError(f"--gpus {gpus}: this machine shows {visible} (--nproc {gpus} runs CPU processes)")
    if gpus is not None:
        return True, gpus
    return (True, 2) if nproc is None and visible >= 2 else (False, nproc or 2)


def _room(keep: str | None) -> Path:
    if keep is None:
        return Path(tempfile.mkdtemp(prefix="launcher-check-"))
    path = Path(keep).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        used = any(path.iterdir())
    except OSError as error:
        raise UsageError(f"--keep {keep}: {error.strerror}") from None
    if used:
        raise UsageError(f"--keep {keep} is not empty: name a fresh directory")
    return path


def _remove(room: Path, keep: str | None) -> None:
    if keep is None:
        shutil.rmtree(room, ignore_errors=True)


def _each(outcomes: Iterator[Outcome], told: Callable[[Outcome], None]) -> Iterator[Outcome]:
    for outcome in outcomes:
        told(outcome)
        yield outcome


@contextmanager
def _progress(expected: int) -> Iterator[Callable[[Outcome], None]]:
    """A bar of the runs that have ended, where stderr is a terminal."""
    from tqdm import tqdm

    with tqdm(total=expected, unit="run", leave=False, disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:

        def told(outcome: Outcome) -> None:
            bar.set_postfix_str(outcome.trial.name, refresh=False)
            bar.update()

        yield told


def _rows(findings: Sequence[Finding]) -> list[dict[str, object]]:
    return [asdict(one) for one in _sorted(findings)]


def _sorted(findings: Sequence[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda one: GROUPS.index(one.group))


def _print(findings: Sequence[Finding], room: Path) -> None:
    """A table; below it what to change for each row that fails."""
    words = {True: "ok", False: "FAILS", None: "-"}
    rows = [(one.group, one.what, words[one.holds], one.told) for one in _sorted(findings)]
    print_table(["check", "what", "", "found"], rows)
    failing = [one for one in _sorted(findings) if one.holds is False]
    for advice in dict.fromkeys(one.advice for one in failing if one.advice):
        which = ", ".join(one.what for one in failing if one.advice == advice)
        print(f"\n{which}:\n  {advice}")
    print(f"\n{len(failing)} of {len(findings)} fail; the runs are in {room}" if failing else "\nall hold")
