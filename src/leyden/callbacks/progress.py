"""Progress bars, under the name that programs import."""

from __future__ import annotations

from leyden.callbacks.progress_bar import ProgressBar, RichProgressBar
from leyden.errors import reject

__all__ = ["ProgressBar", "RichProgressBar", "TQDMProgressBar"]


class TQDMProgressBar(RichProgressBar):
    """`RichProgressBar` under the arguments of tqdm's.

    Args:
        refresh_rate: 0 shows no bar. How often it is drawn is a matter of seconds, see `RichProgressBar`, and not of batches.
        process_position: accepted for compatibility.
        leave: accepted for compatibility: a line stays of each epoch.

    Raises:
        ConfigurationError: if ``refresh_rate`` is negative.
    """

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        if refresh_rate < 0:
            reject("refresh_rate", refresh_rate, "a number of batches, or 0 for no bar")
        super().__init__()
        self.refresh_rate = refresh_rate
        self.process_position = process_position
        if not refresh_rate:
            self.disable()
