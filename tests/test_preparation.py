"""launcher/preparation.py: parts made once by all who come, whole or not there, whoever is killed when."""

import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import xxhash

import launcher
from launcher import preparation
from launcher.errors import RecipeError, UsageError
from tests.harness import ROOT, clean_environment

HEAD = """
import errno, fcntl, os, subprocess, sys, time
from pathlib import Path
from launcher import preparation
preparation.SAY_EVERY = 0.0

def until(happened):
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)

def slow(path):
    name = path.name.split(".")[0]
    with open("log", "a") as log:
        log.write(f"{name} {os.getpid()}\\n")
    with open(path, "w") as file:
        for k in range(10):
            file.write(f"{name} {k}\\n")
            file.flush()
            time.sleep(0.01)

def after(path):
    path.write_text("".join((path.parent / f"part-{k}").read_text() for k in range(5)))

stages = {f"part-{k}": slow for k in range(5)}, {"last": after}
"""
PREPARE = "print(preparation.prepare('cache', {'version': 1}, *stages))"
PARTS = {f"part-{k}": "".join(f"part-{k} {line}\n" for line in range(10)) for k in range(5)}
WHOLE = PARTS | {"last": "".join(PARTS.values())}


@pytest.fixture
def python(tmp_path):
    """Starts Python on some source in a directory of the test's own."""
    processes = []

    def start(source):
        env = clean_environment() | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-c", HEAD + source],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def said(process):
    """What a process that must succeed printed, and wrote to its standard error."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out, err


def found(directory):
    """The parts that are there under their own names."""
    if not directory.is_dir():
        return {}
    return {path.name: path.read_text() for path in directory.iterdir() if path.name in WHOLE}


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.002)  # polling a file that another process writes


def test_whoever_is_killed_a_part_is_whole_or_not_there(python, tmp_path):
    cache = tmp_path / "cache"
    running = [python(PREPARE) for _ in range(3)]
    for _ in range(12):
        time.sleep(random.uniform(0, 0.15))  # whatever moment this is
        victim = running.pop(random.randrange(3))
        victim.send_signal(signal.SIGKILL)
        for directory in cache.glob("*"):
            assert found(directory).items() <= WHOLE.items()
        running.append(python(PREPARE))
    [directory] = {said(process)[0].strip() for process in running}
    directory = tmp_path / directory
    assert found(directory) == WHOLE
    assert sorted(path.name for path in directory.iterdir() if ".partial" not in path.name) == sorted(
        [*WHOLE, "claims", "manifest.json"]
    )
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["done"] is True
    assert manifest["settings"] == {"version": 1}
    for name, text in WHOLE.items():
        expected = {"size": len(text), "xxh3": xxhash.xxh3_64_hexdigest(text.encode())}
        assert manifest["parts"][name] == expected


def test_processes_share_the_work(python, tmp_path):
    source = """
def together(path):
    Path("begun-" + path.name.split(".")[0]).touch()
    until(lambda: len(list(Path().glob("begun-*"))) == 2)
    slow(path)
stages = {"part-0": together, "part-1": together},
"""
    outputs = [said(process)[0] for process in [python(source + PREPARE) for _ in range(2)]]
    assert outputs[0] == outputs[1]
    made = dict(line.split() for line in (tmp_path / "log").read_text().splitlines())
    assert made.keys() == {"part-0", "part-1"}
    assert made["part-0"] != made["part-1"], "one process made both"
    assert len((tmp_path / "log").read_text().splitlines()) == 2


def test_who_waits_says_for_whom(python, tmp_path):
    held = python("stages = {'part-0': lambda path: (path.touch(), until(Path('go').exists))},\n" + PREPARE)
    while not (partial := list(tmp_path.glob("cache/*/part-0.*.partial"))):
        assert held.poll() is None, held.communicate()
        time.sleep(0.002)
    waiting = python("stages = {'part-0': slow},\n" + PREPARE)
    line = waiting.stderr.readline()
    (tmp_path / "go").touch()
    directory = partial[0].parent.relative_to(tmp_path)
    who = f"{socket.gethostname()}, pid {held.pid}"
    assert line == f"launcher: waiting for part-0 in {directory}, which {who} makes\n"
    assert said(held)[0] == said(waiting)[0] == f"{directory}\n"


def test_what_was_made_is_not_made_again(python, tmp_path):
    source = "stages[1]['last'] = lambda path: (after(path), os.kill(os.getpid(), 9))\n"
    dead = python(source + PREPARE)
    dead.communicate()
    assert dead.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("cache/*/last.*.partial"))
    directory = tmp_path / said(python(PREPARE))[0].strip()
    assert found(directory) == WHOLE
    assert len((tmp_path / "log").read_text().splitlines()) == len(PARTS), "each once"
    assert not list(directory.glob("*.partial")), "what a killed process left is gone"


def test_a_child_of_a_killed_maker_holds_nothing_up(python, tmp_path):
    child = "subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid"
    source = f"""
def die(path):
    Path("child").write_text(str({child}))
    os.kill(os.getpid(), 9)
stages = {{"part-0": os.fork and die}},
"""
    dead = python(source + PREPARE)
    dead.communicate()
    try:
        said(python("stages = {'part-0': slow},\n" + PREPARE))
    finally:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_without_locks_the_first_one_stands(python, tmp_path):
    source = """
def none(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.lockf = none
def both(path):
    path.write_text(str(os.getpid()))
    Path(f"begun-{os.getpid()}").touch()
    until(lambda: len(list(Path().glob("begun-*"))) == 2)
stages = {"part-0": both},
"""
    processes = [python(source + PREPARE) for _ in range(2)]
    [directory] = {said(process)[0].strip() for process in processes}
    assert (tmp_path / directory / "part-0").read_text() in {str(process.pid) for process in processes}
    manifest = json.loads((tmp_path / directory / "manifest.json").read_text())
    assert manifest["done"] is True
    assert not list((tmp_path / directory).glob("part-0.*"))


@pytest.fixture
def prepare(tmp_path):
    """Prepares one part in this process, and counts how often it was made."""

    def make(settings=None, name="part"):
        def write(path):
            make.times += 1
            path.write_text("whole")

        return launcher.prepare(tmp_path / "cache", settings or {}, {name: write})

    make.times = 0
    return make


def test_a_damaged_part_is_made_anew_and_told(prepare, capsys):
    part = prepare() / "part"
    assert part == prepare() / "part"
    assert prepare.times == 1
    os.truncate(part, 2)
    prepare()
    assert part.read_text() == "whole"
    assert capsys.readouterr().err == (
        f"launcher: {part} is damaged, of another size than it was made: making it anew\n"
    )
    part.unlink()
    prepare()
    assert (part.read_text(), prepare.times) == ("whole", 3)


@pytest.mark.parametrize("text", ["", '{"parts": {"part": {}', "[]", '{"parts": []}', '{"parts": {"part": {}}}'])
def test_a_damaged_manifest_is_written_anew(prepare, text):
    manifest = prepare() / "manifest.json"
    before = manifest.read_text()
    manifest.write_text(text)
    prepare()
    assert manifest.read_text() == before
    assert prepare.times == 1


def test_what_the_parts_depend_on_is_the_key(prepare, tmp_path):
    text = tmp_path / "text"
    text.write_text("a")
    keys = [prepare({"version": 1, "files": [text]}), prepare({"version": 2, "files": [text]})]
    text.write_text("ab")
    keys.append(prepare({"version": 1, "files": [text]}))
    os.utime(text, ns=(1, 1))
    keys.append(prepare({"files": [text], "version": 1}))
    assert len(set(keys)) == prepare.times == 4
    assert prepare({"version": 1, "files": [text]}) == keys[-1], "in whatever order"


def test_faults_are_one_line(prepare, tmp_path):
    with pytest.raises(UsageError, match=r"^cannot prepare the data: .*missing: No such file or directory$"):
        prepare({"file": tmp_path / "missing"})
    (tmp_path / "cache").touch()
    with pytest.raises(UsageError, match=r"^cannot prepare the data: .*: Not a directory$"):
        prepare()


def test_a_part_that_fails_leaves_nothing(tmp_path):
    def full(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UsageError, match=r"^cannot prepare the data: .*No space left on device$"):
        launcher.prepare(tmp_path, {}, {"part": full})
    with pytest.raises(ZeroDivisionError):
        launcher.prepare(tmp_path, {}, {"part": lambda _: 1 / 0})
    [directory] = tmp_path.iterdir()
    assert [path.name for path in directory.iterdir()] == ["claims"]


@pytest.mark.parametrize("name", ["manifest.json", "claims", "a.partial", "../a", "a/b", "", ".", ".."])
def test_a_part_has_a_name_for_a_file_and_of_its_own(tmp_path, name):
    with pytest.raises(RecipeError, match="a part cannot be called"):
        launcher.prepare(tmp_path, {}, {name: lambda path: path.write_text("x")})
    assert not list(tmp_path.iterdir())


def test_two_parts_do_not_share_a_name(tmp_path):
    def make(path):
        path.write_text("x")

    with pytest.raises(RecipeError, match="two parts are called 'a'"):
        launcher.prepare(tmp_path, {}, {"a": make}, {"a": make})


def test_without_parts_there_is_a_directory(tmp_path):
    assert launcher.prepare(tmp_path, {}).is_dir()


def test_a_manifest_that_could_not_be_written_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, text):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(preparation.Path, "write_text", fail)
    with pytest.raises(UsageError, match="No space left"):
        launcher.prepare(tmp_path, {}, {"a": lambda path: path.write_bytes(b"x")})
    assert not list(tmp_path.rglob("*.partial"))


def test_what_killed_writers_have_left_goes(tmp_path):
    directory = launcher.prepare(tmp_path, {}, {"a": lambda path: path.write_bytes(b"x")})
    for name in ("a", "manifest.json"):
        (directory / f"{name}.{socket.gethostname()}-1-aaaa.partial").touch()
    (directory / "a").unlink()
    launcher.prepare(tmp_path, {}, {"a": lambda path: path.write_bytes(b"x")})
    assert not list(tmp_path.rglob("*.partial"))


def test_the_module_does_not_hide_the_function():
    assert launcher.prepare is preparation.prepare
