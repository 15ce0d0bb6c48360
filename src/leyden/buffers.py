"""A copy of a module's buffers, for what must be able to undo a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leyden.shards import local_part


class BufferBackup:
    """A copy of a module's buffers, such as BatchNorm's statistics, into memory that is allocated once.

    Args:
        module: whose buffers; those that are registered before the first `save`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._places: list[tuple[dict[str, Tensor | None], str]] | None = None
        self._originals: list[Tensor | None] = []
        self._live: list[Tensor] = []
        self._copies: list[Tensor] = []

    @torch.no_grad()
    def save(self) -> None:
        """Copy the buffers as they are now."""
        if self._places is None:
            self._places = [(owner._buffers, name) for owner in self._module.modules() for name in owner._buffers]
        self._originals = [buffers.get(name) for buffers, name in self._places]
        self._live = list({id(buffer): buffer for buffer in self._originals if buffer is not None}.values())
        if [*map(_kind, self._live)] != [*map(_kind, self._copies)]:
            self._copies = [torch.empty_like(buffer) for buffer in self._live]
        if self._live:
            copy_values(self._copies, self._live)

    @torch.no_grad()
    def put_back(self) -> None:
        """Let the buffers be the tensors that they were, with what they held at the last `save`."""
        for (buffers, name), original in zip(self._places or (), self._originals, strict=True):
            buffers[name] = original
        if self._live:
            copy_values(self._live, self._copies)


def copy_values(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy the values of tensors into others of their shapes, in one call; of those that ranks have parts of, this rank's.

    torch_xla 2.9 would let both have one buffer, and free it when either is changed in place («buffer is deleted»). What is
    computed, if only by a product with 1, gets a buffer of its own.
    """
    apart = [source * 1 if source.device.type == "xla" else local_part(source) for source in sources]
    torch._foreach_copy_([local_part(target) for target in targets], apart)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout
