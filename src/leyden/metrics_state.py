"""What a checkpoint keeps of metrics: the logged values, and the metric objects inside of the module.

Metric objects are those of torchmetrics, which is never imported here: what has ``metric_state`` and ``update_count`` is
one. They are no part of ``module.state_dict()`` unless made ``persistent``, so a checkpoint in the middle of an epoch
would lose what they have seen of it. One that is persistent is in both, with the same values.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from leyden.errors import warn
from leyden.metrics import Metrics

_NOT_STATE = frozenset(vars(nn.Module())) | {
    "_TORCH_GREATER_EQUAL_2_1", "_cache", "_computed", "_device", "_dtype", "_dtype_convert", "_enable_grad", "_is_synced",
    "_should_unsync", "_to_sync", "_update_count",
}  # fmt: skip
"""Attributes that torch and torchmetrics keep for themselves: settings, and what holds within one call only."""


def capture_metrics(metrics: Metrics, module: nn.Module, device: torch.device) -> dict[str, Any]:
    """Return the state of everything logged, and of the metric objects in the module, as tensors and plain data.

    Args:
        metrics: what `self.log` feeds.
        module: where metric objects are looked for.
        device: that of the run.
    """
    return {"logged": metrics.state_dict(module, device), "objects": capture_metric_objects(module)}


def restore_metrics(metrics: Metrics, module: nn.Module, state: Mapping[str, Any], device: torch.device) -> None:
    """Take back what `capture_metrics` returned; the state is copied from, and may be taken up again.

    Args:
        metrics: what `self.log` feeds; what was logged so far is forgotten.
        module: on its device.
        state: of a module with the same metric objects; for one that is missing there is a warning
            (``metric-not-restored``).
        device: that of the run.
    """
    restore_metric_objects(module, state["objects"])  # first: trackers make their objects, which series look for
    metrics.load_state_dict(state["logged"], module, device)


def capture_metric_objects(module: nn.Module) -> dict[str, Any]:
    """Return the state of every metric object that is a submodule, by its dotted name.

    Of each: its states, the count of its updates, and what it keeps beside them, such as the extremes of a
    ``MinMaxMetric``. Collections keep their compute groups, trackers the number of their steps. A metric object that is
    not a submodule, because it is held in a list or a dict of Python, is not found.

    Args:
        module: searched through, metrics inside of metrics included.
    """
    objects, collections, trackers = {}, {}, {}
    lists: dict[int, Any] = {}  # by id: metrics of one compute group share theirs, which should be in the file once
    part: Any
    for name, part in module.named_modules():
        if _is_metric(part):
            objects[name] = _capture(part, lists)
        elif _has_groups(part):
            groups = {str(group): list(names) for group, names in part._groups.items()}
            collections[name] = {"groups": groups, "checked": part._groups_checked, "copied": part._state_is_copy}
        elif _is_tracker(part):
            trackers[name] = {"steps": part.n_steps, "called": bool(part._increment_called)}
    return {"objects": objects, "collections": collections, "trackers": trackers}


def restore_metric_objects(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Take back what `capture_metric_objects` returned, so that updates go on as if nothing had happened.

    Args:
        module: with the same metric objects, on its device. One that the state does not know is left as it is.
        state: is copied from.
    """
    parts = dict(module.named_modules())
    for name, tracker in state["trackers"].items():
        if name in parts and _is_tracker(parts[name]):
            known = sum(other.startswith(f"{name}.") for other in state["objects"])
            _restore_tracker(parts[name], tracker, known)
    parts = dict(module.named_modules())  # trackers have made objects
    lost = []
    for name, own in state["objects"].items():
        part = parts.get(name)
        metric: Any = part
        if part is None or not _is_metric(part) or set(own["states"]) != set(metric.metric_state):
            lost.append(name)
        else:
            _restore(metric, own)
    for name, collection in state["collections"].items():
        if name in parts and _has_groups(parts[name]):
            _restore_groups(parts[name], collection)
    if lost:
        warn(
            "metric-not-restored",
            f"The checkpoint has the state of metric objects that the module does not have, or has with other states: "
            f"{', '.join(lost)}. They begin anew. Make them in __init__, with all arguments that their states depend on.",
        )


def _is_metric(part: nn.Module) -> bool:
    return hasattr(type(part), "metric_state") and hasattr(type(part), "update_count")


def _has_groups(part: nn.Module) -> bool:
    """Whether it is a collection, whose metrics of one group share their states."""
    return all(hasattr(part, name) for name in ("_groups", "_groups_checked", "_state_is_copy"))


def _is_tracker(part: nn.Module) -> bool:
    """Whether it makes a new metric object at each ``increment()``."""
    return all(hasattr(part, name) for name in ("increment", "n_steps", "_increment_called"))


def _beside(metric: Any) -> dict[str, Any]:
    """What a metric object keeps beside its declared states.

    That is every tensor and dtype, and numbers in attributes that begin with an underscore: others are settings, which
    a run that goes on may have been given anew.
    """
    known = _NOT_STATE.union(metric.metric_state)
    return {
        name: value
        for name, value in vars(metric).items()
        if name not in known
        and (
            isinstance(value, Tensor | torch.dtype)
            or (name.startswith("_") and isinstance(value, int | float))
            or (name == "_forward_cache" and value is not None)  # what is logged with on_step=True
        )
    }


def _capture(metric: Any, lists: dict[int, Any]) -> dict[str, Any]:
    states = metric.metric_state
    for value in states.values():
        if isinstance(value, list) and id(value) not in lists:
            lists[id(value)] = _packed(value)
    return {
        "states": {name: lists.get(id(value), value) for name, value in states.items()},
        "updates": metric.update_count,
        "beside": _beside(metric),
    }


def _restore(metric: Any, own: Mapping[str, Any]) -> None:
    device = metric.device
    for name, stored in own["states"].items():
        value = _unpacked(stored)
        stays = isinstance(value, list) and getattr(metric, "compute_on_cpu", False)
        setattr(metric, name, _placed(value, torch.device("cpu") if stays else device))
    metric._forward_cache = metric._computed = None  # a value that compute() keeps is computed again
    for name, value in own["beside"].items():
        if name in vars(metric) or not hasattr(type(metric), name):  # never in the way of a method
            setattr(metric, name, _placed(value, device))
    metric._update_count = own["updates"]


def _restore_tracker(tracker: Any, state: Mapping[str, Any], known: int) -> None:
    steps = min(state["steps"], known)
    while tracker.n_steps < steps:
        tracker.increment()
    while tracker.n_steps > steps:
        tracker._modules.popitem()
    tracker._increment_called = state["called"]


def _restore_groups(collection: Any, state: Mapping[str, Any]) -> None:
    groups = {int(group): list(names) for group, names in state["groups"].items()}
    if {name for names in groups.values() for name in names} - set(collection._modules):
        return  # it has other metrics now, and forms its groups anew
    collection._groups, collection._groups_checked = groups, state["checked"]
    collection._state_is_copy = state["copied"]
    if state["checked"] and not state["copied"]:
        collection._compute_groups_create_state_ref()


def _packed(value: list[Any]) -> Any:
    """A list of tensors as one: a file with an entry for each batch of an epoch would be mostly header."""
    if not all(isinstance(item, Tensor) for item in value) or len({(item.dtype, item.device) for item in value}) != 1:
        return list(value)
    shapes = [[len(list(run)), list(shape)] for shape, run in itertools.groupby(item.shape for item in value)]
    return {"flat": torch.cat([item.detach().reshape(-1) for item in value]), "shapes": shapes}


def _unpacked(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    shapes = [shape for count, shape in value["shapes"] for _ in range(count)]
    parts = value["flat"].split([torch.Size(shape).numel() for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _placed(value: Any, device: torch.device) -> Any:
    """A copy with all tensors on the device."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, list | tuple):
        return type(value)(_placed(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _placed(item, device) for key, item in value.items()}
    return value
