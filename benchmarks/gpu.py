"""One GPU in nine minutes: does it all work there, what is it capable of, and how near does training come to that.

    benchmarks/gpu.sh --out DIR [--only PHASE...]

Called by gpu.sh. First the tests marked `gpu`, while the compilers' caches fill; then groups of training loops on
recipes/gpt.py's model, of GPT-2's shape (124 M parameters) and of Llama's at 1 B, all on the same packed rows. The
loops of a group are alive together and take turns (gpu_turns.py), so that a ratio is of turns side by side. `bare` is
the loop that one would write by hand; `launcher` is the recipe itself with its log and its checkpoints. The text is the
source of Python's standard library in bytes, since a step costs the same whatever its tokens say.

Whatever has been measured is in the result at once: a phase that fails, or for which no time is left, says so there.
With --only, the other phases of an earlier result of the same device and versions stay as they are.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import machine
import tables
from gpu_phases import PHASES, TESTS_S, Phase
from gpu_turns import Contender, Group

QUESTION = "How near does training on one GPU come to a loop written by hand, and to what the GPU can do?"
ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
NEEDED = ("torch", "accelerate", "datasets", "filelock", "pyarrow", "pytest", "safetensors", "tokenizers", "tqdm")
NEEDED += ("pytest_timeout", "tyro", "xxhash")
PEERS = {"gpt_hf": "transformers", "gpt_lightning": "lightning"}


class Bench:
    """One call: its time, its scratch directory, and the result that it writes as it grows."""

    def __init__(self, path: Path, result: dict[str, Any], seconds: float, scratch: Path, dry_run: bool) -> None:
        self.path, self.result, self.scratch, self.dry_run = path, result, scratch, dry_run
        self.deadline = time.monotonic() + seconds
        caches = {"TORCHINDUCTOR_CACHE_DIR": scratch / "inductor", "TRITON_CACHE_DIR": scratch / "triton"}
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.environ = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TQDM_MININTERVAL": "5"}
        self.environ |= {name: str(path) for name, path in caches.items()}
        if dry_run:  # the options are read and the loops are run; the tests are where compilation is tried on a CPU
            self.environ |= {"CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def options(self, phase: Phase, own: Sequence[str] = ()) -> list[str]:
        """A contender's options: those of the phase's shape, the data, and its own."""
        data = ["--data.tokenizer", "byte", "--data.cache", str(self.scratch / "data")]
        files = ["--data.files", *map(str, sorted((ROOT / "launcher").glob("*.py")))] if self.dry_run else []
        return [*phase.options(self.dry_run), *data, *files, *own]

    def python(self, *words: str, seconds: float) -> dict[str, Any]:
        """What a script prints as JSON in its last line; or why it does not."""
        try:
            done = subprocess.run(
                [sys.executable, *words],
                env={**os.environ, **self.environ},
                capture_output=True,
                text=True,
                timeout=max(1.0, seconds),
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {seconds:.0f} s"}
        lines = done.stdout.splitlines()
        if done.returncode or not lines:
            return {"failed": f"exit code {done.returncode}", "said": (lines + done.stderr.splitlines())[-15:]}
        answer: dict[str, Any] = json.loads(lines[-1])
        return answer

    def contenders(self, phase: Phase, directory: Path, names: Sequence[str]) -> dict[str, Contender]:
        """Those of a phase, started."""
        started = {}
        for name in names:
            script, own = phase.contenders[name]
            saves = ["--run.save-every", str(phase.save_every(self.dry_run)), "--run.keep", "1"] if phase.saves else []
            words = self.options(phase, [*own, *(saves if script == "gpt_launcher" else [])])
            started[name] = Contender(script, directory / name, words, self.environ)
        return started

    def write(self) -> None:
        """Write the result as it is."""
        machine.write(self.path, self.result)


def missing() -> list[str]:
    """What this Python lacks."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def absent() -> list[str]:
    """The peers that are not installed."""
    return [package for package in PEERS.values() if importlib.util.find_spec(package) is None]


def run_tests(bench: Bench, warm: bool) -> dict[str, Any]:
    """The tests marked gpu, and beside them, at a low priority, the compilations that the phases will want."""
    begun = time.monotonic()
    seconds = min(60.0 if bench.dry_run else TESTS_S, bench.left)
    words = ["-m", "pytest", "tests/gpu", "-m", "gpu", "-v", "-W", "default", "-p", "no:cacheprovider"]
    words += ["--basetemp", str(bench.scratch / "tests")]
    if importlib.util.find_spec("xdist") is not None and not bench.dry_run:
        words += ["-n", "4", "--dist", "loadfile"]
    output = bench.path.parent / "tests.txt"
    environ = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    with open(output, "w") as said, started([sys.executable, *words], said, environ) as tests:
        for phase in (PHASES[name] for name in ("124m", "1b")) if warm else ():
            warm_up(bench, phase, tests, begun + seconds)
        try:
            code: int | None = tests.wait(max(0.1, begun + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
            tests.send_signal(signal.SIGINT)  # pytest then tells what has failed so far
            with suppress(subprocess.TimeoutExpired):
                tests.wait(10)
    lines = output.read_text(errors="replace").splitlines()
    row: dict[str, Any] = {"exit_code": code, "seconds": round(time.monotonic() - begun, 1)}
    row["summary"] = lines[-1].strip("= ") if lines else ""
    row["not_passed"] = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:40]
    if code is None:
        row["failed"] = f"not done after {seconds:.0f} s"
    elif code not in (0, 5):
        row["failed"] = f"exit code {code}"
    return row


@contextmanager
def started(command: list[str], said: Any, environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process, ended with all that it has started."""
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=said, stderr=said, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def warm_up(bench: Bench, phase: Phase, tests: subprocess.Popen[bytes], until: float) -> None:
    """Compile what a phase will run, while the tests do: its loops find it in the caches."""
    names = [name for name in phase.contenders if name in ("bare", "launcher")]
    group = Group(bench.contenders(phase, bench.scratch / f"warm-{phase.shape}", names))
    try:
        for contender in group.alive.values():
            os.setpriority(os.PRIO_PROCESS, contender.process.pid, 15)
        while tests.poll() is None and time.monotonic() < until and group.alive:
            for name, contender in list(group.alive.items()):
                if contender.process.poll() is not None or contender.poll(0.5):
                    contender.close(grace=2)
                    del group.alive[name]
    finally:
        group.close()


def run_phase(bench: Bench, name: str, phase: Phase, memory_gb: float | None) -> None:
    """Start a phase's loops, wait until they are compiled, let them take turns; what is found is written each round."""
    row: dict[str, Any] = {"shape": phase.sizes(bench.dry_run), "contenders": {}}
    bench.result["phases"][name] = row
    if bench.left < phase.least and not bench.dry_run:
        row["failed"] = f"no time left: {bench.left:.0f} s of {phase.least}"
        return
    begun = time.monotonic()
    words = [str(HERE / "peers" / "gpt_common.py"), *bench.options(phase)]
    row |= bench.python(*words, seconds=min(60.0, bench.left))
    if "failed" in row:
        return
    if phase.saves and (rate := bench.result.get("limits", {}).get("to_host_gb_s")):
        row["copy_ms"] = round(12 * row["parameters"] / rate / 1e6, 1)  # fp32: the weights and two moments
    names, left_out = phase.fitting(memory_gb, absent(), PEERS)
    row["left_out"] = left_out
    directory = bench.scratch / name
    group = Group(bench.contenders(phase, directory, names))
    settle, steps = phase.turn(bench.dry_run)
    rounds: list[dict[str, Any]] = []
    until = min(begun + phase.seconds, bench.deadline)
    try:
        group.settle(min(begun + phase.ready, bench.deadline))
        for found in group.rounds(settle, steps, 2 if bench.dry_run else phase.rounds, until):
            rounds.append(found)
            row["contenders"] = summary(rounds, row, phase, bench) | group.failures()
            bench.write()
        if phase.saves and rounds and "launcher" in group.alive:
            wait_for_a_save(directory / "launcher" / "run" / "run.json", min(20.0, bench.left - 5))
    finally:
        group.close()
    row["contenders"] = summary(rounds, row, phase, bench) | group.failures()
    for contender in row["contenders"]:
        row["contenders"][contender] |= saved(directory / contender / "run" / "run.json")
        if contender in group.ready_s:
            row["contenders"][contender]["ready_s"] = group.ready_s[contender]
    row["rounds"], row["seconds"] = len(rounds), round(time.monotonic() - begun, 1)


def summary(rounds: list[dict[str, Any]], row: dict[str, Any], phase: Phase, bench: Bench) -> dict[str, Any]:
    """Every contender's medians, and its ratio to the first one's turn of the same round: above 1 is faster.

    Turns in which the launcher began to save count apart.
    """
    _, steps = phase.turn(bench.dry_run)
    every = phase.save_every(bench.dry_run) if phase.saves else 0
    quiet = [turns for turns in rounds if not any(saves(turn, every) for turn in turns.values())]
    tokens = phase.tokens(bench.dry_run) * steps
    base = next(iter(phase.contenders))
    limits = bench.result.get("limits", {})
    found: dict[str, Any] = {}
    for name in phase.contenders:
        turns = [turns[name] for turns in quiet if name in turns]
        if not turns:
            continue
        usual = statistics.median(turn["seconds"] for turn in turns)
        rate = tokens / usual
        flops = rate * row["flops_per_token"] / 1e12
        pairs = [turns[base]["seconds"] / turns[name]["seconds"] for turns in quiet if {base, name} <= turns.keys()]
        saving = [turns[name]["seconds"] - usual for turns in rounds if name in turns and saves(turns[name], every)]
        found[name] = {
            "tokens_per_s": round(rate),
            "step_ms": round(1e3 * usual / steps, 3),
            **({f"of_{base}": tables.spread(pairs)} if pairs else {}),
            "mfu": share(flops, limits.get("datasheet_tflops")),
            "mfu_of_measured": share(flops, limits.get("peak_tflops")),
            "peak_gb": max((turn["peak_gb"] for turn in turns if "peak_gb" in turn), default=None),
        }
        if saving and name.startswith("launcher"):
            found[name]["save_ms"] = round(1e3 * statistics.median(saving), 1)
    return found


def saves(turn: dict[str, Any], every: int) -> bool:
    """Whether a checkpoint was due in a turn."""
    return every > 0 and any(step % every == 0 for step in range(turn["from"], turn["to"]))


def share(flops: float, of: float | None) -> float | None:
    return None if of is None else round(flops / of, 4)


def wait_for_a_save(path: Path, seconds: float) -> None:
    """Until the first save is durable: its writer goes on while the loop waits for its turn."""
    until = time.monotonic() + seconds
    while "save_blocked_seconds" not in saved(path) and time.monotonic() < until:
        time.sleep(0.1)


def saved(path: Path) -> dict[str, Any]:
    """What a run's saves were: the seconds that training waited, and until the checkpoint was durable and read back."""
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    keys = ("save_blocked_seconds", "save_seconds", "save_error")
    return {key: facts[key] for key in keys if facts.get(key) is not None}


def targets(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was to be reached."""
    found = {}
    for phase, size, utilisation in (("124m", "124 M", 0.45), ("1b", "1 B", 0.55)):
        rows = result["phases"].get(phase, {}).get("contenders", {})
        ours = rows.get("launcher", {})
        if "of_bare" in ours:
            ratio = ours["of_bare"]["ratio"]
            found[f"{size}: at least 0.99 of the hand-written loop"] = tables.target(ratio, least=0.99)
        for peer, title in (("hf", "HF Trainer"), ("lightning", "Lightning")):
            if "tokens_per_s" in rows.get(peer, {}) and "of_bare" in ours and "of_bare" in rows[peer]:
                ratio = round(ours["of_bare"]["ratio"] / rows[peer]["of_bare"]["ratio"], 4)
                found[f"{size}: at least 1.05 of {title}"] = tables.target(ratio, least=1.05)
        if ours.get("mfu") is not None:
            found[f"{size}: MFU of the datasheet's rate at least {utilisation}"] = tables.target(
                ours["mfu"], least=utilisation
            )
    return found


def markdown(result: dict[str, Any]) -> str:
    """The tables of the page, a phase each."""
    parts = []
    limits, tests = result.get("limits", {}), result.get("tests")
    if "peak_tflops" in limits:
        parts.append(
            f"Measured there: a bf16 matrix product at {limits['peak_tflops']} TFLOP/s (the datasheet says "
            f"{limits['datasheet_tflops']}), a copy at {limits['copy_gb_s']} GB/s, one to the host at "
            f"{limits['to_host_gb_s']} GB/s. "
            "A ratio is of tokens a second, within a round of turns; a phase's first loop is what it is held against."
        )
    if tests:
        parts.append(f"GPU tests: {tests['summary'] or tests.get('failed')}, {tests['seconds']} s.")
    for name, phase in result["phases"].items():
        said = f"### {name}: {PHASES[name].title}" if name in PHASES else f"### {name}"
        if "failed" in phase:
            parts.append(f"{said}\n\n{phase['failed']}")
            continue
        parts.append(f"{said}\n\n{table(phase)}")
        if "copy_ms" in phase:
            parts.append(f"One copy of a checkpoint's bytes to the host takes {phase['copy_ms']} ms.")
        parts += [f"{contender}: {why}." for contender, why in phase.get("left_out", {}).items()]
    return "\n\n".join(parts)


def table(phase: dict[str, Any]) -> str:
    """A phase's loops."""
    rows = []
    for name, row in phase["contenders"].items():
        ratio = next((row[key] for key in row if key.startswith("of_")), None)
        if "failed" in row and "tokens_per_s" not in row:
            rows.append((name, row["failed"], *[None] * 8))
            continue
        spread = None if ratio is None else f"{ratio['ratio']} ({tables.quartiles(ratio['quartiles'])})"
        cells = (row["tokens_per_s"], row["step_ms"], spread, row["mfu"], row["mfu_of_measured"], row["peak_gb"])
        rows.append((name, *cells, row.get("ready_s"), row.get("save_ms"), row.get("save_blocked_seconds")))
    header = ("loop", "tokens/s", "ms a step", "ratio", "MFU", "of the measured peak", "peak GB", "s to step 1")
    return tables.markdown((*header, "ms a save adds", "s it blocks"), rows)


def earlier(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """The phases of an earlier result, if it is of the same device and versions."""
    try:
        old = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    same = all(old.get(key) == fresh[key] for key in ("device", "versions", "machine"))
    return {key: old[key] for key in ("tests", "phases") if key in old} if same else {}


def measure(bench: Bench, only: Sequence[str]) -> None:
    """All phases, one after the other; what one raises is its own."""
    result = bench.result
    memory = result["device"].get("memory_gb")
    for name in only:
        print(f"{name}: {bench.left:.0f} s left", flush=True)
        try:
            if name == "tests":
                result["tests"] = run_tests(bench, warm=not bench.dry_run and "124m" in only)
                print(f"  {result['tests']}", flush=True)
            else:
                run_phase(bench, name, PHASES[name], memory)
                print(json.dumps(result["phases"][name], indent=1), flush=True)
        except Exception as error:
            where = result["phases"].setdefault(name, {}) if name != "tests" else result.setdefault("tests", {})
            where["failed"] = f"{type(error).__name__}: {error}"
            print(f"  {where['failed']}", flush=True)
        bench.write()


def failed(result: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether something of these phases failed, rather than had no time."""
    rows = [result.get("tests", {}) if name == "tests" else result["phases"].get(name, {}) for name in names]
    rows += [row for phase in rows for row in phase.get("contenders", {}).values()]
    return any("failed" in row and not row["failed"].startswith("no time left") for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the directory that gets the JSON; without: only look what is missing")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--seconds", type=float, default=500, help="to end by")
    parser.add_argument("--only", nargs="+", choices=["tests", *PHASES], help="these phases")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(124))  # so that what was started ends too
    if lacking := missing():
        raise SystemExit(f"gpu.py: {sys.executable} lacks {', '.join(lacking)}: install them, or give WHEELS=DIR")
    if options.out is None:
        return
    names = options.only or ["tests", *((name for name in PHASES if PHASES[name].dry) if options.dry_run else PHASES)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        bench = Bench(options.out, {}, options.seconds, Path(scratch), options.dry_run)
        limits = bench.python(str(HERE / "gpu_limits.py"), seconds=90)
        device = limits.pop("device", {"name": "unknown"})
        if not options.dry_run and "peak_tflops" not in limits:
            said = "\n".join(limits.get("said", []))
            raise SystemExit(
                f"gpu.py: no CUDA device that works: --dry-run does the same on a CPU, small\n{said}".strip()
            )
        name = "gpu-dry-run.json" if options.dry_run else f"gpu-{machine.slug(device['name'])}.json"
        bench.path = options.out / name
        bench.result = {"benchmark": "gpu", "dry_run": options.dry_run, **machine.facts(), "device": device}
        bench.result |= {"absent": absent(), "limits": limits, "phases": {}}
        bench.result |= earlier(bench.path, bench.result) if options.only else {}
        bench.write()
        measure(bench, names)
    print(markdown(bench.result))
    for name, target in targets(bench.result).items():
        print(f"{'met   ' if target['met'] else 'MISSED'} {name}: {target['found']}")
    print(f"-> {bench.path}")
    sys.exit(failed(bench.result, names))


if __name__ == "__main__":
    main()
