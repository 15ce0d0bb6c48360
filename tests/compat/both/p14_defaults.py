"""What a Trainer does that is told nothing: its files, its attributes, several fits in a row; and state of a datamodule."""

import re

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, ModelSummary
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from observe import Diary, attempt, blobs, files, loader, numbers, quiet, weights
from torch import nn
from torch.nn import functional as F


class Data(L.LightningDataModule):
    """Counts its loaders, and keeps the count in checkpoints."""

    def __init__(self, size: int = 24):
        super().__init__()
        self.save_hyperparameters()
        self.epochs = 0

    def train_dataloader(self):
        self.epochs += 1
        return loader(blobs(self.hparams.size))

    def val_dataloader(self):
        return loader(blobs(8, seed=1))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return (x + 0.1 if self.trainer.training else x), y

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict):
        self.epochs = 10 * state_dict["epochs"]


class Plain(L.LightningModule):
    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(8, 3)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx) -> STEP_OUTPUT:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx) -> STEP_OUTPUT:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class WithCallbacks(Plain):
    def configure_callbacks(self):
        return [EarlyStopping("val_loss", patience=7), ModelCheckpoint(filename="own", save_last=True)]


READ = (
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "current_epoch", "global_step", "accumulate_grad_batches"),
    *("log_every_n_steps", "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "fast_dev_run"),
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches"),
    *(
        "gradient_clip_val",
        "gradient_clip_algorithm",
        "precision",
        "world_size",
        "num_devices",
        "num_nodes",
        "node_rank",
    ),
    *(
        "global_rank",
        "local_rank",
        "is_global_zero",
        "should_stop",
        "interrupted",
        "received_sigterm",
        "sanity_checking",
    ),
    *(
        "training",
        "validating",
        "testing",
        "predicting",
        "evaluating",
        "enable_validation",
        "is_last_batch",
        "ckpt_path",
    ),
    *("num_training_batches", "val_check_batch", "reload_dataloaders_every_n_epochs", "device_ids", "barebones"),
    *("use_distributed_sampler", "predict_dataloaders", "test_dataloaders"),
)


def told(trainer):
    found = {name: attempt(AttributeError, getattr, trainer, name) for name in READ}
    return {name: value if isinstance(value, (int, float, str, list)) else str(value) for name, value in found.items()}


def tree(folder):
    return [re.sub(r"events\.out.*", "events", name) for name in files(folder)]


def train_longer(trainer, model, data):
    trainer.fit(model, datamodule=data)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, datamodule=data)
    return [trainer.current_epoch, trainer.global_step]


def main(folder):
    found = {"attributes": told(L.Trainer(accelerator="cpu", devices=1, default_root_dir=folder, logger=False))}
    few = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    L.seed_everything(1, verbose=False)
    model, data = Plain(), Data()
    trainer = L.Trainer(default_root_dir=folder / "board", **few)
    trainer.fit(model, datamodule=data)
    found["attributes_after"] = told(trainer)
    found["tree"] = tree(folder / "board")
    found["callbacks"] = [
        type(callback).__name__ for callback in trainer.callbacks if "Checkpoint" in type(callback).__name__
    ]
    found["logger"] = [type(trainer.logger).__name__, trainer.logger.name, trainer.logger.version]
    found["where"] = [str(path).removeprefix(str(folder)) for path in (trainer.log_dir, trainer.logger.save_dir)]
    L.Trainer(default_root_dir=folder / "board", **few).fit(Plain(), datamodule=Data())
    found["tree_of_two"] = tree(folder / "board")
    path = folder / "board/lightning_logs/version_0/checkpoints/epoch=1-step=6.ckpt"
    found["hparams"] = [dict(Plain.load_from_checkpoint(path).hparams), Data.load_from_checkpoint(path).hparams.size]
    resumed = Data()
    L.Trainer(default_root_dir=folder / "resumed", **few | {"max_epochs": 3}).fit(
        Plain(), datamodule=resumed, ckpt_path=path
    )
    found["data_state"] = [data.epochs, resumed.epochs]

    L.Trainer(default_root_dir=folder / "bare", logger=False, **few).fit(Plain(), datamodule=Data())
    L.Trainer(default_root_dir=folder / "none", logger=False, enable_checkpointing=False, **few).fit(
        Plain(), datamodule=Data()
    )
    found["trees"] = [tree(folder / "bare"), tree(folder / "none")]
    both = [
        TensorBoardLogger(folder / "both", "tb", log_graph=False),
        CSVLogger(folder / "both", "csv", flush_logs_every_n_steps=1),
    ]
    L.Trainer(default_root_dir=folder, logger=both, **few).fit(WithCallbacks(), datamodule=Data())
    found["tree_of_loggers"] = tree(folder / "both")

    trainer = L.Trainer(default_root_dir=folder / "again", logger=False, callbacks=[diary := Diary()], **few)
    trainer.validate(model, datamodule=data, verbose=False)
    before = weights(model)
    for _ in range(2):
        trainer.fit(model, datamodule=data)
        found.setdefault("fits", []).append([len(diary.losses), trainer.current_epoch, trainer.global_step])
    found["trained"] = before != weights(model)
    found["longer"] = attempt(
        AttributeError, train_longer, L.Trainer(default_root_dir=folder, logger=False, **few), model, data
    )

    options = {
        "strategy": SingleDeviceStrategy(device=torch.device("cpu")),
        "plugins": MixedPrecision("bf16-mixed", "cpu"),
    }
    trainer = quiet(folder, ModelSummary(max_depth=1), enable_model_summary=True, **options)
    L.seed_everything(1, verbose=False)
    trainer.fit(model := Plain(), datamodule=Data())
    found["plugins"] = [str(trainer.precision), numbers(trainer.callback_metrics), weights(model)]
    found["device"] = [
        str(model.device),
        str(trainer.strategy.root_device),
        trainer.strategy.broadcast(3),
        model.global_rank,
    ]
    return found
