"""What `accelerate launch`, or its config file, said of precision, compilation and sharding.

It says so in environment variables, and exports most of them also when nobody asked for anything. Whatever it asks for
that the launcher would not do is refused by name: Accelerate itself ignores some of it in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.errors import UsageError

__all__ = ["Said", "read_launch"]

FLAGS = {
    "ACCELERATE_USE_DEEPSPEED": "use_deepspeed: DeepSpeed is not supported, --run.shard full shards with FSDP2",
    "ACCELERATE_USE_MEGATRON_LM": "use_megatron_lm: Megatron-LM is not supported, --run.shard full shards with FSDP2",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "use_parallelism_config: it is not supported, --run.shard full or hybrid is",
}
DYNAMO_FLAGS = {
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "dynamo_use_fullgraph: it is not supported, drop it",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "dynamo_use_dynamic: it is not supported (lengths become dynamic when they vary)",
}
# What is exported with --use_fsdp: the values that the launcher's FSDP2 honours, and what to do about others. Not in
# here is what changes neither numbers nor memory: FSDP_STATE_DICT_TYPE, FSDP_CPU_RAM_EFFICIENT_LOADING and
# FSDP_SYNC_MODULE_STATES (weights are built alike on every rank), FSDP_MIN_NUM_PARAMS (of SIZE_BASED_WRAP alone).
FSDP = {
    "VERSION": (("2",), "add --fsdp_version 2"),
    "OFFLOAD_PARAMS": (("false",), "parameters stay on the GPU, drop it"),
    "RESHARD_AFTER_FORWARD": (("true",), "parameters are always resharded, drop it"),
    "ACTIVATION_CHECKPOINTING_OFFLOAD": (("false",), "activations are not offloaded, drop it"),
    "FORWARD_PREFETCH": (("false",), "FSDP2 has no such option, drop it"),
    "BACKWARD_PREFETCH": (("backward_pre", "1"), "FSDP2 has no such option, drop it"),
    "USE_ORIG_PARAMS": (("true",), "FSDP2 always keeps the parameters as they are, drop it"),
    "AUTO_WRAP_POLICY": (("transformer_based_wrap",), "the model's repeated blocks are wrapped, drop it"),
    "TRANSFORMER_CLS_TO_WRAP": ((), "name the class in the recipe: run.build(..., blocks=Block)"),
    "IGNORED_MODULES": ((), "every parameter is sharded, drop it"),
}
SHARD = {"full_shard": "full", "1": "full", "hybrid_shard": "hybrid", "4": "hybrid"}


@dataclass(frozen=True)
class Said:
    """A value that `accelerate launch` gave to one of `--run.*`, and the words in which it was asked for."""

    value: Any
    words: str


def read_launch(environ: Mapping[str, str]) -> dict[str, Said]:
    """What was asked for, by the name of the `--run.*` option it amounts to; what was left unsaid is not in it.

    Raises:
        UsageError: it asks for what would be ignored.
    """
    for name, why in FLAGS.items():
        if _is_true(environ.get(name)):
            raise _refused(why)
    accumulation = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1").lower()
    if accumulation not in ("1", "none", ""):
        raise _refused(
            f"gradient_accumulation_steps={accumulation}: "
            "accumulation follows from batch_size and microbatch_size, drop it"
        )
    return _precision(environ) | _compile(environ) | _shard(environ)


def _precision(environ: Mapping[str, str]) -> dict[str, Said]:
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision == "no":  # always exported, so it may not have been said
        return {}
    if precision not in ("bf16", "fp16"):
        raise _refused(f"mixed_precision={precision}: it is not supported, bf16 and fp16 are")
    return {"precision": Said(precision, f"mixed_precision={precision}")}


def _compile(environ: Mapping[str, str]) -> dict[str, Said]:
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend == "no":  # always exported; without a backend Accelerate compiles nothing, whatever else is said
        return {}
    if backend != "inductor":
        raise _refused(f"dynamo_backend={backend}: only inductor is supported")
    for name, why in DYNAMO_FLAGS.items():
        if _is_true(environ.get(name)):
            raise _refused(why)
    mode = environ.get("ACCELERATE_DYNAMO_MODE", "default")
    if mode not in ("default", "reduce-overhead", "max-autotune"):
        raise _refused(f"dynamo_mode={mode}: only default, reduce-overhead and max-autotune are supported")
    said = {"compile": Said(mode, f"dynamo_backend=inductor with dynamo_mode={mode}")}
    if _is_true(environ.get("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION")):
        said["compile_scope"] = Said("block", "dynamo_use_regional_compilation")
    return said


def _shard(environ: Mapping[str, str]) -> dict[str, Said]:
    if not _is_true(environ.get("ACCELERATE_USE_FSDP")):
        return {}
    given = {"VERSION": "1"} | {
        name.removeprefix("FSDP_"): value for name, value in environ.items() if name.startswith("FSDP_")
    }
    for name, (honoured, fix) in FSDP.items():
        value = given.get(name)
        if value not in (None, "") and value.lower() not in honoured:
            raise _refused(f"fsdp_{name.lower()}={value}: {fix}")
    strategy = given.get("SHARDING_STRATEGY", "full_shard").lower()
    if strategy not in SHARD:
        raise _refused(f"fsdp_sharding_strategy={strategy}: only FULL_SHARD and HYBRID_SHARD are supported")
    said = {"shard": Said(SHARD[strategy], f"use_fsdp with {strategy.upper()}")}
    if _is_true(given.get("ACTIVATION_CHECKPOINTING")):
        said["activation_checkpointing"] = Said("full", "fsdp_activation_checkpointing")
    return said


def _refused(why: str) -> UsageError:
    return UsageError(f"accelerate launch says {why}")


def _is_true(value: str | None) -> bool:
    return (value or "").lower() in ("1", "true", "yes", "y", "on", "t")
