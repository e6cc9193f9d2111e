"""What reading micro-batches costs: tokens a second from a memory-mapped packed set, on one core.

    python benchmarks/loader.py
    python benchmarks/loader.py --only launcher datasets --rounds 5

An Arrow file of rows of 1,025 tokens of 16 bits, as recipes/gpt.py packs them; micro-batches of 8 rows, shuffled, as
one int64 tensor, on the CPU. Everybody reads in this process (no data workers), on one core and one thread, and takes
turns: a round is a turn of each, in a new order each time, and ratios are of turns of one round. The set lies in the
page cache.

- launcher: `run.loader`, as a training step takes from it: counts a step ahead, four micro-batches a step.
- memmap: the limit that is aimed at, what nanoGPT does: a slice of a numpy memmap for each row, made int64, stacked.
- gather: the fastest that numpy can do with an index that is given: all rows of a micro-batch at once, made int64.
- datasets: a torch DataLoader over the set in torch format, whose `__getitems__` reads a micro-batch in one call.
- datasets, in one slice: the same with a batch sampler, so that a micro-batch is one index of the set.
- accelerate: the first of these, prepared by Accelerate. torchdata: the same in its StatefulDataLoader.
- control: memmap once more.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import machine
import numpy as np
import pyarrow as pa
import tables
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from launcher.data import Feed, Loader
from launcher.order import Plan
from launcher.world import World

QUESTION = "How many tokens a second does one core read from a packed set, in shuffled micro-batches?"
HERE = Path(__file__).resolve().parent
WIDTH, ROWS, STEP = 1025, 8, 4  # tokens in a row, rows in a micro-batch, micro-batches in a step
CHUNK = 2048  # rows that were written together

Batches = Iterator[torch.Tensor]
Made = Callable[[Path, Path], Batches]


def write(path: Path, raw: Path, rows: int) -> None:
    """The set, as an Arrow stream and as the bare tokens."""
    tokens = np.random.default_rng(0).integers(0, 50257, rows * WIDTH, dtype=np.uint16)
    tokens.tofile(raw)
    column = pa.FixedSizeListArray.from_arrays(pa.array(tokens), WIDTH)
    table = pa.table({"tokens": column})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=CHUNK)


def launcher(path: Path, _: Path) -> Batches:
    loader = Loader(
        datasets.Dataset.from_file(str(path)),
        name="loader",
        batch_size=ROWS * STEP,
        microbatch_size=ROWS,
        seed=0,
        shuffle=True,
        collate=None,
        count=lambda batch: batch["tokens"][:, 1:].numel(),
        unit="tokens",
        workers=0,
    )
    feed = Feed(loader, Plan(ROWS * STEP, ROWS).shares(0, 0, 1), World())
    for step in itertools.count():
        feed.look_ahead(STEP)
        for _ in range(STEP):
            yield feed.take(step).batch["tokens"]


def memmap(_: Path, raw: Path) -> Batches:
    tokens = np.memmap(raw, np.uint16, "r")
    draws = np.random.default_rng()
    while True:
        starts = WIDTH * draws.integers(0, len(tokens) // WIDTH, ROWS)
        yield torch.stack([torch.from_numpy(tokens[k : k + WIDTH].astype(np.int64)) for k in starts.tolist()])


def gather(_: Path, raw: Path) -> Batches:
    rows = np.asarray(np.memmap(raw, np.uint16, "r")).reshape(-1, WIDTH)
    draws = np.random.default_rng()
    while True:
        yield torch.from_numpy(rows.take(draws.integers(0, len(rows), ROWS), axis=0).astype(np.int64))


def formatted(path: Path) -> Any:
    return datasets.Dataset.from_file(str(path)).with_format("torch")


def endless(loader: Any) -> Batches:
    while True:
        for batch in loader:
            yield batch["tokens"]


def by_items(path: Path, _: Path) -> Batches:
    return endless(DataLoader(formatted(path), ROWS, shuffle=True, drop_last=True))


def by_slice(path: Path, _: Path) -> Batches:
    table = formatted(path)
    sampler = BatchSampler(RandomSampler(table), ROWS, drop_last=True)
    return endless(DataLoader(table, batch_size=None, sampler=sampler))


def accelerate(path: Path, _: Path) -> Batches:
    from accelerate import Accelerator

    loader = DataLoader(formatted(path), ROWS, shuffle=True, drop_last=True)
    return endless(Accelerator(cpu=True).prepare(loader))


def torchdata(path: Path, _: Path) -> Batches:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return endless(StatefulDataLoader(formatted(path), ROWS, shuffle=True, drop_last=True))


CONTENDERS: dict[str, Made] = {
    "launcher": launcher,
    "memmap": memmap,
    "gather": gather,
    "datasets": by_items,
    "datasets, in one slice": by_slice,
    "accelerate": accelerate,
    "torchdata": torchdata,
    "control": memmap,
}
NEEDS = {"accelerate": "accelerate", "torchdata": "torchdata"}


def turn(batches: Batches, seconds: float) -> float:
    """Tokens a second, over a turn of some seconds."""
    next(batches)
    begun, number = time.perf_counter(), 0
    while (took := time.perf_counter() - begun) < seconds:
        for _ in range(STEP):
            next(batches)
        number += STEP
    return number * ROWS * WIDTH / took


def measure(names: list[str], directory: Path, *, rows: int, rounds: int, seconds: float) -> list[dict[str, float]]:
    """Tokens a second of every contender, round by round."""
    path, raw = directory / "rows.arrow", directory / "rows.bin"
    write(path, raw, rows)
    batches = {name: CONTENDERS[name](path, raw) for name in names}
    shape, dtype = (ROWS, WIDTH), torch.int64
    for name in names:
        first = next(batches[name])
        if first.shape != shape or first.dtype != dtype:
            raise SystemExit(f"{name} reads {tuple(first.shape)} {first.dtype}, not {shape} {dtype}")
        turn(batches[name], seconds)
    found = []
    for _ in range(rounds):
        order = random.sample(names, len(names))
        rates = {name: turn(batches[name], seconds) for name in order}
        found.append({name: rates[name] for name in names})
    return found


def summary(rounds: list[dict[str, float]], name: str) -> dict[str, Any]:
    """The median rate, and medians of paired ratios."""
    usual = statistics.median(rates[name] for rates in rounds)
    return {
        "tokens_per_s": round(usual),
        "us_a_microbatch": round(1e6 * ROWS * WIDTH / usual, 1),
        "of_memmap": tables.spread([rates[name] / rates["memmap"] for rates in rounds]),
        "launcher_is": tables.spread([rates["launcher"] / rates[name] for rates in rounds]),
    }


def targets(result: dict[str, Any]) -> dict[str, Any]:
    """What was aimed at; the second is of a DataLoader that reads the set a micro-batch in a call, not in a slice."""
    rows = result["contenders"]
    aims = {"at least 0.7 of a bare memmap": tables.target(rows["launcher"]["of_memmap"]["ratio"], least=0.7)}
    if "datasets" in rows:
        found = rows["datasets"]["launcher_is"]["ratio"]
        aims["at least 10 times a DataLoader over datasets"] = tables.target(found, least=10)
    return aims


def markdown(result: dict[str, Any]) -> str:
    """The result, for a person."""
    rows = [
        [
            name,
            f"{row['tokens_per_s'] / 1e6:.1f}",
            row["us_a_microbatch"],
            f"{row['of_memmap']['ratio']:.3f}",
            tables.quartiles(row["of_memmap"]["quartiles"]),
            f"{row['launcher_is']['ratio']:.2f}",
        ]
        for name, row in result["contenders"].items()
    ]
    header = [
        "reader",
        "M tokens/s",
        "us a micro-batch",
        "of memmap",
        "quartiles",
        "the launcher's is so many times it",
    ]
    return tables.markdown(header, rows) + (
        f"\n\nMicro-batches of {ROWS} rows of {WIDTH:,} tokens of 16 bits, shuffled, to int64, on one core. `memmap` is"
        " a slice a row, as nanoGPT reads; `gather` all rows at once, with no order, no count and no epoch to keep;"
        " `control` is `memmap` again."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.25, help="of a turn")
    parser.add_argument("--rows", type=int, default=100_000, help="of the set: 2 KB each")
    parser.add_argument("--only", nargs="*", choices=[*CONTENDERS], help="these, the launcher and memmap")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    asked = [name for name in CONTENDERS if name in {"launcher", "memmap", *(arguments.only or CONTENDERS)}]
    absent = [name for name in asked if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None]
    names = [name for name in asked if name not in absent]
    facts = machine.facts()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    sizes = {"rows": arguments.rows, "rounds": arguments.rounds, "seconds": arguments.seconds}
    with tempfile.TemporaryDirectory() as directory:
        rounds = measure(names, Path(directory), **sizes)
    shape = {"width": WIDTH, "microbatch": ROWS, "microbatches_a_step": STEP, "rows_in_a_chunk": CHUNK}
    result = {
        "benchmark": "loader",
        **facts,
        "settings": sizes | shape,
        "absent": absent,
        "contenders": {name: summary(rounds, name) for name in names},
    }
    result["targets"] = targets(result)
    print(markdown(result))
    for name, aim in result["targets"].items():
        print(f"{'met   ' if aim['met'] else 'MISSED'} {name}: {aim['found']}")
    name = f"loader-{machine.slug(facts['machine']['cpu'])}-{facts['machine']['cores']}-cores.json"
    out = arguments.out or (None if arguments.only else HERE / "results" / name)
    if out is not None:
        machine.write(out, result)
        print(f"written to {out}")


if __name__ == "__main__":
    main()
