"""The data order: a permutation in constant memory, and micro-batches dealt by arithmetic."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.order import BLOCK, Order, Plan, permute


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_every_sample_appears_once(size, key):
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def test_large_sizes_cost_no_memory_and_stay_inside():
    size = 10**11
    result = permute(np.array([0, 1, size // 2, size - 1]), size, key=7)
    assert len(set(result.tolist())) == 4
    assert all(0 <= value < size for value in result)


def test_small_permutations_are_uniform():
    """Each value lands in each place about equally often: chi-squared over 7 x 7 cells, 36 degrees of freedom."""
    trials, size = 7000, 7
    seen = Counter((i, int(v)) for key in range(trials) for i, v in enumerate(permute(np.arange(size), size, key)))
    expected = trials / size
    chi_squared = sum((seen[i, v] - expected) ** 2 / expected for i in range(size) for v in range(size))
    assert chi_squared < 80  # p < 3e-5 for a uniform shuffle


def test_neighbouring_keys_are_unrelated():
    a, b = (permute(np.arange(1000), 1000, key) for key in (1, 2))
    assert 0 <= (a == b).sum() < 10


def test_the_order_is_pinned():
    """A run's data order outlives versions of this code: these numbers never change."""
    assert Order(10, seed=0, shuffle=True).samples(0, 20).tolist() == PINNED


PINNED = [1, 0, 6, 9, 7, 8, 2, 3, 4, 5, 2, 3, 1, 5, 0, 6, 7, 9, 4, 8]


def test_order_across_blocks_and_epochs():
    order = Order(1000, seed=3, shuffle=True)
    whole = order.samples(0, 3 * BLOCK)
    assert np.array_equal(order.samples(BLOCK - 5, 2 * BLOCK + 5), whole[BLOCK - 5 : 2 * BLOCK + 5])
    for epoch in range(3):
        assert sorted(whole[epoch * 1000 : (epoch + 1) * 1000]) == list(range(1000))
    assert not np.array_equal(whole[:1000], whole[1000:2000])
    assert Order(5, seed=0, shuffle=False).samples(3, 12).tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1]


@given(
    size=st.sampled_from([1, 7, 1000, 10**6, 10**11]),
    width=st.sampled_from([1, 8, 600]),
    world=st.sampled_from([1, 5, 64, 1024, 16_384]),
    first=st.integers(0, 10**9),
)
@settings(max_examples=20, deadline=None)
def test_what_a_rank_of_many_reads_is_what_lies_there(size, width, world, first):
    """However far apart its reads are, and where they jump: as if each were the first."""
    order = Order(size, seed=4, shuffle=True)
    reads = [(first + k * width * world, width) for k in (*range(8), 3, 20, 21, 22, 22)]
    for start, number in [*reads, (first + width * world, 1)]:
        alone = Order(size, seed=4, shuffle=True)._near(start, start + number)
        assert np.array_equal(order.samples(start, start + number), alone)


@given(
    batch=st.integers(1, 40),
    micro=st.integers(1, 40),
    world=st.integers(1, 6),
    epochs=st.integers(1, 3),
    size=st.integers(1, 50),
)
@settings(max_examples=200, deadline=None)
def test_ranks_share_every_position_once(batch, micro, world, epochs, size):
    plan = Plan(batch, min(micro, batch), end=epochs * size)
    seen: list[int] = []
    for step in range(plan.steps()):
        shares = [plan.share(step, rank, world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1, "every rank runs as many forward passes"
        slots = sorted(
            (slot for share in shares for slot in share if not slot.padding), key=lambda slot: slot.microbatch
        )
        assert [slot.microbatch for slot in slots] == list(range(len(slots)))
        seen += [position for slot in slots for position in range(slot.start, slot.stop)]
    assert seen == list(range(epochs * size))
    assert plan.size(plan.steps()) == 0


def test_the_world_does_not_change_micro_batches():
    plan = Plan(batch_size=24, microbatch_size=4)

    def micro_batches(world):
        slots = [slot for rank in range(world) for slot in plan.share(5, rank, world)]
        return sorted((slot.microbatch, slot.start, slot.stop) for slot in slots if not slot.padding)

    assert micro_batches(1) == micro_batches(2) == micro_batches(4) == micro_batches(5)


@pytest.mark.parametrize("seen", [0, 50, 100])
def test_a_base_goes_on_behind_what_was_seen(seen):
    straight = Plan(10, 5, end=203)
    resumed = Plan(10, 5, end=203, base=seen, base_step=seen // 10)
    steps = range(seen // 10, 21)
    assert [straight.share(s, 0, 1) for s in steps] == [resumed.share(s, 0, 1) for s in steps]
    assert straight.steps() == resumed.steps() == 21


def test_a_batch_that_is_left_out_moves_what_follows():
    plan = Plan(10, 5, end=43)
    left = plan.without(2).without(2).without(3)
    assert [left.start(step) for step in range(4)] == [0, 10, 40, 43]
    assert [left.size(step) for step in range(4)] == [10, 10, 3, 0]
    assert [left.steps(known) for known in (0, 1, 2, 3)] == [5, 5, 3, 2]
    assert left.steps() == 2
    assert left.slot(2, 0) == left.share(2, 0, 2)[0]
    straight = list(Plan(10, 5, end=43).without(1).shares(0, 0, 1))
    resumed = list(Plan(10, 5, end=43, base=20, base_step=1).shares(1, 0, 1))
    assert straight[2:] == resumed
