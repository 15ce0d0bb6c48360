"""The retention policy against a model of it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leyden.checkpoint.retention import Mode, Saved, is_kept, ranked, to_delete

scores = st.lists(
    st.one_of(st.integers(0, 3).map(float), st.sampled_from([math.nan, math.inf, -math.inf])), max_size=12
)
modes = st.sampled_from(["min", "max"])


def model(values: list[float], k: int, mode: Mode) -> set[int]:
    """The indices to keep, by taking the best k times; the first of equals."""
    left = list(range(len(values)))
    kept: set[int] = set()
    while left and (k == -1 or len(kept) < k):
        numbers = [i for i in left if not math.isnan(values[i])]
        pick = min if mode == "min" else max
        best = pick(numbers, key=lambda i: values[i]) if numbers else left[0]
        kept.add(best)
        left.remove(best)
    return kept


@given(scores, st.integers(-1, 4), modes)
def test_the_best_k_of_a_history(values: list[float], k: int, mode: Mode) -> None:
    history = [(value, str(i)) for i, value in enumerate(values)]
    kept = model(values, k, mode)
    assert set(to_delete(history, k, mode)) == {str(i) for i in range(len(values)) if i not in kept}


@given(scores, st.integers(-1, 4), modes)
def test_deciding_one_at_a_time_gives_the_best_k_of_all(values: list[float], k: int, mode: Mode) -> None:
    history: list[Saved] = []
    for i, value in enumerate(values):
        if is_kept(history, value, k, mode):
            history.append((value, str(i)))
            gone = to_delete(history, k, mode)
            assert str(i) not in gone
            assert len(gone) <= 1
            history = [saved for saved in history if saved[1] not in gone]
    assert {path for _, path in history} == {str(i) for i in model(values, k, mode)}


@pytest.mark.parametrize(("mode", "order"), [("min", "bdac"), ("max", "abdc")])
def test_order(mode: Mode, order: str) -> None:
    history = [(2.0, "a"), (1.0, "b"), (math.nan, "c"), (1.0, "d")]
    assert "".join(path for _, path in ranked(history, mode)) == order
