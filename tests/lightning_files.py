"""One model and one run for both libraries, so that files of Lightning are made by Lightning; for tests of compatibility."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import leyden
from quiet import make_trainer

BATCHES = 6


def data() -> DataLoader[Any]:
    """Six batches of four samples, never shuffled."""
    inputs = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True).sin()), batch_size=4)


def net(base: Any, validates: bool = False) -> Any:
    """The same module on either library's `LightningModule`."""

    class Net(base):  # type: ignore[misc]
        def __init__(self, hidden: int = 5, optimizer: str = "Adam", schedule: str = "", **options: float) -> None:
            super().__init__()
            self.save_hyperparameters()
            with torch.random.fork_rng():
                torch.manual_seed(3)
                self.layers = torch.nn.Sequential(
                    torch.nn.Linear(3, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 1)
                )
            self.norm = torch.nn.BatchNorm1d(1, affine=False)

        def loss(self, batch: Any) -> Tensor:
            return torch.nn.functional.mse_loss(self.layers(batch[0]), batch[1])

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            self.log("loss", loss)
            return loss

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", self.loss(batch))

        def configure_optimizers(self) -> Any:
            hparams = self.hparams
            options = {name: hparams[name] for name in ("lr", "momentum", "weight_decay") if name in hparams}
            optimizer = getattr(torch.optim, hparams["optimizer"])(self.parameters(), **({"lr": 0.05} | options))
            if hparams["schedule"] == "StepLR":
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]
            if hparams["schedule"] == "OneCycleLR":
                scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=100)
                return [optimizer], [{"scheduler": scheduler, "interval": "step"}]
            return optimizer

    class Validated(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch))

    return Validated if validates else Net


@contextmanager
def without_remarks() -> Iterator[None]:
    """Lightning warns of much that is meant here: few batches, one process for the data, a folder that is not empty."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def lightning_fit(
    folder: Path,
    model: Any,
    *callbacks: Any,
    ckpt_path: Any = None,
    validate: bool = False,
    datamodule: Any = None,
    **options: Any,
) -> Any:
    """Train with Lightning; returns its Trainer."""
    with without_remarks():
        import lightning.pytorch as pl

        settings = {
            "max_epochs": 1,
            "logger": False,
            "accelerator": "cpu",
            "num_sanity_val_steps": 0,
            "default_root_dir": folder,
        }
        settings |= {
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": bool(callbacks),
        }
        trainer = pl.Trainer(callbacks=list(callbacks), **(settings | options))
        loaders = {} if datamodule else {"train_dataloaders": data(), "val_dataloaders": data() if validate else None}
        trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, **loaders)
    return trainer


def leyden_fit(folder: Path, model: Any, *callbacks: Any, ckpt_path: Any = None, **options: Any) -> leyden.Trainer:
    """Train with leyden, as `lightning_fit` does."""
    validate = options.pop("validate", False)
    datamodule = options.pop("datamodule", None)
    trainer = make_trainer(folder, *callbacks, **({"enable_checkpointing": bool(callbacks)} | options))
    loaders = {} if datamodule else {"train_dataloaders": data(), "val_dataloaders": data() if validate else None}
    trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, **loaders)
    return trainer


def saver(folder: Path, **options: Any) -> Any:
    """Lightning's `ModelCheckpoint` that keeps everything in ``folder``."""
    with without_remarks():
        from lightning.pytorch.callbacks import ModelCheckpoint

        return ModelCheckpoint(folder, filename="{step}", **({"save_top_k": -1, "monitor": "step"} | options))


def difference(first: Any, second: Any) -> float:
    """The greatest difference between the weights of two modules."""
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
