"""LightningDataModule: the data of a project, in one class."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from leyden.data.transfer import move_to_device
from leyden.hparams import AttributeDict, Hyperparameters, build

if TYPE_CHECKING:
    import torch

    from leyden.trainer import Trainer


class LightningDataModule:
    """Where the data comes from: download, split, transform, loaders.

    `prepare_data` runs once per machine and may write to disk; `setup` runs in every process before loaders are
    asked for. A loader hook returns a `DataLoader`, any iterable of batches, or several of them in a list or dict.
    """

    def __init__(self) -> None:
        self.trainer: Trainer | None = None

    def prepare_data(self) -> None:
        """Download and write to disk; called once per machine, before `setup`."""

    def setup(self, stage: str) -> None:
        """Build the datasets; ``stage`` is fit, validate, test or predict."""

    def teardown(self, stage: str) -> None:
        """Clean up after a verb, also after an error."""

    def train_dataloader(self) -> Any:
        """Return what to train on."""
        raise NotImplementedError(f"{type(self).__name__} has no train_dataloader.")

    def val_dataloader(self) -> Any:
        """Return what to validate on."""
        raise NotImplementedError(f"{type(self).__name__} has no val_dataloader.")

    def test_dataloader(self) -> Any:
        """Return what to test on."""
        raise NotImplementedError(f"{type(self).__name__} has no test_dataloader.")

    def predict_dataloader(self) -> Any:
        """Return what to predict."""
        raise NotImplementedError(f"{type(self).__name__} has no predict_dataloader.")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch before it goes to the device; return it."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to the device; return it. Override for batches of your own kind without ``.to``."""
        return move_to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch that is on the device, e.g. augment it there; return it."""
        return batch

    def on_exception(self, exception: BaseException) -> None:
        """Called when user code or the engine raised."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep of the data's state: plain data and tensors."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    def save_hyperparameters(self, *args: Any, ignore: Sequence[str] | str = (), logger: bool = True) -> None:
        """Keep the arguments of `__init__` in `hparams` and in checkpoints; see `LightningModule.save_hyperparameters`."""
        frame = inspect.currentframe()
        self._hyperparameters().add(self, frame.f_back if frame else None, args, ignore, logger)

    @property
    def hparams(self) -> AttributeDict:
        """The saved hyperparameters, also by attribute."""
        return self._hyperparameters().values

    @property
    def hparams_initial(self) -> AttributeDict:
        """The hyperparameters as they were when they were saved."""
        return self._hyperparameters().initial

    def _hyperparameters(self) -> Hyperparameters:
        # Not made in __init__: user classes often forget to call super().__init__().
        found: Hyperparameters = self.__dict__.setdefault("_saved_hyperparameters", Hyperparameters())
        return found

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str, **kwargs: Any) -> Self:
        """Build the datamodule with the hyperparameters that a checkpoint holds.

        Args:
            checkpoint_path: the file.
            **kwargs: arguments that are not in it, or that replace those in it.
        """
        from leyden.checkpoint.format import load_checkpoint

        checkpoint = load_checkpoint(checkpoint_path, weights_only=True)
        saved = checkpoint.get("datamodule_hyper_parameters", {})
        made: Self = build(cls, saved, {}, kwargs, str(checkpoint_path))
        if cls.__qualname__ in checkpoint:
            made.load_state_dict(checkpoint[cls.__qualname__])
        return made
