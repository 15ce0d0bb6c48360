"""The names that users import. A change of these lists is a decision, and belongs into the changelog."""

from __future__ import annotations

from importlib import import_module

import pytest

SURFACE = {
    "leyden.accelerators": [
        "Accelerator",
        "CPUAccelerator",
        "CUDAAccelerator",
        "MPSAccelerator",
        "XLAAccelerator",
        "find_usable_cuda_devices",
    ],
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
        "RichModelSummary",
        "RichProgressBar",
        "TQDMProgressBar",
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
    "leyden.demos": [
        "BoringDataModule",
        "BoringModel",
        "DemoModel",
    ],
    "leyden.plugins": [
        "CheckpointIO",
        "DeepSpeedPrecision",
        "DoublePrecision",
        "FSDPPrecision",
        "HalfPrecision",
        "MixedPrecision",
        "Precision",
        "XLAPrecision",
    ],
    "leyden.plugins.environments": [
        "ClusterEnvironment",
        "KubeflowEnvironment",
        "LSFEnvironment",
        "LightningEnvironment",
        "MPIEnvironment",
        "SLURMEnvironment",
        "TorchElasticEnvironment",
    ],
    "leyden.profilers": [
        "AdvancedProfiler",
        "PassThroughProfiler",
        "Profiler",
        "PyTorchProfiler",
        "SimpleProfiler",
        "ThroughputProfiler",
    ],
    "leyden.strategies": [
        "DDPStrategy",
        "DeepSpeedStrategy",
        "FSDPStrategy",
        "HogwildStrategy",
        "ModelParallelStrategy",
        "ParallelStrategy",
        "SingleDeviceStrategy",
        "Strategy",
    ],
    "leyden.utilities": [
        "AttributeDict",
        "CombinedLoader",
        "GradClipAlgorithmType",
        "LightningEnum",
        "disable_possible_user_warnings",
        "grad_norm",
        "measure_flops",
        "move_data_to_device",
        "rank_zero_deprecation",
        "rank_zero_info",
        "rank_zero_only",
        "rank_zero_warn",
        "suggested_max_num_workers",
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
