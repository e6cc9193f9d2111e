"""How long a person waits: for `--help`, and from a command to the first step of a small model.

    python benchmarks/startup.py
    python benchmarks/startup.py --rounds 1 --only launcher accelerate

How it is fair:
- A round starts every contender once, in a new order each time, so that each is compared with what ran in the same
  minute. The page cache is warm: the first round is not counted.
- The clock runs from the moment the command is started to the end of the first optimizer step, as rank 0 writes it
  down (peers/start.py): Python, imports, rendezvous, set-up. On one process that is `python SCRIPT`; on two what each
  project says to type: `launcher run`, `accelerate launch`, `torchrun`, and for Lightning the script itself.
- The launcher opens a run directory, copies the code and records the run meanwhile; no peer here does.
"""

from __future__ import annotations

import argparse
import os
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

QUESTION = "How long until the command answers, and until a small model's first step?"
HERE = Path(__file__).resolve().parent
START = HERE / "peers" / "start.py"
TWO = ("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
SCRIPTS = Path(sys.executable).parent
HELP = {
    "launcher": [sys.executable, "-m", "launcher", "--help"],
    "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--help"],
    "bare": [sys.executable, "-m", "torch.distributed.run", "--help"],
    "lightning": [sys.executable, "-m", "lightning.fabric.cli", "--help"],
}
STEP = {
    1: {name: [sys.executable, str(START)] for name in HELP},
    2: {
        "launcher": [sys.executable, "-m", "launcher", "run", "--nproc", "2", str(START)],
        "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *TWO, str(START)],
        "bare": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(START)],
        "lightning": [sys.executable, str(START)],
    },
}


def once(command: list[str], name: str, processes: int, scratch: Path) -> float:
    """Seconds from a command to the first step, or, with no processes, to its end."""
    stamp = scratch / f"{time.monotonic_ns()}"
    environ = machine.environ() | {
        "STEPPED": str(stamp),
        "CONTENDER": name,
        "PROCESSES": str(processes),
        "CUDA_VISIBLE_DEVICES": "",
    }
    environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    began = time.time()
    done = subprocess.run(
        command, cwd=scratch, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    ended = time.time()
    if done.returncode or (processes and not stamp.exists()):
        raise SystemExit(f"{name}: exit code {done.returncode} of {' '.join(command)}:\n{done.stdout}")
    return (float(stamp.read_text()) if processes else ended) - began


def compare(names: list[str], rounds: int) -> dict[str, Any]:
    """Every question's rounds, as the JSON has them."""
    random.seed(0)
    questions = {"help": (0, HELP), "one process": (1, STEP[1]), "two processes": (2, STEP[2])}
    times: dict[str, list[dict[str, float]]] = {question: [] for question in questions}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds + 1):
            for question, (processes, commands) in questions.items():
                for _ in range(3 if not processes else 1):  # short, so that it takes more of them
                    order = random.sample(names, len(names))
                    turn = {name: once(commands[name], name, processes, Path(scratch)) for name in order}
                    if number or rounds == 1:
                        times[question].append(turn)
            print(f"round {number} of {rounds} done", file=sys.stderr, flush=True)
    rows = {question: {name: summary(turns, name) for name in names} for question, turns in times.items()}
    return {"benchmark": "startup", **machine.facts(), "settings": {"rounds": rounds}, "questions": rows}


def summary(turns: list[dict[str, float]], name: str) -> dict[str, Any]:
    """A contender's seconds, and against the launcher's of the same round."""
    row: dict[str, Any] = {"s": round(statistics.median(turn[name] for turn in turns), 3)}
    if "launcher" in turns[0]:
        row["ratio_to_launcher"] = spread([turn[name] / turn["launcher"] for turn in turns])
        row["s_more_than_launcher"] = spread([turn[name] - turn["launcher"] for turn in turns])
    return row


def spread(values: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return dict(zip(("low", "median", "high"), (round(value, 3) for value in quartiles), strict=True))


def targets(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was aimed for, and whether it is met."""
    questions = result["questions"]
    if "accelerate" not in questions["help"]:
        return {}
    ratio = questions["help"]["accelerate"]["ratio_to_launcher"]["median"]
    found = {
        "launcher --help at least 10 times as fast as accelerate launch --help": tables.target(ratio, least=10),
    }
    for question in ("one process", "two processes"):
        more = -questions[question]["accelerate"]["s_more_than_launcher"]["median"]
        name = f"first step, {question}: at most 0.2 s behind a bare Accelerate script"
        found[name] = tables.target(more, most=0.2)
    return found


def markdown(result: dict[str, Any]) -> str:
    """The result, for the results page."""
    rows = []
    for question, contenders in result["questions"].items():
        for name, row in contenders.items():
            more = row["s_more_than_launcher"]
            spread = tables.quartiles((more["low"], more["high"]), 2)
            rows.append((question, name, row["s"], f"{row['ratio_to_launcher']['median']:.2f}", more["median"], spread))
    header = ("question", "contender", "s", "x the launcher's", "s more", "quartiles")
    return tables.markdown(header, rows)


def table(result: dict[str, Any]) -> str:
    lines = []
    for question, rows in result["questions"].items():
        lines.append(f"{question:16}{'s':>8}{'x launcher':>12}{'s more':>9}")
        for name, row in rows.items():
            lines.append(
                f"  {name:14}{row['s']:>8.3f}{row['ratio_to_launcher']['median']:>12.2f}"
                f"{row['s_more_than_launcher']['median']:>9.2f}"
            )
    told = (f"{'met   ' if one['met'] else 'MISSED'} {name}" for name, one in targets(result).items())
    return "\n".join([*lines, *told])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="rounds that count, after one that does not")
    parser.add_argument("--only", nargs="+", choices=list(HELP), help="these, beside the launcher")
    parser.add_argument("--out", type=Path, help="file (default: results/startup-MACHINE.json if nothing is left out)")
    options = parser.parse_args()
    names = list(dict.fromkeys(["launcher", *(options.only or HELP)]))
    if "lightning" in names and machine.installed("lightning") is None:
        names.remove("lightning")
        print("lightning is left out: pip install lightning", file=sys.stderr)
    result = compare(names, options.rounds)
    print(table(result))
    out = options.out
    if out is None and len(names) == len(HELP):
        where = result["machine"]
        out = HERE / "results" / f"startup-{machine.slug(where['cpu'])}-{where['cores']}-cores.json"
    if out is not None:
        machine.write(out, result)


if __name__ == "__main__":
    main()
