"""The batch script of a job: a template, which people may copy and change, with the blanks filled in."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.errors import LauncherError, UsageError
from launcher.slurm.request import Request, allocation

__all__ = ["Script", "check_rendered", "render", "shipped"]

SAFE = re.compile(r"[\w@%+=:,./\[\]*&|()!~^?{}-]+", re.ASCII)  # what `#SBATCH` lines need no quotes for
RANKS = """\
first_log=$run/logs/rank-00000.txt
task='
trap "" USR2
[ "$SLURM_NTASKS" = 1 ] || export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
[ "$SLURM_NTASKS" = 1 ] || export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
cd -- "$LAUNCHER_CWD" || exit 3
exec >> "$LAUNCHER_RUN/logs/rank-$(printf %05d "$SLURM_PROCID").txt" 2>&1 < /dev/null
echo "--- job $SLURM_JOB_ID start ${SLURM_RESTART_COUNT:-0} rank $SLURM_PROCID on $(hostname)"
exec INSIDE"$@"'"""
AGENTS = """\
first_log=$run/logs/node-00000.txt          # an agent of accelerate a node, which starts that node's ranks
task='
trap "" USR2
cd -- "$LAUNCHER_CWD" || exit 3
exec >> "$LAUNCHER_RUN/logs/node-$(printf %05d "$SLURM_NODEID").txt" 2>&1 < /dev/null
echo "--- job $SLURM_JOB_ID start ${SLURM_RESTART_COUNT:-0} on $(hostname)"
exec INSIDE"$1" -m accelerate.commands.launch MANY --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \\
  --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" --gpu_ids all --mixed_precision no \\
  --dynamo_backend no --num_cpu_threads_per_process "$OMP_NUM_THREADS" "${@:2}"'"""


@dataclass(frozen=True)
class Script:
    """What a batch script is rendered from."""

    request: Request
    """With the number of nodes and the shares filled in."""
    name: str
    run: str
    """The run directory, or the sweep's."""
    cwd: str
    recipe: str
    arguments: Sequence[str]
    """The recipe's options, without --run.dir."""
    signal_lead: int
    """Seconds; 0: SLURM is to send no signal before the limit."""
    grace: int
    """Seconds between TERM and KILL at a preemption."""
    environment: Mapping[str, str] = field(default_factory=dict)
    points: Mapping[int, Sequence[str]] = field(default_factory=dict)
    """Of a sweep, the options of each point."""
    python_path: Sequence[str] = ()
    """What goes first on PYTHONPATH."""

    @property
    def is_array(self) -> bool:
        """Whether it is of a job array, with a run directory for each task."""
        return bool(self.points)


def shipped() -> Path:
    """The directory of the template and the site files: a checkout's `slurm/`, or where pip has put them."""
    checkout = Path(__file__).parents[2] / "slurm"
    return checkout if (checkout / "job.sh").is_file() else Path(sysconfig.get_path("data")) / "share/launcher/slurm"


def render(script: Script) -> str:
    """The text of the batch script.

    Raises:
        UsageError: the template cannot be read, or has a blank that is not known, or lacks one.
    """
    request = script.request
    path = Path(request.template).expanduser() if request.template else shipped() / "job.sh"
    try:
        template = os.fsdecode(path.read_bytes())
    except OSError as error:
        raise UsageError(f"--template {path}: {error.strerror}") from None
    blanks = {
        "SBATCH": "\n".join(f"#SBATCH {option}" for option in header(script)),
        "HOME": shlex.quote(script.run),
        "RUN": _quoted_run(script),
        "CWD": shlex.quote(script.cwd),
        "COMMAND": shlex.join(_command(script)),
        "POINT": _points(script),
        "AFTER_KILL": str(script.grace),
        "SIGNAL_LEAD": str(script.signal_lead),
        "ENVIRONMENT": "\n".join(_exports(script)),
        "SETUP": "\n".join(request.setup),
        "CHAIN": "yes" if request.chain else "",
        "REQUEUE": "no" if request.requeue is False or request.chain else "yes",
        "THREADS": "$SLURM_CPUS_PER_TASK" if request.via != "accelerate" else str(request.cpus or 1),
        "TASK": _task(request),
        "SRUN": _srun(request),
    }
    found = set(re.findall(r"@([A-Z_]+)@", template))
    if unknown := sorted(found - blanks.keys()):
        raise UsageError(f"--template {path}: @{unknown[0]}@ is not known: there are {', '.join(sorted(blanks))}")
    if missing := sorted({"SBATCH", "RUN", "COMMAND"} - found):
        raise UsageError(f"--template {path}: @{missing[0]}@ is missing: copy {shipped() / 'job.sh'} and change that")
    return re.sub(r"@([A-Z_]+)@", lambda match: blanks[match[1]], template)


def header(script: Script) -> list[str]:
    """The `#SBATCH` options; values that such a line cannot hold are refused.

    Raises:
        UsageError: a value has blanks, quotes, line breaks or `#`.
    """
    options = [f"--job-name={script.name}", *allocation(script.request)]
    options += [f"--signal=USR2@{script.signal_lead}"] if script.signal_lead else []
    # In a directory whose name has one of these, SLURM would not find the file: it is the script's own lines then.
    output = "/dev/null" if set("%\\") & set(script.run) else "slurm/%A_%a.out" if script.is_array else "slurm/%j.out"
    options += [f"--output={output}", "--open-mode=append"]
    if SAFE.fullmatch(script.run) and "%" not in script.run:  # else it stands on sbatch's command line alone
        options.append(f"--chdir={script.run}")
    for option in options:
        key, _, value = option.partition("=")
        if value and not SAFE.fullmatch(value):
            raise UsageError(f"{key} {value!r}: a value of SLURM's that has blanks, quotes or # cannot be given")
    return options


def _quoted_run(script: Script) -> str:
    run = shlex.quote(script.run)
    return f'{run}/$(printf %05d "$SLURM_ARRAY_TASK_ID")' if script.is_array else run


def _command(script: Script) -> list[str]:
    python = script.request.python
    assert python is not None
    starter = [python] if script.request.via == "accelerate" else [python, "-u"]
    where = [] if script.is_array else ["--run.dir", script.run]
    return [*starter, script.recipe, *script.arguments, *where]


def _points(script: Script) -> str:
    if not script.is_array:
        return ""
    cases = [f"  {index}) command+=({shlex.join(options)});;" for index, options in script.points.items() if options]
    chosen = ["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"] if cases else []
    return "\n".join([*chosen, 'command+=(--run.dir "$run")'])


def _exports(script: Script) -> list[str]:
    lines = [f"export {key}={shlex.quote(value)}" for key, value in script.environment.items()]
    if script.python_path:  # the copy of the code; behind it what the person had
        path = shlex.quote(":".join(script.python_path))
        lines.append("export PYTHONPATH=" + path + "${PYTHONPATH:+:$PYTHONPATH}")
    return lines


def _task(request: Request) -> str:
    inside = ""
    if request.container is not None and request.container.endswith(".sif"):
        binds = f"--bind {shlex.quote(request.mounts)} " if request.mounts else ""
        nv = "--nv " if request.gpus else ""
        inside = (
            f'apptainer exec {nv}{binds}--bind "$LAUNCHER_RUN" --bind "$LAUNCHER_CWD" {shlex.quote(request.container)} '
        )
        inside = inside.replace("'", "'\\''")  # the whole stands in single quotes
    if request.via == "accelerate":
        processes = (request.nodes or 1) * (request.tasks or 1)
        many = f"{'--multi_gpu ' if processes > 1 else ''}--num_processes {processes}"
        return AGENTS.replace("MANY", many).replace("INSIDE", inside)
    return RANKS.replace("INSIDE", inside)


def _srun(request: Request) -> str:
    options = ["--gpu-bind=none"] if request.gpus else []
    if request.container is not None and not request.container.endswith(".sif"):
        mounts = (
            '"$run:$run,$cwd:$cwd"' if not request.mounts else f'"$run:$run,$cwd:$cwd",{shlex.quote(request.mounts)}'
        )
        options += [f"--container-image={shlex.quote(request.container)}", f"--container-mounts={mounts}"]
    elif request.mounts and request.container is None:
        raise UsageError(f"--mounts {request.mounts} is for a --container, which is not given")
    return " ".join(options)


def check_rendered(text: str) -> None:
    """Refuse a script that bash cannot read.

    Raises:
        LauncherError: in bash's own words.
    """
    done = subprocess.run(["bash", "-n"], input=os.fsencode(text), capture_output=True, timeout=20)
    if done.returncode:
        line = done.stderr.decode(errors="replace").strip().partition("\n")[0].removeprefix("bash: ")
        raise LauncherError(f"the batch script is no bash: {line} (a --setup line or the --template?)")
