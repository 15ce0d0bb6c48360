"""Where a Trainer meets arguments of former days: the one place of its `__init__` that reaches `leyden.compat`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leyden.compat.arguments import Modern


def speaks_formerly(asked: Mapping[str, Any]) -> bool:
    """Whether an argument of today has a value of former days: ``{epoch: n}`` to accumulate, ``profiler=True``."""
    return isinstance(asked["accumulate_grad_batches"], dict) or isinstance(asked["profiler"], bool)


def modernised(asked: dict[str, Any], others: dict[str, Any]) -> Modern:
    """Translate arguments of former days.

    Raises:
        ConfigurationError: for names that no Trainer ever had, and for contradictions.
    """
    from leyden.compat.arguments import modernise

    return modernise(asked, others)
