"""A run that goes on from any of its checkpoints shows and logs what an undisturbed one does, to the last bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import Callback, LearningRateMonitor
from leyden.loggers import CSVLogger
from leyden.module import LightningModule
from quiet import Memory, make_trainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torchmetrics = pytest.importorskip("torchmetrics")
    from torchmetrics import classification as classes

torch.set_num_threads(1)

EPOCHS, BATCHES, CLASSES = 3, 5, 3


class Model(LightningModule):
    """Logs in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(4, CLASSES)
        self.train_metrics = torch.nn.ModuleDict(
            {"acc": classes.MulticlassAccuracy(CLASSES), "auroc": classes.MulticlassAUROC(CLASSES)}
        )
        self.early = torchmetrics.MeanMetric()
        self.val_acc = classes.MulticlassAccuracy(CLASSES)
        self.starts = 0

    def on_train_start(self) -> None:
        self.log("started", 1.0, reduce_fx="sum")

    def on_train_epoch_start(self) -> None:
        self.starts += 1
        self.log("begun", float(self.current_epoch + 1), reduce_fx="sum")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        loss = functional.cross_entropy(logits, batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx=torch.max)
        self.log("spread", loss, on_step=False, on_epoch=True, reduce_fx=lambda values: values.max() - values.min())
        self.log("plain", batch_idx / 3, on_epoch=True)
        accuracy, auroc = self.train_metrics["acc"], self.train_metrics["auroc"]
        accuracy(logits, batch[1])
        auroc.update(logits, batch[1])  # type: ignore[operator]
        self.log("acc", accuracy, on_step=True, on_epoch=True, prog_bar=True)
        self.log("auroc", auroc, on_step=False, on_epoch=True)
        if batch_idx == 0:
            self.log("first", loss, on_epoch=True)
            self.early.update(loss)
            self.log("early", self.early, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.val_acc.update(logits, batch[1])
        self.log("val_loss", functional.cross_entropy(logits, batch[1]), on_step=True, on_epoch=True, prog_bar=True)
        self.log("val_acc", self.val_acc)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


class Watch(Callback):
    """Notes what the Trainer shows, and saves after each step; may end the run as a kill does, after a number of batches."""

    def __init__(self, folder: Path, die_after: int | None = None) -> None:
        self.folder, self.die_after = folder, die_after
        self.seen: dict[tuple[str, int], Any] = {}

    def note(self, trainer: L.Trainer, where: str) -> None:
        shown = (trainer.callback_metrics, trainer.logged_metrics)
        plain = [{name: value.double().item() for name, value in values.items()} for values in shown]
        self.seen[where, trainer.global_step] = (*plain, dict(trainer.progress_bar_metrics))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.note(trainer, "batch")
        if trainer.global_step == self.die_after:
            raise SystemExit("killed")
        path = self.folder / f"{trainer.global_step}.ckpt"
        trainer.at_step_boundary(lambda: trainer.save_checkpoint(path))

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.note(trainer, "validation")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.note(trainer, "epoch")

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.note(trainer, "end")


def fit(
    folder: Path, ckpt: Path | None = None, die_after: int | None = None
) -> tuple[Watch, Memory, LearningRateMonitor]:
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(38, 4, generator=generator), torch.randint(0, CLASSES, (38,), generator=generator)
    data = TensorDataset(inputs, targets)
    watch, memory, monitor = Watch(folder, die_after), Memory(), LearningRateMonitor()
    trainer = make_trainer(
        folder, watch, monitor, logger=[memory, CSVLogger(folder, name="", version="v")], max_epochs=EPOCHS,
        log_every_n_steps=2, val_check_interval=3, limit_train_batches=BATCHES,
    )  # fmt: skip
    try:
        trainer.fit(Model(), DataLoader(data, 7), DataLoader(data, 11), ckpt_path=ckpt)
    except SystemExit:
        assert die_after is not None
    return watch, memory, monitor


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Watch, Memory, LearningRateMonitor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, *fit(folder)


@pytest.mark.parametrize("at", range(1, EPOCHS * BATCHES))
def test_from_any_step(undisturbed: tuple[Path, Watch, Memory, LearningRateMonitor], at: int, tmp_path: Path) -> None:
    _, watch, memory, monitor = undisturbed
    _, before, _ = fit(tmp_path, die_after=min(at + 4, EPOCHS * BATCHES))
    again, after, resumed = fit(tmp_path, ckpt=tmp_path / f"{at}.ckpt")
    for where, shown in again.seen.items():
        assert (where, shown) == (where, watch.seen[where])
    assert {where for where in watch.seen if where[1] > at} <= set(again.seen)
    rows = len(memory.rows) - len(after.rows)
    assert after.rows == memory.rows[rows:]
    assert before.rows[:rows] == memory.rows[:rows]
    assert resumed.lrs == monitor.lrs


@pytest.mark.parametrize("at", [1, 3, 5, 9, 10])
def test_the_csv_file_in_the_same_folder(
    undisturbed: tuple[Path, Watch, Memory, LearningRateMonitor], at: int, tmp_path: Path
) -> None:
    folder, *_ = undisturbed
    fit(tmp_path, die_after=at + 4)
    fit(tmp_path, ckpt=tmp_path / f"{at}.ckpt")
    assert (tmp_path / "v" / "metrics.csv").read_bytes() == (folder / "v" / "metrics.csv").read_bytes()
