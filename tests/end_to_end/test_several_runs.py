"""What one run leaves behind for the next, and runs inside of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import EarlyStopping, ModelCheckpoint
from leyden.errors import DataError, LeydenError


class Line(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.layer(batch[0]).pow(2).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", 1.0)  # never better than before

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(count: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(count, 2)))


def make_trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(**{"accelerator": "cpu", "max_epochs": 5, "default_root_dir": folder, **quiet, **options})


def test_a_second_fit_starts_with_callbacks_that_have_forgotten_the_first(tmp_path: Path) -> None:
    stopping, checkpoint = EarlyStopping("val_loss", patience=2), ModelCheckpoint(tmp_path / "kept", monitor="val_loss")
    trainer = make_trainer(tmp_path, callbacks=[stopping, checkpoint])
    epochs, best = [], []
    for module in (Line(), Line()):
        trainer.fit(module, batches(), batches())
        epochs.append(trainer.current_epoch)
        best.append(checkpoint.best_model_path)
    assert epochs == [3, 3]
    assert best[0] != best[1]
    assert all(Path(path).is_file() for path in best)


def test_a_verb_inside_of_a_verb_of_the_same_trainer_is_refused(tmp_path: Path) -> None:
    class Nested(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.validate(pl_module, batches())

    with pytest.raises(
        LeydenError, match=r"validate was called while this Trainer runs fit\. Use a Trainer of its own"
    ):
        make_trainer(tmp_path, callbacks=[Nested()], enable_checkpointing=False).fit(Line(), batches(), batches())


def test_another_trainer_may_validate_inside_of_fit(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Nested(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            other = make_trainer(tmp_path, enable_checkpointing=False)
            assert other.validate(pl_module, batches()) == [{"val_loss": 1.0}]
            assert pl_module.trainer is trainer

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append("train_loss" in trainer.callback_metrics)

    trainer = make_trainer(tmp_path, callbacks=[Nested()], enable_checkpointing=False, max_epochs=2)
    trainer.fit(Line(), batches(), batches())
    assert seen == [True] * 8


def test_the_last_batch_is_let_go(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, enable_checkpointing=False, max_epochs=1)
    trainer.fit(Line(), batches(), batches())
    assert trainer._outlet.metrics._batch is None


def test_what_is_asked_for_at_the_very_end_is_done(tmp_path: Path) -> None:
    done: list[int] = []

    class Late(L.Callback):
        def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.at_step_boundary(lambda: done.append(trainer.global_step))

    make_trainer(tmp_path, callbacks=[Late()], enable_checkpointing=False, max_epochs=1).fit(
        Line(), batches(), batches()
    )
    assert done == [4]


def test_a_dataset_in_place_of_a_loader_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"gave a TensorDataset, which is a dataset.*DataLoader\(dataset, batch_size=…\)"
    ):
        make_trainer(tmp_path, enable_checkpointing=False).fit(Line(), TensorDataset(torch.ones(4, 2)), batches())


def test_a_run_that_is_already_done_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = make_trainer(tmp_path, max_epochs=1)
    first.fit(Line(), batches(), batches())
    second = make_trainer(tmp_path, max_epochs=1)
    assert first.checkpoint_callback is not None
    second.fit(Line(), batches(), batches(), ckpt_path=first.checkpoint_callback.best_model_path)
    assert "max_epochs=1 is reached already" in capsys.readouterr().out
    assert second.global_step == 4


def test_values_of_empty_batches_only_have_no_mean(tmp_path: Path) -> None:
    class Empty(Line):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("nothing", 1.0, batch_size=0)
            self.log("something", 3.0, batch_size=2)

    trainer = make_trainer(tmp_path, enable_checkpointing=False)
    assert trainer.validate(Empty(), batches()) == [{"something": 3.0}]
