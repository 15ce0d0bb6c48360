"""How many samples a batch holds."""

from __future__ import annotations

from leyden.data.transfer import batch_size_of as extract_batch_size

__all__ = ["extract_batch_size"]
