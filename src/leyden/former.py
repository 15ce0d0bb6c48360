"""How code of former days is told from that of today: by names, parameters, and the keys of dicts."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Sequence
from types import CodeType
from typing import Any

from leyden.hooks import EVENTS, FORMER_CALLBACK_HOOKS, FORMER_MODULE_HOOKS, mentioned, own_methods

_FORMER_PARAMETERS = frozenset({"optimizer_idx", "optimizer_i", "opt_idx", "hiddens", "second_order_closure"})
_FORMER_KEYS = frozenset({"log", "progress_bar"})


def former_hooks(owner: Any, base: type, former: frozenset[str]) -> list[str]:
    """The hooks of former days that ``owner`` has, in the order of their names; not those that its own of today call."""
    has = {name for name in former if callable(getattr(type(owner), name, None)) and not hasattr(base, name)}
    calls = {
        other
        for name, method in (own_methods(type(owner), base) if has else ())
        if name not in former
        for other in mentioned(method.__code__)
    }
    return sorted(has - calls)


def is_former(owner: Any, base: type, former: frozenset[str]) -> bool:
    """Whether an object is written for the API of 2020, as its names, parameters and the keys in its code tell.

    A key "log" of some dict may mean something else: `leyden.compat` looks at what is returned.
    """
    if former_hooks(owner, base, former):
        return True
    for name, method in _methods(type(owner), base):
        code = method.__code__
        if former is FORMER_MODULE_HOOKS and not _FORMER_KEYS.isdisjoint(_dict_keys(code)):
            return True
        parameters = code.co_varnames[1 : code.co_argcount]
        if not _FORMER_PARAMETERS.isdisjoint(parameters) and hasattr(base, name):
            return True
        before = ("trainer", "pl_module") if former is FORMER_CALLBACK_HOOKS else ()
        if name in EVENTS and are_former(name, parameters, before):
            return True
        if name == "backward" and len(parameters) > 1 and not method.__defaults__:
            return True
        if name in ("transfer_batch_to_device", "on_save_checkpoint") and len(parameters) == 2:
            return True
    return False


def _methods(cls: type, base: type) -> Iterable[tuple[str, Any]]:
    """The methods of a class and its parents, other than those of ``base``; of plain mixins too."""
    for parent in cls.__mro__:
        if parent not in base.__mro__:
            for name, value in vars(parent).items():
                function = inspect.unwrap(getattr(value, "fget", getattr(value, "__func__", value)) or value)
                if inspect.isfunction(function):
                    yield name, function


def are_former(name: str, parameters: Sequence[str], before: Sequence[str] = ()) -> bool:
    """Whether the parameters of an event's hook are those of former days: more, or in another order, by their names.

    Args:
        name: the event.
        parameters: the hook's, without ``self``.
        before: what callbacks get first.
    """
    event = EVENTS[name]
    today = (*before, *event.arguments, *(["dataloader_idx"] if event.per_dataloader else []))
    known = {*today, "outputs", "dataloader_idx"}
    shifted = any(each in known and each != now for each, now in zip(parameters, today, strict=False))
    extra = {*parameters[len(today) :]}
    return (
        shifted
        or (name == "on_train_epoch_end" and "outputs" in extra)
        or (event.arguments != () and "dataloader_idx" in extra)
    )


def _dict_keys(code: CodeType) -> Iterable[str]:
    """Texts that the code uses as keys of dicts that it makes or fills, in nested functions too."""
    texts: list[str] = []
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if name == "LOAD_CONST" and isinstance(value, str | tuple):
            texts += [value] if isinstance(value, str) else [each for each in value if isinstance(each, str)]
        elif name == "KW_NAMES":
            yield from code.co_consts[instruction.arg or 0]
        elif name in ("BUILD_MAP", "BUILD_CONST_KEY_MAP", "MAP_ADD", "STORE_SUBSCR", "CALL_KW"):
            yield from texts
            texts = []
        elif name in ("POP_TOP", "STORE_FAST", "COMPARE_OP", "CONTAINS_OP", "RETURN_VALUE"):
            texts = []
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _dict_keys(constant)
