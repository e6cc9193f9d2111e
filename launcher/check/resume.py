"""Runs that are killed at random points and started again, on as many ranks and on others."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median

from launcher import checkpoint
from launcher.check import advice
from launcher.check.finding import Finding
from launcher.check.settings import Kill, Settings
from launcher.check.trials import Bench, Outcome, Trial, partial_saves
from launcher.checkpoint.comparing import compare
from launcher.errors import CheckpointError

__all__ = ["SAVING", "STEPS", "elastic", "resume"]

STEPS = 8
EVERY = 2  # steps between saves
SAVING = ("--run.save-every", str(EVERY), "--run.keep", "100")
MOST = 1e-3  # relative: what the order of sums may change in a few losses, under any optimizer
RESTARTS = 3  # more than there are kills: a killed peer may take a start down that was not meant


def resume(
    bench: Bench, base: Outcome, settings: Settings, world_size: int, seed: int, told: Callable[[Outcome], None]
) -> list[Finding]:
    """Kill a run three times, once within a save, and compare it with one that was let be."""
    what = "killed and started again"
    if not base.ok:
        return [Finding("resume", what, False, base.fault, advice.failed(base))]
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
    rows = [_compared(what, base, outcome, f"{struck} kills, {len(torn)} of them within a save", seed)]
    if left := {name: kind for event in base.trace.of("leftovers", 0) for name, kind in event["found"].items()}:
        name, kind = next(iter(left.items()))
        rows.append(
            Finding(
                "resume",
                "what is saved",
                False,
                f"{name} ({kind}) changes as the recipe trains, and is in no checkpoint"
                + (f"; so do {', '.join(list(left)[1:])}" if len(left) > 1 else ""),
                advice.LEFTOVER,
            )
        )
    return rows


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
        return [Finding("elastic", what, False, outcome.fault, advice.failed(outcome))]
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
        Kill("microbatch", draw.uniform(0, seconds), STEPS - 2, draw.randrange(world_size)),
    ]


def _compared(what: str, base: Outcome, outcome: Outcome, how: str, seed: int) -> Finding:
    """Whether a run that was killed has become, bit for bit, what it would have been."""
    if not outcome.ok:
        return Finding("resume", what, False, f"it never finishes: {outcome.fault}", _log(outcome, seed))
    before, after = base.trace.batches(), outcome.trace.batches()
    for key, batch in before.items():
        if key not in after or after[key].digest != batch.digest:
            loader, step, number = key
            told = f"step {step + 1}, micro-batch {number} of {loader!r} holds other data after a resume"
            return Finding("resume", what, False, told, advice.DATA_DRAWN)
    rates = _rates(base), _rates(outcome)
    if rates[0] != rates[1]:
        step = next(step for step in rates[0] if rates[0][step] != rates[1].get(step))
        told = f"step {step + 1}: the learning rate is {rates[1].get(step)} after a resume, and was {rates[0][step]}"
        return Finding("resume", what, False, told, advice.LR)
    lines, others = base.metrics(), outcome.metrics()
    for step, line in lines.items():
        for name, value in line.items():
            if repr(others.get(step, {}).get(name)) != repr(value):
                told = f"{name} after {step} steps is {others.get(step, {}).get(name)}, and was {value}"
                return Finding("resume", what, False, told, advice.LOGGED if name != "loss" else advice.LATER)
    try:
        tensors = _different(base.rundir, outcome.rundir)
    except CheckpointError as error:
        return Finding("resume", what, False, str(error), _log(outcome, seed))
    if tensors:
        return Finding("resume", what, False, f"{tensors[0]} ends with other values", advice.LATER)
    return Finding("resume", what, True, f"{how}: weights, moments, losses and samples are the same bits")


def _different(a: Path, b: Path) -> Sequence[str]:
    """The tensors and values that differ in the last checkpoints of two runs."""
    first, second = (checkpoint.Store(rundir / "checkpoints").newest() for rundir in (a, b))
    if first is None or second is None:
        raise CheckpointError(f"{a if first is None else b} has no checkpoint")
    found = compare(first, second)
    return [one.name for one in found.tensors] + [name for name, *_ in found.facts if name.startswith("values.")]


def _rates(outcome: Outcome) -> dict[int, list[list[float | None]]]:
    return {event["step"]: event["lr"] for event in outcome.trace.of("step", 0)}


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
