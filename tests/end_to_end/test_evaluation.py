"""Validation and test: several loaders, modes of submodules, gradients, random state, and what the sanity check leaves."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import leyden as L
from leyden.data import CombinedLoader
from leyden.errors import DataError, HookError
from leyden.seed import capture_random_state
from quiet import Memory

torch.set_num_threads(1)


class Small(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
        "default_root_dir": folder,
    }
    return L.Trainer(callbacks=list(callbacks), **(settings | options))


def data(*values: float, batch_size: int = 1) -> Any:
    return DataLoader(torch.tensor(values, dtype=torch.float).unsqueeze(1), batch_size=batch_size)  # type: ignore[arg-type]


# Several loaders


class PerLoader(Small):
    """Notes (batch, batch_idx, dataloader_idx) of the steps and of its batch hooks, and logs the batch's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Any] = []
        self.hooks: list[Any] = []

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 9) -> Any:
        self.steps.append((batch.tolist(), batch_idx, dataloader_idx))
        self.log("x", batch.mean())
        return dataloader_idx

    test_step = validation_step

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 9) -> None:
        self.hooks.append(("start", batch_idx, dataloader_idx))

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 9) -> None:
        self.hooks.append((outputs, batch_idx, dataloader_idx))

    on_test_batch_start, on_test_batch_end = on_validation_batch_start, on_validation_batch_end


TWO = [data(1, 2), data(3, 5, 7, batch_size=2)]


@pytest.mark.parametrize("verb", ["validate", "test"])
@pytest.mark.parametrize(
    "loaders",
    [TWO, tuple(TWO), {"a": TWO[0], "b": TWO[1]}, CombinedLoader(TWO, "sequential"), {"n": [TWO[0]], "m": TWO[1]}],
)
def test_several_loaders_are_read_one_after_the_other(tmp_path: Path, verb: str, loaders: Any) -> None:
    if isinstance(loaders, dict) and "n" in loaders:
        loaders = CombinedLoader(loaders, "sequential")  # nested
    module = PerLoader()
    results = getattr(make_trainer(tmp_path), verb)(module, loaders)
    assert module.steps == [([[1]], 0, 0), ([[2]], 1, 0), ([[3], [5]], 0, 1), ([[7]], 1, 1)]
    assert module.hooks == [
        ("start", 0, 0), (0, 0, 0), ("start", 1, 0), (0, 1, 0), ("start", 0, 1), (1, 0, 1), ("start", 1, 1), (1, 1, 1),
    ]  # fmt: skip
    assert results == [{"x/dataloader_idx_0": 1.5}, {"x/dataloader_idx_1": 5.0}]  # (3 + 5 + 7) / 3, by samples


@pytest.mark.parametrize("loaders", [TWO[1], [TWO[1]], {"only": TWO[1]}, CombinedLoader([TWO[1]], "sequential")])
def test_one_loader_gives_no_dataloader_idx(tmp_path: Path, loaders: Any) -> None:
    module, callback = PerLoader(), L.Callback()
    calls: list[Any] = []
    callback.on_validation_batch_end = lambda *args: calls.append(args[2:])  # type: ignore[method-assign]
    assert make_trainer(tmp_path, callback).validate(module, loaders) == [{"x": 5.0}]
    assert module.steps == [([[3], [5]], 0, 9), ([[7]], 1, 9)]
    assert module.hooks == [("start", 0, 9), (9, 0, 9), ("start", 1, 9), (9, 1, 9)]
    assert [args[2:] for args in calls] == [(0,), (1,)]  # after outputs and batch: batch_idx and nothing more


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_a_combined_loader_of_another_mode_is_one_loader_of_combined_batches(tmp_path: Path, mode: str) -> None:
    batches: list[Any] = []

    class Both(Small):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            batches.append((batch["a"], batch["b"]))

    loader = CombinedLoader({"a": data(1, 2, 3), "b": data(10, 20)}, mode)
    make_trainer(tmp_path).validate(Both(), loader)
    found = [(a.item(), None if b is None else b.item()) for a, b in batches]
    end: dict[str, list[Any]] = {"min_size": [], "max_size": [(3, None)], "max_size_cycle": [(3, 10)]}
    assert found == [(1, 10), (2, 20), *end[mode]]


def test_a_step_without_dataloader_idx_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    class Without(Small):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise AssertionError

    expected = (
        r"several dataloaders, but Without.validation_step\(batch.*, batch_idx.*test_evaluation.py.*dataloader_idx=0"
    )
    with pytest.raises(HookError, match=expected):
        make_trainer(tmp_path).validate(Without(), TWO)
    with pytest.raises(HookError, match="no place for dataloader_idx"):
        make_trainer(tmp_path, num_sanity_val_steps=0).fit(Without(), data(1), TWO)


def test_a_batch_hook_without_dataloader_idx_is_refused_where_there_are_several(tmp_path: Path) -> None:
    module = PerLoader()
    module.on_validation_batch_end = lambda outputs, batch, batch_idx: None  # type: ignore[method-assign, assignment, misc]
    make_trainer(tmp_path).validate(module, TWO[0])
    with pytest.raises(HookError, match=r"on_validation_batch_end\(outputs, batch, batch_idx, dataloader_idx\)"):
        make_trainer(tmp_path).validate(module, TWO)


def test_values_without_dataloader_idx_are_mixed_into_one(tmp_path: Path) -> None:
    class Mixing(Small):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
            self.log("x", batch.mean(), add_dataloader_idx=False)

    results = make_trainer(tmp_path).validate(Mixing(), TWO)
    assert results == [{"x": pytest.approx((1 + 2 + 3 + 5 + 7) / 5)}, {}]


def test_validate_and_test_return_a_list_of_dicts_of_floats(tmp_path: Path) -> None:
    class Logging(Small):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("mean", batch.mean())
            self.log("sum", batch.sum(), reduce_fx="sum")
            self.log("both", batch.mean(), on_step=True, on_epoch=True)

        def on_test_epoch_end(self) -> None:
            self.log("late", 4)

    trainer = make_trainer(tmp_path)
    results = trainer.test(Logging(), data(1, 2, 6, batch_size=2))
    assert results == [{"mean": 3.0, "sum": 9.0, "both_epoch": 3.0, "late": 4.0}]
    assert all(type(value) is float for value in results[0].values())
    assert trainer.callback_metrics["mean"] == 3.0


def test_a_validation_that_logs_nothing_returns_an_empty_dict(tmp_path: Path) -> None:
    assert make_trainer(tmp_path).validate(Small(), data(1)) == [{}]


def test_evaluating_without_a_loader_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no val_dataloader"):
        make_trainer(tmp_path).validate(Small())


def test_validate_after_fit_without_a_model_takes_the_same_one(tmp_path: Path) -> None:
    module = PerLoader()
    trainer = make_trainer(tmp_path)
    trainer.fit(module, data(1), data(2))
    module.steps.clear()
    assert trainer.validate(dataloaders=data(4)) == [{"x": 4.0}]
    assert module.steps == [([[4]], 0, 9)]
    assert trainer.lightning_module is module


# Train and eval mode


class Deep(Small):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout(0.5)).eval()
        self.mixed = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout(0.5))
        self.mixed[1].eval()
        self.seen: list[Any] = []

    def modes(self) -> dict[str, bool]:
        return {name: part.training for name, part in self.named_modules()}

    def forward(self, x: Any) -> Any:
        return self.layer(self.mixed(self.frozen(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(("train", self.modes()))
        return self(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(("val", self.modes()))
        self(batch)

    test_step = predict_step = validation_step  # type: ignore[assignment]


MODES = {
    "": True, "layer": True, "frozen": False, "frozen.0": False, "frozen.1": False,
    "mixed": True, "mixed.0": True, "mixed.1": False,
}  # fmt: skip
ALL_EVAL = dict.fromkeys(MODES, False)


def test_modes_of_submodules_come_back_exactly_after_validation(tmp_path: Path) -> None:
    module = Deep()
    assert module.modes() == MODES
    trainer = make_trainer(tmp_path, max_epochs=2, val_check_interval=1, num_sanity_val_steps=2)
    trainer.fit(module, data(1, 2, batch_size=2), data(3, 4, batch_size=2))
    assert module.seen == [("val", ALL_EVAL), ("train", MODES), ("val", ALL_EVAL), ("train", MODES), ("val", ALL_EVAL)]
    assert module.modes() == MODES


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_verb_of_its_own_leaves_the_modes_as_they_were(tmp_path: Path, verb: str) -> None:
    module = Deep()
    getattr(make_trainer(tmp_path), verb)(module, data(1, 2))
    assert [mode for _, mode in module.seen] == [ALL_EVAL, ALL_EVAL]
    assert module.modes() == MODES
    module.eval()
    getattr(make_trainer(tmp_path), verb)(module, data(1, 2))
    assert module.modes() == ALL_EVAL


def test_the_statistics_of_a_frozen_batch_norm_do_not_move(tmp_path: Path) -> None:
    module = Deep()
    trainer = make_trainer(tmp_path, max_epochs=3, val_check_interval=1)
    trainer.fit(module, data(1, 2, 3, 4, batch_size=2), data(30, 40, batch_size=2))
    frozen, live = module.frozen[0], module.mixed[0]
    assert (frozen.running_mean.item(), frozen.running_var.item(), int(frozen.num_batches_tracked)) == (0.0, 1.0, 0)
    assert int(live.num_batches_tracked) == 6  # training batches only: validation is in eval mode


def test_a_submodule_that_was_in_train_mode_inside_an_eval_parent_comes_back(tmp_path: Path) -> None:
    module = Deep()
    module.frozen[1].train()
    before = module.modes()
    make_trainer(tmp_path).fit(module, data(1, 2, batch_size=2), data(3))
    assert module.modes() == before
    assert before["frozen"] is False
    assert before["frozen.1"] is True


def test_on_validation_model_eval_of_the_user_is_called_instead(tmp_path: Path) -> None:
    class Own(Deep):
        def on_validation_model_eval(self) -> None:
            self.layer.eval()

    module = Own()
    make_trainer(tmp_path).validate(module, data(1, 2, batch_size=2))
    assert module.seen == [("val", MODES | {"layer": False})]
    assert module.modes() == MODES  # set back by the engine all the same


def test_on_validation_model_train_of_the_user_is_called_instead(tmp_path: Path) -> None:
    class Own(Deep):
        def on_validation_model_train(self) -> None:
            self.layer.train()

    module = Own()
    make_trainer(tmp_path).validate(module, data(1, 2))
    assert module.modes() == ALL_EVAL | {"layer": True}


def test_the_defaults_of_the_mode_hooks_may_be_called_by_an_override(tmp_path: Path) -> None:
    class Both(Deep):
        def on_validation_model_eval(self) -> None:
            super().on_validation_model_eval()
            self.mixed[0].train()

    module = Both()
    make_trainer(tmp_path).validate(module, data(1, 2, batch_size=2))
    assert module.seen == [("val", ALL_EVAL | {"mixed.0": True})]
    assert module.modes() == MODES


def test_layers_added_in_validation_keep_their_own_mode(tmp_path: Path) -> None:
    class Growing(Small):
        def on_validation_start(self) -> None:
            self.late = nn.Dropout()

    module = Growing()
    make_trainer(tmp_path).validate(module, data(1))
    assert module.training
    assert module.late.training


# Gradients and inference mode


@pytest.mark.parametrize("inference", [True, False])
def test_evaluation_runs_in_inference_mode_or_without_gradients(tmp_path: Path, inference: bool) -> None:
    seen: list[tuple[bool, bool]] = []

    class Looking(Small):
        def note(self, *args: Any) -> None:
            seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert self.layer(batch).requires_grad is False
            self.note()

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.note()

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            self.note()

        def on_validation_epoch_end(self) -> None:
            self.note()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()

    trainer, module = make_trainer(tmp_path, inference_mode=inference, val_check_interval=1), Looking()
    trainer.fit(module, data(1, 2), data(1))
    trainer.validate(module, data(1))
    trainer.test(module, data(1))
    trainer.predict(module, data(1))
    assert seen == [(inference, False)] * 10  # (1 sanity + 2 in fit + 1) * 2, test, predict
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_a_step_may_turn_gradients_on_where_inference_mode_is_off(tmp_path: Path) -> None:
    grads: list[float] = []

    class Attack(Small):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            with torch.enable_grad():
                x = batch.clone().requires_grad_()
                self.layer(x).sum().backward()
            grads.append(x.grad.item())

    module = Attack()
    make_trainer(tmp_path, inference_mode=False).validate(module, data(1))
    assert grads == [module.layer.weight.item()]


def test_validation_inside_of_training_does_not_change_training(tmp_path: Path) -> None:
    torch.manual_seed(3)
    first = Deep()
    second = copy.deepcopy(first)
    for module, options in ((first, {"limit_val_batches": 0}), (second, {"val_check_interval": 1})):
        torch.manual_seed(5)
        loader = data(1, 2, 3, 4, 5, 6, batch_size=2)
        make_trainer(tmp_path, max_epochs=3, **options).fit(module, loader, data(7, 8, batch_size=2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


# The sanity check


def test_the_sanity_check_leaves_no_trace(tmp_path: Path) -> None:
    class Random(Small):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            values = random.random() + float(np.random.rand()) + torch.rand(1).item()
            self.log("noise", values, prog_bar=True, on_step=True, on_epoch=True)

    def state() -> Any:
        return {key: str(value) for key, value in capture_random_state().items()}

    class Watching(L.Callback):
        def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.before = state(), copy.deepcopy(pl_module.state_dict())

        def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.inside = trainer.sanity_checking, set(trainer.callback_metrics)

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert not trainer.sanity_checking
            self.metrics = trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics
            self.after = state(), copy.deepcopy(pl_module.state_dict())
            self.rows = list(memory.rows)

    memory, watching = Memory(), Watching()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    trainer = make_trainer(tmp_path, watching, logger=memory, num_sanity_val_steps=2)
    trainer.fit(Random(), data(1), data(1, 2, 3))
    assert watching.before[0] == watching.after[0]
    assert all(torch.equal(value, watching.after[1][name]) for name, value in watching.before[1].items())
    assert watching.inside == (True, {"noise", "noise_step", "noise_epoch"})
    assert watching.metrics == ({}, {}, {})
    assert watching.rows == []


@pytest.mark.parametrize(
    ("steps", "limit", "expected"),
    [
        (None, None, [2, 1]),
        (0, None, []),
        (1, None, [1, 1]),
        (2, None, [2, 1]),
        (5, None, [3, 1]),
        (-1, None, [3, 1]),
        (-1, 2, [2, 1]),
    ],
)
def test_the_sanity_check_runs_so_many_batches_of_each_loader(
    tmp_path: Path, steps: int | None, limit: int | None, expected: list[int]
) -> None:
    counted: list[Any] = []

    class Counting(Small):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
            if self.trainer.sanity_checking:
                counted.append(dataloader_idx)

        def on_validation_start(self) -> None:
            if self.trainer.sanity_checking:
                assert self.trainer.num_sanity_val_batches == expected

    trainer = make_trainer(tmp_path, num_sanity_val_steps=steps, limit_val_batches=limit)
    trainer.fit(Counting(), data(1), [data(1, 2, 3), data(4)])
    assert [counted.count(index) for index in range(2)] == (expected or [0, 0])


def test_the_sanity_check_finds_an_error_before_training(tmp_path: Path) -> None:
    class Broken(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError("trained first")

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path).fit(Broken(), data(1), data(1))


def test_trainer_flags_are_reset_after_an_error_in_the_sanity_check(tmp_path: Path) -> None:
    class Broken(Small):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.sanity_checking:
                raise ZeroDivisionError

    trainer, module = make_trainer(tmp_path), Broken()
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, data(1), data(1))
    assert not trainer.sanity_checking
    assert trainer.validate(module, data(1)) == [{}]


# Validation in the middle of a window


@pytest.mark.parametrize(("interval", "expected"), [(1, [2, 4, 6, 7]), (3, [4, 6]), (2, [2, 4, 6]), (7, [7])])
def test_a_validation_inside_of_a_window_waits_for_its_end(tmp_path: Path, interval: int, expected: list[int]) -> None:
    # 7 batches, 2 per step: windows end after batches 2, 4, 6 and, a short one, 7
    fired: list[int] = []

    class Noting(Small):
        batches = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.batches += 1
            return super().training_step(batch, batch_idx)

        def on_validation_start(self) -> None:
            fired.append(self.batches)
            assert all(parameter.grad is None for parameter in self.parameters())

    trainer = make_trainer(tmp_path, val_check_interval=interval, accumulate_grad_batches=2, num_sanity_val_steps=0)
    trainer.fit(Noting(), data(1, 2, 3, 4, 5, 6, 7), data(1))
    assert fired == expected
    assert trainer.global_step == 4


def test_manual_optimization_keeps_its_gradients_over_a_validation(tmp_path: Path) -> None:
    class Manual(Small):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            self.manual_backward(self.layer(batch).sum())
            if batch_idx == 1:
                assert self.layer.weight.grad.item() == 3.0  # of samples 1 and 2: the validation between left it
                optimizer.step()
                optimizer.zero_grad()

    trainer = make_trainer(tmp_path, val_check_interval=1)
    trainer.fit(Manual(), data(1, 2), data(1))
    assert trainer.global_step == 1
