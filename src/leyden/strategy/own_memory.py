"""Memory of a process's own for what it was sent: torch sends tensors by letting both sides share them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from leyden.module import LightningModule
    from leyden.trainer import Trainer


def make_own(trainer: Trainer, module: LightningModule) -> None:
    """Give this rank memory of its own for all that it changes."""
    shared = set()
    if trainer.strategy.shares_weights:
        shared = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    for part in (module, *trainer.callbacks):
        take_out_of_shared_memory(tensor for tensor in _tensors_of(part) if id(tensor) not in shared)


def take_out_of_shared_memory(tensors: Iterable[Tensor]) -> None:
    """Give tensors memory of this process alone, in place; views of one memory stay so.

    What is sent to a new process lies in memory that all of them share from then on, so that each step of one rank would change
    the weights of the others.
    """
    copies: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.layout is torch.strided and tensor.is_shared():  # type: ignore[no-untyped-call]
            held = tensor.untyped_storage()
            if held.data_ptr() not in copies:
                copies[held.data_ptr()] = torch.UntypedStorage(held.nbytes()).copy_(held)  # type: ignore[no-untyped-call]
            own = torch.empty(0, dtype=tensor.dtype)
            own.set_(copies[held.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride())
            tensor.data = own


def _tensors_of(part: object) -> Iterator[Tensor]:
    """Those of a module, or of what a callback holds; metric objects keep theirs in plain attributes."""
    if isinstance(part, nn.Module):
        for each in part.modules():
            yield from _tensors_in(vars(each).values())
    elif hasattr(part, "__dict__"):
        for value in vars(part).values():
            yield from _tensors_of(value) if isinstance(value, nn.Module) else _tensors_in([value])


def _tensors_in(values: Iterable[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            yield from _tensors_in(value.values() if isinstance(value, dict) else value)
