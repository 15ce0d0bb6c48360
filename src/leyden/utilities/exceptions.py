"""The exceptions that programs catch and raise; leyden's own are in `leyden.errors`."""

from __future__ import annotations

from leyden.errors import MisconfigurationException, SIGTERMException

__all__ = ["MisconfigurationException", "SIGTERMException"]
