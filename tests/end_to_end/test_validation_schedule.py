"""When training stops to validate: every firing, as (epoch, batches done in it), against a formula."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import leyden as L
from leyden import run as run_module
from leyden.errors import ConfigurationError

torch.set_num_threads(1)

Firing = tuple[int, int]


class Noting(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.batches = 0
        self.fired: list[Firing] = []

    def on_train_epoch_start(self) -> None:
        self.batches = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches += 1
        return self.layer(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_validation_start(self) -> None:
        self.fired.append((self.current_epoch, self.batches))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Unsized(IterableDataset[Any]):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Any:
        return iter(torch.ones(self.samples, 1))


def sized(batches: int) -> Any:
    return DataLoader(torch.ones(batches, 1), batch_size=1)  # type: ignore[arg-type]


def unsized(batches: int) -> Any:
    return DataLoader(Unsized(batches), batch_size=1)


def firings(folder: Path, loader: Any, **options: Any) -> list[Firing]:
    module = Noting()
    settings: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 1,
    }
    L.Trainer(**(settings | options)).fit(module, loader, sized(1))
    return module.fired


def formula(
    batches: int, epochs: int, interval: int | float | None, every: int | None, accumulate: int
) -> list[Firing]:
    """Every batch at which a validation is due, moved to the end of its window of accumulated batches."""
    due: list[Firing] = []
    for epoch in range(epochs):
        if every is not None and (epoch + 1) % every:
            continue
        if interval is None or (interval == 1.0 and isinstance(interval, float)):
            each = batches
        elif isinstance(interval, float):
            each = max(1, int(batches * interval))
        else:
            each = interval
        for batch in range(1, batches + 1):
            counted = batch if every is not None else epoch * batches + batch
            if counted % each == 0:
                end_of_window = min(batches, -(-batch // accumulate) * accumulate)
                if not due or due[-1] != (epoch, end_of_window):
                    due.append((epoch, end_of_window))
    return due


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("interval", [None, 1, 2, 3, 7, 1.0, 0.5, 0.25, 0.1, 0.99])
@pytest.mark.parametrize("length", ["sized", "limited"])
def test_intervals_within_an_epoch(
    tmp_path: Path, length: str, interval: int | float | None, every: int, accumulate: int
) -> None:
    options: dict[str, Any] = {"limit_train_batches": 7} if length == "limited" else {}
    found = firings(
        tmp_path,
        unsized(9) if length == "limited" else sized(7),
        max_epochs=4,
        val_check_interval=interval,
        check_val_every_n_epoch=every,
        accumulate_grad_batches=accumulate,
        **options,
    )
    assert found == formula(7, 4, interval, every, accumulate)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("interval", [1, 3, 5, 7, 11, 20])
@pytest.mark.parametrize("loader", [sized(5), unsized(5)])
def test_intervals_across_epochs(tmp_path: Path, loader: Any, interval: int, accumulate: int) -> None:
    found = firings(
        tmp_path,
        loader,
        max_epochs=4,
        val_check_interval=interval,
        check_val_every_n_epoch=None,
        accumulate_grad_batches=accumulate,
    )
    assert found == formula(5, 4, interval, None, accumulate)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("interval", [None, 1, 2, 3, 7])
def test_a_loader_without_length_fires_as_one_with_length(
    tmp_path: Path, interval: int | None, accumulate: int
) -> None:
    found = firings(tmp_path, unsized(7), max_epochs=2, val_check_interval=interval, accumulate_grad_batches=accumulate)
    assert found == formula(7, 2, interval, 1, accumulate)


def test_the_formula_itself_on_cases_counted_by_hand() -> None:
    assert formula(7, 2, 3, 1, 1) == [(0, 3), (0, 6), (1, 3), (1, 6)]
    assert formula(7, 2, 3, 1, 2) == [(0, 4), (0, 6), (1, 4), (1, 6)]
    assert formula(7, 4, None, 2, 1) == [(1, 7), (3, 7)]
    assert formula(5, 3, 7, None, 1) == [(1, 2), (2, 4)]
    assert formula(7, 1, 0.5, 1, 1) == [(0, 3), (0, 6)]


def test_one_is_a_batch_and_one_point_nought_an_epoch(tmp_path: Path) -> None:
    assert firings(tmp_path, sized(3), max_epochs=1, val_check_interval=1) == [(0, 1), (0, 2), (0, 3)]
    assert firings(tmp_path, sized(3), max_epochs=1, val_check_interval=1.0) == [(0, 3)]


# By time


@pytest.mark.parametrize(
    ("accumulate", "expected"),
    # a batch takes 10 s, a validation none; due once 25 s have passed since the last one
    [(1, [(0, 3), (0, 6), (1, 2), (1, 5)]), (2, [(0, 4), (0, 7), (1, 4), (1, 7)])],
)
@pytest.mark.parametrize("interval", [timedelta(seconds=25), "00:00:00:25", {"seconds": 25}])
def test_a_duration_counts_from_the_last_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: Any, accumulate: int, expected: list[Firing]
) -> None:
    now = [time.monotonic()]
    monkeypatch.setattr(run_module.time, "monotonic", lambda: now[0])

    class Slow(Noting):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            now[0] += 10
            return super().training_step(batch, batch_idx)

    module = Slow()
    L.Trainer(
        max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        accelerator="cpu", default_root_dir=tmp_path, num_sanity_val_steps=0, val_check_interval=interval,
        accumulate_grad_batches=accumulate,
    ).fit(module, sized(7), sized(1))  # fmt: skip
    assert module.fired == expected


# What the end of training does to it


def test_the_last_step_validates_if_one_is_due_and_not_otherwise(tmp_path: Path) -> None:
    assert firings(tmp_path, sized(7), max_steps=4, val_check_interval=2) == [(0, 2), (0, 4)]
    assert firings(tmp_path, sized(7), max_steps=5, val_check_interval=2) == [(0, 2), (0, 4)]
    assert firings(tmp_path, sized(7), max_steps=5) == []


def test_a_validation_whose_window_was_cut_off_by_a_skip_is_made_up_for_at_the_next_step(tmp_path: Path) -> None:
    class Skipping(Noting):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if self.current_epoch == 0 and batch_idx == 3 else None

    module = Skipping()
    L.Trainer(
        max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        accelerator="cpu", default_root_dir=tmp_path, num_sanity_val_steps=0, val_check_interval=3,
        accumulate_grad_batches=2,
    ).fit(module, sized(6), sized(1))  # fmt: skip
    # the first was due after batch 3 of epoch 0, in a window that the skip cut off
    assert module.fired == [(1, 2), (1, 4), (1, 6)]


def test_epochs_with_different_numbers_of_batches(tmp_path: Path) -> None:
    class Growing:
        def __init__(self) -> None:
            self.epoch = 0

        def __iter__(self) -> Any:
            self.epoch += 1
            return iter(torch.ones(2 * self.epoch, 1, 1))

    assert firings(tmp_path, Growing(), max_epochs=3) == [(0, 2), (1, 4), (2, 6)]
    across = firings(tmp_path, Growing(), max_epochs=3, val_check_interval=5, check_val_every_n_epoch=None)
    assert across == [(1, 3), (2, 4)]


def test_without_a_validation_there_is_no_schedule(tmp_path: Path) -> None:
    assert firings(tmp_path, sized(3), max_epochs=2, limit_val_batches=0, val_check_interval=1) == []


# Refused


def test_an_interval_of_more_batches_than_an_epoch_has_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"val_check_interval=8 is more than the 7 training batches"):
        firings(tmp_path, sized(7), max_epochs=1, val_check_interval=8)
    with pytest.raises(
        ConfigurationError, match=r"val_check_interval=8 is more than the 5 .*check_val_every_n_epoch=None"
    ):
        firings(tmp_path, sized(9), max_epochs=1, val_check_interval=8, limit_train_batches=5)


def test_a_fraction_of_a_loader_without_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"val_check_interval=0.5 is a fraction .* has no length"):
        firings(tmp_path, unsized(7), max_epochs=1, val_check_interval=0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"val_check_interval": 0},
        {"val_check_interval": 0.0},
        {"val_check_interval": 1.5},
        {"val_check_interval": -1},
        {"val_check_interval": True},
        {"val_check_interval": "often"},
        {"val_check_interval": {"weekz": 1}},
        {"check_val_every_n_epoch": 0},
        {"check_val_every_n_epoch": 1.0},
        {"check_val_every_n_epoch": None},
        {"check_val_every_n_epoch": None, "val_check_interval": 0.5},
        {"check_val_every_n_epoch": None, "val_check_interval": 1.0},
    ],
)
def test_what_names_no_interval_is_refused_by_the_trainer(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="|".join(options)):
        L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", **options)
