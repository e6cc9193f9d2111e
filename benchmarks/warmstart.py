"""What a compiled model's second launch waits for its first step, beside the first launch's: `recipes/gpt.py` twice.

    python benchmarks/warmstart.py
    python benchmarks/warmstart.py --rounds 1 --processes 1 --scopes block

A turn is three starts of one training: `cold`, with an empty cache; `warm`, right after it, with what the launcher has
kept of that beside the runs; and `torch`, with the launcher's cache off and torch's own, in the temporary directory,
filled by a start before. No variable is set by hand but TMPDIR, which stands for the machine: `cold` and `warm` each
have a new one, as a job has on a cluster that empties /tmp or gives every job its own, or on another node. `torch`
keeps one: on a machine that stays, torch's own cache does as well, and that is what `torch` shows.

The first step is what run.json says of it: the wait for the first batch, compiling (the import of the compiler is part
of it) and the step. `start` is all of the time from the start of the process.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import tables

QUESTION = "What does a compiled GPT's second launch wait for its first step, beside its first launch?"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MODEL = ("--model.depth", "4", "--batch-size", "4", "--microbatch-size", "2")
QUIET = ("--steps", "1", "--eval-every", "0", "--eval-rows", "2", "--sample-tokens", "0", "--run.log-every", "1")
TARGET = 0.15


def start(place: Path, scope: str, processes: int, cache: str, machine_tmp: Path) -> dict[str, Any]:
    """Start the recipe once; the seconds of its stages, and its first loss."""
    run = place / f"run-{time.monotonic_ns()}"
    machine_tmp.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "launcher", "run", "--nproc", str(processes), str(ROOT / "recipes" / "gpt.py")]
    command += [*MODEL, *QUIET, "--run.dir", str(run), "--run.cache", cache]
    command += ["--run.compile", "default", "--run.compile-scope", scope]
    environ = machine.environ("TORCHINDUCTOR_") | {
        "TMPDIR": str(machine_tmp),
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(command, cwd=place, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode} of {' '.join(command)}:\n{done.stdout}")
    startup = json.loads((run / "run.json").read_text())["startup"]
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    loss = next(line["loss"] for line in lines if "loss" in line)
    first = sum(startup.get(stage, 0.0) for stage in ("first batch", "compile", "step", "compile cache"))
    return {"first_step": first, "start": startup["total"], "loss": loss, "stages": startup}


def turn(place: Path, scope: str, processes: int, kept: Path) -> dict[str, dict[str, Any]]:
    """A cold start, and a warm one; between them torch's own, or before both."""
    store = str(place / f"store-{time.monotonic_ns()}")
    new = (place / f"tmp-{time.monotonic_ns()}-{k}" for k in range(3))
    mine = {}
    first = random.random() < 0.5
    if first:
        mine["torch"] = start(place, scope, processes, "off", kept)
    mine["cold"] = start(place, scope, processes, store, next(new))
    if not first:
        mine["torch"] = start(place, scope, processes, "off", kept)
    mine["warm"] = start(place, scope, processes, store, next(new))
    return mine


def compare(scopes: list[str], numbers: list[int], rounds: int) -> list[dict[str, Any]]:
    random.seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for processes in numbers:
            for scope in scopes:
                kept = place / f"kept-{processes}-{scope}"
                start(place, scope, processes, "off", kept)
                turns = [turn(place, scope, processes, kept) for _ in range(rounds)]
                rows.append({"processes": processes, "scope": scope, **summary(turns)})
                print(f"{processes} x {scope} done", file=sys.stderr, flush=True)
    return rows


def summary(turns: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians, and of ratios to the cold start of the same turn."""
    row: dict[str, Any] = {"same_losses": len({one["loss"] for each in turns for one in each.values()}) == 1}
    for name in ("cold", "warm", "torch"):
        row[name] = {what: median([each[name][what] for each in turns]) for what in ("first_step", "start")}
        row[name]["stages_of_last"] = turns[-1][name]["stages"]
    for name in ("warm", "torch"):
        for what in ("first_step", "start"):
            row[name][f"{what}_of_cold"] = [round(each[name][what] / each["cold"][what], 4) for each in turns]
            row[name][f"{what}_ratio"] = median(row[name][f"{what}_of_cold"])
    return row


def median(values: list[float]) -> float:
    return round(statistics.median(values), 4)


def targets(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was aimed for, and whether it is met."""
    return {
        f"first step, {row['scope']}, {row['processes']} processes: at most {TARGET} of cold": tables.target(
            row["warm"]["first_step_ratio"], most=TARGET
        )
        for row in result["rows"]
    }


def markdown(result: dict[str, Any]) -> str:
    """The result, for the results page."""
    header = ("processes", "compiled by", "cold s", "warm s", "warm of cold", "torch's own of cold", "losses equal")
    rows = []
    for row in result["rows"]:
        seconds = (f"{row[name]['first_step']:.1f}" for name in ("cold", "warm"))
        ratios = (row[name]["first_step_ratio"] for name in ("warm", "torch"))
        rows.append((row["processes"], row["scope"], *seconds, *ratios, row["same_losses"]))
    said = "`torch's own` is its cache in a /tmp that stays; the other two have a new one each."
    return f"{tables.markdown(header, rows)}\n\n{said}"


def table(result: dict[str, Any]) -> str:
    head = "".join(f"{word:>8}" for word in ("cold s", "warm s", "ratio", "torch", "start"))
    lines = [f"{'processes':>9} {'scope':6}{head}  losses"]
    for row in result["rows"]:
        warm, same = row["warm"], "equal" if row["same_losses"] else "DIFFER"
        ratios = (warm["first_step_ratio"], row["torch"]["first_step_ratio"], warm["start_ratio"])
        lines.append(
            f"{row['processes']:>9} {row['scope']:6}{row['cold']['first_step']:>8.2f}{warm['first_step']:>8.2f}"
            f"{''.join(f'{ratio:>8.3f}' for ratio in ratios)}  {same}"
        )
    told = (f"{'met   ' if one['met'] else 'MISSED'} {name}" for name, one in targets(result).items())
    return "\n".join([*lines, *told])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="turns of three starts for each setting")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--scopes", nargs="+", choices=["block", "model"], default=["block", "model"])
    parser.add_argument(
        "--out", type=Path, help="file (default: results/warmstart-MACHINE.json if nothing is left out)"
    )
    options = parser.parse_args()
    rows = compare(options.scopes, options.processes, options.rounds)
    settings = {"rounds": options.rounds, "model": " ".join(MODEL)}
    result: dict[str, Any] = {"benchmark": "warmstart", **machine.facts(), "settings": settings, "rows": rows}
    print(table(result))
    out = options.out
    if out is None and (options.processes, options.scopes) == ([1, 2], ["block", "model"]):
        where = result["machine"]
        out = HERE / "results" / f"warmstart-{machine.slug(where['cpu'])}-{where['cores']}-cores.json"
    if out is not None:
        machine.write(out, result)


if __name__ == "__main__":
    main()
