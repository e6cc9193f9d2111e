"""What gpu.py runs, in the order of its importance, each within its own slice of the time; sizes for a CPU too.

Seconds expected on an H100 or H200, of 530 in all: 20 for the start and what the device can do, 150 for the tests
(while they run, the first two phases are compiled), and then those of the phases. The last of them only fit where
others take less, or in a second call (`--only NAME`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

TESTS_S = 150

GPT2 = {"model.depth": 12, "model.width": 768, "model.heads": 12, "data.seq-len": 1024, "model.vocab-multiple": 50_304}
LLAMA = {"model.depth": 16, "model.width": 2048, "model.heads": 16, "model.kv-heads": 8, "model.hidden": 8192}
LLAMA |= {"data.seq-len": 2048, "model.vocab-multiple": 32_768}
TINY = {"model.depth": 2, "model.width": 16, "model.heads": 2, "data.seq-len": 16, "model.vocab-multiple": 512}
WORDS = {"model.mlp": "gelu"}
SHAPES = {
    "124m": {**GPT2, **WORDS, "microbatch-size": 16, "batch-size": 32},
    "1b": {**LLAMA, "microbatch-size": 4, "batch-size": 16},
}
SMALL = {
    "124m": {**TINY, **WORDS, "microbatch-size": 2, "batch-size": 4},
    "1b": {**TINY, "model.kv-heads": 1, "model.hidden": 64, "microbatch-size": 2, "batch-size": 4},
}
COMMON = ["--eval-every", "0", "--sample-tokens", "0", "--warmup", "100", "--lr", "6e-4"]
BF16 = ["--run.precision", "bf16"]
WHOLE = [*BF16, "--run.compile", "default"]
BLOCK = [*WHOLE, "--run.compile-scope", "block"]


@dataclass(frozen=True)
class Phase:
    """A group of loops. The first is what the others are held against."""

    title: str
    shape: str
    contenders: Mapping[str, tuple[str, list[str]]]
    """By name: the script in peers/, and its options."""
    seconds: float
    """All of it; of these, `ready` until everyone has compiled. Without `least` it does not begin."""
    ready: float
    least: float
    steps: int
    rounds: int
    gb: Mapping[str, float] = field(default_factory=dict)
    """GPU memory of a contender where it is not `usual_gb`, to leave out the last where there is no room."""
    usual_gb: float = 15
    saves: bool = False
    dry: Sequence[str] = ()
    """Who takes part in a dry run; with nobody, it leaves the phase out."""

    def sizes(self, dry_run: bool) -> dict[str, int | str]:
        """The options that make the shape."""
        return dict((SMALL if dry_run else SHAPES)[self.shape])

    def options(self, dry_run: bool) -> list[str]:
        """The same as words, with what is common to all."""
        words = [str(word) for name, value in self.sizes(dry_run).items() for word in (f"--{name}", value)]
        return [*words, *COMMON]

    def tokens(self, dry_run: bool) -> int:
        """In a step."""
        sizes = self.sizes(dry_run)
        return int(sizes["batch-size"]) * int(sizes["data.seq-len"])

    def turn(self, dry_run: bool) -> tuple[int, int]:
        """Steps that are not timed, and steps that are."""
        return 2, 2 if dry_run else self.steps  # after the second step of a start the launcher freezes what it has made

    def save_every(self, dry_run: bool) -> int:
        """Steps between saves, each at the end of a turn: of every four (in a dry run: two) the last."""
        return (2 if dry_run else 4) * sum(self.turn(dry_run))

    def fitting(
        self, memory_gb: float | None, absent: Sequence[str], peers: Mapping[str, str]
    ) -> tuple[list[str], dict[str, str]]:
        """Who takes part on a GPU of so much memory (None: in a dry run), and why the others do not."""
        names, left_out, used = [], {}, 0.0
        for name, (script, _) in self.contenders.items():
            if memory_gb is None and name not in self.dry:
                continue
            needs = self.gb.get(name, self.usual_gb)
            if peers.get(script) in absent:
                left_out[name] = f"{peers[script]} is not installed"
            elif memory_gb is not None and used + needs > 0.95 * memory_gb:
                left_out[name] = f"no room for {needs:.0f} GB beside the others"
            else:
                used += needs
                names.append(name)
        return names, left_out


OURS = "gpt_launcher"
PHASES = {
    "124m": Phase(
        title="GPT-2's shape, bf16, compiled whole: the loops",
        shape="124m",
        contenders={
            "bare": ("gpt_bare", WHOLE),
            "launcher": (OURS, WHOLE),
            "hf": ("gpt_hf", WHOLE),
            "lightning": ("gpt_lightning", WHOLE),
        },
        seconds=110,
        ready=60,
        least=60,
        steps=16,
        rounds=12,
        saves=True,
        dry=("bare", "launcher"),
    ),
    "1b": Phase(
        title="Llama's shape at 1 B, bf16, compiled whole: the loops, and a checkpoint's cost",
        shape="1b",
        contenders={"bare": ("gpt_bare", WHOLE), "launcher": (OURS, WHOLE)},
        seconds=100,
        ready=60,
        least=70,
        steps=4,
        rounds=12,
        usual_gb=36,
        saves=True,
    ),
    "modes": Phase(
        title="GPT-2's shape: how it is compiled, and fp16",
        shape="124m",
        contenders={
            "launcher": (OURS, WHOLE),
            "launcher, by block": (OURS, BLOCK),
            "launcher, eager": (OURS, BF16),
            "launcher, fp16": (OURS, ["--run.precision", "fp16", "--run.compile", "default"]),
        },
        seconds=75,
        ready=50,
        least=60,
        steps=8,
        rounds=5,
        gb={"launcher, eager": 24},
    ),
    "kernels-1b": Phase(
        title="Llama's shape at 1 B: fp8, selective recomputation",
        shape="1b",
        contenders={
            "launcher": (OURS, WHOLE),
            "launcher, fp8": (OURS, [*WHOLE, "--model.fp8"]),
            "launcher, selective recomputation": (OURS, [*BLOCK, "--run.activation-checkpointing", "selective"]),
        },
        seconds=70,
        ready=50,
        least=55,
        steps=3,
        rounds=4,
        usual_gb=36,
        gb={"launcher, selective recomputation": 28},
    ),
    "kernels": Phase(
        title="GPT-2's shape: the loss in chunks, FlexAttention",
        shape="124m",
        contenders={
            "launcher": (OURS, WHOLE),
            "launcher, loss in chunks": (OURS, [*WHOLE, "--model.loss-chunk", "2048"]),
            "launcher, flex": (OURS, [*WHOLE, "--model.attention", "flex"]),
        },
        seconds=70,
        ready=50,
        least=55,
        steps=8,
        rounds=5,
    ),
    "garbage": Phase(
        title="GPT-2's shape: gc.collect() and empty_cache() every 10 steps, CUDA graphs",
        shape="124m",
        contenders={
            "launcher": (OURS, WHOLE),
            "launcher, gc.collect": (OURS, [*WHOLE, "--run.gc-every", "10"]),
            "launcher, empty_cache": (OURS, [*WHOLE, "--run.empty-cache-every", "10"]),
            "launcher, CUDA graphs": (OURS, [*BF16, "--run.compile", "reduce-overhead"]),
        },
        seconds=65,
        ready=45,
        least=50,
        steps=20,
        rounds=4,
    ),
    "max-autotune": Phase(
        title="GPT-2's shape: max-autotune",
        shape="124m",
        contenders={
            "launcher": (OURS, WHOLE),
            "launcher, max-autotune": (OURS, [*BF16, "--run.compile", "max-autotune"]),
        },
        seconds=240,
        ready=210,
        least=120,
        steps=8,
        rounds=5,
        gb={"launcher, max-autotune": 24},
    ),
}
