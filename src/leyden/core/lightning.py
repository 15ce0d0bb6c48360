"""`LightningModule`, at the place where programs of 2020 to 2022 import it from."""

from __future__ import annotations

from leyden.module import LightningModule

__all__ = ["LightningModule"]
