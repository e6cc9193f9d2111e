"""Make RESULTS.md of the files in results/: what each benchmark asks, where it ran, what it found, what it missed.

    python benchmarks/page.py          write benchmarks/RESULTS.md
    python benchmarks/page.py --check  say whether it is what the files make, and change nothing

A result names its benchmark, and that module says the rest: see "Adding a benchmark" in README.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import tables

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results", HERE / "RESULTS.md"
ORDER = ("overhead", "ddp", "loader", "checkpoint", "startup", "warmstart", "scale", "gpu", "preemption", "slurm")
"""Of the sections; what is not named here follows by name."""
ELSEWHERE = {"slurm": "tests.slurm.campaign"}
"""Benchmarks whose module is not in this directory."""
HEAD = """# Results

Made by `python benchmarks/page.py` of the files in [results](results): change those, never this page. How to run a
benchmark, how it is fair, and what a missed target is due to: [README.md](README.md).
"""


@dataclass(frozen=True)
class Section:
    """A result, and the module that knows what it means."""

    name: str
    file: str
    result: dict[str, Any]
    module: ModuleType

    @property
    def title(self) -> str:
        """The benchmark, and the device where that is not the machine itself."""
        device = self.result.get("device", {}).get("name")
        return f"{self.name} on {device}" if device else self.name

    @property
    def targets(self) -> dict[str, dict[str, Any]]:
        """What was to be reached: its name, what was found, whether it is met."""
        judge = getattr(self.module, "targets", None)
        found: dict[str, dict[str, Any]] = judge(self.result) if judge else {}
        return found

    @property
    def verdict(self) -> str:
        """How many of the targets are met."""
        met = [target["met"] for target in self.targets.values()]
        if not met:
            return "no targets"
        return f"all {len(met)}" if all(met) else f"{sum(met)} of {len(met)}"

    def text(self) -> str:
        """The section in Markdown."""
        parts = [f"## {self.title}", self.module.QUESTION, self.where(), self.module.markdown(self.result)]
        if self.targets:
            rows = [
                (name, target["found"], "met" if target["met"] else "**missed**")
                for name, target in self.targets.items()
            ]
            parts.append(tables.markdown(("target", "found", ""), rows))
        return "\n\n".join(parts)

    def where(self) -> str:
        """The machine, the day, the versions, and who was not there."""
        place, versions = self.result["machine"], self.result["versions"]
        device = self.result.get("device", {}).get("name")
        said = [
            f"[{self.file}](results/{self.file})",
            f"{device + ' with ' if device else ''}{place['cores']} cores of {place['cpu']}, {place['system']} "
            f"{place['architecture']}",
            self.result["date"],
            ", ".join(f"{name} {version}" for name, version in versions.items()),
        ]
        if absent := self.result.get("absent"):
            said.append(f"not installed there: {', '.join(absent)}")
        return "; ".join(said) + "."


def sections(directory: Path) -> list[Section]:
    """Every result of a directory, in the order of the page."""
    found = []
    for path in sorted(directory.glob("*.json")):
        result = json.loads(path.read_text())
        name = result.get("benchmark") or path.stem.partition("-")[0]
        found.append(Section(name, path.name, result, module(name)))
    places = {name: place for place, name in enumerate(ORDER)}
    return sorted(found, key=lambda section: (places.get(section.name, len(ORDER)), section.file))


def module(name: str) -> ModuleType:
    """The module of a benchmark."""
    for path in (str(HERE), str(HERE.parent)):
        if path not in sys.path:
            sys.path.insert(0, path)
    return importlib.import_module(ELSEWHERE.get(name, name))


def page(directory: Path = RESULTS) -> str:
    """The whole page."""
    return "\n".join(_parts(sections(directory)))


def _parts(found: list[Section]) -> Iterator[str]:
    yield HEAD
    links = [f"[{one.title}](#{anchor(one.title)})" for one in found]
    rows = [
        (link, one.module.QUESTION, one.verdict, one.result["date"]) for link, one in zip(links, found, strict=True)
    ]
    yield tables.markdown(("benchmark", "question", "targets met", "date"), rows) + "\n"
    for one in found:
        yield one.text() + "\n"
    for path in sorted(RESULTS.glob("*.md")):
        yield f"Also there: [{path.stem}](results/{path.name}).\n"


def anchor(title: str) -> str:
    """What a heading is linked by."""
    return "".join(letter for letter in title.lower().replace(" ", "-") if letter.isalnum() or letter in "-_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is not up to date")
    options = parser.parse_args()
    text = page()
    if options.check:
        same = PAGE.exists() and PAGE.read_text() == text
        sys.exit(None if same else "RESULTS.md is not what the results make: python benchmarks/page.py")
    PAGE.write_text(text)
    print(f"{PAGE}: written")


if __name__ == "__main__":
    main()
