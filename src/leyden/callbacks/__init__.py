"""Callbacks: `Callback` to subclass, and the ones that come with leyden, each loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from leyden.errors import no_such_name

if TYPE_CHECKING:
    from leyden.callbacks.callback import Callback
    from leyden.callbacks.early_stopping import EarlyStopping
    from leyden.callbacks.gradient_accumulation import GradientAccumulationScheduler
    from leyden.callbacks.lambda_callback import LambdaCallback
    from leyden.callbacks.learning_rate_monitor import LearningRateMonitor
    from leyden.callbacks.model_checkpoint import ModelCheckpoint
    from leyden.callbacks.model_summary import ModelSummary
    from leyden.callbacks.model_summary import ModelSummary as RichModelSummary
    from leyden.callbacks.prediction_writer import BasePredictionWriter
    from leyden.callbacks.preemption import Preemption
    from leyden.callbacks.progress import TQDMProgressBar
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
    "RichModelSummary",
    "RichProgressBar",
    "TQDMProgressBar",
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
    "RichModelSummary": "model_summary",
    "RichProgressBar": "progress_bar",
    "TQDMProgressBar": "progress",
    "ThroughputMonitor": "throughput_monitor",
    "Timer": "timer",
    "WeightAveraging": "weight_averaging",
}
_FORMER = {"RichModelSummary": "ModelSummary"}  # both print a styled table in a terminal


_LATER = "it is not there yet"
_ABSENT = {
    "BackboneFinetuning": _LATER,
    "BaseFinetuning": _LATER,
    "BatchSizeFinder": _LATER,
    "Checkpoint": "subclass ModelCheckpoint, or Callback and call trainer.save_checkpoint",
    "DeviceStatsMonitor": _LATER,
    "LearningRateFinder": _LATER,
    "ModelPruning": _LATER,
    "OnExceptionCheckpoint": _LATER,
    "SpikeDetection": _LATER,
    "StochasticWeightAveraging": _LATER,
}


def __getattr__(name: str) -> object:
    if name == "LearningRateLogger":
        from leyden.compat.former_callbacks import class_of_today

        name = class_of_today(name)
    if name == "base":
        return import_module("leyden.callbacks.base")
    if name not in _MODULES:
        no_such_name(__name__, name, _ABSENT)
    value: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), _FORMER.get(name, name))
    globals()[name] = value  # the next access is a plain dict look-up
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
