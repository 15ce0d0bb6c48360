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
    skipped_batches: int = 0
    """Training batches whose step returned None, cumulative."""
    skipped_in_window: int = 0
    """Batches of the present window whose step returned None."""
    epoch_ended: bool = False
    """True from the moment the epoch's last hook has run until the next epoch begins."""

    def start_epoch(self) -> None:
        """Set the counters of one epoch to zero, unless the epoch is being resumed in its middle."""
        if self.epoch_ended:
            self.epoch += 1
            self.epoch_ended = False
            self.batch = self.micro_batch = self.skipped_in_window = 0

    def state_dict(self) -> dict[str, Any]:
        """Return all counters as plain integers."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)
