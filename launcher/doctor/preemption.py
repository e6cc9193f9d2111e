"""What becomes of a job that another one preempts, by a cluster's settings, and whether a run can save before that."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.doctor.findings import Finding, bad, ok, warning
from launcher.doctor.measured import Measured
from launcher.errors import LauncherError
from launcher.slurm import cluster

__all__ = ["check_preemption", "span"]


@dataclass(frozen=True)
class Rule:
    """How jobs of a partition, or a QOS, are preempted."""

    mode: str
    """`REQUEUE`, `CANCEL`, `SUSPEND`, `OFF`."""
    grace: int
    """Seconds."""


def check_preemption(
    settings: Mapping[str, str],
    partitions: Sequence[cluster.Partition],
    chosen: Sequence[cluster.Partition],
    nodes: Sequence[cluster.Node],
    measured: Measured,
    *,
    qos: str | None = None,
) -> list[Finding]:
    """What is to be said of preemption; partitions that are alike are told of together.

    Args:
        settings: SLURM's configuration.
        partitions: all of them.
        chosen: those that jobs go to.
        nodes: all of them.
        measured: an earlier run, whose saves must fit.
        qos: the QOS of jobs; None: any.
    """
    kind = settings.get("PreemptType", "preempt/none").removeprefix("preempt/")
    if kind == "none":
        return [ok("preemption", "none (PreemptType=preempt/none)")]
    rules = _by_qos(settings, qos) if kind == "qos" else _by_partition(partitions, chosen, nodes)
    if rules is None:
        fix = "sacctmgr show qos format=Name,Preempt,PreemptMode,GraceTime, as one who may"
        return [warning("preemption", "by QOS, and sacctmgr does not tell of them", fix)]
    groups: dict[Rule, list[str]] = {}
    for name, rule in rules.items():
        groups.setdefault(rule, []).append(name)
    kill_wait = int((re.match(r"\d+", settings.get("KillWait", "")) or ["30"])[0])
    found = [_rule(rule, ", ".join(names), kill_wait, measured) for rule, names in groups.items()]
    if not any(rule.mode != "OFF" for rule in groups):
        return found
    user = "preempt_send_user_signal" in settings.get("SlurmctldParameters", "")
    said = "SIGUSR2 comes first (preempt_send_user_signal)" if user else "SIGTERM comes first"
    exempt = settings.get("PreemptExemptTime", "00:00:00")
    said += "" if exempt in ("00:00:00", "-1", "NONE") else f"; nothing is preempted in its first {exempt}"
    return [*found, ok("preemption signal", said)]


def span(seconds: int | None) -> str:
    """A time as a person says it."""
    if seconds is None:
        return "unlimited"
    hours, minutes = divmod(seconds // 60, 60)
    if hours >= 24:
        return f"{hours // 24} d" + (f" {hours % 24} h" if hours % 24 else "")
    if hours:
        return f"{hours} h" + (f" {minutes} min" if minutes else "")
    return f"{minutes} min" if seconds >= 60 else f"{seconds} s"


def _rule(rule: Rule, names: str, kill_wait: int, measured: Measured) -> Finding:
    if rule.mode == "OFF":
        return ok("preemption", f"{names}: jobs are not preempted")
    if rule.mode == "CANCEL":
        return warning(
            "preemption",
            f"{names}: a preempted job is cancelled, and not requeued by SLURM (PreemptMode=CANCEL): it has to save "
            "and requeue itself within KillWait",
            "submit with --chain N as well, where a save takes longer; or ask for PreemptMode=REQUEUE",
        )
    if rule.mode == "SUSPEND":
        return warning(
            "preemption",
            f"{names}: a preempted job stays in memory, its GPU's too, and holds it while another runs",
            "ask for PreemptMode=REQUEUE: two runs seldom fit on one GPU",
        )
    seconds = rule.grace + kill_wait
    parts = f"GraceTime {rule.grace} and KillWait {kill_wait}" if rule.grace else f"KillWait; GraceTime is {rule.grace}"
    said = f"{names}: requeued, {seconds} s after the first signal ({parts})"
    need, least = measured.need, measured.least
    if need is None or least is None:
        if seconds < 30:
            fix = "ask for a GraceTime of 60 or more; --run RUN of an earlier run says whether it is enough"
            return warning("preemption", said, fix)
        return ok("preemption", said)
    said += f"; {measured.stop}"
    fix = f"ask for GraceTime={max(1, round(need) + 1 - kill_wait)}; until then --run.save-every bounds what is lost"
    if seconds < least:
        return bad("preemption", said, fix)
    return warning("preemption", said, fix) if seconds < need else ok("preemption", said)


def _by_partition(
    partitions: Sequence[cluster.Partition], chosen: Sequence[cluster.Partition], nodes: Sequence[cluster.Node]
) -> dict[str, Rule]:
    rules = {}
    for one in chosen:
        beside = {name for node in nodes if one.name in node.partitions for name in node.partitions}
        above = any(other.priority_tier > one.priority_tier for other in partitions if other.name in beside)
        rules[one.name] = Rule(_mode(one.preempt_mode) if above else "OFF", one.grace_time)
    return {name: rule if rule.mode != "OFF" else Rule("OFF", 0) for name, rule in rules.items()}


def _by_qos(settings: Mapping[str, str], only: str | None) -> dict[str, Rule] | None:
    """The QOS that another may preempt; None where nobody says."""
    try:
        said = cluster.ask(["sacctmgr", "-nP", "show", "qos", "format=Name,Preempt,PreemptMode,GraceTime"])
    except LauncherError:
        return None
    rows = [fields for fields in (line.split("|") for line in said.splitlines()) if len(fields) == 4]
    if not rows:
        return None
    below = {name for _, preempts, _, _ in rows for name in preempts.split(",") if name}
    rules = {}
    for name, _, mode, grace in rows:
        of_cluster = mode.lower() in ("", "cluster")
        seconds = cluster.seconds_of(grace) if re.search(r"\d", grace) else 0
        if only not in (None, name):
            continue
        rule = Rule(_mode(settings.get("PreemptMode", "OFF") if of_cluster else mode), seconds or 0)
        rules[f"QOS {name}"] = rule if name in below and rule.mode != "OFF" else Rule("OFF", 0)
    return rules


def _mode(said: str) -> str:
    """`GANG,SUSPEND` and the like as what happens."""
    words = said.upper().split(",")
    return next(
        (mode for mode in ("SUSPEND", "REQUEUE", "CANCEL") if mode in words),
        "OFF" if "GANG" not in words else "SUSPEND",
    )
