"""Where a run's metrics and hyperparameters are written."""

from importlib import import_module

from leyden.errors import no_such_name
from leyden.loggers.csv_logger import CSVLogger
from leyden.loggers.logger import Logger
from leyden.loggers.tensorboard import TensorBoardLogger, default_logger

__all__ = ["CSVLogger", "Logger", "TensorBoardLogger", "default_logger"]

_LATER = "it is not there yet; subclass Logger"
_ABSENT = dict.fromkeys(("CometLogger", "LitLogger", "MLFlowLogger", "NeptuneLogger", "WandbLogger"), _LATER) | {
    "LightningLoggerBase": "subclass leyden.loggers.Logger",
    "TestTubeLogger": "use CSVLogger or TensorBoardLogger, with the same save_dir and name",
}


def __getattr__(name: str) -> object:
    if name == "base":
        return import_module("leyden.loggers.base")
    return no_such_name(__name__, name, _ABSENT)
