"""The probe on a few nodes: queued through srun, waited for with patience, and what it says of them judged together."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any

from launcher.doctor.probe import LIMIT, MARK
from launcher.errors import LauncherError
from launcher.slurm import cluster
from launcher.slurm.request import Request

__all__ = ["Heard", "probe"]

QUEUE = 180.0  # seconds to wait for the nodes
NOISE = re.compile(
    r"job \d+ (queued and waiting|has been allocated)|configuration not available now|Terminated$|Killed$|"
    r"tasks? [\d,-]+: (running|[Ee]xited|unknown)|Force Terminated|forcing job termination|Job step aborted|"
    r"launch/slurm: _step_signal|STEP \d+\.\d+ ON|^\[W|NNPACK"
)
ERRORS = re.compile(r"[A-Za-z_.]+(Error|Exception): |No module named|command not found|cannot open shared object")


@dataclass
class Heard:
    """What came back from the nodes."""

    count: int
    """How many nodes were asked for."""
    gpus: int
    lines: list[dict[str, Any]] = field(default_factory=list)
    """What the probes told."""
    failures: list[str] = field(default_factory=list)
    """What srun, or a Python that could not start, complained of; each once."""
    waited: str = ""
    """Why the nodes never came, where they did not."""
    offsets: dict[str, float] = field(default_factory=dict)
    """By how much a node's clock is ahead of this one's, at most."""
    written: dict[int, bool] = field(default_factory=dict)
    """By rank, whether what it wrote into the directory is seen here."""

    def of(self, kind: str) -> dict[str, dict[str, Any]]:
        """The last line of a kind from each node, by its name."""
        return {str(line["host"]): line for line in self.lines if line.get("kind") == kind}

    @property
    def missing(self) -> list[str]:
        """The nodes of the job that never said a word."""
        here = self.of("here")
        names: list[str] = next((line["nodes"] for line in here.values() if line.get("nodes")), [])
        return [name for name in names if name not in here]


def probe(request: Request, directory: Path, *, nodes: int, gpus: int, minutes: int = 5) -> Heard:
    """Run the probe on `nodes` nodes with `gpus` GPUs each; everything it needs of `directory` is removed again.

    Raises:
        LauncherError: there is no srun, or the directory cannot be written.
    """
    heard = Heard(nodes, gpus)
    token = secrets.token_hex(16)
    name = f"launcher-doctor-{token[:6]}"
    try:
        with tempfile.TemporaryDirectory(prefix=".launcher-doctor-", dir=directory) as place:
            (Path(place) / "token").write_text(token)
            argv = _srun(request, name, nodes, gpus, minutes)
            with _started(
                [*argv, sys.executable, "-m", "launcher.doctor.probe", "--directory", place, "--token", token], name
            ) as said:
                _listen(said, heard, name)
            heard.written = _written(Path(place), token, heard)
    except OSError as error:
        raise LauncherError(f"cannot write {directory}: {error.strerror}") from None
    return heard


def _srun(request: Request, name: str, nodes: int, gpus: int, minutes: int) -> list[str]:
    argv = ["srun", f"--job-name={name}", f"--nodes={nodes}", "--ntasks-per-node=1", f"--time={minutes}"]
    argv += [f"--gpus-per-node={gpus}", "--gpu-bind=none"] if gpus else []
    for key in ("partition", "account", "qos", "constraint", "exclude", "reservation", "mem"):
        value = getattr(request, key)
        argv += [f"--{key}={value}"] if value is not None else []
    argv += [f"--cpus-per-task={request.cpus}"] if request.cpus is not None else []
    return [*argv, "--unbuffered"]


@contextmanager
def _started(argv: Sequence[str], name: str) -> Iterator[Queue[tuple[str, str] | None]]:
    """srun, with a queue of (stream, line) that it says; at the end it and its job are gone, whatever happens."""
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=cluster.environment(),
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError:
        raise LauncherError("there is no srun here: run this on a login node of the cluster") from None
    said: Queue[tuple[str, str] | None] = Queue()
    assert process.stdout is not None
    assert process.stderr is not None
    streams = {"out": process.stdout, "err": process.stderr}
    threads = [threading.Thread(target=_follow, args=(stream, of, said)) for stream, of in streams.items()]
    for thread in threads:
        thread.start()
    try:
        yield said
    finally:
        _end(process, name)
        for thread in threads:
            thread.join()
        for pipe in streams.values():
            pipe.close()


def _follow(stream: str, pipe: IO[str], said: Queue[tuple[str, str] | None]) -> None:
    for line in pipe:
        said.put((stream, line.rstrip("\n")))
    said.put(None)


def _end(process: subprocess.Popen[str], name: str) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(1)
    with suppress(LauncherError):  # also where srun has ended: a site's RequeueExit would start its job again and again
        cluster.ask(["scancel", f"--name={name}", f"--user={os.getuid()}"])
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _listen(said: Queue[tuple[str, str] | None], heard: Heard, name: str) -> None:
    """Take in what comes, until srun ends, or the nodes do not come, or hang."""
    until, open_streams = time.monotonic() + QUEUE, 2
    while open_streams:
        try:
            item = said.get(timeout=max(0.0, until - time.monotonic()))
        except Empty:
            if not heard.lines:
                heard.waited = _why(name)
            return
        if item is None:
            open_streams -= 1
            continue
        stream, line = item
        if stream == "out" and MARK in line:
            if not heard.lines:
                until = time.monotonic() + LIMIT + 15
            _take(line.partition(MARK)[2], heard)
        elif stream == "err":
            _complaint(line, heard)


def _take(text: str, heard: Heard) -> None:
    with suppress(ValueError, TypeError, KeyError):  # a line that was cut
        line: dict[str, Any] = json.loads(text)
        if line["kind"] == "here":
            heard.offsets[str(line["host"])] = float(line["time"]) - time.time()
        heard.lines.append(line)


def _complaint(line: str, heard: Heard) -> None:
    match = re.match(r"(?:srun|slurmstepd(?:-\S+)?): (?:error: |fatal: )?(.*)", line)
    words = match[1] if match else line if ERRORS.search(line) else ""
    if not words or NOISE.search(words):
        return
    alike = {re.sub(r"\d+", "", known) for known in heard.failures}
    if re.sub(r"\d+", "", words) not in alike and len(heard.failures) < 6:  # a node each says the same
        heard.failures.append(words.strip())


def _why(name: str) -> str:
    """Why a job has not started."""
    try:
        mine = [job for job in cluster.jobs(mine=True) if job.name == name and job.active]
    except LauncherError as error:
        return str(error)
    if not mine:
        return f"nothing was heard for {QUEUE:.0f} s"
    job = mine[0]
    start = f", expected to start {time.strftime('%a %H:%M', time.localtime(job.start))}" if job.start else ""
    reason = f" ({job.reason})" if job.reason else ""
    return f"{job.state.lower()}{reason} for {QUEUE:.0f} s{start}"


def _written(place: Path, token: str, heard: Heard) -> dict[int, bool]:
    """Whether each node's own file is seen here; a network filesystem may take a moment to show it."""
    ranks = {int(line["rank"]) for line in heard.of("here").values() if line.get("writable")}
    seen: dict[int, bool] = defaultdict(bool)
    until = time.monotonic() + 5
    while True:
        for rank in ranks:
            with suppress(OSError):
                os.listdir(place)  # has the names looked up anew
                seen[rank] = seen[rank] or (place / f"from-{rank}").read_text() == f"{token} {rank}"
        if all(seen[rank] for rank in ranks) or time.monotonic() > until:
            return {rank: seen[rank] for rank in ranks}
        time.sleep(0.5)  # asking the file server
