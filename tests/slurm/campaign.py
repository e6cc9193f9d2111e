"""The long campaign: every kind of round, several times, under every setting of a site. Run by hand:

    python -m tests.slurm.campaign                   everything that the result file does not hold yet
    python -m tests.slurm.campaign --rounds 1 --settings linuxproc --kinds 'node crash'

A setting is the process tracking (cgroup, as most clusters; linuxproc) and whether there is accounting (slurmdbd). In
the first one twenty rounds of a kind are played, in the others three; of what must not be requeued ten. Rounds that do
not disturb each other are played at once. A round that fails is written down, shown, and tried again the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import machine
from tests.harness import Ranks, status
from tests.slurm.lab import Lab, why_not
from tests.slurm.rounds import KINDS, Round, left_behind, straight

QUESTION = "Does a job on a real SLURM go on, or end, as it should, whatever happens to it?"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SETTINGS = {
    "cgroup": {"track": "cgroup"},
    "linuxproc": {"track": "linuxproc"},
    "cgroup slurmdbd": {"track": "cgroup", "accounting": True},
    "linuxproc slurmdbd": {"track": "linuxproc", "accounting": True},
}
AT_ONCE = 3  # rounds that are played together
# What happens here happens to all runs of the cluster at once.
TO_ALL = ("preemption", "preemption with grace", "preemption that cancels", "node crash", "slurmctld restart", "drain")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the result file")
    parser.add_argument("--rounds", type=int, help="rounds of each kind, whatever the setting")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no round after so long")
    options = parser.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    facts = machine.facts()
    where = facts["machine"]
    out = options.out or RESULTS / f"slurm-{machine.slug(where['cpu'])}-{where['cores']}-cores.json"
    results = json.loads(out.read_text()) if out.exists() else {**facts, "rounds": []}
    campaign = Campaign(results, out, time.monotonic() + options.seconds)
    for setting in options.settings:
        wanted = {kind: options.rounds or rounds_of(setting, kind) for kind in options.kinds}
        campaign.play(setting, wanted)
    print(markdown(results))
    return int(campaign.failed)


def rounds_of(setting: str, kind: str) -> int:
    """How often a kind is played."""
    if KINDS[kind].loses is None or kind == "finished":
        return 10 if setting == "cgroup" else 3
    return 20 if setting == "cgroup" else 3


class Campaign:
    """Plays what is missing in `results`, which are written after every round."""

    def __init__(self, results: dict[str, Any], out: Path, deadline: float) -> None:
        self.results, self.out, self.deadline = results, out, deadline
        self.failed = False
        self.straight: dict[int, Path] = {}

    def play(self, setting: str, wanted: dict[str, int]) -> None:
        """All rounds of a setting."""
        done = Counter(r["kind"] for r in self.results["rounds"] if r["setting"] == setting and r["held"])
        missing = {kind: number - done[kind] for kind, number in wanted.items() if number > done[kind]}
        if not missing or time.monotonic() > self.deadline:
            return
        with tempfile.TemporaryDirectory(prefix="campaign-") as directory:
            path = Path(directory)
            for steps in {KINDS[kind].steps for kind in missing} - self.straight.keys():
                self.straight[steps] = self._straight(steps)
            lab = Lab(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"), **SETTINGS[setting])
            try:
                lab.up()
                for kind, number in missing.items():
                    self._kind(lab, path, setting, kind, number)
            finally:
                lab.down()

    def _kind(self, lab: Lab, path: Path, setting: str, kind: str, number: int) -> None:
        for first in range(0, number, AT_ONCE):
            if time.monotonic() > self.deadline:
                return
            seeds = [time.time_ns() + k for k in range(min(AT_ONCE, number - first))]
            rounds = [Round(lab, path / str(seed) / "run", kind, seed) for seed in seeds]
            begun = time.monotonic()
            with ThreadPoolExecutor(AT_ONCE) as pool:
                outcomes = list(pool.map(lambda one: one.start(), rounds)) and self._strike(pool, rounds, kind)
            left = left_behind(lab)
            for one, seed, outcome in zip(rounds, seeds, outcomes, strict=True):
                if "missed" in outcome:
                    continue
                facts = {"setting": setting, "kind": kind, "seed": seed, **outcome}
                facts |= {"held": False, "left": left} if left else {}
                facts["seconds"] = round(time.monotonic() - begun, 1)
                self.failed |= not facts["held"]
                self.results["rounds"].append(facts)
                print(facts, file=sys.stderr, flush=True)
                if not facts["held"]:
                    print(one.told(), lab.logs(), sep="\n", file=sys.stderr, flush=True)
            machine.write(self.out, self.results)
            lab.reset()

    def _strike(self, pool: ThreadPoolExecutor, rounds: list[Round], kind: str) -> list[dict[str, Any]]:
        if kind in TO_ALL:
            list(pool.map(Round.ready, rounds))
            rounds[0].kind.strike(rounds[0])
        else:
            list(pool.map(Round.strike, rounds))
        return list(pool.map(self._end, rounds))

    def _end(self, one: Round) -> dict[str, Any]:
        try:
            facts = one.end()
            if one.kind.loses is not None:
                one.compare(self.straight[one.kind.steps])
            return {**facts, "held": True}
        except Exception as error:
            if one.kind.restarts and status(one.path)["status"] == "finished" and status(one.path)["attempt"] == 1:
                return {"missed": True}  # on a busy machine it was over before it happened
            traceback.print_exc()
            return {"held": False, "error": str(error).splitlines()[0]}

    def _straight(self, steps: int) -> Path:
        path = Path(tempfile.mkdtemp(prefix="straight-"))
        jobs = []

        def start(*arguments: Any) -> Ranks:
            jobs.append(Ranks(*arguments, cwd=path))
            return jobs[-1]

        try:
            return straight(start, path / "run", steps)
        finally:
            for job in jobs:
                job.close()


def markdown(results: dict[str, Any]) -> str:
    """The results as Markdown: rounds that held of rounds played, and the most steps that a start trained again."""
    settings = list(dict.fromkeys(r["setting"] for r in results["rounds"]))
    lines = ["| what happens | " + " | ".join(settings) + " | steps trained twice, at most |"]
    lines.append("|---" * (len(settings) + 2) + "|")
    for kind in KINDS:
        rows = [r for r in results["rounds"] if r["kind"] == kind]
        cells = []
        for setting in settings:
            here = [r["held"] for r in rows if r["setting"] == setting]
            cells.append(f"{sum(here)} of {len(here)}" if here else "")
        most = max((lost for r in rows for lost in r.get("lost", ())), default=0)
        if rows:
            lines.append(f"| {kind} | " + " | ".join(cells) + f" | {most} |")
    return "\n".join(lines)


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    sys.exit(main())
