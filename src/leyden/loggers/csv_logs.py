"""`CSVLogger`, at the place where programs import it from."""

from __future__ import annotations

from leyden.loggers.csv_logger import CSVLogger

__all__ = ["CSVLogger"]
