"""A classifier of digits as it was written for 0.7, from `hparams` to `trainer.test()`, against a loop by hand."""

from __future__ import annotations

import os
import warnings
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import leyden as pl
from digits import digits
from leyden.callbacks import EarlyStopping, ModelCheckpoint

pytestmark = pytest.mark.filterwarnings(r"ignore:\[LEY-former-name\]")
with warnings.catch_warnings():  # the class below is made outside of any test
    warnings.simplefilter("ignore")
    pl.data_loader(print)


class DigitSystem(pl.LightningModule):
    def __init__(self, hparams: Any) -> None:
        super().__init__()
        self.hparams = hparams
        self.l1 = torch.nn.Linear(28 * 28, self.hparams.hidden_dim)
        self.l2 = torch.nn.Linear(self.hparams.hidden_dim, 10)
        self.prepared = 0

    def forward(self, x: Any) -> Any:
        return self.l2(torch.relu(self.l1(x.view(x.size(0), -1))))

    def training_step(self, batch: Any, batch_nb: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self.forward(x), y)
        return {"loss": loss, "log": {"train_loss": loss}, "progress_bar": {"nll": loss}}

    def validation_step(self, batch: Any, batch_nb: int) -> Any:
        x, y = batch
        y_hat = self.forward(x)
        return {"val_loss": F.cross_entropy(y_hat, y), "correct": (y_hat.argmax(1) == y).sum(), "size": len(y)}

    def validation_end(self, outputs: Any) -> Any:
        avg_loss = torch.stack([x["val_loss"] for x in outputs]).mean()
        accuracy = sum(x["correct"] for x in outputs).float() / sum(x["size"] for x in outputs)
        return {
            "val_loss": avg_loss,
            "log": {"val_loss": avg_loss, "val_acc": accuracy},
            "progress_bar": {"val_acc": accuracy},
        }

    def test_step(self, batch: Any, batch_nb: int) -> Any:
        return self.validation_step(batch, batch_nb)

    def test_end(self, outputs: Any) -> Any:
        result = self.validation_end(outputs)
        return {"test_loss": result["val_loss"], "log": {"test_acc": result["log"]["val_acc"]}}

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)]

    def prepare_data(self) -> None:
        self.prepared += 1

    def _loader(self, begin: int, end: int) -> Any:
        x, y = digits()
        return DataLoader(TensorDataset(x[begin:end], y[begin:end]), batch_size=self.hparams.batch_size)

    @pl.data_loader
    def train_dataloader(self) -> Any:
        return self._loader(0, 400)

    @pl.data_loader
    def val_dataloader(self) -> Any:
        return self._loader(400, 500)

    @pl.data_loader
    def test_dataloader(self) -> Any:
        return self._loader(500, 600)

    @staticmethod
    def add_model_specific_args(parent_parser: Any) -> Any:
        parser = ArgumentParser(parents=[parent_parser], add_help=False)
        parser.add_argument("--learning_rate", default=0.02, type=float)
        parser.add_argument("--batch_size", default=32, type=int)
        parser.add_argument("--hidden_dim", default=16, type=int)
        return parser


def arguments(*written: str) -> Namespace:
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--epochs", default=3, type=int)
    return DigitSystem.add_model_specific_args(parser).parse_args(written)


def by_hand(hparams: Namespace) -> tuple[DigitSystem, list[float], list[tuple[float, float]]]:
    """The same training as a loop: the module, the losses, and (val_loss, val_acc) of each epoch."""
    torch.manual_seed(7)
    model = DigitSystem(hparams)
    x, y = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=hparams.learning_rate)
    losses, validations = [], []
    for _ in range(hparams.epochs):
        for begin in range(0, 400, hparams.batch_size):
            end = min(begin + hparams.batch_size, 400)
            loss = F.cross_entropy(model(x[begin:end]), y[begin:end])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            starts = range(400, 500, hparams.batch_size)
            parts = [(x[s : min(s + hparams.batch_size, 500)], y[s : min(s + hparams.batch_size, 500)]) for s in starts]
            mean = sum(float(F.cross_entropy(model(a), b)) for a, b in parts) / len(parts)
            right = sum(int((model(a).argmax(1) == b).sum()) for a, b in parts)
        validations.append((mean, right / 100))
    return model, losses, validations


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[DigitSystem, pl.Trainer, Path]:
    folder = tmp_path_factory.mktemp("run")
    hparams = arguments()
    torch.manual_seed(7)
    model = DigitSystem(hparams)
    (folder / "kept").mkdir()  # filepath is a folder if there is one, else a file's name
    checkpoint = ModelCheckpoint(
        filepath=os.fspath(folder / "kept"), save_top_k=1, verbose=False, monitor="val_loss", mode="min", prefix=""
    )
    trainer = pl.Trainer(
        gpus=0,
        max_nb_epochs=hparams.epochs,
        default_save_path=os.fspath(folder),
        checkpoint_callback=checkpoint,
        early_stop_callback=EarlyStopping("val_loss", patience=3),
        show_progress_bar=False,
        row_log_interval=1,
        weights_summary=None,
        nb_sanity_val_steps=0,
    )
    trainer.fit(model)
    return model, trainer, folder


def test_it_trains_to_the_same_weights_as_the_loop_by_hand(trained: Any) -> None:
    model, trainer, _ = trained
    hand, losses, validations = by_hand(arguments())
    for mine, theirs in zip(model.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(losses[-1], rel=1e-5)
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(validations[-1][0], rel=1e-5)
    assert float(trainer.callback_metrics["val_acc"]) == pytest.approx(validations[-1][1])
    assert validations[-1][1] > 0.75


def test_what_log_and_progress_bar_hold_goes_where_it_belongs(trained: Any) -> None:
    _, trainer, _ = trained
    assert {"train_loss", "val_loss", "val_acc"} <= set(trainer.logged_metrics)
    assert "nll" not in trainer.logged_metrics
    assert {"nll", "val_acc", "loss"} <= set(trainer.progress_bar_metrics)
    assert "val_loss" not in trainer.progress_bar_metrics
    assert {"nll", "loss", "val_loss"} <= set(trainer.callback_metrics)


def test_the_callbacks_of_then_watch_the_key(trained: Any) -> None:
    _, trainer, folder = trained
    _, _, validations = by_hand(arguments())
    assert float(trainer.checkpoint_callback.best_model_score) == pytest.approx(
        min(v for v, _ in validations), rel=1e-5
    )
    assert Path(trainer.checkpoint_callback.best_model_path).parent == folder / "kept"
    assert float(trainer.early_stopping_callback.best_score) == pytest.approx(min(v for v, _ in validations), rel=1e-5)
    assert trainer.early_stopping_callback.patience == 3


def test_test_without_a_model_uses_the_one_that_was_trained(trained: Any) -> None:
    _, trainer, _ = trained
    (results,) = trainer.test()
    x, y = digits()
    best = DigitSystem.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    with torch.no_grad():
        expected = float((best(x[500:]).argmax(1) == y[500:]).float().mean())
    assert results["test_acc"] == pytest.approx(expected)
    assert results["test_loss"] > 0


def test_a_checkpoint_brings_the_namespace_back(trained: Any) -> None:
    _, trainer, _ = trained
    path = trainer.checkpoint_callback.best_model_path
    model = DigitSystem.load_from_checkpoint(path)
    assert isinstance(model.hparams, Namespace)
    assert vars(model.hparams) == vars(arguments())
    assert pl.load_checkpoint(path)["hyper_parameters"] == vars(arguments())


def test_load_from_metrics_reads_the_table_that_the_loggers_of_then_wrote(trained: Any, tmp_path: Path) -> None:
    _, trainer, _ = trained
    table = tmp_path / "meta_tags.csv"
    table.write_text("key,value\nlearning_rate,0.02\nbatch_size,32\nhidden_dim,16\nepochs,3\nname,a b\n")
    model = DigitSystem.load_from_metrics(trainer.checkpoint_callback.best_model_path, os.fspath(table))
    assert vars(model.hparams) == {**vars(arguments()), "name": "a b"}
    assert torch.equal(
        model.l1.weight, DigitSystem.load_from_checkpoint(trainer.checkpoint_callback.best_model_path).l1.weight
    )


def test_nothing_of_today_stays_on_the_module(trained: Any) -> None:
    model, _, _ = trained
    assert not {"training_step", "validation_step", "configure_optimizers", "on_validation_epoch_end"} & set(
        vars(model)
    )
    assert model.automatic_optimization


def test_data_is_prepared_once(trained: Any) -> None:
    model, _, _ = trained
    assert model.prepared >= 1


def test_each_spelling_is_told_of_once(tmp_path: Path) -> None:
    model = DigitSystem(arguments("--batch_size", "200"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer = pl.Trainer(max_epochs=2, default_save_path=os.fspath(tmp_path), show_progress_bar=False, logger=False)
        trainer.fit(model)
        trainer.test()
    words = [str(each.message) for each in told if "former-name" in str(each.message)]
    assert len(words) == len(set(words))
    for spelling in (
        "default_save_path",
        "show_progress_bar",
        "DigitSystem.validation_end",
        "DigitSystem.test_end",
        "'log'",
    ):
        assert any(spelling in each for each in words), (spelling, words)


def test_a_trial_run_writes_nothing(tmp_path: Path) -> None:
    model = DigitSystem(arguments())
    trainer = pl.Trainer(fast_dev_run=True, default_save_path=os.fspath(tmp_path), show_progress_bar=False)
    trainer.fit(model)
    assert trainer.global_step == 1
    assert list(tmp_path.iterdir()) == []
