"""Change the number of accumulated batches as training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from leyden.callbacks.callback import Callback
from leyden.errors import ConfigurationError, reject

if TYPE_CHECKING:
    from leyden.module import LightningModule
    from leyden.trainer import Trainer


class GradientAccumulationScheduler(Callback):
    """Set ``trainer.accumulate_grad_batches`` at the start of training epochs.

    ``{0: 8, 4: 4, 8: 1}`` accumulates 8 batches per optimizer step in epochs 0 to 3, 4 in epochs 4 to 7, and 1 from
    epoch 8 on. Before the first epoch named it is 1.

    Args:
        scheduling: from the first epoch (counted from 0) to the number of batches per optimizer step.

    Raises:
        ConfigurationError: ``scheduling`` is empty, an epoch is not an integer >= 0, or a number of batches not one
            >= 1; when training starts, if the Trainer was given ``accumulate_grad_batches`` too, or if the
            module optimizes manually.
    """

    def __init__(self, scheduling: Mapping[int, int]) -> None:
        allowed = "a dict from epoch (integer >= 0) to number of batches (integer >= 1), such as {0: 4, 10: 1}"
        if not isinstance(scheduling, Mapping) or not scheduling:
            reject("scheduling", scheduling, allowed)
        for epoch, batches in scheduling.items():
            if not _is_int(epoch, least=0) or not _is_int(batches, least=1):
                reject("scheduling", dict(scheduling), allowed)
        self.scheduling: dict[int, int] = {0: 1, **scheduling}
        self.epochs: list[int] = sorted(self.scheduling)
        self._set: int | None = None

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """Return the number of batches per optimizer step in ``epoch``."""
        return self.scheduling[max(start for start in self.epochs if start <= epoch)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse two sources of one setting, and set it for a run that resumes within an epoch."""
        # what an earlier fit with this callback left behind is not a second source
        if trainer.accumulate_grad_batches not in (1, self._set):
            raise ConfigurationError(
                f"The Trainer was given accumulate_grad_batches={trainer.accumulate_grad_batches} and a "
                f"GradientAccumulationScheduler({self.scheduling}). Keep one of them."
            )
        if not getattr(pl_module, "automatic_optimization", True) and not trainer._takes_turns:
            raise ConfigurationError(
                "GradientAccumulationScheduler needs automatic optimization. With automatic_optimization=False, "
                "accumulate in training_step and remove the callback."
            )
        self._apply(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the number for this epoch."""
        self._apply(trainer)

    def _apply(self, trainer: Trainer) -> None:
        self._set = self.get_accumulate_grad_batches(trainer.current_epoch)
        trainer.accumulate_grad_batches = self._set


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
