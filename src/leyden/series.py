"""The values of one key in one epoch: how they are summed, and how they go into a checkpoint and come back."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from leyden.errors import MetricError

Value = Tensor | float
Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
Reduction = str | Callable[[Tensor], Tensor]

NAMED_REDUCTIONS: dict[Any, str] = {
    "mean": "mean", "avg": "mean", torch.mean: "mean", "sum": "sum", torch.sum: "sum",
    "min": "min", torch.min: "min", torch.amin: "min", "max": "max", torch.max: "max", torch.amax: "max",
}  # fmt: skip
_STAMPS = itertools.count(1)
_COMPACT_AT = 64
"""Tensors held before they are summed: few small kernels instead of two per step, and bounded memory."""


class _Function:
    """Stands in a restored series for the function that a checkpoint cannot hold, until the next log call gives it."""

    def __repr__(self) -> str:
        return "a function"


_LOST: Any = _Function()


@runtime_checkable
class MetricObject(Protocol):
    """What is asked of a metric object; `torchmetrics.Metric` has it."""

    def compute(self) -> Any:
        """Return the value over all updates since the last reset."""

    def reset(self) -> None:
        """Forget all updates."""


class Series:
    """All values of one key in one epoch: the latest, and what the epoch's value is reduced from."""

    def __init__(self, name: str, flags: tuple[Any, ...], dataloader_idx: int | None) -> None:
        self.name = name
        self.flags = flags
        self.on_step, self.on_epoch, self.prog_bar, self.logger, reduce_fx = flags
        self.reduction = NAMED_REDUCTIONS.get(reduce_fx, reduce_fx)
        self.dataloader_idx = dataloader_idx
        self.metric: MetricObject | None = None
        self.waits_for_metric = False  # restored, and the module does not have the object under a name
        self.latest: Value | None = None
        self.fresh = False  # logged since the last flush
        self.history: list[
            tuple[int, int, Value, float]
        ] = []  # (loader, batch, value, weight): evaluation's step values
        self.rank_zero_only = False
        self.latest_weight = 1.0  # this and the next are kept up to date where there are several ranks
        self.latest_at = (0, 0)  # loader, batch
        self.stamp = 0  # another number after each value
        self._epoch_value: Value | None = None
        self._updates: int | None = None
        self._pending: list[Tensor] = []
        self._weights: list[float] = []
        self._total: Value | None = None
        self._weight = 0.0

    def add(self, value: Value, weight: float) -> None:
        """Take one value; ``weight`` matters for means only."""
        self.latest = value
        self.fresh = True
        self.stamp = next(_STAMPS)
        self._epoch_value = None
        if not self.on_epoch or self.metric is not None:
            return
        if isinstance(value, Tensor):
            self._pending.append(value)
            self._weights.append(weight)
            if len(self._pending) >= _COMPACT_AT and not callable(self.reduction):
                self._compact()
        elif callable(self.reduction):
            self._pending.append(torch.tensor(float(value)))
        else:
            self._merge(value * weight if self.reduction == "mean" else value, weight)

    def epoch_value(self) -> Value | None:
        """Reduce everything that was added since the epoch began; None if nothing was."""
        if self.metric is not None:
            if self._epoch_value is None:
                self._epoch_value = one_number(self.name, "the metric's compute()", self.metric.compute())
            return self._epoch_value
        if self.reduction is _LOST:
            return None
        if callable(self.reduction):
            if not self._pending:
                return None
            device = self._pending[-1].device  # after a resume on another kind of device the earlier ones are elsewhere
            values = [(value if value.is_floating_point() else value.float()).to(device) for value in self._pending]
            return one_number(self.name, "reduce_fx", self.reduction(torch.stack(values)))
        self._compact()
        if self._total is None or (self.reduction == "mean" and self._weight == 0):
            return None  # nothing was logged, or of empty batches only
        value = self._total / self._weight if self.reduction == "mean" else self._total
        return value.to(torch.get_default_dtype()) if isinstance(value, Tensor) else value

    def held(self) -> tuple[Value | None, float, list[Tensor]]:
        """What the epoch's value is reduced from: the total, its weight, and for a function all values instead."""
        if self.metric is not None or not self.on_epoch:
            return None, 0.0, []
        if isinstance(self.reduction, str):
            self._compact()
        return self._total, self._weight, self._pending

    def compact(self, at: int) -> bool:
        """Sum the values that are held, if there are ``at`` or more; whether there were."""
        if len(self._pending) < at or callable(self.reduction):
            return False
        self._compact()
        return True

    def forget_computed(self) -> None:
        """Ask a metric object again, unless its count of updates says that no hook has updated it without logging it."""
        updates = getattr(self.metric, "update_count", None)
        if updates is None or updates != self._updates:
            self._epoch_value, self._updates = None, updates

    # A checkpoint: captured between two steps, and taken up so that every later sum is the same to the last bit

    @property
    def lost(self) -> bool:
        """Whether it still lacks what a checkpoint cannot hold: its ``reduce_fx`` or its metric object."""
        return self.waits_for_metric or (self.reduction is _LOST and self.metric is None)

    def state_dict(self, pack: Pack, object_names: Mapping[int, str]) -> dict[str, Any]:
        """Return everything as plain data, the numbers as places in ``pack``.

        Args:
            pack: takes the tensors.
            object_names: the dotted names of the module's parts, by their id.
        """
        named = isinstance(self.reduction, str)
        return {
            "name": self.name,
            "on_step": bool(self.on_step),
            "on_epoch": bool(self.on_epoch),
            "prog_bar": bool(self.prog_bar),
            "logger": bool(self.logger),
            "reduction": self.reduction if named else None,
            "dataloader_idx": self.dataloader_idx,
            # an empty name: the next log call must bring the object
            "metric": object_names.get(id(self.metric), "")
            if self.metric is not None or self.waits_for_metric
            else None,
            "latest": pack.add(self.latest),
            "fresh": self.fresh,
            "pending": pack.add_all(self._pending),
            "weights": list(self._weights) if self.reduction == "mean" else [],
            "total": pack.add(self._total),
            "weight": self._weight,
            "rank_zero_only": self.rank_zero_only,
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], unpacked: Unpacked, module: nn.Module | None) -> Series:
        """Make a series from `state_dict`; what it lacks comes with the next log call, see `take_up`."""
        reduction = _LOST if state["reduction"] is None else state["reduction"]
        flags = (state["on_step"], state["on_epoch"], state["prog_bar"], state["logger"], reduction)
        series = cls(state["name"], flags, state["dataloader_idx"])
        series.latest, series.fresh = unpacked.value(state["latest"]), state["fresh"]
        series._pending = unpacked.values(state["pending"])
        series._weights = list(state["weights"]) or [1.0] * len(series._pending)  # others than means do not read them
        series._total, series._weight = unpacked.value(state["total"]), state["weight"]
        series.rank_zero_only = state.get("rank_zero_only", False)
        series.stamp = next(_STAMPS)
        if state["metric"] is not None:
            found = submodule(module, state["metric"])
            series.metric = found if isinstance(found, MetricObject) else None
            series.waits_for_metric = series.metric is None
        if series.lost:
            series.flags = (*flags[:4], _LOST)  # equal to none: the next log call is looked at
        if unpacked.device_changed and isinstance(reduction, str):
            series._compact()  # a sum can be added to one on another device, while tensors to stack must be on one
            if isinstance(series._total, Tensor):
                series._total = series._total.to(wide(unpacked.device))
        return series

    def take_up(self, reduce_fx: Reduction, value: Any) -> None:
        """Take from a log call what a checkpoint could not hold."""
        if self.waits_for_metric:
            self.waits_for_metric = False
            if isinstance(value, MetricObject) and not isinstance(value, Tensor):
                self.metric = value
        if self.reduction is _LOST and (self.metric is not None or reduce_fx not in NAMED_REDUCTIONS):
            self.reduction = NAMED_REDUCTIONS.get(reduce_fx, reduce_fx)
        self.flags = (*self.flags[:4], self.reduction)

    def contents(self) -> dict[str, Any]:
        """All that is held now, in lists of its own."""
        return {name: list(value) if isinstance(value, list) else value for name, value in vars(self).items()}

    def _compact(self) -> None:
        if not self._pending:
            return
        dtype = wide(self._pending[0].device)
        if self.reduction == "mean":
            groups: dict[float, list[Tensor]] = {}  # by weight: no copy of weights to the device is needed
            for value, weight in zip(self._pending, self._weights, strict=True):
                groups.setdefault(weight, []).append(value)
            for weight, values in groups.items():
                self._merge(_stacked(values, dtype).sum() * weight, weight * len(values))
        else:
            reduce: Callable[[Tensor], Tensor] = getattr(torch, str(self.reduction))
            self._merge(reduce(_stacked(self._pending, dtype)), 0.0)
        self._pending.clear()
        self._weights.clear()

    def _merge(self, part: Value, weight: float) -> None:
        self._weight += weight
        if self._total is None:
            self._total = part
        elif self.reduction in ("mean", "sum"):
            self._total = self._total + part
        elif isinstance(self._total, Tensor) or isinstance(part, Tensor):
            pick = torch.minimum if self.reduction == "min" else torch.maximum
            self._total = pick(torch.as_tensor(self._total), torch.as_tensor(part))
        else:
            self._total = min(self._total, part) if self.reduction == "min" else max(self._total, part)


def to_floats(values: Mapping[Key, Value]) -> dict[Key, float]:
    """Bring values to the host: one copy for each device that holds some."""
    floats = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    by_device: dict[torch.device, list[Key]] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, []).append(name)
    for device, names in by_device.items():
        stacked = torch.stack([values[name].to(wide(device)) for name in names])  # type: ignore[union-attr]
        floats.update(zip(names, stacked.tolist(), strict=True))  # tolist() waits for the device, once
    return {name: float(floats[name]) for name in values}


def one_number(name: str, source: str, value: Any) -> Value:
    """The value as a detached 0-d tensor, or as the Python number that it is.

    Raises:
        MetricError: if it is not one number; ``source`` says where it came from.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().reshape(())
    if isinstance(value, (int, float)):
        return value
    given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise MetricError(
        f"self.log({name!r}, …): {source} returned {given}; a logged value is one number. Log its parts under their own "
        "names, e.g. with self.log_dict."
    )


def _stacked(values: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    if all(value.dtype is values[0].dtype for value in values):
        return torch.stack(list(values)).to(dtype)
    return torch.stack([value.to(dtype) for value in values])  # stacking half beside int64 would round to half


def same(first: Any, second: Any) -> bool:
    """Whether two values of an argument of `log` mean the same."""
    # A lambda written in the call is a new object at each step, of the same code.
    first, second = NAMED_REDUCTIONS.get(first, first), NAMED_REDUCTIONS.get(second, second)
    return first == second or getattr(first, "__code__", first) is getattr(second, "__code__", second)


def calling_function() -> str:
    """The name of the function outside of leyden that called."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("leyden."):
        frame = frame.f_back
    return frame.f_code.co_name


def fork(series: Any, ending: str) -> str:
    """The key under which a series' step or epoch value is shown: with an ending only if there are both."""
    if not (series.on_step and series.on_epoch):
        return str(series.name)
    name, slash, loader = str(series.name).partition("/dataloader_idx_")
    return f"{name}_{ending}{slash}{loader}"


def interleaved(lists: Sequence[Sequence[Item]]) -> list[Item]:
    """The first item of each list, then the second of each; a list that is over is passed by."""
    longest = max(map(len, lists), default=0)
    return [items[i] for i in range(longest) for items in lists if i < len(items)]


def wide(device: torch.device) -> torch.dtype:
    """The dtype that sums are kept in."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def submodule(module: nn.Module | None, name: str) -> nn.Module | None:
    """The part of that dotted name; None without a name, or if there is none."""
    if module is None or not name:
        return None
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


class Pack:
    """Values on their way into a checkpoint: one tensor for each dtype and device, instead of one for each value."""

    def __init__(self) -> None:
        self._groups: dict[tuple[torch.dtype, torch.device], tuple[int, list[Tensor]]] = {}

    def add(self, value: Value | None) -> Any:
        """Take a value; return it as it is if it is a Python number, else its place."""
        if isinstance(value, Tensor):
            return self.add_all([value])[0]
        # numbers of numpy are subclasses of float
        return float(value) if isinstance(value, float) else value

    def add_all(self, values: Iterable[Tensor]) -> list[list[int]]:
        """Take tensors in order; return their places as runs: group, first position, count."""
        runs: list[list[int]] = []
        for value in values:
            group, held = self._groups.setdefault((value.dtype, value.device), (len(self._groups), []))
            if runs and runs[-1][0] == group:
                runs[-1][2] += 1
            else:
                runs.append([group, len(held), 1])
            held.append(value)
        return runs

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the tensors, in the order of their groups; nothing waits for the device."""
        return [{"device": key[1].type, "values": torch.stack(held)} for key, (_, held) in self._groups.items()]


class Unpacked:
    """The values of a `Pack`, on the devices where they belong.

    What was on the run's device comes to the present run's; what was on the CPU stays there. If the kind of device is
    another one now, everything is on the CPU.

    Args:
        groups: from `Pack.state_dict`.
        before: the kind of device that the run was on, such as "cuda".
        device: that of the present run.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], before: str, device: torch.device) -> None:
        self.device = device
        self.device_changed = before != device.type
        self._groups = []
        for group in groups:
            target = device if group["device"] == before == device.type else torch.device("cpu")
            # a copy: the state may be taken up again, or belong to somebody
            self._groups.append(group["values"].detach().to(target, copy=True).unbind())

    def value(self, place: Any) -> Value | None:
        """The value at a place of `Pack.add`."""
        return self.values([place])[0] if isinstance(place, list) else place

    def values(self, runs: Iterable[Sequence[int]]) -> list[Tensor]:
        """The tensors at the places of `Pack.add_all`, in order."""
        return [tensor for group, start, count in runs for tensor in self._groups[group][start : start + count]]
