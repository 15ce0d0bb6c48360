"""Plain counters of a run: where it stands, in epochs, batches and optimizer steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class Progress:
    """Where training stands.

    A *step* is one optimizer step: one window of accumulated batches, or in manual optimization a batch in
    which some optimizer stepped.
    """

    epoch: int = 0
    """Epochs completed before the present one."""
    batch: int = 0
    """Batches done in the present epoch."""
    micro_batch: int = 0
    """Batches accumulated in the present window, of which no step has been made yet."""
    global_step: int = 0
    """Optimizer steps, cumulative."""
    total_batches: int = 0
    """Training batches, cumulative over epochs."""
    validation_batches: int = 0
    """Validation batches, cumulative over validations: the x axis of their step values."""
    skipped_batches: int = 0
    """Training batches whose step returned None, or which ``nan_policy`` left out, cumulative."""
    skipped_in_window: int = 0
    """Batches of the present window whose step returned None."""
    dropped_in_a_row: int = 0
    """Windows that ``nan_policy`` left out since the last step."""
    rolled_back_to: int = -1
    """Step of the checkpoint that ``nan_policy="rollback"`` went back to last; -1 if it never did."""
    rollbacks: int = 0
    """How often it went back to that one."""
    parts_per_batch: int = 1
    """In how many parts ``oom_policy="halve"`` trains on a batch."""
    epoch_ended: bool = False
    """True from the moment the epoch's last hook has run until the next epoch begins."""

    def start_epoch(self) -> None:
        """Set the counters of one epoch to zero, unless the epoch is being resumed in its middle."""
        if self.epoch_ended:
            self.epoch += 1
            self.epoch_ended = False
            self.batch = self.micro_batch = self.skipped_in_window = 0

    def where(self, batch_idx: int | None = None) -> str:
        """The present batch, or another one of the epoch, in words for messages."""
        return f"epoch {self.epoch}, batch_idx {self.batch if batch_idx is None else batch_idx}, after {self.global_step} steps"

    def state_dict(self) -> dict[str, Any]:
        """Return all counters as plain integers."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)
