"""A GAN in manual optimization: two optimizers that take turns, their schedulers, clipping by hand."""

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from observe import blobs, csv_columns, files, loader, numbers, quiet, weights
from torch import nn
from torch.nn import functional as F


class GAN(L.LightningModule):
    def __init__(self, latent_dim: int = 4, lr: float = 2e-3, b1: float = 0.5, discriminator_steps: int = 1):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(latent_dim, 16), nn.ReLU(), nn.Linear(16, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
        self.register_buffer("validation_z", torch.randn(4, latent_dim))
        self.notes = []
        self.steps = []
        self.graph = []

    def forward(self, z):
        return self.generator(z)

    def adversarial_loss(self, y_hat, y):
        return F.binary_cross_entropy_with_logits(y_hat, y)

    def training_step(self, batch, batch_idx):
        real, _ = batch
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(real.shape[0], self.hparams.latent_dim).type_as(real)

        self.toggle_optimizer(optimizer_g)
        self.graph.append([p.requires_grad for p in self.parameters()])
        self.generated = self(z)
        g_loss = self.adversarial_loss(self.discriminator(self.generated), torch.ones(real.size(0), 1))
        self.log("g_loss", g_loss, prog_bar=True)
        optimizer_g.zero_grad()
        self.manual_backward(g_loss)
        self.clip_gradients(optimizer_g, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        optimizer_g.step()
        self.untoggle_optimizer(optimizer_g)

        self.toggle_optimizer(optimizer_d)
        self.graph.append([p.requires_grad for p in self.parameters()])
        real_loss = self.adversarial_loss(self.discriminator(real), torch.ones(real.size(0), 1))
        fake_loss = self.adversarial_loss(self.discriminator(self(z).detach()), torch.zeros(real.size(0), 1))
        d_loss = (real_loss + fake_loss) / 2
        self.log_dict({"d_loss": d_loss, "d_real": real_loss}, prog_bar=False, on_epoch=True)
        optimizer_d.zero_grad()
        self.manual_backward(d_loss)
        optimizer_d.step()
        self.untoggle_optimizer(optimizer_d)
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.notes.append([float(g_loss), float(d_loss), optimizer_d.param_groups[0]["lr"]])

    def on_validation_epoch_end(self):
        self.log("val_mean", self(self.validation_z).mean())

    def validation_step(self, batch, batch_idx):
        pass

    def on_train_epoch_end(self):
        self.notes.append([self.current_epoch, numbers(self.trainer.callback_metrics)])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.steps.append(self.global_step)

    def configure_optimizers(self):
        lr, b1 = self.hparams.lr, self.hparams.b1
        optimizers = [
            torch.optim.Adam(part.parameters(), lr=lr, betas=(b1, 0.999))
            for part in (self.generator, self.discriminator)
        ]
        gammas = (0.99, 0.9)
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, g) for o, g in zip(optimizers, gammas, strict=True)]
        return optimizers, schedulers


def main(folder):
    L.seed_everything(3, verbose=False)
    model = GAN()
    logger = CSVLogger(folder, name="gan", version="a")
    options = {"logger": logger, "log_every_n_steps": 2, "max_epochs": 2}
    trainer = quiet(folder, LearningRateMonitor("epoch"), **options)
    trainer.fit(model, loader(blobs(32)), loader(blobs(8)))
    found = {
        "notes": model.notes,
        "steps": model.steps,
        "graph": model.graph,
        "requires_grad_after": [p.requires_grad for p in model.parameters()],
        "weights": weights(model),
        "optimizers": [type(o).__name__ for o in trainer.optimizers],
        "global_step": trainer.global_step,
        "stepping_batches": trainer.estimated_stepping_batches,
        "callback_metrics": numbers(trainer.callback_metrics),
        "csv": csv_columns(folder / "gan" / "a" / "metrics.csv"),
        "files": files(folder),
    }
    limited = quiet(folder, max_steps=6, max_epochs=-1)
    model = GAN()
    limited.fit(model, loader(blobs(32)))
    found["limited"] = {"global_step": limited.global_step, "batches": len(model.graph) // 2}
    return found
