"""GPT-2's shape at 124 M parameters on one GPU: eager against compiled, whole and by block, in bf16.

Called by gpu.sh. Every variant is recipes/gpt.py, unmodified, in a process of its own; the numbers are those of its
metrics.jsonl. The attention is causal over rows of 1,024 tokens, the vocabulary 50,304; the text is the standard
library's in bytes, because a step costs the same whatever the tokens say.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("torch", "accelerate", "datasets", "filelock", "pyarrow", "pytest", "safetensors", "tokenizers", "tqdm")
NEEDED += ("pytest_timeout", "tyro", "xxhash")
LOG_EVERY = 10
VARIANTS: dict[str, list[str]] = {
    "eager": [],
    "model": ["--run.compile", "default"],
    "block": ["--run.compile", "default", "--run.compile-scope", "block"],
    "reduce-overhead": ["--run.compile", "reduce-overhead"],
}
DRY = ("block",)
SHAPE = {"depth": 12, "width": 768, "heads": 12, "seq_len": 1024, "vocabulary": 50_304, "rows": 32, "steps": 80}
TINY = {"depth": 2, "width": 16, "heads": 2, "seq_len": 16, "vocabulary": 512, "rows": 4, "steps": 30}


def missing() -> list[str]:
    """What this Python lacks."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def device(dry_run: bool) -> dict[str, Any]:
    """What the numbers were measured on."""
    if dry_run:
        return {"name": "none: a dry run on the CPU"}
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("gpu.py: no CUDA device: --dry-run does the same on a CPU with tiny shapes")
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
    }


def command(shape: dict[str, int], rundir: Path, dry_run: bool) -> list[str]:
    """The recipe's command line."""
    model = {"depth": shape["depth"], "width": shape["width"], "heads": shape["heads"], "mlp": "gelu"}
    options: dict[str, Any] = {f"model.{name}": value for name, value in model.items()}
    options |= {"model.vocab-multiple": shape["vocabulary"], "data.seq-len": shape["seq_len"]}
    options |= {"data.tokenizer": "byte", "data.cache": rundir.parent / "data"}
    options |= {"batch-size": shape["rows"], "microbatch-size": shape["rows"], "steps": shape["steps"]}
    options |= {"lr": 6e-4, "eval-every": 0, "eval-rows": shape["rows"], "sample-tokens": 0}
    options |= {"run.dir": rundir, "run.precision": "bf16", "run.log-every": LOG_EVERY}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    text = ["--data.files", *map(str, sorted((ROOT / "launcher").glob("*.py")))] if dry_run else []
    return [sys.executable, str(ROOT / "recipes" / "gpt.py"), *words, *text]


def measure(name: str, shape: dict[str, int], directory: Path, seconds: float, dry_run: bool) -> dict[str, Any]:
    """Run one variant for at most `seconds`; what it did, or why there is nothing to tell."""
    rundir = directory / name
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if dry_run:  # the options are read and the run is made; the tests are where compilation is tried on a CPU
        environ |= {"CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1"}
    if seconds <= 0:
        return {"failed": "no time left"}
    started = time.monotonic()
    try:
        done = subprocess.run(
            [*command(shape, rundir, dry_run), *VARIANTS[name]],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {seconds:.1f} s"}
    if done.returncode:
        return {"failed": f"exit code {done.returncode}", "said": done.stdout.splitlines()[-20:]}
    lines = [json.loads(line) for line in (rundir / "metrics.jsonl").read_text().splitlines()]
    counted = re.search(r"([\d,]+) parameters", done.stdout)
    parameters = int(counted[1].replace(",", "")) if counted else None
    return {"parameters": parameters, **rates(lines), "wall_s": round(time.monotonic() - started, 1)}


def rates(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A steady run's numbers: medians over the metrics' windows, without those in which it was still warming up."""
    steps = [line for line in lines if "step_s" in line]
    steady = [line for line in steps if line["step"] > LOG_EVERY]
    return {
        "tokens_per_s": round(statistics.median(line["tokens_per_s"] for line in steady)),
        "step_ms": round(1e3 * statistics.median(line["step_s"] for line in steady), 2),
        "mfu": statistics.median(line["mfu"] for line in steady) if "mfu" in steady[0] else None,
        "data_wait": statistics.median(line["data_wait"] for line in steady),
        "peak_memory_gb": max(line["memory_gb"] for line in steps),
        "first_step_s": steps[0]["step_s"],
        "loss": steps[-1]["loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the directory that gets the JSON; without: only look what is missing")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--seconds", type=float, default=480, help="to begin no variant after, and to end them all by")
    parser.add_argument("--rows", type=int, help=f"of {SHAPE['seq_len']} tokens in a step (default {SHAPE['rows']})")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    if lacking := missing():
        raise SystemExit(f"gpu.py: {sys.executable} lacks {', '.join(lacking)}: install them, or give WHEELS=DIR")
    where = device(options.dry_run)
    if options.out is None:
        return
    shape = dict(TINY if options.dry_run else SHAPE)
    shape["rows"] = options.rows or shape["rows"]
    name = "gpu-dry-run.json" if options.dry_run else f"gpu-{machine.slug(where['name'])}.json"
    result = {"benchmark": "gpu", "dry_run": options.dry_run, **machine.facts(), "device": where, "shape": shape}
    result |= {"precision": "bf16", "variants": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for variant in DRY if options.dry_run else VARIANTS:
            left = deadline - time.monotonic()
            row = measure(variant, shape, Path(scratch), left, options.dry_run)
            result["variants"][variant] = row
            machine.write(options.out / name, result)  # each time: what is measured is not lost
            said = row.pop("said", [])
            print(f"{variant:16}", "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            print("".join(f"  | {line}\n" for line in said), end="", flush=True)
    print(f"-> {options.out / name}")
    sys.exit(any("failed" in row for row in result["variants"].values()))


if __name__ == "__main__":
    main()
