"""The recipe's side of a rehearsal: what `launcher.main` does when `launcher submit` only wants to know its config."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.config import RunConfig, check_resume, parse, resolve, to_dict
from launcher.options import flag
from launcher.rundir import RunDir
from launcher.values import option_types

__all__ = ["answer"]


def answer(asked: Path, config_type: type | None, *, prog: str, description: str | None) -> None:
    """Write what every list of options in the file `asked` comes to into answered.json beside it.

    Raises:
        UsageError: one is refused.
    """
    known = ({} if config_type is None else option_types(config_type)) | option_types(RunConfig, "run.")
    points = []
    for given in json.loads(asked.read_text()):
        argv = _plain(given, known)
        config, options = parse(config_type, argv, prog=prog, description=description)
        options = resolve(options, os.environ)
        settings = to_dict(config, options)
        saved = None if options.dir is None else RunDir(Path(options.dir).expanduser().absolute()).config()
        check_resume(settings if saved is None else saved, settings, options.allow)
        name = options.name or Path(prog).stem
        points.append({"settings": settings, "dir": options.dir, "name": name, "argv": argv})
    files = _imported()
    top = {name: file for name, file in files.items() if "." not in name}
    roots = dict.fromkeys([*_search(), *(str(_root(file)) for file in top.values())])
    partial = asked.with_name(".answered")
    partial.write_text(json.dumps({"points": points, "roots": [*roots], "files": top, "all": [*files.values()]}))
    partial.replace(asked.with_name("answered.json"))


def _plain(argv: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """Options where `--tie=false` of a flag is written `--no-tie`: in a sweep, every option has a value."""
    plain = []
    for token in argv:
        name, equals, value = token.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if name.startswith("--") and equals and known.get(key) is bool and value.lower() in ("true", "false"):
            group, dot, last = key.rpartition(".")
            token = flag(key) if value.lower() == "true" else flag(f"{group}{dot}no_{last}")
        plain.append(token)
    return plain


def _imported() -> dict[str, str]:
    """The files of the modules that are neither the standard library's nor an installed package's."""
    found = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name != "__main__" and isinstance(file, str) and os.path.isabs(file) and not _installed(file):
            found[name] = file
    return dict(sorted(found.items()))


def _search() -> list[str]:
    """The directories of the search path in which something else than that may be."""
    return [entry for entry in sys.path if os.path.isabs(entry) and os.path.isdir(entry) and not _installed(entry)]


def _installed(path: str) -> bool:
    """Whether a file or directory is of Python itself or of an installed package."""
    paths = sysconfig.get_paths()
    standard = {os.path.realpath(paths[key]) for key in ("stdlib", "platstdlib")}
    real = os.path.realpath(path)
    packages = {"site-packages", "dist-packages"} & {*Path(path).parts}
    return bool(packages) or any(real == root or real.startswith(f"{root}{os.sep}") for root in standard)


def _root(file: str) -> Path:
    """The directory on the search path that a top-level module was found in."""
    path = Path(file)
    return path.parent.parent if path.stem == "__init__" else path.parent
