"""Small modules and data, for bug reports and first tries."""

from __future__ import annotations

from leyden.demos.boring_classes import BoringDataModule, BoringModel, DemoModel

__all__ = ["BoringDataModule", "BoringModel", "DemoModel"]
