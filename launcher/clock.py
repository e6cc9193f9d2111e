"""The job's end, known ahead: when a run must stop to have saved by then."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from launcher.errors import LauncherError

__all__ = ["Clock"]

FIRST_SAVE = 60.0  # seconds allowed for a save of which none has been measured
MARGIN = 20.0  # seconds before a job's end by which its ranks must have ended, as in slurm/job.sh
ASK = 30.0  # seconds before it would stop a run at which SLURM is asked whether the limit is still that


class Clock:
    """Measures steps, evaluations and saves, and says when to stop so that a last save ends before the job does.

    A batch script exports LAUNCHER_JOB_END, the time by which its ranks must have ended, in seconds since 1970. Without
    it nothing is ever due.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        save_seconds: float | None = None,
        now: Callable[[], float] = time.time,
        ask: Callable[[Mapping[str, str]], float | None] | None = None,
    ) -> None:
        """`save_seconds` is what a save took in an earlier start; `ask` finds out when the job ends, by default SLURM.

        The limit of a running job may be raised: it is asked for once more before a stop.
        """
        self._now, self._environ = now, environ
        self._ask: Callable[[Mapping[str, str]], float | None] | None = ask or _job_end
        self._end = _number(environ.get("LAUNCHER_JOB_END")) or math.inf
        self._lead, self._grace = _number(environ.get("LAUNCHER_SIGNAL_LEAD")), _number(environ.get("LAUNCHER_GRACE"))
        self.step_seconds = 0.0
        """The longest step of late, the longest evaluation, and the last save (None: none is known), in seconds."""
        self.evaluation_seconds = 0.0
        self.save_seconds = save_seconds
        self._paused = 0.0
        self._unmeasured = min(FIRST_SAVE, max(0.0, self.left / 10))
        self._edge: float | None = None

    @property
    def need(self) -> float:
        """Seconds from the decision to stop until all is saved: two steps, an evaluation, twice a save."""
        save = self._unmeasured if self.save_seconds is None else self.save_seconds
        return 2 * self.step_seconds + self.evaluation_seconds + 2 * save

    @property
    def patience(self) -> float:
        """Seconds to wait for a step's edge after a signal: ample, and no longer than the job has."""
        return min(max(120.0, 4 * (self.step_seconds + self.evaluation_seconds)), max(0.0, self.left))

    @property
    def left(self) -> float:
        """Seconds until the ranks must have ended."""
        return self._end - self._now()

    def due(self) -> bool:
        """Whether to stop now."""
        if math.isinf(self._end):
            return False
        if self._ask is not None and self.left <= self.need + ASK:
            end = self._ask(self._environ)
            if end is not None and end - MARGIN > self._end + 1:
                self._end = end - MARGIN
            else:
                self._ask = None  # once
        return self.left <= self.need

    def edge(self, paused: float) -> None:
        """A step's edge; evaluations and saves have taken `paused` seconds since the run began.

        The longest step counts, and is forgotten slowly: one that compiles is not typical of those that follow.
        """
        now = time.perf_counter()
        if self._edge is not None:
            self.step_seconds = max(now - self._edge - (paused - self._paused), 0.9 * self.step_seconds)
        self._edge, self._paused = now, paused

    def evaluated(self, seconds: float) -> None:
        """An evaluation took so long."""
        self.evaluation_seconds = max(seconds, self.evaluation_seconds)

    def saved(self, seconds: float) -> str | None:
        """A save took so long; what to tell where SLURM's signal, or its grace, comes too late for another."""
        first, self.save_seconds = self.save_seconds is None, seconds
        if not first:
            return None
        short = []
        if self._lead and self.need > self._lead:
            short.append(f"--signal-lead {self._lead:.0f} is less: submit with --signal-lead {math.ceil(self.need)}")
        if self._grace and self.need > self._grace:
            short.append(
                f"a preemption here leaves {self._grace:.0f} s (GraceTime and KillWait): what a stop cannot save is "
                "trained again, from the last checkpoint"
            )
        return f"to stop and save takes up to {self.need:.0f} s; {'; '.join(short)}" if short else None


def _job_end(environ: Mapping[str, str]) -> float | None:
    """When the job that this process belongs to ends, in seconds since 1970; None where SLURM does not say."""
    from launcher.slurm import cluster

    array = environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{environ.get('SLURM_ARRAY_TASK_ID')}" if array else environ.get("SLURM_JOB_ID")
    if not job:
        return None
    try:
        found = cluster.job(job, patience=10.0)
    except LauncherError:
        return None
    return None if found is None or found.limit is None else found.end


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if number > 0 and math.isfinite(number) else None
