"""Batches: where they come from, how they are moved, how large they are."""

from leyden.data.combined import CombinedLoader
from leyden.data.dataloader import DataLoader
from leyden.data.transfer import batch_size_of, move_to_device

__all__ = ["CombinedLoader", "DataLoader", "batch_size_of", "move_to_device"]
