"""The same training in other ways: more processes, accumulation, sharding, compiled, workers, bf16.

What is compared are the gradients of the first step, a parameter at a time, and the losses after it, under plain
gradient descent without clipping: clipping and adaptive optimizers hide a gradient's scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from launcher.check import advice
from launcher.check.finding import Finding
from launcher.check.gradients import (
    ASSUMED,
    Gradients,
    Measure,
    distances,
    gradients_of,
    losses_of,
    measure,
    multiple,
    relative,
)
from launcher.check.settings import Settings
from launcher.check.trials import Bench, Outcome, Trial

__all__ = ["WAYS", "Shape", "parity", "reference_trial"]

STEPS = 3
SHARDED = ("--run.shard", "full")
ONE = "1 process, 1 micro-batch"
WAYS = ("accumulation", "ddp", "fsdp", "compiled", "workers", "bf16")


@dataclass(frozen=True)
class Shape:
    """The sizes of the check's runs: uneven by intent, or errors of normalisation would hide."""

    world_size: int

    @property
    def microbatch_size(self) -> int:
        """Samples a micro-batch; the last of a step has one less."""
        return 3

    @property
    def microbatches(self) -> int:
        """A step's; one more than ranks, so that one rank has more of them than the others."""
        return self.world_size + 1

    @property
    def batch_size(self) -> int:
        """Samples a step."""
        return self.microbatches * self.microbatch_size - 1

    def settings(self, *, whole: bool = False, steps: int = STEPS) -> Settings:
        """Of a run of `steps`; `whole`: each step in one micro-batch."""
        even = 4 * self.world_size
        return Settings(
            out="",
            steps=steps,
            batch_size=self.batch_size,
            microbatch_size=self.batch_size if whole else self.microbatch_size,
            even=(even, even if whole else 2),
        )


def reference_trial(shape: Shape) -> Trial:
    """One process, each step in one micro-batch: what the other ways are held against."""
    return Trial("reference", 1, replace(shape.settings(whole=True), descent=True))


def parity(
    bench: Bench, shape: Shape, ways: Sequence[str], reference: Outcome, told: Callable[[Outcome], None]
) -> list[Finding]:
    """The rows of a table; `told` hears of every run that has ended."""
    if unusable := _unusable(reference):
        return [unusable]
    descent = reference.trial.settings
    streamed = None in reference.trace.loaders().values()
    drawn = any(event["drawn"] for event in reference.trace.of("loss"))
    rates = tuple((event["optimizer"], event["rate"]) for event in reference.trace.of("rate", 0))
    descent = replace(descent, rates=rates)
    small = replace(descent, microbatch_size=shape.microbatch_size, even=shape.settings().even)
    trials = {
        "float64": Trial("float64", 1, replace(descent, double=True)),
        "accumulation": Trial("accumulation", 1, small),
        "ddp": Trial("ddp", shape.world_size, small),
        # micro-batches of another size, so that the last of each rank is one that counts
        "fsdp": Trial("fsdp", shape.world_size, small if drawn else replace(small, microbatch_size=2), SHARDED),
        "workers": Trial("workers", 1, small, ("--run.workers", "1" if streamed else "2")),
        "bf16": Trial("bf16", 1, descent, ("--run.precision", "bf16")),
        "compiled": Trial("compiled", 1, descent, ("--run.compile", "default")),
    }
    wanted = {"float64", *ways} | ({"accumulation"} if {"ddp", "fsdp", "workers"} & set(ways) else set())
    if shape.world_size == 1:
        wanted -= {"ddp", "fsdp"}
    found: dict[str, Outcome] = {}
    for outcome in bench.run([trial for name, trial in trials.items() if name in wanted]):
        told(outcome)
        found[outcome.trial.name] = outcome
    measured = measure(reference, found["float64"])
    rows = [_reference(measured, found["float64"])]
    for way in WAYS:
        if way in ways and way in found:
            rows.append(_compared(way, found, reference, measured, shape))
    return rows


def _compared(way: str, found: Mapping[str, Outcome], reference: Outcome, exact: Measure, shape: Shape) -> Finding:
    """The row of one way, beside the reference; beside the same micro-batches where the model draws, and of workers."""
    outcome, parts = found[way], found.get("accumulation")
    drawn = any(event["drawn"] for event in reference.trace.of("loss"))
    loaders = reference.trace.loaders()
    if way == "accumulation" and drawn and outcome.ok:
        return _drawn(outcome, reference, shape)
    if outcome.trial.world_size > 1 and outcome.ok and (not loaders or None in loaders.values()):
        why = "a stream's ranks read other samples" if loaders else "each rank makes its own data"
        return Finding("parity", _called(way, shape), None, f"it trains; not compared: {why}")
    whole = outcome.trial.settings.microbatch_size == shape.batch_size
    if not whole and parts is not None and parts.ok:
        if drawn or way == "workers":
            exact = replace(exact, gradients=gradients_of(parts), losses=losses_of(parts))
        alike = parts.trial.settings.microbatch_size == outcome.trial.settings.microbatch_size
        return _row(way, outcome, reference, parts if alike else None, exact, shape)
    return _row(way, outcome, reference, reference if whole else None, exact, shape)


def _drawn(outcome: Outcome, reference: Outcome, shape: Shape) -> Finding:
    """Draws differ between micro-batches of other sizes, and gradients with them; a mean shows in the losses still."""
    totals = [
        sum(event["loss"] for event in one.trace.of("loss", 0) if not event["step"]) for one in (outcome, reference)
    ]
    what, ratio = _called("accumulation", shape), totals[0] / (totals[1] or math.nan)
    if advice.is_mean(ratio, shape.microbatches):
        told = f"the losses of the first step sum to {ratio:.2f} of the reference's"
        return Finding("parity", what, False, told, f"about {shape.microbatches} = its micro-batches: {advice.MEAN}")
    told = "only losses are compared: the forward pass draws, beside dropout, and otherwise for other micro-batches"
    return Finding("parity", what, None, f"{told} ({ratio:.2f} of the reference's)")


def _unusable(reference: Outcome) -> Finding | None:
    """What makes the reference none."""
    gradients = gradients_of(reference)
    if not any(np.any(one) for one in gradients.values()):
        return Finding("parity", ONE, False, "no parameter has a gradient at optimizer.step", advice.NO_GRADIENT)
    if not np.isfinite([*losses_of(reference), *(np.abs(one).sum() for one in gradients.values())]).all():
        return Finding("parity", ONE, False, "the loss or a gradient is not finite in float32", advice.NOT_FINITE)
    return None


def _reference(exact: Measure, double: Outcome) -> Finding:
    if exact.measured:
        most = max(exact.noise.values())
        return Finding("parity", ONE, True, f"the reference; float32 is within {most:.0e} of float64")
    why = "it does not run in float64" if not double.ok else "float64 gives something else"
    return Finding("parity", ONE, True, f"the reference ({why}: a tolerance of {ASSUMED:.0e} is assumed)")


def _called(way: str, shape: Shape) -> str:
    return {
        "accumulation": f"{shape.microbatches} uneven micro-batches",
        "ddp": f"{shape.world_size} processes (DDP)",
        "fsdp": f"{shape.world_size} processes (FSDP2)",
        "compiled": "compiled",
        "workers": "2 data workers",
        "bf16": "bf16",
    }[way]


def _row(way: str, outcome: Outcome, reference: Outcome, like: Outcome | None, exact: Measure, shape: Shape) -> Finding:
    """The row of one way; `like` has read the same micro-batches, if one has."""
    what = _called(way, shape)
    if not outcome.ok:
        refused = way == "bf16" or (way == "fsdp" and "FSDP" in outcome.fault)  # what torch cannot do is no mistake
        holds = None if refused else False
        return Finding("parity", what, holds, outcome.fault, advice.failed(outcome))
    fault = _other_start(outcome, reference) or _other_data(outcome, like) or _other_groups(outcome, reference)
    if fault is not None and way != "bf16":
        return Finding("parity", what, False, *fault)
    found = gradients_of(outcome)
    far = distances(found, exact.gradients)
    worst = max(far, key=lambda name: far[name] / exact.tolerance(name), default="")
    losses = losses_of(outcome)
    apart = [relative(a, b) for a, b in zip(losses, exact.losses, strict=False)]
    if way == "bf16":
        most, loss = max(far.values(), default=0), max(apart, default=0)
        told = f"gradients within {most:.1%} of float32's, losses within {loss:.0e}"
        return Finding("parity", what, None, told)
    if outcome.trace.of("dropped"):
        step = outcome.trace.of("dropped")[0]["step"]
        told = f"step {step}: the gradients of earlier micro-batches are gone before the last one"
        return Finding("parity", what, False, told, advice.DROPPED)
    if missing := sorted(exact.gradients.keys() - found.keys()):
        told = f"{_some(missing)} has no gradient here, and has one in the reference"
        return Finding("parity", what, False, told, advice.NO_GRADIENT)
    off = [name for name in exact.gradients if not far[name] <= exact.tolerance(name)]
    if off:
        return _diverged(what, off, found, exact, outcome, shape)
    late = [step for step, distance in enumerate(apart) if not distance <= exact.loss_tolerance(step)]
    if late or len(losses) != len(exact.losses):
        step = late[0] if late else len(apart)
        told = f"gradients agree, the loss of step {step + 1} differs by {max(apart, default=0):.1e}"
        return Finding("parity", what, False, told, advice.LATER)
    return Finding(
        "parity", what, True, f"gradients within {far[worst]:.0e}, losses within {max(apart, default=0):.0e}"
    )


def _diverged(
    what: str, off: Sequence[str], found: Gradients, exact: Measure, outcome: Outcome, shape: Shape
) -> Finding:
    """Name the first parameter whose gradient is another one, and what its ratio means."""
    first = off[0]
    ratio, rest = multiple({first: found[first]}, {first: exact.gradients[first]})
    everything = multiple(found, exact.gradients)
    of = f"{len(off)} of {len(exact.gradients)} gradients differ, first {first}"
    digits = 3 if abs(ratio - 1) > 0.01 else 6
    told = f"{of}: {ratio:.{digits}f} of the reference, and {rest:.1%} that is no multiple of it"
    step = -(-shape.batch_size // outcome.trial.settings.microbatch_size)
    return Finding(
        "parity", what, False, told, advice.of_ratio(*everything, step, outcome.trial.world_size, outcome.trace)
    )


def _other_start(outcome: Outcome, reference: Outcome) -> tuple[str, str] | None:
    """What is wrong with the initial weights, if something is."""
    first = reference.trace.weights()
    for rank in outcome.trace.events:
        built = outcome.trace.weights(rank)
        other = [name for name in first if built.get(name) != first[name]]
        if other:
            return f"{other[0]} begins with other values on rank {rank} than in 1 process", advice.INIT
    return None


def _other_groups(outcome: Outcome, reference: Outcome) -> tuple[str, str] | None:
    """Which number the optimizers were given that is another one in one process, if one is."""
    mine, theirs = outcome.trace.groups(), reference.trace.groups()
    for step, optimizers in theirs.items():
        for number, groups in enumerate(optimizers):
            for group, there in enumerate(groups):
                here = mine[step][number][group] if step in mine else there
                if other := [key for key in there if here.get(key) != there[key]]:
                    told = (
                        f"step {step + 1}: {other[0]} is {here.get(other[0])}, and {there[other[0]]} in the reference"
                    )
                    return told, advice.WORLD if outcome.trial.world_size > 1 else advice.LR
    return None


def _other_data(outcome: Outcome, like: Outcome | None) -> tuple[str, str] | None:
    """Which micro-batch of a run is not that of another one of the same size, if one is not."""
    if like is None:
        return None
    sizes, others = outcome.trace.loaders(), like.trace.loaders()
    mine, theirs = outcome.trace.batches(), like.trace.batches()
    for name, size in others.items():
        if sizes.get(name) != size:
            told = f"{name!r} has {sizes.get(name)} samples on rank 0 of {outcome.trial.world_size}, and {size} alone"
            return told, advice.DATA_BY_RANK
    for key in theirs:
        loader, step, number = key
        if key not in mine:
            return f"step {step + 1}: micro-batch {number} of {loader!r} is not read", advice.DATA_BY_RANK
        if mine[key].digest != theirs[key].digest and loader != "split":
            told = f"step {step + 1}, micro-batch {number} of {loader!r} holds other data on rank {mine[key].rank}"
            return told, advice.of_data(outcome)
    return None


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
