"""What users subclass, at the place where programs import it from."""

from __future__ import annotations

from leyden.datamodule import LightningDataModule
from leyden.module import LightningModule

__all__ = ["LightningDataModule", "LightningModule"]
