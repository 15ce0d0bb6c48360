"""Splitting batches: what is sliced, what is kept, what is not split because its samples are not beyond doubt."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from leyden.data.split import sample_count, split_batch


class Pair(NamedTuple):
    inputs: Tensor
    note: str


@dataclass(frozen=True)
class Sample:
    inputs: Tensor
    targets: Tensor
    scale: float


def parts_of(batch: Any, parts: int = 2) -> list[Any]:
    return [part for part, _ in split_batch(batch, parts)]


@pytest.mark.parametrize(
    ("samples", "parts", "sizes"),
    [(8, 2, [4, 4]), (7, 2, [4, 3]), (10, 4, [3, 3, 2, 2]), (3, 8, [1, 1, 1]), (1, 2, [1]), (5, 1, [5])],
)
def test_sizes_differ_by_one_at_most_and_nothing_is_lost(samples: int, parts: int, sizes: list[int]) -> None:
    batch = torch.arange(samples)
    found = split_batch(batch, parts)
    assert [size for _, size in found] == sizes == [len(part) for part, _ in found]
    assert torch.equal(torch.cat([part for part, _ in found]), batch)


def test_tensors_are_views() -> None:
    batch = torch.arange(8.0).reshape(4, 2)
    assert all(part.untyped_storage().data_ptr() == batch.untyped_storage().data_ptr() for part in parts_of(batch))


def test_lists_of_tensors_keep_their_structure_and_what_has_no_samples_is_handed_to_each_part() -> None:
    inputs, targets, weights = torch.arange(6.0)[:, None], torch.arange(6), torch.ones(10)
    temperature = torch.tensor(0.5)
    first, second = parts_of([inputs, targets, weights, temperature, "train", 3, None])
    assert torch.equal(first[0], inputs[:3])
    assert torch.equal(second[1], targets[3:])
    for part in (first, second):
        assert type(part) is list
        assert part[2] is weights
        assert part[3] is temperature
        assert part[4:] == ["train", 3, None]


@pytest.mark.parametrize("samples", [2, 3])
def test_a_list_with_as_many_fields_as_samples_is_not_a_list_of_samples(samples: int) -> None:
    batch = [torch.arange(samples), torch.arange(samples) * 2, torch.ones(7)][: samples if samples == 2 else 3]
    first, second = parts_of(batch)
    assert torch.equal(torch.cat([first[0], second[0]]), batch[0])
    assert torch.equal(torch.cat([first[1], second[1]]), batch[1])
    assert len(first) == len(batch)


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_mappings_keep_their_type_and_lists_beside_tensors_are_sliced(kind: Any) -> None:
    batch = kind(x=torch.arange(4), names=["a", "b", "c", "d"], sizes=(1, 2, 3, 4), nested={"y": torch.arange(4) + 10})
    first, second = parts_of(batch)
    assert type(first) is kind
    assert first["names"] == ["a", "b"]
    assert second["sizes"] == (3, 4)
    assert second["nested"]["y"].tolist() == [12, 13]
    assert batch["x"].tolist() == [0, 1, 2, 3]


def test_named_tuples_and_dataclasses_are_rebuilt() -> None:
    first, second = parts_of(Pair(torch.arange(4), "ab"))
    assert isinstance(first, Pair)
    assert second.inputs.tolist() == [2, 3]
    assert second.note == "ab"
    _, last = parts_of(Sample(torch.arange(2), torch.arange(2) * 5, 0.1))
    assert isinstance(last, Sample)
    assert (last.inputs.tolist(), last.targets.tolist(), last.scale) == ([1], [5], 0.1)


def test_arrays_and_packed_sequences_are_split_by_sample() -> None:
    sequences = [torch.arange(float(length)) for length in (2, 5, 3)]
    packed, ids = pack_sequence(sequences, enforce_sorted=False), np.array([7, 8, 9])
    first, second = parts_of({"packed": packed, "ids": ids})
    assert [len(each) for each in unpack_sequence(first["packed"])] == [2, 5]
    assert torch.equal(unpack_sequence(second["packed"])[0], sequences[2])
    assert second["ids"].tolist() == [9]


def test_a_list_of_sequences_of_different_length_is_a_list_of_samples() -> None:
    batch = [torch.zeros(length) for length in (5, 5, 9, 2)]
    assert sample_count(batch) == 4
    assert [len(part) for part in parts_of(batch)] == [2, 2]


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_detection_batches_are_split_by_image(samples: int) -> None:
    images = tuple(torch.full((3, 4, 4), float(index)) for index in range(samples))
    targets = tuple({"boxes": torch.zeros(index + 1, 4), "labels": torch.zeros(index + 1)} for index in range(samples))
    first, second = parts_of((images, targets))
    assert len(first[0]) == len(first[1]) == (samples + 1) // 2
    assert all(torch.equal(a, b) for a, b in zip((*first[0], *second[0]), images, strict=True))
    assert (*first[1], *second[1]) == targets
    by_labels = parts_of([list(images), torch.arange(samples)]) if samples != 3 else []
    assert all(len(part[0]) == len(part[1]) for part in by_labels)


def test_batches_of_text_are_lists_of_samples() -> None:
    assert parts_of(["a", "b", "c"]) == [["a", "b"], ["c"]]
    assert parts_of({"text": ["a", "b"], "label": [0, 1]}) == [
        {"text": ["a"], "label": [0]},
        {"text": ["b"], "label": [1]},
    ]


def test_several_loaders_of_one_size_are_split_together() -> None:
    first, second = parts_of({"a": [torch.arange(4), torch.arange(4)], "b": [torch.arange(4) + 10]})
    assert first["b"][0].tolist() == [10, 11]
    assert second["a"][1].tolist() == [2, 3]


@pytest.mark.parametrize(
    "batch",
    [
        [[torch.zeros(64), torch.zeros(64)], [torch.zeros(32), torch.zeros(32)]],  # two loaders, or two samples?
        {"text": ["a", "b"], "label": [0, 1, 2]},
        object(),
        None,
        [],
    ],
)
def test_what_is_in_doubt_is_not_split(batch: Any) -> None:
    assert not sample_count(batch)
    assert parts_of(batch) == [batch]
