"""``compile="auto"``: the first steps are measured, and the faster way is kept. The clock is the tests' own."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import leyden as L
from both_ways import Net, Ran, assert_same, codes, fit, needs_tracing, same_size, traced_only
from leyden.checkpoint.format import load_checkpoint
from leyden.compiled import compilation
from leyden.compiled.compilation import MEASURED_STEPS, WARM_UP_STEPS, steps_left

pytestmark = [needs_tracing, pytest.mark.usefixtures("traced_only")]
_ = traced_only


class Clock(L.Callback):
    """Each batch takes as long as the test says: eager ones, and those on which a graph trained."""

    def __init__(self, eager_s: float, compiled_s: float) -> None:
        self.now, self.eager_s, self.compiled_s = 0.0, eager_s, compiled_s
        self.compiled_steps = 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer._run.compiled._inner._step  # type: ignore[union-attr]
        compiled = step is not None and step.output is not None
        if step is not None:
            step.output = None
        self.compiled_steps += compiled
        self.now += self.compiled_s if compiled else self.eager_s


def auto(folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Ran:
    init = compilation.MeasuredCompilation.__init__
    monkeypatch.setattr(
        compilation.MeasuredCompilation, "__init__", lambda self, inner, run: init(self, inner, run, lambda: clock.now)
    )
    return fit(folder, Net(), same_size(10), clock, compile="auto", **{"max_epochs": 6, **options})


def test_the_faster_way_is_kept_if_it_is_the_compiled_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(eager_s=10.0, compiled_s=4.0)
    ran = auto(tmp_path, clock, monkeypatch)
    assert ran.compiled.kept == "compiled"
    assert ran.compiled.why == "1e+04 ms per step in eager, 4e+03 ms compiled: compiled is kept"
    assert ran.line.startswith("compile='auto': 1e+04 ms per step in eager")
    assert "the whole step is compiled: 1 graph" in ran.line
    assert clock.compiled_steps == 60 - WARM_UP_STEPS - MEASURED_STEPS
    assert_same(ran, fit(tmp_path, Net(), same_size(10), compile=False, max_epochs=6), 1e-4)


def test_the_faster_way_is_kept_if_it_is_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(eager_s=4.0, compiled_s=4.5)
    ran = auto(tmp_path, clock, monkeypatch)
    assert ran.compiled.kept == "eager"
    assert ran.line == "compile='auto': 4e+03 ms per step in eager, 4.5e+03 ms compiled: eager is kept"
    assert WARM_UP_STEPS + MEASURED_STEPS <= clock.compiled_steps <= 2 * WARM_UP_STEPS + MEASURED_STEPS + 1
    assert ran.trainer._run.training_step == ran.module.training_step  # type: ignore[union-attr]
    assert_same(ran, fit(tmp_path, Net(), same_size(10), compile=False, max_epochs=6), 1e-4)


def test_a_short_run_is_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(eager_s=1.0, compiled_s=0.0)
    ran = auto(tmp_path, clock, monkeypatch)
    assert ran.compiled.kept == "eager"
    left = 60 - WARM_UP_STEPS - MEASURED_STEPS
    assert ran.compiled.why == f"1e+03 ms per step: the {left} s left do not pay for compiling"
    assert clock.compiled_steps == 0
    assert ran.compiled._inner.compilations == 0


class Saves(L.Callback):
    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if (step := trainer.global_step) in self.steps:
            path = Path(trainer.default_root_dir) / f"{step}.ckpt"
            trainer.at_step_boundary(lambda: trainer.save_checkpoint(path))


@pytest.mark.parametrize(("compiled_s", "kept"), [(4.0, "compiled"), (20.0, "eager")])
def test_the_choice_is_taken_over(
    compiled_s: float, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(10.0, compiled_s)
    init = compilation.MeasuredCompilation.__init__
    monkeypatch.setattr(
        compilation.MeasuredCompilation, "__init__", lambda self, inner, run: init(self, inner, run, lambda: clock.now)
    )
    options: dict[str, Any] = {"compile": "auto", "max_epochs": 6}
    ran = fit(tmp_path, Net(), same_size(10), clock, Saves(5, 20, 50), **options)
    assert ran.compiled.kept == kept
    saved = [load_checkpoint(tmp_path / f"{step}.ckpt")["compiled"]["kept"] for step in (5, 20, 50)]
    assert saved == [None, None, kept]

    clock.compiled_s = 24.0 - compiled_s  # it would decide otherwise now
    later = fit(tmp_path, Net(), same_size(10), clock, ckpt_path=tmp_path / "50.ckpt", **options)
    assert later.compiled.kept == kept
    assert later.compiled.why == ran.compiled.why
    assert later.rows == ran.rows[-len(later.rows) :]
    clock.compiled_s = compiled_s
    for step in (5, 20):  # before the choice, while eager or compiled steps were measured
        earlier = fit(tmp_path, Net(), same_size(10), clock, ckpt_path=tmp_path / f"{step}.ckpt", **options)
        assert earlier.compiled.kept == kept
    always = fit(tmp_path, Net(), same_size(10), ckpt_path=tmp_path / "50.ckpt", compile=True, max_epochs=6)
    assert always.whole
    fit(tmp_path, Net(), same_size(10), Saves(30), compile=True, max_epochs=4)
    measured = fit(tmp_path, Net(), same_size(10), clock, ckpt_path=tmp_path / "30.ckpt", **options)
    assert measured.compiled.kept == kept


def run_of(total: float, max_epochs: int = 3, max_steps: int = -1, accumulate: int = 1, **progress: int) -> Any:
    return SimpleNamespace(
        progress=SimpleNamespace(**{"epoch": 0, "batch": 0, "global_step": 0, **progress}),
        source=SimpleNamespace(total=total),
        max_epochs=max_epochs,
        max_steps=max_steps,
        accumulate=accumulate,
    )


@pytest.mark.parametrize(
    ("run", "left"),
    [
        (run_of(10), 30),
        (run_of(10, epoch=1, batch=4), 16),
        (run_of(10, accumulate=4), 9),
        (run_of(10, accumulate=2, epoch=2, batch=4), 3),
        (run_of(10, max_steps=20, global_step=5), 15),
        (run_of(10, max_steps=200, global_step=5, batch=5), 25),
        (run_of(math.inf), math.inf),
        (run_of(math.inf, max_steps=7), 7),
        (run_of(10, max_epochs=-1), math.inf),
        (run_of(10, max_epochs=-1, max_steps=9, global_step=2), 7),
    ],
)
def test_steps_that_are_left(run: Any, left: float) -> None:
    assert steps_left(run) == left


def test_auto_says_why_whole_steps_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Net, "on_after_backward", lambda self: None, raising=False)
    ran = auto(tmp_path, Clock(10.0, 4.0), monkeypatch)
    assert codes(ran) == ["compile"]
    assert ran.compiled.kept == "eager"  # the tests' clock runs no faster for it
