"""Real ranks on gloo: 2 -> 1 -> 4 -> 1 processes, plain (DDP) <-> FSDP2 <-> HSDP, bit for bit."""

from __future__ import annotations

from pathlib import Path

import scenarios
from ranks import run_ranks

from launcher.checkpoint import Store, read_index, save, verify
from launcher.world import World


def test_any_world_size_and_sharding_into_any_other(tmp_path: Path) -> None:
    run_ranks(2, "save_two_ways", tmp_path, tmp_path)
    for source in ("plain", "fsdp"):
        state = scenarios.check(World(), Store(tmp_path / source).path(3), scenarios.plain(), 2)
    save(Store(tmp_path / "one"), World(), 3, state, attempt=1)
    run_ranks(4, "reshard", tmp_path, tmp_path)
    for source in ("four-plain", "four-fsdp", "four-hsdp"):
        path = Store(tmp_path / source).path(3)
        scenarios.check(World(), path, scenarios.plain(), 4)
        verify(path)
    spec = read_index(path).tensors["model/large.weight"]
    assert (spec.mesh, spec.placements) == ((2, 2), ("R", "S(0)"))


def test_there_and_back_bit_for_bit(tmp_path: Path) -> None:
    """2 -> 1 -> 4 -> 2 processes, DDP -> FSDP2 -> HSDP -> FSDP2 -> DDP: the tensors are those that were saved first."""
    run_ranks(2, "save_two_ways", tmp_path, tmp_path)
    way = [("plain", 1, "fsdp2"), ("on-1", 4, "hsdp"), ("on-4", 2, "fsdp2"), ("on-2", 2, "ddp")]
    for number, (source, world_size, layout) in enumerate(way):
        target = f"on-{world_size}" if number < 3 else "back"
        (tmp_path / str(number)).mkdir()
        run_ranks(world_size, "onwards", tmp_path / str(number), tmp_path / source, tmp_path / target, layout)
    first, last = (Store(tmp_path / name).path(3) for name in ("plain", "back"))
    assert read_index(first).tensors == read_index(last).tensors
    assert [part for _, part in read_index(first).parts] == [part for _, part in read_index(last).parts], "digests"
