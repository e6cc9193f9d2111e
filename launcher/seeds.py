"""Every random draw of a run is a function of (seed, what it is for, where it is), never of a rank or of history."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = [
    "COLLATE",
    "MICROBATCH",
    "ORDER",
    "SAMPLE",
    "WEIGHTS",
    "kept_generators",
    "kept_host_generators",
    "mix",
    "seed_host",
    "seed_microbatch",
    "step_state",
]

# What a seed is for; the numbers are part of what a run's results depend on, so they never change.
WEIGHTS, ORDER, MICROBATCH, SAMPLE, COLLATE = range(1, 6)

MASK = (1 << 64) - 1


def mix(*words: int, state: int = 0) -> int:
    """One 64-bit seed from integers: SplitMix64's output function (Steele, Lea and Flood, 2014), chained.

    `state` is what came of the words before these. Python's `hash` would do, but is not promised to stay the same
    between versions.
    """
    for word in words:
        state = (state ^ (word & MASK)) + 0x9E3779B97F4A7C15 & MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
        state ^= state >> 31
    return state


def seed_host(seed: int) -> None:
    """Seed the three generators that datasets draw from: `random`, numpy's and torch's on the CPU.

    The generator is seeded directly: `torch.manual_seed` also walks every backend and costs a hundred times as much.
    """
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


@contextmanager
def kept_host_generators() -> Iterator[None]:
    """What is drawn in here leaves the host's three generators as they were."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


@contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """What is drawn in here leaves the host's three generators, and that of `device`, as they were."""
    generators = [torch.cuda.default_generators[device.index or 0]] if device.type == "cuda" else []
    states = [generator.get_state() for generator in generators]
    with kept_host_generators():
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def step_state(seed: int, step: int) -> int:
    """What `seed_microbatch` goes on from in every micro-batch of a step."""
    return mix(seed, MICROBATCH, step)


def seed_microbatch(state: int, microbatch: int, device: torch.device, *, iteration: int = 0) -> None:
    """Seed everything that a forward pass may draw from, before micro-batch `microbatch` of the step of `state`.

    `iteration` counts the times that the step's micro-batches were gone through before.
    """
    value = mix(microbatch, iteration, state=state)
    seed_host(value)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(value)
