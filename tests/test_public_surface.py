"""The names that users import. A change of these lists is a decision, and belongs into the changelog."""

from __future__ import annotations

from importlib import import_module

import pytest

SURFACE = {
    "leyden": [
        "Callback",
        "LightningDataModule",
        "LightningModule",
        "Trainer",
        "__version__",
        "load_checkpoint",
        "plan_memory",
        "seed_everything",
    ],
    "leyden.callbacks": [
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
    ],
    "leyden.data": [
        "CombinedLoader",
        "DataLoader",
        "batch_size_of",
        "move_to_device",
    ],
    "leyden.loggers": [
        "CSVLogger",
        "Logger",
        "TensorBoardLogger",
        "default_logger",
    ],
    "leyden.profilers": [
        "AdvancedProfiler",
        "PassThroughProfiler",
        "Profiler",
        "PyTorchProfiler",
        "SimpleProfiler",
        "ThroughputProfiler",
    ],
}


@pytest.mark.parametrize("package", SURFACE)
def test_exported_names(package: str) -> None:
    assert sorted(import_module(package).__all__) == SURFACE[package]


@pytest.mark.parametrize(("package", "name"), [(package, name) for package, names in SURFACE.items() for name in names])
def test_every_name_is_there_and_documented(package: str, name: str) -> None:
    value = getattr(import_module(package), name)
    assert name in dir(import_module(package))
    assert (value.__doc__ or "").strip(), f"{package}.{name} has no docstring"
