"""Several loaders: read together in each mode, in dicts and lists, one after the other in evaluation; batches of any shape."""

from typing import NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import CombinedLoader
from observe import blobs, loader, numbers, quiet
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Records(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        value = torch.full((8,), float(index) / 10)
        return {"x": value, "name": f"n{index}", "pair": Pair(value + 1, value - 1), "nested": [value, {"deep": value}]}


def signature(batch):
    """Shapes and first numbers of whatever a batch is."""
    if isinstance(batch, torch.Tensor):
        return [list(batch.shape), float(batch.double().sum())]
    if isinstance(batch, dict):
        return {key: signature(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return {key: signature(value) for key, value in batch._asdict().items()}
    if isinstance(batch, (list, tuple)):
        return [signature(value) for value in batch]
    return batch


class Reads(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 1)
        self.batches = []
        self.moved = []

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        self.moved.append([str(device), dataloader_idx])
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def training_step(self, batch, batch_idx):
        self.batches.append([batch_idx, signature(batch)])
        return self.net(torch.ones(2, 8)).mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.batches.append(["val", batch_idx, dataloader_idx, signature(batch)])
        self.log("val_sum", batch[0].sum(), batch_size=len(batch[0]))
        self.log(f"own_{dataloader_idx}", batch[0].mean(), add_dataloader_idx=False, batch_size=len(batch[0]))

    def test_step(self, batch, batch_idx, dataloader_idx):
        self.log("test_first", batch[0].flatten()[0], on_step=True, on_epoch=True, reduce_fx="max", batch_size=1)

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return batch[1] + dataloader_idx

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class AsHooks(Reads):
    def train_dataloader(self):
        return {"a": loader(blobs(16)), "b": [loader(blobs(24, seed=1), 6), loader(blobs(8, seed=2), 2)]}

    def val_dataloader(self):
        return [loader(blobs(16)), loader(blobs(9, seed=1), 3)]


def main(folder):
    found = {}
    for mode in ("min_size", "max_size_cycle", "max_size", "sequential"):
        combined = CombinedLoader({"a": loader(blobs(16), 4), "b": loader(blobs(18, seed=1), 6)}, mode)
        found[f"alone_{mode}"] = [[i, loader_idx, signature(batch)] for batch, i, loader_idx in combined]
        found[f"length_{mode}"] = len(combined)
        if mode == "sequential":
            continue
        model = Reads()
        trainer = quiet(folder, max_epochs=2)
        trainer.fit(model, combined)
        found[mode] = [model.batches, model.moved, trainer.num_training_batches, trainer.global_step]
    model = Reads()
    sequential = CombinedLoader([loader(blobs(16)), loader(blobs(9), 3)], "sequential")
    trainer = quiet(folder)
    found["sequential_val"] = [trainer.validate(model, sequential, verbose=False), model.batches]

    model = AsHooks()
    trainer = quiet(folder, max_epochs=1, num_sanity_val_steps=1, limit_val_batches=2)
    trainer.fit(model)
    found["hooks"] = [
        model.batches,
        trainer.num_training_batches,
        trainer.num_val_batches,
        trainer.num_sanity_val_batches,
    ]
    found["metrics"] = numbers(trainer.callback_metrics)
    found["validate"] = trainer.validate(model, verbose=False)
    found["test"] = trainer.test(model, [loader(blobs(16)), loader(blobs(9))], verbose=False)
    found["test_metrics"] = numbers(trainer.callback_metrics)
    found["predict"] = trainer.predict(model, [loader(blobs(16)), loader(blobs(9))])

    model = Reads()
    quiet(folder).fit(model, DataLoader(Records(), batch_size=5))
    found["records"] = model.batches
    model = Reads()
    quiet(folder).fit(model, [loader(blobs(16)), DataLoader(Records(), batch_size=6, drop_last=True)])
    found["listed"] = model.batches
    return found
