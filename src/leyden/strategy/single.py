"""One process, one device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leyden.strategy.base import Strategy


class SingleDevice(Strategy):
    """One process on one device: every collective is the identity."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.world_size = 1
        self.global_rank = self.local_rank = 0

    def barrier(self, name: str | None = None) -> None:
        """Return at once: there is nobody to wait for."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return ``obj``."""
        return obj

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` with a first dimension of 1."""
        return tensor.unsqueeze(0)
