"""The values behind the JSON nodes that `leyden.checkpoint.plain` writes: its tags are read here.

What a node asks for is checked before torch or numpy get it: a file may hold wrong numbers, but none of them makes a
tensor that reads beyond its memory, an import, or much more memory than the file's size.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import datetime
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from leyden.checkpoint.container import raw_bytes
from leyden.checkpoint.plain import NUMPY_DTYPE, NUMPY_NATIVE, SPARSE_LAYOUTS
from leyden.errors import CheckpointError


class Fetch(Protocol):
    """Gives the tensor of a name: where the checkpoint is loaded to, or its bytes, on the CPU and not shared."""

    def __call__(self, name: str, as_bytes: bool = False) -> Tensor: ...  # noqa: D102


def tensor_names(node: Any) -> Iterator[tuple[str, bool]]:
    """Yield the names of the tensors that `decode` will fetch for a node, each with whether as bytes."""
    if isinstance(node, list):
        for item in node:
            yield from tensor_names(item)
    elif isinstance(node, dict):
        for key, item in node.items():
            first = item[0] if isinstance(item, list) and item else item
            if key in _NAMES and isinstance(first, str):
                yield first, _NAMES[key]
            else:
                yield from tensor_names(item)


_NAMES = {"$tensor": False, "$view": False, "$ndarray": True, "$blob": True}
"""The tags that hold a tensor's name, and whether only its bytes matter."""


def decode(node: Any, fetch: Fetch) -> Any:
    """Return the value of a JSON node; ``fetch`` gives the tensor of a name.

    Raises:
        CheckpointError: the node is malformed, or was written by a newer format.
    """
    if isinstance(node, list):
        return [decode(item, fetch) for item in node]
    if not isinstance(node, dict):
        return node
    tag = next((key for key in node if key.startswith("$")), None)
    if tag is None:
        return {key: decode(item, fetch) for key, item in node.items()}
    if len(node) != 1 or tag not in _DECODERS:
        raise CheckpointError(f"unknown entry {tag[:80]!r}: the file is malformed, or of a newer leyden")
    try:
        return _DECODERS[tag](node[tag], fetch)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        if isinstance(error, CheckpointError | RecursionError):
            raise
        raise CheckpointError(f"malformed {tag} entry: {type(error).__name__}: {error}") from None


def _name(argument: Any) -> str:
    if not isinstance(argument, str):
        raise CheckpointError(f"malformed $tensor entry: {argument!r:.80} is not a name")
    return argument


def _decode_pairs(pairs: Any, fetch: Fetch) -> dict[Any, Any]:
    result = {decode(key, fetch): decode(item, fetch) for key, item in pairs}
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _decode_state_dict(argument: Any, fetch: Fetch) -> Any:
    entries, metadata = argument
    result = collections.OrderedDict(decode(entries, fetch))
    result._metadata = decode(metadata, fetch)  # type: ignore[attr-defined]
    return result


def _decode_view(argument: Any, fetch: Fetch) -> Tensor:
    name, dtype = argument[0], _dtype(argument[1])
    tensor = fetch(_name(name))
    if not dtype.is_complex:
        if dtype.itemsize != 1 or tensor.dtype is not torch.uint8 or argument[1].startswith("q"):
            raise ValueError(f"{name!r:.80} cannot be seen as {dtype}")
        return tensor.view(dtype)
    complex_tensor = torch.view_as_complex(tensor)
    if complex_tensor.dtype != dtype:
        raise ValueError(f"{name} does not hold {dtype}")
    return complex_tensor


def _decode_sparse_coo(argument: Any, fetch: Fetch) -> Tensor:
    *nodes, size, coalesced = argument
    indices, values = _parts(nodes, fetch)
    if not isinstance(coalesced, bool):
        raise TypeError("whether it is coalesced must be true or false")
    check = not values.is_meta  # on the meta device there are no numbers to be wrong
    tensor = torch.sparse_coo_tensor(indices, values, size, is_coalesced=coalesced, check_invariants=check)
    return tensor._coalesced_(coalesced)  # torch takes one without entries for coalesced, whatever it is told


def _decode_sparse_compressed(argument: Any, fetch: Fetch) -> Tensor:
    *nodes, size, name = argument
    layout = vars(torch).get(name)
    if layout not in SPARSE_LAYOUTS or layout is torch.sparse_coo:
        raise ValueError(f"{name!r:.40} is not a layout")
    compressed, plain, values = _parts(nodes, fetch)
    with _without(r"Sparse [A-Z]+ tensor support is in beta"):
        return torch.sparse_compressed_tensor(
            compressed, plain, values, size, layout=layout, check_invariants=not values.is_meta
        )


def _decode_quantized(argument: Any, fetch: Fetch) -> Tensor:
    [integers] = _parts(argument[:1], fetch)
    if integers.is_meta:
        raise CheckpointError("torch has no quantized tensors on the meta device")
    if len(argument) == 3:
        scale, zero_point = decode(argument[1], fetch), argument[2]
        limits = torch.iinfo(integers.dtype)
        if type(zero_point) is not int or not limits.min <= zero_point <= limits.max:
            raise ValueError(f"the zero point {zero_point!r:.40} is not one of {integers.dtype}")
        with _without(_QUANTIZED_WARNING):
            return torch._make_per_tensor_quantized_tensor(integers, scale, zero_point)
    [scales, zero_points], axis = _parts(argument[1:3], fetch), argument[3]
    length = integers.shape[axis]  # torch takes scales of any length, and reads beyond their end
    if axis < 0 or scales.shape != (length,) or zero_points.shape != (length,):
        raise ValueError(f"there must be a scale and a zero point for each of {length} channels")
    with _without(_QUANTIZED_WARNING):
        return torch._make_per_channel_quantized_tensor(integers, scales, zero_points, axis)


_QUANTIZED_WARNING = r"torch\.quantize_per_tensor, torch\.quantize_per_channel and other quantized tensor creation"


@contextlib.contextmanager
def _without(message: str) -> Iterator[None]:
    """Mute one of torch's warnings: whoever made the tensor has had it, and loading it asks for nothing new."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message, UserWarning)
        yield


def _parts(nodes: Any, fetch: Fetch) -> list[Tensor]:
    parts = [decode(node, fetch) for node in nodes]
    if not all(isinstance(part, Tensor) and part.layout is torch.strided for part in parts):
        raise TypeError("its parts must be dense tensors")
    return parts


def _dtype(name: Any) -> torch.dtype:
    dtype = vars(torch).get(name)  # not getattr, which imports submodules by name
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"this torch has no dtype {name!r}")
    return dtype


def _numpy_dtype(name: Any) -> Any:
    if not NUMPY_DTYPE.fullmatch(name):
        raise ValueError(f"{name!r} is not a numpy dtype that is read")
    try:
        import numpy
    except ImportError:
        raise CheckpointError("it holds numpy values, and numpy is not installed: pip install numpy") from None
    return numpy.dtype(name)


def _decode_ndarray(argument: Any, fetch: Fetch) -> Any:
    name, dtype, shape = argument
    dtype = _numpy_dtype(dtype)
    stored = fetch(_name(name), as_bytes=True)
    if dtype.str in NUMPY_NATIVE:
        array = stored.numpy()
        if array.dtype != dtype or list(array.shape) != shape:
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, announced as {dtype}{shape}")
        return array.copy()  # never an alias of a tensor of the checkpoint
    return stored.numpy().view(dtype).reshape(shape).copy()


def _decode_float(text: Any, fetch: Fetch) -> float:
    if text not in ("nan", "inf", "-inf"):
        raise ValueError(f"{text!r} is not one of nan, inf, -inf")
    return float(text)


_DECODERS: dict[str, Callable[[Any, Fetch], Any]] = {
    "$tensor": lambda name, fetch: fetch(_name(name)),
    "$view": _decode_view,
    "$sparse_coo": _decode_sparse_coo,
    "$sparse_compressed": _decode_sparse_compressed,
    "$quantized": _decode_quantized,
    "$dict": _decode_pairs,
    "$int": lambda text, fetch: int(text, 16),
    "$float": _decode_float,
    "$tuple": lambda items, fetch: tuple(decode(items, fetch)),
    "$set": lambda items, fetch: set(decode(items, fetch)),
    "$frozenset": lambda items, fetch: frozenset(decode(items, fetch)),
    "$counter": lambda pairs, fetch: collections.Counter(_decode_pairs(pairs, fetch)),
    "$namespace": lambda entries, fetch: argparse.Namespace(**decode(entries, fetch)),
    "$deque": lambda argument, fetch: collections.deque(decode(argument[1], fetch), maxlen=argument[0]),
    "$state_dict": _decode_state_dict,
    "$bytes": lambda text, fetch: base64.b64decode(text, validate=True),
    "$blob": lambda name, fetch: bytes(raw_bytes(fetch(_name(name), as_bytes=True))),
    "$complex": lambda parts, fetch: complex(*decode(parts, fetch)),
    "$size": lambda items, fetch: torch.Size(items),
    "$dtype": lambda name, fetch: _dtype(name),
    "$device": lambda name, fetch: torch.device(name),
    "$timedelta": lambda parts, fetch: datetime.timedelta(*parts),
    "$ndarray": _decode_ndarray,
    "$numpy": lambda argument, fetch: _numpy_dtype(argument[0]).type(decode(argument[1], fetch)),
}
