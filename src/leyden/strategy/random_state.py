"""Random numbers of several ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from leyden.seed import capture_random_state, derived_seed, seed_all

if TYPE_CHECKING:
    from leyden.strategy.base import Strategy


def spread_random_state(strategy: Strategy, device: torch.device) -> None:
    """Let every rank but the first draw random numbers of its own; rank 0 draws those of one process."""
    if strategy.world_size == 1:
        return
    seed = strategy.broadcast(derived_seed(bytes(capture_random_state()["torch"].tolist())))
    if strategy.data_rank > 0:  # ranks that compute one sample together need the same dropout
        own = derived_seed(seed, "rank", strategy.data_rank)
        seed_all(own)
        if device.type == "cuda":
            torch.cuda.manual_seed(own)
