"""Schedules as functions of the step."""

from itertools import pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from launcher.optim import Optimizer
from launcher.schedules import set_lr, warmup_cosine, warmup_linear


def test_warmup_then_fall():
    for schedule in (warmup_cosine, warmup_linear):
        values = [schedule(step, 100, 10, floor=0.1) for step in range(101)]
        assert values[0] == pytest.approx(1 / 11)
        assert values[10] == 1.0
        assert values[100] == pytest.approx(0.1)
        assert all(a < b for a, b in pairwise(values[:11]))
        assert all(a > b for a, b in pairwise(values[10:]))
    assert warmup_cosine(55, 100, 10) == pytest.approx(0.5)
    assert warmup_linear(1000, 100, 10) == 0.0


def test_set_lr_scales_groups_and_fills_tensors():
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    lr = torch.tensor(0.0)
    inner = torch.optim.AdamW([{"params": [a], "lr": lr}, {"params": [b], "lr_scale": 0.5}], fused=True)
    optimizer = Optimizer(inner, [], None)
    set_lr(optimizer, 0.2)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.2)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # of torch itself, compiling
def test_a_rate_that_is_a_tensor_never_compiles_an_optimizer_anew():
    torch._dynamo.reset()
    counter = CompileCounter()
    parameter = torch.nn.Parameter(torch.ones(3))
    inner = torch.optim.AdamW([parameter], lr=torch.tensor(0.0))
    optimizer, step = Optimizer(inner, [], None), torch.compile(inner.step, backend=counter)
    values = []
    for k in range(4):
        parameter.grad = torch.ones(3)
        set_lr(optimizer, 0.1 * (k + 1))
        step()
        values.append(parameter[0].item())
    assert counter.frame_count == 1
    assert values[2] - values[3] > 1.5 * (values[0] - values[1]) > 0, "the rate counts all the same"
    torch._dynamo.reset()
