"""One rank of a run of the check: the recipe as it is, with a run that writes down what it does."""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import launcher
from launcher.attempt import Attempt, conduct
from launcher.check.settings import Settings
from launcher.check.traced import TracedRun

__all__ = ["rank_main"]

DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "FSDP_", "TORCHELASTIC_", "LAUNCHER_", "OMP_")


def rank_main(settings: Settings, recipe: str, argv: Sequence[str], environ: Mapping[str, str], log: str) -> None:
    """Run the recipe in this process, which is its own from here on: a session, an output, an environment."""
    os.setsid()
    threading.Thread(target=_end_with_the_check, name="launcher-check", daemon=True).start()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, target)
    for name in [name for name in os.environ if name.startswith(DISTRIBUTED)]:
        del os.environ[name]
    os.environ.update(environ)
    sys.argv = [recipe, *argv]
    sys.path.insert(0, str(Path(recipe).absolute().parent))
    multiprocessing.set_start_method(None, force=True)  # data workers start as they would without the server
    if settings.descent:
        _still()
    if "--run.compile" in argv:
        inductor = import_module("torch._inductor.config")
        inductor.fallback_random = True  # type: ignore[attr-defined]  # else dropout's masks are its own, and nothing compares
    launcher.main = functools.partial(_main, settings)
    runpy.run_path(recipe, run_name="__main__")


def _end_with_the_check() -> None:
    """Nothing of a check outlives it, even if it is killed."""
    check = multiprocessing.parent_process()
    assert check is not None
    wait([check.sentinel])
    os.killpg(0, signal.SIGKILL)


def _main(settings: Settings, train: Callable[..., None]) -> None:
    """`launcher.main`, with a traced run."""
    conduct(Attempt(functools.partial(TracedRun, settings)), _in_double(train) if settings.double else train)


def _in_double(train: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(train)
    def in_double(*arguments: Any) -> None:
        with _Double():
            train(*arguments)

    return in_double


class _Double(TorchFunctionMode):
    """What a recipe computes in float32 by name (`x.float()`) is computed in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        if func is torch.nn.functional.rms_norm and (kwargs or {}).get("eps", *args[3:4] or [None]) is None:
            return func(*args[:3], **{**(kwargs or {}), "eps": torch.finfo(torch.float32).eps})  # else float64's own
        swap = {torch.float32: torch.float64}
        args = tuple(swap.get(one, one) if isinstance(one, torch.dtype) else one for one in args)
        kwargs = {
            key: swap.get(one, one) if isinstance(one, torch.dtype) else one for key, one in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


def _still() -> None:
    """Take out what would hide or drown a difference: clipping scales gradients, and dropout draws a micro-batch."""
    clip = torch.nn.utils.clip_grad_norm_
    attend: Callable[..., Any] = torch.nn.functional.scaled_dot_product_attention

    @functools.wraps(clip)
    def measured(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> torch.Tensor:
        return clip(parameters, float("inf"), *args, **kwargs)

    def kept(input: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:  # noqa: A002 - torch's name
        return input

    def attended(*args: Any, **kwargs: Any) -> Any:
        if len(args) > 4:
            args = (*args[:4], 0.0, *args[5:])
        return attend(*args, **{key: 0.0 if key == "dropout_p" else value for key, value in kwargs.items()})

    torch.nn.utils.clip_grad_norm_ = measured
    setattr(torch.nn.functional, "scaled_dot_product_attention", attended)  # noqa: B010 - mypy knows it better
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"):
        setattr(torch.nn.functional, name, kept)
