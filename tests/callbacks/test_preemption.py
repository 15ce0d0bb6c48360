"""Preemption: which signals are watched and when, what is said and saved, how a SLURM job is requeued."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import leyden as L
from leyden.callbacks import ModelCheckpoint, Preemption
from leyden.callbacks.preemption import EXIT_CODE, describe, slurm_job
from leyden.checkpoint.format import load_checkpoint
from leyden.errors import CheckpointError, ConfigurationError, LeydenWarning
from leyden.loggers.logger import Logger
from quiet import make_trainer

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals")

WATCHED = (signal.SIGTERM, signal.SIGUSR1)
Hook = Callable[["Net"], object]


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test begins and ends with the default actions, and outside of SLURM."""
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in signals()}
    yield
    left = {number: signal.getsignal(number) for number in signals()}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert left == dict.fromkeys(signals(), signal.SIG_DFL)


def signals() -> tuple[signal.Signals, ...]:
    return (*WATCHED, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)


class Net(L.LightningModule):
    """Calls what it is given by the name of a hook, with the number of batches seen."""

    def __init__(self, **hooks: Hook) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.hooks = hooks
        self.seen = 0

    def call(self, name: str) -> None:
        if name in self.hooks:
            self.hooks[name](self)

    def setup(self, stage: str) -> None:
        self.call("setup")

    def on_fit_start(self) -> None:
        self.call("on_fit_start")

    def on_train_start(self) -> None:
        self.call("on_train_start")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += 1
        self.call("training_step")
        return self.layer(batch).square().mean()

    def on_train_epoch_end(self) -> None:
        self.call("on_train_epoch_end")

    def on_train_end(self) -> None:
        self.call("on_train_end")

    def on_fit_end(self) -> None:
        self.call("on_fit_end")

    def teardown(self, stage: str) -> None:
        self.call("teardown")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Validating(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.call("validation_step")


class Memory(Logger):
    name = "memory"
    version = 0

    def __init__(self, at_finalize: Callable[[], object] = lambda: None) -> None:
        self.statuses: list[str] = []
        self.at_finalize = at_finalize

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        pass

    def finalize(self, status: str) -> None:
        self.statuses.append(status)
        self.at_finalize()


def data(batches: int = 4) -> DataLoader[Any]:
    return DataLoader(torch.ones(batches, 2))  # type: ignore[arg-type]


def send(number: int = signal.SIGTERM, at: int = 0) -> Hook:
    """A hook that sends the signal to this process, in the batch with the number ``at`` or at once."""

    def hook(module: Net) -> None:
        if at in (0, module.seen):
            os.kill(os.getpid(), number)

    return hook


def end(trainer: L.Trainer, module: Net, *data_of: Any, **options: Any) -> None:
    """Fit, and see that it ends as a preempted run does."""
    with pytest.raises(SystemExit) as caught:
        trainer.fit(module, *(data_of or (data(),)), **options)
    assert caught.value.code == EXIT_CODE == 143


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in WATCHED]


# Which signals are watched, and when


def test_signals_are_watched_during_fit_only(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    during: list[Any] = []
    module = Validating(setup=lambda _: during.append(handlers()), on_fit_end=lambda _: during.append(handlers()))
    trainer.fit(module, data(), data())
    assert all(signal.SIG_DFL not in each for each in during)
    assert len(during) == 2
    assert handlers() == [signal.SIG_DFL] * 2
    during.clear()
    trainer.validate(module, data())
    assert during == [[signal.SIG_DFL] * 2]


@pytest.mark.parametrize("place", ["setup", "on_fit_start", "training_step", "validation_step", "teardown"])
def test_handling_is_put_back_after_an_error(place: str, tmp_path: Path) -> None:
    def fail(module: Net) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path).fit(Validating(**{place: fail}), data(), data())
    assert handlers() == [signal.SIG_DFL] * 2


@pytest.mark.parametrize("kept", [signal.SIG_IGN, lambda number, frame: None])
def test_a_signal_that_somebody_handles_or_ignores_is_left_alone(kept: Any, tmp_path: Path) -> None:
    signal.signal(signal.SIGUSR1, kept)
    during: list[Any] = []
    trainer = make_trainer(tmp_path)
    trainer.fit(Net(training_step=lambda _: during.append(handlers())), data())
    assert all(user == kept and term != signal.SIG_DFL for term, user in during)
    assert signal.getsignal(signal.SIGUSR1) == kept
    words = describe(Preemption())
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert words.endswith("; not on SIGUSR1, which had a handler when the Trainer was made")
    assert "SIGUSR1, which" not in describe(Preemption())


def test_a_handler_that_is_installed_during_fit_stays(tmp_path: Path) -> None:
    def own(number: int, frame: Any) -> None: ...

    make_trainer(tmp_path).fit(Net(on_train_start=lambda _: signal.signal(signal.SIGTERM, own)), data())
    assert signal.getsignal(signal.SIGTERM) is own
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_fit_within_a_fit_leaves_the_signals_to_the_outer_one(tmp_path: Path) -> None:
    outer: list[Any] = []
    inner: list[Any] = []

    def nested(module: Net) -> None:
        outer.append(handlers())
        make_trainer(tmp_path).fit(Net(training_step=lambda _: inner.append(handlers())), data(1))
        outer.append(handlers())

    make_trainer(tmp_path).fit(Net(on_train_start=nested), data(1))
    assert inner == outer[:1] == outer[1:]
    assert signal.SIG_DFL not in inner[0]


def test_a_fit_in_another_thread_watches_nothing(tmp_path: Path) -> None:
    during: list[Any] = []
    module = Net(training_step=lambda _: during.append(handlers()))
    thread = threading.Thread(target=make_trainer(tmp_path).fit, args=(module, data(1)))
    thread.start()
    thread.join()
    assert during == [[signal.SIG_DFL] * 2]


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"barebones": True}])
def test_trial_runs_and_bare_runs_have_none(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = L.Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=None, **options)
    assert not [each for each in trainer.callbacks if isinstance(each, Preemption)]


def test_one_that_is_given_is_the_only_one_and_may_watch_nothing(tmp_path: Path) -> None:
    own, during = Preemption(signals=()), []
    trainer = make_trainer(tmp_path, own)
    assert [each for each in trainer.callbacks if isinstance(each, Preemption)] == [own]
    trainer.fit(Net(training_step=lambda _: during.append(handlers())), data(1))
    assert during == [[signal.SIG_DFL] * 2]


def test_explain_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = make_trainer(tmp_path).explain(Net())
    (line,) = [line for line in text.splitlines() if "callback Preemption" in line]
    assert line.endswith("added: on SIGTERM or SIGUSR1: save at the next step boundary, exit with 143")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"signals": ["SIGKILL"]}, "signals='SIGKILL' is not valid. Allowed: names out of SIGTERM, SIGUSR1"),
        ({"signals": "SIGTREM"}, "Did you mean 'SIGTERM'"),
        ({"signals": "SIGINT"}, "Ctrl-C is handled by the Trainer"),
        ({"signals": 15}, "signals=15 is not valid"),
        ({"signals": [15]}, "signals=15 is not valid"),
        ({"requeue": "always"}, "requeue='always' is not valid. Allowed: 'auto', True or False"),
        ({"requeue": 1}, "requeue=1 is not valid"),
        ({"save": "yes"}, "save='yes' is not valid"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message.replace("(", r"\(")):
        Preemption(**arguments)


# What happens at a signal


@pytest.mark.parametrize("number", WATCHED)
@pytest.mark.parametrize(("save_last", "name"), [(None, "preempted.ckpt"), (True, "last.ckpt"), ("link", "last.ckpt")])
def test_the_state_is_saved_at_the_next_boundary(
    number: int, save_last: Any, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    memory, told = Memory(), list[Any]()
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", save_last=save_last)
    trainer = make_trainer(tmp_path, checkpoints, enable_checkpointing=True, logger=memory, accumulate_grad_batches=2)
    end(trainer, Net(training_step=send(number, at=3), teardown=told.append), data(8))
    path = tmp_path / "ckpt" / name
    checkpoint = load_checkpoint(path)
    assert checkpoint["global_step"] == 2  # the step that batch 3 of 8 belongs to
    assert "optimizer_states" in checkpoint
    assert memory.statuses == ["interrupted"]
    assert trainer.interrupted
    assert len(told) == 1
    out, err = capfd.readouterr()
    called = signal.Signals(number).name
    assert f"Ended by {called} in epoch 0 after 2 steps: the state is saved in {path}." in out
    assert 'fit(..., ckpt_path="last") goes on from it.' in out
    assert err == f"{called}: the run ends at the next step boundary. A second signal ends it at once.\n"


def test_without_checkpoints_nothing_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    end(make_trainer(tmp_path), Net(training_step=send(at=2)))
    assert list(tmp_path.iterdir()) == []
    text = capsys.readouterr().out
    assert "after 2 steps: nothing was saved, because there is no ModelCheckpoint (enable_checkpointing=False)." in text


def test_saving_can_be_left_to_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    end(make_trainer(tmp_path, Preemption(save=False), checkpoints, enable_checkpointing=True),
        Net(training_step=send(at=3)))  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=0-step=2.ckpt"]
    assert "nothing was saved, because of Preemption(save=False)" in capsys.readouterr().out


def test_weights_only_checkpoints_get_a_whole_one_beside_them(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path, save_weights_only=True, save_last=True, every_n_train_steps=1)
    end(make_trainer(tmp_path, checkpoints, enable_checkpointing=True), Net(training_step=send(at=2)))
    assert "optimizer_states" not in load_checkpoint(tmp_path / "last.ckpt")
    assert "optimizer_states" in load_checkpoint(tmp_path / "preempted.ckpt")


def test_saves_that_are_due_at_the_same_boundary_come_before(tmp_path: Path) -> None:
    order: list[str] = []

    class Asking(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.at_step_boundary(lambda: order.append("asked"))

        def on_exception(self, *_: Any) -> None:
            order.append("left")

    end(make_trainer(tmp_path, Asking()), Net(training_step=send(at=2)))
    assert order == ["asked", "asked", "left"]  # batch 1, then batch 2, in whose step the signal came before the asking


def test_a_failed_save_is_an_error_and_not_an_exit(tmp_path: Path) -> None:
    class Odd(L.Callback):
        def state_dict(self) -> Any:
            return {"what": object()}

    checkpoints = ModelCheckpoint(tmp_path)
    memory = Memory()
    trainer = make_trainer(tmp_path, Odd(), checkpoints, enable_checkpointing=True, logger=memory)
    with pytest.raises(CheckpointError, match="what"):
        trainer.fit(Net(training_step=send(at=2)), data())
    assert memory.statuses == ["failed"]


def test_the_failure_of_an_earlier_write_does_not_prevent_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, ModelCheckpoint(tmp_path), enable_checkpointing=True)
    own, failures = trainer.save_checkpoint, [CheckpointError("epoch=0.ckpt: no route to host")]

    def save(*args: Any, **options: Any) -> None:
        if failures:
            raise failures.pop()
        own(*args, **options)

    monkeypatch.setattr(trainer, "save_checkpoint", save)
    with pytest.warns(LeydenWarning, match=r"\[LEY-preemption-save\].*at the second attempt.*no route to host"):
        end(trainer, Net(training_step=send(at=2)))
    assert load_checkpoint(tmp_path / "preempted.ckpt")["global_step"] == 2


def test_an_error_before_the_boundary_counts_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def hook(module: Net) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        make_trainer(tmp_path).fit(Net(training_step=hook), data())
    assert not getattr(caught.value, "__notes__", [])
    assert "Ended by" not in capsys.readouterr().out


@pytest.mark.parametrize("place", ["setup", "on_fit_start", "sanity"])
def test_before_training_the_run_ends_at_once(place: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    begun: list[Any] = []
    memory = Memory()
    hooks = {"validation_step" if place == "sanity" else place: send(), "on_train_start": begun.append}
    trainer = make_trainer(
        tmp_path, ModelCheckpoint(tmp_path), enable_checkpointing=True, num_sanity_val_steps=2, logger=memory
    )
    end(trainer, Validating(**hooks), data(), data())
    assert not begun
    assert not list(tmp_path.iterdir())
    assert memory.statuses == ["interrupted"]
    out, err = capfd.readouterr()
    assert "Ended by SIGTERM in epoch 0 after 0 steps: before the first step: nothing was lost." in out
    assert "the run ends before its first step" in err


def test_user_code_that_swallows_the_exit_before_training_delays_it(tmp_path: Path) -> None:
    def swallow(module: Net) -> None:
        with contextlib.suppress(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)

    module = Net(on_fit_start=swallow)
    end(make_trainer(tmp_path, ModelCheckpoint(tmp_path), enable_checkpointing=True), module)
    assert module.seen == 1
    assert load_checkpoint(tmp_path / "preempted.ckpt")["global_step"] == 1


@pytest.mark.parametrize("place", ["on_train_epoch_end", "on_train_end", "on_fit_end"])
def test_at_the_end_of_training_the_state_is_saved_too(place: str, tmp_path: Path) -> None:
    end(make_trainer(tmp_path, ModelCheckpoint(tmp_path), enable_checkpointing=True), Net(**{place: send()}))
    assert load_checkpoint(tmp_path / "preempted.ckpt")["global_step"] == 4
    module = Net()
    trainer = make_trainer(tmp_path, ModelCheckpoint(tmp_path), enable_checkpointing=True)
    trainer.fit(module, data(), ckpt_path=tmp_path / "preempted.ckpt")
    assert (module.seen, trainer.global_step) == (0, 4)


def test_during_the_teardown_the_process_still_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torn: list[Any] = []
    memory = Memory(at_finalize=lambda: os.kill(os.getpid(), signal.SIGTERM))
    trainer = make_trainer(tmp_path, ModelCheckpoint(tmp_path), enable_checkpointing=True, logger=memory)
    end(trainer, Net(teardown=torn.append))
    assert len(torn) == 1
    assert memory.statuses == ["success"]
    assert "training had ended, and its checkpoints are written" in capsys.readouterr().out


def test_after_the_first_signal_the_default_actions_are_back(tmp_path: Path) -> None:
    after: list[Any] = []

    def hook(module: Net) -> None:
        if module.seen == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
            after.extend(handlers())

    end(make_trainer(tmp_path), Net(training_step=hook))
    assert after == [signal.SIG_DFL] * 2


def test_the_same_trainer_can_be_preempted_again(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, ModelCheckpoint(tmp_path), enable_checkpointing=True)
    for at in (2, 3):
        end(trainer, Net(training_step=send(at=at)))
        assert load_checkpoint(tmp_path / "preempted.ckpt")["global_step"] == at


def test_a_handler_that_outlives_fit_acts_by_default(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from types import SimpleNamespace
from leyden.callbacks import Preemption
callback = Preemption()
callback.setup(SimpleNamespace(shared_request=lambda action: action), None, "fit")
kept = signal.getsignal(signal.SIGTERM)
callback.teardown(None, None, "fit")
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
signal.signal(signal.SIGTERM, kept)
os.kill(os.getpid(), signal.SIGTERM)
print("not reached")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "", "")


# SLURM


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Put a program called scontrol onto PATH that notes its arguments; the result reads them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    put_scontrol(folder, f'echo "$@" >> {tmp_path}/calls\n')
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")

    def calls() -> list[str]:
        noted = tmp_path / "calls"
        return noted.read_text().splitlines() if noted.exists() else []

    return calls


def put_scontrol(folder: Path, body: str) -> None:
    program = folder / "scontrol"
    program.write_text(f"#!/bin/sh\n{body}")
    program.chmod(0o755)


def preempted(tmp_path: Path, callback: Preemption, number: int = signal.SIGUSR1, **options: Any) -> None:
    settings = {"enable_checkpointing": True, **options}
    given = [ModelCheckpoint(tmp_path / "ckpt")] if settings["enable_checkpointing"] else []
    end(make_trainer(tmp_path, callback, *given, **settings), Net(training_step=send(number, at=2)))


@pytest.mark.parametrize(
    ("requeue", "number", "requeued"),
    [
        ("auto", signal.SIGUSR1, True),
        ("auto", signal.SIGTERM, False),
        (True, signal.SIGUSR1, True),
        (True, signal.SIGTERM, True),
        (False, signal.SIGUSR1, False),
        (False, signal.SIGTERM, False),
    ],
)
def test_when_a_job_is_requeued(
    requeue: Any, number: int, requeued: bool, tmp_path: Path, scontrol: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    preempted(tmp_path, Preemption(requeue=requeue), number)
    assert scontrol() == ["requeue 4711"] * requeued
    assert ("SLURM job 4711 is requeued." in capsys.readouterr().out) == requeued


def test_a_task_of_an_array_is_requeued_by_itself(
    tmp_path: Path, scontrol: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4700")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "11")
    preempted(tmp_path, Preemption())
    assert scontrol() == ["requeue 4700_11"]


def test_auto_does_not_requeue_what_would_begin_anew(tmp_path: Path, scontrol: Any) -> None:
    preempted(tmp_path, Preemption(), enable_checkpointing=False)
    assert scontrol() == []
    preempted(tmp_path, Preemption(requeue=True), enable_checkpointing=False)
    assert scontrol() == ["requeue 4711"]


def test_a_job_that_had_not_begun_is_requeued(tmp_path: Path, scontrol: Any) -> None:
    end(make_trainer(tmp_path), Net(on_fit_start=send(signal.SIGUSR1)))
    assert scontrol() == ["requeue 4711"]


def test_the_signal_that_requeuing_brings_does_not_cut_the_teardown_off(tmp_path: Path, scontrol: Any) -> None:
    torn: list[Any] = []

    def at_finalize() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        torn.append(signal.getsignal(signal.SIGTERM))

    trainer = make_trainer(tmp_path, ModelCheckpoint(tmp_path), logger=Memory(at_finalize), enable_checkpointing=True)
    end(trainer, Net(training_step=send(signal.SIGUSR1, at=2), teardown=torn.append))
    assert scontrol() == ["requeue 4711"]
    assert torn[0] is signal.SIG_DFL, "the next one ends the process"
    assert len(torn) == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "echo 'Job has already finished' >&2; exit 1\n",
            "scontrol requeue 4711 failed: Job has already finished. Submit",
        ),
        ("exit 3\n", "scontrol requeue 4711 failed: exit code 3"),
        (None, "scontrol requeue 4711 failed: .*No such file or directory: 'scontrol'"),
    ],
)
def test_a_failure_of_scontrol_is_a_warning(
    body: str | None, message: str, tmp_path: Path, scontrol: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if body is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        put_scontrol(tmp_path / "bin", body)
    with pytest.warns(LeydenWarning, match=rf"\[LEY-preemption-requeue\].*{message}"):
        preempted(tmp_path, Preemption())
    assert (tmp_path / "ckpt" / "preempted.ckpt").exists()


def test_requeue_outside_of_slurm_is_a_warning(tmp_path: Path) -> None:
    preempted(tmp_path, Preemption())
    with pytest.warns(LeydenWarning, match="SLURM_JOB_ID names no job"):
        preempted(tmp_path, Preemption(requeue=True))


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "12"}, "12"),
        ({"SLURM_JOB_ID": "13", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "0"}, "12_0"),
        ({"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "0"}, None),
        ({"SLURM_JOB_ID": "12; rm -rf /"}, None),
        ({"SLURM_JOB_ID": "--all"}, None),
        ({"SLURM_JOB_ID": "12\n"}, None),
        ({"SLURM_JOB_ID": "13", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "x"}, None),
    ],
)
def test_the_id_of_a_job(environment: dict[str, str], job: str | None) -> None:
    assert slurm_job(environment) == job
