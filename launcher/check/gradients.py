"""What two runs are compared by: the gradients of their first step, and their losses.

How far they may differ follows from a float64 reference: what float32 itself loses, times a margin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from launcher.check.trials import Outcome

__all__ = [
    "ASSUMED",
    "Gradients",
    "Measure",
    "distances",
    "gradients_of",
    "losses_of",
    "measure",
    "multiple",
    "relative",
]

MARGIN = 32.0  # times what float32 itself loses; orders of summation differ
LEAST = 1e-5  # relative, of float32
MOST = 1e-2  # a reference that differs by more is no reference
SMALL = 1e-6  # of the norm of all gradients: a parameter's gradient below it is compared with that
ASSUMED = LEAST * MARGIN
"""The tolerance where what float32 loses could not be measured."""

Gradients = dict[str, npt.NDArray[np.floating]]


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
    least: float
    """Relative: below it nothing is told apart."""

    def tolerance(self, name: str) -> float:
        """Of a gradient, relative."""
        return max(self.least, MARGIN * self.noise.get(name, 0.0))

    def loss_tolerance(self, step: int) -> float:
        """Of a step's loss, relative."""
        return max(self.least, MARGIN * self.loss_noise[step])


def measure(reference: Outcome, double: Outcome) -> Measure:
    """The reference in float64, or, where the recipe does not run in it, in float32 with an assumed tolerance."""
    gradients, losses = gradients_of(reference), losses_of(reference)
    eps = max((event["eps"] for event in reference.trace.of("build", 0)), default=0.0)
    least = max(LEAST, 4 * eps)  # of weights in half precision much more is rounded away
    noise: dict[str, float] = {}
    loss_noise = [LEAST] * len(losses)
    exact, exact_losses = (gradients_of(double), losses_of(double)) if double.ok else ({}, [])
    if exact.keys() == gradients.keys() and len(exact_losses) == len(losses):
        noise = distances(gradients, exact)
        loss_noise = [relative(a, b) for a, b in zip(losses, exact_losses, strict=True)]
        if max([*noise.values(), *loss_noise], default=math.nan) < MOST / MARGIN:
            return Measure(exact, exact_losses, noise, loss_noise, True, least)
    return Measure(gradients, losses, dict.fromkeys(gradients, LEAST), [LEAST] * len(losses), False, least)


def gradients_of(outcome: Outcome) -> Gradients:
    """Every gradient of the first step, in the order of the parameters."""
    gradients: Gradients = {}
    for path in sorted(outcome.out.glob("gradients-*.safetensors")):
        with safe_open(path, framework="np") as file:
            gradients |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    order = {name: k for k, name in enumerate(outcome.trace.weights())}
    return dict(sorted(gradients.items(), key=lambda item: order.get(item[0], len(order))))


def losses_of(outcome: Outcome) -> list[float]:
    """The loss of every step, in order."""
    found = [line["loss"] for step, line in outcome.metrics().items() if "loss" in line and step]
    return [math.nan if loss is None else loss for loss in found]


def distances(found: Gradients, exact: Gradients) -> dict[str, float]:
    """How far each gradient is from the exact one, relative to its norm, or to a part of that of all of them."""
    norms = {name: float(np.linalg.norm(one.astype(np.float64))) for name, one in exact.items()}
    least = SMALL * float(np.linalg.norm(list(norms.values()))) or 1.0
    return {
        name: float(np.linalg.norm(found[name].astype(np.float64) - one)) / max(norms[name], least)
        if name in found
        else float("inf")
        for name, one in exact.items()
    }


def multiple(found: Gradients, exact: Gradients) -> tuple[float, float]:
    """The multiple of the exact gradients that is nearest to those found, and the part that is in no multiple."""
    names = [name for name in exact if name in found]
    a, b = (np.concatenate([one[name].astype(np.float64).ravel() for name in names]) for one in (found, exact))
    square, norm = float(b @ b), float(np.linalg.norm(a))
    ratio = float(a @ b) / square if square else 0.0
    return ratio, float(np.linalg.norm(a - ratio * b)) / norm if norm else 0.0


def relative(a: float, b: float) -> float:
    """How far `a` is from `b`, relative to `b`."""
    return abs(a - b) / max(abs(b), 1e-12)
