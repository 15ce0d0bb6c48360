"""The exception tree, coded warnings, and how messages are put together."""

from __future__ import annotations

import warnings
from types import FunctionType
from typing import Any

import pytest

from leyden import errors
from leyden.errors import LeydenError, LeydenWarning, call_each, did_you_mean, reject, warn

# each exception with what people may catch it as
TREE: dict[str, tuple[type[BaseException], ...]] = {
    "LeydenError": (Exception,),
    "MisconfigurationException": (LeydenError,),
    "ConfigurationError": (errors.MisconfigurationException, ValueError),
    "HookError": (errors.ConfigurationError, TypeError),
    "StepError": (errors.MisconfigurationException, RuntimeError),
    "NonFiniteError": (errors.StepError, FloatingPointError),
    "DataError": (errors.MisconfigurationException, ValueError),
    "MetricError": (errors.MisconfigurationException, ValueError),
    "MissingMetricError": (errors.MetricError, RuntimeError),
    "CheckpointError": (LeydenError, RuntimeError),
    "CheckpointNotFoundError": (errors.CheckpointError, FileNotFoundError),
    "NoTrainerError": (LeydenError, RuntimeError),
    "UnknownArgumentError": (errors.ConfigurationError, TypeError),
    "RankError": (LeydenError, RuntimeError),
    "AbsentError": (LeydenError, ImportError),
    "SIGTERMException": (SystemExit,),
    "LeydenWarning": (UserWarning,),
}


def test_every_exception_is_in_the_tree() -> None:
    own = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == errors.__name__
    }
    assert own == set(TREE)


@pytest.mark.parametrize("name", TREE)
def test_exceptions_can_be_caught_as_what_they_are(name: str) -> None:
    kind = getattr(errors, name)
    assert all(issubclass(kind, base) for base in TREE[name])
    assert str(kind("what was given")) == "what was given"


def test_reject_names_the_argument_its_value_and_what_is_allowed() -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        reject("max_epochs", "ten", "an integer ≥ 0")
    assert str(caught.value) == "max_epochs='ten' is not valid. Allowed: an integer ≥ 0."


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("acuracy", " Did you mean 'accuracy'?"),
        ("accuracy", " Did you mean 'accuracy'?"),
        ("loss", ""),
        ("", ""),
    ],
)
def test_did_you_mean(name: str, hint: str) -> None:
    assert did_you_mean(name, ("accuracy", "f1")) == hint
    assert did_you_mean(name, iter(("accuracy", "f1"))) == hint


def test_a_warning_has_its_code_in_front_and_points_at_the_users_line() -> None:
    inside = {"__name__": "leyden.data.inside", "warn": warn}
    code = compile("def library():\n    warn('some-code', 'this happened; do that.')", "inside.py", "exec")
    library = FunctionType(next(each for each in code.co_consts if hasattr(each, "co_code")), inside)

    def user() -> int:
        library()
        return user.__code__.co_firstlineno + 1  # the line above

    with pytest.warns(LeydenWarning, match=r"^\[LEY-some-code\] this happened; do that\.$") as caught:
        line = user()
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, line)]


def test_one_code_can_be_muted() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message=r"\[LEY-loud\]")
        warn("loud", "…")
        warn("other", "…")
    assert [str(warning.message) for warning in caught] == ["[LEY-other] …"]


def raising(error: BaseException) -> Any:
    def action() -> None:
        raise error

    return action


def test_each_action_is_called_and_the_first_exception_comes_back() -> None:
    called: list[int] = []
    first, second = ValueError("first"), KeyboardInterrupt("second")
    actions = [lambda: called.append(1), raising(first), lambda: called.append(2), raising(second)]
    assert call_each(actions) is first
    assert called == [1, 2]
    (note,) = first.__notes__
    assert note.startswith(
        f"Afterwards {__file__}:{raising.__code__.co_firstlineno + 2} raised KeyboardInterrupt: second"
    )


def test_an_exception_from_before_comes_first() -> None:
    before = ValueError("before")
    assert call_each([raising(OSError("disk"))], before) is before
    assert len(before.__notes__) == 1
    assert call_each([], before) is before


def test_no_exception_is_none() -> None:
    assert call_each([]) is None
    assert call_each([lambda: "a result"]) is None


def test_an_action_that_raises_what_came_before_again_leaves_no_note() -> None:
    before = ValueError("before")
    assert call_each([raising(before)], before) is before
    assert not hasattr(before, "__notes__")
