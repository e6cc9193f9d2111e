"""Any dataset, read by position: one call a micro-batch where it can, the same bytes for any number of workers."""

import os
import random

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from launcher.data import Feed, Loader
from launcher.errors import UsageError
from launcher.failure import kind_of
from launcher.order import Plan
from launcher.stream import Stream
from launcher.world import World


def loader(data, **options):
    defaults = {"name": "loader", "batch_size": 4, "microbatch_size": 2, "seed": 0, "shuffle": True, "workers": 0}
    return Loader(data, **{**defaults, "collate": None, "count": None, "unit": "samples", **options})


def read(data, steps=5, **options):
    """The micro-batches of the first steps."""
    made = loader(data, **options)
    plan = Plan(made.batch_size, made.microbatch_size)
    feed = Feed(made, plan.shares(0, 0, 1), World())
    batches = [feed.take(0).batch for _ in range(steps * plan.microbatches(0, 1))]
    feed.close()
    return batches


class Noisy(Dataset):
    """Draws from all three generators."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return index, torch.rand(1).item(), float(np.random.rand()), random.random()


class Batched(Noisy):
    calls = 0

    def __getitems__(self, indices):
        type(self).calls += 1
        return [self[index] for index in indices]


X = torch.arange(14.0).reshape(7, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_seeded_wherever_they_are_drawn(workers):
    here, there = read(Noisy()), read(Noisy(), workers=workers)
    assert all(torch.equal(a, b) for x, y in zip(here, there, strict=True) for a, b in zip(x, y, strict=True))
    drawn = torch.cat([batch[1] for batch in here])
    assert len(set(drawn.tolist())) == len(drawn), "a sample draws anew in every epoch"


def test_a_dataset_is_read_in_one_call():
    Batched.calls = 0
    read(Batched(), steps=3)
    assert Batched.calls == 6


def test_containers_of_tensors_give_the_same_rows():
    [tensor, pair, named, wrapped] = [read(data) for data in (X, (X, X), {"x": X}, TensorDataset(X))]
    for k, rows in enumerate(tensor):
        assert torch.equal(rows, pair[k][1])
        assert torch.equal(rows, named[k]["x"])
        assert torch.equal(rows, wrapped[k][0])
    seen = [row[0].item() for rows in tensor for row in rows]
    assert sorted(seen[:7]) == sorted(seen[7:14]) == X[:, 0].tolist(), "every epoch has every sample once"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.bfloat16])
def test_rows_of_any_dtype_and_of_arrays(dtype):
    numbers = torch.arange(7).to(dtype)
    [(plain, wide)] = read((numbers, numbers[:, None].expand(7, 2)), steps=1, shuffle=False, microbatch_size=4)
    assert plain.dtype == dtype
    assert plain.tolist() == numbers[:4].tolist() == wide[:, 0].tolist()
    if dtype == torch.bfloat16:
        return
    [named] = read({"x": numbers.numpy()}, steps=1, shuffle=False, microbatch_size=4)
    assert named["x"].tolist() == plain.tolist()


def test_an_arrow_table_gives_stacked_tensors():
    table = datasets.Dataset.from_dict({"x": X.tolist(), "text": list("abcdefg")})
    for rows, expected in zip(read(table), read(X), strict=True):
        assert torch.equal(rows["x"], expected)
        assert [ord(text) - ord("a") for text in rows["text"]] == (expected[:, 0] / 2).int().tolist()
    collated = read(table, collate=lambda rows: "".join(row["text"] for row in rows))
    assert [len(text) for text in collated] == [2] * 10


def test_an_arrow_transform_is_seeded():
    table = datasets.Dataset.from_dict({"x": X.tolist()}).with_transform(lambda rows: {"x": torch.rand(len(rows["x"]))})
    a, b = read(table), read(table, workers=1)
    assert all(torch.equal(x["x"], y["x"]) for x, y in zip(a, b, strict=True))


def test_an_evaluation_reads_alike_every_time():
    made = loader(Noisy(), workers=2)
    slots = Plan(7, 2, end=7).share(0, 0, 1)
    passes = [[batch[1].tolist() for _, batch, _ in made.batches(slots, World())] for _ in range(3)]
    assert (
        passes[0]
        == passes[1]
        == passes[2]
        == [batch[1].tolist() for _, batch, _ in loader(Noisy()).batches(slots, World())]
    )
    made.close()


def test_counts_are_known_ahead():
    made = loader((X,), count=lambda batch: int(batch[0].sum()))
    feed = Feed(made, Plan(4, 2).shares(0, 0, 1), World())
    ahead = feed.look_ahead(2)
    assert ahead == sum(int(feed.take(0).batch[0].sum()) for _ in range(2))


def test_padding_is_not_counted():
    feed = Feed(loader((X,)), Plan(2, 2).shares(0, rank=1, world_size=2), World())
    fetched = feed.take(0)
    assert fetched.slot.padding
    assert fetched.local_count == 0


@pytest.mark.parametrize(
    ("data", "said"),
    [((X, X[:3]), "one length"), ([], "empty"), (3, "no dataset"), ((), "one length")],
)
def test_what_is_no_dataset_is_refused(data, said):
    with pytest.raises(UsageError, match=said):
        loader(data)


def rows_of(stream, cursor=None, rank=0, world_size=1, limit=4):
    reader = Stream(stream, 2, lambda rows: [row["i"] for row in rows]).read(rank, world_size, cursor)
    return [next(reader) for _ in range(limit)]


def shards():
    for i in range(40):
        yield {"i": i}


def test_a_datasets_stream_goes_on_from_its_own_state():
    stream = datasets.IterableDataset.from_generator(shards)
    whole = rows_of(stream, limit=6)
    assert [batch for batch, _ in whole] == [[2 * k, 2 * k + 1] for k in range(6)]
    again = rows_of(datasets.IterableDataset.from_generator(shards), cursor=whole[2][1], limit=3)
    assert [batch for batch, _ in again] == [batch for batch, _ in whole[3:]]


def test_ranks_share_a_stream():
    parts = [
        [
            i
            for batch, _ in rows_of(datasets.IterableDataset.from_generator(shards), rank=r, world_size=2)
            for i in batch
        ]
        for r in range(2)
    ]
    assert not set(parts[0]) & set(parts[1])
    assert sorted(parts[0] + parts[1]) == list(range(16))


def test_what_a_stream_cannot_restore_is_said():
    plain = datasets.IterableDataset.from_generator(shards)
    assert not any("buffer" in said for said in Stream(plain, 2, list).caveats())
    assert any("buffer" in said for said in Stream(plain.shuffle(buffer_size=10), 2, list).caveats())
    assert any("no state_dict" in said for said in Stream(iter([1]), 2, list).caveats())


def test_a_stream_takes_one_worker_at_most():
    stream = datasets.IterableDataset.from_generator(shards)
    with pytest.raises(UsageError, match=r"--run\.workers 1"):
        loader(stream, workers=2).batches(iter(()), World())


class Breaking:
    """A data set of which sample 5 cannot be read."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5:
            raise KeyError("label")
        return torch.tensor(index)


class Dying(Breaking):
    def __getitem__(self, index):
        os._exit(3)


def fails(data, error, **options):
    """The exception that reading it raises, of the data's own type, and what it and its notes say."""
    try:
        read(data, steps=2, microbatch_size=4, shuffle=False, **options)
    except error as caught:  # no pytest.raises, which would keep the frames, and in them the worker
        return caught.with_traceback(None), "\n".join([*getattr(caught, "__notes__", ()), str(caught)])
    raise AssertionError("it did not fail")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_names_the_sample_and_the_loader(workers):
    _, said = fails(Breaking(), KeyError, workers=workers)
    assert said.count("(launcher: sample 5 of loader 'loader')") == said.count("(launcher: ") == 1


def test_an_exception_of_a_collate_names_all_of_its_samples():
    _, said = fails(range(8), KeyError, collate=lambda _: {}["x"])
    assert "(launcher: samples 0, 1, 2, 3 of loader 'loader')" in said


def test_an_exception_of_a_stream_says_how_far_it_was():
    def rows():
        yield from (torch.zeros(1) for _ in range(5))
        raise KeyError("label")

    _, said = fails(rows(), KeyError)
    assert "(launcher: micro-batch 1 that this rank read of loader 'loader')" in said


def test_a_data_worker_that_dies():
    error, _ = fails(Dying(), RuntimeError, workers=1)
    assert kind_of(error) == "data"
