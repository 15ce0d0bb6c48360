"""What a checkpoint keeps of metrics: the logged values, and the metric objects inside of the module.

Metric objects are those of torchmetrics, which is never imported here: what has ``metric_state`` and ``update_count`` is
one. They are no part of ``module.state_dict()`` unless made ``persistent``, so a checkpoint in the middle of an epoch
would lose what they have seen of it. One that is persistent is in both, with the same values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leyden.errors import MetricError, warn
from leyden.series import interleaved, wide

if TYPE_CHECKING:
    from leyden.metrics import Metrics

_REDUCTIONS = {f"dim_zero_{name}": name for name in ("sum", "mean", "max", "min", "cat")}
"""Torchmetrics' own functions that put the states of ranks together, by their names."""
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


def merged(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make one state of those of several ranks: with it one process goes on where all of them were.

    Sums are added, and values that are not summed yet take turns: value i of each rank, then value i + 1. The states of metric
    objects are put together as each says (``dist_reduce_fx``). What was published is the first rank's.

    Args:
        states: from `capture_metrics`, in rank order; they are not changed.

    Raises:
        MetricError: if one key was logged with different reductions.
    """
    return {
        "logged": _merged_logged([state["logged"] for state in states]),
        "objects": _merged_objects([state["objects"] for state in states]),
    }


def emptied(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same without anything that was logged in the epoch so far: for the ranks beside the one that takes `merged`.

    Metric objects begin anew. What was published stays.
    """
    objects = {name: {**own, "updates": 0, "empty": True} for name, own in state["objects"]["objects"].items()}
    return {"logged": {**state["logged"], "series": []}, "objects": {**state["objects"], "objects": objects}}


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
        if is_metric(part):
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
        if part is None or not is_metric(part) or set(own["states"]) != set(metric.metric_state):
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


def _merged_logged(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ranks = [{series["name"]: series for series in state["series"]} for state in states]
    groups = list(states[0]["tensors"])
    series = []
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        there = [(state["tensors"], rank[name]) for state, rank in zip(states, ranks, strict=True) if name in rank]
        if any(one.get("rank_zero_only") for _, one in there):
            there = there[:1] if name in ranks[0] else []
        if there:
            series.append(_merged_series(there, groups))
    return {**states[0], "series": series, "tensors": groups}


def _merged_series(
    ranks: Sequence[tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]], groups: list[Mapping[str, Any]]
) -> dict[str, Any]:
    """One series of those of several ranks, each given with the tensors that it refers to; new ones are added to ``groups``."""
    first = ranks[0][1]
    for _, other in ranks:
        if other["reduction"] != first["reduction"]:
            raise MetricError(
                f"The ranks logged {first['name']!r} with reduce_fx={first['reduction']!r} and {other['reduction']!r}, which "
                "cannot be made one value. Use one reduction, or two names."
            )

    def tensors(held: Sequence[Mapping[str, Any]], runs: Any) -> list[tuple[str, Tensor]]:
        return [(held[g]["device"], value) for g, start, n in runs for value in held[g]["values"][start : start + n]]

    def add(values: Sequence[tuple[str, Tensor]]) -> list[list[int]]:
        runs = []
        for (device, _), run in itertools.groupby(values, key=lambda each: (each[0], each[1].dtype)):
            stacked = torch.stack([value for _, value in run])
            runs.append([len(groups), 0, len(stacked)])
            groups.append({"device": device, "values": stacked})
        return runs

    def add_one(held: Sequence[Mapping[str, Any]], place: Any) -> Any:
        return add(tensors(held, [place]))[0] if isinstance(place, list) else place

    totals = [tensors(held, [place])[0] if isinstance(place, list) else (None, place) for held, one in ranks
              if (place := one["total"]) is not None]  # fmt: skip
    total = _merged_totals(first["reduction"], [value for _, value in totals])
    if isinstance(total, Tensor):
        total = add([(next(device for device, _ in totals if device is not None), total)])[0]
    return {
        **first,
        "latest": add_one(ranks[0][0], first["latest"]),
        "fresh": any(one["fresh"] for _, one in ranks),
        "pending": add(interleaved([tensors(held, one["pending"]) for held, one in ranks])),
        "weights": interleaved([one["weights"] for _, one in ranks]),
        "total": total,
        "weight": sum(one["weight"] for _, one in ranks),
    }


def _merged_totals(reduction: str | None, values: Sequence[Any]) -> Any:
    if not values or reduction is None:
        return values[0] if values else None
    if not any(isinstance(value, Tensor) for value in values):
        return {"min": min, "max": max}.get(reduction, sum)(values)
    device = next(value.device for value in values if isinstance(value, Tensor))
    stacked = torch.stack([torch.as_tensor(value, dtype=wide(device), device=device) for value in values])
    reduce: Callable[[Tensor], Tensor] = {"min": torch.amin, "max": torch.amax}.get(reduction, torch.sum)
    return reduce(stacked)


def _merged_objects(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    objects: dict[str, Any] = {}
    lists: dict[tuple[int, ...], Any] = {}  # as in `capture_metric_objects`: those that are shared stay so
    lost = []
    for name, first in states[0]["objects"].items():
        ranks = [state["objects"][name] for state in states if name in state["objects"]]
        values = merged_object(ranks)
        if any(value is None for value in values.values()):
            lost.append(name)
            objects[name] = {**first, "updates": 0, "empty": True}
            continue
        for key, value in values.items():
            if isinstance(value, list):
                values[key] = lists.setdefault(tuple(id(own["states"][key]) for own in ranks), packed(value))
        objects[name] = {**first, "states": values, "updates": sum(own["updates"] for own in ranks)}
    if lost:
        warn(
            "metric-not-restored",
            f"The states of these metric objects on several ranks cannot be made one, so they begin anew: {', '.join(lost)}. "
            "States with dist_reduce_fx 'sum', 'mean', 'min', 'max' or 'cat' can.",
        )
    return {**states[0], "objects": objects}


def merged_object(
    ranks: Sequence[Mapping[str, Any]], functions: Mapping[str, Callable[[Tensor], Tensor] | None] | None = None
) -> dict[str, Any]:
    """The states of one metric object over ranks; those of ranks that did not update it are passed by.

    Args:
        ranks: from `capture_metric_objects`, in rank order.
        functions: what puts together the stacked tensors of a state, where it is not one of torchmetrics' own functions;
            None leaves them stacked, which is what ``compute()`` is given. Without it such a state becomes None, since
            updates could not go on from it.
    """
    counted = [own for own in ranks if own["updates"]] or list(ranks[:1])
    states = [{name: unpacked(value) for name, value in own["states"].items()} for own in counted]
    if len(states) == 1:
        return states[0]
    listed = {name for name in states[0] if any(isinstance(state[name], list) for state in states)}
    # one entry for each update: then they are taken in turns, as one process would have made them
    in_turns = all(len({len(state[name]) for name in listed}) == 1 for state in states)
    merged: dict[str, Any] = {}
    for name in states[0]:
        values = [state[name] for state in states]
        if name in listed:
            merged[name] = interleaved(values) if in_turns else list(itertools.chain(*values))
            continue
        reduction = counted[0].get("reductions", {}).get(name)
        value = _merged_tensors(reduction, values, [own["updates"] for own in counted])
        if value is None and functions is not None:
            function, stacked = functions[name], torch.stack(values)
            value = stacked if function is None else function(stacked)
        elif value is None and all(torch.equal(values[0], other) for other in values):
            value = values[0]
        merged[name] = value
    return merged


def _merged_tensors(reduction: str | None, values: Sequence[Tensor], updates: Sequence[int]) -> Tensor | None:
    if reduction == "cat":
        return torch.cat(list(values)) if values[0].ndim else torch.stack(list(values))
    if reduction not in ("sum", "mean", "max", "min"):
        return None
    stacked = torch.stack(list(values))
    if reduction == "mean":  # of all updates, so that ranks with fewer of them weigh less
        weights = torch.tensor(updates, device=stacked.device).reshape(-1, *[1] * values[0].ndim)
        return (stacked * weights).sum(0) / sum(updates)
    if reduction == "sum":
        return stacked.sum(0)
    return stacked.amax(0) if reduction == "max" else stacked.amin(0)


def is_metric(part: Any) -> bool:
    """Whether it is a metric object of torchmetrics."""
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
            lists[id(value)] = packed(value)
    return {
        "states": {name: lists.get(id(value), value) for name, value in states.items()},
        "updates": metric.update_count,
        "beside": _beside(metric),
        "reductions": {name: _reduction_name(function) for name, function in metric._reductions.items()},
    }


def _reduction_name(function: Any) -> str:
    return "none" if function is None else _REDUCTIONS.get(getattr(function, "__name__", ""), "a function")


def _restore(metric: Any, own: Mapping[str, Any]) -> None:
    device = metric.device
    if own.get("empty"):
        metric.reset()
    else:
        for name, stored in own["states"].items():
            set_state(metric, name, unpacked(stored))
    metric._forward_cache = metric._computed = None  # a value that compute() keeps is computed again
    for name, value in own["beside"].items():
        if name in vars(metric) or not hasattr(type(metric), name):  # never in the way of a method
            setattr(metric, name, _placed(value, device))
    metric._update_count = own["updates"]


def set_state(metric: Any, name: str, value: Any) -> None:
    """Let the metric object have a copy of the value, where it keeps values of this kind."""
    stays = isinstance(value, list) and getattr(metric, "compute_on_cpu", False)
    setattr(metric, name, _placed(value, torch.device("cpu") if stays else metric.device))


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


def packed(value: list[Any]) -> Any:
    """A list of tensors as one: a file with an entry for each batch of an epoch would be mostly header."""
    if not all(isinstance(item, Tensor) for item in value) or len({(item.dtype, item.device) for item in value}) != 1:
        return list(value)
    shapes = [[len(list(run)), list(shape)] for shape, run in itertools.groupby(item.shape for item in value)]
    return {"flat": torch.cat([item.detach().reshape(-1) for item in value]), "shapes": shapes}


def unpacked(value: Any) -> Any:
    """A state as it was: what `packed` made of a list is a list again."""
    if not isinstance(value, Mapping):
        return value
    shapes = [shape for count, shape in value["shapes"] for _ in range(count)]
    parts = value["flat"].split([torch.Size(shape).numel() for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _placed(value: Any, device: torch.device) -> Any:
    """A copy with all tensors on the device."""
    return mapped(value, lambda tensor: tensor.detach().to(device, copy=True))


def mapped(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """A copy with every tensor converted."""
    if isinstance(value, Tensor):
        return convert(value)
    if isinstance(value, list | tuple):
        return type(value)(mapped(item, convert) for item in value)
    if isinstance(value, dict):
        return {key: mapped(item, convert) for key, item in value.items()}
    return value
