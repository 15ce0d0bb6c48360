"""Which hooks there are, with which arguments; and how misspelt ones and wrong signatures are refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import leyden as L
from leyden.errors import ConfigurationError, HookError
from leyden.hooks import EVENTS, overridden, step_arity

torch.set_num_threads(1)

# Lightning 2.x's hooks and the names of their arguments, after self.
BATCH, OUTPUTS = ["batch", "batch_idx"], ["outputs", "batch", "batch_idx"]
EVALUATION_BATCH, EVALUATION_OUTPUTS = [*BATCH, "dataloader_idx"], [*OUTPUTS, "dataloader_idx"]
MODULE_HOOKS: dict[str, list[str]] = {
    "on_fit_start": [], "on_fit_end": [],
    "on_train_start": [], "on_train_end": [],
    "on_validation_start": [], "on_validation_end": [],
    "on_test_start": [], "on_test_end": [],
    "on_predict_start": [], "on_predict_end": [],
    "on_train_batch_start": BATCH, "on_train_batch_end": OUTPUTS,
    "on_validation_batch_start": EVALUATION_BATCH, "on_validation_batch_end": EVALUATION_OUTPUTS,
    "on_test_batch_start": EVALUATION_BATCH, "on_test_batch_end": EVALUATION_OUTPUTS,
    "on_predict_batch_start": EVALUATION_BATCH, "on_predict_batch_end": EVALUATION_OUTPUTS,
    "on_train_epoch_start": [], "on_train_epoch_end": [],
    "on_validation_epoch_start": [], "on_validation_epoch_end": [],
    "on_test_epoch_start": [], "on_test_epoch_end": [],
    "on_predict_epoch_start": [], "on_predict_epoch_end": [],
    "on_validation_model_eval": [], "on_validation_model_train": [],
    "on_test_model_eval": [], "on_test_model_train": [],
    "on_predict_model_eval": [], "on_predict_model_train": [],
    "on_validation_model_zero_grad": [],
    "on_before_zero_grad": ["optimizer"],
    "on_before_backward": ["loss"],
    "on_before_optimizer_step": ["optimizer"],
    "on_after_backward": [],
    "configure_model": [], "configure_optimizers": [], "configure_callbacks": [],
    "configure_gradient_clipping": ["optimizer", "gradient_clip_val", "gradient_clip_algorithm"],
    "optimizer_step": ["epoch", "batch_idx", "optimizer", "optimizer_closure", "former", "named"],
    "optimizer_zero_grad": ["epoch", "batch_idx", "optimizer"],
    "lr_scheduler_step": ["scheduler", "metric"],
    "backward": ["loss", "args", "kwargs"],
    "manual_backward": ["loss", "args", "kwargs"],
    "toggle_optimizer": ["optimizer"], "untoggle_optimizer": ["optimizer"],
    "clip_gradients": ["optimizer", "gradient_clip_val", "gradient_clip_algorithm"],
    "all_gather": ["data", "group", "sync_grads"],
    "freeze": [], "unfreeze": [],
    "prepare_data": [], "setup": ["stage"], "teardown": ["stage"],
    "train_dataloader": [], "val_dataloader": [], "test_dataloader": [], "predict_dataloader": [],
    "transfer_batch_to_device": ["batch", "device", "dataloader_idx"],
    "on_before_batch_transfer": ["batch", "dataloader_idx"],
    "on_after_batch_transfer": ["batch", "dataloader_idx"],
    "on_save_checkpoint": ["checkpoint"], "on_load_checkpoint": ["checkpoint"],
    "training_step": ["args", "kwargs"], "validation_step": ["args", "kwargs"],
    "test_step": ["args", "kwargs"], "predict_step": ["args", "kwargs"],
    "print": ["args", "kwargs"],
    "optimizers": ["use_pl_optimizer"], "lr_schedulers": [],
}  # fmt: skip
DATA_HOOKS = (
    "prepare_data", "setup", "teardown", "train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader",
    "transfer_batch_to_device", "on_before_batch_transfer", "on_after_batch_transfer",
)  # fmt: skip
NOT_FOR_CALLBACKS = {
    f"on_{stage}_model_{place}" for stage in ("validation", "test", "predict") for place in ("eval", "train")
} | {"on_validation_model_zero_grad", "on_before_batch_transfer", "on_after_batch_transfer"}


def arguments(hook: Any) -> list[str]:
    return [name for name in inspect.signature(hook).parameters if name != "self"]


@pytest.mark.parametrize("name", MODULE_HOOKS)
def test_the_module_has_the_hook_with_lightnings_arguments(name: str) -> None:
    assert arguments(getattr(L.LightningModule, name)) == MODULE_HOOKS[name]


@pytest.mark.parametrize("name", [name for name in MODULE_HOOKS if name.startswith("on_")])
def test_a_callback_has_the_hook_with_trainer_and_module_in_front(name: str) -> None:
    if name in NOT_FOR_CALLBACKS:
        assert not hasattr(L.Callback, name)
    else:
        assert arguments(getattr(L.Callback, name)) == ["trainer", "pl_module", *MODULE_HOOKS[name]]


@pytest.mark.parametrize("name", DATA_HOOKS)
def test_the_datamodule_has_the_hook_with_the_module_s_arguments(name: str) -> None:
    assert arguments(getattr(L.LightningDataModule, name)) == MODULE_HOOKS[name]


def test_callbacks_have_the_hooks_that_modules_do_not() -> None:
    assert arguments(L.Callback.setup) == arguments(L.Callback.teardown) == ["trainer", "pl_module", "stage"]
    assert arguments(L.Callback.on_exception) == ["trainer", "pl_module", "exception"]
    assert arguments(L.Callback.on_sanity_check_start) == ["trainer", "pl_module"]
    assert arguments(L.Callback.on_sanity_check_end) == ["trainer", "pl_module"]
    assert arguments(L.LightningDataModule.on_exception) == ["exception"]


def test_every_event_is_a_hook_of_the_module_or_of_callbacks() -> None:
    for name, event in EVENTS.items():
        assert hasattr(L.LightningModule, name) or name.startswith("on_sanity_check")
        assert hasattr(L.Callback, name) is not event.module_only


# A module, and a fit that must stop before its first batch


class Small(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.batches = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches += 1
        return self.layer(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.batches += 1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Plain(Small):
    validation_step = L.LightningModule.validation_step  # type: ignore[assignment]


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader()


def loader() -> Any:
    return DataLoader(torch.ones(2, 1), batch_size=1)  # type: ignore[arg-type]


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


def refused(folder: Path, owner: Any, name: str, hook: Any) -> str:
    """Give ``owner``'s class the method, fit, and return the message of the HookError."""
    cls = type(f"User{owner.__name__}", (owner,), {name: hook})
    module = cls() if issubclass(cls, L.LightningModule) else Small()
    callbacks = [cls()] if issubclass(cls, L.Callback) else []
    datamodule = cls() if issubclass(cls, L.LightningDataModule) else Data()
    with pytest.raises(HookError) as caught:
        make_trainer(folder, *callbacks).fit(module, datamodule=datamodule)
    assert module.batches == 0
    return str(caught.value)


WRONG: list[tuple[Any, str, Any, str, str]] = [
    (Small, "on_train_start", lambda self, extra: None, "(extra)", "on_train_start()"),
    (Small, "on_train_batch_start", lambda self, batch: None, "(batch)", "on_train_batch_start(batch, batch_idx)"),
    (
        Small,
        "on_train_batch_end",
        lambda self, outputs, batch, batch_idx, more: None,
        "(outputs, batch, batch_idx, more)",
        "on_train_batch_end(outputs, batch, batch_idx)",
    ),
    (Small, "on_before_optimizer_step", lambda self: None, "()", "on_before_optimizer_step(optimizer)"),
    (Small, "on_validation_epoch_end", lambda self, outputs: None, "(outputs)", "on_validation_epoch_end()"),
    (Small, "on_validation_model_eval", lambda self, x: None, "(x)", "on_validation_model_eval()"),
    (Small, "setup", lambda self: None, "()", "setup(stage)"),
    (Small, "configure_optimizers", lambda self, lr: None, "(lr)", "configure_optimizers()"),
    (Small, "train_dataloader", lambda self, size: None, "(size)", "train_dataloader()"),
    (
        Small,
        "optimizer_step",
        lambda self, epoch, batch_idx, optimizer, more, optimizer_closure: None,
        "(epoch, batch_idx, optimizer, more, optimizer_closure)",
        "optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)",
    ),
    (Small, "lr_scheduler_step", lambda self, scheduler: None, "(scheduler)", "lr_scheduler_step(scheduler, metric)"),
    (Small, "on_save_checkpoint", lambda self: None, "()", "on_save_checkpoint(checkpoint)"),
    (L.Callback, "on_train_start", lambda self: None, "()", "on_train_start(trainer, pl_module)"),
    (
        L.Callback,
        "on_train_batch_end",
        lambda self, trainer, pl_module: None,
        "(trainer, pl_module)",
        "on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)",
    ),
    (
        L.Callback,
        "on_validation_batch_start",
        lambda self, trainer, pl_module, batch: None,
        "(trainer, pl_module, batch)",
        "on_validation_batch_start(trainer, pl_module, batch, batch_idx)",
    ),
    (L.Callback, "setup", lambda self, trainer: None, "(trainer)", "setup(trainer, pl_module, stage)"),
    (
        L.Callback,
        "on_exception",
        lambda self, exception: None,
        "(exception)",
        "on_exception(trainer, pl_module, exception)",
    ),
    (Data, "setup", lambda self: None, "()", "setup(stage)"),
    (Data, "prepare_data", lambda self, path: None, "(path)", "prepare_data()"),
    (Data, "val_dataloader", lambda self, size: None, "(size)", "val_dataloader()"),
    (Data, "on_exception", lambda self: None, "()", "on_exception(exception)"),
    (
        Data,
        "on_after_batch_transfer",
        lambda self, batch: batch,
        "(batch)",
        "on_after_batch_transfer(batch, dataloader_idx)",
    ),
]


@pytest.mark.parametrize(("owner", "name", "hook", "given", "called"), WRONG)
def test_a_wrong_signature_is_refused_before_the_first_batch(
    tmp_path: Path, owner: Any, name: str, hook: Any, given: str, called: str
) -> None:
    message = refused(tmp_path, owner, name, hook)
    assert f"User{owner.__name__}.{name}{given}" in message
    assert f"cannot be called as {called}" in message
    assert f"({__file__}:{hook.__code__.co_firstlineno})" in message
    assert f"Write it as def {name}(self" in message


def test_a_signature_with_defaults_or_any_arguments_is_accepted(tmp_path: Path) -> None:
    calls: list[Any] = []

    class Free(Plain):
        def on_train_batch_start(self, *args: Any) -> None:
            calls.append(args[1])

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int, unused: int = 7, **more: Any) -> None:
            calls.append((batch_idx, unused, more))

        def setup(self, stage: str | None = None) -> None:
            calls.append(stage)

    make_trainer(tmp_path, limit_train_batches=1).fit(Free(), loader())
    assert calls == ["fit", 0, (0, 7, {})]


# Misspelt names


@pytest.mark.parametrize(
    ("owner", "written", "meant"),
    [
        (Small, "val_dataloaders", "val_dataloader"),
        (Small, "on_train_epoch_ends", "on_train_epoch_end"),
        (Small, "on_training_epoch_end", "on_train_epoch_end"),
        (Small, "pred_step", "predict_step"),
        (Small, "on_validaton_end", "on_validation_end"),
        (Small, "configure_callback", "configure_callbacks"),
        (L.Callback, "on_train_epoch_ends", "on_train_epoch_end"),
        (L.Callback, "validation_epoch_end", "on_validation_epoch_end"),
        (L.Callback, "on_save_checkpoints", "on_save_checkpoint"),
        (Data, "test_loader", None),  # a name that only modules are known to get wrong is left alone
        (Data, "valid_dataloader", None),  # the real hook is there, so this is a helper
    ],
)
def test_a_misspelt_hook_is_refused_with_the_name_that_was_meant(
    tmp_path: Path, owner: Any, written: str, meant: str | None
) -> None:
    def hook(self: Any, *args: Any) -> None:
        raise AssertionError("never called")

    if meant is None:
        cls = type("UserData", (owner,), {written: hook})
        make_trainer(tmp_path).fit(Small(), datamodule=cls())
        return
    message = refused(tmp_path, owner, written, hook)
    assert f"User{owner.__name__}.{written}" in message
    assert f"Did you mean '{meant}'?" in message
    assert f"{__file__}:{hook.__code__.co_firstlineno}" in message


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("configure_optimizer", "configure_optimizers"),
        ("configure_optimisers", "configure_optimizers"),
        ("train_step", "training_step"),
        ("traning_step", "training_step"),
        ("val_step", "validation_step"),
        ("validaton_step", "validation_step"),
    ],
)
def test_a_misspelt_step_is_refused_rather_than_missed(tmp_path: Path, written: str, meant: str) -> None:
    def hook(self: Any, *args: Any) -> None:
        raise AssertionError("never called")

    methods = {name: getattr(Small, name) for name in ("training_step", "validation_step", "configure_optimizers")}
    methods[written] = hook
    del methods[meant]
    cls: Any = type("Model", (L.LightningModule,), methods)
    with pytest.raises(HookError, match=f"Did you mean '{meant}'"):
        make_trainer(tmp_path).fit(cls(), loader())


def test_a_misspelt_step_of_an_evaluation_is_refused(tmp_path: Path) -> None:
    class Model(L.LightningModule):
        def val_step(self, batch: Any, batch_idx: int) -> None:
            raise AssertionError

    with pytest.raises(HookError, match="Did you mean 'validation_step'"):
        make_trainer(tmp_path).validate(Model(), loader())


def test_a_misspelt_hook_of_a_datamodule_is_refused(tmp_path: Path) -> None:
    class Wrong(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

        def validation_dataloader(self) -> Any:
            return loader()

    with pytest.raises(HookError, match=r"Wrong\.validation_dataloader .*Did you mean 'val_dataloader'"):
        make_trainer(tmp_path).fit(Small(), datamodule=Wrong())


def test_helpers_with_similar_names_are_not_refused_when_the_real_hook_is_there(tmp_path: Path) -> None:
    class Helping(Small):
        def train_step(self, batch: Any) -> Any:
            return self.layer(batch).mean()

        def val_step(self, batch: Any) -> None:
            pass

        def on_epoch_end(self) -> None:
            pass

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.train_step(batch)

        def on_train_epoch_end(self) -> None:
            self.on_epoch_end()

        def configure_optimizer(self, lr: float) -> Any:
            return torch.optim.SGD(self.parameters(), lr=lr)

        def configure_optimizers(self) -> Any:
            return self.configure_optimizer(0.1)

    trainer = make_trainer(tmp_path)
    trainer.fit(Helping(), loader(), loader())
    assert trainer.global_step == 2


def test_helpers_that_other_methods_call_are_not_refused(tmp_path: Path) -> None:
    class Helping(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.configure_models()

        def configure_models(self) -> None:
            self.layer = torch.nn.Linear(1, 1)

        def val_step(self, batch: Any) -> Any:
            return self.layer(batch).mean()

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log_dict({name: step(batch) for name, step in [("x", lambda batch: self.val_step(batch))]})

    assert set(make_trainer(tmp_path).test(Helping(), loader())[0]) == {"x"}


def test_a_misspelt_hook_that_only_calls_super_is_still_refused(tmp_path: Path) -> None:
    class Base(Small):
        def on_training_epoch_end(self) -> None:
            pass

    class Child(Base):
        def on_training_epoch_end(self) -> None:
            super().on_training_epoch_end()

    with pytest.raises(HookError, match="Did you mean 'on_train_epoch_end'"):
        make_trainer(tmp_path).fit(Child(), loader())


@pytest.mark.parametrize(
    "name", ["best_step", "shared_step", "_val_step", "on_reset", "forward_step", "make_dataloader"]
)
def test_names_that_are_not_close_to_a_hook_are_free(tmp_path: Path, name: str) -> None:
    cls = type("Model", (Plain,), {name: lambda self: None})
    trainer = make_trainer(tmp_path)
    trainer.fit(cls(), loader())
    assert trainer.global_step == 2


def test_a_module_without_training_step_or_optimizers_is_refused_at_once(tmp_path: Path) -> None:
    class NoStep(L.LightningModule):
        def configure_optimizers(self) -> None:
            pass

    class NoOptimizer(L.LightningModule):
        def training_step(self, batch: Any) -> None:
            pass

    with pytest.raises(HookError, match="NoStep has no training_step"):
        make_trainer(tmp_path).fit(NoStep(), loader())
    with pytest.raises(HookError, match="NoOptimizer has no configure_optimizers"):
        make_trainer(tmp_path).fit(NoOptimizer(), loader())
    with pytest.raises(HookError, match="NoStep has no test_step"):
        make_trainer(tmp_path).test(NoStep(), loader())


@pytest.mark.parametrize("model", [Small, torch.nn.Linear(1, 1), None, "model"])
def test_what_is_no_module_is_refused(tmp_path: Path, model: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"model is the class Small, not an instance|model=.* is not valid"):
        make_trainer(tmp_path).fit(model, loader())


# What a step may take


def with_step(name: str, step: Any) -> Any:
    return type("Model", (Small,), {name: step})()


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (lambda self, batch: self.note(batch), ("b",)),
        (lambda self, batch, batch_idx: self.note(batch, batch_idx), ("b", 0)),
        (lambda self, x, i, more=5: self.note(x, i, more), ("b", 0, 5)),
        (lambda self, *args: self.note(*args), ("b", 0)),
        (lambda self, batch, *args: self.note(batch, *args), ("b", 0)),
        (lambda self, batch, batch_idx, **kwargs: self.note(batch, batch_idx, kwargs), ("b", 0, {})),
    ],
)
def test_training_steps_of_every_form(tmp_path: Path, step: Any, expected: Any) -> None:
    calls: list[Any] = []

    def note(self: Any, *args: Any) -> Any:
        calls.append(("b" if isinstance(args[0], torch.Tensor) else args[0], *args[1:]))
        return self.layer.weight.sum()

    cls = type("Model", (Plain,), {"training_step": step, "note": note})
    make_trainer(tmp_path, limit_train_batches=1).fit(cls(), loader())
    assert calls == [expected]


@pytest.mark.parametrize(
    ("step", "one", "several"),
    [
        (lambda self, batch: self.note(batch), ("b",), HookError),
        (lambda self, batch, batch_idx: self.note(batch, batch_idx), ("b", 0), HookError),
        (lambda self, b, i, d: self.note(b, i, d), ("b", 0, 0), ("b", 0, 1)),
        (lambda self, b, i, d=9: self.note(b, i, d), ("b", 0, 9), ("b", 0, 1)),
        (lambda self, *args: self.note(*args), ("b", 0), ("b", 0, 1)),
        (lambda self, b, *args: self.note(b, *args), ("b", 0), ("b", 0, 1)),
    ],
)
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluation_steps_of_every_form(tmp_path: Path, verb: str, step: Any, one: Any, several: Any) -> None:
    calls: list[Any] = []

    def note(self: Any, *args: Any) -> None:
        calls.append(("b", *args[1:]))

    name = {"validate": "validation_step"}.get(verb, f"{verb}_step")
    cls = type("Model", (Small,), {name: step, "note": note})
    limit: dict[str, Any] = {"limit_val_batches": 1, "limit_test_batches": 1, "limit_predict_batches": 1}
    getattr(make_trainer(tmp_path, **limit), verb)(cls(), loader())
    assert calls == [one]
    calls.clear()
    if several is HookError:
        with pytest.raises(HookError, match=f"no place for dataloader_idx. Write it as def {name}"):
            getattr(make_trainer(tmp_path, **limit), verb)(cls(), [loader(), loader()])
        assert calls == []
    else:
        getattr(make_trainer(tmp_path, **limit), verb)(cls(), [loader(), loader()])
        assert calls[1] == several


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("training_step", lambda self: None),
        ("training_step", lambda self, *, batch: None),
        ("training_step", lambda self, batch, batch_idx, more: None),
        ("validation_step", lambda self: None),
        ("validation_step", lambda self, batch, batch_idx, dataloader_idx, more: None),
    ],
)
def test_a_step_that_cannot_be_called_is_refused_with_what_it_gets(tmp_path: Path, name: str, step: Any) -> None:
    module = with_step(name, step)
    with pytest.raises(HookError) as caught:
        make_trainer(tmp_path).fit(module, loader(), loader())
    assert f"Model.{name}" in str(caught.value)
    assert f"({__file__}:{step.__code__.co_firstlineno})" in str(caught.value)
    assert f"cannot be called as {name}(batch, batch_idx)" in str(caught.value)
    assert module.batches == 0


def test_the_arity_of_a_step_patched_onto_the_instance() -> None:
    module = Small()
    module.training_step = lambda batch: None  # type: ignore[method-assign, assignment, misc]
    assert step_arity(module, "training_step", False) == 1


# overridden


def test_overridden_knows_class_base_class_and_instance() -> None:
    class Base(L.LightningModule):
        def on_fit_start(self) -> None:
            pass

    class Child(Base):
        pass

    module = Child()
    module.on_fit_end = lambda: None  # type: ignore[method-assign]
    found = {name for name in EVENTS if overridden(module, name, L.LightningModule)}
    assert found == {"on_fit_start", "on_fit_end"}
    assert not overridden(Small(), "no_such_hook", L.LightningModule)


def test_a_hook_from_a_mixin_counts_as_overridden() -> None:
    class Mixin:
        def on_fit_start(self) -> None:
            pass

    class Mixed(Mixin, L.LightningModule):
        pass

    assert overridden(Mixed(), "on_fit_start", L.LightningModule)
