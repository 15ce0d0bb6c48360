"""`LightningOptimizer`, what `LightningModule.optimizers` gives out, at the place where programs import it from."""

from __future__ import annotations

from leyden.optimizers import LightningOptimizer

__all__ = ["LightningOptimizer"]
