"""Smaller things that programs do: steps that skip, hooks that end an epoch, reloaded loaders, own bars, loggers' experiments."""

import lightning as L
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import LambdaCallback, TQDMProgressBar
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import grad_norm, move_data_to_device
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from observe import Diary, attempt, blobs, files, loader, numbers, quiet, weights
from torch import nn
from torch.nn import functional as F


class Odd(L.LightningModule):
    def __init__(self, skip=(), end_at=None):
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.skip = skip
        self.end_at = end_at
        self.loaders = 0
        self.norms = []
        self.outputs = []
        self.example_input_array = torch.ones(2, 8)

    def forward(self, x):
        return self.layer(x)

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == self.end_at else None

    def training_step(self, batch, batch_idx):
        if batch_idx in self.skip:
            return None
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True)
        return {"loss": loss, "extra": batch_idx}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.outputs.append(sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__)

    def on_before_optimizer_step(self, optimizer):
        norms = grad_norm(self.layer, norm_type=2)
        self.norms.append(numbers(norms))
        self.log_dict(norms)

    def train_dataloader(self):
        self.loaders += 1
        return loader(blobs(24, seed=self.loaders))

    def configure_optimizers(self):
        return torch.optim.RMSprop(self.parameters(), lr=0.01)


class Manual(Odd):
    """Manual optimization with accumulation and a scheduler at the end of an epoch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = F.cross_entropy(self(batch[0]), batch[1]) / 2
        self.manual_backward(loss)
        if (batch_idx + 1) % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
        self.log("loss", loss)
        return loss

    def on_train_epoch_end(self):
        self.lr_schedulers().step()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}


class Recorder(Logger):
    """A logger of one's own."""

    def __init__(self):
        super().__init__()
        self.rows = []
        self.params = None
        self.status = None

    @property
    def name(self):
        return "recorder"

    @property
    def version(self):
        return "1"

    @rank_zero_only
    def log_hyperparams(self, params, *args, **kwargs):
        self.params = dict(params)

    @rank_zero_only
    def log_metrics(self, metrics, step=None):
        self.rows.append([sorted(metrics.keys() - {"epoch"}), metrics.get("epoch")])

    @rank_zero_only
    def finalize(self, status):
        self.status = status


class Bar(TQDMProgressBar):
    def get_metrics(self, trainer, pl_module):
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items


def fit(folder, model, *callbacks, train=None, **options):
    seed_everything(3, verbose=False)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.1)
    diary = Diary()
    trainer = quiet(folder, diary, *callbacks, **options)
    trainer.fit(model, train)
    return trainer, diary.pages() | {
        "weights": weights(model),
        "loaders": model.loaders,
        "norms": model.norms,
        "outputs": model.outputs,
    }


def main(folder):
    found = {
        "skipped": fit(folder, Odd(skip=(1,)), max_epochs=2)[1],
        "ended": fit(folder, Odd(end_at=1), max_epochs=2)[1],
    }
    found["reloaded"] = fit(folder, Odd(), max_epochs=4, reload_dataloaders_every_n_epochs=2)[1]
    found["manual"] = fit(folder, Manual(), max_epochs=2)[1]
    found["ddp"] = fit(folder, Odd(), strategy="ddp", use_distributed_sampler=False)[1]
    order = fit(folder, Odd(), strategy="ddp")[1]["losses"]
    found["ddp_keeps_the_order"] = order == found["ddp"]["losses"]

    logger = Recorder()
    hooks = []
    watcher = LambdaCallback(on_train_epoch_end=lambda trainer, module: hooks.append(trainer.current_epoch))
    fit(folder, Odd(), watcher, logger=logger, max_epochs=2, log_every_n_steps=2)
    found["logger"] = [logger.rows, logger.params, logger.status, hooks]

    board = TensorBoardLogger(folder, name="board", version="x")
    trainer, _ = fit(folder, Odd(), logger=[board, CSVLogger(folder, "rows")], max_epochs=1)
    trainer.logger.experiment.add_scalar("mine", 1.0, 0)
    trainer.logger.log_metrics({"more": 2.0}, step=5)
    board.save()
    found["logs"] = [trainer.logger is board, trainer.log_dir == board.log_dir, len(trainer.loggers)]
    found["log_files"] = sorted({name.split("events.out")[0] for name in files(folder)})

    bar = Bar()
    found["bar"] = attempt(ValueError, lambda: fit(folder, Odd(), bar, enable_progress_bar=True)[1]["losses"])

    boring = BoringModel()
    trainer = Trainer(
        default_root_dir=folder,
        fast_dev_run=2,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(boring, datamodule=BoringDataModule())
    found["boring"] = [
        trainer.global_step,
        trainer.test(boring, datamodule=BoringDataModule(), verbose=False) is not None,
    ]

    moved = move_data_to_device({"a": [torch.ones(2)], "b": "text"}, torch.device("cpu"))
    found["moved"] = [moved["a"][0], moved["b"]]
    datasets = L.LightningDataModule.from_datasets(blobs(24), blobs(8), batch_size=6)
    trainer = quiet(folder)
    trainer.fit(BareOdd(), datamodule=datasets)
    found["from_datasets"] = [trainer.num_training_batches, trainer.global_step, trainer.datamodule is datasets]
    found["wrong"] = {
        "no_optimizer": attempt(MisconfigurationException, quiet(folder).fit, NoOptimizer()),
        "no_step": attempt(MisconfigurationException, quiet(folder).fit, L.LightningModule(), loader(blobs(8))),
        "limit": attempt(MisconfigurationException, quiet, folder, limit_train_batches=-1),
        "interval": attempt(MisconfigurationException, quiet, folder, val_check_interval=1.5),
        "clip": attempt(
            MisconfigurationException, quiet, folder, gradient_clip_algorithm="norms", gradient_clip_val=1.0
        ),
        "argument": attempt(TypeError, L.Trainer, max_epoch=3),
        "too_late": attempt(ValueError, fit, folder, Validated(), val_check_interval=10),
        "both": attempt(MisconfigurationException, trainer.fit, BareOdd(), loader(blobs(8)), datamodule=datasets),
        "accelerator": attempt(MisconfigurationException, quiet, folder, accelerator="gpu"),
        "strategy": attempt(ValueError, quiet, folder, strategy="nothing"),
        "precision": attempt(ValueError, quiet, folder, precision="17"),
        "duration": attempt(MisconfigurationException, L.Trainer, max_time="1 hour"),
    }
    return found


class BareOdd(Odd):
    train_dataloader = L.LightningModule.train_dataloader


class NoOptimizer(Odd):
    configure_optimizers = L.LightningModule.configure_optimizers


class Validated(Odd):
    def validation_step(self, batch, batch_idx):
        pass

    def val_dataloader(self):
        return loader(blobs(8))
