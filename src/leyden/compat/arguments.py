"""The Trainer's arguments of former days in the words of today."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from leyden.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    ModelSummary,
)
from leyden.callbacks.checkpoint_name import folder_path
from leyden.compat import former_devices
from leyden.compat.former_callbacks import auto_mode
from leyden.compat.translation import Translation
from leyden.compat.watchers import GPUMemory, GradientNorms, NaNGradients, ValLossIfLogged
from leyden.errors import ConfigurationError, UnknownArgumentError, did_you_mean, reject

# The same under another name. What had None for «not given» has it still.
RENAMED = {
    "max_nb_epochs": "max_epochs",
    "min_nb_epochs": "min_epochs",
    "nb_gpu_nodes": "num_nodes",
    "gradient_clip": "gradient_clip_val",
    "nb_sanity_val_steps": "num_sanity_val_steps",
    "row_log_interval": "log_every_n_steps",
    "add_row_log_interval": "log_every_n_steps",
    "default_save_path": "default_root_dir",
    "show_progress_bar": "enable_progress_bar",
    "replace_sampler_ddp": "use_distributed_sampler",
}

# What nothing needs to be written for any more.
WITHOUT_EFFECT = {
    "log_save_interval": "leave it out: loggers write what they are given, every log_every_n_steps",
    "flush_logs_every_n_steps": "leave it out: loggers write what they are given, every log_every_n_steps",
    "amp_level": "leave it out: torch's own mixed precision, Trainer(precision='16-mixed'), has no levels",
    "amp_backend": "leave it out: Trainer(precision='16-mixed') is torch's own mixed precision",
    "process_position": "leave it out: the progress bar finds its place by itself",
    "auto_select_gpus": "leave it out, and choose by indices, as in Trainer(devices=[1]), or by CUDA_VISIBLE_DEVICES",
    "move_metrics_to_cpu": "leave it out: what is logged is summed on the device, and is small",
    "enable_pl_optimizer": "leave it out: self.optimizers() gives optimizers that know of the Trainer",
}

# What would change the training if it were passed over: an error, unless the value is one that asks for nothing.
ELSEWHERE = {
    "auto_lr_find": "the learning rate, in the module; Tuner(trainer).lr_find(model), as today, is not there yet",
    "auto_scale_batch_size": "the batch size, in the loader; Tuner(trainer).scale_batch_size(model), as today, is not there yet",
    "stochastic_weight_avg": "callbacks=[leyden.callbacks.WeightAveraging()], or a subclass that says from when on",
    "ipus": "accelerator='auto', 'cpu', 'cuda', 'mps' or 'tpu'; there is no support for IPUs",
    "hpus": "accelerator='auto', 'cpu', 'cuda', 'mps' or 'tpu'; there is no support for HPUs",
}


@dataclass(frozen=True)
class Modern:
    """What former arguments are today.

    Attributes:
        arguments: today's names, all that were asked for.
        ckpt_path: what ``resume_from_checkpoint`` named, for verbs that are given no ``ckpt_path``.
        truncated_bptt_steps: time steps of a part that a sequence is cut into.
    """

    arguments: dict[str, Any]
    ckpt_path: str | os.PathLike[str] | None = None
    truncated_bptt_steps: int | None = None


def modernise(asked: dict[str, Any], others: dict[str, Any]) -> Modern:
    """Translate former arguments, with the meaning that they had, and tell once for each what is written today.

    Args:
        asked: today's names, each with its value, defaults included. Former values of them are translated as well:
            ``accumulate_grad_batches={4: 2}``, ``profiler=True``, ``max_steps=None``, ``accelerator="ddp"``, ``strategy="dp"``.
        others: all other names that the Trainer was given.

    Raises:
        ConfigurationError: for a name that never was one, a value that was never allowed, and where two arguments contradict
            each other.
    """
    for name in others:
        if name not in FORMER_NAMES:
            hint = did_you_mean(name, [*asked, *FORMER_NAMES])
            raise UnknownArgumentError(f"Trainer has no argument {name!r}.{hint}")
    made = Translation(asked, others)
    former_devices.translate_devices(made)
    for name, today in RENAMED.items():
        _rename(made, name, today)
    for name, why in WITHOUT_EFFECT.items():
        if made.take(name) is not None:
            made.say(f"{name}={others[name]!r}", why)
    for name, instead in ELSEWHERE.items():
        _refuse(made, name, instead)
    for name, translate in _OWN_MEANING.items():
        if name in made.others:
            translate(made, made.take(name))
    _former_values(made)
    made.arguments["callbacks"] = made.callbacks or asked["callbacks"]
    made.tell()  # where the Trainer was called
    return Modern(made.arguments, made.ckpt_path, made.truncated_bptt_steps)


def _rename(made: Translation, name: str, today: str) -> None:
    value = made.take(name)
    if value is not None:
        made.set(today, value, f"{name}={value!r}")
        made.say(f"{name}={value!r}", **{today: value})


def _refuse(made: Translation, name: str, instead: str) -> None:
    asks = name in made.others
    value = made.take(name)
    if value:
        raise ConfigurationError(f"Trainer({name}={value!r}) is a former spelling. Write instead: {instead}.")
    if asks and value is not None:
        made.say(f"{name}={value!r}", "leave it out")


def _former_values(made: Translation) -> None:
    """Values of today's names that were allowed in former days."""
    schedule = made.arguments["accumulate_grad_batches"]
    if isinstance(schedule, dict):
        if made.have(GradientAccumulationScheduler):
            raise ConfigurationError(
                f"accumulate_grad_batches={schedule!r} and the GradientAccumulationScheduler among callbacks contradict each "
                "other. Leave the first out."
            )
        made.release("accumulate_grad_batches")
        made.add(GradientAccumulationScheduler(schedule))
        made.say(
            f"accumulate_grad_batches={schedule!r}",
            "its epochs count from 0",
            callback=f"GradientAccumulationScheduler({schedule!r})",
        )
    profiler = made.arguments["profiler"]
    if isinstance(profiler, bool):
        made.arguments["profiler"] = "simple" if profiler else None
        if profiler:
            made.say("profiler=True", profiler="simple")
        else:
            made.say("profiler=False", "leave it out")
    if made.arguments["max_steps"] is None:
        made.arguments["max_steps"] = -1
        made.say("max_steps=None", max_steps=-1)


# How much of the data


def _overfit_pct(made: Translation, value: Any) -> None:
    """So much of each kind of data, whatever the others say; the order stays as it is, unlike with ``overfit_batches``."""
    spelt = f"overfit_pct={value!r}"
    part = 0.0 if value is None else _part("overfit_pct", value)
    if not part:
        made.say(spelt, "leave it out")
        return
    limits: dict[str, Any] = {f"limit_{kind}_batches": part for kind in ("train", "val", "test")}
    for name in ("train_percent_check", "val_percent_check", "test_percent_check"):
        if (other := made.take(name)) is not None:
            made.say(f"{name}={other!r}", f"leave it out: {spelt} decides")
    for name, limit in limits.items():
        made.set(name, limit, spelt)
    made.say(spelt, f"or overfit_batches={part}, which takes batches in order, and all for test", **limits)


def _percent_check(kind: str) -> Callable[[Translation, Any], None]:
    def translate(made: Translation, value: Any) -> None:
        if value is None:
            return
        name, today = f"{kind}_percent_check", f"limit_{kind}_batches"
        part: Any = _part(name, value)  # 1 was all of them, and is one batch today
        made.set(today, part, f"{name}={value!r}")
        made.say(f"{name}={value!r}", **{today: part})

    return translate


def _part(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        reject(name, value, "a fraction from 0.0 to 1.0")
    return float(value)


# Callbacks that were arguments


def _early_stop_callback(made: Translation, value: Any) -> None:
    if value is None or value is False:
        made.say(f"early_stop_callback={value!r}", "leave it out")
        return
    if value is True:
        own = [callback for callback in made.have(EarlyStopping) if callback.monitor == "val_loss"]
        if own:
            raise ConfigurationError(
                "early_stop_callback=True and the EarlyStopping('val_loss') among callbacks contradict each other. Leave the "
                "first out."
            )
        made.add(EarlyStopping("val_loss", patience=3, mode="min", verbose=True, strict=True, log_rank_zero_only=True))
        made.say("early_stop_callback=True", callback="EarlyStopping('val_loss', patience=3, verbose=True)")
        return
    if not isinstance(value, EarlyStopping):
        reject("early_stop_callback", value, "True, False or a leyden.callbacks.EarlyStopping")
    made.add(value)
    made.say("early_stop_callback=EarlyStopping(…)", _mode_of_then(value), callback="EarlyStopping(…)")


def _checkpoint_callback(made: Translation, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        spelt = f"checkpoint_callback={value!r}"
        made.set("enable_checkpointing", value, spelt)
        if value and not made.have(ModelCheckpoint):
            made.add(checkpoint := ModelCheckpoint())
            made.add(ValLossIfLogged([checkpoint]))
            made.say(
                spelt,
                "which keeps the best by that value, if it is logged",
                callback="ModelCheckpoint(monitor='val_loss')",
            )
        else:
            made.say(spelt, enable_checkpointing=value)
        return
    callbacks = list(value) if isinstance(value, (list, tuple)) else [value]
    if not callbacks or not all(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        reject("checkpoint_callback", value, "True, False or a leyden.callbacks.ModelCheckpoint")
    notes = []
    for callback in callbacks:
        made.add(callback)
        notes += [note] if (note := _mode_of_then(callback)) else []
    open_ones = [callback for callback in callbacks if ValLossIfLogged.suits(callback)]
    if open_ones:
        made.add(ValLossIfLogged(open_ones))
        notes.append(
            "with monitor='val_loss', which was the default, if it is logged; today's default is to keep the latest"
        )
    made.say("checkpoint_callback=ModelCheckpoint(…)", "; ".join(notes), callback="ModelCheckpoint(…)")


def _mode_of_then(callback: EarlyStopping | ModelCheckpoint) -> str:
    """Let high values be good where the default of then would have: at a name such as val_acc; what to say of it.

    Whether ``mode="min"`` was written or left out does not show, but nobody wants the lowest accuracy.
    """
    mode = auto_mode(callback.monitor) if callback.monitor is not None else callback.mode
    if mode == callback.mode or callback.mode != "min":
        return ""
    callback.mode = mode
    callback.start_anew()
    return f"with mode={mode!r}, which was the default for {callback.monitor!r}; today's is 'min'"


def _weights_save_path(made: Translation, value: Any) -> None:
    if value is None:
        return
    spelt, said, callback = f"weights_save_path={value!r}", "", f"ModelCheckpoint(dirpath={value!r})"
    checkpoints = made.have(ModelCheckpoint)
    without = [callback for callback in checkpoints if callback.dirpath is None]
    if made.arguments["enable_checkpointing"] is False:
        said, callback = "leave it out: there are no checkpoints", ""
    elif not checkpoints:
        made.add(ModelCheckpoint(dirpath=value))
    elif not without:
        said, callback = "leave it out: dirpath of ModelCheckpoint decides", ""
    else:  # it has been told of, if it is a former spelling
        said, callback = f"write {callback}", ""
    for checkpoint in without:
        checkpoint.dirpath = folder_path(value)
    made.say(spelt, said, callback)


def _weights_summary(made: Translation, value: Any) -> None:
    spelt = f"weights_summary={value!r}"
    if value is None:
        made.set("enable_model_summary", False, spelt)
        made.say(spelt, enable_model_summary=False)
        return
    depths = {"top": 1, "full": -1}
    if value not in depths:
        reject("weights_summary", value, "'top', 'full' or None")
    if made.have(ModelSummary):
        raise ConfigurationError(
            f"{spelt} and the ModelSummary among callbacks contradict each other. Leave the first out."
        )
    made.set("enable_model_summary", True, spelt)
    made.add(ModelSummary(max_depth=depths[value]))
    made.say(spelt, callback=f"ModelSummary(max_depth={depths[value]})")


def _progress_bar_refresh_rate(made: Translation, value: Any) -> None:
    if value is None:
        return
    if type(value) is not int or value < 0:
        reject("progress_bar_refresh_rate", value, "a number of batches, 0 for no bar")
    spelt = f"progress_bar_refresh_rate={value!r}"
    made.set("enable_progress_bar", value > 0, spelt)
    if value:
        made.say(spelt, "leave it out: the bar is drawn by time, see RichProgressBar(refresh_rate_s=…)")
    else:
        made.say(spelt, enable_progress_bar=False)


# What was looked at while training


def _track_grad_norm(made: Translation, value: Any) -> None:
    spelt = f"track_grad_norm={value!r}"
    if value in (None, -1, "-1"):
        made.say(spelt, "leave it out")
        return
    watcher = GradientNorms(value)
    made.add(watcher)
    made.say(spelt, f"self.log_dict(leyden.utilities.grad_norm(self, {watcher.norm_type})) in on_before_optimizer_step")


def _print_nan_grads(made: Translation, value: Any) -> None:
    spelt = f"print_nan_grads={value!r}"
    if value:
        made.add(NaNGradients())
        note = "which prints them; Trainer(nan_policy='raise') stops there and names them"
        made.say(spelt, note, callback="leyden.compat.watchers.NaNGradients()")
    elif value is not None:
        made.say(spelt, "leave it out")


def _log_gpu_memory(made: Translation, value: Any) -> None:
    spelt = f"log_gpu_memory={value!r}"
    if value is None or value is False:
        made.say(spelt, "leave it out")
        return
    if value not in ("all", "min_max", True):
        reject("log_gpu_memory", value, "'all', 'min_max', True or None")
    mode = "all" if value is True else value
    made.add(GPUMemory(mode))
    made.say(spelt, "which logs on CUDA devices only", callback=f"leyden.compat.watchers.GPUMemory({mode!r})")


def _terminate_on_nan(made: Translation, value: Any) -> None:
    spelt = f"terminate_on_nan={value!r}"
    if value:
        made.set("nan_policy", "raise", spelt)
        made.say(spelt, nan_policy="raise")
    elif value is not None:
        made.say(spelt, "leave it out")


# The rest


def _use_amp(made: Translation, value: Any) -> None:
    spelt = f"use_amp={value!r}"
    if value:
        if made.arguments["precision"] not in (
            16,
            "16",
        ):  # the two were given together while one took over from the other
            made.set("precision", "16-mixed", spelt)
        made.say(spelt, precision="16-mixed")
    elif value is not None:
        made.say(spelt, "leave it out")


def _resume_from_checkpoint(made: Translation, value: Any) -> None:
    if value is None:
        return
    if value == "":
        raise ConfigurationError("resume_from_checkpoint='' is empty. Give the path of a checkpoint, or leave it out.")
    made.ckpt_path = value
    note = f"trainer.fit(model, ckpt_path={value!r}), or test(model, ckpt_path={value!r})"
    made.say(f"resume_from_checkpoint={value!r}", note)


def _truncated_bptt_steps(made: Translation, value: Any) -> None:
    if value is None:
        return
    if type(value) is not int or value < 1:
        reject("truncated_bptt_steps", value, "a number of time steps ≥ 1, or None")
    made.truncated_bptt_steps = value
    made.say(f"truncated_bptt_steps={value!r}", "cut the batch in training_step, with automatic_optimization = False")


def _reload_dataloaders_every_epoch(made: Translation, value: Any) -> None:
    spelt = f"reload_dataloaders_every_epoch={value!r}"
    if value:
        made.set("reload_dataloaders_every_n_epochs", 1, spelt)
        made.say(spelt, reload_dataloaders_every_n_epochs=1)
    elif value is not None:
        made.say(spelt, "leave it out")


def _multiple_trainloader_mode(made: Translation, value: Any) -> None:
    if value is None:
        return
    if value != "max_size_cycle":
        raise ConfigurationError(
            f"Trainer(multiple_trainloader_mode={value!r}) is a former spelling. Write instead: return CombinedLoader(loaders, "
            f"mode={value!r}) from train_dataloader()."
        )
    made.say(f"multiple_trainloader_mode={value!r}", "leave it out: it is what is done")


def _prepare_data_per_node(made: Translation, value: Any) -> None:
    if value is None:
        return
    if not value:
        raise ConfigurationError(
            f"Trainer(prepare_data_per_node={value!r}) is a former spelling. Write instead: self.prepare_data_per_node = False "
            "in __init__ of the module or datamodule whose prepare_data it is."
        )
    made.say(f"prepare_data_per_node={value!r}", "leave it out: it is what is done")


def _automatic_optimization(made: Translation, value: Any) -> None:
    if value is False:
        raise ConfigurationError(
            "Trainer(automatic_optimization=False) is a former spelling. Write instead: self.automatic_optimization = False in "
            "__init__ of the module."
        )
    if value is not None:
        made.say(f"automatic_optimization={value!r}", "leave it out: the module says it")


# In this order: what another one looks at comes before it.
_OWN_MEANING: dict[str, Callable[[Translation, Any], None]] = {
    "overfit_pct": _overfit_pct,
    "train_percent_check": _percent_check("train"),
    "val_percent_check": _percent_check("val"),
    "test_percent_check": _percent_check("test"),
    "early_stop_callback": _early_stop_callback,
    "checkpoint_callback": _checkpoint_callback,
    "weights_save_path": _weights_save_path,
    "weights_summary": _weights_summary,
    "progress_bar_refresh_rate": _progress_bar_refresh_rate,
    "track_grad_norm": _track_grad_norm,
    "print_nan_grads": _print_nan_grads,
    "log_gpu_memory": _log_gpu_memory,
    "terminate_on_nan": _terminate_on_nan,
    "use_amp": _use_amp,
    "resume_from_checkpoint": _resume_from_checkpoint,
    "truncated_bptt_steps": _truncated_bptt_steps,
    "reload_dataloaders_every_epoch": _reload_dataloaders_every_epoch,
    "multiple_trainloader_mode": _multiple_trainloader_mode,
    "prepare_data_per_node": _prepare_data_per_node,
    "automatic_optimization": _automatic_optimization,
}

FORMER_NAMES = (*former_devices.NAMES, *RENAMED, *WITHOUT_EFFECT, *ELSEWHERE, *_OWN_MEANING)
