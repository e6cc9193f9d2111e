"""What becomes of a training job that SLURM preempts, stops or loses: submitit's, Lightning's, Accelerate's, the
launcher's.

    python benchmarks/preemption.py --peers submitit,lightning,accelerate,launcher --python VENV/bin/python
    python benchmarks/preemption.py --markdown

A real cluster of two nodes on this machine (tests/slurm; it needs root and slurm-wlm), two CPU ranks, one on each
node, a tiny model. Each round is one (peer, process tracking, event): the job is submitted as that peer's
documentation says, the event comes when step 27 of 60 is done (the last periodic checkpoint is of step 20), and what
follows is read from a log that the job appends a line to after each step, from SLURM and from the nodes' processes.

How it is fair:
- Every peer trains the same model with the same optimizer on the same number of samples, and saves every 10 steps.
- The scripts in peers/ name the pages that they follow. What SLURM needs and a page leaves out is given to all
  (`--requeue`, `--open-mode=append`, a run directory that every start finds again).
- submitit and Lightning want a signal before the time limit, by default at 90 s. The limit here is one minute, so
  they get it at 5 s: SLURM's clock is so coarse that it comes some 30 s before the end.
- submitit's pages ask the site for `preempt_send_user_signal`: there are events with and without it.
- After the event the first start's steps take 2 s, so that it cannot finish within a grace time (10 s).

Python of the peers: `python3 -m venv VENV`, then pip install torch accelerate lightning submitit torchdata.
Results are kept after each round, and a round that is in the file is not repeated without --again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import numpy as np

QUESTION = "What does each setting of a site do to a preempted job: ours, and its peers'?"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SCRIPTS = HERE / "peers"
sys.path.append(str(ROOT))

from tests.slurm.lab import Lab  # noqa: E402 - it is not installed

STEPS, EVENT_STEP = 60, 27  # peers/common.py has them too; this Python may not be the peers'
GRACE = 10
LEAD = 5  # seconds before a time limit of one minute
PARTITIONS = "\n".join(
    f"PartitionName={name} Nodes=ALL DefaultTime=10 PriorityTier=1 PreemptMode={mode} GraceTime={grace}"
    for name, mode, grace in (
        ("requeue-now", "REQUEUE", 0),
        ("requeue-grace", "REQUEUE", GRACE),
        ("cancel-now", "CANCEL", 0),
        ("cancel-grace", "CANCEL", GRACE),
    )
)
TRACKS = ("cgroup", "linuxproc")
TERMINAL = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
}
SETTLED = 6  # seconds in a terminal state, after which nobody requeues any more
PATIENCE = 150  # seconds after the event
KEPT = {  # of a process's environment: nothing of a job or launcher that this runs in
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONPATH": str(SCRIPTS),
    "PYTHONDONTWRITEBYTECODE": "1",
}


@dataclass
class Round:
    """One job, and what happens to it."""

    lab: Lab
    peer: str
    event: Event
    directory: Path
    python: str
    """Of the peers."""
    job: str = ""

    @property
    def env(self) -> dict[str, str]:
        """What the job finds in its environment."""
        slow = {} if self.event.happens else {"PREEMPTION_SLOW": "0.2"}
        return KEPT | {"PREEMPTION_DIR": str(self.directory)} | slow

    @property
    def lead(self) -> int:
        """Seconds before the time limit at which a peer asks for its signal."""
        return LEAD if self.event.minutes == 1 else 90

    def lines(self, name: str) -> list[list[str]]:
        """The lines of a log that the job writes, in words; the last one may be half written."""
        path = self.directory / name
        text = path.read_text() if path.exists() else ""
        return [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def sbatch(self, body: str, **options: str) -> str:
        """Submit a batch script; returns the job's number."""
        given = {
            "job-name": self.peer,
            "nodes": "2",
            "ntasks-per-node": "1",
            "time": str(self.event.minutes),
            "partition": self.event.partition,
            "output": str(self.directory / "out.txt"),
            "open-mode": "append",
        } | options
        header = [f"#SBATCH --{key}={value}" for key, value in given.items()]
        script = self.directory / "job.sh"
        script.write_text("\n".join(["#!/bin/bash", *header, "#SBATCH --requeue", body, ""]))
        return self.lab.command("sbatch", "--parsable", script, cwd=self.directory, env=self.env).strip()


# The peers: each submits its job as its documentation says, and returns the job's number.


def submitit(round_: Round) -> str:
    """Submitted by its own executor, from Python."""
    command = [round_.python, SCRIPTS / "submitit_job.py", "--partition", round_.event.partition]
    command += ["--time", round_.event.minutes, "--signal-delay", round_.lead]
    return round_.lab.command(*map(str, command), cwd=round_.directory, env=round_.env).split()[-1]


def lightning(round_: Round) -> str:
    """The sbatch script of https://lightning.ai/docs/pytorch/stable/clouds/cluster_advanced.html."""
    body = f"export PYTHONFAULTHANDLER=1\nsrun {round_.python} {SCRIPTS / 'lightning_job.py'}"
    return round_.sbatch(body, signal=f"SIGUSR1@{round_.lead}")


def accelerate(round_: Round) -> str:
    """The sbatch script of Accelerate's examples/slurm/submit_multinode.sh.

    --multi_gpu stands for many processes on machines without GPUs too (with --cpu it starts one, or asks for MPI), and
    then asks for a machine's rank, which the example leaves out.
    """
    launch = [Path(round_.python).with_name("accelerate"), "launch", "--multi_gpu", "--num_processes", "$SLURM_NNODES"]
    launch += ["--num_machines", "$SLURM_NNODES", "--rdzv_backend", "c10d", "--main_process_ip", "$head_node_ip"]
    launch += ["--main_process_port", "29500", "--machine_rank", r"\$SLURM_PROCID"]
    body = f"""\
head_node_ip=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)
export ACCELERATE_USE_CPU=true
export LAUNCHER="{" ".join(map(str, launch))}"
export CMD="$LAUNCHER {SCRIPTS / "accelerate_job.py"}"
srun bash -c "exec $CMD"\n"""
    return round_.sbatch(body)


def launcher(round_: Round) -> str:
    """This project's own command, with this Python."""
    command = [sys.executable, "-m", "launcher", "submit", "--json", "--nodes", 2, "--gpus", 0, "--tasks", 1]
    command += ["--partition", round_.event.partition, "--time", round_.event.minutes]
    command += [SCRIPTS / "launcher_job.py", "--run.dir", round_.directory / "run", "--run.save-every", 10]
    paths = os.pathsep.join([str(ROOT), str(SCRIPTS)])
    env = round_.env | {"PYTHONPATH": paths}
    return str(json.loads(round_.lab.command(*map(str, command), cwd=round_.directory, env=env))["job"])


PEERS: dict[str, Callable[[Round], str]] = {
    "submitit": submitit,
    "lightning": lightning,
    "accelerate": accelerate,
    "launcher": launcher,
}


# The events


def nothing(_: Round) -> None:
    """The job is left alone, or its time runs out."""


def preempt(round_: Round) -> None:
    """Somebody with more priority wants both nodes for a moment."""
    round_.lab.submit("exec sleep 3", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null")


def requeue(round_: Round) -> None:
    """An administrator, or the job's owner, sends it back to the queue."""
    round_.lab.command("scontrol", "requeue", round_.job)


def crash(round_: Round) -> None:
    """The node without the batch script loses power, and has it again once SLURM has noticed."""
    round_.lab.crash("node2")
    round_.lab.wait_for(round_.job, lambda job: job["JobState"] not in ("RUNNING", "COMPLETING"), timeout=90)
    round_.lab.start("node2")


def kill_rank(round_: Round) -> None:
    """Out of memory, say: rank 1 is gone without a word."""
    node, pid = round_.lines("rank-1.txt")[-1]
    for host_pid, _ in round_.lab.processes(node):
        status = Path(f"/proc/{host_pid}/status").read_text()
        if re.search(rf"^NSpid:.*\b{pid}$", status, re.MULTILINE):
            os.kill(host_pid, signal.SIGKILL)
            return
    raise AssertionError(f"rank 1 is not process {pid} of {node}")


def cancel(round_: Round) -> None:
    """Its owner does not want it any more."""
    round_.lab.command("scancel", round_.job)


@dataclass(frozen=True)
class Event:
    """A kind of round."""

    said: str
    do: Callable[[Round], None]
    partition: str = "batch"
    minutes: int = 30
    signals: bool = False
    """Whether the site has preempt_send_user_signal."""
    comes_back: bool = True
    """Whether people want the job to go on."""

    @property
    def happens(self) -> bool:
        """Whether the job is disturbed at all."""
        return self.do is not nothing or self.minutes == 1


EVENTS = {
    "none": Event("undisturbed", nothing),
    "requeue-now": Event("preempted, REQUEUE, GraceTime=0", preempt, "requeue-now"),
    "requeue-grace": Event(f"preempted, REQUEUE, GraceTime={GRACE}", preempt, "requeue-grace"),
    "requeue-grace-signal": Event(
        f"preempted, REQUEUE, GraceTime={GRACE}, preempt_send_user_signal", preempt, "requeue-grace", signals=True
    ),
    "cancel-now": Event("preempted, CANCEL, GraceTime=0", preempt, "cancel-now"),
    "cancel-grace": Event(f"preempted, CANCEL, GraceTime={GRACE}", preempt, "cancel-grace"),
    "cancel-grace-signal": Event(
        f"preempted, CANCEL, GraceTime={GRACE}, preempt_send_user_signal", preempt, "cancel-grace", signals=True
    ),
    "time-limit": Event("time limit (--time=1)", nothing, minutes=1),
    "requeue": Event("scontrol requeue", requeue),
    "node-crash": Event("a node crashes", crash),
    "kill-rank": Event("SIGKILL of one rank", kill_rank),
    "scancel": Event("scancel by its owner", cancel, comes_back=False),
}


def play(round_: Round, reference: Path | None) -> dict[str, Any]:
    """Submit the job, let the event come, wait until nothing more comes of it, and look at what there is."""
    event = round_.event
    shutil.rmtree(round_.directory, ignore_errors=True)
    round_.directory.mkdir(parents=True)
    round_.job = PEERS[round_.peer](round_)
    deadline = time.monotonic() + 120
    while not any(int(step) >= EVENT_STEP for _, _, step in round_.lines("steps.txt")):
        state = round_.lab.job(round_.job)["JobState"]
        if time.monotonic() > deadline or state in TERMINAL:
            return {"error": f"{state} before the event", "last_words": last_words(round_.directory)}
        time.sleep(0.1)  # polling a file that the job writes
    began = time.time()
    event.do(round_)
    state = settle(round_)
    found = outcome(round_, state, reference)
    found["seconds_after_event"] = round(time.time() - began, 1)
    return found


def settle(round_: Round) -> str:
    """Wait until the job has been in a terminal state for a while; returns that, or what it hangs in."""
    deadline = time.monotonic() + PATIENCE
    since = None
    while time.monotonic() < deadline:
        job = round_.lab.job(round_.job)
        state = job["JobState"]
        if state in TERMINAL:
            since = since or time.monotonic()
            if time.monotonic() - since > SETTLED:
                return state
        elif "Held" in job.get("Reason", ""):
            return f"{state} ({job['Reason']})"
        else:
            since = None
        time.sleep(0.3)  # polling the controller
    return f"{state} for ever"


def outcome(round_: Round, state: str, reference: Path | None) -> dict[str, Any]:
    """What the logs, the files and the nodes say."""
    steps = [(float(when), int(start), int(step)) for when, start, step in round_.lines("steps.txt")]
    starts = [(float(when), int(resumed)) for when, _, resumed in round_.lines("starts.txt")]
    first = {start: min(when for when, of, _ in steps if of == start) for _, start, _ in steps}
    pauses = [
        first[start] - max(when for when, of, _ in steps if of < start and when < first[start])
        for start in sorted(first)
        if start > 0
    ]
    old = [step for when, start, step in steps if start + 1 in first and when > first[start + 1]]
    final = round_.directory / "final.npy"
    weights: dict[str, Any] = {"weights": None}
    if final.exists() and reference is not None:
        mine, theirs = np.load(final), np.load(reference)
        same = mine.tobytes() == theirs.tobytes()
        weights = {"weights": "identical" if same else "different"}
        weights |= {} if same else {"largest_difference": float(np.abs(mine - theirs).max())}
    return {
        "went_on": len(first) > 1,
        "finished": final.exists() and any(step == STEPS for _, _, step in steps),
        "starts": len(starts),
        "resumed_from": [resumed for _, resumed in starts],
        "steps_trained": len(steps),
        "steps_lost": len(steps) - len({step for _, _, step in steps}),
        "pause_s": [round(pause, 1) for pause in pauses],
        **weights,
        "steps_of_an_old_start_after_a_new_one": len(old),
        "orphans": orphans(round_.lab),
        "unfinished_files": unfinished(round_),
        "state": state,
        "last_words": last_words(round_.directory),
    }


def orphans(lab: Lab) -> list[str]:
    """What runs on the nodes although no job does; what is just ending gets three seconds."""
    deadline = time.monotonic() + 3
    while True:
        found = [line for node in lab.nodes for _, line in lab.processes(node)]
        if not found or time.monotonic() > deadline:
            return [re.sub(r"\S*/", "", line)[:80] for line in found]
        time.sleep(0.2)  # polling the nodes


def unfinished(round_: Round) -> list[str]:
    """Files of checkpoints that are not whole, by name."""
    command = [round_.python, SCRIPTS / "check.py", round_.directory]
    said = subprocess.run([*map(str, command)], env=os.environ | KEPT, capture_output=True, text=True)
    names: list[str] = json.loads(said.stdout) if said.returncode == 0 else [said.stderr.strip().splitlines()[-1]]
    partial = sorted(round_.directory.glob("run/checkpoints/*.partial-*"))
    return names + [path.name for path in partial]


def last_words(directory: Path) -> str:
    """The last line in the job's output that names an error."""
    outputs = [*directory.glob("out.txt"), *directory.glob("submitit/*.err"), *directory.glob("submitit/*.out")]
    outputs += [*directory.glob("run/slurm/*.out"), *directory.glob("run/logs/*.txt")]
    lines = [line for path in outputs for line in path.read_text(errors="replace").splitlines()]
    telling = [line for line in lines if re.search(r"^\w*(\.\w+)*(Error|Exception)\b|error:|Killed|slurmstepd", line)]
    return re.sub(r"/\S+/", "", telling[-1])[:200] if telling else ""


def versions(python: str) -> dict[str, str]:
    """What was compared."""
    names = ["torch", "accelerate", "lightning", "submitit", "torchdata"]
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    found: dict[str, str] = json.loads(subprocess.check_output([python, "-c", code], text=True))
    return found | {"slurm": subprocess.check_output(["slurmctld", "-V"], text=True).split()[-1]}


# The whole


def measure(options: argparse.Namespace) -> None:
    """Every round that is asked for and not there yet, one at a time; a cluster for each way a site may be set up."""
    result = json.loads(options.out.read_text()) if options.out.exists() else {"rounds": {}}
    settings = {"steps": STEPS, "event_after_step": EVENT_STEP, "save_every": 10, "grace_s": GRACE, "lead_s": LEAD}
    head = {"benchmark": "preemption", **machine.facts(), "settings": settings}
    head["versions"] = {"python": head["versions"]["python"], **versions(options.python)}
    rounds = result["rounds"]
    for track in options.tracks:
        for signals in (False, True):
            wanted = [
                (peer, name)
                for name in EVENTS
                for peer in options.peers
                if (name in options.events or name == "none")
                and EVENTS[name].signals is signals
                and (name != "none" or track == options.tracks[0])
                and needed(options, rounds, peer, track, name)
            ]
            if not wanted:
                continue
            extra = PARTITIONS + ("\nSlurmctldParameters=preempt_send_user_signal" if signals else "")
            lab = Lab(options.work / f"lab-{track}", track=track, extra=extra)
            try:
                lab.up()
                for peer, name in wanted:
                    directory = options.work / "rounds" / f"{peer}-{track}-{name}"
                    reference = final_of(options.work, peer) if name != "none" else None
                    began = time.monotonic()
                    try:
                        found = play(Round(lab, peer, EVENTS[name], directory, options.python), reference)
                    except AssertionError as error:  # the test bed's way to say that something did not come
                        found = {"error": str(error).splitlines()[0], "last_words": last_words(directory)}
                    took = time.monotonic() - began
                    if name == "none":
                        final_of(options.work, peer).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copy(directory / "final.npy", final_of(options.work, peer))
                    rounds.setdefault(peer, {}).setdefault(track, {})[name] = found
                    machine.write(options.out, head | {"rounds": rounds})
                    print(f"{took:5.0f} s  {peer} {track} {name}: {json.dumps(found)}", file=sys.stderr, flush=True)
                    lab.reset()
            finally:
                lab.down()


def needed(options: argparse.Namespace, rounds: dict[str, Any], peer: str, track: str, name: str) -> bool:
    """Whether a round must be played; an undisturbed one also where its weights are not there to compare with."""
    if name == "none" and final_of(options.work, peer).exists() and not (options.again and name in options.events):
        return False
    there = name in rounds.get(peer, {}).get(track, {})
    return options.again or not there or name == "none"


def final_of(work: Path, peer: str) -> Path:
    """The weights of a peer's undisturbed run."""
    return work / "undisturbed" / f"{peer}.npy"


def markdown(result: dict[str, Any]) -> str:
    """The table, for people; a cell tells whether it went on, the steps trained again, and the weights at the end."""
    peers = [peer for peer in PEERS if peer in result["rounds"]]
    lines = [f"| event | tracking | {' | '.join(peers)} |", "|---|---|" + "---|" * len(peers)]
    for name, event in EVENTS.items():
        by_track = {track: [cell(result, peer, track, name) for peer in peers] for track in TRACKS}
        there = {track: cells for track, cells in by_track.items() if any(cells)}
        alike = len(there) == len(TRACKS) and len({tuple(cells) for cells in there.values()}) == 1
        for track, cells in list(there.items())[: 1 if alike else None]:
            said = "both" if alike else track
            lines.append(f"| {event.said} | {said} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(result: dict[str, Any], peer: str, track: str, name: str) -> str:
    """One round, in a few words."""
    found = result["rounds"].get(peer, {}).get(track, {}).get(name)
    if found is None:
        return ""
    if "error" in found:
        return f"error: {found['error']}"
    if not EVENTS[name].happens:
        return "ends" if found["finished"] else f"does not end ({found['state']})"
    parts = []
    if not EVENTS[name].comes_back:
        parts.append("**comes back**" if found["went_on"] else "stays away")
    elif found["went_on"]:
        parts.append(f"goes on, {found['steps_lost']} steps lost")
    else:
        parts.append(f"**ends** ({found['state']})")
    if found["went_on"]:
        if not found["finished"]:
            parts.append(f"**does not finish** ({found['state']})")
        elif found["weights"] == "different":
            parts.append(f"**other weights** ({found['largest_difference']:.0e})")
        else:
            parts.append("same weights")
    if found["orphans"]:
        parts.append(f"**{len(found['orphans'])} orphans**")
    if found["unfinished_files"]:
        parts.append(f"**{len(found['unfinished_files'])} unfinished files**")
    if found["steps_of_an_old_start_after_a_new_one"]:
        parts.append("**two starts at once**")
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    place = machine.facts()["machine"]
    out = HERE / "results" / f"preemption-{machine.slug(place['cpu'])}-{place['cores']}-cores.json"
    names = lambda text: text.split(",")  # noqa: E731 - a type for argparse
    parser.add_argument("--peers", type=names, default=list(PEERS), help="with commas; default: all")
    parser.add_argument("--events", type=names, default=list(EVENTS), help="with commas; default: all")
    parser.add_argument("--tracks", type=names, default=list(TRACKS), help="process tracking: cgroup,linuxproc")
    parser.add_argument("--python", default=sys.executable, help="the Python that has the peers")
    parser.add_argument("--again", action="store_true", help="also what is in the result file")
    parser.add_argument("--work", type=Path, default=Path("/tmp/preemption"), help="short path: sockets lie in it")
    parser.add_argument("--out", type=Path, default=out, help="the result file")
    parser.add_argument("--markdown", action="store_true", help="print the table of the result file, and do no more")
    options = parser.parse_args()
    for given, known in ((options.peers, PEERS), (options.events, EVENTS), (options.tracks, TRACKS)):
        if unknown := set(given) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(known)}")
    if not options.markdown:
        measure(options)
    print(markdown(json.loads(options.out.read_text())))


if __name__ == "__main__":
    main()
