"""The same run twice: every weight, batch, output, gradient and loss in order, up to the first that differs."""

from __future__ import annotations

from itertools import zip_longest

from launcher.check import advice
from launcher.check.finding import Finding
from launcher.check.trace import Event
from launcher.check.trials import Outcome

__all__ = ["determinism"]

IN_ORDER = ("build", "steps", "batch", "module", "loss", "gradient", "step", "end")


def determinism(first: Outcome, second: Outcome) -> Finding:
    """Whether two runs did the same; both have written down their modules."""
    what = "the same run twice"
    for outcome in (first, second):
        if not outcome.ok:
            return Finding("determinism", what, False, outcome.fault, advice.failed(outcome))
    for rank in first.trace.events:
        found = _first_difference(first.trace.events[rank], second.trace.events.get(rank, []), rank)
        if found is not None:
            return Finding("determinism", what, False, *found)
    if changed := first.trace.of("changed"):
        told = (
            f"micro-batch {changed[0]['microbatch']} of {changed[0]['loader']!r} is another one when it is read again"
        )
        return Finding("determinism", what, False, told, f"{advice.DATA_DRAWN}. Or something changes the data in place")
    events = sum(len(events) for events in first.trace.events.values())
    return Finding(
        "determinism", what, True, f"{events:,} weights, batches, outputs, gradients and losses are the same"
    )


def _first_difference(mine: list[Event], other: list[Event], rank: int) -> tuple[str, str] | None:
    step = 0
    for a, b in zip_longest(_in_order(mine), _in_order(other)):
        if a is None or b is None:
            return f"rank {rank} does more in one of them, from step {step + 1} on", advice.DRAWN
        step = a.get("step", step)
        if a != b:
            return _said(a, b, step, rank)
    return None


def _in_order(events: list[Event]) -> list[Event]:
    kept = [event for event in events if event["what"] in IN_ORDER]
    return [{key: value for key, value in event.items() if key != "seconds"} for event in kept]


def _said(a: Event, b: Event, step: int, rank: int) -> tuple[str, str]:
    """What differs in two events at the same place, and what to do."""
    where = f"step {step + 1}, rank {rank}: "
    if a["what"] != b["what"] or a.get("name") != b.get("name"):
        return f"{where}one run comes to {_called(a)}, the other to {_called(b)}", advice.DRAWN
    if a["what"] == "build":
        names = [name for name, value in a["weights"].items() if b["weights"].get(name) != value]
        return f"{(names or ['a buffer'])[0]} begins with other values each time", advice.INIT
    if a["what"] == "batch":
        return f"{where}micro-batch {a['microbatch']} of {a['loader']!r} holds other data each time", advice.DATA_DRAWN
    if a["what"] == "module":
        name = f"{a['name']} ({a['type']})" if a["name"] else f"the model ({a['type']})"
        return f"{where}{name} is the first whose output differs", advice.DRAWN
    if a["what"] == "gradient":
        return f"{where}the gradient of {a['name']} differs, after outputs that are the same", advice.DRAWN
    if a["what"] == "step":
        return f"{where}the optimizer is given {_others(a)} in one run and {_others(b)} in the other", advice.LR
    if a["what"] == "loss":
        return f"{where}the loss differs ({a['loss']!r}, {b['loss']!r}), the modules' outputs do not", advice.DRAWN
    return f"{where}{a['what']} differs", advice.DRAWN


def _others(event: Event) -> str:
    """The numbers of the first group of parameters, learning rate first."""
    group: dict[str, float] = next((group for groups in event["groups"] for group in groups), {})
    return ", ".join(f"{key} {value}" for key, value in list(group.items())[:1])


def _called(event: Event) -> str:
    return str(event.get("name") or event["what"])
