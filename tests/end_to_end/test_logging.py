"""Loggers in whole runs: which values arrive where, at which step."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from leyden.callbacks import Callback
from leyden.datamodule import LightningDataModule
from leyden.errors import ConfigurationError
from leyden.loggers import CSVLogger, Logger, TensorBoardLogger
from leyden.module import LightningModule
from leyden.trainer import Trainer

torch.set_num_threads(1)

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 2,
}


class Memory(Logger):
    """Keeps all that a logger is told."""

    name = "memory"
    version = 7

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.told: list[Any] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert all(type(value) in (int, float) for value in metrics.values())
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        self.told.append(("hyperparams", dict(params)))

    def log_graph(self, model: torch.nn.Module, input_array: Any = None) -> None:
        self.told.append("graph")

    def finalize(self, status: str) -> None:
        self.told.append(("finalize", status))


class Net(LightningModule):
    def __init__(self, width: int = 4, layers: tuple[int, ...] = (1, 2)) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("loss", float(self.global_step), on_step=True, on_epoch=True)
        return (self.weight * batch).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", float(self.current_epoch))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test", 3.5)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(batches: int = 4) -> DataLoader[Any]:
    return DataLoader(torch.ones(batches), batch_size=1)  # type: ignore[arg-type]


def make_trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(**{**QUIET, "default_root_dir": folder, "max_epochs": 2, **options})


def csv_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        accumulator = EventAccumulator(str(folder))
        accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


CSV_ROWS = [
    {"step": "2", "epoch": "0", "loss_step": "1.0"},
    {"step": "4", "epoch": "0", "loss_step": "3.0"},
    {"step": "4", "epoch": "0", "val": "0.0"},
    {"step": "4", "epoch": "0", "loss_epoch": "1.5"},
    {"step": "6", "epoch": "1", "loss_step": "5.0"},
    {"step": "8", "epoch": "1", "loss_step": "7.0"},
    {"step": "8", "epoch": "1", "val": "1.0"},
    {"step": "8", "epoch": "1", "loss_epoch": "5.5"},
]
SCALARS = {
    "hp_metric": [(0, -1.0)],
    "epoch": [(2, 0), (4, 0), (4, 0), (4, 0), (6, 1), (8, 1), (8, 1), (8, 1)],
    "loss_step": [(2, 1.0), (4, 3.0), (6, 5.0), (8, 7.0)],
    "loss_epoch": [(4, 1.5), (8, 5.5)],
    "val": [(4, 0.0), (8, 1.0)],
}


def test_without_a_logger_argument_tensorboard_gets_everything(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, log_every_n_steps=2)
    trainer.fit(Net(), data(), data())
    assert isinstance(trainer.logger, TensorBoardLogger)
    folder = tmp_path / "lightning_logs" / "version_0"
    assert trainer.log_dir == str(folder)
    assert scalars(folder) == SCALARS
    assert (folder / "hparams.yaml").read_text() == "width: 4\nlayers: [1, 2]\n"


def test_a_second_trainer_takes_the_next_version(tmp_path: Path) -> None:
    for _ in range(2):
        make_trainer(tmp_path, max_epochs=1).fit(Net(), data(1), data(1))
    assert sorted(path.name for path in (tmp_path / "lightning_logs").iterdir()) == ["version_0", "version_1"]


def test_a_csv_file_has_a_row_per_flush(tmp_path: Path) -> None:
    make_trainer(tmp_path, logger=CSVLogger(tmp_path), log_every_n_steps=2).fit(Net(), data(), data())
    folder = tmp_path / "lightning_logs" / "version_0"
    assert csv_rows(folder / "metrics.csv") == CSV_ROWS
    assert files(folder) == ["hparams.yaml", "metrics.csv"]


def test_two_loggers_get_the_same(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name="table"), TensorBoardLogger(tmp_path, name="board")]
    trainer = make_trainer(tmp_path, logger=loggers, log_every_n_steps=2)
    trainer.fit(Net(), data(), data())
    assert csv_rows(tmp_path / "table" / "version_0" / "metrics.csv") == CSV_ROWS
    assert scalars(tmp_path / "board" / "version_0") == SCALARS
    assert trainer.logger is loggers[0]
    assert trainer.loggers == loggers


@pytest.mark.parametrize("options", [{"logger": False}, {"fast_dev_run": True, "enable_checkpointing": None}])
def test_nothing_is_written(options: dict[str, Any], tmp_path: Path) -> None:
    class Draws(Net):
        def on_train_epoch_end(self) -> None:
            if self.logger is not None:
                self.logger.experiment.add_scalar("x", 1.0)  # user code that goes past log()

    trainer = make_trainer(tmp_path, **options)
    trainer.fit(Draws(), data(), data())
    trainer.test(Draws(), data())
    assert files(tmp_path) == []
    assert (trainer.log_dir is None) == ("fast_dev_run" in options)


def test_a_logger_of_ones_own_is_told_everything(tmp_path: Path) -> None:
    memory = Memory()
    trainer = make_trainer(tmp_path, logger=memory, max_epochs=1)
    trainer.fit(Net(), data(), data())
    assert memory.told == [("hyperparams", {"width": 4, "layers": (1, 2)}), "graph", ("finalize", "success")]
    assert memory.rows == [(4, {"val": 0.0, "epoch": 0}), (4, {"loss_epoch": 1.5, "epoch": 0})]


@pytest.mark.parametrize(("error", "status"), [(ValueError("x"), "failed"), (KeyboardInterrupt(), "interrupted")])
def test_a_logger_is_told_how_it_ended(error: BaseException, status: str, tmp_path: Path) -> None:
    class Breaks(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                raise error

    logger = CSVLogger(tmp_path)
    memory = Memory()
    trainer = make_trainer(tmp_path, logger=[logger, memory], log_every_n_steps=1)
    with pytest.raises(SystemExit if status == "interrupted" else ValueError):
        trainer.fit(Breaks(), data(), data())
    assert memory.told[-1] == ("finalize", status)
    assert csv_rows(Path(logger.log_dir, "metrics.csv")) == [{"step": "1", "epoch": "0", "loss_step": "0.0"}]


@pytest.mark.parametrize("every", [1, 3, 50])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_step_values_are_sent_after_every_nth_step(every: int, accumulate: int, tmp_path: Path) -> None:
    memory = Memory()
    trainer = make_trainer(tmp_path, logger=memory, log_every_n_steps=every, accumulate_grad_batches=accumulate)
    trainer.fit(Net(), data(30), data(1))
    steps = 2 * 30 // accumulate
    fired = [step for step, row in memory.rows if "loss_step" in row]
    assert fired == [step for step in range(1, steps + 1) if step % every == 0]
    assert [row["loss_step"] for _, row in memory.rows if "loss_step" in row] == [step - 1 for step in fired]
    assert [row["epoch"] for _, row in memory.rows if "loss_step" in row] == [
        (step - 1) * accumulate // 30 for step in fired
    ]
    assert [step for step, row in memory.rows if "loss_epoch" in row] == [steps // 2, steps]


def test_log_every_n_steps_0_sends_epochs_only(tmp_path: Path) -> None:
    memory = Memory()
    make_trainer(tmp_path, logger=memory, log_every_n_steps=0, max_epochs=1).fit(Net(), data(), data())
    assert [set(row) for _, row in memory.rows] == [{"val", "epoch"}, {"loss_epoch", "epoch"}]


def test_a_value_that_is_logged_now_and_then_is_sent_once(tmp_path: Path) -> None:
    class Rare(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx == 1:
                self.log("rare", 5.0)
            return self.weight.sum()

    memory = Memory()
    make_trainer(tmp_path, logger=memory, log_every_n_steps=2, max_epochs=1).fit(Rare(), data(6), data(1))
    assert [(step, row["rare"]) for step, row in memory.rows if "rare" in row] == [(2, 5.0)]


def test_validation_within_an_epoch_is_logged_at_the_step_it_happens(tmp_path: Path) -> None:
    memory = Memory()
    trainer = make_trainer(tmp_path, logger=memory, val_check_interval=0.5)
    trainer.fit(Net(), data(), data())
    assert [(step, row["epoch"]) for step, row in memory.rows if "val" in row] == [(2, 0), (4, 0), (6, 1), (8, 1)]


def test_the_sanity_check_is_not_logged(tmp_path: Path) -> None:
    memory = Memory()
    trainer = make_trainer(tmp_path, logger=memory, limit_train_batches=0)
    trainer.fit(Net(), data(), data())
    assert memory.rows == []
    assert trainer.callback_metrics == {}


def test_validate_and_test_are_logged_at_the_step_of_the_last_fit_and_saved(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(tmp_path, logger=logger, max_epochs=1)
    module = Net()
    trainer.fit(module, data(), data())
    assert trainer.validate(module, data()) == [{"val": 1.0}]
    assert trainer.test(module, data()) == [{"test": 3.5}]
    assert csv_rows(Path(logger.log_dir, "metrics.csv"))[2:] == [
        {"step": "4", "epoch": "1", "val": "1.0"},
        {"step": "4", "epoch": "1", "test": "3.5"},
    ]


def test_test_alone_is_saved(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    make_trainer(tmp_path, logger=logger).test(Net(), data())
    assert csv_rows(Path(logger.log_dir, "metrics.csv")) == [{"step": "0", "epoch": "0", "test": "3.5"}]


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_fitting_twice_goes_on_in_the_same_files(kind: Any, tmp_path: Path) -> None:
    logger = kind(tmp_path)
    trainer = make_trainer(tmp_path, logger=logger, log_every_n_steps=2, max_epochs=1)
    for _ in range(2):
        trainer.fit(Net(), data(), data())
        assert trainer.global_step == 4
    folder = tmp_path / "lightning_logs" / "version_0"
    if kind is CSVLogger:
        assert csv_rows(folder / "metrics.csv") == CSV_ROWS[:4] * 2
    else:
        assert scalars(folder)["loss_step"] == [(2, 1.0), (4, 3.0)] * 2
    assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]


def test_values_that_users_send_to_the_logger_arrive_too(tmp_path: Path) -> None:
    class Direct(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.logger.log_metrics({"own": 1.25}, step=trainer.global_step)

    logger = CSVLogger(tmp_path)
    make_trainer(tmp_path, logger=logger, callbacks=[Direct()], max_epochs=1).fit(Net(), data(), data())
    assert {"step": "4", "own": "1.25"} in csv_rows(Path(logger.log_dir, "metrics.csv"))


# hyperparameters


class Data(LightningDataModule):
    def __init__(self, batch_size: int = 8, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return data()

    def val_dataloader(self) -> Any:
        return data()


def test_hyperparameters_of_module_and_datamodule_are_merged(tmp_path: Path) -> None:
    memory, logger = Memory(), CSVLogger(tmp_path)
    trainer = make_trainer(tmp_path, logger=[memory, logger], max_epochs=1)
    trainer.fit(Net(), datamodule=Data())
    assert memory.told[0] == ("hyperparams", {"width": 4, "layers": (1, 2), "batch_size": 8})
    assert Path(logger.log_dir, "hparams.yaml").read_text() == "width: 4\nlayers: [1, 2]\nbatch_size: 8\n"


def test_hyperparameters_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'width'.*4 in Net and 9 in Data"):
        make_trainer(tmp_path, logger=Memory(), max_epochs=1).fit(Net(), datamodule=Data(width=9))


def test_hyperparameters_saved_with_logger_false_stay_away_from_the_loggers(tmp_path: Path) -> None:
    class Secret(Net):
        def __init__(self, key: str = "k") -> None:
            LightningModule.__init__(self)
            self.save_hyperparameters(logger=False)
            self.weight = torch.nn.Parameter(torch.ones(1))

    memory = Memory()
    make_trainer(tmp_path, logger=memory, max_epochs=1).fit(Secret(), data(), data())
    assert memory.told == ["graph", ("finalize", "success")]


def test_loggers_get_the_hyperparameters_as_they_were_saved(tmp_path: Path) -> None:
    memory = Memory()
    module = Net(layers=(3,))
    module.hparams.width = 100
    make_trainer(tmp_path, logger=memory, max_epochs=1).fit(module, data(), data())
    assert memory.told[0] == ("hyperparams", {"width": 4, "layers": (3,)})
