"""What programs catch: wherever Lightning 2.x raises its MisconfigurationException, ``except`` of leyden's catches as well."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from leyden.errors import ConfigurationError, HookError, LeydenError
from leyden.utilities.exceptions import MisconfigurationException, SIGTERMException


class Package(NamedTuple):
    """Lightning or leyden, as programs import them."""

    pl: Any
    callbacks: Any
    misconfiguration: type[Exception]


def package(root: str) -> Package:
    exceptions = import_module(f"{root}.utilities.exceptions")
    return Package(import_module(root), import_module(f"{root}.callbacks"), exceptions.MisconfigurationException)


def loader() -> DataLoader[Any]:
    return DataLoader(torch.ones(4, 2))  # type: ignore[arg-type]


def trainer(of: Package, folder: Path, *callbacks: Any, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "limit_train_batches": 2,
        "limit_val_batches": 2,
        "logger": False,
        "enable_checkpointing": any(isinstance(each, of.callbacks.ModelCheckpoint) for each in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return of.pl.Trainer(callbacks=list(callbacks), **(settings | options))


def model(of: Package, **over: Any) -> Any:
    """A module that trains; ``over`` replaces what it has, and None takes it away."""

    def init(self: Any) -> None:
        of.pl.LightningModule.__init__(self)
        self.layer = torch.nn.Linear(2, 1)

    def step(self: Any, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    own: dict[str, Any] = {
        "__init__": init,
        "training_step": step,
        "validation_step": step,
        "configure_optimizers": lambda self: torch.optim.SGD(self.parameters(), 0.1),
        "train_dataloader": lambda self: loader(),
        "val_dataloader": lambda self: loader(),
    }
    own |= over
    return type("Model", (of.pl.LightningModule,), {name: value for name, value in own.items() if value is not None})()


def fit(**over: Any) -> Callable[[Package, Path], Any]:
    return lambda of, folder: trainer(of, folder).fit(model(of, **over))


def arguments(**options: Any) -> Callable[[Package, Path], Any]:
    return lambda of, folder: trainer(of, folder, **options)


def fit_with(name: str, *args: Any, **options: Any) -> Callable[[Package, Path], Any]:
    return lambda of, folder: trainer(of, folder, getattr(of.callbacks, name)(*args, **options)).fit(model(of))


def callback(name: str, *args: Any, **options: Any) -> Callable[[Package, Path], Any]:
    return lambda of, folder: getattr(of.callbacks, name)(*args, **options)


def log(*args: Any, **options: Any) -> Callable[[Package, Path], Any]:
    def step(self: Any, batch: Tensor, batch_idx: int) -> Tensor:
        self.log(*args, **options)
        return self.layer(batch).sum()

    return fit(training_step=step)


def log_twice(self: Any, batch: Tensor, batch_idx: int) -> Tensor:
    self.log("a", 1.0, on_step=True)
    self.log("a", 1.0, on_step=False, on_epoch=True)
    return self.layer(batch).sum()


def plateau(**config: Any) -> Callable[[Any], Any]:
    def configure(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **config}}

    return configure


def manual(**options: Any) -> Callable[[Package, Path], Any]:
    def run(of: Package, folder: Path) -> None:
        module = model(of)
        module.automatic_optimization = False
        trainer(of, folder, **options).fit(module)

    return run


# what Lightning answers with MisconfigurationException
CASES: dict[str, Callable[[Package, Path], Any]] = {
    "no training_step": fit(training_step=None),
    "no train_dataloader": fit(train_dataloader=None),
    "no configure_optimizers": fit(configure_optimizers=None),
    "no validation_step": lambda of, folder: trainer(of, folder).validate(model(of, validation_step=None)),
    "no val_dataloader": lambda of, folder: trainer(of, folder).validate(model(of, val_dataloader=None)),
    "no test_step": lambda of, folder: trainer(of, folder).test(model(of), loader()),
    "no test_dataloader": lambda of, folder: trainer(of, folder).test(model(of, test_step=lambda *_: None)),
    "loaders and datamodule": lambda of, folder: trainer(of, folder).fit(
        model(of), loader(), datamodule=of.pl.LightningDataModule()
    ),
    "limit_train_batches=-1": arguments(limit_train_batches=-1),
    "limit_val_batches=1.5": arguments(limit_val_batches=1.5),
    "limit_train_batches=0.001": lambda of, folder: trainer(of, folder, limit_train_batches=0.001).fit(model(of)),
    "overfit_batches=-1": arguments(overfit_batches=-1),
    "fast_dev_run=-1": arguments(fast_dev_run=-1),
    "accelerator='cuda' without": arguments(accelerator="cuda"),
    "accelerator='gpu' without": arguments(accelerator="gpu"),
    "devices=0": arguments(devices=0),
    "profiler='fast'": arguments(profiler="fast"),
    "max_epochs=-2": arguments(max_epochs=-2),
    "max_steps=-2": arguments(max_steps=-2),
    "max_time='1h'": arguments(max_time="1h"),
    "gradient_clip_algorithm='x'": arguments(gradient_clip_algorithm="x"),
    "val_check_interval=0.5 across epochs": arguments(check_val_every_n_epoch=None, val_check_interval=0.5),
    "val_check_interval=2.5": arguments(val_check_interval=2.5),
    "ModelCheckpoint in spite of False": lambda of, folder: trainer(
        of, folder, of.callbacks.ModelCheckpoint(), enable_checkpointing=False
    ),
    "progress bar in spite of False": lambda of, folder: trainer(of, folder, of.callbacks.TQDMProgressBar()),
    "plugins=[object()]": arguments(plugins=[object()]),
    "reload_dataloaders_every_n_epochs=-1": arguments(reload_dataloaders_every_n_epochs=-1),
    "ModelCheckpoint(monitor that is not logged)": fit_with("ModelCheckpoint", monitor="nope"),
    "ModelCheckpoint(mode='up')": callback("ModelCheckpoint", monitor="a", mode="up"),
    "ModelCheckpoint(save_top_k=-2)": callback("ModelCheckpoint", monitor="a", save_top_k=-2),
    "ModelCheckpoint(save_top_k=3) of nothing": callback("ModelCheckpoint", save_top_k=3),
    "ModelCheckpoint of steps and epochs": callback("ModelCheckpoint", every_n_train_steps=1, every_n_epochs=1),
    "ModelCheckpoint(every_n_train_steps=-1)": callback("ModelCheckpoint", every_n_train_steps=-1),
    "EarlyStopping(mode='up')": callback("EarlyStopping", "a", mode="up"),
    "LearningRateMonitor without a logger": fit_with("LearningRateMonitor"),
    "LearningRateMonitor('batch')": callback("LearningRateMonitor", "batch"),
    "Timer(interval='x')": callback("Timer", interval="x", duration="00:00:01:00"),
    "GradientAccumulationScheduler({-1: 2})": callback("GradientAccumulationScheduler", {-1: 2}),
    "ReduceLROnPlateau without monitor": fit(configure_optimizers=plateau()),
    "ReduceLROnPlateau of what is not logged": fit(configure_optimizers=plateau(monitor="nope")),
    "configure_optimizers returns 3": fit(configure_optimizers=lambda self: 3),
    "scheduler without scheduler": fit(
        configure_optimizers=lambda self: {
            "optimizer": torch.optim.SGD(self.parameters(), 0.1),
            "lr_scheduler": {"interval": "epoch"},
        }
    ),
    "training_step returns text": fit(training_step=lambda self, batch, batch_idx: "x"),
    "training_step returns a dict without loss": fit(training_step=lambda self, batch, batch_idx: {"los": 1}),
    "log twice with other arguments": fit(training_step=log_twice),
    "log of a name with dataloader_idx": log("a/dataloader_idx_0", 1.0),
    "log(reduce_fx='median')": log("a", 1.0, reduce_fx="median"),
    "log in configure_optimizers": fit(configure_optimizers=lambda self: self.log("a", 1.0)),
    "manual_backward in automatic optimization": fit(
        training_step=lambda self, batch, batch_idx: self.manual_backward(self.layer(batch).sum())
    ),
    "gradient_clip_val in manual optimization": manual(gradient_clip_val=1.0),
    "accumulate_grad_batches in manual optimization": manual(accumulate_grad_batches=2),
}
# leyden sees nothing wrong, or not yet
ELSEWHERE = {
    "no configure_optimizers": "Lightning trains without, and changes nothing; a warning there, an error in leyden",
}
# other exceptions of Lightning that a program may catch, by their built-in name
BUILT_IN: dict[str, tuple[type[Exception], Callable[[Package, Path], Any]]] = {
    "precision='17'": (ValueError, arguments(precision="17")),
    "accelerator='abacus'": (ValueError, arguments(accelerator="abacus")),
    "strategy='dddp'": (ValueError, arguments(strategy="dddp")),
    "log of text": (ValueError, log("a", "b")),
    "log of a vector": (ValueError, log("a", torch.ones(3))),
    "a loss without gradient": (RuntimeError, fit(training_step=lambda self, batch, batch_idx: torch.tensor(1.0))),
    "seed_everything('a')": (ValueError, lambda of, folder: of.pl.seed_everything("a")),
    "a hook with another signature": (TypeError, fit(on_train_start=lambda self, more: None)),
}


@pytest.mark.usefixtures("quiet_lightning")
@pytest.mark.parametrize("case", CASES)
def test_what_lightning_misconfigures_can_be_caught(case: str, tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    if case not in ELSEWHERE:
        theirs = package("lightning.pytorch")
        with pytest.raises(theirs.misconfiguration):
            CASES[case](theirs, tmp_path)
    with pytest.raises(MisconfigurationException) as caught:
        CASES[case](package("leyden"), tmp_path)
    assert isinstance(caught.value, LeydenError)


@pytest.mark.usefixtures("quiet_lightning")
@pytest.mark.parametrize("case", BUILT_IN)
@pytest.mark.parametrize("root", ["lightning.pytorch", "leyden"])
def test_what_is_caught_by_a_built_in_name(root: str, case: str, tmp_path: Path) -> None:
    pytest.importorskip(root)
    kind, do = BUILT_IN[case]
    with pytest.raises(kind):
        do(package(root), tmp_path)


def test_programs_raise_it_themselves() -> None:
    with pytest.raises(MisconfigurationException, match=r"^use another one$") as caught:
        raise MisconfigurationException("use another one")
    assert not isinstance(caught.value, ValueError)
    assert issubclass(HookError, MisconfigurationException)
    assert issubclass(ConfigurationError, (MisconfigurationException, ValueError))


def test_the_end_by_sigterm_is_a_system_exit() -> None:
    with pytest.raises(SystemExit) as caught:
        raise SIGTERMException(143)
    assert caught.value.code == 143
