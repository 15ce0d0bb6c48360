"""Attributes that a Trainer, and what it runs, had in former days, as today's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from leyden.compat.absent import ABSENT
from leyden.compat.once import tell
from leyden.errors import did_you_mean

if TYPE_CHECKING:
    from leyden.module import LightningModule
    from leyden.trainer import Trainer

OF_MODULES = frozenset({"use_amp", "use_ddp", "use_dp", "datamodule"})


def trainer_attribute(trainer: Trainer, name: str) -> Any:
    """What a former attribute of a Trainer is today; told once for each name.

    Raises:
        AttributeError: if no Trainer ever had it.
    """
    if hasattr(type(trainer), name):  # a property has raised, and its own error says why
        return object.__getattribute__(trainer, name)
    if name in ABSENT:
        raise AttributeError(f"Trainer has no {name}: {ABSENT[name]}.", name=name, obj=trainer)
    if name not in _MEANINGS:
        known = [each for each in (*dir(type(trainer)), *_MEANINGS) if not each.startswith("_")]
        raise AttributeError(f"Trainer has no attribute {name!r}.{did_you_mean(name, known)}", name=name, obj=trainer)
    today, read = _MEANINGS[name]
    value = read(trainer)
    tell(f"trainer.{name}", today)  # where it was read
    return value


def module_attribute(module: LightningModule, name: str) -> Any:
    """What a Trainer of former days set on a module, one of `OF_MODULES`; told once for each name.

    Raises:
        AttributeError: if no Trainer runs the module.
    """
    trainer = vars(module).get("_trainer")
    if trainer is None:
        raise AttributeError(f"{type(module).__name__} has no {name} before a Trainer runs it.", name=name, obj=module)
    tell(f"self.{name}", f"self.trainer.{name}" if name == "datamodule" else _MEANINGS[name][0])
    return trainer.datamodule if name == "datamodule" else _MEANINGS[name][1](trainer)


def _own(name: str) -> tuple[str, Callable[[Trainer], Any]]:
    """The same under another name."""
    return f"trainer.{name}", lambda trainer: getattr(trainer, name)


def _is_strategy(*kinds: str) -> Callable[[Trainer], bool]:
    return lambda trainer: type(trainer.strategy).__name__ in kinds


def _gpu_ids(trainer: Trainer) -> list[int] | None:
    return trainer.device_ids if trainer.device.type == "cuda" else None


def _backend(trainer: Trainer) -> str | None:
    kind = type(trainer.strategy).__name__
    return None if kind == "SingleDevice" else kind.removesuffix("Strategy").lower()


def _schedulers(trainer: Trainer) -> list[dict[str, Any]]:
    return [{each.name: getattr(one, each.name) for each in fields(one)} for one in trainer.lr_scheduler_configs]


def _progress_bar_values(trainer: Trainer) -> dict[str, Any]:
    version = getattr(trainer.logger, "version", None)
    return ({} if version is None else {"v_num": version}) | trainer.progress_bar_metrics


def _batch_idx(trainer: Trainer) -> int:
    """The number of the training batch; in hooks that come after it too, though it counts as done there."""
    index, done = trainer._outlet.metrics._batch_idx, trainer._outlet.progress.batch
    return index if trainer.training and index is not None else max(0, done - 1)


def _total_batches(trainer: Trainer) -> int | float:
    return trainer.num_training_batches + sum(trainer.num_val_batches)


def _weights_folder(trainer: Trainer) -> str:
    checkpoint = trainer.checkpoint_callback
    folder = checkpoint.dirpath if checkpoint is not None else None
    return trainer.default_root_dir if folder is None else folder


def _overfit_pct(trainer: Trainer) -> float:
    limits = {trainer.limit_train_batches, trainer.limit_val_batches, trainer.limit_test_batches}
    limit = limits.pop()
    return limit if not limits and isinstance(limit, float) and limit < 1.0 else 0.0


_PROGRESS = ("trainer.progress_bar_metrics", _progress_bar_values)
_DEVICE_TYPE = "trainer.device.type"
_STRATEGY = "trainer.strategy"
_MIXED = ("trainer.precision == '16-mixed'", lambda trainer: trainer.precision == "16-mixed")
_ALWAYS_FALSE = ("False: there is no such strategy; several devices have a process each", lambda trainer: False)

# By name: what to write today, and what it is.
_MEANINGS: dict[str, tuple[str, Callable[[Trainer], Any]]] = {
    # processes and devices
    "proc_rank": _own("global_rank"),
    "nb_gpu_nodes": _own("num_nodes"),
    "num_gpu_nodes": _own("num_nodes"),
    "num_processes": _own("num_devices"),
    "root_device": _own("device"),
    "training_type_plugin": _own("strategy"),
    "num_gpus": ("trainer.num_devices", lambda trainer: len(_gpu_ids(trainer) or ())),
    "gpus": ("trainer.num_devices and trainer.device_ids", lambda trainer: len(_gpu_ids(trainer) or ())),
    "data_parallel_device_ids": ("trainer.device_ids", _gpu_ids),
    "root_gpu": ("trainer.device.index", lambda trainer: trainer.device.index if _gpu_ids(trainer) else None),
    "on_gpu": (f"{_DEVICE_TYPE} == 'cuda'", lambda trainer: trainer.device.type == "cuda"),
    "single_gpu": (
        f"{_DEVICE_TYPE} == 'cuda' and trainer.world_size == 1",
        lambda trainer: trainer.device.type == "cuda" and trainer.world_size == 1,
    ),
    "on_tpu": (f"{_DEVICE_TYPE} == 'xla'", lambda trainer: trainer.device.type == "xla"),
    "use_tpu": (f"{_DEVICE_TYPE} == 'xla'", lambda trainer: trainer.device.type == "xla"),
    "use_ddp": (f"isinstance({_STRATEGY}, leyden.strategies.DDPStrategy)", _is_strategy("DDPStrategy")),
    "use_dp": _ALWAYS_FALSE,
    "use_ddp2": _ALWAYS_FALSE,
    "use_horovod": _ALWAYS_FALSE,
    "data_parallel": ("trainer.world_size > 1", lambda trainer: trainer.world_size > 1),
    "distributed_backend": (_STRATEGY, _backend),
    "use_amp": _MIXED,
    "use_native_amp": _MIXED,
    "amp_level": ("nothing: torch's own mixed precision has no levels, and is like apex's O1", lambda trainer: "O1"),
    # arguments
    "max_nb_epochs": _own("max_epochs"),
    "min_nb_epochs": _own("min_epochs"),
    "nb_sanity_val_steps": _own("num_sanity_val_steps"),
    "gradient_clip": _own("gradient_clip_val"),
    "default_save_path": _own("default_root_dir"),
    "row_log_interval": _own("log_every_n_steps"),
    "add_row_log_interval": _own("log_every_n_steps"),
    "train_percent_check": _own("limit_train_batches"),
    "val_percent_check": _own("limit_val_batches"),
    "test_percent_check": _own("limit_test_batches"),
    "overfit_pct": ("trainer.limit_train_batches", _overfit_pct),
    "resume_from_checkpoint": (
        "trainer.ckpt_path, the file that a verb has loaded",
        lambda trainer: trainer._ckpt_path,
    ),
    "show_progress_bar": (
        "trainer.progress_bar_callback is not None",
        lambda trainer: trainer.progress_bar_callback is not None,
    ),
    "weights_save_path": ("trainer.checkpoint_callback.dirpath", _weights_folder),
    # the data
    "nb_training_batches": _own("num_training_batches"),
    "nb_val_batches": ("sum(trainer.num_val_batches)", lambda trainer: sum(trainer.num_val_batches)),
    "nb_test_batches": ("sum(trainer.num_test_batches)", lambda trainer: sum(trainer.num_test_batches)),
    "total_batches": ("trainer.num_training_batches + sum(trainer.num_val_batches)", _total_batches),
    "get_train_dataloader": ("trainer.train_dataloader", lambda trainer: lambda: trainer.train_dataloader),
    "get_val_dataloaders": ("trainer.val_dataloaders", lambda trainer: lambda: trainer.val_dataloaders),
    "get_test_dataloaders": ("trainer.test_dataloaders", lambda trainer: lambda: trainer.test_dataloaders),
    "disable_validation": ("not trainer.enable_validation", lambda trainer: not trainer.enable_validation),
    # the run
    "batch_idx": ("batch_idx, which every hook of a batch is given", _batch_idx),
    "batch_nb": ("batch_idx, which every hook of a batch is given", _batch_idx),
    "total_batch_nb": (
        "trainer.global_step * trainer.accumulate_grad_batches",
        lambda trainer: trainer._outlet.progress.total_batches,
    ),
    "total_batch_idx": (
        "trainer.global_step * trainer.accumulate_grad_batches",
        lambda trainer: trainer._outlet.progress.total_batches,
    ),
    "running_sanity_check": _own("sanity_checking"),
    "get_model": ("trainer.lightning_module", lambda trainer: lambda: trainer.lightning_module),
    "experiment": ("trainer.logger.experiment", lambda trainer: getattr(trainer.logger, "experiment", None)),
    "lr_schedulers": ("trainer.lr_scheduler_configs", _schedulers),
    "early_stop_callback": _own("early_stopping_callback"),
    "training_tqdm_dict": _PROGRESS,
    "tng_tqdm_dic": _PROGRESS,
    "progress_bar_dict": _PROGRESS,
}
