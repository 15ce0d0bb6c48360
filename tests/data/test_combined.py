"""CombinedLoader against models made of itertools."""

from __future__ import annotations

from itertools import chain, cycle, islice, zip_longest
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from leyden.data import CombinedLoader
from leyden.errors import ConfigurationError

Loaders = list[list[int]]


def model(loaders: Loaders, mode: str) -> list[Any]:
    """What a combined loader gives, from the standard library."""
    if mode == "sequential":
        return list(chain.from_iterable(loaders))
    if mode == "min_size":
        return [list(row) for row in zip(*loaders, strict=False)]
    if mode == "max_size":
        return [list(row) for row in zip_longest(*loaders)]
    longest = max(map(len, loaders), default=0)
    return [list(row) for row in zip(*(islice(cycle(loader), longest) for loader in loaders), strict=True)]


class Loader:
    """An iterable that is no list, so that it is a leaf of the collection."""

    def __init__(self, values: list[int]) -> None:
        self.values = values
        self.started = 0

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Any:
        self.started += 1
        return iter(self.values)


lists = st.lists(st.lists(st.integers(), min_size=1, max_size=5), min_size=1, max_size=4)


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle", "sequential"])
@given(values=lists)
def test_every_mode_equals_its_model(mode: str, values: Loaders) -> None:
    combined = CombinedLoader([Loader(each) for each in values], mode)
    expected = model(values, mode)
    assert list(combined.batches()) == expected
    assert list(combined.batches()) == expected  # a second time
    assert len(combined) == len(expected)


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
@given(values=lists)
def test_iterating_gives_batch_index_and_loader_index(mode: str, values: Loaders) -> None:
    combined = CombinedLoader([Loader(each) for each in values], mode)
    assert list(combined) == [(batch, index, 0) for index, batch in enumerate(model(values, mode))]


@given(values=lists)
def test_sequential_iteration_counts_batches_anew_in_each_loader(values: Loaders) -> None:
    combined = CombinedLoader([Loader(each) for each in values], "sequential")
    expected = [(batch, index, which) for which, each in enumerate(values) for index, batch in enumerate(each)]
    assert list(combined) == expected


def test_empty_loaders() -> None:
    both = [Loader([]), Loader([1, 2])]
    assert list(CombinedLoader(both, "min_size").batches()) == []
    assert list(CombinedLoader(both, "max_size").batches()) == [[None, 1], [None, 2]]
    assert list(CombinedLoader(both, "sequential").batches()) == [1, 2]
    assert list(CombinedLoader(both, "max_size_cycle").batches()) == []  # nothing could be repeated
    assert list(CombinedLoader([], "min_size").batches()) == []
    assert len(CombinedLoader([], "min_size")) == 0


@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        (lambda a, b: {"a": a, "b": b}, [{"a": 1, "b": 3}, {"a": 2, "b": 4}]),
        (lambda a, b: [a, b], [[1, 3], [2, 4]]),
        (lambda a, b: (a, b), [(1, 3), (2, 4)]),
        (lambda a, b: {"x": [a], "y": {"z": b}}, [{"x": [1], "y": {"z": 3}}, {"x": [2], "y": {"z": 4}}]),
        (lambda a, b: a, [1, 2]),
    ],
)
def test_a_batch_has_the_structure_of_the_collection(structure: Any, expected: Any) -> None:
    combined = CombinedLoader(structure(Loader([1, 2]), Loader([3, 4])), "min_size")
    assert list(combined.batches()) == expected


def test_other_loaders_take_the_same_places() -> None:
    combined = CombinedLoader({"x": [Loader([1])], "y": Loader([2])}, "max_size")
    assert len(combined.flattened) == 2
    other = combined.with_loaders([Loader([7]), Loader([8, 9])])
    assert other.mode == "max_size"
    assert list(other.batches()) == [{"x": [7], "y": 8}, {"x": [None], "y": 9}]
    assert list(combined.batches()) == [{"x": [1], "y": 2}]


def test_loaders_start_when_they_are_needed_and_as_often() -> None:
    short, long = Loader([1, 2]), Loader([1, 2, 3, 4, 5])
    list(islice(CombinedLoader([short, long], "max_size_cycle").batches(), 5))
    assert (short.started, long.started) == (3, 1)
    first, second = Loader([1]), Loader([2])
    iterator = CombinedLoader([first, second], "sequential").batches()
    next(iterator)
    assert (first.started, second.started) == (1, 0)


def test_a_loader_without_length_gives_none() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(torch.ones(2))

    combined = CombinedLoader([DataLoader(Stream()), Loader([1])], "max_size")
    with pytest.raises(TypeError):
        len(combined)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"mode='longest' is not valid. Allowed: 'min_size', 'max_size_cycle'"):
        CombinedLoader([], "longest")
