"""What the programs of this folder write down of a run."""

import csv
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset


def blobs(samples=64, features=8, classes=3, seed=0):
    """Points around one centre for each class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(samples) % classes
    centres = torch.randn(classes, features, generator=torch.Generator().manual_seed(99))
    return TensorDataset(centres[y] + 0.9 * torch.randn(samples, features, generator=generator), y)


def loader(dataset, batch_size=8, **options):
    return DataLoader(dataset, batch_size=batch_size, **options)


def files(folder):
    """All files below a folder, by their relative names."""
    return sorted(file.relative_to(folder).as_posix() for file in Path(folder).rglob("*") if file.is_file())


def csv_columns(path):
    """Each column of a metrics.csv without its empty cells: the steps and the values."""
    with open(path) as file:
        rows = list(csv.DictReader(file))
    columns = {}
    for key in rows[0].keys() - {"step", "epoch"}:
        filled = sorted((int(row["step"]), float(row[key])) for row in rows if row[key])
        columns[key] = {"steps": [step for step, _ in filled], "values": [value for _, value in filled]}
    return columns


def names(paths):
    """The names of files that lie anywhere."""
    return [Path(path).name for path in paths]


def numbers(metrics):
    """Metrics as numbers."""
    return {name: float(value) for name, value in metrics.items()}


def weights(module):
    """One number for each parameter and buffer, which tells two states apart."""
    return {name: float(value.double().pow(2).sum()) for name, value in module.state_dict().items()}


def attempt(catch, function, *args, **kwargs):
    """What a call returns, or whether its error is of the kind that a program would catch."""
    try:
        return function(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - of which kind it is, is what is asked
        return f"{'caught' if isinstance(error, catch) else 'not caught'} as {catch.__name__}"


class Diary(L.Callback):
    """Writes down losses, learning rates and counters of each batch, and all metrics at the end of each epoch."""

    def __init__(self):
        self.losses = []
        self.rates = []
        self.counters = []
        self.epochs = []
        self.validations = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self.losses.append(None if loss is None else float(loss))
        self.rates.append([group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups])
        self.counters.append([trainer.current_epoch, batch_idx, trainer.global_step, trainer.is_last_batch])

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validations.append([trainer.current_epoch, trainer.global_step, numbers(trainer.callback_metrics)])

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append([trainer.current_epoch, trainer.global_step, numbers(trainer.callback_metrics)])

    def pages(self):
        return {
            "losses": self.losses,
            "rates": self.rates,
            "counters": self.counters,
            "epochs": self.epochs,
            "validations": self.validations,
        }


def quiet(folder, *callbacks, **options):
    """A Trainer that only trains."""
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "max_epochs": 1,
    }
    return L.Trainer(callbacks=list(callbacks), **(settings | options))
