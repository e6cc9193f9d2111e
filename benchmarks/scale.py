"""What one rank pays to be one of many: its data order, and its part in a checkpoint, at 4 to 16,384 ranks.

    python benchmarks/scale.py
    python benchmarks/scale.py --ranks 4 64 --samples 1000 1000000

What depends on the number of ranks or samples is arithmetic that each rank does for itself, so that one process can
do what a single rank of a large job would: nothing here communicates. Seconds (of CPU) are the least of a few tries,
for a first, a middle and the last rank, the slowest of them; memory is tracemalloc's peak, in a run of its own.

- `order`: which samples a micro-batch holds (`Plan.shares`, `Order`), 8 of them, 4 micro-batches a rank and step.
- `write`: what a rank writes into a checkpoint (`Plan`) of a model that is sharded over all ranks, and of a `hybrid`
  one, sharded over the 8 of a node and replicated over the nodes.
- `read`: where a rank of half as many finds what it holds (`Plan.sources`). The replicas of a hybrid one have shared
  its writing, in pieces of 1 MiB at least: more nodes mean more pieces, until they are that small.
- `index`: what is written once for all ranks, and read by each; it lists the ranks, so it grows with them.
- `stream`: a micro-batch of an iterable without shards, which every rank must read past the others' samples.

Agreement at a step's edge is one reduction of nine numbers, whatever the size of the job.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
import tables
from turns import HERE

from launcher.checkpoint.files import FileEntry, Segment, digest_count
from launcher.checkpoint.index import Index, decode, encode
from launcher.checkpoint.layout import Plan as Layout
from launcher.checkpoint.layout import TensorSpec, boxes
from launcher.order import Order, Plan
from launcher.stream import Stream

QUESTION = "Does a rank pay more where there are more ranks, or more samples?"
RANKS = (4, 64, 1024, 16_384)
SAMPLES = tuple(10**power for power in range(3, 12))
MICROBATCH, ACCUMULATION, NODE = 8, 4, 8
READS = 2048  # micro-batches
TRIES = 3
FLAT = 4.0
"""How many times as much as the least may count as flat: a permutation of n samples walks through up to 4 n places."""
LIMITS = {"order_us": 50, "order_kib": 1024, "plan_s": 1.0, "plan_mib": 16, "hybrid_s": 4.0, "index_bytes": 200}


def least(work: Callable[[], object]) -> float:
    """Seconds of CPU that something takes when nothing disturbs it."""
    found = []
    for _ in range(TRIES):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return min(found)


def peak(work: Callable[[], object]) -> float:
    """KiB that something takes at most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / 1024
    finally:
        tracemalloc.stop()


def some(ranks: int) -> tuple[int, ...]:
    """A first, a middle and the last rank."""
    return (0, ranks // 2, ranks - 1)


def order(samples: int, ranks: int) -> dict[str, Any]:
    """Of a rank's micro-batches, from a late step on: microseconds each, and memory."""
    plan = Plan(MICROBATCH * ACCUMULATION * ranks, MICROBATCH)

    def read(rank: int) -> None:
        shuffled = Order(samples, seed=0, shuffle=True)
        for _, slot in zip(range(READS), plan.shares(10_000, rank, ranks), strict=False):
            shuffled.samples(slot.start, slot.stop)

    seconds = max(least(lambda rank=rank: read(rank)) for rank in some(ranks))
    kib = peak(lambda: read(ranks // 2))
    return {"samples": samples, "ranks": ranks, "us": round(1e6 * seconds / READS, 2), "kib": round(kib, 1)}


def decoder(mesh: tuple[int, ...], placements: tuple[str, ...]) -> dict[str, TensorSpec]:
    """80 layers, 70 B parameters, and their moments, in float32."""
    layer = {"q": (8192, 8192), "o": (8192, 8192), "k": (1024, 8192), "v": (1024, 8192)}
    layer |= {"gate": (28672, 8192), "up": (28672, 8192), "down": (8192, 28672), "norm": (8192,)}
    shapes = {f"layers.{k}.{name}": shape for k in range(80) for name, shape in layer.items()}
    shapes |= {"embed": (128256, 8192), "head": (128256, 8192)}
    kinds = ("model", "optimizer/0/exp_avg", "optimizer/0/exp_avg_sq")
    return {
        f"{kind}/{name}": TensorSpec(shape, "F32", mesh, placements) for kind in kinds for name, shape in shapes.items()
    }


def checkpoint(ranks: int) -> dict[str, Any]:
    """What a rank of so many plans to save, and to load what twice as many have saved."""
    found: dict[str, Any] = {"ranks": ranks}
    for name, cut in (("sharded", sharded), ("hybrid", hybrid)):
        saved, here = cut(ranks), cut(ranks // 2)

        def write(rank: int, specs: dict[str, TensorSpec] = saved) -> int:
            return Layout(specs, ranks).nbytes(rank)

        def read(rank: int, specs: dict[str, TensorSpec] = saved, mine: dict[str, TensorSpec] = here) -> None:
            there, local = Layout(specs, ranks), {key: boxes(spec, rank) for key, spec in mine.items()}
            parts = (part for key in mine for box in local[key] for _, _, part in there.sources(key, box))
            assert sum(part.numel for part in parts) == sum(box.numel for held in local.values() for box in held)

        found[f"write_{name}_s"] = round(max(least(lambda rank=rank: write(rank)) for rank in some(ranks)), 4)
        found[f"write_{name}_kib"] = round(peak(lambda: write(ranks // 2)))
        found[f"read_{name}_s"] = round(max(least(lambda rank=rank: read(rank)) for rank in some(ranks // 2)[1:]), 4)
        found[f"read_{name}_kib"] = round(peak(lambda: read(ranks // 4)))
    whole = index(sharded(ranks), ranks)
    data, without = encode(whole), encode(replace(whole, files=[], parts=[], rank_values=[]))
    digests = sum(len(part.digests) for _, part in whole.parts) * 4 // 3  # in base64
    found |= {"index_mb": round(len(data) / 1e6, 3), "decode_s": round(least(lambda: decode(data)), 4)}
    return found | {"index_bytes_a_rank": round((len(data) - len(without) - digests) / ranks)}


def sharded(ranks: int) -> dict[str, TensorSpec]:
    return decoder((ranks,), ("S(0)",))


def hybrid(ranks: int) -> dict[str, TensorSpec]:
    node = min(NODE, ranks)
    return decoder((ranks // node, node), ("R", "S(0)"))


def parts(specs: dict[str, TensorSpec], ranks: int) -> list[int]:
    """The bytes that each rank writes, as even as they are for a large model."""
    size, rest = divmod(sum(spec.nbytes for spec in specs.values()), ranks)
    return [size + (rank < rest) for rank in range(ranks)]


def index(specs: dict[str, TensorSpec], ranks: int) -> Index:
    """As a job of so many ranks writes it."""
    sizes = parts(specs, ranks)
    header = Segment(0, 1 << 20, bytes(16 * 1))
    segments, files = [], []
    random = np.random.default_rng(0)
    for first in range(0, ranks, NODE):
        at = header.size
        for size in sizes[first : first + NODE]:
            segments.append((len(files), Segment(at, size, random.bytes(digest_count(size)))))
            at += size
        files.append(FileEntry(f"node-{len(files):05d}-of-{-(-ranks // NODE):05d}.safetensors", at, header))
    return Index(1, 1, ranks, specs, {}, files, segments, {}, [{}] * ranks, [], {})


def stream(ranks: int) -> float:
    """Microseconds of a micro-batch of a plain iterable."""
    data = Stream(Numbers(), MICROBATCH, list)
    batches = data.read(ranks // 2, ranks, None)
    return round(1e6 * least(lambda: next(batches)), 1)


class Numbers:
    """An iterable without shards."""

    def __iter__(self) -> Any:
        return iter(range(10**12))


def compare(ranks: list[int], samples: list[int]) -> dict[str, Any]:
    """Everything, as its JSON has it."""
    settings = {"microbatch_size": MICROBATCH, "accumulation": ACCUMULATION, "ranks_a_node": NODE, "reads": READS}
    return {
        "benchmark": "scale",
        **machine.facts(),
        "settings": settings,
        "order": [order(size, number) for size in samples for number in ranks],
        "checkpoint": [checkpoint(number) for number in ranks],
        "stream_us": {str(number): stream(number) for number in ranks},
    }


def markdown(result: dict[str, Any]) -> str:
    """The result, for the results page and the terminal."""
    ranks = [row["ranks"] for row in result["checkpoint"]]
    sizes = dict.fromkeys(row["samples"] for row in result["order"])
    cells = {(row["samples"], row["ranks"]): f"{row['us']:.1f} ({row['kib']:.0f})" for row in result["order"]}
    rows = [[f"{size:.0e} samples", *(cells[size, number] for number in ranks)] for size in sizes]
    header = ["", *(f"{number:,} ranks" for number in ranks)]

    def planned_ms(what: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: f"{1e3 * row[f'{what}_s']:.1f} ({row[f'{what}_kib']:,})"

    plans: dict[str, Callable[[dict[str, Any]], object]] = {
        "plan what it writes, sharded: ms (KiB)": planned_ms("write_sharded"),
        "hybrid: ms (KiB)": planned_ms("write_hybrid"),
        "find what a rank of half as many loads, sharded: ms (KiB)": planned_ms("read_sharded"),
        "hybrid, load: ms (KiB)": planned_ms("read_hybrid"),
        "decode the index: ms": lambda row: f"{1e3 * row['decode_s']:.1f}",
        "the index: MB": lambda row: f"{row['index_mb']:.2f}",
        "of it, bytes a rank besides digests": lambda row: row["index_bytes_a_rank"],
    }
    planned = [[name, *(show(row) for row in result["checkpoint"])] for name, show in plans.items()]
    streams = [["stream without shards: us", *result["stream_us"].values()]]
    return "\n\n".join(
        [
            "The order of a micro-batch: microseconds (and the peak of memory, KiB).",
            tables.markdown(header, rows),
            "A checkpoint of 70 B parameters with their moments; what a rank does. The index holds a digest a block of "
            "8 MiB besides. A stream without shards is read by every rank past what the others take.",
            tables.markdown(header, planned + streams),
        ]
    )


def targets(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is to be reached, and whether it is."""
    times = {(row["samples"], row["ranks"]): row["us"] for row in result["order"]}
    sizes, ranks = ({pair[k] for pair in times} for k in (0, 1))
    by_ranks = max(times[size, number] / times[size, min(ranks)] for size in sizes for number in ranks)
    spreads = [[times[size, number] for size in sizes] for number in ranks]
    plans = result["checkpoint"]
    first = plans[0]
    kinds = ("write_sharded", "read_sharded", "write_hybrid")
    return {
        f"order: at most {FLAT:g} times what {min(ranks)} ranks pay": tables.target(round(by_ranks, 2), most=FLAT),
        f"order: at most {FLAT:g} times the cheapest number of samples": tables.target(
            round(max(max(one) / min(one) for one in spreads), 2), most=FLAT
        ),
        f"order: at most {LIMITS['order_us']} us a micro-batch": tables.target(
            max(times.values()), most=LIMITS["order_us"]
        ),
        f"order: at most {LIMITS['order_kib']} KiB": tables.target(
            max(row["kib"] for row in result["order"]), most=LIMITS["order_kib"]
        ),
        f"plans: at most {LIMITS['plan_s']:g} s each": tables.target(
            max(row[f"{kind}_s"] for row in plans for kind in kinds), most=LIMITS["plan_s"]
        ),
        f"plans, sharded: at most {FLAT:g} times what {min(ranks)} ranks pay": tables.target(
            round(max(row[f"{kind}_s"] / first[f"{kind}_s"] for row in plans for kind in kinds[:2]), 2), most=FLAT
        ),
        f"plans: at most {LIMITS['plan_mib']} MiB": tables.target(
            round(max(row[f"{kind}_kib"] for row in plans for kind in kinds) / 1024, 1), most=LIMITS["plan_mib"]
        ),
        f"load of a hybrid one, written in pieces: at most {LIMITS['hybrid_s']:g} s": tables.target(
            max(row["read_hybrid_s"] for row in plans), most=LIMITS["hybrid_s"]
        ),
        f"index: at most {LIMITS['index_bytes']} bytes a rank at {max(ranks):,}": tables.target(
            plans[-1]["index_bytes_a_rank"], most=LIMITS["index_bytes"]
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), help="numbers of ranks, from 4 on")
    parser.add_argument("--samples", type=int, nargs="+", default=list(SAMPLES), help="sizes of a dataset")
    parser.add_argument("--out", type=Path, help="file (default: results/scale-MACHINE.json if nothing is left out)")
    options = parser.parse_args()
    result = compare(options.ranks, options.samples)
    print(markdown(result))
    for name, target in targets(result).items():
        print(f"{'met   ' if target['met'] else 'MISSED'} {name}: {target['found']}")
    out = options.out
    if out is None and (options.ranks, options.samples) == (list(RANKS), list(SAMPLES)):
        where = result["machine"]
        out = HERE / "results" / f"scale-{machine.slug(where['cpu'])}-{where['cores']}-cores.json"
    if out is not None:
        machine.write(out, result)


if __name__ == "__main__":
    main()
