"""Values that trip shells, SLURM, templates and parsers; and a recipe that takes them all, in options and around it."""

import json
import os
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path

import launcher

VALUES = [
    *("a b", "'", '"', "';touch x;'", '";touch x;"', "$(touch x)", "`touch x`", "${IFS}", "$HOME", "$'\\x41'", "!!"),
    *(
        "\n",
        "a\nb",
        "\n\n",
        "\t",
        "\r",
        "\x1b[31m",
        "*",
        "?",
        "[a-z]*",
        "~",
        "~root",
        "{a,b}",
        "(",
        ")",
        "#",
        "# x",
        "!",
    ),
    *("&", "&&touch x", "|touch x", "||", ";", ";touch x", "<", ">x", ">>x", "<(touch x)", "@RUN@", "@SBATCH@", "@X@"),
    *("%j", "%A_%a", "%%", "\\", "\\\\", "a\\", "\\n", "\\'", "-", "--", "-n", "--run.dir", "-rf", "=", "a=b", "--a=b"),
    *("é", "日本語", "🚀", "\u202e", "\ufeff", "\u2028", "\udce9", "", " ", "  a  ", "x" * 20_000, "INSIDE", "MANY"),
    *("'\"'\"'", "\\$(touch x)", "$((1/0))", "EOF", "esac", ";;", "done", "/dev/null", "../..", "NUL", "null", "None"),
    *("true", "tie=false", "--tie=false", "#SBATCH --uid=0", "\n#SBATCH --wrap=x", "$run", "${command[@]}", "a,b", ","),
]
NAMES = [
    "a b 'c' \"d\"",
    "$(touch x);`touch x`&|<>",
    "new\nline\ttab\r",
    "-rf --run.dir=x",
    "%j %A_%a \\n @RUN@ @CWD@ \\",
    "é日本🚀 ~*?[a]{b}#!",
    "l" * 100,
]
"""For files, directories and environment variables."""


@dataclass(frozen=True)
class Nested:
    path: Path = Path()


def fields():
    """An option for each value, and a few that take many."""
    numbered = [(f"v{number:03d}", str, "unset") for number in range(len(VALUES))]
    return [*numbered, ("words", tuple[str, ...], ()), ("nested", Nested, field(default_factory=Nested))]


Config = make_dataclass("Config", fields(), frozen=True)


def train(run: launcher.Run, cfg: Config) -> None:
    seen = {"cwd": os.getcwd(), "file": __file__, "environment": dict(os.environ)}
    (run.dir / f"seen-{run.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    launcher.main(train)
