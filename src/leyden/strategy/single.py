"""One process, one device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from leyden import xla
from leyden.strategy.base import Layout, Strategy

if TYPE_CHECKING:
    from leyden.module import LightningModule
    from leyden.run import Evaluation, Run
    from leyden.settings import Settings


class SingleDevice(Strategy):
    """One process on one device: every collective is the identity.

    Args:
        device: known later, from the Trainer, if it is left out.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        if device is not None:
            self.device = device

    def settle(self, layout: Layout) -> None:
        """Take the one device."""
        self.device = layout.device

    def prepare_module(self, module: LightningModule, settings: Settings) -> None:
        """Bring the module to the device, in place."""
        if self.device.type == "xla":
            xla.check_settings(settings)
            xla.move_module(module, self.device)
        else:
            super().prepare_module(module, settings)

    def wire(self, run: Run, settings: Settings, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        """Where operations are only recorded, have them run at the end of each step."""
        if self.device.type == "xla":
            xla.sync_each_step(run)
        return optimizers

    def wire_evaluation(self, evaluation: Evaluation) -> None:
        """Where operations are only recorded, have them run at the end of each batch."""
        if self.device.type == "xla":
            xla.sync_each_batch(evaluation)

    def barrier(self, name: str | None = None) -> None:
        """Return at once: there is nobody to wait for."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return ``obj``."""
        return obj

    def all_gather(self, tensor: Tensor, sync_grads: bool = False) -> Tensor:
        """Return ``tensor`` with a first dimension of 1."""
        return tensor.unsqueeze(0)

    def reduce(self, tensor: Tensor, reduce_op: str = "mean") -> Tensor:
        """Return ``tensor``."""
        return tensor

    def gather_objects(self, obj: Any) -> list[Any]:
        """Return ``obj`` in a list."""
        return [obj]

    def highest(self, numbers: Sequence[int]) -> list[int]:
        """Return ``numbers``."""
        return list(numbers)
