"""The report of a drill: how each part of it went, what it cost, and, where it went badly, why and where to look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launcher.slurm.aftermath import Aftermath, Drill, ranks
from launcher.slurm.facts import job_output, rank_logs

__all__ = ["Judgement", "as_dict", "judge", "lines"]

SKEW = 0.5  # seconds that a node's clock may differ from this one's before it is told


@dataclass(frozen=True)
class Judgement:
    """Whether the run went on by itself with no step lost, and otherwise why not."""

    good: bool
    said: str
    fix: str = ""
    look: tuple[Path, ...] = ()


def judge(drill: Drill, found: Aftermath, waited: float | None = None) -> Judgement:
    """What is to be said of a drill that is over; `waited`: it is not, and nobody waits for longer than so many s."""
    output = job_output(drill.path, drill.job)
    if found.went_on:
        return _went_on(drill, found, output)
    if found.failure:
        return Judgement(False, f"a rank failed: {found.failure}", "mend that, then launcher resume", (output,))
    word, why, _ = found.verdict or ("", "", 0.0)
    queue = found.queue
    if queue is not None and queue.held:
        said = f"it is requeued and held ({queue.reason})"
        return Judgement(False, said, f"scontrol release {drill.job}, once the cause is known", (output,))
    if queue is not None and queue.ended and found.began:
        said = f"start {found.began[-1][0]} ended without a new step: {found.ended or queue.state or 'no verdict'}"
        return Judgement(False, said, "mend that, then launcher resume", (output, *_logs(drill)))
    if queue is not None and queue.ended:
        state = f"SLURM says {queue.state}" if queue.state else "SLURM has forgotten it"
        said = f"it was not requeued: job.sh said {word}: {why}" if word else f"it ended without a verdict ({state})"
        return Judgement(False, said, "launcher resume goes on", (output, *_logs(drill)))
    seconds = f"within {waited or 0:g} s"
    if not found.left and not found.began:
        return _stayed(drill, found, seconds, output)
    if not found.began and queue is not None and queue.waits:
        until = f", SLURM expects {_clock(queue.expected)}" if queue.expected is not None else ""
        said = f"it still waits in the queue ({queue.reason or 'no reason given'}{until}), and did not start {seconds}"
        return Judgement(False, said, "drill again with a longer --wait, or see launcher status", (output,))
    if not found.began:
        missing = [rank for rank in range(drill.ranks) if rank not in found.left]
        said = f"{ranks(missing)} did not leave {seconds}" if missing else f"the job was not requeued {seconds}"
        return Judgement(False, said, "the logs say what they do", (output, *_logs(drill, missing)))
    if found.attempt is None:
        said = f"start {found.began[-1][0]} began on {found.began[-1][2]}, and no rank opened the run {seconds}"
    else:
        said = f"attempt {found.attempt} completed no step {seconds}"
    return Judgement(False, said, "the logs say what it waits for", (output, *_logs(drill)))


def as_dict(drill: Drill, found: Aftermath, judgement: Judgement) -> dict[str, Any]:
    """The report for scripts; seconds are since the signal was sent."""

    def since(time: float | None) -> float | None:
        return None if time is None else round(time - drill.struck, 3)

    verdict, checkpoint, stepped = found.verdict, found.checkpoint, found.stepped
    return {
        "run": str(drill.path),
        "job": drill.job,
        "signal": drill.signal,
        "time": datetime.fromtimestamp(drill.struck, UTC).isoformat(timespec="milliseconds"),
        "ranks": drill.ranks,
        "seen": {str(rank): since(sight.time) for rank, sight in sorted(found.seen.items())},
        "not_seen": [rank for rank in range(drill.ranks) if rank not in found.seen],
        "agreed_step": found.agreed,
        "checkpoint": checkpoint
        and {"step": checkpoint[0], "seconds": since(checkpoint[1]), "path": str(checkpoint[2])},
        "left": {str(rank): since(exit_.time) for rank, exit_ in sorted(found.left.items())},
        "not_left": [rank for rank in range(drill.ranks) if rank not in found.left],
        "verdict": verdict and {"word": verdict[0], "why": verdict[1], "seconds": since(verdict[2])},
        "requeued_by": _requeued_by(drill, found),
        "waited": list(found.waited),
        "eligible": found.eligible and {"seconds": since(found.eligible), "time": _clock(found.eligible)},
        "starts": [{"start": start, "seconds": since(time), "nodes": nodes} for start, time, nodes in found.began],
        "attempt": found.attempt,
        "resumed_step": found.resumed,
        "first_step": stepped and {"step": stepped[0], "seconds": since(stepped[1])},
        "finished": since(found.finished),
        "lost": {**_split(drill, found), "steps": found.lost, "exact": found.told or found.lost == 0},
        "good": judgement.good,
        "said": judgement.said,
        "fix": judgement.fix,
        "look": [str(path) for path in judgement.look],
    }


def lines(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The report for a person, from `as_dict`'s: what, and how it went."""
    yield "flag seen", _seen(report["seen"], report["not_seen"], report["ranks"], "seen it")
    yield "agreed step", "not known" if report["agreed_step"] is None else str(report["agreed_step"])
    checkpoint = report["checkpoint"]
    if checkpoint is None:
        yield "checkpoint", "none was published"
    else:
        early = " (it was there before)" if checkpoint["seconds"] < 0 else ""
        yield "checkpoint", f"step {checkpoint['step']}, {_at(checkpoint['seconds'])}{early}: {checkpoint['path']}"
    yield "ranks left", _seen(report["left"], report["not_left"], report["ranks"], "said that they left")
    verdict = report["verdict"]
    if verdict is not None:
        yield "decided", f"{_at(verdict['seconds'])}: {verdict['word']}: {verdict['why']}"
    yield "requeued", f"by {report['requeued_by']}" if report["requeued_by"] else "no"
    if report["waited"]:
        eligible = report["eligible"]
        until = f", eligible at {eligible['time']} ({_at(eligible['seconds'])})" if eligible else ""
        yield "waited", f"{', then '.join(report['waited'])}{until}"
    for start in report["starts"]:
        yield "started again", f"{_at(start['seconds'])} on {start['nodes']} (start {start['start']})"
    first, lost = report["first_step"], report["lost"]
    if first is not None:
        yield "resumed", f"at step {report['resumed_step']} (attempt {report['attempt']})"
        yield "first new step", f"{first['step']}, {_at(first['seconds'])}"
    elif report["finished"] is not None:
        yield "finished", _at(report["finished"])
    if lost["seconds"] is not None:
        yield "time lost", f"{lost['seconds']:.1f} s: {_parts(lost)}"
    least = "" if lost["exact"] else "at least "
    yield "steps lost", "not known" if lost["steps"] is None else f"{least}{lost['steps']}"
    behind = -min(report["seen"].values(), default=0.0)
    if behind > SKEW:
        yield "clocks", f"a node's clock is {behind:.1f} s behind this machine's, or more: times are off by that"


def _went_on(drill: Drill, found: Aftermath, output: Path) -> Judgement:
    if found.stepped is None and found.attempt is None:
        if not found.seen:
            return Judgement(False, "no rank saw the signal, and the run has finished", _unseen(drill), (output,))
        said = "the run finished before it had to stop: nothing was drilled"
        return Judgement(False, said, "drill a run that has more steps to go")
    if found.lost == 0:
        return Judgement(True, "it went on by itself, and lost no step")
    missing = [rank for rank in range(drill.ranks) if rank not in found.left]
    logs = (output, *_logs(drill, missing))
    fix = "--run.save-every bounds what is lost where a stop does not save"
    if found.lost is None:
        said = "it went on by itself, and no rank has said how far it was: steps may be lost"
    else:
        least = "" if found.told else "at least "
        said = f"it went on by itself, and lost {least}{found.lost} step{'' if found.lost == 1 else 's'}"
    if found.failure:
        return Judgement(False, f"{said}: {found.failure}", fix, logs)
    if found.left and not missing:
        reasons = sorted({exit_.reason for exit_ in found.left.values() if exit_.reason})
        return Judgement(False, f"{said}: the ranks left without a save ({'; '.join(reasons)})", fix, logs)
    if not found.seen:
        return Judgement(False, f"{said}: no rank saw the signal", _unseen(drill), logs)
    doing = f"while step {found.saving} was being saved" if found.saving is not None else "before they had saved"
    said = f"{said}: {ranks(missing)} ended {doing}"
    if drill.signal == "requeue":
        fix = f"the rest of a step and a save must fit into KillWait, which is {drill.kill_wait} s; {fix}"
    return Judgement(False, said, fix, logs)


def _stayed(drill: Drill, found: Aftermath, seconds: str, output: Path) -> Judgement:
    """Nobody left."""
    if not found.seen:
        return Judgement(False, f"no rank saw the signal {seconds}", _unseen(drill), (output, *_logs(drill)))
    said = f"{ranks(found.seen)} saw the signal, and no rank left {seconds}"
    if found.saving is not None:
        fix = (
            f"step {found.saving} is still being saved: launcher doctor --cluster compares saves with the time there is"
        )
    else:
        fix = "the ranks agree at a step's edge: look for one that hangs, or steps that are longer than this"
    return Judgement(False, said, fix, (output, *_logs(drill)))


def _unseen(drill: Drill) -> str:
    if drill.agents and drill.signal == "limit":
        return (
            "SIGUSR2 does not pass accelerate's agents: ahead of the time limit the run's own clock stops it; "
            "submit without --via accelerate, and it reaches the ranks"
        )
    return (
        "a signal reaches a task's own process: the recipe must be what srun starts, in place of any shell "
        "(`exec` in the template), and must not replace the launcher's handlers"
    )


def _logs(drill: Drill, of: list[int] | None = None) -> tuple[Path, ...]:
    """The logs of some ranks, or of the first."""
    there = rank_logs(drill.path)
    return tuple([there[rank] for rank in (of or [0]) if rank in there][:3])


def _requeued_by(drill: Drill, found: Aftermath) -> str:
    """SLURM, where it was asked to, or where job.sh did not come to decide; else job.sh."""
    if not found.began and (found.queue is None or found.queue.restarts <= drill.restart):
        return ""
    return "SLURM" if drill.signal == "requeue" or found.verdict is None else "job.sh"


def _split(drill: Drill, found: Aftermath) -> dict[str, float | None]:
    """Seconds from the signal to the first new step, and to what they went; None: not known."""
    finished = None if found.attempt is None else found.finished
    end = finished if found.stepped is None else found.stepped[1]
    last = max((exit_.time for exit_ in found.left.values()), default=found.queued)
    stopped = last if found.verdict is None else found.verdict[2]
    began = found.began[0][1] if found.began else None

    def between(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else round(b - a, 3)

    return {
        "seconds": between(drill.struck, end),
        "stopping": between(drill.struck, stopped),
        "queue": between(stopped, began),
        "starting": between(began, end),
    }


def _parts(lost: Mapping[str, float | None]) -> str:
    named = (("stopping", "stopping and saving"), ("queue", "in the queue"), ("starting", "starting"))
    parts = [f"{what} {'?' if lost[key] is None else f'{lost[key]:.1f}'}" for key, what in named]
    return ", ".join(parts)


def _seen(seconds: Mapping[str, float], missing: list[int], world: int, what: str) -> str:
    """Which ranks, when: those of the same tenth of a second together."""
    groups: dict[str, list[int]] = {}
    for rank, second in seconds.items():
        groups.setdefault(_at(second), []).append(int(rank))
    told = "; ".join(f"{ranks(members)} {at}" for at, members in groups.items())
    never = f"{ranks(missing)} {'has' if len(missing) == 1 else 'have'} not {what}" if missing else ""
    return f"{len(seconds)} of {world}: " + "; ".join(part for part in (told, never) if part)


def _at(seconds: float) -> str:
    return f"{seconds:+.1f} s"


def _clock(time: float) -> str:
    return f"{datetime.fromtimestamp(time):%H:%M:%S}"
