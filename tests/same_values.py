"""Whether two nested values are the same to the bit: what a checkpoint must give back."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import torch


def same(a: Any, b: Any) -> bool:
    """Equal in value, type, layout and order, NaN being equal to itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return same_tensor(a, b)
    if isinstance(a, float):
        return a.hex() == b.hex()
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, dict):
        return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    if isinstance(a, list | tuple | collections.deque):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return bool(a == b)


def same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape, layout and every bit; for sparse and quantized tensors in each of their parts."""
    if (a.dtype, a.shape, a.layout) != (b.dtype, b.shape, b.layout):
        return False
    if a.layout is torch.sparse_coo:
        flags = a.is_coalesced() == b.is_coalesced()
        return flags and same_tensor(a._indices(), b._indices()) and same_tensor(a._values(), b._values())
    if a.layout is not torch.strided:
        by_row = a.layout in (torch.sparse_csr, torch.sparse_bsr)
        names = ("crow_indices", "col_indices", "values") if by_row else ("ccol_indices", "row_indices", "values")
        return all(same_tensor(getattr(a, name)(), getattr(b, name)()) for name in names)
    if a.is_quantized:
        if a.qscheme() is not b.qscheme() or not torch.equal(a.int_repr(), b.int_repr()):
            return False
        if a.qscheme() is torch.per_tensor_affine:
            return (a.q_scale(), a.q_zero_point()) == (b.q_scale(), b.q_zero_point())
        channels = a.q_per_channel_axis() == b.q_per_channel_axis()
        scales = same_tensor(a.q_per_channel_scales(), b.q_per_channel_scales())
        return channels and scales and same_tensor(a.q_per_channel_zero_points(), b.q_per_channel_zero_points())
    return torch.equal(bits(a), bits(b))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a dense tensor in the order of its elements."""
    if not tensor.numel():
        return torch.empty(0, dtype=torch.uint8)
    if tensor.itemsize == 1 and tensor.dtype is not torch.bool:  # torch cannot move the rarer ones
        tensor = tensor.view(torch.uint8)
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return flat.view(tensor.shape).copy_(tensor).reshape(-1).view(torch.uint8)
