"""One outcome for all ranks: either everybody has done its part, or everybody has the same error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from launcher.errors import CheckpointError, LauncherError
from launcher.world import World

__all__ = ["agreed"]

T = TypeVar("T")


def agreed(world: World, work: Callable[[], T]) -> list[T]:
    """Do `work` on every rank and return what each made of it, in rank order.

    Raises:
        CheckpointError: it failed somewhere; the same error on every rank, naming the rank unless all failed alike.
        Exception: on the rank where `work` failed in a way that is nobody's fault but the code's, that failure.
    """
    value: T | None = None
    failure: str | None = None
    bug: Exception | None = None
    try:
        value = work()
    except LauncherError as error:
        failure = str(error)
    except OSError as error:
        failure = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except MemoryError:
        failure = "there is not enough memory"
    except Exception as error:
        bug, failure = error, f"{type(error).__name__}: {error}"
    outcomes: list[tuple[Any, str | None]] = world.gather((value, failure))
    if bug is not None:
        raise bug
    failures = [" ".join(failure.split()) if failure is not None else None for _, failure in outcomes]
    for rank, message in enumerate(failures):
        if message is not None:
            raise CheckpointError(message if len(set(failures)) == 1 else f"rank {rank}: {message}")
    return [cast(T, value) for value, _ in outcomes]
