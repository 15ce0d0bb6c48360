"""A program that trains on several ranks, one of which comes to grief; for `test_faults.py` and `make faults`.

It prints one line of JSON on rank 0 when it comes to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import leyden as L
from leyden.callbacks import ModelCheckpoint

STEPS_PER_EPOCH = 8
EPOCHS = 3


class Endless(IterableDataset[Any]):
    """Each rank has another number of samples."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        for number in range(6 * self.batches):
            x = torch.randn(6, generator=torch.Generator().manual_seed(number))
            yield x, x.sum(0, keepdim=True).sin()


class Victim(L.LightningModule):
    """Comes to grief once, where the arguments say."""

    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__()
        self.given = given
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))

    def suffers(self, place: str) -> bool:
        given, mark = self.given, Path(self.given.folder) / "suffered"
        here = given.place == place and self.global_rank == given.rank and self.global_step >= given.step
        if not here or (given.once and mark.exists()):
            return False
        mark.touch()
        return True

    def suffer(self) -> None:
        fault = self.given.fault
        if fault == "exception":
            raise ValueError("the culprit's own words")
        if fault == "out of memory":
            raise torch.OutOfMemoryError("the culprit's own words")
        if fault in ("SIGINT", "SIGTERM", "SIGKILL"):
            os.kill(os.getpid(), signal.Signals[fault])
        if fault == "exit":
            sys.exit(3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.suffers("training"):
            self.suffer()
            if self.given.fault == "None":
                return None
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.suffers("validation"):
            self.suffer()
        self.log("val_loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.suffers("saving"):
            self.suffer()

    def prepare_data(self) -> None:
        if self.suffers("setup"):
            self.suffer()

    def setup(self, stage: str) -> None:
        if self.suffers("setup"):
            self.suffer()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--fault", default="none")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--step", type=int, default=5)
    parser.add_argument("--place", default="training")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("--uneven", action="store_true")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    L.seed_everything(3, verbose=False)
    x = torch.randn(12 * STEPS_PER_EPOCH, 6)
    dataset = TensorDataset(x, x.sum(1, keepdim=True).sin())
    module = Victim(given)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=given.devices,
        num_nodes=given.nodes,
        strategy=given.strategy,
        max_restarts=given.restarts,
        max_epochs=EPOCHS,
        callbacks=[ModelCheckpoint(given.folder, every_n_train_steps=3, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=given.folder,
    )
    batch_size = 12 // (given.devices * given.nodes)
    train = DataLoader(dataset, batch_size=batch_size, shuffle=True)
    if given.uneven:
        train = DataLoader(Endless(STEPS_PER_EPOCH - 3 * trainer.global_rank), batch_size=6)
    trainer.fit(module, train, DataLoader(dataset, batch_size=batch_size))
    total = sum(float(parameter.detach().double().abs().sum()) for parameter in module.parameters())
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.print(json.dumps({"steps": trainer.global_step, "weights": total, **metrics}), flush=True)


if __name__ == "__main__":
    main()
