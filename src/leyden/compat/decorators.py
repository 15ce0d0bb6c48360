"""Decorators that code of former days has on its methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from leyden.compat.once import tell

F = TypeVar("F", bound=Callable[..., object])


def data_loader(hook: F) -> F:
    """Return the method itself: a hook that gives a loader is called once for each verb anyway."""
    tell("@data_loader", f"{hook.__name__} without a decorator")
    return hook
