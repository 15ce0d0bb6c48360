"""Logged values over all ranks: what each rank sends of a key, and what every rank makes of what all have sent.

All ranks see the same parts in the same order and combine them by the same arithmetic, so what they publish is equal to the
last bit.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from leyden.errors import MetricError, warn
from leyden.metric_ranks import counted_updates, sent_states, with_states_of_all
from leyden.metrics_state import is_metric
from leyden.series import Series, Value, interleaved, one_number, submodule, wide

Gather = Callable[[Any], list[Any]]
"""Takes one object of each rank, gives every rank the list of all, in rank order."""

_FUNCTION, _OBJECT = "a function", "a metric object"


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank has of one key: plain data and tensors on the CPU.

    Attributes:
        kind: how the epoch is reduced: "mean", "sum", "min", "max", "a function" or "a metric object".
        latest: the latest value, with its weight and its place (loader, batch).
        total: of the epoch so far, with its weight.
        device: the kind of device where one process would have a tensor; None: it would have a number of Python.
        values: what a function gets, all of one ``dtype``.
        history: (loader, batch, value, weight) of an evaluation's step values.
        object_name: the metric object's dotted name in the module, or nothing.
        states: those of the metric objects in it, by their dotted names.
        synchronises: whether the object is known to be right when it computes from these states.
    """

    name: str
    dataloader_idx: int | None
    kind: str
    on_step: bool
    on_epoch: bool
    prog_bar: bool
    logger: bool
    rank_zero_only: bool
    latest: float | None
    latest_weight: float
    latest_at: tuple[int, int]
    latest_device: str | None
    total: float | None = None
    weight: float = 0.0
    device: str | None = None
    values: tuple[float, ...] = ()
    dtype: torch.dtype | None = None
    history: tuple[tuple[int, int, float, float], ...] = ()
    object_name: str = ""
    states: Mapping[str, Any] = field(default_factory=dict)
    synchronises: bool = True


@dataclass(slots=True)
class Combined:
    """One key over all ranks; what `Metrics` publishes of it is what it would publish of a `Series`."""

    name: str
    dataloader_idx: int | None
    on_step: bool
    on_epoch: bool
    prog_bar: bool
    logger: bool
    parts: Sequence[Part | None]
    latest: Value | None = None
    epoch: Value | None = None
    history: dict[tuple[int, int], float] = field(default_factory=dict)

    @property
    def counted(self) -> list[Part]:
        """The parts that count, by rank: with ``rank_zero_only`` the first rank's alone."""
        only_first = any(part is not None and part.rank_zero_only for part in self.parts)
        return [part for part in (self.parts[:1] if only_first else self.parts) if part is not None]

    @property
    def kind(self) -> str:
        """That of every part."""
        return next(part.kind for part in self.parts if part is not None)


class OverRanks:
    """The open series of all ranks.

    A key that nothing was added to since the last call is not sent again, nor reduced again if that holds on all ranks.

    Args:
        gather: a collective; it is called alike on every rank.
        module: where a rank looks for a metric object that only others have logged.

    Attributes:
        combined: by key, as of the last `reduce`.
    """

    def __init__(self, gather: Gather, module: nn.Module | None) -> None:
        self._gather, self._module = gather, module
        self._warned: set[str] = set()
        self._sent: dict[str, Any] = {}
        self._known: list[dict[str, Part]] = []
        self._borrowed: dict[str, Any] = {}
        self.combined: dict[str, Combined] = {}

    def reduce(self, series: Mapping[str, Series], again: bool) -> dict[str, Combined]:
        """Combine all that is open on some rank, in an order that is the same on all ranks.

        `gather` is called once; and once more if a function or a metric object has to be asked anew on some rank: their
        results are the first rank's, on all ranks.

        Args:
            series: this rank's.
            again: whether metric objects that do not count their updates are to be asked again.

        Raises:
            MetricError: on all ranks alike if one key was logged in different ways.
        """
        stamps = {key: self._stamp(key, one, again) for key, one in series.items()}
        changed = [one for key, one in series.items() if key not in self._sent or self._sent[key] != stamps[key]]
        parts = {part.name: part for part in parts_of(changed, self._module)}
        self._sent = stamps
        heard: list[dict[str, Part | None]] = self._gather({key: parts.get(key) for key in series})
        known = self._known or [{} for _ in heard]
        self._known = [
            {key: known[rank][key] if part is None else part for key, part in sent.items()}
            for rank, sent in enumerate(heard)
        ]
        before, self.combined = self.combined, {}
        asked = []
        for key, all_parts in by_key(self._known).items():
            old = before.get(key)
            if old is not None and all(map(operator.is_, old.parts, all_parts)):
                self.combined[key] = old
                continue
            one = self.combined[key] = combine(all_parts)
            if one.on_epoch and one.kind in (_FUNCTION, _OBJECT):
                asked.append(one)
        if asked:
            self._ask(asked, series)
        return self.combined

    def steps(self, series: Mapping[str, Series]) -> dict[str, Combined]:
        """Combine the latest values of the series given; `gather` is called once."""
        parts = {part.name: part for part in parts_of(series.values(), self._module, epoch=False)}
        return {key: combine(all_parts) for key, all_parts in by_key(self._gather(parts)).items()}

    def close(self) -> None:
        """Reset the metric objects that only other ranks have logged, and forget everything."""
        for metric in self._borrowed.values():
            metric.reset()
        self.forget()

    def forget(self) -> None:
        """Forget everything: all is new with the next call."""
        for held in (self._sent, self._known, self._borrowed):
            held.clear()
        self.combined = {}

    def _stamp(self, key: str, series: Series, again: bool) -> Any:
        """Something that is another one when there is something new."""
        if series.metric is None:
            return series.stamp
        updates = counted_updates(series.metric)
        if updates:
            return series.stamp, updates
        return object() if again or key not in self._sent else self._sent[key]

    def _ask(self, asked: Iterable[Combined], series: Mapping[str, Series]) -> None:
        """Have functions and metric objects give their values, and let all ranks have the first one's."""
        own: dict[str, tuple[float, torch.dtype | None, str | None]] = {}
        for one in asked:
            value = self._value_of(one, series.get(one.name))
            if isinstance(value, Tensor):
                own[one.name] = (value.item(), value.dtype, value.device.type)
            elif value is not None:
                own[one.name] = (value, None, None)
        heard: list[dict[str, tuple[float, torch.dtype | None, str | None]]] = self._gather(own)
        for one in asked:
            count = {id(part) for part in one.counted}
            given = [
                sent[one.name]
                for sent, part in zip(heard, one.parts, strict=True)
                if id(part) in count and one.name in sent
            ]
            if not given:
                continue
            number, dtype, device = given[0]
            one.epoch = placed(number, device, dtype)
            alike = all(math.isclose(number, other, rel_tol=1e-6) or str(number) == str(other) for other, *_ in given)
            if one.name not in self._warned and not alike and not one.counted[0].synchronises:
                self._warned.add(one.name)
                warn(
                    "metric-not-synchronised",
                    f"self.log({one.name!r}, metric): compute() of the metric object gave different values on the ranks "
                    f"({', '.join(f'{other:.6g}' for other, *_ in given)}), and how to put them together is not known. The first "
                    "rank's is published. Use a metric object of torchmetrics, let compute() synchronise itself, or log numbers "
                    "that have a mean or a sum.",
                )

    def _value_of(self, one: Combined, series: Series | None) -> Value | None:
        """The epoch's value where this rank can tell it."""
        if not one.counted:
            return None
        if one.kind == _FUNCTION:
            if series is None or series.lost:
                return None
            values = function_values(one.counted)
            return one_number(one.name, "reduce_fx", series.reduction(values)) if values is not None else None
        metric: Any = series.metric if series is not None else None
        if metric is None:
            name = next((part.object_name for part in one.counted if part.object_name), "")
            metric = submodule(self._module, name)
            if metric is None:
                return None
            self._borrowed[one.name] = metric
        with with_states_of_all(metric, [part.states for part in one.counted]):
            return one_number(one.name, "the metric's compute()", metric.compute())


def parts_of(series: Iterable[Series], module: nn.Module | None, epoch: bool = True) -> list[Part]:
    """Bring what series hold to the host, in one copy for each device.

    Args:
        series: this rank's.
        module: whose parts have names.
        epoch: False leaves all out but the latest values.
    """
    series = list(series)
    held = [one.held() if epoch else (None, 0.0, []) for one in series]
    logged = any(one.metric is not None for one in series) and module is not None and epoch
    names = {id(part): name for name, part in module.named_modules()} if logged and module is not None else {}
    numbers = iter(
        on_host(
            value
            for one, (total, _, pending) in zip(series, held, strict=True)
            for value in (one.latest, total, *pending, *(entry[2] for entry in (one.history if epoch else ())))
        )
    )
    parts = []
    for one, (total, weight, pending) in zip(series, held, strict=True):
        latest, summed = next(numbers), next(numbers)
        values = tuple(float(next(numbers) or 0.0) for _ in pending)
        history = tuple(
            (loader, batch_idx, float(next(numbers) or 0.0), size)
            for loader, batch_idx, _, size in (one.history if epoch else ())
        )
        parts.append(
            Part(
                name=one.name,
                dataloader_idx=one.dataloader_idx,
                kind=_kind(one),
                on_step=bool(one.on_step),
                on_epoch=bool(one.on_epoch),
                prog_bar=bool(one.prog_bar),
                logger=bool(one.logger),
                rank_zero_only=one.rank_zero_only,
                latest=latest,
                latest_weight=one.latest_weight,
                latest_at=one.latest_at,
                latest_device=_device_type(one.latest),
                total=summed,
                weight=weight,
                device=_device_type(pending[-1] if pending else total),
                values=values,
                dtype=reduce(torch.promote_types, map(_floating, pending)) if pending else None,
                history=history,
                object_name=names.get(id(one.metric), ""),
                states=sent_states(one.metric) if epoch and one.metric is not None else {},
                synchronises=one.metric is None or is_metric(one.metric),
            )
        )
    return parts


def by_key(ranks: Sequence[Mapping[str, Part]]) -> dict[str, list[Part | None]]:
    """The parts of each key by rank: first the keys of the first rank in its order, then those that others have besides."""
    keys = dict.fromkeys(key for parts in ranks for key in parts)
    return {key: [parts.get(key) for parts in ranks] for key in keys}


def combine(parts: Sequence[Part | None]) -> Combined:
    """Combine one key's parts, which are in rank order; functions and metric objects are left to `OverRanks`.

    Raises:
        MetricError: if the key was logged in different ways.
    """
    ranks = [rank for rank, part in enumerate(parts) if part is not None]
    there = [part for part in parts if part is not None]
    first = there[0]
    for rank, part in zip(ranks, there, strict=True):
        names = ("kind", "on_step", "on_epoch")
        changed = [(name, getattr(first, name), getattr(part, name)) for name in names]
        words = [
            f"{_words(n, a)} on rank {ranks[0]} and {_words(n, b)} on rank {rank}" for n, a, b in changed if a != b
        ]
        if words:
            raise MetricError(
                f"self.log({first.name!r}, …) was called in different ways on the ranks: {'; '.join(words)}. Use one set of "
                "arguments, or two names."
            )
    one = Combined(
        name=first.name,
        dataloader_idx=first.dataloader_idx,
        on_step=first.on_step,
        on_epoch=first.on_epoch,
        prog_bar=any(part.prog_bar for part in there),
        logger=any(part.logger for part in there),
        parts=parts,
    )
    counted = one.counted
    logged = [part for part in counted if part.latest is not None]
    if one.on_step and logged:
        newest = max(part.latest_at for part in logged)
        number = of_one_batch(
            first.kind, [(part.latest, part.latest_weight) for part in logged if part.latest_at == newest]
        )
        if number is not None:
            one.latest = placed(number, _first_device(part.latest_device for part in logged))
    if one.on_epoch and first.kind not in (_FUNCTION, _OBJECT):
        one.epoch = _epoch_value(first.kind, counted)
    batches: dict[tuple[int, int], list[tuple[float | None, float]]] = {}
    for part in counted:
        last = {(loader, batch_idx): (value, weight) for loader, batch_idx, value, weight in part.history}
        for place, entry in last.items():
            batches.setdefault(place, []).append(entry)
    for place, entries in batches.items():
        number = of_one_batch(first.kind, entries)
        if number is not None:
            one.history[place] = float(number)
    return one


def of_one_batch(kind: str, entries: Sequence[tuple[float | None, float]]) -> float | None:
    """The value of a global batch from those that ranks logged of their parts of it.

    It is summed, or its least or greatest value is taken, if the epoch is reduced so; in all other cases it is their mean by
    weight, the size of each part.

    Args:
        kind: of reduction.
        entries: values and weights.
    """
    values = [value for value, _ in entries if value is not None]
    if kind in ("sum", "min", "max"):
        return _merged(kind, values)
    if len(values) == 1:
        return values[0]  # not divided, so not rounded
    weight = sum(weight for _, weight in entries)
    # one without weight is left out, since it could be NaN
    return sum(value * size for value, size in entries if value is not None and size) / weight if weight else None


def function_values(parts: Sequence[Part]) -> Tensor | None:
    """What a function gets: value i of each rank, then value i + 1, as one process would have had them; None without any."""
    dtypes = [part.dtype for part in parts if part.dtype is not None]
    if not dtypes:
        return None
    numbers = interleaved([part.values for part in parts])
    device = torch.device(_first_device(part.device for part in parts) or "cpu")
    return torch.tensor(numbers, dtype=wide(device), device=device).to(reduce(torch.promote_types, dtypes))


def on_host(values: Iterable[Value | None]) -> list[float | None]:
    """Bring values to the host in one copy for each device; numbers of Python stay as they are."""
    held = list(values)
    numbers = [None if isinstance(value, Tensor) else value for value in held]
    groups: dict[torch.device, dict[torch.dtype, list[int]]] = {}
    for index, value in enumerate(held):
        if isinstance(value, Tensor):
            groups.setdefault(value.device, {}).setdefault(value.dtype, []).append(index)
    for device, by_dtype in groups.items():
        stacks = [torch.stack([held[i] for i in indices]).to(wide(device)) for indices in by_dtype.values()]  # type: ignore[misc]
        order = [i for indices in by_dtype.values() for i in indices]
        for index, number in zip(order, torch.cat(stacks).tolist(), strict=True):  # tolist() waits for the device
            numbers[index] = number
    return numbers


def placed(number: float, device: str | None, dtype: torch.dtype | None = None) -> Value:
    """The number as a 0-d tensor on the present device of a kind, or as it is if the kind is None."""
    if device is None:
        return number
    return torch.tensor(number, dtype=dtype or torch.get_default_dtype(), device=device)


def _epoch_value(kind: str, parts: Sequence[Part]) -> Value | None:
    totals = [part.total for part in parts if part.total is not None]
    if not totals:
        return None
    total: float = _merged(kind, totals)
    if kind == "mean":
        weight = sum(part.weight for part in parts)
        if weight == 0:
            return None  # of empty batches only
        total = total / weight
    return placed(total, _first_device(part.device for part in parts))


def _merged(kind: str, values: Sequence[float]) -> float:
    """Sums added in rank order; the least or greatest of them, which is NaN if one of them is."""
    if kind in ("mean", "sum"):
        return reduce(operator.add, values)
    odd = [value for value in values if value != value]
    return odd[0] if odd else (min(values) if kind == "min" else max(values))


def _kind(series: Series) -> str:
    if series.metric is not None or series.waits_for_metric:
        return _OBJECT
    return series.reduction if isinstance(series.reduction, str) else _FUNCTION


def _words(name: str, value: Any) -> str:
    return f"reduce_fx={value!r}" if name == "kind" else f"{name}={value}"


def _device_type(value: Value | None) -> str | None:
    return value.device.type if isinstance(value, Tensor) else None


def _first_device(devices: Iterable[str | None]) -> str | None:
    return next((device for device in devices if device is not None), None)


def _floating(value: Tensor) -> torch.dtype:
    return value.dtype if value.is_floating_point() else torch.float32  # as `Series.epoch_value`
