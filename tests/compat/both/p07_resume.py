"""Going on from a checkpoint: the same as without a stop; hyperparameters, own state, loading with other arguments."""

from argparse import Namespace
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from observe import Diary, attempt, blobs, files, loader, names, numbers, quiet, weights
from torch import nn
from torch.nn import functional as F


class Regressor(L.LightningModule):
    def __init__(self, width: int = 6, lr: float = 0.05, act: str = "relu", extra=None, *, decay: float = 0.0):
        super().__init__()
        self.save_hyperparameters(ignore="extra")
        self.net = nn.Sequential(nn.Linear(8, width), nn.ReLU() if act == "relu" else nn.Tanh(), nn.Linear(width, 3))
        self.register_buffer("seen", torch.zeros(()))
        self.notes = {"words": ["a"]}
        self.order = []

    def training_step(self, batch, batch_idx):
        self.seen += len(batch[0])
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def on_save_checkpoint(self, checkpoint):
        checkpoint["notes"] = self.notes | {"epoch": self.current_epoch}
        self.order.append(
            ["save", sorted(set(KEYS) & checkpoint.keys()), checkpoint["epoch"], checkpoint["global_step"]]
        )

    def on_load_checkpoint(self, checkpoint):
        self.notes = checkpoint["notes"]
        self.order.append(
            ["load", checkpoint["hyper_parameters"]["width"], checkpoint["epoch"], checkpoint["global_step"]]
        )

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=self.hparams.decay)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


KEYS = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "hyper_parameters", "epoch", "global_step")


class Counter(L.Callback):
    """Keeps a state of its own in the checkpoint."""

    def __init__(self, what="batches"):
        self.what = what
        self.state = {"batches": 0, "epochs": 0}
        self.loaded = None

    @property
    def state_key(self):
        return f"Counter[{self.what}]"

    def on_train_batch_end(self, *args):
        self.state["batches"] += 1

    def on_train_epoch_end(self, *args):
        self.state["epochs"] += 1

    def state_dict(self):
        return self.state.copy()

    def load_state_dict(self, state_dict):
        self.loaded = dict(state_dict)
        self.state.update(state_dict)


def fit(folder, epochs, ckpt_path=None, model=None, **options):
    L.seed_everything(2, verbose=False)
    model = model or Regressor(width=5, decay=0.01)
    diary, counters = Diary(), [Counter(), Counter("more")]
    keeper = ModelCheckpoint(folder, "{epoch}", monitor="val_loss", save_top_k=-1, save_last=True)
    stopping = EarlyStopping("val_loss", patience=50)
    callbacks = [diary, *counters, stopping, keeper]
    trainer = quiet(folder, *callbacks, enable_checkpointing=True, max_epochs=epochs, **options)
    trainer.fit(model, loader(blobs(40)), loader(blobs(16, seed=3)), ckpt_path=ckpt_path)
    return (
        model,
        trainer,
        diary.pages()
        | {
            "weights": weights(model),
            "counters_loaded": [counter.loaded for counter in counters],
            "counters_now": [counter.state for counter in counters],
            "stopping": [stopping.wait_count, float(stopping.best_score)],
            "best_k": {Path(path).name: float(score) for path, score in keeper.best_k_models.items()},
            "best_and_last": names([keeper.best_model_path, keeper.last_model_path]),
            "metrics": numbers(trainer.callback_metrics),
            "files": files(folder),
            "end": [trainer.current_epoch, trainer.global_step, float(model.seen)],
            "order": list(model.order),
        },
    )


def within_an_epoch(folder):
    """Going on from the middle of an epoch."""
    found = {}
    keeper = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    for name, path in (("whole", None), ("rest", folder / "step=3.ckpt")):
        L.seed_everything(2, verbose=False)
        model, diary, counter = Regressor(lr=0.1), Diary(), Counter()
        trainer = quiet(folder, diary, counter, keeper, enable_checkpointing=True, max_epochs=2)
        trainer.fit(model, loader(blobs(40)), ckpt_path=path)
        found[name] = {"state": counter.state, "loaded": counter.loaded, "files": files(folder)}
        found[name] |= {key: value for key, value in diary.pages().items() if key in ("losses", "counters", "rates")}
    return found


def main(folder):
    found = {}
    _, _, found["straight"] = fit(folder / "straight", 4)
    _, _, found["first_half"] = fit(folder / "halves", 2)
    model, trainer, found["second_half"] = fit(folder / "halves", 4, folder / "halves" / "epoch=1.ckpt")
    found["same"] = found["second_half"]["weights"] == found["straight"]["weights"]
    found["notes"] = model.notes
    _, _, found["by_last"] = fit(folder / "halves", 5, "last")
    found["within"] = within_an_epoch(folder / "within")
    whole, rest = (torch.tensor(found["within"][part].pop("losses")[-7:]) for part in ("whole", "rest"))
    found["goes_on_within_an_epoch"] = torch.allclose(whole, rest)
    path = folder / "by_hand.ckpt"
    trainer.save_checkpoint(path)
    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)

    loaded = Regressor.load_from_checkpoint(path)
    found["loaded"] = [dict(loaded.hparams), weights(loaded), loaded.training, loaded.notes, float(loaded.seen)]
    other = Regressor.load_from_checkpoint(path, lr=0.5, act="tanh", extra="x", map_location="cpu")
    found["overridden"] = [dict(other.hparams), dict(other.hparams_initial), other.hparams.lr]
    found["weights_only"] = weights(Regressor.load_from_checkpoint(folder / "weights.ckpt"))
    found["wrong_width"] = attempt(RuntimeError, Regressor.load_from_checkpoint, path, width=7)
    found["missing"] = attempt(FileNotFoundError, fit, folder / "none", 1, folder / "missing.ckpt")
    found["missing_model"] = attempt(FileNotFoundError, Regressor.load_from_checkpoint, folder / "missing.ckpt")

    class FromNamespace(Regressor):
        def __init__(self, hparams, lr=1.0):
            L.LightningModule.__init__(self)
            self.save_hyperparameters(hparams)
            self.save_hyperparameters({"lr": lr})

    found["namespace"] = dict(FromNamespace(Namespace(width=3, depth=2)).hparams)
    tested = trainer.validate(model, loader(blobs(16, seed=3)), ckpt_path=path, verbose=False)
    found["validated"] = [tested, trainer.ckpt_path is None or Path(trainer.ckpt_path).name]
    return found
