"""Schedulers step when the closed form says, and the user's own hooks of optimization are called as documented."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

import leyden
from leyden.callbacks import GradientAccumulationScheduler
from leyden.errors import MetricError

torch.set_num_threads(1)


def make_trainer(folder: Path, **options: Any) -> leyden.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return leyden.Trainer(**(settings | options))


def loader(batches: int = 4) -> DataLoader[Any]:
    return DataLoader(torch.ones(batches, 2), batch_size=1)  # type: ignore[arg-type]


class Traced(leyden.LightningModule):
    """Notes the learning rate that each optimizer step uses."""

    def __init__(self, make: Any, **config: Any) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.make, self.config = make, config
        self.lrs: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.lrs.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make(optimizer), **self.config}}

    @property
    def lr(self) -> float:
        return self.trainer.optimizers[0].param_groups[0]["lr"]


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


# The trace against the closed form


@pytest.mark.parametrize("frequency", [1, 2, 3])
@pytest.mark.parametrize(("batches", "accumulate"), [(4, 1), (4, 2), (5, 2), (7, 3)])
def test_interval_step_counts_optimizer_steps_over_epochs(
    frequency: int, batches: int, accumulate: int, tmp_path: Path
) -> None:
    module = Traced(halving, interval="step", frequency=frequency)
    trainer = make_trainer(tmp_path, max_epochs=3, accumulate_grad_batches=accumulate)
    trainer.fit(module, loader(batches))
    steps = 3 * math.ceil(batches / accumulate)
    assert module.lrs == [0.5 ** (step // frequency) for step in range(steps)]
    assert module.lr == 0.5 ** (steps // frequency)


@pytest.mark.parametrize("frequency", [1, 2, 3])
@pytest.mark.parametrize(("batches", "accumulate"), [(4, 1), (5, 2)])
def test_interval_epoch_counts_epochs(frequency: int, batches: int, accumulate: int, tmp_path: Path) -> None:
    module = Traced(halving, interval="epoch", frequency=frequency)
    trainer = make_trainer(tmp_path, max_epochs=5, accumulate_grad_batches=accumulate)
    trainer.fit(module, loader(batches))
    steps = math.ceil(batches / accumulate)
    assert module.lrs == [0.5 ** (epoch // frequency) for epoch in range(5) for _ in range(steps)]
    assert module.lr == 0.5 ** (5 // frequency)


def test_an_epoch_without_known_length_counts_too(tmp_path: Path) -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            return iter(torch.ones(3, 2))

    module = Traced(halving, interval="epoch")
    make_trainer(tmp_path, max_epochs=3).fit(module, DataLoader(Stream(), batch_size=1))
    assert module.lrs == [1.0] * 3 + [0.5] * 3 + [0.25] * 3


def test_epoch_is_the_default_interval(tmp_path: Path) -> None:
    class Simple(Traced):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [halving(optimizer)]

    module = Simple(None)
    make_trainer(tmp_path, max_epochs=2).fit(module, loader(2))
    assert module.lrs == [1.0, 1.0, 0.5, 0.5]


def test_warm_up_by_lambda_equals_its_closed_form(tmp_path: Path) -> None:
    module = Traced(lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 5)), interval="step")
    make_trainer(tmp_path, max_epochs=2).fit(module, loader(4))
    assert module.lrs == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0])


def test_two_schedulers_of_one_optimizer_step_at_their_own_intervals(tmp_path: Path) -> None:
    class Two(Traced):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            decay = lr_scheduler.MultiplicativeLR(optimizer, lambda _: 0.5)
            boost = lr_scheduler.MultiplicativeLR(optimizer, lambda _: 10.0)
            return [optimizer], [
                {"scheduler": decay, "interval": "step", "frequency": 2},
                {"scheduler": boost, "interval": "epoch"},
            ]

    module = Two(None)
    make_trainer(tmp_path, max_epochs=2).fit(module, loader(3))
    # steps 0 1 | decay | 2 | boost | 3 | decay | 4 5 | decay, boost
    assert module.lrs == [1.0, 1.0, 0.5, 5.0, 2.5, 2.5]
    assert module.lr == 12.5


def test_a_scheduler_that_is_not_torchs_is_stepped(tmp_path: Path) -> None:
    class Counter:
        steps = 0

        def step(self) -> None:
            self.steps += 1

    counter = Counter()
    make_trainer(tmp_path, max_epochs=2).fit(Traced(lambda _: counter, interval="step"), loader(3))
    assert counter.steps == 6


def test_a_stop_in_mid_epoch_steps_no_epoch_scheduler(tmp_path: Path) -> None:
    module = Traced(halving, interval="epoch")
    make_trainer(tmp_path, max_steps=6).fit(module, loader(4))
    assert module.lrs == [1.0] * 4 + [0.5] * 2
    assert module.lr == 0.5


def test_an_epoch_whose_rest_is_skipped_is_an_epoch_for_schedulers(tmp_path: Path) -> None:
    class Skipping(Traced):
        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

    module = Skipping(halving, interval="epoch")
    make_trainer(tmp_path, max_epochs=3).fit(module, loader(3))
    assert module.lrs == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_steps_without_any_loss_do_not_count(tmp_path: Path) -> None:
    class Absent(Traced):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            return None if batch_idx == 1 else self.layer(batch).mean()

    module = Absent(halving, interval="step")
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, loader(3))
    assert module.lrs == [1.0, 0.5]
    assert (trainer.global_step, trainer.skipped_batches) == (2, 1)


# Watching a value


class Watched(Traced):
    """Logs the given values, one per validation."""

    def __init__(self, values: list[float], **config: Any) -> None:
        super().__init__(plateau, **config)
        self.values = values

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.values.pop(0))


def plateau(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


def test_plateau_sees_each_epochs_validation(tmp_path: Path) -> None:
    module = Watched([3.0, 2.0, 2.5, 1.0, 1.0], monitor="val_loss")
    make_trainer(tmp_path, max_epochs=5).fit(module, loader(2), loader(1))
    assert module.lrs == [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    assert module.lr == 0.25


def test_plateau_may_watch_the_epoch_mean_of_a_training_value(tmp_path: Path) -> None:
    class Training(Traced):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("train_loss", 2.0 + self.current_epoch + batch_idx, on_step=False, on_epoch=True)
            return self.layer(batch).mean()

    module = Training(plateau, monitor="train_loss")
    make_trainer(tmp_path, max_epochs=3).fit(module, loader(2))
    assert module.lrs == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5]  # rises from the second epoch on


def test_plateau_per_step_sees_step_values(tmp_path: Path) -> None:
    values = [3.0, 2.0, 2.5, 1.0, 4.0, 0.5]

    class Training(Traced):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("loss", values[self.global_step])
            return self.layer(batch).mean()

    module = Training(plateau, monitor="loss", interval="step")
    make_trainer(tmp_path, max_epochs=2).fit(module, loader(3))
    assert module.lrs == [1.0, 1.0, 1.0, 0.5, 0.5, 0.25]
    assert module.lr == 0.25


def test_plateau_per_step_with_frequency_reads_the_newest_value_only_then(tmp_path: Path) -> None:
    values = [3.0, 2.0, 9.0, 1.0, 9.0, 4.0]

    class Training(Traced):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("loss", values[self.global_step])
            return self.layer(batch).mean()

    module = Training(plateau, monitor="loss", interval="step", frequency=2)
    make_trainer(tmp_path, max_epochs=1).fit(module, loader(6))
    assert module.lrs == [1.0] * 6  # 2.0, 1.0, and 4.0 only after the last step
    assert module.lr == 0.5


def test_plateau_every_second_epoch(tmp_path: Path) -> None:
    module = Watched([1.0, 2.0], monitor="val_loss", frequency=2)
    make_trainer(tmp_path, max_epochs=4, check_val_every_n_epoch=2).fit(module, loader(1), loader(1))
    assert module.lrs == [1.0] * 4
    assert module.lr == 0.5


def test_plateau_is_not_stepped_by_an_epoch_that_was_cut_short(tmp_path: Path) -> None:
    module = Watched([1.0], monitor="val_loss")
    make_trainer(tmp_path, max_steps=6).fit(module, loader(4), loader(1))
    assert module.lr == 1.0  # the second epoch brought no new value, and did not end


def test_a_missing_monitored_key_is_an_error_that_names_those_there_are(tmp_path: Path) -> None:
    module = Watched([1.0], monitor="val_los")
    with pytest.raises(
        MetricError, match=r"ReduceLROnPlateau monitors 'val_los'.*Logged are: 'val_loss'\. Did you mean 'val_loss'\?"
    ):
        make_trainer(tmp_path, max_epochs=1).fit(module, loader(2), loader(1))


def test_a_missing_key_is_waited_for_if_not_strict(tmp_path: Path) -> None:
    module = Watched([1.0, 2.0], monitor="val_loss", strict=False)
    make_trainer(tmp_path, max_epochs=4, check_val_every_n_epoch=2).fit(module, loader(1), loader(1))
    # epoch 0: nothing known; 1: 1.0; 2: still 1.0, no better; 3: 2.0
    assert module.lrs == [1.0, 1.0, 1.0, 0.5]
    assert module.lr == 0.25


def test_a_strict_key_of_a_validation_that_was_not_due_is_an_error(tmp_path: Path) -> None:
    module = Watched([1.0], monitor="val_loss")
    with pytest.raises(MetricError, match=r"nothing: no value has been logged"):
        make_trainer(tmp_path, max_epochs=2, check_val_every_n_epoch=2).fit(module, loader(1), loader(1))


# How many steps there will be


class OneCycle(Traced):
    def __init__(self) -> None:
        super().__init__(None)
        self.estimated: float = 0

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0, momentum=0.9)
        self.estimated = self.trainer.estimated_stepping_batches
        scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=int(self.estimated))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def one_cycle(total: int) -> list[float]:
    """The learning rates of OneCycleLR's defaults: cosines up to 1 at 30 %, then down to 1/25/10⁴."""

    def between(start: float, end: float, part: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * part))

    peak = 0.3 * total - 1
    return [
        between(1 / 25, 1.0, step / peak)
        if step <= peak
        else between(1.0, 1 / 250000, (step - peak) / (total - 1 - peak))
        for step in range(total)
    ]


@pytest.mark.parametrize(
    ("options", "batches", "steps"),
    [
        ({"max_epochs": 3}, 10, 30),
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, 10, 9),
        ({"max_epochs": 3, "accumulate_grad_batches": 4, "limit_train_batches": 5}, 10, 6),
        ({"max_epochs": 4, "limit_train_batches": 0.5}, 10, 20),
        ({"max_epochs": 3, "max_steps": 7, "accumulate_grad_batches": 4}, 10, 7),
        ({"max_steps": 13}, 10, 13),
        ({"max_epochs": 2, "overfit_batches": 3}, 10, 6),
        ({"max_epochs": -1, "max_steps": 12}, 10, 12),
        ({"fast_dev_run": 6}, 10, 6),
    ],
)
def test_one_cycle_over_the_estimated_steps_equals_its_closed_form(
    options: dict[str, Any], batches: int, steps: int, tmp_path: Path
) -> None:
    module = OneCycle()
    trainer = make_trainer(tmp_path, **options)
    trainer.fit(module, loader(batches))
    assert module.estimated == steps == trainer.global_step
    assert module.lrs == pytest.approx(one_cycle(steps))


def test_estimated_steps_follow_an_accumulation_that_changes_by_epoch(tmp_path: Path) -> None:
    module = OneCycle()
    schedule = GradientAccumulationScheduler({0: 1, 1: 3, 3: 4})
    trainer = make_trainer(tmp_path, max_epochs=4, callbacks=[schedule])
    trainer.fit(module, loader(10))
    assert module.estimated == 10 + 4 + 4 + 3 == trainer.global_step
    assert module.lrs == pytest.approx(one_cycle(21))


@pytest.mark.parametrize(
    ("options", "expected"), [({"max_epochs": 2}, math.inf), ({"max_epochs": 2, "max_steps": 9}, 9)]
)
def test_estimated_steps_of_a_stream_without_length(options: dict[str, Any], expected: float, tmp_path: Path) -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            return iter(torch.ones(3, 2))

    class Asking(Traced):
        def configure_optimizers(self) -> Any:
            estimated.append(self.trainer.estimated_stepping_batches)
            return torch.optim.SGD(self.parameters(), lr=1.0)

    estimated: list[float] = []
    make_trainer(tmp_path, **options).fit(Asking(None), DataLoader(Stream(), batch_size=1))
    assert estimated == [expected]


def test_estimated_steps_of_an_endless_run(tmp_path: Path) -> None:
    class Stopping(Traced):
        def configure_optimizers(self) -> Any:
            assert self.trainer.estimated_stepping_batches == math.inf
            return torch.optim.SGD(self.parameters(), lr=1.0)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.trainer.should_stop = True

    trainer = make_trainer(tmp_path, max_epochs=-1)
    trainer.fit(Stopping(None), loader(2))
    assert trainer.global_step == 1
