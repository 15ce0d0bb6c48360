"""EarlyStopping and LearningRateMonitor in real runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from leyden.callbacks import Callback, EarlyStopping, LearningRateMonitor
from leyden.errors import MetricError
from leyden.module import LightningModule
from leyden.trainer import Trainer
from quiet import Memory

STEPS = 4


class Scripted(LightningModule):
    """Logs the given value of each epoch."""

    def __init__(self, values: list[float], interval: str = "step") -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.values = values
        self.interval = interval

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        # a python number at each step and the epoch's mean, under one key
        value = self.values[self.current_epoch] + (batch_idx - (STEPS - 1) / 2)
        self.log("train_loss", value, on_step=True, on_epoch=True)
        return self.layer(batch).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", torch.tensor(self.values[self.current_epoch]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}


class Scriptless(Scripted):
    validation_step = LightningModule.validation_step  # type: ignore[assignment]


def loader() -> DataLoader[Any]:
    return DataLoader(torch.ones(STEPS * 2, 2), batch_size=2)  # type: ignore[arg-type]


def fit(module: LightningModule, callbacks: list[Callback], folder: Path, validate: bool = True, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "max_epochs": 6,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
        "default_root_dir": str(folder),
    }
    trainer = Trainer(callbacks=callbacks, **(settings | options))
    trainer.fit(module, loader(), loader() if validate else None)
    return trainer


VALUES = [3.0, 2.0, 2.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("monitor", "options"),
    [
        ("val_loss", {}),
        ("val_loss", {"check_on_train_epoch_end": True}),
        ("val_loss", {"check_on_train_epoch_end": False}),
        ("train_loss", {}),
        ("train_loss_epoch", {}),
        ("train_loss", {"check_on_train_epoch_end": True}),
    ],
)
def test_stops_in_the_epoch_of_the_model(tmp_path: Path, monitor: str, options: Any) -> None:
    stopper = EarlyStopping(monitor, patience=2, **options)
    trainer = fit(Scripted(VALUES), [stopper], tmp_path)
    assert stopper.stopping_reason == "patience_exhausted"
    assert (stopper.stopped_epoch, stopper.best_score, trainer.global_step) == (3, 2.0, 4 * STEPS)
    assert not stopper.best_score.is_inference()


def test_training_metric_without_validation(tmp_path: Path) -> None:
    stopper = EarlyStopping("train_loss", patience=2)
    trainer = fit(Scriptless(VALUES), [stopper], tmp_path, validate=False)
    assert (stopper.stopped_epoch, stopper.wait_count, trainer.global_step) == (3, 2, 4 * STEPS)


def test_validation_in_every_second_epoch(tmp_path: Path) -> None:
    stopper = EarlyStopping("val_loss", patience=1)
    trainer = fit(Scripted(VALUES), [stopper], tmp_path, check_val_every_n_epoch=2)
    assert (stopper.stopped_epoch, trainer.global_step) == (3, 4 * STEPS)  # values 2, 2 after epochs 1 and 3


def test_validation_twice_in_an_epoch(tmp_path: Path) -> None:
    stopper = EarlyStopping("val_loss", patience=2)
    trainer = fit(Scripted(VALUES), [stopper], tmp_path, val_check_interval=0.5)
    # 3 3 | 2 2 | 2: stops at the second check in a row that does not improve, in the middle of epoch 2
    assert (stopper.stopped_epoch, trainer.global_step) == (2, 2 * STEPS + STEPS // 2)


def test_misspelt_key(tmp_path: Path) -> None:
    with pytest.raises(MetricError, match="Did you mean 'val_loss'"):
        fit(Scripted(VALUES), [EarlyStopping("val_los")], tmp_path)


def test_rates_by_step_equal_the_closed_form(tmp_path: Path) -> None:
    memory, monitor = Memory(), LearningRateMonitor()
    trainer = fit(Scripted(VALUES), [monitor], tmp_path, max_epochs=2, logger=memory, log_every_n_steps=2)
    expected = [(step, {"lr-SGD": 0.5 ** (step - 1)}) for step in range(2, 2 * STEPS + 1, 2)]
    assert [row for row in memory.rows if "lr-SGD" in row[1]] == expected
    assert monitor.lrs == {"lr-SGD": [row["lr-SGD"] for _, row in expected]}
    assert trainer.callback_metrics["lr-SGD"] == 0.5 ** (2 * STEPS - 1)


def test_rates_by_epoch_equal_the_closed_form(tmp_path: Path) -> None:
    memory, monitor = Memory(), LearningRateMonitor()
    trainer = fit(Scripted(VALUES, "epoch"), [monitor], tmp_path, max_epochs=3, logger=memory)
    expected = [(epoch * STEPS, {"lr-SGD": 0.5**epoch}) for epoch in range(3)]
    assert [row for row in memory.rows if "lr-SGD" in row[1]] == expected
    assert trainer.callback_metrics["lr-SGD"] == 0.25


def test_rates_under_accumulation_count_steps(tmp_path: Path) -> None:
    monitor = LearningRateMonitor("step")
    fit(
        Scripted(VALUES),
        [monitor],
        tmp_path,
        max_epochs=2,
        logger=Memory(),
        log_every_n_steps=1,
        accumulate_grad_batches=2,
    )
    assert monitor.lrs["lr-SGD"] == [1.0, 0.5, 0.25, 0.125]
