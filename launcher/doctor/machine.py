"""Whether this machine can run recipes: its Python, its packages, its GPUs, its limits, its clock."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

from launcher.command import visible_gpus
from launcher.doctor.findings import Finding, bad, ok, warning
from launcher.show import human

__all__ = ["Software", "check_machine", "files_needed", "look_at_software"]

PATIENCE = 180.0  # seconds; an environment on a cold network disk
SLOW = 30.0  # seconds that importing torch may take before it is worth a word
PYTHONS = ((3, 11), (3, 13))
PACKAGES = ("accelerate", "datasets", "safetensors")
INFINIBAND = Path("/sys/class/infiniband")
SHARED_MEMORY = Path("/dev/shm")
# Run in a process of its own: importing torch takes seconds, hundreds of megabytes, and may crash.
LOOK = r"""
import ctypes, importlib, json, sys, time
found = {"packages": {}}
start = time.perf_counter()
try:
    import torch
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found["kernels"] = torch.cuda.get_arch_list() if found["gpus"] else []
    found["capabilities"] = ["sm_%d%d" % torch.cuda.get_device_capability(i) for i in range(len(found["gpus"]))]
except Exception as error:
    found["fault"] = f"{type(error).__name__}: {error}"
found["seconds"] = time.perf_counter() - start
for name in sys.argv[1:]:
    try:
        found["packages"][name] = getattr(importlib.import_module(name), "__version__", "?")
    except Exception as error:
        found["packages"][name] = f"!{type(error).__name__}: {error}"
try:
    number = ctypes.c_int()
    if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) == 0 and number.value:
        found["driver"] = [number.value // 1000, number.value % 1000 // 10]
except OSError:
    pass
print("found:" + json.dumps(found))
"""


@dataclass(frozen=True)
class Software:
    """What a Python that imports torch says of itself."""

    torch: str | None = None
    cuda: str | None = None
    """The CUDA that torch was built with; None: a CPU build."""
    hip: str | None = None
    gpus: Sequence[str] = ()
    kernels: Sequence[str] = ()
    """The kinds of GPU that torch has kernels for."""
    capabilities: Sequence[str] = ()
    """The kind of each GPU."""
    driver: tuple[int, int] | None = None
    """The newest CUDA that the driver takes."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Versions; `!` and what is wrong of what cannot be imported."""
    seconds: float = 0.0
    fault: str = ""


def look_at_software() -> Software:
    """Import torch and the rest in a process of its own, and say how that went."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", LOOK, *PACKAGES],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PATIENCE,
            encoding="utf-8",
            errors="replace",
            cwd="/",  # a folder called torch or datasets beside the user must not be imported
        )
    except subprocess.TimeoutExpired:
        return Software(fault=f"importing it took more than {PATIENCE:.0f} s")
    lines = [line for line in done.stdout.splitlines() if line.startswith("found:")]
    if not lines:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Software(fault=said[-1])
    said_: dict[str, Any] = json.loads(lines[-1].removeprefix("found:"))
    driver = said_.pop("driver", None)
    return Software(**said_, driver=(driver[0], driver[1]) if driver else None)


def check_machine(software: Software, *, world_size: int, workers: int = 0) -> list[Finding]:
    """What is to be said of this machine.

    Args:
        software: what `look_at_software` found.
        world_size: how many ranks a run is to have.
        workers: data workers of each.
    """
    wanted = _requirements()
    found = [_python(), _torch(software, wanted.get("torch", ""))]
    if software.torch is not None:
        found += [_gpus(software), *_driver(software)]
    for name, version in software.packages.items():
        found.append(_package(name, version, wanted.get(name, "")))
    return [*found, _open_files(files_needed(world_size, workers)), _locked_memory(), _shared_memory(), _clock()]


def files_needed(world_size: int, workers: int = 0) -> int:
    """Open files that a rank may need: gloo connects every rank with every other, once for each of four groups."""
    return 256 + 4 * world_size + 32 * workers


def _python() -> Finding:
    version, said = sys.version_info[:2], sys.version.split()[0]
    if PYTHONS[0] <= version <= PYTHONS[1]:
        return ok("python", f"{said} ({sys.executable})")
    low, high = (".".join(map(str, bound)) for bound in PYTHONS)
    return bad("python", f"{said} ({sys.executable})", f"make an environment with Python {low} to {high}")


def _torch(software: Software, wanted: str) -> Finding:
    if software.torch is None:
        return bad("torch", f"cannot be imported: {software.fault}", "pip install launcher, in this environment")
    built = f"for CUDA {software.cuda}" if software.cuda else f"for ROCm {software.hip}" if software.hip else "for CPUs"
    said = f"{software.torch}, built {built}"
    if not _within(software.torch, wanted):
        return bad("torch", f"{said}; tried with torch{wanted}", f"pip install 'torch{wanted}'")
    if software.seconds > SLOW:
        return warning(
            "torch",
            f"{said}; its import took {software.seconds:.0f} s",
            "put the environment on a faster disk: every rank of every start waits for this",
        )
    return ok("torch", said)


def _gpus(software: Software) -> Finding:
    here = visible_gpus(os.environ)
    if software.gpus:
        kinds = set() if software.hip or not software.kernels else set(software.capabilities)
        missing = sorted(kind for kind in kinds if not _runs_on(kind, software.kernels))
        said = ", ".join(f"{software.gpus.count(name)} x {name}" for name in dict.fromkeys(software.gpus))
        if missing:
            said = f"{said}; torch has no kernels for {', '.join(missing)}"
            return bad("gpus", said, "install a build of torch for them (pytorch.org)")
        if len(software.gpus) < here:
            return warning(
                "gpus", f"{said}; torch sees {len(software.gpus)} of {here}", "nvidia-smi says which is lost"
            )
        return ok("gpus", said)
    if not here:
        return ok("gpus", "none here")
    if software.cuda is None and software.hip is None:
        return bad("gpus", f"{here}, and torch is a build for CPUs", "install a CUDA build of torch (pytorch.org)")
    return bad("gpus", f"{here}, and torch sees none", "see nvidia-smi, CUDA_VISIBLE_DEVICES and the driver's version")


def _runs_on(kind: str, kernels: Sequence[str]) -> bool:
    """Whether kernels are there for a kind of GPU: of its generation, or as PTX for an older one."""
    return any(
        _digits(name) <= _digits(kind) and (name.startswith("compute_") or name.startswith(kind[:-1]))
        for name in kernels
    )


def _driver(software: Software) -> list[Finding]:
    if software.cuda is None or software.driver is None:
        return []
    major, minor = (int(part) for part in software.cuda.split(".")[:2])
    said = f"takes CUDA {software.driver[0]}.{software.driver[1]}, torch is built with {software.cuda}"
    if software.driver[0] < major:
        return [
            bad("gpu driver", said, f"update the driver, or install a build of torch for CUDA {software.driver[0]}")
        ]
    if software.driver < (major, minor):
        fix = "works, but what is compiled on the spot (PTX) may not: update the driver at an occasion"
        return [warning("gpu driver", said, fix)]
    return [ok("gpu driver", said)]


def _package(name: str, version: str, wanted: str) -> Finding:
    if version.startswith("!"):
        return bad(name, f"cannot be imported: {version[1:]}", f"pip install '{name}{wanted}'")
    if not _within(version, wanted):
        return bad(name, f"{version}; tried with {name}{wanted}", f"pip install '{name}{wanted}'")
    return ok(name, version)


def _open_files(need: int) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = f"{_limit(soft)} (up to {_limit(hard)}); a rank may need {need}"
    if soft == resource.RLIM_INFINITY or soft >= need:
        return ok("open files", said)
    if hard == resource.RLIM_INFINITY or hard >= need:
        return warning("open files", said, f"ulimit -n {need}, also as a line of --setup 'ulimit -n {need}'")
    return bad("open files", said, "have the hard limit raised: /etc/security/limits.conf, nofile")


def _locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    fabric = sorted(path.name for path in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else []
    said = "unlimited" if soft == resource.RLIM_INFINITY else human(soft)
    if soft == resource.RLIM_INFINITY or not fabric:
        return ok("locked memory", said if fabric else f"{said}; no InfiniBand here that needs more")
    fix = "ulimit -l unlimited: NCCL cannot register memory with the network card otherwise"
    return warning("locked memory", f"{said}, and there is {', '.join(fabric)}", fix)


def _shared_memory() -> Finding:
    try:
        stat = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        return warning("shared memory", f"{SHARED_MEMORY}: {error.strerror}", "--run.workers 0 goes without it")
    size, free = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize
    said = f"{human(free)} of {human(size)} free in {SHARED_MEMORY}"
    if free < 1 << 30:
        fix = "data workers hand batches over in it: --run.workers 0, or more of it (docker run --shm-size 16g)"
        return warning("shared memory", said, fix)
    return ok("shared memory", said)


def _clock() -> Finding:
    now = time.time()
    newest = max(path.stat().st_mtime for path in Path(__file__).parent.glob("*.py"))
    said = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if newest > now + 60:
        return bad("clock", f"{said}: earlier than when the launcher was installed", "set the clock (chronyc, ntpd)")
    return ok("clock", said)


def _requirements() -> dict[str, str]:
    """The range of versions of each package that this needs, as the package or the checkout says."""
    try:
        said = requires("launcher") or []
    except PackageNotFoundError:
        file = Path(__file__).parents[1] / "pyproject.toml"
        said = tomllib.loads(file.read_text())["project"]["dependencies"] if file.is_file() else []
    matches = (re.match(r"([A-Za-z0-9_.-]+)\s*([<>=!~,.\d\s]*)(?:;(.*))?$", line) for line in said)
    return {match[1].lower(): _ordered(match[2]) for match in matches if match and "extra" not in (match[3] or "")}


def _ordered(wanted: str) -> str:
    """`<2.14, >=2.11` with the lower bound first."""
    return ",".join(sorted(wanted.replace(" ", "").split(","), reverse=True))


def _within(version: str, wanted: str) -> bool:
    """Whether a version lies in a range such as `>=2.11,<2.14`."""
    own = _numbers(version.partition("+")[0])
    for sign, bound in re.findall(r"(>=|<)([\d.]+)", wanted):
        limit = _numbers(bound)
        if (own < limit) == (sign == ">="):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    numbers = [int(part) for part in re.findall(r"\d+", version)[:3]]
    return tuple(numbers + [0] * (3 - len(numbers)))


def _digits(name: str) -> int:
    return int(re.sub(r"\D", "", name) or 0)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)
