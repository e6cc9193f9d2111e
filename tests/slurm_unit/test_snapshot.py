"""The copy of the code that a job runs."""

import os
import shutil
import subprocess

import pytest

from launcher.errors import LauncherError
from launcher.slurm import snapshot
from launcher.slurm.snapshot import take


def write(path, text="x = 1\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def git(path, *arguments):
    identity = ("-c", "user.name=n", "-c", "user.email=e@x", "-c", "init.defaultBranch=main")
    subprocess.run(["git", "-C", path, *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    path = tmp_path / "repository"
    path.mkdir()
    git(path, "init")
    write(path / ".gitignore", "*.log\nout/\n_version.py\n")
    write(path / "recipes/a.py")
    write(path / "src/package/__init__.py")
    git(path, "add", "-A")
    git(path, "commit", "-m", "one")
    return path


def files(path):
    found = [name for name in path.rglob("*") if not name.is_dir() or name.is_symlink()]
    return sorted(name.relative_to(path).as_posix() for name in found)


COMMITTED = [".gitignore", "recipes/a.py", "src/package/__init__.py"]


def test_what_git_lists(repository, tmp_path):
    write(repository / "recipes/b.py")  # not added
    write(repository / "recipes/a.py", "changed\n")  # not committed
    write(repository / "noise.log")
    write(repository / "out/result.py")
    (repository / "src/package/__init__.py").unlink()  # deleted, not committed
    copy = take(repository / "recipes/a.py", tmp_path / "code")
    assert files(copy.target) == [".gitignore", "recipes/a.py", "recipes/b.py"]
    assert (copy.target / "recipes/a.py").read_text() == "changed\n"
    assert (copy.copied, copy.left_out, copy.source) == (3, (), repository)
    assert copy.inside(repository / "recipes/a.py") == copy.target / "recipes/a.py"
    assert copy.inside(repository / "recipes") == copy.target / "recipes"
    assert copy.inside(repository) == copy.target
    assert copy.inside(repository / "noise.log") is None
    assert copy.inside(tmp_path / "elsewhere.py") is None


def test_names_are_not_read_as_anything_else(repository, tmp_path):
    nasty = ["$(touch x);.py", "a b.py", "-rf.py", "new\nline.py", '"quoted".py', "é.py", "*.py", "back\\slash.py"]
    for name in nasty:
        write(repository / "recipes" / name)
    latin = os.fsencode(repository) + b"/recipes/\xe9\xff.py"  # no UTF-8
    with open(latin, "w"):
        pass
    copy = take(repository / "recipes/$(touch x);.py", tmp_path / "code")
    assert files(copy.target) == sorted([*COMMITTED, *(f"recipes/{name}" for name in nasty), "recipes/\udce9\udcff.py"])
    assert not os.path.exists("x")


def test_what_a_recipe_imports_is_copied_though_git_ignores_it(repository, tmp_path):
    version = write(repository / "src/package/_version.py")
    recipe = write(repository / "out/mine.py")
    outside = write(tmp_path / "outside.py")
    copy = take(recipe, tmp_path / "code", [version, outside])
    assert files(copy.target) == [*COMMITTED[:1], "out/mine.py", *COMMITTED[1:], "src/package/_version.py"]


def test_what_is_too_large_is_left_out_and_told(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "FILE_LIMIT", 1000)
    monkeypatch.setattr(snapshot, "LIMIT", 2500)
    write(repository / "recipes/a.py", "#" * 1500)  # the recipe itself never is
    write(repository / "data/big.bin", "x" * 1001)
    for name in "cdef":
        write(repository / f"recipes/{name}.py", "#" * 400)
    copy = take(repository / "recipes/a.py", tmp_path / "code")
    assert copy.left_out == ("data/big.bin (0.0 MiB)", "recipes/e.py (0.0 MiB)", "recipes/f.py (0.0 MiB)")
    assert copy.size == sum(path.stat().st_size for path in copy.target.rglob("*") if path.is_file()) <= 2500


def test_links(repository, tmp_path):
    elsewhere = write(tmp_path / "shared/data/words.txt", "words").parent
    (repository / "linked.py").symlink_to("recipes/a.py")
    (repository / "packages").symlink_to("src")
    (repository / "absolute").symlink_to(repository / "src")
    (repository / "recipes/up").symlink_to("../src/package")
    (repository / "data").symlink_to("../shared/data")
    (repository / "words.txt").symlink_to(elsewhere / "words.txt")
    (repository / "nowhere").symlink_to("no/such")
    (repository / "ring").symlink_to("ring")
    copy = take(repository / "recipes/a.py", tmp_path / "runs/r/code")
    assert copy.left_out == ("nowhere (no file)", "ring (no file)")
    shutil.rmtree(repository)
    for name in ("packages/package", "absolute/package", "recipes/up"):
        assert (copy.target / name / "__init__.py").read_text() == "x = 1\n"
    assert (copy.target / "data/words.txt").read_text() == "words"
    assert (copy.target / "linked.py").read_text() == "x = 1\n"
    shutil.rmtree(elsewhere)
    assert (copy.target / "words.txt").read_text() == "words"


def test_a_repository_reached_by_a_link(repository, tmp_path):
    (tmp_path / "way").symlink_to(repository)
    (tmp_path / "recipes").symlink_to(repository / "recipes")
    for recipe in (tmp_path / "way/recipes/a.py", tmp_path / "recipes/a.py"):
        copy = take(recipe, tmp_path / f"code-{recipe.parent.parent.name}")
        assert files(copy.target) == COMMITTED
        assert copy.inside(recipe) == copy.target / "recipes/a.py"
        assert copy.inside(recipe.parent) == copy.target / "recipes"


def test_a_path_with_dots(repository, tmp_path):
    copy = take(repository / "recipes/../src/../recipes/a.py", tmp_path / "code")
    assert files(tmp_path / "code") == COMMITTED
    assert copy.inside(repository / "src/../recipes/a.py") == copy.target / "recipes/a.py"
    alone = write(tmp_path / "plain/a.py")
    copy = take(alone.parent / ".." / "plain" / "a.py", tmp_path / "code-2")
    assert files(tmp_path / "code-2") == ["a.py"]


def test_other_runs_are_no_code(repository, tmp_path):
    run = repository / "runs/one"
    write(run / "run.json")
    write(run / "attempts/1/started.json")
    write(run / "code/recipes/a.py")
    sweep = repository / "runs/sweep"
    write(sweep / "slurm/jobs.jsonl")
    write(sweep / "00000/run.json")
    write(repository / "run.json")  # no run's: there are no attempts
    write(repository / "runs/notes.md")
    copy = take(repository / "recipes/a.py", run / "code-2")
    assert files(copy.target) == sorted([*COMMITTED, "run.json", "runs/notes.md"])
    again = take(run / "code/recipes/a.py", tmp_path / "again")  # out of a run itself
    assert {"runs/one/code/recipes/a.py", *COMMITTED} <= {*files(again.target)}


def test_a_repository_inside_is_told(repository, tmp_path):
    (repository / "third/party").mkdir(parents=True)
    git(repository / "third/party", "init")
    write(repository / "third/party/x.py")
    git(repository / "third/party", "add", "-A")
    git(repository / "third/party", "commit", "-m", "one")
    assert take(repository / "recipes/a.py", tmp_path / "code").left_out == ("third/party (a repository of its own)",)


def test_in_a_hook_of_another_repository(repository, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git/index"))
    assert files(take(repository / "recipes/a.py", tmp_path / "code").target) == COMMITTED


def test_without_a_repository_the_python_files_around_it(tmp_path, monkeypatch):
    project = tmp_path / "project"
    recipe = write(project / "a.py")
    write(project / "lib/b.py")
    write(project / "data.bin")
    write(project / "runs/r/code/a.py")
    write(project / ".hidden/c.py")
    write(project / "venv/pyvenv.cfg")
    write(project / "venv/lib/d.py")
    write(tmp_path / "above.py")
    os.mkfifo(project / "pipe.py")
    copy = take(recipe, tmp_path / "code")
    assert files(copy.target) == ["a.py", "lib/b.py"]
    assert copy.left_out == ("pipe.py (no file)",)
    monkeypatch.setenv("PATH", "/nonexistent")  # no git
    assert files(take(recipe, tmp_path / "code-2").target) == ["a.py", "lib/b.py"]


def test_a_home_directory_is_no_project(tmp_path, monkeypatch):
    many = [(str(tmp_path), [], [f"{number}.py" for number in range(10_001)])]
    monkeypatch.setattr(snapshot.os, "walk", lambda _: iter(many))
    with pytest.raises(LauncherError, match=r"more than 10,000 Python files below it: put the recipe in a repository"):
        take(write(tmp_path / "a.py"), tmp_path / "code")


def test_a_copy_that_cannot_be_written(repository, tmp_path):
    write(tmp_path / "code")
    with pytest.raises(LauncherError, match=rf"cannot copy {repository}/.* to {tmp_path}/code: Not a directory"):
        take(repository / "recipes/a.py", tmp_path / "code")


def test_what_may_not_be_read_is_left_out(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot.os, "access", lambda path, _: path.name != "__init__.py")
    copy = take(repository / "recipes/a.py", tmp_path / "code")
    assert copy.left_out == ("src/package/__init__.py (it may not be read)",)
