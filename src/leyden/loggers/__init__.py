"""Where a run's metrics and hyperparameters are written."""

from leyden.loggers.csv_logger import CSVLogger
from leyden.loggers.logger import Logger
from leyden.loggers.tensorboard import TensorBoardLogger, default_logger

__all__ = ["CSVLogger", "Logger", "TensorBoardLogger", "default_logger"]
