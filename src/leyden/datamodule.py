"""LightningDataModule: the data of a project, in one class."""

from __future__ import annotations

import inspect
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from leyden.data.transfer import move_to_device
from leyden.errors import ConfigurationError
from leyden.hparams import AttributeDict, Hyperparameters, build

if TYPE_CHECKING:
    from leyden.trainer import Trainer

_FORMER = frozenset({"train_transforms", "val_transforms", "test_transforms", "dims", "size", "has_prepared_data"}) | {
    f"has_setup_{stage}" for stage in ("fit", "validate", "test", "predict")
}


class LightningDataModule:
    """Where the data comes from: download, split, transform, loaders.

    `prepare_data` runs once per machine and may write to disk; `setup` runs in every process before loaders are
    asked for. A loader hook returns a `DataLoader`, any iterable of batches, or several of them in a list or dict.

    Args:
        train_transforms: this and the following are arguments of former days, kept as attributes and told of.
        val_transforms: see above.
        test_transforms: see above.
        dims: the shape of a sample.

    Attributes:
        name: for your own use.
        prepare_data_per_node: False has `prepare_data` run once for all machines, where these share a disk.
        CHECKPOINT_HYPER_PARAMS_KEY: under which a checkpoint has the hyperparameters.
    """

    name: str | None = None
    prepare_data_per_node: bool = True
    CHECKPOINT_HYPER_PARAMS_KEY: ClassVar[str] = "datamodule_hyper_parameters"

    def __init__(
        self, train_transforms: Any = None, val_transforms: Any = None, test_transforms: Any = None, dims: Any = None
    ) -> None:
        self.trainer: Trainer | None = None
        given = (train_transforms, val_transforms, test_transforms, dims)
        if any(each is not None for each in given):
            from leyden.compat.former_data import keep

            keep(self, *given)

    if not TYPE_CHECKING:  # else every misspelt attribute would pass for one

        def __getattr__(self, name: str) -> Any:
            # Only for what is not there: attributes that datamodules had in former days.
            if name not in _FORMER:
                return object.__getattribute__(self, name)
            from leyden.compat.former_data import datamodule_attribute

            return datamodule_attribute(self, name)

    @classmethod
    def add_argparse_args(cls, parent_parser: ArgumentParser) -> ArgumentParser:
        """Former way to have the arguments of `__init__` on the command line."""
        from leyden.compat.argparse_2020 import add_arguments

        return add_arguments(cls, parent_parser)

    @classmethod
    def from_argparse_args(cls, args: Namespace | ArgumentParser, **kwargs: Any) -> Self:
        """Former way to make a datamodule from the command line: of ``args`` it takes what its `__init__` knows."""
        from leyden.compat.argparse_2020 import arguments_from

        return cls(**arguments_from(cls, args, kwargs))

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

    def save_hyperparameters(
        self, *args: Any, ignore: Sequence[str] | str = (), frame: Any = None, logger: bool = True
    ) -> None:
        """Keep the arguments of `__init__` in `hparams` and in checkpoints; see `LightningModule.save_hyperparameters`."""
        here = inspect.currentframe()
        self._hyperparameters().add(self, frame or (here.f_back if here else None), args, ignore, logger)

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
    def from_datasets(
        cls,
        train_dataset: Any = None,
        val_dataset: Any = None,
        test_dataset: Any = None,
        predict_dataset: Any = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **datamodule_kwargs: Any,
    ) -> Self:
        """Make a datamodule of datasets: a `DataLoader` for each, that of training shuffled.

        Args:
            train_dataset: a dataset, or several in a list or dict; so for the next three. None leaves the class's own hook.
            val_dataset: see above.
            test_dataset: see above.
            predict_dataset: see above.
            batch_size: samples of a batch; passed to `__init__` too, if it has an argument of this name.
            num_workers: processes that load, for each loader; as ``batch_size``.
            **datamodule_kwargs: other arguments of `__init__`.
        """
        takes = inspect.signature(cls.__init__).parameters
        shared = {"batch_size": batch_size, "num_workers": num_workers}
        if not any(each.kind is each.VAR_KEYWORD for each in takes.values()):
            shared = {name: value for name, value in shared.items() if name in takes}
        made = cls(**datamodule_kwargs, **shared)
        for kind, datasets in (
            ("train", train_dataset),
            ("val", val_dataset),
            ("test", test_dataset),
            ("predict", predict_dataset),
        ):
            if datasets is not None:
                hook = partial(_loaders, datasets, kind == "train", batch_size, num_workers)
                setattr(made, f"{kind}_dataloader", hook)
        return made

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str,
        map_location: Any = None,
        hparams_file: None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build the datamodule with the hyperparameters that a checkpoint holds.

        Args:
            checkpoint_path: the file.
            map_location: accepted for compatibility: a datamodule has no tensors on a device.
            hparams_file: not supported: the checkpoint holds the hyperparameters.
            weights_only: accepted for compatibility: no code is ever run from a file.
            **kwargs: arguments that are not in it, or that replace those in it.
        """
        from leyden.checkpoint.format import load_checkpoint

        if hparams_file is not None:
            raise ConfigurationError("hparams_file is not supported: the checkpoint holds the hyperparameters.")
        checkpoint = load_checkpoint(checkpoint_path, weights_only=True)
        saved = checkpoint.get("datamodule_hyper_parameters", {})
        made: Self = build(cls, saved, {}, kwargs, str(checkpoint_path))
        if cls.__qualname__ in checkpoint:
            made.load_state_dict(checkpoint[cls.__qualname__])
        return made


def _loaders(datasets: Any, shuffle: bool, batch_size: int, num_workers: int) -> Any:
    """A loader for each dataset, in the structure that was given."""
    if isinstance(datasets, Mapping):
        return {name: _loaders(each, shuffle, batch_size, num_workers) for name, each in datasets.items()}
    if isinstance(datasets, (list, tuple)):
        return [_loaders(each, shuffle, batch_size, num_workers) for each in datasets]
    dataset: Dataset[Any] = datasets
    return DataLoader(
        dataset,
        batch_size,
        shuffle=shuffle and not isinstance(dataset, IterableDataset),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
