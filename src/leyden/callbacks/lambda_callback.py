"""A callback made of functions, for when a class would be too much."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from leyden.callbacks.callback import Callback
from leyden.errors import HookError, did_you_mean

# these return or restore data; a function that replaces one of them is never an event
_NOT_EVENTS = {"state_dict", "load_state_dict"}
_HOOKS = [
    name
    for name, value in vars(Callback).items()
    if inspect.isfunction(value) and not name.startswith("_") and name not in _NOT_EVENTS
]


class LambdaCallback(Callback):
    """Call plain functions at the events of a run.

    Example:
        >>> LambdaCallback(on_train_epoch_end=lambda trainer, pl_module: print(trainer.current_epoch))

    Args:
        **hooks: the name of any event of `Callback`, with a function that takes the same positional arguments
            (without ``self``; ``dataloader_idx`` only with several loaders). None means not given.

    Raises:
        HookError: the name is no event, the value is not callable, or it cannot take the event's arguments.
    """

    def __init__(self, **hooks: Callable[..., Any] | None) -> None:
        for name, function in hooks.items():
            if name not in _HOOKS:
                raise HookError(
                    f"LambdaCallback({name}=...): there is no such hook.{did_you_mean(name, _HOOKS)} "
                    f"The hooks are: {', '.join(sorted(_HOOKS))}."
                )
            if function is None:
                continue
            _check(name, function)
            # on the instance, where the engine looks for overridden hooks after the class
            self.__dict__[name] = function


def _check(name: str, function: Callable[..., Any]) -> None:
    wanted = inspect.signature(getattr(Callback, name)).parameters
    names = [parameter for parameter in wanted if parameter != "self"]
    if not callable(function):
        raise HookError(f"LambdaCallback({name}={function!r}): pass a function of ({', '.join(names)}).")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins have none
        return
    needed = [parameter for parameter in names if parameter != "dataloader_idx"]
    if not _takes(signature, needed) and not _takes(signature, names):
        raise HookError(
            f"LambdaCallback({name}=...): the function takes {signature}, but is called with ({', '.join(names)})."
        )


def _takes(signature: inspect.Signature, names: list[str]) -> bool:
    try:
        signature.bind(*names)
    except TypeError:
        return False
    return True
