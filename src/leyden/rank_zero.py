"""What only the first process does or says: functions, messages, warnings."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, overload

import torch.distributed

from leyden.strategy.environments import find_place

P = ParamSpec("P")
R = TypeVar("R")
D = TypeVar("D")

log = logging.getLogger("leyden")


class RankZeroOnly:
    """A decorator: in all processes but the first the function is not called, and ``default`` is returned.

    The rank is looked up at each call: torch's process group knows it, before there is one the launcher's variables do.
    """

    def __init__(self) -> None:
        self._given: int | None = None

    @property
    def rank(self) -> int:
        """This process's number among all; one that was set counts more than what is found."""
        if self._given is not None:
            return self._given
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank()
        place = find_place()
        return place.rank if place is not None else 0

    @rank.setter
    def rank(self, rank: int | None) -> None:
        self._given = rank

    @overload
    def __call__(self, fn: Callable[P, R]) -> Callable[P, R | None]: ...
    @overload
    def __call__(self, fn: Callable[P, R], default: D) -> Callable[P, R | D]: ...
    def __call__(self, fn: Callable[..., Any], default: Any = None) -> Callable[..., Any]:
        """Return ``fn`` for the first process, and for others a function that returns ``default``."""

        @functools.wraps(fn)
        def first_only(*args: Any, **kwargs: Any) -> Any:
            return fn(*args, **kwargs) if self.rank == 0 else default

        return first_only


rank_zero_only = RankZeroOnly()
"""The decorator that all parts of a program share."""


class LightningDeprecationWarning(DeprecationWarning):
    """What `rank_zero_deprecation` warns with."""


def rank_zero_info(*args: Any, **kwargs: Any) -> None:
    """Log to ``logging.getLogger("leyden")`` at the level INFO, from the first process; as ``Logger.info`` does."""
    if rank_zero_only.rank == 0:
        _log().info(*args, **kwargs)


def rank_zero_debug(*args: Any, **kwargs: Any) -> None:
    """The same at the level DEBUG."""
    if rank_zero_only.rank == 0:
        _log().debug(*args, **kwargs)


def rank_zero_warn(message: object, stacklevel: int = 4, category: type[Warning] = UserWarning) -> None:
    """Warn from the first process.

    Args:
        message: the text, or a `Warning`.
        stacklevel: 4 points at the caller of this function, 5 at the caller's caller.
        category: of the warning.
    """
    if rank_zero_only.rank == 0:
        warnings.warn(message if isinstance(message, Warning) else str(message), category, stacklevel=stacklevel - 2)


def rank_zero_deprecation(message: object, stacklevel: int = 5, **kwargs: Any) -> None:
    """Warn with `LightningDeprecationWarning` from the first process; ``stacklevel`` 5 points at the caller's caller."""
    rank_zero_warn(message, stacklevel=stacklevel + 1, category=kwargs.get("category", LightningDeprecationWarning))


def rank_prefixed_message(message: str, rank: int | None) -> str:
    """The message with ``[rank: 1]`` in front, if there is a rank."""
    return message if rank is None else f"[rank: {rank}] {message}"


class WarningCache(set[str]):
    """Says each message once."""

    def warn(self, message: str, stacklevel: int = 5, **kwargs: Any) -> None:
        """`rank_zero_warn`, unless this was said already."""
        if self._is_new(message):
            rank_zero_warn(message, stacklevel=stacklevel, **kwargs)

    def deprecation(self, message: str, stacklevel: int = 6, **kwargs: Any) -> None:
        """`rank_zero_deprecation`, unless this was said already."""
        if self._is_new(message):
            rank_zero_deprecation(message, stacklevel=stacklevel, **kwargs)

    def info(self, message: str, stacklevel: int = 5, **kwargs: Any) -> None:
        """`rank_zero_info`, unless this was said already."""
        if self._is_new(message):
            rank_zero_info(message, stacklevel=stacklevel, **kwargs)

    def _is_new(self, message: str) -> bool:
        known = message in self
        self.add(message)
        return not known


class Anything:
    """What stands in for an object that only the first process has: accepts any attribute, call and index, and does nothing."""

    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Anything:
        """Return itself."""
        return self

    def __getitem__(self, key: Any) -> Anything:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        return None


def _log() -> logging.Logger:
    """Python shows INFO nowhere unless somebody has set logging up; where nobody has, it goes to the standard error."""
    if log.level == logging.NOTSET and not log.hasHandlers():
        log.setLevel(logging.INFO)
        log.addHandler(logging.StreamHandler())
    return log
