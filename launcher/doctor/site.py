"""Whether a cluster's settings let jobs survive there: what SLURM says of itself, read for what it means to a run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from launcher.doctor.findings import Finding, bad, ok, warning
from launcher.doctor.measured import Measured
from launcher.doctor.preemption import check_preemption, span
from launcher.errors import UsageError
from launcher.slurm import cluster
from launcher.slurm.request import Request, Site, check, check_accounts

__all__ = ["Described", "check_site", "describe", "wanted"]

TRIED = (22, 5)  # the oldest SLURM that this was tried with
PORTS = (10000, 31999)  # of the rendezvous, which the batch script picks
LEAD = 120  # seconds before the time limit at which SLURM signals, if submit is not told otherwise


@dataclass(frozen=True)
class Described:
    """A cluster as it describes itself, and what is wanted of it."""

    settings: Mapping[str, str]
    partitions: Sequence[cluster.Partition]
    nodes: Sequence[cluster.Node]
    request: Request
    """What jobs ask for: by the site's file and the command line."""
    site: str
    """The site file's name."""
    measured: Measured

    @property
    def chosen(self) -> list[cluster.Partition]:
        """The partition that jobs go to; without a word on it all of them."""
        name = self.request.partition
        return [one for one in self.partitions if name in (None, one.name)]

    @property
    def reachable(self) -> list[cluster.Node]:
        """The nodes of these partitions."""
        names = {one.name for one in self.chosen}
        return [node for node in self.nodes if names & set(node.partitions)]

    def seconds(self, key: str, default: int) -> int:
        """A setting that is a time."""
        match = re.match(r"\d+", self.settings.get(key, ""))
        return int(match[0]) if match else default


def wanted(site: Site, partition: str | None = None) -> Request:
    """What jobs ask for by a site's file, or in another partition."""
    request = Request(**(site.submit or {}))
    return request if partition is None else replace(request, partition=partition)


def describe(request: Request, site: str, measured: Measured) -> Described:
    """Ask SLURM.

    Raises:
        LauncherError: it does not answer.
        UsageError: there is no such partition.
    """
    found = Described(cluster.configuration(), cluster.partitions(), cluster.nodes(), request, site, measured)
    if not found.chosen:
        there = ", ".join(one.name for one in found.partitions)
        raise UsageError(f"--partition {request.partition}: no such partition; there are {there}")
    return found


def check_site(here: Described) -> list[Finding]:
    """What is to be said of a cluster."""
    found = [_version(here), *_request(here), *_partitions(here), *_nodes(here), _requeue(here), *_requeue_exit(here)]
    found += check_preemption(
        here.settings, here.partitions, here.chosen, here.nodes, here.measured, qos=here.request.qos
    )
    found += [_kill_wait(here), *_limits(here), _lead(here), _processes(here), _tasks(here)]
    found += [_accounting(here), _memory(here), _lost_node(here), _credentials(here), _prolog(here), _ports(here)]
    return [*found, *_gpus(here), _arrays(here), _propagated(here)]


def _version(here: Described) -> Finding:
    version = here.settings.get("SLURM_VERSION", "unknown")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers and numbers < TRIED:
        return warning(
            "slurm", f"{version}: older than 22.05, with which this was tried", "launcher drill RUN tries it"
        )
    return ok("slurm", f"{version}, cluster {here.settings.get('ClusterName', '?')}")


def _request(here: Described) -> list[Finding]:
    """Whether the site's file asks for what there is."""
    if not here.site:
        return []
    try:
        check(here.request, here.partitions, here.nodes)
        check_accounts(here.request)
    except UsageError as error:
        return [bad("site file", f"{here.site}: {error}", "correct its [submit] table")]
    return [ok("site file", f"{here.site}: what it asks for is there")]


def _partitions(here: Described) -> list[Finding]:
    found = []
    for one in here.chosen:
        inside = [node for node in here.nodes if one.name in node.partitions]
        usable = sum(node.usable for node in inside)
        if not one.up:
            told = bad if here.request.partition else warning
            found.append(told("partition", f"{one.name} is not up: jobs wait there", "use another, --partition"))
        elif not usable:
            told = bad if here.request.partition else warning
            found.append(told("partition", f"{one.name} has no usable node", "use another, --partition"))
    names = ", ".join(f"{one.name}{' (default)' if one.default else ''}, {one.nodes} nodes" for one in here.chosen)
    return found or [ok("partition", names)]


def _nodes(here: Described) -> list[Finding]:
    down = [node for node in here.reachable if not node.usable]
    if not down:
        return [ok("nodes", f"all {len(here.reachable)} usable")]
    said = [f"{node.name} {node.state}{f' ({node.reason})' if node.reason else ''}" for node in down[:8]]
    more = f" and {len(down) - 8} more" if len(down) > 8 else ""
    fix = "scontrol update NodeName=... State=RESUME, by an administrator, when the reason is gone"
    return [warning("nodes", f"{len(down)} of {len(here.reachable)} not usable: {', '.join(said)}{more}", fix)]


def _requeue(here: Described) -> Finding:
    if here.request.requeue is False:
        fix = "drop requeue = false from the site's file, or submit with --chain N"
        return warning("requeue", "the site's file says not to", fix)
    if here.settings.get("JobRequeue") == "0":
        return ok("requeue", "JobRequeue=0: only of jobs that ask for it, as launcher submit does")
    return ok("requeue", "JobRequeue=1")


def _requeue_exit(here: Described) -> list[Finding]:
    """Exit codes for which SLURM requeues whatever the batch script has decided."""
    said = {key: _said(here, key) for key in ("RequeueExit", "RequeueExitHold")}
    hit = [f"{key}={value}" for key, value in said.items() if value and _holds(value, 1)]
    fix = "have 1 taken out: the launcher requeues by itself what is to go on, and a failed run exits with 1"
    return [warning("requeue by exit code", f"{', '.join(hit)}: a run that failed starts again", fix)] if hit else []


def _kill_wait(here: Described) -> Finding:
    seconds = here.seconds("KillWait", 30)
    said = f"{seconds} s from SIGTERM to SIGKILL, at scancel and the time limit"
    need = here.measured.need
    if need is None:
        if seconds < 30:
            fix = "ask for KillWait=30 or more; --run RUN of an earlier run says whether it is enough"
            return warning("KillWait", said, fix)
        return ok("KillWait", said)
    said += f"; {here.measured.stop}"
    if seconds < need:
        fix = f"ask for KillWait={round(need) + 1}; until then scancel may lose what --run.save-every has not saved"
        return warning("KillWait", said, fix)
    return ok("KillWait", said)


def _limits(here: Described) -> list[Finding]:
    """Time limits of the partitions, told once for all that have the same."""
    over = here.settings.get("OverTimeLimit", "0").split()[0]
    late = "" if over == "0" else f"; jobs may run {over} min over it, unpromised"
    found = []
    for (most, default), names in _alike((one.name, (one.max_time, one.default_time)) for one in here.chosen):
        said = f"{names}: at most {span(most)}, without --time {span(default if default is not None else most)}{late}"
        asked = None if here.request.time is None else cluster.seconds_of(here.request.time)
        limit = min((seconds for seconds in (asked, most) if seconds is not None), default=None)
        least = 2 * (here.measured.need or 0) + 180  # a limit is kept to the minute
        if limit is not None and limit < least:
            fix = "ask for more --time: most of a start would go into starting and stopping"
            found.append(warning("time limit", f"{said}; a start has {span(limit)}", fix))
        else:
            found.append(ok("time limit", f"{said} (limits are kept to the minute)"))
    return found


def _lead(here: Described) -> Finding:
    lead = here.request.signal_lead or LEAD
    need = here.measured.need
    said = f"SLURM signals {lead} s before the time limit, should the run's own clock fail"
    if need is not None and need > lead:
        fix = f"submit with --signal-lead {round(need * 1.5)}, or put signal_lead into the site's file"
        return warning("signal lead", f"{said}; a stop takes up to {need:.0f} s", fix)
    return ok("signal lead", said)


def _processes(here: Described) -> Finding:
    kind = here.settings.get("ProctrackType", "?").removeprefix("proctrack/")
    if kind == "cgroup":
        return ok("process tracking", "cgroup: what a job leaves behind is killed")
    if kind == "pgid":
        said = "pgid: processes that change their group (data workers, compilers) are neither signalled nor killed"
        return bad("process tracking", said, "have ProctrackType=proctrack/cgroup set")
    said = f"{kind}: what a job leaves behind may live on, and hold its GPU"
    return warning("process tracking", said, "ask for ProctrackType=proctrack/cgroup")


def _tasks(here: Described) -> Finding:
    said = here.settings.get("TaskPlugin", "?").replace("task/", "")
    if "cgroup" in said or "affinity" in said:
        return ok("task plugin", f"{said}: jobs keep to their cores")
    return warning(
        "task plugin",
        f"{said}: nothing keeps the jobs of a node to their own cores",
        "take whole nodes (--sbatch exclusive=user), or ask for TaskPlugin=task/cgroup,task/affinity",
    )


def _accounting(here: Described) -> Finding:
    kind = here.settings.get("AccountingStorageType", "?").removeprefix("accounting_storage/")
    gather = here.settings.get("JobAcctGatherType", "?").removeprefix("jobacct_gather/")
    if kind == "slurmdbd":
        used = "" if gather != "none" else "; JobAcctGatherType=none, so no memory use of a job"
        return ok("accounting", f"slurmdbd{used}")
    return warning(
        "accounting",
        f"{kind}: SLURM forgets jobs, and why they were killed, {here.seconds('MinJobAge', 300)} s after their end",
        "nothing to do: launcher status goes by the run's own files then; accounts and QOS are not checked at submit",
    )


def _memory(here: Described) -> Finding:
    seconds = here.seconds("MinJobAge", 300)
    said = f"jobs are remembered for {seconds} s after their end" if seconds else "jobs are remembered for good"
    if 0 < seconds < 60:
        return warning("MinJobAge", said, "ask for 300: --after JOB and launcher status need a job to be remembered")
    return ok("MinJobAge", said)


def _lost_node(here: Described) -> Finding:
    seconds = here.seconds("SlurmdTimeout", 300)
    if not seconds:
        return bad("lost node", "SlurmdTimeout=0: a node that dies is never missed", "have SlurmdTimeout=300 set")
    said = f"missed after {seconds} s; its jobs are requeued then"
    if seconds > 900:
        return warning("lost node", said, "ask for SlurmdTimeout=300")
    return ok("lost node", said)


def _credentials(here: Described) -> Finding:
    match = re.search(r"cred_expire=(\d+)", here.settings.get("AuthInfo", ""))
    seconds = int(match[1]) if match else 120
    said = f"a requeued job starts {seconds} s later at the earliest (AuthInfo cred_expire)"
    if seconds > 300:
        return warning("requeue delay", said, "ask for AuthInfo=cred_expire=120")
    return ok("requeue delay", said)


def _prolog(here: Described) -> Finding:
    flags = _said(here, "PrologFlags")
    if "serial" in flags.lower():
        said = f"{flags}: prologs of a node run one after the other, starts wait"
        return warning("prolog", said, "ask for PrologFlags without Serial")
    return ok("prolog", f"flags {flags}" if flags else "no flags")


def _ports(here: Described) -> Finding:
    said = []
    for key in ("MpiParams", "SrunPortRange"):
        match = re.search(r"(\d+)-(\d+)", here.settings.get(key, ""))
        if match and int(match[1]) <= PORTS[1] and int(match[2]) >= PORTS[0]:
            said.append(f"{key} {match[0]}")
    if not said:
        return ok("ports", f"SLURM takes none of {PORTS[0]}-{PORTS[1]}, where ranks meet")
    return ok("ports", f"{', '.join(said)} lies in {PORTS[0]}-{PORTS[1]}, where ranks meet; used ones are passed over")


def _gpus(here: Described) -> list[Finding]:
    most = max((node.gpus for node in here.reachable), default=0)
    asked = here.request.gpus
    if not most:
        if asked:
            return [bad("gpus of nodes", f"none, and the site's file asks for {asked}", "use another --partition")]
        return [ok("gpus of nodes", "none: --gpus 0")]
    faults = []
    select = here.settings.get("SelectType", "?")
    if not select.endswith("cons_tres"):
        faults.append(f"SelectType={select}: --gpus-per-node needs select/cons_tres")
    if "gpu" not in here.settings.get("GresTypes", "").split(","):
        faults.append("GresTypes lacks gpu")
    if faults:
        return [bad("gpus of nodes", "; ".join(faults), "have it set: jobs get no GPUs otherwise")]
    counts = sorted({node.gpus for node in here.reachable})
    return [ok("gpus of nodes", " or ".join(map(str, counts)))]


def _arrays(here: Described) -> Finding:
    size = here.seconds("MaxArraySize", 1001)
    if size < 2:
        return warning("sweeps", f"MaxArraySize={size}: no job arrays", "submit runs one by one")
    return ok("sweeps", f"of up to {size} runs (MaxArraySize)")


def _propagated(here: Described) -> Finding:
    what = here.settings.get("PropagateResourceLimits", "ALL")
    apart = _said(here, "PropagateResourceLimitsExcept")
    if what == "NONE" or apart == "ALL":
        return ok("ulimits", "jobs have those of their nodes")
    return ok("ulimits", f"jobs take along those of the shell that submits{f', but {apart}' if apart else ''}")


def _said(here: Described, key: str) -> str:
    value = here.settings.get(key, "")
    return "" if value in ("(null)", "NONE", "None") else value


def _holds(ranges: str, code: int) -> bool:
    """Whether `1-4,9` holds a number."""
    pairs = (part.partition("-") for part in ranges.split(","))
    return any(first.isdigit() and int(first) <= code <= int(last or first) for first, _, last in pairs)


def _alike(
    named: Iterable[tuple[str, tuple[int | None, int | None]]],
) -> list[tuple[tuple[int | None, int | None], str]]:
    """Values with the names of all that have them, in order."""
    groups: dict[tuple[int | None, int | None], list[str]] = {}
    for name, value in named:
        groups.setdefault(value, []).append(name)
    return [(value, ", ".join(names)) for value, names in groups.items()]
