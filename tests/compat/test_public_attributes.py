"""What programs read of Trainer, LightningModule and LightningDataModule: the list of Lightning 2.x, and what became of each.

The values are compared, hook by hook: the same small run under both packages, each attribute read in every hook.
"""

from __future__ import annotations

import math
import os
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import leyden as L
from leyden.compat.absent import ABSENT
from leyden.errors import LeydenError

KEPT = "kept"
# name: kept | another name | left out, and why
TRAINER: dict[str, str] = {
    # the verbs, and what can be asked for
    "fit": KEPT,
    "validate": KEPT,
    "test": KEPT,
    "predict": KEPT,
    "save_checkpoint": KEPT,
    "init_module": KEPT,
    "print": KEPT,
    # where the run stands
    "current_epoch": KEPT,
    "global_step": KEPT,
    "is_last_batch": KEPT,
    "state": KEPT,
    "training": KEPT,
    "validating": KEPT,
    "testing": KEPT,
    "predicting": KEPT,
    "sanity_checking": KEPT,
    "evaluating": KEPT,
    "should_stop": KEPT,
    "received_sigterm": KEPT,
    "interrupted": "kept, for Ctrl-C and preemption only; state.status tells of any exception",
    "estimated_stepping_batches": KEPT,
    # values
    "callback_metrics": KEPT,
    "logged_metrics": KEPT,
    "progress_bar_metrics": KEPT,
    # parts
    "callbacks": KEPT,
    "checkpoint_callback": KEPT,
    "checkpoint_callbacks": KEPT,
    "early_stopping_callback": KEPT,
    "early_stopping_callbacks": KEPT,
    "progress_bar_callback": KEPT,
    "logger": KEPT,
    "loggers": KEPT,
    "log_dir": KEPT,
    "profiler": KEPT,
    "datamodule": KEPT,
    "lightning_module": KEPT,
    "model": KEPT,
    "optimizers": KEPT,
    "lr_scheduler_configs": KEPT,
    "scaler": KEPT,
    "precision_plugin": KEPT,
    "accelerator": KEPT,
    "strategy": KEPT,
    "ckpt_path": KEPT,
    # loaders
    "train_dataloader": KEPT,
    "val_dataloaders": KEPT,
    "test_dataloaders": KEPT,
    "predict_dataloaders": KEPT,
    "num_training_batches": KEPT,
    "num_val_batches": KEPT,
    "num_sanity_val_batches": KEPT,
    "num_test_batches": KEPT,
    "num_predict_batches": KEPT,
    "enable_validation": KEPT,
    "val_check_batch": KEPT,
    # arguments
    "accumulate_grad_batches": KEPT,
    "barebones": KEPT,
    "check_val_every_n_epoch": KEPT,
    "default_root_dir": KEPT,
    "fast_dev_run": KEPT,
    "gradient_clip_algorithm": KEPT,
    "gradient_clip_val": KEPT,
    "limit_predict_batches": KEPT,
    "limit_test_batches": KEPT,
    "limit_train_batches": KEPT,
    "limit_val_batches": KEPT,
    "log_every_n_steps": KEPT,
    "max_epochs": KEPT,
    "max_steps": KEPT,
    "min_epochs": KEPT,
    "min_steps": KEPT,
    "num_sanity_val_steps": KEPT,
    "overfit_batches": KEPT,
    "precision": KEPT,
    "reload_dataloaders_every_n_epochs": KEPT,
    "val_check_interval": KEPT,
    # processes
    "device_ids": KEPT,
    "global_rank": KEPT,
    "is_global_zero": KEPT,
    "local_rank": KEPT,
    "node_rank": KEPT,
    "num_devices": KEPT,
    "num_nodes": KEPT,
    "world_size": KEPT,
    # not here
    "fit_loop": "left out: the loop is a function; the counters and limits are on the Trainer",
    "validate_loop": "left out: as fit_loop",
    "test_loop": "left out: as fit_loop",
    "predict_loop": "left out: as fit_loop; predictions, predict_batch_indices and epoch_batch_indices are on the Trainer",
    "distributed_sampler_kwargs": "left out: samples are divided without DistributedSampler",
    "enable_autolog_hparams": "left out: save_hyperparameters(logger=False)",
}
MODULE: dict[str, str] = {
    "CHECKPOINT_HYPER_PARAMS_KEY": "left out: load_checkpoint(path)['hyper_parameters']",
    "CHECKPOINT_HYPER_PARAMS_NAME": "left out: of files before 2019",
    "CHECKPOINT_HYPER_PARAMS_TYPE": "left out: of files before 2021",
    "allow_zero_length_dataloader_with_multiple_devices": "left out: ranks without data take part in what the others do",
    "configure_sharded_model": "configure_model",
    "fabric": "left out: there is no Fabric",
    "remove_ignored_hparams": "left out: save_hyperparameters(ignore=...)",
    "to_tensorrt": "left out: to_onnx or torch.export, then TensorRT's own tools",
    "prepare_data_per_node": "kept, if set; True where it is not",
}
DATAMODULE: dict[str, str] = {
    "CHECKPOINT_HYPER_PARAMS_NAME": "left out: of files before 2019",
    "CHECKPOINT_HYPER_PARAMS_TYPE": "left out: of files before 2021",
    "allow_zero_length_dataloader_with_multiple_devices": "left out: ranks without data take part in what the others do",
    "remove_ignored_hparams": "left out: save_hyperparameters(ignore=...)",
}
# what programs call on trainer.strategy; the rest of it belongs to the engine
STRATEGY = (
    "all_gather barrier broadcast global_rank is_global_zero local_rank node_rank reduce reduce_boolean_decision root_device "
    "world_size"
)
NAMES = [
    name
    for name in TRAINER
    if TRAINER[name].startswith("kept") and name not in {"print", "init_module", "save_checkpoint"}
]
VERBS = {"fit", "validate", "test", "predict"}
# read, but never equal: objects of the packages, compared below by what they are
OBJECTS = {"callbacks", "strategy", "lr_scheduler_configs", "lightning_module", "state", "precision_plugin", "profiler"}
BATCHES, VAL_BATCHES = 4, 3


# ------------------------------------------------------------------------------------------------ the list is whole


def public(owner: Any, base: type = object) -> set[str]:
    return {name for name in (*dir(type(owner)), *vars(owner)) if not name.startswith("_") and not hasattr(base, name)}


def test_the_lists_are_those_of_the_installed_lightning() -> None:
    pl = pytest.importorskip("lightning.pytorch")
    off = {f"enable_{name}": False for name in ("checkpointing", "progress_bar", "model_summary")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pl.Trainer(accelerator="cpu", logger=False, **off)
    ours = L.Trainer(accelerator="cpu", logger=False, **off)  # type: ignore[arg-type]
    assert public(theirs) == set(TRAINER)
    missing = set(TRAINER) - public(ours)
    assert missing == {name for name, what in TRAINER.items() if what.startswith("left out")}
    for theirs, ours, table in (
        (pl.LightningModule(), L.LightningModule(), MODULE),
        (pl.LightningDataModule(), L.LightningDataModule(), DATAMODULE),
    ):
        known = public(ours) | {"trainer"}
        assert public(theirs, torch.nn.Module) - known == set(table), type(ours).__name__


def test_what_is_left_out_of_the_trainer_is_said_where_it_is_read() -> None:
    left_out = {name for name, what in TRAINER.items() if what.startswith("left out")}
    assert left_out <= set(ABSENT)
    assert not set(ABSENT) & {name for name, what in TRAINER.items() if what.startswith(KEPT)}


# ------------------------------------------------------------------------------------------------ the values agree


def plain(value: Any) -> Any:
    """A value that can be compared between packages: numbers and text as they are, objects by their class."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Tensor):
        return round(value.item(), 6)
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in sorted(value.items())}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return type(value).__name__


def read(trainer: Any, name: str) -> Any:
    try:
        return plain(getattr(trainer, name))
    except LeydenError as error:
        return type(error).__name__


def observed(root: str, folder: Path, accumulate: int) -> list[tuple[str, dict[str, Any]]]:
    """One run of all verbs under a package: for each hook that a callback gets, in order, what it could read."""
    pl, callbacks, loggers = (import_module(f"{root}{part}") for part in ("", ".callbacks", ".loggers"))
    rows: list[tuple[str, dict[str, Any]]] = []

    def look(trainer: Any, hook: str) -> None:
        row = {name: read(trainer, name) for name in NAMES if name not in VERBS | OBJECTS}
        row["state"] = [None if part is None else part.value for part in (trainer.state.fn, trainer.state.stage)]
        row["state"] += [trainer.state.status.value, trainer.state.finished, trainer.state.stopped]
        row["strategy"] = [read(trainer.strategy, name) for name in ("is_global_zero", "world_size", "global_rank")]
        row["strategy"] += [str(trainer.strategy.root_device), trainer.strategy.broadcast("x")]
        row["strategy"] += [trainer.strategy.reduce(torch.tensor(2.0)).item()]
        row["strategy"] += [trainer.strategy.reduce_boolean_decision(True), trainer.strategy.barrier()]
        row["schedulers"] = [[each.interval, each.frequency, each.monitor] for each in trainer.lr_scheduler_configs]
        rows.append((hook, row))

    def watch(hook: str) -> Any:
        return lambda self, trainer, *args, **kwargs: look(trainer, hook)

    hooks = [name for name in dir(callbacks.Callback) if name.startswith("on_") and "checkpoint" not in name]
    watcher = type("Watch", (callbacks.Callback,), {hook: watch(hook) for hook in [*hooks, "setup", "teardown"]})

    class Data(pl.LightningDataModule):  # type: ignore[misc]
        def train_dataloader(self) -> Any:
            return DataLoader(torch.ones(16, 2), batch_size=2)  # type: ignore[arg-type]

        val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    class Model(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)
            torch.nn.init.constant_(self.layer.weight, 0.5)
            torch.nn.init.zeros_(self.layer.bias)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = self.layer(batch).square().mean()
            self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
            return loss  # type: ignore[no-any-return]

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val", float(batch_idx))

        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("test", float(batch_idx), prog_bar=True)

        def predict_step(self, batch: Tensor, batch_idx: int) -> int:
            return batch_idx

        def configure_optimizers(self) -> Any:
            rows.append(("configure_optimizers", {"estimate": self.trainer.estimated_stepping_batches}))
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        limit_train_batches=BATCHES,
        limit_val_batches=VAL_BATCHES,
        limit_test_batches=2,
        limit_predict_batches=2,
        num_sanity_val_steps=1,
        accumulate_grad_batches=accumulate,
        logger=loggers.CSVLogger(str(folder), name="run", version=0),
        callbacks=[watcher()],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        log_every_n_steps=1,
    )
    look(trainer, "before")
    model, data = Model(), Data()
    for verb in ("fit", "validate", "test", "predict"):
        getattr(trainer, verb)(model, datamodule=data)
        look(trainer, f"after {verb}")
    return rows


# What differs on purpose, by name: where, and why. The rest is equal in every hook.
DIFFERENT: dict[str, str] = {
    "lightning_module": "before the first verb: LeydenError in place of None",
    "estimated_stepping_batches": "before the first verb: LeydenError in place of -1",
    "num_training_batches": "known when training begins, not in the sanity check: loaders are asked for as late as possible",
    "num_val_batches": "known as soon as the sanity check begins; of the present verb",
    "num_sanity_val_batches": "as num_val_batches",
    "num_test_batches": "of the present verb",
    "val_check_batch": "known when training begins",
    "min_epochs": "None stays None",
    "is_last_batch": "False at on_train_epoch_start, where Lightning still has the last epoch's",
    "callback_metrics": "empty in setup, where Lightning still has the last verb's; so for the next two",
    "logged_metrics": "see above",
    "progress_bar_metrics": "see above",
    "log_dir": "a folder of the logger in both; compared by what it is below",
}
BEFORE_TRAINING = {
    "before", "setup", "configure_optimizers", "on_fit_start", "on_sanity_check_start", "on_sanity_check_end",
    "on_validation_start", "on_validation_epoch_start", "on_validation_batch_start", "on_validation_batch_end",
    "on_validation_epoch_end", "on_validation_end",
}  # fmt: skip


@pytest.mark.usefixtures("quiet_lightning")
@pytest.mark.parametrize("accumulate", [1, 2])  # with 3 the last window is shorter, and divided by its real size
def test_callbacks_read_the_same_values_in_every_hook(accumulate: int, tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    theirs = observed("lightning.pytorch", tmp_path / "lightning", accumulate)
    ours = observed("leyden", tmp_path / "leyden", accumulate)
    assert [hook for hook, _ in ours] == [hook for hook, _ in theirs]
    compared = 0
    for number, ((hook, here), (_, there)) in enumerate(zip(ours, theirs, strict=True)):
        for name, value in there.items():
            mine, place = here[name], f"{name} in {hook} ({number})"
            if isinstance(value, str) and str(tmp_path) in value:
                value, mine = (os.path.relpath(path, tmp_path).split(os.sep, 1)[1:] for path in (value, mine))
            if name in DIFFERENT:
                assert mine == value or is_deliberate(name, hook, mine, value), f"{place}: {mine} and {value}"
            else:
                assert mine == value, place
            compared += 1
    assert compared > 120 * 60


def is_deliberate(name: str, hook: str, mine: Any, value: Any) -> bool:
    """Whether a difference is the one that `DIFFERENT` tells of."""
    match name:
        case "estimated_stepping_batches":
            return hook == "before" and (mine, value) == ("LeydenError", -1)
        case "num_training_batches":
            return hook in BEFORE_TRAINING and mine == math.inf and value == BATCHES
        case "val_check_batch":
            return hook in BEFORE_TRAINING and mine is None and value == BATCHES
        case "min_epochs":
            return mine is None and value == 0
        case "num_val_batches" | "num_sanity_val_batches" | "num_test_batches":
            return not mine or (not value and hook in BEFORE_TRAINING)
        case "is_last_batch":
            return hook == "on_train_epoch_start" and (mine, value) == (False, True)
        case "callback_metrics" | "logged_metrics" | "progress_bar_metrics":
            return hook == "setup" and mine == {}
    return False


@pytest.mark.usefixtures("quiet_lightning")
@pytest.mark.parametrize("root", ["lightning.pytorch", "leyden"])
def test_the_state_after_an_exception_and_in_it(root: str, tmp_path: Path) -> None:
    pytest.importorskip(root)
    pl, states, exceptions = (
        import_module(f"{root}{part}") for part in ("", ".trainer.states", ".utilities.exceptions")
    )
    seen: list[Any] = []

    class Watch(pl.Callback):  # type: ignore[misc]
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            seen.append((trainer.state.fn, trainer.state.stage, trainer.state.status, type(exception)))

    class Model(import_module(f"{root}.demos.boring_classes").BoringModel):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            assert self.trainer.state.status == states.TrainerStatus.RUNNING
            raise exceptions.MisconfigurationException("mine")

    off = {f"enable_{name}": False for name in ("checkpointing", "progress_bar", "model_summary")}
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[Watch()], default_root_dir=str(tmp_path), **off)
    with pytest.raises(exceptions.MisconfigurationException, match="mine"):
        trainer.fit(Model())
    expected = ("fit", "train", "interrupted", exceptions.MisconfigurationException)
    assert seen == [expected]
    assert seen[0][:3] == (
        states.TrainerFn.FITTING,
        states.RunningStage.TRAINING,
        states.TrainerStatus.INTERRUPTED,
    )
    assert (trainer.state.fn, trainer.state.stage, trainer.state.stopped) == ("fit", None, True)
    assert not trainer.state.finished


def test_the_strategy_has_what_programs_call() -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    for name in STRATEGY.split():
        assert hasattr(trainer.strategy, name), name
    assert trainer.strategy.root_device == torch.device("cpu")
    assert (
        trainer.strategy.reduce_boolean_decision(True),
        trainer.strategy.reduce_boolean_decision(False, all=False),
    ) == (
        True,
        False,
    )
    assert isinstance(trainer.strategy, L.strategies.SingleDeviceStrategy)


def test_a_signal_is_seen_and_stays_seen_until_the_next_fit(tmp_path: Path) -> None:
    import signal

    seen: list[bool] = []

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if raising:
                os.kill(os.getpid(), signal.SIGTERM)
            seen.append(trainer.received_sigterm)

        def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
            assert isinstance(exception, L.utilities.exceptions.SIGTERMException)

    raising = True
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1,
        enable_model_summary=False, limit_train_batches=2, limit_val_batches=0, default_root_dir=tmp_path, callbacks=[Stop()],
    )  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        trainer.fit(L.demos.BoringModel())
    assert (caught.value.code, seen, trainer.received_sigterm) == (143, [True], True)
    assert trainer.state.status == "interrupted"
    raising = False
    trainer.fit(L.demos.BoringModel())
    assert (seen[1:], trainer.received_sigterm) == ([False, False], False)
