"""What leyden may cost: Python calls per step, and frames between the user's call and the user's step. Counted, not timed.

A count is the slope between a short and a long run, so that set-up and end cancel out.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import leyden
from leyden.callbacks import Callback, ModelCheckpoint, RichProgressBar
from leyden.loggers import CSVLogger

torch.set_num_threads(1)

SHORT, LONG = 20, 100
PACKAGE = str(Path(leyden.__file__).parent)

# Calls per step more than the hand-written loop over the same DataLoader. Required: at most 30 and 60. Measured on 2026-11-21
# with torch 2.13: -6.9 bare, -3.4 with logger, bar and checkpoints, for batches of one process are loaded with fewer calls
# than torch's iterator makes. Our own budgets are tighter than what is required, so that growth shows.
REQUIRED_BARE, BUDGET_BARE = 30.0, -4.0
REQUIRED_FULL, BUDGET_FULL = 60.0, 0.0
MAX_FRAMES = 3


class Model(leyden.LightningModule):
    def __init__(self, logs: bool = False) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        self.logs = logs

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = functional.mse_loss(self.net(inputs), targets)
        if self.logs:
            self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Manual(Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.optimizers().minimize(loss)
        return loss


def loader(steps: int) -> DataLoader[Any]:
    data = torch.linspace(-1, 1, steps * 2 * 4).reshape(-1, 4)
    return DataLoader(TensorDataset(data, data[:, :1]), batch_size=2)


def trainer(folder: Path, **options: Any) -> leyden.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return leyden.Trainer(**(settings | options))


def full_options(folder: Path) -> dict[str, Any]:
    """Everything that a real run has: logger, bar, checkpoints."""
    return {
        "logger": CSVLogger(str(folder)),
        "callbacks": [ModelCheckpoint(dirpath=folder), RichProgressBar()],
        "enable_checkpointing": None,
        "enable_progress_bar": None,
        "log_every_n_steps": 1000,
    }


def python_calls(run: Callable[[], object]) -> int:
    """How many Python functions are called while ``run`` runs."""
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        if event == "call":
            count += 1

    gc.collect()
    gc.disable()  # a collection calls finalizers, and callbacks that hypothesis leaves with the collector
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def calls_per_step(make_run: Callable[[int], Callable[[], object]]) -> float:
    """The slope of the number of calls over the number of steps."""
    make_run(SHORT)()  # what happens once in a process, such as imports, is over
    short, long = python_calls(make_run(SHORT)), python_calls(make_run(LONG))
    return (long - short) / (LONG - SHORT)


def by_hand(steps: int) -> Callable[[], object]:
    model, batches = Model(), loader(steps)
    optimizer = model.configure_optimizers()
    optimizer.param_groups[0]["fused"] = True  # as the Trainer chooses, for its step has other calls

    def run() -> None:
        for batch_idx, batch in enumerate(batches):
            optimizer.zero_grad()
            loss = model.training_step(batch, batch_idx)
            loss.backward()
            optimizer.step()

    return run


def by_leyden(folder: Path, logs: bool = False, **options: Any) -> Callable[[int], Callable[[], object]]:
    def make(steps: int) -> Callable[[], object]:
        chosen = full_options(folder) if logs else {}
        engine, model, batches = trainer(folder, **(chosen | options)), Model(logs), loader(steps)
        return lambda: engine.fit(model, batches)

    return make


def test_calls_per_step_of_a_bare_trainer(tmp_path: Path) -> None:
    by_engine = calls_per_step(by_leyden(tmp_path))
    extra = by_engine - calls_per_step(by_hand)
    assert BUDGET_BARE <= REQUIRED_BARE
    assert by_engine > 10, "so few that something was not counted"
    assert extra <= BUDGET_BARE, f"{extra:.1f} Python calls per step more than the hand-written loop"


def test_calls_per_step_with_logging_bar_and_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_engine = calls_per_step(by_leyden(tmp_path, logs=True))
    extra = by_engine - calls_per_step(by_hand)
    assert by_engine > 10, "so few that something was not counted"
    assert "loss" in capsys.readouterr().out, "the bar wrote nothing, so it was not measured"
    assert BUDGET_FULL <= REQUIRED_FULL
    assert extra <= BUDGET_FULL, f"{extra:.1f} Python calls per step more than the hand-written loop"


def test_hooks_that_nobody_overrides_cost_nothing(tmp_path: Path) -> None:
    class Idle(Callback):
        """Overrides nothing of the loop."""

    class Idler(Callback):
        def on_fit_start(self, trainer: leyden.Trainer, pl_module: leyden.LightningModule) -> None:
            """Is called, but not in the loop."""

    with_callbacks = calls_per_step(by_leyden(tmp_path, callbacks=[Idle(), Idler(), Idle()]))
    assert with_callbacks == calls_per_step(by_leyden(tmp_path))


def test_an_overridden_hook_costs_one_call(tmp_path: Path) -> None:
    class Busy(Callback):
        def on_before_zero_grad(
            self, trainer: leyden.Trainer, pl_module: leyden.LightningModule, optimizer: torch.optim.Optimizer
        ) -> None:
            """Is called once per step."""

    extra = calls_per_step(by_leyden(tmp_path, callbacks=[Busy()])) - calls_per_step(by_leyden(tmp_path))
    assert extra == 1


def test_accumulated_batches_cost_less_than_steps(tmp_path: Path) -> None:
    batches = calls_per_step(by_leyden(tmp_path, accumulate_grad_batches=4))
    assert batches < calls_per_step(by_leyden(tmp_path))


class Lost(Exception):
    """What the user's step raises."""


def frames_of(raised: BaseException) -> list[str]:
    """The frames of leyden in the traceback, by function."""
    return [frame.name for frame in traceback.extract_tb(raised.__traceback__) if frame.filename.startswith(PACKAGE)]


def raising(model: leyden.LightningModule, name: str, at: int = 0) -> leyden.LightningModule:
    """Let the model's step raise in the batch with index ``at``; it is the step itself, not a wrapper around one."""
    own = getattr(model, name)

    def step(batch: Any, batch_idx: int) -> Any:
        if batch_idx == at:
            raise Lost
        return own(batch, batch_idx)

    setattr(model, name, step)
    return model


FRAMES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 4},
    "clipped by norm": {"gradient_clip_val": 1.0},
    "clipped by value": {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed": {"precision": "16-mixed"},
    "64-true": {"precision": "64-true"},
    "anomalies": {"detect_anomaly": True},
    "all at once": {"accumulate_grad_batches": 4, "gradient_clip_val": 1.0, "precision": "bf16-mixed"},
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize("at", [0, 2, 7])
@pytest.mark.parametrize("name", FRAMES)
def test_frames_from_fit_to_training_step(name: str, at: int, tmp_path: Path) -> None:
    with pytest.raises(Lost) as caught:
        trainer(tmp_path, **FRAMES[name]).fit(raising(Model(), "training_step", at), loader(SHORT))
    assert 0 < len(frames_of(caught.value)) <= MAX_FRAMES, frames_of(caught.value)


def test_frames_in_manual_optimization(tmp_path: Path) -> None:
    with pytest.raises(Lost) as caught:
        trainer(tmp_path).fit(raising(Manual(), "training_step", 1), loader(SHORT))
    assert 0 < len(frames_of(caught.value)) <= MAX_FRAMES, frames_of(caught.value)


def test_frames_with_everything_on(tmp_path: Path) -> None:
    class Listener(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            """Listens."""

        def on_train_batch_end(self, *args: Any) -> None:
            """Listens."""

    options = full_options(tmp_path)
    options["callbacks"].append(Listener())
    with pytest.raises(Lost) as caught:
        trainer(tmp_path, **options).fit(raising(Model(logs=True), "training_step", 3), loader(SHORT))
    assert 0 < len(frames_of(caught.value)) <= MAX_FRAMES, frames_of(caught.value)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_frames_from_the_other_verbs_to_their_steps(verb: str, tmp_path: Path) -> None:
    model, name = Model(), {"validate": "validation_step"}.get(verb, f"{verb}_step")
    setattr(model, name, lambda batch, batch_idx: None)
    with pytest.raises(Lost) as caught:
        getattr(trainer(tmp_path), verb)(raising(model, name, 1), loader(SHORT))
    assert 0 < len(frames_of(caught.value)) <= MAX_FRAMES, frames_of(caught.value)


@pytest.mark.parametrize(
    "hook", ["on_before_zero_grad", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"]
)
def test_frames_to_a_hook(hook: str, tmp_path: Path) -> None:
    def lose(*args: Any) -> None:
        raise Lost

    model = Model()
    setattr(model, hook, lose)
    with pytest.raises(Lost) as caught:
        trainer(tmp_path).fit(model, loader(SHORT))
    # one more than to a step, where the loop calls all hooks of an event that has no arguments
    assert 0 < len(frames_of(caught.value)) <= MAX_FRAMES + 1, frames_of(caught.value)
