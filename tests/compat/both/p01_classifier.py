"""A classifier with its datamodule: checkpoints by a metric, early stopping, learning rates, CSV logs."""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from observe import Diary, blobs, csv_columns, files, loader, names, numbers, weights
from torch import nn
from torch.nn import functional as F


class BlobsData(L.LightningDataModule):
    def __init__(self, batch_size: int = 8):
        super().__init__()
        self.save_hyperparameters()
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append(f"setup {TrainerFn(stage).name}")
        self.train, self.val, self.test = (blobs(n, seed=seed) for seed, n in enumerate((60, 30, 20)))

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(5)
        return loader(self.train, self.hparams.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self):
        return loader(self.val, self.hparams.batch_size)

    def test_dataloader(self):
        return loader(self.test, self.hparams.batch_size)

    def teardown(self, stage):
        self.calls.append(f"teardown {TrainerFn(stage).name}")


class Classifier(L.LightningModule):
    def __init__(self, hidden: int = 16, lr: float = 0.05):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 3))
        self.seen = []

    def forward(self, x):
        return self.net(x)

    def shared_step(self, batch, stage):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.log(f"{stage}_loss", loss, prog_bar=True, on_epoch=True)
        self.log(f"{stage}_acc", (logits.argmax(-1) == y).float().mean(), on_step=False, on_epoch=True)
        return loss

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[1].tolist())
        return self.shared_step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self.shared_step(batch, "val")

    def test_step(self, batch, batch_idx):
        self.shared_step(batch, "test")

    def on_load_checkpoint(self, checkpoint):
        self.loaded_epoch = checkpoint["epoch"]

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)]


def main(folder):
    L.seed_everything(7)
    model, data, diary = Classifier(), BlobsData(), Diary()
    checkpoint = ModelCheckpoint(
        monitor="val_loss", save_top_k=2, save_last=True, filename="{epoch}-{step}-{val_loss:.4f}", mode="min"
    )
    stopping = EarlyStopping("val_loss", patience=2, min_delta=0.05)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=12,
        callbacks=[diary, checkpoint, stopping, LearningRateMonitor("epoch")],
        logger=CSVLogger(folder, name="blobs"),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2,
    )
    trainer.fit(model, datamodule=data)
    found = diary.pages()
    found["after_fit"] = [trainer.current_epoch, trainer.global_step, trainer.should_stop, trainer.state.status.value]
    found["callback_metrics"] = numbers(trainer.callback_metrics)
    found["logged_metrics"] = numbers(trainer.logged_metrics)
    found["progress_bar_metrics"] = numbers(trainer.progress_bar_metrics)
    found["seen"] = model.seen
    found["weights"] = weights(model)
    found["stopping"] = [stopping.stopped_epoch, stopping.wait_count, float(stopping.best_score), stopping.patience]
    found["best"] = [Path(checkpoint.best_model_path).name, float(checkpoint.best_model_score)]
    found["best_k"] = {Path(path).name: float(score) for path, score in checkpoint.best_k_models.items()}
    found["last_and_worst"] = names([checkpoint.last_model_path, checkpoint.kth_best_model_path])
    found["dirpath"] = Path(checkpoint.dirpath).relative_to(folder)
    found["log_dir"] = Path(trainer.log_dir).relative_to(folder)
    found["test_best"] = trainer.test(datamodule=data, ckpt_path="best", verbose=False)
    last = Classifier.load_from_checkpoint(checkpoint.last_model_path)
    found["last_epoch"] = last.loaded_epoch
    found["data_calls"] = data.calls
    found["csv"] = csv_columns(folder / "blobs/version_0/metrics.csv")
    found["files"] = files(folder)
    loaded = Classifier.load_from_checkpoint(checkpoint.best_model_path)
    found["loaded"] = [dict(loaded.hparams), weights(loaded)]
    return found
