"""Accumulation, clipping by norm and by value, validation inside of epochs, and limits of every kind."""

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from observe import Diary, blobs, loader, numbers, quiet, weights
from torch import nn
from torch.nn import functional as F


class Net(L.LightningModule):
    def __init__(self, lr=0.2):
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        self.norms = []
        self.clipped = []

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])))

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.clipped.append([epoch, batch_idx, float(max(p.grad.abs().max() for p in self.parameters()))])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0]).argmax(-1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Accumulations(L.Callback):
    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append([trainer.current_epoch, trainer.accumulate_grad_batches, trainer.global_step])


RUNS = {
    "accumulate": {"accumulate_grad_batches": 4, "max_epochs": 2},
    "norm": {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2},
    "value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    "twice_an_epoch": {"val_check_interval": 0.5, "max_epochs": 2},
    "every_3_batches": {"val_check_interval": 3},
    "across_epochs": {"val_check_interval": 5, "check_val_every_n_epoch": None, "max_epochs": 3},
    "limits": {"limit_train_batches": 0.5, "limit_val_batches": 1, "max_epochs": 2, "num_sanity_val_steps": 0},
    "max_steps": {"max_steps": 11, "max_epochs": -1},
    "max_steps_accumulated": {"max_steps": 3, "accumulate_grad_batches": 2, "limit_train_batches": 4},
    "min_epochs": {"max_epochs": 3, "min_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 0},
}


def run(folder, data, **options):
    L.seed_everything(5, verbose=False)
    model, diary, accumulations = Net(), Diary(), Accumulations()
    trainer = quiet(folder, diary, accumulations, *options.pop("callbacks", ()), **options)
    trainer.fit(model, loader(data), loader(blobs(16, seed=4)))
    return trainer, diary.pages() | {
        "norms": model.norms,
        "clipped": model.clipped,
        "weights": weights(model),
        "accumulations": accumulations.seen,
        "metrics": numbers(trainer.callback_metrics),
        "end": [trainer.current_epoch, trainer.global_step, trainer.num_training_batches, trainer.num_val_batches],
        "estimated": trainer.estimated_stepping_batches,
    }


def main(folder):
    found = {name: run(folder, blobs(64), **options)[1] for name, options in RUNS.items()}
    scheduler = GradientAccumulationScheduler({0: 1, 1: 2, 3: 4})
    _, found["scheduled"] = run(folder, blobs(64), max_epochs=4, callbacks=[scheduler])
    # an epoch of five batches, so that the last window has one
    _, short = run(folder, blobs(40), accumulate_grad_batches=2)
    found["short"] = {"norms": short["norms"][:2], "counters": short["counters"], "last": short["norms"][2]}

    model = Net()
    limited = quiet(folder, limit_test_batches=2, limit_predict_batches=0.5, limit_val_batches=0.25)
    data = loader(blobs(64))
    found["evaluated"] = {
        "test": limited.test(model, data, verbose=False),
        "predict": limited.predict(model, data),
        "validate": limited.validate(model, data, verbose=False),
        "batches": [limited.num_test_batches, limited.num_predict_batches, limited.num_val_batches],
    }
    return found
