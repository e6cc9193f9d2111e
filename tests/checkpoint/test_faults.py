"""Real disks that fill up, ranks that fail: one line on every rank, older checkpoints untouched, nothing half left."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from samples import same, sample

from launcher.checkpoint import Retention, State, Store, load, save
from launcher.errors import CheckpointError
from launcher.world import World


def test_a_fault_on_one_rank_is_everybodys(tmp_path: Path) -> None:
    run_ranks(2, "faults", tmp_path, tmp_path / "checkpoints")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(tiny_disk: Path) -> None:
    store = Store(tiny_disk / "checkpoints", Retention(1))
    small, large = (State({"w": sample("w", (count,))}) for count in (300_000, 800_000))
    good = save(store, World(), 1, small, attempt=1)
    with pytest.raises(CheckpointError, match=r"step-00000002 could not be saved: .*No space left on device") as caught:
        save(store, World(), 2, large, attempt=1)
    assert "\n" not in str(caught.value)
    assert [path.name for path in store.root.iterdir()] == [good.name]
    live = State({"w": torch.zeros(300_000)})
    load(good, World(), live)
    assert same(live.tensors["w"], small.tensors["w"])
    save(store, World(), 3, small, attempt=1)
    assert store.steps() == [3]


def test_a_place_where_no_directory_can_be(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match=r"step-00000001 could not be saved: .*checkpoints: File exists"):
        save(Store(tmp_path / "checkpoints"), World(), 1, State(), attempt=1)


def test_a_directory_removed_underneath(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "checkpoints")
    save(store, World(), 1, State(), attempt=1)
    begin = Store.begin

    def removed(self: Store, step: int, attempt: int) -> Path:
        partial = begin(self, step, attempt)
        partial.rmdir()
        return partial

    monkeypatch.setattr(Store, "begin", removed)
    with pytest.raises(CheckpointError, match=r"node-00000-of-00001\.safetensors: No such file or directory"):
        save(store, World(), 2, State(), attempt=1)
    assert store.steps() == [1]
