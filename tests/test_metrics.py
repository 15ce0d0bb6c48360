"""What self.log takes and refuses, what becomes of it, and when the host waits for the device."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import leyden.metrics
from leyden.callbacks import Callback, RichProgressBar
from leyden.errors import LeydenWarning, MetricError
from leyden.loggers import CSVLogger
from leyden.metrics import Metrics, to_floats
from leyden.module import LightningModule
from leyden.trainer import Trainer
from quiet import Memory

torch.set_num_threads(1)

Log = Callable[["Training", Any, int], Any]
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "max_epochs": 1,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
}


class Training(LightningModule):
    """Calls a function in each training step, which logs."""

    def __init__(self, train: Log | None = None, evaluate: Log | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.train_log, self.evaluate_log = train, evaluate

    def forward(self, batch: Any) -> Any:
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.train_log is not None:
            self.train_log(self, batch, batch_idx)
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Module(Training):
    """Evaluates as well, with another function."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.evaluate_log is not None:
            self.evaluate_log(self, batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx)


class Batches:
    """Batches as they are: torch's DataLoader would read a random seed from the device."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def loader(*values: float, batch_size: int = 1) -> Batches:
    return Batches(*torch.tensor(values).split(batch_size))


def make_trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(**{**QUIET, "default_root_dir": folder, **options})


def fit(folder: Path, train: Log, data: Any = None, **options: Any) -> Trainer:
    trainer = make_trainer(folder, **options)
    trainer.fit(Training(train), loader(1.0, 2.0, 4.0) if data is None else data)
    return trainer


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


# what on_step and on_epoch are, where they are not given

STEP_HOOKS = (
    "on_train_batch_start", "training_step", "on_train_batch_end", "on_before_zero_grad", "optimizer_zero_grad",
    "on_before_backward", "backward", "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping",
)  # fmt: skip
TRAIN_EPOCH_HOOKS = ("on_train_start", "on_train_epoch_start", "on_train_epoch_end")
VALIDATION_HOOKS = (
    "on_validation_start", "on_validation_epoch_start", "on_validation_batch_start", "validation_step",
    "on_validation_batch_end", "on_validation_epoch_end",
)  # fmt: skip
TEST_HOOKS = tuple(name.replace("validation", "test") for name in VALIDATION_HOOKS)
REFUSED = (
    "prepare_data", "setup", "configure_optimizers", "train_dataloader", "on_fit_start", "on_sanity_check_end", "on_train_end",
    "on_fit_end", "on_predict_start", "on_predict_epoch_start", "on_predict_batch_start", "predict_step",
    "on_predict_batch_end", "on_predict_epoch_end", "on_predict_end",
)  # fmt: skip


def logging_in(hooks: tuple[str, ...]) -> Module:
    """A module that logs a value in each of the hooks, named as it."""

    def patched(name: str) -> Any:
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.log(name, 1.0)
            base = getattr(Module, name, None)
            return base(self, *args, **kwargs) if base is not None else None

        hook.__name__ = name
        hook.__code__ = hook.__code__.replace(co_name=name)
        return hook

    class Base(Module):
        def train_dataloader(self) -> Any:
            return loader(1.0, 2.0)

        def val_dataloader(self) -> Any:
            return loader(1.0, 2.0)

    made: Module = type("Logging", (Base,), {name: patched(name) for name in hooks})()
    return made


def test_hooks_of_training_batches_log_steps_and_all_others_epochs(tmp_path: Path) -> None:
    memory = Memory()
    make_trainer(tmp_path, logger=memory).fit(logging_in(STEP_HOOKS + TRAIN_EPOCH_HOOKS + VALIDATION_HOOKS))
    # on_train_batch_end comes before the boundary, where the step's values are sent
    steps = {**dict.fromkeys(STEP_HOOKS, 1.0), "epoch": 0}
    assert memory.rows == [
        (1, steps),
        (2, steps),
        (2, {**dict.fromkeys(VALIDATION_HOOKS, 1.0), "epoch": 0}),
        (2, {**dict.fromkeys(TRAIN_EPOCH_HOOKS, 1.0), "epoch": 0}),
    ]


def test_hooks_of_test_log_epochs(tmp_path: Path) -> None:
    memory = Memory()
    results = make_trainer(tmp_path, logger=memory).test(logging_in(TEST_HOOKS), loader(1.0, 2.0))
    assert memory.rows == [(0, {**dict.fromkeys(TEST_HOOKS, 1.0), "epoch": 0})]
    assert results == [dict.fromkeys(TEST_HOOKS, 1.0)]


@pytest.mark.parametrize("hook", REFUSED)
def test_logging_where_nothing_is_collected_is_refused_with_the_place(hook: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, num_sanity_val_steps=1)
    verb, loaders = (trainer.predict, loader(1.0)) if "predict" in hook else (trainer.fit, None)
    with pytest.raises(MetricError, match=rf"called in {hook}, where nothing can be logged.*training_step"):
        verb(logging_in((hook,)), loaders)


def test_logging_in_init_warns_that_it_has_no_effect() -> None:
    class Early(Training):
        def __init__(self) -> None:
            super().__init__()
            self.log("early", 1.0)

    with pytest.warns(LeydenWarning, match=r"LEY-log-without-trainer.*'early'"):
        Early()


def test_without_a_trainer_each_line_warns_once() -> None:
    module = Training()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            module.log("x", 1.0)
    assert [str(w.message)[:31] for w in caught] == ["[LEY-log-without-trainer] self."]
    assert caught[0].filename == __file__


def test_on_step_in_an_epochs_hook_is_refused(tmp_path: Path) -> None:
    class Wrong(Training):
        def on_train_epoch_end(self) -> None:
            self.log("x", 1.0, on_step=True)

    with pytest.raises(MetricError, match="it has no step"):
        make_trainer(tmp_path).fit(Wrong(), loader(1.0))


# keys

FLAGS = [
    ({}, {"x": 4.0}, {"x"}),
    ({"on_step": True}, {"x": 4.0}, {"x"}),
    ({"on_epoch": True}, {"x": 7 / 3, "x_step": 4.0, "x_epoch": 7 / 3}, {"x_step", "x_epoch"}),
    ({"on_step": False, "on_epoch": True}, {"x": 7 / 3}, {"x"}),
    ({"on_step": False, "on_epoch": False}, {}, set()),
    ({"on_epoch": True, "logger": False}, {"x": 7 / 3, "x_step": 4.0, "x_epoch": 7 / 3}, set()),
]


@pytest.mark.parametrize(("options", "shown", "sent"), FLAGS)
def test_keys_fork_only_where_both_are_asked_for(
    options: dict[str, Any], shown: dict[str, float], sent: set[str], tmp_path: Path
) -> None:
    memory = Memory()
    trainer = fit(tmp_path, lambda m, b, i: m.log("x", b, prog_bar=True, **options), logger=memory)
    assert numbers(trainer.callback_metrics) == pytest.approx(shown)
    assert set().union(*(row for _, row in memory.rows)) - {"epoch"} == sent
    assert set(trainer.logged_metrics) == sent
    bar = {"x_step", "x_epoch"} if "x_step" in shown else set(shown)
    assert set(trainer.progress_bar_metrics) == bar


def test_only_prog_bar_values_are_in_the_bar(tmp_path: Path) -> None:
    def log(module: Training, batch: Tensor, batch_idx: int) -> None:
        module.log("shown", batch, prog_bar=True)
        module.log("hidden", batch)

    assert fit(tmp_path, log).progress_bar_metrics == {"shown": 4.0}


def test_several_loaders_have_keys_of_their_own_unless_they_are_mixed(tmp_path: Path) -> None:
    def log(module: Training, batch: Tensor, batch_idx: int) -> None:
        module.log("a", batch.mean())
        module.log("b", batch.mean(), on_step=True, on_epoch=True)
        module.log("mixed", batch.mean(), add_dataloader_idx=False, on_step=True, on_epoch=True)

    memory = Memory()
    trainer = make_trainer(tmp_path, logger=memory)
    loaders = [loader(0.0, 1.0, 2.0, 3.0, 4.0, batch_size=2), loader(10.0, 11.0, 12.0, batch_size=2)]
    results = trainer.test(Module(evaluate=log), loaders)
    assert results == [
        {"a/dataloader_idx_0": 2.0, "b_epoch/dataloader_idx_0": 2.0, "mixed_epoch": 5.375},  # 43 / 8
        {"a/dataloader_idx_1": 11.0, "b_epoch/dataloader_idx_1": 11.0},
    ]
    assert set(trainer.callback_metrics) == {
        "a/dataloader_idx_0", "a/dataloader_idx_1", "b/dataloader_idx_0", "b/dataloader_idx_1", "mixed", "mixed_step",
        "b_step/dataloader_idx_0", "b_step/dataloader_idx_1", "b_epoch/dataloader_idx_0", "b_epoch/dataloader_idx_1",
        "mixed_epoch",
    }  # fmt: skip
    assert memory.rows[:-1] == [
        (0, {"b_step/dataloader_idx_0": 0.5, "mixed_step": 0.5}),
        (1, {"b_step/dataloader_idx_0": 2.5, "mixed_step": 2.5}),
        (2, {"b_step/dataloader_idx_0": 4.0, "mixed_step": 4.0}),
        (0, {"b_step/dataloader_idx_1": 10.5, "mixed_step": 10.5}),
        (1, {"b_step/dataloader_idx_1": 12.0, "mixed_step": 12.0}),
    ]


def test_the_ending_of_loaders_may_not_be_in_a_name(tmp_path: Path) -> None:
    with pytest.raises(MetricError, match="is added for you"):
        fit(tmp_path, lambda m, b, i: m.log("x/dataloader_idx_0", 1.0))


def test_one_key_with_two_sets_of_arguments_is_refused(tmp_path: Path) -> None:
    def log(module: Training, batch: Tensor, batch_idx: int) -> None:
        module.log("x", 1.0, prog_bar=batch_idx > 0)

    with pytest.raises(MetricError, match=r"'x', .*different arguments \(prog_bar=False and True\).*two names"):
        fit(tmp_path, log)


def test_arguments_of_a_key_may_change_between_epochs(tmp_path: Path) -> None:
    trainer = fit(tmp_path, lambda m, b, i: m.log("x", b, prog_bar=m.current_epoch > 0), max_epochs=2)
    assert trainer.progress_bar_metrics == {"x": 4.0}


def test_compatible_arguments_change_nothing(tmp_path: Path) -> None:
    def log(module: Training, batch: Tensor, batch_idx: int) -> None:
        module.log(
            "x", batch, on_epoch=True, sync_dist=True, sync_dist_group=None, rank_zero_only=True, enable_graph=True
        )

    assert numbers(fit(tmp_path, log).callback_metrics) == pytest.approx({"x": 7 / 3, "x_step": 4.0, "x_epoch": 7 / 3})


def test_log_dict_passes_its_arguments_on(tmp_path: Path) -> None:
    trainer = fit(
        tmp_path, lambda m, b, i: m.log_dict({"a": b, "b": 2 * b}, on_step=False, on_epoch=True, prog_bar=True)
    )
    assert trainer.progress_bar_metrics == pytest.approx({"a": 7 / 3, "b": 14 / 3})


# values


@pytest.mark.parametrize(
    "value", [torch.tensor(3.0), torch.tensor([3.0]), torch.tensor(3), 3, 3.0, np.float32(3), np.array([3])]
)
def test_every_kind_of_single_number_is_taken(value: Any, tmp_path: Path) -> None:
    trainer = fit(tmp_path, lambda m, b, i: m.log("x", value, on_epoch=True))
    assert numbers(trainer.callback_metrics) == {"x": 3.0, "x_step": 3.0, "x_epoch": 3.0}
    assert all(metric.shape == () for metric in trainer.callback_metrics.values())


@pytest.mark.parametrize(
    "convert", [bool, lambda flag: torch.tensor(bool(flag)), int, lambda flag: torch.tensor(int(flag))]
)
def test_flags_and_integers_have_fractional_means(convert: Any, tmp_path: Path) -> None:
    trainer = fit(tmp_path, lambda m, b, i: m.log("hit", convert(i == 0), on_epoch=True))
    assert numbers(trainer.callback_metrics) == pytest.approx({"hit": 1 / 3, "hit_step": 0.0, "hit_epoch": 1 / 3})


@pytest.mark.parametrize(("reduce_fx", "expected"), [("mean", 7 / 3), ("sum", 7.0), ("min", 1.0), ("max", 4.0)])
@pytest.mark.parametrize("mix", [0, 1, 2])
def test_python_numbers_and_tensors_mix_under_one_key(
    mix: int, reduce_fx: str, expected: float, tmp_path: Path
) -> None:
    def log(module: Training, batch: Tensor, batch_idx: int) -> None:
        module.log("x", batch if batch_idx == mix else float(batch), on_step=False, on_epoch=True, reduce_fx=reduce_fx)

    assert float(fit(tmp_path, log).callback_metrics["x"]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "mend"),
    [
        (torch.zeros(2), r"tensor of shape \(2,\).*\.mean\(\)"),
        (torch.zeros(0), r"tensor of shape \(0,\)"),
        ({"a": 1.0}, "got a dict.*Use self.log_dict"),
        ("high", "got a str; allowed are a number"),
        (None, "got a NoneType; allowed are a number"),
        ([1.0], "got a list; allowed are a number"),
        (np.zeros(3), "got a ndarray; allowed are a number"),
    ],
)
def test_what_is_not_one_number_is_refused_with_the_mend(value: Any, mend: str, tmp_path: Path) -> None:
    with pytest.raises(MetricError, match=rf"'x'.*{mend}"):
        fit(tmp_path, lambda m, b, i: m.log("x", value))


def test_a_name_must_be_a_string(tmp_path: Path) -> None:
    with pytest.raises(MetricError, match="needs a string as name, got 3"):
        fit(tmp_path, lambda m, b, i: m.log(3, 1.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("with_graph", [False, True])
def test_a_tensor_changed_in_place_after_logging_keeps_its_logged_value(with_graph: bool, tmp_path: Path) -> None:
    def log(module: Training, batch: Tensor, batch_idx: int) -> None:
        value = batch.sum() * (module.weight.detach().sum() * 0 + 1)
        if with_graph:
            value = batch.sum() * (module.weight.sum() * 0 + 1)
            assert value.requires_grad
        module.log("x", value, on_epoch=True)
        value += 100  # a penalty that is added, or a buffer that goes on counting

    assert numbers(fit(tmp_path, log).callback_metrics) == pytest.approx({"x": 7 / 3, "x_step": 4.0, "x_epoch": 7 / 3})


@pytest.mark.parametrize("reduce_fx", ["mean", torch.median])
def test_logged_losses_keep_no_graph_alive(reduce_fx: Any, tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def log(module: Training, batch: Tensor, batch_idx: int) -> None:
        gc.collect()
        assert [reference() for reference in alive] == [None] * batch_idx
        hidden = module.weight * batch  # only the graph holds it
        alive.append(weakref.ref(hidden))
        module.log("x", (hidden * hidden).sum(), on_step=True, on_epoch=True, reduce_fx=reduce_fx)

    trainer = fit(tmp_path, log)
    assert len(alive) == 3
    assert not any(value.requires_grad for value in trainer.callback_metrics.values())


# reductions


def test_epoch_means_are_weighted_by_real_batch_sizes(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    data = generator.normal(size=23).astype(np.float32)  # by fives: the last batch has three
    trainer = fit(
        tmp_path,
        lambda m, b, i: m.log("x", b.mean(), on_step=False, on_epoch=True),
        DataLoader(torch.from_numpy(data), batch_size=5),  # type: ignore[arg-type]
    )
    assert float(trainer.callback_metrics["x"]) == pytest.approx(float(data.astype(np.float64).mean()), rel=1e-6)


@pytest.mark.parametrize("as_python_number", [False, True])
def test_epoch_means_of_uneven_batches_equal_numpys(as_python_number: bool, tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    batches = [generator.normal(size=size).astype(np.float32) for size in (3, 1, 7, 2, 2, 5)]

    def log(module: Training, batch: Tensor, batch_idx: int) -> None:
        value = float(batch.mean()) if as_python_number else batch.mean()
        module.log("found", value)
        module.log("given", value, batch_size=batch_idx + 1)
        module.log("even", value, batch_size=1)

    (results,) = make_trainer(tmp_path).test(Module(evaluate=log), Batches(*map(torch.from_numpy, batches)))
    means = [batch.astype(np.float64).mean() for batch in batches]
    assert results == pytest.approx(
        {
            "found": np.concatenate(batches).astype(np.float64).mean(),
            "given": np.average(means, weights=[1, 2, 3, 4, 5, 6]),
            "even": np.mean(means),
        },
        rel=1e-5,
    )


def test_the_batch_size_of_a_dict_of_strings_and_tensors_is_found(tmp_path: Path) -> None:
    batches = [{"text": ["a"] * n, "label": torch.zeros(n), "value": float(n)} for n in (1, 4)]
    (results,) = make_trainer(tmp_path).test(Module(evaluate=lambda m, b, i: m.log("x", b["value"])), Batches(*batches))
    assert results == {"x": (1 * 1 + 4 * 4) / 5}


def test_a_batch_without_a_size_needs_batch_size(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with pytest.raises(MetricError, match=r"Pass batch_size= to self\.log"):
        trainer.test(Module(evaluate=lambda m, b, i: m.log("x", 1.0)), Batches(object()))
    assert trainer.test(Module(evaluate=lambda m, b, i: m.log("x", 1.0, batch_size=2)), Batches(object())) == [
        {"x": 1.0}
    ]


@pytest.mark.parametrize("as_python_number", [False, True])
def test_a_hundred_thousand_values_are_summed_in_double_precision(as_python_number: bool) -> None:
    count = 100_000
    values = (torch.arange(count) % 7 / 7 + 1000).float()
    metrics = Metrics()
    metrics.enter_batches()
    for value in values.tolist() if as_python_number else values.unbind():
        metrics.log("mean", value, False, True, False, True, "mean", 32, True)
    found = metrics.publish_epoch()["mean"]
    exact = values.double().mean().item()
    assert abs(float(found) - exact) <= 6.2e-5  # half a unit in the last place of a float32 near 1000
    single = torch.zeros(())
    for value in values:
        single += value
    assert abs(single.item() / count - exact) > 1e-2  # what a sum in single precision would have given


@pytest.mark.parametrize(
    ("reduce_fx", "expected"),
    [
        ("mean", 7 / 3), ("avg", 7 / 3), (torch.mean, 7 / 3), ("sum", 7.0), (torch.sum, 7.0), ("min", 1.0), (torch.min, 1.0),
        (torch.amin, 1.0), ("max", 4.0), (torch.max, 4.0), (torch.amax, 4.0), (torch.median, 2.0),
        (lambda values: values.prod(), 8.0), (lambda values: values.std(correction=0), np.std([1, 2, 4])),
        (lambda values: float(values[-1] - values[0]), 3.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("convert", [lambda batch: batch, lambda batch: batch.int(), float, int])
def test_reductions_equal_numpys(reduce_fx: Any, expected: float, convert: Any, tmp_path: Path) -> None:
    trainer = fit(tmp_path, lambda m, b, i: m.log("x", convert(b), on_step=False, on_epoch=True, reduce_fx=reduce_fx))
    assert float(trainer.callback_metrics["x"]) == pytest.approx(expected)


def test_a_function_may_be_written_in_the_call(tmp_path: Path) -> None:
    trainer = fit(tmp_path, lambda m, b, i: m.log("x", b, on_epoch=True, reduce_fx=lambda values: values.prod()))
    assert numbers(trainer.callback_metrics) == {"x": 8.0, "x_step": 4.0, "x_epoch": 8.0}


def test_a_long_epoch_reduces_as_a_short_one(tmp_path: Path) -> None:
    values = [float((index * 37) % 101) for index in range(300)]  # more than are held before they are summed up

    def log(module: Training, batch: Tensor, batch_idx: int) -> None:
        for name in ("mean", "sum", "min", "max"):
            module.log(name, batch, on_step=False, on_epoch=True, reduce_fx=name)

    assert numbers(fit(tmp_path, log, loader(*values)).callback_metrics) == pytest.approx(
        {"mean": np.mean(values), "sum": np.sum(values), "min": 0.0, "max": 100.0}, rel=1e-6
    )


def test_an_unknown_reduction_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(MetricError, match=r"reduce_fx='maxx'.*'mean', 'sum', 'min', 'max'.*Did you mean 'max'"):
        fit(tmp_path, lambda m, b, i: m.log("x", b, reduce_fx="maxx"))


def test_a_reduction_that_does_not_give_one_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MetricError, match=r"'x', .*reduce_fx returned a tensor of shape \(3,\)"):
        fit(tmp_path, lambda m, b, i: m.log("x", b.sum(), on_epoch=True, reduce_fx=lambda values: values * 2))


def test_each_epoch_begins_anew(tmp_path: Path) -> None:
    memory = Memory()
    fit(
        tmp_path,
        lambda m, b, i: m.log("x", b + 10 * m.current_epoch, on_step=False, on_epoch=True, reduce_fx="sum"),
        logger=memory,
        max_epochs=3,
    )
    assert memory.rows == [(3, {"x": 7.0, "epoch": 0}), (6, {"x": 37.0, "epoch": 1}), (9, {"x": 67.0, "epoch": 2})]


def test_validation_in_the_middle_of_an_epoch_leaves_its_means_alone(tmp_path: Path) -> None:
    memory = Memory()
    trainer = make_trainer(tmp_path, logger=memory, val_check_interval=1)
    module = Module(
        lambda m, b, i: m.log("x", b, on_step=False, on_epoch=True), lambda m, b, i: m.log("y", b, reduce_fx="sum")
    )
    trainer.fit(module, loader(1.0, 2.0, 4.0), loader(5.0, 6.0))
    assert [row for row in memory.rows if "y" in row[1]] == [(step, {"y": 11.0, "epoch": 0}) for step in (1, 2, 3)]
    assert memory.rows[-1][1] == pytest.approx({"x": 7 / 3, "epoch": 0})


def test_steps_that_return_none_still_log(tmp_path: Path) -> None:
    class Skips(Training):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.log("x", batch, on_step=False, on_epoch=True)
            return None if batch_idx == 1 else self.weight.sum()

    trainer = make_trainer(tmp_path)
    trainer.fit(Skips(), loader(1.0, 2.0, 4.0))
    assert float(trainer.callback_metrics["x"]) == pytest.approx(7 / 3)


# what the Trainer shows of it, as Lightning 2.6 does (its values, obtained by running the same module there)


class Everything(Module):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        value = float(self.current_epoch * 10 + batch_idx)
        self.log("plain", value, prog_bar=True)
        self.log("both", torch.tensor(value), on_step=True, on_epoch=True, prog_bar=True)
        self.log("mean", value, on_step=False, on_epoch=True, prog_bar=True)
        self.log("quiet", value, logger=False)
        return self.weight.sum()

    def on_train_epoch_start(self) -> None:
        self.log("start", 1.5)

    def on_train_epoch_end(self) -> None:
        self.log("end", 2.5, prog_bar=True)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        self.log("val", float(batch_idx), prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self.log("val_end", 7.0)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        self.log("test", float(batch_idx))


class Look(Callback):
    def __init__(self) -> None:
        self.seen: dict[tuple[str, int], tuple[dict[str, float], ...]] = {}

    def look(self, trainer: Trainer, where: str) -> None:
        shown = (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)
        self.seen[where, trainer.current_epoch] = tuple(
            {name: round(float(value), 5) for name, value in values.items()} for values in shown
        )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.look(trainer, "batch_end")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.look(trainer, "sanity_end" if trainer.sanity_checking else "validation_end")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.look(trainer, "epoch_end")

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self.look(trainer, "test_end")


@pytest.mark.parametrize("with_logger", [False, True])
def test_metrics_at_each_event_are_those_of_lightning(with_logger: bool, tmp_path: Path) -> None:
    look = Look()
    trainer = make_trainer(
        tmp_path,
        callbacks=[look],
        max_epochs=2,
        num_sanity_val_steps=2,
        logger=Memory() if with_logger else False,
        log_every_n_steps=2,
    )
    module, data = Everything(), loader(*[1.0] * 5, batch_size=2)
    trainer.fit(module, data, data)
    look.look(trainer, "after_fit")
    val = {"val": 0.8, "val_end": 7.0}
    first = {"both": 2.0, "both_step": 2.0, "plain": 2.0, "quiet": 2.0}
    assert look.seen["sanity_end", 0] == ({"val": 0.5, "val_end": 7.0}, {"val": 0.5, "val_end": 7.0}, {"val": 0.5})
    assert look.seen["batch_end", 0] == (first, {"both_step": 2.0, "plain": 2.0}, {"both_step": 2.0, "plain": 2.0})
    assert look.seen["validation_end", 0] == (
        {**first, **val},
        {"both_step": 2.0, "plain": 2.0, **val},
        {"both_step": 2.0, "plain": 2.0, "val": 0.8},
    )
    bar = {"both_epoch": 0.8, "both_step": 2.0, "mean": 0.8, "plain": 2.0, "val": 0.8}
    assert look.seen["epoch_end", 0] == (
        {**first, "both": 0.8, "both_epoch": 0.8, "mean": 0.8, "start": 1.5, **val},
        {"both_epoch": 0.8, "both_step": 2.0, "mean": 0.8, "plain": 2.0, "start": 1.5, **val},
        bar,
    )
    second = {"both": 12.0, "both_step": 12.0, "plain": 12.0, "quiet": 12.0}
    assert (
        look.seen["batch_end", 1]
        == look.seen["validation_end", 1]
        == (
            {**second, "both_epoch": 0.8, "mean": 0.8, "start": 1.5, "end": 2.5, **val},
            {"both_epoch": 0.8, "both_step": 12.0, "mean": 0.8, "plain": 12.0, "start": 1.5, "end": 2.5, **val},
            {**bar, "both_step": 12.0, "plain": 12.0, "end": 2.5},
        )
    )
    assert (
        look.seen["epoch_end", 1]
        == look.seen["after_fit", 2]
        == (
            {**second, "both": 10.8, "both_epoch": 10.8, "mean": 10.8, "start": 1.5, "end": 2.5, **val},
            {"both_epoch": 10.8, "both_step": 12.0, "mean": 10.8, "plain": 12.0, "start": 1.5, "end": 2.5, **val},
            {"both_epoch": 10.8, "both_step": 12.0, "mean": 10.8, "plain": 12.0, "end": 2.5, "val": 0.8},
        )
    )
    assert trainer.test(module, data) == [{"test": 0.8}]
    look.look(trainer, "after_test")
    assert look.seen["test_end", 2] == look.seen["after_test", 2] == ({"test": 0.8}, {"test": 0.8}, {})


# reading the device


def test_to_floats_brings_everything_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = count_reads(monkeypatch)
    mixed = {
        "a": torch.tensor(1),
        "b": 2,
        "c": torch.tensor(3.5),
        "d": True,
        "e": torch.tensor(2.0, dtype=torch.float16),
    }
    assert to_floats(mixed) == {"a": 1.0, "b": 2.0, "c": 3.5, "d": 1.0, "e": 2.0}
    assert list(to_floats(mixed)) == ["a", "b", "c", "d", "e"]
    assert reads == ["tolist", "tolist"]
    assert to_floats({"a": 1.5}) == {"a": 1.5}
    assert len(reads) == 2


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record each call that would wait for a device: the list grows with it."""
    reads: list[str] = []
    for name in ("item", "tolist", "numpy", "__float__", "__bool__", "__int__", "__index__"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            if self.dtype != torch.uint8:  # bytes are a random state, which is the host's
                reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, counted)
    return reads


class ReadsPerBatch(Callback):
    """How many reads there were up to the beginning of each training batch, and at the end."""

    def __init__(self, reads: list[str]) -> None:
        self.reads, self.at = reads, []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.at.append(len(self.reads))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.at.append(len(self.reads))


class Logging(Training):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.weight * batch).sum()
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log("other", loss * 2, prog_bar=True)
        return loss


class Both(Logging, Module):
    """Logs in training and in validation."""


@pytest.mark.parametrize("every", [1, 3, 5])
def test_the_device_is_read_once_per_logging_interval_and_once_per_epoch(
    every: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reads = count_reads(monkeypatch)
    counter = ReadsPerBatch(reads)
    trainer = make_trainer(
        tmp_path, max_epochs=2, logger=CSVLogger(tmp_path), log_every_n_steps=every, callbacks=[counter]
    )
    trainer.fit(Logging(), loader(*[1.0] * 10))
    per_batch = [after - before for before, after in zip(counter.at, counter.at[1:], strict=False)]
    # the eleventh entry of each epoch is its end; what is read there comes before the next epoch's first batch
    expected = (
        [int(step % every == 0) for step in range(1, 11)] + [1] + [int(step % every == 0) for step in range(11, 21)]
    )
    assert per_batch == expected
    assert len(reads) == sum(expected) + 1


def test_the_progress_bar_reads_the_device_when_it_draws_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reads = count_reads(monkeypatch)
    bar = RichProgressBar(line_interval_s=1.0)

    class Clock(ReadsPerBatch):
        now = 0.0

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            self.now += 0.3

    clock = Clock(reads)
    bar._clock = lambda: clock.now
    trainer = make_trainer(
        tmp_path, callbacks=[clock, bar], enable_progress_bar=True, logger=CSVLogger(tmp_path), log_every_n_steps=1000
    )
    trainer.fit(Logging(), loader(*[1.0] * 12))
    per_batch = [after - before for before, after in zip(clock.at, clock.at[1:], strict=False)]
    assert per_batch == [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1]  # every fourth batch, at 1.2 s, 2.4 s and 3.6 s
    assert len(reads) == 3 + 2  # at the epoch's end: the logger's row, and the bar's line


def test_without_logger_and_bar_the_device_is_never_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reads = count_reads(monkeypatch)
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(Both(evaluate=lambda m, b, i: m.log("val", b, on_step=True)), loader(*[1.0] * 10), loader(1.0, 2.0))
    assert reads == []


def test_validation_reads_the_device_twice_however_many_batches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[int] = []
    original = leyden.metrics.to_floats

    def counted(values: Any) -> Any:
        if any(isinstance(value, Tensor) for value in values.values()):
            calls.append(len(values))
        return original(values)

    monkeypatch.setattr("leyden.metrics.to_floats", counted)
    monkeypatch.setattr("leyden.run.to_floats", counted)
    trainer = make_trainer(tmp_path, logger=Memory())
    module = Module(evaluate=lambda m, b, i: m.log("val", b, on_step=True, on_epoch=True))
    trainer.fit(module, loader(1.0), loader(*map(float, range(20))))
    assert calls == [20, 1]  # the steps' values, and the mean
    assert trainer.callback_metrics["val"] == 9.5
