"""A logger that writes nothing, for `fast_dev_run`: user code that draws to ``self.logger.experiment`` still runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leyden.loggers.logger import Logger


class _Anything:
    """Accepts any attribute, call and index, and does nothing."""

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Anything:
        return self

    def __getitem__(self, key: Any) -> _Anything:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        return None


class DummyLogger(Logger):
    """Takes the place of a logger where nothing may be written."""

    @property
    def name(self) -> str | None:
        """Always None."""
        return None

    @property
    def version(self) -> int | str | None:
        """Always None."""
        return None

    @property
    def experiment(self) -> Any:
        """An object that accepts every call."""
        return _Anything()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Do nothing."""

    def log_hyperparams(self, params: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Do nothing."""
