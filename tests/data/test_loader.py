"""Sources: how many batches, how many follow, in which order; and loaders that are rebuilt."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from leyden.data import CombinedLoader
from leyden.data.indexed import rebuilt
from leyden.data.loader import (
    has_exact_length,
    length_of,
    make_source,
    set_epoch,
    without_shuffle,
)
from leyden.errors import DataError, LeydenWarning


class Stream(IterableDataset[Any]):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Any:
        return iter(torch.arange(self.samples))


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.samples


class Bare:
    """Iterable, with a length that may be wrong."""

    def __init__(self, batches: int, length: int | None = None) -> None:
        self.number, self.length = batches, length

    def __iter__(self) -> Any:
        return iter(range(self.number))

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("no length")
        return self.length


def data(samples: int, **options: Any) -> Any:
    return DataLoader(torch.arange(samples), **options)  # type: ignore[arg-type]


def source(loader: Any, limit: int | float = 1.0) -> Any:
    return make_source(loader, "train_dataloader", limit, "limit_train_batches")


def read(loader: Any, limit: int | float = 1.0, **options: Any) -> list[tuple[Any, int]]:
    def number(batch: Any) -> Any:
        return batch.tolist() if isinstance(batch, torch.Tensor) else batch

    return [(number(batch), following) for batch, following in source(loader, limit).batches(None, **options)]


# Length and limit


@pytest.mark.parametrize(
    ("loader", "length", "exact"),
    [
        (data(7, batch_size=2), 4, True),
        (data(7, batch_size=2, drop_last=True), 3, True),
        (data(7, batch_size=2, shuffle=True), 4, True),
        (data(7, batch_size=None), 7, True),
        (data(7, batch_size=2, sampler=SubsetRandomSampler([1, 2, 3])), 2, True),
        (data(7, sampler=[3, 1]), 2, False),
        (data(7, batch_sampler=[[0], [1, 2]]), 2, False),
        (DataLoader(Stream(5), batch_size=2), math.inf, False),
        (DataLoader(SizedStream(5), batch_size=2), 3, False),
        (Bare(3), math.inf, False),
        (Bare(3, length=3), 3, False),
        (iter([1, 2]), math.inf, False),
        (CombinedLoader([data(3), data(5)], "max_size"), 5, True),
        (CombinedLoader([data(3), Bare(3)], "min_size"), math.inf, False),
    ],
)
def test_the_length_of_a_loader_and_whether_it_is_sure(loader: Any, length: float, exact: bool) -> None:
    assert length_of(loader) == length
    assert has_exact_length(loader) is exact


@given(length=st.integers(1, 300), limit=st.one_of(st.integers(0, 400), st.floats(0.0, 1.0)))
def test_the_total_is_the_limit_in_batches_or_the_fraction_rounded_down(length: int, limit: int | float) -> None:
    loader = Bare(length, length)
    expected = min(length, limit) if isinstance(limit, int) else math.floor(length * limit)
    if isinstance(limit, float) and limit > 0 and expected == 0:
        with pytest.raises(DataError, match="less than one batch"):
            source(loader, limit)
    else:
        assert source(loader, limit).total == expected


@pytest.mark.parametrize(("limit", "total"), [(1.0, math.inf), (0.0, 0), (3, 3), (0, 0)])
def test_the_total_of_a_loader_without_length(limit: Any, total: float) -> None:
    assert source(Bare(5), limit).total == total


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(DataError, match="train_dataloader gave 3, which cannot be iterated over"):
        source(3)
    with pytest.raises(DataError, match="train_dataloader gave a loader without batches: its dataset has 0 samples"):
        source(data(0))
    with pytest.raises(DataError, match="gave a loader without batches"):
        source(Bare(0, 0))


# What follows


@given(
    batches=st.integers(1, 12),
    limit=st.integers(1, 15),
    start=st.integers(0, 12),
    kind=st.sampled_from(["exact", "sized", "unsized"]),
)
def test_batches_and_how_many_follow(batches: int, limit: int, start: int, kind: str) -> None:
    loader = {"exact": data(batches), "sized": Bare(batches, batches), "unsized": Bare(batches)}[kind]
    total = min(batches, limit)
    values = list(range(start, total))
    after = [total - 1 - index for index in values]
    if kind != "exact":  # one batch is read ahead, so what is known is whether another follows
        after = [min(1, number) for number in after]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeydenWarning)  # that batches are passed over by reading them
        found = read(loader, limit, start=start)
    if kind == "exact":
        found = [(batch[0], number) for batch, number in found]
    assert found == list(zip(values, after, strict=True))


@given(batches=st.integers(1, 12), ahead=st.integers(1, 5))
def test_a_window_s_worth_of_batches_is_read_ahead_where_there_is_no_length(batches: int, ahead: int) -> None:
    found = read(Bare(batches), ahead=lambda: ahead)
    assert found == [(index, min(ahead, batches - 1 - index)) for index in range(batches)]


def test_a_length_that_is_too_large_does_not_make_up_batches() -> None:
    assert read(Bare(2, length=5)) == [(0, 1), (1, 0)]


def test_a_length_that_is_too_small_cuts() -> None:
    assert read(Bare(5, length=2)) == [(0, 1), (1, 0)]


def test_no_more_batches_are_taken_than_the_limit_allows() -> None:
    taken: list[int] = []

    def generate() -> Iterator[int]:
        for index in range(10):
            taken.append(index)
            yield index

    assert [batch for batch, _ in read(generate(), 3)] == [0, 1, 2]
    assert taken == [0, 1, 2]


def test_a_generator_that_was_read_is_refused() -> None:
    spent = iter([1])
    assert read(spent) == [(1, 0)]
    with pytest.raises(DataError, match=r"gave no batch. A generator can be read only once"):
        read(spent)
    assert read(Bare(0)) == []  # an empty stream is none


def test_batches_are_moved_with_the_loader_s_number() -> None:
    moved = source(Bare(2)).batches(lambda batch, index: (batch, index), 7)
    assert [batch for batch, _ in moved] == [(0, 7), (1, 7)]


# set_epoch


class Told(Sampler[int]):
    def __init__(self) -> None:
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))

    def __len__(self) -> int:
        return 3


def test_set_epoch_reaches_the_sampler_once_wherever_it_is() -> None:
    for make in (
        lambda told: data(3, sampler=told),
        lambda told: data(3, sampler=told, batch_size=None),
        lambda told: data(3, batch_sampler=BatchSampler(told, 2, False)),
        lambda told: data(3, batch_sampler=told),
        lambda told: CombinedLoader({"a": data(3), "b": [data(3, sampler=told)]}),
        lambda told: told,
    ):
        told = Told()
        set_epoch(make(told), 5)
        assert told.epochs == [5]
    set_epoch(data(3, sampler=[2, 0]), 1)  # a list has no epoch, and no hash


# Rebuilt loaders


def test_a_rebuilt_loader_keeps_every_argument() -> None:
    generator = torch.Generator()
    loader = data(
        6, batch_size=2, num_workers=2, collate_fn=list, timeout=3, worker_init_fn=print, generator=generator,
        prefetch_factor=5, persistent_workers=True, multiprocessing_context="spawn",
    )  # fmt: skip
    again = rebuilt(loader, batch_sampler=BatchSampler(SequentialSampler(range(6)), 3, False))
    for name in (
        "dataset", "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator",
        "prefetch_factor", "persistent_workers", "multiprocessing_context", "in_order",
    ):  # fmt: skip
        assert getattr(again, name) is getattr(loader, name), name


def test_without_shuffle_leaves_alone_what_is_in_order() -> None:
    for loader in (data(4), DataLoader(Stream(3)), Bare(3), data(4, batch_size=None)):
        assert without_shuffle(loader, "x") is loader
    with pytest.warns(LeydenWarning, match="loader of x is read in order"):
        plain = without_shuffle(data(4, shuffle=True, batch_size=3), "x")
    assert [batch.tolist() for batch in plain] == [[0, 1, 2], [3]]


def test_a_source_knows_the_samples_of_the_batch_that_it_gave_last() -> None:
    for workers in (0, 2):
        loader = data(7, batch_size=2, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(1))
        read_from = source(loader)
        assert read_from.indices() is None
        for batch, _ in read_from.batches(None):
            assert read_from.indices() == batch.tolist()


def test_samples_that_cannot_be_known_are_not_made_up() -> None:
    for loader in (DataLoader(Stream(3)), Bare(3), data(3, batch_size=None)):
        read_from = source(loader)
        next(read_from.batches(None))
        assert read_from.indices() is None


def test_a_random_sampler_of_a_part_is_read_in_order_over_that_part() -> None:
    with pytest.warns(LeydenWarning, match="overfit-shuffle"):
        plain = without_shuffle(data(9, sampler=RandomSampler(range(3)), batch_size=2), "x")
    assert [batch.tolist() for batch in plain] == [[0, 1], [2]]
