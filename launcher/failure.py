"""What kind of failure an exception is, and whether the same job may go better when it is tried again."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from launcher.errors import LauncherError

__all__ = ["KINDS", "NOTE", "Kind", "kind_of", "kind_of_text", "may_pass"]

Kind = str
"""One of KINDS."""

# Of each kind, whether the same job may go better when it is tried again.
KINDS = {
    "code": False,  # the recipe, or its options
    "memory": False,  # of the GPU, or of the host where the process was told so
    "data": False,  # a sample that cannot be read or collated, or a data worker that died
    "network": True,  # a sample that comes over a network which did not answer
    "disk": False,  # full, over quota, or read-only
    "numbers": False,  # a loss or a gradient that is not finite
    "hang": True,  # no progress: a rank that the others wait for
    "peer": True,  # another rank has gone
    "hardware": True,  # a GPU, a link or a file system that is broken
    "killed": True,  # from outside, or crashed in native code, without a word
    "lost": True,  # a node with all its ranks
}

# What gloo, NCCL and torch's store say where the other side is gone.
PEER = re.compile(
    r"connection (closed by peer|reset by peer|refused)|broken pipe|"
    r"gloo\b.*(timed out|pair\.cc|buffer\.cc|transport)|timed out waiting \d+ ?ms|"
    r"nccl\b.*(communicator was aborted|remote process|remote error|socket)|remote process exited|"
    r"collective operation timeout|(store|socket)\b.*(timed out|timeout)|failed to recv|sendbytes failed",
    re.IGNORECASE | re.DOTALL,
)
# Of the errors that CUDA's runtime names, those of a machine and not of a program; cuda runtime API, cudaError_t.
HARDWARE = re.compile(
    r"uncorrectable (ecc|nvlink) error|hardware stack error|gpu has fallen off the bus|"
    r"device\(s\) (is|are) busy or unavailable|unknown error|system not yet initialized|contained memory error|"
    r"no cuda-capable device|driver shutting down|nvml.*(unknown error|gpu is lost)|unhandled system error",
    re.IGNORECASE,
)
# What torch's allocators, cuBLAS and C++ say where there is no memory left.
MEMORY = re.compile(
    r"out of memory\b|can't allocate memory|cannot allocate memory|\w+_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation|"
    r"std::bad_alloc",
    re.IGNORECASE,
)
# Gloo aborts the process that gets more elements than it expects, from a thread of its own.
MISMATCH = re.compile(r"collective mismatch|op\.preamble\.length <= op\.nbytes", re.IGNORECASE)
WORKER = re.compile(r"DataLoader worker \(pid.{0,200}?\) (is killed by signal|exited unexpectedly)", re.DOTALL)
NOTE = re.compile(r"^\(launcher: (?P<what>.+) of loader '(?P<loader>.*)'\)$", re.MULTILINE)
"""The note that launcher/data.py adds to an exception in a data set; it survives the way out of a worker process."""
FULL = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)  # what a compiler says, for one
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
BROKEN = {errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENOTCONN, errno.ENXIO, errno.ENODEV}


def kind_of(error: BaseException) -> Kind:
    """The kind of a failure, from the exception and those that it comes from."""
    if isinstance(error, LauncherError) and error.kind != "code":
        return error.kind
    chain = list(_chain(error))
    found = [kind for one in chain if not isinstance(one, LauncherError) and (kind := _kind_of_one(one))]
    first = found[0] if found else "code"
    if first in ("code", "peer") and any(map(_is_of_data, chain)):
        return "network" if first == "peer" or any(isinstance(one, TimeoutError) for one in chain) else "data"
    return first


def kind_of_text(text: str) -> Kind:
    """The kind of a death in native code, from what the process wrote last; `killed` where that says nothing."""
    return "memory" if MEMORY.search(text) else "code" if MISMATCH.search(text) else "killed"


def may_pass(kind: Kind) -> bool:
    """Whether the same job may go better when it is tried again; of code it fails the same way."""
    return KINDS.get(kind, False)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        yield link
        link = link.__cause__ or link.__context__


def _kind_of_one(error: BaseException) -> Kind | None:
    text = str(error)
    if isinstance(error, OSError):
        told = re.findall(r"\[Errno (\d+)\]", text)  # out of a worker process comes the text alone
        number = error.errno or (int(told[-1]) if told else None)
        if number in BROKEN:
            return "hardware"
        if number in DISK:
            return "disk"
        if number == errno.ENOMEM:
            return "memory"
    name, module = type(error).__name__, type(error).__module__
    if ("CUDA" in text or "NCCL" in text or "NVML" in text) and HARDWARE.search(text):
        return "hardware"
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        return "memory"
    if isinstance(error, RuntimeError) and MEMORY.search(text):
        return "memory"
    if isinstance(error, RuntimeError) and FULL.search(text):
        return "disk"
    if module.startswith("torch") and name.startswith("Dist"):
        return "peer"
    if isinstance(error, RuntimeError | ConnectionError) and PEER.search(text):
        return "peer"
    return None


def _is_of_data(error: BaseException) -> bool:
    noted = "\n".join(getattr(error, "__notes__", ()))
    text = str(error)
    return bool(NOTE.search(noted) or NOTE.search(text) or (isinstance(error, RuntimeError) and WORKER.search(text)))
