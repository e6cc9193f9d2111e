"""What a job asks the cluster for: `launcher submit`'s flags over a site's file, checked before it is queued."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from launcher.errors import LauncherError, UsageError
from launcher.options import meant
from launcher.slurm import cluster

__all__ = [
    "FLAGS",
    "Request",
    "Site",
    "allocation",
    "as_dict",
    "check",
    "check_accounts",
    "check_job",
    "chosen",
    "inside",
    "read_flags",
    "read_site",
    "with_shares",
]


def _said(what: str, metavar: str = "", default: Any = None) -> Any:
    """A flag that nobody need give."""
    return field(default=default, metadata={"help": what, "metavar": metavar})


@dataclass(frozen=True)
class Request:
    """What `launcher submit`'s flags say; None and empty: left to the site's file, or to SLURM."""

    nodes: int | None = _said("nodes; default 1", "N")
    gpus: int | None = _said("GPUs on each node, a process each; 0: CPU processes, --tasks of them", "N")
    tasks: int | None = _said("with --gpus 0: CPU processes on each node; default 1", "T")
    cpus: int | None = _said("CPU cores a process; default: with GPUs, its share of the node's", "N")
    mem: str | None = _said("memory on each node, as SLURM writes it: 64G; 0: all there is")
    time: str | None = _said("time limit: minutes, HH:MM:SS or D-HH:MM:SS; behind it the run goes on in a new start")
    partition: str | None = _said("the partition; default: the cluster's")
    account: str | None = _said("the account to charge")
    qos: str | None = _said("the quality of service")
    constraint: str | None = _said("features that nodes must have, as SLURM writes them: a100&ib", "FEATURES")
    exclude: str | None = _said("nodes not to run on: node[3,7-9]", "NODES")
    reservation: str | None = _said("the reservation to run in")
    array: str | None = _said("a run for each index, which the recipe finds in SLURM_ARRAY_TASK_ID: 0-9, 1,5,7%%2")
    sweep: str | None = _said("a run for each combination of options: 'lr=1e-3,3e-4 model.depth=8,12'", "GRID")
    parallel: int | None = _said("of a sweep, how many runs at once", "N")
    after: str | None = _said("start when this job has ended well", "JOB")
    chain: int | None = _said("N jobs that go on one after the other, where a site does not requeue", "N")
    requeue: bool | None = _said("go on in a new start after a preemption, the time limit or a lost node; default: yes")
    signal_lead: int | None = _said("seconds before the time limit at which SLURM signals as well; default 120", "S")
    via: str | None = _said("srun (default): a task a process; accelerate: its agent on every node", "WAY")
    container: str | None = _said("run in this image: by Apptainer if it ends in .sif, else by Pyxis", "IMAGE")
    mounts: str | None = _said("directories to see in the container: /data,/scratch:/tmp", "DIRS")
    python: str | None = _said("the Python to run with; default: this one, in a container python3", "PATH")
    setup: tuple[str, ...] = _said(
        "a line for the batch script to run first ('module load cuda'); repeatable", "LINE", ()
    )
    sbatch: tuple[str, ...] = _said("any other option of sbatch, such as comment=hello; repeatable", "KEY=VALUE", ())
    template: str | None = _said("a batch script of your own to fill in, made from slurm/job.sh", "FILE")


FLAGS: dict[str, Field[Any]] = {flag.name.replace("_", "-"): flag for flag in fields(Request)}
VIA = ("srun", "accelerate")
LEAST = {"nodes": 1, "gpus": 0, "tasks": 1, "cpus": 1, "parallel": 1, "chain": 1, "signal_lead": 1}
# sbatch's own names of what has a flag here, or what the batch script rests on
OURS = {
    *("nodes", "ntasks", "ntasks-per-node", "gpus", "gpus-per-node", "cpus-per-task", "mem", "time", "partition"),
    *("account", "qos", "constraint", "exclude", "reservation", "array", "dependency", "requeue", "no-requeue"),
    *("signal", "output", "error", "open-mode", "chdir", "wrap", "parsable", "job-name", "export", "input"),
    *("test-only", "wait", "wait-all-nodes", "help", "usage", "version", "clusters"),
}


@dataclass(frozen=True)
class Site:
    """A file of a site's defaults: `[submit]` by flag name, `[environment]` for every process of a job."""

    name: str = ""
    submit: Mapping[str, Any] | None = None
    environment: Mapping[str, str] | None = None


def read_site(name: str | None, shipped: Path) -> Site:
    """The file of a cluster: `name` is a path, or one of `slurm/clusters/` here, or of the `shipped` ones.

    Raises:
        UsageError: it is not there, is no TOML, or says what is not known.
    """
    name = name or os.environ.get("LAUNCHER_CLUSTER") or None
    if name is None:
        return Site()
    places = [Path("slurm/clusters"), Path("~/.config/launcher/clusters").expanduser(), shipped]
    candidates = [Path(name).expanduser()] if "/" in name or name.endswith(".toml") else []
    candidates += [place / f"{name}.toml" for place in places if "/" not in name]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        known = sorted({file.stem for place in places for file in place.glob("*.toml")})
        raise UsageError(f"--cluster {name}: no such file{meant(name, known)}; there are {', '.join(known) or 'none'}")
    try:
        said = tomllib.loads(path.read_bytes().decode())
    except (OSError, ValueError) as error:
        raise UsageError(f"--cluster {path}: {error}") from None
    for table in said:
        if table not in ("submit", "environment") or not isinstance(said[table], dict):
            raise UsageError(f"--cluster {path}: {table}: it has the tables [submit] and [environment]")
    variables = {}
    for key, value in said.get("environment", {}).items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key) or isinstance(value, dict | list):
            raise UsageError(f"--cluster {path}: environment.{key}: a variable's name, and one value")
        variables[key] = str(value).lower() if isinstance(value, bool) else str(value)
        if "\0" in variables[key]:
            raise UsageError(f"--cluster {path}: environment.{key}: no variable can hold a NUL")
    submit = {key: _from_site(path, key, value) for key, value in said.get("submit", {}).items()}
    return Site(path.stem, {key.replace("-", "_"): value for key, value in submit.items()}, variables)


def _from_site(path: Path, key: str, value: Any) -> Any:
    where = f"--cluster {path}: submit.{key}"
    if key.replace("_", "-") not in FLAGS:
        raise UsageError(f"{where}: launcher submit has no flag --{key}{meant(key, list(FLAGS))}")
    kind = FLAGS[key.replace("_", "-")].type
    if "tuple" in str(kind):
        if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise UsageError(f'{where}: a list of texts: ["..."]')
        return tuple(value)
    wanted = int if "int" in str(kind) else bool if "bool" in str(kind) else str
    if type(value) is int and key == "time":
        value = str(value)
    if type(value) is not wanted:
        raise UsageError(f"{where} = {value!r}: expected {wanted.__name__}")
    return value


def read_flags(given: Mapping[str, Any], site: Site) -> Request:
    """The request that flags make, over a site's defaults; lists of both are kept, the site's first.

    Raises:
        UsageError: a value is impossible, or two exclude each other.
    """
    own = {key: value for key, value in given.items() if value not in (None, [], ())}
    values = {**(site.submit or {}), **own}
    for key in ("setup", "sbatch"):
        values[key] = (*((site.submit or {}).get(key, ())), *own.get(key, ()))
    if own.get("gpus") and own.get("tasks") is None:
        values.pop("tasks", None)  # the site's, for its CPU jobs
    request = Request(**values)
    for key, value in values.items():
        if value == "":
            raise UsageError(f"--{key.replace('_', '-')} is empty")
    for key, least in LEAST.items():
        value = getattr(request, key)
        if value is not None and value < least:
            raise UsageError(f"--{key.replace('_', '-')} {value}: at least {least}")
    if request.gpus is None:
        raise UsageError(
            "say --gpus N, the GPUs on each node (a process each), or --gpus 0 --tasks T for T CPU processes a node"
        )
    if request.gpus and request.tasks is not None:
        raise UsageError(f"--tasks {request.tasks} is for CPU processes, with --gpus 0: a GPU has a process each")
    if request.via is not None and request.via not in VIA:
        raise UsageError(f"--via {request.via}: srun or accelerate")
    if sum(value is not None for value in (request.array, request.sweep, request.chain)) > 1:
        raise UsageError("--array, --sweep and --chain exclude each other")
    if request.parallel is not None and request.sweep is None:
        raise UsageError("--parallel limits a --sweep, which is not given (an --array takes 0-9%2)")
    if request.array is not None and not re.fullmatch(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?", request.array):
        raise UsageError(f"--array {request.array}: indices such as 0-9, 1,5,7 or 0-99%8")
    if request.time is not None:
        _seconds(request.time)
    for item in request.sbatch:
        key = item.partition("=")[0].lstrip("-")
        if key in OURS:
            raise UsageError(f"--sbatch {item}: the batch script rests on it, or --{key} is a flag here")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
            raise UsageError(f"--sbatch {item}: a long option of sbatch as KEY=VALUE, such as comment=hello")
    return request


def chosen(request: Request, partitions: Sequence[cluster.Partition]) -> list[cluster.Partition]:
    """The partitions that a job may go to: one, or those of `a,b`, of which SLURM takes the first that has room.

    Raises:
        UsageError: there is no such partition, or it is not up.
    """
    names = ", ".join(partition.name for partition in partitions)
    if request.partition is None:
        default = [partition for partition in partitions if partition.default]
        if not default:
            raise UsageError(f"say --partition: the cluster has no default one; there are {names}")
        return default
    known = {partition.name: partition for partition in partitions}
    for name in request.partition.split(","):
        if name not in known:
            raise UsageError(f"--partition {name}: no such partition; there are {names}")
        if not known[name].up:
            raise UsageError(f"--partition {name}: it is not up now (scontrol show partition {name})")
    return [known[name] for name in request.partition.split(",")]


def inside(
    request: Request, partitions: Sequence[cluster.Partition], nodes: Sequence[cluster.Node]
) -> list[cluster.Node]:
    """The nodes of the partitions that a job may go to.

    Raises:
        UsageError: there is no such partition.
    """
    names = {partition.name for partition in chosen(request, partitions)}
    return [node for node in nodes if names & {*node.partitions}]


def with_shares(request: Request, nodes: Sequence[cluster.Node]) -> Request:
    """The request with the number of nodes, and a process's share of the cores of one of `nodes`, filled in."""
    request = replace(request, nodes=request.nodes or 1, tasks=request.tasks or request.gpus or 1)
    if request.cpus is None and request.gpus:
        shares = [node.cpus // node.gpus for node in nodes if node.gpus >= request.gpus]
        return replace(request, cpus=max(1, min(shares))) if shares else request
    return request


def allocation(request: Request) -> list[str]:
    """The options of sbatch that stand for a request: what goes into `#SBATCH` lines."""
    tasks = 1 if request.via == "accelerate" else request.tasks
    cpus = (request.cpus or 1) * ((request.tasks or 1) if request.via == "accelerate" else 1)
    options = [f"--nodes={request.nodes}", f"--ntasks-per-node={tasks}", f"--cpus-per-task={cpus}"]
    options += [f"--gpus-per-node={request.gpus}"] if request.gpus else []
    for key in ("mem", "time", "partition", "account", "qos", "constraint", "exclude", "reservation"):
        value = getattr(request, key)
        options += [f"--{key}={value}"] if value is not None else []
    options.append("--no-requeue" if request.requeue is False else "--requeue")
    return options + [f"--{item.lstrip('-')}" for item in request.sbatch]


def check(request: Request, partitions: Sequence[cluster.Partition], nodes: Sequence[cluster.Node]) -> None:
    """Refuse what the cluster can never give, naming what there is.

    Raises:
        UsageError: a partition, a number of nodes, GPUs, cores, a time that it does not have.
    """
    refused = []
    for partition in chosen(request, partitions):
        try:
            _check_limits(request, partition)
            _check_nodes(request, partition, [node for node in nodes if partition.name in node.partitions])
            return
        except UsageError as error:
            refused.append(error)
    raise refused[0]


def _check_limits(request: Request, partition: cluster.Partition) -> None:
    if request.time is not None and partition.max_time is not None:
        seconds = _seconds(request.time)
        if seconds is None or seconds > partition.max_time:
            raise UsageError(
                f"--time {request.time}: partition {partition.name} allows {_span(partition.max_time)} at most "
                "(a job that reaches its limit goes on in a new one)"
            )
    for what, allowed in (("account", partition.allowed_accounts), ("qos", partition.allowed_qos)):
        value = getattr(request, what)
        if value is not None and allowed is not None and value not in allowed:
            raise UsageError(f"--{what} {value}: partition {partition.name} allows {', '.join(allowed)}")


def _check_nodes(request: Request, partition: cluster.Partition, there: Sequence[cluster.Node]) -> None:
    count, where = request.nodes or 1, f"partition {partition.name}"
    if partition.max_nodes is not None and count > partition.max_nodes:
        raise UsageError(f"--nodes {count}: {where} allows {partition.max_nodes} at most")
    if count > len(there):
        raise UsageError(f"--nodes {count}: {where} has {len(there)}")
    if request.constraint is not None and re.fullmatch(r"\w+", request.constraint):
        known = sorted({feature for node in there for feature in node.features})
        if request.constraint not in known:
            raise UsageError(
                f"--constraint {request.constraint}: no node of {where} has it; there are {', '.join(known) or 'none'}"
            )
    tasks = request.tasks or request.gpus or 1
    cores = (request.cpus or 1) * tasks
    each = "" if request.cpus is None else f"--cpus {request.cpus} for each of "
    for said, wanted, unit, numbers in (
        (f"--gpus {request.gpus}", request.gpus or 0, "GPUs", [node.gpus for node in there]),
        (f"{each}{tasks} processes", cores, "cores", [node.cpus for node in there]),
    ):
        if wanted > max(numbers):
            raise UsageError(f"{said}: a node of {where} has {max(numbers)} {unit} at most")
        if (enough := sum(number >= wanted for number in numbers)) < count:
            raise UsageError(f"--nodes {count}: only {enough} of {where} have {wanted} {unit}")


def check_accounts(request: Request) -> None:
    """Refuse an account, or a QOS, that this user has not, where the cluster keeps accounts."""
    if request.account is None and request.qos is None:
        return
    try:
        said = cluster.ask(
            ["sacctmgr", "-nP", "show", "assoc", f"user={_user()}", "format=Account,QOS,DefaultQOS"],
        )
    except LauncherError:
        return  # no accounting, or not for everybody to read: sbatch decides
    rows = [line.split("|") for line in said.splitlines() if line]
    if not rows:
        return
    accounts = sorted({row[0] for row in rows})
    if request.account is not None and request.account not in accounts:
        raise UsageError(f"--account {request.account}: you have no such account; you have {', '.join(accounts)}")
    qos = sorted({name for row in rows if request.account in (None, row[0]) for name in row[1].split(",") if name})
    if request.qos is not None and qos and request.qos not in qos:
        raise UsageError(f"--qos {request.qos}: you may not use it; you may use {', '.join(qos)}")


def check_job(request: Request) -> None:
    """Refuse to wait for a job that SLURM does not know: it would wait for ever.

    Raises:
        UsageError: there is none, or it has ended otherwise than well.
    """
    if request.after is None:
        return
    if not re.fullmatch(r"\d+(_\d+)?", request.after):
        raise UsageError(f"--after {request.after}: a job's id is a number (launcher status lists them)")
    job = cluster.job(request.after)
    if job is None:
        raise UsageError(f"--after {request.after}: SLURM does not know that job (any more)")
    if not job.active and job.state != "COMPLETED":
        raise UsageError(f"--after {request.after}: that job has ended, {job.state}: this one would never start")


def as_dict(request: Request) -> dict[str, Any]:
    """What differs from a request that says nothing, for JSON."""
    return {key: value for key, value in asdict(request).items() if value not in (None, (), [])}


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _seconds(time: str) -> int | None:
    try:
        return cluster.seconds_of(time)
    except ValueError:
        raise UsageError(f"--time {time}: minutes, HH:MM:SS or D-HH:MM:SS") from None


def _span(seconds: int) -> str:
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours // 24}-{hours % 24:02d}:{minutes:02d}:00" if hours >= 24 else f"{hours}:{minutes:02d}:00"
