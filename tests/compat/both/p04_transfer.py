"""Transfer learning: a frozen backbone, released by a callback; parameter groups; schedulers of every kind."""

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from observe import Diary, blobs, csv_columns, loader, numbers, quiet, weights
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler


class Transfer(L.LightningModule):
    def __init__(self, schedule="onecycle"):
        super().__init__()
        self.schedule = schedule
        self.backbone = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.0))
        self.head = nn.Linear(16, 3)
        for parameter in self.backbone.parameters():
            parameter.requires_grad = False
        self.modes = []

    def on_train_epoch_start(self):
        if not next(self.backbone.parameters()).requires_grad:
            self.backbone.eval()

    def on_train_epoch_end(self):
        self.modes.append([self.training, self.backbone.training, self.head.training])

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.head(self.backbone(batch[0])), batch[1]))

    def configure_optimizers(self):
        head = torch.optim.AdamW(self.head.parameters(), lr=0.02, weight_decay=0.1)
        if self.schedule == "plain":
            return head
        if self.schedule == "onecycle":
            total = self.trainer.estimated_stepping_batches
            scheduler = lr_scheduler.OneCycleLR(head, max_lr=0.05, total_steps=total)
            return {"optimizer": head, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "cycle"}}
        if self.schedule == "plateau":
            scheduler = lr_scheduler.ReduceLROnPlateau(head, factor=0.5, patience=0, threshold=0.1)
            return {"optimizer": head, "lr_scheduler": scheduler, "monitor": "val_loss"}
        if isinstance(self.schedule, int):
            scheduler = lr_scheduler.ExponentialLR(head, 0.5)
            return [head], [{"scheduler": scheduler, "interval": "step", "frequency": self.schedule}]
        if self.schedule == "plateau_by_step":
            scheduler = lr_scheduler.ReduceLROnPlateau(head, factor=0.5, patience=0, threshold=0.3)
            config = {
                "scheduler": scheduler,
                "interval": "step",
                "frequency": 2,
                "monitor": "train_loss",
                "strict": False,
            }
            return {"optimizer": head, "lr_scheduler": config}
        groups = [
            {"params": self.head.weight, "lr": 0.02, "name": "weight"},
            {"params": [self.head.bias], "weight_decay": 0.0, "name": "bias"},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.5, weight_decay=0.1)
        warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
        both = lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[4])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": both, "interval": "step", "frequency": 1}}


class Release(L.Callback):
    """Let the backbone learn from an epoch on, more slowly."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            for parameter in pl_module.backbone.parameters():
                parameter.requires_grad = True
            pl_module.backbone.train()
            trainer.optimizers[0].add_param_group({"params": list(pl_module.backbone.parameters()), "lr": 1e-3})


def main(folder):
    found = {}
    for schedule in ("onecycle", "plateau", "plateau_by_step", 2, "groups", "plain"):
        L.seed_everything(11, verbose=False)
        model, diary = Transfer(schedule), Diary()
        interval = "step" if schedule == "plain" else None
        monitor = LearningRateMonitor(interval, log_momentum=True, log_weight_decay=True)
        logger = CSVLogger(folder, str(schedule), version=3)
        callbacks = [diary, monitor, *([Release(2)] if schedule == "plain" else [])]
        trainer = quiet(folder, *callbacks, max_epochs=4, logger=logger, log_every_n_steps=1)
        trainer.fit(model, loader(blobs(48), 12), loader(blobs(24, seed=1), 12))
        found[schedule] = diary.pages() | {
            "weights": weights(model),
            "modes": model.modes,
            "logged": numbers(trainer.logged_metrics),
            "lrs": dict(monitor.lrs),
            "csv": csv_columns(folder / str(schedule) / "version_3" / "metrics.csv"),
            "configs": [
                [type(c.scheduler).__name__, c.interval, c.frequency, c.monitor, c.strict, c.reduce_on_plateau]
                for c in trainer.lr_scheduler_configs
            ],
        }
    # an epoch of 4 batches in which every third steps
    diary = Diary()
    quiet(folder, diary, max_epochs=4).fit(Transfer(schedule=3), loader(blobs(48), 12))
    found["every_third"] = diary.rates
    model.freeze()
    frozen = [model.training, any(p.requires_grad for p in model.parameters())]
    model.unfreeze()
    found["freeze"] = [frozen, model.training, all(p.requires_grad for p in model.parameters())]
    return found
