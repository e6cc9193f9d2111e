"""Options from the command line and from files, what accelerate launch said, and what a resume may change."""

import enum
import functools
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from launcher.changes import FREE, Change
from launcher.config import RunConfig, changes, check_resume, parse, resolve, to_dict
from launcher.errors import RecipeError, UsageError
from launcher.values import decode, encode, option_types

ROOT = Path(__file__).parent.parent


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass(frozen=True)
class Model:
    depth: int = 4  # blocks that repeat
    tie: bool = True


@dataclass(frozen=True)
class Config:
    model: Model = Model(depth=5)
    steps: int = 200  # optimizer steps
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    files: tuple[str, ...] = ()
    kind: Literal["conv", "mlp"] = "conv"
    color: Color = Color.RED
    out: Path | None = None
    clip: float = math.inf
    layers: list[int] = field(default_factory=lambda: [1, 2])
    weights: dict[str, float] = field(default_factory=dict)
    cfg: int = 0

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, at least 1")


@dataclass(frozen=True)
class Inner:
    depth: int


@dataclass(frozen=True)
class Required:
    inner: Inner
    n: int
    name: str = "x"

    def __post_init__(self):
        assert self.n > 0, "n is positive"


def parsed(*argv: str, config: Any = Config) -> tuple[Any, RunConfig]:
    return parse(config, argv, prog="recipe.py", description="A recipe.")


def refused(*argv: str, config: Any = Config) -> str:
    with pytest.raises(UsageError) as caught:
        parsed(*argv, config=config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_options_are_the_recipes_at_the_top_and_the_runs_under_run() -> None:
    argv = "--lr 0.1 --model.depth 7 --model.no-tie --files a b --betas 0 1 --color BLUE --out x/y --kind mlp"
    cfg, run = parsed(*argv.split(), "--run.save_every", "3", "--run.tracker", "wandb", "--layers", "--cfg", "4")
    assert cfg == Config(
        model=Model(depth=7, tie=False), lr=0.1, files=("a", "b"), betas=(0.0, 1.0), color=Color.BLUE, out=Path("x/y"),
        kind="mlp", layers=[], cfg=4,
    )  # fmt: skip
    assert run == RunConfig(save_every=3, tracker=("wandb",))


def test_no_options_give_the_defaults() -> None:
    assert parsed() == (Config(), RunConfig())
    assert parsed("--run.seed", "3", config=None) == (None, RunConfig(seed=3))


def test_help_shows_every_option_with_type_default_and_comment(capsys) -> None:
    with pytest.raises(SystemExit) as done:
        parsed("--help")
    assert done.value.code == 0
    shown = capsys.readouterr().out
    for key in [*option_types(Config), *option_types(RunConfig, "run.")]:
        assert f"--{key.replace('_', '-')}" in shown
    assert "A recipe." in shown
    assert re.search(r"--model.depth INT[\s│]+blocks that repeat \(default: 5\)", shown)
    assert "--config FILE" in shown
    assert "Fixes the initial weights" in shown


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--stesp 4", "unknown option --stesp: did you mean --steps?"),
        ("--model.dpth=4", "unknown option --model.dpth: did you mean --model.depth?"),
        ("--precision bf16", "unknown option --precision: did you mean --run.precision?"),
        ("--run.save-evry 4", "unknown option --run.save-evry: did you mean --run.save-every?"),
        ("--model.no-tied", "unknown option --model.no-tied: did you mean --model.no-tie?"),
        ("-lr 4", "unknown option -lr: did you mean --lr?"),
        ("--model 4", "unknown option --model: its options are --model.depth, --model.tie, --model.no-tie, ..."),
        ("--zzz 4", "unknown option --zzz (--help lists them)"),
        ("--stesp 4 --lrr 5 --xyz", "unknown option --stesp: did you mean --steps? (and 2 more)"),
        ("--steps abc", "--steps abc: expected int"),
        ("--steps=1.5", "--steps 1.5: expected int"),
        ("--steps 1 --steps x", "--steps x: expected int"),
        ("--steps", "--steps needs a value: expected int"),
        ("--steps --lr 3", "--steps needs a value: expected int"),
        ("--steps 1 2", "--steps does not take '2' as well: expected int"),
        ("--betas 1", "--betas 1: expected [float, float]"),
        ("--betas 1 x", "--betas 1 x: expected [float, float]"),
        ("--kind cnn", "--kind cnn: expected conv | mlp"),
        ("--color GREEN", "--color GREEN: expected RED | BLUE"),
        ("--run.precision bf17", "--run.precision bf17: expected no | bf16 | fp16 | None"),
        ("--run.threads x", "--run.threads x: expected int | None"),
        ("--run.tracker x", "--run.tracker x: expected list of tensorboard | wandb"),
        ("--weights a x", "--weights a x: expected table of float"),
        ("--model.tie False", "--model.tie takes no value, not 'False': write --model.tie or --model.no-tie"),
        ("--model.no-tie=1", "--model.no-tie takes no value, not '1': write --model.tie or --model.no-tie"),
        ("foo", "'foo' stands alone: options are written --name value"),
        ("--run.log-every 0", "--run.log-every 0: at least 1"),
        ("--run.keep 0", "--run.keep 0: at least 1"),
        ("--run.workers -1", "--run.workers -1: at least 0"),
        ("--steps 0", "these options are refused: steps is 0, at least 1"),
        ("--config", "--config needs a value: expected path"),
        ("--config --lr 3", "--config needs a value: expected path"),
        ("--config a.toml --config=b.toml", "--config is given twice: a.toml and b.toml"),
    ],
)
def test_a_wrong_option_is_one_line(argv: str, line: str) -> None:
    assert refused(*argv.split()) == line


def test_a_required_option_is_named() -> None:
    assert refused(config=Required) == "--n is required: expected int (and 1 more)"
    assert refused("--inner.dept", "3", "--n", "1", config=Required).endswith("did you mean --inner.depth?")
    assert refused("--n", "0", "--inner.depth", "1", config=Required).startswith(
        "these options are refused: n is positive"
    )


def test_a_tyro_without_the_hook_still_refuses(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "tyro._errors", None)
    with pytest.raises(SystemExit) as done:
        parsed("--stesp", "4")
    assert done.value.code == 2
    assert "--stesp" in capsys.readouterr().err


@pytest.mark.parametrize("reserved", ["run", "config", "help"])
def test_the_launchers_own_names_are_refused_in_a_recipe(reserved: str) -> None:
    config = dataclass(type("Mine", (), {"__annotations__": {reserved: int}, reserved: 3}))
    with pytest.raises(RecipeError, match=f"Mine.{reserved}: the name is the launcher's own"):
        parsed(config=config)


@pytest.mark.parametrize(
    ("annotation", "default", "words"),
    [
        (str, None, "its default None is not what it is annotated as: str"),
        (int, 1e5, "its default 100000.0 is not what it is annotated as: int"),
        (bytes, b"", "bytes is not a type that an option can have"),
        (Any, 3, "Any is not a type that an option can have"),
        (Model | None, None, "Model is not a type that an option can have"),
        ("NoSuchName", 3, "its annotations cannot be read"),
    ],
)
def test_a_config_that_a_file_could_not_hold_is_refused(annotation: Any, default: Any, words: str) -> None:
    config = dataclass(type("Mine", (), {"__annotations__": {"x": annotation}, "x": default}))
    with pytest.raises(RecipeError) as caught:
        parsed(config=config)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_must_be_a_dataclass() -> None:
    with pytest.raises(RecipeError, match=r"int, .* is not a dataclass"):
        parsed(config=int)


TOML = """
lr = 1
betas = [0.5, 1]
files = ["a b"]
color = "BLUE"
clip = inf
weights = {a = 2}
[model]
depth = 9
[run]
save-every = 3
tracker = ["wandb"]
dir = "somewhere"
"""


def test_a_file_gives_options_and_the_command_line_wins(tmp_path) -> None:
    (tmp_path / "x.toml").write_text(TOML)
    expected = Config(
        model=Model(depth=9), lr=1.0, betas=(0.5, 1.0), files=("a b",), color=Color.BLUE, weights={"a": 2.0}
    )
    ours = RunConfig(save_every=3, tracker=("wandb",), dir="somewhere")
    path = str(tmp_path / "x.toml")
    assert parsed("--config", path) == (expected, ours)
    cfg, run = parsed("--lr", "7", f"--config={path}", "--model.no-tie", "--run.save-every", "4", "--files")
    assert cfg == replace(expected, lr=7.0, model=Model(depth=9, tie=False), files=())
    assert run == replace(ours, save_every=4)


def test_a_file_keeps_the_defaults_of_the_recipe_it_does_not_name(tmp_path) -> None:
    (tmp_path / "x.toml").write_text("[model]\ntie = false\n")
    assert parsed("--config", str(tmp_path / "x.toml"))[0] == Config(model=Model(depth=5, tie=False))


def test_a_file_may_give_what_is_required(tmp_path) -> None:
    (tmp_path / "x.json").write_text('{"inner": {"depth": 3}}')
    argv = ("--config", str(tmp_path / "x.json"))
    assert parsed(*argv, "--n", "2", config=Required)[0] == Required(Inner(3), 2)
    assert refused(*argv, config=Required) == "--n is required: expected int"


def test_a_recipes_own_check_sees_the_final_values(tmp_path) -> None:
    (tmp_path / "x.toml").write_text("steps = 0\n[run]\nkeep = 0")
    argv = ("--config", str(tmp_path / "x.toml"))
    assert parsed(*argv, "--steps", "3", "--run.keep", "2")[0].steps == 3
    assert "steps is 0" in refused(*argv, "--run.keep", "1")
    assert refused(*argv, "--steps", "3") == "--run.keep 0: at least 1"


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("x.toml", "stesp = 3", "unknown key stesp: did you mean steps?"),
        ("x.toml", "precision = 'no'", "unknown key precision: did you mean run.precision?"),
        ("x.toml", "[model]\ndpth = 3", "unknown key model.dpth: did you mean model.depth?"),
        ("x.toml", "[rum]\nseed = 3", "unknown key rum"),
        ("x.toml", "lr = '3'", 'lr = "3": expected float'),
        ("x.toml", "steps = 3.0", "steps = 3.0: expected int"),
        ("x.toml", "steps = true", "steps = true: expected int"),
        ("x.toml", "steps = 2020-01-01", 'steps = "2020-01-01": expected int'),
        ("x.toml", "betas = [1]", "betas = [1]: expected [float, float]"),
        ("x.toml", "files = 'a'", 'files = "a": expected list of str'),
        ("x.toml", "model = 3", "model = 3: expected a table"),
        ("x.toml", "color = 'GREEN'", 'color = "GREEN": expected RED | BLUE'),
        ("x.toml", "kind = 3", "kind = 3: expected conv | mlp"),
        ("x.toml", "lr = true\ndpth = 3\n[run]\nkeep = 'a'", "lr = true: expected float (and 2 more)"),
        ("x.toml", "steps = 3\nlr = x", "Invalid value (at line 2, column 6)"),
        ("x.json", '{"lr": 3,\n "steps": }', "Expecting value: line 2 column 11 (char 20)"),
        ("x.json", '{"lr": 3, "lr": 4}', "lr is given twice"),
        ("x.json", "[3]", "holds a list, not a table of options"),
        ("x.json", '{"out": 3}', "out = 3: expected path | None"),
        ("x.yaml", "lr: 3", "neither .toml nor .json"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, name: str, text: str, line: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert refused("--config", str(path)).startswith(f"--config {path}: {line}")


def test_a_missing_file_is_one_line(tmp_path) -> None:
    assert refused("--config", "no/such.toml") == "--config no/such.toml: No such file or directory"
    (tmp_path / "d.toml").mkdir()
    assert refused("--config", str(tmp_path / "d.toml")).endswith("Is a directory")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    assert "utf-8" in refused("--config", str(tmp_path / "b.toml"))


def test_a_file_of_a_recipe_without_options(tmp_path) -> None:
    (tmp_path / "x.toml").write_text("lr = 3")
    assert refused("--config", str(tmp_path / "x.toml"), config=None).endswith(
        "unknown key lr: the recipe has no options of its own"
    )


ROUND_TRIPS = [
    "",
    "--lr inf --clip 3 --files a --betas -inf 1e-12 --out /x/y --color BLUE --model.no-tie",
    "--files --layers 3 4 --weights a 1 b inf --kind mlp --out None",
    "--run.precision bf16 --run.shard full --run.tracker wandb tensorboard --run.threads 3 --run.name n",
]


@pytest.mark.parametrize("argv", ROUND_TRIPS)
@pytest.mark.parametrize("resolved", [False, True])
def test_a_saved_config_gives_an_equal_one(tmp_path, argv: str, resolved: bool) -> None:
    cfg, run = parsed(*argv.split())
    if resolved:
        run = resolve(run, {})
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(to_dict(cfg, run), allow_nan=False))
    assert parsed("--config", str(saved)) == (cfg, run)
    again = to_dict(*parsed("--config", str(saved)))
    assert again == json.loads(saved.read_text())


def test_a_saved_config_runs_again_in_a_fresh_directory(tmp_path) -> None:
    run = RunConfig(dir="runs/x", resume="never", allow=("lr",), seed=3)
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(to_dict(Config(), run)))
    assert parsed("--config", str(saved))[1] == RunConfig(seed=3)
    assert to_dict(None, run).keys() == {"run"}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int | str, "3"),
        (int | str, 3),
        (float | None, math.inf),
        (Literal[1, True, "a", None], True),
        (Literal[1, True, "a", None], 1),
        (tuple[tuple[int, int], ...], ((1, 2), (3, 4))),
        (set[str], {"b", "a"}),
        (dict[str, tuple[int, ...]], {"a": (1, 2), "b": ()}),
        (tuple[Color, ...], (Color.BLUE, Color.RED)),
        (bool | int, True),
        (Path, Path("a/b")),
    ],
)
def test_values_survive_json(kind: Any, value: Any) -> None:
    decoded = decode(kind, json.loads(json.dumps(encode(value), allow_nan=False)))
    assert decoded == value
    assert type(decoded) is type(value)


# What `accelerate launch` 1.15 exports when nothing is asked for, and what --use_fsdp adds.
UNSAID = {
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
    "ACCELERATE_MIXED_PRECISION": "no",
}
FSDP = UNSAID | {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_VERSION": "2",
}
NOTHING = RunConfig(precision="no", compile="off", compile_scope="model", shard="none", activation_checkpointing="off")


@pytest.mark.parametrize("environ", [{}, UNSAID, FSDP | {"ACCELERATE_USE_FSDP": "false"}])
def test_nothing_said_is_plain(environ: dict[str, str]) -> None:
    assert resolve(RunConfig(), environ) == NOTHING
    ours = RunConfig(precision="bf16", compile="max-autotune", compile_scope="block", shard="hybrid")
    ours = replace(ours, activation_checkpointing="selective")
    assert resolve(ours, environ) == ours


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (UNSAID | {"ACCELERATE_MIXED_PRECISION": "bf16"}, {"precision": "bf16"}),
        (UNSAID | {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {"compile": "default"}),
        (
            UNSAID
            | {
                "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
                "ACCELERATE_DYNAMO_MODE": "reduce-overhead",
                "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "True",
            },
            {"compile": "reduce-overhead", "compile_scope": "block"},
        ),
        (FSDP, {"shard": "full"}),
        (FSDP | {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, {"shard": "hybrid"}),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {"shard": "full", "activation_checkpointing": "full"}),
        (FSDP | {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}, {"shard": "full"}),
        (FSDP | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, {"shard": "full"}),
    ],
)
def test_what_accelerate_launch_said_holds_and_may_be_said_twice(environ: dict[str, str], expected: Any) -> None:
    assert resolve(RunConfig(), environ) == replace(NOTHING, **expected)
    assert resolve(RunConfig(**expected), environ) == replace(NOTHING, **expected)


@pytest.mark.parametrize(
    ("environ", "run", "line"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            {"precision": "fp16"},
            "accelerate launch says mixed_precision=bf16, --run.precision says fp16: drop one",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"precision": "no"}, "--run.precision says no: drop one"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {"compile": "off"}, "--run.compile says off: drop one"),
        (FSDP, {"shard": "none"}, "accelerate launch says use_fsdp with FULL_SHARD, --run.shard says none: drop one"),
        (FSDP | {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, {"shard": "full"}, "--run.shard says full: drop one"),
        (
            FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {"activation_checkpointing": "selective"},
            "says fsdp_activation_checkpointing, --run.activation-checkpointing says selective: drop one",
        ),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "True"},
            {"compile_scope": "model"},
            "says dynamo_use_regional_compilation, --run.compile-scope says model: drop one",
        ),
    ],
)
def test_a_contradiction_tells_who_said_what(environ: dict[str, str], run: Any, line: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(RunConfig(**run), environ)
    assert str(caught.value).endswith(line)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision=fp8"),
        ({"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, "dynamo_backend=eager"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "True"}, "dynamo_use_fullgraph"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_USE_DYNAMIC": "True"}, "dynamo_use_dynamic"),
        ({"ACCELERATE_USE_FSDP": "true"}, "add --fsdp_version 2"),
        (FSDP | {"FSDP_VERSION": "1"}, "fsdp_version=1: add --fsdp_version 2"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params=true"),
        (FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, "fsdp_reshard_after_forward=false"),
        (FSDP | {"FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, "fsdp_sharding_strategy=shard_grad_op"),
        (FSDP | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy=SIZE_BASED_WRAP"),
        (FSDP | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "Block"}, "run.build(..., blocks=Block)"),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"}, "fsdp_activation_checkpointing_offload=true"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "use_deepspeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "use_megatron_lm"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "use_parallelism_config"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "follows from batch_size and microbatch_size"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(environ: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(RunConfig(), environ)
    assert words in str(caught.value)
    assert str(caught.value).startswith("accelerate launch says ")


RESOLVES = """
import dataclasses, os, json
from launcher.config import RunConfig, resolve
from launcher.errors import UsageError
try:
    print(json.dumps(dataclasses.asdict(resolve(RunConfig(), os.environ))))
except UsageError as error:
    print(json.dumps(str(error)))
"""


def launched(tmp_path: Path, *flags: str) -> Any:
    """What a process under the real `accelerate launch` makes of its environment."""
    script = tmp_path / "resolves.py"
    script.write_text(RESOLVES)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_"))}
    environ |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}
    done = subprocess.run([*command, *flags, str(script)], env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


def test_the_real_accelerate_launch_says_nothing_by_default(tmp_path) -> None:
    assert RunConfig(**launched(tmp_path) | {"allow": (), "tracker": (), "init_only": ()}) == NOTHING


def test_the_real_accelerate_launch_says_it_by_flags(tmp_path) -> None:
    flags = "--use_fsdp --fsdp_version 2 --fsdp_activation_checkpointing true --main_process_port 0 "
    flags += "--mixed_precision bf16 --dynamo_backend inductor --dynamo_mode max-autotune"
    said = launched(tmp_path, *flags.split(), "--dynamo_use_regional_compilation")
    assert (said["precision"], said["shard"], said["activation_checkpointing"]) == ("bf16", "full", "full")
    assert (said["compile"], said["compile_scope"]) == ("max-autotune", "block")


def test_the_real_accelerate_launch_says_it_by_its_config_file(tmp_path) -> None:
    (tmp_path / "accelerate.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nmixed_precision: bf16\nnum_processes: 1\n"
        "num_machines: 1\nmain_process_port: 0\nfsdp_config:\n  fsdp_version: 1\n"
    )
    said = launched(tmp_path, "--config_file", str(tmp_path / "accelerate.yaml"))
    assert said == "accelerate launch says fsdp_version=1: add --fsdp_version 2"


@functools.cache
def settings(*argv: str) -> dict[str, Any]:
    cfg, run = parsed(*argv)
    return json.loads(json.dumps(to_dict(cfg, resolve(run, {}))))


def test_changes_are_told_by_dotted_key() -> None:
    assert changes(settings(), settings()) == []
    told = changes(settings(), settings("--lr", "2", "--model.depth", "1", "--run.seed", "4", "--out", "x"))
    assert told == [
        Change("model.depth", 5, 1), Change("lr", 1e-3, 2.0), Change("out", None, "x"), Change("run.seed", 0, 4)
    ]  # fmt: skip
    assert str(told[2]) == 'out was null, now "x"'


FREELY = """--run.dir x --run.name n --run.save-every 3 --run.keep 9 --run.log-every 1 --run.workers 2 --run.threads 1
--run.resume never --run.tracker wandb --run.shard full --run.sync every --run.activation-checkpointing full"""


def test_what_changes_no_result_may_change() -> None:
    check_resume(settings(), settings(*FREELY.split()), ())
    assert not FREE - option_types(RunConfig, "run.").keys()


@pytest.mark.parametrize(
    "argv",
    [
        "--lr 2", "--model.depth 1", "--files a", "--run.seed 1", "--run.precision bf16", "--run.compile default",
        "--run.compile-scope block", "--run.deterministic", "--run.no-tf32", "--run.init-from x",
    ],
)  # fmt: skip
def test_what_changes_results_needs_leave(argv: str) -> None:
    key = argv.split()[0].removeprefix("--").replace("no-tf", "tf").replace("-", "_")
    with pytest.raises(UsageError) as caught:
        check_resume(settings(), settings(*argv.split()), ())
    assert f"{key} was " in str(caught.value)
    assert str(caught.value).endswith(f"accept with --run.allow {key})")
    check_resume(settings(), settings(*argv.split()), (key,))
    check_resume(settings(), settings(*argv.split()), (key.replace("_", "-"), "world"))


def test_a_refused_resume_names_all_that_changed() -> None:
    with pytest.raises(UsageError) as caught:
        check_resume(settings(), settings("--lr", "2", "--run.precision", "bf16", "--cfg", "3"), ("cfg",))
    assert 'lr was 0.001, now 2.0; run.precision was "no", now "bf16"' in str(caught.value)
    assert "--run.allow lr run.precision)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_steps_are_an_extension_and_fewer_are_not() -> None:
    check_resume(settings(), settings("--steps", "300"), ())
    with pytest.raises(UsageError, match="steps was 200, now 100"):
        check_resume(settings(), settings("--steps", "100"), ())
    with pytest.raises(UsageError, match=r"model\.steps was 1, now 2"):  # another thing of the same name
        check_resume({"model": {"steps": 1}}, {"model": {"steps": 2}}, ())
    check_resume({"epochs": 1}, {"epochs": 2.5}, ())
    with pytest.raises(UsageError, match="epochs was null, now 2"):
        check_resume({"epochs": None}, {"epochs": 2}, ())


def test_options_that_came_or_went_are_named() -> None:
    new = settings()
    old = {key: value for key, value in new.items() if key != "clip"} | {"dropout": 0.1}
    with pytest.raises(UsageError) as caught:
        check_resume(old, new, ())
    assert "dropout is gone (was 0.1)" in str(caught.value)
    assert 'clip is new ("inf")' in str(caught.value)
    check_resume(old, new, ("dropout", "clip"))


def test_leave_for_an_unknown_option_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--run.allow lrr: no such option: did you mean lr\?"):
        check_resume(settings(), settings(), ("lrr",))
    check_resume(settings(), settings(), ("world",))
