"""How much is run: limits of batches, epochs, steps and time, trial runs, overfitting, reloading, odd loaders."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import leyden as L
from leyden.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer
from leyden.errors import ConfigurationError, DataError, LeydenWarning
from leyden.loggers import CSVLogger
from quiet import make_trainer

torch.set_num_threads(1)


class Counting(L.LightningModule):
    """Notes what each stage is given: the first feature of each batch's first sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: dict[str, list[list[float]]] = {"train": [], "val": [], "test": [], "predict": []}

    def note(self, stage: str, batch: Any) -> None:
        if not self.trainer.sanity_checking:
            self.seen[stage].append(batch.flatten().tolist())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.note("train", batch)
        return self.layer(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.note("val", batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.note("test", batch)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.note("predict", batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def counts(self) -> dict[str, int]:
        return {stage: len(batches) for stage, batches in self.seen.items()}


class Stream(IterableDataset[Any]):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Any:
        return iter(torch.arange(float(self.samples)).unsqueeze(1))


def data(samples: int, **options: Any) -> Any:
    return DataLoader(torch.arange(float(samples)).unsqueeze(1), **({"batch_size": 1} | options))  # type: ignore[arg-type]


def stream(samples: int) -> Any:
    return DataLoader(Stream(samples), batch_size=1)


def run_all(trainer: L.Trainer, loader: Any, kind: type[Counting] = Counting) -> Counting:
    module = kind()
    trainer.fit(module, loader(), loader())
    trainer.test(module, loader())
    trainer.predict(module, loader())
    return module


# limit_*_batches


@pytest.mark.parametrize(
    ("limit", "batches"),
    [(None, 8), (1, 1), (3, 3), (8, 8), (100, 8), (1.0, 8), (0.5, 4), (0.25, 2), (0.3, 2), (0.99, 7), (0.125, 1)],
)
@pytest.mark.parametrize("stage", ["train", "val", "test", "predict"])
def test_a_limit_is_a_number_or_a_fraction_of_batches(tmp_path: Path, stage: str, limit: Any, batches: int) -> None:
    trainer = make_trainer(tmp_path, **{f"limit_{stage}_batches": limit})
    module = run_all(trainer, lambda: data(8))
    assert module.counts() == {"train": 8, "val": 8, "test": 8, "predict": 8} | {stage: batches}
    assert module.seen[stage] == [[float(index)] for index in range(batches)]


def test_the_trainer_shows_the_limited_numbers(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Looking(Counting):
        def on_train_start(self) -> None:
            seen.update(train=self.trainer.num_training_batches, val=self.trainer.num_val_batches)

        def on_test_start(self) -> None:
            seen.update(test=self.trainer.num_test_batches)

        def on_predict_start(self) -> None:
            seen.update(predict=self.trainer.num_predict_batches)

    limits = {f"limit_{stage}_batches": n for stage, n in (("train", 3), ("val", 0.5), ("test", 9), ("predict", 1))}
    trainer, module = make_trainer(tmp_path, **limits), Looking()
    trainer.fit(module, data(8), [data(8), data(4)])
    trainer.test(module, [data(8), stream(3)])
    trainer.predict(module, stream(5))
    assert seen == {"train": 3, "val": [4, 2], "test": [8, 9], "predict": [1]}


def test_a_limit_holds_for_each_loader_and_each_epoch(tmp_path: Path) -> None:
    module = Counting()
    trainer = make_trainer(tmp_path, max_epochs=3, limit_train_batches=2, limit_val_batches=1)
    trainer.fit(module, data(8), [data(8), data(4)])
    assert module.counts()["train"] == 6
    assert module.counts()["val"] == 6


@pytest.mark.parametrize("limit", [0, 0.0])
def test_a_limit_of_zero_turns_a_stage_off(tmp_path: Path, limit: Any) -> None:
    module = Counting()
    make_trainer(tmp_path, limit_val_batches=limit, num_sanity_val_steps=2).fit(module, data(4), data(4))
    assert module.counts() == {"train": 4, "val": 0, "test": 0, "predict": 0}
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = make_trainer(tmp_path, limit_train_batches=limit, limit_test_batches=limit, limit_predict_batches=limit)
    trainer.fit(module, data(4), data(4))
    assert trainer.global_step == 0
    assert module.counts()["val"] == 0
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())
    trainer.test(module, data(4))
    assert trainer.predict(module, data(4)) == []
    assert module.counts()["test"] == module.counts()["predict"] == 0


@pytest.mark.parametrize("stage", ["train", "val", "test", "predict"])
def test_a_fraction_of_less_than_one_batch_is_refused(tmp_path: Path, stage: str) -> None:
    trainer = make_trainer(tmp_path, **{f"limit_{stage}_batches": 0.1})
    with pytest.raises(DataError, match=rf"limit_{stage}_batches=0.1 of the 8 batches .* Use at least 0.125"):
        run_all(trainer, lambda: data(8))


@pytest.mark.parametrize("stage", ["train", "val", "test", "predict"])
def test_a_loader_without_length_takes_numbers_but_no_fractions(tmp_path: Path, stage: str) -> None:
    module = run_all(make_trainer(tmp_path, **{f"limit_{stage}_batches": 3}), lambda: stream(8))
    assert module.counts() == {"train": 8, "val": 8, "test": 8, "predict": 8} | {stage: 3}
    with pytest.raises(DataError, match=rf"limit_{stage}_batches=0.5 is a fraction, .* has no length"):
        run_all(make_trainer(tmp_path, **{f"limit_{stage}_batches": 0.5}), lambda: stream(8))


@pytest.mark.parametrize("value", [-1, 1.5, "all", True, -0.1, float("nan")])
@pytest.mark.parametrize("name", ["limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches"])
def test_what_is_no_limit_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}=.* a number of batches"):
        L.Trainer(accelerator="cpu", logger=False, **{name: value})


# Loaders that are odd


def test_an_iterable_dataset_without_length_is_read_to_its_end_each_epoch(tmp_path: Path) -> None:
    module = Counting()
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, stream(3), stream(2))
    assert module.seen["train"] == [[0], [1], [2]] * 2
    assert module.seen["val"] == [[0], [1]] * 2
    assert trainer.num_training_batches == float("inf")
    assert (trainer.current_epoch, trainer.global_step) == (2, 6)


def test_a_stream_knows_its_last_batch_and_its_short_window(tmp_path: Path) -> None:
    last: list[bool] = []

    class Looking(Counting):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            last.append(self.trainer.is_last_batch)

    trainer = make_trainer(tmp_path, accumulate_grad_batches=3, max_epochs=2)
    trainer.fit(Looking(), stream(5), stream(1))
    assert last == [False, False, False, False, True] * 2
    assert trainer.global_step == 4  # windows of 3 and 2


class ShortOfItsLength:
    """Says that it has 5 batches, and gives 3."""

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Any:
        return iter(torch.ones(3, 1, 1))


def test_a_loader_that_gives_less_than_its_length_ends_where_it_ends(tmp_path: Path) -> None:
    module = Counting()
    trainer = make_trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(module, ShortOfItsLength(), ShortOfItsLength())
    assert module.counts()["train"] == module.counts()["val"] == 6
    assert (trainer.current_epoch, trainer.global_step) == (2, 4)


@pytest.mark.parametrize(
    "loader",
    [data(0), data(3, batch_size=4, drop_last=True), CSVLogger, 5, None],
    ids=["no samples", "all dropped", "a class", "a number", "None"],
)
def test_a_loader_without_batches_or_that_is_none_is_refused(tmp_path: Path, loader: Any) -> None:
    class Own(Counting):
        def train_dataloader(self) -> Any:
            return loader

    with pytest.raises(DataError, match=r"train_dataloader (gave|returned)"):
        make_trainer(tmp_path, limit_val_batches=0).fit(Own())


def test_the_error_of_an_empty_loader_says_why_it_is_empty(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"train_dataloaders gave a loader without batches: .* 3 samples, batch_size=4 and drop_last=True",
    ):
        make_trainer(tmp_path, limit_val_batches=0).fit(Counting(), data(3, batch_size=4, drop_last=True))
    with pytest.raises(DataError, match=r"val_dataloaders gave a loader without batches"):
        make_trainer(tmp_path).fit(Counting(), data(3), data(0))


def test_an_empty_stream_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train_dataloaders gave no batch in epoch 0"):
        make_trainer(tmp_path, limit_val_batches=0).fit(Counting(), stream(0))


def test_a_generator_trains_one_epoch_and_is_refused_in_the_second(tmp_path: Path) -> None:
    module = Counting()
    with pytest.raises(DataError, match=r"train_dataloaders gave no batch\. A generator can be read only once"):
        make_trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(module, (torch.ones(1, 1) for _ in range(3)))
    assert module.counts()["train"] == 3
    make_trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(module, (torch.ones(1, 1) for _ in range(3)))
    assert module.counts()["train"] == 6


def test_a_generator_that_validation_has_read_before_is_refused(tmp_path: Path) -> None:
    module = Counting()
    trainer = make_trainer(tmp_path, max_epochs=2)
    with pytest.raises(DataError, match=r"val_dataloaders gave no batch\. A generator can be read only once"):
        trainer.fit(module, data(2), (torch.ones(1, 1) for _ in range(3)))
    assert module.counts() == {"train": 4, "val": 3, "test": 0, "predict": 0}


def test_an_empty_stream_may_be_evaluated(tmp_path: Path) -> None:
    assert make_trainer(tmp_path).predict(Counting(), stream(0)) == []
    assert make_trainer(tmp_path).test(Counting(), stream(0)) == [{}]


def test_any_iterable_of_batches_is_a_loader(tmp_path: Path) -> None:
    class ByIndex:
        def __getitem__(self, index: int) -> Any:
            if index == 3:
                raise IndexError
            return torch.full((1, 1), float(index))

    module = Counting()
    make_trainer(tmp_path, max_epochs=2).fit(module, ByIndex(), ByIndex())
    assert module.seen["train"] == [[0], [1], [2]] * 2


def test_batches_whose_step_returns_none_are_counted_and_skipped(tmp_path: Path) -> None:
    class Skipping(Counting):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in (1, 2, 3) else loss

    trainer = make_trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, limit_val_batches=0)
    trainer.fit(Skipping(), data(6))
    assert trainer.skipped_batches == 6
    assert trainer.global_step == 4  # windows (0, 1) and (4, 5) step, (2, 3) has no loss at all


# max and min


@pytest.mark.parametrize(
    ("options", "epochs", "steps"),
    [
        ({"max_epochs": 3}, 3, 12),
        ({"max_epochs": 0}, 0, 0),
        ({"max_steps": 0}, 0, 0),
        ({"max_epochs": 3, "max_steps": 6}, 1, 6),
        ({"max_epochs": 1, "max_steps": 6}, 1, 4),
        ({"max_epochs": None, "max_steps": 8}, 2, 8),
        ({"max_epochs": -1, "max_steps": 9}, 2, 9),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, 2, 2),
        ({"max_epochs": 5, "max_steps": 3, "accumulate_grad_batches": 2}, 1, 3),
        ({"max_epochs": 2, "min_epochs": 2, "min_steps": 3}, 2, 8),
    ],
)
def test_training_ends_at_the_first_limit(tmp_path: Path, options: Any, epochs: int, steps: int) -> None:
    trainer = make_trainer(tmp_path, limit_val_batches=0, **options)
    trainer.fit(Counting(), data(4))
    assert (trainer.current_epoch, trainer.global_step) == (epochs, steps)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 2),  # asked for in batch 1 of epoch 0
        ({"min_epochs": 1}, 4),
        ({"min_epochs": 2}, 8),
        ({"min_steps": 3}, 3),
        ({"min_steps": 7}, 7),
        ({"min_epochs": 1, "min_steps": 6}, 6),
        ({"min_epochs": 3, "min_steps": 1}, 12),
        ({"accumulate_grad_batches": 4}, 1),  # the window is finished
        ({"accumulate_grad_batches": 3}, 1),
        ({"min_epochs": 1, "max_steps": 3}, 3),  # the maximum wins
    ],
)
def test_a_stop_is_heeded_when_the_minima_are_reached(tmp_path: Path, options: Any, steps: int) -> None:
    class Stopping(Counting):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                self.trainer.should_stop = True

    trainer = make_trainer(tmp_path, limit_val_batches=0, **({"max_epochs": 5} | options))
    trainer.fit(Stopping(), data(4))
    assert trainer.global_step == steps


def test_a_stop_does_not_outlive_its_fit(tmp_path: Path) -> None:
    class Stopping(Counting):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.trainer.should_stop = True

    trainer = make_trainer(tmp_path, limit_val_batches=0)
    trainer.fit(Stopping(), data(4))
    assert trainer.global_step == 1
    trainer.fit(Counting(), data(4))
    assert trainer.global_step == 4


def test_max_time_stops_after_the_minima(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=None, max_time=timedelta(0), limit_val_batches=0)
    assert sum(isinstance(callback, Timer) for callback in trainer.callbacks) == 1
    assert trainer.max_epochs == -1
    trainer.fit(Counting(), data(4))
    assert trainer.global_step <= 1
    trainer = make_trainer(tmp_path, max_epochs=None, max_time="00:00:00:00", min_steps=6, limit_val_batches=0)
    trainer.fit(Counting(), data(4))
    assert trainer.global_step == 6


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": -2}, {"max_epochs": 1.0}, {"max_epochs": True}, {"max_steps": -2},
        {"min_epochs": -1}, {"min_steps": 0.5}, {"max_time": "1 hour"}, {"max_time": timedelta(seconds=-1)},
        {"min_epochs": 3, "max_epochs": 2}, {"min_steps": 3, "max_steps": 2},
        {"reload_dataloaders_every_n_epochs": -1}, {"accumulate_grad_batches": 0}, {"num_sanity_val_steps": -2},
        {"fast_dev_run": -1}, {"fast_dev_run": 0.5},
    ],
)  # fmt: skip
def test_what_is_no_limit_of_training_is_refused(options: Any) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        L.Trainer(accelerator="cpu", logger=False, **options)


def test_without_any_limit_there_are_a_thousand_epochs(tmp_path: Path) -> None:
    assert L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path).max_epochs == 1000
    assert L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, max_steps=5).max_epochs == -1


# overfit_batches


def shuffled(samples: int, **options: Any) -> Any:
    return data(samples, shuffle=True, **options)


@pytest.mark.parametrize(("overfit", "train", "val"), [(2, 2, 2), (0.5, 4, 3), (1.0, 8, 6), (100, 8, 6)])
def test_overfitting_trains_and_validates_on_the_same_few_batches_in_order(
    tmp_path: Path, overfit: Any, train: int, val: int
) -> None:
    module = Counting()
    trainer = make_trainer(tmp_path, max_epochs=2, overfit_batches=overfit)
    with pytest.warns(
        LeydenWarning,
        match=r"\[LEY-overfit-shuffle\] overfit_batches: the loader of train_dataloaders is read in order",
    ):
        trainer.fit(module, shuffled(8), data(6))
    assert module.seen["train"] == [[float(index)] for index in range(train)] * 2
    assert module.seen["val"] == [[float(index)] for index in range(val)] * 2


def test_overfitting_replaces_the_shuffle_of_validation_loaders_too(tmp_path: Path) -> None:
    module = Counting()
    with pytest.warns(LeydenWarning, match="val_dataloaders is read in order"):
        make_trainer(tmp_path, overfit_batches=2).fit(module, data(8), [shuffled(8), data(8)])
    assert module.seen["val"] == [[0], [1]] * 2


def test_overfitting_without_shuffle_says_nothing_and_keeps_the_loader(tmp_path: Path) -> None:
    module, loader = Counting(), data(8)
    make_trainer(tmp_path, overfit_batches=1, max_epochs=3).fit(module, loader, loader)
    assert module.seen["train"] == module.seen["val"] == [[0]] * 3


def test_the_rebuilt_loader_keeps_what_the_user_s_loader_was_given(tmp_path: Path) -> None:
    loader = shuffled(7, batch_size=2, drop_last=True, collate_fn=lambda samples: torch.stack(samples) + 10)
    module = Counting()
    with pytest.warns(LeydenWarning, match="overfit-shuffle"):
        make_trainer(tmp_path, overfit_batches=1.0, limit_val_batches=None).fit(module, loader, data(2))
    assert module.seen["train"] == [[10, 11], [12, 13], [14, 15]]


def test_loaders_read_together_are_overfitted_in_order_as_well(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Both(Counting):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append((batch["a"].item(), batch["b"].item()))
            return self.layer(batch["a"]).mean()

    with pytest.warns(LeydenWarning, match="train_dataloaders is read in order"):
        make_trainer(tmp_path, overfit_batches=2, max_epochs=2).fit(Both(), {"a": shuffled(9), "b": data(9)}, data(2))
    assert seen == [(0, 0), (1, 1)] * 2


def test_a_batch_sampler_of_its_own_is_kept_and_announced(tmp_path: Path) -> None:
    class Own(BatchSampler):
        pass

    loader = DataLoader(torch.arange(8.0).unsqueeze(1), batch_sampler=Own(RandomSampler(range(8)), 2, False))  # type: ignore[arg-type]
    module = Counting()
    with pytest.warns(LeydenWarning, match="train_dataloaders has a sampler or batch sampler of its own"):
        make_trainer(tmp_path, overfit_batches=2).fit(module, loader, data(2))
    assert [len(batch) for batch in module.seen["train"]] == [2, 2]


def test_a_subset_sampler_gives_its_own_samples_in_order(tmp_path: Path) -> None:
    loader, module = data(8, sampler=SubsetRandomSampler([5, 1, 7])), Counting()
    with pytest.warns(LeydenWarning, match="is read in order"):
        make_trainer(tmp_path, overfit_batches=1.0, max_epochs=2, limit_val_batches=0).fit(module, loader, data(2))
    assert module.seen["train"] == [[5], [1], [7]] * 2


def test_a_shuffle_inside_of_a_given_batch_sampler_is_replaced(tmp_path: Path) -> None:
    batch_sampler = BatchSampler(RandomSampler(range(7)), 3, drop_last=True)
    loader = DataLoader(torch.arange(7.0).unsqueeze(1), batch_sampler=batch_sampler)  # type: ignore[arg-type]
    module = Counting()
    with pytest.warns(LeydenWarning, match="is read in order"):
        make_trainer(tmp_path, overfit_batches=1.0).fit(module, loader, data(2))
    assert module.seen["train"] == [[0, 1, 2], [3, 4, 5]]


def test_a_sampler_that_weighs_is_kept_and_announced(tmp_path: Path) -> None:
    loader, module = data(8, sampler=WeightedRandomSampler([0, 0, 0, 0, 0, 0, 0, 1], 4)), Counting()
    with pytest.warns(LeydenWarning, match="goes on drawing batches in its own order"):
        make_trainer(tmp_path, overfit_batches=2).fit(module, loader, data(2))
    assert module.seen["train"] == [[7], [7]]


def test_overfitting_and_a_limit_contradict_each_other() -> None:
    with pytest.raises(ConfigurationError, match="overfit_batches=2 and limit_train_batches=3 contradict"):
        L.Trainer(accelerator="cpu", logger=False, overfit_batches=2, limit_train_batches=3)


def test_a_fraction_to_overfit_on_that_is_too_small_is_refused_by_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^overfit_batches=0.25 of the 3 batches of val_dataloaders"):
        make_trainer(tmp_path, overfit_batches=0.25).fit(Counting(), data(8), data(3))
    with pytest.raises(DataError, match=r"^overfit_batches=0.25 of the 3 batches of train_dataloaders"):
        make_trainer(tmp_path, overfit_batches=0.25).fit(Counting(), data(3), data(8))


# fast_dev_run


class Drawing(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"a": 1})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train_loss", 1.0, on_step=True, on_epoch=True)
        self.logger.experiment.add_image("x", batch, self.global_step)  # type: ignore[union-attr]
        self.logger.experiment["a/b"] = 3  # type: ignore[union-attr]
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", 1.0)
        super().validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@pytest.mark.parametrize(("fast", "batches"), [(True, 1), (1, 1), (3, 3), (100, 8)])
@pytest.mark.parametrize("logger", [None, True, "csv"])
def test_a_trial_run_runs_so_many_batches_of_everything_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: Any, batches: int, logger: Any
) -> None:
    root, cwd = tmp_path / "root", tmp_path / "cwd"
    root.mkdir(), cwd.mkdir()
    monkeypatch.chdir(cwd)
    callbacks = [
        ModelCheckpoint(tmp_path / "saved", monitor="val_loss", save_last=True),
        EarlyStopping("val_loss"),
        LearningRateMonitor(),
    ]
    trainer = L.Trainer(
        fast_dev_run=fast,
        max_epochs=50,
        max_steps=1000,
        min_epochs=7,
        limit_train_batches=0.9,
        val_check_interval=0.5,
        check_val_every_n_epoch=5,
        accelerator="cpu",
        default_root_dir=root,
        callbacks=callbacks,
        logger=CSVLogger(tmp_path / "csv") if logger == "csv" else logger,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = run_all(trainer, lambda: data(8), Drawing)
    assert module.counts() == dict.fromkeys(("train", "val", "test", "predict"), batches)
    assert (trainer.current_epoch, trainer.global_step) == (1, batches)
    assert trainer.early_stopping_callback is not None
    assert trainer.early_stopping_callback.best_score == 1.0
    written = [Path(folder, name) for folder, _, names in os.walk(tmp_path) for name in names]
    assert written == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cwd", "root"]
    assert trainer.log_dir is None
    assert trainer.checkpoint_callback is None


def test_a_trial_run_has_no_sanity_check(tmp_path: Path) -> None:
    class Watching(L.Callback):
        def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            raise AssertionError

    make_trainer(tmp_path, Watching(), fast_dev_run=True, num_sanity_val_steps=2).fit(Counting(), data(3), data(3))


@pytest.mark.parametrize("off", [False, 0])
def test_no_trial_run_is_a_real_run(tmp_path: Path, off: Any) -> None:
    trainer = make_trainer(tmp_path, fast_dev_run=off)
    assert trainer.fast_dev_run == 0
    assert run_all(trainer, lambda: data(3)).counts() == {"train": 3, "val": 3, "test": 3, "predict": 3}


def test_a_trial_run_keeps_stages_off_that_are_off(tmp_path: Path) -> None:
    module = Counting()
    make_trainer(tmp_path, fast_dev_run=2, limit_val_batches=0).fit(module, data(3), data(3))
    assert module.counts() == {"train": 2, "val": 0, "test": 0, "predict": 0}


def test_a_trial_run_with_accumulation_runs_as_many_batches(tmp_path: Path) -> None:
    trainer, module = make_trainer(tmp_path, fast_dev_run=4, accumulate_grad_batches=2), Counting()
    trainer.fit(module, data(8), data(8))
    assert module.counts()["train"] == 4
    assert trainer.global_step == 2


# reload_dataloaders_every_n_epochs


@pytest.mark.parametrize(
    ("every", "expected"), [(0, [0]), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (10, [0])]
)
def test_loaders_are_asked_for_again_every_n_epochs(tmp_path: Path, every: int, expected: list[int]) -> None:
    asked: list[tuple[str, int]] = []

    class Reloading(Counting):
        def train_dataloader(self) -> Any:
            asked.append(("train", self.current_epoch))
            return data(1 + self.current_epoch)

        def val_dataloader(self) -> Any:
            asked.append(("val", self.current_epoch))
            return data(1)

    module = Reloading()
    trainer = make_trainer(tmp_path, max_epochs=5, reload_dataloaders_every_n_epochs=every, num_sanity_val_steps=2)
    trainer.fit(module)
    assert [epoch for kind, epoch in asked if kind == "train"] == expected
    assert [epoch for kind, epoch in asked if kind == "val"] == expected
    newest = [max(epoch for epoch in expected if epoch <= now) for now in range(5)]
    assert module.counts()["train"] == sum(1 + epoch for epoch in newest)


def test_a_reloaded_loader_may_be_too_short_for_the_interval(tmp_path: Path) -> None:
    class Shrinking(Counting):
        def train_dataloader(self) -> Any:
            return data(4 if self.current_epoch == 0 else 2)

        def val_dataloader(self) -> Any:
            return data(1)

    trainer = make_trainer(tmp_path, max_epochs=2, reload_dataloaders_every_n_epochs=1, val_check_interval=3)
    with pytest.raises(ConfigurationError, match="val_check_interval=3 is more than the 2 training batches"):
        trainer.fit(Shrinking())
    assert trainer.current_epoch == 1
