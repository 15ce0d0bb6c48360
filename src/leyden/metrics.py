"""What `self.log` feeds: sums that live on the device, read once per interval and once per epoch.

Nothing here waits for the device except `to_floats`, which brings any number of values over in one copy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from leyden.data.transfer import batch_size_of
from leyden.errors import MetricError, did_you_mean

Value = Tensor | float
Key = TypeVar("Key", bound=Hashable)
Reduction = str | Callable[[Tensor], Tensor]

_NAMED_REDUCTIONS: dict[Any, str] = {
    "mean": "mean", "avg": "mean", torch.mean: "mean", "sum": "sum", torch.sum: "sum",
    "min": "min", torch.min: "min", torch.amin: "min", "max": "max", torch.max: "max", torch.amax: "max",
}  # fmt: skip
_COMPACT_AT = 64
"""Tensors held before they are summed: few small kernels instead of two per step, and bounded memory."""


@runtime_checkable
class MetricObject(Protocol):
    """What is asked of a metric object; `torchmetrics.Metric` has it."""

    def compute(self) -> Any:
        """Return the value over all updates since the last reset."""

    def reset(self) -> None:
        """Forget all updates."""


def to_floats(values: Mapping[Key, Value]) -> dict[Key, float]:
    """Bring values to the host: one copy for each device that holds some."""
    floats = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    by_device: dict[torch.device, list[Key]] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, []).append(name)
    for device, names in by_device.items():
        stacked = torch.stack([values[name].to(_wide(device)) for name in names])  # type: ignore[union-attr]
        floats.update(zip(names, stacked.tolist(), strict=True))  # tolist() waits for the device, once
    return {name: float(floats[name]) for name in values}


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


class Series:
    """All values of one key in one epoch: the latest, and what the epoch's value is reduced from."""

    def __init__(self, name: str, flags: tuple[Any, ...], dataloader_idx: int | None) -> None:
        self.name = name
        self.flags = flags
        self.on_step, self.on_epoch, self.prog_bar, self.logger, reduce_fx = flags
        self.reduction = _NAMED_REDUCTIONS.get(reduce_fx, reduce_fx)
        self.dataloader_idx = dataloader_idx
        self.metric: MetricObject | None = None
        self.latest: Value | None = None
        self.fresh = False  # logged since the last flush
        self.history: list[tuple[int, int, Value]] = []  # (loader, batch, value), for evaluation's step values
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
                self._epoch_value = _one_number(self.name, "the metric's compute()", self.metric.compute())
            return self._epoch_value
        if callable(self.reduction):
            if not self._pending:
                return None
            values = [value if value.is_floating_point() else value.float() for value in self._pending]
            return _one_number(self.name, "reduce_fx", self.reduction(torch.stack(values)))
        self._compact()
        if self._total is None or (self.reduction == "mean" and self._weight == 0):
            return None  # nothing was logged, or of empty batches only
        value = self._total / self._weight if self.reduction == "mean" else self._total
        return value.to(torch.get_default_dtype()) if isinstance(value, Tensor) else value

    def forget_computed(self) -> None:
        """Ask a metric object again, unless its count of updates says that no hook has updated it without logging it."""
        updates = getattr(self.metric, "update_count", None)
        if updates is None or updates != self._updates:
            self._epoch_value, self._updates = None, updates

    def _compact(self) -> None:
        if not self._pending:
            return
        wide = _wide(self._pending[0].device)
        if self.reduction == "mean":
            groups: dict[float, list[Tensor]] = {}  # by weight: no copy of weights to the device is needed
            for value, weight in zip(self._pending, self._weights, strict=True):
                groups.setdefault(weight, []).append(value)
            for weight, values in groups.items():
                self._merge(torch.stack(values).to(wide).sum() * weight, weight * len(values))
        else:
            reduce: Callable[[Tensor], Tensor] = getattr(torch, str(self.reduction))
            self._merge(reduce(torch.stack(self._pending).to(wide)), 0.0)
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


class Metrics:
    """Every series of a run, and what the loop publishes of them.

    Attributes:
        published: reduced values by key, as they stay visible in ``trainer.callback_metrics``.
    """

    def __init__(self) -> None:
        self.published: dict[str, Value] = {}
        self._prog_bar: dict[str, None] = {}  # an ordered set of the published keys that the bar shows
        self._logged: dict[str, None] = {}  # likewise those that loggers get
        self._train: dict[str, Series] = {}
        self._active = self._train
        self._where: str | None = None
        self._default_on_step = False
        self._training = True
        self._dataloader_idx: int | None = None
        self._batch: Any = None
        self._batch_idx = 0
        self._batch_size: int | None = None

    # The loop says where it is

    def enter_batches(self) -> None:
        """From now on hooks are those of single batches: in training they log step values by default."""
        self._where = "batch"
        self._default_on_step = self._training

    def enter_epoch_hooks(self) -> None:
        """From now on hooks are those of an epoch's start or end: they log epoch values."""
        self._where = "epoch"
        self._default_on_step = False

    def leave(self) -> None:
        """From now on nothing may be logged."""
        self._where = None
        self._batch = None

    def begin_batch(self, batch: Any, batch_idx: int) -> None:
        """Remember the batch that the values to come belong to: its size is their weight in an epoch's mean."""
        self._batch = batch
        self._batch_idx = batch_idx
        self._batch_size = None

    def begin_evaluation(self) -> None:
        """Open an evaluation; training's unfinished epoch is left as it is."""
        self._active = {}
        self._training = False
        self.enter_epoch_hooks()

    def begin_dataloader(self, index: int | None) -> None:
        """Name the loader that the values to come belong to; None if there is only one."""
        self._dataloader_idx = index

    def end_evaluation(self) -> None:
        """Close an evaluation and return to training's series."""
        self._active = self._train
        self._training = True
        self._dataloader_idx = None
        self._batch = None

    # What users call

    def log(
        self,
        name: str,
        value: Any,
        on_step: bool | None,
        on_epoch: bool | None,
        prog_bar: bool,
        logger: bool,
        reduce_fx: Reduction,
        batch_size: int | None,
        add_dataloader_idx: bool,
    ) -> None:
        """Take one value under ``name``; `LightningModule.log` documents the arguments."""
        if on_step is None:
            on_step = self._default_on_step
        if on_epoch is None:
            on_epoch = not self._default_on_step
        flags = (on_step, on_epoch, prog_bar, logger, reduce_fx)
        key = name
        if self._dataloader_idx is not None and add_dataloader_idx:
            key = f"{name}/dataloader_idx_{self._dataloader_idx}"
        series = self._active.get(key)
        if series is None or series.flags != flags:
            series = self._open(name, key, flags, value, self._dataloader_idx if add_dataloader_idx else None)
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise MetricError(
                    f"self.log({name!r}, …) got a tensor of shape {tuple(value.shape)}; a logged value is one number. "
                    "Reduce it, e.g. with .mean()."
                )
            # A buffer, or a loss that a penalty is added to, may go on being changed in place: copy it.
            value = value.detach().clone()
            if value.ndim:
                value = value.reshape(())
        elif series.metric is not None:
            value = getattr(value, "_forward_cache", None) if on_step else 0.0
            if value is None:
                raise MetricError(
                    f"self.log({name!r}, metric, on_step=True) needs the metric's value on this batch: call it as "
                    "self.metric(preds, target) before logging, or log it with on_step=False."
                )
            value = _one_number(name, "the metric", value)
        elif not isinstance(value, (int, float)):
            value = self._number(name, value)
        weight = 1.0
        if on_epoch and series.reduction == "mean" and series.metric is None:
            weight = batch_size if batch_size is not None else self._size_of_batch()
        series.add(value, weight)
        if on_step and logger and not self._training:
            series.history.append((self._dataloader_idx or 0, self._batch_idx, value))

    @staticmethod
    def _number(name: str, value: Any) -> float:
        if hasattr(value, "item") and getattr(value, "size", 1) == 1:
            return float(value.item())  # a numpy scalar
        hint = " Use self.log_dict for several values." if isinstance(value, Mapping) else ""
        raise MetricError(
            f"self.log({name!r}, …) got a {type(value).__name__}; allowed are a number, a tensor of one element, or a "
            f"metric object with compute() and reset().{hint}"
        )

    def _size_of_batch(self) -> int:
        if self._where == "epoch" or self._batch is None:
            return 1
        if self._batch_size is None:
            self._batch_size = batch_size_of(self._batch)
        return self._batch_size

    def _open(self, name: str, key: str, flags: tuple[Any, ...], value: Any, dataloader_idx: int | None) -> Series:
        if self._where is None:
            raise MetricError(
                f"self.log({name!r}, …) was called in {_calling_function()}, where nothing can be logged. It can be called in "
                "training_step, validation_step and test_step, in hooks from on_train_start to on_train_epoch_end, and in those "
                "of validation and test."
            )
        if not isinstance(name, str):
            raise MetricError(f"self.log(name, …) needs a string as name, got {name!r}.")
        if "/dataloader_idx_" in name:
            raise MetricError(f"self.log({name!r}, …): the ending /dataloader_idx_N is added for you; leave it out.")
        on_step, *_, reduce_fx = flags
        if self._where == "epoch" and on_step:
            raise MetricError(
                f"self.log({name!r}, on_step=True) is not possible in a hook of a whole epoch: it has no step."
            )
        if not (callable(reduce_fx) or reduce_fx in _NAMED_REDUCTIONS):
            raise MetricError(
                f"self.log({name!r}, reduce_fx={reduce_fx!r}): allowed are 'mean', 'sum', 'min', 'max', or a function of "
                f"the stacked values.{did_you_mean(str(reduce_fx), ('mean', 'sum', 'min', 'max'))}"
            )
        known = self._active.get(key)
        if known is not None:
            names = ("on_step", "on_epoch", "prog_bar", "logger", "reduce_fx")
            both = zip(names, known.flags, flags, strict=True)
            changed = [f"{n}={a!r} and {b!r}" for n, a, b in both if not _same(a, b)]
            if not changed:
                return known
            raise MetricError(
                f"self.log({name!r}, …) was called twice in one epoch with different arguments ({', '.join(changed)}). "
                "Use one set of arguments, or two names."
            )
        series = self._active[key] = Series(key, flags, dataloader_idx)
        if not isinstance(value, (Tensor, int, float)) and isinstance(value, MetricObject):
            series.metric = value
        return series

    # What the loop publishes

    def step_values(self) -> dict[str, Value]:
        """Training's latest values that were logged since the last call, for the loggers."""
        values = {}
        for series in self._train.values():
            if series.fresh and series.on_step and series.logger and series.latest is not None:
                values[_fork(series, "step")] = series.latest
                series.fresh = False
        return values

    def publish_epoch(self) -> dict[str, Value]:
        """Reduce the active series that ask for it; return those meant for the loggers."""
        for_loggers = {}
        for series in self._active.values():
            if series.on_step and series.latest is not None:
                name = _fork(series, "step")
                self.published[series.name] = self.published[name] = series.latest
                if series.prog_bar and self._training:
                    self._prog_bar[name] = None
                if series.logger:
                    self._logged[name] = None
            series.forget_computed()
            value = series.epoch_value() if series.on_epoch else None
            if value is None:
                continue
            name = _fork(series, "epoch")
            self.published[series.name] = self.published[name] = value
            if series.prog_bar:
                self._prog_bar[name] = None
            if series.logger:
                self._logged[name] = None
                for_loggers[name] = value
        return for_loggers

    def evaluation_history(self) -> list[tuple[int, dict[str, float]]]:
        """The step values of an evaluation, by loader and batch, for the loggers; all are read at once."""
        values = {
            (loader, batch_idx, _fork(series, "step")): value
            for series in self._active.values()
            for loader, batch_idx, value in series.history
        }
        rows: dict[tuple[int, int], dict[str, float]] = {}
        for (loader, batch_idx, name), number in to_floats(values).items():
            rows.setdefault((loader, batch_idx), {})[name] = number
        return [(batch_idx, rows[loader, batch_idx]) for loader, batch_idx in sorted(rows)]

    def evaluation_results(self, dataloaders: int) -> list[dict[str, float]]:
        """The reduced values of an evaluation as plain numbers, one dict per loader."""
        rows: list[dict[str, Value]] = [{} for _ in range(dataloaders)]
        for series in self._active.values():
            value = series.epoch_value() if series.on_epoch else None
            if value is not None:
                rows[series.dataloader_idx or 0][_fork(series, "epoch")] = value
        return [to_floats(row) for row in rows]

    def reset(self) -> None:
        """Forget the active series: their epoch is over."""
        for series in self._active.values():
            if series.metric is not None:
                series.metric.reset()
        self._active.clear()

    # What the public Trainer shows

    def callback_values(self) -> dict[str, Value]:
        """Every value: reduced ones as published, step values as they are now."""
        values = dict(self.published)
        epoch_is_published = self._training and self._where == "epoch"
        for series in self._train.values():
            if series.on_step and series.latest is not None and not (series.on_epoch and epoch_is_published):
                values[series.name] = values[_fork(series, "step")] = series.latest
        return values

    def logger_values(self) -> dict[str, Value]:
        """The values that loggers are given, each as it is now; nothing waits for the device."""
        values = {name: self.published[name] for name in self._logged}
        for series in self._train.values():
            if series.logger and series.on_step and series.latest is not None:
                values[_fork(series, "step")] = series.latest
        return values

    def progress_bar_values(self) -> dict[str, float]:
        """The values that were logged with ``prog_bar=True``, as numbers; this waits for the device."""
        values = {name: self.published[name] for name in self._prog_bar if name in self.published}
        for series in self._train.values():
            if series.prog_bar and series.on_step and series.latest is not None:
                values[_fork(series, "step")] = series.latest
        return to_floats(values)


def _one_number(name: str, source: str, value: Any) -> Value:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().reshape(())
    if isinstance(value, (int, float)):
        return value
    given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise MetricError(
        f"self.log({name!r}, …): {source} returned {given}; a logged value is one number. Log its parts under their own "
        "names, e.g. with self.log_dict."
    )


def _same(first: Any, second: Any) -> bool:
    # A lambda written in the call is a new object at each step, of the same code.
    return first == second or getattr(first, "__code__", first) is getattr(second, "__code__", second)


def _calling_function() -> str:
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("leyden."):
        frame = frame.f_back
    return frame.f_code.co_name


def _fork(series: Series, ending: str) -> str:
    """The key under which a series' step or epoch value is shown: with an ending only if there are both."""
    if not (series.on_step and series.on_epoch):
        return series.name
    name, slash, loader = series.name.partition("/dataloader_idx_")
    return f"{name}_{ending}{slash}{loader}"


def as_tensors(values: Mapping[str, Value]) -> dict[str, Tensor]:
    """Values as 0-d tensors, which is what Lightning shows; python numbers become float32."""
    return {name: value if isinstance(value, Tensor) else torch.tensor(float(value)) for name, value in values.items()}


def missing_metric(what: str, key: str, known: Iterable[str]) -> MetricError:
    """The error for a monitored key that was never logged: it names those that were."""
    names = sorted(known)
    listed = ", ".join(map(repr, names)) if names else "nothing: no value has been logged with self.log yet"
    return MetricError(
        f"{what} monitors {key!r}, which was not logged. Logged are: {listed}.{did_you_mean(key, names)}"
    )
