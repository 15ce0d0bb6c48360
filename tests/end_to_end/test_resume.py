"""What a run that goes on does, and what it does not do again. `tests/faults` kills runs at every instant."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import leyden as L
from leyden.callbacks import EarlyStopping, ModelCheckpoint, Timer
from leyden.checkpoint import container
from quiet import make_trainer


class Killed(Exception):
    """Stands for the end of a process: nothing is done after it but what a test does."""


class Net(L.LightningModule):
    """Logs what it sees, so that each call can be told."""

    def __init__(self, values: list[float] | None = None, die_after: int | None = None) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 1)
        self.values = values
        self.die_after = die_after
        self.calls: list[str] = []
        self.trained: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == self.die_after:
            raise Killed
        self.trained.append([int(value) for value in batch[0]])
        return self.net(batch[0]).square().mean()

    def on_sanity_check_start(self) -> None:
        self.calls.append("sanity")

    def on_validation_epoch_start(self) -> None:
        self.calls.append(f"validation at {self.trainer.global_step}")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        values = self.values or [0.0]
        self.log("val", values[min(self.trainer.current_epoch, len(values) - 1)])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(samples: int = 8, **options: Any) -> Any:
    return DataLoader(TensorDataset(torch.arange(float(samples)).reshape(-1, 1)), batch_size=2, **options)


def keeps(folder: Path, every: int = 1) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=every)


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    return make_trainer(folder, keeps(folder), *callbacks, **{"enable_checkpointing": None, **options})


def test_nothing_is_validated_again_and_no_batch_is_trained_on_twice(tmp_path: Path) -> None:
    L.seed_everything(1, verbose=False)
    first = Net(die_after=6)
    options: dict[str, Any] = {"max_epochs": 3, "num_sanity_val_steps": 2, "val_check_interval": 2}
    with pytest.raises(Killed):
        trainer(tmp_path, **options).fit(first, loader(shuffle=True), loader())
    assert first.calls[:2] == ["sanity", "validation at 0"]
    assert first.calls[-1] == "validation at 6"
    second = Net()
    trainer(tmp_path, **options).fit(second, loader(shuffle=True), loader(), ckpt_path="last")
    assert second.calls == ["validation at 8", "validation at 10", "validation at 12"]
    in_second_epoch = first.trained[4:] + second.trained[:2]
    assert sorted(sample for batch in in_second_epoch for sample in batch) == list(range(8))
    assert len(first.trained + second.trained) == 12


def test_last_with_none_there_starts_anew_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = Net()
    trainer(tmp_path).fit(net, loader(), loader(), ckpt_path="last")
    assert len(net.trained) == 4
    assert f"there is none in {tmp_path}" in capsys.readouterr().out


def test_a_stop_that_waits_for_min_epochs_is_not_forgotten(tmp_path: Path) -> None:
    def stopping() -> EarlyStopping:
        return EarlyStopping("val", patience=1, stopping_threshold=-1.0)

    options: dict[str, Any] = {"max_epochs": 9, "min_epochs": 4}
    values = [0.0, -2.0, 0.0, -0.5, -0.6, -0.7, -0.8, -0.9, -0.95]
    whole = trainer(tmp_path / "whole", stopping(), **options)
    whole.fit(Net(values), loader(), loader())
    assert whole.current_epoch == 4
    with pytest.raises(Killed):
        trainer(tmp_path / "cut", stopping(), **options).fit(Net(values, die_after=9), loader(), loader())
    rest = trainer(tmp_path / "cut", stopping(), **options)
    rest.fit(Net(values), loader(), loader(), ckpt_path="last")
    assert (rest.current_epoch, rest.global_step) == (4, whole.global_step)


def test_a_run_that_was_stopped_early_stays_so_unless_it_is_given_more_patience(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(patience: int, **options: Any) -> L.Trainer:
        engine = trainer(tmp_path, EarlyStopping("val", patience=patience), max_epochs=9)
        engine.fit(Net(), loader(), loader(), **options)
        return engine

    assert run(2).current_epoch == 3
    assert run(2, ckpt_path="last").current_epoch == 3
    assert "Training had been asked to stop there" in capsys.readouterr().out
    assert run(4, ckpt_path="last").current_epoch == 5


def test_a_run_that_had_no_time_left_goes_on_when_it_is_given_more(tmp_path: Path) -> None:
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            Clock.now += 1.0
            return Clock.now

    def run(seconds: int, **options: Any) -> int:
        timer = Timer(timedelta(seconds=seconds))
        timer._clock = Clock()
        engine = trainer(tmp_path, timer, max_epochs=5)
        engine.fit(Net(), loader(), loader(), **options)
        return engine.global_step

    stopped = run(4)
    assert 0 < stopped < 20
    assert run(4, ckpt_path="last") == stopped
    assert run(100_000, ckpt_path="last") == 20


def test_another_training_loader_goes_on_after_as_many_batches_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        trainer(tmp_path).fit(Net(die_after=2), loader(8, shuffle=True), loader())
    net = Net()
    with pytest.warns(L.errors.LeydenWarning, match="batch 2 of the present epoch has other samples"):
        trainer(tmp_path).fit(net, loader(12, shuffle=True), loader(), ckpt_path="last")
    assert len(net.trained) == 4


def test_a_window_that_minimize_has_begun_goes_on_with_its_gradients(tmp_path: Path) -> None:
    class Windows(Net):
        def __init__(self, die_after: int | None = None) -> None:
            super().__init__(die_after=die_after)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            if self.trainer._outlet.progress.total_batches == self.die_after:
                raise Killed
            self.optimizers().minimize(self.net(batch[0]).square().mean(), accumulate_grad_batches=3)

    def save(engine: L.Trainer) -> None:
        engine.at_step_boundary(lambda: engine.save_checkpoint(tmp_path / "here.ckpt"))

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            save(trainer)

    L.seed_everything(2, verbose=False)
    whole = Windows()
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    make_trainer(tmp_path, max_epochs=3).fit(whole, loader(), loader())
    for die_after in range(1, 12):
        cut, rest = Windows(die_after), Windows()
        cut.load_state_dict(start)
        with pytest.raises(Killed):
            make_trainer(tmp_path, Saves(), max_epochs=3).fit(cut, loader(), loader())
        make_trainer(tmp_path, max_epochs=3).fit(rest, loader(), loader(), ckpt_path=tmp_path / "here.ckpt")
        assert torch.equal(rest.net.weight, whole.net.weight), die_after


def test_who_wants_weights_reads_no_optimizer_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Adam(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    class Curious(Adam):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            assert "optimizer_states" in checkpoint

    engine = make_trainer(tmp_path)
    engine.fit(Adam(), loader(), loader())
    engine.save_checkpoint(tmp_path / "a.ckpt")
    read: list[str] = []
    original = container.Reader.read

    def noted(self: container.Reader, name: str) -> torch.Tensor:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(container.Reader, "read", noted)
    weights = ["module.net.bias", "module.net.weight"]
    Adam.load_from_checkpoint(tmp_path / "a.ckpt")
    assert sorted(read) == weights
    read.clear()
    make_trainer(tmp_path).validate(Adam(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert sorted(read) == weights
    read.clear()
    Curious.load_from_checkpoint(tmp_path / "a.ckpt")
    assert any(name.startswith("optimizer.") for name in read)
    read.clear()
    make_trainer(tmp_path).validate(Curious(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert any(name.startswith("optimizer.") for name in read)


class SavesAtOnce(L.Callback):
    """Saves within a batch's last hook, and when training fails, as people write it."""

    def __init__(self, path: Path, after: int | None = None) -> None:
        self.path, self.after, self.batches = path, after, 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.batches += 1
        if self.batches == self.after:
            trainer.save_checkpoint(self.path)

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        if self.after is None:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_window_goes_on_that_was_begun_when_somebody_saved_within_it(tmp_path: Path, precision: str) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "max_epochs": 2, "precision": precision}
    for after in (1, 2, 4, 9, 10):
        L.seed_everything(2, verbose=False)
        whole = Net()
        start = {name: value.clone() for name, value in whole.state_dict().items()}
        path = tmp_path / f"{after}.ckpt"
        engine = make_trainer(tmp_path, SavesAtOnce(path, after), **options)
        engine.fit(whole, loader(16, shuffle=True), loader())
        rest = Net()
        rest.load_state_dict(start)
        again = make_trainer(tmp_path, **options)
        again.fit(rest, loader(16, shuffle=True), loader(), ckpt_path=path)
        assert rest.trained == whole.trained[after:]
        assert again.global_step == engine.global_step == 6
        assert torch.equal(rest.net.weight, whole.net.weight), after


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("fails_in", ["training_step", "on_before_zero_grad", "on_after_backward"])
def test_what_is_saved_when_training_fails_goes_on_with_that_batch(
    tmp_path: Path, accumulate: int, fails_in: str
) -> None:
    class Fails(Net):
        failing = True

        def fail(self, name: str) -> None:
            if self.failing and name == fails_in and self.trainer.current_epoch == 1 and len(self.trained) >= 11:
                raise Killed

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.fail("training_step")
            return super().training_step(batch, batch_idx)

        def on_before_zero_grad(self, optimizer: Any) -> None:
            self.fail("on_before_zero_grad")

        def on_after_backward(self) -> None:
            self.fail("on_after_backward")

    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "max_epochs": 3}
    first, path = Fails(), tmp_path / "failed.ckpt"
    engine = make_trainer(tmp_path, SavesAtOnce(path), **options)
    with pytest.raises(Killed):
        engine.fit(first, loader(16, shuffle=True), loader())
    done = engine._outlet.progress.batch
    rest = Fails()
    rest.failing = False
    make_trainer(tmp_path, **options).fit(rest, loader(16, shuffle=True), loader(), ckpt_path=path)
    second_epoch = first.trained[8 : 8 + done] + rest.trained[: 8 - done]
    assert sorted(sample for batch in second_epoch for sample in batch) == list(range(16))
    assert done > 1
    assert len(rest.trained) == 8 - done + 8
    assert [call.split()[0] for call in rest.calls] == ["validation", "validation"]


def test_a_failure_before_training_can_be_saved_too(tmp_path: Path) -> None:
    class Fails(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise Killed

    path = tmp_path / "failed.ckpt"
    with pytest.raises(Killed):
        make_trainer(tmp_path, SavesAtOnce(path), num_sanity_val_steps=1).fit(Fails(), loader(), loader())
    rest = Net()
    make_trainer(tmp_path).fit(rest, loader(), loader(), ckpt_path=path)
    assert len(rest.trained) == 4


def test_generators_that_module_datamodule_and_callbacks_own_go_on(tmp_path: Path) -> None:
    class Part(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tools = {"mix": [random.Random(1)]}

    class Draws(Net):
        def __init__(self, die_after: int | None = None) -> None:
            super().__init__(die_after=die_after)
            self.rng = np.random.default_rng(0)
            self.noise = torch.Generator().manual_seed(1)
            self.really = random.SystemRandom()  # has no state
            self.part = Part()
            self.drawn: list[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            own = torch.rand((), generator=self.noise).item(), self.part.tools["mix"][0].random()
            self.drawn.append((float(self.rng.random()), *own))
            return loss

        def on_train_epoch_start(self) -> None:
            self.rng.random()

    class Draw(L.Callback):
        def __init__(self) -> None:
            self.rng = random.Random(3)
            self.drawn: list[float] = []

        def on_train_batch_end(self, *_: Any) -> None:
            self.drawn.append(self.rng.random())

    class Data(L.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.rng = np.random.RandomState(5)
            self.drawn: list[float] = []

        def train_dataloader(self) -> Any:
            return loader()

        def val_dataloader(self) -> Any:
            return loader()

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.drawn.extend([self.rng.random()] * bool(self.trainer.training))
            return batch

    def run(folder: Path, die_after: int | None = None, **options: Any) -> list[Any]:
        parts = Draws(die_after), Draw(), Data()
        try:
            trainer(folder, parts[1], max_epochs=3).fit(parts[0], datamodule=parts[2], **options)
        except Killed:
            parts[2].drawn.pop()  # for the batch that is done again
        return [part.drawn for part in parts]

    whole = run(tmp_path / "whole")
    for cut in (3, 4, 6):
        before = run(tmp_path / str(cut), cut)
        after = run(tmp_path / str(cut), ckpt_path="last")
        assert [first + second for first, second in zip(before, after, strict=True)] == whole, cut


def test_the_sanity_check_leaves_loaders_as_they_were(tmp_path: Path) -> None:
    class Lines(IterableDataset[Any]):
        def __init__(self) -> None:
            self.index = 0

        def __iter__(self) -> Iterator[torch.Tensor]:
            while self.index < 12:
                self.index += 1
                yield torch.tensor([float(self.index)])
            self.index = 0

        def state_dict(self) -> dict[str, Any]:
            return {"index": self.index}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.index = state["index"]

    class Validated(Net):
        def __init__(self) -> None:
            super().__init__()
            self.validated: list[int] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.validated.clear()
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.validated.extend(int(value) for value in batch)

    stream = Validated()
    make_trainer(tmp_path, num_sanity_val_steps=2).fit(stream, loader(), DataLoader(Lines(), batch_size=3))
    assert stream.validated == list(range(1, 13))
    orders = []
    for steps in (0, 2):
        shared, net = torch.Generator().manual_seed(1), Net()
        loaders = loader(shuffle=True, generator=shared), loader(generator=shared)
        make_trainer(tmp_path, num_sanity_val_steps=steps).fit(net, *loaders)
        orders.append(net.trained)
    assert orders[0] == orders[1]
