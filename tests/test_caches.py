"""Compile caches: kept in packs beside the runs, whole or not at all, and never a reason for a run to end."""

import json
import os
import re
import threading
import time
from pathlib import Path

import pytest

from launcher import caches, packs
from launcher.caches import open_caches
from launcher.packs import DamagedError, pack, unpack
from launcher.turns import Turns
from tests.harness import losses, status

ENTRIES = {"ab/cab.main.so": b"code" * 999, "fxgraph/ab/key/one": b"graph", "triton/0/K/k.cubin": b"cubin"}

RECIPE = """
import sys
from torch import nn
import torch
import launcher

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.two(self.one(x).relu())

def train(run: launcher.Run) -> None:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=draws)
    model = run.build(Net)
    optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for step in run.steps(run.loader((x,), batch_size=8, microbatch_size=4), total=3):
        for (x,) in step:
            step.backward(model(x).square().sum())
        optimizer.step()
        optimizer.zero_grad()

if __name__ == "__main__":
    launcher.main(train)
"""


@pytest.fixture(autouse=True)
def unset(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()


@pytest.fixture
def said():
    return []


@pytest.fixture
def opened(tmp_path, said):
    """A start's caches; its token is its own."""
    tokens = iter("abcdefgh")

    def open_(choice="auto", token=None):
        if (os.environ.get("TORCHINDUCTOR_CACHE_DIR") or "").startswith(str(tmp_path)):
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]  # another process's
        return open_caches(choice, tmp_path / "runs", "recipe", token or next(tokens), said.append)

    return open_


def compiled(entries=ENTRIES):
    """What inductor would leave."""
    root = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    for name, data in entries.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def found():
    root = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def kept(tmp_path):
    return sorted((tmp_path / "runs" / ".cache" / "compile").glob("*/*"))


def test_what_a_start_has_compiled_the_next_one_finds(opened, tmp_path, said):
    first = opened()
    compiled({**ENTRIES, "locks/x.lock": b"1", "ab/.123.tmp": b"half", "ab/y.so": b""})
    first.close()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert not list((tmp_path / "node").glob("*/*")), "nothing is left on the node"
    second = opened()
    assert found() == ENTRIES
    second.close()
    third = opened()
    compiled({"cd/new.so": b"more"})
    third.close()
    assert len(kept(tmp_path)) == 2, "only what is new is kept again"
    fourth = opened()
    assert found() == ENTRIES | {"cd/new.so": b"more"}
    fourth.close()
    assert said == []


def test_the_first_node_keeps_after_the_first_step_and_others_at_the_end(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "SETTLED", 0.0)
    one, two = opened(), opened()
    for each in (one, two):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(each._path)
        compiled()
    two.stepped(first_node=False)
    one.stepped(first_node=True)
    until = time.monotonic() + 10
    while not kept(tmp_path):
        assert time.monotonic() < until
        time.sleep(0.01)
    two.close()
    one.close()
    assert len(kept(tmp_path)) == 1


def test_ranks_of_a_node_share_a_directory_and_one_of_them_keeps(opened, tmp_path):
    one, two = opened(token="same"), opened(token="same")
    assert (one.keeps, two.keeps) == (True, False)
    assert one._path == two._path
    compiled()
    one.close()
    assert (tmp_path / "node").glob("*/same*"), "another rank is still using it"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(two._path)
    assert found() == ENTRIES
    two.close()
    assert not list((tmp_path / "node").glob("*/*"))
    assert len(kept(tmp_path)) == 1


@pytest.mark.parametrize("damage", ["cut", "flip", "noise", "empty"])
def test_a_damaged_pack_is_told_of_and_made_anew(opened, tmp_path, said, damage):
    first = opened()
    compiled()
    first.close()
    [path] = kept(tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[:-7], "flip": data, "noise": os.urandom(999), "empty": b""}[damage])
    second = opened()
    assert found() == {}
    assert len(said) == 1
    assert re.fullmatch(r"compile cache: .*\.pack is left out, .*: compiled anew", said[0])
    compiled()
    second.close()
    assert kept(tmp_path) == [path]
    third = opened()
    assert found() == ENTRIES
    third.close()


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../out", ""])
def test_a_pack_cannot_name_files_elsewhere(tmp_path, name):
    header = json.dumps({"files": [[name, 3]]}).encode() + b"\nabc"
    path = tmp_path / "x.pack"
    path.write_bytes(header + packs.xxhash.xxh3_128_digest(header))
    with pytest.raises(DamagedError, match="it names"):
        unpack(path, tmp_path / "root")
    assert not (tmp_path / "out").exists()


def test_a_pack_of_another_user_is_left_out(opened, tmp_path, said):
    first = opened()
    compiled()
    first.close()
    [path] = kept(tmp_path)
    path.chmod(0o666)
    second = opened()
    assert found() == {}
    assert "anybody may write it" in said[0]
    second.close()


def test_a_full_disk_leaves_nothing_half_and_is_told(opened, tmp_path, said, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    caches_ = opened()
    compiled()
    monkeypatch.setattr(packs.os, "fsync", full)
    caches_.close()
    assert kept(tmp_path) == []
    assert len(said) == 1
    assert said[0].endswith("No space left on device: nothing is kept for the next start")


def test_a_place_that_cannot_be_written_is_told(opened, tmp_path, said):
    (tmp_path / "file").touch()
    caches_ = opened(str(tmp_path / "file"))
    compiled()
    caches_.close()
    assert len(said) == 1
    assert "Not a directory: nothing is kept for the next start" in said[0]


def test_a_node_without_room_is_told(opened, said, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caches.os, "statvfs", full)
    assert opened() is None
    assert said == ["compile cache: " + said[0].split(": ")[1] + ": No space left on device: nothing is kept for the "
                    "next start"]  # fmt: skip
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_a_place_that_a_person_names_is_left_alone(opened, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    assert opened() is None
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"


def test_off_is_torchs_own(opened):
    assert opened("off") is None
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_what_killed_processes_left_goes_and_what_lives_stays(opened, tmp_path, monkeypatch):
    alive = opened()
    left = alive._node.parent / "left"
    left.mkdir()
    monkeypatch.setattr(caches, "STALE", -1.0)
    opened().close()
    assert not left.exists()
    assert alive._node.exists()
    alive.close()


def test_the_packs_beyond_the_bound_go_the_least_used_first(tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    store = tmp_path / "stores" / "key"
    for k, name in enumerate(("old", "middle", "new")):
        (root / name).write_bytes(bytes(1000))
        pack(root, [name], store, key="", about={})
        [path] = [path for path in store.iterdir() if packs.names(path) == [name]]
        os.utime(path, (k, k))
    monkeypatch.setattr(caches, "BOUND", 2500)
    caches._prune(store.parent)
    assert sorted(packs.names(path) for path in store.iterdir()) == [["middle"], ["new"]]


def test_two_ranks_compile_a_graph_once(tmp_path):
    """The second misses too, waits until the first has compiled, and finds it then."""
    cache, compiled_by, looked = {}, [], threading.Event()

    def rank(name):
        turns = Turns(tmp_path)

        def look_up(key):
            if name == "second":
                looked.set()
            return (cache.get(key), None)

        look_up_in_turn = turns.looking_up(look_up)

        def compile_graph(key):
            if look_up_in_turn(key)[0] is None:
                if name == "first":
                    began.set()
                    assert looked.wait(10)
                compiled_by.append(name)
                cache[key] = name
            return cache[key]

        results.append(turns.compiling(compile_graph)("graph"))
        assert turns._held is None

    results, began = [], threading.Event()
    first = threading.Thread(target=rank, args=("first",))
    first.start()
    assert began.wait(10)
    second = threading.Thread(target=rank, args=("second",))
    second.start()
    first.join(10)
    second.join(10)
    assert results == ["first", "first"]
    assert compiled_by == ["first"]


def test_a_turn_is_waited_for_only_so_long_and_given_back_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("launcher.turns.PATIENCE", 0.0)
    holder, other = Turns(tmp_path), Turns(tmp_path)
    assert holder.take("graph") is False
    assert other.take("graph") is True, "compiles too"
    other.give_back()
    assert other.take("another") is False
    other.give_back()

    def broken():
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        holder.compiling(broken)()
    assert holder._held is None


def test_a_second_start_compiles_nothing_and_learns_the_same(start, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    said = []
    for name in ("cold", "warm"):
        directory = tmp_path / "runs" / name
        options = ["--run.compile", "default", "--run.log-every", 1, "--run.dir", directory]
        said.append(start(2, recipe, *options).ok())
        told = status(directory)["startup"]
        assert told["compile"] > 0
        assert sum(told.values()) == pytest.approx(2 * told["total"], abs=0.02)
    assert losses(tmp_path / "runs" / "cold") == losses(tmp_path / "runs" / "warm")
    hits, graphs = re.search(r"compile [\d.]+ \((\d+) of (\d+) graphs from the cache\)", said[1]).groups()
    assert hits == graphs, said[1]
    assert len(kept(tmp_path)) == 1
