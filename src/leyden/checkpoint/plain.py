"""Nested Python data as strict JSON plus named tensors, and back. Nothing is pickled, nothing is imported by name.

A JSON value stands for itself. Everything else is an object with one key that begins with ``$``; a user's dict
that has such a key is written as ``$dict``, so the two cannot be confused.

============================  ===================================================================
``{"$tensor": name}``         a tensor of the file
``{"$view": [name, dtype]}``  a tensor whose dtype the file format lacks: complex numbers as pairs of
                              reals, the rarer 8-bit floats as bytes
``{"$dict": [[k, v], …]}``    a dict with keys that are not strings (or begin with ``$``), in order
``{"$int": "0x…"}``           an integer of more than 64 bits
``{"$float": "nan"}``         ``nan``, ``inf`` or ``-inf``
and                           ``$tuple $set $frozenset $counter $deque $namespace $state_dict $bytes $blob $complex
                              $size $dtype $device $timedelta $ndarray $numpy``
============================  ===================================================================
"""

from __future__ import annotations

import argparse
import base64
import collections
import ctypes
import datetime
import enum
import json
import math
import pathlib
import re
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from leyden.errors import CheckpointError

Path = tuple[str, ...]
Fetch = Callable[[str], Tensor]

MAX_DEPTH = 64  # far above real data, far below the interpreter's recursion limit
_INLINE_BYTES = 4096  # longer byte strings go among the tensors: base64 costs a third more
NATIVE_DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The dtypes written as they are, with their safetensors names: those that every reader since 2023 knows."""
_NUMPY_DTYPE = re.compile(r"[<>|=][biufcSUmM]\d+(\[\w+\])?")
_NUMPY_NATIVE = {
    f"{order}{kind}{size}"
    for order in "<|"
    for kind, sizes in (("b", "1"), ("i", "1248"), ("u", "1248"), ("f", "248"))
    for size in sizes
}


def strict_json(text: str) -> Any:
    """Parse JSON, refusing what the standard refuses: duplicate keys and NaN or Infinity literals.

    Raises:
        CheckpointError: with the reason.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except RecursionError:
        raise CheckpointError("its JSON is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"its JSON is malformed: {error}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, n in collections.Counter(key for key, _ in pairs).items() if n > 1)
        raise CheckpointError(f"its JSON has the key {twice!r} twice in one object")
    return result


def _no_constant(literal: str) -> NoReturn:
    raise CheckpointError(f"its JSON holds the literal {literal}, which is not JSON")


class Encoder:
    """Turns values into JSON nodes and collects the tensors met on the way in `tensors`, by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._written: dict[tuple[Any, ...], Any] = {}

    def encode(self, value: Any, path: Path) -> Any:
        """Return the JSON node of ``value``; ``path`` is its key, for errors and tensor names.

        Raises:
            CheckpointError: the value, or something in it, is neither a tensor nor plain data; names its key.
        """
        if len(path) > MAX_DEPTH:
            raise CheckpointError(f"{_dotted(path[:6])}…: nested deeper than {MAX_DEPTH} levels, or contains itself")
        if value is None or value is True or value is False:
            return value
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        numpy = sys.modules.get("numpy")  # a numpy value cannot exist unless numpy was imported
        if numpy is not None and isinstance(value, numpy.generic | numpy.ndarray):
            return self._numpy(value, path)
        if isinstance(value, enum.Enum):
            return self.encode(value.value, path)
        # TorchVersion is a str, and hyperparameter containers are dicts: such subclasses become the plain type
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, int):
            return int(value) if -(2**63) <= value < 2**63 else {"$int": hex(value)}
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
        return self._container(value, path)

    def _container(self, value: Any, path: Path) -> Any:
        kind = type(value)
        if kind is list:
            return self._items(value, path)
        if kind in _SEQUENCES:
            return {_SEQUENCES[kind]: self._items(value, path)}
        if kind is collections.deque:
            return {"$deque": [value.maxlen, self._items(value, path)]}
        if kind is collections.Counter:
            return {"$counter": self._pairs(value, path)}
        if kind is argparse.Namespace:
            return {"$namespace": self._mapping(vars(value), path)}
        if kind is collections.OrderedDict and isinstance(getattr(value, "_metadata", None), dict):
            # module.state_dict() carries the modules' format versions in this attribute; load_state_dict reads it
            metadata = self.encode(dict(value._metadata), (*path, "_metadata"))
            return {"$state_dict": [self._mapping(value, path), metadata]}
        if isinstance(value, dict):
            return self._mapping(value, path)
        return self._scalar(value, path)

    def _items(self, values: Any, path: Path) -> list[Any]:
        return [self.encode(item, (*path, str(i))) for i, item in enumerate(values)]

    def _pairs(self, mapping: dict[Any, Any], path: Path) -> list[Any]:
        pairs = []
        for key, item in mapping.items():
            if isinstance(key, Tensor):
                _refuse(key, (*path, "<key>"), "a tensor cannot be a key; use its name")
            pairs.append([self.encode(key, (*path, "<key>")), self.encode(item, (*path, str(key)))])
        return pairs

    def _mapping(self, mapping: dict[Any, Any], path: Path) -> Any:
        if all(type(key) is str and not key.startswith("$") for key in mapping):
            return {key: self.encode(item, (*path, key)) for key, item in mapping.items()}
        return {"$dict": self._pairs(mapping, path)}

    def _scalar(self, value: Any, path: Path) -> Any:
        match value:
            case bytes() | bytearray() if len(value) > _INLINE_BYTES:
                return {"$blob": self._store(_bytes_tensor(value), path)}
            case bytes() | bytearray():
                return {"$bytes": base64.b64encode(value).decode("ascii")}
            case complex():
                return {"$complex": [self.encode(value.real, path), self.encode(value.imag, path)]}
            case torch.dtype() | torch.device():
                return {f"${type(value).__name__}": str(value).removeprefix("torch.")}
            case datetime.timedelta():
                return {"$timedelta": [value.days, value.seconds, value.microseconds]}
            case pathlib.PurePath():
                return str(value)
        return _refuse(value, path)

    def _tensor(self, tensor: Tensor, path: Path) -> Any:
        _check_tensor(tensor, path)
        # the same bytes seen in the same way are one tensor: tied weights are written once and stay tied
        view = (tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        seen = (tensor.device, tensor.data_ptr(), tensor.dtype, view)
        if tensor.numel() and seen in self._written:
            return self._written[seen]
        plain = tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg()
        if plain.dtype in NATIVE_DTYPES:
            node: Any = {"$tensor": self._store(plain, path)}
        else:
            dtype = str(plain.dtype).removeprefix("torch.")
            try:
                stored = torch.view_as_real(plain) if plain.is_complex() else plain.contiguous().view(torch.uint8)
            except RuntimeError:
                _refuse(tensor, path, f"its dtype {plain.dtype} has no byte representation; convert it")
            if stored.shape != plain.shape and not plain.is_complex():
                _refuse(tensor, path, f"its dtype {plain.dtype} cannot be written; convert it, for example to float32")
            node = {"$view": [self._store(stored, path), dtype]}
        self._written[seen] = node
        return node

    def _store(self, tensor: Tensor, path: Path) -> str:
        name = wanted = tensor_name(path)
        n = 1
        while name in self.tensors or name == "__metadata__":
            n += 1
            name = f"{wanted}#{n}"
        self.tensors[name] = tensor.cpu().contiguous()
        return name

    def _numpy(self, value: Any, path: Path) -> Any:
        dtype = value.dtype.str
        if not _NUMPY_DTYPE.fullmatch(dtype) or (value.dtype.kind == "f" and value.dtype.itemsize > 8):
            _refuse(value, path, f"numpy's dtype {value.dtype} is not plain data; convert it")
        import numpy

        if isinstance(value, numpy.generic):
            if value.dtype.kind in "mM":
                _refuse(value, path, "store int(value.astype('int64')) or an ISO string")
            return {"$numpy": [dtype, self.encode(value.item(), path)]}
        array = numpy.array(value, order="C", copy=True)  # torch wants writable memory without negative strides
        if dtype in _NUMPY_NATIVE:
            stored = torch.from_numpy(array)
        else:
            stored = _bytes_tensor(array.tobytes())
        return {"$ndarray": [self._store(stored, path), dtype, list(array.shape)]}


_SEQUENCES: dict[type, str] = {tuple: "$tuple", set: "$set", frozenset: "$frozenset", torch.Size: "$size"}


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, without a copy or numpy; keep the tensor alive meanwhile."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:  # the pointer may be null
        return memoryview(b"")
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


def _bytes_tensor(data: bytes | bytearray) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def tensor_name(path: Path) -> str:
    """Return the name that the tensor at ``path`` gets in the file, such as ``optimizer.0.state.3.exp_avg``."""
    first, rest = path[0], path[1:]
    if rest:
        first = {"state_dict": "module", "optimizer_states": "optimizer"}.get(first, first)
    return ".".join((first, *rest)).encode("utf-8", "backslashreplace").decode("utf-8")


def _dotted(path: Path) -> str:
    return ".".join(path)


def _check_tensor(tensor: Tensor, path: Path) -> None:
    wraps: bool = is_traceable_wrapper_subclass(tensor)
    if torch.nn.parameter.is_lazy(tensor):
        _refuse(tensor, path, "a lazy module has no weights yet; run one batch through it before saving")
    if wraps and hasattr(tensor, "full_tensor"):
        _refuse(tensor, path, "a sharded tensor belongs in a sharded checkpoint; or store tensor.full_tensor()")
    if tensor.is_nested:
        _refuse(tensor, path, "store its parts, tensor.unbind(), as a list")
    if tensor.is_quantized:
        _refuse(tensor, path, "quantized tensors cannot be written yet; store tensor.dequantize()")
    if tensor.layout is not torch.strided:
        _refuse(tensor, path, f"its layout {tensor.layout} cannot be written yet; store tensor.to_dense()")
    if tensor.is_meta:
        _refuse(tensor, path, "it is on the meta device and has no values; materialize it first")
    if wraps:
        _refuse(tensor, path, f"{type(tensor).__name__} wraps other tensors; store those")


def _refuse(value: Any, path: Path, hint: str | None = None) -> NoReturn:
    raise CheckpointError(
        f"{_dotted(path)}: {_describe(value)} cannot be written to a checkpoint, which holds tensors and plain "
        f"data only (no pickles). What to do: {hint or _hint(value)}."
    )


def _describe(value: Any) -> str:
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodType | type):
        kind = "the class" if isinstance(value, type) else "the function"
        return f"{kind} {value.__qualname__}"
    return f"a value of type {type(value).__module__}.{type(value).__qualname__}"


def _hint(value: Any) -> str:
    if isinstance(value, torch.nn.Module):
        return "store module.state_dict(), and pass the module again when loading"
    if isinstance(value, torch.Generator):
        return "store generator.get_state()"
    if isinstance(value, tuple):
        return "store tuple(value), or value._asdict() of a named tuple"
    if isinstance(value, list | range):
        return "store list(value)"
    if isinstance(value, datetime.date | datetime.time):
        return "store value.isoformat()"
    if isinstance(value, Mapping):
        return "store dict(value)"
    if hasattr(value, "__dataclass_fields__"):
        return "store dataclasses.asdict(value)"
    if hasattr(value, "state_dict"):
        return "store value.state_dict()"
    if callable(value):
        return "store its name and look the function up when loading"
    return "store the numbers and strings it was made from, or leave it out"


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
    if len(node) != 1 or (tag not in _DECODERS and tag != "$tensor"):
        raise CheckpointError(f"unknown entry {tag!r}: the file is malformed, or of a newer leyden")
    if tag == "$tensor":  # outside the try: a device that is out of memory is not a malformed file
        return fetch(_name(node[tag]))
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
        return tensor.view(dtype)
    complex_tensor = torch.view_as_complex(tensor)
    if complex_tensor.dtype != dtype:
        raise ValueError(f"{name} does not hold {dtype}")
    return complex_tensor


def _dtype(name: Any) -> torch.dtype:
    dtype = vars(torch).get(name)  # not getattr, which imports submodules by name
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"this torch has no dtype {name!r}")
    return dtype


def _numpy_dtype(name: Any) -> Any:
    if not _NUMPY_DTYPE.fullmatch(name):
        raise ValueError(f"{name!r} is not a numpy dtype that is read")
    try:
        import numpy
    except ImportError:
        raise CheckpointError("it holds numpy values, and numpy is not installed: pip install numpy") from None
    return numpy.dtype(name)


def _decode_ndarray(argument: Any, fetch: Fetch) -> Any:
    name, dtype, shape = argument
    dtype = _numpy_dtype(dtype)
    stored = fetch(_name(name)).cpu()
    if dtype.str in _NUMPY_NATIVE:
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
    "$view": _decode_view,
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
    "$blob": lambda name, fetch: bytes(raw_bytes(fetch(_name(name)).cpu())),
    "$complex": lambda parts, fetch: complex(*decode(parts, fetch)),
    "$size": lambda items, fetch: torch.Size(items),
    "$dtype": lambda name, fetch: _dtype(name),
    "$device": lambda name, fetch: torch.device(name),
    "$timedelta": lambda parts, fetch: datetime.timedelta(*parts),
    "$ndarray": _decode_ndarray,
    "$numpy": lambda argument, fetch: _numpy_dtype(argument[0]).type(decode(argument[1], fetch)),
}
