"""`launcher status`: a row a run; of one run all there is to say; of a sweep a row a point."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launcher.errors import UsageError
from launcher.evidence import tail
from launcher.parser import Parser
from launcher.show import print_json, print_table, printable
from launcher.slurm import record
from launcher.slurm.facts import job_output, near, rank_logs
from launcher.slurm.standing import ACTIVE, Heard, Standing, Sweep, ask, clock, stand, stand_of_sweep
from launcher.verdict import judged

__all__ = ["main"]

DAY = 86_400.0
LONGEST = 120  # characters of a reason, in a table
LAST_LINES = 12
COLUMNS = ("RUN", "JOB", "STATE", "WHY", "STEP", "LOSS", "RATE", "RESTARTS", "CHECKPOINT", "LEFT", "NODES")
RIGHT = ("STEP", "LOSS", "RATE", "RESTARTS", "LEFT")
# Of every object that --json prints; null where it is not known, or not of this one.
KEYS = (
    *("run", "job", "jobs", "job_state", "state", "why", "status", "step", "total", "loss", "rate", "rate_unit"),
    *("restarts", "attempt", "world_size", "checkpoint", "checkpoint_time", "seconds_left", "starts", "nodes"),
    *("node_list", "hosts", "command", "changed", "logs", "verdict", "point", "options", "points"),
)
Row = Standing | Sweep


def main(argv: Sequence[str]) -> int:
    """`launcher status [RUN|SWEEP|JOB ...]`; the exit code."""
    parser = Parser(
        prog="launcher status",
        usage="launcher status [--json] [--all] [RUN|SWEEP|JOB ...]",
        description="Where runs stand: by default those under ./runs, and those of your jobs.",
    )
    parser.add_argument("targets", metavar="RUN|SWEEP|JOB", nargs="*", help="a run directory, a sweep's, or a job's id")
    parser.add_argument("--all", action="store_true", help="also what finished, or was cancelled, more than a day ago")
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    options = parser.parse_args(list(argv))
    if options.all and options.targets:
        raise UsageError("--all is of the list without names: launcher status --all")
    if not options.targets:
        rows, hidden = _everything(old=options.all)
    else:
        rows, hidden = _named(options.targets), 0
    if options.json:
        print_json([one for row in rows for one in _as_json(row, alone=len(options.targets) == 1)])
    elif len(options.targets) == 1 and rows:
        _show_sweep(rows[0]) if isinstance(rows[0], Sweep) else _show(rows[0])
    elif rows:
        print_table(COLUMNS, [_row(row) for row in rows], right=RIGHT)
    elif not options.targets:
        print("no runs under ./runs, and no jobs of yours" if not hidden else "nothing that is new")
    if hidden and not options.json:
        print(f"and {hidden} that ended more than a day ago: launcher status --all")
    return 0 if len(rows) >= len(options.targets) else UsageError.exit_code


def _named(targets: Sequence[str]) -> list[Row]:
    """What a person has named; a name that is none is told, and the others are shown."""
    paths = []
    for target in targets:
        try:
            paths.append(record.find(target))
        except UsageError as error:
            print(f"launcher: {printable(str(error))}", file=sys.stderr)
    ids = [one.job for path in paths for one in record.submissions(path)[-20:]]
    heard = _hear(ask(ids))
    return [_stand(path, heard) for path in paths]


def _everything(*, old: bool) -> tuple[list[Row], int]:
    """The runs under ./runs and those of this user's jobs, what moved last first; and how many are not shown."""
    under = [path for path in Path("runs").absolute().glob("*") if _holds_run(path)]
    foreign = any(path.stat().st_uid != os.getuid() for path in under)
    heard = _hear(ask(mine=not foreign))
    own = os.getuid()
    elsewhere = {Path(job.work_dir) for job in heard.jobs.values() if job.active}
    paths = {os.path.realpath(path): path for path in under}
    for path in sorted(elsewhere):
        if os.path.isfile(path / "slurm" / "job.sh") and path.stat().st_uid == own:
            paths.setdefault(os.path.realpath(path), path)
    rows = sorted((_stand(path, heard) for path in paths.values()), key=_changed, reverse=True)
    shown = [row for row in rows if old or not _is_old(row)]
    return shown, len(rows) - len(shown)


def _hear(heard: Heard) -> Heard:
    if heard.fault:
        print(f"launcher: by the files alone: {printable(heard.fault)}", file=sys.stderr)
    return heard


def _stand(path: Path, heard: Heard) -> Row:
    is_sweep = os.path.exists(path / "slurm" / "sweep.json")  # False also where it may not be looked at
    return stand_of_sweep(path, heard) if is_sweep else stand(path, heard)


def _holds_run(path: Path) -> bool:
    return any(os.path.exists(path / name) for name in ("run.json", "attempts", "slurm"))


def _changed(row: Row) -> float:
    return max((_changed(one) for one in row.points), default=0.0) if isinstance(row, Sweep) else row.facts.changed


def _is_old(row: Row) -> bool:
    return row.state in ("finished", "cancelled") and _changed(row) < time.time() - DAY


def _row(row: Row) -> list[object]:
    if isinstance(row, Sweep):
        job = next((one.job_id for one in row.points if one.job is not None), None) or _last_job(row)
        return [near(row.path), job.partition("_")[0], row.state, f"{len(row.points)} points: {row}", *[""] * 7]
    facts = row.facts
    why = row.why.strip().split("\n")[0]
    return [
        *(near(facts.path), row.job_id or "", row.state, why if len(why) <= LONGEST else f"{why[: LONGEST - 3]}..."),
        *(_step(row), _loss(row), _rate(row), "" if facts.restarts is None else facts.restarts),
        *(_checkpoint(row), _left(row), _nodes(row)),
    ]


def _last_job(sweep: Sweep) -> str:
    return next((one.job_id for one in reversed(sweep.points) if one.job_id), "")


def _show(row: Standing) -> None:
    """All there is to say of one run, a line each."""
    facts, job = row.facts, row.job
    hosts = f" on {', '.join(facts.hosts)}" if facts.hosts else ""
    attempt = f" (attempt {facts.attempt})" if facts.attempt else ""
    since = "" if job is None or job.start is None or row.state != "running" else f", since {clock(job.start)}"
    limit = "" if job is None or job.limit is None else f" of {_span(job.limit)}"
    logs = rank_logs(facts.path)
    outputs = [path for id_ in facts.jobs[-1:] if (path := job_output(facts.path, id_)).exists()]
    lines: list[tuple[str, object]] = [
        ("run", near(facts.path)),
        ("state", row.state),
        ("why", row.why),
        ("verdict", _verdict(row)),
        ("step", _step(row, percent=True)),
        ("loss", _loss(row)),
        ("rate", _rate(row)),
        ("restarts", "" if facts.restarts is None else f"{facts.restarts}{attempt}"),
        ("checkpoint", _checkpoint(row)),
        ("left", f"{_left(row)}{limit}" if _left(row) else ""),
        ("nodes", _nodes(row)),
        ("ranks", "" if facts.world_size is None else f"{facts.world_size}{hosts}"),
        ("job", "" if row.job_id is None else f"{row.job_id}{f' ({job.state}{since})' if job is not None else ''}"),
        ("jobs so far", ", ".join(facts.jobs) if len(facts.jobs) > 1 else ""),
        ("last start", ": ".join(facts.verdict) if facts.verdict is not None else ""),
        ("process", f"{facts.start.pid} on {facts.start.host}" if facts.start and facts.is_local else ""),
        ("changed", _ago(facts.changed) if facts.changed else ""),
        ("command", shlex.join(facts.command)),
        ("directory", facts.path),
        ("logs", f"{next(iter(logs.values()))}{f' and {len(logs) - 1} more' if len(logs) > 1 else ''}" if logs else ""),
        ("job's output", outputs[0] if outputs else ""),
    ]
    shown = [(name, printable(str(value))) for name, value in lines if value != ""]
    for name, value in shown:
        print(f"{name:12}  {value}")
    if row.state in ("failed", "lost"):
        _show_end(row, logs)


def _show_end(row: Standing, logs: dict[int, Path]) -> None:
    """The last lines of the rank that failed, or of the batch script."""
    facts = row.facts
    rank = facts.failure.rank if facts.failure is not None and facts.failure.rank is not None else 0
    log = logs.get(rank) or (job_output(facts.path, facts.jobs[-1]) if facts.jobs else None)
    lines = [line for line in tail(log) if line.strip()] if log is not None else []
    if log is not None and lines:
        print(f"\nthe last lines of {printable(str(log))}:")
        for line in lines[-LAST_LINES:]:
            print(f"  {printable(line.rstrip(chr(13)).rpartition(chr(13))[2].expandtabs())}")


def _verdict(row: Standing) -> str:
    """How a run that is over, and not finished, ended; a start that is still to go on has none."""
    facts = row.facts
    if not facts.attempt or row.state in (*ACTIVE, "finished", "broken"):
        return ""
    found = judged(facts.path, facts.attempt)
    return "" if row.state == "cancelled" and found.kind != "stopped" else found.text  # `why` knows better


def _show_sweep(sweep: Sweep) -> None:
    """A row a point, with what differs."""
    names = list(dict.fromkeys(name for options in sweep.options for name in options))
    columns = [name for name in COLUMNS if name not in ("RUN", "JOB", "NODES")]
    rows = []
    for one, options in zip(sweep.points, sweep.options, strict=True):
        told = dict(zip(COLUMNS, _row(one), strict=True))
        chosen = [options.get(name, "") for name in names]
        rows.append([one.facts.path.name, *chosen, *(told[name] for name in columns), told["JOB"]])
    if rows:
        print_table(["POINT", *names, *columns, "JOB"], rows, right=[name for name in RIGHT if name not in names])
    counts = sweep.counts
    again = not counts.keys() <= {*ACTIVE, "finished"} and not counts.keys() & set(ACTIVE)
    print(f"{sweep}" + (f": launcher resume {printable(shlex.quote(near(sweep.path)))}" if again else ""))


def _step(row: Standing, *, percent: bool = False) -> str:
    step, total = row.facts.step, row.facts.total
    if step is None or total is None:
        return "" if step is None else str(step)
    return f"{step}/{total}" + (f" ({100 * step // total}%)" if percent and total else "")


def _loss(row: Standing) -> str:
    loss = row.facts.progress.loss
    return "" if loss is None else f"{loss:.5g}"


def _rate(row: Standing) -> str:
    rate, unit = row.facts.progress.rate, row.facts.progress.unit
    if rate is None:
        return ""
    return f"{rate:,.0f} {unit}/s" if abs(rate) >= 100 else f"{rate:.3g} {unit}/s"


def _checkpoint(row: Standing) -> str:
    step, when = row.facts.checkpoint, row.facts.checkpoint_time
    return "" if step is None else str(step) if when is None else f"{step}, {_ago(when)}"


def _left(row: Standing) -> str:
    left = row.seconds_left()
    return "" if left is None else _span(left)


def _nodes(row: Standing) -> str:
    job = row.job
    if job is None:
        return ""
    return f"{job.nodes}: {job.node_list}" if job.node_list else str(job.nodes)


def _ago(when: float) -> str:
    seconds = max(0.0, time.time() - when)
    for size, unit, most in ((1, "s", 120), (60, "min", 120), (3600, "h", 48)):
        if seconds < size * most:
            return f"{seconds // size:.0f} {unit} ago"
    return f"{seconds // DAY:.0f} days ago"


def _span(seconds: int) -> str:
    days, rest = divmod(seconds, 86_400)
    return (f"{days}-" if days else "") + f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"


def _as_json(row: Row, *, alone: bool) -> list[dict[str, Any]]:
    if isinstance(row, Standing):
        return [{**_run_as_json(row), "verdict": (_verdict(row) or None) if alone else None}]
    points = [
        {**_run_as_json(one), "point": one.facts.path.name, "options": dict(options)}
        for one, options in zip(row.points, row.options, strict=True)
    ]
    if alone:
        return points
    said = {
        "run": str(row.path),
        "job": _row(row)[1] or None,
        "state": row.state,
        "why": str(row),
        "points": row.counts,
    }
    return [{**dict.fromkeys(KEYS), **said}]


def _run_as_json(row: Standing) -> dict[str, Any]:
    facts, job, progress = row.facts, row.job, row.facts.progress
    return {
        **dict.fromkeys(KEYS),
        "run": str(facts.path),
        "job": row.job_id,
        "jobs": facts.jobs,
        "job_state": None if job is None else job.state,
        "state": row.state,
        "why": row.why or None,
        "status": facts.status or None,
        "step": facts.step,
        "total": facts.total,
        "loss": _finite(progress.loss),
        "rate": _finite(progress.rate),
        "rate_unit": None if progress.unit is None else f"{progress.unit}/s",
        "restarts": facts.restarts,
        "attempt": facts.attempt or None,
        "world_size": facts.world_size,
        "checkpoint": facts.checkpoint,
        "checkpoint_time": _iso(facts.checkpoint_time),
        "seconds_left": row.seconds_left(),
        "starts": _iso(job.start) if job is not None and row.state in ("pending", "requeued") else None,
        "nodes": None if job is None else job.nodes,
        "node_list": (job.node_list or None) if job is not None else None,
        "hosts": list(facts.hosts),
        "command": list(facts.command),
        "changed": _iso(facts.changed or None),
        "logs": [str(path) for path in rank_logs(facts.path).values()],
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _iso(when: float | None) -> str | None:
    return None if when is None else datetime.fromtimestamp(when, UTC).isoformat("T", "seconds")
