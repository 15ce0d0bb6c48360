"""Train a small network with any number of ranks: the same file on a laptop and under every launcher.

    python train.py                                            one process, or one for each GPU of this machine
    python train.py --devices 2 --accelerator cpu              two ranks on this machine
    torchrun --nproc-per-node 2 train.py --accelerator cpu     the same, started by torchrun
    mpirun -np 2 python train.py --accelerator cpu             the same, started by MPI

Several machines: slurm.sbatch, lsf.sh, kubernetes.yaml and ray_train.py beside this file start it; docs/clusters.md explains.
The data are waves in noise, made here, so nothing is downloaded: the network tells how often each wave swings.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import ModelCheckpoint

Batch = tuple[Tensor, Tensor]  # waves (N, 1, 64), classes (N,)
CLASSES, LENGTH = 8, 64


class WaveClassifier(L.LightningModule):
    """Nothing in here knows how many ranks there are."""

    def __init__(self, width: int = 32, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv1d(1, width, kernel_size=9, padding=4),
            nn.ReLU(),
            nn.MaxPool1d(4),
            nn.Conv1d(width, width, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * LENGTH // 4, CLASSES),
        )

    def forward(self, waves: Tensor) -> Tensor:
        scores: Tensor = self.network(waves)
        return scores

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        waves, classes = batch
        loss = F.cross_entropy(self(waves), classes)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        waves, classes = batch
        scores = self(waves)
        accuracy = (scores.argmax(1) == classes).float().mean()
        self.log_dict({"val_loss": F.cross_entropy(scores, classes), "val_acc": accuracy}, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


class Waves(L.LightningDataModule):
    """Waves of 1 to 8 swings, shifted at random, in as much noise as signal."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size  # of each rank: two ranks with 32 train on 64 samples in a step

    def setup(self, stage: str) -> None:
        """Called in every rank; the seed makes the data the same in all of them."""
        self.train, self.val = waves(4096, seed=0), waves(1024, seed=1)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, batch_size=256)


def waves(count: int, seed: int) -> TensorDataset:
    random = torch.Generator().manual_seed(seed)
    classes = torch.randint(CLASSES, (count,), generator=random)
    shifts = torch.rand(count, 1, generator=random)
    time = torch.arange(LENGTH) / LENGTH
    clean = torch.sin(2 * torch.pi * ((classes[:, None] + 1) * time + shifts))
    noise = 0.7 * torch.randn(count, LENGTH, generator=random)
    return TensorDataset((clean + noise)[:, None], classes)


def main(arguments: Sequence[str] | None = None) -> float:
    """Train, and return the accuracy on data that were not trained on."""
    args = parse(arguments)
    L.seed_everything(0)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.num_nodes,
        strategy=args.strategy,
        callbacks=[ModelCheckpoint(f"{args.out}/checkpoints", save_last=True)],
        default_root_dir=args.out,
        enable_progress_bar=args.progress,
    )
    # "last": a job that was put back into the queue goes on from its newest checkpoint; the first time there is none.
    trainer.fit(WaveClassifier(), datamodule=Waves(args.batch_size), ckpt_path="last")
    accuracy = float(trainer.callback_metrics["val_acc"])
    trainer.print(f"{trainer.world_size} ranks, validation accuracy {accuracy:.1%}")
    return accuracy


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small network on waves with any number of ranks.")
    parser.add_argument("--devices", default="auto", help="ranks on each machine (default: what the launcher started)")
    parser.add_argument("--num-nodes", type=int, default=1, help="machines (default: 1)")
    parser.add_argument("--strategy", default="auto", help="auto, ddp … (default: auto)")
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda … (default: the best there is)")
    parser.add_argument("--epochs", type=int, default=5, help="in all, also after a restart (default: 5)")
    parser.add_argument("--batch-size", type=int, default=32, help="samples of each rank in a step (default: 32)")
    parser.add_argument("--out", default="runs/waves", help="folder that all machines share (default: runs/waves)")
    parser.add_argument("--progress", action="store_true", help="show a progress bar; batch jobs write logs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
