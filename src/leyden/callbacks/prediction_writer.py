"""Base class of callbacks that write predictions as they are made, or all of them at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from leyden.callbacks.callback import Callback
from leyden.errors import HookError, reject

if TYPE_CHECKING:
    from leyden.module import LightningModule
    from leyden.trainer import Trainer


class BasePredictionWriter(Callback):
    """Subclass it and implement `write_on_batch_end`, `write_on_epoch_end`, or both.

    For large data write by batch, together with ``trainer.predict(..., return_predictions=False)``, so that no
    prediction is kept in memory.

    Args:
        write_interval: which of the two methods is called: ``"batch"``, ``"epoch"`` or ``"batch_and_epoch"``.

    Raises:
        ConfigurationError: ``write_interval`` is none of these.
        HookError: when predicting begins, if a method that will be called is not implemented.
    """

    def __init__(self, write_interval: Literal["batch", "epoch", "batch_and_epoch"] = "batch") -> None:
        if write_interval not in ("batch", "epoch", "batch_and_epoch"):
            reject("write_interval", write_interval, "'batch', 'epoch' or 'batch_and_epoch'")
        self.interval: Literal["batch", "epoch", "batch_and_epoch"] = write_interval

    @property
    def wants_all(self) -> bool:
        """Whether predictions must be kept for the end."""
        return self.interval != "batch"

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write what `predict_step` returned for one batch.

        Args:
            trainer: the trainer.
            pl_module: the module.
            prediction: what `predict_step` returned.
            batch_indices: positions of the batch's samples in the data set; None if they are not known.
            batch: the batch, on the device.
            batch_idx: number of the batch within its loader.
            dataloader_idx: number of the loader.
        """
        raise self._not_implemented("write_on_batch_end")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any] | None,
    ) -> None:
        """Write all predictions.

        Args:
            trainer: the trainer.
            pl_module: the module.
            predictions: one entry per batch; with several loaders a list of these per loader.
            batch_indices: positions of the samples in the data set, for each batch of each loader.
        """
        raise self._not_implemented("write_on_epoch_end")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a missing method before the first batch instead of after the last."""
        if stage != "predict":
            return
        for part in self.interval.split("_and_"):
            name = f"write_on_{part}_end"
            if getattr(type(self), name) is getattr(BasePredictionWriter, name) and name not in self.__dict__:
                raise self._not_implemented(name)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Hand one prediction to `write_on_batch_end`."""
        if self.interval != "epoch":
            indices = trainer.predict_batch_indices
            self.write_on_batch_end(trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand all predictions to `write_on_epoch_end`."""
        if self.wants_all:
            self.write_on_epoch_end(trainer, pl_module, trainer.predictions, trainer.epoch_batch_indices)

    def _not_implemented(self, name: str) -> HookError:
        own = type(self).__name__
        return HookError(f"{own}(write_interval={self.interval!r}) calls {name}: implement it in {own}.")
