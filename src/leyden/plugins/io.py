"""Reading and writing checkpoints, apart from a Trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from leyden.errors import no_such_name

__all__ = ["CheckpointIO"]

_ABSENT = {
    "AsyncCheckpointIO": "checkpoints are always written in the background; leave it out",
    "TorchCheckpointIO": "checkpoints have one format, whose files no pickle is in; leave it out",
    "XLACheckpointIO": "checkpoints of TPUs are like all others; leave it out",
}


def __getattr__(name: str) -> object:
    return no_such_name(__name__, name, _ABSENT)


class CheckpointIO(ABC):
    """Base of a program's own way to keep checkpoints, for its own use.

    A `Trainer` refuses it: it writes one format, atomically, and verifies it on load. ``ModelCheckpoint(dirpath="s3://…")``
    writes to other file systems, and `on_save_checkpoint` adds to what is written.
    """

    @abstractmethod
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""

    @abstractmethod
    def load_checkpoint(self, path: Any, map_location: Any = None) -> dict[str, Any]:
        """Read a checkpoint."""

    @abstractmethod
    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""

    def teardown(self) -> None:
        """Called by the program when it is done."""
