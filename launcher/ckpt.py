"""`launcher ckpt`: checkpoints as things one can look at. To list, verify and prune them, torch is not imported."""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.checkpoint.index import Json
from launcher.checkpoint.listing import CHECKPOINTS, Row, checkpoints, is_checkpoint, one_checkpoint, root_of, row, rows
from launcher.checkpoint.pruning import Pruning, carry_out, choose
from launcher.checkpoint.retention import Best, Retention
from launcher.checkpoint.verifying import verify_and_mark
from launcher.errors import CheckpointError, LauncherError, UsageError
from launcher.parser import Parser
from launcher.rundir import RunDir
from launcher.scores import scores
from launcher.show import human, print_json, print_table, printable

if TYPE_CHECKING:
    from launcher.checkpoint.comparing import Comparison, Difference

__all__ = ["main"]

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def main(argv: Sequence[str]) -> int:
    """The exit code of `launcher ckpt ARGV`.

    Raises:
        LauncherError: what is wrong, in a line.
        SystemExit: after `--help`.
    """
    options = _parser().parse_args(argv)
    if options.act is None:
        raise UsageError("name what to do: ls, verify, diff, export, import or prune (launcher ckpt --help)")
    act: Callable[[Namespace], int] = options.act
    try:
        return act(options)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise LauncherError(f"{where}{error.strerror or error}") from None
    except MemoryError:
        raise LauncherError("there is not enough memory for it on this machine") from None


def _parser() -> Parser:
    parser = Parser(
        prog="launcher ckpt",
        description="Look at checkpoints, compare, export, import and prune them. None of it needs a GPU.",
        epilog="RUN is a run directory, CHECKPOINT one of its checkpoints/step-N; of a run the newest is taken.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    parser.set_defaults(act=None)

    def command(act: Callable[[Namespace], int], name: str, text: str) -> Parser:
        added: Parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.set_defaults(act=act)
        added.add_argument("--json", action="store_true", help="print JSON, for scripts")
        return added

    listing = command(_ls, "ls", "list the checkpoints of runs")
    listing.add_argument("paths", metavar="RUN_OR_DIR", nargs="+", type=_path)
    verify = command(_verify, "verify", "read checkpoints back, every byte, and name what is damaged")
    verify.add_argument("paths", metavar="RUN_OR_CHECKPOINT", nargs="+", type=_path)
    diff = command(_diff, "diff", "say what differs between two checkpoints; exit code 1 if anything does")
    diff.add_argument("a", metavar="A", type=_path)
    diff.add_argument("b", metavar="B", type=_path)
    diff.add_argument("--only", metavar="PATTERN", help="compare only the tensors of these names: 'model/*'")
    _add_export(command(_export, "export", "write a model as plain safetensors, as transformers loads them"))
    _add_import(command(_import, "import", "make a checkpoint of safetensors or of a torch state dict"))
    _add_prune(command(_prune, "prune", "remove the checkpoints that a run need not keep"))
    return parser


def _path(text: str) -> Path:
    """A path whose last part is a name: messages and rows are told by it."""
    path = Path(text)
    return path.resolve() if path.name in ("", "..") else path


def _add_export(parser: Parser) -> None:
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT", type=_path)
    parser.add_argument("-o", "--output", metavar="DIR", type=_path, required=True, help="directory to write to")
    parser.add_argument("--name", default="model", help="what run.build called the model (default: model)")
    parser.add_argument("--shard-size", metavar="SIZE", default="5GB", help="bytes a file at most (default: 5GB)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="cast floating-point tensors")
    parser.add_argument(
        "--base", metavar="DIR", type=_path, help="take what is missing from here: frozen weights, config, tokenizer"
    )
    parser.add_argument("--copy-ties", action="store_true", help="write tied tensors under each of their names")


def _add_import(parser: Parser) -> None:
    parser.add_argument(
        "path", metavar="FILE_OR_DIR", type=_path, help="safetensors, a directory of them, or a .pt, .pth, .bin file"
    )
    parser.add_argument("-o", "--output", metavar="DIR", type=_path, required=True, help="the checkpoint to make")
    parser.add_argument("--name", default="model", help="what run.build calls the model (default: model)")
    parser.add_argument("--key", help="where in a nested torch file the state dict is")
    parser.add_argument(
        "--tie",
        metavar="NAME=HOLDER",
        action="append",
        default=[],
        help="a tied name that the file leaves out: lm_head.weight=model.embed_tokens.weight",
    )


def _add_prune(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", type=_path)
    parser.add_argument("--keep", metavar="K", type=int, help="how many of the last stay (default: the run's)")
    parser.add_argument("--keep-every", metavar="N", type=int, help="those of every N steps stay (default: the run's)")
    parser.add_argument("--keep-best", metavar="METRIC:min|max", help="the best stays (default: the run's); or no")
    parser.add_argument("--bad", action="store_true", help="also remove what was set aside as damaged")
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")


def _ls(options: Namespace) -> int:
    found = [
        (path, one)
        for path in options.paths
        for one in ([row(path)] if is_checkpoint(path) else rows(root_of(path)))
    ]  # fmt: skip
    if options.json:
        print_json([_row_as_json(path, one) for path, one in found])
    elif not found:
        print("no checkpoints")
    else:
        several = len(options.paths) > 1
        headers = [*(["run"] if several else []), "checkpoint", "step", "size", "world", "when", "loss", "state"]
        lines = [[*([path] if several else []), *_row_as_text(one)] for path, one in found]
        print_table(headers, lines, right=("step", "size", "world", "loss"))
    return 0


def _row_as_text(one: Row) -> list[str]:
    loss = _loss(one)
    when = _when(one).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    world = str(one.index.world_size) if one.index else "-"
    said = "-" if loss is None else f"{loss:.6g}"
    return [one.path.name, str(one.step), human(one.size), world, when, said, _state(one)]


def _row_as_json(given: Path, one: Row) -> dict[str, Json]:
    verified = None if one.verified is None else _utc(one.verified).isoformat("T", "seconds")
    return {
        "run": str(given),
        "path": str(one.path),
        "name": one.path.name,
        "step": one.step,
        "bytes": one.size,
        "world_size": one.index.world_size if one.index else None,
        "attempt": one.index.attempt if one.index else None,
        "time": _when(one).isoformat("T", "seconds"),
        "loss": _loss(one),
        "state": one.kind or ("broken" if one.fault else "verified" if one.verified else "unverified"),
        "fault": one.fault or None,
        "verified": verified,
    }


def _state(one: Row) -> str:
    kind, _, attempt = one.kind.partition("-")
    if kind == "partial":
        return f"partial: attempt {attempt} writes it, or has left it"
    if one.kind:
        return {"bad": "bad: set aside as damaged", "replaced": "being replaced", "pruned": "being removed"}[kind]
    if one.fault:
        return f"broken: {one.fault}"
    return "-" if one.verified is None else "verified"


def _when(one: Row) -> datetime:
    """When it was written: what it says itself, else its directory."""
    said = one.index.facts.get("time") if one.index else None
    try:
        return datetime.fromisoformat(said).astimezone(UTC) if isinstance(said, str) else _utc(one.changed)
    except (ValueError, OverflowError):
        return _utc(one.changed)


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _loss(one: Row) -> float | None:
    metrics = one.index.facts.get("metrics") if one.index else None
    loss = metrics.get("loss") if isinstance(metrics, dict) else None
    return float(loss) if isinstance(loss, int | float) and abs(loss) < 1e300 else None


def _verify(options: Namespace) -> int:
    found = [path for given in options.paths for path in checkpoints(given)]
    outcomes: list[dict[str, Json]] = []
    for path in found:
        try:
            with _bar(path.name) as progress:
                index = verify_and_mark(path, progress)
        except CheckpointError as error:
            outcomes.append({"path": str(path), "ok": False, "fault": str(error)})
            said = f"DAMAGED: {error}"
        else:
            outcomes.append({"path": str(path), "ok": True, "bytes": index.nbytes})
            said = f"ok, {human(index.nbytes)}"
        if not options.json:
            print(f"{printable(str(path))}  {printable(said)}", flush=True)
    if options.json:
        print_json(outcomes)
    damaged = [str(outcome["path"]) for outcome in outcomes if not outcome["ok"]]
    if damaged:
        raise CheckpointError(f"not whole: {', '.join(damaged)} ({len(damaged)} of {len(found)})")
    return 0


def _diff(options: Namespace) -> int:
    from launcher.checkpoint.comparing import compare

    a, b = one_checkpoint(options.a), one_checkpoint(options.b)
    with _bar("diff") as progress:
        found = compare(a, b, only=options.only, progress=progress)
    if options.json:
        print_json(_comparison_as_json(a, b, found))
    elif found.same:
        print(f"the same, bit for bit: {found.compared} tensors" + ("" if options.only else ", and all values"))
    else:
        _print_comparison(a, b, found)
    return 0 if found.same else 1


def _print_comparison(a: Path, b: Path, found: Comparison) -> None:
    print(f"A  {printable(str(a))}\nB  {printable(str(b))}")
    if found.facts:
        print()
        print_table(["beside tensors", "A", "B"], [[name, _short(x), _short(y)] for name, x, y in found.facts])
    if found.tensors:
        print()
        headers = ["tensor", "what", "elements", "largest", "relative"]
        print_table(headers, [_difference(one) for one in found.tensors], right=headers[-3:])
    differing = len({one.name for one in found.tensors if not one.what.startswith("only")})
    print(f"\n{differing} of the {found.compared} tensors that both have differ")


def _difference(one: Difference) -> list[str]:
    numbers = one.numbers
    if numbers is None:
        said = f"{one.what} ({one.a or one.b})" if one.what.startswith("only") else f"{one.what}: {one.a} | {one.b}"
        return [one.name, said, "", "", ""]
    bad = f" ({numbers.not_finite} NaN or infinite)" if numbers.not_finite else ""
    count = f"{numbers.differing} of {numbers.elements}{bad}"
    return [one.name, one.a, count, f"{numbers.largest_abs:.3g}", f"{numbers.largest_rel:.3g}"]


def _comparison_as_json(a: Path, b: Path, found: Comparison) -> dict[str, Json]:
    from launcher.checkpoint.comparing import ABSENT

    facts = [{"name": name, "a": x, "b": y} for name, x, y in found.facts]
    tensors = [
        {
            **{"name": one.name, "differs": one.what, "a": one.a or None, "b": one.b or None},
            **(vars(one.numbers) if one.numbers else {}),
        }
        for one in found.tensors
    ]
    return {
        "a": str(a),
        "b": str(b),
        "same": found.same,
        "compared": found.compared,
        "facts": [{key: value for key, value in fact.items() if value is not ABSENT} for fact in facts],
        "tensors": tensors,
    }


def _short(value: Json) -> str:
    from launcher.checkpoint.comparing import ABSENT

    text = "absent" if value is ABSENT else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _export(options: Namespace) -> int:
    from launcher.checkpoint.export import DTYPE_OPTIONS, export

    path = one_checkpoint(options.path)
    with _bar("export") as progress:
        done = export(
            path,
            options.output,
            name=options.name,
            shard_size=_size(options.shard_size),
            dtype=DTYPE_OPTIONS.get(options.dtype),
            base=options.base,
            copy_ties=options.copy_ties,
            progress=progress,
        )
    if done.frozen and options.base is None:
        _note("the model has frozen parameters, which are not in a checkpoint: --base DIR adds them")
    if len(done.dtypes) > 1:
        _note(f"the tensors are {' and '.join(done.dtypes)}, which from_pretrained makes one: --dtype does it here")
    if options.json:
        print_json({"checkpoint": str(path), **vars(done)})
        return 0
    files = done.files[0] if len(done.files) == 1 else f"{len(done.files)} files"
    base = f", {done.from_base} of them and {len(done.copied)} other files from {options.base}" if options.base else ""
    print(printable(f"{path}: {done.tensors} tensors, {human(done.nbytes)}, in {options.output}/ ({files}){base}"))
    return 0


def _note(text: str) -> None:
    print(f"launcher: {text}", file=sys.stderr)


def _import(options: Namespace) -> int:
    from launcher.checkpoint.importing import import_weights

    ties = {}
    for text in options.tie:
        tied, _, holder = text.partition("=")
        if not tied or not holder:
            raise UsageError(f"--tie {text}: give NAME=HOLDER, such as lm_head.weight=model.embed_tokens.weight")
        ties[tied] = holder
    index = import_weights(options.path, options.output, name=options.name, key=options.key, ties=ties)
    if options.json:
        names = {"tensors": len(index.tensors), "tied": len(index.aliases)}
        print_json({"checkpoint": str(options.output), **names, "bytes": index.nbytes})
        return 0
    tied = f" and {len(index.aliases)} tied names" if index.aliases else ""
    said = f"{options.output}: {len(index.tensors)} tensors{tied}, {human(index.nbytes)}"
    print(printable(f"{said}; start from it with --run.init-from {options.output}"))
    return 0


def _prune(options: Namespace) -> int:
    if is_checkpoint(options.run):
        raise UsageError(f"{options.run} is one checkpoint: prune takes a run")
    root = root_of(options.run)
    run = RunDir(root.parent if root.name == CHECKPOINTS else root)
    retention = _retention(options, run)
    values = scores(run.path / "metrics.jsonl", retention.best.metric) if retention.best else {}
    pruning = choose(root, retention, values, bad=options.bad)
    if retention.best is not None and pruning.removed and not set(values) & {one.step for one in rows(root)}:
        raise UsageError(
            f"{run.path}/metrics.jsonl has no {retention.best.metric} of a step that has a checkpoint, so the best is "
            "unknown: give --keep-best no to prune without it"
        )
    if not options.dry_run:
        carry_out(pruning)
    _tell_pruning(options, pruning)
    return 0


def _tell_pruning(options: Namespace, pruning: Pruning) -> None:
    if options.json:
        print_json(
            {
                "dry_run": options.dry_run,
                "kept": [{"name": name, "why": why} for name, why in pruning.kept.items()],
                "removed": [{"name": name, "bytes": one.size} for name, one in pruning.removed.items()],
            }
        )
        return
    verb = "would go" if options.dry_run else "removed"
    lines = [[name, "stays", why] for name, why in pruning.kept.items()]
    lines += [[name, verb, human(one.size)] for name, one in pruning.removed.items()]
    if lines:
        print_table(["checkpoint", "", "why, or size"], sorted(lines))
    print(f"{len(pruning.removed)} {verb} ({human(pruning.nbytes)}), {len(pruning.kept)} stay")


def _retention(options: Namespace, run: RunDir) -> Retention:
    """What the command line says, else what the run's config.json does.

    Raises:
        UsageError: neither says how many are kept, or what is said cannot be.
    """
    config = run.config() or {}
    settings = config.get("run")
    said: Mapping[str, Any] = settings if isinstance(settings, dict) else {}
    keep = said.get("keep") if options.keep is None else options.keep
    every = said.get("keep_every", 0) if options.keep_every is None else options.keep_every
    best = said.get("keep_best") if options.keep_best is None else options.keep_best
    if keep is None:
        raise UsageError(f"{run.path} has no config.json that says how many checkpoints it keeps: give --keep K")
    if type(keep) is not int or type(every) is not int or not isinstance(best, str | None):
        raise UsageError(f"{run.path}/config.json: what it says of run.keep cannot be: give --keep, --keep-every")
    try:
        return Retention(keep, every, None if best in (None, "no") else Best.parse(best))
    except UsageError as error:  # it speaks of the options of a run
        raise UsageError(str(error).replace("--run.", "--")) from None


def _size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `2GiB` or `1000000`.

    Raises:
        UsageError: it is no such thing.
    """
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?) ?([KMGT]I?|)B?", text.strip().upper(), re.ASCII)
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise UsageError(f"--shard-size {text}: give a size such as 5GB, 500MB or 2GiB")
    return size


@contextmanager
def _bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """Progress in bytes, shown to a person at a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from tqdm import tqdm

    with tqdm(desc=printable(text), unit="B", unit_scale=True, dynamic_ncols=True, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
