"""A site's file of defaults: which is taken, and what it may say."""

import pytest

from launcher.errors import UsageError
from launcher.slurm.request import Site, read_flags, read_site
from launcher.slurm.script import shipped

SHIPPED = sorted(path.stem for path in (shipped() / "clusters").glob("*.toml"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No site file of this machine's is found."""
    monkeypatch.delenv("LAUNCHER_CLUSTER", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_where_it_is_looked_for(tmp_path, monkeypatch):
    assert read_site(None, tmp_path) == Site()
    write(tmp_path / "shipped/c.toml", "[submit]\nnodes = 1")
    write(tmp_path / "home/.config/launcher/clusters/c.toml", "[submit]\nnodes = 2")
    assert read_site("c", tmp_path / "shipped").submit == {"nodes": 2}
    write(tmp_path / "slurm/clusters/c.toml", "[submit]\nnodes = 3")
    assert read_site("c", tmp_path / "shipped").submit == {"nodes": 3}
    monkeypatch.setenv("LAUNCHER_CLUSTER", "c")
    assert read_site(None, tmp_path / "shipped").name == "c"
    monkeypatch.setenv("LAUNCHER_CLUSTER", "")
    assert read_site(None, tmp_path / "shipped") == Site()
    assert read_site(str(tmp_path / "shipped/c.toml"), tmp_path).submit == {"nodes": 1}
    assert read_site("shipped/c.toml", tmp_path).submit == {"nodes": 1}
    write(tmp_path / "here.toml", "")
    assert read_site("here.toml", tmp_path) == Site("here", {}, {})


def test_one_that_is_not_there(tmp_path):
    write(tmp_path / "slurm/clusters/h100.toml", "")
    with pytest.raises(UsageError, match=r"--cluster h10: no such file: did you mean h100\?; there are h100"):
        read_site("h10", tmp_path / "none")
    with pytest.raises(UsageError, match=r"--cluster /no/such.toml: no such file"):
        read_site("/no/such.toml", tmp_path)


def test_values_are_of_their_kinds(tmp_path):
    text = """
    [submit]
    gpus = 8
    time = 90
    requeue = false
    signal-lead = 30
    setup = ["module load cuda", 'echo "é"']
    [environment]
    NCCL_DEBUG = "INFO"
    A = 3
    B = true
    C = 0.5
    NASTY = '''two
    lines; $(touch x) 'quoted' \\n'''
    """
    site = read_site(str(write(tmp_path / "s.toml", text)), tmp_path)
    assert site.submit == {
        **{"gpus": 8, "time": "90", "requeue": False, "signal_lead": 30},
        "setup": ("module load cuda", 'echo "é"'),
    }
    assert site.environment is not None
    assert (site.environment["A"], site.environment["B"], site.environment["C"]) == ("3", "true", "0.5")
    assert site.environment["NASTY"] == "two\n    lines; $(touch x) 'quoted' \\n"
    assert read_flags({}, site).signal_lead == 30


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[submit", "Expected ']'"),
        ("nodes = 2", "nodes: it has the tables [submit] and [environment]"),
        ("[sumbit]\nnodes = 2", "sumbit: it has the tables"),
        ("[submit]\nnode = 2", "submit.node: launcher submit has no flag --node: did you mean nodes?"),
        ("[submit]\nnodes = '2'", "submit.nodes = '2': expected int"),
        ("[submit]\nnodes = true", "submit.nodes = True: expected int"),
        ("[submit]\nrequeue = 1", "submit.requeue = 1: expected bool"),
        ("[submit]\npartition = 3", "submit.partition = 3: expected str"),
        ("[submit]\nsetup = 'x'", 'submit.setup: a list of texts: ["..."]'),
        ("[submit]\nsetup = [1]", "submit.setup: a list of texts"),
        ("[environment]\n'A B' = 1", "environment.A B: a variable's name, and one value"),
        ("[environment]\n'A;touch x' = 1", "environment.A;touch x: a variable's name"),
        ("[environment]\nA = [1]", "environment.A: a variable's name, and one value"),
        ('[environment]\nA = "x\\u0000y"', "environment.A: no variable can hold a NUL"),
    ],
)
def test_what_it_may_not_say(tmp_path, text, said):
    with pytest.raises(UsageError) as refused:
        read_site(str(write(tmp_path / "s.toml", text)), tmp_path)
    assert said in str(refused.value)
    assert "s.toml" in str(refused.value)


def test_one_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    with pytest.raises(UsageError, match=r"latin\.toml: 'utf-8' codec can't decode"):
        read_site("latin.toml", tmp_path)


@pytest.mark.parametrize("name", SHIPPED)
def test_those_that_are_shipped(name, tmp_path):
    site = read_site(name, shipped() / "clusters")
    assert site.name == name
    read_flags({} if (site.submit or {}).get("gpus") is not None else {"gpus": 1}, site)


def test_some_are_shipped():
    assert {"a100", "cpu", "h100-infiniband"} <= {*SHIPPED}
