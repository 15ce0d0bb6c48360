"""What Lightning saved, leyden goes on with: files are made by the installed Lightning, or as older versions made them."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import leyden as L
from leyden.checkpoint.format import read_about
from leyden.compat.convert import convert
from leyden.compat.hparams_file import read_hparams_file
from leyden.errors import CheckpointError, LeydenWarning
from lightning_files import BATCHES, data, difference, leyden_fit, lightning_fit, net, saver, without_remarks
from quiet import make_trainer

# Of how many epochs a file is of is what each library counts; the runs are on CPU, on the same unshuffled data.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Adam": ({}, {}),
    "SGD with momentum, StepLR by epoch": ({"optimizer": "SGD", "momentum": 0.9, "schedule": "StepLR"}, {}),
    "OneCycleLR by step": ({"schedule": "OneCycleLR"}, {}),
    "accumulated": ({"schedule": "OneCycleLR"}, {"accumulate_grad_batches": 3}),
    "clipped": ({"lr": 0.1}, {"gradient_clip_val": 0.05}),
    "validated": ({"optimizer": "AdamW", "weight_decay": 0.1, "schedule": "StepLR"}, {"validate": True}),
}


def bases(lightning: Any, validates: bool = False) -> tuple[Any, Any]:
    return net(lightning.LightningModule, validates), net(L.LightningModule, validates)


def like(path: Path, **options: Any) -> L.callbacks.ModelCheckpoint:
    """The same callback as `saver`'s, elsewhere."""
    return L.callbacks.ModelCheckpoint(path, filename="{step}", **({"save_top_k": -1, "monitor": "step"} | options))


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("when", ["at epochs", "within epochs", "afterwards"])
def test_training_goes_on_as_if_lightning_had_not_stopped(name: str, when: str, lightning: Any, tmp_path: Path) -> None:
    hparams, options = RUNS[name]
    theirs, ours = bases(lightning, bool(options.get("validate")))
    window = options.get("accumulate_grad_batches", 1)
    trigger = {"every_n_train_steps": 1 if window > 1 else 4} if when == "within epochs" else {}
    trainer = lightning_fit(tmp_path, theirs(**hparams), saver(tmp_path / when, **trigger), max_epochs=2, **options)
    if when == "afterwards":
        with without_remarks():
            trainer.save_checkpoint(tmp_path / when / "after.ckpt")
    whole = theirs(**hparams)
    steps = lightning_fit(tmp_path, whole, max_epochs=4, **options).global_step
    assert steps == 4 * BATCHES // window
    files = sorted((tmp_path / when).glob("*.ckpt"))
    assert len(files) >= 2
    for file in files:
        model, callback = ours(**hparams), like(tmp_path / "ours", **trigger)
        arguments = {"ckpt_path": file, "max_epochs": 4, "fused_optimizer": False, **options}
        if read_about(file).global_step % (BATCHES // window):
            with pytest.warns(LeydenWarning, match=r"\[LEY-left-out\].*in the middle of epoch"):
                done = leyden_fit(tmp_path / "ours", model, callback, **arguments)
        else:
            done = leyden_fit(tmp_path / "ours", model, callback, **arguments)
        assert (done.global_step, done.current_epoch) == (steps, 4)
        assert difference(model, whole) == 0.0  # bit-equal, with the same kernels


def test_with_leydens_fused_optimizer_it_is_equal_to_rounding(lightning: Any, tmp_path: Path) -> None:
    theirs, ours = bases(lightning)
    lightning_fit(tmp_path, theirs(), saver(tmp_path), max_epochs=1)
    whole, model = theirs(), ours()
    lightning_fit(tmp_path, whole, max_epochs=3)
    leyden_fit(tmp_path / "ours", model, like(tmp_path / "ours"), ckpt_path=tmp_path / "step=6.ckpt", max_epochs=3)
    assert difference(model, whole) < 1e-6


def test_weights_and_hyperparameters(lightning: Any, tmp_path: Path) -> None:
    theirs, ours = bases(lightning)
    made = theirs(hidden=7, lr=0.01)
    with without_remarks():
        trainer = lightning_fit(tmp_path, made, saver(tmp_path))
        expected = trainer.test(made, data(), verbose=False)
    file = tmp_path / "step=6.ckpt"
    model = ours.load_from_checkpoint(str(file))
    assert difference(model, made) == 0.0
    assert (model.hparams.hidden, model.hparams.lr) == (7, 0.01)
    assert ours.load_from_checkpoint(str(file), lr=0.5).hparams.lr == 0.5
    found = make_trainer(tmp_path).test(ours(hidden=7), data(), ckpt_path=file)
    assert found[0]["test_loss"] == pytest.approx(expected[0]["test_loss"], rel=1e-6)
    assert make_trainer(tmp_path).validate(net(L.LightningModule, True)(hidden=7), data(), ckpt_path=file)
    assert len(make_trainer(tmp_path).predict(Predicts(hidden=7), data(), ckpt_path=file)) == BATCHES


class Predicts(net(L.LightningModule)):  # type: ignore[misc]
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layers(batch[0])


def test_a_file_without_the_state_of_a_training_says_so(lightning: Any, tmp_path: Path) -> None:
    theirs, ours = bases(lightning)
    lightning_fit(tmp_path, theirs(), saver(tmp_path, save_weights_only=True))
    with pytest.raises(CheckpointError, match=r"step=6\.ckpt holds weights only.*load_state_dict"):
        leyden_fit(tmp_path, ours(), ckpt_path=tmp_path / "step=6.ckpt", max_epochs=2)


# Callbacks, datamodules, what users add


def test_callbacks_go_on(lightning: Any, tmp_path: Path) -> None:
    theirs, ours = bases(lightning, validates=True)
    with without_remarks():
        from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2, save_last=True)
    stopping = EarlyStopping("val_loss", patience=4, min_delta=100.0)
    lightning_fit(tmp_path, theirs(), best, stopping, Timer(), max_epochs=3, validate=True)
    here = L.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2, save_last=True)
    stops = L.callbacks.EarlyStopping("val_loss", patience=4, min_delta=100.0)
    timer = L.callbacks.Timer()
    seen: dict[str, Any] = {}

    class Looks(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.update(best=here.best_model_path, score=here.best_model_score, kept=dict(here.best_k_models))
            seen.update(last=here.last_model_path, waited=stops.wait_count, elapsed=timer.time_elapsed("train"))

    trainer = leyden_fit(
        tmp_path, ours(), here, stops, timer, Looks(), ckpt_path=tmp_path / "last.ckpt", max_epochs=9, validate=True
    )
    assert seen["best"] == best.best_model_path
    assert float(seen["score"]) == float(best.best_model_score)
    assert {path: float(score) for path, score in seen["kept"].items()} == {
        path: float(score) for path, score in best.best_k_models.items()
    }
    assert seen["last"] == best.last_model_path == str(tmp_path / "last.ckpt")
    assert seen["waited"] == stopping.wait_count == 2
    assert seen["elapsed"] > 0
    assert trainer.current_epoch == 5  # two checks more: the best score of the first one is far from beaten
    assert stops.wait_count == 4
    kept = [Path(path).name for path in here.best_k_models]
    assert len(kept) == 2
    assert all((tmp_path / name).exists() for name in kept)


def test_in_another_folder_only_the_best_is_remembered(lightning: Any, tmp_path: Path) -> None:
    theirs, ours = bases(lightning)
    lightning_fit(tmp_path, theirs(), saver(tmp_path, monitor=None, save_top_k=1))
    here = like(tmp_path / "new", monitor=None, save_top_k=1)
    model = ours()
    trainer = leyden_fit(tmp_path / "new", model, here, ckpt_path=tmp_path / "step=6.ckpt", max_epochs=1)
    assert here.best_model_path == str(tmp_path / "step=6.ckpt")
    assert trainer.global_step == 6
    leyden_fit(tmp_path / "new", model, here, ckpt_path=tmp_path / "step=6.ckpt", max_epochs=2)
    assert here.best_model_path == str(tmp_path / "new" / "step=12.ckpt")
    assert (tmp_path / "step=6.ckpt").exists()


def test_what_no_callback_takes_is_named(lightning: Any, tmp_path: Path) -> None:
    theirs, ours = bases(lightning)

    class Counts(lightning.Callback):  # type: ignore[misc, name-defined]
        def state_dict(self) -> dict[str, Any]:
            return {"count": 3}

    lightning_fit(tmp_path, theirs(), saver(tmp_path), Counts())
    with pytest.warns(LeydenWarning, match=rf"callback-state.*{Counts.__qualname__}"):
        leyden_fit(tmp_path, ours(), like(tmp_path / "new"), ckpt_path=tmp_path / "step=6.ckpt")


def datamodule(base: Any) -> Any:
    class Rows(base):  # type: ignore[misc]
        def __init__(self, size: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.epochs = 0

        def train_dataloader(self) -> Any:
            return data()

        def state_dict(self) -> dict[str, Any]:
            return {"epochs": self.epochs}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.epochs = state_dict["epochs"]

    Rows.__qualname__ = "Rows"
    return Rows


def adding(base: Any) -> Any:
    class Adds(net(base)):  # type: ignore[misc]
        loaded = None

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = {"table": torch.arange(3), "name": "ä"}

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.loaded = checkpoint

    return Adds


def test_datamodules_and_what_hooks_added(lightning: Any, tmp_path: Path) -> None:
    rows = datamodule(lightning.LightningDataModule)(size=9)
    rows.epochs = 5
    lightning_fit(tmp_path, adding(lightning.LightningModule)(), saver(tmp_path), datamodule=rows)
    file = tmp_path / "step=6.ckpt"
    ours = datamodule(L.LightningDataModule)
    assert ours.load_from_checkpoint(str(file)).hparams.size == 9
    model, mine = adding(L.LightningModule)(), ours()
    leyden_fit(tmp_path, model, like(tmp_path / "new"), ckpt_path=file, datamodule=mine)
    assert mine.epochs == 5
    assert model.loaded["mine"]["name"] == "ä"
    assert model.loaded["mine"]["table"].tolist() == [0, 1, 2]
    assert "optimizer_states" in model.loaded
    assert "loops" not in model.loaded


@pytest.mark.parametrize("per_batch", [1, 2])
def test_steps_of_several_optimizers_count_once(per_batch: int, lightning: Any, tmp_path: Path) -> None:
    def two(base: Any) -> Any:
        class Two(base):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False
                self.a, self.b = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)

            def training_step(self, batch: Any, batch_idx: int) -> None:
                for _ in range(per_batch):
                    for part, optimizer in zip((self.a, self.b), self.optimizers(), strict=True):
                        optimizer.zero_grad()
                        self.manual_backward(part(batch[0]).square().mean())
                        optimizer.step()

            def configure_optimizers(self) -> Any:
                return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.a, self.b)]

        return Two

    theirs = lightning_fit(
        tmp_path, two(lightning.LightningModule)(), saver(tmp_path, every_n_train_steps=2), max_epochs=2
    )
    assert theirs.global_step == 2 * BATCHES * 2 * per_batch
    files = sorted(tmp_path.glob("*.ckpt"), key=lambda file: file.stat().st_mtime)
    # at each of Lightning's saves one batch was done more, which is a step of leyden's
    assert [read_about(file).global_step for file in files] == list(range(1, 2 * BATCHES + 1))
    here = like(tmp_path / "new", every_n_train_steps=2)
    trainer = leyden_fit(tmp_path, two(L.LightningModule)(), here, ckpt_path=files[-1], max_epochs=3)
    assert trainer.global_step == 3 * BATCHES


def test_the_loss_scaler(tmp_path: Path) -> None:
    state = {
        "scale": 1024.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 3,
    }
    for key in ("MixedPrecision", "MixedPrecisionPlugin", "NativeMixedPrecisionPlugin", "native_amp_scaling_state"):
        torch.save(old_file(**{key: state}), tmp_path / "a.ckpt")
        assert L.load_checkpoint(tmp_path / "a.ckpt")["scaler"] == state
        assert key not in L.load_checkpoint(tmp_path / "a.ckpt")
        assert "scaler" not in L.load_checkpoint(tmp_path / "a.ckpt", weights_only=True)


# Older versions. The structures are those of files that pytorch-lightning 1.9.5, 1.5.10, 1.0.8 and 0.7.6 wrote for `net`, looked
# at key by key; leyden went on from those files with the weights of an unbroken training of these versions, bit for bit.


def counts(ready: int, started: int, processed: int, completed: int) -> dict[str, int]:
    return {"ready": ready, "started": started, "processed": processed, "completed": completed}


def moves(number: int) -> dict[str, Any]:
    return {"total": {"ready": number, "completed": number}, "current": {"ready": number, "completed": number}}


def loops_of_1_9(
    epochs: dict[str, int], batch: dict[str, int], total: dict[str, int], last: bool, steps: int
) -> dict[str, Any]:
    return {
        "state_dict": {},
        "epoch_loop.state_dict": {"_batches_that_stepped": steps},
        "epoch_loop.batch_progress": {"total": total, "current": batch, "is_last_batch": last},
        "epoch_loop.scheduler_progress": moves(1),
        "epoch_loop.batch_loop.state_dict": {},
        "epoch_loop.batch_loop.optimizer_loop.state_dict": {},
        "epoch_loop.batch_loop.optimizer_loop.optim_progress": {
            "optimizer": {"step": moves(steps), "zero_grad": moves(steps)},
            "optimizer_position": 1,
        },
        "epoch_loop.batch_loop.manual_loop.state_dict": {},
        "epoch_loop.batch_loop.manual_loop.optim_step_progress": moves(0),
        "epoch_progress": {"total": epochs, "current": epochs},
    }


def old_file(**more: Any) -> dict[str, Any]:
    """What every version has saved, of `net` after one epoch of Adam."""
    model = net(L.LightningModule)()
    optimizer = model.configure_optimizers()
    for batch in data():
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
    return {
        "epoch": 1,
        "global_step": BATCHES,
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        **more,
    }


def by_hand(epochs: int) -> Any:
    """`net` trained with Adam and no framework."""
    model = net(L.LightningModule)()
    optimizer = model.configure_optimizers()
    for _ in range(epochs):
        for batch in data():
            optimizer.zero_grad()
            model.loss(batch).backward()
            optimizer.step()
    return model


KEY_1_9 = (
    "ModelCheckpoint{'monitor': None, 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1, "
    "'train_time_interval': None}"
)
KEY_1_8 = KEY_1_9.replace("None}", "None, 'save_on_train_epoch_end': True}")
SAVED = {
    "monitor": None,
    "best_model_score": None,
    "best_model_path": "/old/a.ckpt",
    "current_score": None,
    "dirpath": "/old",
}
DONE = counts(BATCHES, BATCHES, BATCHES, BATCHES)
OLD: dict[str, dict[str, Any]] = {
    "1.9 at an epoch's end": {
        "epoch": 0,
        "pytorch-lightning_version": "1.9.5",
        "loops": {"fit_loop": loops_of_1_9(counts(1, 1, 1, 0), DONE, DONE, True, BATCHES)},
        "callbacks": {KEY_1_9: SAVED},
    },
    "1.9 after the validation": {
        "epoch": 0,
        "pytorch-lightning_version": "1.9.5",
        "loops": {"fit_loop": loops_of_1_9(counts(1, 1, 0, 0), DONE, DONE, True, BATCHES)},
        "callbacks": {KEY_1_9: SAVED},
    },
    "1.6 after the training": {
        "pytorch-lightning_version": "1.6.0",
        "loops": {"fit_loop": loops_of_1_9(counts(1, 1, 1, 1), DONE, DONE, True, BATCHES)},
        "callbacks": {KEY_1_8: SAVED},
    },
    "1.5, where the loops' counters lag": {
        "pytorch-lightning_version": "1.5.10",
        "loops": {"fit_loop": {"epoch_progress": {"current": counts(0, 0, 0, 0)}, "epoch_loop.batch_progress": {}}},
        "callbacks": {KEY_1_8: SAVED},
        "hparams_name": "kwargs",
        "hyper_parameters": {"hidden": 5},
    },
    "1.0": {
        "pytorch-lightning_version": "1.0.8",
        "callbacks": {"ModelCheckpoint": {"best_model_score": 0, "best_model_path": "/old/a.ckpt"}},
    },
    "0.9": {
        "pytorch-ligthning_version": "0.9.0",
        "checkpoint_callback_best_model_score": 0.5,
        "checkpoint_callback_best_model_path": "/old/a.ckpt",
    },
    "0.7": {"hparams": {"hidden": 5}, "hparams_type": "Namespace"},
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_older_versions(name: str, legacy: bool, tmp_path: Path) -> None:
    torch.save(old_file(**OLD[name]), tmp_path / "a.ckpt", _use_new_zipfile_serialization=not legacy)
    about = read_about(tmp_path / "a.ckpt")
    assert (about.global_step, about.resumable) == (BATCHES, True)
    model, checkpoints = net(L.LightningModule)(), L.callbacks.ModelCheckpoint(tmp_path / "new")
    trainer = leyden_fit(
        tmp_path, model, checkpoints, ckpt_path=tmp_path / "a.ckpt", max_epochs=3, fused_optimizer=False
    )
    assert (trainer.current_epoch, trainer.global_step) == (3, 3 * BATCHES)
    assert difference(model, by_hand(3)) == 0.0


def test_callbacks_as_classes_are_names(lightning: Any, tmp_path: Path) -> None:
    # versions before 1.5 had the classes themselves as keys
    with without_remarks():
        from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
    states = {
        ModelCheckpoint: {"best_model_path": "/old/a.ckpt", "best_model_score": torch.tensor(0.25), "monitor": "val_loss",
                          "dirpath": "/old"},
        EarlyStopping: {"wait_count": 2, "stopped_epoch": 0, "best_score": torch.tensor(0.25), "patience": 3},
    }  # fmt: skip
    torch.save(old_file(callbacks=states, **{"pytorch-lightning_version": "1.4.9"}), tmp_path / "a.ckpt")
    best = L.callbacks.ModelCheckpoint(tmp_path / "new", monitor="val_loss")
    stops = L.callbacks.EarlyStopping("val_loss", patience=3)
    seen = []

    class Looks(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append((stops.wait_count, float(stops.best_score)))

    leyden_fit(
        tmp_path,
        net(L.LightningModule, True)(),
        best,
        stops,
        Looks(),
        ckpt_path=tmp_path / "a.ckpt",
        max_epochs=2,
        validate=True,
    )
    assert seen == [(2, 0.25)]
    found = L.load_checkpoint(tmp_path / "a.ckpt")["callbacks"]
    assert found["ModelCheckpoint"]["inherited"] == [0.25, "/old/a.ckpt"]


def test_counters_of_0_7_that_say_too_little_are_named(tmp_path: Path) -> None:
    torch.save(
        old_file(early_stop_callback_wait=1, early_stop_callback_patience=3, checkpoint_callback_best=0.5),
        tmp_path / "a.ckpt",
    )
    with pytest.warns(LeydenWarning) as warned:
        leyden_fit(tmp_path, net(L.LightningModule)(), ckpt_path=tmp_path / "a.ckpt", max_epochs=2)
    text = "\n".join(str(each.message) for each in warned)
    assert "EarlyStopping" in text
    assert "ModelCheckpoint" in text
    assert "early_stop_callback_wait" not in L.load_checkpoint(tmp_path / "a.ckpt")


class AsOne(L.LightningModule):
    def __init__(self, hparams: Any) -> None:
        super().__init__()
        self.given = hparams
        self.layer = torch.nn.Linear(hparams.inputs, 1)


@pytest.mark.parametrize(
    "saved",
    [
        {"hparams": {"inputs": 3, "name": "x"}, "hparams_type": "Namespace"},
        {"hparams": argparse.Namespace(inputs=3, name="x")},
        {"hyper_parameters": {"inputs": 3, "name": "x"}, "hparams_name": "hparams"},
    ],
    ids=["0.7", "a Namespace", "2.x"],
)
def test_hyperparameters_that_were_one_argument(saved: dict[str, Any], tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {"layer.weight": torch.ones(1, 3), "layer.bias": torch.ones(1)}, "global_step": 1, **saved},
        tmp_path / "a.ckpt",
    )
    model = AsOne.load_from_checkpoint(str(tmp_path / "a.ckpt"))
    assert model.given.name == "x"
    assert isinstance(model.given, argparse.Namespace) is ("hparams" in saved)
    assert model.layer.bias.item() == 1.0


def test_dicts_with_attributes_and_configurations(lightning: Any, tmp_path: Path) -> None:
    with without_remarks():
        from lightning.fabric.utilities.data import AttributeDict
    given = {"hyper_parameters": AttributeDict(lr=0.1, nested=AttributeDict(depth=2)), "_class_path": "x.Y"}
    torch.save({"state_dict": {}, "global_step": 1, **given}, tmp_path / "a.ckpt")
    found = L.load_checkpoint(tmp_path / "a.ckpt")["hyper_parameters"]
    assert found["nested"].depth == 2
    assert type(found["nested"]).__module__ == "leyden.hparams"


def test_configurations_of_omegaconf_without_omegaconf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # its containers keep their items under _content, its values theirs under _val, and both more about themselves
    made = {}
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    for module, name in (
        ("dictconfig", "DictConfig"),
        ("listconfig", "ListConfig"),
        ("nodes", "AnyNode"),
        ("base", "Metadata"),
    ):
        made[name] = type(name, (), {"__module__": f"omegaconf.{module}"})
        holder = types.ModuleType(f"omegaconf.{module}")
        setattr(holder, name, made[name])
        monkeypatch.setitem(sys.modules, f"omegaconf.{module}", holder)

    def new(kind: str, **state: Any) -> Any:
        value = made[kind]()
        vars(value).update(state, _metadata=made["Metadata"](), _parent=None)
        return value

    layers = new("ListConfig", _content=[new("AnyNode", _val=8), new("AnyNode", _val="${lr}")])
    config = new(
        "DictConfig", _content={"lr": new("AnyNode", _val=0.1), "layers": layers, "type": new("AnyNode", _val=int)}
    )
    vars(layers)["_parent"] = config  # each knows what it is in
    saved = {"state_dict": {}, "global_step": 1, "hyper_parameters": config, "hparams_type": made["DictConfig"]}
    torch.save(saved, tmp_path / "a.ckpt")
    for name in [name for name in sys.modules if name.startswith("omegaconf")]:
        monkeypatch.delitem(sys.modules, name)
    found = L.load_checkpoint(tmp_path / "a.ckpt")
    assert found["hyper_parameters"] == {"lr": 0.1, "layers": [8, "${lr}"], "type": "int"}
    assert not [name for name in sys.modules if name.startswith("omegaconf")]


@pytest.mark.parametrize(
    "wrong",
    [
        {"global_step": "many"},
        {"epoch": "x", "optimizer_states": []},
        {
            "loops": {"fit_loop": {"epoch_progress": 1, "epoch_loop.batch_progress": 2}},
            "pytorch-lightning_version": "2.0.0",
        },
        {"optimizer_states": [], "callbacks": {"A": {"wait_count": "x", "best_score": 1, "stopped_epoch": 0}}},
        {"hyper_parameters": 7},
        {"hparams": [1]},
        {"hyper_parameters": {1: 2}},
        {"global_step": math.inf},
        {"global_step": -5},
        {"epoch": 10**30},
        {"epoch": True},
        {"loops": {"fit_loop": {"epoch_progress": {"current": counts(1, 1, 1, -3)},
                                "epoch_loop.batch_progress": {"current": DONE, "total": DONE}}},
         "pytorch-lightning_version": "2.0.0"},
        {"state_dict": {1: torch.ones(1)}},
        {"optimizer_states": range(10**9)},
        {"optimizer_states": [], "lr_schedulers": range(10**9)},
        {"optimizer_states": [], "callbacks": [1]},
        {"optimizer_states": [], "callbacks": {"M": {"best_model_path": ["a"], "dirpath": ""}}},
        {"optimizer_states": [], "callbacks": {"M": {"best_model_path": "a", "dirpath": "", "best_model_score": "x"}}},
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_structure_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "global_step": 1, **wrong}, tmp_path / "a.ckpt")
    with pytest.raises(
        CheckpointError, match=r"a\.ckpt: it has keys of a checkpoint of Lightning, but not its structure: (\w|\.)+"
    ):
        L.load_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("steps", [math.inf, "many", -5, 10**30])
def test_a_counter_that_is_none_is_named_with_its_value(steps: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "global_step": steps}, tmp_path / "a.ckpt")
    for reads in (L.load_checkpoint, read_about):
        with pytest.raises(CheckpointError, match=rf"global_step is {re.escape(repr(steps))}, not a whole number"):
            reads(tmp_path / "a.ckpt")


def test_counters_of_other_types_are_read(tmp_path: Path) -> None:
    for steps in (torch.tensor(7), np.int64(7), 7.0):
        torch.save({"state_dict": {}, "global_step": steps}, tmp_path / "a.ckpt")
        assert L.load_checkpoint(tmp_path / "a.ckpt")["global_step"] == read_about(tmp_path / "a.ckpt").global_step == 7


def test_only_files_with_lightnings_keys_are_said_to_have_them(tmp_path: Path) -> None:
    torch.save({"state_dict": {1: torch.ones(1)}}, tmp_path / "a.ckpt")
    with pytest.raises(
        CheckpointError, match=r"a\.ckpt: its state_dict has the key 1, and names of weights are strings"
    ):
        L.load_checkpoint(tmp_path / "a.ckpt")


# What a user added under a name that leyden has for its own


ADDED: dict[str, Any] = {
    "metrics": {"acc": 0.9}, "run_id": "mine-1", "random_state": {"python": (3, (1, 2), None)}, "should_stop": True,
    "loggers": 5, "other_ranks": [1], "compiled": True, "loader_states": {"train": 1}, "optimizer_windows": [1],
    "rng": torch.arange(4),
}  # fmt: skip
LOST: dict[str, Any] = {
    "scaler": {"mean": [1.0]}, "progress": 0.5, "left_out": "val", "added_keys": 7, "hparams_omitted": {"x": 1},
    "current_model_state": {"layers.0.weight": torch.ones(1)},
}  # fmt: skip


@pytest.mark.parametrize("converted", [False, True])
def test_what_users_added_reaches_hooks_and_steers_nothing(converted: bool, tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    torch.save(old_file(**ADDED), file)
    if converted:
        convert(file, tmp_path / "b.ckpt")
        file = tmp_path / "b.ckpt"
    seen: dict[str, Any] = {}

    class Looks(net(L.LightningModule)):  # type: ignore[misc]
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            seen.update(checkpoint)

    model = Looks()
    trainer = leyden_fit(tmp_path, model, ckpt_path=file, max_epochs=3, fused_optimizer=False)
    assert trainer.global_step == 3 * BATCHES
    assert difference(model, by_hand(3)) == 0.0
    assert seen["metrics"] == {"acc": 0.9}
    assert all(seen[key] == ADDED[key] for key in ADDED if key != "rng")
    assert seen["rng"].tolist() == [0, 1, 2, 3]
    Looks.load_from_checkpoint(str(file))
    make_trainer(tmp_path).test(Looks(), data(), ckpt_path=file)


@pytest.mark.parametrize("key", LOST)
def test_what_users_added_under_a_name_that_is_taken_is_told(key: str, tmp_path: Path) -> None:
    lost = {key: LOST[key], **({"scaler": 1} if key == "left_out" else {})}
    torch.save(old_file(**lost), tmp_path / "a.ckpt")
    model = net(L.LightningModule)()
    averages = L.callbacks.WeightAveraging()
    with pytest.warns(LeydenWarning) as warned:
        leyden_fit(tmp_path, model, averages, ckpt_path=tmp_path / "a.ckpt", max_epochs=2, fused_optimizer=False)
    text = "\n".join(str(each.message) for each in warned)
    assert all(f"{name!r}, which is no key of Lightning" in text for name in lost)
    assert "of another library" in text


def test_a_users_word_for_the_averages_is_no_weights(tmp_path: Path) -> None:
    torch.save(old_file(left_out="val"), tmp_path / "a.ckpt")
    leyden_fit(tmp_path, net(L.LightningModule)(), ckpt_path=tmp_path / "a.ckpt", max_epochs=2)  # and no warning
    theirs = {"current_model_state": {"w": torch.ones(1)}, "averaging_state": {"n": 1}}
    torch.save(old_file(**theirs), tmp_path / "a.ckpt")
    assert L.load_checkpoint(tmp_path / "a.ckpt")["current_model_state"]["w"] == 1


def test_states_of_callbacks_are_known_by_what_their_classes_save(tmp_path: Path) -> None:
    users = {
        "MyStopper": {"wait_count": 2, "best_score": torch.tensor(1.0), "patience": 3, "history": [1, 2, 3]},
        "MyKeeper": {"best_model_path": "a", "mine": 5},
        "Other": {"latest_update_step": 4},
    }
    torch.save(old_file(callbacks=users), tmp_path / "a.ckpt")
    found = L.load_checkpoint(tmp_path / "a.ckpt")
    assert found["callbacks"] == users
    assert "left_out" not in found
    more = {
        "Stops": {"wait_count": 2, "best_score": torch.tensor(1.0), "stopped_epoch": 0, "patience": 3, "seen": 7},
        "Keeps": {**SAVED, "best_k_models": {}, "kth_value": None, "mine": 5},
    }
    torch.save(old_file(callbacks=more), tmp_path / "a.ckpt")
    found = L.load_checkpoint(tmp_path / "a.ckpt")["callbacks"]
    assert found["Stops"]["seen"] == 7
    assert found["Stops"]["limits"] == {"patience": 3}
    assert "patience" not in found["Stops"]
    assert found["Keeps"]["mine"] == 5
    assert "kth_value" not in found["Keeps"]
    assert found["Keeps"]["history"] == [[6.0, "/old/a.ckpt"]]


def test_a_window_that_lightning_had_begun_is_told(lightning: Any, tmp_path: Path) -> None:
    theirs, ours = bases(lightning)

    class Saves(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{args[3]}.ckpt")

    lightning_fit(tmp_path, theirs(), Saves(), accumulate_grad_batches=3)
    for batch_idx, begun in ((1, 2), (2, 0), (3, 1)):
        with pytest.warns(LeydenWarning) as warned:
            leyden_fit(tmp_path, ours(), ckpt_path=tmp_path / f"{batch_idx}.ckpt", accumulate_grad_batches=3)
        told = [str(each.message) for each in warned if "that were accumulated" in str(each.message)]
        assert len(told) == bool(begun)
        assert all(f"gradients of {begun} of 3 batches" in message for message in told)


# Hyperparameters in files


WRONG: dict[str, tuple[str, str, str]] = {
    "a large cell": ("a.csv", "k,v\na," + "x" * 200_000 + "\n", "field larger than field limit"),
    "brackets": ("a.yaml", "a: " + "[" * 5000, "cannot be read: RecursionError"),
    "a number as name": ("a.yaml", "1: 2\n", "the name 1 is not a string"),
    "no date": ("a.yaml", "a: 2020-99-99\n", "cannot be read: ValueError"),
    "a list as name": ("a.yaml", "? [1]\n: 2\n", "cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_of_hyperparameters_are_refused(name: str, tmp_path: Path) -> None:
    file, text, pattern = WRONG[name]
    if file.endswith("yaml"):
        pytest.importorskip("yaml", reason="YAML files are read with PyYAML")
    torch.save({"state_dict": {}, "global_step": 1}, tmp_path / "a.ckpt")
    (tmp_path / file).write_text(text)
    for module in (AsOne, net(L.LightningModule)):
        with pytest.raises(CheckpointError, match=rf"{re.escape(file)}.*{pattern}"):
            module.load_from_checkpoint(str(tmp_path / "a.ckpt"), hparams_file=str(tmp_path / file))


@pytest.mark.parametrize("signs", [5000, 50_000])
def test_a_cell_that_is_nested_without_end_is_text_or_refused(signs: int, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("k,v\na," + "-" * signs + "1\nb,2\n")
    try:
        assert read_hparams_file(tmp_path / "a.csv", net(L.LightningModule)) == {"a": "-" * signs + "1", "b": 2}
    except CheckpointError as error:
        assert "a.csv cannot be read" in str(error)  # noqa: PT017 the interpreter's parser decides


# Weights of others


def test_state_dicts(tmp_path: Path) -> None:
    model = net(L.LightningModule)()
    for legacy in (False, True):
        torch.save(by_hand(1).state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
        found = L.load_checkpoint(tmp_path / "w.pt")
        assert list(found) == ["state_dict"]
        make_trainer(tmp_path).test(model, data(), ckpt_path=tmp_path / "w.pt")
        assert difference(model, by_hand(1)) == 0.0
        assert difference(net(L.LightningModule).load_from_checkpoint(str(tmp_path / "w.pt")), by_hand(1)) == 0.0
        with pytest.raises(CheckpointError, match=r"w\.pt holds weights only.*load_state_dict"):
            leyden_fit(tmp_path, model, ckpt_path=tmp_path / "w.pt")
        assert not read_about(tmp_path / "w.pt").resumable


def test_other_files_of_torch_save_say_what_to_do(tmp_path: Path) -> None:
    torch.save({"model": by_hand(0).state_dict(), "steps": 3}, tmp_path / "w.pt")
    with pytest.raises(
        CheckpointError, match=r"w\.pt: neither .* its keys are 'model', 'steps'.*foreign\.read\(path\)\['model'\]"
    ):
        L.load_checkpoint(tmp_path / "w.pt")
    torch.save(torch.ones(2), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a state dict"):
        L.load_checkpoint(tmp_path / "w.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*safe_globals"):
        L.load_checkpoint(tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("w/data.pkl", b"")
        archive.writestr("w/constants.pkl", b"")
    with pytest.raises(CheckpointError, match=r"TorchScript.*torch\.jit\.load"):
        L.load_checkpoint(tmp_path / "w.pt")


def hub_folder(folder: Path, shards: int) -> Any:
    """A folder as model hubs have it, written by the safetensors library."""
    from safetensors.torch import save_file

    folder.mkdir()
    model = by_hand(1)
    weights = model.state_dict()
    if not shards:
        save_file(weights, folder / "model.safetensors")
        return model
    names = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(weights)}
    for file in set(names.values()):
        save_file({name: weights[name] for name in names if names[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_folders_of_model_hubs(shards: int, tmp_path: Path) -> None:
    expected = hub_folder(tmp_path / "hub", shards)
    places = [tmp_path / "hub"] if shards else [tmp_path / "hub", tmp_path / "hub" / "model.safetensors"]
    for place in places:
        assert set(L.load_checkpoint(place)["state_dict"]) == set(expected.state_dict())
        model = net(L.LightningModule)()
        make_trainer(tmp_path).test(model, data(), ckpt_path=place)
        assert difference(model, expected) == 0.0
        assert difference(net(L.LightningModule).load_from_checkpoint(str(place)), expected) == 0.0
        with pytest.raises(CheckpointError, match="holds weights only"):
            leyden_fit(tmp_path, model, ckpt_path=place)


@pytest.mark.parametrize(
    ("index", "pattern"),
    [
        ("{", "malformed"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', r"names the file '\.\./secret\.safetensors'"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names the file"),
        ('{"weight_map": {"a": "model-00002-of-00003.safetensors"}}', "is not in model-00002"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "shard gone.safetensors is missing"),
    ],
)
def test_a_wrong_index_is_refused(index: str, pattern: str, tmp_path: Path) -> None:
    hub_folder(tmp_path / "hub", 3)
    (tmp_path / "hub" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=rf"hub: .*{pattern}"):
        L.load_checkpoint(tmp_path / "hub")


def test_the_best_score_may_be_infinite(tmp_path: Path) -> None:
    state = {"wait_count": 0, "stopped_epoch": 0, "best_score": torch.tensor(math.inf), "patience": 3}
    torch.save(old_file(callbacks={"EarlyStopping{'monitor': 'loss', 'mode': 'min'}": state}), tmp_path / "a.ckpt")
    stops = L.callbacks.EarlyStopping("loss")
    leyden_fit(tmp_path, net(L.LightningModule)(), stops, ckpt_path=tmp_path / "a.ckpt", max_epochs=2)
    assert 0 < float(stops.best_score) < 10
