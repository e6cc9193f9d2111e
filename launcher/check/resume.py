"""Runs that are killed at random points and started again, on as many ranks and on others."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from launcher import checkpoint
from launcher.check import advice
from launcher.check.finding import Finding
from launcher.check.settings import Kill, Settings
from launcher.check.trials import Bench, Outcome, Trial, partial_saves
from launcher.checkpoint.comparing import compare
from launcher.errors import CheckpointError, UsageError

__all__ = ["SAVING", "STEPS", "elastic", "resume"]

WHAT = "killed and started again"
STEPS = 8
EVERY = 2  # steps between saves
SAVING = ("--run.save-every", str(EVERY), "--run.keep", "100")
MOST = 1e-3  # relative: what the order of sums may change in a few losses, under any optimizer
RESTARTS = 3  # more than there are kills: a killed peer may take a start down that was not meant


def resume(
    bench: Bench,
    base: Outcome,
    again: Outcome,
    settings: Settings,
    world_size: int,
    seed: int,
    told: Callable[[Outcome], None],
) -> list[Finding]:
    """Kill a run three times, once within a save, and compare it with one that was let be.

    `again` is `base` once more: what differs between these two (a time) is not for a resume to restore.
    """
    what = WHAT
    for one in (base, again):
        if not one.ok:
            return [Finding("resume", what, False, one.fault, advice.failed(one))]
    rundir = str(bench.room / "killed" / "run")
    kills = _kills(base, world_size, random.Random(seed))
    struck, torn = 0, set[str]()
    for kill in [*kills, *[None] * RESTARTS]:
        trial = Trial("killed", world_size, replace(settings, kill=kill), SAVING, rundir)
        [outcome] = list(bench.run([trial]))
        if kill is not None:
            told(outcome)
        if outcome.ok:
            break
        if -9 not in outcome.codes:
            return [Finding("resume", what, False, f"a start after a kill fails: {outcome.fault}", _log(outcome, seed))]
        struck += 1
        torn |= set(partial_saves(Path(rundir)))
    if not struck:
        return [Finding("resume", what, None, "not looked at: the recipe ends before a kill comes")]
    went_on = [event["start"] for event in outcome.trace.of("steps", 0) if event["start"]]
    if outcome.ok and not went_on:
        why = f"{struck} kills, and no start went on from a checkpoint: nothing is proved"
        return [Finding("resume", what, False, why, _log(outcome, seed))]
    how = (
        f"{struck} kills, {len(torn)} within a save, {len(went_on)} start{'s' * (len(went_on) != 1)} from a checkpoint"
    )
    return [_compared(base, again, outcome, how, seed), _held(base, again, outcome)]


def _held(base: Outcome, again: Outcome, outcome: Outcome) -> Finding:
    """What the recipe holds in its own variables in the end, after resumes and without."""
    what = "what the recipe holds"
    first, second, third = (
        {event["step"]: event["found"] for event in one.trace.of("held", 0)} for one in (base, again, outcome)
    )
    last = max(first, default=0)  # what is set anew in every step is right by then, and what adds up is not
    mine, twin, there = (found.get(last, {}) for found in (first, second, third))
    lost = {name: one[0] for name, one in mine.items() if twin.get(name) == one != there.get(name, one)}
    if not lost:
        return Finding("resume", what, True, f"{len(mine)} variables are in the end what they were without")
    name, kind = next(iter(lost.items()))
    more = f"; nor are {', '.join(list(lost)[1:])}" if len(lost) > 1 else ""
    told = f"{name} ({kind}) is not what it was, after a resume{more}"
    return Finding("resume", what, False, told, advice.LEFTOVER)


def elastic(
    bench: Bench, base: Outcome, settings: Settings, other: int, told: Callable[[Outcome], None]
) -> list[Finding]:
    """Go on from a checkpoint of the base run on another number of ranks: the same samples a step."""
    what = f"{len(base.codes)} processes, then {other}"
    loaders = base.trace.loaders()
    if not loaders or None in loaders.values():
        why = "a stream's order depends on the ranks" if loaders else "each rank makes its own data"
        return [Finding("elastic", what, None, f"not compared: {why}")]
    path = checkpoint.Store(base.rundir / "checkpoints").path(EVERY)
    if not base.ok:
        return [Finding("elastic", what, False, base.fault, advice.failed(base))]
    [outcome] = list(bench.run([Trial("elastic", other, settings, (*SAVING, "--run.resume", str(path)))]))
    told(outcome)
    if not outcome.ok:
        refused = UsageError.exit_code in outcome.codes  # BatchNorm, or state that each rank has of its own
        return [Finding("elastic", what, None if refused else False, outcome.fault, advice.failed(outcome))]
    before, after = base.trace.batches(), outcome.trace.batches()
    for key, batch in before.items():
        loader, step, number = key
        if step >= EVERY and loader != "split":
            there = after.get(key)
            if there is None or (there.ids, there.digest) != (batch.ids, batch.digest):
                told_ = f"step {step + 1}, micro-batch {number} of {loader!r} holds other data than before"
                return [Finding("elastic", what, False, told_, advice.of_data(outcome))]
    apart = _losses_apart(base, outcome)
    if not apart <= MOST:
        told_ = f"the same samples in every step, and losses that differ by {apart:.0e}"
        return [Finding("elastic", what, False, told_, advice.LATER)]
    return [Finding("elastic", what, True, f"the same samples in every step; losses within {apart:.0e}")]


def _kills(base: Outcome, world_size: int, draw: random.Random) -> list[Kill]:
    """Three kills: within a step, within a save, and of one rank alone."""
    seconds = median([event["seconds"] for event in base.trace.of("step", 0)])
    save = 0.02
    with suppress(OSError, ValueError):
        save = json.loads((base.rundir / "run.json").read_text()).get("save_seconds") or save
    return [
        Kill(draw.choice(("microbatch", "edge")), draw.uniform(0, seconds), draw.choice((1, 2, 3))),
        Kill("save", draw.uniform(0, save / 2)),
        Kill("microbatch", draw.uniform(0, seconds), STEPS - 2, draw.randrange(world_size), saved=True),
    ]


def _compared(base: Outcome, again: Outcome, outcome: Outcome, how: str, seed: int) -> Finding:
    """Whether a run that was killed has become, bit for bit, what it would have been."""
    if not outcome.ok:
        return Finding("resume", WHAT, False, f"it never finishes: {outcome.fault}", _log(outcome, seed))
    before, after = base.trace.batches(), outcome.trace.batches()
    for key, batch in before.items():
        if key not in after or after[key].digest != batch.digest:
            loader, step, number = key
            told = f"step {step + 1}, micro-batch {number} of {loader!r} holds other data after a resume"
            return Finding("resume", WHAT, False, told, advice.DATA_DRAWN)
    groups, others = base.trace.groups(), outcome.trace.groups()
    if len(groups) != len(others):
        told = f"it makes {len(others)} steps with resumes, and {len(groups)} without"
        return Finding("resume", WHAT, False, told, advice.RESUMED)
    for step, given in groups.items():
        if others.get(step) != given and again.trace.groups().get(step) == given:
            told = (
                f"step {step + 1}: the optimizer is given {_rate(others.get(step))} after a resume, not {_rate(given)}"
            )
            return Finding("resume", WHAT, False, told, advice.LR)
    lines, repeated, resumed = base.metrics(), again.metrics(), outcome.metrics()
    for step, line in lines.items():
        for name, value in line.items():
            there = resumed.get(step, {}).get(name)
            if repr(there) != repr(value) and repr(repeated.get(step, {}).get(name)) == repr(value):
                told = f"{name} after {step} steps is {there}, and was {value}"
                return Finding("resume", WHAT, False, told, advice.LOGGED if name != "loss" else advice.RESUMED)
    try:
        tensors = _different(base.rundir, outcome.rundir)
    except CheckpointError as error:
        return Finding("resume", WHAT, False, str(error), _log(outcome, seed))
    if tensors:
        return Finding("resume", WHAT, False, f"{tensors[0]} ends with other values", advice.RESUMED)
    return Finding("resume", WHAT, True, f"{how}: weights, moments, losses and samples are the same bits")


def _rate(groups: Any) -> str:
    """The first number of the first group of parameters: mostly the learning rate."""
    group: dict[str, float] = next((group for optimizer in groups or () for group in optimizer), {})
    return ", ".join(f"{key} {value}" for key, value in list(group.items())[:1]) or "nothing"


def _different(a: Path, b: Path) -> Sequence[str]:
    """The tensors and values that differ in the last checkpoints of two runs."""
    first, second = (checkpoint.Store(rundir / "checkpoints").newest() for rundir in (a, b))
    if first is None or second is None:
        raise CheckpointError(f"{a if first is None else b} has no checkpoint")
    found = compare(first, second)
    return [one.name for one in found.tensors] + [name for name, *_ in found.facts if name.startswith("values.")]


def _losses_apart(base: Outcome, outcome: Outcome) -> float:
    """The largest relative difference of the losses that both have."""
    lines, others = base.metrics(), outcome.metrics()
    pairs = [
        (line["loss"], others[step]["loss"])
        for step, line in lines.items()
        if "loss" in line and "loss" in others.get(step, {})
    ]
    return max((abs(a - b) / max(abs(a), 1e-12) for a, b in pairs), default=0.0)


def _log(outcome: Outcome, seed: int) -> str:
    return f"{advice.failed(outcome)} (the same kills again: --seed {seed})"
