"""An autoencoder: validation, test and prediction, predictions written to files by batch and by epoch."""

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.utilities.model_summary import summarize
from observe import Diary, attempt, blobs, files, loader, names, numbers, quiet, weights
from torch import nn
from torch.nn import functional as F


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.l1 = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2))

    def forward(self, x):
        return self.l1(x)


class AutoEncoder(L.LightningModule):
    def __init__(self, encoder, decoder):
        super().__init__()
        self.save_hyperparameters(ignore=["encoder", "decoder"])
        self.encoder = encoder
        self.decoder = decoder
        self.example_input_array = torch.zeros(1, 8)
        self.modes = []

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def _loss(self, batch):
        x, _ = batch
        return F.mse_loss(self(x), x)

    def training_step(self, batch, batch_idx):
        loss = self._loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss, "batch_idx": batch_idx}

    def validation_step(self, batch, batch_idx):
        self.modes.append([self.training, torch.is_grad_enabled()])
        self.log("val_loss", self._loss(batch))

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        loss = self._loss(batch)
        self.log_dict({"test_loss": loss, "test_root": loss.sqrt()})
        return loss

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.encoder(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Writer(BasePredictionWriter):
    def __init__(self, folder, write_interval):
        super().__init__(write_interval)
        self.folder = folder
        self.indices = []

    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        self.folder.mkdir(exist_ok=True)
        self.indices.append(list(batch_indices))
        torch.save(prediction, self.folder / f"{dataloader_idx}_{batch_idx}.pt")

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        self.folder.mkdir(exist_ok=True)
        self.indices.append(batch_indices)
        torch.save(predictions, self.folder / "all.pt")


def main(folder):
    L.seed_everything(1)
    model = AutoEncoder(Encoder(), nn.Linear(2, 8))
    diary = Diary()
    checkpoint = ModelCheckpoint(folder / "kept", "{epoch:02d}-{val_loss:.3f}", monitor="val_loss", save_top_k=1)
    train, val, test = (blobs(samples, seed=seed) for seed, samples in enumerate((40, 20, 14)))
    trainer = quiet(folder, diary, checkpoint, max_epochs=3, enable_checkpointing=True, check_val_every_n_epoch=2)
    trainer.fit(model, loader(train), loader(val))
    found = diary.pages() | {"modes": model.modes, "weights": weights(model), "files": files(folder)}
    found["callback_metrics"] = numbers(trainer.callback_metrics)
    found["best"] = names([checkpoint.best_model_path])

    found["validate"] = trainer.validate(model, loader(val), verbose=False)
    found["test_one"] = trainer.test(model, loader(test), verbose=False)
    found["test_two"] = trainer.test(model, [loader(test), loader(val, 5)], verbose=False)
    found["after_test"] = numbers(trainer.callback_metrics)
    found["modes_after"] = [model.training, model.encoder.training]

    one = trainer.predict(model, loader(test))
    two = trainer.predict(model, [loader(test), loader(val, 10)])
    found["predictions"] = [one, two, trainer.predict(model, loader(test), return_predictions=False)]
    found["best_prediction"] = trainer.predict(dataloaders=loader(test), ckpt_path="best")

    for interval in ("batch", "epoch", "batch_and_epoch"):
        writer = Writer(folder / interval, interval)
        writing = quiet(folder, writer)
        # the predictions of an epoch are kept for the writer, whether or not they are returned
        data = [loader(test), loader(val, 10)]
        found[f"writing_{interval}"] = attempt(ValueError, writing.predict, model, data, return_predictions=False)
        found[f"written_{interval}"] = [files(folder / interval), writer.indices]
    found["written"] = attempt(ValueError, torch.load, folder / "epoch" / "all.pt")
    found["summary"] = summarize(model).total_parameters
    return found
