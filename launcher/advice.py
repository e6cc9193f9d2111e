"""What a failure's kind means for the next start, and what to change: the second half of a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.evidence import Evidence, Word
from launcher.show import human

__all__ = ["advice"]

AGAIN = "another start may go better"
# What is said of a kind where nothing more is known than that.
SAID = {
    "numbers": "Bad numbers: the next start comes to the same ones",
    "hang": f"A hang: {AGAIN}",
    "peer": f"No rank has told of a fault of its own, so look at the network between them: {AGAIN}",
    "network": f"What a sample comes from did not answer: {AGAIN}",
    "lost": f"A lost node: {AGAIN}",
}


def advice(evidence: Evidence, first: Word) -> str:
    """Of a failure's first rank: its class, and what to do."""
    kind = first.kind
    if kind == "memory":
        return _of_memory(evidence, first)
    if kind == "killed":
        return _of_killed(evidence, first)
    if kind == "hang" and "not every rank makes" in first.message:
        return "The code makes it: it will hang again."
    if kind == "data":
        what = f"{first.sample} of loader {first.loader!r}" if first.sample else "a data worker died"
        said = f"A data error ({what}): it will come again with the same data"
    elif kind == "disk":
        what = f" ({first.path})" if first.path else ""
        said = f"The disk takes no more{what}: make room, or name another --run.dir; until then it fails the same way"
    elif kind == "hardware":
        host = f" of {first.host}" if first.host else ""
        said = f"A fault of the machine{host}, not of the code: {AGAIN}, on another node"
    else:
        said = SAID.get(kind, "A code error: it will fail the same way again")
    retried = kind in SAID or kind == "hardware"
    return f"{said}{', so it is not retried' if evidence.is_job and not retried and kind != 'numbers' else ''}."


def _of_memory(evidence: Evidence, first: Word) -> str:
    memory, held = first.memory, ""
    allocated, reserved, limit = (memory.get(name) for name in ("allocated", "reserved", "limit"))
    if isinstance(allocated, int) and isinstance(limit, int):
        if isinstance(reserved, int):
            held = f": torch had allocated {human(allocated)} (reserved {human(reserved)}) of the GPU's {human(limit)}"
        else:
            held = f": the rank held {human(allocated)}, and {memory.get('of', 'the host')} has {human(limit)}"
    on_gpu = memory.get("device") == "cuda"
    return f"Out of memory{held}.{_settings(evidence, first.step, on_gpu=on_gpu)}"


def _of_killed(evidence: Evidence, first: Word) -> str:
    if "memory" in first.message:
        return f"Out of host memory.{_settings(evidence, first.step, on_gpu=False)}"
    if "native code" in first.message:
        return f"A crash: {AGAIN}, and if it comes again at the same step it is the code's."
    unknown = "Killed from outside, crashed, or gone with its machine" if "without a word" in first.message else ""
    return f"{unknown or 'Nothing in the run itself says why'}: {AGAIN}."


def _settings(evidence: Evidence, step: int | None, *, on_gpu: bool) -> str:
    """The two settings most likely to help, by what the run has not set yet."""
    run = evidence.settings.get("run")
    run = run if isinstance(run, dict) else {}
    name, size = _microbatch(evidence.settings)
    smaller = f"--{name.replace('_', '-')} {max(1, size // 2)} (now {size})" if name and size > 1 else ""
    if not name:
        smaller = "a smaller microbatch_size= of run.loader"
    sharded = "--run.shard full" if evidence.world_size > 1 and run.get("shard") in (None, "none") else ""
    recomputes = run.get("activation_checkpointing") not in (None, "off")
    recompute = "" if recomputes else "--run.activation-checkpointing full"
    half = "--run.precision bf16" if run.get("precision") in (None, "no") and on_gpu else ""
    workers = "--run.workers 0" if run.get("workers") and not on_gpu else ""
    # before the first step it is the weights that do not fit, not the activations
    wanted = [workers, smaller, recompute, half, sharded] if step else [sharded, half, smaller, recompute]
    chosen = [one for one in wanted if one][:2]
    return f" Most likely to help: {' and '.join(chosen)}." if chosen else ""


def _microbatch(settings: Mapping[str, Any], prefix: str = "") -> tuple[str, int]:
    """The recipe's own option of that name, wherever it stands, and its value; "" where it has none."""
    for key, value in settings.items():
        if isinstance(value, dict) and key != "run":
            found = _microbatch(value, f"{prefix}{key}.")
            if found[0]:
                return found
        if key == "microbatch_size" and type(value) is int:
            return f"{prefix}{key}", value
    return "", 0
