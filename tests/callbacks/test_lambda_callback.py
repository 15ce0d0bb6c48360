from __future__ import annotations

import inspect
from typing import Any

import pytest

from leyden.callbacks import Callback, LambdaCallback
from leyden.errors import HookError

EVENTS = [name for name, _ in inspect.getmembers(Callback, inspect.isfunction) if name[:3] == "on_"]


def test_every_event_can_be_given() -> None:
    for name in [*EVENTS, "setup", "teardown"]:
        calls: list[tuple[Any, ...]] = []
        callback = LambdaCallback(**{name: lambda *args, calls=calls: calls.append(args)})
        count = len(inspect.signature(getattr(Callback, name)).parameters) - 1
        getattr(callback, name)(*range(count))
        assert calls == [tuple(range(count))]


def test_only_what_was_given_is_overridden() -> None:
    callback = LambdaCallback(on_fit_start=lambda trainer, pl_module: None, on_fit_end=None)
    seen = [name for name in EVENTS if name in callback.__dict__]
    assert seen == ["on_fit_start"]
    assert type(callback).on_fit_start is Callback.on_fit_start  # the instance, not the class


def test_return_value_is_kept() -> None:
    callback = LambdaCallback(on_train_batch_start=lambda trainer, pl_module, batch, batch_idx: -1)
    assert callback.on_train_batch_start(None, None, None, 0) == -1  # type: ignore[arg-type]


def test_unknown_name() -> None:
    with pytest.raises(HookError, match=r"on_epoch_ends.*Did you mean 'on_.*epoch_end'"):
        LambdaCallback(on_epoch_ends=lambda *args: None)
    with pytest.raises(HookError, match="Did you mean 'on_train_epoch_end'"):
        LambdaCallback(on_train_epochend=lambda *args: None)


@pytest.mark.parametrize("name", ["state_dict", "load_state_dict", "state_key", "__init__"])
def test_what_is_no_event(name: str) -> None:
    with pytest.raises(HookError, match="no such hook"):
        LambdaCallback(**{name: lambda *args: None})


def test_wrong_signature_names_both() -> None:
    with pytest.raises(HookError, match=r"takes \(trainer\), but is called with \(trainer, pl_module\)"):
        LambdaCallback(on_fit_start=lambda trainer: None)


def test_the_loader_may_be_left_out() -> None:
    LambdaCallback(on_validation_batch_end=lambda trainer, pl_module, outputs, batch, batch_idx: None)
    with pytest.raises(HookError, match="dataloader_idx"):
        LambdaCallback(on_validation_batch_end=lambda trainer, pl_module, outputs, batch: None)


def test_not_callable() -> None:
    with pytest.raises(HookError, match=r"on_fit_start=3\): pass a function of \(trainer, pl_module\)"):
        LambdaCallback(on_fit_start=3)  # type: ignore[arg-type]
    LambdaCallback(on_fit_start=print)
