"""The loss of a language model without its logits: of a large vocabulary they are the largest tensor of a step.

Tokens are taken a chunk at a time, as in Liger Kernel (Hsu et al., 2024, arXiv:2410.10989), and as "Cut Your Losses in
Large-Vocabulary Language Models" (Wijmans et al., 2024, arXiv:2411.09009) sets out: the gradients are computed in the
forward pass, while a chunk's logits are there, and the backward pass multiplies them. No product is computed twice.

`torch.nn.functional.linear_cross_entropy` has chunks from torch 2.13 on, in an operator that a compiler cannot look
into, which knows neither autocast nor a z-loss, and adds up the weight's gradient in the weight's own precision.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["linear_cross_entropy"]

Chunk = tuple[Tensor, Tensor | None, Tensor | None]  # the sum of its losses; its gradients by hidden, by weight


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk: int = 4096,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    compile: bool = False,  # noqa: A002 - torch's word
) -> Tensor:
    """The sum of the cross-entropies of `hidden @ weight.T` against targets, whose logits never exist whole.

    Products are in the precision of autocast where it is on, else in `weight`'s and `hidden`'s (those of gradients in
    fp32 for fp16); the statistics, the loss and the sum of the weight's gradient over the chunks in fp32 (in fp64 of
    fp64). Gradients are once differentiable. Under FSDP2 `weight` must be whole: call it within the forward of the
    module that owns it.

    Args:
        hidden: the last hidden states, after the norm.
        weight: of the output layer, or of the embedding that it is tied with.
        targets: class numbers; those that are `ignore_index` add nothing.
        chunk: tokens at a time. The largest tensors are [chunk, vocabulary]; smaller saves memory, and keeps a GPU
            less busy.
        ignore_index: the target of what is not to be predicted.
        z_loss: what the square of the log of the softmax's denominator is added with (PaLM, arXiv:2204.02311, takes
            1e-4): it keeps logits from drifting.
        compile: compile the work on a chunk, which fuses its passes over the logits. Within a compiled model it is
            compiled anyway.

    Shapes: `hidden` [..., width], `weight` [vocabulary, width], `targets` [...], to [].
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if targets.shape[0] != hidden.shape[0]:
        raise ValueError(f"{targets.shape[0]} targets for {hidden.shape[0]} hidden states")
    if chunk < 1:
        raise ValueError(f"chunk {chunk}: at least 1 token")
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):  # outside of the function: a cast's own backward restores the precision
        precision = torch.get_autocast_dtype(kind)
    else:
        precision = torch.promote_types(hidden.dtype, weight.dtype)
    options = (chunk, ignore_index, z_loss, precision, compile, torch.is_grad_enabled())
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, *options)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed with the loss and multiplied in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        ignore_index: int,
        z_loss: float,
        precision: torch.dtype,
        compile: bool,  # noqa: A002
        trains: bool,
    ) -> Tensor:
        work = _compiled() if compile and not torch.compiler.is_compiling() else _chunk
        wanted = (trains and ctx.needs_input_grad[0], trains and ctx.needs_input_grad[1])
        ctx.dtypes = (hidden.dtype, weight.dtype)
        exact = torch.promote_types(precision, torch.float32)
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        by_hidden: list[Tensor] = []
        by_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(precision)
            for states, classes in zip(hidden.split(chunk), targets.split(chunk), strict=True):
                one, gradient, addend = work(states.to(precision), matrix, classes, ignore_index, z_loss, wanted)
                loss = loss + one
                if gradient is not None:
                    by_hidden.append(gradient)
                if by_weight is not None and addend is not None:
                    by_weight += addend
        ctx.save_for_backward(torch.cat(by_hidden) if by_hidden else None, by_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if saved is None else (saved * gradient).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, *[None] * 7)


def _chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float, wanted: tuple[bool, bool]
) -> Chunk:
    """A chunk's loss, and the gradients that are wanted. Shapes: as `linear_cross_entropy`'s, flat."""
    logits = hidden @ weight.T
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    kept = targets != ignore_index
    classes = torch.where(kept, targets, 0)[:, None]
    normaliser = scores.logsumexp(-1)
    losses = normaliser - scores.gather(1, classes)[:, 0] + z_loss * normaliser.square()
    loss = torch.where(kept, losses, 0.0).sum()
    if not any(wanted):
        return loss, None, None
    # of a token that is ignored the softmax is that of an infinite denominator: no pass of its own to mask it
    softmax = scores.sub_(torch.where(kept, normaliser, torch.inf)[:, None]).exp_()
    if z_loss:
        softmax *= (1 + 2 * z_loss * normaliser)[:, None]
    # in fp16 they would vanish: the scale that keeps gradients from it comes with the backward pass
    precision = softmax.dtype if logits.dtype == torch.float16 else logits.dtype
    by_logits = softmax.scatter_add_(1, classes, -kept.to(softmax.dtype)[:, None]).to(precision)
    by_hidden = by_logits @ weight.to(precision) if wanted[0] else None
    return loss, by_hidden, by_logits.T @ hidden.to(precision) if wanted[1] else None


@cache
def _compiled() -> Callable[..., Chunk]:
    return torch.compile(_chunk, dynamic=False)
