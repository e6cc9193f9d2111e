"""Metrics: lines in metrics.jsonl, a bar on a terminal or plain lines in a log; never a reason for a GPU to wait.

A line belongs to a number of completed optimizer steps. Its loss is read back while the next step runs, and is
summed over ranks in that step's agreement, so that a line appears two steps late; at a save, and at the end, lines are
brought up to date.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from launcher.agreement import Ballot
from launcher.errors import RecipeError
from launcher.world import World

__all__ = ["Bar", "Metrics", "checked", "peak_flops"]

Value = float | torch.Tensor

# Dense bf16 (and fp16) tensor-core peaks in FLOP/s, from NVIDIA's datasheets.
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12,
    "L4": 121e12, "V100": 125e12, "4090": 165e12,
}  # fmt: skip


@dataclass(slots=True)
class Line:
    """What is known of `step` completed steps; the loss is None where the line is of the weights alone."""

    step: int
    loss: torch.Tensor | None
    local_count: float | None
    count: float
    samples: int
    waited: float
    ended: float
    due: bool = False
    summed: bool = False
    values: dict[str, Value] = field(default_factory=dict)
    readback: tuple[torch.Tensor, torch.cuda.Event] | None = None


class Metrics:
    """The metrics of one attempt at a run; every rank keeps them, rank 0 writes them."""

    def __init__(
        self,
        path: Path,
        world: World,
        *,
        attempt: int,
        log_every: int,
        total: int | None = None,
        unit: str = "samples",
        flops: float | None = None,
        bar: Bar | None = None,
        track: Callable[[Mapping[str, float], int], None] | None = None,
    ) -> None:
        self._world, self._attempt, self._log_every, self._total = world, attempt, log_every, total
        self._unit, self._flops, self._bar, self._track = unit, flops, bar, track
        self._file = Lines(path) if world.is_main else None
        self._last: Line | None = None  # the newest finished step
        self._sent: Line | None = None  # the one whose loss is in the pending agreement
        self._values: dict[int, dict[str, Value]] = {}
        self._marked: set[int] = set()
        self._unwritten: set[str] = set()
        self._written: set[str] = set()
        self._newest: tuple[int, dict[str, Any]] = (-1, {})
        self._untold: tuple[int, dict[str, Any]] = (-1, {})  # what no line of this attempt has
        self.waited = 0.0
        """Seconds that this step has waited for data."""
        self.paused = 0.0
        """Seconds that evaluations and saves have taken."""
        self._window = Window(time.perf_counter())

    def add(self, step: int, values: Mapping[str, Value]) -> None:
        """Values for the line of `step` completed steps."""
        detached = checked(values)
        line = self._last
        if line is not None and line.step == step:
            line.values.update(detached)
        else:
            self._values.setdefault(step, {}).update(detached)

    def mark(self, step: int) -> None:
        """Write the line of `step` whatever `log_every` says."""
        self._marked.add(step)

    def finished(
        self, step: int, loss: torch.Tensor | None, local_count: float | None, count: float, samples: int
    ) -> None:
        """A step has ended: `step` are complete, this rank's losses in it sum to `loss` (0-d, on the device)."""
        before = self._values.pop(step - 1, None)
        if before and (step - 1 in self._marked or (step > 1 and self._due(step - 1))):
            self.write(step - 1, _numbers(before))  # behind a save or a start, which have told, or know, the rest
        elif before:
            self._unwritten.update(before)
        line = Line(step, loss, local_count, count, samples, self.waited, time.perf_counter() - self.paused)
        line.values = self._values.pop(step, {})
        self.waited = 0.0
        if loss is not None and loss.is_cuda:
            line.readback = _start_readback(loss, line.values)
        self._last = line

    def loss(self, *, ahead: bool) -> tuple[float, float]:
        """What this rank tells of the newest line: its loss sum and, where counts came with the losses, their sum.

        Not `ahead` of a step but between two, it is told of a line that is not due as well: an evaluation may make it
        so, and a checkpoint has it.
        """
        line = self._sent = self._last
        if line is not None:
            line.due = self._due(line.step)
            line.summed = line.due or not ahead
        if line is None or line.loss is None or not line.summed:
            return 0.0, 0.0
        if line.readback is not None:
            line.readback[1].synchronize()  # of a step whose kernels are behind those already queued
            return line.readback[0][0].item(), line.local_count or 0.0
        return line.loss.item(), line.local_count or 0.0

    def settle(self, ballot: Ballot) -> None:
        """Write the line whose loss `ballot` sums over ranks if it is due, else keep it in mind if it has that."""
        line, self._sent = self._sent, None
        if line is None:
            return
        if line is self._last:
            self._last = None
        self._window.add(line)
        if not line.due:
            self._unwritten.update(line.values)
        if not line.summed:
            return
        count = line.count if line.local_count is None else ballot.loss_count
        values: dict[str, Any] = {} if line.loss is None or not count else {"loss": ballot.loss / count}
        values |= _numbers(line.values, line.readback)
        if line.due:
            self._marked.discard(line.step)
            self.write(line.step, values | self._rates())
        else:
            self.remember(line.step, self.line(line.step) | values)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write a line now."""
        values = {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in values.items()}
        if step == self._untold[0]:
            values = self._untold[1] | values
            self._untold = (-1, {})
        if step >= self._newest[0]:  # what the recipe writes of its weights may be ahead of the line before
            self._newest = (step, self.line(step) | values)
        self._written.update(values)
        if self._file is None:
            return
        self._append({"step": step, **values})
        if self._bar is not None:
            self._bar.show(step, values)
        if self._track is not None:
            self._track({key: value for key, value in values.items() if isinstance(value, int | float)}, step)

    def forget(self, step: int) -> None:
        """Behind `step`, which is the last that counts, there is to be no line."""
        self._last = None if self._last is not None and self._last.step > step else self._last
        self._sent = None if self._sent is not None and self._sent.step > step else self._sent

    def rewind(self, step: int, bad: int, total: int | None, values: Mapping[str, Any]) -> None:
        """The run goes on from `step`, whose line has `values`, without the samples of step `bad`.

        A line of its own says so: what this attempt has told of later steps counts for nothing.
        """
        self._last = self._sent = None
        self._values.clear()
        self._marked.clear()
        self._total = total
        self.remember(step, values)
        self._window = Window(time.perf_counter() - self.paused)
        self.waited = 0.0
        if self._file is not None:
            self._append({"step": step, "rewound_from": bad + 1, **values})
        if self._bar is not None:
            self._bar.rewind(step, total)

    def line(self, step: int) -> dict[str, Any]:
        """What the line of `step` says, if that is the newest."""
        return self._newest[1] if self._newest[0] == step else {}

    def remember(self, step: int, values: Mapping[str, Any]) -> None:
        """Values of `step` that are known and in no line of this attempt.

        Of one step the latest attempt counts: what this one adds to it must not replace what an earlier one has told.
        """
        self._newest = self._untold = (step, dict(values))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time in here (an evaluation, a save) is not the steps'."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.paused += time.perf_counter() - start

    def sync(self) -> None:
        """Make the lines written so far durable; from any thread.

        Raises:
            OSError: they are not.
        """
        if self._file is not None:
            self._file.sync()

    def close(self) -> set[str]:
        """Stop writing; returns the names that were logged and never in a line that was due."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._bar is not None:
            self._bar.close()
        return self._unwritten - self._written

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        fault = self._file.append(json.dumps({"attempt": self._attempt, **line, **_nulls(line)}, allow_nan=False))
        if fault is not None:
            print(f"launcher: metrics are not written, training goes on: {fault}", file=sys.stderr, flush=True)

    def _due(self, step: int) -> bool:
        return step % self._log_every == 0 or step in (1, self._total) or step in self._marked

    def _rates(self) -> dict[str, float]:
        window, self._window = self._window, Window(self._window.end)
        seconds = max(window.end - window.start, 1e-9)
        rates = {
            "step_s": seconds / max(window.steps, 1),
            "samples_per_s": window.samples / seconds,
            "data_wait": window.waited / seconds,
            "memory_gb": memory_gb(self._world.device),
        }
        if self._unit != "samples":
            rates[f"{self._unit}_per_s"] = window.count / seconds
        peak = peak_flops(self._world.device)
        if self._flops is not None and peak is not None:
            rates["mfu"] = self._flops * window.count / seconds / (peak * self._world.world_size)
        return {key: float(f"{value:.6g}") for key, value in rates.items()}


class Lines:
    """A file that grows by whole lines; what a full disk does not take is kept, and written when there is room."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - lives with the run
        self._unwritten = b""
        self._told = False
        if self._file.tell() and os.pread(self._file.fileno(), 1, self._file.tell() - 1) != b"\n":
            self._unwritten = b"\n"  # an earlier start was killed within a line

    def append(self, line: str) -> str | None:
        """Add a line; what is wrong, the first time that it cannot be written, or None."""
        self._unwritten += line.encode() + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            told, self._told = self._told, True
            return None if told else f"{self._path}: {error.strerror}"
        self._told = False
        return None

    def sync(self) -> None:
        """Make what is written durable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass
class Window:
    """Steps between two lines; times are of a clock that stands still during evaluations and saves."""

    start: float
    end: float = 0.0
    steps: int = 0
    samples: int = 0
    count: float = 0.0
    waited: float = 0.0

    def __post_init__(self) -> None:
        self.end = self.start

    def add(self, line: Line) -> None:
        """Count a finished step."""
        self.steps += 1
        self.samples += line.samples
        self.count += line.count
        self.waited += line.waited
        self.end = line.ended


class Bar:
    """Progress for a person: a bar where stderr is a terminal, else a line each time."""

    def __init__(self, total: int | None, start: int) -> None:
        self._total = total
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1)

    def show(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the line of `step`."""
        text = "  ".join(
            f"{key} {_short(value)}" for key, value in values.items() if key not in ("step_s", "memory_gb")
        )
        if self._bar is None:
            of = "" if self._total is None else f"/{self._total}"
            print(f"step {step}{of}  {text}", file=sys.stderr, flush=True)
        elif step >= self._bar.n:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)

    def rewind(self, step: int, total: int | None) -> None:
        """Go on from an earlier step."""
        self._total = total
        if self._bar is not None:
            self._bar.total, self._bar.n = total, step
            self._bar.refresh()

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def _nulls(values: Mapping[str, Any]) -> dict[str, None]:
    """What is no number in JSON."""
    return {key: None for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)}


def peak_flops(device: torch.device) -> float | None:
    """The datasheet's dense bf16 FLOP/s of a GPU, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def memory_gb(device: torch.device) -> float:
    """The most memory this rank has held so far, in GB: on its GPU, or (on a CPU) resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _start_readback(loss: torch.Tensor, values: Mapping[str, Value]) -> tuple[torch.Tensor, torch.cuda.Event]:
    """Copy the loss and the logged tensors to the host behind the work that computes them."""
    tensors = [loss, *(value for value in values.values() if isinstance(value, torch.Tensor))]
    packed = torch.stack([tensor.to(loss.device, torch.float64, non_blocking=True).reshape(()) for tensor in tensors])
    host = torch.empty(packed.shape, dtype=torch.float64, pin_memory=True).copy_(packed, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def _numbers(
    values: Mapping[str, Value], readback: tuple[torch.Tensor, torch.cuda.Event] | None = None
) -> dict[str, Any]:
    """Logged values as numbers, from the readback where there is one."""
    read = iter([] if readback is None else readback[0].tolist()[1:])
    numbers: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, torch.Tensor):
            number = next(read, None)  # a tensor logged after the readback began is read here
            numbers[key] = value.item() if number is None else number
        else:
            numbers[key] = value
    return numbers


def checked(values: Mapping[str, Any]) -> dict[str, Value]:
    """Logged values as they are now: a parameter that is logged goes on changing.

    Raises:
        RecipeError: one is not one number.
    """
    return {key: _one_number(key, value) for key, value in values.items()}


def _one_number(key: str, value: Any) -> Value:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.detach().clone()
    try:
        return value if isinstance(value, int | float) else float(value)
    except (TypeError, ValueError, RuntimeError):
        raise RecipeError(f"{key!r} is logged as {type(value).__name__}: a metric is one number") from None


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
