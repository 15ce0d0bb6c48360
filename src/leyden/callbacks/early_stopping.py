"""Stop training when a monitored metric no longer improves, reaches its goal, diverges or is not finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from leyden.callbacks.callback import Callback, has_validation
from leyden.errors import MissingMetricError, did_you_mean, reject, warn

if TYPE_CHECKING:
    from leyden.module import LightningModule
    from leyden.trainer import Trainer

MODES: tuple[str, ...] = ("min", "max")


class EarlyStopping(Callback):
    """Ask the trainer to stop when ``monitor`` has not improved for ``patience`` checks.

    One check is made per value of the metric. With ``check_on_train_epoch_end=None`` its place is found
    by looking: a metric that validation logs is checked after each validation, a metric that only training logs at
    the end of each training epoch. The sanity check and `Trainer.validate` are never counted.

    At each check, in this order: a value that is not finite stops training (``check_finite``); a value beyond
    ``stopping_threshold`` stops it; a value beyond ``divergence_threshold`` stops it; a value better than the best
    by more than ``min_delta`` becomes the best and sets ``wait_count`` to 0; any other adds 1 to
    ``wait_count``, and ``patience`` of these in a row stop training.

    Args:
        monitor: key of the metric, as given to ``self.log``; needed, unless the arguments are those of former days.
        min_delta: smallest change that counts as an improvement, in the metric's unit. A negative one
            lets slightly worse values count.
        patience: number of checks in a row without improvement after which training stops; with 0, as with 1, the
            first of them stops it. Counted in checks, not in epochs.
        verbose: print each improvement and the reason for stopping.
        mode: ``"min"`` when lower is better, ``"max"`` when higher is.
        strict: raise when ``monitor`` was never logged; otherwise warn (``early-stopping-key``) and skip the check.
        check_finite: stop on a NaN or an infinite value. Otherwise NaN counts as no improvement.
        stopping_threshold: stop once the metric is strictly better than this.
        divergence_threshold: stop once the metric is strictly worse than this.
        check_on_train_epoch_end: True: only at the end of training epochs; False: only after validation; None: as
            described above.
        log_rank_zero_only: with ``verbose``, print on the first process only.
        **former: refused; a ``monitor`` left out and ``mode="auto"`` are what former days had, and are told of.

    Attributes:
        wait_count: checks in a row without improvement.
        stopped_epoch: epoch in which training was stopped; 0 when it was not.
        best_score: best value seen, a 0-d CPU tensor; infinite before the first check.
        stopping_reason: None, or ``"patience_exhausted"``, ``"non_finite_metric"``, ``"stopping_threshold"`` or
            ``"divergence_threshold"``.
        stopping_reason_message: the same as a sentence, or None.

    Raises:
        ConfigurationError: an argument is out of range.
        MissingMetricError: during the run, when ``strict`` and ``monitor`` is not among the logged metrics.
    """

    monitors_epoch: ClassVar[bool] = True
    _former = {"wait": "wait_count", "best": "best_score"}  # noqa: RUF012 read only

    def __init__(
        self,
        monitor: str | None = None,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: Literal["min", "max"] = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
        **former: Any,
    ) -> None:
        if monitor is None or mode not in MODES or former:
            from leyden.compat.former_callbacks import stopping_arguments

            monitor, mode = stopping_arguments(type(self), former, monitor, mode)
        if not isinstance(monitor, str) or not monitor:
            reject("monitor", monitor, "the key of a metric, as given to self.log")
        if mode not in MODES:
            reject("mode", mode, "'min' (lower is better) or 'max' (higher is better)")
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 0:
            reject("patience", patience, "an integer >= 0, the number of checks without improvement")
        if not math.isfinite(min_delta):
            reject("min_delta", min_delta, "a finite number in the unit of the metric")
        self.monitor = monitor
        self.min_delta = float(min_delta)
        self.patience = patience
        self.verbose = verbose
        self.mode: Literal["min", "max"] = mode
        self.strict = strict
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.check_on_train_epoch_end = check_on_train_epoch_end
        self.log_rank_zero_only = log_rank_zero_only
        self._counts = True  # False while the verb is not fit
        self.start_anew()

    def start_anew(self) -> None:
        """Forget what an earlier `fit` counted."""
        self.wait_count = 0
        self.stopped_epoch = 0
        self.best_score = torch.tensor(math.inf if self.mode == "min" else -math.inf)
        self.stopping_reason: str | None = None
        self.stopping_reason_message: str | None = None
        self._value_before: Tensor | None = None
        self._validated = False  # a validation ended in this fit
        self._limits_before: dict[str, Any] = {}  # those of a run that goes on here
        self._validated_before = False  # likewise before the checkpoint that it goes on from
        self._source: str | None = None  # "validation" or "training", once that was seen

    @property
    def state_key(self) -> str:
        """Differs for callbacks that watch different metrics."""
        return f"{type(self).__qualname__}{ {'monitor': self.monitor, 'mode': self.mode}!r}"

    def state_dict(self) -> dict[str, Any]:
        """Counters, the best value and the reason for stopping."""
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score.clone(),
            "stopping_reason": self.stopping_reason,
            "stopping_reason_message": self.stopping_reason_message,
            "limits": self._limits(),
            "source": self._source,
            "validated": self._validated,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counters back. Arguments stay as given to this object, so a resumed run may be given more patience."""
        self.wait_count = int(state_dict["wait_count"])
        self.stopped_epoch = int(state_dict["stopped_epoch"])
        self.best_score = torch.as_tensor(state_dict["best_score"]).detach().cpu().clone()
        reason = state_dict.get("stopping_reason")
        self.stopping_reason = reason if isinstance(reason, str) else None
        self.stopping_reason_message = state_dict.get("stopping_reason_message")
        self._limits_before = state_dict.get("limits", {})
        self._source = state_dict.get("source")
        self._validated_before = bool(state_dict.get("validated", False))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note whether this verb trains; the other verbs' metrics are not checked."""
        self._counts = stage == "fit"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Withdraw a stop that was asked for before a restart, if the new limits allow more; warn of a place never come to."""
        self._validated, self._validated_before = self._validated_before, False
        if self.stopping_reason is not None and self._limits_before and not self._still_holds(self.stopping_reason):
            trainer.should_stop = False
            self.stopping_reason = self.stopping_reason_message = None
        if self.check_on_train_epoch_end is False and not has_validation(trainer):
            warn(
                "early-stopping-idle",
                f"EarlyStopping(monitor={self.monitor!r}, check_on_train_epoch_end=False) checks after validation, "
                "and this fit has none: it will never stop training. Pass val_dataloaders, or leave "
                "check_on_train_epoch_end out.",
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metric's value, to see whether this validation writes a new one."""
        self._value_before = trainer.callback_metrics.get(self.monitor)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check a metric that validation logged."""
        before, self._value_before = self._value_before, None
        if not self._counts or self.check_on_train_epoch_end is True:
            return
        value = trainer.callback_metrics.get(self.monitor)
        if self._source is None and value is not None and not _same(value, before):
            self._source = "validation"
        if trainer.sanity_checking:
            return
        self._validated = True
        # an endless epoch may never come to the place where a misspelt key would be found
        lost = value is None and math.isinf(trainer.num_training_batches)
        if self.check_on_train_epoch_end is False or self._source == "validation" or lost:
            self._check(trainer, value)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check a metric that only training logged, or any metric when that was asked for."""
        if self.check_on_train_epoch_end is False:
            return
        value = trainer.callback_metrics.get(self.monitor)
        if self.check_on_train_epoch_end is None and has_validation(trainer):
            to_come = value is None and not self._validated  # as with check_val_every_n_epoch=2
            if self._source == "validation" or to_come:
                return
            self._source = None if value is None else "training"
        self._check(trainer, value)

    def _check(self, trainer: Trainer, value: Tensor | None) -> None:
        if value is None:
            self._missing(trainer)
            return
        current, best = float(value), float(self.best_score)
        with torch.inference_mode(False):  # validation may run in it, and its tensors are of no use outside
            score = torch.tensor(current, dtype=value.dtype)
        reason: str | None = None
        message = ""
        if self.check_finite and not math.isfinite(current):
            reason = "non_finite_metric"
            message = f"{self.monitor} = {current} is not finite; the best value before it was {best:.6g}."
        else:
            goal, limit = self.stopping_threshold, self.divergence_threshold
            improved = self._better(current - self._sign * self.min_delta, best)
            if goal is not None and self._better(current, goal):
                reason = "stopping_threshold"
                message = f"{self.monitor} = {current:.6g} is better than stopping_threshold={goal}."
            elif limit is not None and self._better(limit, current):
                reason = "divergence_threshold"
                message = f"{self.monitor} = {current:.6g} is worse than divergence_threshold={limit}."
            elif not improved:
                self.wait_count += 1
                if self.wait_count >= self.patience:
                    reason = "patience_exhausted"
                    message = f"{self.monitor} did not improve in {self.wait_count} checks; best value {best:.6g}."
            if improved and reason != "divergence_threshold":
                self._improve(trainer, score, best)
        if reason is not None:
            self._stop(trainer, reason, message)

    def _limits(self) -> dict[str, Any]:
        names = ("patience", "check_finite", "stopping_threshold", "divergence_threshold")
        return {name: getattr(self, name) for name in names}

    def _still_holds(self, reason: str) -> bool:
        if reason == "patience_exhausted":
            return self.wait_count >= self.patience
        name = "check_finite" if reason == "non_finite_metric" else reason
        return bool(self._limits_before.get(name) == getattr(self, name))

    @property
    def _sign(self) -> float:
        return 1.0 if self.mode == "max" else -1.0

    def _better(self, first: float, second: float) -> bool:
        return self._sign * first > self._sign * second  # False when either is NaN

    def _improve(self, trainer: Trainer, score: Tensor, before: float) -> None:
        self.best_score = score
        self.wait_count = 0
        if self.verbose:
            by = f" by {abs(float(score) - before):.6g}" if math.isfinite(before) else ""
            self._say(trainer, f"{self.monitor} improved{by} to {float(score):.6g}.")

    def _stop(self, trainer: Trainer, reason: str, message: str) -> None:
        trainer.should_stop = True
        self.stopped_epoch = trainer.current_epoch
        self.stopping_reason = reason
        self.stopping_reason_message = message
        if self.verbose:
            self._say(trainer, f"{message} Stopping.")

    def _say(self, trainer: Trainer, message: str) -> None:
        if trainer.is_global_zero:
            trainer.print(f"EarlyStopping: {message}")
        elif not self.log_rank_zero_only:
            print(f"[rank {trainer.global_rank}] EarlyStopping: {message}")

    def _missing(self, trainer: Trainer) -> None:
        keys = sorted(trainer.callback_metrics)
        known = ", ".join(map(repr, keys)) if keys else "none were logged"
        message = (
            f"EarlyStopping(monitor={self.monitor!r}): no such metric. Logged metrics: {known}."
            f"{did_you_mean(self.monitor, keys)} Log it with self.log({self.monitor!r}, value), or monitor another."
        )
        if self.strict:
            raise MissingMetricError(message)
        warn("early-stopping-key", f"{message} This check is skipped (strict=False).")


def _same(value: Tensor, before: Tensor | None) -> bool:
    """Whether a validation left the value as it was; the trainer may show one value as two tensors."""
    if value is before or before is None:
        return value is before
    return float(value) == float(before) or (math.isnan(float(value)) and math.isnan(float(before)))
