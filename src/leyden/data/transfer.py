"""Move a batch of any structure to a device, and find out how many samples it holds."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from leyden.errors import DataError, MetricError, warn

Batch = TypeVar("Batch")

_LEAVES = (str, bytes, int, float, complex, type(None))
_MISSING = object()
_warned_of_sizes = False


def move_to_device(batch: Batch, device: torch.device | str | int, dtype: torch.dtype | None = None) -> Batch:
    """Return ``batch`` with its tensors on ``device`` and, if ``dtype`` is given, its floating ones cast to it.

    Looked into are mappings, lists, tuples, named tuples, dataclass instances and `PackedSequence`, nested in any
    way. Containers keep their type and their other content, and are rebuilt, never changed, along the path to a tensor
    that moved; a container in which nothing changed is returned as the same object. A dataclass is copied
    field by field, those with ``init=False`` included, and without its ``__init__`` and ``__post_init__``; it may be
    frozen. A mapping that cannot be rebuilt from a dict becomes a dict.

    Any other object with a method ``to`` (a graph, the output of a tokenizer) is moved by ``to(device)``; if that
    returns None the object was moved in place. ``dtype`` then reaches into it only if it is a mapping,
    because a blanket cast would also round its indices. Everything else (text, numbers, None, sets, arrays) is
    returned untouched.

    Page-locked ("pinned") CPU tensors are copied without waiting for the copy to end.

    A tensor that occurs twice is copied twice: the parts of a batch that share memory on the host do not share
    it on the device. A batch that contains itself is refused.

    Args:
        batch: what the loader gave.
        device: where to.
        dtype: of floating tensors; None leaves them as they are. Integer, bool and complex tensors are never cast.

    Raises:
        DataError: the batch contains itself, or is nested too deeply.
    """
    target = torch.device(device)

    def convert(tensor: Tensor) -> Tensor:
        return _convert(tensor, target, dtype)

    return converted(batch, target, dtype, convert)


@dataclasses.dataclass(frozen=True)
class DeviceMove:
    """What brings a batch to a device where no hook takes part: `move_to_device`, whichever loader the batch is of."""

    device: torch.device
    dtype: torch.dtype | None

    def __call__(self, batch: Any, index: int) -> Any:
        """Return the batch on the device; ``index`` is the number of its loader among several."""
        return move_to_device(batch, self.device, self.dtype)


def converted(
    batch: Batch, device: torch.device, dtype: torch.dtype | None, convert: Callable[[Tensor], Tensor]
) -> Batch:
    """Return ``batch`` as `move_to_device` does, with ``convert`` of each of its tensors; the rest is moved by its own ``to``."""
    try:
        return cast(Batch, _move(batch, device, dtype, convert))
    except RecursionError as error:
        raise DataError(
            f"The batch of type {type(batch).__name__} contains itself, or is nested too deeply to be moved. "
            "Return a tree of tensors from the data set, or override transfer_batch_to_device."
        ) from error


def _convert(tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        dtype = tensor.dtype
    if device.type == "cpu" or tensor.device.type != "cpu" or not _is_pinned(tensor):
        return tensor.to(device, dtype)
    if device.type == "mps":  # it has no float64, so cast first
        return tensor.to(dtype).to(device)
    # a cast on the host would make a pageable copy, for which the device has to be waited for
    return tensor.to(device, non_blocking=True).to(dtype)


def _is_pinned(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.is_pinned()


def _move(value: Any, device: torch.device, dtype: torch.dtype | None, convert: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return convert(value)
    if isinstance(value, (*_LEAVES, type)):
        return value

    def move(part: Any) -> Any:
        return _move(part, device, dtype, convert)

    if isinstance(value, PackedSequence):
        return _move_packed(value, convert)
    if callable(getattr(value, "to", None)):
        return _move_by_itself(value, device, dtype, move)
    if isinstance(value, Mapping):
        return _move_mapping(value, move)
    if isinstance(value, list | tuple):
        return _move_sequence(value, move)
    if dataclasses.is_dataclass(value):
        return _move_dataclass(value, move)
    return value


def _move_packed(packed: PackedSequence, convert: Callable[[Tensor], Tensor]) -> PackedSequence:
    data = convert(packed.data)
    if data is packed.data:
        return packed
    # batch_sizes stays on the CPU: torch's recurrent layers read it there
    sorted_indices, unsorted_indices = (
        None if indices is None else indices.to(data.device)
        for indices in (packed.sorted_indices, packed.unsorted_indices)
    )
    return PackedSequence(data, packed.batch_sizes, sorted_indices, unsorted_indices)


def _move_by_itself(value: Any, device: torch.device, dtype: torch.dtype | None, move: Callable[[Any], Any]) -> Any:
    moved = value.to(device)
    if moved is None:
        moved = value
    if dtype is not None and isinstance(moved, MutableMapping):
        for key, part in list(moved.items()):
            cast_part = move(part)
            if cast_part is not part:
                moved[key] = cast_part
    return moved


def _move_mapping(mapping: Mapping[Any, Any], move: Callable[[Any], Any]) -> Any:
    moved = {key: move(part) for key, part in mapping.items()}
    if all(moved[key] is part for key, part in mapping.items()):
        return mapping
    if type(mapping) is dict:
        return moved
    # a shallow copy keeps the default_factory, the order and other attributes, but is only known to have items of
    # its own in subclasses of dict and UserDict; where attributes are the items, a copy would keep the old ones
    if isinstance(mapping, dict | UserDict) and getattr(mapping, "__dict__", None) is not mapping:
        rebuilt = copy.copy(mapping)
        for key, part in moved.items():
            if part is not mapping[key]:
                rebuilt[key] = part
        return rebuilt
    try:
        return type(mapping)(moved)  # type: ignore[call-arg]
    except TypeError:
        return moved


def _move_sequence(values: list[Any] | tuple[Any, ...], move: Callable[[Any], Any]) -> Any:
    moved = [move(part) for part in values]
    if all(new is old for new, old in zip(moved, values, strict=True)):
        return values
    if type(values) is list:
        return moved
    if isinstance(values, list):
        rebuilt = copy.copy(values)
        rebuilt[:] = moved
        return rebuilt
    if type(values) is tuple:
        return tuple(moved)
    if hasattr(values, "_make"):
        return values._make(moved)
    try:
        return type(values)(moved)
    except TypeError:
        return tuple(moved)


def _move_dataclass(value: Any, move: Callable[[Any], Any]) -> Any:
    changed = {}
    for field in dataclasses.fields(value):
        part = getattr(value, field.name, _MISSING)  # a field with init=False may not be set yet
        moved = move(part)
        if moved is not part:
            changed[field.name] = moved
    if not changed:
        return value
    rebuilt = copy.copy(value)
    for name, part in changed.items():
        object.__setattr__(rebuilt, name, part)  # frozen classes refuse a plain assignment
    return rebuilt


def batch_size_of(batch: Any) -> int:
    """Return the number of samples in ``batch``: the size of dim 0 of its first tensor, depth first.

    Mappings, lists, tuples and dataclasses are looked into in their order; of a `PackedSequence` the number of its
    sequences counts. Tensors without dimensions (a temperature, a flag) say nothing about the number of samples
    and are passed over. Where there is no other tensor, the length of the first list or tuple of strings is taken,
    and without one of those a tensor without dimensions counts as 1.

    If the tensors disagree in dim 0, the first one's is returned and a warning (``batch-size-ambiguous``) is issued,
    once per process.

    Raises:
        MetricError: nothing in the batch has a size.
    """
    global _warned_of_sizes
    sizes = [-1, -1, -1]  # the first of each kind
    for kind, size in _sizes(batch):
        if sizes[kind] < 0:
            sizes[kind] = size
        if kind != _TENSOR:
            continue
        if _warned_of_sizes:
            break
        if size != sizes[_TENSOR]:
            _warned_of_sizes = True
            warn(
                "batch-size-ambiguous",
                f"The tensors of a batch have {sizes[_TENSOR]} and {size} entries in dim 0; {sizes[_TENSOR]} is taken "
                "as the number of samples, the weight of logged values. If that is wrong, pass batch_size= "
                "to self.log.",
            )
    found = next((size for size in sizes if size >= 0), None)
    if found is None:
        raise MetricError(
            f"Cannot find the number of samples in a batch of type {type(batch).__name__}: no tensor and no list of "
            "strings in it. Pass batch_size= to self.log."
        )
    return found


_TENSOR, _STRINGS, _SCALAR = range(3)


def _sizes(value: Any) -> Iterator[tuple[int, int]]:
    """Every size found in ``value``, with its kind, depth first."""
    if isinstance(value, Tensor):
        yield (_TENSOR, value.shape[0]) if value.dim() else (_SCALAR, 1)
    elif isinstance(value, PackedSequence):
        yield _TENSOR, int(value.batch_sizes[0])
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _sizes(part)
    elif isinstance(value, list | tuple):
        if value and all(isinstance(part, str) for part in value):
            yield _STRINGS, len(value)
        else:
            for part in value:
                yield from _sizes(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _sizes(getattr(value, field.name, None))
