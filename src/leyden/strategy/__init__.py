"""How a run is spread over processes. For now: not at all."""

from __future__ import annotations

import torch

from leyden.errors import reject
from leyden.strategy.base import Strategy
from leyden.strategy.single import SingleDevice

__all__ = ["SingleDevice", "Strategy"]


def resolve_strategy(strategy: object, device: torch.device) -> Strategy:
    """Turn the Trainer's ``strategy`` argument into a `Strategy`.

    Raises:
        ConfigurationError: for a name that is not known.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if strategy not in ("auto", "single_device"):
        reject("strategy", strategy, "'auto', 'single_device', or a leyden.strategy.Strategy")
    return SingleDevice(device)
