"""Whatever becomes of a checkpoint's bytes: it is refused in a line, or loaded bit for bit as it was saved.

Two runs are the material, one of a single process and one whose shards two ranks wrote into one file. Each mutation is
one change, drawn from a seeded generator, to a copy of the newest of two checkpoints. Most are those of failing disks
and careless hands, and must never load as something else. The others are forgeries, with the digests that they then
need: they can say what they like, but never end in a traceback, nor run code.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import random
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from samples import same

import launcher
from launcher.checkpoint import Index, State, load, read_index, verify
from launcher.errors import CheckpointError
from launcher.world import World
from tests.distributed import saving
from tests.forked import jobs
from tests.harness import tensors

SEED = int(os.environ.get("MUTATION_SEED", secrets.randbelow(10**6)))
OPTIONS = ["--width", 16, "--run.save-every", 4, "--run.log-every", 1, "--run.threads", 1]
NEWEST, OLDER = "step-00000008", "step-00000004"


class Material:
    """A run of 8 steps with checkpoints of 4 and 8, and what they hold."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.checkpoints = run / "checkpoints"
        self.indexes = {step: verify(self.checkpoints / f"step-{step:08d}") for step in (4, 8)}
        self.tensors = {step: tensors(run, step) for step in (4, 8)}

    def copy(self, path: Path) -> Path:
        """A copy to be changed: the directory of its checkpoints."""
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.checkpoints, path)
        return path


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> list[Material]:
    path = tmp_path_factory.mktemp("material")
    with jobs(path) as start:
        for size, options in ((1, []), (2, ["--run.shard", "full"])):
            start(size, Path(saving.__file__), "--steps", 8, *OPTIONS, *options, "--run.dir", path / f"{size}").ok()
    return [Material(path / "1"), Material(path / "2")]


@pytest.fixture(scope="module")
def one_more(material: list[Material], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The tensors of the single process's run after one more step."""
    path = tmp_path_factory.mktemp("more")
    shutil.copytree(material[0].run, path / "run")
    with jobs(path) as start:
        start(1, Path(saving.__file__), "--steps", 9, *OPTIONS, "--run.dir", path / "run").ok()
    return tensors(path / "run")


# What becomes of a checkpoint. Each takes the directory of the checkpoints, and chance.

Mutation = Callable[[Path, random.Random], None]


def a_file(checkpoints: Path, chance: random.Random) -> Path:
    return chance.choice([path for path in sorted((checkpoints / NEWEST).iterdir()) if path.stat().st_size])


def data_file(checkpoints: Path, step: str = NEWEST) -> Path:
    [path] = (checkpoints / step).glob("*.safetensors")
    return path


def flip(checkpoints: Path, chance: random.Random) -> None:
    path = a_file(checkpoints, chance)
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def truncate(checkpoints: Path, chance: random.Random) -> None:
    path = a_file(checkpoints, chance)
    size = path.stat().st_size
    os.truncate(path, chance.choice([0, size - 1, chance.randrange(size), size // 4096 * 4096]))


def extend(checkpoints: Path, chance: random.Random) -> None:
    with open(a_file(checkpoints, chance), "ab") as file:
        file.write(chance.choice([b"\0", b"\n", bytes(4096), chance.randbytes(10)]))


def blank(checkpoints: Path, chance: random.Random) -> None:
    """A block that was never written, or overwritten."""
    path = a_file(checkpoints, chance)
    data = bytearray(path.read_bytes())
    size = chance.choice([16, 512, 4096])
    start = chance.randrange(len(data)) // size * size
    data[start : start + size] = chance.choice([bytes(size), chance.randbytes(size)])[: len(data) - start]
    path.write_bytes(data)


def exchange(checkpoints: Path, chance: random.Random) -> None:
    """Two places of a file, as blocks written to each other's."""
    path = a_file(checkpoints, chance)
    data = bytearray(path.read_bytes())
    size = chance.choice([4, 8, 64, 512])
    a, b = (chance.randrange(len(data) - size) // 4 * 4 for _ in range(2))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    path.write_bytes(data[: path.stat().st_size])


def swap_shards(checkpoints: Path, chance: random.Random) -> None:
    """The shards of two ranks in each other's place, or shards of another step."""
    index, path = read_index(checkpoints / NEWEST), data_file(checkpoints)
    data, other = bytearray(path.read_bytes()), data_file(checkpoints, OLDER).read_bytes()
    parts = [part for _, part in index.parts]
    if len(parts) > 1 and chance.random() < 0.5:
        size = min(part.size for part in parts)
        a, b = (part.offset for part in parts)
        data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    else:
        part = chance.choice(parts)
        data[part.offset : part.offset + part.size] = other[part.offset : part.offset + part.size]
    path.write_bytes(data)


def swap_files(checkpoints: Path, chance: random.Random) -> None:
    """A file, or all of them, from another step's checkpoint."""
    names = [path.name for path in sorted((checkpoints / NEWEST).iterdir())]
    for name in chance.choice([names, [chance.choice(names)]]):
        shutil.copyfile(checkpoints / OLDER / name, checkpoints / NEWEST / name)


def edit(checkpoints: Path, chance: random.Random) -> None:
    """The index's text changed by hand: a number, a name, a member."""
    path = checkpoints / NEWEST / "index.json"
    text = path.read_bytes()
    old, new = chance.choice(
        [
            (b'"step": 8', b'"step": 9'),
            (b'"samples_seen": 64', b'"samples_seen": 65'),
            (b'"lr": 0.001', b'"lr": 0.1'),
            (b'"F32"', b'"I32"'),
            (b"exp_avg_sq", b"exp_avg_qs"),
            (b'"format": 2', b'"format": 1'),
            (b'"seen"', b'"sean"'),
            (b"}\n", b"}"),
            (b'{"digest"', b' {"digest"'),
        ]
    )
    path.write_bytes(text.replace(old, new, chance.choice([1, -1])))


def replace(checkpoints: Path, chance: random.Random) -> None:
    """Something else than a file, or none."""
    path = a_file(checkpoints, chance)
    elsewhere = checkpoints / "elsewhere"
    kind = chance.choice(["none", "link", "directory", "pipe", "text", "all"])
    path.rename(elsewhere)
    if kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "text":
        path.write_text("See the other disk.\n")
    elif kind == "all":
        shutil.rmtree(checkpoints / NEWEST)
        (checkpoints / NEWEST).mkdir()


def head(checkpoints: Path, chance: random.Random) -> None:
    """A safetensors header that says something else, of the same length."""
    path = data_file(checkpoints)
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    names = [name for name in entries if name != "__metadata__"]
    a, b = chance.sample(names, 2)
    kind = chance.choice(["huge", "swapped", "dtype", "offsets", "code", "cut"])
    if kind == "huge":
        data[:8] = (chance.choice([2**63, 2**32, size + 8])).to_bytes(8, "little")
    elif kind == "swapped":
        entries[a], entries[b] = entries[b], entries[a]
    elif kind == "dtype":
        entries[a]["dtype"] = "I32"
    elif kind == "offsets":
        entries[a]["data_offsets"] = [0, 2**40]
    elif kind == "code":
        entries["__metadata__"] = {"__reduce__": "os.system"}
        del entries[a], entries[b]
    else:
        entries = dict(list(entries.items())[:3])
    if kind != "huge":
        data[8 : 8 + size] = json.dumps(entries, separators=(",", ":")).encode().ljust(size)[:size]
    path.write_bytes(data)


MUTATIONS: list[Mutation] = [
    *(flip, flip, flip, truncate, truncate, extend, blank, exchange, swap_shards, swap_files, edit, replace, head)
]


def mutations(count: int) -> Iterator[tuple[int, Mutation, random.Random]]:
    """`count` changes, each kind in its turn, each with a generator of its own."""
    for number in range(count):
        yield number, MUTATIONS[number % len(MUTATIONS)], random.Random(f"{SEED} {number}")


def test_none_loads_as_something_else(material: list[Material], tmp_path: Path) -> None:
    print(f"MUTATION_SEED={SEED} tries the same")
    outcomes = Counter()
    for number, mutate, chance in mutations(500):
        source = chance.choice(material)
        checkpoints = source.copy(tmp_path / "checkpoints")
        mutate(checkpoints, chance)
        try:
            outcomes[mutate.__name__, attempted(source, checkpoints / NEWEST)] += 1
        except BaseException:
            print(f"mutation {number}, {mutate.__name__}, of {source.run.name}: left in {checkpoints}")
            raise
    print(outcomes)
    refused = sum(count for (_, outcome), count in outcomes.items() if outcome == "refused")
    assert refused > 400, outcomes


def attempted(source: Material, path: Path) -> str:
    """Verify and load a checkpoint: what came of it."""
    unsound = refusal(lambda: verify(path))
    live = {name: torch.full_like(tensor, 7) for name, tensor in source.tensors[8].items()}
    loaded: list[Index] = []
    refused = refusal(lambda: loaded.append(load(path, World(), State(live))))
    if refused is None:
        as_saved(source, loaded[0], live)
        return "as it was" if unsound is None else "loads, does not verify"
    assert all(bool((tensor == 7).all()) for tensor in live.values()), f"something was loaded all the same: {refused}"
    assert unsound is not None, refused
    return "refused"


def refusal(work: Callable[[], object]) -> str | None:
    """The line in which something is refused, or None."""
    line = None
    try:
        work()
    except CheckpointError as error:
        line = str(error)
    assert line is None or "\n" not in line, line
    return line


def as_saved(source: Material, index: Index, live: dict[str, torch.Tensor]) -> None:
    right = source.indexes[index.step]
    for member in ("values", "rank_values", "exceptions", "facts", "world_size", "attempt", "tensors", "aliases"):
        assert getattr(index, member) == getattr(right, member), member
    for name, tensor in live.items():
        assert same(tensor, source.tensors[index.step][name]), name


def test_no_run_goes_on_from_something_else(
    material: list[Material], one_more: dict[str, torch.Tensor], tmp_path: Path, start_again: Callable[..., str]
) -> None:
    """The whole start of a run: it passes the damaged one over, and ends as the undisturbed one does."""
    print(f"MUTATION_SEED={SEED} tries the same")
    passed_over = 0
    for number, mutate, chance in mutations(2 * len(MUTATIONS)):
        run = tmp_path / f"{number}"
        shutil.copytree(material[0].run, run)
        mutate(run / "checkpoints", chance)
        printed = start_again(run, f"{number}, {mutate.__name__}")
        last = tensors(run)
        assert all(same(last[name], tensor) for name, tensor in one_more.items()), printed
        verify(run / "checkpoints" / "step-00000009")
        passed_over += "PASSED OVER" in printed
    assert passed_over > 15


@pytest.fixture
def start_again(run_recipe: Callable[..., str], capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Start a run for a ninth step, in this process; what it prints. Its exit code is that of a refusal, or 0."""

    def run(path: Path, what: str, codes: tuple[int, ...] = (0,)) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["saving.py", "--steps", "9", *map(str, OPTIONS), "--run.dir", str(path)])
            code: object = 0
            try:
                launcher.main(saving.train)
            except SystemExit as exit_:
                code = exit_.code
            except BaseException as error:
                raise AssertionError(f"{what}: a traceback, of {type(error).__name__}: {error}") from error
        captured = capfd.readouterr()
        printed = captured.out + captured.err
        assert code in codes, f"{what}: exit code {code}\n{printed}"
        assert "Traceback" not in printed, f"{what}\n{printed}"
        if code:
            assert len([line for line in printed.splitlines() if line.startswith("launcher: ")]) == 1, printed
        return printed

    return run


# Forgeries: of what an index says, with the digest that it then has.

HUGE = 10**400
EMA = "track/ema"


def forge(checkpoint: Path, index: object) -> None:
    body = json.dumps(index).encode()
    digest = xxhash.xxh3_128_hexdigest(body).encode()
    (checkpoint / "index.json").write_bytes(b'{"digest": "' + digest + b'", "index": ' + body + b"}\n")


def members(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "index.json").read_bytes())["index"]


REMOVE = object()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *(("values", value) for value in ({}, {"loaders": {}}, {"x": 3})),
        *(("values/loaders", value) for value in (3, None, {}, [], {"loader": None}, REMOVE)),
        *(("values/loaders/loader", value) for value in ({}, {"size": 101}, {"samples_seen": 64}, [1])),
        *(("values/loaders/loader/samples_seen", value) for value in ("64", None, 64.0, True, -5, HUGE, 2**62)),
        *(("values/loaders/loader/size", value) for value in (None, "101", 102, [])),
        *(("values/optimizer", value) for value in (None, {}, [], 3, REMOVE, {"groups": None}, {"groups": []})),
        *(("values/optimizer/groups", value) for value in (3, None, {}, [], [{}], [{}, {}], [[]], [3])),
        *(("values/optimizer/groups/0/lr", value) for value in ("x", None, [], {}, -1.0, HUGE, REMOVE)),
        *(("values/optimizer/groups/0/betas", value) for value in (3, [], ["a", "b"], None)),
        *(("values/optimizer/initial_groups", value) for value in (3, None, [], [{}], [{}, {}], REMOVE)),
        *(("values/optimizer/scalars", value) for value in (3, None, [], {"model/out.weight": 3}, REMOVE)),
        *((f"values/{EMA}", value) for value in (3, None, {}, [], {"$tensor": "nothing"}, {"out.bias": 1}, REMOVE)),
        (f"values/{EMA}", {"$tensor": ["model/out.bias"]}),
        (f"values/{EMA}", {"out.bias": {"$tensor": "model/out.bias"}}),
        (f"values/{EMA}", {"$items": 3}),
        (f"values/{EMA}", {"$tuple": None}),
        *(("values/track/progress", value) for value in (3, None, {}, {"seen": 3}, {"$items": [[{}, 3]]}, [1])),
        *(
            ("values/track/progress/sums", value)
            for value in ({"$items": [[0]]}, {"$items": [[0, 1, 2]]}, {"$tuple": 3})
        ),
        ("values/track/unknown", 3),
        *(("values/frozen", value) for value in (3, None, {"model": 3}, REMOVE)),
        *(("values/batch_coupled", value) for value in ("yes", None, [])),
        ("values/scaler", {"scale": "x"}),
        *(("rank_values/0", value) for value in ({"track/draws": 3}, {"track/draws": None}, {"x": 3}, {"stream/y": 3})),
        *(("rank_values/0/track/draws", value) for value in ({}, {"drawn": 3}, {"drawn": ["x"]}, [])),
        *(("facts", value) for value in ({}, {"config": 3}, {"metrics": 3}, {"metrics": {"loss": []}})),
        *(("facts/config", value) for value in ({}, {"run": 3}, None, {"steps": "8"}, {"width": {}})),
        *(("facts/metrics", value) for value in ({"loss": "low"}, {"attempt": 9, "step": "x"}, {"x": {"y": None}})),
        *(("step", value) for value in (0, 3, 9, 10, 2**62)),
        *(("attempt", value) for value in (0, 2**62)),
        ("exceptions", []),
        ("aliases/model/tied", "model/out.bias"),
        ("aliases/optimizer/exp_avg/model/tied", "model/out.bias"),
        *((f"tensors/{EMA}/out.bias/dtype", value) for value in ("I32", "U32")),
        *((f"tensors/{EMA}/out.bias/shape", value) for value in ([2, 4], [4, 2], [8, 1])),
        *(("tensors/optimizer/step/model/out.bias/shape", value) for value in ([1], [1, 1], [1, 1, 1])),
        ("tensors/optimizer/step/model/out.bias/dtype", "I32"),
    ],
    ids=lambda value: "REMOVE" if value is REMOVE else str(value)[:40],
)
def test_a_forged_value_never_ends_in_a_traceback(
    material: list[Material], tmp_path: Path, start_again: Callable[..., str], place: str, value: object
) -> None:
    """The start of a run refuses it in a line, or can live with it: what a recipe's own object makes of numbers that
    are its own, or torch of moments that have another shape, is theirs to say."""
    shutil.copytree(material[0].run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / NEWEST
    index = members(checkpoint)
    put(index, place, value)
    forge(checkpoint, index)
    start_again(tmp_path / "run", f"{place}: {value}", codes=(0, 1, 2))


def put(index: dict[str, Any], place: str, value: object) -> None:
    """Put a value where a path leads; names may have slashes in them."""
    inner: Any = index
    while True:
        keys = [str(k) for k in (range(len(inner)) if isinstance(inner, list) else inner)]
        found = [key for key in keys if place == key or place.startswith(f"{key}/")]
        key = max(found, key=len, default=place)
        if key == place:
            break
        inner, place = inner[int(key) if isinstance(inner, list) else key], place[len(key) + 1 :]
    if value is REMOVE:
        del inner[key]
    else:
        inner[int(key) if isinstance(inner, list) else key] = value


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.sentinel,)


@pytest.mark.parametrize("kind", ["pickle", "torch.save", "behind the header", "in the values", "as a tensor's name"])
def test_nothing_runs_code(
    material: list[Material], tmp_path: Path, start_again: Callable[..., str], kind: str
) -> None:
    sentinel, run = tmp_path / "sentinel", tmp_path / "run"
    bomb = pickle.dumps(Bomb(sentinel))
    shutil.copytree(material[0].run, run)
    checkpoint, path = run / "checkpoints" / NEWEST, data_file(run / "checkpoints")
    index = members(checkpoint)
    if kind == "pickle":
        path.write_bytes(bomb)
    elif kind == "torch.save":
        torch.save({"model": Bomb(sentinel)}, path)
    elif kind == "behind the header":  # with all the digests that it needs
        data = bytearray(path.read_bytes())
        start = index["parts"][0]["offset"]
        data[start : start + len(bomb)] = bomb
        digest = xxhash.xxh3_128_digest(bytes(data[start : start + index["parts"][0]["size"]]))
        index["parts"][0]["digests"] = base64.b64encode(digest).decode()
        path.write_bytes(data)
    elif kind == "in the values":
        text = base64.b64encode(bomb).decode()
        index["values"]["track/progress"] |= {"__reduce__": ["os.system", "touch sentinel"], "pickle": text}
        index["rank_values"][0]["track/draws"] = {"drawn": [7], "__setstate__": text, "$pickle": text}
        index["facts"]["metrics"] = {"loss": f"!!python/object/apply:os.system ['touch {sentinel}']"}
    else:
        index["values"][EMA]["__import__('os').system('touch sentinel')"] = {"$tensor": "model/out.bias"}
    forge(checkpoint, index)
    start_again(run, kind, codes=(0, 1, 2))
    assert not sentinel.exists()
    assert not Path("sentinel").exists()
    pickle.loads(bomb)
    assert sentinel.exists(), "the bomb would not have gone off anyway"
