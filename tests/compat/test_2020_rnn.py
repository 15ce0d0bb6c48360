"""A recurrent net with truncated back-propagation through time, as of 0.7, against a loop by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import leyden as pl
from leyden.compat.turns import split_batch
from leyden.errors import HookError
from quiet import Memory, make_trainer

pytestmark = pytest.mark.filterwarnings(r"ignore:\[LEY-former-name\]")

LENGTH, PART = 10, 4  # parts of 4, 4 and 2
SEQUENCES = torch.sin(torch.arange(LENGTH + 1) * 0.7 + torch.arange(12).unsqueeze(1)).unsqueeze(2)


class Recurrent(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(1, 6, batch_first=True), nn.Linear(6, 1)
        self.seen: list[tuple[int, int, bool]] = []

    def training_step(self, batch: Any, batch_idx: int, hiddens: Any) -> Any:
        x, y = batch
        self.seen.append((batch_idx, x.shape[1], hiddens is None or not hiddens.requires_grad))
        states, hiddens = self.rnn(x, hiddens)
        loss = F.mse_loss(self.out(states), y)
        return {"loss": loss, "hiddens": hiddens, "log": {"mse": loss}}

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(SEQUENCES[:, :-1], SEQUENCES[:, 1:]), batch_size=4)


def made(cls: type = Recurrent) -> Any:
    torch.manual_seed(2)
    return cls()


def by_hand(epochs: int) -> tuple[Recurrent, list[float]]:
    model, losses = made(), []
    optimizer = model.configure_optimizers()
    for _ in range(epochs):
        for batch_idx in range(3):
            rows, hiddens = slice(4 * batch_idx, 4 * batch_idx + 4), None
            for begin in range(0, LENGTH, PART):
                x, y = SEQUENCES[rows, :-1][:, begin : begin + PART], SEQUENCES[rows, 1:][:, begin : begin + PART]
                output = model.training_step((x, y), batch_idx, hiddens)
                optimizer.zero_grad()
                output["loss"].backward()
                optimizer.step()
                hiddens = output["hiddens"].detach()
            losses.append(output["loss"].item())
    return model, losses


def test_it_is_the_loop_by_hand_part_by_part(tmp_path: Path) -> None:
    memory, model = Memory(), made()
    trainer = make_trainer(tmp_path, max_epochs=3, truncated_bptt_steps=PART, logger=memory, log_every_n_steps=1)
    trainer.fit(model)
    hand, losses = by_hand(3)
    assert (
        model.seen == hand.seen == [(batch, part, True) for _ in range(3) for batch in range(3) for part in (4, 4, 2)]
    )
    for mine, theirs in zip(model.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert memory.of("mse") == pytest.approx(losses, rel=1e-5)  # of the last part of each batch
    assert trainer.global_step == 9  # batches


def test_it_can_be_set_on_the_module_as_in_1_x(tmp_path: Path) -> None:
    model = made()
    model.truncated_bptt_steps = PART
    make_trainer(tmp_path, max_epochs=3).fit(model)
    hand, _ = by_hand(3)
    torch.testing.assert_close(model.out.weight, hand.out.weight, rtol=0, atol=1e-6)


class SplitsItself(Recurrent):
    def tbptt_split_batch(self, batch: Any, split_size: int) -> Any:
        x, y = batch
        return [(x[:, :1], y[:, :1]), (x[:, 1:], y[:, 1:])]


def test_an_own_split_is_asked(tmp_path: Path) -> None:
    model = made(SplitsItself)
    make_trainer(tmp_path, truncated_bptt_steps=PART).fit(model)
    assert [length for _, length, _ in model.seen] == [1, 9] * 3


class TwoOptimizers(Recurrent):
    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int, hiddens: Any) -> Any:  # type: ignore[override]
        self.seen.append((batch_idx, optimizer_idx, hiddens is None))
        states, hiddens = self.rnn(batch[0], hiddens)
        return {"loss": F.mse_loss(self.out(states), batch[1]), "hiddens": hiddens}

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.rnn.parameters(), lr=0.1), torch.optim.SGD(self.out.parameters(), lr=0.1)]


def test_parts_are_the_outer_loop_and_optimizers_the_inner_one(tmp_path: Path) -> None:
    model = made(TwoOptimizers)
    make_trainer(tmp_path, truncated_bptt_steps=5, limit_train_batches=1).fit(model)
    assert [turn for _, turn, _ in model.seen] == [0, 1, 0, 1]
    assert [first for *_, first in model.seen] == [True, False, False, False]  # the state of the turn before


def test_without_a_place_for_the_hidden_state_it_is_refused(tmp_path: Path) -> None:
    class Blind(Recurrent):
        def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
            return {"loss": self.out(self.rnn(batch[0])[0]).mean()}

    with pytest.raises(HookError, match=r"truncated_bptt_steps is set, but Blind\.training_step.*no place for hiddens"):
        make_trainer(tmp_path, truncated_bptt_steps=PART).fit(made(Blind))


def test_batches_of_every_form_are_cut() -> None:
    x = torch.arange(12).view(2, 6)
    parts = split_batch({"x": x, "pair": (x, [x + 1]), "label": torch.tensor([1, 2]), "name": "n"}, 4)
    assert [part["x"].tolist() for part in parts] == [[[0, 1, 2, 3], [6, 7, 8, 9]], [[4, 5], [10, 11]]]
    assert [part["pair"][1][0].shape[1] for part in parts] == [4, 2]
    assert all(part["label"].tolist() == [1, 2] for part in parts)
    assert all(part["name"] == "n" for part in parts)
    with pytest.raises(ValueError, match=r"none.*tbptt_split_batch"):
        split_batch(torch.arange(3), 2)
    with pytest.raises(ValueError, match=r"lengths \[2, 6\]"):
        split_batch((x, x[:, :2]), 2)
