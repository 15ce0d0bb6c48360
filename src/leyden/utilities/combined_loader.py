"""`CombinedLoader`: several loaders read as one."""

from __future__ import annotations

from leyden.data.combined import CombinedLoader

__all__ = ["CombinedLoader"]
