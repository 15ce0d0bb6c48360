"""The names that programs import from Lightning 2.x, each at its place in leyden; or an error that says what to write instead."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from typing import Any

import pytest

import leyden as L
from leyden.errors import AbsentError

# by module below the root: what leyden has
KEPT: dict[str, str] = {
    "": "Callback LightningDataModule LightningModule Trainer seed_everything",
    "accelerators": "Accelerator CPUAccelerator CUDAAccelerator MPSAccelerator XLAAccelerator find_usable_cuda_devices",
    "callbacks": "BasePredictionWriter Callback EMAWeightAveraging EarlyStopping GradientAccumulationScheduler LambdaCallback "
    "LearningRateMonitor ModelCheckpoint ModelSummary ProgressBar RichModelSummary RichProgressBar TQDMProgressBar "
    "ThroughputMonitor Timer WeightAveraging",
    "callbacks.callback": "Callback",
    "callbacks.early_stopping": "EarlyStopping",
    "callbacks.lr_monitor": "LearningRateMonitor",
    "callbacks.model_checkpoint": "ModelCheckpoint",
    "callbacks.model_summary": "ModelSummary",
    "callbacks.prediction_writer": "BasePredictionWriter",
    "callbacks.progress": "ProgressBar RichProgressBar TQDMProgressBar",
    "callbacks.timer": "Timer",
    "callbacks.weight_averaging": "EMAWeightAveraging WeightAveraging",
    "core": "LightningDataModule LightningModule",
    "core.datamodule": "LightningDataModule",
    "core.module": "LightningModule",
    "core.optimizer": "LightningOptimizer",
    "demos": "BoringDataModule BoringModel DemoModel",
    "demos.boring_classes": "BoringDataModule BoringModel DemoModel ManualOptimBoringModel RandomDataset RandomDictDataset "
    "RandomIterableDataset RandomIterableDatasetWithLen",
    "loggers": "CSVLogger Logger TensorBoardLogger",
    "loggers.csv_logs": "CSVLogger",
    "loggers.logger": "Logger rank_zero_experiment",
    "loggers.tensorboard": "TensorBoardLogger",
    "plugins": "CheckpointIO DeepSpeedPrecision DoublePrecision FSDPPrecision HalfPrecision MixedPrecision Precision "
    "XLAPrecision",
    "plugins.environments": "ClusterEnvironment KubeflowEnvironment LSFEnvironment LightningEnvironment MPIEnvironment "
    "SLURMEnvironment TorchElasticEnvironment",
    "plugins.io": "CheckpointIO",
    "plugins.precision": "DeepSpeedPrecision DoublePrecision FSDPPrecision HalfPrecision MixedPrecision Precision XLAPrecision",
    "profilers": "AdvancedProfiler PassThroughProfiler Profiler PyTorchProfiler SimpleProfiler",
    "profilers.advanced": "AdvancedProfiler",
    "profilers.profiler": "Profiler",
    "profilers.pytorch": "PyTorchProfiler",
    "profilers.simple": "SimpleProfiler",
    "strategies": "DDPStrategy DeepSpeedStrategy FSDPStrategy ModelParallelStrategy ParallelStrategy SingleDeviceStrategy "
    "Strategy",
    "trainer": "Trainer seed_everything",
    "trainer.states": "RunningStage TrainerFn TrainerState TrainerStatus",
    "utilities": "AttributeDict CombinedLoader GradClipAlgorithmType LightningEnum disable_possible_user_warnings grad_norm "
    "measure_flops move_data_to_device rank_zero_deprecation rank_zero_info rank_zero_only rank_zero_warn "
    "suggested_max_num_workers",
    "utilities.combined_loader": "CombinedLoader",
    "utilities.data": "extract_batch_size",
    "utilities.enums": "GradClipAlgorithmType LightningEnum",
    "utilities.exceptions": "MisconfigurationException SIGTERMException",
    "utilities.grads": "grad_norm",
    "utilities.model_helpers": "is_overridden",
    "utilities.model_summary": "LayerSummary ModelSummary get_human_readable_count summarize",
    "utilities.parsing": "AttributeDict",
    "utilities.rank_zero": "LightningDeprecationWarning WarningCache rank_prefixed_message rank_zero_debug "
    "rank_zero_deprecation rank_zero_info rank_zero_only rank_zero_warn",
    "utilities.seed": "isolate_rng",
    "utilities.types": "EVAL_DATALOADERS LRSchedulerConfig LRSchedulerConfigType LRSchedulerPLType LRSchedulerTypeUnion "
    "OptimizerConfig OptimizerLRScheduler OptimizerLRSchedulerConfig STEP_OUTPUT TRAIN_DATALOADERS",
    "utilities.warnings": "PossibleUserWarning",
}
# where releases before 2.0 had them, which programs of then still import
FORMER = {
    "core.lightning": "LightningModule",
    "utilities.apply_func": "move_data_to_device",
    "utilities.distributed": "rank_zero_deprecation rank_zero_info rank_zero_only rank_zero_warn",
    "utilities.seed": "seed_everything",
}
# names of Lightning's ``__all__`` that are not in KEPT: an error tells of each
WITHOUT = {
    "callbacks": "BackboneFinetuning BaseFinetuning BatchSizeFinder Checkpoint DeviceStatsMonitor LearningRateFinder "
    "ModelPruning OnExceptionCheckpoint SpikeDetection StochasticWeightAveraging",
    "loggers": "CometLogger LitLogger MLFlowLogger WandbLogger",
    "plugins": "AsyncCheckpointIO BitsandbytesPrecision LayerSync TorchCheckpointIO TorchSyncBatchNorm "
    "TransformerEnginePrecision XLACheckpointIO",
    "plugins.io": "AsyncCheckpointIO TorchCheckpointIO XLACheckpointIO",
    "plugins.precision": "BitsandbytesPrecision TransformerEnginePrecision",
    "profilers": "XLAProfiler",
    "utilities": "find_shared_parameters is_picklable is_shared_filesystem set_shared_parameters",
}
# examples, which programs do not build on
EXAMPLES = "LightningLSTM LightningTransformer SequenceSampler SimpleLSTM Transformer WikiText2"


def module(root: str, below: str) -> Any:
    return import_module(f"{root}.{below}" if below else root)


def pairs(table: dict[str, str]) -> list[tuple[str, str]]:
    return [(below, name) for below, names in table.items() for name in names.split()]


@pytest.mark.parametrize(("below", "name"), pairs(KEPT) + pairs(FORMER))
def test_the_name_is_at_its_place(below: str, name: str) -> None:
    source = f"leyden.{below}" if below else "leyden"
    bound: dict[str, Any] = {}
    exec(f"from {source} import {name}", bound)  # as programs write it
    assert bound[name] is getattr(module("leyden", below), name)


@pytest.mark.parametrize(("below", "name"), pairs(WITHOUT))
def test_an_absent_name_says_what_to_write_instead(below: str, name: str) -> None:
    with pytest.raises(AbsentError, match=rf"^leyden\.{below} has no {name}: .{{10,}}") as caught:
        exec(f"from leyden.{below} import {name}")
    assert isinstance(caught.value, ImportError)


def test_a_name_that_nobody_has_is_a_plain_error() -> None:
    for below in ("callbacks", "loggers", "plugins", "plugins.io", "profilers", "strategies", "utilities"):
        with pytest.raises(AttributeError, match="has no attribute 'Nobody'"):
            module("leyden", below).Nobody  # noqa: B018
        assert not hasattr(module("leyden", below), "Nobody")


def test_the_tables_are_those_of_the_installed_lightning() -> None:
    pytest.importorskip("lightning.pytorch")
    for below, name in pairs(KEPT):
        assert hasattr(module("lightning.pytorch", below), name), f"{below}.{name}"
    for below in {**KEPT, **WITHOUT}:
        theirs = set(getattr(module("lightning.pytorch", below), "__all__", ()))
        here = {*KEPT[below].split(), *WITHOUT.get(below, "").split()}
        assert theirs - here <= set(EXAMPLES.split() if below == "demos" else ()), below


def test_modules_are_reached_through_the_root_and_loaded_then_only() -> None:
    code = """
import sys, leyden as L
modules = ("accelerators", "callbacks", "compat", "demos", "loggers", "plugins", "profilers", "strategies", "utilities")
assert not [name for name in sys.modules if name.startswith(tuple("leyden." + each for each in modules))]
L.callbacks.ModelCheckpoint, L.loggers.CSVLogger, L.profilers.SimpleProfiler, L.trainer.states.TrainerFn
assert not [name for name in sys.modules if name.startswith(("leyden.utilities", "leyden.strategies", "leyden.plugins"))]
L.utilities.rank_zero_only, L.strategies.DDPStrategy, L.plugins.MixedPrecision, L.demos.BoringModel
L.accelerators.CUDAAccelerator
assert "leyden.compat" not in sys.modules, "leyden.compat"
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("name", ["cli", "tuner", "Fabric"])
def test_what_comes_later_is_said(name: str) -> None:
    with pytest.raises(AttributeError, match="not there yet"):
        getattr(L, name)
