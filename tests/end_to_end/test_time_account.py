"""The account of where a run's time goes, against a clock that only moves where a test lets time pass."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import ModelCheckpoint, RichProgressBar
from leyden.device_time import SAMPLED_BATCHES, SKIPPED_BATCHES, DeviceTime
from quiet import Memory, make_trainer

torch.set_num_threads(1)

# Seconds, each a sum of few powers of two, so that sums of them are exact.
SETUP, DATA, END, MOVE, STEP, OPTIMIZER, VALIDATE, SAVE, LOG, HOOK = (2.0**-n for n in range(10))


class Clock:
    """Stands still, but for what is spent on purpose."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.spent: Counter[str] = Counter()

    def __call__(self) -> float:
        return self.now

    def spend(self, part: str, seconds: float) -> None:
        self.now += seconds
        self.spent[part] += seconds  # type: ignore[assignment]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("leyden.account.perf_counter", clock)
    return clock


class Slow:
    """Batches that take their time, and so does the end of them."""

    def __init__(self, clock: Clock, count: int, part: str = "waiting for data") -> None:
        self.clock, self.count, self.part = clock, count, part

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        given = 0
        try:
            while given < self.count:
                self.clock.spend(self.part, DATA)
                given += 1
                yield torch.ones(2, 2)
        finally:  # a reader that has all batches closes the iterator without asking again
            left = self.part == "waiting for data" and given < self.count
            self.clock.spend("everything else" if left else self.part, END)


class SlowSGD(torch.optim.SGD):
    clock: Clock

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        self.clock.spend("optimizer", OPTIMIZER)
        super().step()
        return loss


class Net(L.LightningModule):
    """Every part of its training takes time."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.clock = clock
        self.step_part = "forward and backward"

    def setup(self, stage: str) -> None:
        self.clock.spend("set-up", SETUP)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.clock.spend("host to device" if self.trainer.training else self.outside(), MOVE)
        return batch

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.clock.spend(self.step_part, STEP)
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.clock.spend(self.outside(), VALIDATE)
        self.log("val_loss", self.layer(batch).mean())

    def outside(self) -> str:
        return "set-up" if self.trainer.sanity_checking else "validation"

    def on_train_epoch_start(self) -> None:
        self.clock.spend("everything else", HOOK)

    def on_after_backward(self) -> None:
        self.clock.spend(self.step_part, HOOK)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.clock.spend("optimizer" if self.automatic_optimization else self.step_part, HOOK)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.clock.spend("everything else", HOOK)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.clock.spend("checkpoints", SAVE)

    def on_fit_end(self) -> None:
        self.clock.spend("everything else", HOOK)

    def configure_optimizers(self) -> Any:
        optimizer = SlowSGD(self.parameters(), lr=0.1)
        optimizer.clock = self.clock
        return optimizer


class Manual(Net):
    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.automatic_optimization = False
        self.step_part = "training step"

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.optimizers().minimize(super().training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Own(Net):
    """Steps its optimizer through a closure, and takes its time before and after."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        self.clock.spend("optimizer", HOOK)
        optimizer.step(closure=optimizer_closure)
        self.clock.spend("optimizer", HOOK)


class Newton(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), max_iter=3)


class SlowLogger(Memory):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.clock.spend("logging", LOG)


class Interrupts(L.Callback):
    """Does what takes time of its own in the middle of other parts."""

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        pl_module.clock.spend("compilation", HOOK)
        trainer.time_account.add("compilation", HOOK)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        with trainer.time_account.spent_on("compilation"):
            pl_module.clock.spend("compilation", HOOK)
            trainer.save_checkpoint(Path(trainer.default_root_dir, "in_validation.ckpt"))


class SkipsEpochs(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> int | None:
        pl_module.clock.spend("everything else", HOOK)
        return -1 if batch_idx == 2 else None


EPOCHS, BATCHES, VAL_BATCHES, EVERY = 2, 5, 2, 2


def train(
    clock: Clock, model: Net, folder: Path, *callbacks: L.Callback, ckpt_path: Path | None = None, **options: Any
) -> L.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "logger": SlowLogger(clock),
        "log_every_n_steps": EVERY,
        "num_sanity_val_steps": 1,
        "enable_checkpointing": True,
    }
    settings |= options
    saves = [ModelCheckpoint(dirpath=folder)] if settings["enable_checkpointing"] else []
    trainer = make_trainer(folder, *saves, *callbacks, **settings)
    trainer.fit(model, Slow(clock, BATCHES), SlowValidation(clock, VAL_BATCHES, trainer), ckpt_path=ckpt_path)
    return trainer


class SlowValidation(Slow):
    """Validation's batches, which the sanity check reads as well."""

    def __init__(self, clock: Clock, count: int, trainer: L.Trainer) -> None:
        super().__init__(clock, count)
        self.trainer = trainer

    def __iter__(self) -> Iterator[Tensor]:
        self.part = "set-up" if self.trainer.sanity_checking else "validation"
        return super().__iter__()


CASES: dict[str, tuple[type[Net], dict[str, Any]]] = {
    "plain": (Net, {}),
    "accumulated": (Net, {"accumulate_grad_batches": 2}),
    "clipped": (Net, {"gradient_clip_val": 1.0}),
    "validated often": (Net, {"val_check_interval": 2}),
    "stopped in an epoch": (Net, {"max_steps": 3, "max_epochs": -1, "enable_checkpointing": False}),
    "logged each step": (Net, {"log_every_n_steps": 1}),
    "without logger": (Net, {"logger": False}),
    "by hand": (Manual, {}),
    "own step": (Own, {}),
    "own step, accumulated": (Own, {"accumulate_grad_batches": 3}),
    "halved where memory ends": (Net, {"oom_policy": "halve"}),
    "looked at": (Net, {"nan_policy": "skip"}),
    "interrupted": (Net, {"callbacks": [Interrupts()]}),
    "interrupted, own step": (Own, {"callbacks": [Interrupts()]}),
    "interrupted by hand": (Manual, {"callbacks": [Interrupts()]}),
    "epochs skipped": (Net, {"callbacks": [SkipsEpochs()], "enable_checkpointing": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_each_part_gets_the_seconds_that_were_spent_on_it(name: str, clock: Clock, tmp_path: Path) -> None:
    model_class, options = CASES[name]
    began = clock.now
    trainer = train(clock, model_class(clock), tmp_path, *options.pop("callbacks", ()), **options)
    seconds = trainer.time_account.seconds()
    assert {part: spent for part, spent in seconds.items() if spent} == dict(clock.spent)
    assert sum(seconds.values()) == trainer.time_account.total == clock.now - began
    assert trainer.time_account.steps == trainer.global_step > 0


def test_the_parts_of_a_plain_run_in_closed_form(clock: Clock, tmp_path: Path) -> None:
    trainer = train(clock, Net(clock), tmp_path)
    batches = EPOCHS * BATCHES
    assert trainer.time_account.seconds() == {
        "set-up": SETUP + DATA + END + MOVE + VALIDATE,  # one batch of the sanity check
        "compilation": 0.0,
        "waiting for data": batches * DATA + EPOCHS * END,
        "host to device": batches * MOVE,
        "forward and backward": batches * (STEP + HOOK),
        "training step": 0.0,
        "optimizer": batches * (OPTIMIZER + HOOK),
        "validation": EPOCHS * (VAL_BATCHES * (DATA + MOVE + VALIDATE) + END),
        "checkpoints": EPOCHS * SAVE,
        "logging": (batches // EVERY + EPOCHS) * LOG,  # and validation's values
        "waiting for the device": 0.0,
        "everything else": batches * HOOK + EPOCHS * HOOK + HOOK,
    }


def test_an_optimizer_that_evaluates_again_is_charged_for_the_rest_only(clock: Clock, tmp_path: Path) -> None:
    trainer = train(clock, Newton(clock), tmp_path)
    seconds = trainer.time_account.seconds()
    assert seconds["forward and backward"] == clock.spent["forward and backward"] > EPOCHS * BATCHES * (STEP + HOOK)
    assert sum(seconds.values()) == trainer.time_account.total


def test_a_fit_that_fails_ends_its_account(clock: Clock, tmp_path: Path) -> None:
    class Fails(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise RuntimeError("lost")
            return super().training_step(batch, batch_idx)

    trainer = make_trainer(tmp_path, limit_val_batches=0)
    with pytest.raises(RuntimeError, match="lost"):
        trainer.fit(Fails(clock), Slow(clock, BATCHES))
    total = trainer.time_account.total
    clock.now += 100
    assert trainer.time_account.total == total
    assert trainer.time_account.steps == 2


def test_what_follows_the_fit_does_not_count(clock: Clock, tmp_path: Path) -> None:
    trainer = train(clock, Net(clock), tmp_path)
    before = trainer.time_account.seconds()
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    trainer.validate(dataloaders=Slow(clock, 2, "validation"))
    assert trainer.time_account.seconds() == before


def test_a_run_that_goes_on_has_an_account_of_its_own(clock: Clock, tmp_path: Path) -> None:
    train(clock, Net(clock), tmp_path)
    saved = next(tmp_path.glob("epoch*.ckpt"))
    assert "optimizer_states" in (keys := L.load_checkpoint(saved).keys())
    assert not [key for key in keys if "account" in key]
    trainer = train(clock, Net(clock), tmp_path, max_epochs=EPOCHS + 1, ckpt_path=saved)
    assert trainer.time_account.steps == BATCHES
    assert trainer.time_account.seconds()["waiting for data"] == BATCHES * DATA + END


# What is shown, and where


def slow_epochs(clock: Clock, folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    return train(clock, Net(clock), folder, *callbacks, **({"enable_checkpointing": False, "logger": False} | options))


def test_it_is_printed_beneath_a_progress_bar(clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = slow_epochs(clock, tmp_path, enable_progress_bar=True)
    written = capsys.readouterr().out
    assert written.rstrip().endswith(trainer.time_account.summary())
    assert written.count("waiting for data") == 1
    assert len(trainer.time_account.summary().splitlines()) <= 4


class Muted(RichProgressBar):
    def __init__(self) -> None:
        super().__init__()
        self.disable()


SILENT: dict[str, dict[str, Any]] = {
    "no bar": {},
    "a bar that is off": {"enable_progress_bar": True, "callbacks": [Muted()]},
    "a trial": {
        "enable_progress_bar": True,
        "fast_dev_run": 2,
        "log_every_n_steps": None,
        "num_sanity_val_steps": None,
    },
    "barebones": {
        "barebones": True,
        "enable_progress_bar": None,
        "num_sanity_val_steps": None,
        "log_every_n_steps": None,
    },
}


@pytest.mark.filterwarnings("ignore:.*LEY-.*")
@pytest.mark.parametrize("name", SILENT)
def test_it_is_not_printed_with(name: str, clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = dict(SILENT[name])
    trainer = slow_epochs(clock, tmp_path, *options.pop("callbacks", ()), **options)
    assert trainer.time_account.total > 1
    assert "waiting for data" not in capsys.readouterr().out


def test_it_is_not_printed_after_a_moment_however_long_the_set_up_took(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Moment(Clock):
        def spend(self, part: str, seconds: float) -> None:
            super().spend(part, seconds if part == "set-up" else seconds / 1024)

    clock = Moment()
    monkeypatch.setattr("leyden.account.perf_counter", clock)
    trainer = slow_epochs(clock, tmp_path, enable_progress_bar=True)
    assert 0 < trainer.time_account.total - trainer.time_account.seconds()["set-up"] < 1 < trainer.time_account.total
    assert "waiting for data" not in capsys.readouterr().out


def test_it_is_not_printed_after_an_error_but_after_an_interruption(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Raises(L.Callback):
        def __init__(self, error: type[BaseException]) -> None:
            self.error = error

        def on_train_batch_end(self, *args: Any) -> None:
            raise self.error

    with pytest.raises(ValueError):
        slow_epochs(clock, tmp_path, Raises(ValueError), enable_progress_bar=True)
    assert "waiting for data" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        slow_epochs(clock, tmp_path, Raises(KeyboardInterrupt), enable_progress_bar=True)
    assert "waiting for data" in capsys.readouterr().out


def test_explain_shows_it_after_a_fit_of_the_same_model(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, model = make_trainer(tmp_path), Net(clock)
    assert "Where the time went" not in trainer.explain(model)
    trainer.fit(model, Slow(clock, BATCHES), Slow(clock, 1, "validation"))
    text = trainer.explain(model)
    shown = text[text.index("Where the time went") :].splitlines()[1:]
    assert [line.strip() for line in shown] == [line.strip() for line in str(trainer.time_account).splitlines()]
    assert "Where the time went" not in trainer.explain(Net(clock))


# What it costs


def calls_per_step(folder: Path, steps: int = 64) -> dict[str, float]:
    """Calls of the clock, and of Python functions of the account, per step between two runs of different length."""

    def count(epochs: int) -> Counter[str]:
        calls: Counter[str] = Counter()

        def note(frame: FrameType, event: str, argument: Any) -> None:
            if event == "c_call" and argument is time.perf_counter:
                calls["clock"] += 1
            if event == "call" and frame.f_code.co_filename.endswith(("leyden/account.py", "leyden/device_time.py")):
                calls["python"] += 1

        trainer = make_trainer(folder, max_epochs=epochs, log_every_n_steps=1000)
        data = TensorDataset(torch.ones(2 * steps, 2), torch.ones(2 * steps, 1))
        sys.setprofile(note)
        try:
            trainer.fit(Bare(), DataLoader(data, batch_size=2))
        finally:
            sys.setprofile(None)
        return calls

    short, long = count(1), count(3)
    return {name: (long[name] - short[name]) / (2 * steps) for name in ("clock", "python")}


class Bare(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = (self.layer(batch[0]) - batch[1]).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_step_reads_the_clock_six_times_and_calls_no_function_of_the_account(tmp_path: Path) -> None:
    calls = calls_per_step(tmp_path)
    assert 6 <= calls["clock"] < 6.1  # and twice per epoch
    assert calls["python"] == 0


# The device's time


class Events:
    """CUDA's events, on a device that stands at ``now_ms`` and has passed what was recorded before ``passed``."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.made = self.read = 0
        self.passed = True

    def __call__(self) -> FakeEvent:
        self.made += 1
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, events: Events) -> None:
        self.events = events

    def record(self) -> None:
        self.at_s = self.events.clock.now

    def query(self) -> bool:
        return self.events.passed

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.events.passed, "that would wait"
        self.events.read += 1
        return (end.at_s - self.at_s) * 1e3


class Sampling(L.Callback):
    """Gives the account what it has on a GPU."""

    def __init__(self, clock: Clock) -> None:
        self.events = Events(clock)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        assert trainer._run is not None
        self.before = (trainer._run.hooks.on_train_batch_start, trainer._run.hooks.on_train_batch_end)
        trainer.time_account.device = DeviceTime(trainer._run, self.events)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        assert trainer._run is not None
        self.after = (trainer._run.hooks.on_train_batch_start, trainer._run.hooks.on_train_batch_end)


INTERVAL = 10


def sampled(clock: Clock, model: Net, folder: Path, steps: int, events_pass: bool = True, **options: Any) -> Any:
    sampling = Sampling(clock)
    sampling.events.passed = events_pass
    trainer = make_trainer(
        folder, sampling, max_steps=steps, max_epochs=-1, log_every_n_steps=INTERVAL, limit_val_batches=0, **options
    )
    trainer.fit(model, Slow(clock, 200))
    return trainer.time_account, sampling


def test_some_steps_of_each_interval_are_sampled_on_the_device(clock: Clock, tmp_path: Path) -> None:
    account, sampling = sampled(clock, Net(clock), tmp_path, 4 * INTERVAL)
    device = account.device
    # the samples of an interval are read at its end: those of the second, the third and the fourth
    assert device.batches == device.steps == 3 * SAMPLED_BATCHES
    assert sampling.events.made == 3 * 3 * SAMPLED_BATCHES
    assert device.compute_s == device.batches * STEP  # up to the end of backward: the hook after it is not the device's
    assert device.optimizer_s == device.steps * (OPTIMIZER + 2 * HOOK)
    assert account.on_device_s == account.steps * (STEP + OPTIMIZER + 2 * HOOK)
    assert sampling.before[1] == sampling.after[1][-len(sampling.before[1]) :]
    assert "on the device: 62.5 ms forward and backward per batch" in str(account)


def test_accumulated_batches_are_sampled_with_and_without_a_step(clock: Clock, tmp_path: Path) -> None:
    account, _ = sampled(clock, Net(clock), tmp_path, 4 * INTERVAL, accumulate_grad_batches=2)
    device = account.device
    assert (device.batches, device.steps) == (3 * SAMPLED_BATCHES, 3 * SAMPLED_BATCHES // 2)
    assert account.on_device_s == account.steps * (2 * STEP + OPTIMIZER + 2 * HOOK)


def test_samples_that_the_device_has_not_passed_are_left_alone(clock: Clock, tmp_path: Path) -> None:
    account, sampling = sampled(clock, Net(clock), tmp_path, 4 * INTERVAL, events_pass=False)
    assert account.device.batches == sampling.events.read == 0
    assert sampling.events.made == 3 * SAMPLED_BATCHES  # and no more of them
    assert account.on_device_s == 0
    assert "on the device" not in str(account)
    sampling.events.passed = True
    account.device.collect()
    assert account.device.batches == SAMPLED_BATCHES


def test_batches_without_loss_give_no_sample(clock: Clock, tmp_path: Path) -> None:
    class Skips(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx < INTERVAL else None

    sampling = Sampling(clock)
    trainer = make_trainer(tmp_path, sampling, log_every_n_steps=INTERVAL, limit_val_batches=0)
    trainer.fit(Skips(clock), Slow(clock, 2 * INTERVAL))
    trainer.time_account.sample_device()
    assert trainer.time_account.device is not None
    assert trainer.time_account.device.batches == 0


gpu = pytest.mark.gpu
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@gpu
@no_gpu
def test_a_run_on_a_gpu_samples_it_without_waiting(tmp_path: Path) -> None:
    class Wide(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Sequential(
                torch.nn.Linear(2, 4096), torch.nn.Linear(4096, 4096), torch.nn.Linear(4096, 1)
            )  # type: ignore[assignment]

    class Strict(L.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            torch.cuda.set_sync_debug_mode("error")

        def on_train_batch_end(self, *args: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    data = TensorDataset(torch.ones(8192, 2), torch.ones(8192, 1))
    trainer = make_trainer(tmp_path, Strict(), accelerator="cuda", log_every_n_steps=16)
    try:
        trainer.fit(Wide(), DataLoader(data, batch_size=64))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    account = trainer.time_account
    assert account.device is not None
    assert account.device.batches >= 2 * SAMPLED_BATCHES
    assert 0 < account.on_device_s < account.total
    assert account.seconds()["host to device"] > 0
    assert SKIPPED_BATCHES + SAMPLED_BATCHES < 16
