"""`LearningRateMonitor`, at the place where programs import it from."""

from __future__ import annotations

from leyden.callbacks.learning_rate_monitor import LearningRateMonitor

__all__ = ["LearningRateMonitor"]
