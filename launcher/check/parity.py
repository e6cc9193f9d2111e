"""The same training in other ways: more processes, accumulation, sharding, compiled, workers, bf16.

What is compared are the gradients of the first step, a parameter at a time, and the losses after it, under plain
gradient descent without clipping: clipping and adaptive optimizers hide a gradient's scale. How far they may differ
follows from a float64 reference: what float32 itself loses, times a margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from launcher.check import advice
from launcher.check.finding import Finding
from launcher.check.settings import Settings
from launcher.check.trials import Bench, Outcome, Trial

__all__ = ["WAYS", "Shape", "parity", "reference_trial"]

STEPS = 3
MARGIN = 32.0  # times what float32 itself loses; orders of summation differ
LEAST = 1e-5  # relative: below it nothing is told apart
MOST = 1e-2  # a reference that differs by more is no reference
SMALL = 1e-6  # of the norm of all gradients: a parameter's gradient below it is compared with that
ONE = "1 process, 1 micro-batch"
WAYS = ("accumulation", "ddp", "fsdp", "compiled", "workers", "bf16")

Gradients = dict[str, npt.NDArray[np.floating]]


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


@dataclass(frozen=True)
class Measure:
    """How far a run's numbers are from the reference's, and how far they may be."""

    gradients: Gradients
    losses: list[float]
    noise: dict[str, float]
    """What float32 loses of each gradient, relative."""
    loss_noise: list[float]
    measured: bool
    """Whether the noise was; else it is assumed."""

    def tolerance(self, name: str) -> float:
        """Of a gradient, relative."""
        return max(LEAST, MARGIN * self.noise.get(name, 0.0))

    def loss_tolerance(self, step: int) -> float:
        """Of a step's loss, relative."""
        return max(LEAST, MARGIN * self.loss_noise[step])


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
    descent = replace(descent, rates=tuple(event["rate"] for event in reference.trace.of("rate", 0)))
    small = replace(descent, microbatch_size=shape.microbatch_size, even=shape.settings().even)
    trials = {
        "float64": Trial("float64", 1, replace(descent, double=True)),
        "accumulation": Trial("accumulation", 1, small),
        "ddp": Trial("ddp", shape.world_size, small),
        "fsdp": Trial("fsdp", shape.world_size, small, ("--run.shard", "full")),
        "workers": Trial("workers", 1, small, ("--run.workers", "1" if streamed else "2")),
        "bf16": Trial("bf16", 1, descent, ("--run.precision", "bf16")),
        "compiled": Trial("compiled", 1, descent, ("--run.compile", "default")),
    }
    wanted = {"float64", *ways} | ({"accumulation"} if "workers" in ways or "ddp" in ways else set())
    if shape.world_size == 1:
        wanted -= {"ddp", "fsdp"}
    found: dict[str, Outcome] = {}
    for outcome in bench.run([trial for name, trial in trials.items() if name in wanted]):
        told(outcome)
        found[outcome.trial.name] = outcome
    measure = _measure(reference, found["float64"])
    rows = [_reference(measure, found["float64"])]
    for way in WAYS:
        if way in ways and way in found:
            rows.append(_compared(way, found, reference, measure, shape))
    return rows


def _compared(way: str, found: Mapping[str, Outcome], reference: Outcome, measure: Measure, shape: Shape) -> Finding:
    """The row of one way, beside the reference, or, where the model draws, beside the same micro-batches."""
    drawn = any(event["drawn"] for event in reference.trace.of("loss"))
    loaders = reference.trace.loaders()
    small = found[way].trial.settings.microbatch_size < shape.batch_size
    parts = found.get("accumulation")
    if way == "accumulation" and drawn and found[way].ok:
        told = "not compared: the forward pass draws (beside dropout), and draws otherwise for other micro-batches"
        return Finding("parity", _called(way, shape), None, told)
    if found[way].trial.world_size > 1 and found[way].ok and (not loaders or None in loaders.values()):
        why = "a stream's ranks read other samples" if loaders else "each rank makes its own data"
        return Finding("parity", _called(way, shape), None, f"it trains; not compared: {why}")
    if small and parts is not None and parts.ok:
        if drawn:
            measure = replace(measure, gradients=_gradients(parts), losses=_losses(parts))
        return _row(way, found[way], reference, parts, measure, shape)
    return _row(way, found[way], reference, reference, measure, shape)


def _measure(reference: Outcome, double: Outcome) -> Measure:
    """The reference in float64, or, where the recipe does not run in it, in float32 with an assumed tolerance."""
    gradients, losses = _gradients(reference), _losses(reference)
    noise: dict[str, float] = {}
    loss_noise = [LEAST] * len(losses)
    exact, exact_losses = (_gradients(double), _losses(double)) if double.ok else ({}, [])
    if exact.keys() == gradients.keys() and len(exact_losses) == len(losses):
        noise = _distances(gradients, exact)
        loss_noise = [_relative(a, b) for a, b in zip(losses, exact_losses, strict=True)]
        if max([*noise.values(), *loss_noise], default=math.nan) < MOST / MARGIN:
            return Measure(exact, exact_losses, noise, loss_noise, True)
    return Measure(gradients, losses, dict.fromkeys(gradients, LEAST), [LEAST] * len(losses), False)


def _unusable(reference: Outcome) -> Finding | None:
    """What makes the reference none."""
    gradients = _gradients(reference)
    if not any(np.any(one) for one in gradients.values()):
        return Finding("parity", ONE, False, "no parameter has a gradient at optimizer.step", advice.NO_GRADIENT)
    if not np.isfinite([*_losses(reference), *(np.abs(one).sum() for one in gradients.values())]).all():
        return Finding("parity", ONE, False, "the loss or a gradient is not finite in float32", advice.NOT_FINITE)
    return None


def _reference(measure: Measure, double: Outcome) -> Finding:
    if measure.measured:
        most = max(measure.noise.values())
        return Finding("parity", ONE, True, f"the reference; float32 is within {most:.0e} of float64")
    why = "it does not run in float64" if not double.ok else "float64 gives something else"
    return Finding("parity", ONE, True, f"the reference ({why}: a tolerance of {LEAST * MARGIN:.0e} is assumed)")


def _called(way: str, shape: Shape) -> str:
    return {
        "accumulation": f"{shape.microbatches} uneven micro-batches",
        "ddp": f"{shape.world_size} processes (DDP)",
        "fsdp": f"{shape.world_size} processes (FSDP2)",
        "compiled": "compiled",
        "workers": "2 data workers",
        "bf16": "bf16",
    }[way]


def _row(way: str, outcome: Outcome, reference: Outcome, like: Outcome, measure: Measure, shape: Shape) -> Finding:
    """The row of one way; `like` has read the same micro-batches."""
    what = _called(way, shape)
    if not outcome.ok:
        holds = None if way == "bf16" else False
        return Finding("parity", what, holds, outcome.fault, advice.failed(outcome))
    fault = _other_start(outcome, reference) or _other_data(outcome, like)
    if fault is not None and way != "bf16":
        return Finding("parity", what, False, *fault)
    found = _gradients(outcome)
    distances = _distances(found, measure.gradients)
    worst = max(distances, key=lambda name: distances[name] / measure.tolerance(name), default="")
    losses = _losses(outcome)
    apart = [_relative(a, b) for a, b in zip(losses, measure.losses, strict=False)]
    if way == "bf16":
        most, loss = max(distances.values(), default=0), max(apart, default=0)
        told = f"gradients within {most:.1%} of float32's, losses within {loss:.0e}"
        return Finding("parity", what, None, told)
    if outcome.trace.of("dropped"):
        step = outcome.trace.of("dropped")[0]["step"]
        told = f"step {step}: the gradients of earlier micro-batches are gone before the last one"
        return Finding("parity", what, False, told, advice.DROPPED)
    if missing := sorted(measure.gradients.keys() - found.keys()):
        told = f"{_some(missing)} has no gradient here, and has one in the reference"
        return Finding("parity", what, False, told, advice.NO_GRADIENT)
    off = [name for name in measure.gradients if not distances[name] <= measure.tolerance(name)]
    if off:
        return _diverged(what, off, found, measure, outcome, shape)
    late = [step for step, distance in enumerate(apart) if not distance <= measure.loss_tolerance(step)]
    if late or len(losses) != len(measure.losses):
        step = late[0] if late else len(apart)
        told = f"gradients agree, the loss of step {step + 1} differs by {max(apart, default=0):.1e}"
        return Finding("parity", what, False, told, advice.LATER)
    return Finding("parity", what, True, f"gradients within {distances[worst]:.0e}, losses within {max(apart):.0e}")


def _diverged(
    what: str, off: Sequence[str], found: Gradients, measure: Measure, outcome: Outcome, shape: Shape
) -> Finding:
    """Name the first parameter whose gradient is another one, and what its ratio means."""
    first = off[0]
    ratio, rest = _ratio(found[first], measure.gradients[first])
    everything = _ratio(_joined(found, measure.gradients), _joined(measure.gradients, measure.gradients))
    of = f"{len(off)} of {len(measure.gradients)} gradients differ, first {first}"
    told = f"{of}: {ratio:.3f} of the reference" + (f", and {rest:.0%} that is no multiple" if rest > 1e-3 else "")
    step = shape.microbatches if outcome.trial.settings.microbatch_size == shape.microbatch_size else 1
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


def _other_data(outcome: Outcome, like: Outcome) -> tuple[str, str] | None:
    """Which micro-batch of a run is not that of another one of the same size, if one is not."""
    sizes, others = outcome.trace.loaders(), like.trace.loaders()
    mine, theirs = outcome.trace.batches(), like.trace.batches()
    for name, size in others.items():
        if sizes.get(name) != size:
            told = f"{name!r} has {sizes.get(name)} samples on rank 0 of {outcome.trial.world_size}, and {size} alone"
            return told, advice.DATA_BY_RANK
    for key in theirs:
        if key in mine and mine[key].digest != theirs[key].digest and key[0] != "split":
            loader, step, number = key
            told = f"step {step + 1}, micro-batch {number} of {loader!r} holds other data on rank {mine[key].rank}"
            return told, advice.of_data(outcome)
    return None


def _gradients(outcome: Outcome) -> Gradients:
    """Every gradient of the first step, in the order of the parameters."""
    gradients: Gradients = {}
    for path in sorted(Path(outcome.log.parent).glob("gradients-*.safetensors")):
        with safe_open(path, framework="np") as file:
            gradients |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    order = {name: k for k, name in enumerate(outcome.trace.weights())}
    return dict(sorted(gradients.items(), key=lambda item: order.get(item[0], len(order))))


def _losses(outcome: Outcome) -> list[float]:
    return [line["loss"] for step, line in outcome.metrics().items() if "loss" in line and step]


def _distances(found: Gradients, exact: Gradients) -> dict[str, float]:
    """How far each gradient is from the exact one, relative to its norm, or to a part of that of all of them."""
    norms = {name: float(np.linalg.norm(one.astype(np.float64))) for name, one in exact.items()}
    least = SMALL * float(np.linalg.norm(list(norms.values()))) or 1.0
    return {
        name: float(np.linalg.norm(found[name].astype(np.float64) - one)) / max(norms[name], least)
        if name in found
        else float("inf")
        for name, one in exact.items()
    }


def _ratio(found: npt.NDArray[np.floating], exact: npt.NDArray[np.floating]) -> tuple[float, float]:
    """The multiple of `exact` that is nearest to `found`, and the part of `found` that is not in it."""
    a, b = found.astype(np.float64).ravel(), exact.astype(np.float64).ravel()
    square = float(b @ b)
    ratio = float(a @ b) / square if square else 0.0
    norm = float(np.linalg.norm(a))
    return ratio, float(np.linalg.norm(a - ratio * b)) / norm if norm else 0.0


def _joined(gradients: Gradients, like: Gradients) -> npt.NDArray[np.floating]:
    return np.concatenate([gradients[name].astype(np.float64).ravel() for name in like if name in gradients])


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-12)


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
