"""Nested Python data as strict JSON plus named tensors. Nothing is pickled; `leyden.checkpoint.from_plain` is the way back.

A JSON value stands for itself. Everything else is an object with one key that begins with ``$``; a user's dict
that has such a key is written as ``$dict``, so the two cannot be confused.

============================  ===================================================================
``{"$tensor": name}``         a tensor of the file
``{"$view": [name, dtype]}``  a tensor whose dtype the file format lacks: complex numbers as pairs of
                              reals, the rarer 8-bit floats as bytes
``{"$sparse_coo": […]}``      a sparse or quantized tensor in its parts, which are nodes; so are
                              ``$sparse_compressed`` and ``$quantized``
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
import datetime
import enum
import math
import pathlib
import re
import sys
import types
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from leyden.checkpoint.container import NATIVE_DTYPES
from leyden.errors import CheckpointError

Path = tuple[str, ...]

MAX_DEPTH = 64  # far above real data, far below the interpreter's recursion limit
_INLINE_BYTES = 4096  # longer byte strings go among the tensors: base64 costs a third more
NUMPY_DTYPE = re.compile(r"[<>|=][biufcSUmM]\d+(\[\w+\])?")
NUMPY_NATIVE = {
    f"{order}{kind}{size}"
    for order in "<|"
    for kind, sizes in (("b", "1"), ("i", "1248"), ("u", "1248"), ("f", "248"))
    for size in sizes
}


class Encoder:
    """Turns values into JSON nodes and collects the tensors met on the way in `tensors`, by name.

    The tensors are references, on whatever device; `storable` makes of each what the file holds.

    Args:
        sharded: take DTensors as they are, into `shards`; else they are refused.
    """

    def __init__(self, sharded: bool = False) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.shards: dict[str, Any] = {}
        """The DTensors, of which this process has a part."""
        self._sharded = sharded
        self._alike: dict[tuple[Any, ...], list[tuple[str, Tensor]]] = {}
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
        if self._sharded and _is_dtensor(tensor):
            return {"$tensor": self._shard(tensor, path)}
        _check_tensor(tensor, path)
        if tensor.layout is not torch.strided:
            return self._sparse(tensor.detach(), path)
        if tensor.is_quantized:
            return self._quantized(tensor.detach().as_subclass(Tensor), path)
        # the same bytes seen in the same way are one tensor: tied weights are written once and stay tied
        view = (tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        seen = (tensor.device, tensor.data_ptr(), tensor.dtype, view)
        if tensor.numel() and tensor.data_ptr() and seen in self._written:  # on "xla" all addresses are 0
            return self._written[seen]
        bare = type(tensor) is Tensor and not tensor.requires_grad
        plain = tensor if bare else tensor.detach().as_subclass(Tensor)
        if plain.dtype in NATIVE_DTYPES:
            node: Any = {"$tensor": self._store(plain, path)}
        else:
            dtype = str(plain.dtype).removeprefix("torch.")
            try:
                stored = plain if plain.is_complex() else plain.view(torch.uint8)
            except RuntimeError:
                _refuse(tensor, path, f"its dtype {plain.dtype} has no byte representation; convert it")
            if stored.shape != plain.shape:
                _refuse(tensor, path, f"its dtype {plain.dtype} cannot be written; convert it, for example to float32")
            node = {"$view": [self._store(stored, path), dtype]}
        self._written[seen] = node
        return node

    def _sparse(self, tensor: Tensor, path: Path) -> Any:
        size = list(tensor.shape)
        if tensor.layout is torch.sparse_coo:  # the underscored ones also give the parts of an uncoalesced tensor
            parts = {"indices": tensor._indices(), "values": tensor._values()}
            nodes = [self.encode(part, (*path, name)) for name, part in parts.items()]
            return {"$sparse_coo": [*nodes, size, tensor.is_coalesced()]}
        by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        names = ("crow_indices", "col_indices", "values") if by_row else ("ccol_indices", "row_indices", "values")
        nodes = [self.encode(getattr(tensor, name)(), (*path, name)) for name in names]
        return {"$sparse_compressed": [*nodes, size, str(tensor.layout).removeprefix("torch.")]}

    def _quantized(self, tensor: Tensor, path: Path) -> Any:
        if tensor.dtype not in _QUANTIZED or tensor.qscheme() not in (torch.per_tensor_affine, *_PER_CHANNEL):
            _refuse(tensor, path, f"{tensor.dtype} {tensor.qscheme()} cannot be written; store tensor.dequantize()")
        # the memory itself, which int_repr() would copy
        integers = torch.empty(0, dtype=_QUANTIZED[tensor.dtype], device=tensor.device)
        integers.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
        node = self.encode(integers, (*path, "int_repr"))
        if tensor.qscheme() is torch.per_tensor_affine:
            return {"$quantized": [node, self.encode(tensor.q_scale(), path), tensor.q_zero_point()]}
        scales = self.encode(tensor.q_per_channel_scales(), (*path, "scales"))
        zero_points = self.encode(tensor.q_per_channel_zero_points(), (*path, "zero_points"))
        return {"$quantized": [node, scales, zero_points, tensor.q_per_channel_axis()]}

    def _shard(self, tensor: Any, path: Path) -> str:
        """Return the name of a DTensor. All ranks come to the same names: a tie is one on each of them."""
        if any(placement.is_partial() for placement in tensor.placements):
            _refuse(tensor, path, "its values are not summed over the ranks yet; store tensor.full_tensor()")
        if tensor.dtype not in NATIVE_DTYPES:
            _refuse(tensor, path, f"{tensor.dtype} cannot be sharded; convert it, or store tensor.full_tensor()")
        bare = tensor.detach()
        local = bare.to_local()
        _check_tensor(local, path)
        if not tensor.numel():  # there is nothing to share out
            return self._store(torch.empty(tensor.shape, dtype=tensor.dtype), path)
        # the address tells tensors apart, except empty parts, which have none
        seen = (tensor.shape, tensor.placements, tensor.dtype, local.data_ptr(), local.device)
        for name, other in self._alike.setdefault(seen, []):
            if local.is_set_to(other):
                return name
        name = self._free_name(path)
        self.shards[name] = bare
        self._alike[seen].append((name, local))
        return name

    def _store(self, tensor: Tensor, path: Path) -> str:
        name = self._free_name(path)
        self.tensors[name] = tensor
        return name

    def _free_name(self, path: Path) -> str:
        name = wanted = tensor_name(path)
        n = 1
        while name in self.tensors or name in self.shards or name == "__metadata__":
            n += 1
            name = f"{wanted}#{n}"
        return name

    def _numpy(self, value: Any, path: Path) -> Any:
        dtype = value.dtype.str
        if not NUMPY_DTYPE.fullmatch(dtype) or (value.dtype.kind == "f" and value.dtype.itemsize > 8):
            _refuse(value, path, f"numpy's dtype {value.dtype} is not plain data; convert it")
        import numpy

        if isinstance(value, numpy.generic):
            if value.dtype.kind in "mM":
                _refuse(value, path, "store int(value.astype('int64')) or an ISO string")
            return {"$numpy": [dtype, self.encode(value.item(), path)]}
        if dtype not in NUMPY_NATIVE:
            stored = _bytes_tensor(value.tobytes())
        elif value.flags.c_contiguous and value.flags.writeable:
            stored = torch.from_numpy(value)
        else:
            stored = torch.from_numpy(numpy.array(value, order="C", copy=True))
        return {"$ndarray": [self._store(stored, path), dtype, list(value.shape)]}


_QUANTIZED = {torch.qint8: torch.int8, torch.quint8: torch.uint8, torch.qint32: torch.int32}
"""The integers behind the quantized dtypes."""
_PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
SPARSE_LAYOUTS = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}
_SEQUENCES: dict[type, str] = {tuple: "$tuple", set: "$set", frozenset: "$frozenset", torch.Size: "$size"}


def storable(tensor: Tensor) -> Tensor:
    """Return the tensor as the file holds it: contiguous, on the CPU, complex numbers as pairs of reals.

    One that is such already is not copied.
    """
    plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    return torch.view_as_real(plain) if plain.is_complex() else plain


def _bytes_tensor(data: bytes | bytearray) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def tensor_name(path: Path) -> str:
    """Return the name that the tensor at ``path`` gets in the file, such as ``optimizer.0.state.3.exp_avg``."""
    first, rest = path[0], path[1:]
    if rest:
        first = {"state_dict": "module", "optimizer_states": "optimizer"}.get(first, first)
    name = ".".join((first, *rest))
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode("utf-8")


def _dotted(path: Path) -> str:
    return ".".join(path)


def _check_tensor(tensor: Tensor, path: Path) -> None:
    wraps: bool = is_traceable_wrapper_subclass(tensor)
    if torch.nn.parameter.is_lazy(tensor):
        _refuse(tensor, path, "a lazy module has no weights yet; run one batch through it before saving")
    if _is_dtensor(tensor):
        _refuse(tensor, path, "a sharded tensor belongs in a sharded checkpoint; or store tensor.full_tensor()")
    if tensor.is_nested:
        _refuse(tensor, path, "store its parts, tensor.unbind(), as a list")
    if tensor.layout not in {torch.strided, *SPARSE_LAYOUTS}:
        _refuse(tensor, path, f"its layout {tensor.layout} cannot be written; store tensor.to_dense()")
    if tensor.is_meta:
        _refuse(tensor, path, "it is on the meta device and has no values; materialize it first")
    if wraps:
        _refuse(tensor, path, f"{type(tensor).__name__} wraps other tensors; store those")


def _is_dtensor(tensor: Tensor) -> bool:
    """Whether it is one, without importing what defines them."""
    wraps: bool = is_traceable_wrapper_subclass(tensor)
    return wraps and hasattr(tensor, "full_tensor")


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
