"""The lifecycle on paper is the lifecycle of recorded runs; `Trainer.explain` shows the user's part of it."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import EarlyStopping, GradientAccumulationScheduler
from leyden.errors import HookError, MetricError
from leyden.explain import explain, schedule_in_words
from leyden.hooks import EVENTS
from leyden.lifecycle import batch_listing, lines_of, listing
from leyden.run import Mode
from leyden.settings import Settings

PAGE = Path(__file__).parents[1] / "docs" / "lifecycle.md"
HERE = Path(__file__).name
Calls = list[tuple[str, str]]

# Hooks that are no events, with those who may have them, in the order in which they are called.
OWNERS = {
    "prepare_data": "datamodule, module",
    "setup": "datamodule, callback, module",
    "teardown": "datamodule, callback, module",
    "on_load_checkpoint": "callback, module",
    "on_save_checkpoint": "callback, module",
    **dict.fromkeys(("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"), "datamodule"),
    **dict.fromkeys(("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"), "datamodule"),
}
MODULE_SINGLES = (
    "backward", "optimizer_zero_grad", "lr_scheduler_step", "configure_gradient_clipping", "configure_optimizers",
    "configure_callbacks", "configure_model", "setup", "teardown", "prepare_data", "on_save_checkpoint",
    "on_load_checkpoint", "training_step", "validation_step", "test_step", "predict_step",
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def batches(count: int = 1) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(count, 2)))


def trainer(tmp_path: Path, **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(**{"accelerator": "cpu", "max_epochs": 1, "default_root_dir": tmp_path, **quiet, **options})


def nothing(*_: Any) -> None: ...


# Everything overridden, everything recorded


def recording(base: type, owner: str, names: Any, calls: Calls) -> Any:
    """A subclass of ``base`` in which each of ``names`` is noted, and then does what it does in ``base``."""

    def hook_of(name: str) -> Any:
        inherited = getattr(base, name, nothing)  # a module has no hooks of the sanity check, but may define them

        def hook(self: Any, *args: Any) -> Any:
            calls.append((owner, name))
            return inherited(self, *args)

        return hook

    return type(f"Recording{base.__name__}", (base,), {name: hook_of(name) for name in names})


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, batch: list[Tensor]) -> Tensor:
        return self.layer(batch[0]).mean()  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self(batch)
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        by_step = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        by_epoch = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return [optimizer], [
            {"scheduler": by_step, "interval": "step"},
            by_epoch,
            {"scheduler": plateau, "monitor": "loss_epoch"},
        ]


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(self(batch))
        self.optimizers().step()


class Closure(Net):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer.step(closure=optimizer_closure)


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return batches()

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Late(L.Callback):
    monitors_epoch = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.at_step_boundary(lambda: trainer.save_checkpoint(f"{trainer.default_root_dir}/saved.ckpt"))


def recorded(verb: str, base: type[Net], tmp_path: Path, max_epochs: int = 1, **arguments: Any) -> Calls:
    calls: Calls = []
    events = [name for name, event in EVENTS.items() if not event.module_only]
    saves = ["setup", "teardown", "on_save_checkpoint", "on_load_checkpoint"]
    singles = [*MODULE_SINGLES, *(["optimizer_step"] if base is Closure else [])]
    module = recording(base, "module", [*EVENTS, *singles], calls)()
    data_hooks = [name for name, owners in OWNERS.items() if "datamodule" in owners]
    data = recording(Data, "datamodule", data_hooks, calls)()
    callback = recording(L.Callback, "callback", [*events, *saves], calls)()
    late = recording(Late, "late", ["on_train_epoch_end"], calls)()
    run = trainer(tmp_path, callbacks=[late, callback], num_sanity_val_steps=1, max_epochs=max_epochs)
    getattr(run, verb)(module, datamodule=data, **arguments)
    return calls


def on_paper(verb: str, mode: Mode = Mode.AUTOMATIC, without: tuple[str, ...] = ("resumes",)) -> Calls:
    """The calls that the template of ``verb`` says for one epoch of one batch, ``without`` some of its conditions."""
    calls: Calls = []
    left_out = math.inf
    for line in lines_of(verb, mode):
        if line.depth > left_out:
            continue
        left_out = line.depth if line.when in without else math.inf
        if line.when in without:
            continue
        if line.text.endswith("as below"):
            below = on_paper("validate")
            calls += below[
                below.index(("module", "on_validation_model_eval")) : below.index(("datamodule", "teardown"))
            ]
        calls += calls_of(line.hook, line.group)
    # The loaders of validation are asked for once: by the sanity check if there is one.
    asked = [index for index, call in enumerate(calls) if call[1] == "val_dataloader"]
    return [call for index, call in enumerate(calls) if index not in asked[1:]]


def calls_of(hook: str | None, group: str) -> Calls:
    if hook is None:
        return []
    if group == "late":
        return [("late", hook)]
    event = EVENTS.get(hook)
    if event is not None:
        return ([] if event.module_only else [("callback", hook)]) + [("module", hook)]
    return [(owner, hook) for owner in OWNERS.get(hook, "module").split(", ")]


@pytest.mark.parametrize(
    ("base", "mode", "without"),
    [
        (Net, Mode.AUTOMATIC, ("resumes",)),
        (Closure, Mode.CLOSURE, ("resumes",)),
        (Manual, Mode.MANUAL, ("resumes", "automatic")),
    ],
)
def test_fit_calls_what_the_page_says(base: type[Net], mode: Mode, without: tuple[str, ...], tmp_path: Path) -> None:
    assert recorded("fit", base, tmp_path) == on_paper("fit", mode, without)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_the_other_verbs_call_what_the_page_says(verb: str, tmp_path: Path) -> None:
    assert recorded(verb, Net, tmp_path) == on_paper(verb)


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_a_checkpoint_is_read_where_the_page_says(verb: str, tmp_path: Path) -> None:
    first = trainer(tmp_path, limit_val_batches=0)
    first.fit(Net(), batches())
    first.save_checkpoint(tmp_path / "start.ckpt")
    expected = on_paper(verb, without=("sanity",) if verb == "fit" else ())
    calls = recorded(verb, Net, tmp_path, max_epochs=2, ckpt_path=tmp_path / "start.ckpt")
    assert calls == expected


# The page


def blocks() -> list[str]:
    return re.findall(r"^```text\n(.*?)\n```$", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_the_page_shows_the_listings() -> None:
    expected = [listing("fit"), batch_listing(Mode.CLOSURE), batch_listing(Mode.MANUAL), listing("validate")]
    assert blocks() == expected, "paste the output of leyden.lifecycle.listing and batch_listing"


def test_every_event_is_on_the_page() -> None:
    text = "\n".join(listing(verb) for verb in ("fit", "test", "predict"))
    assert [name for name in EVENTS if f"{name}(" not in text] == []


def section(title: str) -> str:
    return PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]


def test_logging_is_refused_where_the_page_says(tmp_path: Path) -> None:
    allowed: set[str] = set()
    refused: set[str] = set()

    def hook_of(name: str, base: type) -> Any:
        inherited = getattr(base, name, nothing)

        def hook(self: Any, *args: Any) -> Any:
            try:
                self.log(name, 1.0)
                allowed.add(name)
            except MetricError:
                refused.add(name)
            return inherited(self, *args)

        return hook

    # lr_scheduler_step runs in batches and at the epoch's end, where the same key means two things
    others = ("configure_callbacks", "prepare_data", "backward", "lr_scheduler_step")
    hooks = [name for name in [*EVENTS, *MODULE_SINGLES] if name not in others]
    module = type("Logging", (Net,), {name: hook_of(name, Net) for name in hooks})()
    run = trainer(tmp_path)
    run.fit(module, batches(), batches())
    run.test(module, batches())
    run.predict(module, batches())

    assert not allowed & refused
    words = section("Where logging is allowed").split("Elsewhere")[1].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", words)) & set(hooks)
    sanity = {"on_sanity_check_start", "on_sanity_check_end"}
    prediction = {name for name in hooks if "predict" in name}
    assert refused == named | sanity | prediction | {"configure_model"}


@pytest.mark.parametrize(
    ("options", "due"),
    [
        ({}, [4, 8, 12]),
        ({"check_val_every_n_epoch": 3}, [12]),
        ({"val_check_interval": 3}, [3, 7, 11]),
        ({"val_check_interval": 0.25}, list(range(1, 13))),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, [3, 6, 9, 12]),
        ({"val_check_interval": 3, "accumulate_grad_batches": 2}, [4, 8, 12]),
        ({"val_check_interval": "00:01:00:00"}, []),
    ],
)
def test_validation_is_due_when_the_page_says(options: dict[str, Any], due: list[int], tmp_path: Path) -> None:
    seen: list[int] = []

    class Watch(L.Callback):
        done = 0

        def on_train_batch_end(self, *_: Any) -> None:
            self.done += 1

        def on_validation_start(self, *_: Any) -> None:
            seen.append(self.done)

    trainer(tmp_path, callbacks=Watch(), max_epochs=3, num_sanity_val_steps=0, **options).fit(
        Net(), batches(4), batches()
    )
    assert seen == due


# explain


class Mine(L.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None: ...

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        raise AssertionError("explain must not run this")


class Untouchable(L.LightningModule):
    """Everything that explain must not call raises."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError

    def prepare_data(self) -> None:
        raise AssertionError

    def setup(self, stage: str) -> None:
        raise AssertionError

    def configure_model(self) -> None:
        raise AssertionError

    def configure_optimizers(self) -> Any:
        raise AssertionError


class UntouchableData(L.LightningDataModule):
    def prepare_data(self) -> None:
        raise AssertionError

    def setup(self, stage: str) -> None:
        raise AssertionError

    def train_dataloader(self) -> Any:
        raise AssertionError

    val_dataloader = train_dataloader


def line_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(start))


def place(function: Any) -> str:
    return f"{HERE}:{function.__code__.co_firstlineno}"


def test_explain_runs_nothing_and_names_the_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    module, data = Untouchable(), UntouchableData()
    run = trainer(tmp_path, callbacks=[Mine()], logger=True)
    text = run.explain(module, data)
    assert capsys.readouterr().out == f"{text}\n"
    assert list(tmp_path.iterdir()) == []
    assert module._trainer is None
    assert line_of(text, "on_train_batch_start").split("  ")[-1] == (
        f"Mine ({place(Mine.on_train_batch_start)}), Untouchable ({place(Untouchable.on_train_batch_start)})"
    )
    assert line_of(text, "setup").split("  ")[-1] == (
        f"UntouchableData ({place(UntouchableData.setup)}), Mine ({place(Mine.setup)}), Preemption, "
        f"Untouchable ({place(Untouchable.setup)})"
    )
    assert line_of(text, "train_dataloader").endswith(f"UntouchableData ({place(UntouchableData.train_dataloader)})")
    assert "on_after_backward" not in text
    assert "loss.backward()" in text
    assert len(text.splitlines()) < 75


def test_a_place_outside_of_the_working_directory_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = explain(trainer(tmp_path), Untouchable())
    assert f"({Path(__file__)}:" in line_of(text, "training_step")


def test_hooks_stand_in_the_order_of_the_run(tmp_path: Path) -> None:
    text = explain(trainer(tmp_path, callbacks=[EarlyStopping("loss")]), recording(Net, "", EVENTS, [])())
    shown = [
        match[1] for line in text.split("Settings")[0].splitlines() if (match := re.match(r" +(\w+)\(.*  \S", line))
    ]
    expected = [line.hook for line in lines_of("fit") if line.hook in EVENTS]
    assert [name for name in shown if name in EVENTS] == expected


def body(run: L.Trainer, module: L.LightningModule) -> str:
    return explain(run, module).split("Settings")[0]


def test_the_branch_of_the_module_is_shown(tmp_path: Path) -> None:
    automatic, closure, manual = (body(trainer(tmp_path), module) for module in (Net(), Closure(), Manual()))
    assert "closure" not in automatic
    assert "manual_backward" not in automatic
    assert "closure():" in closure
    assert line_of(closure, "optimizer_step").endswith(f"{HERE}:{Closure.optimizer_step.__code__.co_firstlineno})")
    assert "self.manual_backward(loss):" in manual
    assert "schedulers" not in manual
    assert "zero_grad" not in manual


def test_after_fit_the_optimizer_is_known(tmp_path: Path) -> None:
    class Quasi(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), max_iter=1)

    run, module = trainer(tmp_path, limit_val_batches=0), Quasi()
    assert "as LBFGS" in explain(run, module)
    run.fit(module, batches(3))
    text = explain(run, module)
    assert "closure():" in text
    assert "as LBFGS" not in text
    assert "3 per epoch; a length that can be trusted" in text


def test_windows_are_shown_only_if_batches_are_accumulated(tmp_path: Path) -> None:
    plain, two = body(trainer(tmp_path), Net()), body(trainer(tmp_path, accumulate_grad_batches=2), Net())
    scheduled = body(trainer(tmp_path, callbacks=[GradientAccumulationScheduler({0: 1, 4: 8})]), Net())
    assert "batch of a step" not in plain
    assert "loss / " not in plain
    assert "loss = loss / 2" in two
    assert "loss = loss / the batches of the step" in scheduled
    deeper = [len(line_of(text, "optimizer.step()")) for text in (two, plain)]
    assert deeper[0] - deeper[1] == 4


@pytest.mark.parametrize(
    ("options", "there", "absent"),
    [
        ({"gradient_clip_val": 0.5}, "clip the gradients' norm to 0.5", ""),
        ({"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}, "clip the gradients' value to 0.5", ""),
        ({}, "optimizer.step()", "clip"),
        ({"precision": "16-mixed"}, "bring the gradients to their real size", ""),
        ({"precision": "bf16-mixed"}, "in bf16-mixed", "real size"),
        ({"precision": "64-true"}, "move the batch to cpu", ""),
        ({"limit_val_batches": 0}, "for each epoch, until max_epochs=1:", "validat"),
        ({"num_sanity_val_steps": 0}, "validate after the last batch of every epoch", "sanity"),
        ({"max_steps": 7, "max_epochs": None}, "for each epoch, until max_steps=7", "max_epochs"),
        ({"logger": True, "log_every_n_steps": 5}, "step values to the loggers, every 5 steps", ""),
        ({}, "training_step", "to the loggers"),
        ({"enable_checkpointing": True}, "do what callbacks asked for, such as save", ""),
        ({}, "training_step", "such as save"),
        ({"reload_dataloaders_every_n_epochs": 2}, "every 2 epochs: ask train_dataloader()", ""),
    ],
)
def test_settings_shape_the_listing(options: dict[str, Any], there: str, absent: str, tmp_path: Path) -> None:
    text = body(trainer(tmp_path, **options), Net())
    assert there in text
    assert not absent or absent not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "after the last batch of every epoch"),
        ({"check_val_every_n_epoch": 3}, "after the last batch of every 3. epoch"),
        ({"val_check_interval": 100}, "after every 100 batches"),
        ({"val_check_interval": 100, "check_val_every_n_epoch": 2}, "after every 100 batches, in every 2. epoch"),
        (
            {"val_check_interval": 100, "check_val_every_n_epoch": None},
            "after every 100 batches, counted across epochs",
        ),
        ({"val_check_interval": 0.25}, "after every 0.25 of an epoch"),
        ({"val_check_interval": timedelta(minutes=10)}, "every 0:10:00"),
    ],
)
def test_schedule_in_words(options: dict[str, Any], words: str) -> None:
    assert schedule_in_words(Settings(**options)) == words


def settings_rows(run: L.Trainer, module: L.LightningModule) -> dict[str, str]:
    rows = explain(run, module).split("Settings\n")[1].splitlines()
    return {row[4:38].strip(): row[38:].strip() for row in rows}


def test_settings_say_what_was_given_and_what_was_chosen(tmp_path: Path) -> None:
    rows = settings_rows(trainer(tmp_path, accumulate_grad_batches=2, max_epochs=None, precision="bf16"), Net())
    assert rows["accumulate_grad_batches=2"] == "given"
    assert rows["precision='bf16-mixed'"] == "given"
    assert rows["max_epochs=1000"].startswith("no limit was given")
    assert rows["device='cpu'"] == "accelerator='cpu': asked for"
    assert rows["log_every_n_steps=50"].startswith("default")
    assert rows["batches"].startswith("stay as they are")
    assert rows["loggers"] == "none: logger=False"
    assert rows["callbacks"] == "Preemption"
    assert "profiler" not in rows


def test_a_default_that_is_given_counts_as_given(tmp_path: Path) -> None:
    assert settings_rows(trainer(tmp_path, max_epochs=1000), Net())["max_epochs=1000"] == "given"


def test_settings_name_what_was_added(tmp_path: Path) -> None:
    run = L.Trainer(accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False, profiler="simple")
    rows = settings_rows(run, Net())
    assert rows["callback ModelCheckpoint"] == "added, because enable_checkpointing=False was not given"
    assert rows["callbacks"] == "ModelSummary, Preemption, ModelCheckpoint"
    assert rows["log_dir"] == f"{tmp_path / 'lightning_logs'}: a folder of its own for this run"
    assert rows["profiler"] == "SimpleProfiler"
    assert list(tmp_path.iterdir()) == []


def test_moved_batches_say_so(tmp_path: Path) -> None:
    class Moving(Net):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    assert settings_rows(trainer(tmp_path), Moving())["batches"] == "are moved to cpu"


def test_a_module_without_validation_says_so(tmp_path: Path) -> None:
    class Plain(L.LightningModule):
        def training_step(self, batch: Any) -> Any: ...

        def configure_optimizers(self) -> Any: ...

    text = explain(trainer(tmp_path), Plain())
    assert "none: there is no validation_step" in text
    assert "validate" not in text.split("Settings")[0]


def test_callbacks_of_the_module_are_shown(tmp_path: Path) -> None:
    class Own(Net):
        def configure_callbacks(self) -> Any:
            assert self.trainer is not None
            return [Mine()]

    assert "Mine (" in line_of(explain(trainer(tmp_path), Own()), "on_train_batch_start")


def wrong_signature() -> L.LightningModule:
    class Wrong(Net):
        def on_train_batch_end(self, outputs: Any) -> None: ...

    return Wrong()


def misspelt() -> L.LightningModule:
    class Wrong(Net):
        def on_train_epoch_ends(self) -> None: ...

    return Wrong()


def wrong_step() -> L.LightningModule:
    class Wrong(Net):
        def validation_step(self, batch: Any, batch_idx: int, more: int, even_more: int) -> None: ...

    return Wrong()


def no_step() -> L.LightningModule:
    class Wrong(L.LightningModule):
        def configure_optimizers(self) -> None: ...

    return Wrong()


@pytest.mark.parametrize("make", [wrong_signature, misspelt, wrong_step, no_step])
def test_explain_refuses_what_fit_refuses(make: Any, tmp_path: Path) -> None:
    with pytest.raises(HookError) as from_fit:
        trainer(tmp_path).fit(make(), batches(), batches())
    with pytest.raises(HookError) as from_explain:
        trainer(tmp_path).explain(make())
    assert str(from_explain.value) == str(from_fit.value)


def test_a_line_with_nothing_under_it_has_no_colon(tmp_path: Path) -> None:
    class Manual(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> None: ...

    trainer = L.Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False, max_epochs=1)
    lines = trainer.explain(Manual()).split("Settings")[0].splitlines()
    steps = [line.strip() for line in lines if "optimizer.step()" in line]
    assert steps == ["optimizer.step()"]
    depths = [len(line) - len(line.lstrip()) for line in lines]
    for index, line in enumerate(lines[:-1]):
        assert depths[index + 1] > depths[index] or not line.endswith(":"), line
