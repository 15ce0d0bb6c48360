"""Split a batch of any structure into parts of fewer samples."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from leyden.data.transfer import _move_dataclass, _move_mapping, _move_sequence


def sample_count(batch: Any) -> int | None:
    """Return how many samples a batch holds, if that is beyond doubt; None if it cannot be split.

    It is the size of dim 0 if all tensors of the batch agree in it. If they do not:

    - a list of tensors that differ in shape alone is a list of samples;
    - else the first tensor counts that is the batch itself or directly in it, as in ``[images, labels, class_weights]``;
    - else lists of one length directly in the batch are samples if the tensors in one of them disagree, as in
      ``(images, targets)`` of object detection.

    Without any tensor, lists of one length count.
    """
    return _count(batch)[0]


def split_batch(batch: Any, parts: int) -> list[tuple[Any, int]]:
    """Split a batch into at most ``parts`` parts, whose sizes differ by one sample at most.

    Tensors (and arrays) with one entry per sample in dim 0 are sliced, without a copy; so are lists and tuples with one
    item per sample. Mappings, named tuples, dataclasses and lists of tensors keep their structure, a `PackedSequence` is
    packed again. Everything else is handed to each part as it is.

    Args:
        batch: what the loader gave; `sample_count` says how its samples are counted.
        parts: how many.

    Returns:
        The parts and the number of samples in each, in order. A batch that cannot be split is returned as one part.
    """
    samples, held = _count(batch)
    if samples is None or samples < 2 or parts < 2:
        return [(batch, samples or 1)]
    small, larger = divmod(samples, min(parts, samples))
    found, start = [], 0
    for index in range(min(parts, samples)):
        size = small + (index < larger)
        found.append((_sliced(batch, samples, slice(start, start + size), held), size))
        start += size
    return found


class _Held(enum.Enum):
    """Where the samples are."""

    IN_TENSORS = "entries of dim 0"
    IN_BATCH = "items of the batch, which is a list"
    IN_FIELDS = "items of the lists directly in the batch"


def _count(batch: Any) -> tuple[int | None, _Held]:
    sizes = set(_sizes(batch))
    if len(sizes) == 1:
        return sizes.pop(), _Held.IN_TENSORS
    inside = _inside(batch)
    fields = [part for part in inside if _is_list(part)]
    if not sizes:
        if _is_list(batch) and not any(map(_inside, batch)):
            return len(batch), _Held.IN_BATCH
        lengths = {len(part) for part in fields}
        return (lengths.pop(), _Held.IN_FIELDS) if len(lengths) == 1 else (None, _Held.IN_TENSORS)
    all_tensors = _is_list(batch) and all(isinstance(part, Tensor) for part in batch)
    if all_tensors and len({(part.dtype, part.dim()) for part in batch}) == 1:
        return len(batch), _Held.IN_BATCH
    for part in inside:
        if isinstance(part, Tensor | PackedSequence) and (size := next(_sizes(part), None)) is not None:
            return size, _Held.IN_TENSORS
    if len({len(part) for part in fields}) == 1 and any(len(set(_sizes(part))) > 1 for part in fields):
        return len(fields[0]), _Held.IN_FIELDS
    return None, _Held.IN_TENSORS


def _sizes(value: Any) -> Iterator[int]:
    """The size of dim 0 of every tensor that has one, depth first."""
    if isinstance(value, Tensor):
        if value.dim():
            yield value.shape[0]
    elif isinstance(value, PackedSequence):
        yield int(value.batch_sizes[0])
    else:
        for part in _inside(value):
            yield from _sizes(part)


def _inside(value: Any) -> list[Any]:
    """What a container holds; nothing for everything else."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple) and not isinstance(value, PackedSequence):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return []


def _is_list(value: Any) -> bool:
    """Whether ``value`` may be a list of samples; a named tuple has fields."""
    return isinstance(value, list | tuple) and not isinstance(value, PackedSequence) and not hasattr(value, "_fields")


def _sliced(value: Any, samples: int, where: slice, held: _Held, top: bool = True) -> Any:
    def inner(part: Any) -> Any:
        return _sliced(part, samples, where, held, top=False)

    if isinstance(value, Tensor):
        return value[where] if value.dim() and value.shape[0] == samples else value
    if isinstance(value, PackedSequence):
        if int(value.batch_sizes[0]) != samples:
            return value
        return pack_sequence(unpack_sequence(value)[where], enforce_sorted=value.sorted_indices is None)
    if _is_list(value) and len(value) == samples:
        # [inputs, targets] of two samples each is no list of two samples, and a batch has fields unless it is counted itself
        of_samples = held is _Held.IN_FIELDS or set(_sizes(value)) != {samples}
        if held is _Held.IN_BATCH if top else of_samples:
            return value[where] if type(value) in (list, tuple) else type(value)(value[where])
    if isinstance(value, Mapping):
        return _move_mapping(value, inner)
    if isinstance(value, list | tuple):
        return _move_sequence(value, inner)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _move_dataclass(value, inner)
    shape = getattr(value, "shape", None)  # an array of numpy, of which torch made no tensor
    return value[where] if isinstance(shape, tuple) and shape[:1] == (samples,) else value
