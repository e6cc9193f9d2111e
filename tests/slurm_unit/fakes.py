"""SLURM's commands as small scripts on PATH: they answer from files, and write down how they were called."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

PARTITIONS = [
    "PartitionName=batch AllowAccounts=ALL AllowQos=ALL Default=YES DefaultTime=00:10:00 "
    "GraceTime=0 Hidden=NO MaxNodes=UNLIMITED MaxTime=1-00:00:00 Nodes=node[1-4] PriorityTier=1 State=UP TotalCPUs=64 "
    "TotalNodes=4 PreemptMode=OFF",
    "PartitionName=small AllowAccounts=lab,guest AllowQos=normal,high Default=NO DefaultTime=NONE GraceTime=60 "
    "MaxNodes=1 MaxTime=UNLIMITED PriorityTier=1 State=UP TotalNodes=2 PreemptMode=REQUEUE",
    "PartitionName=closed AllowAccounts=ALL AllowQos=ALL Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED State=DOWN "
    "TotalNodes=1 PreemptMode=OFF",
]
NODES = [
    "NodeName=node1 CPUTot=16 RealMemory=64000 Gres=gpu:a100:4(S:0-1) ActiveFeatures=a100,ib Partitions=batch,small "
    "State=IDLE",
    "NodeName=node2 CPUTot=16 RealMemory=64000 Gres=gpu:a100:4(S:0-1) ActiveFeatures=a100,ib Partitions=batch,small "
    "State=MIXED",
    "NodeName=node3 CPUTot=8 RealMemory=32000 Gres=gpu:2 ActiveFeatures=v100 Partitions=batch State=IDLE",
    "NodeName=node4 CPUTot=4 RealMemory=8000 Gres=(null) ActiveFeatures=(null) Partitions=batch State=IDLE",
]
SCRIPTS = {
    "scontrol": """
case "$*" in
  'show config') cat "$here/config";;
  '-o show partition') cat "$here/partitions";;
  '-o show node') cat "$here/nodes";;
  'show hostnames '*) echo 127.0.0.1;;
  '-o show job '*) cat "$here/job";;
  'requeue '*) [ ! -e "$here/meanwhile" ] || . "$here/meanwhile"; answer requeue;;
  *) :;;
esac""",
    "squeue": """
case "$*" in
  *'-o %e') cat "$here/end";;
  *PreemptTime*) cat "$here/preempted";;
  *) answer squeue;;
esac""",
    "sbatch": """
case "$*" in
  *--test-only*) cat > "$here/tried"; answer tested;;
  *) env -0 > "$here/environment"
     echo x >> "$here/count"
     if [ "$(wc -l < "$here/count")" -gt "$(cat "$here/most")" ]; then echo "sbatch: error: no more" >&2; exit 1; fi
     echo "$((100 + $(wc -l < "$here/count")));cluster";;
esac""",
    "sinfo": 'cat "$here/idle"',
    "sacctmgr": "answer sacctmgr",
    "scancel": ":",
    "srun": """
. "$here/during"
echo ran >> "$here/ran"
cp -r "$here/scene/." "$LAUNCHER_RUN/"
answer srun""",
    # short ones pass at once
    "sleep": '[ "$1" -le 5 ] || exec /bin/sleep "$@"',
}
HEAD = """#!/bin/bash
here=HERE
case $0 in
  */sleep) ;;
  *) { printf '%s\\0' "${0##*/}" "$@"; echo; } >> "$here/calls";;
esac
answer() {   # the lines of a file, one a call, the last for ever: EXIT-CODE TEXT
  local line
  line=$(head -n 1 "$here/$1")
  [ "$(wc -l < "$here/$1")" -le 1 ] || sed -i 1d "$here/$1"
  [ -z "${line#* }" ] || [ "${line%% *}" != 0 ] || printf '%b\\n' "${line#* }"
  [ "${line%% *}" = 0 ] || { printf '%b\\n' "${line#* }" >&2; exit "${line%% *}"; }
}
"""


REALLY = 'while [ "$1" != bash ]; do shift; done; exec "$@"'
"""For `during`: srun runs its task, one of them."""


@dataclass
class Fakes:
    """Fakes of SLURM's commands, in a directory of their own."""

    path: Path
    files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.path / "bin").mkdir(parents=True)
        (self.path / "scene").mkdir()
        for name, body in SCRIPTS.items():
            script = self.path / "bin" / name
            script.write_text(HEAD.replace("HERE", f"'{self.path}'") + body.lstrip("\n") + "\n")
            script.chmod(0o755)
        self.say(config="KillWait = 30 sec", partitions="\n".join(PARTITIONS), nodes="\n".join(NODES), job="")
        self.say(
            end="N/A",
            preempted="N/A",
            idle="",
            requeue="0 ",
            tested="0 ",
            squeue="0 ",
            srun="0 ",
            calls=None,
            during=None,
        )
        self.say(sacctmgr="1 no accounting", most="99")

    def say(self, **answers: str | None) -> Fakes:
        """What the commands answer from now on."""
        for name, text in answers.items():
            (self.path / name).write_text("" if text is None else f"{text}\n")
        return self

    def calls(self, command: str) -> list[list[str]]:
        """How a command was called."""
        lines = (self.path / "calls").read_bytes().decode(errors="surrogateescape").split("\0\n")
        return [words[1:] for words in (line.split("\0") for line in lines if line) if words[0] == command]

    def environment(self) -> dict[str, str]:
        """What sbatch was called with."""
        pairs = (self.path / "environment").read_text().split("\0")
        return dict(pair.split("=", 1) for pair in pairs if pair)

    @property
    def search(self) -> str:
        """PATH with the fakes in front."""
        return f"{self.path / 'bin'}:{os.environ['PATH']}"

    def squeue(self, *jobs: str) -> Fakes:
        """Jobs that SLURM knows, `id:STATE:directory`."""
        records = []
        for job in jobs:
            id_, state, directory = job.split(":")
            told = [
                id_,
                id_,
                "name",
                "me",
                "batch",
                state,
                "None",
                "1",
                "node1",
                "N/A",
                "N/A",
                "N/A",
                "10:00",
                directory,
            ]
            records.append("\\x1e" + "\\x1f".join(told))
        return self.say(squeue="0 " + "".join(records))


def read_nul(path: Path) -> list[str]:
    """What `printf '%s\\0'` wrote."""
    return [os.fsdecode(word) for word in path.read_bytes().split(b"\0")[:-1]]


def bash(text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run lines of bash."""
    return subprocess.run(
        ["bash", "-c", text], env=os.environ | environment, capture_output=True, text=True, timeout=30, check=False
    )


def facts(path: Path) -> dict[str, object]:
    """A run's run.json."""
    said: dict[str, object] = json.loads((path / "run.json").read_text())
    return said
