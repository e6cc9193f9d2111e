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
- Peers read the data through a DataLoader whose dataset reads a batch in one slice: the fastest they can be given.
- The launcher, Lightning's Trainer and HF's Trainer log every 10 steps and save every fourth turn (what that takes is
  told apart, as `save_ms`); Accelerate's and Fabric's loops do neither, and nor does the bare loop.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import torch
from contenders import BATCH, CONTENDERS, INPUTS, LOG_EVERY, SAMPLES

HERE = Path(__file__).resolve().parent
SETTLE = 10  # steps of a turn that are not timed
ROUNDS_A_SAVE = 4
NEEDS = {"fabric": "lightning", "lightning": "lightning", "hf": "transformers"}
BOTH = ("launcher", "lightning", "hf")  # log and save
THRESHOLD = str(100 << 20)
PINNED = {
    "MALLOC_TRIM_THRESHOLD_": THRESHOLD,
    "MALLOC_MMAP_THRESHOLD_": THRESHOLD,
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(HERE.parent),
}
JOB = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "FSDP_", "SLURM_", "TORCHELASTIC_")


class Contender:
    """A process that trains while it has the turn."""

    def __init__(self, name: str, directory: Path, data: Path, save_every: int) -> None:
        self.name = name
        directory.mkdir()
        self.said = directory / "output.txt"
        mine, theirs = socket.socketpair()
        command = [sys.executable, "contenders.py", name, theirs.fileno(), directory, data, save_every]
        environ = {key: value for key, value in os.environ.items() if not key.startswith(JOB)} | PINNED
        with theirs, open(self.said, "w") as said:
            self.process = subprocess.Popen(
                list(map(str, command)), cwd=HERE, env=environ, pass_fds=[theirs.fileno()], stdout=said, stderr=said
            )
        self.socket, self.file = mine, mine.makefile("rw")

    def ready(self) -> tuple[float, float]:
        """Wait for the end of its turn: seconds of wall clock and of CPU."""
        line = self.file.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}:\n{self.said.read_text()}")
        wall, cpu = map(float, line.split())
        return wall, cpu

    def turn(self, settle: int, steps: int) -> tuple[float, float]:
        """Let it train: `settle` steps that are not timed, then `steps` that are."""
        self.file.write(f"{settle} {steps}\n")
        self.file.flush()
        return self.ready()

    def close(self) -> None:
        """End it."""
        self.file.close()
        self.socket.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def launch(names: list[str], rounds: int, steps: int, directory: Path, data: Path) -> list[dict[str, Any]]:
    """One process each, `rounds` turns each; a round holds the (wall, CPU) seconds of every contender."""
    save_every = ROUNDS_A_SAVE * (SETTLE + steps)
    directory.mkdir()
    contenders: list[Contender] = []
    try:
        contenders += (Contender(name, directory / name, data, save_every) for name in names)
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
