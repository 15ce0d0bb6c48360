from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from leyden.callbacks import EarlyStopping
from leyden.errors import ConfigurationError, LeydenWarning, MetricError

NAN, INF = math.nan, math.inf


def fake_trainer(**changes: Any) -> Any:
    printed: list[str] = []
    settings: dict[str, Any] = {
        "callback_metrics": {},
        "current_epoch": 0,
        "num_training_batches": 2,
        "num_val_batches": [1],
        "should_stop": False,
        "sanity_checking": False,
        "is_global_zero": True,
        "global_rank": 0,
        "printed": printed,
        "print": printed.append,
    }
    return SimpleNamespace(**(settings | changes))


def validate(stopper: EarlyStopping, trainer: Any, **metrics: float) -> None:
    stopper.on_validation_start(trainer, None)  # type: ignore[arg-type]
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in metrics.items()})
    stopper.on_validation_end(trainer, None)  # type: ignore[arg-type]


def end_epoch(stopper: EarlyStopping, trainer: Any, **metrics: float) -> None:
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in metrics.items()})
    stopper.on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
    trainer.current_epoch += 1


def run(stopper: EarlyStopping, values: list[float], trainer: Any = None) -> Any:
    """Epochs with one validation at the end of each, until the trainer is asked to stop."""
    trainer = trainer or fake_trainer()
    stopper.setup(trainer, None, "fit")  # type: ignore[arg-type]
    stopper.on_train_start(trainer, None)  # type: ignore[arg-type]
    for value in values:
        validate(stopper, trainer, loss=value)
        end_epoch(stopper, trainer)
        if trainer.should_stop:
            break
    return trainer


def model(values: list[float], mode: str, delta: float, patience: int, goal: float | None, limit: float | None) -> Any:
    sign = 1 if mode == "max" else -1
    best, wait = -sign * INF, 0
    for epoch, value in enumerate(values):
        if not math.isfinite(value):
            return epoch, "non_finite_metric", wait
        if goal is not None and sign * value > sign * goal:
            return epoch, "stopping_threshold", None
        if limit is not None and sign * value < sign * limit:
            return epoch, "divergence_threshold", wait
        best, wait = (value, 0) if sign * value - delta > sign * best else (best, wait + 1)
        if wait >= max(patience, 1):
            return epoch, "patience_exhausted", wait
    return None, None, wait


quarters = st.integers(-12, 12).map(lambda n: n / 4)  # exact in float32
maybe = st.none() | quarters


@given(
    st.lists(quarters | st.sampled_from([NAN, INF, -INF]), max_size=12),
    st.sampled_from(["min", "max"]),
    st.sampled_from([0.0, 0.25, 1.0, -0.5]),
    st.integers(0, 4),
    maybe,
    maybe,
)
@example([3.0, 2.0, 2.0, 2.0], "min", 0.0, 2, None, None)
@example([3.0, 2.5], "min", 0.5, 1, None, None)
def test_against_a_model(
    values: list[float], mode: Any, delta: float, patience: int, goal: float | None, limit: float | None
) -> None:
    stopper = EarlyStopping("loss", delta, patience, mode=mode, stopping_threshold=goal, divergence_threshold=limit)
    trainer = run(stopper, values)
    epoch, reason, wait = model(values, mode, delta, patience, goal, limit)
    assert stopper.stopping_reason == reason
    assert trainer.should_stop == (epoch is not None)
    assert stopper.stopped_epoch == (epoch or 0)
    assert wait is None or stopper.wait_count == wait


@pytest.mark.parametrize(
    ("settings", "values", "stopped", "best"),
    [
        ({"patience": 2}, [3, 2, 2, 2, 2], 3, 2),
        ({"patience": 0}, [3, 2, 2, 2], 2, 2),
        ({"min_delta": 0.5, "patience": 1}, [3, 2.5, 2.4], 1, 3),
        ({"mode": "max", "patience": 1}, [1, 2, 2, 2], 2, 2),
        ({}, [1, NAN, 1], 1, 1),
        ({"check_finite": False, "patience": 2}, [1, NAN, 0.5, NAN, NAN], 4, 0.5),
        ({"stopping_threshold": 0.5}, [1, 0.5, 0.25, 0.1], 2, 0.25),
        ({"divergence_threshold": 5}, [1, 5, 6, 3], 2, 1),
        ({"min_delta": -0.5, "patience": 1}, [3, 3, 3], 0, 3),
    ],
)
def test_worked_examples(settings: Any, values: list[float], stopped: int, best: float) -> None:
    stopper = EarlyStopping("loss", **settings)
    run(stopper, values)
    assert stopper.stopped_epoch == stopped
    assert stopper.best_score.shape == ()
    assert stopper.best_score == best


def test_before_the_first_check() -> None:
    assert EarlyStopping("loss").best_score == INF
    assert EarlyStopping("loss", mode="max").best_score == -INF


def test_message_says_what_happened() -> None:
    stopper = EarlyStopping("loss", patience=1)
    run(stopper, [1.0, 2.0])
    assert stopper.stopping_reason_message == "loss did not improve in 1 checks; best value 1."


class TestPlace:
    def test_sanity_check_and_validate_are_not_counted(self) -> None:
        stopper, trainer = EarlyStopping("loss", patience=1), fake_trainer(sanity_checking=True)
        validate(stopper, trainer, loss=0.0)
        trainer.sanity_checking = False
        stopper.setup(trainer, None, "validate")  # type: ignore[arg-type]
        validate(stopper, trainer, loss=0.0)
        validate(stopper, trainer)  # a missing key would raise
        assert stopper.best_score == INF

    @pytest.mark.parametrize("asked", [None, True])
    def test_training_metric_with_validation(self, asked: bool | None) -> None:
        stopper, trainer = EarlyStopping("train", patience=2, check_on_train_epoch_end=asked), fake_trainer()
        for value in (3.0, 2.0, 2.0, 2.0):
            validate(stopper, trainer, loss=1.0)
            end_epoch(stopper, trainer, train=value)
        assert (stopper.wait_count, stopper.stopped_epoch) == (2, 3)

    def test_step_value_of_a_training_metric_is_not_taken_for_the_epoch(self) -> None:
        stopper, trainer = EarlyStopping("train"), fake_trainer()
        trainer.callback_metrics["train"] = torch.tensor(9.0)  # of the last batch, before validation
        validate(stopper, trainer, loss=1.0)
        assert stopper.best_score == INF
        end_epoch(stopper, trainer, train=2.0)
        assert stopper.best_score == 2.0

    @pytest.mark.parametrize("asked", [None, True])
    def test_without_validation(self, asked: bool | None) -> None:
        stopper = EarlyStopping("train", patience=1, check_on_train_epoch_end=asked)
        trainer = fake_trainer(num_val_batches=[])
        end_epoch(stopper, trainer, train=1.0)
        end_epoch(stopper, trainer, train=1.0)
        assert trainer.should_stop

    def test_validation_in_every_second_epoch(self) -> None:
        stopper, trainer = EarlyStopping("loss", patience=1), fake_trainer()
        end_epoch(stopper, trainer)  # nothing to check yet, and no error
        validate(stopper, trainer, loss=1.0)
        end_epoch(stopper, trainer)
        end_epoch(stopper, trainer)  # the old value is not checked again
        assert stopper.wait_count == 0
        validate(stopper, trainer, loss=1.0)
        assert stopper.wait_count == 1

    def test_several_validations_in_an_epoch(self) -> None:
        stopper, trainer = EarlyStopping("loss", patience=3), fake_trainer()
        for _ in range(4):
            validate(stopper, trainer, loss=1.0)
        assert trainer.should_stop
        assert stopper.stopped_epoch == 0

    def test_only_after_validation(self) -> None:
        stopper, trainer = EarlyStopping("loss", check_on_train_epoch_end=False), fake_trainer()
        end_epoch(stopper, trainer, loss=1.0)
        assert stopper.best_score == INF
        validate(stopper, trainer, loss=2.0)
        assert stopper.best_score == 2.0

    def test_a_place_that_never_comes(self) -> None:
        stopper = EarlyStopping("loss", check_on_train_epoch_end=False)
        with pytest.warns(LeydenWarning, match=r"\[LEY-early-stopping-idle\]"):
            stopper.on_train_start(fake_trainer(num_val_batches=[0]), None)  # type: ignore[arg-type]

    def test_resumed_after_the_check_it_is_not_made_twice(self) -> None:
        first, trainer = EarlyStopping("loss"), fake_trainer()
        validate(first, trainer, loss=1.0)
        resumed = EarlyStopping("loss")
        resumed.load_state_dict(first.state_dict())
        resumed.setup(trainer, None, "fit")  # type: ignore[arg-type]
        end_epoch(resumed, trainer)  # the metric is still there
        assert resumed.wait_count == 0

    def test_a_resumed_run_knows_that_it_has_validated(self) -> None:
        first, trainer = EarlyStopping("val_los"), fake_trainer()
        first.on_train_start(trainer, None)  # type: ignore[arg-type]
        validate(first, trainer, val_loss=1.0)
        resumed = EarlyStopping("val_los")
        resumed.load_state_dict(first.state_dict())
        resumed.on_train_start(trainer, None)  # type: ignore[arg-type]
        with pytest.raises(MetricError, match="Did you mean 'val_loss'"):
            end_epoch(resumed, trainer)
        fresh = EarlyStopping("val_los")
        fresh.on_train_start(trainer, None)  # type: ignore[arg-type]
        end_epoch(fresh, trainer)  # its first validation may be to come

    def test_one_value_shown_as_two_tensors_is_no_new_value(self) -> None:
        class Fresh(dict):
            def get(self, key: str, default: Any = None) -> Any:
                return self[key].clone() if key in self else default

        for first in (1.0, NAN):
            stopper = EarlyStopping("train", check_finite=False)
            trainer = fake_trainer(callback_metrics=Fresh(train=torch.tensor(first)))
            validate(stopper, trainer)
            assert stopper.wait_count == 0
            assert stopper.best_score == INF
            for value in (3.0, 2.0, 2.0):
                end_epoch(stopper, trainer, train=value)
                validate(stopper, trainer)
            assert (stopper.wait_count, stopper.best_score) == (1, 2.0)

    def test_the_sanity_check_shows_where_the_metric_comes_from(self) -> None:
        stopper, trainer = EarlyStopping("loss", patience=1), fake_trainer(sanity_checking=True)
        validate(stopper, trainer, loss=1.0)
        trainer.sanity_checking = False
        end_epoch(stopper, trainer)  # validation is in every second epoch; the value of the sanity check is still there
        assert stopper.best_score == INF
        validate(stopper, trainer, loss=1.0)
        assert (stopper.best_score, stopper.wait_count) == (1.0, 0)


class TestMissingKey:
    def test_error_names_the_keys(self) -> None:
        stopper, trainer = EarlyStopping("val_los"), fake_trainer()
        validate(stopper, trainer, val_loss=1.0, acc=0.5)
        with pytest.raises(MetricError, match=r"'acc', 'val_loss'\. Did you mean 'val_loss'\?"):
            end_epoch(stopper, trainer)

    def test_in_an_endless_epoch_it_is_found_at_the_first_validation(self) -> None:
        with pytest.raises(MetricError, match="none were logged"):
            validate(EarlyStopping("loss"), fake_trainer(num_training_batches=INF))

    def test_not_strict(self) -> None:
        stopper, trainer = EarlyStopping("loss", strict=False), fake_trainer(num_val_batches=[])
        with pytest.warns(LeydenWarning, match=r"\[LEY-early-stopping-key\]"):
            end_epoch(stopper, trainer)
        assert not trainer.should_stop


def test_state_round_trip() -> None:
    stopper = EarlyStopping("loss", patience=2)
    run(stopper, [3.0, 2.0, 2.0])
    state = stopper.state_dict()
    assert all(isinstance(value, int | str | dict | torch.Tensor | None) for value in state.values())
    resumed = EarlyStopping("loss", patience=5)
    resumed.load_state_dict(state)
    assert (resumed.wait_count, resumed.patience, resumed.best_score) == (1, 5, 2.0)
    trainer = run(resumed, [2.0] * 9)
    assert trainer.current_epoch == 4  # the fifth check without improvement, counting the one before


def test_state_keys_differ() -> None:
    keys = {EarlyStopping("a").state_key, EarlyStopping("b").state_key, EarlyStopping("a", mode="max").state_key}
    assert len(keys) == 3
    assert EarlyStopping("a").state_key == "EarlyStopping{'monitor': 'a', 'mode': 'min'}"


def test_verbose_prints_on_the_ranks_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = run(EarlyStopping("loss", verbose=True, patience=1), [3.0, 2.0, 2.0])
    assert trainer.printed == [
        "EarlyStopping: loss improved to 3.",
        "EarlyStopping: loss improved by 1 to 2.",
        "EarlyStopping: loss did not improve in 1 checks; best value 2. Stopping.",
    ]
    other = fake_trainer(is_global_zero=False, global_rank=1)
    run(EarlyStopping("loss", verbose=True, log_rank_zero_only=True), [3.0], other)
    assert capsys.readouterr().out == ""
    run(EarlyStopping("loss", verbose=True), [3.0], other)
    assert capsys.readouterr().out == "[rank 1] EarlyStopping: loss improved to 3.\n"


@pytest.mark.parametrize(
    ("argument", "value"),
    [("patience", -1), ("patience", 1.5), ("patience", True), ("mode", "low"), ("min_delta", NAN), ("monitor", "")],
)
def test_bad_arguments(argument: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{argument}="):
        EarlyStopping(**({"monitor": "loss"} | {argument: value}))
