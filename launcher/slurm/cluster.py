"""What SLURM says of itself: its configuration, partitions, nodes and jobs, through its own commands.

Everything a person's environment could change in these commands' output (SQUEUE_FORMAT, SLURM_TIME_FORMAT, a locale) is
taken out before they are called.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from launcher.errors import LauncherError

__all__ = [
    "Job",
    "Node",
    "Partition",
    "accounted",
    "ask",
    "configuration",
    "environment",
    "job",
    "jobs",
    "nodes",
    "partitions",
    "seconds_of",
]

PATIENCE = 60.0  # seconds that a busy controller may take to answer
UNIT, RECORD = "\x1f", "\x1e"
# Ended states in which a job stays; others (COMPLETING, REQUEUED, ...) pass.
ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"),
    *("OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED"),
}


@dataclass(frozen=True)
class Partition:
    """A partition, with what it allows."""

    name: str
    default: bool
    up: bool
    nodes: int
    max_nodes: int | None
    """None: as many as there are."""
    max_time: int | None
    """Seconds; None: no limit."""
    default_time: int | None
    preempt_mode: str
    """`REQUEUE`, `CANCEL`, `OFF`, ..."""
    grace_time: int
    """Seconds between a preemption's first signal and its last."""
    priority_tier: int
    allowed_accounts: tuple[str, ...] | None
    """None: all of them."""
    allowed_qos: tuple[str, ...] | None


@dataclass(frozen=True)
class Node:
    """A node, with what is on it."""

    name: str
    partitions: tuple[str, ...]
    state: str
    """As SLURM writes it: `IDLE`, `MIXED+DRAIN`, `DOWN*`, ..."""
    cpus: int
    memory: int
    """MiB."""
    gpus: int
    features: tuple[str, ...]
    reason: str = ""

    @property
    def usable(self) -> bool:
        """Whether a job may ever start here as it is."""
        return not re.search(r"DOWN|DRAIN|FAIL|MAINT|NOT_RESPONDING|FUTURE", self.state)


@dataclass(frozen=True)
class Job:
    """A job, or one task of an array, while SLURM remembers it."""

    id: str
    """As a person names it: `123`, or `123_4` for a task of an array."""
    number: str
    """What SLURM_JOB_ID is: of every task its own."""
    name: str
    user: str
    partition: str
    state: str
    reason: str
    nodes: int
    node_list: str
    submitted: float | None
    start: float | None
    """When it started, or is expected to; seconds since 1970."""
    end: float | None
    limit: int | None
    """Seconds; None: none."""
    work_dir: str
    """The run directory, of a job that `launcher submit` made."""

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.state not in ENDED

    @property
    def array(self) -> str:
        """The array's id, or the job's own."""
        return self.id.partition("_")[0]


def environment() -> dict[str, str]:
    """This process's environment, without what changes how SLURM's commands answer."""
    ours = {name: value for name, value in os.environ.items() if not re.match(r"(SQUEUE|SINFO|SACCT|SCONTROL)_", name)}
    return {**ours, "LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"}


def ask(argv: Sequence[str], *, patience: float = PATIENCE) -> str:
    """What one of SLURM's commands prints; it may take `patience` seconds.

    Raises:
        LauncherError: it is not installed, does not answer, or refuses; in its own words.
    """
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=patience,
            env=environment(),
            encoding="utf-8",
            errors="replace",
        )
    except FileNotFoundError:
        raise LauncherError(
            f"there is no {argv[0]} here: run this on a login node of the cluster (or `module load slurm`)"
        ) from None
    except subprocess.TimeoutExpired:
        raise LauncherError(
            f"{argv[0]} has not answered for {patience:.0f} s: is slurmctld up? (scontrol ping)"
        ) from None
    if done.returncode:
        words = " ".join(line.partition("error: ")[2] or line for line in done.stderr.splitlines() if line.strip())
        raise LauncherError(f"{argv[0]} says: {words or f'exit code {done.returncode}'}")
    return done.stdout


def configuration() -> dict[str, str]:
    """What `scontrol show config` says, by key."""
    pairs = (line.partition("=") for line in ask(["scontrol", "show", "config"]).splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def partitions() -> list[Partition]:
    """The partitions of the cluster."""
    return [_partition(_fields(line)) for line in ask(["scontrol", "-o", "show", "partition"]).splitlines() if line]


def nodes() -> list[Node]:
    """The nodes of the cluster."""
    lines = ask(["scontrol", "-o", "show", "node"]).splitlines()
    return [_node(_fields(line)) for line in lines if line.startswith("NodeName=")]


# what stands last may hold anything
JOB = ("%i", "%A", "%j", "%u", "%P", "%T", "%r", "%D", "%N", "%V", "%S", "%e", "%l", "%Z")


def jobs(*ids: str, mine: bool = False, patience: float = PATIENCE) -> list[Job]:
    """The jobs of which SLURM still knows, tasks of arrays each; all of them, of `ids`, or this user's own."""
    some = ["-j", ",".join(ids)] if ids else []
    some += ["-u", str(os.getuid())] if mine else []
    try:
        said = ask(["squeue", "-h", "-r", "-t", "all", *some, "-o", RECORD + UNIT.join(JOB)], patience=patience)
    except LauncherError as error:
        if ids and "Invalid job id" in str(error):
            return []
        raise
    return [_job(record.removesuffix("\n").split(UNIT, len(JOB) - 1)) for record in said.split(RECORD)[1:]]


def job(id_: str, *, patience: float = PATIENCE) -> Job | None:
    """The job (or array's task) with this id; None where SLURM has forgotten it."""
    found = jobs(id_, patience=patience)
    return next((one for one in found if id_ in (one.id, one.number)), found[0] if found else None)


def accounted(id_: str) -> tuple[str, str] | None:
    """State and exit code of a job that has left SLURM's memory, from its accounting; None without one."""
    try:
        said = ask(["sacct", "-X", "-P", "-n", "-D", "--format=State,ExitCode", "-j", id_])
    except LauncherError:
        return None
    lines = [line for line in said.splitlines() if line]
    state, _, code = lines[-1].partition("|") if lines else ("", "", "")
    return (state.split()[0], code) if state else None  # CANCELLED by 1000


def seconds_of(text: str) -> int | None:
    """Seconds of `30`, `30:00`, `2:30:00`, `1-12`, `1-12:00:00`, as SLURM reads them; None where there is no limit.

    Raises:
        ValueError: it is no such time.
    """
    if text.upper() in ("UNLIMITED", "INFINITE", "NONE", "N/A", "NOT_SET", ""):
        return None
    match = re.fullmatch(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?|(\d+)|(?:(\d+):)?(\d+):(\d+))", text)
    if match is None:
        raise ValueError(text)
    days, day_hours, day_minutes, day_seconds, alone, hours, minutes, seconds = (
        int(part or 0) for part in match.groups()
    )
    if match[1] is not None:
        return ((days * 24 + day_hours) * 60 + day_minutes) * 60 + day_seconds
    return (hours * 60 + minutes + alone) * 60 + seconds


def _fields(line: str) -> dict[str, str]:
    """`Key=Value Key=Value` where values may hold spaces, but no ` Key=`."""
    parts = re.split(r" +(?=[A-Z][A-Za-z/:]*=)", line.strip())
    return {key: value for key, _, value in (part.partition("=") for part in parts)}


def _partition(said: dict[str, str]) -> Partition:
    return Partition(
        name=said["PartitionName"],
        default=said.get("Default") == "YES",
        up=said.get("State") == "UP",
        nodes=_number(said.get("TotalNodes")) or 0,
        max_nodes=_number(said.get("MaxNodes")),
        max_time=seconds_of(said.get("MaxTime", "")),
        default_time=seconds_of(said.get("DefaultTime", "")),
        preempt_mode=said.get("PreemptMode", "OFF"),
        grace_time=_number(said.get("GraceTime")) or 0,
        priority_tier=_number(said.get("PriorityTier")) or 0,
        allowed_accounts=_listed(said.get("AllowAccounts")),
        allowed_qos=_listed(said.get("AllowQos")),
    )


def _node(said: dict[str, str]) -> Node:
    return Node(
        name=said["NodeName"],
        partitions=tuple(filter(None, said.get("Partitions", "").split(","))),
        state=said.get("State", "UNKNOWN"),
        cpus=_number(said.get("CPUTot")) or 0,
        memory=_number(said.get("RealMemory")) or 0,
        gpus=sum(int(number) for number in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", said.get("Gres", ""))),
        features=tuple(filter(None, said.get("ActiveFeatures", "").removeprefix("(null)").split(","))),
        reason=said.get("Reason", ""),
    )


def _job(said: list[str]) -> Job:
    id_, number, name, user, partition, state, reason, count, where, submitted, start, end, limit, work_dir = said
    return Job(
        *(id_, number, name, user, partition, state, "" if reason == "None" else reason, _number(count) or 0, where),
        *(_when(submitted), _when(start), _when(end), seconds_of(limit), work_dir),
    )


def _when(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:  # N/A
        return None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _listed(text: str | None) -> tuple[str, ...] | None:
    return None if text in (None, "ALL") else tuple(text.split(","))
