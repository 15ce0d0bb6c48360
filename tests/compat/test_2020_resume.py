"""Resume and test from a path, as of 0.7: `Trainer(resume_from_checkpoint=PATH)`."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import leyden as pl
from quiet import make_trainer

pytestmark = pytest.mark.filterwarnings(r"ignore:\[LEY-former-name\]")

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


class Regression(pl.LightningModule):
    def __init__(self, hparams: Any) -> None:
        super().__init__()
        self.hparams = hparams
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_nb: int) -> Any:
        loss = F.mse_loss(self(batch[0]), batch[1])
        return {"loss": loss, "log": {"train_loss": loss}}

    def test_step(self, batch: Any, batch_nb: int) -> Any:
        return {"loss": F.mse_loss(self(batch[0]), batch[1], reduction="none")}

    def test_epoch_end(self, outputs: Any) -> Any:
        return {"test_loss": torch.cat([each["loss"] for each in outputs]).mean()}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)

    def test_dataloader(self) -> Any:
        return DataLoader(TensorDataset(X, Y), batch_size=7)


def made(seed: int = 1) -> Regression:
    torch.manual_seed(seed)
    return Regression(Namespace(lr=0.05))


def trainer_of_then(folder: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        gpus=None,
        default_save_path=os.fspath(folder),
        show_progress_bar=False,
        weights_summary=None,
        checkpoint_callback=False,
        logger=False,
        **options,
    )


@pytest.fixture
def half(tmp_path: Path) -> Path:
    trainer = trainer_of_then(tmp_path, max_nb_epochs=2)
    trainer.fit(made())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    return tmp_path / "half.ckpt"


def test_fit_goes_on_to_the_same_weights(tmp_path: Path, half: Path) -> None:
    straight = made()
    trainer_of_then(tmp_path, max_nb_epochs=4).fit(straight)
    resumed = made(seed=99)
    trainer = trainer_of_then(tmp_path, max_nb_epochs=4, resume_from_checkpoint=os.fspath(half))
    trainer.fit(resumed)
    assert trainer.global_step == 32
    for mine, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_test_has_the_weights_of_the_path(tmp_path: Path, half: Path) -> None:
    other = made(seed=99)
    (results,) = trainer_of_then(tmp_path, resume_from_checkpoint=os.fspath(half)).test(other)
    trained = Regression.load_from_checkpoint(half).eval()
    with torch.no_grad():
        expected = F.mse_loss(trained(X), Y).item()
    assert results["test_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_path_that_is_given_to_the_verb_counts(tmp_path: Path, half: Path) -> None:
    model = made(seed=99)
    trainer = trainer_of_then(tmp_path, resume_from_checkpoint=os.fspath(tmp_path / "there is none.ckpt"))
    (results,) = trainer.test(model, ckpt_path=half)
    assert results["test_loss"] > 0
    with pytest.raises(pl.errors.CheckpointError, match="there is none"):
        trainer.test(model)


def test_load_from_checkpoint_then_freeze_and_predict(half: Path) -> None:
    model = Regression.load_from_checkpoint(os.fspath(half))
    model.freeze()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.hparams.lr == 0.05
    assert model(X).shape == (60, 1)


def test_training_of_today_goes_on_from_it_as_well(tmp_path: Path, half: Path) -> None:
    model = made(seed=99)
    trainer = make_trainer(tmp_path, max_epochs=3)
    trainer.fit(model, ckpt_path=half)
    assert trainer.global_step == 24
