"""A real SLURM cluster on this machine: starts it, breaks it in controlled ways and says what it did."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

from tests.harness import clean_environment

SCRIPT = Path(__file__).with_name("cluster.sh")
FREEZER = Path("/sys/fs/cgroup/freezer/cgroup.procs")
NOISE = re.compile(r"pmix|MPI:|plugin loaded|state file|state save file|(Unauthorized|Replayed) credential|sigprocmask")
PACKAGES = "apt-get install -y --no-install-recommends slurm-wlm munge iproute2 util-linux"


def why_not() -> str | None:
    """Why a cluster cannot run here; None where it can."""
    if os.geteuid() != 0:
        return "a SLURM cluster needs root"
    missing = [tool for tool in ("slurmctld", "slurmd", "munged", "ip", "unshare", "nsenter") if not shutil.which(tool)]
    if missing:
        return f"no {', '.join(missing)}: {PACKAGES}"
    attempt = [
        "unshare",
        "--fork",
        "--pid",
        "--mount-proc",
        "--mount",
        "--uts",
        "--net",
        "ip",
        "link",
        "add",
        "type",
        "veth",
    ]
    tried = subprocess.run(attempt, capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


def default_track() -> str:
    """The process tracking that most clusters have, where this machine can do it."""
    return "cgroup" if os.access(FREEZER, os.W_OK) else "linuxproc"


class Lab:
    """One cluster, in a directory of its own (empty or new); jobs see this machine's files.

    Partitions, all over the same nodes: batch, the default; high, which preempts low, grace and cancel: a job of low is
    requeued at once, one of grace is told and has 30 s to end, one of cancel ends for good. `extra` are more lines for
    slurm.conf; they win.
    """

    def __init__(
        self,
        directory: Path | str,
        track: str = "cgroup",
        accounting: bool = False,
        extra: str = "",
        nodes: int = 2,
        gpus: int = 2,
    ) -> None:
        self.directory = Path(directory)
        self.track = track
        self.accounting = accounting
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        environment = {key: value for key, value in clean_environment().items() if not key.startswith("SBATCH_")}
        self.env = environment | {
            "SLURM_CONF": str(self.directory / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",  # `launcher` and `python` are this one's
        }
        self._settings = {
            "SLURMLAB_DIR": str(self.directory),
            "SLURMLAB_TRACK": track,
            "SLURMLAB_DBD": str(int(accounting)),
            "SLURMLAB_EXTRA": extra,
            "SLURMLAB_NODES": str(nodes),
            "SLURMLAB_GPUS": str(gpus),
            "SLURMLAB_OWNER": str(os.getpid()),  # the cluster ends with this process, however that ends
        }

    def up(self) -> None:
        """Start the cluster; returns when every node takes jobs."""
        self._script("up")

    def down(self) -> None:
        """End all that runs in the cluster, and remove its directory."""
        if self.directory.exists():
            self._script("down")

    def crash(self, node: str) -> None:
        """A power failure: all that runs on a node is gone at once, and nobody is told."""
        self._script("crash", node)

    def start(self, node: str, rebooted: bool = False) -> None:
        """Power on. A node that says it was rebooted loses its jobs at once, and is down until `undrain`.

        Otherwise the controller finds out by itself that the jobs are gone.
        """
        self._script("start", node, *(["-b"] if rebooted else []))

    def cut(self, node: str) -> None:
        """Pull a node's network cable: its processes live on."""
        self._script("cut", node)

    def join(self, node: str) -> None:
        """Plug the cable in again."""
        self._script("join", node)

    def stop_controller(self, hard: bool = True, saved: bool = True) -> None:
        """End slurmctld: with SIGKILL, or as an administrator does.

        Killed before it has saved what is new, it forgets jobs and gives their ids again, or forgets that they started.
        """
        if hard and saved:
            state, now = self.directory / "state" / "job_state", time.time()
            # what has changed is saved within 5 to 7 s
            while time.time() < now + 8 and not (state.exists() and state.stat().st_mtime > now + 0.2):
                time.sleep(0.05)  # polling what the controller writes
        self._script("controller", "kill" if hard else "stop")

    def start_controller(self) -> None:
        """Start slurmctld; the nodes report to it a little later."""
        self._script("controller", "start")

    def restart_controller(self, hard: bool = True, saved: bool = True) -> None:
        """Stop slurmctld and start it again."""
        self.stop_controller(hard, saved)
        self.start_controller()

    def drain(self, node: str) -> None:
        """Let no more jobs start on a node; those that run there go on."""
        self.command("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")

    def undrain(self, node: str) -> None:
        """Let jobs start on a node again, also on one that is down."""
        self.command("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def run(
        self, *argv: str | Path, timeout: float = 60, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as a user of the cluster does; in the cluster's directory if not said otherwise."""
        try:
            return subprocess.run(
                [str(arg) for arg in argv],
                env=self.env | (env or {}),
                cwd=cwd or self.directory,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as expired:
            said = [(said or b"").decode(errors="replace") for said in (expired.stdout, expired.stderr)]
            raise AssertionError(f"no end after {timeout} s{_told(argv, *said)}") from None

    def command(
        self,
        *argv: str | Path,
        check: bool = True,
        timeout: float = 60,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> str:
        """What a command printed; one that fails is told with all that it printed."""
        ended = self.run(*argv, timeout=timeout, cwd=cwd, env=env)
        if check and ended.returncode != 0:
            raise AssertionError(f"exit code {ended.returncode}{_told(argv, ended.stdout, ended.stderr)}")
        return ended.stdout

    def submit(self, script: str, *options: str, cwd: Path | None = None) -> str:
        """Submit some lines of shell; returns the job's id."""
        return self.command("sbatch", "--parsable", *options, "--wrap", script, cwd=cwd).strip()

    def job(self, job_id: str | int) -> dict[str, str]:
        """What the controller knows of a job (of an array: of the first task that it lists)."""
        return _fields(self.command("scontrol", "-o", "show", "job", str(job_id)).splitlines()[0])

    def node(self, name: str) -> dict[str, str]:
        """What the controller knows of a node."""
        return _fields(self.command("scontrol", "-o", "show", "node", name))

    def output(self, job_id: str | int) -> str:
        """What a job has printed so far."""
        path = Path(self.job(job_id).get("StdOut", ""))
        return path.read_text(errors="replace") if path.is_file() else ""

    def wait_for(
        self,
        job_id: str | int,
        wanted: str | Collection[str] | Callable[[dict[str, str]], bool],
        timeout: float = 60,
    ) -> dict[str, str]:
        """Wait for a state, for one of some states, or until a predicate of `job()` holds; returns `job()`."""
        if callable(wanted):
            reached, what = wanted, "is not as wanted"
        else:
            states = [wanted] if isinstance(wanted, str) else list(wanted)
            reached, what = (lambda job: job["JobState"] in states), f"is not {' or '.join(states)}"
        deadline = time.monotonic() + timeout
        while not reached(job := self.job(job_id)):
            if time.monotonic() > deadline:
                told = "\n".join(f"{key}={value}" for key, value in job.items())
                printed = "\n".join(self.output(job_id).splitlines()[-40:])
                raise AssertionError(f"job {job_id} {what} after {timeout} s:\n{told}\n--- its output\n{printed}")
            time.sleep(0.05)  # polling the controller
        return job

    def processes(self, node: str) -> list[tuple[int, str]]:
        """(pid, command line) of what jobs run on a node or have left there; the pids are this machine's."""
        found = []
        for pid in self._pids(node):
            try:
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:
                continue  # it has just ended
            if line and name not in ("slurmd", "slurmstepd"):  # a zombie has no command line
                found.append((pid, line))
        return found

    def logs(self, lines: int = 40) -> str:
        """The end of what the daemons wrote."""
        parts = []
        for path in sorted((self.directory / "log").glob("*.log")):
            told = [line for line in path.read_text(errors="replace").splitlines() if not NOISE.search(line)]
            parts += [f"--- {path.name}", *told[-lines:]] if told else []
        return "\n".join(parts)

    def reset(self) -> None:
        """Cancel every job, end what they left behind and make every node idle, whatever a test has broken."""
        self.start_controller()
        for node in self.nodes:
            self.start(node)
            self.join(node)
        if jobs := self._jobs():
            self.run("scancel", *jobs)
        deadline = time.monotonic() + 60
        while True:
            # what cleans up on TERM would take KillWait to end, and orphans would stay
            pids = [pid for node in self.nodes for pid, _ in self.processes(node)]
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            jobs, states = self._jobs(), self._states()
            if not (pids or jobs or states):
                return
            for node, state in states.items():
                if "drain" in state or "down" in state:
                    self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
            told = f"processes {pids}, jobs {jobs}, nodes {states}"
            assert time.monotonic() < deadline, f"not idle again: {told}\n{self.logs()}"
            time.sleep(0.05)  # polling the controller

    def _jobs(self) -> list[str]:
        """Every job that has not ended."""
        return self.command("squeue", "-h", "-o", "%A").split()

    def _states(self) -> dict[str, str]:
        """The states of nodes that are not idle."""
        states = dict(line.split() for line in self.command("sinfo", "-h", "-N", "-o", "%N %T").splitlines())
        return {node: state for node, state in states.items() if state != "idle"}

    def _pids(self, node: str) -> list[int]:
        """Every process of a node but its holder."""
        try:
            holder = int((self.directory / "run" / node).read_text().split()[0])
            namespace = os.readlink(f"/proc/{holder}/ns/pid")
        except OSError:
            return []  # the node is down
        pids = []
        for path in Path("/proc").iterdir():
            try:
                if path.name.isdigit() and int(path.name) != holder and os.readlink(path / "ns/pid") == namespace:
                    pids.append(int(path.name))
            except OSError:
                continue  # it has just ended
        return pids

    def _script(self, *argv: str) -> None:
        # in a session of its own: Ctrl-C ends the tests, not what takes the cluster down
        ended = subprocess.run(
            ["bash", str(SCRIPT), *argv],
            env=clean_environment() | self._settings,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            start_new_session=True,
        )
        if ended.returncode != 0:
            told = _told([SCRIPT.name, *argv], ended.stdout, ended.stderr)
            raise AssertionError(f"exit code {ended.returncode}{told}\n{self.logs()}")


def _fields(line: str) -> dict[str, str]:
    """Key=Value, Key=Value: values may hold spaces; of a key that a job's own text repeats the first counts."""
    fields: dict[str, str] = {}
    for key, value in re.findall(r"(?:^| )([A-Z][\w/:]*)=(.*?)(?= +[A-Z][\w/:]*=| *$)", line):
        fields.setdefault(key, value)
    return fields


def _told(argv: Collection[str | Path], stdout: str, stderr: str) -> str:
    return f": {' '.join(map(str, argv))}\n--- stdout\n{stdout}\n--- stderr\n{stderr}"
