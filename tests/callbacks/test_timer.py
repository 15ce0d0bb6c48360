from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from leyden.callbacks import Timer
from leyden.errors import ConfigurationError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def fake_trainer() -> Any:
    printed: list[str] = []
    return SimpleNamespace(should_stop=False, sanity_checking=False, printed=printed, print=printed.append)


def fit(timer: Timer, clock: Clock, trainer: Any, epochs: int, batches: int, seconds: float) -> tuple[int, int]:
    """A loop that stops at the next batch after it was asked to; returns batches and epochs done."""
    done, epoch = 0, 0
    timer.setup(trainer, None, "fit")  # type: ignore[arg-type]
    timer.on_train_start(trainer, None)  # type: ignore[arg-type]
    while epoch < epochs and not trainer.should_stop:
        for batch in range(batches):
            clock.now += seconds
            timer.on_train_batch_end(trainer, None, None, None, batch)  # type: ignore[arg-type]
            done += 1
            if trainer.should_stop:
                break
        timer.on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
        epoch += 1
    timer.on_train_end(trainer, None)  # type: ignore[arg-type]
    timer.teardown(trainer, None, "fit")  # type: ignore[arg-type]
    return done, epoch


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        ("00:00:00:01", 1),
        ("1:2:3:4", 86400 + 7200 + 180 + 4),
        ("100:00:00:00", 8_640_000),
        (timedelta(minutes=2), 120),
        ({"hours": 1, "minutes": 30}, 5400),
        ({"weeks": 1}, 604_800),
        ({"seconds": 0}, 0),
        (None, None),
    ],
)
def test_durations(duration: Any, seconds: float | None) -> None:
    assert Timer(duration).duration_s == seconds
    assert Timer(duration).time_remaining() == seconds


@pytest.mark.parametrize("duration", ["1:2", "", "1 hour", 5, {"hour": 1}, {"hours": "x"}, timedelta(seconds=-1)])
def test_bad_durations(duration: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"duration=.*DD:HH:MM:SS"):
        Timer(duration)


def test_other_bad_arguments() -> None:
    with pytest.raises(ConfigurationError, match="interval='batch'"):
        Timer(interval="batch")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"stage='training'.*Did you mean 'train'"):
        Timer().time_elapsed("training")  # type: ignore[arg-type]


def test_before_anything_ran() -> None:
    timer = Timer("00:00:00:10")
    assert (timer.start_time(), timer.end_time(), timer.time_elapsed()) == (None, None, 0.0)


def test_stops_at_the_batch_that_passes_the_limit(clock: Clock) -> None:
    timer, trainer = Timer({"seconds": 5}, clock=clock), fake_trainer()
    assert fit(timer, clock, trainer, epochs=9, batches=4, seconds=1) == (5, 2)
    assert (timer.start_time(), timer.end_time(), timer.time_elapsed()) == (100.0, 105.0, 5.0)
    assert timer.time_remaining() == 0.0
    assert trainer.printed == ["Timer: the limit of 0:00:05 is reached after 0:00:05 of training. Stopping."]


def test_by_epoch(clock: Clock) -> None:
    timer, trainer = Timer({"seconds": 5}, "epoch", verbose=False, clock=clock), fake_trainer()
    assert fit(timer, clock, trainer, epochs=9, batches=4, seconds=1) == (8, 2)
    assert trainer.printed == []


def test_without_a_limit(clock: Clock) -> None:
    timer = Timer(clock=clock)
    assert fit(timer, clock, fake_trainer(), epochs=2, batches=2, seconds=10) == (4, 2)
    assert (timer.time_elapsed(), timer.time_remaining()) == (40.0, None)


@pytest.mark.parametrize("state_first", [True, False])
def test_a_resumed_run_counts_on(clock: Clock, state_first: bool) -> None:
    timer = Timer({"seconds": 5}, clock=clock)
    fit(timer, clock, fake_trainer(), epochs=1, batches=3, seconds=1)
    state = timer.state_dict()
    assert state["time_elapsed"]["train"] == 3.0
    clock.now = 7.0  # another machine
    resumed, trainer = Timer({"seconds": 5}, clock=clock), fake_trainer()
    if state_first:
        resumed.load_state_dict(state)
        resumed.setup(trainer, None, "fit")  # type: ignore[arg-type]
    else:
        resumed.setup(trainer, None, "fit")  # type: ignore[arg-type]
        resumed.load_state_dict(state)
    resumed.on_train_start(trainer, None)  # type: ignore[arg-type]
    clock.now += 1.5
    assert (resumed.time_elapsed(), resumed.time_remaining()) == (4.5, 0.5)
    assert resumed.state_dict()["time_elapsed"]["train"] == 4.5


def test_no_time_left_when_resuming(clock: Clock) -> None:
    timer, trainer = Timer({"seconds": 5}, clock=clock), fake_trainer()
    timer.load_state_dict({"time_elapsed": {"train": 6.0}})
    timer.on_train_start(trainer, None)  # type: ignore[arg-type]
    assert trainer.should_stop


def test_a_second_fit_starts_at_zero(clock: Clock) -> None:
    timer = Timer({"seconds": 5}, clock=clock)
    fit(timer, clock, fake_trainer(), epochs=9, batches=4, seconds=1)
    assert fit(timer, clock, fake_trainer(), epochs=1, batches=3, seconds=1) == (3, 1)


def test_validations_add_up_and_the_sanity_check_is_apart(clock: Clock) -> None:
    timer, trainer, module = Timer(clock=clock), fake_trainer(), None
    timer.setup(trainer, module, "fit")  # type: ignore[arg-type]
    trainer.sanity_checking = True
    timer.on_sanity_check_start(trainer, module)  # type: ignore[arg-type]
    timer.on_validation_start(trainer, module)  # type: ignore[arg-type]
    clock.now += 1
    timer.on_validation_end(trainer, module)  # type: ignore[arg-type]
    timer.on_sanity_check_end(trainer, module)  # type: ignore[arg-type]
    trainer.sanity_checking = False
    for seconds in (2, 3):
        timer.on_validation_start(trainer, module)  # type: ignore[arg-type]
        assert timer.end_time("validate") is None
        clock.now += seconds
        timer.on_validation_end(trainer, module)  # type: ignore[arg-type]
        clock.now += 10
    assert timer.time_elapsed("sanity_check") == 1
    assert timer.time_elapsed("validate") == 5
    assert timer.end_time("validate") == timer.start_time("validate") + 3  # type: ignore[operator]


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_the_other_stages(clock: Clock, stage: Any) -> None:
    timer, trainer = Timer(clock=clock), fake_trainer()
    getattr(timer, f"on_{stage}_start")(trainer, None)
    clock.now += 2
    getattr(timer, f"on_{stage}_end")(trainer, None)
    clock.now += 2
    assert timer.time_elapsed(stage) == 2


def test_an_error_ends_what_was_running(clock: Clock) -> None:
    timer, trainer = Timer(clock=clock), fake_trainer()
    timer.on_train_start(trainer, None)  # type: ignore[arg-type]
    clock.now += 4
    timer.teardown(trainer, None, "fit")  # type: ignore[arg-type]
    clock.now += 4
    assert timer.time_elapsed() == 4
    assert timer.end_time() == 104
