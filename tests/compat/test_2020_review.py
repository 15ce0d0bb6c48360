"""What a review of the API of 2020 found: numbers against loops by hand, and what is left behind."""

from __future__ import annotations

import copy
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden as pl
from leyden.errors import ConfigurationError
from quiet import Memory, make_trainer

pytestmark = pytest.mark.filterwarnings(r"ignore:\[LEY-(former-name|no-val-loader|compile-former)\]")

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))


def loader(count: int = 8, size: int = 2) -> Any:
    return DataLoader(TensorDataset(X[:count]), batch_size=size)


class Two(pl.LightningModule):
    """Two layers with an optimizer each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
        self.calls: list[Any] = []

    def loss(self, batch: Any, optimizer_idx: int) -> Any:
        return ((self.a, self.b)[optimizer_idx](batch[0]) - 1).square().mean()

    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
        return {"loss": self.loss(batch, optimizer_idx)}

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.a.parameters(), lr=0.1), torch.optim.SGD(self.b.parameters(), lr=0.1)]


def weights(module: Any) -> list[Any]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def assert_equal(one: list[Any], other: list[Any]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_hooks_of_1_x_know_whose_turn_it_is(tmp_path: Path) -> None:
    class Asks(Two):
        def configure_gradient_clipping(  # type: ignore[override]
            self, optimizer: Any, optimizer_idx: int, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
        ) -> None:
            self.calls.append(("clip", optimizer_idx, gradient_clip_val, gradient_clip_algorithm))

        def on_before_optimizer_step(self, optimizer: Any, optimizer_idx: int) -> None:  # type: ignore[override]
            self.calls.append(("before", optimizer_idx))

        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_idx: int) -> None:  # type: ignore[override]
            self.calls.append(("zero", epoch, batch_idx, optimizer_idx))
            optimizer.zero_grad()

        def lr_scheduler_step(self, scheduler: Any, optimizer_idx: int, metric: Any) -> None:  # type: ignore[override]
            self.calls.append(("scheduler", optimizer_idx, metric))

        def configure_optimizers(self) -> Any:
            optimizers = super().configure_optimizers()
            return optimizers, [torch.optim.lr_scheduler.StepLR(each, 1) for each in optimizers]

    module = Asks()
    make_trainer(tmp_path, limit_train_batches=1, gradient_clip_val=0.5).fit(module, loader())
    assert module.calls == [
        *(("before", 0), ("clip", 0, 0.5, None), ("zero", 0, 0, 0)),
        *(("before", 1), ("clip", 1, 0.5, None), ("zero", 0, 0, 1)),
        *(("scheduler", 0, None), ("scheduler", 1, None)),
    ]


def test_frequencies_count_over_epochs(tmp_path: Path) -> None:
    class Frequent(Two):
        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
            self.calls.append(optimizer_idx)
            return super().training_step(batch, batch_idx, optimizer_idx)

        def configure_optimizers(self) -> Any:
            return [
                {"optimizer": each, "frequency": n}
                for each, n in zip(super().configure_optimizers(), (5, 1), strict=True)
            ]

    module = Frequent()
    make_trainer(tmp_path, max_epochs=6).fit(module, loader())
    assert module.calls == ([0] * 5 + [1]) * 4
    again = Frequent()
    make_trainer(tmp_path, max_epochs=6, accumulate_grad_batches=2).fit(again, loader())
    assert again.calls == [turn for turn in [0] * 5 + [1] for _ in range(2)] * 2


def test_gradients_that_were_there_before_are_gone(tmp_path: Path) -> None:
    plain, stained = Two(), Two()
    for parameter in stained.parameters():
        parameter.grad = torch.ones_like(parameter)
    for module in (plain, stained):
        make_trainer(tmp_path).fit(module, loader())
    assert_equal(weights(stained), weights(plain))


def test_a_batch_without_a_loss_drops_out_of_its_window(tmp_path: Path) -> None:
    class Skips(Two):
        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
            return None if batch_idx == 0 else super().training_step(batch, batch_idx, optimizer_idx)

    module, hand = Skips(), Two()
    trainer = make_trainer(tmp_path, accumulate_grad_batches=2, limit_train_batches=2)
    trainer.fit(module, loader())
    for index in (0, 1):
        hand.loss((X[2:4],), index).backward()
    with torch.no_grad():
        for parameter in hand.parameters():
            parameter -= 0.1 * parameter.grad
    assert_equal(weights(module), weights(hand))
    assert trainer.skipped_batches == 1


def test_lbfgs_among_several_is_refused_where_batches_are_accumulated(tmp_path: Path) -> None:
    class Again(Two):
        def configure_optimizers(self) -> Any:
            return [torch.optim.LBFGS(self.a.parameters()), torch.optim.SGD(self.b.parameters(), lr=0.1)]

    with pytest.raises(ConfigurationError, match="accumulate_grad_batches=2 does not go with LBFGS"):
        make_trainer(tmp_path, accumulate_grad_batches=2).fit(Again(), loader())
    module = Again()
    make_trainer(tmp_path).fit(module, loader())
    hand = Again()
    lbfgs, sgd = hand.configure_optimizers()
    for begin in range(0, 8, 2):
        batch = (X[begin : begin + 2],)

        def closure(batch: Any = batch) -> Any:
            lbfgs.zero_grad()
            loss = hand.loss(batch, 0)
            loss.backward()
            return loss

        lbfgs.step(closure)
        sgd.zero_grad()
        hand.loss(batch, 1).backward()
        sgd.step()
    assert_equal(weights(module), weights(hand))


def test_the_outputs_of_an_epoch_have_one_entry_for_each_batch(tmp_path: Path) -> None:
    class Again(Two):
        def training_epoch_end(self, outputs: Any) -> None:
            self.calls.append([len(each) for each in outputs])

        def configure_optimizers(self) -> Any:
            return [torch.optim.LBFGS(self.a.parameters()), torch.optim.SGD(self.b.parameters(), lr=0.1)]

    module = Again()
    make_trainer(tmp_path, max_epochs=2).fit(module, loader())
    assert module.calls == [[4, 4], [4, 4]]


class One(pl.LightningModule):
    def __init__(self, hparams: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)
        self.calls: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch[0]).square().mean()
        return {"loss": loss, "log": {"train_loss": loss}, "progress_bar": {"acc": 1.0}}

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return {"v": self.layer(batch[0]).mean()}

    def validation_epoch_end(self, outputs: Any) -> Any:
        self.calls.append(len(outputs))
        return {"log": {"acc": 0.5}}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("sanity", [0, 2])
def test_where_a_value_goes_is_the_hooks_own(tmp_path: Path, sanity: int) -> None:
    memory = Memory()
    trainer = make_trainer(tmp_path, logger=memory, log_every_n_steps=1, num_sanity_val_steps=sanity)
    trainer.fit(One(), loader(), loader())
    assert memory.of("acc") == [0.5]  # validation's, and not training's
    assert len(memory.of("train_loss")) == 4


def test_one_name_for_steps_and_their_epoch(tmp_path: Path) -> None:
    class Both(One):
        def training_epoch_end(self, outputs: Any) -> Any:
            return {"log": {"train_loss": torch.stack([each["loss"] for each in outputs]).mean()}}

    memory = Memory()
    make_trainer(tmp_path, logger=memory, log_every_n_steps=1).fit(Both(), loader())
    steps, (mean,) = memory.of("train_loss"), memory.of("train_loss_epoch")
    assert mean == pytest.approx(sum(steps) / len(steps))


def test_compile_stays_in_eager(tmp_path: Path) -> None:
    module = One()
    with pytest.warns(pl.errors.LeydenWarning, match="the run stays in eager"):
        make_trainer(tmp_path, compile=True).fit(module, loader())
    plain = One()
    make_trainer(tmp_path).fit(plain, loader())
    assert_equal(weights(module), weights(plain))


def test_another_trainer_within_the_run(tmp_path: Path) -> None:
    class Nests(One):
        def on_epoch_end(self) -> None:
            make_trainer(tmp_path).validate(self, loader(4))
            self.calls.append("on_epoch_end")

    module = Nests()
    before = set(vars(module))
    make_trainer(tmp_path, max_epochs=2).fit(module, loader(), loader())
    assert module.calls == [4, 2, "on_epoch_end"] * 2
    assert set(vars(module)) == before


def test_what_the_user_put_onto_the_object_is_there_afterwards(tmp_path: Path) -> None:
    module = One()
    module.training_step = step = lambda batch, batch_idx: {"loss": module.layer(batch[0]).mean(), "log": {}}
    make_trainer(tmp_path).fit(module, loader())
    assert module.training_step is step


def test_an_error_in_a_callback_s_first_hook_leaves_nothing(tmp_path: Path) -> None:
    class Fails(pl.Callback):
        def on_init_start(self, trainer: Any) -> None:
            raise RuntimeError("no")

    module = One()
    before = set(vars(module))
    with pytest.raises(RuntimeError, match="no"):
        make_trainer(tmp_path, Fails()).fit(module, loader())
    assert set(vars(module)) == before


def test_on_init_end_is_called_once_for_a_trainer(tmp_path: Path) -> None:
    class Greets(pl.Callback):
        calls = 0

        def on_init_end(self, trainer: Any) -> None:
            self.calls += 1

    callback = Greets()
    trainer = make_trainer(tmp_path, callback)
    module = One()
    trainer.fit(module, loader())
    trainer.validate(module, loader())
    assert callback.calls == 1


def test_a_copy_within_the_run_is_a_plain_module(tmp_path: Path) -> None:
    class Copies(Two):
        def on_epoch_end(self) -> None:
            self.copies = (copy.deepcopy(self), pickle.loads(pickle.dumps(self)))

    module = Copies()
    globals()["Copies"] = Copies
    Copies.__qualname__ = "Copies"
    make_trainer(tmp_path).fit(module, loader())
    for each in module.copies:
        assert "training_step" not in vars(each)
        assert_equal(weights(each), weights(module))


def test_a_plain_mixin_is_looked_at_too(tmp_path: Path) -> None:
    class Mixin:
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.layer(batch[0]).mean()  # type: ignore[attr-defined]
            return {"loss": loss, "log": {"mixed": loss}}

    class Net(Mixin, pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = make_trainer(tmp_path)
    trainer.fit(Net(), loader())
    assert "mixed" in trainer.callback_metrics


def test_transfer_without_a_number_of_the_loader(tmp_path: Path) -> None:
    class Moves(One):
        def transfer_batch_to_device(self, batch: Any, device: Any) -> Any:  # type: ignore[override]
            self.calls.append(str(device))
            return batch

    module = Moves(Namespace())
    make_trainer(tmp_path, limit_train_batches=1).fit(module, loader())
    assert module.calls == ["cpu"]


def test_two_loaders_of_which_one_gave_nothing(tmp_path: Path) -> None:
    class Quiet(One):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return {"n": batch_idx} if dataloader_idx == 0 else None

        def validation_epoch_end(self, outputs: Any) -> Any:
            self.calls.append([len(each) for each in outputs])

    module = Quiet()
    make_trainer(tmp_path).validate(module, [loader(4), loader(2)])
    assert module.calls == [[2, 0]]


@pytest.mark.parametrize("alone", [True, False])
def test_the_state_that_a_callback_returned(tmp_path: Path, alone: bool) -> None:
    class Counts(pl.Callback):
        def __init__(self) -> None:
            self.batches = 0

        def on_batch_end(self, trainer: Any, pl_module: Any) -> None:
            self.batches += 1

        def on_save_checkpoint(self, trainer: Any, pl_module: Any) -> Any:  # type: ignore[override]
            return {"batches": self.batches}

    def load_alone(self: Any, state: Any) -> None:
        self.batches = state["batches"]

    def load(self: Any, trainer: Any, pl_module: Any, state: Any) -> None:
        self.batches = state["batches"]

    kind = type("Counts", (Counts,), {"on_load_checkpoint": load_alone if alone else load})
    first = kind()
    trainer = make_trainer(tmp_path, first)
    trainer.fit(One(), loader())
    path = tmp_path / "x.ckpt"
    module = One()

    class Saves(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.at_step_boundary(lambda: trainer.save_checkpoint(path))

    make_trainer(tmp_path, kind(), Saves()).fit(module, loader())
    second = kind()
    make_trainer(tmp_path, second, max_epochs=2).fit(One(), loader(), ckpt_path=path)
    assert (first.batches, second.batches) == (4, 8)


def test_names_of_the_users_own_are_given_by_position(tmp_path: Path) -> None:
    class Own(One):
        def on_train_batch_start(self, b: Any, i: int, dataloader_idx: int) -> Any:  # type: ignore[override]
            self.calls.append((len(b), i, dataloader_idx))

    module = Own()
    make_trainer(tmp_path, limit_train_batches=2).fit(module, loader())
    assert module.calls == [(1, 0, 0), (1, 1, 0)]
