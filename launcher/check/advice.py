"""What to change in a recipe, for everything that a check finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.check.trace import Trace
    from launcher.check.trials import Outcome

__all__ = [
    "BUFFERS",
    "COUPLED",
    "DATA_BY_RANK",
    "DATA_DRAWN",
    "DRAWN",
    "DROPPED",
    "INIT",
    "LEFTOVER",
    "LR",
    "MEAN",
    "NOT_FINITE",
    "NO_GRADIENT",
    "NO_SUM",
    "RESUMED",
    "ROUNDED",
    "UNUSED",
    "WORLD",
    "failed",
    "is_mean",
    "of_data",
    "of_ratio",
]

INIT = (
    "the weights depend on the rank, or on a seed that the recipe sets itself: in the function given to run.build draw "
    "from the global generators, which the launcher seeds alike on every rank"
)
DATA_BY_RANK = (
    "the recipe splits the data by rank, and the launcher deals micro-batches out to ranks already: give run.loader "
    "the whole dataset on every rank"
)
DATA_DRAWN = (
    "a sample is not a function of its index: a generator of the dataset's own, or a position that it keeps. Draw from "
    "`random`, numpy's or torch's global generators, which the launcher seeds for every sample, and read by index"
)
DROPPED = (
    "optimizer.zero_grad() inside the loop over micro-batches drops what they have added: call it after the loop, "
    "behind optimizer.step()"
)
NO_GRADIENT = (
    "optimizer.zero_grad() between step.backward and optimizer.step leaves nothing to apply: call it after "
    "optimizer.step(); or the loss does not depend on the parameters"
)
NOT_FINITE = "look at the data and at the loss of the first step; --run.bad-numbers says what a run does about it"
LATER = "something beside the gradient differs: a buffer, a state of the recipe's own, a draw that the rank decides"
MEAN = (
    "the loss is averaged over its micro-batch: return the SUM (reduction='sum'), in fp32; the launcher divides by "
    "the count of the whole step"
)
ROUNDED = (
    "the numbers are rounded otherwise, by more than float32 does: weights or a part of the model in half "
    "precision, or sums of very different sizes"
)
NO_SUM = (
    "what is given to step.backward is no sum over samples: the loss of one depends on the others in its micro-batch "
    "(contrastive: run.all_gather; a mean over the batch), on how often the model was called, or has a term beside the "
    "samples (multiply that by step.local_count)"
)
COUPLED = (
    "{module} normalises over a micro-batch, so the micro-batch's size is part of the result: use GroupNorm or "
    "LayerNorm, or on GPUs nn.SyncBatchNorm.convert_sync_batchnorm(model) inside run.build"
)
BUFFERS = (
    "each rank updates it from its own samples and only rank 0's is saved: nn.SyncBatchNorm.convert_sync_batchnorm("
    "model) inside run.build (on GPUs), a norm without running statistics, or an update that is reduced over ranks"
)
LEFTOVER = (
    "a resume begins with it anew: give it to run.track(obj), an average of weights as launcher.EMA(run, model); or "
    "make it a function of step.index"
)
RESUMED = (
    "something beside weights, moments and data came back otherwise: a counter, an optimizer's own attributes, a mode "
    "(model.eval()), a plain attribute of the model: run.track it, or make it a function of step.index"
)
WORLD = (
    "what the optimizer is given depends on the number of processes: batch_size is that of the whole job, so nothing "
    "is to be scaled by it"
)
DRAWN = (
    "a draw that no seed of the run reaches, or a kernel whose sums vary: draw from torch's generator on the model's "
    "device; on a GPU --run.deterministic refuses such kernels by name"
)
LOGGED = "what is logged depends on a state that no checkpoint holds: run.track it"
UNUSED = (
    "DDP waits for every gradient: make every parameter take part in every micro-batch (add 0 * parameter.sum()), "
    "freeze it, or run.build(..., find_unused_parameters=True)"
)
LR = (
    "what the optimizer is given must be a pure function of step.index (launcher.warmup_cosine, launcher.set_lr): no "
    "clock, no counter of the recipe's own; or give the scheduler to run.track"
)


def of_ratio(ratio: float, rest: float, microbatches: int, world_size: int, trace: Trace) -> str:
    """What a gradient that is `ratio` of the reference's, up to a part `rest`, means.

    Args:
        ratio: the multiple of the reference that is nearest.
        rest: the part that is no multiple, 0 to 1.
        microbatches: of the step that it was found in; the reference's has one.
        world_size: the ranks.
        trace: of the run.
    """
    if coupled := trace.coupled():
        return COUPLED.format(module=coupled[0])
    exact = rest < 1e-3
    if world_size > 1 and exact and _near(ratio, world_size, 1e-3):
        return f"{world_size} = world size: the loss is multiplied by it: return the plain sum, the launcher divides"
    if world_size > 1 and exact and _near(ratio, 1 / world_size, 1e-3):
        return f"1/{world_size} = 1 / world size: the loss is divided by it, or averaged over ranks: return the sum"
    if is_mean(ratio, microbatches):
        return f"about {microbatches} = the step's micro-batches: {MEAN}"
    if microbatches > 1 and exact and _near(ratio, 1 / microbatches, 1e-3):
        return f"1/{microbatches} = 1 / the step's micro-batches: the loss is divided by their number: return the sum"
    return NO_SUM if rest > 1e-3 or abs(ratio - 1) > 1e-3 else ROUNDED


def is_mean(ratio: float, microbatches: int) -> bool:
    """Whether a ratio to a step in one micro-batch says that each of several was averaged."""
    return microbatches > 1 and _near(ratio, microbatches, 0.25)


def of_data(outcome: Outcome) -> str:
    """What it means that a micro-batch holds other data than in one process."""
    ids = {key: batch.ids for key, batch in outcome.trace.batches().items()}
    alike = outcome.trial.world_size == 1 or not any(ids.values())
    return DATA_DRAWN if alike else f"{DATA_BY_RANK}. Or {DATA_DRAWN}"


def failed(outcome: Outcome) -> str:
    """What to do when a run has failed."""
    if "finished reduction" in outcome.fault:  # DDP's words
        return UNUSED
    return f"what it printed: {outcome.log}"


def _near(a: float, b: float, part: float) -> bool:
    return abs(a - b) <= part * abs(b)
