"""Which batches share a graph: those of one shape, and those of all other shapes once there are four."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

MAX_STATIC_SHAPES = 4
"""Shapes of batches that get a graph of their own; for others there is one in which the sizes are variables."""
ANY = "any"

Shape = Any
"""The sizes of all tensors of a batch, in its structure."""


class Shapes:
    """The shapes that have a graph of their own, in the order in which they came.

    Which graph trains on a batch depends on the batches before it alone, and this is part of a checkpoint, so that a run that
    goes on from one makes the same steps.
    """

    def __init__(self) -> None:
        self._static: list[Shape] = []

    def of(self, batch: Any) -> Shape:
        """The batch's shape, or `ANY` if it has no graph of its own; then its sizes are marked as variables."""
        shape = shape_of(batch)
        if shape not in self._static:
            if len(self._static) == MAX_STATIC_SHAPES:
                _mark_dynamic(batch)
                return ANY
            self._static.append(shape)
        return shape

    def state(self) -> list[Any]:
        """The shapes, for a checkpoint."""
        return [_plain(shape) for shape in self._static]

    def load(self, state: list[Any]) -> None:
        """Take back what `state` returned."""
        self._static = [_hashable(shape) for shape in state]


def shape_of(value: Any) -> Shape:
    """The sizes of all tensors in ``value``, in its structure."""
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, (list, tuple)):
        return tuple([shape_of(part) for part in value])
    if isinstance(value, dict):
        return tuple([(str(name), shape_of(part)) for name, part in value.items()])
    return None


def _plain(shape: Shape) -> Any:
    return [_plain(part) for part in shape] if isinstance(shape, tuple) else shape


def _hashable(shape: Any) -> Shape:
    return tuple([_hashable(part) for part in shape]) if isinstance(shape, (list, tuple)) else shape


def _mark_dynamic(batch: Any) -> None:
    for tensor in _tensors(batch):
        for dimension in range(tensor.dim()):
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
