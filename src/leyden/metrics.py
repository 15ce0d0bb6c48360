"""What `self.log` feeds: sums that live on the device, read once per interval and once per epoch.

Nothing here waits for the device except `to_floats`, which brings any number of values over in one copy, and where there are
several ranks `over_ranks`, which does the same before it gathers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leyden.data.transfer import batch_size_of
from leyden.errors import MetricError, did_you_mean, missing_metric, no_such_name, warn
from leyden.metrics_state import restore_metric_objects
from leyden.series import (
    NAMED_REDUCTIONS,
    MetricObject,
    Pack,
    Reduction,
    Series,
    Unpacked,
    Value,
    calling_function,
    fork,
    one_number,
    same,
    to_floats,
)

if TYPE_CHECKING:
    from leyden.over_ranks import Combined, Gather, OverRanks

__all__ = ["Metrics", "Reduction", "Value", "as_tensors", "missing_metric", "to_floats"]

_CPU = torch.device("cpu")


class Metrics:
    """Every series of a run, and what the loop publishes of them.

    Over several ranks everything that is published is reduced over all of them, and equal on all to the last bit; so are the
    loggers' step values. `step_values`, `publish_epoch` and `evaluation_results` are then collectives: every rank calls
    them alike, also one that has logged nothing.

    Args:
        gather: takes one object of each rank that has data of its own, and gives every rank the list of all in rank
            order; None where there is one process.
        module: with several ranks, where metric objects are looked for that only some of them have logged.

    Attributes:
        published: reduced values by key, as they stay visible in ``trainer.callback_metrics``.
    """

    def __init__(self, gather: Gather | None = None, module: nn.Module | None = None) -> None:
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
        self._counts = True
        self._module = module
        self._ranks: OverRanks | None = None
        if gather is not None:
            from leyden.over_ranks import OverRanks

            self._ranks = OverRanks(gather, module)
        self._agreed: dict[
            str, tuple[int, Combined, Value]
        ] = {}  # training's step values over ranks, and as of which stamp
        self._kept_objects: dict[str, Any] | None = (
            None  # the metric objects' states before a batch that does not count
        )

    # The loop says where it is

    def enter_batches(self) -> None:
        """From now on hooks are those of single batches: in training they log step values by default."""
        self._where = "batch"
        self._default_on_step = self._training

    def enter_epoch_hooks(self) -> None:
        """From now on hooks are those of an epoch's start or end: they log epoch values."""
        self._end_batch()
        self._where = "epoch"
        self._default_on_step = False

    def leave(self) -> None:
        """From now on nothing may be logged."""
        self._end_batch()
        self._where = None
        self._batch = None

    def begin_batch(self, batch: Any, batch_idx: int, weight: float = 1.0) -> None:
        """Remember the batch that the values to come belong to: its size is their weight in an epoch's mean.

        Args:
            batch: on any device.
            batch_idx: its number in the epoch.
            weight: 0 for a batch that a rank repeats only to have something to compute while others have more: nothing counts
                that is logged in it, nor what metric objects in the module are updated with. Any other: it counts.
        """
        if self._kept_objects is not None:
            self._end_batch()
        self._batch = batch
        self._batch_idx = batch_idx
        self._batch_size = None
        self._counts = weight != 0
        if not self._counts and self._module is not None:
            from leyden.metric_ranks import copied_states

            self._kept_objects = copied_states(self._module)

    def _end_batch(self) -> None:
        self._counts = True
        if self._kept_objects is not None and self._module is not None:
            restore_metric_objects(self._module, self._kept_objects)
            self._kept_objects = None

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

    def compact(self, at: int) -> bool:
        """Sum what means and the like hold now, where it is ``at`` values or more; whether there was one. See `leyden.xla`."""
        return sum(series.compact(at) for series in self._active.values()) > 0

    # What the policies for steps that go wrong ask

    def mark(self) -> dict[str, tuple[Series, dict[str, Any]]]:
        """Note what training's series hold now, for `rewind`: some small copies for each."""
        return {key: (series, series.contents()) for key, series in self._train.items()}

    def rewind(self, mark: dict[str, tuple[Series, dict[str, Any]]]) -> None:
        """Forget what was logged in training since `mark`, except what metric objects were updated with."""
        self._train.clear()
        for key, (series, contents) in mark.items():
            vars(series).update(
                {name: list(value) if isinstance(value, list) else value for name, value in contents.items()}
            )
            self._train[key] = series

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
        rank_zero_only: bool = False,
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
            series = self._open(name, key, flags, value, self._dataloader_idx)
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
            value = one_number(name, "the metric", value)
        elif not isinstance(value, (int, float)):
            value = self._number(name, value)
        if rank_zero_only:
            series.rank_zero_only = True
        weight = 1.0
        if on_epoch and series.reduction == "mean" and series.metric is None:
            weight = batch_size if batch_size is not None else self._size_of_batch()
        if not self._counts:
            return
        if self._ranks is not None:
            series.latest_weight = weight
            if on_step and weight == 1.0:
                with suppress(MetricError):  # nothing in the batch has a size, which a step value does not need
                    series.latest_weight = batch_size if batch_size is not None else self._size_of_batch()
            series.latest_at = (self._dataloader_idx or 0, self._batch_idx)
        series.add(value, weight)
        if on_step and logger and not self._training:
            series.history.append((self._dataloader_idx or 0, self._batch_idx, value, series.latest_weight))

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
                f"self.log({name!r}, …) was called in {calling_function()}, where nothing can be logged. It can be called in "
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
        if not (callable(reduce_fx) or reduce_fx in NAMED_REDUCTIONS):
            raise MetricError(
                f"self.log({name!r}, reduce_fx={reduce_fx!r}): allowed are 'mean', 'sum', 'min', 'max', or a function of "
                f"the stacked values.{did_you_mean(str(reduce_fx), ('mean', 'sum', 'min', 'max'))}"
            )
        known = self._active.get(key)
        if known is not None:
            if known.lost:
                known.take_up(reduce_fx, value)
            names = ("on_step", "on_epoch", "prog_bar", "logger", "reduce_fx")
            both = zip(names, known.flags, flags, strict=True)
            changed = [f"{n}={a!r} and {b!r}" for n, a, b in both if not same(a, b)]
            if not changed:
                known.flags = flags  # the same in other words, such as torch.mean for "mean"
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
        """Training's latest values that were logged since the last call, for the loggers.

        Over several ranks they are those of the global batch: means weighted by the sizes of its parts; sums, least or
        greatest values where ``reduce_fx`` says so.
        """
        values: dict[str, Value] = {}
        fresh = {key: one for key, one in self._train.items() if one.fresh and one.on_step}
        for series in fresh.values():
            if self._ranks is not None:
                series.fresh = False
            elif series.logger and series.latest is not None:
                values[fork(series, "step")] = series.latest
                series.fresh = False
        for key, one in self._ranks.steps(fresh).items() if self._ranks is not None else ():
            if one.latest is not None:
                self._agree(key, one, one.latest)
                if one.logger:
                    values[fork(one, "step")] = one.latest
        return values

    def publish_epoch(self) -> dict[str, Value]:
        """Reduce the active series that ask for it; return those meant for the loggers."""
        for_loggers = {}
        for series, latest, value in self._reduced():
            if series.on_step and latest is not None:
                name = fork(series, "step")
                self.published[series.name] = self.published[name] = latest
                if series.prog_bar and self._training:
                    self._prog_bar[name] = None
                if series.logger:
                    self._logged[name] = None
            if value is None:
                continue
            name = fork(series, "epoch")
            self.published[series.name] = self.published[name] = value
            if series.prog_bar:
                self._prog_bar[name] = None
            if series.logger:
                self._logged[name] = None
                for_loggers[name] = value
        return for_loggers

    def _reduced(self, again: bool = True) -> Iterator[tuple[Series | Combined, Value | None, Value | None]]:
        """What is open, with the latest value and that of the epoch.

        Args:
            again: whether to ask metric objects anew that may have been updated without being logged.
        """
        if self._ranks is not None:
            for key, one in self._ranks.reduce(self._active, again).items():
                if one.latest is not None and self._training:
                    self._agree(key, one, one.latest)
                yield one, one.latest, one.epoch
            return
        for series in self._active.values():
            if again:
                series.forget_computed()
            yield series, series.latest, series.epoch_value() if series.on_epoch else None

    def _agree(self, key: str, one: Combined, value: Value) -> None:
        series = self._train.get(key)
        self._agreed[key] = (0 if series is None else series.stamp, one, value)

    def _steps_now(self) -> Iterator[tuple[Series | Combined, Value]]:
        """Training's step values: over all ranks where they have been agreed on, else this rank's, which are newer."""
        for key, series in self._train.items():
            if series.on_step and series.latest is not None:
                stamp, _, value = self._agreed.get(key, (-1, None, series.latest))
                yield series, value if stamp == series.stamp else series.latest
        for key, (_, one, value) in self._agreed.items():
            if key not in self._train or self._train[key].latest is None:
                yield one, value

    def evaluation_history(self) -> list[tuple[int, dict[str, float]]]:
        """The step values of an evaluation, by loader and batch, for the loggers; all are read at once.

        Over several ranks they are those of the global batches, as of the last `publish_epoch`; no rank waits for another here.
        """
        if self._ranks is not None:
            combined = self._ranks.combined.values()
            numbers = {(*at, fork(one, "step")): number for one in combined for at, number in one.history.items()}
        else:
            numbers = to_floats(
                {
                    (loader, batch_idx, fork(series, "step")): value
                    for series in self._active.values()
                    for loader, batch_idx, value, _ in series.history
                }
            )
        rows: dict[tuple[int, int], dict[str, float]] = {}
        for (loader, batch_idx, name), number in numbers.items():
            rows.setdefault((loader, batch_idx), {})[name] = number
        return [(batch_idx, rows[loader, batch_idx]) for loader, batch_idx in sorted(rows)]

    def evaluation_results(self, dataloaders: int) -> list[dict[str, float]]:
        """The reduced values of an evaluation as plain numbers, one dict per loader."""
        rows: list[dict[str, Value]] = [{} for _ in range(dataloaders)]
        for series, _, value in self._reduced(again=False):
            if value is not None:
                rows[series.dataloader_idx or 0][fork(series, "epoch")] = value
        return [to_floats(row) for row in rows]

    def reset(self) -> None:
        """Forget the active series: their epoch is over."""
        lost = [series.name for series in self._active.values() if series.lost and series.on_epoch]
        for series in self._active.values():
            if series.metric is not None:
                series.metric.reset()
        self._active.clear()
        if self._ranks is not None:
            self._ranks.close()
            if self._training:
                self._agreed.clear()
        if lost:
            warn(
                "metric-not-restored",
                f"{', '.join(map(repr, lost))}: logged before the checkpoint that this run goes on from, and not after it, with "
                "a function as reduce_fx, or as a metric object that is no submodule of the module. A checkpoint can hold "
                "neither, so the values of this one epoch are missing. Log in the epoch's later part too, reduce by 'mean', "
                "'sum', 'min' or 'max', or make the metric object an attribute of the module.",
            )

    # A checkpoint

    def state_dict(self, module: nn.Module | None = None, device: torch.device = _CPU) -> dict[str, Any]:
        """Return training's open series and everything published, as plain data and a few tensors.

        To be called between two steps or at an epoch's end; the series of an evaluation are not part of it. Nothing waits for
        the device. The state of metric objects is not in it, only their names: see `leyden.metrics_state`.

        Args:
            module: where metric objects are looked for.
            device: that of the run.
        """
        names = {id(part): name for name, part in module.named_modules()} if module is not None else {}
        pack = Pack()
        return {
            "device": device.type,
            "published": {name: pack.add(value) for name, value in self.published.items()},
            "prog_bar": list(self._prog_bar),
            "logged": list(self._logged),
            "series": [series.state_dict(pack, names) for series in self._train.values()],
            "tensors": pack.state_dict(),  # last: the pack is full only now
        }

    def load_state_dict(
        self, state: Mapping[str, Any], module: nn.Module | None = None, device: torch.device = _CPU
    ) -> None:
        """Take back what `state_dict` returned, in the place of everything logged so far.

        Every later value is then the same to the last bit. What the state cannot hold, a function given as ``reduce_fx`` and a
        metric object that is no submodule, comes with the next log call of the same name; if there is none in that
        epoch, a warning (``metric-not-restored``) says so.

        Args:
            state: is copied from.
            module: where metric objects are looked for.
            device: that of the run. If it is of another kind than before, sums go on, but not to the last bit.
        """
        unpacked = Unpacked(state["tensors"], state["device"], device)
        published = {name: unpacked.value(place) for name, place in state["published"].items()}
        self.published = {name: value for name, value in published.items() if value is not None}
        self._prog_bar = dict.fromkeys(state["prog_bar"])
        self._logged = dict.fromkeys(state["logged"])
        self._train.clear()
        self._agreed.clear()
        if self._ranks is not None:
            self._ranks.forget()
        for each in state["series"]:
            self._train[each["name"]] = Series.restored(each, unpacked, module)

    # What the public Trainer shows

    def callback_values(self) -> dict[str, Value]:
        """Every value: reduced ones as published, step values as they are now."""
        values = dict(self.published)
        epoch_is_published = self._training and self._where == "epoch"
        for series, latest in self._steps_now():
            if not (series.on_epoch and epoch_is_published):
                values[series.name] = values[fork(series, "step")] = latest
        return values

    def logger_values(self) -> dict[str, Value]:
        """The values that loggers are given, each as it is now; nothing waits for the device."""
        values = {name: self.published[name] for name in self._logged}
        for series, latest in self._steps_now():
            if series.logger:
                values[fork(series, "step")] = latest
        return values

    def progress_bar_values(self) -> dict[str, float]:
        """The values that were logged with ``prog_bar=True``, as numbers; this waits for the device."""
        values = {name: self.published[name] for name in self._prog_bar if name in self.published}
        for series, latest in self._steps_now():
            if series.prog_bar:
                values[fork(series, "step")] = latest
        return to_floats(values)


def as_tensors(values: Mapping[str, Value]) -> dict[str, Tensor]:
    """Values as 0-d tensors, which is what Lightning shows; python numbers become float32."""
    return {name: value if isinstance(value, Tensor) else torch.tensor(float(value)) for name, value in values.items()}


def __getattr__(name: str) -> object:
    # For programs of 2020, whose metrics were at this place.
    former = name[:1].isupper() or name == "functional"
    return no_such_name(
        __name__, name, {name: f"metrics are a package of their own: torchmetrics.{name}"} if former else {}
    )
