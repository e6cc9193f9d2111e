"""A checkpoint exists once its directory has its final name: whatever is killed, old, stale or in the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import HERE, environment
from samples import same, sample

from launcher.checkpoint import Retention, State, Store, load, save, verify
from launcher.errors import CheckpointError, UsageError
from launcher.world import World

WORLD = World()


def state(step: int, kind: str = "") -> State:
    return State({"w": sample(f"{kind}{step}", (5, 4))}, values={"kind": kind})


def holds(path: Path, step: int, kind: str = "") -> bool:
    """Whether a checkpoint is sound and the one that `state(step, kind)` was saved as."""
    verify(path)
    live = State({"w": torch.zeros(5, 4)})
    index = load(path, WORLD, live)
    return (
        index.step == step
        and index.values == {"kind": kind}
        and same(live.tensors["w"], sample(f"{kind}{step}", (5, 4)))
    )


def names(store: Store) -> set[str]:
    return {path.name for path in store.root.iterdir()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def test_the_last_ones_are_kept(root: Path) -> None:
    store = Store(root, Retention(2))
    assert (store.steps(), store.newest()) == ([], None)
    for step in (5, 10, 9, 123_456_789):
        save(store, WORLD, step, state(step), attempt=1)
    assert store.steps() == [10, 123_456_789]
    assert names(store) == {"step-00000010", "step-123456789"}
    assert store.newest() == store.path(123_456_789) == root / "step-123456789"


def test_what_was_just_saved_is_never_pruned(root: Path) -> None:
    """As when a run goes on from an older checkpoint than its newest."""
    store = Store(root, Retention(2))
    for step in (800, 1000, 500):
        save(store, WORLD, step, state(step), attempt=1)
    assert store.steps() == [500, 800, 1000]


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_nothing_is_refused(root: Path, keep: int) -> None:
    with pytest.raises(UsageError, match="would keep no checkpoint"):
        Store(root, Retention(keep))


def test_leftovers_and_strangers_are_no_checkpoints(root: Path) -> None:
    store = Store(root)
    for name in [
        "step-00000007.partial-1",
        "step-00000007.pruned",
        "step-7",
        "step-000000007",
        "step-00000007x",
        "tmp",
    ]:
        (root / name).mkdir(parents=True)
    (root / "step-00000008").write_text("a file")
    (root / "step-00000009").symlink_to(root / "tmp")
    assert (store.steps(), store.newest()) == ([], None)


def test_a_saved_step_is_replaced(root: Path) -> None:
    store = Store(root)
    save(store, WORLD, 40, state(40, "old"), attempt=1)
    path = save(store, WORLD, 40, state(40, "new"), attempt=1)
    assert holds(path, 40, "new")
    assert names(store) == {"step-00000040"}


def test_a_replaced_checkpoint_counts_until_the_new_one_has_its_name(root: Path) -> None:
    store = Store(root)
    save(store, WORLD, 40, state(40, "old"), attempt=1).rename(root / "step-00000040.replaced")
    assert store.steps() == [40]
    assert store.newest() == store.path(40) == root / "step-00000040.replaced"
    assert holds(store.path(40), 40, "old")
    save(store, WORLD, 41, state(41), attempt=2)
    assert names(store) == {"step-00000040", "step-00000041"}
    assert holds(store.path(40), 40, "old")
    assert holds(save(store, WORLD, 40, state(40, "new"), attempt=2), 40, "new")
    assert names(store) == {"step-00000040", "step-00000041"}


def test_leftovers_of_older_attempts_go_and_those_of_newer_ones_stay(root: Path) -> None:
    for attempt in (1, 2, 3, 10):
        (root / f"step-00000007.partial-{attempt}").mkdir(parents=True)
        (root / f"step-00000007.partial-{attempt}" / "node-00000-of-00001.safetensors").write_text("half")
    (root / "step-00000006.pruned").mkdir()
    store = Store(root)
    assert holds(save(store, WORLD, 7, state(7), attempt=2), 7)
    assert names(store) == {"step-00000007", "step-00000007.partial-3", "step-00000007.partial-10"}


def test_a_stale_attempt_neither_publishes_nor_prunes(root: Path) -> None:
    current = 1
    store = Store(root, Retention(1), attempt_is_current=lambda attempt: attempt == current)
    good = save(store, WORLD, 10, state(10), attempt=1)
    partial = store.begin(20, 1)
    current = 2
    for stale in (
        lambda: store.publish(partial, 1),
        lambda: store.prune(1),
        lambda: store.begin(30, 1),
        lambda: save(store, WORLD, 30, state(30), attempt=1),
    ):
        with pytest.raises(CheckpointError, match="attempt 1 of this run has been replaced by a newer one"):
            stale()
        assert store.steps() == [10]
        assert holds(good, 10)
    save(store, WORLD, 20, state(20), attempt=2)
    assert names(store) == {"step-00000020"}


def test_an_attempt_that_is_replaced_while_it_writes_does_not_publish(root: Path) -> None:
    answers = iter([True, False])
    store = Store(root, attempt_is_current=lambda attempt: next(answers))
    with pytest.raises(
        CheckpointError, match="step-00000010 could not be saved: attempt 1 of this run has been replaced"
    ):
        save(store, WORLD, 10, state(10), attempt=1)
    assert names(store) == set()


@pytest.mark.parametrize("kept", [1, 2])
def test_what_cannot_be_removed_is_told_and_does_not_stop_the_run(
    root: Path, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(root, Retention(kept))
    for step in range(kept):
        save(store, WORLD, step, state(step), attempt=1)

    def busy(path: Path) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", busy)
        with pytest.warns(UserWarning, match="step-00000000 could not be removed: Device or resource busy"):
            save(store, WORLD, 7, state(7), attempt=1)
    assert store.steps() == [*range(1, kept), 7]
    save(store, WORLD, 8, state(8), attempt=1)
    assert names(store) == {f"step-{step:08d}" for step in (7, 8)[-kept:]}


def test_a_damaged_one_is_set_aside_and_never_written_over(root: Path) -> None:
    store = Store(root)
    for kind, aside in (("first", "step-00000007.bad"), ("second", "step-00000007.bad-2")):
        assert store.set_aside(save(store, WORLD, 7, state(7, kind), attempt=1)) == root / aside
    assert (store.steps(), store.newest()) == ([], None)
    assert [path.name for path in store.bad()] == ["step-00000007.bad", "step-00000007.bad-2"]
    save(store, WORLD, 8, state(8), attempt=9)
    assert holds(root / "step-00000007.bad", 7, "first")
    assert holds(root / "step-00000007.bad-2", 7, "second")


def test_the_former_one_stays_until_the_new_one_is_verified(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(root)
    save(store, WORLD, 7, state(7, "old"), attempt=1)
    publish = Store.publish

    def torn(self: Store, partial: Path, attempt: int) -> Path:
        path = publish(self, partial, attempt)
        [file] = path.glob("node-*")
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        return path

    with monkeypatch.context() as patch:
        patch.setattr(Store, "publish", torn)
        with pytest.raises(CheckpointError, match=r"cannot be read back .* it is .*step-00000007\.bad now"):
            save(store, WORLD, 7, state(7, "new"), attempt=1)
    assert holds(store.path(7), 7, "old")
    save(store, WORLD, 9, state(9), attempt=1)
    assert holds(root / "step-00000007", 7, "old")
    assert (root / "step-00000007.bad").is_dir()


class Killed(BaseException):
    """Nothing of the code can catch it, so nothing is done after it: what a SIGKILL leaves."""


def test_killed_at_any_moment_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving a new step and saving one again, ended before each call that changes the disk in turn."""
    calls = ("mkdir", "open", "write", "fsync", "rename", "rmdir", "unlink")
    kills = 0
    for again in (False, True):
        for moment in range(100):
            store = Store(tmp_path / f"{again}-{moment}", Retention(2))
            for step in (1, 2, 3):
                save(store, WORLD, step, state(step, "old"), attempt=1)
            step = 3 if again else 4
            with monkeypatch.context() as patch:
                left = iter(range(moment))
                for call in calls:
                    patch.setattr(os, call, killing(getattr(os, call), left))
                try:
                    save(store, WORLD, step, state(step, "new"), attempt=2)
                    finished = True
                except Killed:
                    finished = False
                    kills += 1
            newest = store.newest()
            assert newest is not None
            assert holds(newest, step, "new") or (not finished and holds(newest, 3, "old"))
            assert 2 <= len(store.steps()) <= 3
            assert all(verify(store.path(step)) for step in store.steps())
            save(store, WORLD, 5, state(5), attempt=3)
            former = {"step-00000003.replaced"} if again else set()  # of a new one that was not verified in time
            assert names(store) - former == {f"step-{step:08d}" for step in store.steps()}
            assert store.steps() in ([3, 5], [4, 5])
            if finished:
                break
        assert finished
    assert kills > 30


def killing(call: object, left: object) -> object:
    def wrapper(*arguments: object, **options: object) -> object:
        if next(left, None) is None:
            raise Killed
        return call(*arguments, **options)

    return wrapper


SAVING = """
import sys, torch
from pathlib import Path
from launcher.checkpoint import Retention, State, Store, save
from launcher.world import World
store = Store(Path(sys.argv[1]), Retention(2))
for step in range(1, 10**6):
    save(store, World(), step, State({"w": torch.full((1 << 20,), float(step))}), attempt=1)
    print(step, flush=True)
"""


def test_a_killed_process_loses_at_most_the_save_it_was_in(root: Path) -> None:
    """A real SIGKILL, in the midst of writing."""
    child = subprocess.Popen([sys.executable, "-c", SAVING, root], stdout=subprocess.PIPE, env=environment(), cwd=HERE)
    assert child.stdout is not None
    for step in range(1, 6):
        assert child.stdout.readline().split() == [str(step).encode()]
    while not any(root.glob("step-*.partial-1/node-*")):
        time.sleep(0.001)  # it is saving all the time
    child.send_signal(signal.SIGKILL)
    done = [int(line) for line in child.stdout.read().split()]
    child.wait()
    child.stdout.close()
    store = Store(root, Retention(2))
    newest = store.newest()
    assert newest is not None
    index = verify(newest)
    assert index.step in (last := max([5, *done]), last + 1)
    live = torch.zeros(1 << 20)
    load(newest, WORLD, State({"w": live}))
    assert torch.equal(live, torch.full((1 << 20,), float(index.step)))
    save(store, WORLD, index.step + 1, State({"w": live}), attempt=2)
    assert names(store) == {f"step-{step:08d}" for step in (index.step, index.step + 1)}
