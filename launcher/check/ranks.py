"""What must be alike on all ranks of one run, and seldom is looked at: weights, batches, gradients, buffers."""

from __future__ import annotations

from launcher.check import advice
from launcher.check.finding import Finding
from launcher.check.trials import Outcome

__all__ = ["ranks"]


def ranks(outcome: Outcome) -> list[Finding]:
    """The rows of a run that has written down which parameters take part."""
    if not outcome.ok:
        return [Finding("ranks", "a run", False, outcome.fault, advice.failed(outcome))]
    return [_weights(outcome), _batches(outcome), _gradients(outcome), _buffers(outcome)]


def _weights(outcome: Outcome) -> Finding:
    what, first = "initial weights", outcome.trace.weights()
    for rank in outcome.trace.events:
        other = [name for name, value in outcome.trace.weights(rank).items() if first.get(name) != value]
        if other:
            told = f"{other[0]} begins with other values on rank {rank} than on rank 0"
            return Finding("ranks", what, False, told, advice.INIT)
    return Finding("ranks", what, True, f"{len(first)} parameters are the same on every rank")


def _batches(outcome: Outcome) -> Finding:
    what, trace = "batches", outcome.trace
    sizes = {rank: trace.loaders(rank) for rank in trace.events}
    for rank, loaders in sizes.items():
        if other := [name for name in sizes[0] if loaders.get(name) != sizes[0][name]]:
            told = (
                f"{other[0]!r} has {loaders.get(other[0])} samples on rank {rank}, and {sizes[0][other[0]]} on rank 0"
            )
            return Finding("ranks", what, False, told, advice.DATA_BY_RANK)
    numbers = {rank: trace.of("end", rank)[-1]["microbatches"] for rank in trace.events}
    if len(set(numbers.values())) > 1:
        told = f"the ranks run {', '.join(map(str, numbers.values()))} micro-batches: a collective would wait for ever"
        return Finding("ranks", what, False, told, "run as many micro-batches on every rank: iterate over the step")
    return Finding("ranks", what, True, f"{numbers[0]} micro-batches on every rank, of the same data")


def _gradients(outcome: Outcome) -> Finding:
    what, trace = "gradients", outcome.trace
    allowed = any(event["unused"] for event in trace.of("build", 0))
    unused = {rank: [set(event["unused"]) for event in trace.of("step", rank)] for rank in trace.events}
    never = set.intersection(*(names for steps in unused.values() for names in steps))
    for step, (first, *others) in enumerate(zip(*unused.values(), strict=True)):
        for rank, names in enumerate(others, 1):
            if some := sorted((names ^ first) - never):
                without = rank if some[0] in names else 0
                told = f"step {step + 1}: {some[0]} takes no part on rank {without}, and does on another"
                if allowed:
                    return Finding("ranks", what, True, f"{told}, which find_unused_parameters allows")
                return Finding("ranks", what, False, told, advice.UNUSED)
    if never and not allowed:
        told = f"{min(never)} never has a gradient" + (
            f", nor have {len(never) - 1} more" if never - {min(never)} else ""
        )
        return Finding("ranks", what, False, told, advice.UNUSED)
    return Finding("ranks", what, True, "every parameter that trains takes part on every rank")


def _buffers(outcome: Outcome) -> Finding:
    what, trace = "buffers", outcome.trace
    ends = {rank: trace.of("buffers", rank)[-1]["buffers"] for rank in trace.events}
    coupled = trace.coupled()
    for rank, buffers in ends.items():
        for name, value in buffers.items():
            if ends[0].get(name) != value:
                module = name.rpartition(".")[0].partition("/")[2] or "the model"
                told = f"{name} drifts apart: rank {rank} and rank 0 end with other values"
                kind = f"{module} is a BatchNorm that is not synchronised: " if module in coupled else ""
                return Finding("ranks", what, False, told, kind + advice.BUFFERS)
    return Finding("ranks", what, True, f"{len(ends[0])} buffers are the same on every rank")
