"""What somebody who comes with a program of 2020 to 2022 writes beside its hooks: flags, keywords, attributes, names."""

from __future__ import annotations

import inspect
import warnings
from argparse import ArgumentParser, Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import leyden as pl
from leyden.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from leyden.compat.former_attributes import OF_MODULES, module_attribute
from leyden.compat.map_location import device_of
from leyden.errors import AbsentError, ConfigurationError, LeydenWarning, UnknownArgumentError
from leyden.precision import PRECISIONS, PrecisionName
from quiet import make_trainer

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(r"ignore:\[LEY-no-val-loader\]")
muted = pytest.mark.filterwarnings(r"ignore:\[LEY-former-name\]")


class Net(pl.LightningModule):
    """A line whose step sizes and losses are seen."""

    def __init__(self, lr: float = 0.1, width: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)
        torch.nn.init.constant_(self.layer.weight, 0.5)
        torch.nn.init.constant_(self.layer.bias, 0.0)
        self.seen: list[str] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append("train")
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append("val")
        self.log("val_loss", self.layer(batch).square().mean())

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append("test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class OfHparams(pl.LightningModule):
    """As modules of 0.7: all hyperparameters in one argument."""

    def __init__(self, hparams: Any) -> None:
        super().__init__()
        self.hparams = hparams
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(batches: int = 3) -> DataLoader[Any]:
    data = torch.linspace(-1, 1, batches * 2 * 2).reshape(-1, 2)
    return DataLoader(data, batch_size=2)  # type: ignore[arg-type]


# The command line


@muted
def test_former_flags_are_on_the_command_line_and_passed_on_only_if_written() -> None:
    parser = pl.Trainer.add_argparse_args(ArgumentParser(add_help=False))
    written = "--gpus 0 --max_nb_epochs 3 --progress_bar_refresh_rate 0 --row_log_interval 7 --train_percent_check 0.5"
    args = parser.parse_args([*written.split(), "--logger", "false"])
    assert (args.gpus, args.max_nb_epochs, args.max_epochs) == (0, 3, None)
    assert not hasattr(args, "distributed_backend")
    trainer = pl.Trainer.from_argparse_args(args)
    assert (trainer.max_epochs, trainer.log_every_n_steps, trainer.limit_train_batches) == (3, 7, 0.5)
    assert trainer.progress_bar_callback is None
    assert trainer.device.type == "cpu"
    assert pl.Trainer.parse_argparser(args) is args


def test_without_former_flags_no_former_argument_is_told_of() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parser = pl.Trainer.add_argparse_args(ArgumentParser(add_help=False))
        pl.Trainer.from_argparse_args(parser.parse_args(["--max_epochs", "2"]), logger=False)
    told = [str(each.message).split(" is a ")[0].removeprefix("[LEY-former-name] ") for each in caught]
    assert told == ["Trainer.add_argparse_args(parser)", "Trainer.from_argparse_args(args)"]


def test_defaults_and_types_of_the_trainers_arguments() -> None:
    parameters = inspect.signature(pl.Trainer).parameters
    defaults = pl.Trainer.default_attributes()
    assert defaults == {name: each.default for name, each in parameters.items() if name != "others"}
    found = {name: (types, default) for name, types, default in pl.Trainer.get_init_arguments_and_types()}
    assert found.keys() == defaults.keys()
    assert found["max_epochs"] == ((int,), None)
    assert found["fast_dev_run"] == ((bool, int), False)
    assert found["limit_val_batches"] == ((int, float), None)


# The verbs


def test_former_keywords_of_the_verbs(tmp_path: Path) -> None:
    model, trainer = Net(), make_trainer(tmp_path)
    with pytest.warns(LeydenWarning, match=r"fit\(train_dataloader=…\) is a.*fit\(train_dataloaders=…\)") as caught:
        trainer.fit(model, train_dataloader=loader(3), val_dataloaders=loader(2))
    assert [each.filename for each in caught] == [__file__]
    with pytest.warns(LeydenWarning, match=r"validate\(val_dataloaders=…\).*validate\(dataloaders=…\)"):
        trainer.validate(model, val_dataloaders=loader(1))
    with pytest.warns(LeydenWarning, match=r"test\(test_dataloaders=…\).*test\(dataloaders=…\)"):
        trainer.test(model, test_dataloaders=loader(4))
    assert model.seen == ["train"] * 3 + ["val"] * 3 + ["test"] * 4
    trainer.test(model, test_dataloaders=loader(1))  # told once: another warning would be an error


def test_keywords_that_verbs_never_had(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with pytest.raises(
        UnknownArgumentError, match=r"fit has no argument 'train_loaders'\. Did you mean 'train_dataloaders'"
    ):
        trainer.fit(Net(), train_loaders=loader())
    with pytest.raises(TypeError, match="test has no argument 'val_dataloaders'"):
        trainer.test(Net(), val_dataloaders=loader())
    with pytest.raises(ConfigurationError, match="train_dataloader and train_dataloaders are the same argument of fit"):
        trainer.fit(Net(), loader(), train_dataloader=loader())
    with pytest.raises(ConfigurationError, match=r"Write test\(model, dataloaders=…\)"):
        trainer.fit(Net(), train_dataloader=loader(), test_dataloaders=loader())


@muted
def test_an_own_fit_is_called_once(tmp_path: Path) -> None:
    calls = []

    class Own(pl.Trainer):
        def fit(self, *args: Any, **kwargs: Any) -> None:
            calls.append(kwargs.keys())
            super().fit(*args, **kwargs)

    Own(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path).fit(Net(), train_dataloader=loader())  # fmt: skip
    assert calls == [{"train_dataloader"}]


# Checkpoints


def saved(folder: Path, model: pl.LightningModule) -> str:
    trainer = make_trainer(folder)
    trainer.fit(model, loader())
    trainer.save_checkpoint(folder / "a.ckpt")
    return str(folder / "a.ckpt")


@pytest.mark.parametrize("name", ["hparam_overrides", "hparams_overrides"])
def test_overrides_of_hyperparameters(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path, Net(lr=0.5))
    with pytest.warns(LeydenWarning, match=rf"\(path, {name}={{'lr': 3}}\) is a.*load_from_checkpoint\(path, lr=3\)"):
        model = Net.load_from_checkpoint(path, **{name: {"lr": 3}})
    assert dict(model.hparams) == {"lr": 3, "width": 2}
    with pytest.raises(ConfigurationError, match=rf"{name}=3 is not valid. Allowed: a dict"):
        Net.load_from_checkpoint(path, **{name: 3})


@muted
def test_overrides_where_one_argument_has_all_hyperparameters(tmp_path: Path) -> None:
    path = saved(tmp_path, OfHparams(Namespace(lr=0.5, width=2)))
    model = OfHparams.load_from_checkpoint(path, hparam_overrides={"lr": 3})
    assert (model.hparams.lr, model.hparams.width) == (3, 2)
    tags = tmp_path / "meta_tags.csv"
    tags.write_text("key,value\nlr,0.25\nwidth,2\n")
    bare = torch.nn.Module.state_dict(model)
    torch.save(bare, tmp_path / "bare.pt")
    again = OfHparams.load_from_checkpoint(str(tmp_path / "bare.pt"), tags_csv=tags, hparam_overrides={"lr": 4})
    assert (again.hparams.lr, again.hparams.width) == (4, 2)


PLACES = [
    (None, "cpu"),
    (lambda storage, loc: storage, "cpu"),
    (lambda storage, loc: storage.cpu(), "cpu"),
    (lambda storage, loc: None, "cpu"),
    ({"cuda:0": "cpu"}, "cpu"),
    ({"cuda:0": "cuda:1", "cuda:3": "cuda:1"}, "cuda:1"),
    ({}, "cpu"),
]


@pytest.mark.parametrize(("given", "device"), PLACES)
def test_what_map_location_of_then_means(given: Any, device: str) -> None:
    assert device_of(given) == torch.device(device)


def test_modules_are_loaded_by_it(tmp_path: Path) -> None:
    model = Net(lr=0.5)
    path = saved(tmp_path, model)
    for given in (None, lambda storage, loc: storage, {"cuda:0": "cpu"}, torch.device("cpu"), "cpu"):
        loaded = Net.load_from_checkpoint(path, map_location=given)
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cuda:0": "cpu", "cuda:1": "cuda:0"}, "names several devices: cpu, cuda:0"),
        (lambda storage, loc: [], "is not valid. Allowed: a device"),
        (1.5, "map_location=1.5 is not valid"),
    ],
)
def test_places_that_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        device_of(given)


# Attributes


@muted
def test_attributes_that_modules_had(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

    model, data = Net(), Data()
    with pytest.raises(AttributeError, match="Net has no use_amp before a Trainer runs it"):
        module_attribute(model, "use_amp")
    make_trainer(tmp_path, precision="bf16-mixed").fit(model, datamodule=data)
    found = {name: module_attribute(model, name) for name in OF_MODULES}
    assert found == {"use_amp": False, "use_ddp": False, "use_dp": False, "datamodule": data}


def test_attributes_that_callbacks_had(tmp_path: Path) -> None:
    stopping, checkpoint = EarlyStopping("val_loss"), ModelCheckpoint(tmp_path, monitor="val_loss")
    make_trainer(tmp_path, stopping, checkpoint, enable_checkpointing=True, max_epochs=2).fit(Net(), loader(), loader())
    former = [
        (stopping, "wait", "wait_count"),
        (stopping, "best", "best_score"),
        (checkpoint, "best", "best_model_score"),
        (checkpoint, "best_model", "best_model_path"),
        (checkpoint, "kth_best_model", "kth_best_model_path"),
    ]
    for callback, name, today in former:
        kind = type(callback).__name__
        with pytest.warns(LeydenWarning, match=f"{kind}.{name} is a former spelling. Today: {kind}.{today}.") as caught:
            assert getattr(callback, name) == getattr(callback, today)
        assert [each.filename for each in caught] == [__file__]
    assert checkpoint.best_model_path.endswith("epoch=1-step=6.ckpt")
    with pytest.raises(AttributeError, match="'EarlyStopping' object has no attribute 'wate'"):
        stopping.wate  # noqa: B018
    assert not hasattr(pl.Callback(), "best")


def test_what_is_not_there_any_more_is_said(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="Trainer has no split_idx: parts of a sequence are not numbered"):
        make_trainer(tmp_path).split_idx  # noqa: B018


@pytest.mark.parametrize(
    ("given", "equals"), [(16, 16), (32, 32), (64, 64), ("bf16", "bf16"), ("16-mixed", 16), (None, 32)]
)
def test_a_precision_equals_its_short_form(given: Any, equals: Any, tmp_path: Path) -> None:
    precision = make_trainer(tmp_path, precision=given).precision
    assert precision == equals
    assert equals == precision
    assert precision == str(equals)
    assert (precision != equals) is False
    assert precision in (8, equals)


def test_a_precision_equals_nothing_else() -> None:
    short = {"32-true": 32, "64-true": 64, "16-mixed": 16, "bf16-mixed": "bf16"}
    for name in PRECISIONS:
        precision = PrecisionName(name)
        assert [other for other in (*PRECISIONS, 16, 32, 64, "bf16", True, 8, None, 16.5) if precision == other] == [
            name,
            *([short[name]] if name in short else []),
        ]
        assert {name: 1}[precision] == 1
        assert f"{precision}" == name
        assert precision.split("-") == name.split("-")


# Datamodules of 0.9


class Data09(pl.LightningDataModule):
    def __init__(self, folder: str = ".", batch_size: int = 2, **options: Any) -> None:
        super().__init__(train_transforms=len, dims=(1, 28, 28), **options)
        self.folder, self.batch_size = folder, batch_size
        self.flags: list[tuple[str, bool, bool]] = []

    def prepare_data(self) -> None:
        self.note("prepare")

    def setup(self, stage: str | None = None) -> None:
        self.note("setup")

    def note(self, where: str) -> None:
        self.flags.append((where, self.has_prepared_data, self.has_setup_fit))

    def train_dataloader(self) -> Any:
        return loader()


def test_arguments_of_a_datamodule() -> None:
    with pytest.warns(LeydenWarning, match=r"LightningDataModule\(train_transforms=…, dims=…\) is a.*self.dims = …"):
        data = Data09()
    assert (data.train_transforms, data.val_transforms, data.dims) == (len, None, (1, 28, 28))
    with pytest.warns(LeydenWarning, match=r"datamodule.size\(\) is a former spelling"):
        assert data.size() == (1, 28, 28)
    assert data.size(1) == 28
    assert pl.LightningDataModule().dims == ()
    with pytest.raises(AttributeError, match="'Data09' object has no attribute 'dimz'"):
        data.dimz  # noqa: B018
    with pytest.raises(TypeError, match="unexpected keyword argument 'dimz'"):
        pl.LightningDataModule(dimz=3)  # type: ignore[call-arg]


@muted
def test_a_datamodule_from_the_command_line() -> None:
    parser = Data09.add_argparse_args(ArgumentParser(add_help=False))
    args = parser.parse_args(["--batch_size", "64"])
    data = Data09.from_argparse_args(args, folder="there")
    assert (data.batch_size, data.folder) == (64, "there")


@muted
def test_what_was_done_with_a_datamodule(tmp_path: Path) -> None:
    data = Data09()
    assert not data.has_prepared_data
    assert not data.has_setup_fit
    make_trainer(tmp_path).fit(Net(), datamodule=data)
    assert data.flags[0][0] == "prepare"
    assert data.has_prepared_data
    assert data.has_setup_fit
    assert not data.has_setup_test


# Names


@pytest.mark.parametrize(
    ("source", "name", "told"),
    [
        ("leyden", "TrainResult", "self.log"),
        ("leyden", "EvalResult", "self.log"),
        ("leyden", "metrics", "torchmetrics"),
        ("leyden.metrics", "Accuracy", "torchmetrics.Accuracy"),
        ("leyden.metrics", "functional", "torchmetrics.functional"),
        ("leyden.loggers", "TestTubeLogger", "CSVLogger"),
        ("leyden.loggers", "LightningLoggerBase", "subclass leyden.loggers.Logger"),
        ("leyden.loggers.base", "LightningLoggerBase", "subclass leyden.loggers.Logger"),
        ("leyden.core.decorators", "auto_move_data", "transfer_batch_to_device"),
        ("leyden.utilities.cloud_io", "load", "leyden.load_checkpoint"),
    ],
)
def test_absent_names_say_what_to_write(source: str, name: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if source == "leyden":  # as before the Trainer has imported the module of this name
        monkeypatch.delattr(pl, "metrics", raising=False)
    with pytest.raises(AbsentError, match=f"^{source} has no {name}: .*{told}"):
        exec(f"from {source} import {name}")


def test_former_places() -> None:
    bound: dict[str, Any] = {}
    exec("from leyden.callbacks.base import Callback; from leyden.loggers.base import rank_zero_experiment", bound)
    exec("from leyden.core.decorators import data_loader", bound)
    assert bound["Callback"] is pl.Callback
    assert bound["rank_zero_experiment"] is pl.loggers.logger.rank_zero_experiment
    assert pl.loggers.base.rank_zero_experiment is bound["rank_zero_experiment"]
    assert pl.callbacks.base.Callback is pl.Callback
    assert bound["data_loader"] is pl.data_loader


def test_metrics_are_told_of_after_the_module_of_that_name_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl, "metrics", import_module("leyden.metrics"), raising=False)
    with pytest.raises(AbsentError, match=r"torchmetrics\.Accuracy"):
        pl.metrics.Accuracy()
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        pl.metrics.nothing  # noqa: B018


# Training


class Two(pl.LightningModule):
    """Two optimizers, which take turns on each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        for layer, value in ((self.a, 0.5), (self.b, -0.25)):
            torch.nn.init.constant_(layer.weight, value)
            torch.nn.init.constant_(layer.bias, 0.0)

    def training_step(self, batch: Tensor, batch_idx: int, optimizer_idx: int) -> Tensor:
        return self.loss(batch, optimizer_idx)

    def loss(self, batch: Tensor, optimizer_idx: int) -> Tensor:
        layer = (self.a, self.b)[optimizer_idx]
        return (layer(batch) - 1).square().mean()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(each.parameters(), lr=0.1) for each in (self.a, self.b)]


@muted
def test_accumulation_by_epoch_with_two_optimizers(tmp_path: Path) -> None:
    model, twin = Two(), Two()
    make_trainer(tmp_path, max_epochs=3, accumulate_grad_batches={1: 2}).fit(model, loader(5))
    optimizers = twin.configure_optimizers()
    for window in (1, 2, 2):
        batches = list(loader(5))
        for start in range(0, 5, window):
            part = batches[start : start + window]
            for batch in part:
                for index in range(2):
                    (twin.loss(batch, index) / len(part)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-6, atol=1e-7)


def test_accumulation_by_epoch_of_who_optimizes_manually_is_refused(tmp_path: Path) -> None:
    model = Net()
    model.automatic_optimization = False
    trainer = make_trainer(tmp_path, GradientAccumulationScheduler({1: 2}))
    with pytest.raises(ConfigurationError, match="needs automatic optimization"):
        trainer.fit(model, loader())


def test_no_internal_callback_is_missed_in_a_checkpoint(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeydenWarning)
        trainer = make_trainer(tmp_path, checkpoint_callback=True, enable_checkpointing=None, enable_progress_bar=False)
    trainer.fit(Net(), loader(), loader())
    assert trainer.checkpoint_callback is not None
    path = trainer.checkpoint_callback.best_model_path
    assert not [key for key in pl.load_checkpoint(path)["callbacks"] if "ValLossIfLogged" in key]
    plain = make_trainer(tmp_path, max_epochs=2)
    with pytest.warns(LeydenWarning, match="callback-state") as caught:
        plain.fit(Net(), loader(), loader(), ckpt_path=path)
    assert "ValLoss" not in str(caught[0].message)
