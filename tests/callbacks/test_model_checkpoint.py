"""ModelCheckpoint against a model of its policy: which files exist, and what is in them."""

from __future__ import annotations

import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leyden.callbacks.model_checkpoint import ModelCheckpoint
from leyden.checkpoint.format import About
from leyden.errors import CheckpointError, ConfigurationError, LeydenWarning, MetricError
from leyden.strategy import SingleDevice


class FakeLogger:
    def __init__(self, log_dir: str | None = None) -> None:
        self.log_dir = log_dir
        self.saves: list[str] = []

    def after_save_checkpoint(self, callback: ModelCheckpoint) -> None:
        self.saves.append(callback.last_model_path or callback.best_model_path)


def about(path: str) -> About:
    """What `read_about` says of the small files below."""
    try:
        content = json.loads(pathlib.Path(path).read_text())
        return About(global_step=content["step"], run_id=content.get("run_id"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


@pytest.fixture(scope="module", autouse=True)
def small_files() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leyden.callbacks.checkpoint_name.read_about", about)
        yield


class FakeTrainer:
    """The part of the Trainer that the callback sees; a checkpoint is a small file with the step and states."""

    def __init__(self, folder: pathlib.Path, *callbacks: ModelCheckpoint, val_batches: int = 2) -> None:
        self.default_root_dir = str(folder)
        self.callbacks = callbacks
        self.num_val_batches = [val_batches] if val_batches else []
        self.callback_metrics: dict[str, torch.Tensor] = {}
        self.loggers: list[FakeLogger] = []
        self.global_step = self.current_epoch = self.fast_dev_run = 0
        self.sanity_checking = False
        self.is_global_zero = True
        self.actions: list[Callable[[], None]] = []
        self.written: list[tuple[str, int]] = []
        self.printed: list[str] = []
        self.fail = False
        self.run_id = "a"
        self.strategy = SingleDevice(torch.device("cpu"))

    @property
    def checkpoint_callbacks(self) -> list[ModelCheckpoint]:
        return list(self.callbacks)

    def at_step_boundary(self, action: Callable[[], None]) -> None:
        self.actions.append(action)

    def shared_request(self, action: Callable[[], None]) -> Callable[[], None]:
        return lambda: self.at_step_boundary(action)

    def print(self, text: str) -> None:
        self.printed.append(text)

    def save_checkpoint(
        self,
        path: str,
        weights_only: bool = False,
        wait: bool = True,
        then: Sequence[Callable[[], object]] = (),
    ) -> None:
        if self.fail:
            raise OSError("disk full")
        states = {callback.state_key: callback.state_dict() for callback in self.callbacks}
        content = {"step": self.global_step, "run_id": self.run_id, "weights_only": weights_only, "callbacks": states}
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(path + ".tmp")
        temporary.write_text(json.dumps(content))
        os.replace(temporary, path)
        self.written.append((os.path.basename(path), self.global_step))
        if self.is_global_zero:
            for action in then:
                action()

    # the loop

    def event(self, name: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, name)(self, None, *arguments)
        while self.actions:
            self.actions.pop(0)()

    def log(self, **metrics: float) -> None:
        self.callback_metrics.update({key.replace("__", "/"): torch.tensor(value) for key, value in metrics.items()})

    def start(self, sanity: bool = True) -> None:
        self.event("setup", "fit")
        self.event("on_fit_start")
        self.event("on_train_start")
        if sanity and self.num_val_batches:
            self.sanity_checking = True
            self.event("on_validation_end")
            self.sanity_checking = False

    def step(self, n: int = 1, accumulate: int = 1) -> None:
        for _ in range(n):
            for micro in range(accumulate):
                self.global_step += micro == accumulate - 1
                self.event("on_train_batch_end", None, None, 0)

    def epoch(self, steps: int = 2, **metrics: float) -> None:
        self.step(steps)
        self.log(**metrics)
        if self.num_val_batches:
            self.event("on_validation_end")
        self.event("on_train_epoch_end")
        self.current_epoch += 1

    def end(self) -> None:
        self.event("on_train_end")
        self.event("on_fit_end")
        self.event("teardown", "fit")


def step_in(path: pathlib.Path | str) -> int:
    step = json.loads(pathlib.Path(path).read_text())["step"]
    assert isinstance(step, int)
    return step


def files(folder: pathlib.Path) -> dict[str, int]:
    """The step in each file, by name."""
    return {path.name: step_in(path) for path in sorted(folder.glob("*"))} if folder.exists() else {}


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "checkpoints"


# the policy


def kept_steps(scores: list[tuple[int, float]], k: int, mode: str) -> set[int]:
    """The model: of (step, score), the steps of the best k; NaN last, earlier before later."""
    sign = 1 if mode == "min" else -1
    order = sorted(scores, key=lambda s: (math.isnan(s[1]), 0 if math.isnan(s[1]) else sign * s[1], s[0]))
    return {step for step, _ in (order if k == -1 else order[:k])}


metric_values = st.one_of(st.integers(0, 3).map(float), st.sampled_from([math.nan, math.inf, -math.inf]))
triggers = st.sampled_from(
    [
        {},
        {"every_n_epochs": 2},
        {"save_on_train_epoch_end": True},
        {"every_n_train_steps": 1},
        {"every_n_train_steps": 3},
    ]
)


@settings(max_examples=400, deadline=None)
@given(
    values=st.lists(metric_values, min_size=1, max_size=8),
    steps=st.integers(1, 4),
    k=st.sampled_from([-1, 0, 1, 2, 3]),
    mode=st.sampled_from(["min", "max"]),
    save_last=st.sampled_from([None, True, "link"]),
    trigger=triggers,
    val_batches=st.sampled_from([0, 2]),
    resume_at=st.one_of(st.none(), st.integers(0, 7)),
)
def test_the_files_are_those_of_the_model(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[float],
    steps: int,
    k: int,
    mode: Any,
    save_last: Any,
    trigger: dict[str, Any],
    val_batches: int,
    resume_at: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("run")

    def make() -> FakeTrainer:
        arguments = {"monitor": "loss", "save_top_k": k, "mode": mode, "save_last": save_last, **trigger}
        return FakeTrainer(folder, ModelCheckpoint(dirpath=folder, **arguments), val_batches=val_batches)

    trainer = make()
    trainer.log(loss=math.nan)
    trainer.start()
    every_steps, every_epochs = trigger.get("every_n_train_steps"), trigger.get("every_n_epochs", 1)
    saved: list[tuple[int, float]] = []
    now = math.nan
    for epoch, value in enumerate(values):
        trainer.epoch(steps, loss=value)
        for step in range(epoch * steps + 1, (epoch + 1) * steps + 1):
            if every_steps and step % every_steps == 0:
                saved.append((step, now))  # a step trigger sees the value of the epoch before
        now = value
        if not every_steps and (epoch + 1) % every_epochs == 0:
            saved.append(((epoch + 1) * steps, value))
        if epoch == resume_at:  # a new process goes on from what a manual save holds
            state = json.loads(json.dumps(trainer.callbacks[0].state_dict()))
            before, trainer = trainer, make()
            trainer.global_step, trainer.current_epoch = before.global_step, before.current_epoch
            trainer.callback_metrics = before.callback_metrics
            trainer.callbacks[0].load_state_dict(state)
            trainer.start()
    trainer.end()

    steps_done = len(values) * steps
    expected = {f"epoch={(step - 1) // steps}-step={step}.ckpt": step for step in kept_steps(saved, k, mode)}
    if save_last:
        expected["last.ckpt"] = steps_done
    assert files(folder) == expected

    callback = trainer.callbacks[0]
    best = kept_steps(saved, 1, mode) if k else set()
    assert (step_in(callback.best_model_path) if best else callback.best_model_path) == (best.pop() if best else "")
    assert {step_in(path) for path in callback.best_k_models} == kept_steps(saved, k, mode)
    assert callback.last_model_path == (str(folder / "last.ckpt") if "last.ckpt" in expected else "")
    if (folder / "last.ckpt").is_symlink():
        assert save_last == "link"


@settings(max_examples=100, deadline=None)
@given(
    epochs=st.integers(1, 6),
    k=st.sampled_from([-1, 0, 1]),
    save_last=st.sampled_from([None, True, "link"]),
    every_n_train_steps=st.sampled_from([None, 1, 3]),
)
def test_without_a_metric_the_most_recent_is_kept(
    tmp_path_factory: pytest.TempPathFactory, epochs: int, k: int, save_last: Any, every_n_train_steps: int | None
) -> None:
    folder = tmp_path_factory.mktemp("run")
    callback = ModelCheckpoint(folder, save_top_k=k, save_last=save_last, every_n_train_steps=every_n_train_steps)
    trainer = FakeTrainer(folder, callback)
    trainer.start()
    for _ in range(epochs):
        trainer.epoch(2)
    trainer.end()
    n = every_n_train_steps or 2
    saved = [step for step in range(1, 2 * epochs + 1) if step % n == 0]
    kept = {-1: saved, 0: [], 1: saved[-1:]}[k]
    expected = {f"epoch={(step - 1) // 2}-step={step}.ckpt": step for step in kept}
    if save_last:
        expected["last.ckpt"] = 2 * epochs
    assert files(folder) == expected
    assert callback.best_model_path == (str(folder / list(expected)[len(kept) - 1]) if kept else "")
    assert callback.best_model_score is None
    assert callback.best_k_models == {}


def test_the_default_run(tmp_path: pathlib.Path) -> None:
    callback = ModelCheckpoint()
    trainer = FakeTrainer(tmp_path, callback)
    trainer.start()
    trainer.epoch(79)
    trainer.end()
    assert files(tmp_path / "checkpoints") == {"epoch=0-step=79.ckpt": 79}
    assert callback.best_model_path == str(tmp_path / "checkpoints" / "epoch=0-step=79.ckpt")


def test_last_is_the_last_whatever_the_best_is(folder: pathlib.Path) -> None:
    callback = ModelCheckpoint(folder, monitor="loss", save_last=True)
    trainer = FakeTrainer(folder, callback)
    trainer.start()
    trainer.epoch(loss=1.0)
    trainer.epoch(loss=2.0)
    assert files(folder) == {"epoch=0-step=2.ckpt": 2, "last.ckpt": 4}
    trainer.step()  # stopped within the third epoch
    trainer.end()
    assert files(folder) == {"epoch=0-step=2.ckpt": 2, "last.ckpt": 5}
    assert callback.current_score is not None
    assert callback.current_score.item() == 2.0


def test_only_the_end_is_saved_when_triggers_are_off(folder: pathlib.Path) -> None:
    trainer = FakeTrainer(folder, ModelCheckpoint(folder, save_last=True, every_n_epochs=0))
    trainer.start()
    trainer.epoch()
    assert files(folder) == {}
    trainer.end()
    assert files(folder) == {"last.ckpt": 2}


def test_an_earlier_last_is_replaced(folder: pathlib.Path) -> None:
    for steps in (3, 1):
        trainer = FakeTrainer(folder, ModelCheckpoint(folder, save_top_k=0, save_last=True))
        trainer.start()
        trainer.epoch(steps)
        trainer.end()
    assert files(folder) == {"last.ckpt": 1}


def test_last_with_a_template(folder: pathlib.Path) -> None:
    class Named(ModelCheckpoint):
        CHECKPOINT_NAME_LAST = "{epoch}-last"

    trainer = FakeTrainer(folder, Named(folder, save_last=True))
    trainer.start()
    trainer.epoch()
    trainer.epoch()
    trainer.end()
    assert files(folder) == {"epoch=1-step=4.ckpt": 4, "epoch=1-last.ckpt": 4}


def test_last_costs_no_second_write(folder: pathlib.Path) -> None:
    trainer = FakeTrainer(folder, ModelCheckpoint(folder, save_last=True))
    trainer.start()
    trainer.epoch()
    trainer.end()
    assert trainer.written == [("epoch=0-step=2.ckpt", 2)]
    assert files(folder) == {"epoch=0-step=2.ckpt": 2, "last.ckpt": 2}


def test_the_old_is_deleted_only_after_the_new_is_there(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = ModelCheckpoint(folder, monitor="loss", save_last="link")
    trainer = FakeTrainer(folder, callback)
    trainer.start()
    trainer.epoch(loss=2.0)
    seen: list[dict[str, int]] = []

    def remove(path: str) -> None:
        seen.append(files(folder))
        os.remove(path)

    monkeypatch.setattr("leyden.callbacks.model_checkpoint.remove", remove)
    trainer.epoch(loss=1.0)
    assert seen == [{"epoch=0-step=2.ckpt": 2, "epoch=1-step=4.ckpt": 4, "last.ckpt": 4}]
    assert files(folder) == {"epoch=1-step=4.ckpt": 4, "last.ckpt": 4}


def test_a_failed_save_changes_nothing(folder: pathlib.Path) -> None:
    callback = ModelCheckpoint(folder, monitor="loss", save_last=True)
    trainer = FakeTrainer(folder, callback)
    trainer.start()
    trainer.epoch(loss=2.0)
    state = callback.state_dict()
    trainer.fail = True
    with pytest.raises(OSError, match="disk full"):
        trainer.epoch(loss=1.0)
    assert callback.state_dict() == {**state}
    assert files(folder) == {"epoch=0-step=2.ckpt": 2, "last.ckpt": 2}


# triggers


@pytest.mark.parametrize("accumulate", [1, 3])
def test_step_trigger_counts_optimizer_steps_once(folder: pathlib.Path, accumulate: int) -> None:
    trainer = FakeTrainer(folder, ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=2))
    trainer.start()
    trainer.step(5, accumulate)
    assert [step for _, step in trainer.written] == [2, 4]


def test_time_trigger(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    trainer = FakeTrainer(folder, ModelCheckpoint(folder, save_top_k=-1, train_time_interval=timedelta(seconds=10)))
    trainer.start()
    for _ in range(12):
        clock[0] += 4
        trainer.step()
    assert [step for _, step in trainer.written] == [3, 6, 9, 12]


def test_every_validation_of_an_epoch_is_a_trigger(folder: pathlib.Path) -> None:
    trainer = FakeTrainer(folder, ModelCheckpoint(folder, monitor="loss", save_top_k=-1))
    trainer.start()
    for loss in (1.0, 2.0):
        trainer.step()
        trainer.log(loss=loss)
        trainer.event("on_validation_end")
    assert files(folder) == {"epoch=0-step=1.ckpt": 1, "epoch=0-step=2.ckpt": 2}


def test_what_does_not_trigger(folder: pathlib.Path) -> None:
    trainer = FakeTrainer(folder, ModelCheckpoint(folder, save_last=True))
    trainer.event("setup", "validate")
    trainer.event("on_validation_end")
    trainer.event("teardown", "validate")
    trainer.start()
    trainer.end()  # no step was done
    trainer.fast_dev_run = 1
    trainer.start()
    trainer.epoch()
    trainer.end()
    assert not folder.exists()


def test_epoch_in_the_name_is_that_of_the_trigger(folder: pathlib.Path) -> None:
    callback = ModelCheckpoint(folder, save_on_train_epoch_end=True)
    trainer = FakeTrainer(folder, callback)
    trainer.start()
    trainer.step()
    callback.on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
    trainer.current_epoch += 1  # the boundary comes after the turn of the epoch
    trainer.actions.pop()()
    assert files(folder) == {"epoch=0-step=1.ckpt": 1}


def test_values_are_those_of_the_moment_of_writing(folder: pathlib.Path) -> None:
    callback = ModelCheckpoint(folder, monitor="loss", filename="{loss}")
    trainer = FakeTrainer(folder, callback)
    trainer.start()
    trainer.log(loss=1.0)
    trainer.step()
    callback.on_validation_end(trainer, None)  # type: ignore[arg-type]
    trainer.log(loss=2.0)  # the module's hook comes after the callback's
    trainer.actions.pop()()
    assert files(folder) == {"loss=2.0.ckpt": 1}


def test_a_save_without_a_boundary_is_made_at_the_end(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = ModelCheckpoint(folder, save_last=True, every_n_epochs=0)
    trainer = FakeTrainer(folder, callback)
    trainer.start()
    trainer.step()
    monkeypatch.setattr(trainer, "at_step_boundary", lambda action: None)
    trainer.end()
    assert files(folder) == {"last.ckpt": 1}


# the monitored key


def test_a_key_that_was_never_logged(folder: pathlib.Path) -> None:
    trainer = FakeTrainer(folder, ModelCheckpoint(folder, monitor="val_los"))
    trainer.start()
    with pytest.raises(
        MetricError, match=r"monitor='val_los'.*not logged. Did you mean 'val_loss'.*Known: acc, epoch, step, val_loss"
    ):
        trainer.epoch(val_loss=1.0, acc=0.5)
    assert not folder.exists()


def test_before_the_first_validation_it_is_a_warning(folder: pathlib.Path) -> None:
    arguments: dict[str, Any] = {"monitor": "val_loss", "save_last": True, "every_n_train_steps": 1}
    trainer = FakeTrainer(folder, ModelCheckpoint(folder, **arguments))
    trainer.start()
    with pytest.warns(LeydenWarning, match=r"\[LEY-checkpoint-no-score\] At step 1, before the first validation"):
        trainer.step()
    assert files(folder) == {"last.ckpt": 1}
    trainer.event("on_validation_end")
    with pytest.raises(MetricError, match="val_loss"):
        trainer.step()


def test_before_the_first_validation_all_are_kept_if_all_are_wanted(folder: pathlib.Path) -> None:
    callback = ModelCheckpoint(
        folder, "{step}-{val_loss:.1f}", monitor="val_loss", save_top_k=-1, every_n_train_steps=1
    )
    trainer = FakeTrainer(folder, callback)
    trainer.start()
    trainer.step()
    trainer.log(val_loss=0.5)
    trainer.event("on_validation_end")
    trainer.step()
    assert files(folder) == {"step=1-val_loss=nan.ckpt": 1, "step=2-val_loss=0.5.ckpt": 2}
    assert callback.best_model_path.endswith("step=2-val_loss=0.5.ckpt")


def test_without_validation_it_is_an_error_at_once(folder: pathlib.Path) -> None:
    trainer = FakeTrainer(folder, ModelCheckpoint(folder, monitor="x", every_n_train_steps=1), val_batches=0)
    trainer.start()
    with pytest.raises(MetricError, match="Known: epoch, step"):
        trainer.step()


def test_step_and_epoch_can_be_monitored(folder: pathlib.Path) -> None:
    trainer = FakeTrainer(folder, ModelCheckpoint(folder, monitor="step", mode="max", save_top_k=2))
    trainer.start()
    for _ in range(4):
        trainer.epoch()
    assert files(folder) == {"epoch=2-step=6.ckpt": 6, "epoch=3-step=8.ckpt": 8}


# names


@pytest.mark.parametrize(
    ("template", "auto", "expected"),
    [
        (None, True, "epoch=3-step=80.ckpt"),
        (None, False, "3-80.ckpt"),
        ("{epoch:02d}-{val_loss:.2f}", True, "epoch=03-val_loss=0.12.ckpt"),
        ("{epoch:02d}-{val/loss:.2f}", True, "epoch=03-val_loss=0.25.ckpt"),
        ("{epoch:02d}-{val/loss:.2f}", False, "03-0.25.ckpt"),
        ("epoch={epoch}-loss={val_loss:.1e}", True, "epoch=3-loss=val_loss=1.2e-01.ckpt"),
        ("a{{b}}", True, "a{b}.ckpt"),
        ("best", True, "best.ckpt"),
        ("best.ckpt", True, "best.ckpt"),
        ("best/{epoch}", True, "best/epoch=3.ckpt"),
        ("{a.b[0]}", True, "a.b[0]=1.ckpt"),
        ("{n:03d}", True, "n=007.ckpt"),
    ],
)
def test_templates(template: str | None, auto: bool, expected: str) -> None:
    metrics = {
        "epoch": 3,
        "step": 80,
        "val_loss": torch.tensor(0.125),
        "val/loss": torch.tensor(0.25),
        "a.b[0]": 1,
        "n": torch.tensor(7),
    }
    callback = ModelCheckpoint(filename=template, auto_insert_metric_name=auto)
    assert callback.format_checkpoint_name(metrics) == expected
    assert ModelCheckpoint("x", auto_insert_metric_name=auto).format_checkpoint_name(metrics, template, ver=2) == (
        os.path.abspath("x/" + expected.replace(".ckpt", "-v2.ckpt"))
    )


def test_template_errors() -> None:
    callback = ModelCheckpoint(filename="{val_los:.2f}")
    with pytest.raises(MetricError, match=r"names 'val_los'.*Did you mean 'val_loss'"):
        callback.format_checkpoint_name({"val_loss": 1.0})
    with pytest.raises(ConfigurationError, match=r"val_loss is 1\.5: .*format code 'd'"):
        callback.format_checkpoint_name({"val_loss": 1.5}, "{val_loss:02d}")


def test_a_taken_name_gets_a_version(folder: pathlib.Path) -> None:
    folder.mkdir()
    (folder / "best.ckpt").write_text('{"step": -1}')
    callback = ModelCheckpoint(folder, "best", monitor="loss", save_top_k=2)
    trainer = FakeTrainer(folder, callback)
    trainer.start()
    for loss in (3.0, 2.0, 1.0, 4.0):
        trainer.epoch(loss=loss)
    assert files(folder) == {"best.ckpt": -1, "best-v1.ckpt": 6, "best-v2.ckpt": 4}
    assert [step_in(path) for path in callback.best_k_models] == [4, 6]


@pytest.mark.parametrize(("k", "steps"), [(1, [2, 2, 6]), (2, [2, 2, 6]), (-1, [2, 4, 6])])
def test_without_versions_a_name_holds_one_checkpoint(folder: pathlib.Path, k: int, steps: list[int]) -> None:
    callback = ModelCheckpoint(folder, "best", monitor="loss", save_top_k=k, enable_version_counter=False)
    trainer = FakeTrainer(folder, callback)
    trainer.start()
    for loss, step in zip([2.0, 3.0, 1.0], steps, strict=True):
        trainer.epoch(loss=loss)
        assert files(folder) == {"best.ckpt": step}
        assert len(callback.best_k_models) == 1


def test_folder_of_the_first_logger_that_has_one(tmp_path: pathlib.Path) -> None:
    callback = ModelCheckpoint()
    trainer = FakeTrainer(tmp_path, callback)
    trainer.loggers = [FakeLogger(), FakeLogger(str(tmp_path / "version_0")), FakeLogger(str(tmp_path / "other"))]
    trainer.start()
    assert callback.dirpath == str(tmp_path / "version_0" / "checkpoints")
    trainer.epoch()
    assert [logger.saves for logger in trainer.loggers] == [[callback.best_model_path]] * 3


# state


def test_the_file_holds_the_state_that_includes_itself(folder: pathlib.Path) -> None:
    callback = ModelCheckpoint(folder, monitor="loss", save_last=True)
    trainer = FakeTrainer(folder, callback)
    trainer.start()
    trainer.epoch(loss=1.0)
    state = json.loads((folder / "last.ckpt").read_text())["callbacks"][callback.state_key]
    assert state == callback.state_dict()
    again = ModelCheckpoint(folder, monitor="loss", save_last=True)
    again.load_state_dict(state)
    for name in ("best_model_path", "best_model_score", "kth_best_model_path", "kth_value", "last_model_path"):
        assert getattr(again, name) == getattr(callback, name)
    assert again.best_model_path == str(folder / "epoch=0-step=2.ckpt")


def resumed(callback: ModelCheckpoint, state: dict[str, Any], folder: pathlib.Path, step: int) -> FakeTrainer:
    trainer = FakeTrainer(folder, callback)
    trainer.global_step = step
    callback.load_state_dict(state)
    trainer.start()
    return trainer


def test_a_resumed_run_does_not_save_its_step_again(folder: pathlib.Path) -> None:
    first = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)
    trainer = FakeTrainer(folder, first)
    trainer.start()
    trainer.step(2)
    trainer = resumed(ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1), first.state_dict(), folder, 2)
    trainer.event("on_train_batch_end", None, None, 0)  # the first of an accumulation window: no step yet
    assert trainer.written == []
    trainer.step(2)
    assert [step for _, step in trainer.written] == [4]


def test_a_validation_that_is_run_again_after_a_restart_is_not_saved_again(folder: pathlib.Path) -> None:
    first = ModelCheckpoint(folder, save_last=True)
    trainer = FakeTrainer(folder, first)
    trainer.start()
    trainer.epoch()
    trainer = resumed(ModelCheckpoint(folder, save_last=True), first.state_dict(), folder, 2)
    trainer.epoch(0)
    trainer.end()
    assert trainer.written == []
    assert files(folder) == {"epoch=0-step=2.ckpt": 2, "last.ckpt": 2}


def test_resumed_elsewhere_the_old_files_are_safe(tmp_path: pathlib.Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    first = ModelCheckpoint(old, monitor="loss", save_last=True)
    trainer = FakeTrainer(old, first)
    trainer.start()
    trainer.epoch(loss=1.0)
    before = files(old)
    callback = ModelCheckpoint(new, monitor="loss", save_last=True)
    trainer = resumed(callback, first.state_dict(), new, 2)
    trainer.epoch(loss=2.0)
    assert files(new) == {"epoch=0-step=4.ckpt": 4, "last.ckpt": 4}
    assert callback.best_model_path == str(old / "epoch=0-step=2.ckpt")
    trainer.epoch(loss=0.5)
    assert files(new) == {"epoch=1-step=6.ckpt": 6, "last.ckpt": 6}
    assert callback.best_model_path == str(new / "epoch=1-step=6.ckpt")
    assert files(old) == before


def test_files_that_are_gone_are_forgotten(folder: pathlib.Path) -> None:
    first = ModelCheckpoint(folder, monitor="loss", save_top_k=2)
    trainer = FakeTrainer(folder, first)
    trainer.start()
    trainer.epoch(loss=1.0)
    trainer.epoch(loss=2.0)
    (folder / "epoch=0-step=2.ckpt").unlink()
    callback = ModelCheckpoint(folder, monitor="loss", save_top_k=2)
    resumed(callback, first.state_dict(), folder, 4)
    assert list(callback.best_k_models) == [str(folder / "epoch=1-step=4.ckpt")]


def test_a_state_cannot_make_files_outside_of_the_folder_disappear(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "mine.txt").write_text('{"step": 2, "run_id": "a"}')
    (folder / "newest.ckpt").write_text('{"step": 2, "run_id": "a"}')
    outside = [tmp_path / "precious.ckpt", tmp_path / "checkpoints-2.ckpt"]
    for path in outside:
        path.write_text('{"step": 1, "run_id": "a"}')
    wanted = [*map(str, outside), f"{folder}/../precious.ckpt", f"{folder}/mine.txt"]
    callback = ModelCheckpoint(folder, monitor="loss", save_last=True)
    state = {
        **callback.state_dict(),
        "history": [[9.0, path] for path in [*wanted, str(folder / "newest.ckpt")]],
        "displaced": wanted,
        "last_model_path": str(outside[0]),
        "step_saved": 2,
    }
    trainer = resumed(callback, state, folder, 2)
    trainer.epoch(loss=1.0)
    trainer.end()
    assert all(path.exists() for path in outside)
    assert files(folder) == {"epoch=0-step=4.ckpt": 4, "last.ckpt": 4, "mine.txt": 2}


@pytest.mark.parametrize(("step_saved", "left"), [(4, []), (3, ["old.ckpt"])])
def test_what_a_killed_process_was_to_delete_is_deleted(step_saved: int, left: list[str], folder: pathlib.Path) -> None:
    folder.mkdir()
    for name, step in (("new.ckpt", 4), ("old.ckpt", 2), ("other.ckpt", 1)):
        (folder / name).write_text(json.dumps({"step": step, "run_id": "a"}))
    other = ModelCheckpoint(folder, monitor="acc")
    callback = ModelCheckpoint(folder, monitor="loss", save_last=True)
    callback.load_state_dict(
        {
            **callback.state_dict(),
            "history": [[1.0, str(folder / "new.ckpt")]],
            "displaced": [str(folder / "old.ckpt"), str(folder / "other.ckpt")],
            "last_model_path": str(folder / "last.ckpt"),
            "step_saved": step_saved,
        }
    )
    other.load_state_dict({**other.state_dict(), "history": [[1.0, str(folder / "other.ckpt")]]})
    trainer = FakeTrainer(folder, callback, other)
    trainer.global_step = 4
    trainer.start()
    last = ["last.ckpt"] if step_saved == 4 else []
    assert sorted(files(folder)) == sorted([*last, *left, "new.ckpt", "other.ckpt"])


def test_a_file_that_a_later_save_has_overwritten_is_not_the_one_that_was_kept(folder: pathlib.Path) -> None:
    first = ModelCheckpoint(folder, "best", monitor="loss")
    trainer = FakeTrainer(folder, first)
    trainer.start()
    trainer.epoch(loss=2.0)
    state = json.loads(json.dumps(first.state_dict()))  # in a checkpoint of step 2 that somebody else has saved
    trainer.epoch(loss=1.0)
    assert files(folder) == {"best.ckpt": 4}
    callback = ModelCheckpoint(folder, "best", monitor="loss")
    trainer = resumed(callback, state, folder, 2)
    assert callback.best_model_path == ""
    trainer.epoch(loss=3.0)
    assert files(folder) == {"best.ckpt": 4}
    assert callback.best_k_models == {str(folder / "best.ckpt"): 3.0}


def test_another_runs_name_gets_a_version_and_a_lost_one_is_overwritten(folder: pathlib.Path) -> None:
    folder.mkdir()
    (folder / "step=1.ckpt").write_text('{"step": 1, "run_id": "b"}')
    (folder / "step=2.ckpt").write_text('{"step": 2, "run_id": "a"}')
    (folder / "step=3.ckpt").write_text("damaged")
    trainer = FakeTrainer(folder, ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1))
    trainer.start()
    trainer.step(3)
    (folder / "step=3.ckpt").unlink()
    assert files(folder) == {"step=1.ckpt": 1, "step=1-v1.ckpt": 1, "step=2.ckpt": 2, "step=3-v1.ckpt": 3}


def test_a_save_that_was_still_to_come_is_made_when_the_run_goes_on(folder: pathlib.Path) -> None:
    first = ModelCheckpoint(folder, monitor="loss", save_last=True)
    trainer = FakeTrainer(folder, first)
    trainer.start()
    trainer.step(2)
    trainer.log(loss=1.0)
    first.on_validation_end(trainer, None)  # type: ignore[arg-type]
    state = json.loads(json.dumps(first.state_dict()))  # another callback saves, and the process is killed
    callback = ModelCheckpoint(folder, monitor="loss", save_last=True)
    again = FakeTrainer(folder, callback)
    again.log(loss=1.0)
    again.global_step, again.current_epoch = 2, 1
    callback.load_state_dict(state)
    again.start()
    assert files(folder) == {"epoch=0-step=2.ckpt": 2, "last.ckpt": 2}
    assert callback.state_dict()["requested"] is None


@pytest.mark.parametrize("background", [True, False])
def test_saves_wait_or_do_not(background: bool, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[bool] = []
    save = FakeTrainer.save_checkpoint

    def watched(self: Any, path: str, weights_only: bool = False, wait: bool = True, then: Any = ()) -> None:
        waited.append(wait)
        save(self, path, weights_only, wait, then)

    monkeypatch.setattr(FakeTrainer, "save_checkpoint", watched)
    arguments: dict[str, Any] = {} if background else {"background": False}
    trainer = FakeTrainer(folder, ModelCheckpoint(folder, save_last=True, **arguments))
    trainer.start()
    trainer.epoch()
    assert waited == [not background]


def test_folders_in_their_forms(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder, kept in (
        ("s3://bucket/run/", "s3://bucket/run"),
        ("memory://run", "memory://run"),
        (f"file://{tmp_path}/x/", f"{tmp_path}/x"),
        ("x", f"{tmp_path}/x"),
        ("~/x", f"{tmp_path}/x"),
        (pathlib.Path("x"), f"{tmp_path}/x"),
    ):
        assert ModelCheckpoint(folder).dirpath == kept
    metrics = {"epoch": 1, "step": 2}
    assert ModelCheckpoint("s3://bucket/run").format_checkpoint_name(metrics) == "s3://bucket/run/epoch=1-step=2.ckpt"


def test_the_same_object_in_a_second_fit(folder: pathlib.Path) -> None:
    callback = ModelCheckpoint(folder)
    for _ in range(2):
        callback.start_anew()  # as every fit does that goes on from nothing
        trainer = FakeTrainer(folder, callback)
        trainer.start()
        trainer.epoch()
        trainer.end()
        assert [step for _, step in trainer.written] == [2]


def test_state_keys() -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"monitor": "a"},
        {"monitor": "b"},
        {"monitor": "a", "mode": "max"},
        {"every_n_train_steps": 5},
        {"every_n_epochs": 2},
        {"train_time_interval": timedelta(minutes=1)},
    ]
    keys = [ModelCheckpoint(**arguments).state_key for arguments in variants]
    assert len(set(keys)) == len(keys)
    assert keys == [ModelCheckpoint(**arguments).state_key for arguments in variants]


def test_verbose_and_weights_only(folder: pathlib.Path) -> None:
    callback = ModelCheckpoint(folder, monitor="loss", verbose=True, save_weights_only=True, save_last=True)
    trainer = FakeTrainer(folder, callback)
    trainer.start()
    trainer.epoch(loss=0.5)
    assert trainer.printed == [f"Saved step 2, loss=0.5: {folder / 'epoch=0-step=2.ckpt'} and {folder / 'last.ckpt'}"]
    assert json.loads((folder / "last.ckpt").read_text())["weights_only"]


# arguments


def bad_arguments() -> Iterator[tuple[dict[str, Any], str]]:
    yield {"monitor": ""}, "monitor=''"
    yield {"mode": "low"}, "mode='low'.*'min'"
    yield {"save_top_k": -2}, "save_top_k=-2"
    yield {"save_top_k": 1.5}, "save_top_k=1.5"
    yield {"save_top_k": 3}, "save_top_k=3.*monitor='step'"
    yield {"save_last": "yes"}, "save_last='yes'"
    yield {"every_n_train_steps": -1}, "every_n_train_steps=-1"
    yield {"every_n_epochs": 1.0}, "every_n_epochs=1.0"
    yield {"train_time_interval": 60}, "train_time_interval=60.*timedelta"
    yield {"train_time_interval": timedelta(0)}, "longer than 0"
    yield {"every_n_train_steps": 5, "every_n_epochs": 1}, "got 2: every_n_train_steps=5, every_n_epochs=1"
    yield {"every_n_train_steps": 5, "save_on_train_epoch_end": True}, "save_on_train_epoch_end=True"
    yield {"filename": ""}, "filename=''"
    yield {"filename": "/tmp/x"}, "within dirpath"
    yield {"filename": "{epoch"}, "not a valid template"
    yield {"filename": "{}"}, "fields such as"
    yield {"filename": "{loss!r}"}, "fields such as"
    yield {"filename": "{loss:{width}}"}, "fields such as"
    yield {"filename": "{loss:.2q}"}, "number format"
    yield {"filename": "last", "save_last": True}, "another name than 'last'"
    yield {"filename": "../x"}, "within dirpath"


@pytest.mark.parametrize(("arguments", "message"), list(bad_arguments()))
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ModelCheckpoint(**arguments)


def test_arguments_that_turn_triggers_off() -> None:
    assert ModelCheckpoint().every_n_epochs == 1
    for arguments in ({"every_n_train_steps": 3}, {"every_n_epochs": 0}, {"every_n_train_steps": 0}):
        assert ModelCheckpoint(**arguments).every_n_epochs == 0
