"""Where the names of Lightning are in leyden: modules, classes, former names, and what to use for those that are not there."""

from __future__ import annotations

from dataclasses import dataclass

ROOTS = ("lightning.pytorch", "pytorch_lightning", "lightning", "leyden")
"""What people import; the longest prefix counts."""

HAS: dict[str, frozenset[str]] = {
    module: frozenset(names.split())
    for module, names in {
        "": "Callback LightningDataModule LightningModule Trainer __version__ seed_everything",
        "accelerators": "Accelerator CPUAccelerator CUDAAccelerator MPSAccelerator XLAAccelerator find_usable_cuda_devices",
        "callbacks": "BasePredictionWriter Callback EMAWeightAveraging EarlyStopping GradientAccumulationScheduler "
        "LambdaCallback LearningRateMonitor ModelCheckpoint ModelSummary ProgressBar RichModelSummary RichProgressBar "
        "TQDMProgressBar ThroughputMonitor Timer WeightAveraging",
        "demos": "BoringDataModule BoringModel DemoModel",
        "demos.boring_classes": "BoringDataModule BoringModel DemoModel ManualOptimBoringModel RandomDataset "
        "RandomDictDataset RandomIterableDataset RandomIterableDatasetWithLen",
        "loggers": "CSVLogger Logger TensorBoardLogger",
        "plugins": "CheckpointIO DeepSpeedPrecision DoublePrecision FSDPPrecision HalfPrecision MixedPrecision Precision "
        "XLAPrecision",
        "plugins.environments": "ClusterEnvironment KubeflowEnvironment LSFEnvironment LightningEnvironment MPIEnvironment "
        "SLURMEnvironment TorchElasticEnvironment",
        "plugins.io": "CheckpointIO",
        "plugins.precision": "DeepSpeedPrecision DoublePrecision FSDPPrecision HalfPrecision MixedPrecision Precision "
        "XLAPrecision",
        "profilers": "AdvancedProfiler PassThroughProfiler Profiler PyTorchProfiler SimpleProfiler",
        "strategies": "DDPStrategy DeepSpeedStrategy FSDPStrategy ModelParallelStrategy ParallelStrategy SingleDeviceStrategy "
        "Strategy",
        "trainer": "Trainer seed_everything",
        "trainer.states": "RunningStage TrainerFn TrainerState TrainerStatus",
        "utilities": "AttributeDict CombinedLoader GradClipAlgorithmType LightningEnum disable_possible_user_warnings "
        "grad_norm measure_flops move_data_to_device rank_zero_deprecation rank_zero_info rank_zero_only rank_zero_warn "
        "suggested_max_num_workers",
        "utilities.apply_func": "move_data_to_device",
        "utilities.combined_loader": "CombinedLoader",
        "utilities.data": "extract_batch_size",
        "utilities.distributed": "rank_zero_deprecation rank_zero_info rank_zero_only rank_zero_warn",
        "utilities.enums": "GradClipAlgorithmType LightningEnum",
        "utilities.exceptions": "MisconfigurationException SIGTERMException",
        "utilities.grads": "grad_norm",
        "utilities.model_helpers": "is_overridden",
        "utilities.model_summary": "LayerSummary ModelSummary get_human_readable_count summarize",
        "utilities.parsing": "AttributeDict",
        "utilities.rank_zero": "LightningDeprecationWarning WarningCache rank_prefixed_message rank_zero_debug "
        "rank_zero_deprecation rank_zero_info rank_zero_only rank_zero_warn",
        "utilities.seed": "isolate_rng seed_everything",
        "utilities.types": "EVAL_DATALOADERS LRSchedulerConfig LRSchedulerConfigType LRSchedulerPLType LRSchedulerTypeUnion "
        "OptimizerConfig OptimizerLRScheduler OptimizerLRSchedulerConfig STEP_OUTPUT TRAIN_DATALOADERS",
        "utilities.warnings": "PossibleUserWarning disable_possible_user_warnings",
    }.items()
}
"""The names of Lightning's that leyden has, by module below ``leyden``."""

_MODULES = {"logging": "loggers", "profiler": "profilers", "utilities.cli": "cli"}
_WITHOUT_A_MODULE = ("core", "root_module")  # what they held is in the root now
RENAMED = {
    "AbstractProfiler": "Profiler",
    "BaseProfiler": "Profiler",
    "LearningRateLogger": "LearningRateMonitor",
    "LightningLoggerBase": "Logger",
}
"""Names that were given up, or are not needed twice, and the one that means the same."""

_LOGGER = (
    "TensorBoardLogger or CSVLogger of leyden.loggers, or a subclass of leyden.loggers.Logger that calls the library"
)
_RESULT = "self.log(name, value) in the step, and return the loss"
_SIZE = "leave it out and choose the value by hand; leyden has no tuner yet"
ADVICE: dict[str, str] = {
    **dict.fromkeys(
        ("WandbLogger", "MLFlowLogger", "CometLogger", "NeptuneLogger", "LitLogger", "TestTubeLogger", "TrainsLogger"),
        _LOGGER,
    ),
    **dict.fromkeys(("TrainResult", "EvalResult", "Result"), _RESULT),
    **dict.fromkeys(("Tuner", "BatchSizeFinder", "LearningRateFinder"), _SIZE),
    **dict.fromkeys(
        ("GPUStatsMonitor", "XLAStatsMonitor", "DeviceStatsMonitor"),
        'leyden.compat.watchers.GPUMemory("all") for memory, leyden.callbacks.ThroughputMonitor for rates',
    ),
    "BackboneFinetuning": "a callback that thaws the layers and adds them with optimizer.add_param_group in on_train_epoch_start",
    "BaseFinetuning": "a callback that freezes in setup and thaws in on_train_epoch_start",
    "Checkpoint": "leyden.callbacks.ModelCheckpoint, or leyden.Callback",
    "Fabric": "a leyden.LightningModule with a Trainer; Fabric's own loop may stay beside it",
    "LightningLite": "a leyden.LightningModule with a Trainer",
    "LightningCLI": "argparse, a module and a Trainer; leyden has no command line of its own yet",
    "LightningOptimizer": "torch.optim.Optimizer in annotations, or leyden.optimizers.LightningOptimizer",
    "ModelPruning": "a callback that calls torch.nn.utils.prune in on_train_epoch_end",
    "OnExceptionCheckpoint": "a callback that calls trainer.save_checkpoint(path) in on_exception",
    "ProgressBarBase": "leyden.callbacks.ProgressBar",
    "SpikeDetection": 'Trainer(nan_policy="skip"), or a callback that watches outputs["loss"] in on_train_batch_end',
    "StochasticWeightAveraging": "leyden.callbacks.WeightAveraging or EMAWeightAveraging",
    "XLAProfiler": "torch_xla.debug.profiler itself",
    **dict.fromkeys(("DDPPlugin", "DDPSpawnPlugin"), "Trainer(strategy=leyden.strategies.DDPStrategy(…))"),
    **dict.fromkeys(
        ("DDPShardedStrategy", "DDPShardedPlugin", "DDPFullyShardedStrategy"),
        "Trainer(strategy=leyden.strategies.FSDPStrategy(…))",
    ),
    "auto_move_data": "self.transfer_batch_to_device(batch, self.device, 0) before a call by hand, or "
    "trainer.predict(model, loader)",
    "cloud_io": "leyden.load_checkpoint(path) for load, trainer.save_checkpoint(path) for atomic_save, "
    "fsspec.core.url_to_fs(path)[0] for get_filesystem",
    "fabric": "a leyden.LightningModule with a Trainer; Fabric's own loop may stay beside it",
    "metrics": "from torchmetrics import …; classifiers take task= and num_classes= there",
    "pl_bolts": "the class copied into your own code",
    "tuner": _SIZE,
    "cli": "argparse, a module and a Trainer; leyden has no command line of its own yet",
}
"""What to use in place of names that leyden does not have."""

_DECORATORS = ("auto_move_data",)
DATA_LOADER = "data_loader"
"""A decorator of 2019 that does nothing any more: it is taken away wherever it stands."""


def is_ours(path: str) -> bool:
    """Whether a dotted name belongs to a package that is rewritten, or was."""
    return path.split(".")[0] == "pl_bolts" or below_root(path) is not None


@dataclass(frozen=True)
class Place:
    """What a name of Lightning's is in leyden.

    Attributes:
        module: dotted, from ``leyden``.
        name: in that module; None if the module itself is meant.
        missing: what to use instead if leyden does not have it.
    """

    module: str
    name: str | None = None
    missing: str | None = None

    @property
    def path(self) -> str:
        """The dotted name."""
        return self.module if self.name is None else f"{self.module}.{self.name}"


def homes(name: str) -> list[str]:
    """The modules below ``leyden`` that have a name of Lightning's, the root first."""
    return [module for module, names in HAS.items() if name in names]


def below_root(path: str) -> tuple[str, tuple[str, ...]] | None:
    """Split a dotted name into the package that people import and what follows; None if it belongs to another package."""
    for root in ROOTS:
        if path == root or path.startswith(f"{root}."):
            return root, tuple(path[len(root) + 1 :].split(".")) if path != root else ()
    return None


def place(path: str) -> tuple[Place, int] | None:
    """Find a dotted name of Lightning's, or a former one of leyden's, in leyden.

    Args:
        path: as in ``lightning.pytorch.callbacks.early_stopping.EarlyStopping``, attributes of a class included.

    Returns:
        Where it is, and how many parts of ``path`` that covers, what follows being attributes; None for other packages.
    """
    if path.split(".")[0] == "pl_bolts":
        return Place(path, None, ADVICE["pl_bolts"]), path.count(".") + 1
    split = below_root(path)
    if split is None:
        return None
    root, parts = split
    if "cloud_io" in parts:
        return Place(path, None, ADVICE["cloud_io"]), path.count(".") + 1
    covered = root.count(".") + 1
    if parts[:2] == ("fabric", "utilities") and any(homes(part) for part in parts[2:]):
        parts, covered = (
            parts[1:],
            covered + 1,
        )  # Fabric's small tools are those of the Trainer; its loggers and strategies are not
    for number, part in enumerate(parts):
        lower = part in (DATA_LOADER, *_DECORATORS) or (number == 0 and part in ("metrics", "fabric"))
        if part[0].isupper() or homes(part) or lower:
            found = _leaf(root, parts[:number], part)
            return None if found is None else (found, covered + number + 1)
    return _module(root, parts), covered + len(parts)


def _leaf(root: str, before: tuple[str, ...], name: str) -> Place | None:
    family = _renamed(".".join(before))
    today = RENAMED.get(name, name)
    own = f"leyden.{family}" if family else "leyden"
    if root == "leyden" and name == today and (name not in ADVICE or homes(name)):
        return None  # written for leyden; not ours to move
    if name == DATA_LOADER:
        return Place("leyden", DATA_LOADER)
    if family == "fabric" or before[:1] in (("metrics",), ("fabric",)):
        return Place(own, name, ADVICE[before[0]])
    known = homes(today)
    if not known:
        return Place(own, name, ADVICE.get(name, "something else; leyden has no such name (docs/migrate.md)"))
    best = max(known, key=lambda module: (_in_common(module, family), module == ""))
    return Place(f"leyden.{best}" if best else "leyden", today)


def _module(root: str, parts: tuple[str, ...]) -> Place:
    if not parts or parts[0] in _WITHOUT_A_MODULE:
        return Place("leyden")
    name = _renamed(".".join(parts))
    if name in HAS or root == "leyden":
        return Place(f"leyden.{name}")
    above = name.rpartition(".")[0]
    while above and above not in HAS:
        above = above.rpartition(".")[0]
    write = ADVICE.get(parts[0], f"what you need of it; leyden has no module {name}") if not above else ""
    return Place(f"leyden.{above or name}", None, write or f"leyden.{above}, which has the names that are still there")


def _renamed(module: str) -> str:
    for former, today in _MODULES.items():
        if module == former or module.startswith(f"{former}."):
            return today + module[len(former) :]
    return module


def _in_common(one: str, other: str) -> int:
    count = 0
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b or not a:
            break
        count += 1
    return count
