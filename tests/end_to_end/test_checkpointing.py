"""Checkpoints in whole runs: which files there are, what is in them, and going on from them bit by bit."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from leyden.callbacks import Callback, EarlyStopping, ModelCheckpoint
from leyden.checkpoint.format import load_checkpoint
from leyden.errors import CheckpointError, LeydenWarning
from leyden.module import LightningModule
from leyden.seed import capture_random_state
from leyden.trainer import Trainer
from quiet import Memory

torch.set_num_threads(1)

SAMPLES, BATCH = 10, 2
BATCHES = 5
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Numbered(Dataset[Any]):
    """Samples that know their index, noisy as an augmentation would make them."""

    def __init__(self, augment: bool = True) -> None:
        generator = torch.Generator().manual_seed(5)
        self.features = torch.randn(SAMPLES, 4, generator=generator)
        self.augment = augment

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.randn(4) + random.random() + float(np.random.normal()) if self.augment else 0.0
        return self.features[index] + noise, index


def loader(shuffle: bool = False, augment: bool = True) -> DataLoader[Any]:
    return DataLoader(Numbered(augment), batch_size=BATCH, shuffle=shuffle)


class Net(LightningModule):
    """Dropout, BatchNorm, Adam, two schedulers' worth of state; ``val`` follows the given list of values."""

    def __init__(self, values: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 1))
        self.values = values

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features, _ = batch
        loss = self.layers(features).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        features, _ = batch
        own = self.layers(features).square().mean()
        self.log("val", self.values[self.current_epoch] if self.values else own)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Record(Callback):
    """What was trained on, and the weights at the end of each epoch and after each step."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int, list[int]]] = []
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.epochs: dict[int, dict[str, Tensor]] = {}
        self.count = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append((trainer.current_epoch, batch_idx, batch[1].tolist()))
        self.weights[trainer.global_step] = copied(pl_module)
        self.count += 1

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.epochs[trainer.current_epoch] = copied(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


class Break(Callback):
    """Stops the run as a crash would, after a number of batches."""

    def __init__(self, after: int) -> None:
        self.after, self.seen = after, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen += 1
        if self.seen == self.after:
            raise RuntimeError("power cut")


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    defaults = {**QUIET, "default_root_dir": folder, "max_epochs": 3}
    if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        defaults["enable_checkpointing"] = False
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def seed(value: int = 1) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def same(first: Any, second: Any) -> bool:
    """Whether nested data is equal to the last bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def fit(
    folder: Path, checkpoint: ModelCheckpoint, values: tuple[float, ...] = (), **options: Any
) -> tuple[Trainer, Record]:
    seed()
    record = Record()
    trainer = make_trainer(folder, record, checkpoint, **options)
    trainer.fit(Net(values), loader(), loader())
    return trainer, record


# which files exist

VALUES = (3.0, 1.0, 2.0, 0.5, 4.0)  # after each epoch; a step is 0.2 epochs
FILES = [
    ({}, ["epoch=4-step=25.ckpt"]),
    ({"monitor": "val"}, ["epoch=3-step=20.ckpt"]),
    ({"monitor": "val", "mode": "max"}, ["epoch=4-step=25.ckpt"]),
    ({"monitor": "val", "save_top_k": 2}, ["epoch=1-step=10.ckpt", "epoch=3-step=20.ckpt"]),
    ({"monitor": "val", "save_last": True}, ["epoch=3-step=20.ckpt", "last.ckpt"]),
    ({"monitor": "val", "save_top_k": 0, "save_last": True}, ["last.ckpt"]),
    ({"save_top_k": 0}, []),
    ({"save_top_k": -1}, [f"epoch={epoch}-step={5 * epoch + 5}.ckpt" for epoch in range(5)]),
    ({"save_top_k": -1, "every_n_epochs": 2}, ["epoch=1-step=10.ckpt", "epoch=3-step=20.ckpt"]),
    ({"save_top_k": -1, "every_n_epochs": 2, "save_on_train_epoch_end": True}, ["epoch=1-step=10.ckpt", "epoch=3-step=20.ckpt"]),
    ({"save_top_k": -1, "every_n_train_steps": 7}, ["epoch=1-step=7.ckpt", "epoch=2-step=14.ckpt", "epoch=4-step=21.ckpt"]),
    ({"save_top_k": -1, "every_n_train_steps": 5}, [f"epoch={epoch}-step={5 * epoch + 5}.ckpt" for epoch in range(5)]),
    ({"monitor": "val", "save_top_k": 1, "every_n_train_steps": 10, "save_last": True}, ["epoch=3-step=20.ckpt", "last.ckpt"]),
    ({"save_top_k": 1, "train_time_interval": timedelta(days=1)}, []),
    ({"save_top_k": -1, "every_n_train_steps": 0, "every_n_epochs": 0}, []),
    ({"monitor": "val", "filename": "{epoch:02d}-{val:.1f}"}, ["epoch=03-val=0.5.ckpt"]),
    ({"monitor": "val", "filename": "best", "save_top_k": 2}, ["best-v1.ckpt", "best.ckpt"]),
    ({"monitor": "val", "filename": "{step}/{val}", "auto_insert_metric_name": False}, ["20/0.5.ckpt"]),
]  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), FILES)
def test_files_after_fit(options: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    fit(tmp_path, ModelCheckpoint(tmp_path / "kept", **options), VALUES, max_epochs=5)
    assert names(tmp_path) == [f"kept/{name}" for name in expected]


def test_a_short_time_interval_saves_after_every_step(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_top_k": -1, "train_time_interval": timedelta(microseconds=1)}
    fit(tmp_path, ModelCheckpoint(tmp_path, **options), VALUES, max_epochs=1)
    assert names(tmp_path) == [f"epoch=0-step={step}.ckpt" for step in range(1, 6)]


def test_without_validation_the_epochs_end_is_the_trigger(tmp_path: Path) -> None:
    seed()
    trainer = make_trainer(tmp_path, ModelCheckpoint(tmp_path, monitor="loss", save_top_k=-1), limit_val_batches=0)
    trainer.fit(Net(), loader())
    assert names(tmp_path) == ["epoch=0-step=5.ckpt", "epoch=1-step=10.ckpt", "epoch=2-step=15.ckpt"]


def test_validations_within_an_epoch_are_triggers(tmp_path: Path) -> None:
    fit(tmp_path, ModelCheckpoint(tmp_path, save_top_k=-1), VALUES, max_epochs=2, val_check_interval=2)
    assert names(tmp_path) == [
        "epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt", "epoch=1-step=7.ckpt", "epoch=1-step=9.ckpt",
    ]  # fmt: skip


def test_a_default_callback_saves_beside_the_logs_or_in_the_root(tmp_path: Path) -> None:
    seed()
    trainer = Trainer(**QUIET, default_root_dir=tmp_path, max_epochs=1)
    trainer.fit(Net(), loader(), loader())
    assert names(tmp_path) == ["checkpoints/epoch=0-step=5.ckpt"]
    logged = Trainer(**{**QUIET, "logger": True}, default_root_dir=tmp_path / "logged", max_epochs=1)
    logged.fit(Net(), loader(), loader())
    assert (tmp_path / "logged/lightning_logs/version_0/checkpoints/epoch=0-step=5.ckpt").is_file()


def test_no_temporary_files_are_left(tmp_path: Path) -> None:
    fit(tmp_path, ModelCheckpoint(tmp_path, save_top_k=2, monitor="val", save_last=True))
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


# what is in them


def test_the_best_path_holds_the_weights_of_the_best_epoch(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val", save_top_k=2, save_last=True)
    trainer, record = fit(tmp_path, checkpoint, VALUES, max_epochs=5)
    assert (checkpoint.best_model_score, checkpoint.best_model_path) == (0.5, str(tmp_path / "epoch=3-step=20.ckpt"))
    best = load_checkpoint(checkpoint.best_model_path)
    assert same(dict(best["state_dict"]), record.epochs[3])
    assert (best["epoch"], best["global_step"]) == (3, 20)
    last = load_checkpoint(checkpoint.last_model_path)
    assert same(dict(last["state_dict"]), record.epochs[4])
    assert same(dict(last["state_dict"]), copied(trainer.lightning_module))


@pytest.mark.parametrize("max_steps", [3, 5, 8])
def test_last_is_the_state_at_the_end_wherever_that_is(max_steps: int, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val", save_last=True)
    trainer, _ = fit(tmp_path, checkpoint, VALUES, max_steps=max_steps)
    last = load_checkpoint(tmp_path / "last.ckpt")
    assert last["global_step"] == max_steps
    assert same(dict(last["state_dict"]), copied(trainer.lightning_module))


def test_checkpoints_hold_the_steps_they_are_named_after(tmp_path: Path) -> None:
    _, record = fit(tmp_path, ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1), max_epochs=2)
    for epoch, batch in itertools.product(range(2), range(BATCHES)):
        step = 5 * epoch + batch + 1
        held = load_checkpoint(tmp_path / f"epoch={epoch}-step={step}.ckpt")
        assert held["global_step"] == step
        assert same(dict(held["state_dict"]), record.weights[step])


def test_a_score_belongs_to_the_weights_that_are_saved_with_it(tmp_path: Path) -> None:
    # the trigger counts steps, and the validation that scores these weights comes at the same boundary
    checkpoint = ModelCheckpoint(tmp_path, monitor="val", save_top_k=-1, every_n_train_steps=5)
    fit(tmp_path, checkpoint, VALUES, max_epochs=5)
    paths = [str(tmp_path / f"epoch={epoch}-step={5 * epoch + 5}.ckpt") for epoch in range(5)]
    assert checkpoint.best_k_models == dict(zip(paths, VALUES, strict=True))


def test_weights_only_leaves_out_what_only_training_needs(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, ModelCheckpoint(tmp_path), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "deep" / "weights.ckpt", weights_only=True)
    trainer.save_checkpoint(tmp_path / "deep" / "whole.ckpt")
    weights = load_checkpoint(tmp_path / "deep" / "weights.ckpt")
    whole = load_checkpoint(tmp_path / "deep" / "whole.ckpt")
    names = {"epoch", "global_step", "run_id", "state_dict", "hyper_parameters"}
    names |= {"hparams_name", "hparams_omitted", "hparams_type"}
    assert set(weights) == names
    assert set(whole) - set(weights) == {
        "optimizer_states", "lr_schedulers", "scaler", "progress", "callbacks", "random_state", "loader_states", "metrics",
        "should_stop", "optimizer_windows", "loggers",
    }  # fmt: skip
    assert same(dict(weights["state_dict"]), copied(trainer.lightning_module))


# going on


class Outcome:
    """Everything that two runs must agree on."""

    def __init__(self, trainer: Trainer, record: Record, memory: Memory) -> None:
        self.weights = copied(trainer.lightning_module)
        self.optimizer = trainer.optimizers[0].state_dict()
        self.scheduler = trainer.lr_scheduler_configs[0].scheduler.state_dict()
        self.numbers = (trainer.current_epoch, trainer.global_step, record.count)
        self.random_state = capture_random_state()
        self.batches, self.rows = record.batches, memory.rows
        stopping = trainer.early_stopping_callback
        self.callback = stopping.state_dict() if stopping is not None else {}

    def assert_goes_on(self, undisturbed: Outcome) -> None:
        """This run, which began in the middle, is the end of the undisturbed one."""
        assert self.batches == undisturbed.batches[len(undisturbed.batches) - len(self.batches) :]
        for part in ("weights", "optimizer", "scheduler", "numbers", "random_state", "callback"):
            assert same(getattr(self, part), getattr(undisturbed, part)), part
        rows = undisturbed.rows[len(undisturbed.rows) - len(self.rows) :]
        assert self.rows == rows


def run(folder: Path, *callbacks: Callback, ckpt_path: Any = None, shuffle: bool = False, **options: Any) -> Outcome:
    record, memory = Record(), Memory()
    options = {"logger": memory, "log_every_n_steps": 1, "num_sanity_val_steps": 2, **options}
    trainer = make_trainer(folder, record, *callbacks, EarlyStopping("val", patience=100), **options)
    trainer.fit(Net(), loader(shuffle), loader(augment=True), ckpt_path=ckpt_path)
    return Outcome(trainer, record, memory)


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_run_resumed_at_an_epochs_end_is_bit_equal_to_an_undisturbed_one(
    shuffle: bool, epochs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def checkpoint() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, save_top_k=-1)

    seed()
    undisturbed = run(tmp_path / "a", ModelCheckpoint(tmp_path / "kept", save_top_k=-1), shuffle=shuffle, max_epochs=4)
    seed()
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, checkpoint(), Break(5 * epochs + 3), shuffle=shuffle, max_epochs=4)
    seed(99)  # another process
    path = tmp_path / f"epoch={epochs - 1}-step={5 * epochs}.ckpt"
    resumed = run(tmp_path, checkpoint(), shuffle=shuffle, max_epochs=4, ckpt_path=path)
    assert resumed.batches[0][:2] == (epochs, 0)
    resumed.assert_goes_on(undisturbed)
    assert f"Going on from {path}: epoch {epochs}, step {5 * epochs}." in capsys.readouterr().out


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2}, {"accumulate_grad_batches": 2}])
def test_a_run_resumed_after_any_step_is_bit_equal_to_an_undisturbed_one(options: Any, tmp_path: Path) -> None:
    def checkpoint(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / name, filename="{step}", save_top_k=-1, every_n_train_steps=1)

    seed()
    undisturbed = run(tmp_path, checkpoint("first"), max_epochs=2, **options)
    steps = 6 if "accumulate_grad_batches" in options else 10
    for step in range(1, steps):
        seed(99)
        path = tmp_path / "first" / f"step={step}.ckpt"
        run(tmp_path, checkpoint(f"from{step}"), max_epochs=2, ckpt_path=path, **options).assert_goes_on(undisturbed)


def test_random_numbers_drawn_before_training_do_not_disturb_the_resumed_run(tmp_path: Path) -> None:
    class Draws(Net):
        def train_dataloader(self) -> Any:
            torch.randn(3)
            return loader(shuffle=True)

        def val_dataloader(self) -> Any:
            return loader()

        def on_fit_start(self) -> None:
            random.random()

        def on_train_start(self) -> None:
            np.random.normal()
            torch.randn(1)

    def outcome(max_epochs: int, ckpt_path: Any = None) -> Outcome:
        record, memory = Record(), Memory()
        checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", enable_version_counter=False)
        trainer = make_trainer(tmp_path, record, checkpoint, max_epochs=max_epochs, logger=memory)
        trainer.fit(Draws(), ckpt_path=ckpt_path)
        return Outcome(trainer, record, memory)

    seed()
    undisturbed = outcome(3)
    seed(99)
    outcome(3, tmp_path / "epoch=0.ckpt").assert_goes_on(undisturbed)


def test_a_finished_run_goes_on_with_a_higher_limit(tmp_path: Path) -> None:
    seed()
    undisturbed = run(tmp_path, ModelCheckpoint(tmp_path / "all", save_last=True), max_epochs=4)
    seed()
    run(tmp_path, ModelCheckpoint(tmp_path / "two", save_last=True), max_epochs=2)
    seed(99)
    checkpoint = ModelCheckpoint(tmp_path / "two", save_last=True)
    run(tmp_path, checkpoint, max_epochs=4, ckpt_path="last").assert_goes_on(undisturbed)


def test_going_on_from_the_end_trains_no_more(tmp_path: Path) -> None:
    seed()
    first = run(tmp_path, ModelCheckpoint(tmp_path, save_last=True), max_epochs=2)
    again = run(tmp_path, ModelCheckpoint(tmp_path, save_last=True), max_epochs=2, ckpt_path="last")
    assert (again.batches, again.numbers) == ([], first.numbers)
    assert same(again.weights, first.weights)


def test_best_k_are_counted_over_the_restart(tmp_path: Path) -> None:
    def trainer(max_epochs: int) -> tuple[Trainer, ModelCheckpoint]:
        checkpoint = ModelCheckpoint(tmp_path, monitor="val", save_top_k=2, filename="{epoch}", save_last=True)
        return make_trainer(tmp_path, checkpoint, max_epochs=max_epochs), checkpoint

    seed()
    trainer(2)[0].fit(Net(VALUES), loader(), loader())
    second, checkpoint = trainer(4)
    second.fit(Net(VALUES), loader(), loader(), ckpt_path="last")
    assert names(tmp_path) == ["epoch=1.ckpt", "epoch=3.ckpt", "last.ckpt"]
    assert checkpoint.best_k_models == {str(tmp_path / "epoch=1.ckpt"): 1.0, str(tmp_path / "epoch=3.ckpt"): 0.5}


def test_last_without_one_starts_anew_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(tmp_path, ModelCheckpoint(tmp_path / "none"), max_epochs=1)
    trainer.fit(Net(), loader(), loader(), ckpt_path="last")
    assert trainer.global_step == 5
    assert f"ckpt_path='last': there is none in {tmp_path / 'none'}; training starts anew." in capsys.readouterr().out


def test_last_is_found_in_the_folders_of_earlier_default_loggers(tmp_path: Path) -> None:
    for epochs, steps in ((1, 5), (3, 10)):
        checkpoint = ModelCheckpoint(save_last=True)
        record = Record()
        trainer = make_trainer(tmp_path, record, checkpoint, logger=None, max_epochs=epochs)
        trainer.fit(Net(), loader(), loader(), ckpt_path="last")
        assert len(record.batches) == steps
    assert sorted(path.parts[-3] for path in tmp_path.rglob("last.ckpt")) == ["version_0", "version_1"]


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_best_that_is_not_known_is_refused(verb: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, ModelCheckpoint(tmp_path))
    with pytest.raises(CheckpointError, match=rf"{verb}\(ckpt_path='best'\): no best checkpoint is known"):
        getattr(trainer, verb)(Evaluated(), loader(), ckpt_path="best")


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.ckpt.*no such file"):
        make_trainer(tmp_path).fit(Net(), loader(), loader(), ckpt_path=tmp_path / "nowhere.ckpt")


# evaluating


class Evaluated(Net):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("bias", self.layers[3].bias.detach())

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layers[3].bias.detach().clone()


def test_the_best_weights_are_tested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed()
    record, checkpoint = Record(), ModelCheckpoint(tmp_path, monitor="val")
    trainer = make_trainer(tmp_path, record, checkpoint, max_epochs=5)
    module = Evaluated(VALUES)
    trainer.fit(module, loader(), loader())
    best, last = (float(record.epochs[epoch]["layers.3.bias"]) for epoch in (3, 4))
    assert best != last
    assert trainer.test(module, loader()) == [{"bias": pytest.approx(last)}]
    assert trainer.test(module, loader(), ckpt_path="best") == [{"bias": pytest.approx(best)}]
    module.load_state_dict(record.epochs[4])
    assert trainer.test(dataloaders=loader()) == [{"bias": pytest.approx(best)}]
    assert f"its best checkpoint is taken, {checkpoint.best_model_path}." in capsys.readouterr().out
    module.load_state_dict(record.epochs[4])
    assert (
        trainer.predict(dataloaders=loader(), ckpt_path=checkpoint.best_model_path) == [pytest.approx(best)] * BATCHES
    )


def test_evaluation_with_a_checkpoint_leaves_the_counters_alone(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, ModelCheckpoint(tmp_path, save_top_k=-1), VALUES)
    trainer.validate(Net(VALUES), loader(), ckpt_path=tmp_path / "epoch=0-step=5.ckpt")
    assert (trainer.current_epoch, trainer.global_step) == (3, 15)


# what users add


class Keeps(Callback):
    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["kept"] = {"by": "callback", "tensor": torch.arange(3)}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.found.append(checkpoint["kept"])


class KeepsToo(Net):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["kept"]["seen_by_module"] = sorted(checkpoint["callbacks"])
        checkpoint["own"] = (1, {"a": torch.ones(2)})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.found = checkpoint["own"]


def test_hooks_add_to_the_checkpoint_and_get_it_back(tmp_path: Path) -> None:
    make_trainer(tmp_path, Record(), Keeps(), ModelCheckpoint(tmp_path, save_last=True), max_epochs=1).fit(
        KeepsToo(), loader(), loader()
    )
    keeps, module = Keeps(), KeepsToo()
    make_trainer(tmp_path, Record(), keeps, ModelCheckpoint(tmp_path, save_last=True), max_epochs=2).fit(
        module, loader(), loader(), ckpt_path="last"
    )
    assert len(keeps.found) == 1
    assert keeps.found[0]["by"] == "callback"
    assert torch.equal(keeps.found[0]["tensor"], torch.arange(3))
    assert [key.split("{")[0] for key in keeps.found[0]["seen_by_module"]] == ["ModelCheckpoint", "Record"]
    assert same(module.found, (1, {"a": torch.ones(2)}))


def test_the_state_of_callbacks_that_are_gone_is_announced(tmp_path: Path) -> None:
    fit(tmp_path, ModelCheckpoint(tmp_path, save_last=True), VALUES, max_epochs=1)
    trainer = make_trainer(tmp_path, ModelCheckpoint(tmp_path, save_last=True), max_epochs=2)
    with pytest.warns(LeydenWarning, match=r"LEY-callback-state.*does not have: Record"):
        trainer.fit(Net(VALUES), loader(), loader(), ckpt_path="last")


class Unsaveable(Net):
    broken = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.broken:
            checkpoint["own"] = {"open": [object()]}


def test_a_value_that_cannot_be_stored_is_refused_with_its_key_and_the_old_file_stays(tmp_path: Path) -> None:
    seed()
    trainer = make_trainer(tmp_path, max_epochs=1)
    module = Unsaveable()
    trainer.fit(module, loader(), loader())
    path = tmp_path / "mine.ckpt"
    trainer.save_checkpoint(path)
    before = path.read_bytes()
    module.broken = True
    with pytest.raises(CheckpointError, match=r"own\.open\.0: a value of type builtins\.object cannot be written"):
        trainer.save_checkpoint(path)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["mine.ckpt"]


def test_a_failed_save_in_fit_keeps_the_best_and_the_last(tmp_path: Path) -> None:
    class Later(Unsaveable):
        def on_train_epoch_start(self) -> None:
            self.broken = self.current_epoch == 1

    seed()
    checkpoint = ModelCheckpoint(tmp_path, monitor="val", save_last=True)
    with pytest.raises(CheckpointError, match=r"own\.open\.0"):
        make_trainer(tmp_path, checkpoint).fit(Later(VALUES), loader(), loader())
    assert names(tmp_path) == ["epoch=0-step=5.ckpt", "last.ckpt"]
    assert checkpoint.best_model_path == str(tmp_path / "epoch=0-step=5.ckpt")
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 5
