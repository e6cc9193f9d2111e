"""Where batches come from: any map-style dataset read by position, or a stream read by cursor.

A map-style dataset has no state at all: micro-batch j of step s is fetched from wherever the run stands, by any number
of worker processes. A stream (an IterableDataset) has a cursor, which travels with each micro-batch and is saved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from typing import Any, Generic

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate
from typing_extensions import TypeVar

from launcher.errors import LauncherError, RecipeError, UsageError
from launcher.failure import NOTE
from launcher.order import Ints, Order, Slot
from launcher.seeds import COLLATE, SAMPLE, mix, seed_host
from launcher.signals import ignore_signals
from launcher.stacks import answer
from launcher.stream import Stream, is_stream
from launcher.world import World

__all__ = ["Feed", "Fetched", "Loader"]

B = TypeVar("B", default=Any)


class Loader(Generic[B]):
    """What `run.loader` returns: a dataset, how it is batched, and in which order; it holds no position."""

    def __init__(
        self,
        data: Any,
        *,
        name: str,
        batch_size: int,
        microbatch_size: int,
        seed: int,
        shuffle: bool,
        collate: Callable[[list[Any]], B] | None,
        count: Callable[[B], int] | None,
        unit: str,
        workers: int,
    ) -> None:
        self.name, self.batch_size, self.microbatch_size = name, batch_size, microbatch_size
        self.count, self.unit, self.workers, self.shuffle = count, unit, workers, shuffle
        self.stream: Stream | None = None
        self.order: Order | None = None
        self._repeated: DataLoader[Any] | None = None
        if is_stream(data):
            self.stream = Stream(data, microbatch_size, collate or default_collate)
        else:
            self.order = Order(_length(data), seed, shuffle=shuffle)
            self._fetch = Fetch(data, self.order, seed, collate, name)

    @property
    def size(self) -> int | None:
        """Samples in one epoch, None of a stream."""
        return None if self.order is None else self.order.size

    def __len__(self) -> int:
        """Samples in one epoch; a stream has no length."""
        if self.order is None:
            raise TypeError(f"loader {self.name!r} reads a stream, whose length nobody knows")
        return self.order.size

    def head(self, size: int) -> Loader[B]:
        """A loader of the first samples alone, `size` at most, in their order; of a stream, itself."""
        if self.order is None or self.order.size <= size:
            return self
        head = copy(self)
        head.order = Order(size, self.order.seed, shuffle=False)
        head.microbatch_size = min(self.microbatch_size, size)
        head._fetch = self._fetch.ordered(head.order)
        head._repeated = None
        return head

    def batches(self, slots: Iterable[Slot], world: World, cursor: Any = None) -> Iterator[tuple[Slot, Any, Any]]:
        """The host batch of every slot, in order, with the stream's cursor after it; ends where a stream ends.

        An exception of the data's own passes through, with a note of what was read.
        """
        return _noting(self.name, self._batches(slots, world, cursor))

    def _batches(self, slots: Iterable[Slot], world: World, cursor: Any) -> Iterator[tuple[Slot, Any, Any]]:
        if self.stream is not None:
            return self.stream.batches(slots, world, cursor, workers=self.workers)
        if not self.workers:
            pins = world.device.type == "cuda"
            return ((slot, self._fetch.read(slot, pins), None) for slot in slots)
        if isinstance(slots, list):  # an evaluation's, alike every time: its workers stay for the next
            if self._repeated is None:
                self._repeated = self._pool(slots, world, persistent=True)
            return ((slot, batch, None) for slot, batch in zip(slots, self._repeated, strict=True))
        listed, fetched = _tee(slots)
        return ((slot, batch, None) for slot, batch in zip(listed, self._pool(fetched, world), strict=False))

    def close(self) -> None:
        """Let the workers go that stayed."""
        self._repeated = None

    def _pool(self, slots: Iterable[Slot], world: World, *, persistent: bool = False) -> DataLoader[Any]:
        return DataLoader(
            self._fetch,
            batch_size=None,
            sampler=slots,  # where a plain sampler yields the numbers of samples
            num_workers=self.workers,
            collate_fn=_as_is,
            pin_memory=world.device.type == "cuda",
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # else making the iterator draws from the global one
            persistent_workers=persistent,
        )


class Fetch(Dataset[Any]):
    """Reads a slot of a map-style dataset in one call where the dataset can, every draw seeded by sample."""

    def __init__(
        self, data: Any, order: Order, seed: int, collate: Callable[[list[Any]], Any] | None, name: str = "loader"
    ) -> None:
        self._order, self._seed, self._name = order, seed, name
        self._data, self._collate = data, collate
        self._read, self._draws, self._one_by_one = _reader(data, collate)

    def __reduce__(self) -> tuple[Any, ...]:  # how to read is found anew where it is unpickled
        return Fetch, (self._data, self._order, self._seed, self._collate, self._name)

    def ordered(self, order: Order) -> Fetch:
        """The same in another order."""
        other = object.__new__(Fetch)
        other.__dict__ |= self.__dict__ | {"_order": order}
        return other

    def __getitem__(self, slot: Slot) -> Any:
        return self.read(slot)

    def read(self, slot: Slot, pins: bool = False) -> Any:
        """The collated micro-batch of a slot; if `pins`, in page-locked memory where that saves a copy."""
        samples = self._order.samples(slot.start, slot.stop)
        begun = -1

        def begin(k: int) -> None:
            nonlocal begun
            begun = k
            if self._draws:
                seed_host(seeds[k])

        seeds = self._seeds(slot, samples) if self._draws else []
        try:
            return self._read(samples, begin, pins)
        except Exception as error:
            _note(error, _named(samples[[begun]] if self._one_by_one and begun >= 0 else samples), self._name)
            raise

    def _seeds(self, slot: Slot, samples: Ints) -> list[int]:
        """Of every sample, and of the collate."""
        epochs = [self._order.epoch(position) for position in range(slot.start, slot.stop)]
        seeds = [mix(self._seed, SAMPLE, epoch, sample) for epoch, sample in zip(epochs, samples.tolist(), strict=True)]
        return [*seeds, mix(self._seed, COLLATE, slot.start)]


class Fetched:
    """A micro-batch on its way to the model."""

    __slots__ = ("batch", "cursor", "event", "local_count", "slot")

    def __init__(self, slot: Slot, batch: Any, cursor: Any, local_count: int) -> None:
        self.slot, self.batch, self.cursor, self.local_count = slot, batch, cursor, local_count
        self.event: torch.cuda.Event | None = None


class Feed:
    """This rank's micro-batches of one loader, from a step on, on the device ahead of their use."""

    def __init__(self, loader: Loader[Any], slots: Iterable[Slot], world: World, cursor: Any = None) -> None:
        self._batches = iter(loader.batches(slots, world, cursor))
        self._name, self._count = loader.name, loader.count
        self._device = world.device
        self._ahead: deque[Fetched] = deque()
        self._copies = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None
        self.cursor = cursor

    def take(self, step: int) -> Fetched:
        """The next micro-batch, on the device.

        Raises:
            RecipeError: the data has ended inside `step`.
        """
        if not self._ahead and not self._fetch():
            raise RecipeError(f"loader {self._name!r} ended inside step {step}: its data became shorter")
        fetched = self._ahead.popleft()
        self._copy(fetched)
        if self._copies is not None and (self._ahead or self._fetch()):
            self._copy(self._ahead[0])
        if fetched.event is not None:
            torch.cuda.current_stream(self._device).wait_event(fetched.event)
            _record_stream(fetched.batch, torch.cuda.current_stream(self._device))
        self.cursor = fetched.cursor
        return fetched

    def look_ahead(self, number: int) -> int | None:
        """The count of the next `number` micro-batches together, fetching them; None if the data ends before."""
        while len(self._ahead) < number:
            if not self._fetch():
                return None
        return sum(self._ahead[index].local_count for index in range(number))

    def close(self) -> None:
        """Let the workers go."""
        self._batches = iter(())
        self._ahead.clear()

    def _fetch(self) -> bool:
        entry = next(self._batches, None)
        if entry is None:
            return False
        slot, batch, cursor = entry
        count = slot.stop - slot.start if self._count is None else int(self._count(batch))
        self._ahead.append(Fetched(slot, batch, cursor, 0 if slot.padding else count))
        return True

    def _copy(self, fetched: Fetched) -> None:
        if self._copies is None or fetched.event is not None:
            return
        with torch.cuda.stream(self._copies):
            fetched.batch = _move(fetched.batch, self._device)
            fetched.event = torch.cuda.Event()
            fetched.event.record(self._copies)


Reader = Callable[[Ints, Callable[[int], None], bool], Any]


def _reader(data: Any, collate: Callable[[list[Any]], Any] | None) -> tuple[Reader, bool, bool]:
    """How to read samples [i, ...] at once, told when sample k begins (and, as k = -1, the collate), pinned or not.

    And may it draw, and does it read them one by one?
    """
    if collate is None:
        if isinstance(data, TensorDataset):
            data = data.tensors
        if isinstance(data, torch.Tensor):
            return lambda samples, _, pins: _pick(data, samples, pins), False, False
        if isinstance(data, tuple):
            return lambda samples, _, pins: tuple(_pick(tensor, samples, pins) for tensor in data), False, False
        if isinstance(data, Mapping):
            return lambda samples, _, pins: {key: _pick(data[key], samples, pins) for key in data}, False, False
        if _is_arrow(data):
            return _arrow_reader(data), data.format["type"] == "custom", False
    collate = collate or default_collate
    if hasattr(data, "__getitems__"):
        return _seeding_first(lambda samples: data.__getitems__(samples), collate), True, False
    if isinstance(data, tuple | Mapping | torch.Tensor):
        raise UsageError("collate= takes a list of samples, and a dataset of tensors is read in one slice: drop one")
    return lambda samples, seed, _: _one_by_one(data, samples, seed, collate), True, True


def _arrow_reader(data: Any) -> Reader:
    """Straight from its memory where its columns are plain numbers, otherwise as `datasets` formats them."""
    from launcher.arrow import Rows  # imports pyarrow, which whoever has no such data need not wait for

    try:
        rows = Rows(data)
    except TypeError:
        table = data if data.format["type"] else data.with_format("torch")
        return _seeding_first(lambda samples: table[samples])
    return lambda samples, _, pins: rows(samples, pinned=pins)


def _seeding_first(read: Callable[[list[int]], Any], collate: Callable[[Any], Any] | None = None) -> Reader:
    """One call reads all the samples, so the first sample's seed serves them together."""

    def reader(samples: Ints, seed: Callable[[int], None], _: bool) -> Any:
        seed(0)
        batch = read(samples.tolist())
        if collate is None:
            return batch
        seed(-1)
        return collate(batch)

    return reader


def _one_by_one(data: Any, samples: Ints, seed: Callable[[int], None], collate: Callable[[list[Any]], Any]) -> Any:
    batch = []
    for k, sample in enumerate(samples.tolist()):
        seed(k)
        batch.append(data[sample])
    seed(-1)
    return collate(batch)


UNSELECTED = (torch.uint16, torch.uint32, torch.uint64)  # dtypes of which index_select takes no rows of one number


def _pick(tensor: Any, samples: Ints, pins: bool) -> Any:
    """Rows of a tensor (or an array), copied once: if `pins`, into page-locked memory, and from there to the device."""
    index = torch.from_numpy(samples)
    if not isinstance(tensor, torch.Tensor) or tensor.dtype in UNSELECTED:
        return tensor[index]
    if not pins or tensor.device.type != "cpu" or tensor.requires_grad:
        return tensor.index_select(0, index)  # half the time of tensor[index]
    rows = torch.empty((len(index), *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=True)
    return torch.index_select(tensor, 0, index, out=rows)


def _length(data: Any) -> int:
    """Samples in a map-style dataset or a tuple or mapping of equally long tensors."""
    if isinstance(data, tuple | Mapping):
        lengths = {len(part) for part in (data.values() if isinstance(data, Mapping) else data)}
        if len(lengths) != 1:
            raise UsageError(f"a dataset of tensors needs tensors of one length, not {sorted(lengths)}")
        length = lengths.pop()
    else:
        try:
            length = len(data)
        except TypeError:
            raise UsageError(
                f"{type(data).__name__} is no dataset: it has neither __len__ nor is it iterable"
            ) from None
    if length == 0:
        raise UsageError(f"the dataset ({type(data).__name__}) is empty")
    return length


def _is_arrow(data: Any) -> bool:
    """Whether this is a `datasets.Dataset`, asked without importing datasets."""
    return type(data).__module__.startswith("datasets.") and hasattr(data, "with_format")


def _move(batch: Any, device: torch.device) -> Any:
    """`batch` with its tensors on `device`; page-locked first, so that the copy does not wait."""
    if isinstance(batch, torch.Tensor):
        return batch.pin_memory().to(device, non_blocking=True) if batch.device.type == "cpu" else batch
    if hasattr(batch, "to"):  # a BatchEncoding, a graph: it knows its tensors
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_move(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_move(value, device) for value in batch)
    return batch


def _record_stream(batch: Any, stream: torch.cuda.Stream) -> None:
    """Tell the allocator that memory filled on the copy stream is in use on this one."""
    if isinstance(batch, torch.Tensor):
        batch.record_stream(stream)
    elif isinstance(batch, Mapping):
        _record_stream(list(batch.values()), stream)
    elif isinstance(batch, list | tuple):
        for value in batch:
            _record_stream(value, stream)


def _tee(slots: Iterable[Slot]) -> tuple[Iterator[Slot], Iterator[Slot]]:
    """Two readers of the same slots: one for the workers, who run ahead, one to name what comes back."""
    waiting: deque[Slot] = deque()

    def fetched() -> Iterator[Slot]:
        for slot in slots:
            waiting.append(slot)
            yield slot

    def listed() -> Iterator[Slot]:
        while waiting:
            yield waiting.popleft()

    return listed(), fetched()


def _noting(loader: str, batches: Iterator[tuple[Slot, Any, Any]]) -> Iterator[tuple[Slot, Any, Any]]:
    """The same, with a note on what a worker's death, or a stream, raises."""
    number = 0
    try:
        for entry in batches:
            yield entry
            number += 1
    except LauncherError:
        raise
    except Exception as error:
        _note(error, f"micro-batch {number} that this rank read", loader)
        raise


def _note(error: Exception, what: str, loader: str) -> None:
    """Note on an exception what was read when it was raised, once: its type and traceback stay the person's own."""
    noted = "\n".join([*getattr(error, "__notes__", ()), str(error)])
    if not NOTE.search(noted):
        error.add_note(f"(launcher: {what} of loader {loader!r})")


def _named(samples: Ints) -> str:
    ids = samples.tolist()
    listed = ", ".join(map(str, ids[:8])) + (f", ... ({len(ids)} in all)" if len(ids) > 8 else "")
    return f"sample {listed}" if len(ids) == 1 else f"samples {listed}"


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    ignore_signals()
    answer()
    torch.set_num_threads(1)
