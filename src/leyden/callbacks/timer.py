"""Measure how long each stage takes, and stop training when its time is over."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from leyden.callbacks.callback import Callback
from leyden.errors import did_you_mean, reject

if TYPE_CHECKING:
    from leyden.module import LightningModule
    from leyden.trainer import Trainer

Stage = Literal["train", "sanity_check", "validate", "test", "predict"]
_STAGES: tuple[Stage, ...] = ("train", "sanity_check", "validate", "test", "predict")
_OF_VERB: dict[str, tuple[Stage, ...]] = {
    "fit": ("train", "sanity_check", "validate"),
    "validate": ("validate",),
    "test": ("test",),
    "predict": ("predict",),
}


class Timer(Callback):
    """Measure the time of each stage and stop training after ``duration``.

    Times are seconds of a monotonic clock. The stages are ``"train"`` (validation within it included),
    ``"sanity_check"``, ``"validate"``, ``"test"`` and ``"predict"``. A stage that runs several times within one
    verb, such as validation within `fit`, is added up; a new verb starts its stages at zero, except that
    a `fit` which resumes from a checkpoint goes on from the time stored there.

    Args:
        duration: limit of the training time: ``"DD:HH:MM:SS"``, a `timedelta`, a dict of its arguments such as
            ``{"hours": 1, "minutes": 30}``, or None for no limit.
        interval: look at the clock after each training batch (``"step"``) or each epoch (``"epoch"``).
        verbose: print when the time is over.
        clock: returns seconds; to be replaced in tests.

    Raises:
        ConfigurationError: ``duration`` or ``interval`` is not one of the above.
    """

    def __init__(
        self,
        duration: str | timedelta | Mapping[str, float] | None = None,
        interval: Literal["step", "epoch"] = "step",
        verbose: bool = True,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if interval not in ("step", "epoch"):
            reject("interval", interval, "'step' or 'epoch'")
        self.duration_s = None if duration is None else _seconds(duration)
        self.interval: Literal["step", "epoch"] = interval
        self.verbose = verbose
        self._clock = clock
        self._start: dict[Stage, float] = {}
        self._end: dict[Stage, float] = {}
        self._before: dict[Stage, float] = dict.fromkeys(_STAGES, 0.0)
        self._restored = False
        self._was_over = False

    def start_time(self, stage: Stage = "train") -> float | None:
        """When ``stage`` last began, in seconds of the clock; None if it has not."""
        return self._start.get(_known(stage))

    def end_time(self, stage: Stage = "train") -> float | None:
        """When ``stage`` last ended, in seconds of the clock; None if it has not or is running."""
        return self._end.get(_known(stage))

    def time_elapsed(self, stage: Stage = "train") -> float:
        """Seconds spent in ``stage``, those before a restart included."""
        return self._before[_known(stage)] + self._running(stage)

    def time_remaining(self, stage: Stage = "train") -> float | None:
        """Seconds left for ``stage``, never below 0; None without ``duration``."""
        _known(stage)
        return None if self.duration_s is None else max(0.0, self.duration_s - self.time_elapsed(stage))

    def state_dict(self) -> dict[str, Any]:
        """Seconds spent in each stage, and whether the time for training is over."""
        return {"time_elapsed": {stage: self.time_elapsed(stage) for stage in _STAGES}, "over": self._over()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from the seconds in ``state_dict``."""
        stored = state_dict.get("time_elapsed", {})
        for stage in _STAGES:
            self._before[stage] = float(stored.get(stage, 0.0))
        self._restored = True
        self._was_over = bool(state_dict.get("over", False))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the stages of this verb at zero, unless a checkpoint's state was just applied."""
        for own in _OF_VERB[stage]:
            if not self._restored:
                self._before[own] = 0.0
            self._start.pop(own, None)
            self._end.pop(own, None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End what an error left running."""
        for own in _OF_VERB[stage]:
            self._stop(own)
        self._restored = False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of ``sanity_check``."""
        self._begin("sanity_check")

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of ``sanity_check``."""
        self._stop("sanity_check")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of ``train``; a resumed run may have no time left, or have been given more."""
        self._begin("train")
        if self._was_over and not self._over():
            trainer.should_stop = False
        self._was_over = False
        self._check(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of ``train``."""
        self._stop("train")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of ``validate``."""
        if not trainer.sanity_checking:
            self._begin("validate")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of ``validate``."""
        if not trainer.sanity_checking:
            self._stop("validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of ``test``."""
        self._begin("test")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of ``test``."""
        self._stop("test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of ``predict``."""
        self._begin("predict")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of ``predict``."""
        self._stop("predict")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask for a stop if the time is over."""
        if self.interval == "step":
            self._check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for a stop if the time is over."""
        self._check(trainer)

    def _begin(self, stage: Stage) -> None:
        self._start[stage] = self._clock()
        self._end.pop(stage, None)

    def _stop(self, stage: Stage) -> None:
        if stage in self._start and stage not in self._end:
            self._before[stage] += self._running(stage)
            self._end[stage] = self._clock()

    def _running(self, stage: Stage) -> float:
        if stage not in self._start or stage in self._end:
            return 0.0
        return self._clock() - self._start[stage]

    def _over(self) -> bool:
        return self.duration_s is not None and self.time_elapsed("train") >= self.duration_s

    def _check(self, trainer: Trainer) -> None:
        if trainer.should_stop or self.duration_s is None or not self._over():
            return
        trainer.should_stop = True
        if self.verbose:
            limit, spent = timedelta(seconds=self.duration_s), timedelta(seconds=int(self.time_elapsed("train")))
            trainer.print(f"Timer: the limit of {limit} is reached after {spent} of training. Stopping.")


def _known(stage: Stage) -> Stage:
    if stage not in _STAGES:
        reject("stage", stage, f"one of {', '.join(map(repr, _STAGES))}.{did_you_mean(str(stage), _STAGES)}")
    return stage


def _seconds(duration: str | timedelta | Mapping[str, float]) -> float:
    allowed = "'DD:HH:MM:SS' such as '00:01:30:00', a timedelta, or a dict such as {'hours': 1, 'minutes': 30}; not < 0"
    span: timedelta | None = None
    if isinstance(duration, str):
        match = re.fullmatch(r"(\d+):(\d\d?):(\d\d?):(\d\d?)", duration.strip())
        if match:
            days, hours, minutes, seconds = map(int, match.groups())
            span = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    elif isinstance(duration, timedelta):
        span = duration
    elif isinstance(duration, Mapping):
        try:
            span = timedelta(**duration)
        except TypeError:  # an unknown unit, or a value that is not a number
            span = None
    if span is None or span < timedelta(0):
        reject("duration", duration, allowed)
    return span.total_seconds()
