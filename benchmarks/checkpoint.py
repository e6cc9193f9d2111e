"""What a checkpoint costs, the launcher's and its peers': blocked, until durable, to load, in memory; and a large job.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --gigabytes 0.1 --rounds 3 --only launcher dcp --out result.json

1 GB of state (weights and AdamW's moments, 141 tensors) over 2 ranks of this machine.

How it is fair:
- All contenders save the same bytes in the same two processes and take turns: a round is a save each, in a new order
  each time, then a load each, and every ratio is of two turns of one round. A first round only warms up, and there
  what was loaded is compared with what was saved.
- A turn begins at a barrier, with nothing left to write back and free memory that has been touched just now, and
  lasts until the last rank is done.
- `blocked` is how long training waits, beside one memcpy of the same bytes into touched memory, just before.
- `durable` is until the data and its names are on the disk: each contender gets the fsyncs that it leaves out. The
  measure is `raw`: write and fsync of the same bytes, a file a rank. The launcher reads everything back after that:
  `verified`.
- `cold` and `warm` are a load in place with and without the files in the page cache (of this machine: what caches the
  disk has is not known). The measure is a read of the same bytes into touched memory and one xxh3 pass over them.
- `control` is `raw` again: its distance from 1 is what this method cannot resolve.
- Memory is measured in processes of their own: by how much their anonymous and shared memory grew, all ranks together,
  from before the first of two saves to the peak, so that what a contender keeps counts; and in a load alone. How long
  that took is told too, once, as `first load`: with the files in the page cache, and no buffer or heap yet.
- Beside training: a small MLP on one thread a rank, its steps before and during a save; there are as many ranks as
  CPU cores here, so that whatever a thread does is taken from training.

The large job is layout only, and nothing in it communicates: 70 B parameters on 4,096 ranks of 512 nodes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
import tables
import torch
import torch._dynamo
import torch.distributed as dist
import xxhash
from savers import PEERS, SAVERS, Job, Memcpy, Saver, forget, remember

from launcher.checkpoint import Index, Plan, TensorSpec, boxes
from launcher.checkpoint.files import FileEntry, Segment, digest_count, header, part_sizes
from launcher.checkpoint.index import decode, encode
from launcher.world import World

QUESTION = "What does a checkpoint cost beside a memcpy, the raw disk and its peers, and how does a large job plan?"
HERE = Path(__file__).resolve().parent
RANKS = 2
LIMITS = {"blocked": 1.2, "durable": 1.2, "cold": 1.3}
"""Of the launcher's ratios."""
ASYNC = ("launcher", "dcp async")
QUIET = 0.3  # seconds
SECONDS = 3600  # after which the ranks are taken to hang

Sample = tuple[float, int]
"""When, and how many bytes the ranks had."""


# --- the ranks ---


def start(scenario: str, directory: Path, *arguments: Any) -> tuple[Any, list[Sample]]:
    """Fork the ranks and wait for them: what rank 0 returned, and their memory meanwhile."""
    directory.mkdir(parents=True)
    sys.stdout.flush()
    pids = []
    for rank in range(RANKS):
        if (pid := os.fork()) == 0:
            os._exit(be(rank, scenario, directory, *arguments))
        pids.append(pid)
    alive, failed = set(pids), False
    samples: list[Sample] = []
    end = time.monotonic() + SECONDS
    while alive:
        if time.monotonic() > end and not failed:
            failed = True
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002 if scenario == "memory" else 0.05)
        if len(alive) == RANKS and scenario == "memory":
            samples.append((time.monotonic(), sum(map(memory_of, pids))))
        for pid in list(alive):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                alive.discard(pid)
                if status and not failed:
                    failed = True
                    for other in alive:
                        os.kill(other, signal.SIGKILL)
    said = "\n".join(path.read_text() for path in sorted(directory.glob("rank-*.txt")))
    if failed:
        raise SystemExit(f"{scenario} {' '.join(map(str, arguments))} failed:\n{said}")
    return json.loads((directory / "result.json").read_text()), samples


def be(rank: int, scenario: str, directory: Path, *arguments: Any) -> int:
    """What a rank does with its life; its exit code."""
    output = os.open(directory / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # for Accelerate
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", f"file://{directory}/rendezvous", rank=rank, world_size=RANKS)
        world = World(rank=rank, world_size=RANKS, group=dist.group.WORLD)
        found = globals()[f"rank_{scenario}"](world, directory, *arguments)
        if world.is_main:
            (directory / "result.json").write_text(json.dumps(found))
        world.barrier()
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


def memory_of(pid: int) -> int:
    """Bytes of a process that are no file's."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon", "RssShm")))


def rank_times(world: World, directory: Path, gigabytes: float, rounds: int, names: list[str]) -> dict[str, Any]:
    """Saves and loads by turns; what each took in every round."""
    job = Job(world, gigabytes)
    job.fill()
    memcpy = Memcpy(job)
    savers = {name: SAVERS[name](job) for name in names}
    savers["control"] = savers["raw"]
    order = random.Random(0)
    found: list[dict[str, Any]] = []
    for number in range(rounds + 1):
        turns: dict[str, Any] = {}
        for name in order.sample(list(savers), len(savers)):
            turns[name] = time_save(world, savers[name], directory / name, memcpy)
        for name in order.sample(list(savers), len(savers)):
            load = time_load if number else check_load
            turns[name] |= load(world, savers[name], directory / name)
        clear(world, *(directory / name for name in savers))
        if number:
            found.append(turns)
    beside: dict[str, list[Any]] = {name: [] for name in ASYNC if name in savers}
    for _ in range(rounds):
        for name in order.sample(list(beside), len(beside)):
            prepare(world, directory / name)
            beside[name].append(steps_beside(world, savers[name], directory / name))
            clear(world, directory / name)
    return {"nbytes": job.nbytes, "tensors": len(job.names()), "rounds": found, "beside": beside}


def rank_memory(world: World, directory: Path, gigabytes: float, name: str, kept: str, what: str) -> list[float]:
    """Two saves, or a load of what they left; when that began and ended."""
    job = Job(world, gigabytes)
    job.fill()
    saver = SAVERS[name](job)
    warm(world, job.nbytes)
    time.sleep(QUIET)
    world.barrier()
    begun = time.monotonic()
    if what == "load":
        saver.load(Path(kept))
        world.barrier()
    for _ in range(2 * (what == "save")):
        prepare(world, Path(kept))
        saver.save(Path(kept))()
    return [begun, time.monotonic()]


def prepare(world: World, directory: Path) -> None:
    """An empty directory, and nothing to write back."""
    clear(world, directory)
    if world.is_main:
        directory.mkdir()
        os.sync()
    world.barrier()


def warm(world: World, nbytes: int) -> None:
    """Make free memory of the machine that has been touched just now, half as much again as the state of all ranks.

    Where a virtual machine gives free memory back to its host, what a turn takes, for itself or for the page cache, can
    cost ten times what it does elsewhere; whose turn that is would be chance.
    """
    np.ones(nbytes * 3 // 2 // world.world_size, dtype=np.uint8)
    world.barrier()


def clear(world: World, *directories: Path) -> None:
    """Remove directories, for good."""
    world.barrier()
    if world.is_main:
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)
        os.sync()
    world.barrier()


def timed(world: World, work: Callable[[], object]) -> float:
    """How long all ranks together need for something."""
    world.barrier()
    begun = time.monotonic()
    work()
    return max(world.gather(time.monotonic() - begun))


def time_save(world: World, saver: Saver, directory: Path, memcpy: Memcpy) -> dict[str, float]:
    prepare(world, directory)
    warm(world, saver.job.nbytes)
    copied = timed(world, memcpy)
    world.barrier()
    begun = time.monotonic()
    finish = saver.save(directory)
    returned = time.monotonic()
    durable = finish()
    ended = time.monotonic()
    seen = world.gather((begun, returned - begun, durable, ended))
    first = min(begun for begun, *_ in seen)
    return {
        "memcpy": copied,
        "blocked": max(blocked for _, blocked, *_ in seen),
        "durable": max(durable for *_, durable, _ in seen) - first,
        "verified": max(ended for *_, ended in seen) - first,
    }


def time_load(world: World, saver: Saver, directory: Path) -> dict[str, float]:
    if world.is_main:
        forget(directory)
    warm(world, saver.job.nbytes)
    cold = timed(world, lambda: saver.load(directory))
    if world.is_main:
        remember(directory)
    warm(world, saver.job.nbytes)
    return {"cold": cold, "warm": timed(world, lambda: saver.load(directory))}


def check_load(world: World, saver: Saver, directory: Path) -> dict[str, float]:
    """Load into zeros, and see that everything is there again."""
    before = {name: digest(tensor) for name, tensor in saver.live().items()}
    for tensor in saver.live().values():
        tensor.zero_()
    world.barrier()
    saver.load(directory)
    assert {name: digest(tensor) for name, tensor in saver.live().items()} == before
    return {}


def digest(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(tensor.flatten().view(torch.uint8).numpy())


def steps_beside(world: World, saver: Saver, directory: Path) -> dict[str, float]:
    """Train before and during a save: the median and the mean step of the latter by the median of the former, and the
    seconds that training lost.
    """
    torch.manual_seed(0)
    layers = [torch.nn.Linear(784, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(512, 10))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    inputs, wanted = torch.rand(64, 784), torch.randint(10, (64,))

    def step() -> float:
        begun = time.monotonic()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), wanted).backward()
        optimizer.step()
        return time.monotonic() - begun

    end = time.monotonic() + 2 * QUIET
    while time.monotonic() < end:
        step()
    before = []
    while time.monotonic() < end + 2 * QUIET:
        before.append(step())
    world.barrier()
    finish = saver.save(directory)
    thread = threading.Thread(target=finish)
    thread.start()
    during = [step()]
    while thread.is_alive():
        during.append(step())
    usual = statistics.median(before)
    mean = statistics.mean(during)
    seen = world.gather((statistics.median(during) / usual, mean / usual, (mean - usual) * len(during)))
    return dict(zip(("median", "mean", "lost_s"), map(max, zip(*seen, strict=True)), strict=True))


# --- the large job ---


def shapes_of_70b() -> dict[str, tuple[int, ...]]:
    layer = {
        "attention.q": (8192, 8192),
        "attention.k": (1024, 8192),
        "attention.v": (1024, 8192),
        "attention.o": (8192, 8192),
        "mlp.gate": (28672, 8192),
        "mlp.up": (28672, 8192),
        "mlp.down": (8192, 28672),
        "norm1": (8192,),
        "norm2": (8192,),
    }
    found = {f"layers.{k}.{name}.weight": shape for k in range(80) for name, shape in layer.items()}
    return found | {"embed.weight": (128256, 8192), "head.weight": (128256, 8192)}


def large(mesh: tuple[int, ...], placements: tuple[str, ...]) -> dict[str, TensorSpec]:
    """70 B parameters and their moments, in float32."""
    kinds = ("model", "optimizer/0/exp_avg", "optimizer/0/exp_avg_sq")
    shapes = shapes_of_70b().items()
    return {f"{kind}/{name}": TensorSpec(shape, "F32", mesh, placements) for kind in kinds for name, shape in shapes}


def planning(mesh: tuple[int, ...], placements: tuple[str, ...]) -> dict[str, Any]:
    """What a save on 4,096 ranks and a load on half as many, placed in another way, cost a rank before it does any
    I/O; seconds. No process group exists here, so none of it communicates.
    """
    assert not dist.is_initialized()
    ranks, node, nodes = math.prod(mesh), 8, math.prod(mesh) // 8
    mates = range(node, 2 * node)
    specs = large(mesh, placements)
    found: dict[str, Any] = {"mesh": list(mesh), "placements": list(placements), "tensors": len(specs)}

    def clock(name: str, work: Callable[[], Any]) -> Any:
        begun = time.monotonic()
        made = work()
        found[name] = round(time.monotonic() - begun, 3)
        return made

    clock("plan_a_rank_s", lambda: Plan(specs, ranks).nbytes(mates[0]))

    def lead() -> tuple[bytes, list[int]]:
        plan = Plan(specs, ranks)
        return header([plan[rank] for rank in mates], specs), part_sizes([plan.nbytes(rank) for rank in mates])

    head, _ = clock("plan_a_nodes_leader_s", lead)
    size, rest = divmod(sum(spec.nbytes for spec in specs.values()), ranks)
    assert not rest, "each rank has about as much"
    blank = Segment(0, len(head), bytes(digest_count(len(head))))
    entry = FileEntry("", len(head) + node * size, blank)
    files = [replace(entry, name=f"node-{k:05d}-of-{nodes:05d}.safetensors") for k in range(nodes)]
    parts = []
    for rank in range(ranks):
        digests = np.random.default_rng(rank).bytes(digest_count(size))
        parts.append((rank // node, Segment(len(head) + rank % node * size, size, digests)))
    index = Index(1, 1, ranks, specs, {}, files, parts, {}, [{"cursor": rank} for rank in range(ranks)], [], {})
    data = clock("encode_index_s", lambda: encode(index))
    found |= {"index_mb": round(len(data) / 1e6, 2), "files": len(files), "nodes": nodes}
    read: Index = clock("decode_index_s", lambda: decode(data))
    here = large((4, ranks // 8), ("R", "S(0)"))

    def sources() -> int:
        there = Plan(read.tensors, ranks)
        return sum(
            overlap.numel
            for name, spec in here.items()
            for box in boxes(spec, 100)
            for _, _, overlap in there.sources(name, box)
        )

    needed = clock("plan_a_load_s", sources)
    assert needed == sum(box.numel for spec in here.values() for box in boxes(spec, 100))
    found["slowest_rank_s"] = round(
        max(
            found["plan_a_nodes_leader_s"] + found["encode_index_s"],
            found["decode_index_s"] + found["plan_a_load_s"],
        ),
        3,
    )
    return found


# --- what it comes to ---


def spread(values: list[float]) -> dict[str, Any]:
    """A median and the quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"ratio": round(float(middle), 3), "quartiles": [round(float(low), 3), round(float(high), 3)]}


def summary(rounds: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """A contender's seconds and its ratios to the measure of the same round, and to the launcher's."""
    row: dict[str, Any] = {}
    for what in ("blocked", "durable", "verified", "cold", "warm"):
        if (name in ("raw", "control") and what == "blocked") or (name != "launcher" and what == "verified"):
            continue
        measures = {"blocked": (name, "memcpy"), "verified": ("raw", "durable")}
        whose, measure = measures.get(what, ("raw", what))
        row[what] = {
            "s": round(statistics.median(turns[name][what] for turns in rounds), 4),
            **spread([turns[name][what] / turns[whose][measure] for turns in rounds]),
        }
        if name in PEERS and "launcher" in rounds[0]:
            row[what]["of_the_launchers"] = spread([turns[name][what] / turns["launcher"][what] for turns in rounds])
    return row


def targets(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the launcher is to reach, and whether it does."""
    rows, found = result["contenders"], {}
    mine = rows.get("launcher")
    if mine is not None:
        for what, limit in LIMITS.items():
            ratio = mine[what]["ratio"]
            found[f"{what} at most {limit} of the measure"] = {"found": ratio, "met": ratio <= limit}
        for what in LIMITS:
            for peer in PEERS:
                if peer in rows:
                    ratio = rows[peer][what]["of_the_launchers"]["ratio"]
                    found[f"{what} ahead of {peer}"] = {"found": ratio, "met": ratio > 1}
    slowest = max(plan["slowest_rank_s"] for plan in result["large_job"])
    size = max(plan["index_mb"] for plan in result["large_job"])
    found["a large job's rank plans in under 1 s"] = {"found": slowest, "met": slowest < 1}
    found["a large job's index has under 50 MB"] = {"found": size, "met": size < 50}
    return found


def table(result: dict[str, Any]) -> str:
    """The result, for a person."""
    columns = ("blocked", "durable", "verified", "cold", "warm")
    lines = [
        f"{'':12}"
        + "".join(f"{what:>26}" for what in columns)
        + f"{'GB to save':>12}{'to load':>9}{'first load s':>14}"
    ]
    for name, row in result["contenders"].items():
        line = f"{name:12}"
        for what in columns:
            if what in row:
                low, high = row[what]["quartiles"]
                line += f"{row[what]['s']:>8.3f} s {row[what]['ratio']:5.2f} ({low:.2f}-{high:.2f})".rjust(26)
            else:
                line += f"{'-':>26}"
        once = [row.get(what, "-") for what in ("memory_to_save_gb", "memory_to_load_gb", "first_load_s")]
        lines.append(line + f"{once[0]:>12}{once[1]:>9}{once[2]:>14}")
    for name, row in result["beside_training"].items():
        median, mean = row["median"]["ratio"], row["mean"]["ratio"]
        lines.append(f"steps during {name}'s save: median {median}, mean {mean}, {row['lost_s']} s lost")
    for plan in result["large_job"]:
        lines.append("large job: " + ", ".join(f"{name} {value}" for name, value in plan.items()))
    for name, target in result["targets"].items():
        lines.append(f"{'met   ' if target['met'] else 'MISSED'} {name}: {target['found']}")
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    """The result, for the results page."""

    def ratio(row: dict[str, Any], what: str) -> str | None:
        return f"{row[what]['ratio']:.2f} ({tables.quartiles(row[what]['quartiles'], 2)})" if what in row else None

    columns = {"blocked": "memcpy", "durable": "raw write", "cold": "raw read", "warm": "raw read"}
    header = ["contender", *(f"{what} / {measure}" for what, measure in columns.items())]
    rows = []
    for name, row in result["contenders"].items():
        memory = [row.get(f"memory_to_{what}_gb") for what in ("save", "load")]
        rows.append([name, *(ratio(row, what) for what in columns), *memory])
    settings, raw = result["settings"], result["contenders"]["raw"]
    parts = [
        f"{settings['gigabytes']:.2f} GB over {settings['ranks']} ranks, medians of paired ratios and their quartiles "
        f"over {settings['rounds']} rounds. The raw write and fsync took {raw['durable']['s']:.2f} s, the raw read and "
        f"a digest {raw['cold']['s']:.2f} s cold and {raw['warm']['s']:.2f} s warm.",
        tables.markdown([*header, "GB more to save", "to load"], rows),
    ]
    for name, row in result["beside_training"].items():
        median, mean = row["median"]["ratio"], row["mean"]["ratio"]
        parts.append(f"Steps during {name}'s save: median {median}, mean {mean} of the usual, {row['lost_s']} s lost.")
    keys = ("plan_a_rank_s", "plan_a_nodes_leader_s", "encode_index_s", "index_mb", "decode_index_s", "plan_a_load_s")
    plans = [
        [f"mesh {'x'.join(map(str, plan['mesh']))}, {', '.join(plan['placements'])}", *(plan[key] for key in keys)]
        for plan in result["large_job"]
    ]
    said = ("saved as", "plan a part", "a node's leader, with its header", "encode the index", "its MB", "decode it")
    parts.append("The large job, 70 B parameters with their moments on 4,096 ranks of 512 nodes; seconds a rank:")
    parts.append(tables.markdown((*said, "plan the load of 2,048 ranks"), plans))
    return "\n\n".join(parts)


def compare(names: list[str], gigabytes: float, rounds: int, root: Path | None) -> dict[str, Any]:
    """The whole comparison, as its JSON has it."""
    plans = [planning((4096,), ("S(0)",)), planning((8, 512), ("R", "S(0)"))]
    with tempfile.TemporaryDirectory(prefix="checkpoint-benchmark-", dir=root) as name_of_scratch:
        scratch = Path(name_of_scratch)
        times, _ = start("times", scratch / "times", gigabytes, rounds, ["raw", *names])
        rows = {name: summary(times["rounds"], name) for name in ["raw", "control", *names]}
        for name in names:
            for what in ("save", "load"):
                directory, kept = scratch / f"memory-{what}-{name}", scratch / "kept"
                (begun, ended), samples = start("memory", directory, gigabytes, name, str(kept), what)
                resting = statistics.median(held for at, held in samples if begun - QUIET / 2 < at <= begun)
                peak = max(held for at, held in samples if begun <= at <= ended)
                rows[name][f"memory_to_{what}_gb"] = round((peak - resting) / 1e9, 2)
                if what == "load":
                    rows[name]["first_load_s"] = round(ended - begun, 3)
            shutil.rmtree(kept)
    result = {
        "benchmark": "checkpoint",
        **machine.facts(),
        "settings": {
            "ranks": RANKS,
            "gigabytes": round(times["nbytes"] / 1e9, 4),
            "tensors": times["tensors"],
            "rounds": rounds,
            "threads": 1,
        },
        "contenders": rows,
        "beside_training": {
            name: {what: spread([turn[what] for turn in turns]) for what in ("median", "mean")}
            | {"lost_s": round(statistics.median(turn["lost_s"] for turn in turns), 3)}
            for name, turns in times["beside"].items()
        },
        "large_job": plans,
    }
    return result | {"targets": targets(result)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of state, all ranks together")
    parser.add_argument("--rounds", type=int, default=9, help="saves and loads of each contender")
    parser.add_argument("--dir", type=Path, help="where to save (default: the system's temporary directory)")
    parser.add_argument("--only", nargs="+", choices=[name for name in SAVERS if name != "raw"], help="these")
    parser.add_argument("--out", type=Path, help="file (default: results/checkpoint-MACHINE.json if none is left out)")
    options = parser.parse_args()
    names = options.only or [name for name in SAVERS if name != "raw"]
    result = compare(names, options.gigabytes, options.rounds, options.dir)
    print(table(result))
    out = options.out
    if out is None and not options.only:
        where = result["machine"]
        out = HERE / "results" / f"checkpoint-{machine.slug(where['cpu'])}-{where['cores']}-cores.json"
    if out is not None:
        machine.write(out, result)


if __name__ == "__main__":
    main()
