from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leyden.callbacks import GradientAccumulationScheduler
from leyden.errors import ConfigurationError

MODULE: Any = SimpleNamespace(automatic_optimization=True)


def factors(scheduler: GradientAccumulationScheduler, epochs: range, trainer: Any = None) -> list[int]:
    trainer = trainer or SimpleNamespace(accumulate_grad_batches=1)
    trainer.current_epoch = epochs.start
    scheduler.on_train_start(trainer, MODULE)
    seen = []
    for trainer.current_epoch in epochs:
        scheduler.on_train_epoch_start(trainer, MODULE)
        seen.append(trainer.accumulate_grad_batches)
    return seen


def test_before_the_first_epoch_named_it_is_one() -> None:
    assert factors(GradientAccumulationScheduler({1: 2, 3: 4}), range(5)) == [1, 2, 2, 4, 4]
    assert factors(GradientAccumulationScheduler({0: 3}), range(2)) == [3, 3]


@given(st.dictionaries(st.integers(0, 9), st.integers(1, 8), min_size=1))
def test_against_carrying_the_last_value_on(scheduling: dict[int, int]) -> None:
    expected, current = [], 1
    for epoch in range(12):
        current = scheduling.get(epoch, current)
        expected.append(current)
    scheduler = GradientAccumulationScheduler(scheduling)
    assert factors(scheduler, range(12)) == expected
    assert [scheduler.get_accumulate_grad_batches(epoch) for epoch in range(12)] == expected


def test_resumed_within_an_epoch() -> None:
    trainer: Any = SimpleNamespace(accumulate_grad_batches=1, current_epoch=3)
    GradientAccumulationScheduler({2: 8}).on_train_start(trainer, MODULE)
    assert trainer.accumulate_grad_batches == 8


def test_two_sources_are_refused_but_a_second_fit_is_not() -> None:
    scheduler, trainer = GradientAccumulationScheduler({1: 2}), SimpleNamespace(accumulate_grad_batches=1)
    assert factors(scheduler, range(3), trainer) == [1, 2, 2]
    assert factors(scheduler, range(3), trainer) == [1, 2, 2]
    given_twice: Any = SimpleNamespace(accumulate_grad_batches=4, current_epoch=0)
    with pytest.raises(ConfigurationError, match="accumulate_grad_batches=4"):
        scheduler.on_train_start(given_twice, MODULE)


def test_manual_optimization_is_refused() -> None:
    trainer: Any = SimpleNamespace(accumulate_grad_batches=1, current_epoch=0, _takes_turns=False)
    manual: Any = SimpleNamespace(automatic_optimization=False)
    with pytest.raises(ConfigurationError, match="automatic"):
        GradientAccumulationScheduler({0: 2}).on_train_start(trainer, manual)


@pytest.mark.parametrize("scheduling", [{}, {-1: 2}, {1: 0}, {1: 2.0}, {"a": 1}, {True: 2}, {1: True}, [1, 2], None])
def test_bad_schedulings(scheduling: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"scheduling=.*such as \{0: 4, 10: 1\}"):
        GradientAccumulationScheduler(scheduling)
