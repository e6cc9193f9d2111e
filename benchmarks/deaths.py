"""What a person reads when a rank of four dies: under `accelerate launch` alone, and under `launcher run`.

    python benchmarks/deaths.py [--out FILE.md]

Both train the same few rows on four CPU processes and die in the same way in step 2. All that each prints is counted;
shown are the last lines of the one, where a person begins to read, and those of the other.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from machine import facts

HERE = Path(__file__).parent
DEATHS = {
    "exception": "An exception on rank 2",
    "kill": "SIGKILL of rank 3",
    "memory": "Memory used up on rank 2",
    "hang": "A barrier on rank 2 alone",
}
PATIENCE = 60.0  # seconds; a job that hangs for longer is ended by hand
SHOWN = 8  # lines


@dataclass(frozen=True)
class Death:
    """What was printed, and when it ended."""

    lines: list[str]
    seconds: float
    ended: bool
    """By itself."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "deaths.md", help="where the page goes")
    out = parser.parse_args().out
    room = Path(tempfile.mkdtemp(prefix="deaths-"))
    try:
        pairs = {death: (die(death, accelerate(), room), die(death, launcher(room / death), room)) for death in DEATHS}
    finally:
        shutil.rmtree(room, ignore_errors=True)
    out.write_text(page(pairs))
    print(f"{out}: written")


def accelerate() -> list[str]:
    script = str(Path(sys.executable).with_name("accelerate"))
    many = ["--multi_gpu", "--num_processes", "4", "--num_machines", "1", "--mixed_precision", "no"]
    return [script, "launch", *many, "--dynamo_backend", "no", str(HERE / "peers" / "accelerate_dying.py")]


def launcher(rundir: Path) -> list[str]:
    recipe = str(HERE / "peers" / "launcher_dying.py")
    return [
        sys.executable,
        "-m",
        "launcher",
        "run",
        "--nproc",
        "4",
        recipe,
        "--run.dir",
        str(rundir),
        "--run.hang-after",
        "10",
    ]


def die(death: str, command: list[str], room: Path) -> Death:
    environ = {**os.environ, "DEATH": death, "ACCELERATE_USE_CPU": "true", "TMPDIR": str(room)}
    begun = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=PATIENCE)
        ended = True
    except subprocess.TimeoutExpired:
        process.terminate()  # the agent passes it on, and kills after half a minute what does not answer
        output, _ = process.communicate()
        ended = False
    return Death(output.rstrip().splitlines(), time.monotonic() - begun, ended)


def page(pairs: dict[str, tuple[Death, Death]]) -> str:
    about = facts()
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    parts = [
        "# What four deaths look like\n\nMade by `python benchmarks/deaths.py`: four CPU processes, of which one dies "
        f"in its third step. {about['date']}, {about['machine']['cpu']}, {versions}. Of `accelerate launch` the last "
        f"{SHOWN} lines are shown, of `launcher run` all that it prints from the death on.\n"
    ]
    for death, (theirs, ours) in pairs.items():
        parts.append(f"## {DEATHS[death]}\n\n{told('accelerate launch', theirs)}\n\n{block(theirs.lines[-SHOWN:])}\n")
        parts.append(f"{told('launcher run', ours)}\n\n{block(from_the_death(ours.lines))}\n")
    return "\n".join(parts)


def told(who: str, one: Death) -> str:
    how = (
        f"it ends after {one.seconds:.0f} s"
        if one.ended
        else f"it hangs, and was ended by hand after {one.seconds:.0f} s"
    )
    return f"`{who}` prints {len(one.lines)} lines; {how}:"


def from_the_death(lines: list[str]) -> list[str]:
    """Without the command, the run directory and the steps before."""
    kept = [line for line in lines if not re.match(r"\+ |run directory: |step \d+/", line)]
    while kept and not kept[0]:
        del kept[0]
    return kept


def block(lines: list[str]) -> str:
    text = "\n".join(re.sub(r"/\S*/(benchmarks|site-packages)/", r"\1/", line) for line in lines)
    text = re.sub(rf"\b{re.escape(socket.gethostname())}\b", "host", text)
    return f"```\n{text or '(nothing)'}\n```"


if __name__ == "__main__":
    main()
