"""What `checkpoint.py` compares: ways to save a rank's state and to load it again, peers' and the launcher's.

All save the same bytes in all: weights and AdamW's two moments in float32, sharded over the ranks by rows. Accelerate
alone cannot shard on a CPU: there every rank holds all of it, and rank 0 writes it. Every method is called by all ranks
together. `save` returns when training may go on, and what it returns waits until the bytes are durable.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch.distributed.tensor import DTensor, Shard

from launcher.checkpoint import Retention, State, Store, Writer, load
from launcher.world import World

Finish = Callable[[], float]
"""Waits until all that this rank writes is durable, and tells when that was, by `time.monotonic`."""

LAYERS = 5
KINDS = ("model", "optimizer/0/exp_avg", "optimizer/0/exp_avg_sq")
BLOCK = 8 << 20


def shapes(gigabytes: float) -> dict[str, tuple[int, ...]]:
    """A decoder's weights, so many that three times their bytes are about `gigabytes`."""
    width = max(16, 8 * round(math.sqrt(gigabytes * 1e9 / (12 * (16 * LAYERS + 5))) / 8))
    layer = dict.fromkeys(("attention.q", "attention.k", "attention.v", "attention.o"), (width, width))
    layer |= {"mlp.gate": (4 * width, width), "mlp.up": (4 * width, width), "mlp.down": (width, 4 * width)}
    layer |= {"norm1": (width,), "norm2": (width,)}
    found = {f"layers.{k}.{name}.weight": shape for k in range(LAYERS) for name, shape in layer.items()}
    return found | {"embed.weight": (5 * width, width), "norm.weight": (width,)}


def filled(name: str, shape: tuple[int, ...], rows: slice) -> torch.Tensor:
    """Rows of a tensor of random bits, the same for a name on every rank, and its own memory."""
    pattern = np.random.default_rng(xxhash.xxh64_intdigest(name.encode())).random(1 << 20, dtype=np.float32)
    row = math.prod(shape[1:])
    start, stop = rows.start * row, rows.stop * row
    flat = np.empty(stop - start, dtype=np.float32)
    for at in range(0, len(flat), len(pattern)):
        piece = flat[at : at + len(pattern)]
        piece[:] = np.roll(pattern, -(start + at))[: len(piece)]
    return torch.from_numpy(flat).view(-1, *shape[1:])


class Job:
    """The ranks, and the state as shards: what most contenders save."""

    def __init__(self, world: World, gigabytes: float) -> None:
        self.world, self.shapes = world, shapes(gigabytes)
        self.tensors: dict[str, DTensor] = {}

    @property
    def nbytes(self) -> int:
        """Of all ranks' state."""
        return sum(4 * len(KINDS) * math.prod(shape) for shape in self.shapes.values())

    def fill(self) -> None:
        """Make the state."""
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (self.world.world_size,))
        for name, shape in self.names():
            part = shape[0] // self.world.world_size
            rows = slice(part * self.world.rank, part * (self.world.rank + 1))
            stride = torch.empty(shape, device="meta").stride()
            self.tensors[name] = DTensor.from_local(
                filled(name, shape, rows), mesh, [Shard(0)], shape=torch.Size(shape), stride=stride
            )

    def names(self) -> list[tuple[str, tuple[int, ...]]]:
        """Every tensor of the state."""
        return [(f"{kind}/{name}", shape) for kind in KINDS for name, shape in self.shapes.items()]

    def locals(self) -> dict[str, torch.Tensor]:
        """What this rank holds."""
        return {name: tensor.to_local() for name, tensor in self.tensors.items()}


class Memcpy:
    """The least that a save can cost training: a copy of this rank's bytes into memory that has been touched."""

    def __init__(self, job: Job) -> None:
        sources = [tensor.numpy() for tensor in job.locals().values()]
        self._held = np.ones(sum(source.nbytes for source in sources), dtype=np.uint8)
        self._copies = []
        at = self._held.ctypes.data
        for source in sources:
            self._copies.append((at, source.ctypes.data, source.nbytes))
            at += source.nbytes

    def __call__(self) -> None:
        for copy in self._copies:
            ctypes.memmove(*copy)


class Saver:
    """A contender."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def save(self, directory: Path) -> Finish:
        """Save into an empty directory."""
        raise NotImplementedError

    def load(self, directory: Path) -> None:
        """Load what `save` wrote into the live tensors."""
        raise NotImplementedError

    def live(self) -> dict[str, torch.Tensor]:
        """The tensors that `load` fills."""
        return self.job.locals()


class Raw(Saver):
    """The same bytes from a buffer into a file a rank and fsync; the same bytes into that buffer, and one digest."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._data = np.concatenate([tensor.view(torch.uint8).flatten().numpy() for tensor in job.locals().values()])
        self.digests: list[bytes] = []

    def save(self, directory: Path) -> Finish:
        fd = os.open(directory / f"rank-{self.job.world.rank}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        for start in range(0, len(self._data), BLOCK):
            block, written = self._data.data[start : start + BLOCK], 0
            while written < len(block):
                written += os.pwrite(fd, block[written:], start + written)
        os.fsync(fd)
        os.close(fd)
        fsync([directory])
        return now()

    def load(self, directory: Path) -> None:
        fd = os.open(directory / f"rank-{self.job.world.rank}", os.O_RDONLY)
        self.digests = []
        for start in range(0, len(self._data), BLOCK):
            block, filled = self._data.data[start : start + BLOCK], 0
            while filled < len(block):
                filled += os.preadv(fd, [block[filled:]], start + filled)
            self.digests.append(xxhash.xxh3_128_digest(block))
        os.close(fd)

    def live(self) -> dict[str, torch.Tensor]:
        return {"": torch.from_numpy(self._data)}


class Launcher(Saver):
    """`launcher.checkpoint`: durable is when the checkpoint is published; it is then read back and verified."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._store = _Timed(Path(), Retention(1))
        self._writer = Writer(self._store, job.world, attempt=1)
        self._state = State(dict(job.tensors), values={"step": 1})

    def save(self, directory: Path) -> Finish:
        self._store.root = directory
        self._store.published = time.monotonic()  # stays so on the ranks that do not publish
        self._writer.start(1, self._state)

        def finish() -> float:
            self._writer.wait()
            outcome = self._writer.outcome
            assert outcome is not None
            assert outcome.path is not None, outcome.error
            return self._store.published

        return finish

    def load(self, directory: Path) -> None:
        path = Store(directory).newest()
        assert path is not None
        load(path, self.job.world, self._state, buffer=self._writer.buffer)


class _Timed(Store):
    """A store that knows when its checkpoint had its name."""

    published = 0.0

    def publish(self, partial: Path, attempt: int) -> Path:
        path = super().publish(partial, attempt)
        self.published = time.monotonic()
        return path


class TorchSave(Saver):
    """`torch.save` of each rank's shards into a file of its own."""

    def save(self, directory: Path) -> Finish:
        path = directory / f"rank-{self.job.world.rank}.pt"
        torch.save(self.job.locals(), path)

        def finish() -> float:
            fsync([path, directory])
            return time.monotonic()

        return finish

    def load(self, directory: Path) -> None:
        path = directory / f"rank-{self.job.world.rank}.pt"
        loaded = torch.load(path, map_location="cpu", mmap=False, weights_only=True)
        for name, tensor in self.job.locals().items():
            tensor.copy_(loaded[name])


class Accelerate(Saver):
    """`accelerator.save_state`: weights as safetensors, the optimizer as a pickle, all of it by rank 0."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        from accelerate import Accelerator

        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for name, shape in job.shapes.items():
                    weight = filled(f"model/{name}", shape, slice(0, shape[0]))
                    self.register_parameter(name.replace(".", "_"), torch.nn.Parameter(weight))

        self._accelerator = Accelerator(cpu=True)
        assert self._accelerator.num_processes == job.world.world_size
        model = Model()
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter, (name, shape) in zip(model.parameters(), job.shapes.items(), strict=True):
            moments = {
                kind.rpartition("/")[2]: filled(f"{kind}/{name}", shape, slice(0, shape[0])) for kind in KINDS[1:]
            }
            optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
        # not wrapped for DDP, which would only add a copy of the gradients
        self._model = self._accelerator.prepare_model(model, evaluation_mode=True)
        self._optimizer = self._accelerator.prepare_optimizer(optimizer)

    def save(self, directory: Path) -> Finish:
        self._accelerator.save_state(str(directory))

        def finish() -> float:
            fsync([*files(directory), directory] if self.job.world.is_main else [])
            return time.monotonic()

        return finish

    def load(self, directory: Path) -> None:
        self._accelerator.load_state(str(directory))

    def live(self) -> dict[str, torch.Tensor]:
        found = {}
        for name, weight in self._model.named_parameters():
            found[f"model/{name}"] = weight.detach()
            for kind in KINDS[1:]:
                found[f"{kind}/{name}"] = self._optimizer.state[weight][kind.rpartition("/")[2]]
        return found


class Dcp(Saver):
    """`torch.distributed.checkpoint.save`, which syncs its files, and `load` in place."""

    def save(self, directory: Path) -> Finish:
        import torch.distributed.checkpoint as dcp

        dcp.save(dict(self.job.tensors), storage_writer=dcp.FileSystemWriter(directory))

        def finish() -> float:
            fsync([directory] if self.job.world.is_main else [])
            return time.monotonic()

        return finish

    def load(self, directory: Path) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.load(dict(self.job.tensors), storage_reader=dcp.FileSystemReader(directory))


class DcpAsync(Dcp):
    """`dcp.async_save` in a thread, with a stager that keeps its memory, and a gloo group of its own.

    On the training's group it deadlocks: its thread's collectives and training's meet in another order on each rank.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self._stager = DefaultStager(StagingOptions(False, False, False, False))  # as async_save makes it itself
        self._group = dist.new_group(backend="gloo")

    def save(self, directory: Path) -> Finish:
        import torch.distributed.checkpoint as dcp

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            future: Any = dcp.async_save(
                dict(self.job.tensors),
                storage_writer=dcp.FileSystemWriter(directory),
                process_group=self._group,
                async_stager=self._stager,
            )

        def finish() -> float:
            future.result()
            fsync([directory] if self.job.world.is_main else [])
            return time.monotonic()

        return finish


SAVERS: dict[str, type[Saver]] = {
    "raw": Raw,
    "launcher": Launcher,
    "torch.save": TorchSave,
    "accelerate": Accelerate,
    "dcp": Dcp,
    "dcp async": DcpAsync,
}
PEERS = ("torch.save", "accelerate", "dcp", "dcp async")


def files(directory: Path) -> list[Path]:
    """All files below a directory."""
    return [path for path in sorted(directory.rglob("*")) if path.is_file()]


def fsync(paths: Iterable[Path]) -> None:
    """Make files or directories durable."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def forget(directory: Path) -> None:
    """Drop a directory's files from the page cache."""
    for path in files(directory):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def remember(directory: Path) -> None:
    """Read a directory's files into the page cache."""
    for path in files(directory):
        with open(path, "rb", buffering=0) as file:
            scratch = bytearray(BLOCK)
            while file.readinto(scratch):
                pass


def now() -> Finish:
    """For what is durable already."""
    at = time.monotonic()
    return lambda: at
