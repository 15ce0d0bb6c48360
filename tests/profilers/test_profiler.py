"""The argument, the base class, and that a run without profiler is left as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from leyden.errors import ConfigurationError, LeydenError
from leyden.profilers import (
    AdvancedProfiler,
    PassThroughProfiler,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
    ThroughputProfiler,
    resolve_profiler,
)
from profiled import Net, Watcher, batches, make_trainer

torch.set_num_threads(1)


class Notes(Profiler):
    """Writes down what it is told."""

    def __init__(self, dirpath: Any = None, filename: Any = None, text: str = "the report") -> None:
        super().__init__(dirpath, filename)
        self.notes: list[str] = []
        self.text = text

    def start(self, action: str) -> None:
        self.notes.append(f"+{action}")

    def stop(self, action: str) -> None:
        self.notes.append(f"-{action}")

    def step(self) -> None:
        self.notes.append("step")

    def setup(self, stage: str, log_dir: str | None) -> None:
        super().setup(stage, log_dir)
        self.notes.append(f"setup {stage} {log_dir}")

    def teardown(self, stage: str) -> None:
        self.notes.append(f"teardown {stage}")

    def summary(self) -> str:
        return self.text


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (None, PassThroughProfiler),
        ("simple", SimpleProfiler),
        ("advanced", AdvancedProfiler),
        ("pytorch", PyTorchProfiler),
        ("throughput", ThroughputProfiler),
    ],
)
def test_names_are_resolved(given: str | None, kind: type, tmp_path: Path) -> None:
    assert type(make_trainer(tmp_path, profiler=given).profiler) is kind


def test_a_profiler_is_taken_as_it_is(tmp_path: Path) -> None:
    profiler = Notes()
    assert make_trainer(tmp_path, profiler=profiler).profiler is profiler


@pytest.mark.parametrize("given", ["simpel", "xla", 1, True, SimpleProfiler])
def test_other_values_are_refused_with_the_known_names(given: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"Allowed: None, 'simple', 'advanced', 'pytorch', 'throughput', or a leyden"
    ):
        resolve_profiler(given)


def test_a_misspelt_name_is_recognised() -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'simple'"):
        resolve_profiler("simpel")


def test_the_package_loads_profilers_when_they_are_named() -> None:
    code = (
        "import sys, leyden.profilers as p; before = [m for m in sys.modules if m.startswith('leyden.profilers.')];"
        "p.SimpleProfiler; after = sorted(m for m in sys.modules if m.startswith('leyden.profilers.')); print(before, after)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[] ['leyden.profilers.profiler', 'leyden.profilers.simple']"


def test_the_order_of_one_batch(tmp_path: Path) -> None:
    profiler, module = Notes(), Net()
    make_trainer(tmp_path, profiler=profiler, max_epochs=1, limit_val_batches=0).fit(module, batches(1))
    step = "[LightningModule]Net.training_step"
    epoch_end = "[LightningModule]Net.on_train_epoch_end"
    assert profiler.notes == [
        f"setup fit {tmp_path}",
        "+next_batch", "-next_batch", f"+{step}", f"-{step}", "+backward", "-backward", "+optimizer_step",
        "-optimizer_step", "step", f"+{epoch_end}", f"-{epoch_end}", "teardown fit",
    ]  # fmt: skip


def test_an_evaluation_steps_only_outside_of_fit(tmp_path: Path) -> None:
    profiler = Notes()
    trainer = make_trainer(tmp_path, profiler=profiler, max_epochs=1)
    trainer.fit(Net(), batches(4), batches(2))
    assert profiler.notes.count("step") == 4
    trainer.test(Net(), batches(3))
    assert profiler.notes.count("step") == 4 + 3


def test_user_code_may_profile_parts_of_its_own(tmp_path: Path) -> None:
    class Parts(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with self.trainer.profiler.profile("my part"):
                return super().training_step(batch, batch_idx)

    profiler = Notes()
    make_trainer(tmp_path, profiler=profiler, limit_val_batches=0).fit(Parts(), batches(5))
    assert profiler.notes.count("+my part") == profiler.notes.count("-my part") == 10
    make_trainer(tmp_path, limit_val_batches=0).fit(Parts(), batches(5))  # also where there is no profiler


def test_an_action_that_raises_is_stopped() -> None:
    profiler = Notes()
    with pytest.raises(KeyError):
        with profiler.profile("part") as action:
            raise KeyError(action)
    assert profiler.notes == ["+part", "-part"]


@pytest.mark.parametrize("kind", [SimpleProfiler, AdvancedProfiler, PyTorchProfiler])
def test_stop_without_start_is_an_error(kind: Any) -> None:
    with pytest.raises(LeydenError, match=r"stop\('part'\): it was not started"):
        kind().stop("part")


def test_the_report_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, profiler=Notes(), limit_val_batches=0).fit(Net(), batches(1))
    assert capsys.readouterr().out == "the report\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "name", "expected"),
    [(None, "times", "fit-times.txt"), ("reports/new", None, "reports/new/fit-profile.txt")],
)
def test_the_report_is_written(
    folder: str | None, name: str | None, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profiler = Notes(tmp_path / folder if folder else None, name)
    make_trainer(tmp_path, profiler=profiler, limit_val_batches=0).fit(Net(), batches(1))
    assert (tmp_path / expected).read_text(encoding="utf-8") == "the report\n"
    assert capsys.readouterr().out == ""


def test_an_empty_report_is_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, profiler=Notes(text=""), limit_val_batches=0).fit(Net(), batches(1))
    assert capsys.readouterr().out == ""


def test_a_trial_run_writes_no_report_into_the_log_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_trainer(tmp_path, profiler=Notes(filename="times"), fast_dev_run=True).fit(Net(), batches(1), batches(1))
    assert list(tmp_path.iterdir()) == []
    assert "the report" in capsys.readouterr().out


def test_a_run_that_fails_is_reported_and_torn_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyError("broken")

    profiler = Notes()
    with pytest.raises(KeyError, match="broken"):
        make_trainer(tmp_path, profiler=profiler, limit_val_batches=0).fit(Broken(), batches(1))
    assert profiler.notes[-1] == "teardown fit"
    assert capsys.readouterr().out == "the report\n"


def test_optimizers_are_left_alone_after_the_run(tmp_path: Path) -> None:
    profiler = Notes()
    trainer = make_trainer(tmp_path, profiler=profiler, limit_val_batches=0)
    trainer.fit(Net(), batches(1))
    before = list(profiler.notes)
    trainer.optimizers[0].step()
    assert profiler.notes == before


def test_without_profiler_nothing_is_wrapped(tmp_path: Path) -> None:
    module, watcher = Net(), Watcher()
    trainer = make_trainer(tmp_path, callbacks=[watcher])
    trainer.fit(module, batches(2), batches(1))
    run = trainer._run
    assert run is not None
    assert run.validation is not None
    assert run.training_step == module.training_step
    assert run.validation.step == module.validation_step
    assert run.hooks.on_train_epoch_end == (module.on_train_epoch_end,)
    assert [hook.func for hook in run.hooks.on_train_batch_end] == [watcher.on_train_batch_end]  # type: ignore[attr-defined]
    assert run.validation.hooks.end == ()
    assert run.move is None
    assert run.source.around is None
    assert run.validation.sources[0].around is None
    hooks = run.handles[0].optimizer._optimizer_step_pre_hooks.values()
    assert not [hook for hook in hooks if hook.__module__.startswith("leyden.profilers")]
