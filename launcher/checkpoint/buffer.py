"""Host memory that a rank's tensors pass through, on their way to the disk or from it; used again and again."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import torch

__all__ = ["Buffer"]

CHUNK = 64 << 20


class Buffer:
    """Memory that is touched once and kept: the first copy into fresh pages takes several times as long as any other.

    For a CUDA device it is page-locked, so that copies run beside the host; `settle` waits for them.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._held = torch.empty(0, dtype=torch.uint8)
        self._registered = False
        self._copied: torch.cuda.Event | None = None

    def room(self, size: int) -> torch.Tensor:
        """Bytes, shape (size,), not initialised; the same memory as before unless that is too small, or far too large.

        Raises:
            MemoryError: there is not as much.
        """
        self.settle()
        if not size <= len(self._held) <= 2 * size:
            self._release()  # first: there may not be room for both
            if size:
                self._held = self._allocate(size)
        return self._held[:size]

    def warm(self, size: int) -> None:
        """Make room for `size` bytes, and touch every page of it; where that is too much, nothing."""
        with suppress(MemoryError):
            room = self.room(size).numpy()
            for start in range(0, size, CHUNK):
                room[start : start + CHUNK] = 0  # without the interpreter's lock, a piece at a time

    def copied(self) -> None:
        """Mark the copies queued so far on the current stream as those to wait for."""
        if self._device is not None:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self._device))

    def settle(self) -> None:
        """Wait until the copies that were marked, or all that were queued in a load, have arrived."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None

    def _allocate(self, size: int) -> torch.Tensor:
        """numpy's memory, so that too much is a MemoryError; registered with CUDA, where there is.

        torch's own page-locked memory would be rounded up to a power of two, and never given back.
        """
        room = torch.from_numpy(np.empty(size, dtype=np.uint8))
        if self._device is not None:
            portable = 1  # cudaHostRegisterPortable
            self._registered = int(torch.cuda.cudart().cudaHostRegister(room.data_ptr(), size, portable)) == 0
        return room

    def _release(self) -> None:
        if self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._held.data_ptr())
        self._registered = False
        self._held = torch.empty(0, dtype=torch.uint8)
