"""`LightningModule`, at the place where programs import it from."""

from __future__ import annotations

from leyden.module import LightningModule

__all__ = ["LightningModule"]
