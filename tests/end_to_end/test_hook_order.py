"""Every hook of a run in its order, written out; and who is asked, in which place, after which error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import leyden as L
from leyden.callbacks import EarlyStopping, ModelCheckpoint
from leyden.errors import ConfigurationError

torch.set_num_threads(1)

MODULE_HOOKS = (
    "prepare_data", "setup", "teardown", "configure_model",
    "on_fit_start", "on_fit_end", "on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end",
    "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward", "backward",
    "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping", "optimizer_zero_grad",
    "lr_scheduler_step", "on_validation_model_zero_grad", "configure_callbacks",
    *(f"on_{stage}_{place}" for stage in ("validation", "test", "predict") for place in (
        "model_eval", "model_train", "start", "end", "epoch_start", "epoch_end", "batch_start", "batch_end"
    )),
)  # fmt: skip
CALLBACK_HOOKS = tuple(name for name in dir(L.Callback) if name.startswith("on_") or name in ("setup", "teardown"))
DATA_HOOKS = (
    "prepare_data", "setup", "teardown", "on_exception",
    "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer",
)  # fmt: skip


def recorder(base: type, prefix: str, names: tuple[str, ...]) -> Callable[[type], type]:
    """A class decorator: each hook notes its name in ``log`` and calls the base class."""

    def wrap(name: str) -> Callable[..., Any]:
        original = getattr(base, name)

        def hook(self: Any, *args: Any) -> Any:
            self.log_of_calls.append(f"{prefix}.{name}")
            return original(self, *args)

        return hook

    def decorate(cls: type) -> type:
        for name in names:
            if name not in vars(cls):
                setattr(cls, name, wrap(name))
        return cls

    return decorate


class Small(L.LightningModule):
    def __init__(self, log: list[str] | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.__dict__["log_of_calls"] = [] if log is None else log

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@recorder(L.LightningModule, "module", MODULE_HOOKS)
class RecordingModule(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log_of_calls.append("module.training_step")
        return self.layer(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_of_calls.append("module.validation_step")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log_of_calls.append("module.test_step")

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.log_of_calls.append("module.predict_step")

    def configure_optimizers(self) -> Any:
        self.log_of_calls.append("module.configure_optimizers")
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ClosureModule(RecordingModule):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        self.log_of_calls.append("module.optimizer_step")
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


@recorder(L.Callback, "callback", CALLBACK_HOOKS)
class RecordingCallback(L.Callback):
    def __init__(self, log: list[str]) -> None:
        self.log_of_calls = log


@recorder(L.LightningDataModule, "dm", DATA_HOOKS)
class RecordingData(L.LightningDataModule):
    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log_of_calls = log

    def loader(self, kind: str) -> Any:
        self.log_of_calls.append(f"dm.{kind}_dataloader")
        return DataLoader(torch.ones(3 if kind == "train" else 1, 2), batch_size=1)  # type: ignore[arg-type]

    def train_dataloader(self) -> Any:
        return self.loader("train")

    def val_dataloader(self) -> Any:
        return self.loader("val")

    def test_dataloader(self) -> Any:
        return self.loader("test")

    def predict_dataloader(self) -> Any:
        return self.loader("predict")


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


def data(batches: int = 3) -> Any:
    return DataLoader(torch.ones(batches, 2), batch_size=1)  # type: ignore[arg-type]


def record(folder: Path, verb: str, module: type[RecordingModule] = RecordingModule, **options: Any) -> list[str]:
    log: list[str] = []
    trainer = make_trainer(folder, RecordingCallback(log), **options)
    getattr(trainer, verb)(module(log), datamodule=RecordingData(log))
    return log


def lines(*blocks: str) -> list[str]:
    return [line.strip() for block in blocks for line in block.strip().splitlines()]


SET_UP = """
    module.configure_callbacks
    dm.prepare_data
    module.prepare_data
    dm.setup
    callback.setup
    module.setup
    module.configure_model
"""
TRANSFER = """
    dm.on_before_batch_transfer
    dm.transfer_batch_to_device
    dm.on_after_batch_transfer
"""
TEAR_DOWN = """
    dm.teardown
    callback.teardown
    module.teardown
"""
BACKWARD = """
    callback.on_before_backward
    module.on_before_backward
    module.backward
    callback.on_after_backward
    module.on_after_backward
"""
ZERO_GRAD = """
    callback.on_before_zero_grad
    module.on_before_zero_grad
    module.optimizer_zero_grad
"""
STEP = """
    callback.on_before_optimizer_step
    module.on_before_optimizer_step
    module.configure_gradient_clipping
    module.lr_scheduler_step
"""
BATCH_START = """
    callback.on_train_batch_start
    module.on_train_batch_start
"""
BATCH_END = """
    callback.on_train_batch_end
    module.on_train_batch_end
"""
# The hooks around an evaluation. Lightning 2.6 never calls on_predict_model_train; here every evaluation has both.
EVALUATION = """
    module.on_STAGE_model_eval
    callback.on_STAGE_start
    module.on_STAGE_start
    callback.on_STAGE_epoch_start
    module.on_STAGE_epoch_start
    dm.on_before_batch_transfer
    dm.transfer_batch_to_device
    dm.on_after_batch_transfer
    callback.on_STAGE_batch_start
    module.on_STAGE_batch_start
    module.STAGE_step
    callback.on_STAGE_batch_end
    module.on_STAGE_batch_end
    callback.on_STAGE_epoch_end
    module.on_STAGE_epoch_end
    callback.on_STAGE_end
    module.on_STAGE_end
    module.on_STAGE_model_train
"""
VALIDATION = EVALUATION.replace("STAGE", "validation")
BEFORE_TRAINING = """
    module.configure_optimizers
    callback.on_fit_start
    module.on_fit_start
    callback.on_sanity_check_start
    dm.val_dataloader
"""
TRAIN_START = """
    callback.on_sanity_check_end
    dm.train_dataloader
    callback.on_train_start
    module.on_train_start
    callback.on_train_epoch_start
    module.on_train_epoch_start
"""
TRAIN_END = """
    callback.on_train_epoch_end
    module.on_train_epoch_end
    callback.on_train_end
    module.on_train_end
    callback.on_fit_end
    module.on_fit_end
"""
TRAINING_STEP = "module.training_step"
ZERO_AND_VALIDATE = "module.on_validation_model_zero_grad"


def test_fit_calls_every_hook_in_order(tmp_path: Path) -> None:
    # 3 batches at 2 per step: two windows, of 2 and of 1.
    log = record(tmp_path, "fit", accumulate_grad_batches=2, gradient_clip_val=1.0, num_sanity_val_steps=1)
    assert log == lines(
        SET_UP, BEFORE_TRAINING, VALIDATION, TRAIN_START,
        TRANSFER, BATCH_START, TRAINING_STEP, ZERO_GRAD, BACKWARD, BATCH_END,
        TRANSFER, BATCH_START, TRAINING_STEP, BACKWARD, STEP, BATCH_END,
        TRANSFER, BATCH_START, TRAINING_STEP, ZERO_GRAD, BACKWARD, STEP, BATCH_END,
        ZERO_AND_VALIDATE, VALIDATION, TRAIN_END, TEAR_DOWN,
    )  # fmt: skip


def test_fit_with_an_optimizer_step_of_its_own_runs_the_window_s_last_batch_inside_of_it(tmp_path: Path) -> None:
    log = record(tmp_path, "fit", ClosureModule, accumulate_grad_batches=2, gradient_clip_val=1.0)
    inside = "module.optimizer_step"
    assert log == lines(
        SET_UP, BEFORE_TRAINING, VALIDATION, TRAIN_START,
        TRANSFER, BATCH_START, TRAINING_STEP, ZERO_GRAD, BACKWARD, BATCH_END,
        TRANSFER, BATCH_START, inside, TRAINING_STEP, BACKWARD, STEP, BATCH_END,
        TRANSFER, BATCH_START, inside, TRAINING_STEP, ZERO_GRAD, BACKWARD, STEP, BATCH_END,
        ZERO_AND_VALIDATE, VALIDATION, TRAIN_END, TEAR_DOWN,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "stage", "kind"),
    [("validate", "validation", "val"), ("test", "test", "test"), ("predict", "predict", "predict")],
)
def test_an_evaluation_calls_every_hook_in_order(tmp_path: Path, verb: str, stage: str, kind: str) -> None:
    evaluation = EVALUATION.replace("STAGE", stage)
    assert record(tmp_path, verb) == lines(SET_UP, f"dm.{kind}_dataloader", evaluation, TEAR_DOWN)


def test_an_error_calls_on_exception_and_then_teardown(tmp_path: Path) -> None:
    # Lightning 2.6 leaves teardown out after an error; here it always runs, so that files and processes are let go.
    class Failing(RecordingModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ZeroDivisionError("on purpose")

    log: list[str] = []
    seen: list[BaseException] = []
    callback = RecordingCallback(log)
    callback.on_exception = lambda trainer, module, error: seen.append(error)  # type: ignore[method-assign]
    trainer = make_trainer(tmp_path, callback)
    with pytest.raises(ZeroDivisionError, match="on purpose") as caught:
        trainer.fit(Failing(log), datamodule=RecordingData(log))
    assert seen == [caught.value]
    assert log[log.index("module.on_train_batch_start") :] == lines(
        "module.on_train_batch_start", "dm.on_exception", TEAR_DOWN
    )


def test_an_error_in_setup_is_followed_by_teardown_too(tmp_path: Path) -> None:
    class Failing(RecordingModule):
        def setup(self, stage: str) -> None:
            raise OSError("no disk")

    log: list[str] = []
    with pytest.raises(OSError, match="no disk"):
        make_trainer(tmp_path, RecordingCallback(log)).fit(Failing(log), datamodule=RecordingData(log))
    after = lines("callback.on_exception", "dm.on_exception", TEAR_DOWN)
    assert log == lines(SET_UP)[: lines(SET_UP).index("module.setup")] + after


def test_a_validation_that_fails_leaves_the_module_in_train_mode_and_gradients_on(tmp_path: Path) -> None:
    class Failing(Small):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert not self.layer.training
            raise ZeroDivisionError

    module = Failing()
    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path).fit(module, data(), data())
    assert module.training
    assert module.layer.training
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_a_second_run_after_an_error_starts_anew(tmp_path: Path) -> None:
    module, trainer = Small(), make_trainer(tmp_path)
    module.training_step = lambda batch, batch_idx: 1 / 0  # type: ignore[method-assign, assignment]
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, data())
    assert not trainer.training
    del module.training_step
    trainer.fit(module, data())
    assert trainer.global_step == 3


def test_an_interrupt_calls_on_exception_and_ends_with_code_130(tmp_path: Path, capsys: Any) -> None:
    class Interrupted(RecordingModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    log: list[str] = []
    trainer = make_trainer(tmp_path, RecordingCallback(log))
    with pytest.raises(SystemExit) as caught:
        trainer.fit(Interrupted(log), datamodule=RecordingData(log))
    assert caught.value.code == 130
    assert trainer.interrupted
    assert log[-5:] == lines("callback.on_exception", "dm.on_exception", TEAR_DOWN)
    assert "Interrupted in epoch 0 after 1 steps" in capsys.readouterr().out


# Who is asked


def test_hooks_patched_onto_an_instance_are_called(tmp_path: Path) -> None:
    log: list[Any] = []
    module, callback = Small(), L.Callback()
    module.on_train_start = lambda: log.append("module")  # type: ignore[method-assign]
    callback.on_train_start = lambda trainer, pl_module: log.append(pl_module)  # type: ignore[method-assign]
    make_trainer(tmp_path, callback).fit(module, data())
    assert log == [module, "module"]


def test_hooks_that_setup_sets_are_called(tmp_path: Path) -> None:
    log: list[str] = []

    class Late(Small):
        def setup(self, stage: str) -> None:
            self.on_train_start = lambda: log.append("on_train_start")  # type: ignore[method-assign]
            self.training_step = self.second_step  # type: ignore[method-assign]

        def second_step(self, batch: Any, batch_idx: int) -> Any:
            log.append("second_step")
            return self.layer(batch).mean()

    make_trainer(tmp_path).fit(Late(), data(2))
    assert log == ["on_train_start", "second_step", "second_step"]


def test_a_hook_inherited_from_a_users_base_class_is_called(tmp_path: Path) -> None:
    log: list[str] = []

    class Base(Small):
        def on_train_end(self) -> None:
            log.append("base")

    class Child(Base):
        pass

    make_trainer(tmp_path).fit(Child(), data(1))
    assert log == ["base"]


def test_hooks_that_nobody_overrides_are_not_in_the_table(tmp_path: Path) -> None:
    tables: list[Any] = []

    class Looking(Small):
        def on_train_start(self) -> None:
            assert self._run is not None
            tables.append(self._run.hooks)

    make_trainer(tmp_path, L.Callback()).fit(Looking(), data(1))
    filled = {name for name, hooks in vars(tables[0]).items() if hooks}
    assert filled == {"on_train_start", "on_validation_model_zero_grad"}  # the second has work to do by itself


def test_on_train_epoch_end_of_the_module_comes_before_those_that_monitor(tmp_path: Path) -> None:
    class Logging(Small):
        def on_train_epoch_end(self) -> None:
            self.log("late", float(self.current_epoch))

    class Seeing(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append("late" in trainer.callback_metrics)

    seen: list[bool] = []
    stopping = EarlyStopping("late", patience=1, check_on_train_epoch_end=True)  # min: the value grows
    saving = ModelCheckpoint(tmp_path, monitor="late", save_on_train_epoch_end=True)
    trainer = make_trainer(tmp_path, saving, stopping, Seeing(), max_epochs=5, enable_checkpointing=True)
    trainer.fit(Logging(), data(1))
    assert stopping.best_score == 0.0
    assert saving.best_model_score == 0.0
    assert trainer.global_step == 2  # epoch 0 is the best, epoch 1 uses up the patience
    assert seen == [False, True]  # an ordinary callback comes before the module and sees the epoch before


def test_checkpoint_callbacks_come_last(tmp_path: Path) -> None:
    class Noting(L.Callback):
        pass

    trainer = make_trainer(tmp_path, ModelCheckpoint(tmp_path), Noting(), enable_checkpointing=True)
    assert [type(callback).__name__ for callback in trainer.callbacks] == ["Noting", "Preemption", "ModelCheckpoint"]


# configure_callbacks


class Named(L.Callback):
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.calls = name, log

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.calls.append(self.name)


class Other(Named):
    pass


def test_callbacks_of_the_module_replace_those_of_the_same_class(tmp_path: Path) -> None:
    log: list[str] = []
    module = Small()
    module.configure_callbacks = lambda: [Named("module's", log)]  # type: ignore[method-assign]
    make_trainer(tmp_path, Named("trainer's", log), Other("other", log)).fit(module, data(1))
    assert log == ["other", "module's"]


def test_configure_callbacks_may_return_one_callback(tmp_path: Path) -> None:
    log: list[str] = []
    module = Small()
    module.configure_callbacks = lambda: Named("one", log)  # type: ignore[method-assign]
    make_trainer(tmp_path).fit(module, data(1))
    assert log == ["one"]


def test_callbacks_of_one_module_are_not_kept_for_the_next(tmp_path: Path) -> None:
    log: list[str] = []
    first, second = Small(), Small()
    first.configure_callbacks = lambda: [Named("first's", log)]  # type: ignore[method-assign]
    trainer = make_trainer(tmp_path, Named("trainer's", log))
    trainer.fit(first, data(1))
    trainer.fit(second, data(1))
    assert log == ["first's", "trainer's"]


def test_what_configure_callbacks_brings_is_found_through_the_trainer(tmp_path: Path) -> None:
    class Bringing(Small):
        def configure_callbacks(self) -> Any:
            return [EarlyStopping("x", patience=3), ModelCheckpoint(tmp_path / "own")]

        def on_train_epoch_end(self) -> None:
            self.log("x", 1.0)

    trainer = make_trainer(tmp_path, enable_checkpointing=None)
    trainer.fit(Bringing(), data(1))
    assert trainer.early_stopping_callback is not None
    assert trainer.early_stopping_callback.monitor == "x"
    assert trainer.checkpoint_callback is not None
    assert Path(trainer.checkpoint_callback.best_model_path).parent == tmp_path / "own"


def test_configure_callbacks_that_returns_something_else_is_refused(tmp_path: Path) -> None:
    module = Small()
    module.configure_callbacks = lambda: ["early"]  # type: ignore[method-assign, list-item, return-value]
    with pytest.raises(ConfigurationError, match="configure_callbacks returned 'early'"):
        make_trainer(tmp_path).fit(module, data(1))


# Skipping the rest of an epoch


@pytest.mark.parametrize("who", ["module", "callback"])
def test_on_train_batch_start_returning_minus_one_skips_the_rest_of_the_epoch(tmp_path: Path, who: str) -> None:
    steps: list[tuple[int, int]] = []
    ends: list[str] = []

    class Noting(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            steps.append((self.current_epoch, batch_idx))
            return self.layer(batch).mean()

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            ends.append(f"batch {batch_idx}")

        def on_train_epoch_end(self) -> None:
            ends.append(f"epoch {self.current_epoch}")

    module, callback = Noting(), L.Callback()

    def skip(batch_idx: int) -> int | None:
        return -1 if module.current_epoch == 0 and batch_idx == 1 else None

    if who == "module":
        module.on_train_batch_start = lambda batch, batch_idx: skip(batch_idx)  # type: ignore[method-assign]
    else:
        callback.on_train_batch_start = lambda t, m, batch, batch_idx: skip(batch_idx)  # type: ignore[method-assign]
    trainer = make_trainer(tmp_path, callback, max_epochs=2)
    trainer.fit(module, data(3))
    assert steps == [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert ends == ["batch 0", "epoch 0", "batch 0", "batch 1", "batch 2", "epoch 1"]
    assert (trainer.current_epoch, trainer.global_step) == (2, 4)


def test_an_epoch_skipped_at_its_first_batch_trains_nothing(tmp_path: Path) -> None:
    module = Small()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.on_train_batch_start = lambda batch, batch_idx: -1  # type: ignore[method-assign]
    trainer = make_trainer(tmp_path, max_epochs=3)
    trainer.fit(module, data(3))
    assert (trainer.current_epoch, trainer.global_step) == (3, 0)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_all_hooks_of_on_train_batch_start_run_even_if_one_skips(tmp_path: Path) -> None:
    calls: list[int] = []
    module, callback = Small(), L.Callback()
    callback.on_train_batch_start = lambda t, m, batch, batch_idx: -1  # type: ignore[method-assign]
    module.on_train_batch_start = lambda batch, batch_idx: calls.append(batch_idx)  # type: ignore[method-assign]
    make_trainer(tmp_path, callback).fit(module, data(3))
    assert calls == [0]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.LBFGS])
def test_a_window_that_a_skip_cuts_off_is_dropped_whole(tmp_path: Path, optimizer: Any) -> None:
    seen: list[float] = []

    class Windowed(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(batch[0, 0].item())
            return (self.layer(batch) - 1).square().mean()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if self.current_epoch == 0 and batch_idx == 3 else None

        def configure_optimizers(self) -> Any:
            options = {"max_iter": 1} if optimizer is torch.optim.LBFGS else {}
            return optimizer(self.parameters(), lr=0.1, **options)

    samples = torch.arange(4.0).unsqueeze(1).expand(4, 2)
    trainer = make_trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(Windowed(), DataLoader(samples, batch_size=1))  # type: ignore[arg-type]
    assert trainer.global_step == 3
    if optimizer is torch.optim.SGD:
        assert seen == [0, 1, 2, 0, 1, 2, 3]  # sample 2 of epoch 0 gave gradients that no step used
    else:
        assert seen == [0, 1, 0, 1, 2, 3]  # a window is evaluated when it is full


# What hooks see


def test_status_and_counters_as_the_hooks_see_them(tmp_path: Path) -> None:
    seen: dict[str, tuple[Any, ...]] = {}

    class Watching(L.Callback):
        def note(self, name: str, t: L.Trainer) -> None:
            flags = ("training", "validating", "sanity_checking", "evaluating")
            now = tuple(flag for flag in flags if getattr(t, flag))
            seen.setdefault(name, (now, t.current_epoch, t.global_step, t.is_last_batch))

        def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
            self.note("sanity start", trainer)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.note("train start", trainer)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.note(f"train batch end {batch_idx}", trainer)

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            self.note("sanity validation" if trainer.sanity_checking else "validation", trainer)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.note("epoch end", trainer)

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            self.note("fit end", trainer)

    class Validating(Small):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    make_trainer(tmp_path, Watching(), accumulate_grad_batches=2).fit(Validating(), data(3), data(1))
    assert seen == {
        "sanity start": (("sanity_checking", "evaluating"), 0, 0, False),
        "sanity validation": (("sanity_checking", "evaluating"), 0, 0, False),
        "train start": (("training",), 0, 0, False),
        "train batch end 0": (("training",), 0, 0, False),
        "train batch end 1": (("training",), 0, 1, False),
        "train batch end 2": (("training",), 0, 2, True),
        "validation": (("validating", "evaluating"), 0, 2, True),
        "epoch end": (("training",), 0, 2, True),
        "fit end": (("training",), 1, 2, True),
    }


def test_outputs_of_on_train_batch_end_are_detached_and_the_window_s_division_does_not_show(tmp_path: Path) -> None:
    given: list[Any] = []

    class Dicts(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.layer(batch).mean()
            return {"loss": loss, "extra": loss * 2, "name": "x"}

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            given.append(outputs)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = Dicts()
    expected = module.layer(torch.ones(1, 2)).mean().item()
    make_trainer(tmp_path, accumulate_grad_batches=2).fit(module, data(2))
    for outputs in given:
        assert set(outputs) == {"loss", "extra", "name"}
        assert not outputs["loss"].requires_grad
        assert not outputs["extra"].requires_grad
        assert (outputs["loss"].item(), outputs["extra"].item()) == (expected, 2 * expected)
