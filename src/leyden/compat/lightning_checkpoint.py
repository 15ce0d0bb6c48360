"""Checkpoints of Lightning, 0.7 to 2.x, as leyden's; and leyden's as one of Lightning 2.x.

Both are dicts with many keys of one name: ``state_dict``, ``optimizer_states``, ``lr_schedulers``, ``callbacks``,
``hyper_parameters``, and what `on_save_checkpoint` and the datamodule added. What differs:

- Lightning's place in the training is in ``loops``, since 1.6; leyden's is in ``progress``.
- Lightning counts every step of every optimizer, leyden one for each window of batches.
- The state of `ModelCheckpoint` and `EarlyStopping`, and the names of a few keys.
- Lightning's file has no random state, no order of the data and no metrics of an unfinished epoch.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch

from leyden.callbacks.checkpoint_name import folder_path
from leyden.progress import Progress

__all__ = ["from_lightning", "is_lightning", "progress_of", "to_lightning", "training_keys"]

VERSION_KEY = "pytorch-lightning_version"
_VERSION_KEYS = (VERSION_KEY, "pytorch-ligthning_version")  # misspelt before 0.8
_HPARAMS_KEYS = ("hyper_parameters", "hparams", "module_arguments")  # today's, before 0.8, in 0.7.6
_MARKS = (*_VERSION_KEYS, "loops", "global_step", "hparams", "hparams_type", "optimizer_states")
_SCALERS = re.compile(r"native_amp_scaling_state|(\w+\.)*\w*MixedPrecision(Plugin)?")
_OPTIMIZER_STEPS = (
    "epoch_loop.automatic_optimization.optim_progress",
    "epoch_loop.batch_loop.optimizer_loop.optim_progress",  # 1.6 to 1.9
)
_MANUAL_STEPS = (
    "epoch_loop.manual_optimization.optim_step_progress",
    "epoch_loop.batch_loop.manual_loop.optim_step_progress",
)
_LEYDENS_OWN = frozenset({
    "compiled", "hparams_omitted", "hparams_type",
    "loader_states", "loggers", "metrics", "optimizer_windows", "other_ranks", "progress",
    "random_state", "run_id", "scaler", "should_stop", "left_out", "current_model_state",
})  # fmt: skip
"""Keys that a file of Lightning does not have."""


def is_lightning(tree: Any) -> bool:
    """Whether this is the dict of a checkpoint that Lightning wrote."""
    return isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict) and any(mark in tree for mark in _MARKS)


def training_keys(tree: Mapping[str, Any]) -> frozenset[str]:
    """The keys of a checkpoint of Lightning that only a training needs."""
    known = {
        "optimizer_states",
        "lr_schedulers",
        "callbacks",
        "current_model_state",
        "averaging_state",
        "amp_scaling_state",
    }
    return frozenset(key for key in tree if key in known or (isinstance(key, str) and _SCALERS.fullmatch(key)))


def from_lightning(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint of Lightning with leyden's keys.

    Args:
        given: plain data and tensors; keys that only a training needs may be missing.

    Returns:
        What leyden would have saved, as far as the file has it; under ``left_out``, if there is anything, sentences about what a
        training that goes on from it will not find. Keys that the user added stay.
    """
    rest = dict(given)
    left_out: list[str] = []
    progress = progress_of(rest)
    made: dict[str, Any] = {"epoch": progress.epoch, "global_step": progress.global_step}
    made["state_dict"] = rest.pop("state_dict")
    made |= _hyper_parameters(rest)
    if "optimizer_states" in rest:
        made["optimizer_states"] = rest.pop("optimizer_states")
        made["lr_schedulers"] = [_scheduler_state(state) for state in rest.pop("lr_schedulers", None) or ()]
        made["scaler"] = _scaler_state(rest, left_out)
        made["progress"] = progress.state_dict()
        made["callbacks"] = _callback_states(rest, progress, left_out)
        if progress.batch and not progress.epoch_ended:
            left_out.append(
                f"It was saved in the middle of epoch {progress.epoch}, after {progress.batch} batches, and Lightning saves no "
                "order of the data: if the training loader shuffles, the rest of this epoch is another one, with some samples "
                "twice and others not at all."
            )
    if left_out:
        made["left_out"] = left_out
    for key in ("epoch", "global_step", "loops", "datamodule_hparams_name", "datamodule_hparams_type"):
        rest.pop(key, None)
    return {**rest, **made}


def progress_of(given: Mapping[str, Any]) -> Progress:
    """Where a checkpoint of Lightning stands in its training.

    Until 1.6 a file has the number of the next epoch, wherever in an epoch it was saved. Since then the loops' counters say
    it: callbacks save at an epoch's end before the epoch counts as completed, and within it before or after the batch does.
    """
    loops = given.get("loops")
    fit = loops.get("fit_loop", {}) if isinstance(loops, dict) else {}
    epochs, batches = fit.get("epoch_progress"), fit.get("epoch_loop.batch_progress")
    steps = int(given.get("global_step") or 0)
    if _version(given) < (1, 6) or epochs is None or batches is None:
        return Progress(epoch=int(given.get("epoch") or 0), global_step=steps, total_batches=steps)
    current = epochs["current"]
    done = current["completed"]
    within = current["ready"] > done and current.get("started", current["ready"]) > done
    batch = batches["current"]["processed"] if within else 0
    manual = next((fit[key]["total"]["completed"] for key in _MANUAL_STEPS if key in fit), 0)
    if manual or len(given.get("optimizer_states") or ()) > 1:
        counted = fit.get("epoch_loop.state_dict", {}).get("_batches_that_stepped", steps)
        # which goes up only after the validation and the callbacks of a batch, where files are saved
        steps = min(steps, counted + (1 if batch and current["processed"] == done else 0))
    return Progress(
        epoch=done,
        batch=batch,
        global_step=steps,
        total_batches=batches["total"]["processed"],
        epoch_ended=bool(within and batches.get("is_last_batch")),
    )


def _version(given: Mapping[str, Any]) -> tuple[int, int]:
    text = next((str(given[key]) for key in _VERSION_KEYS if key in given), "")
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _hyper_parameters(rest: dict[str, Any]) -> dict[str, Any]:
    """Take the hyperparameters, their type, and the argument of `__init__` that held all of them as one."""
    key = next((key for key in _HPARAMS_KEYS if rest.get(key)), None)
    values = rest.get(key, {}) if key is not None else {}
    name = rest.pop("hparams_name", "hparams" if key == "hparams" else None)
    was_namespace = rest.pop("hparams_type", None) == "Namespace" or isinstance(values, Namespace)
    for each in _HPARAMS_KEYS:
        rest.pop(each, None)
    values = dict(vars(values) if isinstance(values, Namespace) else values)
    for noted_by_cli in ("_instantiator", "_class_path"):  # the names of what would make the module
        values.pop(noted_by_cli, None)
    return {
        "hyper_parameters": values,
        "hparams_name": None if name == "kwargs" else name,
        "hparams_type": "Namespace" if was_namespace else "AttributeDict",
        "hparams_omitted": {},
    }


def _scheduler_state(state: Any) -> Any:
    """Without the method that a OneCycleLR of torch 1.x saved; the scheduler has one of its own."""
    if isinstance(state, dict) and str(state.get("anneal_func")).startswith("OneCycleLR."):
        return {key: each for key, each in state.items() if key != "anneal_func"}
    return state


def _scaler_state(rest: dict[str, Any], left_out: list[str]) -> Any:
    if rest.pop("amp_scaling_state", None):
        left_out.append("The state of Apex's loss scaling: leyden has no Apex, and its own scaling starts anew.")
    found = [key for key in rest if _SCALERS.fullmatch(key) and isinstance(rest[key], dict) and "scale" in rest[key]]
    states = [rest.pop(key) for key in found]
    return states[0] if states else None


# Callbacks


def _callback_states(rest: dict[str, Any], progress: Progress, left_out: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, state in (rest.pop("callbacks", None) or {}).items():
        # until 1.9 the key of a ModelCheckpoint had one argument more
        name = re.sub(r", 'save_on_train_epoch_end': (None|True|False)", "", str(key))
        if isinstance(state, dict) and "best_model_path" in state:
            found[name] = _model_checkpoint(state, progress.global_step)
        elif isinstance(state, dict) and {"wait_count", "best_score"} <= state.keys():
            found[name] = _early_stopping(state)
        elif isinstance(state, dict) and state.keys() == {"latest_update_step"}:
            left_out.append(f"The state of {name}: Lightning keeps the averages elsewhere, and leyden's start anew.")
        elif state:
            found[name] = state
    _callbacks_of_0_7(rest, found, progress, left_out)
    return found


def _callbacks_of_0_7(rest: dict[str, Any], found: dict[str, Any], progress: Progress, left_out: list[str]) -> None:
    """What versions before 0.10 noted of the two callbacks, under keys of their own."""
    score = rest.pop("checkpoint_callback_best_model_score", rest.pop("checkpoint_callback_best", None))
    path = rest.pop("checkpoint_callback_best_model_path", "")
    if path:
        state = {"best_model_path": path, "best_model_score": score}
        found.setdefault("ModelCheckpoint", _model_checkpoint(state, progress.global_step))
    elif score is not None:
        left_out.append("The best score of ModelCheckpoint, because the file does not say of which checkpoint.")
    waited = rest.pop("early_stop_callback_wait", None)
    patience = rest.pop("early_stop_callback_patience", None)
    if waited is not None or patience is not None:
        left_out.append("The counter of EarlyStopping, because the file does not say which score was the best.")


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _model_checkpoint(state: Mapping[str, Any], step: int) -> dict[str, Any]:
    kept = {str(path): float(score) for path, score in (state.get("best_k_models") or {}).items()}
    best, monitor = str(state["best_model_path"] or ""), state.get("monitor")
    score = _number(state.get("best_model_score"))
    history = [[score, path] for path, score in kept.items()]
    inherited = None
    if best and not kept and monitor is None and score is None:
        history = [[float(step), best]]  # without a metric, leyden's score is the step
    elif best and best not in kept and score is not None:
        inherited = [score, best]
    return {
        "monitor": monitor,
        "dirpath": folder_path(state["dirpath"]) if state.get("dirpath") else "",
        "requested": None,
        "history": history,
        "inherited": inherited,
        "last_model_path": str(state.get("last_model_path") or ""),
        "current_score": _number(state.get("current_score")),
        "step_saved": None,
        "displaced": [],
    }


def _early_stopping(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "wait_count": int(state["wait_count"]),
        "stopped_epoch": int(state.get("stopped_epoch") or 0),
        "best_score": torch.as_tensor(state["best_score"]),
        "limits": {"patience": state.get("patience")},
    }


# The way back


def to_lightning(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return leyden's checkpoint with the keys of Lightning 2.x, and sentences about what such a file has no place for.

    Args:
        given: what `leyden.load_checkpoint` returns.
    """
    progress = Progress()
    progress.load_state_dict(given.get("progress") or {"epoch": given.get("epoch", 0)})
    steps = int(given.get("global_step") or 0)
    left_out: list[str] = []
    made = {key: each for key, each in given.items() if key not in _LEYDENS_OWN}
    made |= {"epoch": progress.epoch, "global_step": steps, VERSION_KEY: "2.0.0"}
    made["hparams_name"] = given.get("hparams_name") or "kwargs"
    if not made.get("hyper_parameters"):
        made.pop("hyper_parameters", None)
        made.pop("hparams_name")
    if not made.get("datamodule_hyper_parameters"):
        made.pop("datamodule_hyper_parameters", None)
    manual = len(given.get("optimizer_states") or ()) > 1
    made["loops"] = {"fit_loop": _fit_loop(progress, steps, manual, len(made.get("optimizer_states") or ()))}
    if "optimizer_states" not in given:
        return made, left_out
    made.setdefault("lr_schedulers", [])
    if given.get("scaler"):
        made["MixedPrecision"] = given["scaler"]
    made["callbacks"] = {key: _callback_back(key, state) for key, state in (given.get("callbacks") or {}).items()}
    if given.get("random_state"):
        left_out.append("The random state, and where the loaders stand: a Lightning training goes on with other ones.")
    if progress.batch and not progress.epoch_ended:
        left_out.append(
            f"The order of the data of epoch {progress.epoch}, of which {progress.batch} batches are done: if the loader "
            "shuffles, the rest is another one; and the metrics of its first part."
        )
    if any(window for window in given.get("optimizer_windows") or ()):
        left_out.append("The gradients of a window of accumulated batches that was begun.")
    if given.get("current_model_state"):
        left_out.append("The raw weights beside their averages: state_dict has the averages.")
    return made, left_out


def _fit_loop(progress: Progress, steps: int, manual: bool, optimizers: int) -> dict[str, Any]:
    """The counters as Lightning has them: when a callback saves at an epoch's end, at a batch's end, or between two epochs."""

    def counts(ready: int, processed: int, completed: int) -> dict[str, int]:
        return {"ready": ready, "started": ready, "processed": processed, "completed": completed}

    epoch, batch, total = progress.epoch, progress.batch, progress.total_batches
    within = bool(batch)
    if progress.epoch_ended:
        epochs, batches, unfinished = counts(epoch + 1, epoch + 1, epoch), counts(batch, batch, batch), 0
    elif within:
        epochs, batches, unfinished = counts(epoch + 1, epoch, epoch), counts(batch, batch, batch - 1), 1
    else:
        epochs, batches, unfinished = counts(epoch, epoch, epoch), counts(batch, batch, batch), 0
    moves = {"ready": steps, "completed": steps}
    automatic, by_hand = (0, steps * max(optimizers, 1)) if manual else (steps, 0)
    return {
        "state_dict": {},
        "epoch_loop.state_dict": {"_batches_that_stepped": max(0, steps - unfinished)},
        "epoch_loop.batch_progress": {
            "total": counts(total, total, total - unfinished),
            "current": batches,
            "is_last_batch": progress.epoch_ended or not within,
        },
        "epoch_loop.scheduler_progress": {"total": moves, "current": {"ready": 0, "completed": 0}},
        "epoch_loop.automatic_optimization.state_dict": {},
        "epoch_loop.automatic_optimization.optim_progress": {
            "optimizer": {
                "step": _tracked(automatic, ("ready", "completed")),
                "zero_grad": _tracked(automatic, ("ready", "completed", "started")),
            }
        },
        "epoch_loop.manual_optimization.state_dict": {},
        "epoch_loop.manual_optimization.optim_step_progress": _tracked(by_hand, ("ready", "completed")),
        "epoch_loop.val_loop.state_dict": {},
        "epoch_progress": {"total": epochs, "current": epochs},
    }


def _tracked(total: int, names: tuple[str, ...]) -> dict[str, dict[str, int]]:
    return {"total": dict.fromkeys(names, total), "current": dict.fromkeys(names, 0)}


def _callback_back(key: str, state: Any) -> Any:
    if isinstance(state, dict) and {"history", "last_model_path"} <= state.keys():
        return _model_checkpoint_back(key, state)
    if isinstance(state, dict) and {"wait_count", "best_score"} <= state.keys():
        kept = {name: state[name] for name in ("wait_count", "stopped_epoch", "best_score")}
        return {**kept, "patience": (state.get("limits") or {}).get("patience", 3)}
    return state


def _model_checkpoint_back(key: str, state: Mapping[str, Any]) -> dict[str, Any]:
    known = [tuple(each) for each in (state.get("inherited"), *state["history"]) if each is not None]
    highest = "'mode': 'max'" in key or state["monitor"] is None
    ordered = sorted(known, key=lambda saved: saved[0], reverse=highest)
    monitored = state["monitor"] is not None
    scores = {path: torch.tensor(score) for score, path in state["history"]} if monitored else {}
    best = ordered[0] if ordered else (None, "")
    worst = ordered[-1][1] if monitored and ordered else ""
    current = state.get("current_score")
    return {
        "monitor": state["monitor"],
        "best_model_score": torch.tensor(best[0]) if monitored and best[0] is not None else None,
        "best_model_path": best[1],
        "current_score": None if current is None else torch.tensor(current),
        "dirpath": state["dirpath"],
        "best_k_models": scores,
        "kth_best_model_path": worst,
        "kth_value": scores.get(worst),
        "last_model_path": state["last_model_path"],
    }
