"""What the flight recorder of torch knows: the collectives that this rank has called, and which have ended.

Source: torch/csrc/distributed/c10d/FlightRecorder.hpp. Gloo's recorder and NCCL's are two; both number the collectives
of a group from 1, alike on every rank that calls the same.
"""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["collectives", "switch_on"]

KEPT = 40  # calls of a group that are kept
PATIENCE = 3.0  # seconds; NCCL's recorder asks the GPU, which may be what hangs
# What every rank must call with the same number of elements.
SAME_SIZE = ("all_reduce", "broadcast")


def switch_on() -> None:
    """Have the collectives recorded, unless the person has said how many; before any group is made."""
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # its older name
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")


def collectives() -> list[dict[str, Any]]:
    """The collectives of every group on this rank; nothing where none are recorded, or the recorder does not answer.

    Of a group: `group` (its name), `backend`, `ranks`, `enqueued` and `completed` (the number of the last that was
    called, and of the last that has ended), `calls` (the last few, each as [number, name, elements]).
    """
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.extend(_read()), name="launcher-flight", daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return [] if thread.is_alive() else found


def _read() -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):  # private, and the second only with CUDA
        read = getattr(torch._C._distributed_c10d, name, None)
        if read is None:
            continue
        with suppress(RuntimeError, ValueError):
            for entry in json.loads(read(includeCollectives=True)).get("entries", []):
                if not entry["is_p2p"]:
                    backend, _, call = entry["profiling_name"].rpartition(":")
                    groups.setdefault((backend, entry["process_group"][0]), []).append({**entry, "call": call})
    members = _members()
    return [_group(backend, name, members.get(name), entries) for (backend, name), entries in groups.items()]


def _group(backend: str, name: str, ranks: list[int] | None, entries: list[dict[str, Any]]) -> dict[str, Any]:
    entries.sort(key=lambda entry: entry["collective_seq_id"])
    ended = [entry["collective_seq_id"] for entry in entries if entry["retired"] or entry["state"] == "completed"]
    calls = [[entry["collective_seq_id"], entry["call"], _elements(entry)] for entry in entries[-KEPT:]]
    enqueued, completed = entries[-1]["collective_seq_id"], max(ended, default=0)
    return {
        **{"group": name, "backend": backend, "ranks": ranks, "enqueued": enqueued, "completed": completed},
        "calls": calls,
    }


def _elements(entry: dict[str, Any]) -> int | None:
    """The elements of a call that must be the same on every rank; None of a call where they may differ."""
    if not entry["call"].startswith(SAME_SIZE):
        return None
    total = 0
    for shape in entry["input_sizes"]:
        elements = 1
        for size in shape:
            elements *= size
        total += elements
    return total


def _members() -> dict[str, list[int]]:
    """The ranks of every group by its name; nothing where torch keeps them elsewhere than today."""
    with suppress(AttributeError, RuntimeError, ValueError):
        names = dist.distributed_c10d._world.pg_names
        return {str(name): dist.get_process_group_ranks(group) for group, name in list(names.items())}
    return {}
