"""A small training with everything in it that a restart could lose, and the instants at which it can be killed.

`train` is what a user's script does: build everything anew, then ``fit(ckpt_path="last")``. It writes down each batch it
trains on and each value that is logged, and at the end the whole state, so that runs can be compared bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, WeightedRandomSampler

import leyden as L
from leyden.callbacks import EarlyStopping, EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from leyden.checkpoint import store
from leyden.data import CombinedLoader
from leyden.loggers import Logger

SAMPLES = 23  # of the first loader; 3 per batch leave a short last one, of 2 for the sake of BatchNorm


@dataclass(frozen=True)
class Case:
    """One setting of the training."""

    name: str
    workers: int = 0
    persistent: bool = False
    workers_after: int | None = None  # of the runs that go on; None: the same
    loader: str = "shuffled"
    accumulate: int = 1
    precision: str = "32-true"
    val_check_interval: float | int = 1.0
    ema: bool = False
    stopping: bool = False
    manual: bool = False
    save_every_n_steps: int = 1
    epochs: int = 3


CASES = [
    Case("plain"),
    Case("accumulate", accumulate=3, val_check_interval=3),
    Case("sparse-saves", save_every_n_steps=5, val_check_interval=0.5),
    Case("amp", precision="16-mixed", accumulate=2),
    Case("averages", ema=True, val_check_interval=0.5, save_every_n_steps=3),
    Case("stopping", stopping=True, epochs=8, save_every_n_steps=2),
    Case("manual", manual=True, save_every_n_steps=2),
    Case("min_size", loader="min_size"),
    Case("max_size", loader="max_size"),
    Case("max_size_cycle", loader="max_size_cycle", save_every_n_steps=2),
    Case("sequential", loader="sequential", accumulate=2),
    Case("replacement", loader="replacement"),
    Case("generator", loader="generator"),
    Case("weighted", loader="weighted"),
    Case("own-sampler", loader="own-sampler"),
    Case("own-batch-sampler", loader="own-batch-sampler"),
    Case("stream-with-state", loader="stream-with-state"),
    Case("stream", loader="stream"),
    Case("workers", workers=2, save_every_n_steps=2),
    Case("persistent", workers=2, persistent=True, save_every_n_steps=2),
    Case("workers-then-none", workers=2, workers_after=0, save_every_n_steps=2),
    Case("none-then-workers", workers=0, workers_after=2, save_every_n_steps=2),
    Case(
        "combined-workers", loader="max_size_cycle", workers=2, persistent=True, workers_after=1, save_every_n_steps=3
    ),
]


class Data(Dataset[Any]):
    """Samples that are augmented with torch's, numpy's, python's and its own random numbers."""

    def __init__(self, samples: int, first: int = 0, augment: bool = True) -> None:
        generator = torch.Generator().manual_seed(first)
        self.x = torch.randn(samples, 6, generator=generator)
        self.first = first
        self.augment = augment
        self.rng = np.random.default_rng(first)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = self.x[index]
        if self.augment:
            noise = torch.rand(()) + float(np.random.rand()) + random.random() + float(self.rng.random())
            x = x + 0.1 * torch.randn(6) * noise + 0.01 * float(np.random.randn())
        return {"x": x, "y": x.sum(), "id": self.first + index}


class OwnSampler(Sampler[int]):
    """A user's sampler that draws one index after the other from python's random numbers."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(SAMPLES):
            yield random.randrange(SAMPLES)

    def __len__(self) -> int:
        return SAMPLES


class OwnBatches(Sampler[list[int]]):
    """A user's batch sampler with a generator of its own that lives through all epochs."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(7):
            yield [int(index) for index in self.rng.integers(0, SAMPLES, size=int(self.rng.integers(2, 5)))]


class Stream(IterableDataset[Any]):
    """A stream with noise in it."""

    def __init__(self) -> None:
        self.data = Data(SAMPLES)

    def __iter__(self) -> Iterator[Any]:
        for index in range(SAMPLES):
            yield self.data[index]


class StreamWithState(Stream):
    """A stream that can say where it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.index = 0

    def __iter__(self) -> Iterator[Any]:
        while self.index < SAMPLES:
            self.index += 1
            yield self.data[self.index - 1]
        self.index = 0

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index, "rng": self.data.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.index = state["index"]
        self.data.rng.bit_generator.state = state["rng"]


def train_loader(case: Case, workers: int) -> Any:
    options: dict[str, Any] = {"batch_size": 3, "num_workers": workers}
    if workers:
        options["persistent_workers"] = case.persistent
    data = Data(SAMPLES)
    match case.loader:
        case "shuffled":
            return DataLoader(data, shuffle=True, **options)
        case "replacement":
            return DataLoader(data, sampler=RandomSampler(data, replacement=True, num_samples=71), **options)
        case "generator":
            return DataLoader(data, shuffle=True, generator=torch.Generator().manual_seed(5), **options)
        case "weighted":
            weights = torch.arange(1.0, SAMPLES + 1)
            return DataLoader(data, sampler=WeightedRandomSampler(weights, SAMPLES), **options)  # type: ignore[arg-type]
        case "own-sampler":
            return DataLoader(data, sampler=OwnSampler(), **options)
        case "own-batch-sampler":
            return DataLoader(data, batch_sampler=OwnBatches(), num_workers=workers)
        case "stream":
            return DataLoader(Stream(), **options)
        case "stream-with-state":
            return DataLoader(StreamWithState(), **options)
    other = DataLoader(Data(10, first=100), shuffle=True, **{**options, "batch_size": 4})
    return CombinedLoader({"a": DataLoader(data, shuffle=True, **options), "b": other}, case.loader)


class Net(L.LightningModule):
    """Dropout, BatchNorm, a scheduler per step, values of all kinds."""

    def __init__(self, case: Case, note: Note) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.case = case
        self.note = note
        self.automatic_optimization = not case.manual
        self.seen = 0

    def loss(self, batch: Any) -> torch.Tensor:
        batch = batch if "x" in batch else {
            key: torch.cat([part[key] for part in batch.values() if part is not None]) for key in ("x", "y", "id")
        }  # fmt: skip
        prediction = self.net(batch["x"].float()).squeeze(-1)
        if len(batch["x"]) == 1:
            prediction = prediction.reshape(1)
        return (prediction - batch["y"].float()).square().mean()

    def on_train_epoch_start(self) -> None:
        self.note.event("epoch_start")
        self.log("drawn", float(torch.rand(())))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.note.batch(self.trainer._outlet.progress.total_batches, batch)
        self.note.event("train_batch")
        loss = self.loss(batch)
        size = len(batch["x"]) if "x" in batch else sum(len(part["x"]) for part in batch.values() if part is not None)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=size)
        self.log("worst", loss.detach(), on_step=False, on_epoch=True, reduce_fx="max", batch_size=size)
        if batch_idx == 0:
            self.log("once", loss.detach() * 2, on_step=False, on_epoch=True, batch_size=size)
        if self.case.manual:
            optimizer = self.optimizers()
            optimizer.minimize(loss)
            self.lr_schedulers().step()
            return None
        return loss

    def on_after_backward(self) -> None:
        self.note.event("backward")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.note.event("optimizer_step")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.note.event("train_batch_end")

    def on_train_epoch_end(self) -> None:
        self.log("at_end", float(np.random.rand()))
        self.note.event("epoch_end")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.note.event("val_batch")
        self.log("val_loss", self.loss(batch))

    def on_validation_end(self) -> None:
        self.note.event("val_end")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=400)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Lines(Logger):
    """A logger that writes down what it is given."""

    def __init__(self, note: Note) -> None:
        super().__init__()
        self.note = note

    @property
    def name(self) -> str:
        return "lines"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            self.note.line("log", f"{step} {key} {int(metrics.get('epoch', -1))}", float(value).hex())

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


@dataclass
class Note:
    """What a run writes down, and when it is to die.

    Attributes:
        folder: of the run.
        kill: an event and how many times it happens before this process kills itself; None never.
        counts: how often each event has happened in this process.
    """

    folder: Path
    kill: tuple[str, int] | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def event(self, name: str) -> None:
        count = self.counts[name] = self.counts.get(name, 0) + 1
        if (name, count) == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def line(self, kind: str, key: str, value: Any) -> None:
        raw = (json.dumps([kind, key, value]) + "\n").encode()
        with open(self.folder / "lines.jsonl", "ab", buffering=0) as file:
            file.write(raw)  # one call, so that a kill leaves a whole line or none

    def batch(self, number: int, batch: Any) -> None:
        parts = [batch] if "x" in batch else [part for part in batch.values() if part is not None]
        content = [
            [int(i) for i in part["id"]] + [value.hex() for value in part["x"].sum(1).tolist()] for part in parts
        ]
        self.line("batch", str(number), content)


@contextmanager
def watched_writes(note: Note) -> Iterator[None]:
    """Make each system call of a write to the disk an event."""
    kept: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in ("fsync", "replace", "unlink", "link")}

    def watched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            note.event("write")
            # a killed process leaves what it wrote to the system: only a power cut needs the sync
            result = None if name == "fsync" else kept[name](*args, **kwargs)
            note.event("write")
            return result

        return call

    write_file = store.write_file

    def torn(stream: Any, tensors: Any, metadata: Any) -> None:
        note.event("write")
        write_file(Halved(stream, note), tensors, metadata)

    for name in kept:
        setattr(os, name, watched(name))
    store.write_file = torn  # type: ignore[assignment]
    try:
        yield
    finally:
        store.write_file = write_file
        for name, function in kept.items():
            setattr(os, name, function)


@dataclass
class Halved:
    """A stream in which a process may die in the middle of a write."""

    stream: Any
    note: Note

    def write(self, data: Any) -> None:
        data = memoryview(data)
        half = len(data) // 2
        self.stream.write(data[:half])
        self.stream.flush()
        self.note.event("write")
        self.stream.write(data[half:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def train(folder: Path, case: Case, kill: tuple[str, int] | None = None, resumed: bool = False) -> None:
    """Train, or go on training, in ``folder``; killed at ``kill``."""
    note = Note(folder, kill)
    L.seed_everything(11, verbose=False)
    workers = case.workers if not resumed or case.workers_after is None else case.workers_after
    module = Net(case, note)
    callbacks: list[Any] = [
        ModelCheckpoint(folder / "steps", save_last=True, save_top_k=2, every_n_train_steps=case.save_every_n_steps,
                        monitor="loss"),
        ModelCheckpoint(folder / "best", monitor="val_loss", filename="{epoch}-{step}-{val_loss:.3f}"),
        LearningRateMonitor(),
    ]  # fmt: skip
    if case.ema:
        callbacks.append(EMAWeightAveraging(decay=0.9, update_starting_at_step=4))
    if case.stopping:
        callbacks.append(EarlyStopping("val_loss", patience=2, min_delta=0.5))
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=case.epochs, accumulate_grad_batches=case.accumulate, precision=case.precision,
        val_check_interval=case.val_check_interval, callbacks=callbacks, logger=Lines(note), log_every_n_steps=2,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        gradient_clip_val=None if case.manual else 1.0,
    )  # fmt: skip
    validation = DataLoader(Data(8, first=200), batch_size=4, shuffle=True)
    with watched_writes(note):
        trainer.fit(module, train_loader(case, workers), validation, ckpt_path="last")
    note.kill = None
    (folder / "counts.json").write_text(json.dumps(note.counts))
    finish(folder, trainer, module)


def finish(folder: Path, trainer: L.Trainer, module: Net) -> None:
    """Write down the state that a run ended with."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.ckpt"))
    metrics = {key: value.item().hex() for key, value in trainer.callback_metrics.items()}
    store.write_checkpoint(
        folder / "result.state",
        {
            "weights": module.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "metrics": metrics,
            "callbacks": {callback.state_key: callback.state_dict() for callback in trainer.callbacks},
            "files": names,
            "random": [torch.rand(()).item(), float(np.random.rand()), random.random()],
            "steps": [trainer.global_step, trainer.current_epoch],
        },
    )
