"""Calling hooks with the parameters of former days: what each is given follows from the names of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Hook = Callable[..., Any]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_ANY_NUMBER = 99
_MEANT = {
    "batch_nb": "batch_idx",
    "batch_i": "batch_idx",
    "dataloader_i": "dataloader_idx",
    "dataset_idx": "dataloader_idx",
    "optimizer_i": "optimizer_idx",
    "opt_idx": "optimizer_idx",
    "model": "pl_module",
    "module": "pl_module",
    "proc_rank": "global_rank",
    "epoch_nb": "epoch",
    "current_epoch": "epoch",
    "closure": "optimizer_closure",
    "opt_closure": "optimizer_closure",
    "second_order_closure": "optimizer_closure",
    "closure_loss": "loss",
}
"""Names that parameters had, and those of today."""


def parameters_of(hook: Hook) -> list[inspect.Parameter]:
    """A hook's positional parameters, without ``self``."""
    return [each for each in inspect.signature(hook).parameters.values() if each.kind in _POSITIONAL]


def names_of(hook: Hook) -> list[str]:
    """Their names."""
    return [each.name for each in parameters_of(hook)]


def needs(hook: Hook) -> int:
    """How many positional arguments a hook cannot do without."""
    return sum(each.default is inspect.Parameter.empty for each in parameters_of(hook))


def takes(hook: Hook) -> int:
    """How many positional arguments a hook can be given."""
    kinds = [each.kind for each in inspect.signature(hook).parameters.values()]
    return _ANY_NUMBER if inspect.Parameter.VAR_POSITIONAL in kinds else len(parameters_of(hook))


def spelled(owner: object, name: str, hook: Hook) -> str:
    """A hook as its user wrote it: ``Net.backward(trainer, loss)``."""
    return f"{type(owner).__name__}.{name}({', '.join(names_of(hook))})"


def arguments_of(hook: Hook, known: Mapping[str, Any], given: Sequence[Any] | None = None) -> list[Any]:
    """What a hook is called with: by the names of its parameters, else by position.

    Args:
        hook: bound.
        known: all that there is, by name.
        given: what there is by position, where a name says nothing; None for all of ``known``.
    """
    positional = list(known.values()) if given is None else list(given)
    if takes(hook) == _ANY_NUMBER:
        return positional
    found: list[Any] = []
    for place, parameter in enumerate(parameters_of(hook)):
        name = parameter.name if parameter.name in known else _MEANT.get(parameter.name, parameter.name)
        if name in known:
            found.append(known[name])
        elif parameter.default is not inspect.Parameter.empty:
            break  # what follows has defaults too
        elif place < len(given or ()):
            found.append(positional[place])  # a name of the user's own
        else:
            return positional[: needs(hook)]
    return found


def adapted(
    hook: Hook, today: Sequence[str], more: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
) -> Hook:
    """A hook of former days as one that is called with the arguments of today, of which it gets those that it asks for.

    Args:
        hook: bound.
        today: names of the arguments that it will be called with.
        more: returns what else it may ask for by name, given those.
    """
    unknown = {"dataloader_idx": 0, "outputs": None}

    def call(*given: Any) -> Any:
        known = dict(zip(today, given, strict=False))
        others = {name: unknown[name] for name in unknown.keys() - known}
        return hook(*arguments_of(hook, {**others, **(more(known) if more is not None else {}), **known}, given))

    return call


def fits(hook: Hook, today: Sequence[str]) -> bool:
    """Whether a hook can be called with the arguments of today."""
    return needs(hook) <= len(today) <= takes(hook)
