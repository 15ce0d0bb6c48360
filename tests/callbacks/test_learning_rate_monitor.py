from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from leyden.callbacks import LearningRateMonitor
from leyden.checkpoint.format import decode, encode
from leyden.errors import ConfigurationError


class Memory:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, dict(metrics)))


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(1))


def config(optimizer: Optimizer, interval: str = "epoch", name: str | None = None, factor: float = 0.5) -> Any:
    return SimpleNamespace(scheduler=StepLR(optimizer, 1, factor), interval=interval, name=name)


def fake_trainer(optimizers: list[Optimizer], configs: Any = (), **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "optimizers": optimizers,
        "lr_scheduler_configs": list(configs),
        "loggers": [Memory(), Memory()],
        "log_every_n_steps": 2,
        "global_step": 0,
        "current_epoch": 0,
        "fast_dev_run": 0,
        "callback_metrics": {},
    }
    return SimpleNamespace(**(settings | changes))


def fake_module(trainer: Any) -> Any:
    places: dict[str, bool] = {}

    def log_dict(values: dict[str, float], on_step: bool, on_epoch: bool, logger: bool) -> None:
        assert on_step != on_epoch
        assert not logger
        for key, value in values.items():
            assert places.setdefault(key, on_step) == on_step  # a module refuses two ways of logging one key
            trainer.callback_metrics[key] = value

    return SimpleNamespace(log_dict=log_dict)


def fit(monitor: LearningRateMonitor, trainer: Any, epochs: int = 2, steps: int = 4, accumulate: int = 1) -> None:
    module = fake_module(trainer)
    monitor.on_train_start(trainer, module)
    for _ in range(epochs):
        monitor.on_train_epoch_start(trainer, module)
        for batch in range(steps * accumulate):
            monitor.on_train_batch_start(trainer, module, None, batch)
            if (batch + 1) % accumulate == 0:
                for optimizer in trainer.optimizers:
                    optimizer.step()
                trainer.global_step += 1
                for one in trainer.lr_scheduler_configs:
                    if one.interval == "step":
                        one.scheduler.step()
        for one in trainer.lr_scheduler_configs:
            if one.interval == "epoch":
                one.scheduler.step()
        trainer.current_epoch += 1


def names(optimizers: list[Optimizer], configs: Any = (), **options: Any) -> list[str]:
    monitor = LearningRateMonitor("epoch", **options)
    trainer = fake_trainer(optimizers, configs)
    fit(monitor, trainer, epochs=1, steps=1)
    row = trainer.loggers[0].rows[0][1]
    assert list(trainer.callback_metrics) == list(row)
    return list(row)


class TestNames:
    def test_one_group(self) -> None:
        assert names([AdamW([parameter()])]) == ["lr-AdamW"]

    def test_several_groups(self) -> None:
        groups = [{"params": [parameter()]}, {"params": [parameter()]}]
        assert names([AdamW(groups)]) == ["lr-AdamW/pg1", "lr-AdamW/pg2"]
        assert names([AdamW([{**groups[0], "name": "enc"}, groups[1]])]) == ["lr-AdamW/enc", "lr-AdamW/pg2"]
        optimizer = AdamW(groups)
        assert names([optimizer], [config(optimizer, name="warm")]) == ["warm/pg1", "warm/pg2"]

    def test_several_optimizers(self) -> None:
        first, second, third = AdamW([parameter()]), AdamW([parameter()]), SGD([parameter()])
        assert names([first, second, third]) == ["lr-AdamW", "lr-AdamW-1", "lr-SGD"]
        assert names([first, second], [config(first, name="warm")]) == ["warm", "lr-AdamW"]

    def test_clashes(self) -> None:
        first, second = AdamW([parameter()]), AdamW([parameter()])
        with pytest.raises(ConfigurationError, match="Two optimizers would be logged as 'warm'"):
            names([first, second], [config(first, name="warm"), config(second, name="warm")])
        groups = [{"params": [parameter()], "name": "enc"}, {"params": [parameter()], "name": "enc"}]
        with pytest.raises(ConfigurationError, match="called 'enc'"):
            names([AdamW(groups)])

    def test_momentum_and_weight_decay(self) -> None:
        options = {"log_momentum": True, "log_weight_decay": True}
        expected = ["lr-AdamW", "lr-AdamW-momentum", "lr-AdamW-weight_decay"]
        assert names([AdamW([parameter()])], **options) == expected


def test_by_step_is_the_rate_of_that_step() -> None:
    optimizer = SGD([parameter()], lr=1.0)
    trainer = fake_trainer([optimizer], [config(optimizer, "step")])
    monitor = LearningRateMonitor()
    fit(monitor, trainer)
    expected = [(step, {"lr-SGD": 0.5 ** (step - 1)}) for step in (2, 4, 6, 8)]
    assert [logger.rows for logger in trainer.loggers] == [expected, expected]
    assert monitor.lrs == {"lr-SGD": [0.5, 0.5**3, 0.5**5, 0.5**7]}
    assert trainer.callback_metrics["lr-SGD"] == 0.5**7


def test_a_window_of_accumulated_batches_is_logged_once() -> None:
    optimizer = SGD([parameter()], lr=1.0)
    trainer = fake_trainer([optimizer], [config(optimizer, "step")], log_every_n_steps=1)
    monitor = LearningRateMonitor("step")
    fit(monitor, trainer, epochs=1, accumulate=3)
    assert monitor.lrs["lr-SGD"] == [1.0, 0.5, 0.25, 0.125]


def test_by_epoch() -> None:
    optimizer = SGD([parameter()], lr=1.0)
    trainer = fake_trainer([optimizer], [config(optimizer)])
    fit(LearningRateMonitor(), trainer, epochs=3)
    assert trainer.loggers[0].rows == [(0, {"lr-SGD": 1.0}), (4, {"lr-SGD": 0.5}), (8, {"lr-SGD": 0.25})]


def test_each_as_its_scheduler_says() -> None:
    first, second, free = SGD([parameter()], lr=1.0), AdamW([parameter()], lr=0.1), AdamW([parameter()], lr=0.2)
    configs = [config(first, "step", factor=1.0), config(second, "epoch", factor=1.0)]
    monitor = LearningRateMonitor()
    fit(monitor, fake_trainer([first, second, free], configs))
    counts = {name: len(values) for name, values in monitor.lrs.items()}
    assert counts == {"lr-SGD": 4, "lr-AdamW": 2, "lr-AdamW-1": 6}
    monitor = LearningRateMonitor("epoch")
    fit(monitor, fake_trainer([first, second, free], configs))
    assert {len(values) for values in monitor.lrs.values()} == {2}


def test_values_of_momentum_and_weight_decay() -> None:
    sgd, adam = SGD([parameter()], momentum=0.8, weight_decay=0.1), AdamW([parameter()], betas=(0.7, 0.9))
    monitor = LearningRateMonitor("epoch", log_momentum=True, log_weight_decay=True)
    fit(monitor, fake_trainer([sgd, adam]), epochs=1)
    assert monitor.last_momentum_values == {"lr-SGD-momentum": 0.8, "lr-AdamW-momentum": 0.7}
    assert monitor.last_weight_decay_values == {"lr-SGD-weight_decay": 0.1, "lr-AdamW-weight_decay": 0.01}


def test_tensor_rates_become_plain_numbers() -> None:
    trainer = fake_trainer([AdamW([parameter()], lr=torch.tensor(0.5))])
    fit(LearningRateMonitor("epoch"), trainer, epochs=1)
    assert type(trainer.loggers[0].rows[0][1]["lr-AdamW"]) is float


def test_a_resumed_run_shows_and_logs_the_same() -> None:
    def start() -> tuple[LearningRateMonitor, Any]:
        groups = [{"params": [parameter()], "lr": 0.5}, {"params": [parameter()], "lr": 0.25}]
        optimizer = SGD(groups, momentum=0.9)
        return LearningRateMonitor(log_momentum=True), fake_trainer([optimizer])

    monitor, trainer = start()
    fit(monitor, trainer, epochs=1, steps=4)
    whole, seen = monitor.lrs, trainer.loggers[0].rows
    assert [len(values) for values in whole.values()] == [3, 3]

    first, trainer = start()
    module = fake_module(trainer)
    first.on_train_start(trainer, module)
    first.on_train_epoch_start(trainer, module)
    for step in range(2):
        trainer.global_step = step
        first.on_train_batch_start(trainer, module, None, step)
    state, rows = decode(*encode({"state": first.state_dict()}))["state"], trainer.loggers[0].rows

    resumed, trainer = start()
    trainer.global_step = 2
    resumed.load_state_dict(state)
    resumed.setup(trainer, module, "fit")
    assert resumed.lrs == first.lrs
    resumed.on_train_start(trainer, module)
    resumed.on_train_epoch_start(trainer, fake_module(trainer))  # of the same epoch: it was logged already
    assert trainer.loggers[0].rows == []
    for step in range(2, 4):
        trainer.global_step = step
        resumed.on_train_batch_start(trainer, module, None, step)
    assert (resumed.lrs, rows + trainer.loggers[0].rows) == (whole, seen)
    assert resumed.last_momentum_values == monitor.last_momentum_values
    trainer.current_epoch = 1
    resumed.on_train_epoch_start(trainer, module)
    assert len(trainer.loggers[0].rows) == 2


def test_a_second_fit_logs_its_first_epoch() -> None:
    monitor = LearningRateMonitor("epoch")
    for _ in range(2):
        trainer = fake_trainer([SGD([parameter()])])
        fit(monitor, trainer, epochs=1, steps=1)
        assert len(trainer.loggers[0].rows) == 1


def test_the_state_of_a_long_run_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leyden.callbacks.learning_rate_monitor._KEPT", 5)
    optimizer = SGD([parameter()], lr=1.0)
    monitor, trainer = (
        LearningRateMonitor("step"),
        fake_trainer([optimizer], [config(optimizer, "step")], log_every_n_steps=1),
    )
    fit(monitor, trainer, epochs=1, steps=9)
    assert monitor.lrs["lr-SGD"] == [0.5**step for step in range(4, 9)]
    resumed = LearningRateMonitor("step")
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.lrs == monitor.lrs


def test_no_logger() -> None:
    optimizer = SGD([parameter()])
    with pytest.raises(ConfigurationError, match="no logger"):
        LearningRateMonitor().on_train_start(fake_trainer([optimizer], loggers=[]), None)  # type: ignore[arg-type]
    trial = fake_trainer([optimizer], loggers=[], fast_dev_run=1)
    LearningRateMonitor().on_train_start(trial, None)  # type: ignore[arg-type]


def test_no_optimizer_and_bad_interval() -> None:
    trainer = fake_trainer([])
    fit(LearningRateMonitor(), trainer)
    assert trainer.loggers[0].rows == []
    with pytest.raises(ConfigurationError, match="logging_interval='batch'"):
        LearningRateMonitor("batch")  # type: ignore[arg-type]
