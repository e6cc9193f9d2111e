"""What the kernel's log says of a process that was killed for its memory, where it may be read (by root, mostly)."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

__all__ = ["killed_for_memory"]

KMSG = Path("/dev/kmsg")
LONGEST = 8192  # bytes of a record; the kernel's CONSOLE_EXT_LOG_MAX


def killed_for_memory(pid: int, log: Path = KMSG) -> str:
    """The kernel's words about process `pid` (`Killed process 123 (python) total-vm:...`); empty where it has none.

    Source: Documentation/ABI/testing/dev-kmsg; a read gives a record, and fails with EAGAIN behind the last.
    """
    said = ""
    with suppress(OSError):
        descriptor = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
        try:
            while record := os.read(descriptor, LONGEST):
                if found := re.search(rb"Killed process %d \([^\n]*" % pid, record):
                    said = found[0].decode(errors="replace")
        finally:
            os.close(descriptor)
    return said
