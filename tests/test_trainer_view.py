"""What callbacks and modules read of a Trainer: every public property, at each place of each verb."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import leyden
from leyden.accelerators import CPUAccelerator, CUDAAccelerator
from leyden.callbacks import (
    BasePredictionWriter,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    Preemption,
    RichProgressBar,
)
from leyden.errors import ConfigurationError
from leyden.loggers import CSVLogger
from leyden.trainer.arguments import TrainerArguments
from leyden.trainer.states import RunningStage, TrainerFn, TrainerState, TrainerStatus
from leyden.trainer.view import TrainerView

torch.set_num_threads(1)

FLAGS = ("training", "validating", "sanity_checking", "testing", "predicting", "evaluating")
COUNTS = ("num_val_batches", "num_sanity_val_batches", "num_test_batches", "num_predict_batches")
TRAIN_BATCHES, VAL_BATCHES, TEST_BATCHES, PREDICT_BATCHES = 4, (3, 2), 3, 2


def loader(batches: int = TRAIN_BATCHES) -> DataLoader[Any]:
    return DataLoader(torch.ones(batches * 2, 2), batch_size=2)  # type: ignore[arg-type]


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.ones(2)


class Model(leyden.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.estimates: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("number", float(batch_idx), on_step=True, on_epoch=True, prog_bar=True)
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", float(dataloader_idx + 1))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test", float(batch_idx), prog_bar=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> int:
        return batch_idx * 10

    def configure_optimizers(self) -> Any:
        self.estimates.append(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Observer(Callback):
    """Keeps what the Trainer shows, by the name of the hook, each time that the hook is called."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.seen: dict[str, list[dict[str, Any]]] = {}
        for hook in dir(Callback):
            if hook in ("setup", "teardown") or (hook.startswith("on_") and "checkpoint" not in hook):
                setattr(self, hook, self._note(hook))

    def _note(self, hook: str) -> Any:
        def note(trainer: leyden.Trainer, *args: Any) -> None:
            self.seen.setdefault(hook, []).append({name: getattr(trainer, name) for name in self.names})

        return note

    def rows(self, hook: str) -> list[tuple[Any, ...]]:
        return [tuple(row.values()) for row in self.seen.get(hook, [])]


def make(*callbacks: Callback, **options: Any) -> leyden.Trainer:
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "max_epochs": 2, "callbacks": list(callbacks)}
    quiet |= {f"enable_{name}": False for name in ("checkpointing", "progress_bar", "model_summary")}
    return leyden.Trainer(**(quiet | options))


def run_all(observer: Observer, **options: Any) -> leyden.Trainer:
    """Fit with two validation loaders, then validate, test and predict."""
    trainer, model = make(observer, **options), Model()
    validation = [loader(batches) for batches in VAL_BATCHES]
    trainer.fit(model, loader(), validation)
    trainer.validate(model, validation)
    trainer.test(model, loader(TEST_BATCHES))
    trainer.predict(model, loader(PREDICT_BATCHES))
    return trainer


NOTHING: set[str] = set()
TRAIN, VALIDATION, SANITY = {"training"}, {"validating", "evaluating"}, {"sanity_checking", "evaluating"}
TEST, PREDICT = {"testing", "evaluating"}, {"predicting"}
# for each hook which flags are set, in the order of its calls; of calls in a row that are alike only one is listed
FLAGS_OF: dict[str, list[set[str]]] = {
    "setup": [TRAIN, VALIDATION, TEST, PREDICT],
    "on_fit_start": [TRAIN],
    "on_sanity_check_start": [SANITY],
    "on_validation_start": [SANITY, VALIDATION],
    "on_validation_epoch_start": [SANITY, VALIDATION],
    "on_validation_batch_start": [SANITY, VALIDATION],
    "on_validation_batch_end": [SANITY, VALIDATION],
    "on_validation_epoch_end": [SANITY, VALIDATION],
    "on_validation_end": [SANITY, VALIDATION],
    "on_sanity_check_end": [SANITY],
    "on_train_start": [TRAIN],
    "on_train_epoch_start": [TRAIN],
    "on_train_batch_start": [TRAIN],
    "on_before_zero_grad": [TRAIN],
    "on_before_backward": [TRAIN],
    "on_after_backward": [TRAIN],
    "on_before_optimizer_step": [TRAIN],
    "on_train_batch_end": [TRAIN],
    "on_train_epoch_end": [TRAIN],
    "on_train_end": [TRAIN],
    "on_fit_end": [TRAIN],
    "on_test_start": [TEST],
    "on_test_epoch_start": [TEST],
    "on_test_batch_start": [TEST],
    "on_test_batch_end": [TEST],
    "on_test_epoch_end": [TEST],
    "on_test_end": [TEST],
    "on_predict_start": [PREDICT],
    "on_predict_epoch_start": [PREDICT],
    "on_predict_batch_start": [PREDICT],
    "on_predict_batch_end": [PREDICT],
    "on_predict_epoch_end": [PREDICT],
    "on_predict_end": [PREDICT],
}


def test_flags_say_what_is_running() -> None:
    observer = Observer(*FLAGS)
    trainer = run_all(observer)
    found: dict[str, list[set[str]]] = {}
    for hook, rows in observer.seen.items():
        for row in rows:
            flags = {name for name, value in row.items() if value}
            if found.setdefault(hook, [flags])[-1] != flags:
                found[hook].append(flags)
    # after fit a verb's teardown sees the stage that ended
    assert {hook: found[hook] for hook in FLAGS_OF} == FLAGS_OF
    assert set(found) == {*FLAGS_OF, "teardown"}
    assert not any(getattr(trainer, name) for name in FLAGS)


def test_progress_counts_epochs_steps_and_batches() -> None:
    observer = Observer("current_epoch", "global_step", "is_last_batch")
    trainer = run_all(observer, accumulate_grad_batches=2)
    no, yes = False, True
    assert observer.rows("on_fit_start") == observer.rows("on_sanity_check_start") == [(0, 0, no)]
    assert observer.rows("on_train_epoch_start") == [(0, 0, no), (1, 2, no)]
    starts = [(0, 0, no), (0, 0, no), (0, 1, no), (0, 1, yes), (1, 2, no), (1, 2, no), (1, 3, no), (1, 3, yes)]
    ends = [(0, 0, no), (0, 1, no), (0, 1, no), (0, 2, yes), (1, 2, no), (1, 3, no), (1, 3, no), (1, 4, yes)]
    assert observer.rows("on_train_batch_start") == starts
    assert observer.rows("on_train_batch_end") == ends
    assert observer.rows("on_before_optimizer_step") == starts[1::2]
    assert observer.rows("on_train_epoch_end") == [(0, 2, yes), (1, 4, yes)]
    assert observer.rows("on_validation_start") == [(0, 0, no), (0, 2, yes), (1, 4, yes), (2, 4, yes)]
    assert observer.rows("on_train_end") == observer.rows("on_fit_end") == [(2, 4, yes)]
    assert {row[:2] for row in observer.rows("on_test_batch_end") + observer.rows("on_predict_end")} == {(2, 4)}
    assert (trainer.current_epoch, trainer.global_step, trainer.skipped_batches) == (2, 4, 0)


def test_a_training_has_a_name_from_its_beginning() -> None:
    observer = Observer("run_id")
    trainer = run_all(observer)
    (name,) = {row[0] for row in observer.rows("on_train_batch_end")}
    assert isinstance(name, str)
    assert len(name) == 16
    assert trainer.run_id is not None
    assert leyden.Trainer(logger=False).run_id is None


def test_batches_are_counted_for_each_loader() -> None:
    observer = Observer("num_training_batches", *COUNTS)
    trainer = run_all(observer)
    sanity, both = [2, 2], [*VAL_BATCHES]
    assert observer.rows("setup")[0] == (math.inf, [], [], [], [])
    assert observer.rows("on_sanity_check_end")[0][2] == sanity
    assert observer.rows("on_validation_start")[0][2] == sanity
    assert observer.rows("on_sanity_check_end")[0][1] == both
    train = (TRAIN_BATCHES, both, sanity, [], [])
    for hook in ("on_train_start", "on_train_batch_end", "on_train_epoch_end", "on_train_end", "on_fit_end"):
        assert set(map(str, observer.rows(hook))) == {str(train)}, hook
    assert observer.rows("on_validation_end")[1:3] == [train, train]
    assert [row[1] for row in observer.rows("on_validation_end")[3:]] == [both]
    assert {str(row[3]) for row in observer.rows("on_test_batch_end")} == {str([TEST_BATCHES])}
    assert {str(row[4]) for row in observer.rows("on_predict_batch_end")} == {str([PREDICT_BATCHES])}
    assert (trainer.num_test_batches, trainer.num_predict_batches) == ([TEST_BATCHES], [PREDICT_BATCHES])


def test_counts_follow_the_limits() -> None:
    observer = Observer("num_training_batches", *COUNTS)
    run_all(
        observer,
        limit_train_batches=0.5,
        limit_val_batches=2,
        limit_test_batches=1,
        limit_predict_batches=0.5,
        num_sanity_val_steps=1,
    )
    assert observer.rows("on_train_start") == [(2, [2, 2], [1, 1], [], [])]
    assert observer.rows("on_sanity_check_end")[0][2] == [1, 1]
    assert observer.rows("on_test_end")[0][3] == [1]
    assert observer.rows("on_predict_end")[0][4] == [1]
    types = {type(count) for rows in observer.seen.values() for row in rows for count in row["num_val_batches"]}
    assert types == {int}


def test_a_loader_without_length_has_infinitely_many_batches() -> None:
    observer = Observer("num_training_batches", "is_last_batch")
    trainer = make(observer, max_steps=3, max_epochs=None)
    model = Model()
    trainer.fit(model, DataLoader(Endless()), [loader(1)] * 2)
    assert observer.rows("on_train_batch_end") == [(math.inf, False)] * 3
    assert model.estimates == [3]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 2}, 8),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 4),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, 2),
        ({"max_epochs": 2, "accumulate_grad_batches": 9}, 2),
        ({"max_epochs": -1, "max_steps": 3}, 3),
        ({"max_epochs": 2, "max_steps": 5}, 5),
        ({"max_epochs": 2, "max_steps": 100}, 8),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_epochs": 2, "overfit_batches": 1}, 2),
        ({"fast_dev_run": 2}, 2),
        ({"max_epochs": 3, "callbacks": [GradientAccumulationScheduler({1: 2})]}, 8),
    ],
)
def test_estimated_stepping_batches_is_the_number_of_steps_that_are_made(options: dict[str, Any], steps: int) -> None:
    model, trainer = Model(), make(**options)
    trainer.fit(model, loader(), loader())
    assert model.estimates == [steps]
    assert isinstance(model.estimates[0], int)
    assert trainer.global_step == trainer.estimated_stepping_batches == steps


def test_estimated_stepping_batches_is_infinite_if_there_is_no_limit() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: leyden.Trainer, *_: Any) -> None:
            trainer.should_stop = True

    model = Model()
    make(Stop(), max_epochs=-1).fit(model, loader(), loader())
    assert model.estimates == [math.inf]


def test_metrics_are_shown_as_tensors_and_as_numbers() -> None:
    observer = Observer("callback_metrics", "progress_bar_metrics")
    trainer = run_all(observer, max_epochs=1)
    for number, (callback, bar) in enumerate(observer.rows("on_train_batch_end")):
        assert {name: value.item() for name, value in callback.items()} == {
            "number": float(number),
            "number_step": float(number),
        }
        assert bar == {"number_step": float(number)}
        assert all(isinstance(value, Tensor) and value.ndim == 0 for value in callback.values())
        assert all(type(value) is float for value in bar.values())
    callback, bar = observer.rows("on_train_epoch_end")[0]
    validation = {"val/dataloader_idx_0": 1.0, "val/dataloader_idx_1": 2.0}
    expected = {"number": 1.5, "number_step": 3.0, "number_epoch": 1.5, **validation}
    assert {name: value.item() for name, value in callback.items()} == expected
    assert bar == {"number_epoch": 1.5, "number_step": 3.0}
    assert "val/dataloader_idx_0" not in observer.rows("on_train_start")[0][0], "the sanity check left a value"
    assert trainer.callback_metrics == {}, "predict logs nothing"
    shown = observer.rows("on_test_end")[0]
    assert ({name: value.item() for name, value in shown[0].items()}, shown[1]) == ({"test": 1.0}, {"test": 1.0})


def test_logged_metrics_are_the_values_meant_for_loggers_as_they_are_now() -> None:
    class Discreet(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("secret", 1.0, logger=False)
            return super().training_step(batch, batch_idx)

    observer = Observer("logged_metrics")
    make(observer, max_epochs=1).fit(Discreet(), loader(), [loader(1), loader(1)])

    def shown(hook: str) -> list[dict[str, float]]:
        return [{name: value.item() for name, value in row["logged_metrics"].items()} for row in observer.seen[hook]]

    validation = {"val/dataloader_idx_0": 1.0, "val/dataloader_idx_1": 2.0}
    assert shown("on_train_batch_end") == [{"number_step": float(number)} for number in range(TRAIN_BATCHES)]
    assert shown("on_train_end") == [{"number_step": 3.0, "number_epoch": 1.5, **validation}]


def test_settings_are_shown_as_they_were_made(tmp_path: Path) -> None:
    trainer = make(
        max_epochs=5, min_epochs=2, max_steps=100, min_steps=10, log_every_n_steps=7, precision="bf16",
        gradient_clip_val=0.5, check_val_every_n_epoch=3, accumulate_grad_batches=4, default_root_dir=tmp_path,
    )  # fmt: skip
    shown = {
        "max_epochs": 5, "min_epochs": 2, "max_steps": 100, "min_steps": 10, "log_every_n_steps": 7,
        "precision": "bf16-mixed", "gradient_clip_val": 0.5, "check_val_every_n_epoch": 3, "accumulate_grad_batches": 4,
        "default_root_dir": str(tmp_path), "fast_dev_run": 0, "log_dir": str(tmp_path),
    }  # fmt: skip
    assert {name: getattr(trainer, name) for name in shown} == shown
    unset = make(max_epochs=None)
    shown = {
        "max_epochs": 1000, "min_epochs": None, "max_steps": -1, "min_steps": None, "log_every_n_steps": 50,
        "precision": "32-true", "gradient_clip_val": None, "check_val_every_n_epoch": 1, "accumulate_grad_batches": 1,
    }  # fmt: skip
    assert {name: getattr(unset, name) for name in shown} == shown
    trial = make(fast_dev_run=3)
    assert (trial.fast_dev_run, trial.max_steps, trial.log_dir) == (3, 3, None)


def test_log_dir_is_the_first_loggers_that_has_one(tmp_path: Path) -> None:
    loggers = [CSVLogger(str(tmp_path / "a"), name="x", version=3), CSVLogger(str(tmp_path / "b"))]
    trainer = make(logger=loggers, default_root_dir=tmp_path)
    assert (trainer.loggers, trainer.logger) == (loggers, loggers[0])
    assert trainer.log_dir == str(tmp_path / "a" / "x" / "version_3")
    assert (make().loggers, make().logger) == ([], None)


def test_parts_are_those_of_the_present_or_the_last_verb() -> None:
    class Data(leyden.LightningDataModule):
        def train_dataloader(self) -> Any:
            return given["train"]

        def val_dataloader(self) -> Any:
            return given["val"]

    given = {"train": loader(), "val": [loader(1), loader(1)], "test": loader(1), "predict": loader(1)}
    trainer, model, data = make(max_epochs=1), Model(), Data()
    assert (trainer.model, trainer.datamodule, trainer.optimizers, trainer.lr_scheduler_configs) == (None, None, [], [])
    assert trainer.train_dataloader is trainer.val_dataloaders is trainer.test_dataloaders is None
    trainer.fit(model, datamodule=data)
    assert trainer.lightning_module is trainer.model is model
    assert trainer.datamodule is data
    assert trainer.train_dataloader is given["train"]
    assert trainer.val_dataloaders is given["val"]
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is torch.optim.SGD
    (config,) = trainer.lr_scheduler_configs
    assert (config.scheduler.optimizer, config.interval, config.frequency) == (optimizer, "epoch", 1)
    trainer.test(model, given["test"])
    assert trainer.test_dataloaders is given["test"]
    assert trainer.datamodule is None
    trainer.predict(model, given["predict"])
    assert trainer.predict_dataloaders is given["predict"]
    assert trainer.optimizers == [optimizer]


def test_callbacks_are_found_by_their_kind() -> None:
    plain, best, last = Callback(), ModelCheckpoint(monitor="val"), ModelCheckpoint()
    stops, bar = [EarlyStopping("val"), EarlyStopping("test")], RichProgressBar()
    trainer = make(best, plain, *stops, bar, last, enable_checkpointing=True, enable_progress_bar=True)
    assert [each for each in trainer.callbacks if not isinstance(each, Preemption)] == [plain, *stops, bar, best, last]
    assert (trainer.checkpoint_callbacks, trainer.checkpoint_callback) == ([best, last], best)
    assert (trainer.early_stopping_callbacks, trainer.early_stopping_callback) == (stops, stops[0])
    assert trainer.progress_bar_callback is bar
    nothing = make()
    assert (nothing.checkpoint_callbacks, nothing.early_stopping_callbacks) == ([], [])
    assert nothing.checkpoint_callback is nothing.early_stopping_callback is nothing.progress_bar_callback is None


class Writer(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.seen: list[Any] = []

    def write_on_batch_end(self, trainer: leyden.Trainer, *_: Any) -> None:
        self.seen.append((trainer.predict_batch_indices, trainer.predictions[:]))

    def write_on_epoch_end(self, trainer: leyden.Trainer, *_: Any) -> None:
        self.seen.append(trainer.epoch_batch_indices)


def test_predictions_and_their_indices() -> None:
    writer = Writer()
    trainer = make(writer)
    assert (trainer.predictions, trainer.predict_batch_indices, trainer.epoch_batch_indices) == ([], None, [])
    assert trainer.predict(Model(), loader(2)) == trainer.predictions == [0, 10]
    assert writer.seen == [([0, 1], [0]), ([2, 3], [0, 10]), [[[0, 1], [2, 3]]]]


def test_predictions_of_several_loaders() -> None:
    model = Model()
    model.predict_step = lambda batch, batch_idx, dataloader_idx: (dataloader_idx, batch_idx)  # type: ignore[method-assign]
    trainer = make()
    trainer.predict(model, [loader(2), loader(1)])
    assert trainer.predictions == [[(0, 0), (0, 1)], [(1, 0)]]
    assert trainer.num_predict_batches == [2, 1]


def test_one_process_on_one_device() -> None:
    trainer = make()
    assert trainer.is_global_zero
    assert (trainer.global_rank, trainer.local_rank, trainer.world_size) == (0, 0, 1)
    assert (trainer.num_nodes, trainer.num_devices, trainer.device) == (1, 1, torch.device("cpu"))
    assert trainer.layout.world_size == 1
    assert trainer.max_restarts == 0


def test_should_stop_is_heeded_at_the_step_boundary_and_forgotten_by_the_next_fit() -> None:
    class Stop(Callback):
        def on_train_batch_start(self, trainer: leyden.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            assert not trainer.should_stop
            trainer.should_stop = batch_idx == 2

    trainer = make(Stop())
    trainer.should_stop = True  # nothing runs, so there is nothing to stop
    assert not trainer.should_stop
    for _ in range(2):
        trainer.fit(Model(), loader(), loader())
        assert (trainer.should_stop, trainer.global_step) == (True, 3)


def test_accumulate_grad_batches_can_be_set_and_is_checked() -> None:
    trainer = make()
    trainer.accumulate_grad_batches = 2
    assert trainer.accumulate_grad_batches == 2
    trainer.fit(Model(), loader(), loader())
    assert trainer.global_step == 4
    for bad in (0, -1, 1.5, True, None):
        with pytest.raises(
            ConfigurationError, match=f"accumulate_grad_batches={bad} is not valid. Allowed: an integer ≥ 1"
        ):
            trainer.accumulate_grad_batches = bad  # type: ignore[assignment]


def properties() -> dict[str, property]:
    named = {**vars(TrainerArguments), **vars(TrainerView)}
    return {name: value for name, value in named.items() if isinstance(value, property)}


def test_the_state_is_one_object_that_lives() -> None:
    seen: list[tuple[TrainerFn | None, RunningStage | None, TrainerStatus]] = []

    class Watch(Callback):
        def note(self, trainer: leyden.Trainer, *_: Any) -> None:
            assert trainer.state is state
            seen.append((state.fn, state.stage, state.status))

        setup = on_sanity_check_start = on_validation_start = on_train_start = on_fit_end = note  # type: ignore[assignment]
        teardown = on_exception = on_predict_start = note  # type: ignore[assignment]

    trainer, model = make(Watch(), max_epochs=1), Model()
    state = trainer.state
    assert (state.fn, state.stage, state.status) == (None, None, "initializing")
    assert not state.stopped
    trainer.fit(model, loader(), [loader(1)])
    running = TrainerStatus.RUNNING
    stages = ["train", "sanity_check", "sanity_check", "train", "validate", "train", "train"]
    assert seen == [("fit", stage, running) for stage in stages]
    assert (state.fn, state.stage, state.status, state.finished) == (TrainerFn.FITTING, None, "finished", True)
    seen.clear()
    trainer.predict(model, loader(1))
    assert seen == [("predict", "predict", running)] * 3
    seen.clear()
    model.training_step = None  # type: ignore[assignment, method-assign]
    with pytest.raises(TypeError):
        trainer.fit(model, loader(), [loader(1), loader(1)])
    assert seen[-2:] == [("fit", "train", TrainerStatus.INTERRUPTED)] * 2  # on_exception, teardown
    assert (state.stage, state.status, state.finished, state.stopped) == (None, "interrupted", False, True)
    assert "interrupted" in repr(state)


def test_stages_and_verbs_are_the_strings_that_hooks_get() -> None:
    assert [stage for stage in RunningStage if stage.evaluating] == ["sanity_check", "validate", "test"]
    prefixes = {stage.value: stage.dataloader_prefix for stage in RunningStage}
    assert prefixes == {
        "train": "train",
        "sanity_check": "val",
        "validate": "val",
        "test": "test",
        "predict": "predict",
    }
    assert list(TrainerFn) == ["fit", "validate", "test", "predict"]
    assert isinstance(make().state, TrainerState)


def test_what_was_asked_for_can_be_read() -> None:
    plain = make()
    names = ("train", "val", "test", "predict")
    assert [getattr(plain, f"limit_{name}_batches") for name in names] == [1.0] * 4
    assert (plain.limit_train_batches, plain.limit_val_batches) == (1.0, 1.0)
    assert (plain.limit_test_batches, plain.limit_predict_batches) == (1.0, 1.0)
    assert (plain.overfit_batches, plain.barebones, plain.val_check_interval) == (0.0, False, 1.0)
    assert (plain.gradient_clip_algorithm, plain.reload_dataloaders_every_n_epochs) == (None, 0)
    assert (plain.num_sanity_val_steps, make(num_sanity_val_steps=-1).num_sanity_val_steps) == (2, math.inf)
    assert make(overfit_batches=3).limit_train_batches == 3
    assert (plain.device_ids, plain.node_rank) == ([0], 0)
    assert isinstance(plain.accelerator, CPUAccelerator)
    assert not isinstance(plain.accelerator, CUDAAccelerator)
    assert (make(precision="bf16-mixed").precision_plugin.compute_dtype, plain.scaler) == (torch.bfloat16, None)


def test_whether_and_when_fit_validates() -> None:
    trainer = make(val_check_interval=2)
    assert (trainer.enable_validation, trainer.val_check_batch) == (False, None)
    trainer.fit(Model(), loader(), [loader(1), loader(1)])
    assert (trainer.enable_validation, trainer.val_check_batch) == (True, 2)
    at_end = make()
    at_end.fit(Model(), loader(), [loader(1), loader(1)])
    assert at_end.val_check_batch == TRAIN_BATCHES
    by_clock = make(val_check_interval={"hours": 1})
    by_clock.fit(Model(), loader(), [loader(1), loader(1)])
    assert by_clock.val_check_batch is None
    off = make(limit_val_batches=0)
    off.fit(Model(), loader(), [loader(1), loader(1)])
    assert not off.enable_validation


def test_the_checkpoint_that_was_loaded_is_named(tmp_path: Path) -> None:
    trainer, path = make(), tmp_path / "a.ckpt"
    trainer.fit(Model(), loader(), [loader(1), loader(1)])
    assert trainer.ckpt_path is None
    trainer.save_checkpoint(path)
    trainer.test(Model(), loader(1), ckpt_path=path)
    assert trainer.ckpt_path == str(path)
    trainer.test(Model(), loader(1))
    assert trainer.ckpt_path is None


def test_the_logger_can_be_exchanged(tmp_path: Path) -> None:
    trainer, logger = make(), CSVLogger(str(tmp_path))
    trainer.logger = logger
    assert trainer.loggers == [logger]
    trainer.logger = None
    assert trainer.loggers == []


def test_no_signal_has_come() -> None:
    trainer = make(Preemption())
    trainer.fit(Model(), loader(), [loader(1), loader(1)])
    assert not trainer.received_sigterm


def test_modules_can_be_made_in_their_precision() -> None:
    with make(precision="64-true").init_module():
        layer = torch.nn.Linear(1, 1)
    assert (layer.weight.dtype, torch.nn.Linear(1, 1).weight.dtype) == (torch.float64, torch.float32)


@pytest.mark.parametrize("name", ["fit_loop", "validate_loop", "distributed_sampler_kwargs", "tune"])
def test_what_a_trainer_has_not_is_said_with_a_way_out(name: str) -> None:
    with pytest.raises(AttributeError, match=f"Trainer has no {name}: "):
        getattr(make(), name)
    assert not hasattr(make(), name)


def test_errors_of_properties_are_their_own() -> None:
    class Broken(leyden.Trainer):
        @property
        def mine(self) -> int:
            return None.absent  # type: ignore[attr-defined, no-any-return]

    broken = Broken(logger=False, accelerator="cpu", enable_checkpointing=False)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'absent'"):
        broken.mine  # noqa: B018
    with pytest.raises(AttributeError, match="Did you mean 'current_epoch'"):
        broken.currnt_epoch  # noqa: B018


def test_what_can_be_set_is_little() -> None:
    public = properties()
    assert {name for name, value in public.items() if value.fset is not None} == {
        "should_stop",
        "accumulate_grad_batches",
        "logger",
    }


def test_the_time_account_is_that_of_the_last_fit() -> None:
    trainer = make()
    assert trainer.time_account.steps == 0
    model = Model()
    trainer.fit(model, loader(), loader())
    account = trainer.time_account
    trainer.validate(model, loader())
    assert trainer.time_account is account
    assert account.steps == 2 * TRAIN_BATCHES


def test_what_compile_has_come_to_can_be_seen_after_fit() -> None:
    assert make().compilation is None
    trainer = make(compile="auto")
    assert trainer.compilation is None
    trainer.fit(Model(), loader(), loader())
    assert trainer.compilation is not None
    assert trainer.compilation.line() == ("compile='auto'", "the first steps are measured")  # of a run that had fewer


def test_every_property_is_documented_and_looked_at_in_this_file() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for name, value in properties().items():
        assert value.__doc__, name
        assert f".{name}" in source or f'"{name}"' in source, name
