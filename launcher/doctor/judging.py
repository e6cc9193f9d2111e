"""What the probes of a few nodes mean: each thing told once for all nodes, those that differ by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from statistics import median_low
from typing import Any

from launcher.doctor.findings import Finding, bad, ok, warning
from launcher.doctor.machine import Software, files_needed
from launcher.doctor.probing import Heard
from launcher.show import human

__all__ = ["judge"]

SLOW = 1.3  # times the median
SKEW = 2.0  # seconds; a run stops 20 s before its job's end, by its own node's clock
START = 5.0  # seconds that a line may take from a node to here
IMPORT = 20.0  # seconds
FIRST_FREE_PORT = 32000

Lines = Mapping[str, dict[str, Any]]


def judge(heard: Heard, software: Software, python: str, *, world_size: int) -> list[Finding]:
    """What is to be said of the nodes.

    Args:
        heard: what the probes told.
        software: what torch here says of itself.
        python: the version of Python here.
        world_size: how many ranks a run is to have.
    """
    found = [bad("srun", said, _hint(said)) for said in heard.failures]
    here = heard.of("here")
    if heard.waited:
        fix = "try again when nodes are free, or with --nodes 1, --gpus 1 or another --partition"
        return [*found, warning("nodes", f"not looked at: {heard.waited}", fix)]
    if not here:
        fix = "try it by hand: srun --nodes 1 python -m launcher.doctor.probe --help"
        return found or [bad("nodes", "the probe did not say a word", fix)]
    found += _came(heard, here)
    found += [*_versions(heard, here, software, python), *_directory(heard, here)]
    found += [*_clocks(heard), *_gpus(heard, here), *_ports(heard, here), *_limits(here, world_size)]
    found += [*_matmul(heard), *_within(heard), *_between(heard)]
    return found


def _came(heard: Heard, here: Lines) -> list[Finding]:
    """Who was there, and who was lost on the way."""
    came = ", ".join(sorted(here))
    told = [name for name in here if any(re.search(rf"\b{re.escape(name)}\b", said) for said in heard.failures)]
    lost, found = {*heard.missing, *told}, []
    for name in heard.missing:
        found.append(bad("nodes", f"{name} never came; {came} did", f"launcher submit --exclude {name}"))
    ended = heard.of("end").keys() | heard.of("stuck").keys()
    for name, line in heard.of("stuck").items():
        fix = f"launcher submit --exclude {name}, if the others do not hang there"
        found.append(bad("nodes", f"{name} hung in {line['phase']}", fix))
    for name in here:
        if name not in ended and not told:  # where one is told of already, SLURM has ended the rest with it
            fix = f"srun --nodelist {name} --nodes 1 python -c 'import torch' may say why"
            found.append(bad("nodes", f"{name} broke off or hung, without a word", fix))
            lost.add(name)
    found += _apart(heard, lost | heard.of("stuck").keys())
    for name, line in heard.of("fault").items():
        found.append(bad("nodes", f"{name}, in {line['phase']}: {line['why']}", _hint(str(line["why"]))))
    return found or ([] if told else [ok("nodes", came)])


def _apart(heard: Heard, known: Collection[str]) -> list[Finding]:
    """Who did not find whom. Of two the one that looked tells more than the one that waited, which is rank 0."""
    lines = heard.of("apart")
    looked = {name: line for name, line in lines.items() if line["rank"]}
    found = []
    for name, line in (looked or lines).items():
        others = [_name(heard, rank) for rank in line["ranks"]]
        if not {name, *others} & set(known):
            fix = "open the ports between the nodes; each must know the others by name (getent hosts NODE)"
            said = f"{name} and {', '.join(others)} did not meet ({line['phase']}): {line['why']}"
            found.append(bad("nodes", said, fix))
    return found


def _versions(heard: Heard, here: Lines, software: Software, python: str) -> list[Finding]:
    """Python and torch, as they are where the job is submitted."""
    torch = heard.of("torch")
    found = [_same("python", {name: str(line["python"]) for name, line in here.items()}, python)]
    faults = {name: str(line["fault"]) for name, line in torch.items() if "fault" in line}
    found += [
        bad("torch", f"{name}: {said}", "see what differs there: drivers, libraries") for name, said in faults.items()
    ]
    versions = {name: _built(line["version"], line["cuda"]) for name, line in torch.items() if "version" in line}
    if versions:
        found.append(_same("torch", versions, _built(software.torch, software.cuda)))
    slow = {name: line["seconds"] for name, line in torch.items() if line.get("seconds", 0) > IMPORT}
    if slow:
        said = ", ".join(f"{seconds:.0f} s on {name}" for name, seconds in slow.items())
        found.append(warning("import of torch", said, "put the environment on a faster disk, or a container image"))
    return found


def _built(version: object, cuda: object) -> str:
    return f"{version}, {f'CUDA {cuda}' if cuda else 'without CUDA'}"


def _same(check: str, values: Mapping[str, str], own: str) -> Finding:
    other = {name: value for name, value in values.items() if value != own}
    if not other:
        return ok(check, f"{own}, as here")
    said = ", ".join(f"{value} on {name}" for name, value in other.items())
    return bad(check, f"{said}; here {own}", "use one environment, on a filesystem that all nodes see (or a container)")


def _directory(heard: Heard, here: Lines) -> list[Finding]:
    """Whether all nodes see one and the same directory, and this machine what they write into it."""
    faults = []
    for name, line in here.items():
        if "directory" in line and "same" not in line:
            faults.append(f"{name} does not see it ({line['directory']})")
        elif not line.get("same"):
            faults.append(f"{name} sees another one there")
        elif not line.get("writable"):
            faults.append(f"{name} cannot write it ({line.get('directory', '')})")
        elif not heard.written.get(line["rank"]):
            faults.append(f"what {name} writes is not seen here")
    if faults:
        return [bad("run directory", "; ".join(faults), "name a DIR on a filesystem that all nodes share, for writing")]
    return [ok("run directory", "all see the same, and write it")]


def _clocks(heard: Heard) -> list[Finding]:
    """Clocks among the nodes, read at one moment; and against this one, within the time a line takes."""
    found = []
    for line in heard.of("clocks").values():
        times: Sequence[float] = line["times"]
        middle = median_low(times)
        off = {_name(heard, rank): at - middle for rank, at in enumerate(times) if abs(at - middle) > SKEW}
        said = f"within {(max(times) - min(times)) * 1000:.0f} ms of each other"
        if off:
            named = ", ".join(f"{name} by {seconds:+.0f} s" for name, seconds in off.items())
            fix = "set them by NTP: runs stop by their node's clock"
            found.append((bad if max(map(abs, off.values())) > 10 else warning)("clocks", f"{named} off", fix))
        else:
            found.append(ok("clocks", said))
    # a line arrives after it was sent: a node's clock is never further ahead than this, and behind by less than START
    off = {name: by for name, by in heard.offsets.items() if by > SKEW or by < -START}
    if off:
        named = ", ".join(f"{name} {by:+.0f} s" for name, by in off.items())
        found.append(warning("clocks", f"against this machine's: {named}", "set both by NTP"))
    return found


def _gpus(heard: Heard, here: Lines) -> list[Finding]:
    if not heard.gpus:
        return []
    seen = {name: int(line.get("gpus", 0)) for name, line in heard.of("torch").items()}
    less = {name: number for name, number in seen.items() if number < heard.gpus}
    if not less:
        return [ok("gpus", f"{heard.gpus} asked for and seen, on each node")]
    said = ", ".join(f"{name} sees {number}" for name, number in less.items())
    given = ", ".join(sorted({f"SLURM gave {here[name].get('gpus_given') or 'none'}" for name in less if name in here}))
    fix = "nvidia-smi there says whether driver and GPUs live; a build of torch for CPUs sees none"
    return [bad("gpus", f"{heard.gpus} asked for: {said} ({given})", fix)]


def _ports(heard: Heard, here: Lines) -> list[Finding]:
    found = []
    lines = heard.of("ports")
    refused = [f"{name} to {other}: {why}" for name, line in lines.items() for other, why in line["refused"].items()]
    if refused:
        more = f" and {len(refused) - 6} more" if len(refused) > 6 else ""
        fix = "open 10000-31999 between the nodes: ranks meet there"
        found.append(bad("ports", "; ".join(refused[:6]) + more, fix))
    elif lines:
        found.append(ok("ports", "each node reaches the others"))
    early = [name for name, line in here.items() if (line.get("ports_from") or FIRST_FREE_PORT) < FIRST_FREE_PORT]
    if early:
        fix = f"sysctl net.ipv4.ip_local_port_range: from {FIRST_FREE_PORT} on, else a rendezvous port may be taken"
        lowest = min(here[name]["ports_from"] for name in early)
        found.append(warning("free ports", f"{_some(early)}: the kernel deals out ports from {lowest} on", fix))
    return found


def _limits(here: Lines, world_size: int) -> list[Finding]:
    """Room and limits of the nodes."""
    need = files_needed(world_size)
    found = [
        _least("/tmp", here, "tmp", 1 << 30, human, "clear it, or set TMPDIR: compilers write there"),
        _least("/dev/shm", here, "shm", 1 << 30, human, "--run.workers 0, or more of it: data workers use it"),
        _least("open files", here, "nofile", need, str, f"--setup 'ulimit -n {need}'; or ask for a higher limit"),
    ]
    tight = [name for name, line in here.items() if line.get("infiniband") and 0 <= line["memlock"] < 1 << 40]
    if tight:
        fix = "ulimit -l unlimited, before submitting or by PropagateResourceLimitsExcept=MEMLOCK"
        found.append(warning("locked memory", f"{_some(tight)}: {human(min(here[n]['memlock'] for n in tight))}", fix))
    without = [name for name, line in here.items() if not line.get("scontrol", True)]
    if without:
        fix = "have SLURM's commands installed there, or --setup 'module load slurm': the batch script uses them"
        found.append(bad("scontrol", f"there is none on {_some(without)}", fix))
    return found


def _least(check: str, here: Lines, key: str, least: int, said: Callable[[int], str], fix: str) -> Finding:
    values = {name: int(line[key]) for name, line in here.items() if line.get(key) is not None}
    values = {name: value if value >= 0 else 1 << 62 for name, value in values.items()}  # -1: no limit
    if not values:
        return warning(check, "unknown", fix)
    low = {name: value for name, value in values.items() if value < least}
    if low:
        return warning(check, ", ".join(f"{said(value)} on {name}" for name, value in low.items()), fix)
    smallest = min(values.values())
    return ok(check, "unlimited" if smallest == 1 << 62 else f"{said(smallest)} or more")


def _matmul(heard: Heard) -> list[Finding]:
    """Matrix products: each node's, or GPU's, against the others'."""
    lines = heard.of("matmul")
    times = {
        name if len(line["seconds"]) == 1 else f"{name} GPU {index}": seconds
        for name, line in lines.items()
        for index, seconds in enumerate(line["seconds"])
    }
    if not times:
        return []
    flops = [value for line in lines.values() for value in line["flops"]]
    kind = (
        "bf16, a GPU" if any(line["device"] == "cuda" for line in lines.values()) else "fp32, a node's share of cores"
    )
    said = f"{min(flops) / 1e12:.3g} to {max(flops) / 1e12:.3g} TFLOP/s ({kind})"
    return [_outliers("matmul", times, said)]


def _within(heard: Heard) -> list[Finding]:
    """The sum over the GPUs of each node."""
    lines = heard.of("within")
    found = [
        bad("all-reduce in a node", f"{name}: wrong sums", "do not use that node")
        for name, line in lines.items()
        if not line["right"]
    ]
    times = {name: float(line["seconds"]) for name, line in lines.items()}
    if times:
        slowest = max(times.values())
        size = next(iter(lines.values()))["bytes"]
        found.append(_outliers("all-reduce in a node", times, f"{human(size)} in {slowest * 1000:.1f} ms or less"))
    return found


def _between(heard: Heard) -> list[Finding]:
    """The sum over all nodes; and of each node the better of those with its two neighbours, where a slow one shows."""
    lines = heard.of("between")
    if not lines:
        return []
    first = next(iter(lines.values()))
    slowest = max(float(line["seconds"]) for line in lines.values())
    said = f"{human(first['bytes'])} over {len(lines)} nodes in {slowest * 1000:.1f} ms ({first['backend']})"
    times = {name: min(map(float, line["neighbours"].values())) for name, line in lines.items() if line["neighbours"]}
    return [_outliers("all-reduce between nodes", times if len(lines) > 2 else {}, said)]


def _outliers(check: str, times: Mapping[str, float], said: str) -> Finding:
    middle = median_low(times.values()) if times else 0.0
    slow = {name: seconds / middle for name, seconds in times.items() if seconds > SLOW * middle}
    if not slow:
        return ok(check, said)
    named = ", ".join(f"{name} takes {ratio:.1f} x the median" for name, ratio in slow.items())
    nodes = ",".join(dict.fromkeys(name.split()[0] for name in slow))
    return warning(check, f"{said}; {named}", f"launcher submit --exclude {nodes}: the slowest sets the pace")


def _name(heard: Heard, rank: int) -> str:
    names: list[str] = next((line["nodes"] for line in heard.of("here").values() if line.get("nodes")), [])
    return names[rank] if rank < len(names) else f"rank {rank}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _hint(said: str) -> str:
    """What to do about a complaint, where it is one of those that are seen often."""
    for part, fix in (
        ("Node failure", "scontrol show node says more of it; launcher submit --exclude does without it"),
        ("No such file or directory", "put the environment (or DIR) where all nodes see it; or --setup loads it there"),
        ("chdir", "run this in a directory that all nodes see"),
        ("No module named", "install the launcher in an environment that all nodes see"),
        ("account", "--cluster NAME, whose file names an account"),
        ("artition", "--partition: sinfo lists them"),
        ("gres", "ask for fewer GPUs: --gpus"),
        ("onfiguration is not available", "ask for fewer --nodes or --gpus: sinfo lists what there is"),
        ("oom", "give mem in the site's file: what a core has by default does not hold torch"),
        ("nreachable", "open the ports between nodes, or name the network: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"),
        ("imed out", "open the ports between nodes, or name the network: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"),
        ("onnect", "open the ports between nodes, or name the network: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"),
    ):
        if part in said:
            return fix
    return "try it by hand: srun --nodes 1 hostname"
