"""The other trainers that are installed. README.md says who does what.

Each is used as its own documentation shows it. «bare» trains and does nothing else; «default» shows a bar with the loss,
logs it at every step and saves a checkpoint when the epoch ends, with the means that the library has for that.
"""

from __future__ import annotations

import csv
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from contestants import BARE_OPTIONS, Contestant, Make, Run, modules_of
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from workloads import LEARNING_RATE, Task


@contextmanager
def csv_rows(folder: Path) -> Iterator[Any]:
    """A writer of rows, for those that have no CSV logger of their own."""
    with (folder / "metrics.csv").open("w", newline="") as file:
        yield csv.writer(file)


def by_lightning(bare: bool) -> Make:
    def make(task: Task, batches: DataLoader[Any], folder: Path) -> Run:
        from lightning.pytorch import LightningModule, Trainer
        from lightning.pytorch.callbacks import ModelCheckpoint
        from lightning.pytorch.loggers import CSVLogger

        options: dict[str, Any] = BARE_OPTIONS
        if not bare:
            options = {"logger": CSVLogger(str(folder)), "callbacks": [ModelCheckpoint(dirpath=folder / "checkpoints")]}
        trainer = Trainer(accelerator="cpu", max_epochs=1, default_root_dir=folder, **options)
        module = modules_of(LightningModule)(task, not bare)
        return lambda: trainer.fit(module, batches)

    return make


def by_accelerate(task: Task, batches: DataLoader[Any], folder: Path) -> Run:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, prepared = accelerator.prepare(task, task.optimizer(), batches)

    def run() -> None:
        model.train()
        for batch in prepared:
            optimizer.zero_grad()
            loss = task.loss(batch)
            accelerator.backward(loss)
            optimizer.step()

    return run


def by_accelerate_logging(task: Task, batches: DataLoader[Any], folder: Path) -> Run:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker
    from accelerate.utils import tqdm

    class Tracker(GeneralTracker):  # type: ignore[misc]
        name, requires_logging_directory, tracker = "csv", False, None

        def __init__(self, rows: Any) -> None:
            super().__init__()
            self.rows = rows

        def store_init_configuration(self, values: dict[str, Any]) -> None: ...

        def log(self, values: dict[str, Any], step: int | None, **options: Any) -> None:
            self.rows.writerow([step, *values.values()])

    def run() -> None:
        with csv_rows(folder) as rows:
            accelerator = Accelerator(cpu=True, log_with=Tracker(rows))
            accelerator.init_trackers("run")
            model, optimizer, prepared = accelerator.prepare(task, task.optimizer(), batches)
            model.train()
            bar = tqdm(prepared)
            for step, batch in enumerate(bar):
                optimizer.zero_grad()
                loss = task.loss(batch)
                accelerator.backward(loss)
                optimizer.step()
                values = {"loss": loss.item()}
                accelerator.log(values, step=step)
                bar.set_postfix(**values)
            accelerator.save_state(str(folder / "checkpoint"))
            accelerator.end_training()

    return run


def by_ignite(bare: bool) -> Make:
    def make(task: Task, batches: DataLoader[Any], folder: Path) -> Run:
        from ignite.engine import Engine, Events
        from ignite.handlers import Checkpoint, DiskSaver, ProgressBar

        optimizer = task.optimizer()

        def update(engine: Any, batch: Any) -> Any:
            task.train()
            optimizer.zero_grad()
            loss = task.loss(batch)
            loss.backward()
            optimizer.step()
            return loss.detach() if bare else loss.item()

        engine = Engine(update)

        def run() -> None:
            if bare:
                engine.run(batches, max_epochs=1)
                return
            ProgressBar().attach(engine, output_transform=lambda loss: {"loss": loss})
            saved = {"model": task, "optimizer": optimizer}
            engine.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(saved, DiskSaver(str(folder / "checkpoints"))))
            with csv_rows(folder) as rows:
                engine.add_event_handler(
                    Events.ITERATION_COMPLETED, lambda: rows.writerow([engine.state.iteration, engine.state.output])
                )
                engine.run(batches, max_epochs=1)

        return run

    return make


class Ticking(nn.Module):
    """The model alone, for trainers that compute the loss themselves."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.net = task.net
        self._clock = [task]  # in a list, so that it is no submodule

    def forward(self, inputs: Tensor) -> Tensor:
        self._clock[0].tick()
        return self.net(inputs)


class FlatCrossEntropy(nn.Module):
    """Cross entropy of (batch, classes) as well as of (batch, time, classes)."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.ndim > 2:
            outputs, targets = outputs.flatten(0, -2), targets.flatten()
        return functional.cross_entropy(outputs, targets)


def by_skorch(task: Task, batches: DataLoader[Any], folder: Path) -> Run:
    from skorch import NeuralNet
    from skorch.callbacks import Checkpoint, ProgressBar

    net = NeuralNet(
        Ticking(task),
        FlatCrossEntropy(),
        optimizer=torch.optim.AdamW,
        lr=LEARNING_RATE,
        max_epochs=1,
        iterator_train=lambda dataset, **options: batches,
        train_split=None,
        callbacks=[ProgressBar(), Checkpoint(dirname=str(folder / "checkpoints"), monitor=None)],
    )
    return lambda: net.fit(batches.dataset, None)


def by_keras(task: Task, batches: DataLoader[Any], folder: Path) -> Run:
    os.environ.setdefault("KERAS_BACKEND", "torch")  # before the first import of it
    import keras

    model = keras.Sequential([keras.layers.TorchModuleWrapper(Ticking(task))])
    model.compile(
        # torch's defaults, which are others than those of Keras
        optimizer=keras.optimizers.AdamW(LEARNING_RATE, weight_decay=0.01, epsilon=1e-8),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    callbacks = [
        keras.callbacks.CSVLogger(str(folder / "metrics.csv")),
        keras.callbacks.ModelCheckpoint(str(folder / "epoch.weights.h5"), save_weights_only=True),
    ]
    return lambda: model.fit(batches, epochs=1, callbacks=callbacks)


def peers() -> list[Contestant]:
    """Those that are installed."""
    known = {
        "lightning.pytorch": [
            ("Lightning, bare", by_lightning(bare=True)),
            ("Lightning, default", by_lightning(bare=False)),
        ],
        "accelerate": [("Accelerate, bare", by_accelerate), ("Accelerate, default", by_accelerate_logging)],
        "ignite": [("Ignite, bare", by_ignite(bare=True)), ("Ignite, default", by_ignite(bare=False))],
        "skorch": [("skorch, default", by_skorch)],
        "keras": [("Keras on torch, default", by_keras)],
    }
    return [
        Contestant(name, make, "peer", package=package)
        for package, makers in known.items()
        if importlib.util.find_spec(package.partition(".")[0]) is not None
        for name, make in makers
    ]
