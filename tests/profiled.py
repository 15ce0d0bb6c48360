"""The small run that the profilers' tests look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden as L

EPOCHS, TRAIN, VAL = 2, 5, 3


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch[0]).mean())

    def test_step(self, batch: Any, batch_idx: int) -> None: ...

    def on_train_epoch_end(self) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Watcher(L.Callback):
    def on_train_batch_end(self, *_: Any) -> None: ...


def batches(count: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(count, 2)))


def make_trainer(tmp_path: Path, **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(**{"accelerator": "cpu", "max_epochs": EPOCHS, "default_root_dir": tmp_path, **quiet, **options})
