"""`launcher doctor`: whether runs can live on this machine, this cluster, these nodes; each line with the fix."""

from __future__ import annotations

import platform
import shutil
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from launcher.doctor.disk import check_disk, existing
from launcher.doctor.findings import Finding, bad, ok
from launcher.doctor.judging import judge
from launcher.doctor.machine import Software, check_machine, look_at_software
from launcher.doctor.measured import KEEP, Measured, measure
from launcher.doctor.probing import probe
from launcher.doctor.site import Described, check_site, describe, wanted
from launcher.errors import LauncherError, UsageError
from launcher.parser import Parser
from launcher.show import print_json, print_table
from launcher.slurm import record
from launcher.slurm.request import Request, read_site
from launcher.slurm.script import shipped

__all__ = ["main"]

SOME = 2  # nodes to look at, if not said otherwise


def main(argv: Sequence[str]) -> int:
    """The exit code of `launcher doctor ARGV`: 0 nothing is bad, 1 something is.

    Raises:
        UsageError: an option is wrong.
        SystemExit: after `--help`.
    """
    options = _parser().parse_args(argv)
    for name, least in (("nodes", 1), ("keep", 1), ("gpus", 0)):
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise UsageError(f"--{name} {getattr(options, name)}: at least {least}")
    groups = _look(options)
    if options.json:
        print_json([{"group": group, **asdict(one)} for group, findings in groups.items() for one in findings])
    else:
        _print(groups)
    return 1 if any(one.state == "bad" for findings in groups.values() for one in findings) else 0


def _parser() -> Parser:
    parser = Parser(
        prog="launcher doctor",
        usage="launcher doctor [--cluster [NAME]] [--nodes [N]] [--partition P] [--run RUN] [--json] [DIR]",
        description="Say whether runs can live here: on this machine, on the cluster, on its nodes; and what to mend.",
        epilog="Exit code: 0 where nothing is bad, 1 where something is. DIR stands before --cluster and --nodes.",
    )
    parser.add_argument("directory", metavar="DIR", nargs="?", help="where runs are to be; default: ./runs, or .")
    parser.add_argument(
        "--cluster",
        metavar="NAME",
        nargs="?",
        const="",
        help="check SLURM's settings, for jobs as this site's file says",
    )
    parser.add_argument(
        "--nodes", metavar="N", nargs="?", type=int, const=True, help="try N nodes in a short job (default: 2)"
    )
    parser.add_argument("--partition", metavar="P", help="of the cluster, this partition")
    parser.add_argument("--gpus", metavar="N", type=int, help="GPUs on each node to try (default: the site's, or all)")
    parser.add_argument("--run", metavar="RUN", help="an earlier run, whose checkpoints, saves and steps are measured")
    parser.add_argument("--keep", metavar="K", type=int, help="checkpoints that a run keeps (default: RUN's, or 2)")
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    return parser


def _look(options: Namespace) -> dict[str, list[Finding]]:
    measured = measure(record.find(options.run), options.keep) if options.run else Measured(keep=options.keep or KEEP)
    directory = Path(options.directory or ("runs" if Path("runs").is_dir() else ".")).expanduser()
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{options.directory} is a file: name a directory")
    if options.cluster and Path(options.cluster).is_dir():
        raise UsageError(f"--cluster {options.cluster}: a directory; DIR stands before --cluster")
    asked = options.cluster is not None or options.nodes is not None
    site = read_site(options.cluster or None, shipped() / "clusters")
    request = wanted(site, options.partition)
    if options.gpus is not None:
        request = replace(request, gpus=options.gpus)
    software = look_at_software()
    machine = check_machine(software, world_size=_world_size(request, measured))
    machine += check_disk(directory, measured, many=asked and options.nodes is None)
    if not asked:
        return {"machine": machine, "cluster": [_no_slurm()]}
    try:
        here = describe(request, site.name, measured)
    except LauncherError as error:
        if isinstance(error, UsageError):
            raise
        fix = "look from a login node; scontrol ping says whether the controller lives"
        return {"machine": machine, "cluster": [bad("slurm", str(error), fix)]}
    groups = {"machine": machine}
    if options.cluster is not None:
        groups["cluster"] = check_site(here)
    if options.nodes is not None:
        groups["nodes"] = _try_nodes(options.nodes, here, directory, software)
    return groups


def _try_nodes(asked: int | bool, here: Described, directory: Path, software: Software) -> list[Finding]:
    """Queue the probe on some of the nodes that jobs would go to, and judge what it says."""
    request = here.request
    if request.partition is None and not any(one.default for one in here.partitions):
        raise UsageError(
            f"--partition: there is no default one; there are {', '.join(p.name for p in here.partitions)}"
        )
    partition = next(
        p for p in here.partitions if (p.default if request.partition is None else p.name == request.partition)
    )
    inside = [node for node in here.nodes if partition.name in node.partitions]
    usable = [node for node in inside if node.usable]
    if not usable:
        return [bad("nodes", f"partition {partition.name} has no usable node", "use another, --partition")]
    if asked is not True and asked > len(usable):
        raise UsageError(f"--nodes {asked}: partition {partition.name} has {len(usable)} usable ones")
    count = min(SOME, len(usable)) if asked is True else asked
    gpus = request.gpus if request.gpus is not None else min(node.gpus for node in usable)
    minutes = 5 if partition.max_time is None else max(1, min(5, partition.max_time // 60))
    print(f"waiting for {count} nodes of {partition.name}", file=sys.stderr, flush=True)
    try:
        heard = probe(request, existing(directory), nodes=count, gpus=gpus, minutes=minutes)
    except LauncherError as error:
        return [bad("nodes", str(error), "name another DIR, or look from a login node")]
    world_size = _world_size(request, here.measured)
    return judge(heard, software, platform.python_version(), world_size=world_size)


def _world_size(request: Request, measured: Measured) -> int:
    """How many ranks a run is to have, as far as anybody says."""
    asked = (request.nodes or 1) * (request.gpus or request.tasks or 8)
    return measured.world_size or asked


def _no_slurm() -> Finding:
    if shutil.which("scontrol"):
        return ok("slurm", "there is one: --cluster looks at its settings, --nodes tries its nodes")
    return ok("slurm", "none here")


def _print(groups: Mapping[str, Sequence[Finding]]) -> None:
    for number, (group, findings) in enumerate(groups.items()):
        if number:
            print()
        rows: list[tuple[str, str, str]] = []
        for one in findings:
            rows.append((one.state, one.check, one.found))
            rows += [("", "", f"fix: {one.fix}")] if one.fix else []
        print_table((group, "check", "found"), rows)
