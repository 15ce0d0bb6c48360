"""Saving and reading the state of a run: the file format, safe writing, and which files are kept."""

from leyden.checkpoint.format import load_checkpoint, read_metadata
from leyden.checkpoint.store import copy_checkpoint, link_checkpoint, newest, remove, write_checkpoint

__all__ = [
    "copy_checkpoint",
    "link_checkpoint",
    "load_checkpoint",
    "newest",
    "read_metadata",
    "remove",
    "write_checkpoint",
]
