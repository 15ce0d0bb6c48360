"""What a verb was given, refused where nothing can be run with it."""

from __future__ import annotations

from typing import Any

from leyden.datamodule import LightningDataModule
from leyden.errors import ConfigurationError, HookError, reject
from leyden.hooks import FORMER_MODULE_HOOKS, check_names, overridden
from leyden.module import LightningModule


def check_module(model: object) -> LightningModule:
    """Refuse what is not a module, and a class in place of an object."""
    if isinstance(model, LightningModule):
        if "_modules" not in vars(model):
            name = type(model).__name__
            raise ConfigurationError(f"{name}.__init__ did not call super().__init__(). Make that its first line.")
        return model
    if isinstance(model, type) and issubclass(model, LightningModule):
        raise ConfigurationError(f"model is the class {model.__name__}, not an instance. Write {model.__name__}(…).")
    return reject("model", model, "a leyden.LightningModule")


def check_data(verb: str, datamodule: object, passed: dict[str, Any]) -> LightningDataModule | None:
    """Refuse what is not a datamodule, and one beside loaders.

    Args:
        verb: for messages.
        datamodule: what was passed as such.
        passed: the loaders that were passed, by kind. A datamodule among them, as people write it, is taken out.
    """
    for kind, value in passed.items():
        if isinstance(value, LightningDataModule):
            datamodule, passed[kind] = value, datamodule
    if isinstance(datamodule, type) and issubclass(datamodule, LightningDataModule):
        name = datamodule.__name__
        raise ConfigurationError(f"datamodule is the class {name}, not an instance. Write {name}(…).")
    if datamodule is not None and not isinstance(datamodule, LightningDataModule):
        reject("datamodule", datamodule, "a leyden.LightningDataModule; loaders are passed by their own argument")
    if datamodule is not None and any(value is not None for value in passed.values()):
        raise ConfigurationError(f"{verb} got both dataloaders and a datamodule. Give one of the two.")
    return datamodule


def check_fit(module: LightningModule) -> None:
    """Refuse a module that cannot be trained, before anything is set up."""
    check_names(
        module, LightningModule, FORMER_MODULE_HOOKS
    )  # first, because it knows what a missing hook was misspelt as
    for name, what in (
        ("training_step", "what one step computes"),
        ("configure_optimizers", "which optimizer it uses"),
    ):
        if not overridden(module, name, LightningModule):
            raise HookError(
                f"{type(module).__name__} has no {name}, so the Trainer does not know {what}. Define it"
                + (", or return None from it to train without an optimizer." if name == "configure_optimizers" else ".")
            )
