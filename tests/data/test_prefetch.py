"""Batches one ahead of training: order, tickets and position, what may be read early, errors in their place; copies on a GPU."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, TensorDataset

from leyden.assemble import make_move
from leyden.data import CombinedLoader, prefetch
from leyden.data import loader as loader_module
from leyden.data.loader import Source, make_source
from leyden.data.prefetch import CudaCopies, can_be_copied, copies_for, one_ahead
from leyden.data.reader import Ticket
from leyden.data.reading import make_reader
from leyden.data.transfer import DeviceMove
from leyden.datamodule import LightningDataModule
from leyden.module import LightningModule
from leyden.precision import resolve_precision

CUDA = torch.device("cuda", 0)
Event = tuple[str, Any]


class Journal:
    """Reads numbers and copies them, and notes what happens when."""

    def __init__(self, batches: int = 4, fails_at: int | None = None) -> None:
        self.events: list[Event] = []
        self.batches, self.fails_at = batches, fails_at
        self.closed = False

    def read(self) -> Iterator[tuple[Any, Ticket]]:
        try:
            for number in range(1, self.batches + 1):
                if number == self.fails_at:
                    raise OSError(f"no batch {number}")
                self.events.append(("read", number))
                yield number, Ticket({}, number, None)
        finally:
            self.closed = True

    def start(self, batch: Any) -> Callable[[], Any]:
        self.events.append(("start", batch))

        def finish() -> Any:
            self.events.append(("finish", batch))
            return -batch

        return finish

    def train(self, batches: Iterator[Any]) -> None:
        for batch, ticket in batches:
            assert ticket.number == -batch
            self.events.append(("train", -batch))


def test_the_next_batch_is_being_copied_when_one_is_trained_on() -> None:
    journal = Journal(3)
    journal.train(one_ahead(journal.read(), journal.start))
    assert journal.events == [
        ("read", 1), ("start", 1), ("read", 2), ("start", 2), ("finish", 1), ("train", 1),
        ("read", 3), ("start", 3), ("finish", 2), ("train", 2),
        ("finish", 3), ("train", 3),
    ]  # fmt: skip


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_short_passes(batches: int) -> None:
    journal = Journal(batches)
    journal.train(one_ahead(journal.read(), journal.start))
    assert [what for what in journal.events if what[0] == "train"] == [("train", 1 + i) for i in range(batches)]
    assert journal.closed


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_an_error_is_raised_when_it_is_the_batch_s_turn(fails_at: int) -> None:
    journal = Journal(fails_at=fails_at)
    with pytest.raises(OSError, match=f"no batch {fails_at}"):
        journal.train(one_ahead(journal.read(), journal.start))
    assert [number for what, number in journal.events if what == "train"] == list(range(1, fails_at))


def test_a_copy_that_fails_is_raised_when_it_is_the_batch_s_turn() -> None:
    journal = Journal()

    def start(batch: Any) -> Any:
        if batch == 3:
            raise RuntimeError("out of memory")
        return journal.start(batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        journal.train(one_ahead(journal.read(), start))
    assert [number for what, number in journal.events if what == "train"] == [1, 2]


def test_a_pass_that_is_left_early_is_closed() -> None:
    journal = Journal()
    reading = one_ahead(journal.read(), journal.start)
    next(reading)
    del reading
    assert journal.closed


# In a source


class Places(Dataset[Any]):
    """Notes which samples were loaded."""

    def __init__(self) -> None:
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> float:
        self.loaded.append(index)
        return float(index)


def with_prefetch(monkeypatch: pytest.MonkeyPatch, journal: Journal) -> None:
    """Let every source read one ahead, as on a GPU, with copies that negate."""
    monkeypatch.setattr(loader_module, "copies_for", lambda move, reader, index: journal.start)


def tensors(**options: Any) -> DataLoader[Any]:
    return DataLoader(torch.arange(11.0), **{"batch_size": 2, "shuffle": True, **options})  # type: ignore[arg-type]


def rows(source: Source, **options: Any) -> list[Any]:
    """What a loop sees of each batch, with the place it would save after it."""
    seen = []
    for number, (batch, following) in enumerate(source.batches(None, **options), 1 + options.get("start", 0)):
        within = source.is_within_batch(number - 1), source.is_within_batch(number)
        before, after = source.position(number - 1), source.position(number)
        seen.append((batch.abs().tolist(), following, within, source.indices(), places(before), places(after)))
    return seen


def places(position: Any) -> Any:
    return None if position is None else (position["count"], position.get("last"))


def make(limit: int | float = 1.0, **options: Any) -> Source:
    return make_source(tensors(**options), "loader", limit, "limit")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [1.0, 4, 1])
def test_a_source_stands_at_the_batch_that_is_trained_on(
    workers: int, limit: int | float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    expected = rows(make(limit, num_workers=workers))
    assert [row[2] for row in expected] == [(True, False)] * len(expected)
    journal = Journal()
    with_prefetch(monkeypatch, journal)
    torch.manual_seed(1)
    assert rows(make(limit, num_workers=workers)) == expected
    assert len([1 for what, _ in journal.events if what == "finish"]) == len(expected)


def test_a_pass_is_taken_up_at_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    with_prefetch(monkeypatch, Journal())
    torch.manual_seed(1)
    expected = rows(make())
    for cut in range(1, len(expected)):
        torch.manual_seed(1)
        source = make()
        reading = source.batches(None)
        for _ in range(cut):
            next(reading)
        position = source.position(cut)
        torch.manual_seed(99)
        rest = rows(make(), start=cut, position=position)
        assert [row[:2] for row in rest] == [row[:2] for row in expected[cut:]]


def test_nothing_is_read_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with_prefetch(monkeypatch, Journal())
    dataset = Places()
    list(make_source(DataLoader(dataset), "loader", 3, "limit").batches(None))
    assert dataset.loaded == [0, 1, 2]


# What may be read ahead


class Watching(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))

    def __len__(self) -> int:
        return 4


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


MOVE = DeviceMove(CUDA, None)


class Copies:
    """In place of a GPU's."""

    def __init__(self, *_: Any) -> None: ...

    def start(self, batch: Any) -> Any:
        return lambda: "copied"


@pytest.mark.parametrize(
    ("loader", "ahead"),
    [
        (tensors(), True),
        (DataLoader(Subset(TensorDataset(torch.zeros(4)), [1, 2])), True),
        (DataLoader(Places()), False),  # it may look at what has been trained
        (DataLoader(Places(), num_workers=1), True),
        (tensors(shuffle=False, sampler=Watching()), False),
        (tensors(shuffle=False, sampler=Watching(), num_workers=1), True),
        (tensors(collate_fn=torch.stack), False),
        (DataLoader(Stream()), False),
        (DataLoader(Stream(), num_workers=1), True),
        ([torch.zeros(2)], False),
        (CombinedLoader([tensors(), tensors()]), True),
        (CombinedLoader([tensors(), DataLoader(Places())]), False),
    ],
)
def test_what_may_be_read_ahead(loader: Any, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "CudaCopies", Copies)
    reader = make_reader(loader, "loader")
    assert reader.reads_ahead is ahead
    assert (copies_for(MOVE, reader, 0) is not None) is ahead


def test_only_a_plain_move_to_a_cuda_device_is_done_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def note(*arguments: Any) -> Copies:
        made.append(arguments)
        return Copies()

    monkeypatch.setattr(prefetch, "CudaCopies", note)
    reader, precision = make_reader(tensors(), "loader"), resolve_precision("64-true")

    class Hooked(LightningModule):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    class Data(LightningDataModule):
        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            return batch

    def copies(module: LightningModule, datamodule: Any = None, device: torch.device = CUDA) -> Any:
        return copies_for(make_move(module, datamodule, device, precision), reader, 0)

    for none in (copies(Hooked()), copies(LightningModule(), Data()), copies_for(None, reader, 0)):
        assert none is None
    for device in ("cpu", "mps"):
        assert copies(LightningModule(), device=torch.device(device)) is None
    assert not made
    assert copies(LightningModule()) is not None
    assert made == [(CUDA, torch.float64)]

    def measured(batch: Any, index: int) -> Any:
        raise AssertionError

    assert copies_for(measured, reader, 0) is None
    measured.__wrapped__ = MOVE  # type: ignore[attr-defined]
    begun: list[Any] = []
    measured.around = lambda start: lambda batch: (begun.append(batch), start(batch))[1]  # type: ignore[attr-defined]
    start = copies_for(measured, reader, 0)
    assert start is not None
    assert start("batch")() == "copied"
    assert begun == ["batch"]  # as the time of a move is counted, so is that of beginning a copy


Point = namedtuple("Point", ["x", "y"])


class Movable(list[Any]):
    def to(self, device: torch.device) -> Any:
        return self


@pytest.mark.parametrize(
    ("batch", "ahead"),
    [
        (torch.zeros(2), True),
        ([torch.zeros(2, 3), {"a": torch.zeros(()), "b": ["text", 1, None, 2.5]}, (True,)], True),
        (Point(torch.zeros(1), torch.zeros(1)), True),
        (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.zeros(2, 3).T, False),
        (torch.zeros(1).expand(4), False),
        (torch.zeros(2, requires_grad=True), False),
        (torch.eye(2).to_sparse(), False),
        (torch.zeros(2, device="meta"), False),
        (torch.nn.Parameter(torch.zeros(2)), False),
        (pack_sequence([torch.zeros(2)]), False),
        (Movable([torch.zeros(2)]), False),
        ([torch.zeros(2), object()], False),
    ],
)
def test_which_batches_are_copied_ahead(batch: Any, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Any] = []
    move = DeviceMove(CUDA, None)
    monkeypatch.setattr(prefetch, "CudaCopies", Copies)
    monkeypatch.setattr(DeviceMove, "__call__", lambda self, batch, index: moved.append((batch, index)))
    start = copies_for(move, make_reader(tensors(), "loader"), 3)
    assert start is not None
    assert can_be_copied(batch) is ahead
    finish = start(batch)
    assert moved == []  # what is not copied ahead is moved when its turn comes
    assert (finish() == "copied") is ahead
    assert [index for _, index in moved] == ([] if ahead else [3])


# On a GPU

gpu = pytest.mark.gpu
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@gpu
@no_gpu
@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_copies_are_those_of_a_plain_move_and_nothing_waits_for_them(pinned: bool, dtype: Any) -> None:
    torch.manual_seed(0)
    batches: list[Any] = [{"x": torch.randn(64, 1000), "y": [torch.arange(64), "text"]} for _ in range(50)]
    if pinned:
        batches = [{"x": batch["x"].pin_memory(), "y": batch["y"]} for batch in batches]
    copies, numbers = CudaCopies(CUDA, dtype), count(1)
    reading = ((batch, Ticket({}, next(numbers), None)) for batch in batches)
    sums, weight = [], torch.ones(1000, 1000, device=CUDA)
    for batch, _ in one_ahead(reading, copies.start):
        assert batch["x"].device == batch["y"][0].device == CUDA
        assert batch["x"].dtype == (dtype or torch.float32)
        torch.mm(weight, weight)  # so that training is behind the copies
        sums.append((batch["x"].clone(), batch["y"][0].clone()))
        batch["x"].zero_()  # what training does to a batch must not reach the next one
    torch.cuda.set_sync_debug_mode("default")
    move = DeviceMove(CUDA, dtype)
    for (x, y), batch in zip(sums, batches, strict=True):
        expected = move(batch, 0)
        assert torch.equal(x, expected["x"])
        assert torch.equal(y, expected["y"][0])


@gpu
@no_gpu
def test_the_memory_of_a_copy_is_not_used_again_while_it_is_trained_on() -> None:
    copies = CudaCopies(CUDA, None)
    kept, busy = [], torch.ones(4000, 4000, device=CUDA)
    for number in range(20):
        batch = copies.start(torch.full((1 << 20,), float(number)))()
        for _ in range(5):
            busy = busy @ busy * 0  # the device is still at work when Python drops the batch
        kept.append(batch.sum() + busy[0, 0])
        del batch
    assert [float(value) for value in kept] == [float(number << 20) for number in range(20)]


@gpu
@no_gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_gives_the_same_batches_on_a_gpu(workers: int) -> None:
    torch.manual_seed(1)
    expected = [(batch, following) for batch, following in make(num_workers=workers).batches(None)]
    torch.manual_seed(1)
    found: list[tuple[Tensor, int]] = list(make(num_workers=workers).batches(MOVE))
    assert [(batch.tolist(), following) for batch, following in found] == [
        (batch.tolist(), following) for batch, following in expected
    ]
    assert {batch.device for batch, _ in found} == {CUDA}
