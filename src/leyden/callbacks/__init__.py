"""Callbacks: `Callback` to subclass, and the ones that come with leyden, each loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from leyden.callbacks.callback import Callback
    from leyden.callbacks.early_stopping import EarlyStopping
    from leyden.callbacks.gradient_accumulation import GradientAccumulationScheduler
    from leyden.callbacks.lambda_callback import LambdaCallback
    from leyden.callbacks.learning_rate_monitor import LearningRateMonitor
    from leyden.callbacks.model_checkpoint import ModelCheckpoint
    from leyden.callbacks.model_summary import ModelSummary
    from leyden.callbacks.prediction_writer import BasePredictionWriter
    from leyden.callbacks.preemption import Preemption
    from leyden.callbacks.progress_bar import ProgressBar, RichProgressBar
    from leyden.callbacks.throughput_monitor import ThroughputMonitor
    from leyden.callbacks.timer import Timer
    from leyden.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging

__all__ = [
    "BasePredictionWriter",
    "Callback",
    "EMAWeightAveraging",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "Preemption",
    "ProgressBar",
    "RichProgressBar",
    "ThroughputMonitor",
    "Timer",
    "WeightAveraging",
]

_MODULES = {
    "BasePredictionWriter": "prediction_writer",
    "Callback": "callback",
    "EMAWeightAveraging": "weight_averaging",
    "EarlyStopping": "early_stopping",
    "GradientAccumulationScheduler": "gradient_accumulation",
    "LambdaCallback": "lambda_callback",
    "LearningRateMonitor": "learning_rate_monitor",
    "ModelCheckpoint": "model_checkpoint",
    "ModelSummary": "model_summary",
    "Preemption": "preemption",
    "ProgressBar": "progress_bar",
    "RichProgressBar": "progress_bar",
    "ThroughputMonitor": "throughput_monitor",
    "Timer": "timer",
    "WeightAveraging": "weight_averaging",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # the next access is a plain dict look-up
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
