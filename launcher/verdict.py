"""The verdict: which rank of a run failed first, where, why, how the others ended, and what to do, in one paragraph.

`python -m launcher.verdict RUN` prints it. It is judged from the files of the run's newest start, when that has ended
(launcher/evidence.py), and needs no torch.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from launcher import cgroup
from launcher.advice import advice
from launcher.errors import LauncherError
from launcher.evidence import Evidence, Exit, Word, read_evidence, read_word
from launcher.failure import kind_of_text, may_pass
from launcher.hang import Standing, another_call
from launcher.kernel import killed_for_memory
from launcher.rundir import RunDir
from launcher.show import printable
from launcher.stacks import Place, read_places

__all__ = ["Verdict", "judge", "judged", "of_one"]

LONGEST = 400  # characters of a message that others wrote
SIGNALLED = ("preempted", "cancelled")
SAID = {signal.strsignal(one): one.name for one in signal.Signals}  # srun says `Killed` of SIGKILL
OOM = "Out Of Memory"
ON_RANK = re.compile(r"\bon rank (\d+)")
ENFORCED = re.compile(r"\[enforce fail at [^\]]*\] (err == 0\. )?")  # c10's and gloo's: where in their code


@dataclass(frozen=True)
class Verdict:
    """How a start of a run ended."""

    kind: str
    """One of launcher/failure.py's, or `finished`, `stopped`, `unknown`."""
    text: str
    """The paragraph, on one line."""
    rank: int | None = None
    """The one that failed first."""
    host: str = ""
    step: int | None = None
    traceback: str = ""
    retry: bool = False
    """Whether another start may go better."""


def judged(path: Path, attempt: int | None = None, beside: Path | None = None) -> Verdict:
    """The verdict on a start of the run at `path` that has ended: `attempt`, by default the newest one.

    `beside` is the directory in which its ranks told their parent, if they had one.
    """
    if attempt is None:
        with suppress(LauncherError):
            attempt = RunDir(path).current_attempt()
    if not attempt:
        return Verdict("unknown", "no rank has come as far as to open the run directory")
    found = judge(read_evidence(path, attempt, beside))
    if attempt > 1 and found.rank is not None:
        before = judge(read_evidence(path, attempt - 1))
        if (before.kind, before.step) == (found.kind, found.step) and _cause(before) == _cause(found):
            return replace(found, text=f"{found.text} The start before it ended alike, at the same step.")
    return found


def judge(evidence: Evidence) -> Verdict:
    """The verdict on what a start has left."""
    first = _first(evidence)
    if first is not None:
        return _failed(evidence, first)
    statuses = {exit_.status for exit_ in evidence.left.values()}
    if evidence.left and statuses <= {"finished"} and not evidence.silent:
        return Verdict("finished", f"finished at step {evidence.left[min(evidence.left)].step}")
    if evidence.left and statuses <= {*SIGNALLED, "finished"} and not evidence.silent:
        return _stopped(evidence)
    if evidence.job is not None and evidence.job[0] == "cancelled":
        return Verdict("stopped", f"cancelled: {evidence.job[1]}{_at(evidence.stepped)}.")
    if evidence.silent:
        return _failed(evidence, _of_silent(evidence))
    return Verdict("unknown", f"ended{_at(evidence.stepped)}, and no rank has said why.")


def of_one(facts: Mapping[str, object], world_size: int) -> Verdict:
    """The verdict of a rank that fails and knows of no other."""
    one = read_word(int(str(facts["rank"])), facts)
    return _failed(Evidence(Path(), 0, world_size=world_size, words={one.rank: one}), one, alone=True)


def main(argv: Sequence[str]) -> int:
    """`python -m launcher.verdict RUN`."""
    if len(argv) != 1:
        print("usage: python -m launcher.verdict RUN", file=sys.stderr)
        return 2
    print(f"launcher: {judged(Path(argv[0]).absolute()).text}")
    return 0


def _first(evidence: Evidence) -> Word | None:
    """The rank that failed first, of those that said why; None where that only tells of others that are gone."""
    words = dict(evidence.words)
    marked = evidence.marked
    if marked is not None and (marked.rank not in words or marked.kind == "hang"):
        words[marked.rank] = marked
    own = [word for word in words.values() if word.kind != "peer"]
    if own:
        return min(own, key=_time)
    if words and (odd := _odd_call(evidence)) is not None:
        return odd
    if evidence.silent or not words:
        return None
    return min(words.values(), key=_time)


def _time(word: Word) -> tuple[float, int]:
    return (float("inf") if word.time is None else word.time, word.rank)


def _odd_call(evidence: Evidence) -> Word | None:
    """The rank that brought another tensor to a collective than the rest: they fell over it, itself perhaps not."""
    told: dict[int, Exit | Word] = {**evidence.left, **evidence.words}
    standings = {}
    for rank, said in told.items():
        with suppress(TypeError, ValueError, KeyError):
            standing = Standing.read({"rank": rank, "collectives": said.collectives})
            if standing.groups:
                standings[rank] = replace(standing, own=said.place)
    found = another_call(standings) if len(standings) > 2 else None  # of two, nobody knows which is the odd one
    if found is None:
        return None
    rank, sentence = found
    message = sentence.removeprefix(f"rank {rank} ")
    one = evidence.words.get(rank) or Word(rank, step=evidence.left[rank].step, host=evidence.host(rank))
    return replace(one, kind="code", type="", message=message, place=None, is_own=True)


def _of_silent(evidence: Evidence) -> Word:
    """What can be known of a rank that has not said how it ended."""
    silent = evidence.silent
    if (node := _lost_node(evidence)) is not None:
        ranks = [rank for rank in silent if evidence.host(rank) == node]
        message = f"{node} was lost with {_count(len(ranks), 'rank')}"
        return Word(ranks[0], "lost", message=message, step=evidence.stepped, host=node)
    if len(silent) == evidence.world_size > 1 and not evidence.codes and not evidence.srun:
        message = f"all {len(silent)} ranks have ended without a word"
        return Word(silent[0], "killed", message=message, step=evidence.stepped, host=evidence.host(silent[0]))
    rank = min(silent, key=lambda rank: (_follows(evidence, rank), rank))
    kind, message, place = _death(evidence, rank)
    return Word(rank, kind, message=message, step=evidence.stepped, host=evidence.host(rank), place=place)


def _lost_node(evidence: Evidence) -> str | None:
    """A node of several whose ranks are silent, all of them, and no other's."""
    hosts: dict[str, set[int]] = {}
    for rank in range(evidence.world_size):
        hosts.setdefault(evidence.host(rank), set()).add(rank)
    silent = set(evidence.silent)
    gone = [host for host, ranks in hosts.items() if host and ranks <= silent and not ranks & {*evidence.srun}]
    return gone[0] if len(hosts) > 1 and len(gone) == 1 and hosts[gone[0]] == silent else None


def _follows(evidence: Evidence, rank: int) -> bool:
    """Whether a silent rank's death may follow from another's: who ends a job sends it SIGTERM."""
    return evidence.codes.get(rank) in (-signal.SIGTERM, None) and rank not in evidence.srun


def _death(evidence: Evidence, rank: int) -> tuple[str, str, Place | None]:
    """Kind, message and place of a death without a word."""
    code, said = evidence.codes.get(rank), evidence.last_words(rank)
    told = evidence.srun.get(rank, "")
    name = _signal(code) or SAID.get(told.removesuffix(" (core dumped)"), "")
    crash = said.rpartition("Fatal Python error: ")[2] if "Fatal Python error: " in said else ""
    if crash:
        kind = kind_of_text(said)
        what = said.partition("what():")[2].partition("\n")[0].strip()
        name = name or crash.partition("\n")[0].strip()
        return kind, f"crashed in native code ({name})" + (f": {what}" if what else ""), read_places(crash)[0]
    if code in (None, -signal.SIGKILL) and (known := _for_memory(evidence, rank) or (told if OOM in told else "")):
        return "killed", f"was killed by the kernel because the host's memory was used up ({known})", None
    if name:
        return "killed", f"was killed by {name}", None
    if told:
        return "killed", f"left without a word; srun says: {told}", None
    if code is not None:
        return "killed", f"left without a word, with exit code {code} (os._exit?)", None
    return "killed", "ended without a word", None


def _for_memory(evidence: Evidence, rank: int) -> str:
    """How it is known that the kernel has killed a rank for its memory; empty where it is not."""
    one = evidence.ranks.get(rank)
    if one is None:
        return ""
    after = dict[str, int]()
    for word in evidence.words.values():
        if word.host == one.host:
            after = {key: max(value, after.get(key, 0)) for key, value in {**after, **word.oom_kills}.items()}
    if here := one.host in (socket.gethostname(), os.environ.get("SLURMD_NODENAME")):
        after |= cgroup.kills([Path(path) for path in one.oom_kills])
    for path, before in one.oom_kills.items():
        shared = path.count("/") < 4  # the root and its first children: others' processes are counted there too
        if not shared and after.get(path, 0) > before:
            return f"out of memory in {path}"
    return killed_for_memory(one.pid) if here and one.pid is not None else ""


def _failed(evidence: Evidence, first: Word, *, alone: bool = False) -> Verdict:
    """`alone`: nothing is known of the other ranks yet."""
    if first.kind == "numbers" and (found := ON_RANK.search(first.message)):  # they all stop for it
        first = replace(first, rank=int(found[1]), host=evidence.host(int(found[1])))
    others = "" if alone else _others(evidence, first)
    parts = [_sentence(evidence, first), others, advice(evidence, first)]
    if not alone and evidence.checkpoint is not None:
        parts.append(f"The newest checkpoint is of step {evidence.checkpoint}.")
    text = printable(" ".join(filter(None, parts)))
    return Verdict(first.kind, text, first.rank, first.host, first.step, first.traceback, may_pass(first.kind))


def _sentence(evidence: Evidence, first: Word) -> str:
    """Who failed first, at which step, why, and where in the person's own code."""
    what = ": ".join(filter(None, [first.type, first.message])) if not first.is_own else first.message
    what = _cut(ENFORCED.sub("", what).removesuffix("."))
    at, who = _at(first.step), _who(evidence, first)
    if first.step is not None and not evidence.words and not evidence.left and evidence.marked is None:
        at = f" after step {first.step}"  # the last that a file tells of
    place = "" if first.place is None or first.kind == "numbers" else f" ({_at_place(first.place, first.source)})"
    if first.kind == "hang":
        return f"the run hung{at}: {what}{place}."
    if first.kind == "lost" or (first.kind == "killed" and what.startswith("all ")):
        return f"{what}{at}."
    if first.kind == "killed" and not first.type:
        return f"{who} {what}{at}{place}."
    if first.kind == "numbers":  # the message says of which step
        at = ""
    if evidence.world_size == 1:
        return f"the run failed{at}: {what}{place}."
    if len(_alike(evidence, first)) + 1 == evidence.world_size:
        return f"all {evidence.world_size} ranks failed{at}: {what}{place}."
    return f"{who} failed first{at}: {what}{place}."


def _who(evidence: Evidence, first: Word) -> str:
    hosts = {one.host for one in evidence.ranks.values()} | {one.host for one in evidence.words.values()}
    where = f" on {first.host}" if first.host and (evidence.is_job or len(hosts) > 1) else ""
    return f"rank {first.rank}{where}" if evidence.world_size > 1 else f"the process{where}"


def _others(evidence: Evidence, first: Word) -> str:
    """How the other ranks ended."""
    if first.kind in ("hang", "lost") or evidence.world_size == 1:
        return ""
    words = [word for rank, word in evidence.words.items() if rank != first.rank]
    peers = [word for word in words if word.kind == "peer"]
    alike = _alike(evidence, first)
    other = [word for word in words if word not in peers and word not in alike]
    stopped = [rank for rank in evidence.left if rank not in evidence.words and rank != first.rank]
    silent = [rank for rank in evidence.silent if rank != first.rank]
    parts = []
    if alike and len(alike) + 1 < evidence.world_size:
        parts.append(f"{_count(len(alike), 'more rank')} failed with the same error")
    if other:
        rest = f" (and {_count(len(other) - 1, 'more rank')})" if other[1:] else ""
        parts.append(f"rank {other[0].rank} failed too, with {other[0].type}: {_cut(other[0].message, 120)}{rest}")
    if peers:
        parts.append(f"{_count(len(peers), 'rank')} then lost {'its' if len(peers) == 1 else 'their'} peer")
    if stopped:
        parts.append(f"{_count(len(stopped), 'rank')} {_was(len(stopped))} stopped")
    if silent and len(silent) + 1 < evidence.world_size + (first.rank in evidence.words):
        parts.append(f"{_count(len(silent), 'rank')} left no word")
    text = ", ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _alike(evidence: Evidence, first: Word) -> list[Word]:
    """The other ranks that failed with the same error."""
    same = (first.kind, first.type, first.message)
    words = [word for rank, word in evidence.words.items() if rank != first.rank]
    return [word for word in words if (word.kind, word.type, word.message) == same]


def _stopped(evidence: Evidence) -> Verdict:
    """Ranks that have agreed to stop, or had to leave at once."""
    exits = [exit_ for exit_ in evidence.left.values() if exit_.status in SIGNALLED]
    main = evidence.left.get(0, exits[0])
    why = next((exit_.reason for exit_ in exits if exit_.reason not in ("", "another rank")), "a signal")
    saved = main.step is not None and evidence.checkpoint == main.step
    verb = "cancelled" if any(exit_.status == "cancelled" for exit_ in exits) else "stopped"
    how = f"at step {main.step} and saved" if saved else "without a save"
    return Verdict("stopped", printable(f"{verb} by {why} {how}; run it again to go on"), step=main.step, retry=True)


def _cause(found: Verdict) -> str:
    """What of a verdict's text does not differ between two starts."""
    return found.text.partition(": ")[2].partition(" (")[0]


def _at(step: int | None) -> str:
    return " before its first step" if step is None else f" at step {step}"


def _at_place(place: Place, source: str) -> str:
    relative = os.path.relpath(place.path)
    path = place.path if relative.startswith("..") else relative
    source = source or place.source
    return f"{path}:{place.line} in {place.function}" + (f": `{source}`" if source else "")


def _cut(message: str, longest: int = LONGEST) -> str:
    """On one line, and no longer than a person reads."""
    line = " ".join(message.split())
    return line if len(line) <= longest else f"{line[: longest - 4]} ..."


def _signal(code: int | None) -> str:
    with suppress(ValueError):
        return signal.Signals(-code).name if code is not None and code < 0 else ""
    return f"signal {-(code or 0)}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _was(number: int) -> str:
    return "was" if number == 1 else "were"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
