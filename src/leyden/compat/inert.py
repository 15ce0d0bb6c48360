"""What a pickle may name, and the inert thing that each name stands for. No name makes anything run or be imported.

What is handed to the unpickler is one of: an immutable class of the interpreter's own, such as `set`; a `_Maker`, which checks
its arguments and returns plain data or a placeholder; a class whose instances only note what they are given. None can be
changed by the file: a pickle may set the state of any object on its stack, classes and functions included.
"""

from __future__ import annotations

import collections
import datetime
import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from leyden.compat.scan import said
from leyden.errors import CheckpointError

_LIGHTNING = frozenset({"lightning", "lightning_fabric", "lightning_lite", "pytorch_lightning", "lightning_utilities"})
_TOLERATED = _LIGHTNING | {"omegaconf", "typing"}
"""Packages whose classes are known to hold plain data: a stand-in notes it."""
_NUMPY_CODE = re.compile(r"[biufcSU]\d+|M8|m8")


class Frozen(type):
    """Classes that a file cannot change."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise AttributeError(f"{name} cannot be set")

    def __delattr__(cls, name: str) -> None:
        raise AttributeError(f"{name} cannot be deleted")


class Sealed:
    """What is no data, and has no state that a file could set."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise CheckpointError(f"malformed: it sets the state of a {type(self).__name__}")


class _File(Protocol):
    """Where tensors are made: `leyden.compat.pickles.Pickled`."""

    def tensor(self, storage: Storage, offset: int, size: Any, stride: Any, dtype: torch.dtype | None) -> Tensor: ...


class _Maker(Sealed):
    """A function that a file may call."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class Deferred(Sealed):
    """What will be a tensor: ``make`` gets the file, and what makes a tensor of another placeholder."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[[_File, Callable[[Any], Tensor]], Tensor]) -> None:
        self.make = make


class StorageType(Sealed):
    """A kind of storage, by its dtype."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


@dataclass(frozen=True)
class Storage(Sealed):
    """A storage in the file: its key, and its part from element ``start`` on."""

    key: str
    dtype: torch.dtype
    start: int
    numel: int


class StandIn(metaclass=Frozen):
    """An object of a foreign class, as what it was given."""

    full = ""
    tolerated = False

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:  # noqa: D102
        made = super().__new__(cls)
        made.args, made.state = args, None  # here: pickles leave __init__ out
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any) -> StandIn:  # noqa: D102
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Take what is put into it, as lists do."""

    def add(self, value: Any) -> None:
        """Take what is put into it, as sets do."""


def stand_in(full: str) -> Any:
    """Return an inert class for a name; ``tolerated`` if a checkpoint may have it."""
    tolerated = full.partition(".")[0] in _TOLERATED or full in _KNOWN_CLASSES
    return Frozen(full.rpartition(".")[2], (StandIn,), {"full": full, "tolerated": tolerated})


class Attributes(dict[Any, Any], metaclass=Frozen):
    """Lightning's dict whose items are attributes."""

    def __setstate__(self, state: Any) -> None:
        pass


class Namespace(metaclass=Frozen):
    """An `argparse.Namespace`."""

    def __new__(cls, *args: Any) -> Namespace:  # noqa: D102
        made = super().__new__(cls)
        made.state = {}
        return made

    state: dict[Any, Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


class DType(Sealed):
    """A NumPy dtype, by its name such as ``<f8``."""

    __slots__ = ("_code", "_order")

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not (_NUMPY_CODE.fullmatch(code) or code in ("b1", "O8")):
            raise CheckpointError(f"it holds a NumPy array of dtype {said(code)}. Save numbers or strings, or a tensor")
        self._code, self._order = code, "|"

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "|", "=") or (len(state) > 8 and state[8] is not None):
            raise CheckpointError(
                f"it holds a NumPy array whose dtype has the state {said(state)}. Save it as a tensor"
            )
        self._order = order

    @property
    def name(self) -> str:
        """As ``numpy.dtype`` takes it."""
        return self._order + self._code


class Array(Sealed):
    """A NumPy array, or a scalar if ``of_one``."""

    __slots__ = ("of_one", "state")

    def __init__(self, state: Any, of_one: bool) -> None:
        self.state, self.of_one = state, of_one

    def __setstate__(self, state: Any) -> None:
        self.state = state


def array_of(given: Any) -> Any:
    """Return the NumPy array or scalar that a placeholder means; None for anything else.

    Raises:
        CheckpointError: malformed, of objects, or there is no NumPy here.
    """
    if not isinstance(given, Array):
        return None
    if not isinstance(given.state, tuple) or len(given.state) != 5:
        raise CheckpointError("malformed: a NumPy array without its data")
    _, shape, dtype, fortran, data = given.state
    if not isinstance(dtype, DType) or not isinstance(data, bytes) or dtype.name.endswith("O8"):
        raise CheckpointError("it holds a NumPy array of objects. Save numbers or strings, or a list")
    if importlib.util.find_spec("numpy") is None:
        raise CheckpointError("it holds a NumPy array, and NumPy is not installed: pip install numpy")
    import numpy

    lengths = _whole(shape)
    plain = numpy.dtype(dtype.name)
    if math.prod(lengths) * plain.itemsize != len(data):
        raise CheckpointError("damaged: a NumPy array whose data does not have its shape")
    array = numpy.frombuffer(data, plain).reshape(lengths, order="F" if fortran else "C").copy()
    return array[()] if given.of_one else array


def known(module: str, name: str) -> Any:
    """Return what a name in a file stands for; None if it is not in the table."""
    if name == "AttributeDict" and module.partition(".")[0] in _LIGHTNING:
        return Attributes
    if module in ("torch", "torch.cuda") and name in _STORAGES:
        return _STORAGES[name]
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    return _TABLE.get(f"{module}.{name}")


# What the file may call


def _whole(numbers: Any) -> tuple[int, ...]:
    if not isinstance(numbers, (list, tuple)) or not all(
        type(number) is int and 0 <= number < 2**63 for number in numbers
    ):
        raise CheckpointError(f"malformed: {said(numbers)} instead of whole numbers")
    return tuple(numbers)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Deferred:
    return _strided(storage, offset, size, stride, None, rest[2] if len(rest) > 2 else None)


def _tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Deferred:
    """As `_tensor`, with the dtype apart: a storage of plain bytes."""
    return _strided(storage, offset, size, stride, rest[2], rest[3] if len(rest) > 3 else None)


def _strided(storage: Any, offset: Any, size: Any, stride: Any, dtype: Any, lazily: Any) -> Deferred:
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype | None):
        raise CheckpointError("malformed: a tensor without its storage")
    lazily = lazily if isinstance(lazily, dict) else {}

    def make(file: _File, _: Callable[[Any], Tensor]) -> Tensor:
        made = file.tensor(storage, offset, size, stride, dtype)
        made = made.conj() if lazily.get("conj") else made
        return torch._neg_view(made) if lazily.get("neg") else made

    return Deferred(make)


def _sparse(layout: Any, parts: Any) -> Deferred:
    if not isinstance(parts, tuple):
        raise CheckpointError(f"malformed: a sparse tensor of {said(parts)}")

    def make(file: _File, tensor: Callable[[Any], Tensor]) -> Tensor:
        if layout is torch.sparse_coo:
            indices, values, size, *coalesced = parts
            made = torch.sparse_coo_tensor(tensor(indices), tensor(values), _whole(size), check_invariants=True)
            return made._coalesced_(bool(coalesced and coalesced[0]))
        first, second, values, size = parts
        return torch.sparse_compressed_tensor(
            tensor(first), tensor(second), tensor(values), _whole(size), layout=layout, check_invariants=True
        )

    return Deferred(make)


def _first(value: Any, *_: Any) -> Any:
    """Of a parameter, or a tensor that was brought to the CPU: the tensor."""
    return value


def _with_attributes(function: Any, _: Any, args: Any, *__: Any) -> Any:
    """A tensor with attributes, which are left out."""
    if not isinstance(function, _Maker) or not isinstance(args, tuple):
        raise CheckpointError("malformed: a tensor that is made by something else")
    return function(*args)


def _layout(name: Any) -> torch.layout:
    layouts = (torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
    found = {str(layout): layout for layout in layouts}.get(name) if isinstance(name, str) else None
    if found is None:
        raise CheckpointError(f"malformed: the layout {said(name)}")
    return found


def _device(kind: Any, index: Any = None) -> torch.device:
    if not isinstance(kind, str) or not (index is None or type(index) is int):
        raise CheckpointError(f"malformed: the device {said(kind)}")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _encoded(text: Any, encoding: Any = "utf-8") -> bytes:
    """Bytes, as protocol 2 writes them. Other encodings would be looked up among modules."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8"):
        raise CheckpointError(f"malformed: bytes in the encoding {said(encoding)}")
    return text.encode(encoding)


def _bytearray(data: Any = b"", *encoding: Any) -> bytes:
    if isinstance(data, str):
        return _encoded(data, *encoding)
    if not isinstance(data, bytes):  # a number would take that much memory
        raise CheckpointError("malformed: a bytearray that is not made of bytes")
    return data


def _annealing(owner: Any, name: Any) -> str:
    """The one attribute that checkpoints look up: the method of a OneCycleLR, which older versions of torch saved."""
    if getattr(owner, "full", None) != ONE_CYCLE or name not in ("_annealing_cos", "_annealing_linear"):
        raise CheckpointError(
            f"it looks up the attribute {said(name)} with builtins.getattr, which no checkpoint needs and harmful files use to "
            "run code. Nothing of it was run"
        )
    return f"OneCycleLR.{name}"


def _texts(parts: tuple[Any, ...]) -> tuple[str, ...]:
    if not all(isinstance(part, str) for part in parts):
        raise CheckpointError(f"malformed: a path of {said(parts)}")
    return parts


def _path(*parts: Any) -> pathlib.PurePath:
    return pathlib.Path(*_texts(parts))


def _windows_path(*parts: Any) -> pathlib.PurePath:
    path = pathlib.PureWindowsPath(*_texts(parts))
    return pathlib.Path(path) if os.name == "nt" else path


def _items(given: Any = ()) -> list[Any] | tuple[Any, ...]:
    if not isinstance(given, (list, tuple)):  # a range of a few bytes would fill the memory
        raise CheckpointError(f"malformed: a container that is made of a {type(given).__name__}")
    return given


def _counter(counts: Any = ()) -> Any:
    return collections.Counter(_pairs(counts))


def _pairs(items: Any) -> dict[Any, Any]:
    return dict(items if isinstance(items, dict) else _items(items))


def _scalar(dtype: Any, data: Any) -> Array:
    return Array((1, (), dtype, False, data), True)


ONE_CYCLE = "torch.optim.lr_scheduler.OneCycleLR"
_KNOWN_CLASSES = frozenset({ONE_CYCLE, "numpy.ndarray", "torch.Tensor", "torch.nn.parameter.Parameter"}) | {
    f"builtins.{each}" for each in ("bool", "dict", "float", "int", "list", "object", "str", "tuple")
}
"""Classes that are mentioned and not called."""
_PATHS: Sequence[str] = ("pathlib", "pathlib._local")
_NUMPY: Sequence[str] = ("numpy.core.multiarray", "numpy._core.multiarray")
_DTYPES = {str(each).removeprefix("torch."): each for each in vars(torch).values() if isinstance(each, torch.dtype)}
_STORAGES = {
    f"{name}Storage": StorageType(dtype)
    for name, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64,
    }.items()
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _encoded,
    "builtins.bytearray": _bytearray,
    "builtins.bytes": lambda: b"",  # as protocol 2 writes none
    "builtins.getattr": _annealing,
    "builtins.frozenset": lambda items=(): frozenset(_items(items)),
    "builtins.set": lambda items=(): set(_items(items)),
    "collections.Counter": _counter,
    "collections.defaultdict": lambda factory=None, items=(): _pairs(items),
    "collections.OrderedDict": lambda items=(): collections.OrderedDict(_items(items)),
    "collections.deque": lambda items=(), length=None: collections.deque(_items(items), length),
    "numpy.dtype": DType,
    "torch.Size": lambda lengths=(): torch.Size(_whole(lengths)),
    "torch.device": _device,
    "torch.serialization._get_layout": _layout,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    **{f"{module}._reconstruct": lambda *_: Array(None, False) for module in _NUMPY},
    **{f"{module}.scalar": _scalar for module in _NUMPY},
    **{f"{module}.{kind}Path": _path for module in _PATHS for kind in ("", "Posix", "Pure", "PurePosix")},
    **{f"{module}.{kind}WindowsPath": _windows_path for module in _PATHS for kind in ("", "Pure")},
}
_TABLE: dict[str, Any] = {
    # immutable classes, called with what they are made of
    **{f"builtins.{each.__name__}": each for each in (complex, range)},
    **{f"datetime.{each}": getattr(datetime, each) for each in ("date", "datetime", "time", "timedelta", "timezone")},
    # classes whose objects only note what they are given
    "argparse.Namespace": Namespace,
    "torch.storage.UntypedStorage": StorageType(torch.uint8),
    **{name: _Maker(function) for name, function in _FUNCTIONS.items()},
}
