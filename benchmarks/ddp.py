"""How many tokens a second a job of two ranks trains, beside a hand-written DDP loop: the launcher's, and its peers'.

    python benchmarks/ddp.py
    python benchmarks/ddp.py --only launcher --launches 1 --rounds 8

recipes/gpt.py's model, 0.8 M parameters, over two gloo processes of one thread each: micro-batches of 2 rows of 128
tokens, four of them a step and rank, gradients clipped, the same fused AdamW everywhere.

How it is fair:
- The bare loop is one that a careful person writes: no_sync but for the last micro-batch, gradients in DDP's buckets,
  no buffers broadcast, rows read as slices. It neither logs nor saves.
- The ranks of all contenders are alive together and take turns, a new order each round; every ratio is of two turns of
  one round (`turns.py`). A turn lasts until its slower rank is done; its first step only warms the caches.
- Everybody trains on the same rows in the same order from the same weights: their first losses are compared.
- The clock is in the model; peers read through a DataLoader whose dataset reads a micro-batch in one slice; malloc's
  thresholds and the number of threads are pinned in all; everything is launched anew a few times.
- `control` is the bare loop again: its distance from 1 is what this method cannot resolve.
- The launcher and HF's Trainer log every 5 steps and save at the end of every fourth turn, which is told apart
  (`ms a save`); Accelerate's loop does neither, and nor does the bare loop.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import socket
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import numpy as np
import tables
from turns import HERE, PINNED, Contender

QUESTION = "How many tokens a second does a small GPT train on two ranks, beside DDP by hand?"
NAMES = ("bare", "control", "launcher", "accelerate", "hf")
NEEDS = {"hf": "transformers"}
BOTH = ("launcher", "hf")  # log and save
LEAST, CLOSE = 0.98, 1e-4
"""Of the launcher's ratio, and how far a loss may be from the bare loop's."""
SETTLE = 1  # steps of a turn that are not timed
ROUNDS_A_SAVE = 4
RANKS, ACCUMULATION = 2, 4
ROWS, LENGTH = 2, 128
"""Of a micro-batch: its rows, and the tokens in each."""
SAMPLES, VOCABULARY = 4096, 256
"""Rows to learn from: a whole number of steps."""
MODEL = {"depth": 4, "width": 128, "heads": 4, "tie": False}  # HF's Trainer cannot save a plain module's ties
LOG_EVERY = 5
COMPARED = 10
"""Steps whose losses are written down."""

Times = tuple[float, float]
"""Seconds of wall clock and of CPU."""


def ranks() -> list[dict[str, str]]:
    """The environment of each rank of a job, as a launcher would make it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    job = {"WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    job |= {"ACCELERATE_USE_CPU": "true"}
    return [{key: str(value) for key, value in (job | {"RANK": r, "LOCAL_RANK": r}).items()} for r in range(RANKS)]


def launch(names: list[str], rounds: int, steps: int, directory: Path, data: Path) -> dict[str, Any]:
    """One job each, `rounds` turns each; a round holds the seconds of every contender."""
    save_every = ROUNDS_A_SAVE * (SETTLE + steps)
    directory.mkdir()
    contenders: list[Contender] = []
    try:
        for name in names:
            contenders.append(Contender(name, "teams.py", directory / name, [data, save_every], ranks()))
            contenders[-1].ready()  # one after the other: no two begin on one port
        for contender in contenders:
            contender.turn(save_every - 1, 1)  # warm, and with its saves where a turn ends
        found = []
        for _ in range(rounds):
            random.shuffle(contenders)
            found.append({contender.name: contender.turn(SETTLE, steps) for contender in contenders})
    finally:
        for contender in contenders:
            contender.close()
    return {"rounds": found, "losses": {name: losses(directory / name) for name in names}}


def losses(directory: Path) -> list[float]:
    """The mean loss of each of the first steps, over all ranks and micro-batches."""
    of_ranks = np.array([json.loads((directory / f"losses-{rank}.json").read_text()) for rank in range(RANKS)])
    steps = of_ranks.reshape(RANKS, -1, ACCUMULATION).mean(axis=(0, 2))
    return [float(loss) for loss in steps]


def text(path: Path) -> None:
    """Rows of the launcher's own source, a token a byte."""
    size = SAMPLES * (LENGTH + 1)
    source = b"".join(file.read_bytes() for file in sorted((HERE.parent / "launcher").rglob("*.py")))
    np.resize(np.frombuffer(source, dtype=np.uint8), size).astype(np.int64).tofile(path)


def saves(number: int) -> bool:
    """Whether a round's turns end with a save."""
    return number % ROUNDS_A_SAVE == ROUNDS_A_SAVE - 1


def summary(launches: list[dict[str, Any]], name: str, tokens: int) -> dict[str, Any]:
    """Medians over every pair of turns, a contender's and the bare loop's, and how far they spread."""
    rounds = [[turns for k, turns in enumerate(one["rounds"]) if not saves(k)] for one in launches]
    pairs = [(turns[name], turns["bare"]) for one in rounds for turns in one]
    usual = statistics.median(mine[0] for mine, _ in pairs)
    saving = [turns[name][0] - usual for one in launches for k, turns in enumerate(one["rounds"]) if saves(k)]
    apart = [
        abs(mine - bare)
        for one in launches
        for mine, bare in zip(one["losses"][name], one["losses"]["bare"], strict=True)
    ]
    return {
        "logs_and_saves": name in BOTH,
        "tokens_per_s": round(tokens / usual),
        **tables.spread([bare[0] / mine[0] for mine, bare in pairs]),
        "ratio_of_each_launch": [
            round(statistics.median(turns["bare"][0] / turns[name][0] for turns in one), 4) for one in rounds
        ],
        "cpu_ratio": round(statistics.median(bare[1] / mine[1] for mine, bare in pairs), 4),
        "save_ms": round(1e3 * statistics.median(saving), 1) if name in BOTH and saving else None,
        "loss": round(statistics.median(one["losses"][name][-1] for one in launches), 6),
        "loss_apart": float(f"{max(apart):.2g}"),
    }


def markdown(result: dict[str, Any]) -> str:
    """The result, for the results page and the terminal."""
    given = result["settings"]
    rows = [
        (
            name,
            row["tokens_per_s"],
            f"{row['ratio']:.3f}",
            tables.quartiles(row["quartiles"]),
            f"{row['cpu_ratio']:.3f}",
            row["save_ms"],
            row["logs_and_saves"],
            f"{row['loss_apart']:.0e}",
        )
        for name, row in result["contenders"].items()
    ]
    said = (
        f"{given['ranks']} ranks, {given['accumulation']} micro-batches of {given['rows']} x {given['length']} tokens "
        f"a step and rank. Ratios are of tokens a second, more is better; the last column is the largest difference of "
        "a loss from the bare loop's."
    )
    header = ("contender", "tokens a second", "of the bare loop", "quartiles", "of its CPU time", "ms a save")
    return said + "\n\n" + tables.markdown((*header, "logs and saves", "loss apart"), rows)


def targets(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the launcher is to reach, and whether it does."""
    rows = result["contenders"]
    mine = rows.get("launcher")
    if mine is None:
        return {}
    found = {f"at least {LEAST} of the bare loop": tables.target(mine["ratio"], least=LEAST)}
    for name in ("accelerate", "hf"):
        if name in rows:
            found[f"ahead of {name}"] = tables.target(round(mine["ratio"] / rows[name]["ratio"], 3), least=1.0)
    apart = max(row["loss_apart"] for row in rows.values())
    return found | {f"all losses within {CLOSE:g}": tables.target(apart, most=CLOSE)}


def compare(names: list[str], launches: int, rounds: int, steps: int) -> dict[str, Any]:
    """The whole comparison, as its JSON has it."""
    random.seed(0)
    times = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "tokens"
        text(data)
        for number in range(launches):
            times.append(launch(names, rounds, steps, Path(scratch) / str(number), data))
            print(f"launch {number + 1} of {launches} done", file=sys.stderr, flush=True)
    tokens = steps * RANKS * ACCUMULATION * ROWS * LENGTH
    given = {"launches": launches, "rounds": rounds, "steps": steps, "settle": SETTLE, "ranks": RANKS, "rows": ROWS}
    given |= {"accumulation": ACCUMULATION, "length": LENGTH, "vocabulary": VOCABULARY, "model": MODEL, "threads": 1}
    given |= {"log_every": LOG_EVERY, "save_every": ROUNDS_A_SAVE * (SETTLE + steps), **PINNED}
    del given["PYTHONPATH"]
    rows = {name: summary(times, name, tokens) for name in names}
    return {"benchmark": "ddp", **machine.facts(), "settings": given, "contenders": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=2, help="times that every process is started anew")
    parser.add_argument("--rounds", type=int, default=16, help=f"turns in a launch; every {ROUNDS_A_SAVE}th one saves")
    parser.add_argument("--steps", type=int, default=4, help="timed steps in a turn")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="these, beside the bare loop")
    parser.add_argument("--out", type=Path, help="file (default: results/ddp-MACHINE.json if nothing is left out)")
    options = parser.parse_args()
    names = ["bare", *(name for name in options.only or NAMES if name != "bare")]
    absent = [name for name in names if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None]
    for name in absent:
        print(f"{name} is left out: pip install {NEEDS[name]}", file=sys.stderr)
    result = compare([name for name in names if name not in absent], options.launches, options.rounds, options.steps)
    result["absent"] = absent
    print(markdown(result))
    for name, target in targets(result).items():
        print(f"{'met   ' if target['met'] else 'MISSED'} {name}: {target['found']}")
    out = options.out
    if out is None and not options.only:
        where = result["machine"]
        out = HERE / "results" / f"ddp-{machine.slug(where['cpu'])}-{where['cores']}-cores.json"
    if out is not None:
        machine.write(out, result)


if __name__ == "__main__":
    main()
