"""What a training step costs beside a bare torch loop: the launcher's, and its peers'.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --only launcher hf --launches 1

A step of a 784-512-512-10 MLP, batch 64, one CPU thread, the same fused AdamW everywhere. A few milliseconds: less
than any real step, so that what is added to it shows.

How it is fair:
- Each contender has a process of its own, because importing some of them changes torch, malloc or the garbage
  collector for whatever else runs there. malloc's thresholds, which alone move such a step by 8 %, are pinned in all.
- The processes of one launch are alive together and take turns: a round is a turn of 40 steps each, in a new order
  each time, while the others sleep. So a turn is compared with the bare loop's of the same second; what a busy or
  throttled machine does to one it does to its neighbours. The first 10 steps of a turn only warm the caches.
- A process keeps its luck (where its memory lies) for life, so everything is launched anew several times.
- The clock is in the model: a step lasts from one forward pass to the next, whoever owns the loop.
- `control` is the bare loop again: its distance from 1 is what this method cannot resolve.
- `collecting` is the bare loop with the `gc.collect()` every 10 steps that many have: the launcher freezes what stays,
  and collects every 100.
- Peers read the data through a DataLoader whose dataset reads a batch in one slice: the fastest they can be given.
- The launcher, Lightning's Trainer and HF's Trainer log every 10 steps and save every fourth turn (what that takes is
  told apart, as `save_ms`); Accelerate's and Fabric's loops do neither, and nor does the bare loop.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import tables
import torch
from contenders import BATCH, CONTENDERS, INPUTS, LOG_EVERY, SAMPLES
from turns import HERE, PINNED, Contender

QUESTION = "What does a step of a small MLP on one CPU thread cost beside a bare torch loop?"
MOST, MOST_US = 1.03, 50
"""Of the launcher's ratio, and of the microseconds it adds to a step."""
SETTLE = 10  # steps of a turn that are not timed
ROUNDS_A_SAVE = 4
NEEDS = {"fabric": "lightning", "lightning": "lightning", "hf": "transformers"}
BOTH = ("launcher", "lightning", "hf")  # log and save


def launch(names: list[str], rounds: int, steps: int, directory: Path, data: Path) -> list[dict[str, Any]]:
    """One process each, `rounds` turns each; a round holds the (wall, CPU) seconds of every contender."""
    save_every = ROUNDS_A_SAVE * (SETTLE + steps)
    directory.mkdir()
    contenders: list[Contender] = []
    try:
        for name in names:
            contenders.append(Contender(name, "contenders.py", directory / name, [data, save_every], [{}]))
        for contender in contenders:
            contender.ready()
        for contender in contenders:
            contender.turn(save_every - 1, 1)  # warm, and with its saves where a turn ends
        times = []
        for _ in range(rounds):
            random.shuffle(contenders)
            times.append({contender.name: contender.turn(SETTLE, steps) for contender in contenders})
    finally:
        for contender in contenders:
            contender.close()
    return times


def summary(launches: list[list[dict[str, Any]]], name: str, steps: int) -> dict[str, Any]:
    """Medians over every pair of turns, a contender's and the bare loop's, and how far they spread."""
    quiet = [[turns for k, turns in enumerate(rounds) if not saves(k)] for rounds in launches]
    pairs = [[(turns[name], turns["bare"]) for turns in rounds] for rounds in quiet]
    ratios = [[mine[0] / bare[0] for mine, bare in rounds] for rounds in pairs]
    together = [pair for rounds in pairs for pair in rounds]
    low, _, high = statistics.quantiles([ratio for rounds in ratios for ratio in rounds], n=4, method="inclusive")
    usual = statistics.median(mine[0] for mine, _ in together)
    saving = [turns[name][0] - usual for rounds in launches for k, turns in enumerate(rounds) if saves(k)]
    return {
        "logs_and_saves": name in BOTH,
        "step_us": round(1e6 * usual / steps, 1),
        "ratio": round(statistics.median(ratio for rounds in ratios for ratio in rounds), 4),
        "ratio_quartiles": [round(low, 4), round(high, 4)],
        "ratio_of_each_launch": [round(statistics.median(rounds), 4) for rounds in ratios],
        "cpu_ratio": round(statistics.median(mine[1] / bare[1] for mine, bare in together), 4),
        "added_us": round(1e6 * statistics.median(mine[0] - bare[0] for mine, bare in together) / steps, 1),
        "save_ms": round(1e3 * statistics.median(saving), 1) if name in BOTH and saving else None,
    }


def saves(number: int) -> bool:
    """Whether a round's turns end with a save."""
    return number % ROUNDS_A_SAVE == ROUNDS_A_SAVE - 1


def table(result: dict[str, Any]) -> str:
    """The result, for a person."""
    lines = [f"{'':12}{'step us':>9}{'ratio':>8}  {'quartiles':16}{'CPU ratio':>9}{'added us':>10}{'save ms':>9}"]
    for name, row in result["contenders"].items():
        low, high = row["ratio_quartiles"]
        save = "-" if row["save_ms"] is None else row["save_ms"]
        lines.append(
            f"{name:12}{row['step_us']:>9.0f}{row['ratio']:>8.3f}  {f'{low:.3f} to {high:.3f}':16}"
            f"{row['cpu_ratio']:>9.3f}{row['added_us']:>10.1f}{save:>9}"
        )
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    """The result, for the results page."""
    rows = []
    for name, row in result["contenders"].items():
        ratio, spread = f"{row['ratio']:.3f}", tables.quartiles(row["ratio_quartiles"])
        rows.append((name, ratio, spread, round(row["added_us"]), row["save_ms"], row["logs_and_saves"]))
    header = ("contender", "ratio to the bare loop", "quartiles", "us added", "ms a save", "logs and saves")
    return tables.markdown(header, rows)


def targets(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the launcher is to reach, and whether it does."""
    rows = result["contenders"]
    mine = rows.get("launcher")
    if mine is None:
        return {}
    found = {
        f"at most {MOST} of the bare loop": tables.target(mine["ratio"], most=MOST),
        f"at most {MOST_US} us added": tables.target(mine["added_us"], most=MOST_US),
    }
    for name, row in rows.items():
        if row["logs_and_saves"] and name != "launcher":
            found[f"ahead of {name}"] = tables.target(round(row["ratio"] / mine["ratio"], 3), least=1.0)
    return found


def compare(names: list[str], launches: int, rounds: int, steps: int) -> dict[str, Any]:
    """The whole comparison, as its JSON has it."""
    random.seed(0)
    times: list[list[dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "samples"
        torch.rand(SAMPLES, INPUTS, generator=torch.Generator().manual_seed(0)).numpy().tofile(data)
        for number in range(launches):
            times.append(launch(names, rounds, steps, Path(scratch) / str(number), data))
            print(f"launch {number + 1} of {launches} done", file=sys.stderr, flush=True)
    settings = {"launches": launches, "rounds": rounds, "steps": steps, "settle": SETTLE, "batch": BATCH}
    settings |= {"log_every": LOG_EVERY, "save_every": ROUNDS_A_SAVE * (SETTLE + steps), "threads": 1, **PINNED}
    del settings["PYTHONPATH"]
    rows = {name: summary(times, name, steps) for name in names}
    return {"benchmark": "overhead", **machine.facts(), "settings": settings, "contenders": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=8, help="times that every process is started anew")
    parser.add_argument("--rounds", type=int, default=16, help=f"turns in a launch; every {ROUNDS_A_SAVE}th one saves")
    parser.add_argument("--steps", type=int, default=40, help="timed steps in a turn")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="these, beside the bare loop")
    parser.add_argument("--out", type=Path, help="file (default: results/overhead-MACHINE.json if nothing is left out)")
    options = parser.parse_args()
    names = ["bare", *(name for name in options.only or CONTENDERS if name != "bare")]
    absent = [name for name in names if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None]
    for name in absent:
        print(f"{name} is left out: pip install {NEEDS[name]}", file=sys.stderr)
    names = [name for name in names if name not in absent]
    result = compare(names, options.launches, options.rounds, options.steps)
    print(table(result))
    out = options.out
    if out is None and not (absent or options.only):
        where = result["machine"]
        out = HERE / "results" / f"overhead-{machine.slug(where['cpu'])}-{where['cores']}-cores.json"
    if out is not None:
        machine.write(out, result)


if __name__ == "__main__":
    main()
