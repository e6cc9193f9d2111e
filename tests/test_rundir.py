"""The run directory: attempts that never share a number, files that are whole, and no secret in any of them."""

import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from launcher import source
from launcher.errors import LauncherError, UsageError
from launcher.rundir import RunDir
from launcher.source import code_patch, describe_code, strip_credentials

ROOT = Path(__file__).parent.parent
SETTINGS: dict[str, Any] = {"lr": 0.1, "run": {"seed": 0}}


def child(code: str, *argv: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, argv)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def output(process: subprocess.Popen[str], code: int = 0) -> str:
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, f"exit code {process.returncode}\n{said}"
    return said


def started(path: Path, recipe: Path | None = None, settings: dict[str, Any] = SETTINGS) -> RunDir:
    rundir = RunDir.open(str(path), name="x")
    number = rundir.start_attempt(2)
    rundir.record(settings, recipe or path / "none.py", command=["x.py", "--lr", "1"], attempt=number, world_size=2)
    return rundir


def status(rundir: RunDir) -> dict[str, Any]:
    return json.loads((rundir.path / "run.json").read_text())


def files(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path) -> Path:
    path = tmp_path / "code"
    path.mkdir()
    git(path, "init", "-q")
    (path / "recipe.py").write_text("lr = 1\n")
    (path / "data.bin").write_bytes(bytes(range(256)))
    git(path, "add", ".")
    git(path, "commit", "-q", "-m", "first")
    return path


def test_a_fresh_directory_is_named_after_the_recipe_and_is_private(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = {RunDir.open(None, name="gpt").path for _ in range(20)}
    assert len(made) == 20
    for path in made:
        assert path.parent == tmp_path / "runs"
        assert re.fullmatch(r"gpt-\d{4}-\d{4}-[a-z2-9]{3}", path.name)
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["a/b", "", ".hidden", "../x"])
def test_a_name_is_no_path(tmp_path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="a name, not a path"):
        RunDir.open(None, name=name)
    assert not (tmp_path / "runs").exists()


def test_a_named_directory_is_made_or_taken_when_empty(tmp_path) -> None:
    path = RunDir.open(str(tmp_path / "a" / "b"), name="x").path
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert RunDir.open(str(path), name="x").config() is None
    assert RunDir.open(str(path), name="x").read() == {}


def test_a_directory_of_something_else_is_refused(tmp_path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="holds files and no run"):
        RunDir.open(str(tmp_path), name="x")
    with pytest.raises(UsageError, match="is a file"):
        RunDir.open(str(tmp_path / "thesis.tex"), name="x")
    with pytest.raises(UsageError, match="Not a directory"):
        RunDir.open(str(tmp_path / "thesis.tex" / "run"), name="x")
    assert files(tmp_path) == {"thesis.tex"}


def test_a_run_cut_off_at_its_birth_is_a_run(tmp_path) -> None:
    RunDir.open(str(tmp_path), name="x").start_attempt(1)
    assert started(tmp_path).current_attempt() == 2


def test_what_a_start_writes_down(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    recipe = tmp_path / "recipe.py"
    recipe.write_text("lr = 1\n")
    rundir = started(tmp_path / "run", recipe)
    said = status(rundir)
    assert (said["status"], said["attempt"], said["restarts"], said["world_size"]) == ("running", 1, 0, 2)
    assert (said["global_step"], said["total_steps"], said["git"]) == (0, None, None)
    assert said["command"] == ["x.py", "--lr", "1"]
    assert said["versions"]["torch"]
    assert said["hosts"]
    assert rundir.config() == SETTINGS
    first = json.loads((rundir.path / "attempts/1/started.json").read_text())
    assert (first["world_size"], first["pid"], first["environment"]["OMP_NUM_THREADS"]) == (2, os.getpid(), "3")
    assert files(rundir.path) == {
        "run.json", "config.json", "recipe.py", "attempts/1/started.json", "attempts/1/config.json"
    }  # fmt: skip


def test_a_restart_keeps_what_is_the_runs_and_notes_what_changed(tmp_path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text("lr = 1\n")
    path = tmp_path / "run"
    first = started(path, recipe)
    first.update(status="preempted", global_step=7, total_steps=9)
    began = status(first)["started"]
    started(path, recipe)
    assert not (path / "attempts/2/recipe.py").exists()
    recipe.write_text("lr = 2\n")
    said = status(started(path, recipe, {"lr": 0.2}))
    assert (said["status"], said["attempt"], said["restarts"]) == ("running", 3, 2)
    assert (said["global_step"], said["total_steps"], said["started"]) == (7, 9, began)
    assert (path / "recipe.py").read_text() == "lr = 1\n"
    assert (path / "attempts/3/recipe.py").read_text() == "lr = 2\n"
    assert json.loads((path / "config.json").read_text()) == {"lr": 0.2}
    assert json.loads((path / "attempts/2/config.json").read_text()) == SETTINGS


STARTS = """
import sys
from launcher.rundir import RunDir
rundir = RunDir.open(sys.argv[1], name="x")
sys.stdin.read()  # until all are there
print(*[rundir.start_attempt(1) for _ in range(10)])
"""


def test_live_copies_that_start_at_once_get_different_numbers(tmp_path) -> None:
    code = STARTS
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    copies = [
        subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for copy in copies:
        assert copy.stdin is not None
        copy.stdin.close()
        copy.stdin = None
    numbers = [int(number) for copy in copies for number in output(copy).split()]
    assert sorted(numbers) == list(range(1, 41))
    assert RunDir(tmp_path / "run").current_attempt() == 40


def test_an_old_incarnation_writes_no_status(tmp_path) -> None:
    old = started(tmp_path)
    new = started(tmp_path)
    assert not old.update(status="failed", global_step=3)
    assert (status(new)["status"], status(new)["attempt"]) == ("running", 2)
    assert new.update(status="finished")
    assert status(new)["status"] == "finished"


def test_the_first_rank_to_fail_tells_it(tmp_path) -> None:
    rundir = started(tmp_path)
    assert rundir.failure(1) is None
    assert rundir.failed(1, rank=1, step=4, error="ValueError: boom")
    assert not rundir.failed(1, rank=0, step=4, error="RuntimeError: connection closed by peer")
    told = rundir.failure(1)
    assert told is not None
    assert (told["rank"], told["step"], told["error"]) == (1, 4, "ValueError: boom")


def test_a_failure_is_not_overwritten_by_a_rank_that_does_not_know(tmp_path) -> None:
    rundir = started(tmp_path)
    rundir.failed(1, rank=1, step=4, error="boom")
    rundir.update(status="preempted", global_step=5)
    assert (status(rundir)["status"], status(rundir)["global_step"]) == ("failed", 5)
    assert status(started(tmp_path))["status"] == "running"


LOOKS = """
import sys
from pathlib import Path
from launcher.rundir import RunDir
rundir = RunDir(Path(sys.argv[1]), 1)
print("looks", flush=True)
for attempt in range(1, int(sys.argv[2])):
    while (told := rundir.failure(attempt)) is None:
        pass
    assert told["error"] == "boom", told
"""


def test_whoever_sees_a_failure_can_read_it(tmp_path) -> None:
    attempts = 300
    for number in range(1, attempts):
        (tmp_path / "attempts" / str(number)).mkdir(parents=True)
    looking = child(LOOKS, tmp_path, attempts)
    assert looking.stdout is not None
    assert looking.stdout.readline() == "looks\n"
    rundir = RunDir(tmp_path, 1)
    for number in range(1, attempts):
        assert rundir.failed(number, rank=1, step=0, error="boom")
    output(looking)
    assert not [name for name in files(tmp_path) if Path(name).name.startswith(".")]


@pytest.mark.parametrize("answer", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_failure_is_marked_once_where_there_are_no_links(tmp_path, monkeypatch, answer) -> None:
    def refuse(*_: object) -> None:
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(os, "link", refuse)
    rundir = started(tmp_path)
    assert rundir.failed(1, rank=1, step=4, error="boom")
    assert not rundir.failed(1, rank=0, step=4, error="another")
    assert (rundir.failure(1) or {})["error"] == "boom"
    assert not [name for name in files(tmp_path) if Path(name).name.startswith(".")]


def test_a_link_that_was_asked_for_twice_is_ones_own(tmp_path, monkeypatch) -> None:
    link = os.link

    def twice(*names: Any) -> None:
        link(*names)
        link(*names)

    monkeypatch.setattr(os, "link", twice)
    assert started(tmp_path).failed(1, rank=1, step=4, error="boom")


UPDATES = """
import sys
from pathlib import Path
from launcher.rundir import RunDir
for step in range(int(sys.argv[2])):
    RunDir(Path(sys.argv[1]), 1).update(status="running", global_step=step)
"""
FAILS = """
import sys
from pathlib import Path
from launcher.rundir import RunDir
rundir = RunDir(Path(sys.argv[1]), 1)
rundir.failed(1, rank=1, step=0, error="boom")
rundir.update(status="failed")
"""


def test_a_failure_stands_whoever_writes_at_the_same_time(tmp_path) -> None:
    rundir = started(tmp_path)
    writers = [child(UPDATES, tmp_path, 200) for _ in range(2)]
    time.sleep(0.1)  # any moment will do
    failing = child(FAILS, tmp_path)
    for process in [*writers, failing]:
        output(process)
    assert status(rundir)["status"] == "failed"
    assert not [name for name in files(tmp_path) if Path(name).name.startswith(".")]


def test_readers_see_whole_files_and_a_kill_leaves_one(tmp_path) -> None:
    rundir = started(tmp_path)
    writer = child(UPDATES, tmp_path, 10**9)
    seen = set()
    while len(seen) < 50:
        assert writer.poll() is None, output(writer)
        seen.add(status(rundir)["global_step"])
    writer.send_signal(signal.SIGKILL)
    writer.communicate(timeout=60)
    assert status(rundir)["global_step"] >= max(seen)


def test_an_exit_is_recorded_for_each_rank(tmp_path) -> None:
    rundir = started(tmp_path)
    rundir.record_exit(1, rank=3, status="preempted", step=8, reason="SIGTERM")
    said = json.loads((tmp_path / "attempts/1/exit-00003.json").read_text())
    assert (said["rank"], said["status"], said["step"], said["reason"]) == (3, "preempted", 8, "SIGTERM")


def test_a_broken_file_is_one_line(tmp_path) -> None:
    rundir = started(tmp_path)
    (tmp_path / "config.json").write_text('{"lr": ')
    with pytest.raises(LauncherError, match=r"config.json is broken .*: put it right") as caught:
        rundir.config()
    assert "\n" not in str(caught.value)


WITHOUT_PERMISSION = """
import os, sys
from launcher.errors import LauncherError
from launcher.rundir import RunDir
if os.geteuid() == 0:  # root may do anything: become nobody
    os.seteuid(65534)
for given in sys.argv[1:]:
    try:
        RunDir.open(given, name="x").start_attempt(1)
        print("no error")
    except LauncherError as error:
        print(error.exit_code, error)
"""


def test_no_permission_is_one_line() -> None:
    with tempfile.TemporaryDirectory() as given:  # pytest's own are closed to anybody else from further up
        closed = Path(given)
        (closed / "empty").mkdir()
        (closed / "empty").chmod(0o555)
        closed.chmod(0o555)
        lines = output(child(WITHOUT_PERMISSION, closed / "run", closed / "empty")).splitlines()
        closed.chmod(0o755)
    assert lines == [
        f"2 cannot use {closed / 'run'} as a run directory: Permission denied",
        f"1 cannot write {closed / 'empty' / 'attempts'}: Permission denied",
    ]


FULL_DISK = """
import resource, sys
from pathlib import Path
from launcher.errors import LauncherError
from launcher.rundir import RunDir
rundir = RunDir(Path(sys.argv[1]), 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
try:
    rundir.update(global_step=5)
except LauncherError as error:
    print(error)
print(rundir.failed(1, rank=0, step=5, error="no space"))
print(rundir.update(status="failed"))
"""


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path) -> None:
    rundir = started(tmp_path)
    before = status(rundir)
    lines = output(child(FULL_DISK, tmp_path)).splitlines()
    assert lines == [f"cannot write {tmp_path / 'run.json'}: File too large", "True", "True"]
    assert status(rundir) == before
    assert not [name for name in files(tmp_path) if Path(name).name.startswith(".")]
    assert rundir.failure(1) == {}  # there was one, and no room to say which


def test_no_secret_is_written(tmp_path, monkeypatch, repository) -> None:
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    monkeypatch.setenv("SLURM_JOB_ID", "12345")
    git(repository, "remote", "add", "origin", "https://me:s3cret@github.com/a/b.git")
    rundir = RunDir.open(str(tmp_path / "run"), name="x")
    rundir.start_attempt(1)
    command = ["x.py", "--url", "https://me:s3cret@host/data?x=1"]
    rundir.record(SETTINGS, repository / "recipe.py", command=command, attempt=1, world_size=1)
    rundir.failed(1, rank=0, step=0, error="cannot reach https://s3cret@host/")
    assert status(rundir)["git"]["remote"] == "https://github.com/a/b.git"
    assert status(rundir)["command"][-1] == "https://host/data?x=1"
    texts = {name: (rundir.path / name).read_bytes() for name in files(rundir.path)}
    assert not [name for name, text in texts.items() if b"s3cret" in text]
    assert b"12345" in texts["attempts/1/started.json"]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("https://me:pass@host:80/a@b", "https://host:80/a@b"),
        ("ssh://git@host/a", "ssh://host/a"),
        ("https://a@b:c@host/", "https://host/"),
        ("https://host/a@b", "https://host/a@b"),
        ("git@github.com:a/b.git", "git@github.com:a/b.git"),
        ("x https://t@a/ y https://u:v@b/", "x https://a/ y https://b/"),
    ],
)
def test_credentials_are_stripped_from_urls(text: str, plain: str) -> None:
    assert strip_credentials(text) == plain


def test_the_patch_makes_the_code_that_ran(tmp_path, repository) -> None:
    clean = git(repository, "rev-parse", "HEAD")
    assert describe_code(repository) is not None
    assert describe_code(repository)["dirty"] is False  # type: ignore[index]
    assert code_patch(repository) == b""
    (repository / "recipe.py").write_text("lr = 2\n")
    (repository / "data.bin").write_bytes(bytes(range(255, -1, -1)))
    (repository / "sub").mkdir()
    (repository / "sub" / "new.py").write_text("x = 1\n")
    git(repository, "add", "sub")
    git(repository, "config", "diff.noprefix", "true")
    rundir = started(tmp_path / "run", repository / "recipe.py")
    assert status(rundir)["git"]["commit"] == clean
    assert status(rundir)["git"]["dirty"] is True
    copy = tmp_path / "copy"
    git(tmp_path, "clone", "-q", str(repository), str(copy))
    git(copy, "apply", str(rundir.path / "code.patch"))
    for name in ("recipe.py", "data.bin", "sub/new.py"):
        assert (copy / name).read_bytes() == (repository / name).read_bytes()
    (repository / "recipe.py").write_text("lr = 3\n")
    started(tmp_path / "run", repository / "recipe.py")
    assert b"+lr = 2" in (tmp_path / "run/code.patch").read_bytes()
    assert b"+lr = 3" in (tmp_path / "run/attempts/2/code.patch").read_bytes()


def test_a_huge_patch_is_left_out_with_a_note(repository, monkeypatch) -> None:
    monkeypatch.setattr(source, "PATCH_LIMIT", 10_000)
    (repository / "recipe.py").write_text("x = 1\n" * 100_000)
    patch = code_patch(repository)
    assert patch == b"# Not kept: the uncommitted changes are more than 10000 bytes.\n"


def test_without_git_nothing_is_said_of_it(tmp_path, repository, monkeypatch) -> None:
    (tmp_path / "plain").mkdir()
    assert describe_code(tmp_path / "plain") is None
    assert code_patch(tmp_path / "plain") is None
    (tmp_path / "empty").mkdir()
    git(tmp_path / "empty", "init", "-q")  # no commit yet
    assert describe_code(tmp_path / "empty") is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert describe_code(repository) is None


def test_a_git_that_hangs_is_given_up(tmp_path, repository, monkeypatch) -> None:
    slow = tmp_path / "bin" / "git"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nexec sleep 600\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(source, "TIMEOUT", 0.2)
    assert code_patch(repository) is None
