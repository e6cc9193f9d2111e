"""All ranks come to the store before they connect to each other, so that one which never comes is known by name.

torch's own rendezvous waits half an hour and says that a socket timed out.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from launcher.errors import UsageError, WorldError

__all__ = ["CheckIn", "missing_line"]

COME = "all have come"
ASK = 10.0  # seconds for SLURM to name a job's nodes
LOOK = 1.0  # seconds between two looks at the store, at most
LINGER = 3 * LOOK


class CheckIn:
    """One rank's visit at the store; `store` is what its process groups are to be made with."""

    def __init__(self, rank: int, world_size: int, local_world_size: int, environ: Mapping[str, str]) -> None:
        """Raises UsageError where the environment does not say where the store is."""
        self.rank, self.world_size, self._local_world_size = rank, world_size, local_world_size
        self._environ = environ
        self.hosts: tuple[str, ...] = ()
        """Every rank's machine, once all have come."""
        try:
            self._address, self._port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
        except (KeyError, ValueError) as error:
            raise UsageError(
                f"the environment does not say where the ranks meet ({error}): start with launcher run, accelerate "
                "launch or torchrun, or set MASTER_ADDR and MASTER_PORT"
            ) from None
        self._place = f"{self._address}:{self._port}"
        self.store: Store

    def come(self, seconds: float) -> None:
        """Come to the store and wait until all ranks have, `seconds` from the first one on.

        Raises:
            WorldError: some have not; one rank's error names them.
        """
        server = self._connect(seconds)
        count = self._environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        mine = PrefixStore(f"launcher/{count}", server)
        try:
            mine.set(f"host/{self.rank}", _host())
            if mine.add("came", 1) == self.world_size:
                mine.set("outcome", COME)
            outcome = self._outcome(mine, seconds)
            self.hosts = tuple(_text(host) for host in mine.multi_get(self._keys())) if outcome == COME else ()
        except dist.DistError as error:  # the store went with its process
            raise WorldError(
                f"rank {self.rank} on {_host()}: the store at {self._place} has gone before all ranks had come: look "
                "at what rank 0 printed"
            ) from error
        if outcome != COME:
            raise WorldError(f"rank {self.rank} on {_host()}: not all ranks have come, as rank {outcome} says")
        server.set_timeout(timedelta(minutes=30))
        self.store = server

    def unreached(self, why: str) -> str:
        """What to tell where ranks that have all come cannot connect to each other; `why` is gloo's reason."""
        named = re.search(r"keys: \S*/(\d+)$|[Rr]anks? (\d+)[\d, ]* failed", why.partition("\n")[0])
        rank = int(named[1] or named[2]) if named else None
        whom = "all other ranks: one" if rank is None else f"rank {rank} on {self.hosts[rank]}: it"
        return (
            f"rank {self.rank} on {self.hosts[self.rank]} met all others at {self._place} and cannot connect to {whom} "
            "has ended meanwhile, or a firewall is between them, or gloo takes a network that they do not share "
            f"(GLOO_SOCKET_IFNAME names another): {why.partition(chr(10))[0]}"
        )

    def _connect(self, seconds: float) -> Store:
        agent = self._environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            return TCPStore(
                self._address,
                self._port,
                self.world_size,
                is_master=self.rank == 0 and not agent,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
                multi_tenant=not agent,
            )
        except dist.DistNetworkError as error:
            if "EADDRINUSE" in str(error) or "already in use" in str(error):
                raise WorldError(f"port {self._port} of {_host()} is taken: set MASTER_PORT to another") from error
            raise WorldError(
                f"rank {self.rank} on {_host()} could not reach {self._place} in {seconds:.0f} s, where "
                f"{'the agent' if agent else 'rank 0'} should be: it did not start, or a firewall is between them"
            ) from error

    def _outcome(self, store: Store, seconds: float) -> str:
        """What all ranks get to know alike: that all have come, or the rank that names those that have not.

        Raises:
            WorldError: they have not, and this rank is to name them.
        """
        begun = time.monotonic()
        came: dict[int, str] = {}
        outcome = ""
        while not outcome:
            if store.check(["outcome"]):  # a wait for it would print warnings of torch's when it ends in vain
                outcome = _text(store.get("outcome"))
                break
            waited = time.monotonic() - begun
            time.sleep(min(LOOK, max(0.005, waited / 20)))
            if waited >= seconds:
                came = {rank: _text(store.get(key)) for rank, key in enumerate(self._keys()) if store.check([key])}
                outcome = _text(store.compare_set("outcome", "", str(self.rank)))
        if outcome != COME:
            self._let_read(store)
        if outcome == str(self.rank):
            nodes = _nodes(self._environ)
            raise WorldError(missing_line(came, self.world_size, self._local_world_size, nodes, seconds, self._place))
        return outcome

    def _let_read(self, store: Store) -> None:
        """Rank 0 may hold the store: it stays until the others that came know how this ends, as this rank does now."""
        read = store.add("read", 1)
        number = store.add("came", 0)
        deadline = time.monotonic() + LINGER
        while self.rank == 0 and read < number and time.monotonic() < deadline:
            time.sleep(0.02)
            read = store.add("read", 0)

    def _keys(self) -> list[str]:
        return [f"host/{rank}" for rank in range(self.world_size)]


def missing_line(
    came: Mapping[int, str], world_size: int, local_world_size: int, nodes: Sequence[str], seconds: float, place: str
) -> str:
    """Which ranks have not come, and where they should be.

    Args:
        came: the host of every rank that came.
        world_size: the number of ranks.
        local_world_size: of one node.
        nodes: the job's nodes in the order of the ranks; nothing where it is not known.
        seconds: how long they had.
        place: address and port of the store.
    """
    hosts = {rank // local_world_size: host for rank, host in came.items()}
    absent: dict[int, list[int]] = {}
    for rank in range(world_size):
        if rank not in came:
            absent.setdefault(rank // local_world_size, []).append(rank)
    parts = []
    for node, ranks in list(absent.items())[:8]:
        host = hosts.get(node) or (nodes[node] if node < len(nodes) else "")
        numbers = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
        if len(ranks) not in (1, ranks[-1] - ranks[0] + 1):
            numbers = f"ranks {', '.join(map(str, ranks))}"
        parts.append(f"{numbers} on {host}" if host else numbers)
    if len(absent) > 8:
        parts.append(f"and all or some of {len(absent) - 8} nodes more")
    missing = world_size - len(came)
    verb = "has" if missing == 1 else "have"
    return (
        f"{missing} of {world_size} ranks {verb} not come in {seconds:.0f} s: {', '.join(parts)}; look at what they "
        f"printed, and whether they reach {place} (--run.join-within SECONDS waits longer)"
    )


def _nodes(environ: Mapping[str, str]) -> list[str]:
    """The nodes of this SLURM step, in the order of its ranks; nothing outside of SLURM."""
    listed = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not listed:
        return []
    command = ["scontrol", "show", "hostnames", listed]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ASK)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split()


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
