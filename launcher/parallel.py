"""From a module as the recipe wrote it to one that computes the same on every rank.

The order matters and is the same on a CPU and on GPUs: built and initialised on the host under one seed, activation
checkpointed, compiled in place, given autocast, then replicated (DDP); or sharded (FSDP2) a block at a time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from launcher.config import RunConfig
from launcher.errors import UsageError
from launcher.world import World

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Blocks", "Replica", "all_gather", "broadcast_buffers", "plain_name", "reshard", "set_gradient_sync", "wrap"]

Blocks = type[nn.Module] | tuple[type[nn.Module], ...] | None

WRAPPERS = re.compile(r"(^module\.)|_orig_mod\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.")


class Replica(DistributedDataParallel):
    """DDP that lends its module's attributes, so that a recipe reads `model.config` on one GPU and on eight.

    `synced` tells whether a forward pass went through DDP since it was last cleared: a backward of anything else
    (`model.head(x)`) would leave gradients that differ between ranks.
    """

    synced = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's forward, with gradients reduced in the backward that follows."""
        self.synced = self.synced or self.require_backward_grad_sync
        return super().forward(*inputs, **kwargs)  # type: ignore[no-untyped-call]


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers and compilers put into it."""
    return WRAPPERS.sub("", name)


def wrap(
    model: nn.Module, run: RunConfig, world: World, accelerator: Accelerator, *, blocks: Blocks, unused: bool
) -> nn.Module:
    """`model` (on the CPU, initialised) made parallel on `world`, with the precision and compilation of `run`."""
    repeated = find_blocks(model, blocks)
    if run.activation_checkpointing != "off":
        for block in _need(repeated, f"--run.activation-checkpointing {run.activation_checkpointing}"):
            _recompute(block, keep_dear=run.activation_checkpointing == "selective")
    if run.compile != "off" and run.compile_scope == "block":
        for block in _need(repeated, "--run.compile-scope block"):
            _compile(block, run)
    trains = any(parameter.requires_grad for parameter in model.parameters())
    if run.shard != "none":
        _shard(model, repeated, run, _mesh(run, world))
    # evaluation_mode: autocast and the device are Accelerate's, the wrapping is ours
    model = accelerator.prepare_model(model, device_placement=run.shard == "none", evaluation_mode=True)
    if run.compile != "off" and run.compile_scope == "model":
        _compile(model, run)  # inside DDP, whose own forward would break the graph, and recompile
    if run.shard == "none" and world.world_size > 1 and trains:
        model = _replicate(model, world, unused=unused)
    return model


def find_blocks(model: nn.Module, blocks: Blocks) -> list[nn.Module]:
    """The modules of a model that repeat: of the classes `blocks`, or of those a transformers model must not split, or
    the elements of the lists (`nn.ModuleList`, `nn.Sequential`) that hold two or more modules of one class."""
    if blocks is not None:
        return [module for module in model.modules() if isinstance(module, blocks)]
    names = set(getattr(model, "_no_split_modules", None) or ())
    if names:
        return [module for module in model.modules() if type(module).__name__ in names]
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and id(module) not in inside:
            classes = Counter(type(child) for child in module if any(child.children()))
            repeats = [child for child in module if classes[type(child)] > 1]
            found.extend(repeats)
            inside.update(id(inner) for child in repeats for inner in child.modules())
    return found


def set_gradient_sync(models: Iterable[nn.Module], sync: bool) -> None:
    """Whether the next forward and backward reduce gradients over ranks: `no_sync` without its context manager."""
    for model in models:
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = sync
        elif callable(set_sync := getattr(model, "set_requires_gradient_sync", None)):  # FSDP2's
            set_sync(sync)


def broadcast_buffers(models: Iterable[nn.Module], world: World) -> None:
    """Rank 0's buffers (BatchNorm's running means drift apart between ranks) on every rank."""
    if world.world_size == 1:
        return
    for model in models:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def reshard(model: nn.Module) -> None:
    """Put a sharded model's parameters back into shards.

    FSDP2 leaves the root's whole after a forward without a backward; they would not see what is written to the shards,
    and a checkpoint would not see the shards.
    """
    if not hasattr(model, "set_requires_gradient_sync"):
        return  # not FSDP2's
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def all_gather(value: torch.Tensor, world: World) -> torch.Tensor:
    """Every rank's rows of `value`, in rank order, with gradients. Shapes: [n_rank, ...] to [sum of n_rank, ...]."""
    sizes = world.gather(value.shape[0])
    return _AllGather.apply(value, sizes, world.rank)  # type: ignore[no-any-return, no-untyped-call]


class _AllGather(torch.autograd.Function):
    """Gather rows; a row's gradient is the sum of what every rank's loss says of it."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, sizes: list[int], rank: int) -> torch.Tensor:
        ctx.start, ctx.size = sum(sizes[:rank]), sizes[rank]
        padded = value.new_zeros(max(sizes), *value.shape[1:])
        padded[: value.shape[0]] = value
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.start + ctx.size], None, None


def _recompute(block: nn.Module, *, keep_dear: bool) -> None:
    """Activation checkpointing in place, so that names stay clean; dropout repeats its mask in the recomputation."""
    given = block.forward
    forward = getattr(given, "__func__", None) or (lambda _, *args, **kwargs: given(*args, **kwargs))
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": True}
    if keep_dear:
        how["context_fn"] = _keep_dear

    def recomputed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(lambda *a, **k: forward(self, *a, **k), *args, **how, **kwargs)

    block.forward = MethodType(recomputed, block)  # a method: a copy of the block computes with its own weights


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_grouped_mm")
ATTENTION = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")


def _keep_dear() -> tuple[Any, Any]:
    """What a recomputation finds kept: attention, and every second matrix product, as torchtitan keeps them.

    Attention costs the most for each byte of what comes out of it; with dropout, it is recomputed too. Products cost
    alike, so half of them is half the way; to keep them all is what a compiler does unasked, as it recomputes all that
    is cheap.
    """
    aten = torch.ops.aten
    products = {getattr(aten, name).default for name in PRODUCTS if hasattr(aten, name)}
    attention = {getattr(aten, f"_scaled_dot_product_{name}").default for name in ATTENTION}
    attention.add(torch.ops.higher_order.flex_attention)
    seen = {False: 0, True: 0}

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator in products:
            seen[context.is_recompute] += 1
            kept = seen[context.is_recompute] % 2 == 1
        else:  # what is kept is not run again: were it to draw, whatever draws after it would draw something else
            kept = operator in attention and not _drops(operator, args, kwargs)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-any-return]


def _drops(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator of attention is called with dropout."""
    names = [argument.name for argument in attention._schema.arguments] if hasattr(attention, "_schema") else []
    return bool((dict(zip(names, args, strict=False)) | kwargs).get("dropout_p", 0.0))


# without it torch keeps no compiled graph of a block; it is to change when what is kept does
_keep_dear.cache_hash = f"attention without dropout, and every second of {PRODUCTS}"  # type: ignore[attr-defined]


def _need(blocks: list[nn.Module], option: str) -> list[nn.Module]:
    if not blocks:
        raise UsageError(
            f"{option} found no repeated block in the model: name its class in run.build(..., blocks=Block)"
        )
    return blocks


def _compile(module: nn.Module, run: RunConfig) -> None:
    """Compile in place.

    Dynamo takes no frame of torch's own files for a beginning: without its `wrap_top_frame` an nn.Sequential, or an
    nn.TransformerEncoderLayer, would go on eager without a word.
    """
    options: dict[str, Any] = {} if run.compile == "default" else {"mode": run.compile}
    if not getattr(module.forward, "__module__", "").startswith("torch.nn."):
        module.compile(**options)
        return
    with torch._dynamo.config.patch(wrap_top_frame=True):
        if run.shard == "none":
            module.compile(**options)
        else:  # FSDP2's hooks, which cannot be compiled, stay outside, as they do of themselves in modules not torch's
            module.forward = torch.compile(module.forward, **options)


def _replicate(model: nn.Module, world: World, *, unused: bool) -> Replica:
    """Wrap in DDP, and settle its buckets.

    DDP re-orders its buckets after the first backward, so that the first step after a resume would sum in another
    order than the same step of the straight run. A backward over the bare parameters makes it do so now. With
    find_unused_parameters DDP keeps its buckets as they are.
    """
    replica = Replica(
        model,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=unused,
    )
    replica.broadcast_buffers = False  # rank 0's are the ones that count: saved, and broadcast before an evaluation
    if unused:
        return replica
    replica.reducer.prepare_for_backward([])
    zeros = [(parameter * 0).sum() for parameter in model.parameters() if parameter.requires_grad]
    torch.stack(zeros).sum().backward()
    replica.zero_grad(set_to_none=True)
    return replica


def _mesh(run: RunConfig, world: World) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    if run.shard == "hybrid":
        nodes, rest = divmod(world.world_size, world.local_world_size)
        if rest:
            raise UsageError(f"--run.shard hybrid needs as many ranks on every node: {world.world_size} are uneven")
        shape = (nodes, world.local_world_size)
        return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(world.device.type, (world.world_size,), mesh_dim_names=("shard",))


def _shard(model: nn.Module, blocks: list[nn.Module], run: RunConfig, mesh: DeviceMesh) -> None:
    """FSDP2, a block at a time, gradients reduced in fp32 whatever the precision of the forward pass."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    compute = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.precision or "no")
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32 if compute else None)
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
