"""What a rank writes down of itself: at its start what it is, and when it fails why; launcher/evidence.py reads it."""

from __future__ import annotations

import json
import os
import re
import resource
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from launcher import cgroup
from launcher.errors import LauncherError
from launcher.failure import NOTE, Kind, may_pass
from launcher.rundir import here
from launcher.source import strip_credentials
from launcher.stacks import Place, is_own, main_stack, places

if TYPE_CHECKING:
    from launcher.world import World

__all__ = ["PARENT", "about", "recipes_part", "told_to_agent", "told_to_parent", "whereabouts", "witness"]

PARENT = "LAUNCHER_PARENT"
"""The environment variable in which launcher/parent.py names a directory that its ranks may write to."""
LONGEST = 64 * 1024  # characters of a traceback
# The text that torch makes of an exception in a data worker, and a frame in it.
WORKER = re.compile(r"Caught (\w+) in DataLoader worker process \d+\.\nOriginal (Traceback.*)", re.DOTALL)
FRAME = re.compile(r'^  File "(.+)", line (\d+), in (.+)$', re.MULTILINE)
LAST = re.compile(r"^(?:\w+\.)*(\w+)(?:: (.*))?$")


def about(world: World) -> dict[str, Any]:
    """What attempts/A/rank-R.json holds."""
    seen = cgroup.groups()
    return {
        **{"rank": world.rank, "local_rank": world.local_rank, "pid": os.getpid(), **here()},
        **{"cgroup": str(seen[0]) if seen else None, "oom_kills": cgroup.kills(seen)},
    }


def witness(
    error: BaseException, kind: Kind, *, world: World, step: int | None, called: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """What attempts/A/error-R.json holds of the exception that ends a rank.

    `called` are the collectives that it has called, where that can tell more than the exception does.
    """
    name, message, place = _told(error)
    text = "".join(traceback.format_exception(type(error), error, recipes_part(error.__traceback__)))
    noted = NOTE.search("\n".join([*getattr(error, "__notes__", ()), str(error)]))
    return {
        **{"rank": world.rank, "pid": os.getpid(), **here(), "step": step, "kind": kind, "retry": may_pass(kind)},
        "launcher": isinstance(error, LauncherError),  # its message names the fault and the fix
        **{"type": name, "message": strip_credentials(message), "place": None if place is None else _as_json(place)},
        "data": None if noted is None else {"loader": noted["loader"], "what": noted["what"]},
        "path": str(error.filename) if isinstance(error, OSError) and error.filename else None,
        "memory": _memory(world) if kind == "memory" else None,
        "oom_kills": cgroup.kills(cgroup.groups()),
        "collectives": called or [],
        "traceback": strip_credentials(text[-LONGEST:]),
    }


def whereabouts(called: list[dict[str, Any]]) -> dict[str, Any]:
    """What attempts/A/exit-R.json holds besides, of a rank that another's failure ends where it stands."""
    place, _ = places(main_stack())
    return {"collectives": called, "place": None if place is None else _as_json(place)}


def recipes_part(frames: TracebackType | None) -> TracebackType | None:
    """A traceback from the recipe's first frame on; the whole where there is none of its own."""
    first = frames
    while first is not None and not is_own(_place(first)):
        first = first.tb_next
    return first or frames


def told_to_parent(directory: str | None, name: str, facts: Mapping[str, Any]) -> bool:
    """Let the parent of `launcher run` know something, if there is one: also what a full disk cannot take."""
    if directory is None:
        return False
    with suppress(OSError), open(Path(directory, name), "x", encoding="utf-8") as file:
        json.dump(facts, file)
    return True


def told_to_agent(text: str, *, failed_at: float | None) -> None:
    """Let the agent of torch know why this rank fails: it prints a table of its ranks.

    It takes for the first the one with the least time, in whole seconds: that one gets a second less, the others one
    more. Source: torch/distributed/elastic/multiprocessing/errors/__init__.py, ProcessFailure.

    Args:
        failed_at: of the first rank to fail, the time before the others could know of it; of those None.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        when = int(time.time()) + 1 if failed_at is None else int(failed_at) - 1
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": text, "extraInfo": {"timestamp": str(when)}}}, file)


def _told(error: BaseException) -> tuple[str, str, Place | None]:
    """The exception's type and message, and where in the person's own code it was raised; of a worker's, there."""
    name, message = type(error).__name__, NOTE.sub("", str(error)).strip()
    places = [_place(frame) for frame in _frames(error.__traceback__)]
    if found := WORKER.match(str(error)):
        text = NOTE.sub("", found[2]).rstrip()
        places += [Place(path, int(line), function) for path, line, function in FRAME.findall(text)]
        last = LAST.match(text.rpartition("\n")[2])
        name, message = (last[1], last[2] or "") if last is not None else (found[1], text.rpartition("\n")[2])
    own = [place for place in places if is_own(place)]
    return name, message, own[-1] if own else None


def _frames(frame: TracebackType | None) -> list[TracebackType]:
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.tb_next
    return frames


def _place(frame: TracebackType) -> Place:
    code = frame.tb_frame.f_code
    path = code.co_filename if code.co_filename.startswith("<") else os.path.abspath(code.co_filename)
    return Place(path, frame.tb_lineno, code.co_name)


def _as_json(place: Place) -> dict[str, Any]:
    return {**vars(place), "source": place.source}


def _memory(world: World) -> dict[str, Any]:
    """What this rank holds of its GPU, or of the host, and how much there is of that; bytes."""
    facts: dict[str, Any] = {"device": world.device.type}
    with suppress(Exception):  # whatever a process without memory can still find out
        if world.device.type == "cuda":
            import torch

            facts["allocated"] = torch.cuda.memory_allocated(world.device)
            facts["reserved"] = torch.cuda.memory_reserved(world.device)
            facts["limit"] = torch.cuda.get_device_properties(world.device).total_memory
            return facts
        facts["allocated"] = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        seen = cgroup.groups()
        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        limits = {"its address space (ulimit -v)": soft if soft != resource.RLIM_INFINITY else None}
        limits["its control group"] = cgroup.limit(seen)
        limits["the host"] = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
        of, least = min(((of, size) for of, size in limits.items() if size is not None), key=lambda pair: pair[1])
        facts["limit"], facts["of"] = least, of
    return facts
