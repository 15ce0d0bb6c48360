"""Counts equal closed forms; times equal those of a clock that the test turns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import leyden as L
from leyden.callbacks import ModelCheckpoint
from leyden.profilers import SimpleProfiler
from profiled import EPOCHS, TRAIN, VAL, Net, Watcher, batches, make_trainer

torch.set_num_threads(1)


SANITY = 2


class Clock:
    """Shows the time that it was turned to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def counts(
    module: L.LightningModule, tmp_path: Path, train: Any = None, val: Any = None, **options: Any
) -> dict[str, int]:
    profiler = SimpleProfiler()
    make_trainer(tmp_path, profiler=profiler, **options).fit(
        module, batches(TRAIN) if train is None else train, batches(VAL) if val is None else val
    )
    return profiler.counts


@pytest.mark.parametrize("window", [1, 2, 3])
def test_counts_of_fit(window: int, tmp_path: Path) -> None:
    found = counts(Net(), tmp_path, callbacks=[Watcher()], accumulate_grad_batches=window)
    evaluated = SANITY + EPOCHS * VAL
    assert found == {
        "[LightningModule]Net.training_step": EPOCHS * TRAIN,
        "[LightningModule]Net.validation_step": evaluated,
        "[LightningModule]Net.on_train_epoch_end": EPOCHS,
        "[LightningModule]Net.on_validation_model_zero_grad": EPOCHS,
        "[LightningModule]Net.on_validation_model_eval": 1 + EPOCHS,
        "[Callback]Watcher.on_train_batch_end": EPOCHS * TRAIN,
        "backward": EPOCHS * TRAIN,
        "optimizer_step": EPOCHS * math.ceil(TRAIN / window),
        "next_batch": EPOCHS * TRAIN + evaluated,
        "sanity_check": 1,
        "validation": EPOCHS,
    }


def test_batches_on_their_way_are_counted_where_they_are_moved(tmp_path: Path) -> None:
    class Moving(Net):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    assert counts(Moving(), tmp_path)["batch_to_device"] == EPOCHS * TRAIN + SANITY + EPOCHS * VAL


def test_a_loader_without_length_is_asked_once_more_for_its_end(tmp_path: Path) -> None:
    class Endless:
        def __iter__(self) -> Iterator[Any]:
            return iter(batches(TRAIN))

    assert counts(Net(), tmp_path, Endless(), limit_val_batches=0)["next_batch"] == EPOCHS * (TRAIN + 1)
    limited = counts(Net(), tmp_path, Endless(), limit_val_batches=0, limit_train_batches=3)
    assert limited["next_batch"] == EPOCHS * 3


def test_several_loaders_are_counted_by_batch(tmp_path: Path) -> None:
    found = counts(Several(), tmp_path, [batches(2), batches(4)], [batches(1), batches(2)], num_sanity_val_steps=0)
    assert found["next_batch"] == EPOCHS * (4 + 3)
    assert found["[LightningModule]Several.validation_step"] == EPOCHS * 3
    assert found["validation"] == EPOCHS


class Several(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[0], batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...


def test_reloaded_loaders_are_counted_as_well(tmp_path: Path) -> None:
    class Own(Net):
        def train_dataloader(self) -> Any:
            return batches(TRAIN)

        def val_dataloader(self) -> Any:
            return batches(VAL)

    profiler = SimpleProfiler()
    make_trainer(tmp_path, profiler=profiler, reload_dataloaders_every_n_epochs=1, num_sanity_val_steps=0).fit(Own())
    assert profiler.counts["next_batch"] == EPOCHS * (TRAIN + VAL)
    assert profiler.counts["validation"] == EPOCHS
    assert profiler.counts["[LightningModule]Own.validation_step"] == EPOCHS * VAL


def test_an_own_optimizer_step_is_counted_beside_torchs(tmp_path: Path) -> None:
    class Own(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
            optimizer.step(closure=optimizer_closure)

    found = counts(Own(), tmp_path)
    assert found["[LightningModule]Own.optimizer_step"] == found["optimizer_step"] == EPOCHS * TRAIN
    assert found["[LightningModule]Own.training_step"] == found["backward"] == EPOCHS * TRAIN


def test_every_optimizer_of_manual_optimization_is_counted(tmp_path: Path) -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.layer(batch[0]).mean())
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([self.layer.weight], lr=0.1), torch.optim.SGD([self.layer.bias], lr=0.1)]

    found = counts(Two(), tmp_path)
    assert found["optimizer_step"] == found["backward"] == 2 * EPOCHS * TRAIN
    assert found["[LightningModule]Two.training_step"] == EPOCHS * TRAIN


def test_a_step_that_overflowed_is_none(tmp_path: Path) -> None:
    steps: list[int] = []

    class Overflows(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx).float() * (math.inf if batch_idx == 1 else 1e-3)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            optimizer.register_step_post_hook(lambda *_: steps.append(1))
            return optimizer

    found = counts(Overflows(), tmp_path, precision="16-mixed", limit_val_batches=0)
    assert found["optimizer_step"] == len(steps) == EPOCHS * (TRAIN - 1)


def test_saves_are_counted(tmp_path: Path) -> None:
    found = counts(Net(), tmp_path, callbacks=[ModelCheckpoint(save_top_k=-1)], enable_checkpointing=True)
    assert found["save_checkpoint"] == EPOCHS


@pytest.mark.parametrize(("verb", "action"), [("validate", "validation"), ("test", "test"), ("predict", "predict")])
def test_counts_of_the_other_verbs(verb: str, action: str, tmp_path: Path) -> None:
    class Predicting(Net):
        def predict_step(self, batch: Any, batch_idx: int) -> None: ...

    profiler = SimpleProfiler()
    getattr(make_trainer(tmp_path, profiler=profiler), verb)(Predicting(), batches(VAL))
    assert profiler.counts[action] == 1
    assert profiler.counts[f"[LightningModule]Predicting.{action}_step"] == VAL
    assert profiler.counts["next_batch"] == VAL


def test_every_verb_starts_at_zero(tmp_path: Path) -> None:
    profiler = SimpleProfiler()
    trainer = make_trainer(tmp_path, profiler=profiler)
    for _ in range(2):
        trainer.fit(Net(), batches(TRAIN), batches(VAL))
        assert profiler.counts["backward"] == EPOCHS * TRAIN
    trainer.test(Net(), batches(VAL))
    assert "backward" not in profiler.counts


def test_times_are_those_of_the_clock(tmp_path: Path) -> None:
    clock = Clock()

    class Slow(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            clock.now += 2
            with self.trainer.profiler.profile("part"):
                clock.now += 3
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            clock.now += 7

        def on_train_epoch_end(self) -> None:
            clock.now += 11

        def setup(self, stage: str) -> None:
            clock.now += 13

    profiler = SimpleProfiler(clock=clock)
    make_trainer(tmp_path, profiler=profiler, num_sanity_val_steps=0).fit(Slow(), batches(TRAIN), batches(VAL))
    spent = {action: total for action, total in profiler.totals.items() if total}
    assert spent == {
        "part": EPOCHS * TRAIN * 3,
        "[LightningModule]Slow.training_step": EPOCHS * TRAIN * 5,
        "[LightningModule]Slow.validation_step": EPOCHS * VAL * 7,
        "validation": EPOCHS * VAL * 7,
        "[LightningModule]Slow.on_train_epoch_end": EPOCHS * 11,
    }
    whole = EPOCHS * (TRAIN * 5 + VAL * 7 + 11) + 13
    clock.now += 1000  # after the run
    lines = profiler.summary().splitlines()
    assert lines[0] == f"fit: {whole:.3f} s on the host; an action includes those inside of it"
    assert lines[1].split() == ["action", "calls", "total", "(s)", "mean", "(ms)", "%"]
    assert lines[2].split() == [
        "[LightningModule]Slow.training_step",
        "10",
        "50.000",
        "5000.000",
        f"{5000 / whole:.1f}",
    ]
    assert [line.split()[-2] for line in lines[3:5]] == ["7000.000", "21000.000"]


def test_an_action_inside_of_itself_is_measured_twice() -> None:
    clock = Clock()
    profiler = SimpleProfiler(clock=clock)
    with profiler.profile("outer"):
        clock.now += 1
        with profiler.profile("outer"):
            clock.now += 2
    assert (profiler.counts, profiler.totals) == ({"outer": 2}, {"outer": 5.0})


def test_no_actions_give_no_table() -> None:
    assert SimpleProfiler().summary() == ""


def test_a_table_without_time_has_no_division_by_zero() -> None:
    profiler = SimpleProfiler(clock=Clock())
    with profiler.profile("part"):
        pass
    assert profiler.summary().splitlines()[-1].split() == ["part", "1", "0.000", "0.000", "0.0"]
