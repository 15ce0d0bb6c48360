"""The moments of a run that a LightningModule can hook into; each does nothing until it is overridden."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from leyden.data.transfer import move_to_device


class ModuleHooks(nn.Module):
    """The lifecycle part of `LightningModule`: abstract, and there only so that the steps have a page of their own."""

    # Batches on their way to the device

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch before it goes to the device; return it."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to the device; return it. Override for batches of your own kind without ``.to``."""
        return move_to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch that is on the device, e.g. augment it there; return it."""
        return batch

    # Training

    def on_fit_start(self) -> None:
        """Called once when `fit` begins, after the optimizers were built and a checkpoint was applied."""

    def on_fit_end(self) -> None:
        """Called once when `fit` ends."""

    def on_train_start(self) -> None:
        """Called before the first training epoch."""

    def on_train_end(self) -> None:
        """Called after the last training epoch."""

    def on_train_epoch_start(self) -> None:
        """Called before the first batch of each training epoch."""

    def on_train_epoch_end(self) -> None:
        """Called after the last batch of each training epoch and its validation; may log."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Called with each training batch, on the device. Return -1 to skip the rest of the epoch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Called after each training batch with what `training_step` returned, the loss detached."""

    def on_validation_model_zero_grad(self) -> None:
        """Free the gradients before a validation inside of training."""
        self.zero_grad()

    # Validation

    def on_validation_model_eval(self) -> None:
        """Set eval mode before validation."""
        self.eval()

    def on_validation_model_train(self) -> None:
        """Override to set modes after validation yourself; else every submodule gets back the mode that it had."""

    def on_validation_start(self) -> None:
        """Called when validation begins."""

    def on_validation_end(self) -> None:
        """Called when validation ends."""

    def on_validation_epoch_start(self) -> None:
        """Called before the first validation batch."""

    def on_validation_epoch_end(self) -> None:
        """Called after the last validation batch."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called with each validation batch, on the device."""

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called after each validation batch with what the step returned."""

    # Testing

    def on_test_model_eval(self) -> None:
        """Set eval mode before testing."""
        self.eval()

    def on_test_model_train(self) -> None:
        """Override to set modes after testing yourself; else every submodule gets back the mode that it had."""

    def on_test_start(self) -> None:
        """Called when testing begins."""

    def on_test_end(self) -> None:
        """Called when testing ends."""

    def on_test_epoch_start(self) -> None:
        """Called before the first test batch."""

    def on_test_epoch_end(self) -> None:
        """Called after the last test batch."""

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called with each test batch, on the device."""

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called after each test batch with what the step returned."""

    # Prediction

    def on_predict_model_eval(self) -> None:
        """Set eval mode before prediction."""
        self.eval()

    def on_predict_model_train(self) -> None:
        """Override to set modes after prediction yourself; else every submodule gets back the mode that it had."""

    def on_predict_start(self) -> None:
        """Called when prediction begins."""

    def on_predict_end(self) -> None:
        """Called when prediction ends."""

    def on_predict_epoch_start(self) -> None:
        """Called before the first batch to predict."""

    def on_predict_epoch_end(self) -> None:
        """Called after the last batch to predict."""

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called with each batch to predict, on the device."""

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called after each batch to predict with what the step returned."""
