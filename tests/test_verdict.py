"""The verdict on a start of a run, from the files that it has left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time as clock
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from launcher import cgroup, kernel, witness
from launcher.errors import CheckpointError, LauncherError, NumbersError
from launcher.evidence import read_evidence
from launcher.failure import KINDS, kind_of
from launcher.stacks import Place
from launcher.verdict import judge, judged, of_one
from launcher.world import World

ROOT = Path(__file__).parent.parent


class Scene:
    """The files of one start."""

    def __init__(self, path: Path, world_size: int = 4, *, attempt: int = 1, hosts: tuple[str, ...] = (), **settings):
        self.path, self.attempt = path, attempt
        hosts = hosts or ("alpha",) * world_size
        self.write("started.json", {"world_size": world_size, "started": time(0)})
        self.write("config.json", {"microbatch_size": 8, "run": {"workers": 0}, **settings})
        for rank, host in enumerate(hosts):
            kills = {"/sys/fs/cgroup/a/b": 1}
            self.write(f"rank-{rank:05d}.json", {"host": host, "pid": 2**22 + rank, "oom_kills": kills})
        self.hosts = hosts

    def write(self, name: str, value: Any) -> Scene:
        file = self.path / "attempts" / str(self.attempt) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(value if isinstance(value, str) else json.dumps(value))
        return self

    def error(self, rank: int, second: float, kind: str = "code", message: str = "bad", **facts: Any) -> Scene:
        """A rank says why it fails."""
        said = {"rank": rank, "host": self.hosts[rank], "time": time(second), "step": 7, "kind": kind}
        said |= {"type": "ValueError" if kind != "peer" else "RuntimeError", "message": message, **facts}
        return self.write(f"error-{rank:05d}.json", said).exit(rank, "failed")

    def peers(self, *ranks: int, **facts: Any) -> Scene:
        for rank in ranks:
            self.error(rank, 0.5 * rank, "peer", "Connection closed by peer", **facts)
        return self

    def exit(self, rank: int, status: str, reason: str = "", step: int | None = 7, **facts: Any) -> Scene:
        said = {"status": status, "reason": reason, "step": step, "host": self.hosts[rank], "time": time(9), **facts}
        return self.write(f"exit-{rank:05d}.json", said)

    def marked(self, rank: int, kind: str, error: str) -> Scene:
        said = {"rank": rank, "step": 7, "error": error, "kind": kind, "retry": KINDS[kind], "time": time(3)}
        return self.write("failed", {**said, "host": self.hosts[rank]})

    def codes(self, **codes: int) -> Scene:
        return self.write("codes.json", {"codes": {name.removeprefix("rank"): code for name, code in codes.items()}})

    def log(self, rank: int, text: str) -> Scene:
        file = self.path / "logs" / f"rank-{rank:05d}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"--- attempt 0\nFatal Python error: of an older start\n--- attempt {self.attempt}\n{text}")
        return self

    def checkpoint(self, step: int) -> Scene:
        (self.path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        return self


def time(second: float) -> str:
    return datetime.fromtimestamp(1_700_000_000 + second, UTC).isoformat(timespec="milliseconds")


CRASH = (
    "Fatal Python error: Aborted\n\nCurrent thread 0x1 (most recent call first):\n"
    '  File "/home/me/r.py", line 3 in train\n'
)
WHAT = (
    "terminate called after throwing an instance of 'gloo::EnforceNotMet'\n"
    "  what():  [enforce fail at /x/pair.cc:1] op.preamble.length <= op.nbytes. 8 vs 4\n"
)
OOM = {"oom_kills": {"/sys/fs/cgroup/a/b": 2}}
CALLS = [{"group": "0", "backend": "gloo", "ranks": [0, 1, 2, 3], "enqueued": 1, "completed": 0}]


PLACE = {"path": "/x/r.py", "line": 4, "function": "train"}


def called(elements: int) -> dict[str, Any]:
    return {"collectives": [{**CALLS[0], "calls": [[1, "all_reduce", elements]]}]}


# Of each: what is there; the rank, the kind, and what the paragraph begins with and holds.
CASES = {
    "one fails, the others follow": (
        lambda scene: scene.peers(0, 1, 3).error(2, 5.0),
        *(2, "code", "rank 2 failed first at step 7: ValueError: bad. 3 ranks then lost their peer."),
        "A code error: it will fail the same way again.",
    ),
    "of two errors the earlier": (
        lambda scene: scene.error(3, 1.0, message="first").error(1, 2.0, message="second").peers(0),
        *(3, "code", "rank 3 failed first at step 7: ValueError: first. Rank 1 failed too, with ValueError: second"),
        "1 rank left no word",
    ),
    "all alike": (
        lambda scene: [scene.error(rank, rank) for rank in range(4)],
        *(0, "code", "all 4 ranks failed at step 7: ValueError: bad. A code error"),
        "",
    ),
    "an error of its own, and others that are gone": (
        lambda scene: scene.error(1, 1.0).codes(rank3=-15),
        *(1, "code", "rank 1 failed first"),
        "3 ranks left no word",
    ),
    "no word, by its exit code": (
        lambda scene: scene.peers(0, 1).codes(rank2=-15, rank3=-9),
        *(3, "killed", "rank 3 was killed by SIGKILL at step 7. 2 ranks then lost their peer, 1 rank left no word."),
        "another start may go better",
    ),
    "no word, and no code": (
        lambda scene: scene.peers(0, 1, 3),
        *(2, "killed", "rank 2 ended without a word at step 7. 3 ranks then lost their peer."),
        "Killed from outside, crashed, or gone with its machine: another start may go better.",
    ),
    "no word, and code 0": (
        lambda scene: scene.peers(0, 1, 3).codes(rank2=0),
        *(2, "killed", "rank 2 left without a word, with exit code 0 (os._exit?) at step 7."),
        "",
    ),
    "killed for its memory, as a peer has seen": (
        lambda scene: scene.peers(0, 1, 3, **OOM).codes(rank2=-9),
        *(2, "killed", "rank 2 was killed by the kernel because the host's memory was used up (out of memory in /sys/"),
        "Most likely to help: --microbatch-size 4 (now 8) and --run.activation-checkpointing full.",
    ),
    "not for memory: another signal": (
        lambda scene: scene.peers(0, 1, 3, **OOM).codes(rank2=-15),
        *(2, "killed", "rank 2 was killed by SIGTERM at step 7."),
        "",
    ),
    "a crash": (
        lambda scene: scene.peers(0, 1, 3).codes(rank2=-6).log(2, CRASH),
        *(2, "killed", "rank 2 crashed in native code (SIGABRT) at step 7 (/home/me/r.py:3 in train)."),
        "",
    ),
    "a crash in a collective": (
        lambda scene: scene.peers(0, 1).exit(3, "failed", "SIGTERM, after ...").log(2, WHAT + CRASH),
        *(2, "code", "rank 2 failed first at step 7: crashed in native code (Aborted): op.preamble.length <= "),
        "2 ranks then lost their peer, 1 rank was stopped. A code error",
    ),
    "the odd one in a collective, stopped where it stood": (
        lambda scene: scene.peers(0, 1, **called(8)).exit(3, "failed", "SIGTERM", **called(9), place=PLACE),
        *(3, "code", "rank 3 failed first at step 7: called all_reduce of 9 elements (/x/r.py:4 in train) where 2"),
        "2 ranks then lost their peer, 1 rank left no word.",
    ),
    "the odd one in a collective": (
        lambda scene: scene.peers(0, 1, **called(8)).peers(3, **called(9)).codes(rank2=-6),
        *(3, "code", "rank 3 failed first at step 7: called all_reduce of 9 elements where 2 others called "),
        "",
    ),
    "peers alone": (
        lambda scene: scene.peers(0, 1, 2, 3),
        *(0, "peer", "all 4 ranks failed at step 7: RuntimeError: Connection closed by peer."),
        "look at the network",
    ),
    "nobody has a word": (
        lambda _: None,
        *(0, "killed", "all 4 ranks have ended without a word before its first step."),
        "",
    ),
    "a hang": (
        lambda scene: (
            [scene.exit(r, "failed", "the run hangs") for r in range(4)] and scene.marked(1, "hang", "rank 1 w")
        ),
        *(1, "hang", "the run hung at step 7: rank 1 w. A hang: another start may go better."),
        "",
    ),
    "a hang of the code's making": (
        lambda scene: scene.peers(0, 2, 3).marked(1, "hang", "x: a collective that not every rank makes, or"),
        *(1, "hang", "the run hung at step 7: x"),
        "The code makes it: it will hang again.",
    ),
    "numbers": (
        lambda scene: [
            scene.error(r, r, "numbers", "step 8: the loss is nan on rank 2 (samples 1)", launcher=True)
            for r in range(4)
        ],
        *(2, "numbers", "all 4 ranks failed: step 8: the loss is nan on rank 2 (samples 1). Bad numbers"),
        "",
    ),
    "data": (
        lambda scene: scene.error(1, 1, "data", data={"loader": "loader_1", "what": "sample 5"}).peers(0, 2, 3),
        *(1, "data", "rank 1 failed first"),
        "A data error (sample 5 of loader 'loader_1'): it will come again with the same data.",
    ),
    "a disk": (
        lambda scene: scene.error(1, 1, "disk", path="/data/x").peers(0, 2, 3),
        *(1, "disk", "rank 1 failed first"),
        "The disk takes no more (/data/x): make room",
    ),
    "memory of a GPU": (
        lambda scene: scene.error(
            *(0, 1, "memory"),
            memory={"device": "cuda", "allocated": 70 * 10**9, "reserved": 75 * 10**9, "limit": 80 * 10**9},
        ),
        *(0, "memory", "rank 0 failed first"),
        "Out of memory: torch had allocated 70.0 GB (reserved 75.0 GB) of the GPU's 80.0 GB. Most likely to help: "
        "--microbatch-size 4 (now 8) and --run.activation-checkpointing full.",
    ),
    "memory before the first step": (
        lambda scene: scene.error(0, 1, "memory", step=None, memory={"device": "cuda"}),
        *(0, "memory", "rank 0 failed first before its first step"),
        "Most likely to help: --run.shard full and --run.precision bf16.",
    ),
    "stopped": (
        lambda scene: (
            [scene.exit(r, "preempted", "SIGTERM" if r == 2 else "another rank") for r in range(4)]
            and scene.checkpoint(7)
        ),
        *(None, "stopped", "stopped by SIGTERM at step 7 and saved; run it again to go on"),
        "",
    ),
    "stopped before it could save": (
        lambda scene: [scene.exit(r, "cancelled", "a second SIGINT", None) for r in range(4)],
        *(None, "stopped", "cancelled by a second SIGINT without a save; run it again to go on"),
        "",
    ),
    "finished": (
        lambda scene: [scene.exit(rank, "finished") for rank in range(4)],
        *(None, "finished", "finished at step 7"),
        "",
    ),
    "left, and nobody says why": (
        lambda scene: [scene.exit(rank, "failed") for rank in range(4)],
        *(None, "unknown", "ended at step 7, and no rank has said why."),
        "",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_who_was_first_and_why(tmp_path, name):
    make, rank, kind, begins, holds = CASES[name]
    make(Scene(tmp_path))
    found = judged(tmp_path)
    assert found.text.startswith(begins), found.text
    assert holds in found.text
    assert (found.rank, found.kind) == (rank, kind)
    assert found.retry == (kind == "stopped" or KINDS.get(kind, False))


def test_a_lost_node(tmp_path):
    scene = Scene(tmp_path, hosts=("alpha", "alpha", "beta", "beta")).peers(0, 1)
    found = judged(tmp_path)
    assert (found.kind, found.host) == ("lost", "beta")
    assert found.text == ("beta was lost with 2 ranks at step 7. A lost node: another start may go better.")
    scene.codes(rank3=-9)  # one of two that are gone on the same host
    scene.exit(2, "failed")
    assert judged(tmp_path).text.startswith("rank 3 on beta was killed by SIGKILL at step 7.")


def test_under_slurm(tmp_path):
    scene = Scene(tmp_path)
    said = {"world_size": 4, "started": time(0), "environment": {"SLURM_JOB_ID": "55"}}
    scene.write("started.json", said).peers(0, 1, 2).checkpoint(5)
    (tmp_path / "slurm").mkdir()
    old = "launcher: 2026-01-01 job 55 start 0 on n: x\nsrun: error: n: task 1: Killed\n"
    new = "launcher: 2026-01-02 job 55 start 1 on n: x\nsrun: error: n: tasks 3,5-9: Out Of Memory\n"
    (tmp_path / "slurm" / "55.out").write_text(old + new)
    found = judged(tmp_path)
    assert found.text.startswith(
        "rank 3 on alpha was killed by the kernel because the host's memory was used up (Out Of"
    )
    assert found.text.endswith("The newest checkpoint is of step 5.")
    for said, told in (("Killed", "was killed by SIGKILL"), ("Segmentation fault (core dumped)", "by SIGSEGV at")):
        (tmp_path / "slurm" / "55.out").write_text(old + new.replace("Out Of Memory", said))
        assert told in judged(tmp_path).text
    scene.error(3, 4.0)
    assert " it will fail the same way again, so it is not retried." in judged(tmp_path).text
    for rank in range(4):
        (tmp_path / f"attempts/1/error-{rank:05d}.json").unlink()
    (tmp_path / "slurm" / "verdict").write_text("cancelled: by a person\n")
    assert judged(tmp_path).text == "cancelled: by a person at step 7."


def test_twice_the_same(tmp_path):
    place = {"path": "/home/me/r.py", "line": 3, "function": "train", "source": "x = 1"}
    Scene(tmp_path, 1).error(0, 1.0, message="shapes", place=place)
    Scene(tmp_path, 1, attempt=2).error(0, 9.0, message="shapes", place=place)
    found = judged(tmp_path)
    assert found.text == (
        "the run failed at step 7: ValueError: shapes (/home/me/r.py:3 in train: `x = 1`). A code error: it will fail "
        "the same way again. The start before it ended alike, at the same step."
    )
    Scene(tmp_path, 1, attempt=3).error(0, 9.0, message="other")
    assert "ended alike" not in judged(tmp_path).text


def test_what_others_wrote_cannot_play_with_the_terminal(tmp_path):
    Scene(tmp_path, 1).error(0, 1.0, message="a\x1b[2J\n  b" + "x" * 1000)
    text = judged(tmp_path).text
    assert "a\\x1b[2J b" in text
    assert text.isprintable()
    assert len(text) < 600


def test_broken_files_stop_nobody(tmp_path):
    assert judged(tmp_path).kind == "unknown"
    scene = Scene(tmp_path)
    for name in ("failed", "error-00000.json", "exit-00001.json", "rank-00002.json", "codes.json", "config.json"):
        for text in (
            "",
            "[]",
            "{",
            '{"rank": "x", "time": 3, "step": -1, "codes": [], "place": 1, "memory": 2}',
            "[" * 9999,
        ):
            scene.write(name, text)
            assert judged(tmp_path).text
    for name in ("started.json", "error-00000.json", "failed"):
        path = tmp_path / "attempts" / "1" / name
        path.unlink()
        os.mkfifo(path)  # which a reader would wait at
    assert judged(tmp_path).text


def test_what_a_full_disk_has_not_taken_is_read_beside_it(tmp_path):
    Scene(tmp_path / "run").write("failed", "")
    beside = Scene(tmp_path / "room").error(1, 1.0, "disk").path / "attempts" / "1"
    assert judge(read_evidence(tmp_path / "run", 1)).text.startswith("the run failed") is False
    found = judged(tmp_path / "run", 1, beside)
    assert (found.rank, found.kind) == (1, "disk")


def test_the_command(tmp_path):
    Scene(tmp_path).error(2, 1.0)
    command = [sys.executable, "-X", "importtime", "-m", "launcher.verdict", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith("launcher: rank 2 failed first at step 7: ValueError: bad.")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "accelerate"}


# ---- what a rank says ----


def caught(raising: Any) -> Exception:
    try:
        raising()
    except Exception as error:
        return error
    raise AssertionError


def said(error: Exception) -> dict[str, Any]:
    facts = witness.witness(error, kind_of(error), world=World(), step=3)
    return json.loads(json.dumps(facts))


def test_an_exceptions_place_is_in_the_persons_own_file():
    def own() -> None:
        torch.nn.Linear(2, 3)(torch.ones(4))

    facts = said(caught(own))
    assert (facts["type"], facts["kind"], facts["step"]) == ("RuntimeError", "code", 3)
    assert facts["place"] == {
        "path": __file__,
        "line": own.__code__.co_firstlineno + 1,
        "function": "own",
        "source": "torch.nn.Linear(2, 3)(torch.ones(4))",
    }
    assert facts["traceback"].startswith("Traceback (most recent call last):\n")
    assert "in forward" in facts["traceback"]


class Broken(Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        error = KeyError(f"no {index}")
        error.add_note(f"(launcher: sample {index} of loader 'it')")
        raise error


def test_an_exception_out_of_a_data_worker():
    facts = said(caught(lambda: list(DataLoader(Broken(), num_workers=1))))
    assert (facts["type"], facts["message"], facts["kind"]) == ("KeyError", "'no 0'", "data")
    assert facts["data"] == {"loader": "it", "what": "sample 0"}
    assert facts["place"]["function"] == "__getitem__"
    assert "Caught KeyError in DataLoader worker process 0" in facts["traceback"]


def test_memory_is_counted():
    facts = said(MemoryError())
    assert facts["kind"] == "memory"
    assert facts["memory"]["device"] == "cpu"
    assert 10**7 < facts["memory"]["allocated"] < facts["memory"]["limit"]
    assert "Out of memory: the rank held " in of_one(facts, 4).text


def test_an_error_of_the_launchers_is_told_as_it_is():
    facts = said(caught(lambda: refuse(NumbersError("step 4: nan on rank 0"))))
    assert (facts["launcher"], facts["kind"]) == (True, "numbers")
    assert of_one(facts, 2).text.startswith("rank 0 failed first: step 4: nan on rank 0. Bad numbers")


def refuse(error: LauncherError) -> None:
    raise error


def test_a_ranks_facts():
    facts = witness.about(World(rank=3, world_size=4, local_rank=1))
    assert {"rank": 3, "local_rank": 1, "pid": os.getpid()}.items() <= facts.items()


def test_the_agents_table(tmp_path, monkeypatch):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    failures, before = {}, clock.time() - 3  # the first to fail may be slow to tell
    for rank, failed_at in ((0, None), (1, before)):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank)))
        witness.told_to_agent(f"rank {rank} it was", failed_at=failed_at)
        failures[rank] = ProcessFailure(rank, 1, 1, str(tmp_path / str(rank)))
    text = str(ChildFailedError("r.py", failures))
    assert "traceback : rank 1 it was" in text.partition("Root Cause")[2]


def test_only_the_recipes_frames_are_shown():
    error = caught(lambda: refuse(CheckpointError("x")))
    frames = traceback.extract_tb(witness.recipes_part(error.__traceback__))
    assert frames[0].filename == __file__


# ---- what the kernel says ----


@pytest.mark.parametrize(
    ("lines", "where", "files"),
    [
        (
            "0::/a/b\n",
            "a/b",
            {"memory.events": "low 0\noom_kill 2\n", "memory.max": "5000\n", "memory.current": "40\n"},
        ),
        (
            *("4:memory:/a/b\n3:cpu:/\n0::/\n", "memory/a/b"),
            {
                "memory.oom_control": "under_oom 0\noom_kill 2\n",
                "memory.limit_in_bytes": "5000\n",
                "memory.usage_in_bytes": "40\n",
            },
        ),
    ],
)
def test_control_groups(tmp_path, lines, where, files):
    (tmp_path / "proc").write_text(lines)
    group = tmp_path / where
    group.mkdir(parents=True)
    for name, text in files.items():
        (group / name).write_text(text)
        (group.parent / name).write_text("max\n" if "max" in name else str(2**63 - 4096) if "limit" in name else text)
    found = cgroup.groups(tmp_path / "proc", tmp_path)
    assert found == [group, group.parent]
    assert cgroup.kills(found) == {str(group): 2, str(group.parent): 2}
    assert cgroup.limit(found) == 5000
    assert cgroup.used(found) == 40


def test_control_groups_that_cannot_be_seen(tmp_path):
    assert cgroup.groups(tmp_path / "none", tmp_path) == []
    (tmp_path / "proc").write_text("0::/elsewhere\n")
    assert cgroup.groups(tmp_path / "proc", tmp_path) == []
    assert (cgroup.kills([]), cgroup.limit([]), cgroup.used([])) == ({}, None, None)


def test_the_kernels_log(tmp_path):
    log = tmp_path / "kmsg"
    log.write_text("6,1,2;Out of memory: Killed process 77 (python) total-vm:9kB\n")
    assert kernel.killed_for_memory(77, log) == "Killed process 77 (python) total-vm:9kB"
    assert kernel.killed_for_memory(7, log) == ""
    assert kernel.killed_for_memory(7, tmp_path / "none") == ""


def test_signals_have_names():
    from launcher.verdict import _signal

    assert [_signal(code) for code in (-signal.SIGKILL, 0, 1, None, -34)] == ["SIGKILL", "", "", "", "SIGRTMIN"]
    assert Place("/x", 1, "f").source == ""
