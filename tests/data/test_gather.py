"""Batches gathered in one operation are those of torch's DataLoader, bit for bit; what might differ is not gathered."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, default_collate, random_split
from torch.utils.data._utils.collate import collate_tensor_fn, default_collate_fn_map

from leyden.data.gather import gathering
from leyden.data.loader import make_source
from leyden.data.seeded import SeededDataset, fetcher

SAMPLES = 13


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Different numbers, a NaN with a payload and a negative zero among those that have such."""
    count = torch.Size((SAMPLES, *shape)).numel()
    tensor = torch.arange(count).sub(count // 3).reshape(SAMPLES, *shape).to(dtype)
    if dtype == torch.float32 and count:
        flat = tensor.view(torch.int32).view(-1)
        flat[0], flat[-1] = 0x7FC0_1234, -0x8000_0000
    return tensor


def pair() -> TensorDataset:
    return TensorDataset(numbers(4), numbers(dtype=torch.int64))


class Named(TensorDataset):
    """A subclass that changes only how it is made."""

    def __init__(self) -> None:
        super().__init__(numbers(2), numbers())


GATHERED: dict[str, Callable[[], Any]] = {
    "pair": pair,
    "one tensor in a dataset": lambda: TensorDataset(numbers(3)),
    "subclass": Named,
    "tensor": lambda: numbers(3),
    "tensor of numbers": numbers,
    "empty samples": lambda: numbers(0, 2),
    "images": lambda: TensorDataset(numbers(3, 5, 4), numbers(dtype=torch.int32)),
    "videos": lambda: numbers(2, 3, 4, 2),
    "channels_last": lambda: numbers(3, 5, 4).to(memory_format=torch.channels_last),
    "columns": lambda: TensorDataset(numbers(6)[:, 1:3], numbers(6)[:, 5]),
    "transposed": lambda: numbers(3, 4).transpose(1, 2),
    "expanded": lambda: TensorDataset(torch.tensor(7.0).expand(SAMPLES), numbers(1).expand(SAMPLES, 3)),
    "of every dtype": lambda: TensorDataset(
        *(
            numbers(2, dtype=dtype)
            for dtype in (
                torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.int64,
                torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
            )
        )
    ),
    "split": lambda: random_split(pair(), [9, SAMPLES - 9], torch.Generator().manual_seed(1))[0],
    "split of a split": lambda: random_split(random_split(pair(), [0.8, 0.2])[0], [0.7, 0.3])[0],
    "subset from the end": lambda: Subset(pair(), [3, 2, 2, 5, 11, 7, 0]),
    "subset by numpy": lambda: Subset(numbers(2), np.array([4, 8, 1, 12, 0])),  # type: ignore[arg-type]
    "subset by a tensor": lambda: Subset(pair(), torch.tensor([4, 8, 1, 12, 0])),  # type: ignore[arg-type]
    "subset by a range": lambda: Subset(pair(), range(1, 12, 2)),
    "parts": lambda: ConcatDataset([pair(), pair(), Subset(pair(), [5, 6])]),
    "parts of tensors": lambda: ConcatDataset([numbers(3), Subset(numbers(3), [1, 4])]),  # type: ignore[list-item]
    "subset of parts": lambda: Subset(ConcatDataset([pair(), pair()]), [20, 3, 14, 25, 0, 12, 13]),
    "parts of parts": lambda: ConcatDataset([ConcatDataset([pair(), pair()]), pair()]),
}  # fmt: skip


class Doubled(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        return tuple(2 * tensor for tensor in super().__getitem__(index))


class AtOnce(TensorDataset):
    def __getitems__(self, indices: list[int]) -> Any:
        return [self[index] for index in reversed(indices)]


class Tagged(Tensor):
    pass


LEFT: dict[str, Callable[[], Any]] = {
    "own __getitem__": lambda: Doubled(numbers(2)),
    "own __getitems__": lambda: AtOnce(numbers(2)),
    "own dataset in a subset": lambda: Subset(Doubled(numbers(2)), [3, 1, 4, 2, 5]),
    "own subset": lambda: type("Own", (Subset,), {})(pair(), [1, 5, 2, 0]),
    "gradients": lambda: TensorDataset(numbers(2).requires_grad_()),
    "parameter": lambda: TensorDataset(torch.nn.Parameter(numbers(2))),
    "subclass of Tensor": lambda: TensorDataset(numbers(2).as_subclass(Tagged)),  # type: ignore[arg-type]
    "conjugated": lambda: TensorDataset(numbers(2, dtype=torch.complex64).conj()),
    "videos in channels_last": lambda: numbers(2, 3, 4, 2).transpose(2, 4),
    "parts that differ in shape": lambda: ConcatDataset([numbers(1), numbers(2)]),  # type: ignore[list-item]
    "parts that differ in dtype": lambda: ConcatDataset([numbers(), numbers(dtype=torch.int64)]),  # type: ignore[list-item]
    "parts of two kinds": lambda: ConcatDataset([numbers(4), TensorDataset(numbers(4))]),  # type: ignore[list-item]
    "list": lambda: list(numbers(2)),
    "subset by booleans": lambda: Subset(pair(), torch.tensor([True, False] * 3)),  # type: ignore[arg-type]
}


def facts(value: Any) -> Any:
    """Everything about a batch that a program could find out."""
    if isinstance(value, Tensor):
        bits = value.detach().resolve_conj().contiguous().view(-1).view(torch.uint8).tolist() if value.numel() else []
        about = (type(value), value.dtype, value.shape, value.stride(), value.storage_offset(), value.requires_grad)
        return *about, value.is_conj(), bits
    return type(value), [facts(part) for part in value]


def by_torch(loader: DataLoader[Any]) -> list[Any]:
    torch.manual_seed(3)
    return [facts(batch) for batch in loader]


def by_leyden(loader: DataLoader[Any]) -> list[Any]:
    torch.manual_seed(3)
    source = make_source(loader, "loader", 1.0, "limit")
    batches = [facts(batch) for batch, _ in source.batches(None)]
    source.shut_down()
    return batches


def outcome(read: Callable[[DataLoader[Any]], Any], loader: DataLoader[Any]) -> Any:
    """The batches, or the error."""
    try:
        return read(loader)
    except Exception as error:  # noqa: BLE001
        return type(error), str(error)


def refused(indices: Any) -> Any:
    raise AssertionError(f"{indices} were not gathered")


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"shuffle": True, "drop_last": True}, {"batch_size": 1}])
@pytest.mark.parametrize("kind", [*GATHERED, *LEFT])
def test_batches_are_those_of_torch(kind: str, options: dict[str, Any]) -> None:
    dataset = (GATHERED | LEFT)[kind]()
    loader = DataLoader(dataset, **{"batch_size": 4, **options})
    assert outcome(by_leyden, loader) == outcome(by_torch, loader)


@pytest.mark.parametrize("kind", ["pair", "tensor", "split of a split", "parts", "own __getitem__", "own __getitems__"])
@pytest.mark.parametrize("persistent", [False, True])
def test_batches_out_of_workers_are_those_of_torch(kind: str, persistent: bool) -> None:
    dataset = (GATHERED | LEFT)[kind]()
    loader = DataLoader(dataset, 4, shuffle=True, num_workers=2, persistent_workers=persistent)
    assert by_leyden(loader) == by_torch(DataLoader(dataset, 4, shuffle=True))


@pytest.mark.parametrize("kind", GATHERED)
def test_what_can_be_gathered_is(kind: str) -> None:
    dataset = GATHERED[kind]()
    gather = gathering(dataset, default_collate, refused)
    for indices in ([0], [1, 2, 3], [len(dataset) - 1, 0, 2, 2], list(range(len(dataset)))):
        assert facts(gather(indices)) == facts(default_collate([dataset[index] for index in indices]))
        if not isinstance(dataset, Tensor):
            in_worker = SeededDataset(dataset, default_collate, True)[1, indices]
            assert facts(in_worker) == facts(gather(indices))


@pytest.mark.parametrize("kind", LEFT)
def test_what_might_differ_is_left_to_torch(kind: str) -> None:
    assert gathering(LEFT[kind](), default_collate, refused) is refused


def test_other_ways_to_collate_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gathering(pair(), list, refused) is refused
    monkeypatch.setitem(default_collate_fn_map, Tensor, lambda batch, **_: sum(batch))
    assert gathering(pair(), default_collate, refused) is refused
    assert by_leyden(DataLoader(pair(), 4)) == by_torch(DataLoader(pair(), 4))
    monkeypatch.setitem(default_collate_fn_map, Tensor, collate_tensor_fn)
    assert gathering(pair(), default_collate, refused) is not refused
    monkeypatch.setitem(default_collate_fn_map, tuple, lambda batch, **_: batch)
    assert gathering(pair(), default_collate, refused) is refused


@settings(max_examples=200, deadline=None)
@given(data=st.data(), dims=st.integers(1, 6), batch=st.integers(1, 4))
def test_strides_are_those_of_torch_whatever_those_of_the_dataset(data: st.DataObject, dims: int, batch: int) -> None:
    order = data.draw(st.permutations(range(dims)))
    shape = [data.draw(st.integers(1, 3)) for _ in range(dims)]
    base = torch.arange(float(torch.Size(shape).numel())).reshape([shape[axis] for axis in order])
    tensor = base.permute([order.index(axis) for axis in range(dims)])
    indices = [data.draw(st.integers(0, shape[0] - 1)) for _ in range(batch)]
    expected = default_collate([tensor[index] for index in indices])
    assert facts(fetcher(tensor, default_collate, True)(indices)) == facts(expected)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_parts_are_joined_in_the_order_that_was_asked_for(data: st.DataObject, sizes: list[int]) -> None:
    values, parts = torch.arange(100.0).split(25), []
    for size, part in zip(sizes, values, strict=False):
        parts.append(TensorDataset(part[:size], part[:size].view(-1, 1).expand(-1, 2)))
    joined = ConcatDataset(parts)
    if len(joined) == 0:
        return
    indices = data.draw(st.lists(st.integers(-len(joined), len(joined) - 1), min_size=1, max_size=8))
    expected = default_collate([joined[index] for index in indices])
    assert facts(fetcher(joined, default_collate, True)(indices)) == facts(expected)


# Indices that are none, or not in a list


@pytest.mark.parametrize("kind", ["pair", "tensor", "split", "parts", "subset of parts", "images"])
@pytest.mark.parametrize(
    "indices",
    [
        [-1], [0, -2, 1], [99], [0, -99], [], [1.0, 2.0], ["a"], [[0, 1], [2, 3]], [slice(0, 2), slice(2, 4)], [None], [2**70],
        [np.int64(2), np.int64(0)], [torch.tensor(2), torch.tensor(1)], (0, 2), np.array([1, 2]), torch.tensor([1, 2]), range(3),
    ],
    ids=repr,
)  # fmt: skip
def test_any_index_gives_the_batch_or_the_error_of_torch(kind: str, indices: Any) -> None:
    dataset = GATHERED[kind]()
    loader = DataLoader(dataset, batch_sampler=[indices])
    assert outcome(by_leyden, loader) == outcome(by_torch, loader)


# What the dataset keeps, and what is looked at when


@pytest.mark.parametrize("kind", ["pair", "tensor", "tensor of numbers", "parts", "subset by a range", "channels_last"])
@pytest.mark.parametrize("batch_size", [1, 4, 99])
def test_a_batch_shares_no_memory_with_the_dataset(kind: str, batch_size: int) -> None:
    dataset = GATHERED[kind]()
    before = [facts(dataset[index]) for index in range(len(dataset))]
    for batch, _ in make_source(DataLoader(dataset, batch_size), "loader", 1.0, "limit").batches(None):
        for tensor in [batch] if isinstance(batch, Tensor) else batch:
            tensor.fill_(77)
    assert [facts(dataset[index]) for index in range(len(dataset))] == before


def test_tensors_may_be_replaced_between_batches_and_between_passes() -> None:
    dataset = TensorDataset(torch.zeros(6))
    source = make_source(DataLoader(dataset, 2), "loader", 1.0, "limit")
    reading = source.batches(None)
    seen = [next(reading)[0]]
    dataset.tensors = (torch.ones(6),)
    seen += [batch for batch, _ in reading]
    dataset.tensors = (torch.full((6,), 2.0), torch.full((6, 1), 3.0))
    seen += [batch for batch, _ in source.batches(None)]
    assert [[tensor.view(-1).tolist() for tensor in batch] for batch in seen] == [
        [[0.0, 0.0]], *[[[1.0, 1.0]]] * 2, *[[[2.0, 2.0], [3.0, 3.0]]] * 3,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "mask", [[True, False, True, True], [torch.tensor(1), torch.tensor(True)]], ids=["bool", "tensor"]
)
def test_a_mask_in_the_place_of_indices_is_read_as_by_torch(mask: Any) -> None:
    """To Python True is 1, so that it would be trained on two samples only, and nobody told."""
    loader = DataLoader(Subset(pair(), mask), 2)
    assert outcome(by_leyden, loader) == outcome(by_torch, loader)


def test_the_indices_of_a_subset_may_be_changed_between_batches() -> None:
    subset = Subset(torch.arange(6), [0, 1, 2, 3])  # type: ignore[arg-type]
    reading = make_source(DataLoader(subset, 2), "loader", 1.0, "limit").batches(None)
    assert next(reading)[0].tolist() == [0, 1]
    subset.indices[3] = 5  # type: ignore[index]
    assert next(reading)[0].tolist() == [2, 5]


class Several(Dataset[Any]):
    """Gives its samples at once, and only so."""

    asked: list[list[int]]

    def __init__(self) -> None:
        self.asked = []

    def __len__(self) -> int:
        return 5

    def __getitems__(self, indices: list[int]) -> list[int]:
        self.asked.append(indices)
        return [index * index for index in indices]


@pytest.mark.parametrize("nested", [False, True])
def test_a_dataset_that_gives_its_samples_at_once_is_asked_once_for_a_batch(nested: bool) -> None:
    dataset = Several()
    loader = DataLoader(Subset(dataset, [4, 3, 2, 1, 0]) if nested else dataset, 2)
    batches = [batch.tolist() for batch, _ in make_source(loader, "loader", 1.0, "limit").batches(None)]
    assert batches == ([[16, 9], [4, 1], [0]] if nested else [[0, 1], [4, 9], [16]])
    assert dataset.asked == ([[4, 3], [2, 1], [0]] if nested else [[0, 1], [2, 3], [4]])


def calls_per_batch(dataset: Any, batch_size: int) -> float:
    """Python calls for each batch of a shuffled pass, set-up left out."""

    def count(batches: int) -> int:
        calls = 0

        def note(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event == "call"

        part = Subset(dataset, range(batches * batch_size))
        reading: Iterator[Any] = make_source(DataLoader(part, batch_size), "loader", 1.0, "limit").batches(None)
        gc.disable()
        sys.setprofile(note)
        try:
            for _ in reading:
                pass
        finally:
            sys.setprofile(None)
            gc.enable()
        return calls

    return (count(20) - count(10)) / 10


def test_the_number_of_calls_does_not_grow_with_the_batch() -> None:
    dataset = TensorDataset(torch.zeros(4000, 3), torch.zeros(4000))
    small, large = calls_per_batch(dataset, 2), calls_per_batch(dataset, 200)
    assert small == large
    assert 1 < small <= 9, "the samplers, the reader, the source and three of the gathering"
