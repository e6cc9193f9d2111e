"""The processes of a run: who is here, on which device, and small exchanges between hosts.

Exchanges of Python values go over a gloo group of their own, never over the group that carries gradients:
two threads of a rank, or two ranks that issue in another order, would deadlock or crash on a shared one.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from launcher import flight
from launcher.checkin import CheckIn
from launcher.config import RunConfig
from launcher.errors import UsageError, WorldError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["World", "connect", "disconnect"]

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
SINGLE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


@dataclass(frozen=True)
class World:
    """One rank's view of all ranks; `group` is the host-side gloo group (None in a single process)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    group: dist.ProcessGroup | None = None
    hosts: tuple[str, ...] = ()
    """Every rank's machine; nothing in a single process."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that speaks and writes."""
        return self.rank == 0

    def another(self) -> World:
        """The same ranks with a host group of their own, for a thread; called by all of them."""
        if self.group is None:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=TIMEOUT))

    def gather(self, value: T) -> list[T]:
        """Every rank's `value` (picklable between our own processes), in rank order, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's `value` on every rank."""
        if self.group is None:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]  # type: ignore[no-any-return]

    def sum(self, *values: float) -> list[float]:
        """The sums of every rank's numbers, exact for integers up to 2**53."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return total.tolist()

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.group is not None:
            dist.barrier(group=self.group)


def connect(run: RunConfig, environ: Mapping[str, str]) -> tuple[World, Accelerator]:
    """Join the processes that `accelerate launch`, torchrun or a SLURM job started; `run` is resolved.

    Raises:
        UsageError: the environment is half set, or the precision does not exist on this device.
        WorldError: Accelerate came up with another world than the environment promises, a job that asked for GPUs has
            none, or a rank did not come.
    """
    rank, world_size, local_rank, local_world_size = _ranks(environ)
    cuda = torch.cuda.is_available() and environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes")
    if (asked := environ.get("LAUNCHER_GPUS")) and not cuda:
        raise WorldError(
            f"{socket.gethostname()}: the job asked for {asked} GPUs a node and torch {torch.__version__} sees none: "
            "a build for the CPU, or a node with a broken driver (launcher doctor --nodes)"
        )
    if run.precision == "fp16" and not cuda:
        raise UsageError("fp16 needs a CUDA device: Accelerate would silently train in fp32 here; --run.precision bf16")
    if cuda and local_rank >= torch.cuda.device_count():
        raise WorldError(
            f"local rank {local_rank} has no GPU: this host shows {torch.cuda.device_count()}; ask for fewer"
        )
    check_in = None
    if world_size > 1:
        check_in = CheckIn(rank, world_size, local_world_size, environ)
        _join(check_in, _backend(cuda), run.join_within)
    accelerator = _accelerator(run, cuda, "LOCAL_RANK" in environ)
    if (accelerator.num_processes, accelerator.process_index) != (world_size, rank):
        raise WorldError(
            f"rank {rank} of {world_size} was asked for, Accelerate set up rank {accelerator.process_index} of "
            f"{accelerator.num_processes}: on a CPU start with `launcher run --nproc {world_size}`"
        )
    if world_size == 1 and run.shard != "none" and not dist.is_initialized():  # FSDP2 wants a mesh, if only of one
        dist.init_process_group(
            _backend(cuda),
            store=dist.HashStore(),  # type: ignore[attr-defined]
            rank=0,
            world_size=1,
        )
    world = World(rank, world_size, local_rank, local_world_size, accelerator.device)
    if check_in is not None:
        world = replace(world, group=_host_group(check_in, run.join_within), hosts=check_in.hosts)
    return world, accelerator


def disconnect() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _ranks(environ: Mapping[str, str]) -> tuple[int, int, int, int]:
    """Rank, world size, local rank, local world size; a plain `python`, inside salloc too, is one process."""
    if "WORLD_SIZE" not in environ and "RANK" not in environ:
        environ = SINGLE
    try:
        return tuple(int(environ[name]) for name in SINGLE)  # type: ignore[return-value]
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"the environment describes a half distributed run ({error} of {', '.join(SINGLE)}): "
            "start with accelerate launch, torchrun or launcher run, or unset WORLD_SIZE and RANK"
        ) from None


def _backend(cuda: bool) -> str:
    return "cpu:gloo,cuda:nccl" if cuda else "gloo"


def _join(check_in: CheckIn, backend: str, seconds: float) -> None:
    """Make the process group that Accelerate then finds; who cannot be reached is given up after `seconds`."""
    flight.switch_on()
    check_in.come(seconds)
    with _reaching(check_in):
        dist.init_process_group(
            backend,
            store=check_in.store,
            rank=check_in.rank,
            world_size=check_in.world_size,
            timeout=timedelta(seconds=seconds),
        )
    _set_timeout(dist.group.WORLD)


def _host_group(check_in: CheckIn, seconds: float) -> dist.ProcessGroup:
    """The host-side group, with every rank in it."""
    patience = timedelta(seconds=seconds)
    with _reaching(check_in):
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=patience)
        dist.monitored_barrier(group, timeout=patience, wait_all_ranks=True)
    _set_timeout(group)
    return group


@contextmanager
def _reaching(check_in: CheckIn) -> Iterator[None]:
    """Tell in one line that a rank which had come to the store cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        raise WorldError(check_in.unreached(str(error))) from error


def _set_timeout(group: dist.ProcessGroup | None) -> None:
    """Of a group's collectives, once it is up."""
    dist.distributed_c10d._set_pg_timeout(TIMEOUT, group)


def _accelerator(run: RunConfig, cuda: bool, distributed: bool) -> Accelerator:
    """Accelerate's set-up of processes, device and mixed precision, with what the launcher does itself turned off."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    os.environ.pop("ACCELERATE_USE_FSDP", None)  # sharding is ours: on a CPU Accelerate would drop it, and the ranks
    group = [InitProcessGroupKwargs(backend=_backend(cuda), timeout=TIMEOUT)] if distributed else []
    return Accelerator(
        cpu=not cuda,
        mixed_precision=run.precision,
        gradient_accumulation_steps=1,
        dynamo_backend="no",
        step_scheduler_with_optimizer=False,
        kwargs_handlers=group,
    )
