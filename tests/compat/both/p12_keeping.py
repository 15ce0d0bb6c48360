"""Which checkpoints are kept and what they are called; when training stops early; averaged weights."""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from observe import attempt, blobs, files, loader, names, numbers, quiet, weights
from torch import nn
from torch.nn import functional as F

VALUES = [0.9, 0.5, 0.7, 0.4, 0.6, 0.8, 0.3, 0.35]


class Scripted(L.LightningModule):
    """Logs given values, one for each epoch."""

    def __init__(self, values=None):
        super().__init__()
        self.values = values or VALUES
        self.layer = nn.Linear(8, 3)
        self.validated = []

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.layer(batch[0]), batch[1])
        self.log("train/step", float(self.global_step), on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch, batch_idx):
        self.validated.append(float(self.layer.weight.sum()))
        self.log("val/loss", self.values[self.current_epoch])
        self.log("acc", 1 - self.values[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


KEEPERS = {
    "default": {},
    "best_2": {"monitor": "val/loss", "save_top_k": 2, "filename": "{epoch:03d}-{acc:.2f}"},
    "no_names": {"monitor": "acc", "mode": "max", "filename": "e{epoch}-a{acc:.1f}", "auto_insert_metric_name": False},
    "all": {"save_top_k": -1, "every_n_epochs": 3},
    "last_only": {"save_top_k": 0, "save_last": True},
    "steps": {"every_n_train_steps": 3, "save_top_k": -1, "filename": "at-{step}"},
    "steps_monitored": {"every_n_train_steps": 4, "monitor": "train/step", "mode": "max", "save_top_k": 2},
    "slash": {"filename": "{epoch}-{val/loss:.1f}", "save_top_k": 1, "monitor": "val/loss"},
    "same_name": {"filename": "same", "monitor": "val/loss", "save_top_k": 3},
    "weights": {"save_weights_only": True, "monitor": "acc", "mode": "max"},
    "after_validation": {"save_on_train_epoch_end": False, "save_top_k": -1},
    "at_epoch_end": {"save_on_train_epoch_end": True, "monitor": "val/loss", "save_last": True, "save_top_k": 4},
    "subfolder": {"filename": "{epoch}/{step}", "save_top_k": 2, "monitor": "val/loss"},
    "before_validation": {
        "every_n_train_steps": 1,
        "filename": "{step}-{val/loss:.2f}",
        "save_top_k": 2,
        "monitor": "train/step",
    },
    "missing_metric": {"filename": "{epoch}-{nothing:.2f}", "save_top_k": 1},
}

STOPPERS = {
    "patience": {"patience": 2},
    "min_delta": {"patience": 1, "min_delta": 0.25},
    "threshold": {"patience": 9, "stopping_threshold": 0.45},
    "divergence": {"patience": 9, "divergence_threshold": 0.65},
    "maximum": {"mode": "max", "patience": 1},
    "at_epoch_end": {"patience": 1, "check_on_train_epoch_end": True},
    "not_strict": {"monitor": "absent", "strict": False},
    "strict": {"monitor": "absent"},
}


def kept(folder, arguments):
    keeper = ModelCheckpoint(folder, **arguments)
    trainer = quiet(folder, keeper, enable_checkpointing=True, max_epochs=len(VALUES), limit_val_batches=1)
    trainer.fit(Scripted(), loader(blobs(16)), loader(blobs(8)))
    return {
        "files": files(folder),
        "best": names([keeper.best_model_path])[0],
        "score": keeper.best_model_score,
        "k_best": {Path(path).name: float(score) for path, score in keeper.best_k_models.items()},
        "kth": [names([keeper.kth_best_model_path]), keeper.kth_value],
        "last": Path(keeper.last_model_path).name,
        "format": keeper.format_checkpoint_name({"epoch": 3, "step": 7, "val/loss": 0.25, "acc": 0.75}).split("/")[-1],
        "monitor": [keeper.monitor, keeper.mode, keeper.save_top_k, keeper.save_last],
    }


def stopped(folder, arguments):
    values = [0.9, 0.7, 0.6, 0.62, 0.55, 0.4, 0.41, 0.42]
    stopping = EarlyStopping(**({"monitor": "val/loss"} | arguments))
    trainer = quiet(folder, stopping, max_epochs=len(values), limit_val_batches=1)
    trainer.fit(Scripted(values), loader(blobs(16)), loader(blobs(8)))
    best = float(stopping.best_score)
    return [trainer.current_epoch, trainer.global_step, stopping.stopped_epoch, stopping.wait_count, best]


class FromThird(WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None and step_idx >= 2


def averaged(folder, callback):
    L.seed_everything(8, verbose=False)
    model = Scripted()
    trainer = quiet(folder, callback, max_epochs=3, limit_val_batches=1)
    trainer.fit(model, loader(blobs(16)), loader(blobs(8)))
    return {"weights": weights(model), "validated": model.validated, "metrics": numbers(trainer.callback_metrics)}


def main(folder):
    found = {name: attempt(ValueError, kept, folder / name, arguments) for name, arguments in KEEPERS.items()}
    found["again"] = kept(folder / "best_2", KEEPERS["best_2"])
    found["stopped"] = {name: attempt(RuntimeError, stopped, folder, arguments) for name, arguments in STOPPERS.items()}
    found["nan"] = attempt(RuntimeError, lambda: quiet(folder, EarlyStopping("val/loss"), max_epochs=3).fit(
        Scripted([0.5, float("nan"), 0.1]), loader(blobs(16)), loader(blobs(8))))  # fmt: skip
    found["ema"] = averaged(folder, EMAWeightAveraging(decay=0.8))
    found["mean"] = averaged(folder, FromThird())
    found["two"] = two_of_a_kind(folder / "two")
    return found


def two_of_a_kind(folder):
    """Two ModelCheckpoints in one Trainer."""
    best = ModelCheckpoint(folder, "best-{epoch}", monitor="acc", mode="max")
    newest = ModelCheckpoint(folder, "every-{epoch}", every_n_epochs=2, save_top_k=-1)
    trainer = quiet(folder, best, newest, enable_checkpointing=True, max_epochs=5, limit_val_batches=1)
    trainer.fit(Scripted(), loader(blobs(16)), loader(blobs(8)))
    first = trainer.checkpoint_callback is best
    return [files(folder), first, len(trainer.checkpoint_callbacks), trainer.early_stopping_callback]
