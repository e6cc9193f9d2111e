"""Whether a directory is a place for runs: room, quota, and what its filesystem can do."""

from __future__ import annotations

import getpass
import mmap
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.doctor.findings import Finding, bad, ok, warning
from launcher.doctor.measured import Measured
from launcher.show import human

__all__ = ["Mount", "check_disk", "existing", "mount_of"]

PATIENCE = 20.0  # seconds that quota may take to ask its servers
NETWORK = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "panfs", "pvfs2", "afs", "9p", "virtiofs"}
IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}
LOOSE = {"cifs", "smb3", "fuse.s3fs", "fuse.goofys", "fuse.gcsfuse", "fuse.mount-s3", "fuse.rclone", "fuse.sshfs"}
SKEW = 2.0  # seconds


@dataclass(frozen=True)
class Mount:
    """The filesystem that a directory is on."""

    point: str
    kind: str
    source: str
    options: tuple[str, ...] = ()

    @property
    def shared(self) -> bool:
        """Whether other machines may see it."""
        return self.kind in NETWORK or self.kind.startswith("fuse.")


def existing(path: Path) -> Path:
    """The directory itself, or the nearest above it that there is."""
    path = path.expanduser().absolute()
    return next(one for one in (path, *path.parents) if one.is_dir())


def mount_of(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> Mount:
    """The filesystem that a path is on."""
    real = os.path.realpath(path)
    found = Mount("/", "unknown", "")
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, (kind, source, *rest) = before.split(), after.split(" ")
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(found.point):  # of two in one place the later hides the earlier
            options = (*fields[5].split(","), *(rest[0].split(",") if rest else []))
            found = Mount(point, kind, source, options)
    return found


def check_disk(directory: Path, measured: Measured, *, many: bool) -> list[Finding]:
    """What is to be said of the directory that runs are to be in.

    Args:
        directory: where they are to be; it need not be there yet.
        measured: an earlier run like them.
        many: whether other machines must see it too, and nobody looks whether they do.
    """
    place = existing(directory)
    mount = mount_of(place)
    need = _need(place, measured)
    return [
        _kind(directory, mount, many),
        *_works(place),
        _space(place, measured, need),
        *_inodes(place),
        *_quota(place, mount, need),
    ]


def _kind(directory: Path, mount: Mount, many: bool) -> Finding:
    said = f"{directory.expanduser().absolute()} is on {mount.kind} ({mount.point})"
    if mount.kind in LOOSE:
        return bad("filesystem", said, "renaming is not atomic there: put runs on a POSIX filesystem")
    if mount.kind in IN_MEMORY:
        return warning("filesystem", f"{said}: gone with the next reboot", "put runs on a disk")
    if mount.kind == "overlay":
        return warning("filesystem", f"{said}: gone with its container", "put runs on a mounted volume")
    if mount.kind.startswith("nfs") and "soft" in mount.options:
        fix = "have it mounted hard: a soft mount answers a slow server with errors, and files end up cut"
        return warning("filesystem", f"{said}, mounted soft", fix)
    if many and not mount.shared:
        fix = "name a directory that every node sees; --nodes looks whether they see this one"
        return warning("filesystem", f"{said}: a disk of this machine", fix)
    return ok("filesystem", said)


def _works(place: Path) -> list[Finding]:
    """Try what saving rests on, in a directory that is removed again."""
    if not os.access(place, os.W_OK | os.X_OK):
        return [bad("files", f"{place} cannot be written", "name another DIR, or have its rights changed")]
    tries: dict[str, Callable[[Path], None]] = {
        "fsync": _try_fsync, "rename": _try_rename, "exclusive create": _try_exclusive, "mmap": _try_mmap,
    }  # fmt: skip
    failed = []
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix=".launcher-doctor-", dir=place) as directory:
            for name, attempt in tries.items():
                try:
                    attempt(Path(directory))
                except (OSError, ValueError) as error:
                    failed.append(f"{name} ({getattr(error, 'strerror', None) or error})")
            skew = _skew(Path(directory))
    except OSError as error:
        return [bad("files", f"{place}: {error.strerror}", "name another DIR")]
    if failed:
        return [bad("files", f"does not work: {', '.join(failed)}", "put runs on another filesystem")]
    found = [ok("files", f"{', '.join(tries)} work ({(time.perf_counter() - start) * 1000:.0f} ms)")]
    if abs(skew) > SKEW:
        said = f"the filesystem's is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's"
        found.append(warning("file clock", said, "set both by NTP: times of files and logs cannot be compared"))
    return found


def _try_fsync(directory: Path) -> None:
    with open(directory / "a", "wb") as file:
        file.write(b"a" * 4096)
        file.flush()
        os.fsync(file.fileno())
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _try_rename(directory: Path) -> None:
    (directory / "b").write_bytes(b"b")
    os.replace(directory / "b", directory / "a")
    if (directory / "a").read_bytes() != b"b":
        raise ValueError("the old file is still there")
    (directory / "step.partial").mkdir()
    os.rename(directory / "step.partial", directory / "step")
    if (directory / "step.partial").exists() or not (directory / "step").is_dir():
        raise ValueError("a directory keeps its old name")


def _try_exclusive(directory: Path) -> None:
    os.close(os.open(directory / "c", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        os.close(os.open(directory / "c", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return
    raise ValueError("two could create one file")


def _try_mmap(directory: Path) -> None:
    with open(directory / "d", "w+b") as file:
        file.write(bytes(8192))
        file.flush()
        with mmap.mmap(file.fileno(), 8192) as mapped:
            mapped[4096:4100] = b"here"
            mapped.flush()
        file.seek(4096)
        if file.read(4) != b"here":
            raise ValueError("what is written through it is not in the file")


def _skew(directory: Path) -> float:
    """How far the clock that stamps files is ahead of this machine's."""
    before = time.time()
    (directory / "e").write_bytes(b"")
    after = time.time()
    stamped = (directory / "e").stat().st_mtime
    return stamped - after if stamped > after else min(0.0, stamped - before)


def _need(place: Path, measured: Measured) -> int | None:
    """Bytes that a run will take here beyond what it has: while one is saved there is one more than it keeps."""
    if measured.size is None:
        return None
    here = measured.path is not None and os.stat(measured.path).st_dev == os.stat(place).st_dev
    return (measured.keep + 1 - (measured.held if here else 0)) * measured.size


def _space(place: Path, measured: Measured, need: int | None) -> Finding:
    free = shutil.disk_usage(place).free
    said = f"{human(free)} free"
    if need is None or measured.size is None:
        if free < 10 * 10**9:
            return warning("space", said, "make room; --run RUN of an earlier run says what one takes")
        return ok("space", f"{said}; --run RUN of an earlier run says what one takes")
    said += f" for {human(need)}: {measured.keep} checkpoints of {human(measured.size)} and one being saved"
    said += f", less the {measured.held} that are there" if need < (measured.keep + 1) * measured.size else ""
    said += f"; --run.keep-every {measured.keep_every} keeps more for ever" if measured.keep_every else ""
    if free < need:
        return bad("space", said, "make room (launcher ckpt prune), keep fewer (--run.keep), or use another disk")
    if free < 1.5 * need:
        return warning("space", said, "make room: whatever else is written here fills the rest")
    return ok("space", said)


def _inodes(place: Path) -> list[Finding]:
    stat = os.statvfs(place)
    if not stat.f_files:  # the filesystem makes them as it needs them
        return []
    said = f"{stat.f_favail} files can still be made"
    if stat.f_favail < 10_000:
        return [
            bad("inodes", said, "remove small files")
            if stat.f_favail < 100
            else warning("inodes", said, "remove small files")
        ]
    return [ok("inodes", said)]


def _quota(place: Path, mount: Mount, need: int | None) -> list[Finding]:
    """What is left of this user's quota, where a command tells it."""
    if mount.kind == "lustre" and shutil.which("lfs"):
        said = _ask(["lfs", "quota", "-q", "-u", getpass.getuser(), mount.point])
        numbers = _numbers(said, mount.point)
    elif shutil.which("quota"):
        numbers = _numbers(_ask(["quota", "-w"]), mount.source)
    else:
        return []
    if numbers is None:
        return []
    (used, limit), (files, most) = numbers
    found = []
    if limit:
        left = max(0, limit - used)
        text = f"{human(left)} left of {human(limit)}"
        if left < (need or 1):
            fix = "make room (launcher ckpt prune), keep fewer (--run.keep), or ask for more"
            found.append(bad("quota", text + (f" for {human(need)}" if need is not None else ""), fix))
        elif used > 0.9 * limit:
            found.append(warning("quota", text, "make room: a save that meets the limit fails"))
        else:
            found.append(ok("quota", text))
    if most:
        text = f"{max(0, most - files)} left of {most}"
        near = files > 0.9 * most
        found.append(warning("quota of files", text, "remove small files") if near else ok("quota of files", text))
    return found


def _ask(argv: list[str]) -> str:
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, text=True, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout  # quota's exit code is 1 when over it


def _numbers(said: str, name: str) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(bytes, limit) and (files, limit) of the filesystem `name`, a line or a wrapped one; None where it has none."""
    words = said.split()
    if name not in words:
        return None
    row = [word.strip("*[]") for word in words[words.index(name) + 1 :]]
    sizes = row[:3]
    rest = row[3:] if len(row) > 3 and row[3].isdigit() else row[4:]  # between them a time of grace may stand
    counts = rest[:3]
    if not (len(sizes) == 3 and len(counts) == 3 and all(word.isdigit() for word in sizes + counts)):
        return None
    used, soft, hard, files, few, most = map(int, sizes + counts)
    return (used * 1024, (hard or soft) * 1024), (files, most or few)
