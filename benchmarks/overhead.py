"""Steps per second of the hand-written loop, of leyden, and of other trainers that are installed; and what they call.

    python benchmarks/overhead.py [--steps 400] [--repeats 5] [--models tiny mlp cnn]

Everything runs in one process on one CPU thread. A round runs every contestant once, in an order that rotates, so that a
machine that is busy for a while disturbs all of them alike; shown are medians over the rounds. A contestant's ratio is
the median of its ratios to the hand-written loop of the same round. The clock runs from one step near the beginning to
the last one; everything before and after, the checkpoint at the end too, is shown apart as set-up.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import io
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import leyden
from leyden.callbacks import ModelCheckpoint, RichProgressBar
from leyden.loggers import CSVLogger

Run = Callable[[], object]
Make = Callable[[str, int, Path], Run]

FIRST_STEP = 20
"""The step from which on the clock runs."""
CALL_STEPS = (20, 100)
"""Two lengths of run: the slope of the number of calls between them leaves out what happens once."""


class StepReachedError(Exception):
    """Raised by a step, to see what stands between it and the call of the trainer."""


class Task(nn.Module):
    """A model with its loss; the same for every contestant."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.raises = False
        self.times: list[float] = []
        if kind == "tiny":
            self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        elif kind == "mlp":
            self.net = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        else:
            self.net = nn.Sequential(
                nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
                nn.Flatten(), nn.Linear(16 * 6 * 6, 10),
            )  # fmt: skip

    def loss(self, batch: list[Tensor]) -> Tensor:
        if self.raises:
            raise StepReachedError
        self.times.append(time.perf_counter())
        inputs, targets = batch
        return functional.cross_entropy(self.net(inputs), targets)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.net.parameters(), lr=1e-3)


BATCH_SIZE = {"tiny": 8, "mlp": 64, "cnn": 64}
TITLE = {
    "tiny": "MLP 8-16-2, batch 8",
    "mlp": "MLP 784-256-256-10, batch 64",
    "cnn": "CNN of two convolutions on 28 x 28, batch 64",
}


def loader(kind: str, steps: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    size, shape = BATCH_SIZE[kind], {"tiny": (8,), "mlp": (784,), "cnn": (1, 28, 28)}[kind]
    # One batch's worth of samples, again and again, so that the data's size is no part of the measurement.
    inputs = torch.randn(size, *shape, generator=generator)
    targets = torch.randint(0, 2, (size,), generator=generator)
    data = TensorDataset(inputs, targets)
    return DataLoader(torch.utils.data.ConcatDataset([data] * steps), batch_size=size)


# The contestants


def raw(kind: str, steps: int, folder: Path) -> Run:
    task, batches = Task(kind), loader(kind, steps)
    optimizer = task.optimizer()

    def run() -> None:
        task.train()
        for batch in batches:
            optimizer.zero_grad()
            loss = task.loss(batch)
            loss.backward()
            optimizer.step()

    run.task = task  # type: ignore[attr-defined]
    return run


def modules_of(base: type) -> type:
    """The same LightningModule on top of leyden's or Lightning's base class."""

    class Module(base):  # type: ignore[misc]
        def __init__(self, kind: str, logs: bool) -> None:
            super().__init__()
            self.task = Task(kind)
            self.logs = logs

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = self.task.loss(batch)
            if self.logs:
                self.log("loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.task.optimizer()

    return Module


BARE = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def trained_by(make_trainer: Callable[[Path], Any], base: type, logs: bool) -> Make:
    module_class = modules_of(base)

    def make(kind: str, steps: int, folder: Path) -> Run:
        trainer, module, batches = make_trainer(folder), module_class(kind, logs), loader(kind, steps)

        def run() -> None:
            trainer.fit(module, batches)

        run.task = module.task  # type: ignore[attr-defined]
        return run

    return make


def leyden_bare(folder: Path) -> leyden.Trainer:
    return leyden.Trainer(accelerator="cpu", max_epochs=1, **BARE)  # type: ignore[arg-type]


def leyden_default(folder: Path) -> leyden.Trainer:
    return leyden.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=CSVLogger(str(folder)),
        callbacks=[ModelCheckpoint(dirpath=folder / "leyden"), RichProgressBar()],
        enable_model_summary=False,
    )


def lightning_bare(folder: Path) -> Any:
    from lightning.pytorch import Trainer

    return Trainer(accelerator="cpu", max_epochs=1, **BARE)


def lightning_default(folder: Path) -> Any:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint as LightningCheckpoint
    from lightning.pytorch.loggers import CSVLogger as LightningCSVLogger

    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=LightningCSVLogger(str(folder)),
        callbacks=[LightningCheckpoint(dirpath=folder / "lightning")],
        enable_model_summary=False,
    )


def by_accelerate(kind: str, steps: int, folder: Path) -> Run:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    task = Task(kind)
    model, optimizer, batches = accelerator.prepare(task, task.optimizer(), loader(kind, steps))

    def run() -> None:
        model.train()
        for batch in batches:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                loss = task.loss(batch)
                accelerator.backward(loss)
                optimizer.step()

    run.task = task  # type: ignore[attr-defined]
    return run


def by_ignite(kind: str, steps: int, folder: Path) -> Run:
    from ignite.engine import Engine

    task, batches = Task(kind), loader(kind, steps)
    optimizer = task.optimizer()

    def update(engine: Any, batch: Any) -> Tensor:
        task.train()
        optimizer.zero_grad()
        loss = task.loss(batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    engine = Engine(update)

    def run() -> None:
        engine.run(batches, max_epochs=1)

    run.task = task  # type: ignore[attr-defined]
    return run


def contestants() -> dict[str, Make]:
    """Everyone who is installed, the hand-written loop first."""
    found: dict[str, Make] = {
        "PyTorch, by hand": raw,
        "leyden, bare": trained_by(leyden_bare, leyden.LightningModule, logs=False),
        "leyden, default": trained_by(leyden_default, leyden.LightningModule, logs=True),
    }
    if importlib.util.find_spec("lightning") is not None:
        from lightning.pytorch import LightningModule

        found["Lightning, bare"] = trained_by(lightning_bare, LightningModule, logs=False)
        found["Lightning, default"] = trained_by(lightning_default, LightningModule, logs=True)
    if importlib.util.find_spec("accelerate") is not None:
        found["Accelerate"] = by_accelerate
    if importlib.util.find_spec("ignite") is not None:
        found["Ignite"] = by_ignite
    return found


# The measurements


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let bars and messages be made, but not shown."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def timed(run: Run) -> tuple[float, float]:
    """Steps per second, and the seconds that all else took."""
    gc.collect()
    with quiet():
        start = time.perf_counter()
        run()
        whole = time.perf_counter() - start
    times = run.task.times  # type: ignore[attr-defined]
    per_step = (times[-1] - times[FIRST_STEP]) / (len(times) - 1 - FIRST_STEP)
    return 1 / per_step, whole - per_step * len(times)


def measure(kind: str, steps: int, repeats: int, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """What `timed` says of every contestant in every round."""
    makers = contestants()
    names = list(makers)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(repeats + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            torch.manual_seed(0)
            with quiet():
                run = makers[name](kind, steps, folder)
            result = timed(run)
            if number > 0:  # the first round warms up
                found[name].append(result)
    return found


def python_calls(run: Run) -> int:
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        if event == "call":
            count += 1

    with quiet():
        gc.collect()
        gc.disable()  # a collection may call finalizers
        sys.setprofile(note)
        try:
            run()
        finally:
            sys.setprofile(None)
            gc.enable()
    return count


def calls_per_step(make: Make, folder: Path) -> float:
    short, long = (python_calls(make("tiny", steps, folder)) for steps in CALL_STEPS)
    return (long - short) / (CALL_STEPS[1] - CALL_STEPS[0])


def frames(make: Make, folder: Path) -> int:
    """The frames between the call of the trainer and the user's step."""
    with quiet():
        run = make("tiny", 2, folder)
        run.task.raises = True  # type: ignore[attr-defined]
        try:
            run()
        except StepReachedError as reached:
            return sum(frame.filename != __file__ for frame in traceback.extract_tb(reached.__traceback__))
    raise AssertionError("the step was not reached")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speed_table(kind: str, steps: int, repeats: int, folder: Path) -> str:
    found = measure(kind, steps, repeats, folder)
    baseline = [rate for rate, _ in next(iter(found.values()))]
    rows = []
    for name, results in found.items():
        rates = [rate for rate, _ in results]
        ratios = sorted(rate / base for rate, base in zip(rates, baseline, strict=True))
        rows.append(
            [
                name,
                f"{statistics.median(rates):.0f}",
                f"{statistics.median(ratios):.2f}",
                f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
                f"{statistics.median(set_up for _, set_up in results) * 1000:.0f}",
            ]
        )
    return table([TITLE[kind], "steps/s", "ratio", "lowest and highest", "set-up, ms"], rows)


def count_table(folder: Path) -> str:
    makers = contestants()
    calls: dict[str, float] = {}
    for name, make in makers.items():
        with quiet():
            make("tiny", CALL_STEPS[0], folder)()  # imports and caches of the first time
        calls[name] = calls_per_step(make, folder)
    base = next(iter(calls.values()))
    rows = [
        [name, f"{number:.0f}", f"{number - base:+.0f}", str(frames(makers[name], folder))]
        for name, number in calls.items()
    ]
    return table(["", "Python calls per step", "more than by hand", "frames to the step"], rows)


def versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    parts = [f"Python {platform.python_version()}"]
    for name in ("torch", "leyden", "lightning", "accelerate", "pytorch-ignite"):
        with contextlib.suppress(PackageNotFoundError):
            parts.append(f"{name} {version(name)}")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="steps of each run (default: 400)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count, after one to warm up (default: 5)")
    parser.add_argument("--models", nargs="+", default=list(TITLE), choices=list(TITLE))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("COLUMNS", "120")
    if arguments.steps < 2 * FIRST_STEP or arguments.repeats < 1:
        parser.error(f"--steps must be at least {2 * FIRST_STEP}, and --repeats at least 1")
    print(f"{versions()}; one thread, {os.cpu_count()} CPU cores;")
    print(f"medians of {arguments.repeats} rounds of {arguments.steps} steps\n")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        print(count_table(Path(folder)), flush=True)
        for kind in arguments.models:
            print("\n" + speed_table(kind, arguments.steps, arguments.repeats, Path(folder)), flush=True)
        os.chdir("/")


if __name__ == "__main__":
    main()
