"""Checkpoints of Lightning, 0.7 to 2.x, as leyden's; and leyden's as one of Lightning 2.x.

Both are dicts with many keys of one name: ``state_dict``, ``optimizer_states``, ``lr_schedulers``, ``callbacks``,
``hyper_parameters``, and what `on_save_checkpoint` and the datamodule added. What differs:

- Lightning's place in the training is in ``loops``, since 1.6; leyden's is in ``progress``.
- Lightning counts every step of every optimizer, leyden one for each window of batches.
- The state of `ModelCheckpoint` and `EarlyStopping`, and the names of a few keys.
- Lightning's file has no random state, no order of the data and no metrics of an unfinished epoch.
"""

from __future__ import annotations

import operator
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import torch

from leyden.callbacks.checkpoint_name import folder_path
from leyden.compat.scan import said
from leyden.errors import CheckpointError
from leyden.progress import Progress

__all__ = [
    "VERSION_KEYS",
    "from_lightning",
    "is_lightning",
    "malformed",
    "progress_of",
    "to_lightning",
    "training_keys",
]

VERSION_KEY = "pytorch-lightning_version"
VERSION_KEYS = (VERSION_KEY, "pytorch-ligthning_version")  # misspelt before 0.8
_HPARAMS_KEYS = ("hyper_parameters", "hparams", "module_arguments")  # today's, before 0.8, in 0.7.6
_MARKS = (*VERSION_KEYS, "loops", "global_step", "hparams", "hparams_type", "optimizer_states")
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
    "added_keys", "compiled", "hparams_omitted", "hparams_type",
    "loader_states", "loggers", "metrics", "optimizer_windows", "other_ranks", "progress",
    "random_state", "run_id", "scaler", "should_stop", "left_out", "current_model_state",
})  # fmt: skip
"""Keys that a file of Lightning has only if a user added them, or a callback for averages."""
_MODEL_CHECKPOINT = frozenset({
    "monitor", "best_model_score", "best_model_path", "current_score", "dirpath", "best_k_models", "kth_best_model_path",
    "kth_value", "last_model_path",
})  # fmt: skip
_EARLY_STOPPING = frozenset({"wait_count", "stopped_epoch", "best_score", "patience"})
_LEYDENS_MODEL_CHECKPOINT = frozenset({
    "monitor", "dirpath", "requested", "history", "inherited", "last_model_path", "current_score", "step_saved", "displaced",
})  # fmt: skip
_LEYDENS_EARLY_STOPPING = frozenset({
    "wait_count", "stopped_epoch", "best_score", "limits", "stopping_reason", "stopping_reason_message", "source", "validated",
})  # fmt: skip
"""What the states of the two callbacks consist of; a subclass of a user may have more."""
_MOST = 10**15  # of any counter: a million steps a second make fewer in thirty years


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
        training that goes on from it will not find. Keys that the user added stay; those of them that leyden uses itself are
        named under ``added_keys``, so that only hooks look at them.

    Raises:
        CheckpointError: it has the keys of Lightning with something else under them.
    """
    rest = dict(given)
    left_out: list[str] = []
    if odd := [said(key) for key in rest["state_dict"] if not isinstance(key, str)]:
        raise malformed(f"state_dict has the key {odd[0]}, and names of weights are strings")
    progress = progress_of(rest)
    made: dict[str, Any] = {"epoch": progress.epoch, "global_step": progress.global_step}
    made["state_dict"] = rest.pop("state_dict")
    made |= _hyper_parameters(rest)
    if "optimizer_states" in rest:
        made["optimizer_states"] = _listed(rest, "optimizer_states")
        made["lr_schedulers"] = [_scheduler_state(state) for state in _listed(rest, "lr_schedulers")]
        made["scaler"] = _scaler_state(rest, left_out)
        made["progress"] = progress.state_dict()
        made["callbacks"] = _callback_states(rest, progress, left_out)
        if progress.batch and not progress.epoch_ended:
            left_out.append(
                f"It was saved in the middle of epoch {progress.epoch}, after {progress.batch} batches, and Lightning saves no "
                "order of the data: if the training loader shuffles, the rest of this epoch is another one, with some samples "
                "twice and others not at all."
            )
    for key in ("epoch", "global_step", "loops", "datamodule_hparams_name", "datamodule_hparams_type"):
        rest.pop(key, None)
    _set_apart(rest, made, left_out)
    return {**rest, **made}


def _set_apart(rest: dict[str, Any], made: dict[str, Any], left_out: list[str]) -> None:
    """Keep what the user added from steering the run: leyden's own keys are those that the conversion made."""
    added = _LEYDENS_OWN & rest.keys()
    lost = added & {*made, "added_keys", *(["left_out"] if left_out else [])}
    if "current_model_state" in added:  # hooks of callbacks take the weights from there
        if "averaging_state" not in rest:
            lost |= {"current_model_state"}
        added -= {"current_model_state"}
    if lost and "left_out" in added:
        lost |= {"left_out"}
    for key in sorted(lost):
        rest.pop(key)
        left_out.append(
            f"{key!r}, which is no key of Lightning: somebody added it, and leyden has that name for its own."
        )
    if added - lost:
        made["added_keys"] = sorted(added - lost)
    if left_out:
        made["left_out"] = left_out


def malformed(what: str) -> CheckpointError:
    """The error of a file that is Lightning's by its keys only."""
    return CheckpointError(f"it has keys of a checkpoint of Lightning, but not its structure: {what}")


def _listed(rest: dict[str, Any], key: str) -> Any:
    found = rest.pop(key, None)
    if not isinstance(found, (list, tuple, type(None))):
        raise malformed(f"{key} is {said(found)}, not a list")
    return found or []


def _count(value: Any, key: str) -> int:
    """A counter: a whole number from 0 on; None counts as 0."""
    try:
        number = 0 if value is None else operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        number = int(value) if isinstance(value, float) and value.is_integer() else -1
    if isinstance(value, bool) or not 0 <= number <= _MOST:
        raise malformed(f"{key} is {said(value)}, not a whole number from 0 to 10^15")
    return number


def _score(value: Any, key: str) -> float | None:
    if value is None or (isinstance(value, torch.Tensor) and value.numel() == 1):
        return None if value is None else float(value)
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise malformed(f"{key} is {said(value)}, not a number") from None


def _text(value: Any, key: str) -> str:
    """A path, or none."""
    if not isinstance(value, (str, PurePath, type(None))):
        raise malformed(f"{key} is {said(value)}, not a path")
    return str(value or "")


def progress_of(given: Mapping[str, Any]) -> Progress:
    """Where a checkpoint of Lightning stands in its training.

    Until 1.6 a file has the number of the next epoch, wherever in an epoch it was saved. Since then the loops' counters say
    it: callbacks save at an epoch's end before the epoch counts as completed, and within it before or after the batch does.
    """
    loops = given.get("loops")
    fit = loops.get("fit_loop", {}) if isinstance(loops, dict) else {}
    epochs, batches = fit.get("epoch_progress"), fit.get("epoch_loop.batch_progress")
    steps = _count(given.get("global_step"), "global_step")
    epoch = _count(given.get("epoch"), "epoch")
    if _version(given) < (1, 6) or epochs is None or batches is None:
        return Progress(epoch=epoch, global_step=steps, total_batches=steps)
    current = {key: _count(each, f"epoch_progress.current.{key}") for key, each in epochs["current"].items()}
    done = current["completed"]
    within = current["ready"] > done and current.get("started", current["ready"]) > done
    batch = _count(batches["current"]["processed"], "batch_progress.current.processed") if within else 0
    by_hand = next((fit[key]["total"]["completed"] for key in _MANUAL_STEPS if key in fit), 0)
    if _count(by_hand, "optim_step_progress") or len(given.get("optimizer_states") or ()) > 1:
        counted = _count(
            fit.get("epoch_loop.state_dict", {}).get("_batches_that_stepped", steps), "_batches_that_stepped"
        )
        # which goes up only after the validation and the callbacks of a batch, where files are saved
        steps = min(steps, counted + (1 if batch and current["processed"] == done else 0))
    return Progress(
        epoch=done,
        batch=batch,
        global_step=steps,
        total_batches=_count(batches["total"]["processed"], "batch_progress.total.processed"),
        epoch_ended=bool(within and batches.get("is_last_batch") is True),
    )


def _version(given: Mapping[str, Any]) -> tuple[int, int]:
    text = next((given[key] for key in VERSION_KEYS if key in given), "")
    found = re.match(r"(\d{1,9})\.(\d{1,9})", text) if isinstance(text, str) else None
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _hyper_parameters(rest: dict[str, Any]) -> dict[str, Any]:
    """Take the hyperparameters, their type, and the argument of `__init__` that held all of them as one."""
    key = next((key for key in _HPARAMS_KEYS if rest.get(key)), None)
    values = rest.get(key, {}) if key is not None else {}
    name = rest.pop("hparams_name", "hparams" if key == "hparams" else None)
    was_namespace = rest.pop("hparams_type", None) == "Namespace" or isinstance(values, Namespace)
    for each in _HPARAMS_KEYS:
        rest.pop(each, None)
    values = vars(values) if isinstance(values, Namespace) else values
    if not isinstance(values, Mapping) or not all(isinstance(each, str) for each in values):
        raise malformed(f"{key} is {said(values)}, not a dict with strings as names")
    values = dict(values)
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
    method = state.get("anneal_func") if isinstance(state, dict) else None
    if isinstance(method, str) and method.startswith("OneCycleLR."):
        return {key: each for key, each in state.items() if key != "anneal_func"}
    return state


def _scaler_state(rest: dict[str, Any], left_out: list[str]) -> Any:
    if rest.pop("amp_scaling_state", None):
        left_out.append("The state of Apex's loss scaling: leyden has no Apex, and its own scaling starts anew.")
    named = [key for key in rest if isinstance(key, str) and _SCALERS.fullmatch(key)]
    found = [key for key in named if isinstance(rest[key], dict) and "scale" in rest[key]]
    states = [rest.pop(key) for key in found]
    return states[0] if states else None


# Callbacks


def _callback_states(rest: dict[str, Any], progress: Progress, left_out: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    states = rest.pop("callbacks", None) or {}
    if not isinstance(states, dict) or not all(isinstance(key, str) for key in states):
        raise malformed(f"callbacks is {said(states)}, not a dict of their states by name")
    for key, state in states.items():
        # until 1.9 the key of a ModelCheckpoint had one argument more
        name = re.sub(r", 'save_on_train_epoch_end': (None|True|False)", "", key)
        if _is_model_checkpoint(name, state):
            found[name] = _model_checkpoint(state, progress.global_step)
        elif isinstance(state, dict) and {"wait_count", "best_score", "stopped_epoch"} <= state.keys():
            found[name] = _early_stopping(state)
        elif isinstance(state, dict) and state.keys() == {"latest_update_step"} and "averaging_state" in rest:
            left_out.append(f"The state of {name}: Lightning keeps the averages elsewhere, and leyden's start anew.")
        elif state:
            found[name] = state
    _callbacks_of_0_7(rest, found, progress, left_out)
    return found


def _is_model_checkpoint(name: str, state: Any) -> bool:
    if not isinstance(state, dict) or "best_model_path" not in state:
        return False
    # before 1.2 there were the path and its score alone
    return bool(state.keys() & {"dirpath", "best_k_models"}) or name == "ModelCheckpoint"


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


def _model_checkpoint(state: Mapping[str, Any], step: int) -> dict[str, Any]:
    scores = state.get("best_k_models") or {}
    if not isinstance(scores, dict):
        raise malformed(f"best_k_models is {said(scores)}, not a dict of scores by path")
    kept = {
        _text(path, "a path of best_k_models"): _score(score, "best_k_models") or 0.0 for path, score in scores.items()
    }
    best, monitor = _text(state["best_model_path"], "best_model_path"), state.get("monitor")
    score = _score(state.get("best_model_score"), "best_model_score")
    history = [[score, path] for path, score in kept.items()]
    inherited = None
    if best and not kept and monitor is None and score is None:
        history = [[float(step), best]]  # without a metric, leyden's score is the step
    elif best and best not in kept and score is not None:
        inherited = [score, best]
    folder = _text(state.get("dirpath"), "dirpath")
    return {
        **{key: each for key, each in state.items() if key not in _MODEL_CHECKPOINT},
        "monitor": monitor,
        "dirpath": folder_path(folder) if folder else "",
        "requested": None,
        "history": history,
        "inherited": inherited,
        "last_model_path": _text(state.get("last_model_path"), "last_model_path"),
        "current_score": _score(state.get("current_score"), "current_score"),
        "step_saved": None,
        "displaced": [],
    }


def _early_stopping(state: Mapping[str, Any]) -> dict[str, Any]:
    best = state["best_score"]
    return {
        **{key: each for key, each in state.items() if key not in _EARLY_STOPPING},
        "wait_count": _count(state["wait_count"], "wait_count"),
        "stopped_epoch": _count(state["stopped_epoch"], "stopped_epoch"),
        "best_score": best if isinstance(best, torch.Tensor) else torch.as_tensor(_score(best, "best_score") or 0.0),
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
    added = given["added_keys"] if isinstance(given.get("added_keys"), list) else []
    made = {key: each for key, each in given.items() if key not in _LEYDENS_OWN or key in added}
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
    made["callbacks"] = {
        key: _callback_back(key, state, left_out) for key, state in (given.get("callbacks") or {}).items()
    }
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


def _callback_back(key: str, state: Any, left_out: list[str]) -> Any:
    if isinstance(state, dict) and {"history", "inherited", "last_model_path"} <= state.keys():
        return _model_checkpoint_back(key, state, left_out)
    if isinstance(state, dict) and {"wait_count", "best_score", "stopped_epoch"} <= state.keys():
        kept = {name: each for name, each in state.items() if name not in _LEYDENS_EARLY_STOPPING}
        kept |= {name: state[name] for name in ("wait_count", "stopped_epoch", "best_score")}
        return {**kept, "patience": (state.get("limits") or {}).get("patience", 3)}
    return state


def _model_checkpoint_back(key: str, state: Mapping[str, Any], left_out: list[str]) -> dict[str, Any]:
    known = [tuple(each) for each in (state.get("inherited"), *state["history"]) if each is not None]
    highest = "'mode': 'max'" in key or state["monitor"] is None
    ordered = sorted(known, key=lambda saved: saved[0], reverse=highest)
    monitored = state["monitor"] is not None
    scores = {path: torch.tensor(score) for score, path in state["history"]} if monitored else {}
    best = ordered[0] if ordered else (None, "")
    worst = ordered[-1][1] if monitored and ordered else ""
    current = state.get("current_score")
    if not monitored and len(known) > 1:
        left_out.append(
            f"Which {len(known) - 1} checkpoints ModelCheckpoint keeps beside the newest: without monitor, Lightning notes one "
            "path, and the others are never deleted."
        )
    if state.get("displaced"):
        left_out.append(
            f"That {', '.join(map(str, state['displaced']))} is to be deleted: ModelCheckpoint had a newer one."
        )
    return {
        **{name: each for name, each in state.items() if name not in _LEYDENS_MODEL_CHECKPOINT},
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
