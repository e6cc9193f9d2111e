"""One gradient, however the batch is cut: over micro-batches, ranks, DDP or FSDP2, with uneven counts."""

from pathlib import Path

import pytest
import torch

from launcher.order import Order
from launcher.seeds import WEIGHTS, mix
from tests.distributed.exact import Config, Model, Samples
from tests.harness import assert_same, tensors

RECIPE = Path(__file__).parent / "exact.py"
# SGD at lr 1 without clipping: a step moves the weights by exactly the gradient. 50 samples in batches of 32: the
# second step is short, and its last micro-batch too.
OPTIONS = {"optimizer": "sgd", "lr": 1.0, "dropout": 0.0, "clip": 0.0, "warmup": 0, "steps": 1000, "batch_size": 32}
FLAGS = [text for key, value in OPTIONS.items() for text in (f"--{key}", str(value))]
FLAGS += ["--no-augment", "--epochs", "1", "--eval-every", "0"]


@pytest.fixture(scope="module")
def reference():
    """The weights after the two steps, from plain torch on whole batches."""
    cfg = Config(**OPTIONS, augment=False, epochs=1)
    torch.manual_seed(mix(0, WEIGHTS, 0))
    model = Model(cfg)
    data, order = Samples(cfg), Order(cfg.samples, 0, shuffle=True)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    for step in range(2):
        rows = [data[int(i)] for i in order.samples(step * 32, min(50, step * 32 + 32))]
        x, y, mask = (torch.stack([row[key] for row in rows]) for key in ("x", "y", "mask"))
        loss = ((model(x) - y) ** 2 / 4 * mask).sum() * 4 / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        factor = 0.5 * (1 + torch.cos(torch.tensor(step / 1000 * torch.pi))).item()
        for group in optimizer.param_groups:
            group["lr"] = factor
        optimizer.step()
    return {f"model/{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("world_size", "micro", "counting", "shard"),
    [
        (1, 4, "--tokens", "none"),
        (1, 32, "--tokens", "none"),
        (1, 4, "--late", "none"),
        (2, 4, "--tokens", "none"),
        (2, 4, "--late", "none"),
        (2, 4, "--tokens", "full"),
        (2, 4, "--late", "full"),
        (4, 4, "--tokens", "none"),
        (4, 8, "--tokens", "full"),
    ],
)
def test_gradients_do_not_depend_on_how_the_batch_is_cut(
    start, tmp_path, reference, world_size, micro, counting, shard
):
    flags = ["--microbatch-size", micro, counting, "--run.shard", shard, "--run.dir", tmp_path / "run"]
    start(world_size, RECIPE, *FLAGS, *flags).ok()
    weights = {name: tensor for name, tensor in tensors(tmp_path / "run").items() if name.startswith("model/")}
    assert_same(weights, reference, tolerance=1e-6)
