"""How a run is spread over processes. For now: not at all."""

from leyden.strategy.base import Strategy
from leyden.strategy.single import SingleDevice

__all__ = ["SingleDevice", "Strategy"]
