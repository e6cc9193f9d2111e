"""What is compiled when a recipe asks for it."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from launcher import parallel
from launcher.config import RunConfig


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x).relu()


@pytest.mark.parametrize("shard", ["none", "full"])
@pytest.mark.parametrize("make", [Own, lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()), lambda: nn.Linear(4, 4)])
def test_modules_of_torch_itself_are_compiled_too(monkeypatch, make, shard):
    torch._dynamo.reset()
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **options: compile_(call, backend=counter))
    module = make()
    parallel._compile(module, RunConfig(compile="default", shard=shard))
    module(torch.ones(2, 4)).sum().backward()
    assert counter.frame_count == 1
    torch._dynamo.reset()
