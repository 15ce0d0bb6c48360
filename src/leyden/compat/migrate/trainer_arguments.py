"""The Trainer's arguments of 2020 and of 1.x, and what is written for each today."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import libcst as cst

from leyden.compat.migrate.calls import Arguments, is_unknown
from leyden.compat.migrate.facts import code, literal

TODAY = frozenset(
    (
        "accelerator",
        "strategy",
        "devices",
        "num_nodes",
        "max_restarts",
        "precision",
        "logger",
        "callbacks",
        "fast_dev_run",
        "max_epochs",
        "min_epochs",
        "max_steps",
        "min_steps",
        "max_time",
        "limit_train_batches",
        "limit_val_batches",
        "limit_test_batches",
        "limit_predict_batches",
        "overfit_batches",
        "val_check_interval",
        "check_val_every_n_epoch",
        "num_sanity_val_steps",
        "log_every_n_steps",
        "enable_checkpointing",
        "enable_progress_bar",
        "enable_model_summary",
        "accumulate_grad_batches",
        "gradient_clip_val",
        "gradient_clip_algorithm",
        "deterministic",
        "benchmark",
        "compile",
        "fused_optimizer",
        "inference_mode",
        "use_distributed_sampler",
        "profiler",
        "detect_anomaly",
        "nan_policy",
        "oom_policy",
        "barebones",
        "plugins",
        "sync_batchnorm",
        "reload_dataloaders_every_n_epochs",
        "default_root_dir",
    )
)
STRATEGIES = frozenset(
    (
        "auto",
        "single_device",
        "ddp",
        "ddp_spawn",
        "ddp_fork",
        "ddp_notebook",
        "ddp_find_unused_parameters_true",
        "fsdp",
        "fsdp_cpu_offload",
        "model_parallel",
        "deepspeed",
        "hogwild",
    )
)
_PER_PROCESS = "batch_size=… divided by the number of devices, for the same steps: each process has batches of its own"
_NOT_SEEN = "its value is not seen here."

Rule = Callable[[Arguments, str], None]
MakeCallback = Callable[[str, str], cst.BaseExpression]
"""From a callback's name and its arguments to an expression; the import is added where it is needed."""


def renamed(today: str) -> Rule:
    """The same value under another name."""
    return lambda call, name: call.rename(name, today)


def _dropped(call: Arguments, name: str) -> None:
    call.drop(name)


def _off(write: str, nothing: tuple[Any, ...] = (None, False)) -> Rule:
    """Left out where it is off, else left to a person."""

    def rule(call: Arguments, name: str) -> None:
        if call.literal(name) in nothing:
            call.drop(name)
        else:
            call.note(name, "the Trainer has no such argument any more.", write)

    return rule


def _by_value(values: dict[Any, tuple[str, str] | None], otherwise: str) -> Rule:
    """Another name and value for each literal, None to leave it out.

    ``otherwise`` is what a person writes, or, with ``=``, the argument for any other expression, whose text is put for ``{}``;
    empty to let other values stay.
    """

    def rule(call: Arguments, name: str) -> None:
        value = call.literal(name)
        for known, new in values.items():
            if type(value) is type(known) and value == known:
                if new is None:
                    call.drop(name)
                else:
                    call.rename(name, *new)
                return
        if not otherwise:
            return
        if is_unknown(value) and otherwise.startswith("="):
            today, _, form = otherwise[1:].partition("=")
            call.rename(name, today, form.format(call.text(name)))
        else:
            call.note(name, _NOT_SEEN if is_unknown(value) else "it has no such value any more.", otherwise.lstrip("="))

    return rule


def _fraction(today: str) -> Rule:
    """A share of the batches: 1 was all of them, and is one batch today."""

    def rule(call: Arguments, name: str) -> None:
        value = call.literal(name)
        if value is None:
            call.drop(name)
        elif isinstance(value, float):
            call.rename(name, today)
        elif is_unknown(value):
            call.rename(name, today, f"float({call.text(name)})")
        else:
            call.rename(name, today, repr(float(str(value))))

    return rule


def _overfit_pct(call: Arguments, name: str) -> None:
    """So much of each kind of data, whatever was said of each; unlike `overfit_batches` it leaves the order alone."""
    value = call.literal(name)
    if value in (0, None):
        call.drop(name)
        return
    part = f"float({call.text(name)})" if is_unknown(value) else repr(float(str(value)))
    for kind in ("train", "val", "test"):
        if f"{kind}_percent_check" in call.given:
            call.drop(f"{kind}_percent_check")
    call.add(name, "limit_test_batches", part)
    call.add(name, "limit_val_batches", part)
    call.rename(name, "limit_train_batches", part)


def _gpus(call: Arguments, name: str) -> None:
    value = call.literal(name)
    if isinstance(value, str) and value.replace(",", "").replace(" ", "").replace("-1", "1").isdigit():
        indices = [int(part) for part in value.split(",") if part.strip()]
        value = -1 if indices == [-1] else indices
    if value is None and ({"accelerator", "devices", "tpu_cores", "num_tpu_cores"} & set(call.given)):
        call.drop(name)
    elif value in (0, None, []):
        call.rename(name, "accelerator", '"cpu"')
    elif isinstance(value, (int, list, tuple)):
        devices = call.text(name) if not isinstance(call.literal(name), str) else repr(value)
        if "accelerator" in call.given:
            call.rename(name, "devices", devices)
        else:
            call.add(name, "devices", devices)
            call.rename(name, "accelerator", '"gpu"')
    else:
        text = call.text(name)
        write = (
            f'accelerator="gpu", devices={text}; or, where it may be 0 or None, accelerator="gpu" if {text} else "cpu"'
        )
        call.note(name, f"{_NOT_SEEN} 0 and None were the CPU.", write)


def _tpu_cores(call: Arguments, name: str) -> None:
    value = call.literal(name)
    if value is None:
        call.drop(name)
    elif isinstance(value, int):
        call.add(name, "devices", call.text(name))
        call.rename(name, "accelerator", '"tpu"')
    else:
        call.note(name, "TPU cores are devices now, counted from 0.", 'accelerator="tpu", devices=…')


def _processes(call: Arguments, name: str) -> None:
    value = call.literal(name)
    elsewhere = "accelerator" in call.given and call.literal("accelerator") not in ("cpu", "auto")
    if value in (None, 1) or elsewhere or "devices" in call.given:
        call.drop(name)
    elif "gpus" in call.given:
        call.note(name, "it counts on the CPU alone, and gpus is not seen here.", 'accelerator="cpu", devices=…')
    elif isinstance(value, int):
        call.add(name, "devices", call.text(name))
        call.rename(name, "accelerator", '"cpu"')
    else:
        call.note(name, f"{_NOT_SEEN} It counted on the CPU.", f'accelerator="cpu", devices={call.text(name)}')


def _backend(call: Arguments, name: str) -> None:
    """``distributed_backend``, and ``accelerator`` and ``strategy`` where they hold such a value."""
    value, former = call.literal(name), name == "distributed_backend"
    if value is None and former:
        call.drop(name)
    elif value in ("ddp", "ddp_spawn") or (value in STRATEGIES and former):
        call.rename(name, "strategy")
    elif value in ("dp", "ddp2") and "gpus" in call.given and call.literal("gpus") in (0, 1, None):
        call.drop(name)
    elif value in ("dp", "ddp2"):
        call.note(name, f"{value} is not there any more; ddp stands in its place.", _PER_PROCESS)
        call.rename(name, "strategy", '"ddp"')
    elif value == "ddp_cpu":
        call.add(name, "strategy", '"ddp_spawn"')
        call.rename(name, "accelerator", '"cpu"')
    elif former or (name == "strategy" and isinstance(value, str) and value not in STRATEGIES):
        known = ", ".join(sorted(STRATEGIES))
        why = "leyden has no such strategy." if isinstance(value, str) else _NOT_SEEN
        call.note(name, why, f"strategy=…, one of {known}")


def _precision(call: Arguments, name: str) -> None:
    value = call.literal(name)
    if value in (16, "16"):
        call.rename(name, name, '"16-mixed"')
    elif value == "bf16":
        call.rename(name, name, '"bf16-mixed"')
    elif isinstance(value, str) and value.startswith("transformer-engine"):
        call.note(name, "leyden has no such precision.", 'precision="bf16-mixed"')


def _use_amp(call: Arguments, name: str) -> None:
    value = call.literal(name)
    if value in (False, None) or "precision" in call.given:
        call.drop(name)
    else:
        form = '"16-mixed"' if value is True else f'"16-mixed" if {call.text(name)} else "32-true"'
        call.rename(name, "precision", form)


def _callback(call: Arguments, name: str, kinds: tuple[str, ...], write: str) -> None:
    """An argument that held a callback, which goes into ``callbacks``."""
    original = call.original_value(name)
    held = original if isinstance(original, cst.Call) else call.facts.value_of(original)
    made = call.facts.meaning(held.func) if isinstance(held, cst.Call) else None
    if made is not None and made.rpartition(".")[2] in kinds and call.add_callback(name, call.value(name)):
        return
    if isinstance(original, cst.IfExp):
        write = _either(call, name, original) or write
    call.note(name, "callbacks are given in one list.", write)


def _either(call: Arguments, name: str, value: cst.IfExp) -> str | None:
    """What is written for ``a if c else None``; None where one of the two is True, or neither is none."""
    off = [literal(each) for each in (value.body, value.orelse)]
    if not any(each is None or each is False for each in off) or True in off:
        return None
    both = zip(off, (value.body, value.orelse), strict=True)
    one, other = ("[]" if each in (None, False) else f"[{code(node)}]" for each, node in both)
    chosen, test = f"{one} if {code(value.test)} else {other}", code(value.test)
    write = f"callbacks=[…, *({chosen})]" if "callbacks" in call.given else f"callbacks={chosen}"
    if name == "checkpoint_callback" and False in off:
        write += f", enable_checkpointing={f'not ({test})' if off[0] is False else f'bool({test})'}"
    return write


def _has_checkpoint(call: Arguments) -> bool:
    """Whether a `ModelCheckpoint` is seen among the callbacks."""
    given = call.facts.held(call.original_value("callbacks")) if "callbacks" in call.given else None
    found = [call.facts.held(each.value) for each in given.elements] if isinstance(given, (cst.List, cst.Tuple)) else []
    return any(
        isinstance(each, cst.Call) and (call.facts.meaning(each.func) or "").endswith(".ModelCheckpoint")
        for each in found
    )


def rules(callback: MakeCallback) -> dict[str, Rule]:
    """The rule of every former argument, and of today's that had values which are former ones.

    Args:
        callback: makes the expression for a callback of leyden's.
    """

    def put(call: Arguments, name: str, made: cst.BaseExpression) -> None:
        if not call.add_callback(name, made):
            call.note(name, "callbacks= is not a list that is seen here.", f"callbacks=[…, {code(made)}]")

    def early_stopping(call: Arguments, name: str) -> None:
        value = call.literal(name)
        if value in (False, None):
            call.drop(name)
        elif value is True:
            put(call, name, callback("EarlyStopping", '"val_loss", patience=3'))
        else:
            flag = 'callbacks=[EarlyStopping("val_loss", patience=3)] if it is True, and nothing for None or False'
            _callback(call, name, ("EarlyStopping",), f"callbacks=[{call.text(name)}]; {flag}")

    def checkpointing(call: Arguments, name: str) -> None:
        value = call.literal(name)
        if value is None:
            call.drop(name)
        elif value is True and not _has_checkpoint(call):
            why = "it kept the best by val_loss where that is logged, else the latest."
            made = f'callbacks=[{"…, " * ("callbacks" in call.given)}ModelCheckpoint(monitor="val_loss")]'
            call.note(name, why, f"{made}; if val_loss is not logged, enable_checkpointing=True")
        elif isinstance(value, bool):
            call.rename(name, "enable_checkpointing")
        else:
            write = f"callbacks=[{call.text(name)}], or enable_checkpointing={call.text(name)} if it is True or False"
            _callback(call, name, ("ModelCheckpoint",), write)

    def accumulation(call: Arguments, name: str) -> None:
        value = call.literal(name)
        held = call.facts.value_of(call.original_value(name))
        if isinstance(value, dict) or isinstance(held, cst.Dict):
            put(call, name, callback("GradientAccumulationScheduler", call.text(name)))

    def summary(call: Arguments, name: str) -> None:
        value = call.literal(name)
        if value == "full":
            put(call, name, callback("ModelSummary", "max_depth=-1"))
        elif value in (None, "top"):
            call.rename(name, "enable_model_summary", repr(value is not None))
        else:
            call.note(name, _NOT_SEEN, "enable_model_summary=False, or callbacks=[ModelSummary(max_depth=…)]")

    return {
        **_RULES,
        "early_stop_callback": early_stopping,
        "checkpoint_callback": checkpointing,
        "accumulate_grad_batches": accumulation,
        "weights_summary": summary,
    }


def _max_steps(call: Arguments, name: str) -> None:
    if call.literal(name) is None:
        call.drop(name)


def _refresh_rate(call: Arguments, name: str) -> None:
    """Zero was no bar; how often the bar is drawn is no matter of batches any more."""
    value = call.literal(name)
    if value == 0:
        call.rename(name, "enable_progress_bar", "False")
    elif is_unknown(value):
        call.rename(name, "enable_progress_bar", f"bool({call.text(name)})")
    else:
        call.drop(name)


def _track_grad_norm(call: Arguments, name: str) -> None:
    value = call.literal(name)
    if value == -1:
        call.drop(name)
    else:
        norm = call.text(name)
        call.note(
            name,
            "the Trainer has no such argument any more.",
            "in the module:\ndef on_before_optimizer_step(self, optimizer):\n"
            f"    self.log_dict(leyden.utilities.grad_norm(self, {norm}))",
        )


def _log_gpu_memory(call: Arguments, name: str) -> None:
    value = call.literal(name)
    if value in (None, False):
        call.drop(name)
    else:
        mode = '"all"' if value is True else call.text(name)
        write = f"callbacks=[leyden.compat.watchers.GPUMemory({mode})]"
        call.note(name, "the Trainer has no such argument any more.", write)


_TUNE = "the value by hand; leyden has no tuner yet"
_RULES: dict[str, Rule] = {
    "gpus": _gpus,
    "num_tpu_cores": _tpu_cores,
    "tpu_cores": _tpu_cores,
    "num_processes": _processes,
    "distributed_backend": _backend,
    "accelerator": _backend,
    "strategy": _backend,
    "precision": _precision,
    "use_amp": _use_amp,
    "max_steps": _max_steps,
    "track_grad_norm": _track_grad_norm,
    "max_nb_epochs": renamed("max_epochs"),
    "min_nb_epochs": renamed("min_epochs"),
    "nb_gpu_nodes": renamed("num_nodes"),
    "num_gpu_nodes": renamed("num_nodes"),
    "nb_sanity_val_steps": renamed("num_sanity_val_steps"),
    "gradient_clip": renamed("gradient_clip_val"),
    "default_save_path": renamed("default_root_dir"),
    "row_log_interval": renamed("log_every_n_steps"),
    "add_row_log_interval": renamed("log_every_n_steps"),
    "show_progress_bar": renamed("enable_progress_bar"),
    "replace_sampler_ddp": renamed("use_distributed_sampler"),
    "overfit_pct": _overfit_pct,
    "train_percent_check": _fraction("limit_train_batches"),
    "val_percent_check": _fraction("limit_val_batches"),
    "test_percent_check": _fraction("limit_test_batches"),
    "progress_bar_refresh_rate": _refresh_rate,
    "profiler": _by_value({True: ("profiler", '"simple"'), False: None}, ""),
    "reload_dataloaders_every_epoch": _by_value(
        {True: ("reload_dataloaders_every_n_epochs", "1"), False: None}, "=reload_dataloaders_every_n_epochs=int({})"
    ),
    "terminate_on_nan": _by_value(
        {True: ("nan_policy", '"raise"'), False: None, None: None}, '=nan_policy="raise" if {} else None'
    ),
    "print_nan_grads": _off(
        'nan_policy="raise", which stops there; callbacks=[leyden.compat.watchers.NaNGradients()] prints them as before'
    ),
    **dict.fromkeys(
        (
            "log_save_interval",
            "flush_logs_every_n_steps",
            "process_position",
            "amp_level",
            "auto_select_gpus",
            "move_metrics_to_cpu",
            "enable_pl_optimizer",
            "enable_autolog_hparams",
        ),
        _dropped,
    ),
    "amp_backend": _by_value({"native": None, None: None}, 'precision="16-mixed", which is torch\'s own'),
    "log_gpu_memory": _log_gpu_memory,
    "weights_save_path": _off("callbacks=[ModelCheckpoint(dirpath=…)]"),
    "truncated_bptt_steps": _off(
        "self.automatic_optimization = False, and in training_step for each piece of the batch: loss, optimizer.zero_grad(), "
        "self.manual_backward(loss), optimizer.step(), hiddens.detach(); leyden still takes the argument"
    ),
    "auto_lr_find": _off(_TUNE),
    "auto_scale_batch_size": _off(_TUNE),
    "stochastic_weight_avg": _off("callbacks=[WeightAveraging()]"),
    "multiple_trainloader_mode": _off(
        'train_dataloaders=CombinedLoader(loaders, mode=…)', ("max_size_cycle", None)
    ),
    "prepare_data_per_node": _off("self.prepare_data_per_node = False in the module or datamodule", (True, None)),
    "automatic_optimization": _off("self.automatic_optimization = False in the module's __init__", (True, None)),
    "ipus": _off("an accelerator that leyden has: cpu, cuda, mps, tpu"),
    "hpus": _off("an accelerator that leyden has: cpu, cuda, mps, tpu"),
    "model_registry": _off("the logger's own calls after fit"),
}  # fmt: skip
_FIRST = ("accelerator", "distributed_backend", "strategy", "gpus", "overfit_pct")
FORMER = frozenset(_RULES) - TODAY | {
    "early_stop_callback",
    "checkpoint_callback",
    "weights_summary",
    "resume_from_checkpoint",
}
"""Every former argument that is known here; `resume_from_checkpoint` goes to `fit`, in `objects`."""


def rewrite_arguments(call: Arguments, known: dict[str, Rule]) -> None:
    """Apply the rules to a call of the Trainer.

    Args:
        call: its arguments.
        known: what `rules` gave.
    """
    if call.positional:
        write = "a name for each: " + ", ".join(f"…={code(value)}" for value in call.positional)
        call.note_at(call.original, "Trainer(…)", "its arguments have no order any more.", write)
    first = [name for name in _FIRST if name in call.given]
    for name in [*first, *(name for name in call.given if name not in first)]:
        if name not in call.given:
            continue  # another one has decided
        if name in known:
            known[name](call, name)
        elif name not in TODAY and name != "resume_from_checkpoint":
            call.note(name, "leyden's Trainer has no such argument.", "nothing, or what it did by hand")
