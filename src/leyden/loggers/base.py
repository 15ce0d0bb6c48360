"""The base class of loggers, at the place where programs of 2020 to 2022 import it from: what it is today."""

from __future__ import annotations

from leyden.errors import no_such_name
from leyden.loggers.logger import rank_zero_experiment

__all__ = ["rank_zero_experiment"]


def __getattr__(name: str) -> object:
    absent = {
        "LightningLoggerBase": "subclass leyden.loggers.Logger",
        "LoggerCollection": "Trainer(logger=[…]) takes several, and trainer.loggers has them",
        "DummyLogger": "Trainer(logger=False) has none",
    }
    return no_such_name(__name__, name, absent)
