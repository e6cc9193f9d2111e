"""The writer's thread and the loop share a buffer: never at the same time."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from samples import same, sample

from launcher.checkpoint import State, Store, Writer, load, saving
from launcher.world import World


def test_memory_that_is_being_written_is_not_made_warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a run saves at its first edge, and gets ready for later saves after its first step."""
    reached, go = threading.Event(), threading.Event()
    write_part = saving.write_part

    def held(*arguments: object) -> object:
        reached.set()
        assert go.wait(60)
        return write_part(*arguments)

    monkeypatch.setattr(saving, "write_part", held)
    writer = Writer(Store(tmp_path / "checkpoints"), World(), attempt=1)
    tensors = {"w": sample("w", (1000, 100))}
    writer.start(1, State(tensors))
    assert reached.wait(60)
    writer.prepare(State(tensors | {"moment": sample("m", (1000, 50))}), warm=True)
    writer.wait(0.2)
    go.set()
    assert writer.wait(60)
    assert writer.outcome is not None
    assert writer.outcome.path is not None, writer.outcome.error
    live = State({"w": torch.zeros(1000, 100)})
    load(writer.outcome.path, World(), live)
    assert same(live.tensors["w"], tensors["w"])
