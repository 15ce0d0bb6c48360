"""Tensors of which each rank has a part (torch's DTensors): telling them, cutting whole ones, and norms over all parts.

torch.distributed.tensor is never imported for the sake of a question: where nobody has imported it there are no DTensors.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether this is a DTensor."""
    there = sys.modules.get("torch.distributed.tensor")
    return there is not None and isinstance(tensor, there.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of it, if it is not a DTensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def cut_like(value: Any, like: Any) -> Any:
    """Bring a tensor of ``like``'s shape into its form: this rank's part, on its device. Others stay as they are.

    A whole tensor must be the same on all ranks. One that is sharded otherwise is exchanged, which is a collective.
    """
    if not isinstance(value, Tensor) or not isinstance(like, Tensor) or value.shape != like.shape:
        return value
    if not is_sharded(like):
        return value.full_tensor() if is_sharded(value) else value
    if is_sharded(value):
        if value.device_mesh == like.device_mesh and value.placements == like.placements:
            return value
        value = value.full_tensor()
    from torch.distributed.tensor import DTensor, distribute_tensor

    part = distribute_tensor(value.detach(), like.device_mesh, like.placements, src_data_rank=None)
    device = like.to_local().device
    if part.to_local().device == device:
        return part
    # of parameters that are kept in the host's memory the mesh is one of GPUs all the same
    local, layout = part.to_local().to(device), (like.shape, like.stride())
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=layout[0], stride=layout[1]
    )


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all tensors together, the same on each rank; a collective for each way in which tensors are sharded.

    torch's own puts tensors into one list, in which those of different meshes, and whole ones, cannot stand together.
    """
    parts: dict[tuple[Any, tuple[int, ...]], list[Tensor]] = {}
    for tensor in tensors:
        mesh: Any = None
        dims: tuple[int, ...] = ()
        part = tensor
        if is_sharded(tensor):
            if any(placement.is_partial() for placement in tensor.placements):
                part = tensor.full_tensor()
            else:
                part, mesh = tensor.to_local(), tensor.device_mesh
                dims = tuple(dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate())
        parts.setdefault((mesh if dims else None, dims), []).append(part)
    squares = []
    for (mesh, dims), group in parts.items():
        square = torch.nn.utils.get_total_norm([part for part in group if part.numel()]).to(group[0].device).square()
        for dim in dims:
            torch.distributed.all_reduce(square, group=mesh.get_group(dim))
        squares.append(square)
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()


def clip_norm(gradients: Sequence[Tensor], most: float) -> Tensor:
    """Scale gradients in place so that their norm is at most ``most``, as `torch.nn.utils.clip_grad_norm_` does; return it."""
    norm = total_norm(gradients)
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        part = local_part(gradient)
        part.mul_(factor.to(part.device))
    return norm


def clip_value(gradients: Sequence[Tensor], most: float) -> None:
    """Clamp each element of gradients in place."""
    for gradient in gradients:
        local_part(gradient).clamp_(-most, most)
