"""Metric objects, and self.log in all its variants and from all its places."""

import lightning as L
import torch
import torchmetrics
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from observe import attempt, blobs, csv_columns, loader, numbers, quiet, weights
from torch import nn
from torch.nn import functional as F


class Largest(torchmetrics.Metric):
    def __init__(self):
        super().__init__()
        self.add_state("value", torch.tensor(-1e9), dist_reduce_fx="max")

    def update(self, values):
        self.value = torch.maximum(self.value, values.max())

    def compute(self):
        return self.value


class Measured(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.train_acc = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        self.val_acc = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        metrics = {"f1": torchmetrics.F1Score(task="multiclass", num_classes=3, average="macro"), "largest": Largest()}
        self.val_metrics = torchmetrics.MetricCollection({"f1": metrics["f1"]}, prefix="val_")
        self.largest = metrics["largest"]
        self.mean = torchmetrics.MeanMetric()

    def training_step(self, batch, batch_idx):
        logits = self.layer(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.train_acc(logits, batch[1])
        self.log("train_acc", self.train_acc, on_step=True, on_epoch=True, prog_bar=True)
        self.mean.update(loss.detach())
        self.log("plain", loss)
        self.log("both", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("epoch_only", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log("sum", loss, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("least", loss, on_step=False, on_epoch=True, reduce_fx="min")
        self.log("greatest", loss, on_step=False, on_epoch=True, reduce_fx=torch.max)
        self.log("weighted", float(batch_idx), on_step=False, on_epoch=True, batch_size=batch_idx + 1)
        self.log("hidden", batch_idx, logger=False)
        self.log("integer", torch.tensor(batch_idx), on_epoch=True)
        self.log_dict({"a": loss * 2, "b": loss.double()}, on_step=False, on_epoch=True, rank_zero_only=True)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("from_hook", batch_idx * 2.0, on_step=True, on_epoch=True)

    def on_train_epoch_start(self):
        self.log("epoch_number", float(self.current_epoch))

    def on_train_epoch_end(self):
        self.log("mean_loss", self.mean.compute())
        self.mean.reset()
        self.log("tested", torch.tensor(3.0), prog_bar=True)

    def validation_step(self, batch, batch_idx):
        logits = self.layer(batch[0])
        self.val_acc.update(logits, batch[1])
        self.val_metrics.update(logits, batch[1])
        self.largest(logits)
        self.log("val_acc", self.val_acc)
        self.log("val_largest", self.largest, on_step=False, on_epoch=True)
        self.log("val_loss", F.cross_entropy(logits, batch[1]), prog_bar=True)
        self.log("val_step", float(batch_idx), on_step=True, on_epoch=True)

    def on_validation_epoch_end(self):
        self.log_dict(self.val_metrics.compute())
        self.val_metrics.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Shown(L.Callback):
    """The three views of what was logged, at each place."""

    def __init__(self):
        self.batches = []
        self.epochs = []
        self.bars = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx in (0, 3):
            self.batches.append(numbers(trainer.callback_metrics))
            self.bars.append(numbers(trainer.progress_bar_metrics))

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(numbers(trainer.callback_metrics))
        pl_module.log("from_callback", float(trainer.current_epoch + 1))

    def on_validation_end(self, trainer, pl_module):
        self.epochs.append(numbers(trainer.callback_metrics))


def refused(folder, catch, log):
    """Whether a wrong call of self.log raises what a program catches."""
    module = Measured()
    module.training_step = lambda batch, batch_idx: log(module) or module.layer(batch[0]).mean()
    return attempt(catch, quiet(folder, limit_val_batches=0).fit, module, loader(blobs(8)))


def log_twice(module):
    module.log("a", 1.0)
    module.log("a", 1.0, on_epoch=True)


def main(folder):
    L.seed_everything(9, verbose=False)
    model, shown = Measured(), Shown()
    trainer = quiet(folder, shown, max_epochs=2, logger=CSVLogger(folder, "measured"), log_every_n_steps=3)
    train, val = loader(blobs(37), 8), loader(blobs(18, seed=1), 5)
    trainer.fit(model, train, val)
    csv = csv_columns(folder / "measured" / "version_0" / "metrics.csv")
    found = {
        "csv": csv,
        "batches": shown.batches,
        "bars": shown.bars,
        "epochs": shown.epochs,
        "callback_metrics": numbers(trainer.callback_metrics),
        "logged_metrics": numbers(trainer.logged_metrics),
        "progress_bar_metrics": numbers(trainer.progress_bar_metrics),
        "types": sorted({type(value).__name__ for value in trainer.callback_metrics.values()}),
        "weights": weights(model),
        "validate": trainer.validate(model, val, verbose=False),
        "test": trainer.test(model, val, verbose=False),
    }
    found["refused"] = {
        "text": refused(folder, ValueError, lambda module: module.log("a", "text")),
        "vector": refused(folder, ValueError, lambda module: module.log("a", torch.zeros(2))),
        "twice": refused(folder, MisconfigurationException, log_twice),
        "reduce": refused(folder, MisconfigurationException, lambda module: module.log("a", 1.0, reduce_fx="median")),
    }
    return found
