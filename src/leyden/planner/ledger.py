"""What lives in memory, by what it is for: bytes of storages, followed from their first operation to their death."""

from __future__ import annotations

import weakref
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException  # there is no public name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Kind(IntEnum):
    """What a storage is for. What is «divided» is divided among the ranks of a tensor-parallel group."""

    OTHER = 0  # activations, what an operation leaves for its backward pass, the batch, gradients of activations
    DIVIDED = 1
    CAST = 2  # a weight in autocast's format
    DIVIDED_CAST = 3
    GRADIENT = 4  # of a parameter, whole
    DIVIDED_GRADIENT = 5
    WEIGHT = 6  # parameters and buffers: counted elsewhere
    DIVIDED_WEIGHT = 7


_WEIGHTS = frozenset({Kind.WEIGHT, Kind.CAST})
_DIVIDED_WEIGHTS = frozenset({Kind.DIVIDED_WEIGHT, Kind.DIVIDED_CAST})
_GRADIENTS = frozenset({Kind.GRADIENT, Kind.DIVIDED_GRADIENT})


class Moment(NamedTuple):
    """Bytes that live at one moment of a step. The last four are what FSDP would hold besides, see `ShardedUnits`."""

    other: int
    divided: int
    casts: int
    divided_casts: int
    gradients: int
    divided_gradients: int
    unsharded: int = 0
    gathered: int = 0
    open_gradients: int = 0
    reduced: int = 0


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the fake tensors that operations inside of it make.

    Entered after the fake mode, it sees each operation before that does. What a kernel takes for itself while it runs is
    not seen. A number that is read (``.item()``) is taken for 1.

    Attributes:
        moments: what lived after each operation that made something.
        numbers_read: how many, of those that are not known.
        sharding: the last four figures of a `Moment`; whoever follows FSDP's units changes them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moments: list[Moment] = []
        self.sharding = [0, 0, 0, 0]
        self.numbers_read = 0
        self._bytes = [0] * len(Kind)
        self._known: dict[int, tuple[Kind, int, weakref.ref[Any]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, and enter what it made."""
        try:
            output = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            self.numbers_read += 1
            return 1.0 if args[0].is_floating_point() else args[0].dtype is torch.bool or 1
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and not self._knows(leaf)]
        if made:
            kind = self._kind_of_result(
                func, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            )
            for tensor in made:
                self.enter(tensor, kind)
            self.record()
        return output

    def record(self) -> None:
        """Note what lives now."""
        self.moments.append(Moment(*self._bytes[: Kind.WEIGHT], *self.sharding))

    def enter(self, tensor: Tensor, kind: Kind) -> None:
        """Count a tensor's storage as ``kind``, whatever it was counted as before."""
        storage = tensor.untyped_storage()
        key = id(storage)  # torch keeps the Python object for as long as the storage lives
        before = self._known.get(key)
        if before is not None:
            self._bytes[before[0]] -= before[1]
        size = storage.nbytes()
        self._bytes[kind] += size
        self._known[key] = (kind, size, weakref.ref(storage, lambda _: self._gone(key)))

    def kind_of(self, tensor: Tensor) -> Kind:
        """What a tensor's storage is counted as; what is not known is OTHER."""
        known = self._known.get(id(tensor.untyped_storage()))
        return Kind.OTHER if known is None else known[0]

    def is_divided(self, tensor: Tensor) -> bool:
        """Whether each rank of a tensor-parallel group would hold a part of this activation only."""
        return self.kind_of(tensor) in (Kind.DIVIDED, Kind.DIVIDED_GRADIENT)

    def accumulated(self, parameter: Tensor) -> int:
        """Count a parameter's gradient as such; return by how many bytes the gradients have grown."""
        gradient = parameter.grad
        if gradient is None or self.kind_of(gradient) in _GRADIENTS:
            return 0
        divided = self.kind_of(parameter) in _DIVIDED_WEIGHTS
        self.enter(gradient, Kind.DIVIDED_GRADIENT if divided else Kind.GRADIENT)
        return gradient.untyped_storage().nbytes()

    def _knows(self, tensor: Tensor) -> bool:
        return id(tensor.untyped_storage()) in self._known

    def _gone(self, key: int) -> None:
        kind, size, _ = self._known.pop(key)
        self._bytes[kind] -= size

    def _kind_of_result(self, func: Any, inputs: list[Tensor]) -> Kind:
        kinds = {self.kind_of(tensor) for tensor in inputs}
        if func is torch.ops.aten._to_copy.default:
            if kinds & _WEIGHTS:
                return Kind.CAST
            if kinds & _DIVIDED_WEIGHTS:
                return Kind.DIVIDED_CAST
        # A whole activation with a divided weight gives a divided one (a column-wise product, or the backward pass of a row-wise
        # one); a divided activation with a divided weight gives a whole one, once the ranks have added theirs up.
        divided = Kind.DIVIDED in kinds or Kind.DIVIDED_GRADIENT in kinds
        return Kind.DIVIDED if divided != bool(kinds & _DIVIDED_WEIGHTS) else Kind.OTHER
