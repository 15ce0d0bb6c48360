"""The API of 2020 over two processes: two optimizers in turn, epoch ends, and a module that wraps itself."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import leyden as pl
from quiet import make_trainer
from ranks import run_trainers

pytestmark = pytest.mark.filterwarnings(r"ignore:\[LEY-former-name\]")

X = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))


class Two(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.one, self.other = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
        net, more = ((self.one, self.other), (self.other, self.one))[optimizer_idx]
        loss = (net(batch[0]) - more(batch[0]) - 1).square().mean()
        return {"loss": loss, "log": {f"loss_{optimizer_idx}": loss}}

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.one.parameters(), lr=0.1), torch.optim.Adam(self.other.parameters(), lr=0.02)]

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return {"squares": self.one(batch[0]).square()}

    def validation_epoch_end(self, outputs: Any) -> Any:
        return {"val_loss": torch.cat([each["squares"] for each in outputs]).mean()}


def loader(batch_size: int) -> Any:
    return DataLoader(TensorDataset(X), batch_size=batch_size)


def trained(rank: int, folder: Path, devices: int) -> dict[str, Any]:
    model = Two()
    trainer = make_trainer(folder, max_epochs=2, devices=devices, gradient_clip_val=0.5)
    trainer.fit(model, loader(8 // devices), loader(8))
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "val_loss": float(trainer.callback_metrics["val_loss"]),
        "steps": trainer.global_step,
    }


def test_two_processes_are_one(tmp_path: Path) -> None:
    alone = trained(0, tmp_path, 1)
    ranks = run_trainers(trained, 2, tmp_path, 2)
    for rank in ranks:
        assert rank["steps"] == alone["steps"] == 8
        for name, value in rank["weights"].items():
            torch.testing.assert_close(value, alone["weights"][name], rtol=0, atol=1e-6)
        assert rank["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-5)


class WrapsItself(pl.LightningModule):
    def __init__(self, hparams: Any) -> None:
        super().__init__()
        self.hparams = hparams
        torch.manual_seed(4)
        self.used, self.unused = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
        self.wrapped = 0

    def configure_ddp(self, model: Any, device_ids: Any) -> Any:
        self.wrapped += 1
        assert device_ids is None  # on the CPU
        return DistributedDataParallel(model, device_ids=device_ids, find_unused_parameters=True)

    def init_ddp_connection(self, proc_rank: int, world_size: int) -> None:
        self.joined = (proc_rank, world_size)
        torch.distributed.init_process_group("gloo", rank=proc_rank, world_size=world_size)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.used(batch[0]).square().mean()}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def wrapped(rank: int, folder: Path) -> Any:
    model = WrapsItself(Namespace())
    make_trainer(folder, devices=2).fit(model, loader(4))
    return model.wrapped, model.joined, model.used.weight.detach().clone()


def test_a_module_that_joins_and_wraps_itself(tmp_path: Path) -> None:
    first, second = run_trainers(wrapped, 2, tmp_path)
    assert (first[0], second[0]) == (1, 1)
    assert (first[1], second[1]) == ((0, 2), (1, 2))
    assert torch.equal(first[2], second[2])
