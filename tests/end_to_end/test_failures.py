"""What goes wrong in a run: each error says what was given and what to write; hooks and teardown run; nothing hides it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import leyden
from leyden.callbacks import Callback, RichProgressBar
from leyden.checkpoint.format import load_checkpoint
from leyden.errors import (
    ConfigurationError,
    DataError,
    HookError,
    LeydenError,
    LeydenWarning,
    MetricError,
    NonFiniteError,
    StepError,
)
from leyden.loggers.logger import Logger

torch.set_num_threads(1)

PACKAGE = str(Path(leyden.__file__).parent)
MAX_FRAMES = 3
Step = Callable[["Model", Tensor, int], Any]


class Model(leyden.LightningModule):
    """Its training step is the one that it is given."""

    def __init__(self, step: Step | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.own_step = step

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.own_step is not None:
            return self.own_step(self, batch, batch_idx)
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Memory(Logger):
    name = "memory"
    version = 0

    def __init__(self) -> None:
        self.statuses: list[str] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        pass

    def finalize(self, status: str) -> None:
        self.statuses.append(status)


def loader(batches: int = 4) -> DataLoader[Any]:
    return DataLoader(torch.ones(batches * 2, 2), batch_size=2)  # type: ignore[arg-type]


def make(**options: Any) -> leyden.Trainer:
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "max_epochs": 1}
    quiet |= {f"enable_{name}": False for name in ("checkpointing", "progress_bar", "model_summary")}
    return leyden.Trainer(**(quiet | options))


def fit(step: Step | None = None, **options: Any) -> tuple[leyden.Trainer, Model]:
    trainer, model = make(**options), Model(step)
    trainer.fit(model, loader())
    return trainer, model


# What a training step returns


@pytest.mark.parametrize(
    ("step", "messages"),
    [
        (
            lambda self, batch, batch_idx: self.layer(batch).square().mean().detach(),
            ("a loss that has no gradient", "detached", "frozen"),
        ),
        (
            lambda self, batch, batch_idx: {"loss": torch.tensor(1.0)},
            ("a loss that has no gradient",),
        ),
        (
            lambda self, batch, batch_idx: self.layer(batch),
            (r"a loss of shape \(2, 1\)", "must be one number", r"\.mean\(\)"),
        ),
        (
            lambda self, batch, batch_idx: {"los": self.layer(batch).mean()},
            (r"a dict with the keys \['los'\]", "under 'loss'", "automatic_optimization = False"),
        ),
        (lambda self, batch, batch_idx: {"loss": None}, (r"a dict with the keys \['loss'\]", "or None to skip")),
        (lambda self, batch, batch_idx: {"loss": 1.5}, ("a loss that is a float, not a tensor",)),
        (lambda self, batch, batch_idx: 1.5, ("returned a float", "the loss as a tensor")),
        (lambda self, batch, batch_idx: (self.layer(batch).mean(), 1), ("returned a tuple",)),
        (lambda self, batch, batch_idx: "loss", ("returned a str",)),
    ],
)
def test_what_cannot_be_trained_on_is_refused(step: Step, messages: tuple[str, ...]) -> None:
    with pytest.raises(StepError) as caught:
        fit(step)
    for message in messages:
        assert re.search(message, str(caught.value)), caught.value
    assert str(caught.value).startswith("training_step returned")


def test_frozen_parameters_are_named_as_a_reason() -> None:
    model = Model()
    model.freeze()
    with pytest.raises(StepError, match=r"no gradient.*requires_grad=False"):
        make().fit(model, loader())


def test_a_step_that_returns_none_is_skipped_and_counted() -> None:
    def step(self: Model, batch: Tensor, batch_idx: int) -> Any:
        return None if batch_idx % 2 else self.layer(batch).square().mean()

    trainer, _ = fit(step)
    assert (trainer.skipped_batches, trainer.global_step) == (2, 2)


def test_a_run_in_which_every_step_is_skipped_changes_nothing() -> None:
    model = Model(lambda self, batch, batch_idx: None)
    before = model.layer.weight.clone()
    trainer = make(max_epochs=2)
    trainer.fit(model, loader())
    assert (trainer.skipped_batches, trainer.global_step, trainer.current_epoch) == (8, 0, 2)
    assert torch.equal(model.layer.weight, before)


def test_none_within_a_window_leaves_the_mean_of_the_others() -> None:
    def step(self: Model, batch: Tensor, batch_idx: int) -> Any:
        return None if batch_idx == 1 else self.layer(batch).square().mean() * (batch_idx + 1)

    model = Model(step)
    expected = Model()
    expected.load_state_dict(model.state_dict())
    losses = [step(expected, torch.ones(2, 2), batch_idx) for batch_idx in (0, 2, 3)]
    (sum(losses) / 3).backward()  # type: ignore[union-attr]
    trainer = make(accumulate_grad_batches=4)
    trainer.fit(model, loader())
    assert (trainer.skipped_batches, trainer.global_step) == (1, 1)
    torch.testing.assert_close(model.layer.weight.grad, expected.layer.weight.grad)


# Values that are not finite


def at_step_5(make_loss: Callable[[Model, Tensor], Tensor]) -> Step:
    """A step that is sound, but for the batch with index 1 of the second epoch."""

    def step(self: Model, batch: Tensor, batch_idx: int) -> Tensor:
        if self.global_step == 5:
            return make_loss(self, batch)
        return self.layer(batch).square().mean()

    return step


PLACE = r"epoch 1, batch_idx 1, after 5 steps"


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_a_loss_that_is_not_finite_ends_the_run_if_asked_for(value: float, shown: str) -> None:
    step = at_step_5(lambda self, batch: self.layer(batch).square().mean() * value)
    with pytest.raises(NonFiniteError, match=rf"The loss is {shown} in {PLACE}\. Look for") as caught:
        fit(step, max_epochs=3, detect_anomaly=True)
    assert isinstance(caught.value, (StepError, FloatingPointError))
    trainer, model = fit(step, max_epochs=3)
    assert trainer.global_step == 12, "without detect_anomaly nobody looks, because looking waits for the device"
    assert not torch.isfinite(model.layer.weight).all()


# torch warns as well, with the place in the forward pass
@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")
def test_nan_that_appears_in_the_backward_pass_only_is_found() -> None:
    # the loss is 0, the gradient of the root there is infinite, times 0 is NaN
    step = at_step_5(lambda self, batch: (self.layer(batch).sum() * 0).sqrt())
    with pytest.raises(NonFiniteError, match=rf"'MulBackward0' returned nan.*backward pass of {PLACE}") as caught:
        fit(step, max_epochs=3, detect_anomaly=True)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_gradient_that_is_infinite_is_found_by_its_parameter() -> None:
    step = at_step_5(lambda self, batch: (self.layer.weight[0, 0] - self.layer.weight[0, 0].detach()).sqrt())
    with pytest.raises(NonFiniteError, match=rf"The gradient of layer\.weight is not finite .*{PLACE}"):
        fit(step, max_epochs=3, detect_anomaly=True)


@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")
def test_detect_anomaly_works_in_manual_optimization() -> None:
    class Manual(Model):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.factor = factor

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            loss = self.layer(batch).sum() * self.factor
            self.manual_backward(loss.sqrt() if self.factor == 0 else loss)
            self.optimizers().step()

    for factor, message in ((float("nan"), "The loss is nan in epoch 0"), (0.0, "MulBackward0.*epoch 0, batch_idx 0")):
        with pytest.raises(NonFiniteError, match=message):
            make(detect_anomaly=True).fit(Manual(factor), loader())


def test_another_error_of_the_backward_pass_stays_what_it_is() -> None:
    kept: list[Tensor] = []

    def step(self: Model, batch: Tensor, batch_idx: int) -> Tensor:
        kept.append(self.layer(batch).square().mean())
        return kept[0]

    with pytest.raises(RuntimeError, match="second time") as caught:
        fit(step, detect_anomaly=True)
    assert not isinstance(caught.value, LeydenError)


# Loaders that give nothing


class Nothing(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "train_dataloaders gave a loader without batches"),
        (DataLoader([]), "without batches: its dataset has 0 samples, batch_size=1"),  # type: ignore[arg-type]
        (
            DataLoader(torch.ones(3, 2), batch_size=4, drop_last=True),  # type: ignore[arg-type]
            "without batches: its dataset has 3 samples, batch_size=4 and drop_last=True",
        ),
        (DataLoader(Nothing()), "train_dataloaders gave no batch in epoch 0"),
        (5, "train_dataloaders gave 5, which cannot be iterated over. Return a DataLoader"),
    ],
)
def test_a_loader_that_gives_nothing_is_refused_with_the_reason(given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make().fit(Model(), given)


def test_a_generator_is_read_once_and_says_so() -> None:
    with pytest.raises(DataError, match=r"gave no batch.* A generator can be read only once"):
        make(max_epochs=2).fit(Model(), (torch.ones(2, 2) for _ in range(3)))


@pytest.mark.parametrize(
    ("verb", "name"), [("fit", "train_dataloader"), ("test", "test_dataloader"), ("predict", "predict_dataloader")]
)
def test_no_loader_at_all(verb: str, name: str) -> None:
    model = Model()
    model.test_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    with pytest.raises(DataError, match=f"There is no {name}. Pass one .* or define {name} in Model"):
        getattr(make(), verb)(model)


def test_a_loader_hook_that_returns_none() -> None:
    model = Model()
    model.train_dataloader = lambda: None  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"train_dataloader returned None. Return a DataLoader"):
        make().fit(model)


# An exception in the user's code


class Lost(Exception):
    """What user code raises."""


class Witness(Callback):
    """Notes what it is told of the end of a run."""

    def __init__(self, name: str = "callback", told: list[Any] | None = None) -> None:
        self.name = name
        self.told: list[Any] = [] if told is None else told

    @property
    def state_key(self) -> str:
        return self.name

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.told.append((self.name, exception))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        assert pl_module.trainer is trainer
        self.told.append((self.name, f"teardown {stage}"))


class Data(leyden.LightningDataModule):
    def __init__(self, told: list[Any]) -> None:
        super().__init__()
        self.told = told

    def train_dataloader(self) -> Any:
        return loader()

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    def on_exception(self, exception: BaseException) -> None:
        self.told.append(("data", exception))

    def teardown(self, stage: str) -> None:
        self.told.append(("data", f"teardown {stage}"))


class Fragile(Model):
    """Raises in the place whose name it is given."""

    def __init__(self, place: str, told: list[Any], error: BaseException | None = None) -> None:
        super().__init__()
        self.told = told
        self.error = Lost(place) if error is None else error
        own = getattr(self, place) if place != "teardown" else self.note_teardown

        def lose(*args: Any) -> Any:
            if place == "teardown":
                own(*args)
            raise self.error

        self.teardown = self.note_teardown  # type: ignore[method-assign]
        setattr(self, place, lose)

    def note_teardown(self, stage: str) -> None:
        self.told.append(("module", f"teardown {stage}"))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """There is one."""

    test_step = validation_step


PLACES = [
    "prepare_data", "setup", "configure_model", "configure_optimizers", "on_fit_start", "on_validation_epoch_end",
    "on_train_start", "on_train_epoch_start", "on_train_batch_start", "training_step", "on_before_zero_grad",
    "on_before_backward", "on_after_backward", "backward", "on_before_optimizer_step", "on_train_batch_end",
    "validation_step", "on_train_epoch_end", "on_train_end", "on_fit_end", "on_before_batch_transfer",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_an_exception_in_user_code_runs_every_hook_and_arrives_as_it_is(place: str) -> None:
    told: list[Any] = []
    memory = Memory()
    trainer = make(callbacks=[Witness("first", told), Witness("second", told)], logger=memory)
    model = Fragile(place, told)
    with pytest.raises(Lost) as caught:
        trainer.fit(model, datamodule=Data(told))
    assert caught.value is model.error
    end = "teardown fit"
    assert told == [
        *((name, model.error) for name in ("first", "second", "data")),
        *((name, end) for name in ("data", "first", "second", "module")),
    ]
    assert memory.statuses == ["failed"]
    assert trainer.interrupted
    assert not any((trainer.training, trainer.validating, trainer.sanity_checking))


@pytest.mark.parametrize(
    ("verb", "place"), [("validate", "validation_step"), ("test", "test_step"), ("predict", "forward")]
)
def test_an_exception_in_an_evaluation(verb: str, place: str) -> None:
    told: list[Any] = []
    model = Fragile(place, told)
    model.layer.eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(Lost):
        getattr(make(callbacks=Witness("first", told)), verb)(model, datamodule=Data(told))
    assert told[:2] == [("first", model.error), ("data", model.error)]
    assert told[2:] == [(name, f"teardown {verb}") for name in ("data", "first", "module")]
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_the_traceback_is_short_and_ends_in_the_users_line() -> None:
    def step(self: Model, batch: Tensor, batch_idx: int) -> Any:
        raise Lost("here")

    with pytest.raises(Lost, match="here") as caught:
        fit(step)
    frames = traceback.extract_tb(caught.value.__traceback__)
    inside = [frame.name for frame in frames if frame.filename.startswith(PACKAGE)]
    assert 0 < len(inside) <= MAX_FRAMES, inside
    assert frames[-1].name == "step"
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_after_an_exception_the_module_is_on_its_own_again() -> None:
    model = Model(lambda self, batch, batch_idx: 1 / 0)
    trainer = make()
    with pytest.raises(ZeroDivisionError):
        trainer.fit(model, loader())
    with pytest.raises(LeydenError, match="Model is not run by a Trainer now"):
        _ = model.trainer
    with pytest.warns(LeydenWarning, match="LEY-log-without-trainer"):
        model.log("x", 1.0)
    assert (model.current_epoch, model.global_step) == (0, 0)


def test_the_same_objects_can_be_run_again_after_an_exception() -> None:
    def step(self: Model, batch: Tensor, batch_idx: int) -> Tensor:
        if not failed:
            failed.append(True)
            raise Lost
        return self.layer(batch).square().mean()

    failed: list[bool] = []
    trainer, model = make(precision="64-true"), Model(step)
    with pytest.raises(Lost):
        trainer.fit(model, loader())
    assert torch.get_default_dtype() is torch.float32
    trainer.fit(model, loader())
    assert trainer.global_step == 4


class Clumsy(Callback):
    """Fails where others report a failure."""

    def __init__(self, *places: str, error: type[BaseException] = OSError) -> None:
        for place in places:
            setattr(self, place, self.fail)
        self.error = error

    def fail(self, *args: Any) -> None:
        raise self.error("the disk is full")


@pytest.mark.parametrize("places", [("on_exception",), ("teardown",), ("on_exception", "teardown")])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_an_exception_while_another_is_handled_does_not_hide_the_first(
    places: tuple[str, ...], error: type[BaseException]
) -> None:
    told: list[Any] = []
    memory = Memory()
    model = Fragile("training_step", told)
    trainer = make(callbacks=[Clumsy(*places, error=error), Witness("after", told)], logger=memory)
    with pytest.raises(Lost) as caught:
        trainer.fit(model, datamodule=Data(told))
    assert caught.value is model.error
    assert [name for name, _ in told] == ["after", "data", "data", "after", "module"], "the others still run"
    assert memory.statuses == ["failed"]
    notes = caught.value.__notes__
    assert len(notes) == len(places)
    assert all(re.search(rf"test_failures\.py:\d+ raised {error.__name__}: the disk is full", note) for note in notes)
    assert "the disk is full" in "".join(traceback.format_exception(caught.value))


def test_an_exception_in_the_datamodule_or_the_modules_teardown_does_not_hide_the_first() -> None:
    class Broken(Data):
        def on_exception(self, exception: BaseException) -> None:
            raise OSError("first")

        def teardown(self, stage: str) -> None:
            raise OSError("second")

    told: list[Any] = []
    model = Fragile("on_train_batch_end", told)

    def teardown(stage: str) -> None:
        raise OSError("third")

    model.teardown = teardown  # type: ignore[method-assign]
    with pytest.raises(Lost) as caught:
        make().fit(model, datamodule=Broken(told))
    assert [note.rpartition(" ")[2] for note in caught.value.__notes__] == ["first", "second", "third"]


def test_an_exception_in_a_teardown_after_success_is_raised_and_the_others_run() -> None:
    told: list[Any] = []
    memory = Memory()
    trainer = make(callbacks=[Clumsy("teardown"), Witness("after", told)], logger=memory)
    with pytest.raises(OSError, match="the disk is full"):
        trainer.fit(Fragile("teardown", told), datamodule=Data(told))
    assert [name for name, _ in told] == ["data", "after", "module"]
    assert memory.statuses == ["success"]
    assert trainer.global_step == 4


# Ctrl-C


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


INTERRUPTED = [("fit", "training_step"), ("fit", "validation_step"), ("fit", "on_train_epoch_end"), ("fit", "setup")]
INTERRUPTED += [("validate", "validation_step"), ("test", "test_step"), ("predict", "forward"), ("test", "setup")]


@pytest.mark.parametrize(("verb", "place"), INTERRUPTED)
@pytest.mark.parametrize("interactive", [False, True])
def test_ctrl_c_runs_every_hook(
    verb: str, place: str, interactive: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(sys, "ps1", raising=False)
    if interactive:
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    told: list[Any] = []
    memory = Memory()
    pressed = KeyboardInterrupt()
    model = Fragile(place, told, pressed)
    trainer = make(callbacks=Witness("first", told), logger=memory)
    if interactive and place == "setup":
        with pytest.raises(KeyboardInterrupt):  # there is nothing to give back yet; at a prompt it ends there
            getattr(trainer, verb)(model, datamodule=Data(told))
    elif interactive:
        result = getattr(trainer, verb)(model, datamodule=Data(told))
        assert result in (None, [])
    else:
        with pytest.raises(SystemExit) as caught:
            getattr(trainer, verb)(model, datamodule=Data(told))
        assert caught.value.code == 130
    assert told[:2] == [("first", pressed), ("data", pressed)]
    assert told[2:] == [(name, f"teardown {verb}") for name in ("data", "first", "module")]
    assert memory.statuses == ["interrupted"]
    assert trainer.interrupted
    assert "Interrupted in epoch 0 after" in capsys.readouterr().out


def test_interrupted_is_about_the_last_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    trainer, model = make(), Model(interrupt)
    trainer.fit(model, loader())
    assert trainer.interrupted
    model.own_step = None
    trainer.fit(model, loader())
    assert not trainer.interrupted


def test_an_exception_after_ctrl_c_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delattr(sys, "ps1", raising=False)
    with pytest.raises(SystemExit) as caught:
        fit(interrupt, callbacks=[Clumsy("on_exception", "teardown")])
    assert caught.value.code == 130
    assert capsys.readouterr().out.count("raised OSError: the disk is full") == 2


SCRIPT = """
import sys, time, torch, leyden
from torch.utils.data import DataLoader
from leyden.callbacks import Callback, ModelCheckpoint

class Model(leyden.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(512, 512)

    def training_step(self, batch, batch_idx):
        if self.global_step == 3:
            print("READY", flush=True)
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

class Told(Callback):
    def on_exception(self, trainer, module, exception):
        print("told of", type(exception).__name__)

    def teardown(self, trainer, module, stage):
        print("teardown")

trainer = leyden.Trainer(
    accelerator="cpu", max_epochs=-1, logger=False, default_root_dir=sys.argv[1], enable_model_summary=False,
    callbacks=[Told(), ModelCheckpoint(dirpath=sys.argv[1], every_n_train_steps=1, save_top_k=-1, save_last=True)],
)
trainer.fit(Model(), DataLoader(torch.ones(4000, 512), batch_size=2))
print("NOT REACHED")
trainer.test()
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_a_signal_to_a_script_ends_it_with_130_and_whole_checkpoints(tmp_path: Path) -> None:
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        head = []
        while "READY" not in "".join(head[-1:]):
            head.append(process.stdout.readline())
            assert head[-1], process.stderr.read() if process.stderr is not None else ""
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in out + err
    lines = [line for line in out.splitlines() if line]
    assert "NOT REACHED" not in lines
    assert lines.index("told of KeyboardInterrupt") < lines.index("teardown")
    message = next(line for line in lines if line.startswith("Interrupted in epoch 0 after"))
    steps = int(message.split()[5])
    assert steps >= 3
    files = sorted(path.name for path in folder.iterdir())
    assert all(name.endswith(".ckpt") for name in files), files
    assert len(files) >= 3
    for name in files:
        assert 1 <= load_checkpoint(folder / name)["global_step"] <= steps


# Things used in the wrong place or order


def test_optimizers_outside_of_fit() -> None:
    model = Model()
    with pytest.raises(LeydenError, match="Model is not being run by a Trainer; this is possible during fit only"):
        model.optimizers()
    with pytest.raises(LeydenError, match="during fit only"):
        model.lr_schedulers()
    make().fit(model, loader())
    with pytest.raises(LeydenError, match="during fit only"):
        model.optimizers()


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_verb_without_model_before_any_fit(verb: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{verb} needs a model: this Trainer has not run one yet"):
        getattr(make(), verb)()


def test_a_checkpoint_before_any_fit(tmp_path: Path) -> None:
    with pytest.raises(LeydenError, match="save_checkpoint: this Trainer has not run a module yet"):
        make().save_checkpoint(tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_reading_what_is_only_known_during_a_run() -> None:
    trainer = make()
    with pytest.raises(LeydenError, match="has not run a module yet"):
        _ = trainer.lightning_module
    with pytest.raises(LeydenError, match="known during fit only"):
        _ = trainer.estimated_stepping_batches
    with pytest.raises(LeydenError, match="has no trainer before fit"):
        _ = RichProgressBar().trainer


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Model, r"model is the class Model, not an instance. Write Model\(…\)"),
        (torch.nn.Linear(1, 1), r"model=Linear\(.* is not valid. Allowed: a leyden.LightningModule"),
        (5, "model=5 is not valid. Allowed: a leyden.LightningModule"),
    ],
)
def test_something_else_than_a_module(verb: str, given: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        getattr(make(), verb)(given, loader())


def test_something_else_than_a_datamodule() -> None:
    with pytest.raises(ConfigurationError, match="datamodule is the class Data, not an instance"):
        make().fit(Model(), datamodule=Data)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"datamodule=.*Allowed: a leyden.LightningDataModule"):
        make().fit(Model(), datamodule=loader())  # type: ignore[arg-type]


def test_loaders_and_a_datamodule() -> None:
    with pytest.raises(ConfigurationError, match=r"fit got both dataloaders and a datamodule. Give one of the two"):
        make().fit(Model(), loader(), datamodule=Data([]))


def test_a_module_without_the_methods_that_are_needed() -> None:
    class Empty(leyden.LightningModule):
        pass

    class Half(Empty):
        def training_step(self, batch: Tensor) -> None:
            pass

    with pytest.raises(HookError, match=r"Empty has no training_step, .* Define it"):
        make().fit(Empty(), loader())
    with pytest.raises(HookError, match=r"Half has no configure_optimizers, .* return None from it"):
        make().fit(Half(), loader())
    for verb in ("validate", "test"):
        step = {"validate": "validation_step"}.get(verb, f"{verb}_step")
        with pytest.raises(HookError, match=f"Empty has no {step}, so there is nothing to run"):
            getattr(make(), verb)(Empty(), loader())


def test_a_module_that_forgot_to_call_init_of_its_base() -> None:
    class Hasty(leyden.LightningModule):
        def __init__(self) -> None:
            pass

        training_step = Model.training_step
        configure_optimizers = Model.configure_optimizers

    with pytest.raises(ConfigurationError, match=r"Hasty.__init__ did not call super\(\).__init__\(\)"):
        make().fit(Hasty(), loader())


def test_several_optimizers_in_automatic_optimization() -> None:
    class Pair(Model):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]

    with pytest.raises(ConfigurationError, match=r"returned 2 optimizers.*automatic_optimization = False.*minimize"):
        make().fit(Pair(), loader())


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (5, "configure_optimizers returned int 5. Allowed: an optimizer"),
        (torch.optim.SGD, "configure_optimizers returned .*Allowed: an optimizer"),
        ({"optimiser": 1}, "the key 'optimiser'. Allowed: .* Did you mean 'optimizer'"),
        ([1, 2], r"returned a list of \(int, int\). Allowed"),
    ],
)
def test_something_else_than_optimizers(returned: Any, message: str) -> None:
    model = Model()
    model.configure_optimizers = lambda: returned  # type: ignore[method-assign]
    with pytest.raises(ConfigurationError, match=message):
        make().fit(model, loader())


def test_manual_backward_in_automatic_optimization() -> None:
    def step(self: Model, batch: Tensor, batch_idx: int) -> None:
        self.manual_backward(self.layer(batch).mean())

    with pytest.raises(StepError, match=r"manual_backward needs self.automatic_optimization = False in __init__"):
        fit(step)


@pytest.mark.parametrize(("option", "value"), [("gradient_clip_val", 1.0), ("accumulate_grad_batches", 2)])
def test_settings_of_automatic_optimization_in_manual_optimization(option: str, value: Any) -> None:
    model = Model()
    model.automatic_optimization = False
    with pytest.raises(ConfigurationError, match=f"{option}={value} needs automatic optimization.*minimize"):
        make(**{option: value}).fit(model, loader())


def test_untoggling_an_optimizer_that_was_not_toggled() -> None:
    def step(self: Model, batch: Tensor, batch_idx: int) -> None:
        self.untoggle_optimizer(self.optimizers())

    with pytest.raises(StepError, match="for an optimizer that was not toggled"):
        fit(step)


@pytest.mark.parametrize("hook", ["on_fit_start", "on_fit_end", "configure_model"])
def test_logging_where_nothing_can_be_logged(hook: str) -> None:
    model = Model()
    if hook == "configure_model":
        model.configure_model = lambda: model.log("x", 1.0)  # type: ignore[method-assign]
    else:
        setattr(model, hook, lambda: model.log("x", 1.0))
    with pytest.raises(
        MetricError, match=r"self.log\('x', …\) was called .*nothing can be logged. It can be called in"
    ):
        make().fit(model, loader())


def test_logging_in_prediction() -> None:
    model = Model()
    model.predict_step = lambda batch, batch_idx: model.log("x", 1.0)  # type: ignore[method-assign]
    with pytest.raises(MetricError, match="nothing can be logged"):
        make().predict(model, loader())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3), r"a tensor of shape \(3,\); a logged value is one number. Reduce it, e.g. with .mean\(\)"),
        ("text", "got a str; allowed are a number"),
        ({"a": 1.0}, "got a dict; .* Use self.log_dict for several values"),
        (None, "got a NoneType; allowed are a number"),
    ],
)
def test_values_that_cannot_be_logged(value: Any, message: str) -> None:
    def step(self: Model, batch: Tensor, batch_idx: int) -> Any:
        self.log("x", value)

    with pytest.raises(MetricError, match=message):
        fit(step)


def test_logging_without_a_trainer_warns() -> None:
    with pytest.warns(LeydenWarning, match=r"\[LEY-log-without-trainer\] self.log\('x', …\) has no effect"):
        Model().log("x", 1.0)


def test_training_without_optimizer_warns() -> None:
    model = Model()
    model.configure_optimizers = lambda: None  # type: ignore[method-assign]
    with pytest.warns(LeydenWarning, match=r"\[LEY-no-optimizer\] .*nothing is optimized"):
        make().fit(model, loader())
