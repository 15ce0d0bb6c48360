"""`LightningDataModule`, at the place where programs import it from."""

from __future__ import annotations

from leyden.datamodule import LightningDataModule

__all__ = ["LightningDataModule"]
