"""The options of a run: the recipe's own at the top level, the launcher's under ``--run.*``."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from launcher.changes import OF_ONE_START, Change, changes, check_resume
from launcher.checkpoint.retention import Best
from launcher.errors import RecipeError, UsageError
from launcher.launch import read_launch
from launcher.options import flag, parse_options
from launcher.tables import overlay, read_table
from launcher.values import decode, default_of, describe, encode, init_fields, is_table, option_types

__all__ = ["Change", "RunConfig", "changes", "check_resume", "parse", "resolve", "to_dict"]

C = TypeVar("C")

RESERVED = ("run", "config", "help")
AT_LEAST = {
    **{"save_every": 0, "keep": 1, "keep_every": 0, "log_every": 1, "workers": 0, "threads": 1},
    **{"bad_numbers_limit": 1, "gc_every": 0, "empty_cache_every": 0},
}

# What is unset means where `accelerate launch` leaves it unsaid too.
UNSAID = {"precision": "no", "compile": "off", "compile_scope": "model", "shard": "none"}
UNSAID |= {"activation_checkpointing": "off"}


@dataclass(frozen=True)
class RunConfig:
    """How the launcher runs a recipe; what it learns is the recipe's own config."""

    dir: str | None = None
    """Run directory; with one that holds a run, the run goes on. Unset: a fresh one under runs/."""
    name: str | None = None
    """What a fresh run directory is called; unset: the recipe's file name."""
    seed: int = 0
    """Fixes the initial weights, the data order and every random draw."""
    precision: Literal["no", "bf16", "fp16"] | None = None
    """Mixed precision; unset: what `accelerate launch` said, else no."""
    tf32: bool = True
    """Let fp32 matrix products on a GPU use TF32."""
    compile: Literal["off", "default", "reduce-overhead", "max-autotune"] | None = None
    """torch.compile mode; unset: what `accelerate launch` said, else off."""
    compile_scope: Literal["model", "block"] | None = None
    """Compile the model whole, or each of its repeated blocks (a faster start); unset: accelerate's, else model."""
    shard: Literal["none", "full", "hybrid"] | None = None
    """FSDP2: over all ranks, or within a node and replicated between nodes; unset: accelerate's, else none."""
    activation_checkpointing: Literal["off", "full", "selective"] | None = None
    """Recompute each repeated block in the backward pass instead of keeping its activations: all of it, or all but
    attention and every second matrix product; unset: what `accelerate launch` said, else off."""
    sync: Literal["last", "every"] = "last"
    """Reduce gradients on the last micro-batch of a step, or on every one (less memory when sharded)."""
    save_every: int = 0
    """Steps between checkpoints; 0: only at the end, and when stopped."""
    keep: int = 2
    """Checkpoints kept; older ones go once a newer one is published and verified."""
    keep_every: int = 0
    """Also keep, for ever, the first checkpoint at or after every so many steps; 0: none."""
    keep_best: str | None = None
    """Also keep the best by a metric that is logged for its step: `val_loss:min`, `accuracy:max`."""
    log_every: int = 10
    """Steps between metrics lines."""
    workers: int = 0
    """Data worker processes a rank; they cannot change the data."""
    threads: int | None = None
    """CPU threads a rank; unset: OMP_NUM_THREADS if you set it, else this machine's cores shared out."""
    deterministic: bool = False
    """Only deterministic kernels, so that losses repeat bit for bit on a GPU."""
    bad_numbers: Literal["stop", "skip", "rewind"] = "stop"
    """A step whose loss or gradient is not finite: stop, skip its update, or rewind and leave its samples out."""
    bad_numbers_limit: int = 3
    """Steps in a row that `bad_numbers` may skip, or rewind; one more stops the run."""
    spike: float | None = None
    """Also take for bad a loss above so many times the median of the last 50 steps' (10, say); unset: none is."""
    hang_after: float | Literal["auto", "off"] = "auto"
    """Seconds without progress that end the run (10 x in the first step, a restore, a save); auto: 10 min and more."""
    join_within: float = 600.0
    """Seconds for all ranks to come, from the first on."""
    gc_every: int = 100
    """Steps between garbage collections, on all ranks at once; 0: when Python likes, which makes stragglers."""
    empty_cache_every: int = 0
    """Steps between two calls of torch.cuda.empty_cache, which makes the GPU wait and allocate anew; 0: none."""
    cache: str = "auto"
    """Where compiled code is kept for the next start: auto (.cache/compile beside the run), off, or a directory."""
    resume: str = "auto"
    """auto: go on from the run's newest checkpoint; never: refuse a run that has one; or a checkpoint's path."""
    init_from: str | None = None
    """A checkpoint, or a run, whose weights (alone) to start from."""
    init_only: tuple[str, ...] = ()
    """Of `init_from`, only the weights whose names match one of these patterns: `blocks.*`; what is left is listed."""
    allow: tuple[str, ...] = ()
    """Changes to accept on resume, by option name (`lr`, `run.precision`), or `world` for batch-coupled models."""
    tracker: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also send metrics to these trackers, through Accelerate."""

    @property
    def cuda_graphs(self) -> bool:
        """Whether, on a GPU, what is compiled is replayed as CUDA graphs."""
        return self.compile in ("reduce-overhead", "max-autotune")

    def __post_init__(self) -> None:
        for name, least in AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{flag('run.' + name)} {value}: at least {least}")
        for name in ("hang_after", "join_within"):
            value = getattr(self, name)
            if isinstance(value, float | int) and not 0 < value < math.inf:
                raise UsageError(f"{flag('run.' + name)} {value}: seconds above 0")
        if self.spike is not None and not 1 < self.spike < math.inf:
            raise UsageError(f"--run.spike {self.spike}: a factor above 1, such as 10")
        if self.bad_numbers == "rewind" and not self.save_every:
            raise UsageError("--run.bad-numbers rewind goes back to a checkpoint: give --run.save-every N too")
        if self.keep_best is not None:
            Best.parse(self.keep_best)
        if self.init_only and self.init_from is None:
            raise UsageError("--run.init-only names weights of --run.init-from, which is not given")


def parse(
    config_type: type[C] | None, argv: Sequence[str], *, prog: str, description: str | None
) -> tuple[C | None, RunConfig]:
    """The recipe's config and the run's, from the command line and the file that its `--config` names.

    The file holds options in TOML or JSON, nested as on the command line (`[model]`, `[run]`); the command line wins.

    Args:
        config_type: the dataclass of the recipe's options; None: it has none.
        argv: the arguments, without the program's name.
        prog: what the program is called in its help.
        description: what the help begins with.

    Raises:
        UsageError: an option, a value or the file is wrong.
        RecipeError: `config_type` is not what options can be made of.
        SystemExit: after `--help`.
    """
    if config_type is not None:
        _check(config_type)
    known = ({} if config_type is None else option_types(config_type)) | option_types(RunConfig, "run.")
    options = _options_type(config_type)
    path = _config_file(argv)
    default = None if path is None else _from_file(path, config_type, options, known)
    parsed = parse_options(
        options, argv, default=default, known={**known, "config": Path}, prog=prog, description=description
    )
    return getattr(parsed, "cfg", None), parsed.run


def to_dict(config: Any, run: RunConfig) -> dict[str, Any]:
    """Both configs as JSON can hold them, nested as the options are: what `--config` reads back as equal ones.

    Without `run.dir`, `run.resume` and `run.allow`, which belong to one start.
    """
    own = {} if config is None else encode(config)
    return {**own, "run": {name: value for name, value in encode(run).items() if name not in OF_ONE_START}}


def resolve(run: RunConfig, environ: Mapping[str, str]) -> RunConfig:
    """`run` with what it leaves open filled in from what `accelerate launch` said; nothing of that is None after it.

    Raises:
        UsageError: both say something and differ, or `accelerate launch` asks for what would be ignored.
    """
    filled: dict[str, Any] = {}
    for name, said in read_launch(environ).items():
        own = getattr(run, name)
        if own not in (None, said.value):
            raise UsageError(f"accelerate launch says {said.words}, {flag('run.' + name)} says {own}: drop one")
        filled[name] = said.value
    for name, unsaid in UNSAID.items():
        if getattr(run, name) is None:
            filled.setdefault(name, unsaid)
    return dataclasses.replace(run, **filled)


def _options_type(config_type: type | None) -> Any:
    """The dataclass of the whole command line: the recipe's options at the top, the run's below `run`."""
    import tyro

    path = Annotated[str | None, tyro.conf.arg(metavar="FILE", help="TOML or JSON file of options; these win over it.")]
    members: list[Any] = [("run", RunConfig), ("config", path, None)]
    if config_type is not None:
        members.insert(0, ("cfg", Annotated[config_type, tyro.conf.arg(name="")]))
    return dataclasses.make_dataclass("Options", members)


def _from_file(path: str, config_type: type | None, options: Any, known: Mapping[str, Any]) -> Any:
    """The whole command line's defaults, with the values that a file gives."""
    table, faults = read_table(path), []  # type: tuple[dict[str, Any], list[str]]
    own = table.pop("run", {})
    values: dict[str, Any] = {"config": path}
    if config_type is not None:
        values["cfg"] = overlay(config_type, table, "", known, faults)
    else:
        faults += [f"unknown key {key}: the recipe has no options of its own" for key in table]
    values["run"] = overlay(RunConfig, own, "run.", known, faults)
    if faults:
        raise UsageError(f"--config {path}: {faults[0]}" + (f" (and {len(faults) - 1} more)" if faults[1:] else ""))
    return options(**values)


def _check(config: type, prefix: str = "") -> None:
    """Refuse a config whose options could not be given in a file and read back as they are."""
    if not is_table(config):
        raise RecipeError(f"{config.__name__}, which train's cfg is annotated with, is not a dataclass: add @dataclass")
    try:
        members = init_fields(config)
    except NameError as error:
        raise RecipeError(f"{config.__name__}: its annotations cannot be read ({error})") from None
    for name, (field, kind) in members.items():
        where = f"{config.__name__}.{name}"
        if not prefix and name in RESERVED:
            raise RecipeError(f"{where}: the name is the launcher's own, call it something else")
        if is_table(kind):
            _check(kind, f"{prefix}{name}.")
            continue
        try:
            expected, default = describe(kind), default_of(field)
            if default is not dataclasses.MISSING:
                decode(kind, encode(default))
        except TypeError as error:
            raise RecipeError(f"{where}: {error} is not a type that an option can have") from None
        except ValueError:
            raise RecipeError(f"{where}: its default {default!r} is not what it is annotated as: {expected}") from None


def _config_file(argv: Sequence[str]) -> str | None:
    """The file that `--config` names, wherever it stands."""
    pairs = itertools.pairwise(argv)
    found = [value for name, value in pairs if name == "--config" and not value.startswith("--")]
    found += [token.partition("=")[2] for token in argv if token.startswith("--config=")]
    if len(found) > 1:
        raise UsageError(f"--config is given twice: {' and '.join(found)}")
    return found[0] if found else None
