"""One outcome for all ranks: either everybody has done its part, or everybody has the same error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from launcher.errors import CheckpointError, DamagedError, LauncherError
from launcher.world import World

__all__ = ["agreed"]

T = TypeVar("T")


def agreed(world: World, work: Callable[[], T]) -> list[T]:
    """Do `work` on every rank and return what each made of it, in rank order.

    Raises:
        LauncherError: it failed somewhere; the same error on every rank, naming the rank unless all failed alike. Of
            several the first rank's, but damage last: another checkpoint would not help against the other faults.
        Exception: on the rank where `work` failed in a way that is nobody's fault but the code's, that failure.
    """
    value: T | None = None
    failure: LauncherError | None = None
    bug: Exception | None = None
    try:
        value = work()
    except LauncherError as error:
        failure = error
    except OSError as error:
        failure = CheckpointError(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except MemoryError:
        failure = CheckpointError("there is not enough memory")
    except Exception as error:
        bug, failure = error, CheckpointError(f"{type(error).__name__}: {error}")
    if failure is not None:
        failure = type(failure)(" ".join(str(failure).split()))  # one line, and nothing that cannot be sent
    outcomes: list[tuple[Any, LauncherError | None]] = world.gather((value, failure))
    if bug is not None:
        raise bug
    failures = [(rank, error) for rank, (_, error) in enumerate(outcomes) if error is not None]
    if failures:
        rank, first = min(failures, key=lambda found: isinstance(found[1], DamagedError))
        alike = {(type(error), str(error)) for _, error in outcomes} == {(type(first), str(first))}
        raise type(first)(str(first) if alike else f"rank {rank}: {first}")
    return [cast(T, value) for value, _ in outcomes]
