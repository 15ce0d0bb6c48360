"""What the engine asks of a strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Strategy(ABC):
    """How the processes of a run share their work: who they are, and how they talk."""

    world_size: int
    global_rank: int
    local_rank: int
    device: torch.device

    @property
    def is_global_zero(self) -> bool:
        """Whether this process is the one that writes logs and files."""
        return self.global_rank == 0

    @abstractmethod
    def barrier(self, name: str | None = None) -> None:
        """Wait until every process is here."""

    @abstractmethod
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return the object that rank ``src`` passed in."""

    @abstractmethod
    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, stacked in a new first dimension of ``world_size``."""
