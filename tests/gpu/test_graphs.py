"""CUDA graphs (reduce-overhead, max-autotune): draws follow the seed, gradients add up, an evaluation may follow."""

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import launcher
from launcher.seeds import seed_microbatch, step_state
from tests.gpu import CUDA

pytestmark = CUDA

CALLS = 6  # a compiled function is run once to warm up, then recorded, then replayed


@dataclass(frozen=True)
class Config:
    steps: int = 6


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def dropped():
    """A compiled function of a CUDA graph that draws."""
    return torch.compile(lambda x: F.dropout(x, 0.5), mode="reduce-overhead")


def test_a_replay_draws_what_its_seed_says(dropped):
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.ones(4096, device=device)

    def masks():
        found = []
        for microbatch in range(CALLS):
            seed_microbatch(step_state(1, 2), microbatch, device)
            found.append(dropped(x).clone())
        return found

    masks()  # recorded by now
    first, second = masks(), masks()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(first))


def test_seeding_does_not_wait_for_the_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    torch.zeros(1, device=device)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    event = torch.cuda.Event()
    event.record()
    seed_microbatch(step_state(1, 2), 3, device)
    assert not event.query(), "seeding has waited for the GPU"


@pytest.mark.parametrize("scope", ["model", "block"])
def test_gradients_add_up_and_an_evaluation_may_follow(run_recipe, scope):
    """Gradients of four micro-batches and those of one are the same, in every step of a graph that is replayed."""
    worst: dict[int, float] = {}
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))

    def train(run: launcher.Run, cfg: Config) -> None:
        loader = run.loader((x, x.flip(1)), batch_size=32, microbatch_size=8)
        held_out = run.loader((x, x.flip(1)), batch_size=16, shuffle=False)
        model = run.build(Blocks)
        optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=1e-2))

        def score(batch):
            return {"error": (F.mse_loss(model(batch[0]), batch[1], reduction="sum"), len(batch[0]))}

        for step in run.steps(loader, total=cfg.steps):
            seen = []
            for a, b in step:
                seen.append((a, b))
                step.backward(F.mse_loss(model(a), b, reduction="sum"))
            plain = Blocks().to(run.device)
            plain.load_state_dict(model.state_dict())
            for a, b in seen:
                (F.mse_loss(plain(a), b, reduction="sum") / step.count).backward()
            pairs = zip(plain.parameters(), model.parameters(), strict=True)
            worst[step.index] = max((p.grad - q.grad).abs().max().item() for p, q in pairs)
            optimizer.step()
            optimizer.zero_grad()
            run.average(score, held_out)

    run_recipe(train, "--run.no-tf32", "--run.compile", "reduce-overhead", "--run.compile-scope", scope)
    assert len(worst) == Config.steps
    assert max(worst.values()) < 1e-4, worst
