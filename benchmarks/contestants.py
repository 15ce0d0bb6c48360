"""Who trains: the hand-written loop, leyden, and in `peers` the other trainers. README.md says who does what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from workloads import Task

import leyden
from leyden.callbacks import Callback, ModelCheckpoint
from leyden.loggers import CSVLogger

Run = Callable[[], object]
"""Trains for one epoch."""
Make = Callable[[Task, "DataLoader[Any]", Path], Run]
"""Prepares a run of a task on a loader; files go to the folder."""

BY_HAND = "PyTorch, by hand"
DEFAULT = "leyden, default"
BARE_OPTIONS: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class Contestant:
    """One way of training.

    Attributes:
        name: what the tables call it.
        make: prepares a run.
        group: ``by hand``, ``leyden`` or ``peer``.
        compiled: whether the first steps compile something.
        exact: whether it must train bit for bit as the hand-written loop does.
        package: what is imported before it begins.
    """

    name: str
    make: Make
    group: str
    compiled: bool = False
    exact: bool = False
    package: str | None = None

    @property
    def required(self) -> bool:
        """Whether the suite is broken where this one does not run: not a peer, nor a compiler that may be missing."""
        return self.group == "leyden" or (self.group == "by hand" and not self.compiled)


# The hand-written loop


def by_hand(**options: Any) -> Make:
    """The loop that people write; ``options`` are AdamW's."""

    def make(task: Task, batches: DataLoader[Any], folder: Path) -> Run:
        optimizer = task.optimizer(**options)

        def run() -> None:
            task.train()
            for batch in batches:
                optimizer.zero_grad()
                loss = task.loss(batch)
                loss.backward()
                optimizer.step()

        return run

    return make


def by_hand_compiled(task: Task, batches: DataLoader[Any], folder: Path) -> Run:
    """The same with ``torch.compile`` around model and loss."""
    optimizer, compute = task.optimizer(), torch.compile(task.compute)

    def run() -> None:
        task.train()
        for batch in batches:
            task.tick()
            optimizer.zero_grad()
            loss = compute(batch)
            loss.backward()
            optimizer.step()

    return run


# leyden


def modules_of(base: type) -> type:
    """The same LightningModule on top of leyden's or Lightning's base class."""

    class Module(base):  # type: ignore[misc]
        def __init__(self, task: Task, logs: bool) -> None:
            super().__init__()
            self.task = task
            self.logs = logs

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = self.task.loss(batch)
            if self.logs:
                self.log("loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.task.optimizer()

    return Module


class Compiled(leyden.LightningModule):
    """The same without the clock, which no graph can hold."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.task.compute(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.task.optimizer()


class Clock(Callback):
    """The clock of a compiled step, which costs more than the one in `Task.loss`; ends the run after its first epoch."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.task.tick()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = True


def default_options(folder: Path) -> dict[str, Any]:
    """A bar, a logger and checkpoints: what a Trainer does by itself, but with files in ``folder``."""
    return {
        "default_root_dir": folder,
        "logger": CSVLogger(str(folder)),
        "callbacks": [ModelCheckpoint(dirpath=folder / "checkpoints")],
    }


def by_leyden(bare: bool = False, **options: Any) -> Make:
    """A Trainer of leyden; ``options`` are added to what ``bare`` says."""
    module_class = modules_of(leyden.LightningModule)

    def make(task: Task, batches: DataLoader[Any], folder: Path) -> Run:
        chosen = BARE_OPTIONS if bare else default_options(folder)
        trainer = leyden.Trainer(accelerator="cpu", max_epochs=1, **(chosen | options))
        module = module_class(task, not bare)
        return lambda: trainer.fit(module, batches)

    return make


def by_leyden_compiled(compile_step: bool | str) -> Make:
    def make(task: Task, batches: DataLoader[Any], folder: Path) -> Run:
        chosen = default_options(folder)
        chosen["callbacks"].append(Clock())
        # as if for long: "auto" compiles only if it pays before the end
        trainer = leyden.Trainer(accelerator="cpu", max_epochs=1000, compile=compile_step, **chosen)
        module = Compiled(task)
        return lambda: trainer.fit(module, batches)

    return make


def own_contestants() -> list[Contestant]:
    """The hand-written loop, first, and leyden."""
    return [
        Contestant(BY_HAND, by_hand(), "by hand", exact=True),
        Contestant("by hand, fused=True", by_hand(fused=True), "by hand"),
        Contestant("by hand, torch.compile", by_hand_compiled, "by hand", compiled=True),
        Contestant("leyden, bare", by_leyden(bare=True), "leyden"),
        Contestant(DEFAULT, by_leyden(), "leyden"),
        Contestant("leyden, fused_optimizer=False", by_leyden(fused_optimizer=False), "leyden", exact=True),
        Contestant("leyden, compile=True", by_leyden_compiled(True), "leyden", compiled=True),
        Contestant('leyden, compile="auto"', by_leyden_compiled("auto"), "leyden", compiled=True),
    ]
