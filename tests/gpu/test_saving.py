"""Snapshots of tensors on a GPU: queued in order with what changes them next, through page-locked memory."""

import pytest
import torch

from launcher.checkpoint import State, Store, Writer, load
from launcher.world import World
from tests.gpu import CUDA

pytestmark = CUDA

SIZE = 1 << 24


@pytest.fixture
def world():
    return World(device=torch.device("cuda", torch.cuda.current_device()))


def test_what_changes_right_after_a_save_is_not_in_it(world, tmp_path):
    writer = Writer(Store(tmp_path / "checkpoints"), world, attempt=1)
    tensor = torch.zeros(SIZE, device=world.device)
    for step in range(1, 6):
        tensor.fill_(step)
        writer.start(step, State({"w": tensor, "t": tensor.view(1 << 12, -1).t()[:7]}))
        tensor.fill_(-1)
        assert writer.wait(60)
        assert writer.outcome is not None
        assert writer.outcome.error is None
        live = {"w": torch.zeros(SIZE, device=world.device), "t": torch.zeros(7, 1 << 12, device=world.device)}
        load(writer.outcome.path, world, State(live), buffer=writer.buffer)
        assert all(bool((value == step).all()) for value in live.values())


def test_the_memory_is_page_locked_and_given_back(world, tmp_path):
    writer = Writer(Store(tmp_path / "checkpoints"), world, attempt=1)
    for size in (1 << 20, 3 << 20, 1 << 18):
        room = writer.buffer.room(size)
        assert room.is_pinned()
        assert len(room) == size


def test_the_host_does_not_wait_for_the_copy(world, tmp_path):
    """A save queued behind much work returns while that is still to be done."""
    writer = Writer(Store(tmp_path / "checkpoints"), world, attempt=1)
    tensor = torch.zeros(SIZE, device=world.device)
    writer.prepare(State({"w": tensor}), warm=True)
    assert writer.wait(60)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    event = torch.cuda.Event()
    writer.start(1, State({"w": tensor}))
    event.record()
    assert not event.query(), "start has waited for the GPU"
    assert writer.wait(60)
    assert writer.outcome is not None
    assert writer.outcome.error is None
