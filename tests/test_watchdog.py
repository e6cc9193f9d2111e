"""When no progress is a hang, and which rank the others wait for."""

import ctypes
import math
import os
import threading
import time

import pytest

from launcher.clock import Clock
from launcher.config import RunConfig
from launcher.errors import UsageError
from launcher.hang import Standing, judge
from launcher.stacks import Place, data_wait, main_stack, places, read_places
from launcher.watchdog import FIRST, LONG, STEP, Idle, Pulse, Watchdog, limit


class TestLimit:
    @pytest.mark.parametrize(
        ("phase", "auto", "given"),
        [
            ("start", math.inf, math.inf),
            ("restore", LONG, 30),
            ("first step", FIRST, 30),
            ("step", STEP, 3),
            ("scoring", STEP, 3),
            ("evaluation", LONG, 30),
            ("save", LONG, 30),
            ("end", LONG, 30),
        ],
    )
    def test_of_each_phase(self, phase, auto, given):
        clock = Clock({})
        assert limit(phase, "auto", clock, compiled=False) == auto
        assert limit(phase, 3, clock, compiled=False) == given
        assert limit(phase, "off", clock, compiled=False) == math.inf

    def test_grows_with_what_the_run_has_seen(self):
        clock = Clock({}, save_seconds=500)
        clock.step_seconds = 100
        clock.evaluated(400)
        assert limit("step", "auto", clock, compiled=False) == 1000
        assert limit("step", 3, clock, compiled=False) == 3
        assert limit("evaluation", "auto", clock, compiled=False) == 4000
        assert limit("save", "auto", clock, compiled=False) == 5000
        assert limit("first step", "auto", clock, compiled=False) == FIRST

    def test_leaves_time_to_compile_anew(self):
        assert limit("step", "auto", Clock({}), compiled=True) == LONG

    @pytest.mark.parametrize("name", ["hang_after", "join_within"])
    @pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
    def test_refuses_what_is_no_time(self, name, value):
        with pytest.raises(UsageError, match=f"--run.{name.replace('_', '-')} .*seconds above 0"):
            RunConfig(**{name: value})


class TestIdle:
    def test_counts_from_the_last_beat(self):
        idle = Idle(1.0, now=0)
        assert [idle.look(beats, now) for now, beats in enumerate([5, 5, 5, 6, 6], 1)] == [0, 1, 2, 0, 1]

    def test_a_suspended_job_has_not_hung(self):
        idle = Idle(1.0, now=0)
        idle.look(1, 1)
        idle.look(1, 2)
        assert idle.look(1, 5000) == 3

    def test_a_phase_within_another(self):
        pulse = Pulse()
        pulse.enter("step")
        with pulse.during("evaluation"):
            assert pulse.phase == "evaluation"
        assert pulse.phase == "step"
        assert pulse.beats == 3


RECIPE, TORCH = "/home/me/recipe.py", "/venv/site-packages/torch/distributed/distributed_c10d.py"


def standing(rank, *calls, ended=None, own=10, waits=False, members=None, **more):
    """A rank's file; `calls` are the collectives that it has made, all but the last one of those that have ended."""
    ended = len(calls) if ended is None else ended
    group = {
        **{"group": "0", "backend": "gloo", "ranks": members, "enqueued": len(calls), "completed": ended},
        "calls": [[number, *call.split()] for number, call in enumerate(calls, 1)],
    }
    for call in group["calls"]:
        call[2:] = [int(call[2])] if len(call) > 2 else [None]
    inner = {"path": TORCH if waits else RECIPE, "line": own, "function": "wait" if waits else "train"}
    where = {"own": {"path": RECIPE, "line": own, "function": "train"}, "inner": inner}
    return {
        **{"rank": rank, "host": f"node{rank // 2}", "step": 7, "phase": "step", "seconds": 12.0, "where": where},
        **{"collectives": [group] if calls else [], **more},
    }


def judged(*facts, world_size=4, **more):
    return judge({one["rank"]: Standing.read(one) for one in facts}, world_size, **more)


REDUCE = ["all_reduce 4"] * 3


class TestJudgement:
    def test_behind_in_a_collective(self):
        waiting = [standing(rank, *REDUCE, ended=2, waits=True) for rank in (0, 1, 3)]
        found = judged(*waiting, standing(2, *REDUCE[:2], own=33))
        assert (found.rank, found.host, found.step) == (2, "node1", 7)
        assert found.sentence == (
            "rank 2 on node1 has stood for 12 s at /home/me/recipe.py:33 in train; "
            "3 ranks wait for it in all_reduce (number 3 of gloo group 0)"
        )

    def test_of_two_behind_the_one_that_waits_for_nobody(self):
        first = standing(0, *REDUCE, ended=2, waits=True)
        other = {"group": "3", "backend": "gloo", "ranks": [1, 2], "enqueued": 1, "completed": 0, "calls": []}
        second = standing(1, *REDUCE[:2], waits=True)
        second["collectives"].append(other)
        assert judged(first, second, standing(2, *REDUCE[:2]), world_size=3).rank == 2

    def test_an_extra_collective(self):
        usual = [standing(rank, *REDUCE, ended=2, waits=True) for rank in (0, 2, 3)]
        found = judged(*usual, standing(1, *REDUCE[:2], "barrier", ended=2, waits=True, own=21))
        assert found.rank == 1
        assert found.sentence.startswith(
            "rank 1 on node0 called barrier (/home/me/recipe.py:21 in train) where 3 other"
        )
        assert "as number 3 of gloo group 0" in found.sentence

    def test_the_same_collective_of_another_size(self):
        usual = [standing(rank, *REDUCE, ended=2, waits=True) for rank in range(3)]
        found = judged(*usual, standing(3, *REDUCE[:2], "all_reduce 5", ended=2, waits=True))
        assert found.rank == 3
        assert "called all_reduce of 5 elements" in found.sentence
        assert "called all_reduce of 4 elements" in found.sentence

    def test_calls_of_unequal_length_that_may_be_so(self):
        facts = [standing(rank, "all_gather", "all_gather", ended=1, waits=True) for rank in range(4)]
        assert "does not end: look at the network" in judged(*facts).sentence

    def test_other_groups_of_the_same_name_are_not_compared(self):
        pairs = [
            standing(0, "all_reduce 4", members=[0, 1], ended=0, waits=True),
            standing(1, "all_reduce 4", members=[0, 1], ended=0, waits=True),
            standing(2, "barrier", members=[2, 3], ended=0, waits=True),
            standing(3, members=[2, 3]),
        ]
        assert judged(*pairs).rank == 3

    def test_a_rank_that_says_nothing(self):
        waiting = [standing(rank, *REDUCE, ended=2, waits=True) for rank in (0, 1, 2)]
        found = judged(*waiting, hosts=["a", "a", "b", "b"])
        assert (found.rank, found.host, found.step) == (3, "b", 7)
        assert found.sentence == (
            "rank 3 on b gives no sign of life: stopped, frozen, or its node gone; 3 ranks wait for it in all_reduce"
        )

    def test_a_node_that_says_nothing(self):
        found = judged(standing(0), standing(1), hosts=["a", "a", "b", "b"])
        assert found.sentence.startswith("ranks 2-3 on b give no sign of life: that node is gone or stopped")

    def test_native_code_that_holds_the_lock(self):
        stack = (
            "Timeout (0:00:03)!\nThread 0x01 (most recent call first):\n"
            '  File "/usr/lib/python3.11/threading.py", line 1 in wait\n\nThread 0x02 (most recent call first):\n'
            f'  File "{RECIPE}", line 5 in hold\n  File "{RECIPE}", line 40 in train\n'
        )
        found = judged(standing(0), world_size=2, stacks={1: stack})
        assert found.rank == 1
        assert found.sentence.startswith(
            "rank 1 is in native code that holds Python's lock at /home/me/recipe.py:5 in hold"
        )

    def test_data_that_does_not_come(self):
        data = {"loader": "text", "worker": 4711, "worker_at": "recipe.py:3 in __getitem__"}
        found = judged(standing(0, *REDUCE, ended=2, waits=True), standing(1, *REDUCE[:2], data=data), world_size=2)
        assert found.rank == 1
        assert (
            "has waited 12 s for the next micro-batch of loader 'text', from worker process 4711 at recipe.py:3 in "
            "__getitem__; 1 rank waits for it"
        ) in found.sentence

    def test_without_a_recorder_the_stacks_decide(self):
        found = judged(standing(0, waits=True), standing(1, own=50), world_size=2)
        assert found.rank == 1
        assert found.sentence.endswith("recipe.py:50 in train; 1 rank waits in a collective")

    def test_nobody_waits(self):
        assert judged(standing(0), standing(1), world_size=2).sentence.endswith("no rank waits in a collective")
        assert judged(standing(0), world_size=1).sentence.endswith("recipe.py:10 in train")

    def test_a_line_of_code_is_shown(self, tmp_path):
        path = tmp_path / "recipe.py"
        path.write_text("def train(run):\n    time.sleep(600)\n")
        own = {"path": str(path), "line": 2, "function": "train"}
        facts = {"rank": 0, "where": {"own": own, "inner": own}}
        assert judged(facts, world_size=1).sentence.endswith("recipe.py:2 in train: `time.sleep(600)`")


class TestStacks:
    def test_where_this_thread_stands(self):
        own, inner = places(main_stack())
        assert own is not None
        assert own.path == __file__
        assert own.function == "test_where_this_thread_stands"
        assert inner.function == "main_stack"
        assert data_wait(main_stack()) is None

    def test_no_code_is_known(self):
        assert read_places("") == (None, None)
        assert read_places('Thread 1:\n  File "<string>", line 1 in <module>\n') == (
            None,
            Place("<string>", 1, "<module>"),
        )


class TestThread:
    """The thread itself, with a run that only stands."""

    class Run:
        rank, world_size, completed, clock, pulse = 0, 1, 3, Clock({}), Pulse()
        world = type("World", (), {"world_size": 1, "hosts": ()})

        def __init__(self, hang_after):
            self.config = RunConfig(hang_after=hang_after, compile="off")

    def watch(self, tmp_path, hang_after):
        from launcher.rundir import RunDir

        (tmp_path / "attempts" / "1").mkdir(parents=True)
        told: list = []
        happened = threading.Event()
        dog = Watchdog(self.Run(hang_after), RunDir(tmp_path), 1, lambda found: (told.append(found), happened.set()))
        return dog, told, happened

    @pytest.mark.parametrize("hang_after", ["auto", "off"])
    def test_a_single_process_is_not_watched_unless_asked(self, tmp_path, hang_after):
        dog, _, _ = self.watch(tmp_path, hang_after)
        assert not [thread for thread in threading.enumerate() if thread.name == "launcher-watchdog"]
        dog.stop()

    def test_tells_and_writes_down(self, tmp_path):
        self.Run.pulse.enter("step")
        dog, told, happened = self.watch(tmp_path, 0.2)
        assert happened.wait(30)
        dog.stop()
        [found] = told
        assert (found.rank, found.step) == (0, 3)
        names = {path.name for path in (tmp_path / "attempts" / "1").iterdir()}
        assert names == {"hang-00000.json", "stacks-00000.txt"}
        assert "test_tells_and_writes_down" in (tmp_path / "attempts" / "1" / "stacks-00000.txt").read_text()

    def test_a_lock_that_was_held_for_long_is_forgotten(self, tmp_path, monkeypatch):
        truncate, forgotten = os.ftruncate, []

        def noting(fd, length):
            forgotten.append(os.fstat(fd).st_size)
            truncate(fd, length)

        monkeypatch.setattr(os, "ftruncate", noting)
        self.Run.pulse.enter("step")
        dog, told, _ = self.watch(tmp_path, 0.4)
        stacks = tmp_path / "attempts" / "1" / "stacks-00000.txt"
        deadline = time.monotonic() + 30
        while not stacks.exists() and time.monotonic() < deadline:
            self.Run.pulse.beats += 1
            time.sleep(0.01)
        ctypes.PyDLL(None).usleep(800_000)  # native code that keeps Python's lock
        while not forgotten and time.monotonic() < deadline:
            self.Run.pulse.beats += 1
            time.sleep(0.01)
        dog.stop()
        assert len(forgotten) == 1
        assert forgotten[0] > 0
        assert not told
        assert not list((tmp_path / "attempts" / "1").iterdir())

    def test_is_quiet_where_there_is_progress_and_leaves_nothing(self, tmp_path):
        self.Run.pulse.enter("step")
        dog, told, _ = self.watch(tmp_path, 0.4)
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            self.Run.pulse.beats += 1
            time.sleep(0.01)
        dog.stop()
        assert not told
        assert not list((tmp_path / "attempts" / "1").iterdir())
