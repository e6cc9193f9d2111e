"""The optimizer under a gradient scaler."""

import pytest
import torch

from launcher.optim import Optimizer, update_scaler


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_skips_the_update_and_says_so(fused):
    weight = torch.nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = Optimizer(torch.optim.AdamW([weight], lr=0.1, fused=fused), [], scaler)
    for scale, gradient, skipped in ((4.0, 1.0, False), (4.0, float("inf"), True), (2.0, 1.0, False)):
        before = weight.detach().clone()
        assert scaler.get_scale() == scale
        scaler.scale(weight.sum() * gradient).backward()
        optimizer.begin(lambda: 1.0, lambda: True)
        optimizer.step()
        assert optimizer.skipped is skipped
        assert torch.equal(before, weight.detach()) is skipped
        optimizer.zero_grad()
        update_scaler(scaler)
