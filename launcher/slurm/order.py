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
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from launcher.errors import LauncherError, UsageError
from launcher.rundir import RunDir
from launcher.show import printable
from launcher.slurm import cluster, record, snapshot
from launcher.slurm.rehearsal import Modules
from launcher.slurm.request import Request, check, check_accounts, check_job, with_shares
from launcher.slurm.script import Script, check_rendered, render
from launcher.source import code_patch, describe_code

__all__ = ["Code", "Order", "copy_code", "free", "load", "queue", "settle"]

LEAD = 120  # seconds
KILL_WAIT = 30  # seconds, SLURM's own default
# What a job must not inherit from the one that submits it, or from ranks around it.
NOT_INHERITED = re.compile(
    r"SLURM_(?!CONF$)|RANK$|WORLD_SIZE$|LOCAL_|MASTER_(ADDR|PORT)$|TORCHELASTIC_|"
    r"LAUNCHER_(JOB_END|GRACE|SIGNAL_LEAD|RUN|CWD)$|"
    r"SBATCH_(ARRAY_INX|CHDIR|WORK_DIR|ERROR|EXPORT|INPUT|JOB_NAME|OPEN_MODE|OUTPUT|REQUEUE|NO_REQUEUE|SIGNAL|WAIT)$"
)
BY_FLAG = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE", "array": "ARRAY_INX"}


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

    def text(self, path: Path) -> str:
        """The batch script of the run at `path`."""
        order = self.order
        environment = {"ACCELERATE_USE_CPU": "true"} if not order.request.gpus else {}
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
    request = order.request
    if request.python is None:
        request = replace(request, python=sys.executable if request.container is None else "python3")
    if not here:
        return Settled(replace(order, request=with_shares(request, [])), request.signal_lead or 0, KILL_WAIT)
    partitions, nodes = cluster.partitions(), cluster.nodes()
    request = with_shares(request, nodes)
    check(request, partitions, nodes)
    check_accounts(request)
    check_job(request)
    partition = next(p for p in partitions if (p.name == request.partition if request.partition else p.default))
    limit = partition.default_time if request.time is None else cluster.seconds_of(request.time)
    limit = partition.max_time if limit is None else limit
    kill_wait = re.match(r"\d+", cluster.configuration().get("KillWait", ""))
    grace = (int(kill_wait[0]) if kill_wait else KILL_WAIT) + partition.grace_time
    return Settled(replace(order, request=request), _lead(request, limit), grace)


def _lead(request: Request, limit: int | None) -> int:
    """Seconds before the limit at which SLURM is to signal; 0: not at all, in a job too short for it.

    SLURM counts limits in minutes and may signal up to one minute early: a short job would be signalled at its start.
    """
    if limit is None:
        return 0
    if request.signal_lead is not None and request.signal_lead + 60 >= limit:
        raise UsageError(f"--signal-lead {request.signal_lead}: with a limit of {limit} s the job would stop at once")
    lead = min(request.signal_lead or LEAD, (limit - 60) // 4 if request.signal_lead is None else limit)
    return lead if lead >= 10 else 0


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
    copy = snapshot.take(recipe, target)
    roots = [copy.inside(Path(root)) for root in modules.roots]
    search = dict.fromkeys([str(target), *(str(root) for root in roots if root is not None)])
    inside = copy.inside(recipe)
    assert inside is not None
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
    return Code(str(inside), tuple(search)), copy


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
    file.write_text(settled.text(path))
    file.chmod(0o700)
    order.save(path)
    for directory in [path / f"{task:05d}" for task in tasks] or [path]:
        (directory / "slurm").mkdir(exist_ok=True)
        for name in ("cancelled", "verdict", "idle"):
            (directory / "slurm" / name).unlink(missing_ok=True)
        RunDir(directory).update(status="pending")
    jobs = []
    for _ in range(order.request.chain or 1):
        job = _sbatch(sbatch(settled, path, tasks), order.request)
        record.add_submission(path, job, tuple(tasks))
        jobs.append(job)
    return jobs


def sbatch(settled: Settled, path: Path, tasks: Sequence[int] = ()) -> list[str]:
    """The line that queues it. Paths stand here and not in the script: `#SBATCH` lines cannot quote them."""
    request = settled.order.request
    argv = ["sbatch", "--parsable", f"--chdir={path}"]
    if request.after is not None:
        argv += [f"--dependency=afterok:{request.after}", "--kill-on-invalid-dep=yes"]
    if request.chain is not None:
        argv += ["--dependency=singleton"]
    if tasks:
        argv += [f"--array={','.join(map(str, tasks))}" + (f"%{request.parallel}" if request.parallel else "")]
    return [*argv, str(path / "slurm" / "job.sh")]


def try_out(settled: Settled, path: Path) -> None:
    """Let sbatch say whether it would take the job.

    Raises:
        UsageError: it would not.
    """
    done = _call(["sbatch", "--test-only"], settled.order.request, settled.text(path))
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it does not say why"]
        raise UsageError(f"sbatch would refuse this: {printable(lines[-1].removeprefix('allocation failure: '))}")


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
        return subprocess.run(
            argv,
            **({"stdin": subprocess.DEVNULL} if text is None else {"input": text}),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=cluster.PATIENCE,
            env=environment,
        )
    except FileNotFoundError:
        raise LauncherError("there is no sbatch here: run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise LauncherError(
            f"sbatch has not answered for {cluster.PATIENCE:.0f} s: launcher status says whether the job is there"
        ) from None
