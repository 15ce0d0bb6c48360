"""Seeds, and random numbers that leave no trace."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from leyden.seed import isolated_random_state, seed_everything

__all__ = ["isolate_rng", "seed_everything"]


def isolate_rng(include_cuda: bool = True) -> AbstractContextManager[None]:
    """Leave every random generator after this context as it was before.

    Args:
        include_cuda: that of the current CUDA device too, if there is one.
    """
    cuda = include_cuda and torch.cuda.is_available()
    return isolated_random_state(torch.device("cuda", torch.cuda.current_device()) if cuda else None)
