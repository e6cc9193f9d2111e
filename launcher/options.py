"""A command line by tyro, whose every complaint becomes one line that names the option and the one meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from launcher.errors import UsageError
from launcher.values import describe

if TYPE_CHECKING:
    from tyro._errors import ParseErrorEvent

__all__ = ["flag", "meant", "parse_options"]

T = TypeVar("T")


def parse_options(
    options: type[T],
    argv: Sequence[str],
    *,
    default: T | None,
    known: Mapping[str, Any],
    prog: str,
    description: str | None,
) -> T:
    """The dataclass `options` as `argv` sets it; `--help` prints and exits with 0.

    Args:
        options: a dataclass that tyro understands.
        argv: the arguments, without the program's name.
        default: what holds for options that `argv` does not name; None: their own defaults.
        known: the type of every option, by dotted key.
        prog: what the program is called in its help.
        description: what the help begins with.

    Raises:
        UsageError: an unknown option, a wrong value, a missing one, or the config's own `__post_init__` refuses.
    """
    import tyro

    call = partial(tyro.cli, options, args=list(argv), prog=prog, description=description)
    try:
        with _one_line(argv, known):
            return cast(T, call() if default is None else call(default=default))
    except (ValueError, AssertionError) as error:  # from a __post_init__: the recipe's own check of its options
        raise UsageError(f"these options are refused: {_flat(str(error)) or type(error).__name__}") from None


def flag(key: str) -> str:
    """An option as it is written on a command line: `run.save_every` is `--run.save-every`."""
    return "--" + key.replace("_", "-")


def meant(name: str, known: Iterable[str], before: str = "") -> str:
    """ ": did you mean X?" where `known` has a name like `name`, or one that ends alike; else nothing.

    `before` is written before the name found.
    """
    candidates = list(known)
    ends_alike = [other for other in candidates if other.rpartition(".")[2] == name.rpartition(".")[2]]
    near = ends_alike if len(ends_alike) == 1 else difflib.get_close_matches(name, candidates, 1)
    return f": did you mean {before}{near[0]}?" if near else ""


@contextmanager
def _one_line(argv: Sequence[str], known: Mapping[str, Any]) -> Iterator[None]:
    """Raise tyro's complaint as a UsageError. A tyro older than its hook (1.0.15) prints boxes and exits with 2."""
    try:
        from tyro._errors import on_parse_error
    except ImportError:
        yield
        return

    def tell(event: ParseErrorEvent) -> None:
        line = _complaint(event, argv, known)
        if line is not None:
            raise UsageError(line)

    with on_parse_error(tell):
        yield


def _complaint(event: ParseErrorEvent, argv: Sequence[str], known: Mapping[str, Any]) -> str | None:
    """One line for what tyro found; None for a kind of complaint that is not known here."""
    from tyro._errors import BadValue, InstantiationFailure, InvalidChoice, MissingArgs, UnrecognizedArgs

    if isinstance(event, UnrecognizedArgs):
        return _unrecognized(event.tokens, argv, known)
    if isinstance(event, MissingArgs):
        if event.unrecognized_tokens:  # more likely a typo in the required one's name
            return _unrecognized(event.unrecognized_tokens, argv, known)
        names = [missing.arg.display_name() for missing in event.missing_arguments]
        return f"{names[0]} is required{_expected(names[0], known)}{_more(len(names) - 1)}"
    if isinstance(event, BadValue | InvalidChoice) or (isinstance(event, InstantiationFailure) and event.argument):
        assert event.argument is not None
        name = event.argument.display_name()
        given = " ".join(_given(name, argv))
        if not given:
            return f"{name} needs a value{_expected(name, known)}"
        return f"{name} {given}{_expected(name, known)}"
    return _flat(event.message) if isinstance(event, InstantiationFailure) else None


def _unrecognized(tokens: Sequence[str], argv: Sequence[str], known: Mapping[str, Any]) -> str:
    """Of tokens that no option takes: the first option among them, or else the first value."""
    unknown = [token for token in tokens if token.startswith("-")]
    if not unknown:
        return _stray(tokens[0], argv, known)
    name = unknown[0].partition("=")[0].replace("_", "-")
    names = [flag(key)[2:] for key in known]
    names += [_negated(key)[2:] for key, kind in known.items() if kind is bool]
    group = [f"--{other}" for other in names if other.startswith(f"{name.lstrip('-')}.")]
    hint = f": its options are {', '.join(group[:3])}, ..." if group else meant(name.lstrip("-"), names, "--")
    return f"unknown option {name}{hint or ' (--help lists them)'}{_more(len(unknown) - 1)}"


def _stray(value: str, argv: Sequence[str], known: Mapping[str, Any]) -> str:
    """A value that stands behind an option which takes none, or no more."""
    owner = None
    for token in argv:
        name, _, attached = token.partition("=")
        if name.startswith("--"):
            owner = name.replace("_", "-")
        if value in (token, attached):
            break
    if owner is None:
        return f"{value!r} stands alone: options are written --name value"
    for key, kind in known.items():
        if kind is bool and owner in (flag(key), _negated(key)):
            return f"{owner} takes no value, not {value!r}: write {flag(key)} or {_negated(key)}"
    return f"{owner} does not take {value!r} as well{_expected(owner, known)}"


def _negated(key: str) -> str:
    group, dot, name = key.rpartition(".")
    return flag(f"{group}{dot}no-{name}")


def _given(name: str, argv: Sequence[str]) -> list[str]:
    """The values that the command line gives an option, the last time it does."""
    values: list[str] = []
    taking = False
    for token in argv:
        if token.startswith("--"):
            option, _, attached = token.partition("=")
            taking = option.replace("_", "-") == name
            if taking:
                values = [attached] if attached else []
        elif taking:
            values.append(token)
    return values


def _expected(name: str, known: Mapping[str, Any]) -> str:
    kinds = {flag(key): kind for key, kind in known.items()}
    return f": expected {describe(kinds[name])}" if name in kinds else ""


def _more(number: int) -> str:
    return f" (and {number} more)" if number > 0 else ""


def _flat(text: str) -> str:
    return " ".join(text.split())
