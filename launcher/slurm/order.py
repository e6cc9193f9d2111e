"""A job on its way to the queue: checked against the cluster, written into its run directory, given to sbatch."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from launcher.errors import LauncherError, UsageError
from launcher.rundir import RunDir
from launcher.show import printable
from launcher.slurm import cluster, record, snapshot
from launcher.slurm.rehearsal import Modules
from launcher.slurm.request import Request, check, check_accounts, check_job, chosen, inside, with_shares
from launcher.slurm.script import Script, check_rendered, render
from launcher.source import code_patch, describe_code

__all__ = [
    "Code",
    "Order",
    "Settled",
    "UnansweredError",
    "copy_code",
    "free",
    "load",
    "queue",
    "sbatch",
    "settle",
    "try_out",
]

LEAD = 120  # seconds
KILL_WAIT = 30  # seconds, SLURM's own default
# What a job must not inherit from the one that submits it, or from ranks around it.
NOT_INHERITED = re.compile(
    r"SLURM_(?!CONF$)|(LOCAL_)?(RANK|WORLD_SIZE)$|MASTER_(ADDR|PORT)$|TORCHELASTIC_|(SQUEUE|SINFO|SCONTROL|SACCT)_|"
    r"LAUNCHER_(JOB_END|GRACE|SIGNAL_LEAD|RUN|CWD|GPUS)$|ACCELERATE_USE_CPU$|"
    r"SBATCH_(ARRAY_INX|CHDIR|WORK_DIR|ERROR|EXPORT|INPUT|JOB_NAME|OPEN_MODE|OUTPUT|REQUEUE|NO_REQUEUE|SIGNAL|WAIT)$"
)
BY_FLAG = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE", "array": "ARRAY_INX", "gpus": "GPUS_PER_NODE"}


class UnansweredError(LauncherError):
    """sbatch does not answer: nobody knows whether it has queued the job."""


@dataclass(frozen=True)
class Code:
    """The code that a job runs."""

    recipe: str
    """The path of the recipe in the copy."""
    path: tuple[str, ...] = ()
    """What goes first on PYTHONPATH."""


@dataclass(frozen=True)
class Order:
    """A job as it was asked for; what request.json keeps, for `launcher resume`."""

    request: Request
    recipe: str
    """Where the person has it."""
    arguments: list[str]
    """The recipe's options, without --run.dir."""
    name: str
    cwd: str
    site: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    """What the site's file sets."""
    points: dict[int, list[str]] = field(default_factory=dict)
    """The options of each run of an array."""
    code: Code = Code("")

    def save(self, path: Path) -> None:
        """Write it into the run directory."""
        (path / "slurm" / "request.json").write_text(json.dumps(asdict(self), indent=2) + "\n")


def load(path: Path) -> Order:
    """The order of the run, or sweep, at `path`.

    Raises:
        UsageError: it was not submitted, or the file is broken.
    """
    file = path / "slurm" / "request.json"
    try:
        said: dict[str, Any] = json.loads(file.read_text())
        flags: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in said["request"].items()}
        request = Request(**flags)
        points = {int(index): list(options) for index, options in said["points"].items()}
        code = Code(said["code"]["recipe"], tuple(said["code"]["path"]))
        return Order(**{**said, "request": request, "points": points, "code": code})
    except FileNotFoundError:
        raise UsageError(
            f"{path} was not submitted: launcher submit [flags] RECIPE [options] --run.dir {shlex.quote(str(path))}"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{file} is broken ({error}): submit the run again, with its --run.dir") from None


@dataclass(frozen=True)
class Settled:
    """An order as this cluster takes it."""

    order: Order
    signal_lead: int
    grace: int
    """Seconds that a preemption leaves; 0: nothing is preempted here."""

    def text(self, path: Path) -> str:
        """The batch script of the run at `path`."""
        order = self.order
        gpus = order.request.gpus
        environment = {"LAUNCHER_GPUS": str(gpus)} if gpus else {"ACCELERATE_USE_CPU": "true"}
        script = Script(
            *(order.request, job_name(order, path), str(path), order.cwd, order.code.recipe, order.arguments),
            *(self.signal_lead, self.grace, {**environment, **order.environment}, order.points),
            python_path=order.code.path,
        )
        text = render(script)
        check_rendered(text)
        return text


def settle(order: Order, *, here: bool = True) -> Settled:
    """Check an order against the cluster and fill in what that leaves open.

    With `here` False (a dry run where there is no SLURM) nothing is checked.

    Raises:
        UsageError: the cluster can never give what is asked for.
    """
    request = _filled(order.request)
    if not here:
        return Settled(replace(order, request=with_shares(request, [])), request.signal_lead or 0, KILL_WAIT)
    partitions = cluster.partitions()
    nodes = cluster.nodes()
    request = with_shares(request, inside(request, partitions, nodes))
    check(request, partitions, nodes)
    check_accounts(request)
    check_job(request)
    targets = chosen(request, partitions)
    limits = [_limit(request, partition) for partition in targets]
    limit = min((limit for limit in limits if limit is not None), default=None)
    kill_wait = re.match(r"\d+", cluster.configuration().get("KillWait", ""))
    after = int(kill_wait[0]) if kill_wait else KILL_WAIT
    grace = min((after + p.grace_time for p in targets if p.preempt_mode != "OFF"), default=0)
    return Settled(replace(order, request=request), _lead(request, limit), grace)


def _limit(request: Request, partition: cluster.Partition) -> int | None:
    """The seconds that a job may take there; None: as long as it likes."""
    own = partition.default_time if request.time is None else cluster.seconds_of(request.time)
    return partition.max_time if own is None else own


def _filled(request: Request) -> Request:
    """The request with what the environment says to sbatch, and with the Python."""
    said = {key: os.environ.get(f"SBATCH_{BY_FLAG.get(key, key.upper())}") for key in ("partition", "time", "account")}
    filled: dict[str, Any] = {key: value for key, value in said.items() if value and getattr(request, key) is None}
    if request.python is None:
        filled["python"] = sys.executable if request.container is None else "python3"
    return replace(request, **filled)


def _lead(request: Request, limit: int | None) -> int:
    """Seconds before the limit at which SLURM is to signal; 0: not at all, in a job too short for it.

    SLURM counts limits in minutes and may signal up to one minute early: a short job would be signalled at its start.
    """
    if limit is None:
        return 0
    if request.signal_lead is None:
        lead = min(LEAD, (limit - 60) // 4)
        return lead if lead >= 10 else 0
    if request.signal_lead + 60 >= limit:
        raise UsageError(f"--signal-lead {request.signal_lead}: with a limit of {limit} s the job would stop at once")
    return request.signal_lead


def free(path: Path) -> None:
    """Refuse a run that has a job already.

    Raises:
        UsageError: one waits or runs.
    """
    ids = [one.job for one in record.submissions(path)[-20:]]
    active = [job for job in (cluster.jobs(*ids) if ids else []) if job.active]
    if active:
        job = active[0]
        raise UsageError(
            f"{path} has job {job.id}, {job.state.lower()}: launcher cancel {job.id}, or another --run.dir"
        )


def copy_code(path: Path, recipe: Path, modules: Modules) -> tuple[Code, snapshot.Snapshot]:
    """Copy the code into the run directory, and write down where it was from and what it imports from elsewhere."""
    number = 1
    while (target := path / ("code" if number == 1 else f"code-{number}")).exists():
        number += 1
    copy = snapshot.take(recipe, target, [Path(file) for file in modules.all])
    inside = copy.inside(recipe)
    if inside is None:
        raise LauncherError(f"cannot copy {recipe}: {', '.join(copy.left_out) or 'it is gone'}")
    outside = {name: file for name, file in modules.files.items() if copy.inside(Path(file)) is None}
    source = {
        "directory": str(copy.source),
        "git": describe_code(recipe.parent),
        "files": copy.copied,
        "bytes": copy.size,
        "left_out": list(copy.left_out),
        "imported_from_elsewhere": outside,
    }
    (path / "slurm" / "source.json").write_text(json.dumps(source, indent=2) + "\n")
    patch = code_patch(recipe.parent)
    if patch is not None and not (path / "code.patch").exists():
        (path / "code.patch").write_bytes(patch)
    packages = sorted({f"{found.metadata['Name']}=={found.version}" for found in distributions()}, key=str.lower)
    (path / "slurm" / "packages.txt").write_text("\n".join(packages) + "\n")
    return Code(str(inside), _search(recipe, inside, copy, modules)), copy


def _search(recipe: Path, inside: Path, copy: snapshot.Snapshot, modules: Modules) -> tuple[str, ...]:
    """What goes first on PYTHONPATH: the copies of the directories in which the recipe finds its modules.

    Raises:
        UsageError: PYTHONPATH cannot hold them.
    """
    roots = [copy.inside(Path(root)) for root in modules.roots] if modules.roots else [copy.target]
    if not os.environ.get("PYTHONSAFEPATH"):
        roots = [root for root in roots if root != inside.parent]  # Python's own first place
    beside = Path(os.path.realpath(recipe)).parent  # of a recipe that is a link: where its modules are
    if copy.inside(beside) is None and str(beside) in modules.roots:
        roots.append(beside)
    search = tuple(dict.fromkeys(str(root) for root in roots if root is not None))
    if any(":" in place for place in search):
        raise UsageError(f"{copy.target.parent}: PYTHONPATH cannot hold a colon: name another --run.dir")
    return search


def queue(settled: Settled, path: Path, tasks: Sequence[int] = ()) -> list[str]:
    """Write the batch script of the run (or sweep) at `path` and give it to sbatch; the job's id, or the chain's.

    Args:
        settled: what is to run.
        path: the run directory.
        tasks: of a sweep, the points that are to run.

    Raises:
        LauncherError: sbatch refuses, in its own words.
    """
    order = settled.order
    file = path / "slurm" / "job.sh"
    file.write_bytes(os.fsencode(settled.text(path)))
    file.chmod(0o700)
    order.save(path)
    runs = [RunDir(path / f"{task:05d}") for task in tasks] or [RunDir(path)]
    before = [run.read().get("status") for run in runs]
    for run in runs:
        (run.path / "slurm").mkdir(exist_ok=True)
        for name in ("cancelled", "verdict", "idle"):
            (run.path / "slurm" / name).unlink(missing_ok=True)
        run.update(status="pending")
    jobs: list[str] = []
    try:
        for _ in range(order.request.chain or 1):
            jobs.append(_sbatch(sbatch(settled, path, tasks), order.request))
            record.add_submission(path, jobs[-1], tuple(tasks))
    except UnansweredError:
        raise
    except LauncherError:
        with suppress(LauncherError):
            if jobs:  # half a chain is none
                cluster.ask(["scancel", *jobs])
        for run, status in zip(runs, before, strict=True):
            if status is not None:
                run.update(status=status)
        raise
    return jobs


def sbatch(settled: Settled, path: Path, tasks: Sequence[int] = ()) -> list[str]:
    """The line that queues it. Paths stand here and not in the script: `#SBATCH` lines cannot quote them."""
    request = settled.order.request
    argv = ["sbatch", "--parsable", f"--chdir={path}", *_relations(request, tasks)]
    return [*argv, str(path / "slurm" / "job.sh")]


def _relations(request: Request, tasks: Sequence[int]) -> list[str]:
    """The options that say what the job has to do with others."""
    after = [] if request.after is None else [f"afterok:{request.after}"]
    waits = [*after, *(["singleton"] if request.chain is not None else [])]
    options = [f"--dependency={','.join(waits)}"] if waits else []
    options += ["--kill-on-invalid-dep=yes"] if after else []
    if tasks:
        options += [f"--array={_ranges(tasks)}" + (f"%{request.parallel}" if request.parallel else "")]
    return options


def _ranges(tasks: Sequence[int]) -> str:
    """Numbers in order as SLURM writes them, `0-9,12`: it takes no long lists."""
    parts: list[list[int]] = []
    for task in tasks:
        if parts and task == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], task]
        else:
            parts.append([task])
    return ",".join("-".join(map(str, part)) for part in parts)


def try_out(settled: Settled, path: Path, tasks: Sequence[int] = ()) -> None:
    """Let sbatch say whether it would take the job; `path` need not be there yet.

    Raises:
        UsageError: it would not.
    """
    request = settled.order.request
    done = _call(["sbatch", "--test-only", *_relations(request, tasks)], request, settled.text(path))
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("Try ")]
        why = re.sub(r"^(sbatch: |error: |allocation failure: )+", "", lines[-1]) if lines else "it does not say why"
        raise UsageError(f"sbatch would refuse this: {printable(why)}")


def job_name(order: Order, path: Path) -> str:
    """A name that a `#SBATCH` line can hold; of a chain one that nothing else has, because its jobs wait for it."""
    name = re.sub(r"[^\w.+-]", "_", path.name, flags=re.ASCII)[:60].lstrip("-") or "run"
    return name if order.request.chain is None else f"{name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}"


def _sbatch(argv: Sequence[str], request: Request) -> str:
    done = _call(argv, request, None)
    if done.returncode:
        words = [line.partition("error: ")[2] or line for line in done.stderr.splitlines() if line.strip()]
        raise LauncherError(f"sbatch says: {printable(' '.join(words)) or f'exit code {done.returncode}'}")
    return done.stdout.strip().partition(";")[0]


def _call(argv: Sequence[str], request: Request, text: str | None) -> subprocess.CompletedProcess[str]:
    dropped = {f"SBATCH_{BY_FLAG.get(key, key.upper())}" for key, value in asdict(request).items() if value is not None}
    environment = {
        key: value for key, value in os.environ.items() if not NOT_INHERITED.match(key) and key not in dropped
    }
    try:
        done = subprocess.run(
            argv,
            input=b"" if text is None else os.fsencode(text),
            capture_output=True,
            timeout=cluster.PATIENCE,
            env=environment,
        )
        said = (os.fsdecode(done.stdout), os.fsdecode(done.stderr))
        return subprocess.CompletedProcess(argv, done.returncode, *said)
    except FileNotFoundError:
        raise LauncherError("there is no sbatch here: run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise UnansweredError(
            f"sbatch has not answered for {cluster.PATIENCE:.0f} s: launcher status says whether the job is there"
        ) from None
