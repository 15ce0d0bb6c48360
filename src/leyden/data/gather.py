"""Batches of tensors that are in memory already: gathered in one indexing operation instead of sample by sample.

Only where the batch is the same, bit for bit and in its structure and strides, as what torch's `default_collate` makes of the
samples: `TensorDataset`, a tensor, and `Subset` and `ConcatDataset` of these, of plain tensors on the CPU.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset, default_collate
from torch.utils.data._utils.collate import collate_tensor_fn, default_collate_fn_map

Gather = Callable[[Any], Any]

# Those that torch's index_select and stack both know.
_DTYPES = frozenset(
    (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
)  # fmt: skip
# What an index that cannot be gathered ends in: a negative one, one out of range, one that is no integer.
_NOT_GATHERED = (IndexError, OverflowError, RuntimeError, TypeError, ValueError)


class _Table(NamedTuple):
    """How the rows of a dataset are gathered.

    Attributes:
        rows: from indices to one tensor for each column.
        columns: dtype and shape of a sample's tensors.
        single: whether a sample is a tensor and not a tuple of them.
    """

    rows: Callable[[list[int]], list[Tensor]]
    columns: tuple[tuple[torch.dtype, torch.Size], ...]
    single: bool


def gathering(dataset: Any, collate: Any, otherwise: Gather) -> Gather:
    """Return what loads a batch of ``dataset`` at once; ``otherwise`` where that might not be the same.

    What it returns is for one pass: tensors and parts are looked up now, the indices of a `Subset` at each batch.

    Args:
        dataset: of any kind.
        collate: the loader's ``collate_fn``.
        otherwise: loads a batch sample by sample; also asked for the batches that cannot be gathered, which it may refuse.
    """
    # users may give torch's collate function another way to put tensors or samples together
    own = default_collate_fn_map.get(Tensor) is not collate_tensor_fn or tuple in default_collate_fn_map
    if collate is not default_collate or own:
        return otherwise
    table = _table(dataset)
    if table is None:
        return otherwise
    rows, _, single = table

    def gather(indices: Any) -> Any:
        if type(indices) is list:
            try:
                columns = rows(indices)
            except _NOT_GATHERED:
                pass
            else:
                return columns[0] if single else columns
        return otherwise(indices)

    return gather


def _table(dataset: Any) -> _Table | None:
    """How ``dataset`` is gathered; None if it cannot be."""
    if type(dataset) is Tensor:
        return _of_tensors(TensorDataset(dataset), True) if dataset.dim() else None
    if type(dataset) is Subset:
        return _of_subset(dataset)
    if type(dataset) is ConcatDataset:
        return _of_parts(dataset)
    if (
        isinstance(dataset, TensorDataset)
        and type(dataset).__getitem__ is TensorDataset.__getitem__
        and not hasattr(dataset, "__getitems__")
    ):
        return _of_tensors(dataset, False)
    return None


def _is_plain(tensor: Any) -> bool:
    """Whether stacked samples of the tensor are what ``index_select`` gives."""
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.dtype in _DTYPES
        and not (tensor.requires_grad or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
        # stacked samples of four and more dimensions may come out in channels_last
        and (0 < tensor.dim() <= 4 or tensor.stride() == torch.empty(tensor.shape, device="meta").stride())
    )


def _of_tensors(dataset: TensorDataset, single: bool) -> _Table | None:
    tensors = getattr(dataset, "tensors", None)
    if type(tensors) is not tuple or not tensors or not all(map(_is_plain, tensors)):
        return None

    def rows(indices: list[int]) -> list[Tensor]:
        if dataset.tensors is not tensors:
            raise IndexError("other tensors than at the beginning of the pass")
        index = _index(indices)
        return [tensor.index_select(0, index) for tensor in tensors]

    return _Table(rows, tuple((tensor.dtype, tensor.shape[1:]) for tensor in tensors), single)


def _of_subset(subset: Subset[Any]) -> _Table | None:
    inner = _table(subset.dataset)
    if inner is None or not _are_integers(subset.indices):
        return None
    whole = inner.rows
    given: Any = subset.indices
    masks = {bool} if isinstance(given, Tensor) else {bool, Tensor}  # `_are_integers` has looked at a tensor's dtype

    def rows(indices: list[int]) -> list[Tensor]:
        taken = list(map(subset.indices.__getitem__, indices))
        if not masks.isdisjoint(map(type, taken)):
            raise IndexError("True is a mask to torch, and 1 to Python")
        return whole(taken)

    return inner._replace(rows=rows)


def _are_integers(indices: Any) -> bool:
    """Whether taking an index out of ``indices`` runs no code of a user's, and gives no mask."""
    if isinstance(indices, Tensor):
        return type(indices) is Tensor and indices.dtype is torch.int64
    numpy = sys.modules.get("numpy")
    return type(indices) in (list, tuple, range) or (numpy is not None and type(indices) is numpy.ndarray)


def _of_parts(concatenated: ConcatDataset[Any]) -> _Table | None:
    parts = [_table(part) for part in concatenated.datasets]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts) or any(part[1:] != found[0][1:] for part in found):
        return None
    ends = concatenated.cumulative_sizes
    starts = [0, *ends]

    def rows(indices: list[int]) -> list[Tensor]:
        if min(indices) < 0:
            raise IndexError("counted from the end")
        part = bisect_right(ends, min(indices))
        if max(indices) < ends[part]:
            return found[part].rows([index - starts[part] for index in indices])
        return from_several(indices)

    def from_several(indices: list[int]) -> list[Tensor]:
        part_of = [bisect_right(ends, index) for index in indices].__getitem__
        order = sorted(range(len(indices)), key=part_of)
        pieces = [
            found[part].rows([indices[place] - starts[part] for place in places])
            for part, places in groupby(order, part_of)
        ]
        back = _index(sorted(range(len(order)), key=order.__getitem__))
        return [torch.cat(column).index_select(0, back) for column in zip(*pieces, strict=True)]

    return found[0]._replace(rows=rows)


def _index(indices: list[int]) -> Tensor:
    """A seventh of the time of ``torch.tensor(indices)``; and what is no integer is refused."""
    return torch.frombuffer(array("q", indices), dtype=torch.int64)
