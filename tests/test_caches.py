"""Compile caches: kept in packs beside the runs, whole or not at all, and never a reason for a run to end."""

import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from launcher import caches, packs
from launcher.caches import check_choice, open_caches
from launcher.errors import UsageError
from launcher.packs import DamagedError, pack, unpack
from launcher.turns import Turns
from tests.harness import losses, status

# its table of sections has 2 x 64 bytes and begins at 900
LIBRARY = b"\x7fELF\x02\x01".ljust(40, b"\0") + struct.pack("<Q10xHHH", 900, 64, 2, 1) + b"code" * 241
ENTRIES = {"ab/cab.main.so": LIBRARY, "fxgraph/ab/key/one": b"graph", "triton/0/K/k.cubin": b"cubin"}

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
    compiled({"cd/new.py": b"more"})
    third.close()
    assert len(kept(tmp_path)) == 2, "only what is new is kept again"
    fourth = opened()
    assert found() == ENTRIES | {"cd/new.py": b"more"}
    fourth.close()
    assert said == []


def test_the_first_node_keeps_after_the_first_step_and_others_at_the_end(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "SETTLED", 0.0)
    monkeypatch.setattr(caches, "WRITTEN", 0.0)
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


def test_half_a_library_is_never_kept(opened, tmp_path):
    """The linker fills the file first, and writes its head and its table of sections last."""
    library, store = tmp_path / "whole.so", tmp_path / "store"
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", library], input=b"int f() { return 1; }", check=True
    )
    data = library.read_bytes()
    assert not packs._is_cut_off("x.so", data)
    assert all(packs._is_cut_off("x.so", data[:size]) for size in range(len(data)))
    (tmp_path / "half.so").write_bytes(data[: len(data) // 2])
    (tmp_path / "headless.so").write_bytes(bytes(64) + data[64:])
    (tmp_path / "half.cubin").write_bytes(data[:-1])
    files = ["whole.so", "half.so", "headless.so", "half.cubin"]
    assert pack(tmp_path, files, store, key="", about={}) == ("whole.so",)


def test_a_pack_with_half_a_library_is_made_anew(opened, tmp_path, said, monkeypatch):
    first = opened()
    compiled({**ENTRIES, "ab/cab.main.so": LIBRARY[:500]})
    with monkeypatch.context() as before:
        before.setattr(packs, "_is_cut_off", lambda *_: False)  # as they were written once
        first.close()
    second = opened()
    assert found() == {}
    assert "it holds half of 'ab/cab.main.so': compiled anew" in said[0]
    second.close()
    assert kept(tmp_path) == []


def test_what_was_just_written_is_kept_at_the_end(opened, tmp_path):
    """Beside the training another graph may be being compiled."""
    caches_ = opened()
    compiled({"ab/old.py": b"old", "ab/new.py": b"new"})
    ago = time.time() - 2 * caches.WRITTEN
    os.utime(caches_._path / "ab/old.py", (ago, ago))
    caches_._keep(caches.WRITTEN)
    assert [packs.names(path) for path in kept(tmp_path)] == [["ab/old.py"]]
    caches_.close()
    assert sorted(packs.names(path) for path in kept(tmp_path)) == [["ab/new.py"], ["ab/old.py"]]


def test_a_cache_larger_than_a_pack_is_kept_in_several_and_found_whole(opened, monkeypatch, tmp_path):
    monkeypatch.setattr(packs, "LIMIT", 25_000)
    monkeypatch.setattr(caches, "STAGED", 100_000)
    entries = {f"d{k}/key.bin": os.urandom(4000) for k in range(20)}
    first = opened()
    compiled(entries)
    first.close()
    assert len(kept(tmp_path)) == 4
    second = opened()
    assert found() == entries
    second.close()


def test_a_store_beyond_the_bound_of_staging_keeps_what_is_compiled_anew(opened, monkeypatch, tmp_path, said):
    """The newest that fit are staged; what an old pack holds counts for nothing until it is the newest again."""
    monkeypatch.setattr(caches, "STAGED", 10_000)
    entries = [{"a": bytes(6000)}, {"b": bytes(9000)}, {"c": bytes(2000)}]
    times = {}
    for k, entry in enumerate(entries):
        each = opened()
        compiled(entry)
        each.close()
        [path] = set(kept(tmp_path)) - set(times)
        times[path] = k
        for path, when in times.items():
            os.utime(path, (when, when))
    start = opened()
    assert found() == entries[0] | entries[2], "the middle one is too large, and the older one is not"
    compiled(entries[1])
    start.close()
    assert set(kept(tmp_path)) == set(times), "an equal pack is there: it is the newest now"
    start = opened()
    assert found() == entries[1]
    compiled({**entries[0], "d": b"new"})
    start.close()
    assert ["a", "d"] in [packs.names(path) for path in kept(tmp_path)]
    assert said == []


def packed(path, header, body):
    """A pack as somebody else may have made it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    data = (header if isinstance(header, bytes) else json.dumps({"files": header}).encode()) + b"\n" + body
    path.write_bytes(data + packs.xxhash.xxh3_128_digest(data))
    path.chmod(0o600)


NAMES = ["../out", "/tmp/out", "a/../../out", "", ".", "a//b", "a\0b", "a\ud800b", "a" * 256, "a/" + "é" * 128]


@pytest.mark.parametrize("name", NAMES)
def test_a_pack_cannot_name_files_elsewhere_or_none(tmp_path, name):
    path = tmp_path / "x.pack"
    packed(path, [[name, 3]], b"abc")
    with pytest.raises(DamagedError, match="it names"):
        unpack(path, tmp_path / "root")
    with pytest.raises(DamagedError, match="it names"):
        packs.names(path)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "root").exists()


LISTS = {
    "none": b"[1, 2]",
    "deep": b"[" * 100_000,
    "endless": b'{"files": [["a", Infinity]]}',
    "half": [["a", 3.5]],
    "boolean": [["a", True], ["b", 2]],
    "negative": [["a", -5], ["b", 8]],
    "more": [["a", 100]],
    "less": [["a", 2]],
    "a number": [[1, 3]],
    "twice": [["a", 2], ["a", 1]],
    "folder": [["a/b/c", 2], ["a/b", 1]],
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_pack_whose_list_cannot_be_is_made_anew(opened, tmp_path, said, kind):
    path = tmp_path / "runs" / ".cache" / "compile" / caches._key("recipe") / "x.pack"
    packed(path, LISTS[kind], b"abc")
    with pytest.raises(DamagedError):
        packs.names(path)
    start = opened()
    assert found() == {}
    assert len(said) == 1
    assert re.fullmatch(r"compile cache: .*x\.pack is left out, it.*: compiled anew", said[0])
    assert not path.exists()
    start.close()


def test_a_file_that_no_pack_may_hold_is_not_kept(opened, tmp_path, said):
    first = opened()
    compiled({"ab/k.py": b"kernel", os.fsdecode(b"ab/\xff.py"): b"other"})
    first.close()
    second = opened()
    assert found() == {"ab/k.py": b"kernel"}
    second.close()
    assert said == []


@pytest.mark.parametrize("whose", ["anybody's", "another user's"])
def test_a_pack_that_is_not_this_users_alone_is_passed_over(opened, tmp_path, said, whose, monkeypatch):
    first = opened()
    compiled()
    first.close()
    [path] = kept(tmp_path)
    if whose == "anybody's":
        path.chmod(0o666)
    else:
        fstat = os.fstat
        monkeypatch.setattr(packs.os, "fstat", lambda file: _of(fstat(file), os.geteuid() + 1))
    second = opened()
    assert found() == {}
    assert len(said) == 1
    assert re.fullmatch(r"compile cache: .*\.pack is passed over, (it belongs|anybody may) .*: compiled anew", said[0])
    second.close()
    assert kept(tmp_path) == [path]


def _of(about, user):
    return os.stat_result([*about[:4], user, *about[5:10]])


def test_a_pack_is_its_owners_alone_whatever_the_umask(opened, tmp_path):
    before = os.umask(0)
    try:
        caches_ = opened()
        compiled()
        caches_.close()
    finally:
        os.umask(before)
    [path] = kept(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_killed_writers_left_goes_at_the_next_start_and_what_is_written_stays(opened, tmp_path, monkeypatch):
    first = opened()
    compiled()
    first.close()
    [path] = kept(tmp_path)
    left, written = (path.with_name(f".{path.name}.host.{pid}.abcd.partial") for pid in (1, 2))
    left.touch()
    written.touch()
    ago = time.time() - 2 * caches.ABANDONED
    os.utime(left, (ago, ago))
    opened().close()
    assert kept(tmp_path) == sorted([written, path])


def test_a_writer_leaves_anothers_half_alone(tmp_path, monkeypatch):
    """Containers of a host have its name, and each a process of the same number."""
    monkeypatch.setattr(packs.secrets, "token_hex", lambda _: "same")
    path = tmp_path / "x.pack"
    partial = path.with_name(f".x.pack.{packs.socket.gethostname()}.{os.getpid()}.same.partial")
    partial.write_bytes(b"another's")
    with pytest.raises(FileExistsError):
        packs._store(path, [b"mine"])
    assert partial.read_bytes() == b"another's"


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


@pytest.mark.parametrize(
    ("choice", "fault"),
    [
        ("", "'': no directory is named"),
        (" ", "' ': no directory is named"),
        ("~nosuchuser/x", "~nosuchuser is nobody's home directory"),
        ("a\0b", "no path has a NUL in it"),
        ("a" * 256, "File name too long"),
        ("file", "file is no directory"),
        ("file/on/the/way", "file is no directory"),
        ("link", "link is a link to nothing"),
        ("loop/x", "Too many levels of symbolic links"),
    ],
)
def test_a_place_that_can_be_no_directory_is_refused(tmp_path, monkeypatch, choice, fault):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("link").symlink_to("nothing")
    Path("loop").symlink_to("loop")
    with pytest.raises(UsageError, match=r"--run\.cache") as told:
        check_choice(choice)
    assert fault in str(told.value)
    assert str(told.value).endswith(": give auto, off or a directory")
    assert len(str(told.value).splitlines()) == 1


def test_a_place_that_may_be_one_later_is_not_refused(tmp_path, monkeypatch):
    for choice in ("auto", "off", str(tmp_path), str(tmp_path / "not" / "yet"), "/proc/sys/x"):
        check_choice(choice)

    def denied(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(caches.os, "stat", denied)
    check_choice("/secret/place")


def test_a_bad_place_is_a_usage_error_before_anything_is_touched(run_recipe, tmp_path):
    (tmp_path / "file").touch()
    said = run_recipe(lambda run: None, "--run.cache", tmp_path / "file", code=2)
    assert said.startswith(f"launcher: --run.cache {tmp_path}/file: {tmp_path}/file is no directory: ")
    assert not run_recipe.dir.exists()


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


def test_a_place_that_a_person_names_is_left_alone(opened, monkeypatch, said):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    assert opened() is None
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    assert said == []
    assert opened("/other") is None
    assert said == ["compile cache: TORCHINDUCTOR_CACHE_DIR is set, and wins over --run.cache /other: compiled code is "
                    "in /mine"]  # fmt: skip


def test_a_place_that_torch_has_named_is_nobodys_choice(opened, monkeypatch, tmp_path):
    """torch puts its default into the variable as soon as something is compiled, or the compiler imported."""
    name = "torch._inductor.runtime.cache_dir_utils"
    torchs = types.SimpleNamespace(default_cache_dir=lambda: str(tmp_path / "torchs"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torchs"))
    monkeypatch.delitem(sys.modules, name, raising=False)
    assert caches._named() == str(tmp_path / "torchs"), "torch has not been asked: a person's"
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace())
    assert caches._named() == str(tmp_path / "torchs"), "a torch without the function"
    monkeypatch.setitem(sys.modules, name, torchs)
    assert caches._named() is None


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


@pytest.mark.slow
def test_what_compiles_at_import_hides_no_place(start, tmp_path):
    recipe, store = tmp_path / "recipe.py", tmp_path / "store"
    recipe.write_text(RECIPE.replace("class Net", "torch.compile(lambda t: t.sin() + 1)(torch.ones(3))\n\nclass Net"))
    environment = {"TMPDIR": str(tmp_path)}  # torch's default is below it
    for name in ("cold", "warm"):
        options = ["--run.compile", "default", "--run.cache", store, "--run.dir", tmp_path / "runs" / name]
        start(1, recipe, *options, env=environment).ok()
        assert len(list(store.glob("*/*.pack"))) == 1
    names = {name for path in store.glob("*/*.pack") for name in packs.names(path)}
    assert any(name.startswith("fxgraph/") for name in names)
    assert any(name.endswith(".so") for name in names)


def test_a_second_start_compiles_nothing_and_learns_the_same(start, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    said = []
    for name in ("cold", "warm"):
        directory, node = tmp_path / "runs" / name, tmp_path / f"node-{name}"
        node.mkdir()
        options = ["--run.compile", "default", "--run.log-every", 1, "--run.dir", directory]
        said.append(start(2, recipe, *options, env={"TMPDIR": str(node)}).ok())
        assert not list(node.rglob("*.gch")), "a header takes longer than all that is in the cache"
        told = status(directory)["startup"]
        assert told["compile"] > 0
        assert sum(told.values()) == pytest.approx(2 * told["total"], abs=0.02)
    assert losses(tmp_path / "runs" / "cold") == losses(tmp_path / "runs" / "warm")
    hits, graphs = re.search(r"compile [\d.]+ \((\d+) of (\d+) graphs from the cache\)", said[1]).groups()
    assert hits == graphs, said[1]
    assert len(kept(tmp_path)) == 1
