"""What `launcher doctor --nodes` runs on each node: looks around, meets the others, works, and tells of it.

    python -m launcher.doctor.probe --directory DIR --token TOKEN

It tells in lines of JSON on standard output, each behind `launcher-probe: `, and ends by itself within a minute,
whatever hangs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.doctor.hub import Door, Hub, LostError, candidates, listen

if TYPE_CHECKING:
    import torch

__all__ = ["LIMIT", "MARK", "Tell", "main"]

MARK = "launcher-probe: "
LIMIT = 55.0  # seconds
PATIENCE = 20.0  # seconds to wait for the other nodes' processes
WORK = 1.5  # seconds of matrix products
REACH = 16  # neighbours whose ports are tried
DEVICES = Path("/sys/class/infiniband")


class Tell:
    """Prints what is found, and knows what is being looked at, should it never end."""

    def __init__(self, rank: int, host: str) -> None:
        self._rank, self._host = rank, host
        self._lock = threading.Lock()
        self.phase = "the start"

    def __call__(self, kind: str, **facts: Any) -> None:
        """Print a line."""
        line = json.dumps({"kind": kind, "rank": self._rank, "host": self._host, **facts})
        with self._lock:
            sys.stdout.write(f"{MARK}{line}\n")
            sys.stdout.flush()

    def end_at(self, seconds: float) -> None:
        """End this process by then, and say what it hung in."""

        def end() -> None:
            self("stuck", phase=self.phase)
            os._exit(4)

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        signal.alarm(int(seconds) + 3)  # where a library does not let go of Python's lock: the kernel ends it


def main(argv: Sequence[str] | None = None) -> int:
    """Look, and tell."""
    parser = argparse.ArgumentParser(prog="launcher.doctor.probe")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--patience", type=float, default=PATIENCE)
    options = parser.parse_args(argv)
    deadline = time.monotonic() + LIMIT
    rank, count = int(os.environ.get("SLURM_PROCID", "0")), int(os.environ.get("SLURM_NTASKS", "1"))
    names = _names(os.environ)
    tell = Tell(rank, names[rank] if rank < len(names) else socket.gethostname())
    tell.end_at(LIMIT)
    tell("here", nodes=names, **_around(options.directory, options.token, rank))

    hub, job = None, int(os.environ.get("SLURM_JOB_ID", "0"))
    tell.phase = "waiting for the other nodes"
    try:
        hub = Hub(
            *(rank, count, names[0] if names else "", candidates(job)),
            **{"token": options.token, "deadline": deadline - 3, "patience": options.patience},
        )
    except (LostError, OSError) as error:
        tell("apart", ranks=getattr(error, "ranks", [rank]), why=str(error), phase=tell.phase)
    tell.phase = "the import of torch"
    device = _torch(tell)
    try:
        if device is not None:
            tell.phase = "the matrix products"
            _multiply(tell, device)
        if hub is not None and count > 1:
            _together(tell, hub, names, options.token, job, device)
    except LostError as error:
        tell("apart", ranks=error.ranks, why=str(error), phase=tell.phase)
    except Exception as error:  # whatever torch raises is a finding
        tell("fault", phase=tell.phase, why=f"{type(error).__name__}: {error}".partition("\n")[0])
    tell("end")
    os._exit(0)  # no teardown that could hang or abort


def _names(environ: Mapping[str, str]) -> list[str]:
    """The nodes, in the order of the ranks."""
    listed = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", listed],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return [listed] if listed and "[" not in listed and "," not in listed else []
    return done.stdout.split()


def _around(directory: Path, token: str, rank: int) -> dict[str, Any]:
    """What there is to see without torch."""
    limits = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0] for name in ("NOFILE", "MEMLOCK")}
    found: dict[str, Any] = {
        "time": time.time(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "gpus_given": os.environ.get("SLURM_STEP_GPUS", os.environ.get("SLURM_JOB_GPUS", "")),
        "cpus": len(os.sched_getaffinity(0)),
        "tmp": _free("/tmp"),
        "shm": _free("/dev/shm"),
        "nofile": limits["NOFILE"],
        "memlock": limits["MEMLOCK"],
        "infiniband": DEVICES.is_dir() and any(DEVICES.iterdir()),
        "ports_from": _first_port(),
        "scontrol": shutil.which("scontrol") is not None,
    }
    try:
        found["same"] = (directory / "token").read_text() == token
        (directory / f"from-{rank}").write_text(f"{token} {rank}")
        found["writable"] = True
    except OSError as error:
        found["directory"] = f"{error.strerror}: {error.filename}"
    return found


def _free(path: str) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _first_port() -> int | None:
    """The first port that the kernel deals out by itself."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _torch(tell: Tell) -> torch.device | None:
    """Import torch, and tell of it."""
    start = time.perf_counter()
    try:
        import torch

        gpus = torch.cuda.device_count()
    except Exception as error:
        tell("torch", fault=f"{type(error).__name__}: {error}".partition("\n")[0])
        return None
    seconds = time.perf_counter() - start
    tell("torch", version=torch.__version__, cuda=torch.version.cuda, gpus=gpus, seconds=round(seconds, 1))
    return torch.device("cuda:0" if gpus else "cpu")


def _multiply(tell: Tell, device: torch.device) -> None:
    """Time matrix products: on every GPU in bf16, on a CPU in fp32; and within the node a sum over its GPUs."""
    import torch

    if device.type == "cpu":
        given = int(os.environ.get("SLURM_CPUS_ON_NODE", "0"))  # where nothing keeps a job to these it sees more
        torch.set_num_threads(max(1, min(given or 1, len(os.sched_getaffinity(0)))))
        best, flops = _timed(torch.randn(1024, 1024), lambda: None)
        tell("matmul", seconds=[best], flops=[flops], device="cpu")
        return
    timed = []
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            a = torch.randn(8192, 8192, device=f"cuda:{index}", dtype=torch.bfloat16)
            timed.append(_timed(a, torch.cuda.synchronize))
            del a
    tell("matmul", seconds=[best for best, _ in timed], flops=[flops for _, flops in timed], device="cuda")
    if len(timed) > 1:
        tell.phase = "the sum over the GPUs of a node"
        tell("within", **_sum_within(len(timed)))


def _timed(a: torch.Tensor, synchronize: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a product, the best of many, and the operations a second that this makes."""
    best, end = float("inf"), time.monotonic() + WORK
    a @ a
    synchronize()
    while time.monotonic() < end:
        start = time.perf_counter()
        a @ a
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best, 2 * a.shape[0] ** 3 / best


def _sum_within(gpus: int) -> dict[str, Any]:
    """NCCL's sum over the GPUs of this node, by one process."""
    import torch
    from torch.cuda import nccl

    tensors = [torch.ones(1 << 26, device=f"cuda:{index}") for index in range(gpus)]
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        nccl.all_reduce(tensors)
        for index in range(gpus):
            torch.cuda.synchronize(index)
        best = min(best, time.perf_counter() - start)
    right = all(tensor[0].item() == gpus**4 for tensor in tensors)
    return {"seconds": best, "bytes": tensors[0].nbytes, "right": right}


def _together(tell: Tell, hub: Hub, names: Sequence[str], token: str, job: int, device: torch.device | None) -> None:
    """What needs all nodes: ports, clocks, sums."""
    tell.phase = "the ports"
    door = Door(token, candidates(job + 7 + hub.rank))
    ports = hub.gather(door.port)
    others = [(hub.rank + step) % hub.count for step in range(1, min(hub.count, REACH + 1))]
    refused = {names[other]: why for other in others if (why := Door.knock(names[other], ports[other], token))}
    tell("ports", port=door.port, refused=refused)
    tell.phase = "the clocks"
    hub.gather(None)
    times = hub.gather(time.time())  # all have just been let go, within milliseconds
    door.close()
    if hub.rank == 0:
        tell("clocks", times=times)
    tell.phase = "the import of torch on another node"
    kinds = hub.gather(None if device is None else device.type)
    if None in kinds:
        return
    tell.phase = "the sum over all nodes"
    _sum_between(tell, hub, names[0], job, "cuda" if set(kinds) == {"cuda"} else "cpu")
    hub.gather(None)


def _sum_between(tell: Tell, hub: Hub, host: str, job: int, kind: str) -> None:
    """Time a sum over all nodes, and over each two that are neighbours: in the latter a slow one shows."""
    import torch
    import torch.distributed as dist

    port = None
    if hub.rank == 0:
        with listen(candidates(job + 3)) as free:
            port = free.getsockname()[1]
    port = hub.gather(port)[0]
    backend = "nccl" if kind == "cuda" else "gloo"
    device = torch.device("cuda:0") if kind == "cuda" else torch.device("cpu")
    dist.init_process_group(
        backend,
        init_method=f"tcp://{host}:{port}",
        rank=hub.rank,
        world_size=hub.count,
        timeout=timedelta(seconds=20),
    )
    tensor = torch.ones(1 << (26 if kind == "cuda" else 22), device=device)
    seconds = _sum(tensor, None)
    pairs = [sorted((first, (first + 1) % hub.count)) for first in range(hub.count if hub.count > 2 else 1)]
    groups = [dist.new_group(pair, backend=backend, timeout=timedelta(seconds=20)) for pair in pairs]
    neighbours = {}
    for index in sorted(range(len(pairs)), key=lambda index: (index % 2, index)):  # on all alike, and half at a time
        if hub.rank in pairs[index]:
            neighbours[sum(pairs[index]) - hub.rank] = _sum(tensor, groups[index])
    tell("between", backend=backend, seconds=seconds, bytes=tensor.nbytes, neighbours=neighbours)


def _sum(tensor: torch.Tensor, group: Any) -> float:
    """Seconds of a sum, the best of some."""
    import torch
    import torch.distributed as dist

    best = float("inf")
    for _ in range(4):
        tensor.fill_(1)
        dist.all_reduce(tensor, group=group)  # all are here: what came late is not counted
        if tensor.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    size = dist.get_world_size(group)
    if tensor[0].item() != size**2:
        raise ValueError(f"a sum of ones over {size} nodes, twice, is {tensor[0].item():g}")
    return best


if __name__ == "__main__":
    sys.exit(main())
