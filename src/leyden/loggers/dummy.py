"""A logger that writes nothing, for `fast_dev_run`: user code that draws to ``self.logger.experiment`` still runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leyden.loggers.logger import Logger
from leyden.rank_zero import Anything


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
        return Anything()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Do nothing."""

    def log_hyperparams(self, params: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Do nothing."""
