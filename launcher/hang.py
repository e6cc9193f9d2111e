"""A run that stands still: what each rank says of itself, and which of them the others wait for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from launcher.stacks import Place, read_places

__all__ = ["Group", "Judgement", "Standing", "another_call", "judge"]

# Where a thread stands that waits for other ranks in a call of torch's or of ours.
COLLECTIVE = ("/torch/distributed/", "/launcher/agreement.py", "/launcher/world.py")


class Call(NamedTuple):
    """A collective: its name and, of those where all ranks must bring as many, its elements."""

    name: str
    elements: int | None = None


@dataclass(frozen=True)
class Group:
    """The collectives that a rank has called in one process group, numbered from 1; `ranks` are its members."""

    name: str
    backend: str
    ranks: tuple[int, ...]
    enqueued: int
    """The number of the last that this rank has called."""
    completed: int
    """The number of the last that has ended."""
    calls: Mapping[int, Call]
    """The last few, by number."""

    @property
    def waits(self) -> bool:
        """Whether the last call has not ended."""
        return self.enqueued > self.completed


@dataclass(frozen=True)
class Standing:
    """Where one rank stands, as attempts/A/hang-R.json has it."""

    rank: int
    host: str = ""
    step: int | None = None
    """Completed optimizer steps."""
    phase: str = "step"
    seconds: float = 0.0
    """For so long it has made no progress."""
    own: Place | None = None
    """The innermost frame of the main thread in the person's own code, and below it the innermost of all."""
    inner: Place | None = None
    loader: str | None = None
    """The loader whose next micro-batch it waits for, the process id of the worker, and where that stands."""
    worker: int | None = None
    worker_at: str | None = None
    groups: tuple[Group, ...] = ()

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Standing:
        """From the file's content; what is missing there is unknown.

        Raises:
            TypeError, ValueError, KeyError: it is none.
        """
        data = facts.get("data") or {}
        where = facts.get("where") or {}
        return cls(
            rank=int(facts["rank"]),
            host=str(facts.get("host", "")),
            step=facts.get("step"),
            phase=str(facts.get("phase", "step")),
            seconds=float(facts.get("seconds", 0.0)),
            own=Place(**where["own"]) if where.get("own") else None,
            inner=Place(**where["inner"]) if where.get("inner") else None,
            loader=data.get("loader"),
            worker=data.get("worker"),
            worker_at=data.get("worker_at"),
            groups=tuple(map(_read_group, facts.get("collectives", ()))),
        )

    @property
    def waits(self) -> bool:
        """Whether it waits for other ranks."""
        inside = self.inner is not None and any(part in self.inner.path for part in COLLECTIVE)
        return inside or any(group.waits for group in self.groups)

    def __str__(self) -> str:
        if self.loader is not None:
            text = f"has waited {self.seconds:.0f} s for the next micro-batch of loader {self.loader!r}"
            if self.worker is not None:
                text += f", from worker process {self.worker}" + (f" at {self.worker_at}" if self.worker_at else "")
            return text
        place = self.own or self.inner
        text = f"has stood for {self.seconds:.0f} s" + (f" at {place}" if place else "")
        if self.inner is not None and self.own not in (None, self.inner):
            text += f", inside {self.inner.function} ({self.inner.path.rpartition('/')[2]}:{self.inner.line})"
        return text


@dataclass(frozen=True)
class Judgement:
    """The rank that the others wait for, and the sentence that says so."""

    rank: int
    host: str
    step: int | None
    sentence: str


def judge(
    standings: Mapping[int, Standing],
    world_size: int,
    *,
    hosts: Sequence[str] = (),
    stacks: Mapping[int, str] | None = None,
) -> Judgement:
    """Which rank a run that makes no progress waits for, and where that one stands.

    In this order: a rank that says nothing; one that has called another collective than the rest; one that is behind
    in a collective that others wait in; one that stands outside of any.

    Args:
        standings: by rank, of those that said where they stand; one at least.
        world_size: the number of ranks.
        hosts: the name of every rank's machine, where known.
        stacks: what faulthandler wrote by itself of ranks that said nothing: native code holds Python's lock there.
    """
    silent = [rank for rank in range(world_size) if rank not in standings]
    if silent:
        rank, why = silent[0], _of_silent(silent, hosts, stacks or {})
    elif found := another_call(standings) or _behind(standings):
        rank, why = found
    else:
        rank, why = _nobody_behind(standings)
    standing = standings.get(rank)
    host = standing.host if standing is not None else hosts[rank] if rank < len(hosts) else ""
    known = [other.step for other in standings.values() if other.step is not None]
    step = standing.step if standing is not None else max(known, default=None)
    waiting = sum(other.waits for other in standings.values() if other.rank != rank)
    if silent and waiting:
        why += f"; {_count(waiting, 'rank waits', 'ranks wait')} for it in {_pending(standings)}"
    return Judgement(rank, host, step, why)


def _of_silent(silent: Sequence[int], hosts: Sequence[str], stacks: Mapping[int, str]) -> str:
    rank = silent[0]
    if stacks.get(rank):
        own, inner = read_places(stacks[rank])
        where = Standing(rank, own=own, inner=inner)
        place = f" at {where.own or where.inner}" if own or inner else ""
        return f"{_named(rank, hosts)} is in native code that holds Python's lock{place}"
    same = [other for other in silent if rank < len(hosts) and hosts[other] == hosts[rank]]
    if same == silent and len(silent) > 1:
        return f"ranks {_numbers(silent)} on {hosts[rank]} give no sign of life: that node is gone or stopped"
    others = f" (nor do ranks {_numbers(silent[1:])})" if silent[1:] else ""
    return f"{_named(rank, hosts)} gives no sign of life{others}: stopped, frozen, or its node gone"


def another_call(standings: Mapping[int, Standing]) -> tuple[int, str] | None:
    """The rank that made another collective than the rest under the same number of the same group."""
    for name, members in _by_group(standings).items():
        for number in sorted(set.intersection(*(set(group.calls) for group in members.values()))):
            calls = {rank: group.calls[number] for rank, group in members.items()}
            if len(set(calls.values())) == 1:
                continue
            usual = Counter(calls.values()).most_common(1)[0][0]
            rank = next(rank for rank in sorted(calls, reverse=True) if calls[rank] != usual)
            rest = _count(sum(call == usual for call in calls.values()), "other called", "others called")
            place = standings[rank].own or standings[rank].inner
            return rank, (
                f"{_who(standings[rank])} called {_call(calls[rank], usual)}"
                + (f" ({place})" if place else "")
                + f" where {rest} {_call(usual, calls[rank])}, as number {number} of {name}: "
                "a collective that not every rank makes, or with another shape"
            )
    return None


def _behind(standings: Mapping[int, Standing]) -> tuple[int, str] | None:
    """The rank that has not called what others wait in; among several one that waits for nobody itself."""
    found: list[tuple[bool, int, int, str]] = []
    for name, members in _by_group(standings).items():
        top = max(group.enqueued for group in members.values())
        waiting = [rank for rank, group in members.items() if group.enqueued == top and group.waits]
        call = next((members[rank].calls[top].name for rank in waiting if top in members[rank].calls), "a collective")
        for rank, group in members.items():
            if waiting and group.enqueued < top:
                wait = f"{_count(len(waiting), 'rank waits', 'ranks wait')} for it in {call} (number {top} of {name})"
                found.append((standings[rank].waits, -len(waiting), rank, wait))
    if not found:
        return None
    _, _, rank, wait = min(found)
    return rank, f"{_who(standings[rank])} {standings[rank]}; {wait}"


def _nobody_behind(standings: Mapping[int, Standing]) -> tuple[int, str]:
    outside = [rank for rank in sorted(standings) if not standings[rank].waits]
    if not outside:
        rank = min(standings)
        return rank, (
            f"all {len(standings)} ranks have called {_pending(standings)} and it does not end: look at the network "
            f"between the hosts and at the GPUs; {_who(standings[rank])} {standings[rank]}"
        )
    rank = outside[0]
    text = f"{_who(standings[rank])} {standings[rank]}"
    if len(outside) == len(standings) > 1:
        return rank, f"{text}; no rank waits in a collective"
    rest = len(standings) - len(outside)
    return rank, text + (f"; {_count(rest, 'rank waits', 'ranks wait')} in a collective" if rest else "")


def _by_group(standings: Mapping[int, Standing]) -> dict[str, dict[int, Group]]:
    """The groups that more than one rank tells of, by a name to print, each with what they say; the widest first."""
    found: dict[tuple[str, str, tuple[int, ...]], dict[int, Group]] = {}
    for rank, standing in standings.items():
        for group in standing.groups:
            found.setdefault((group.name, group.backend, group.ranks), {})[rank] = group
    widest = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    return {f"{backend} group {name}": members for (name, backend, _), members in widest if len(members) > 1}


def _pending(standings: Mapping[int, Standing]) -> str:
    """The collective that most ranks wait in."""
    names = Counter(
        group.calls[group.enqueued].name
        for standing in standings.values()
        for group in standing.groups
        if group.waits and group.enqueued in group.calls
    )
    return names.most_common(1)[0][0] if names else "a collective"


def _read_group(facts: Mapping[str, Any]) -> Group:
    return Group(
        name=str(facts["group"]),
        backend=str(facts.get("backend", "")),
        ranks=tuple(facts.get("ranks") or ()),
        enqueued=int(facts["enqueued"]),
        completed=int(facts["completed"]),
        calls={int(number): Call(str(name), elements) for number, name, elements in facts.get("calls", ())},
    )


def _call(call: Call, other: Call) -> str:
    """A call, with its elements where only they tell it from the other."""
    return f"{call.name} of {call.elements} elements" if call.name == other.name else call.name


def _who(standing: Standing) -> str:
    return f"rank {standing.rank}" + (f" on {standing.host}" if standing.host else "")


def _named(rank: int, hosts: Sequence[str]) -> str:
    return f"rank {rank}" + (f" on {hosts[rank]}" if rank < len(hosts) and hosts[rank] else "")


def _count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def _numbers(ranks: Iterable[int]) -> str:
    """Ranks as a person writes them: `2, 4-7`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
