"""What kind of failure an exception is, and whether the same job may go better when it is tried again."""

from __future__ import annotations

import errno
import re

from launcher.errors import LauncherError

__all__ = ["Kind", "kind_of", "may_pass"]

Kind = str
"""`code` (the recipe, its options, its data), `peer` (another rank has gone), or `hardware`."""

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
DISK = {errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENOTCONN, errno.ENXIO, errno.ENODEV}


def kind_of(error: BaseException) -> Kind:
    """The kind of a failure, from the exception and those that it comes from."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    if isinstance(error, LauncherError):
        chain = [one for one in chain if not isinstance(one, LauncherError)]
    for one in chain:
        if isinstance(one, OSError) and one.errno in DISK:
            return "hardware"
        text = str(one)
        if ("CUDA" in text or "NCCL" in text or "NVML" in text) and HARDWARE.search(text):
            return "hardware"
        if type(one).__module__.startswith("torch") and type(one).__name__.startswith("Dist"):
            return "peer"
        if isinstance(one, RuntimeError | ConnectionError) and PEER.search(text):
            return "peer"
    return "code"


def may_pass(kind: Kind) -> bool:
    """Whether the same job may go better when it is tried again; of code it fails the same way."""
    return kind != "code"
