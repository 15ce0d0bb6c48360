"""How large plain data and tensors are, with what they share counted once, and counted each time."""

from __future__ import annotations

import collections
from argparse import Namespace
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

_MOST = 1 << 60


class Size:
    """The size of a value that does not contain itself.

    Attributes:
        held: bytes of memory that the tensors have, shared memory once.
        written: bytes of the tensors' elements, each tensor for itself; the same view of the same memory once.
        plain: bytes that the other data have at least, shared objects once.
        expanded: the same, with shared objects counted wherever they are; not more than 2⁶⁰.
    """

    def __init__(self, value: Any) -> None:
        self.held = self.written = self.plain = 0
        self._memory: set[int] = set()
        self._views: set[tuple[Any, ...]] = set()
        self._sizes: dict[int, int] = {}
        self.expanded = self._of(value)

    def _of(self, value: Any) -> int:
        if id(value) not in self._sizes:
            own, parts = self._own(value)
            self.plain += own
            self._sizes[id(value)] = min(_MOST, own + sum(map(self._of, parts)))
        return self._sizes[id(value)]

    def _own(self, value: Any) -> tuple[int, Collection[Any]]:
        """The bytes that a value has itself, and its parts."""
        parts: Collection[Any] = ()
        if isinstance(value, Tensor):
            for part in _dense(value):
                self._add(part)
            return 0, ()
        if isinstance(value, (str, bytes)):
            return len(value), ()
        if isinstance(value, Namespace):
            value = vars(value)
        if isinstance(value, dict):
            parts = [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
            parts = value
        return int(getattr(value, "nbytes", 8)) + 8 * len(parts), parts  # NumPy's arrays have the attribute

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._memory:
            self._memory.add(storage.data_ptr())
            self.held += storage.nbytes()
        view = (storage.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if view not in self._views:
            self._views.add(view)
            self.written += tensor.numel() * tensor.itemsize


def _dense(tensor: Tensor) -> list[Tensor]:
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    first, second = (tensor.crow_indices, tensor.col_indices) if by_row else (tensor.ccol_indices, tensor.row_indices)
    return [first(), second(), tensor.values()]
