"""Tensors within objects that ranks send each other: on the way they are bytes on the CPU, on arrival on the rank's own device.

Torch pickles tensors by its old format there, which knows no unsigned integers of more than 8 bits, and brings a tensor of
``cuda:1`` to ``cuda:1`` whoever receives it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Carried:
    """A tensor on its way."""

    data: Tensor | bytes
    dtype: torch.dtype
    shape: tuple[int, ...]
    on_device: bool


def packed(obj: Any, as_bytes: bool = False) -> Any:
    """The same object with its tensors ready to be sent: those in dicts, lists and tuples, nested as they may be.

    Args:
        obj: what is to be sent.
        as_bytes: whether they are to be plain bytes, for a way on which tensors would be shared instead of copied.
    """
    if isinstance(obj, Tensor) and obj.layout is torch.strided:
        held = obj.detach().cpu().contiguous()
        data = held.reshape(-1).view(torch.uint8) if held.numel() else torch.empty(0, dtype=torch.uint8)
        sent = ctypes.string_at(data.data_ptr(), data.numel()) if as_bytes else data.clone()
        return Carried(sent, obj.dtype, tuple(obj.shape), obj.device.type != "cpu")
    return _mapped(lambda item: packed(item, as_bytes), obj)


def unpacked(obj: Any, device: torch.device) -> Any:
    """What `packed` was given, with tensors that were on a device on ``device``."""
    if isinstance(obj, Carried):
        value = (_from_bytes(obj.data) if isinstance(obj.data, bytes) else obj.data).view(obj.dtype).reshape(obj.shape)
        return value.to(device) if obj.on_device else value
    return _mapped(lambda item: unpacked(item, device), obj)


def _from_bytes(data: bytes) -> Tensor:
    # in memory of its own, since that of bytes may not be written to
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _mapped(function: Any, obj: Any) -> Any:
    if type(obj) is dict:
        return {key: function(value) for key, value in obj.items()}
    if type(obj) in (list, tuple):
        return type(obj)(function(item) for item in obj)
    return obj
