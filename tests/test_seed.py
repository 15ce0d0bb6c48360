"""Seeding, and isolating the random state."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import leyden
from leyden.errors import ConfigurationError
from leyden.seed import (
    SEED_VARIABLE,
    capture_random_state,
    isolated_random_state,
    restore_random_state,
    seed_everything,
)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SEED_VARIABLE, "0")
    monkeypatch.delenv(SEED_VARIABLE)


def draw() -> tuple[float, float, float, float]:
    return random.random(), float(np.random.rand()), random.gauss(0, 1), torch.rand(()).item()


def test_the_same_seed_gives_the_same_numbers_and_another_gives_others() -> None:
    seed_everything(7)
    first = [draw(), draw()]
    seed_everything(7)
    assert [draw(), draw()] == first
    seed_everything(8)
    assert all(one != other for one, other in zip(draw(), first[0], strict=True))


def test_each_library_is_seeded_as_by_hand() -> None:
    seed_everything(1234)
    found = random.random(), float(np.random.rand()), torch.rand(()).item()
    random.seed(1234)
    np.random.seed(1234)
    torch.manual_seed(1234)
    assert found == (random.random(), float(np.random.rand()), torch.rand(()).item())


def test_the_seed_is_returned_printed_and_kept_in_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert seed_everything(42) == 42
    assert capsys.readouterr().out == "Seed set to 42\n"
    assert os.environ["PL_GLOBAL_SEED"] == "42"
    assert seed_everything(43, workers=True, verbose=False) == 43
    assert capsys.readouterr().out == ""


def test_without_a_seed_the_environments_is_taken_or_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seed_everything() == 0
    monkeypatch.setenv(SEED_VARIABLE, "99")
    assert seed_everything() == 99
    found = draw()
    seed_everything(99)
    assert draw() == found


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, "seven", [1]])
def test_a_wrong_seed_is_refused_and_nothing_is_seeded(seed: Any) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with pytest.raises(ConfigurationError, match=r"seed=.* is not valid\. Allowed: an integer from 0 to 4294967295"):
        seed_everything(seed)
    assert torch.equal(torch.get_rng_state(), before)
    assert SEED_VARIABLE not in os.environ


@pytest.mark.parametrize("seed", [0, 2**32 - 1, "17", np.int64(3)])
def test_seeds_at_the_edges_and_in_other_forms(seed: Any) -> None:
    assert seed_everything(seed) == int(seed)


def test_a_wrong_seed_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SEED_VARIABLE, "many")
    with pytest.raises(ConfigurationError, match="seed='many' is not valid"):
        seed_everything()


def test_the_random_state_can_be_taken_and_given_back() -> None:
    seed_everything(3)
    random.gauss(0, 1)  # leaves a second normal number for the next call
    np.random.randn()
    state = capture_random_state()
    expected = [draw(), draw(), (np.random.randn(), random.gauss(0, 1))]
    seed_everything(4)
    restore_random_state(state)
    assert [draw(), draw(), (np.random.randn(), random.gauss(0, 1))] == expected


def test_drawing_in_isolation_leaves_no_trace_also_after_an_error() -> None:
    seed_everything(3)
    expected = [draw(), draw()]
    seed_everything(3)
    with isolated_random_state():
        inside = draw()
        seed_everything(8)
        draw()
    assert inside == expected[0]

    def failing() -> None:
        with isolated_random_state():
            draw()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert [draw(), draw()] == expected


class Noise(leyden.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.drop = torch.nn.Dropout(0.5)
        self.drawn: list[Any] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.drawn.append((batch.tolist(), draw()))
        return self.drop(self.layer(batch)).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        draw()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, **options: Any) -> Noise:
    seed_everything(21, verbose=False)
    module = Noise()
    trainer = leyden.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        max_epochs=2,
        **options,
    )
    loader: DataLoader[Any] = DataLoader(torch.arange(12.0).reshape(6, 2), batch_size=2, shuffle=True)  # type: ignore[arg-type]
    trainer.fit(module, loader, DataLoader(torch.ones(4, 2), batch_size=2))  # type: ignore[arg-type]
    return module


def test_a_seeded_run_repeats_itself(tmp_path: Path) -> None:
    first, second = fit(tmp_path), fit(tmp_path)
    assert first.drawn == second.drawn
    assert len(first.drawn) == 6
    assert torch.equal(first.layer.weight, second.layer.weight)


def test_the_sanity_check_draws_in_isolation(tmp_path: Path) -> None:
    with_check, without = fit(tmp_path, num_sanity_val_steps=2), fit(tmp_path, num_sanity_val_steps=0)
    assert with_check.drawn == without.drawn
    assert torch.equal(with_check.layer.weight, without.layer.weight)


class Augmented(Dataset[Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([random.random(), float(np.random.rand()), torch.rand(()).item()], dtype=torch.float64)


def test_loader_workers_draw_different_numbers_that_repeat() -> None:
    def numbers() -> Tensor:
        seed_everything(5, workers=True, verbose=False)
        return torch.cat(list(DataLoader(Augmented(), batch_size=2, num_workers=2)))

    first = numbers()
    assert torch.equal(first, numbers())
    assert all(len(set(column.tolist())) == 8 for column in first.T)
