"""Shows how far a run is: bars in a terminal or a notebook, plain lines in a pipe or a file."""

from __future__ import annotations

import math
import time
from abc import ABC
from collections import deque
from typing import TYPE_CHECKING, Any

from leyden.callbacks.callback import Callback
from leyden.callbacks.progress_view import Bar, MetricValue, View, choose_view, duration, metrics_text
from leyden.errors import LeydenError, reject

if TYPE_CHECKING:
    from rich.console import Console

    from leyden.module import LightningModule
    from leyden.trainer import Trainer

# A refresh that costs c seconds is followed by 50 c without one: at most 2 % of the time goes into drawing.
_PAUSE_PER_COST = 50
# The speed shown is that of the last refreshes, so that a slow start is forgotten.
_SPEED_WINDOW = 30


class ProgressBar(Callback, ABC):
    """Base of callbacks that show progress; the trainer has at most one of them.

    Subclass it, and override the hooks you need, for a bar of your own.
    """

    def __init__(self) -> None:
        self._is_enabled = True
        self._trainer: Trainer | None = None

    @property
    def is_enabled(self) -> bool:
        """Whether progress is shown."""
        return self._is_enabled

    @property
    def is_disabled(self) -> bool:
        """Whether progress is not shown."""
        return not self._is_enabled

    @property
    def trainer(self) -> Trainer:
        """The trainer whose progress is shown; set when a verb begins."""
        if self._trainer is None:
            raise LeydenError("The progress bar has no trainer before fit, validate, test or predict has begun.")
        return self._trainer

    @property
    def total_train_batches(self) -> int | float:
        """Number of training batches in an epoch, ``inf`` if unknown."""
        return self.trainer.num_training_batches

    @property
    def total_val_batches(self) -> int | float:
        """Number of batches in one validation, over all loaders, ``inf`` if unknown."""
        trainer = self.trainer
        return sum(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)

    @property
    def total_test_batches(self) -> int | float:
        """Number of batches in a test, over all loaders, ``inf`` if unknown."""
        return sum(self.trainer.num_test_batches)

    @property
    def total_predict_batches(self) -> int | float:
        """Number of batches to predict, over all loaders, ``inf`` if unknown."""
        return sum(self.trainer.num_predict_batches)

    def enable(self) -> None:
        """Show progress from the next verb on."""
        self._is_enabled = True

    def disable(self) -> None:
        """Show nothing, from now on."""
        self._is_enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print without disturbing what is shown; arguments as in the builtin."""
        print(*args, **kwargs)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, MetricValue]:
        """The values shown beside the bar: what was logged with ``prog_bar=True``. Override to change them.

        It is called only when something is about to be drawn, because reading the values waits for the device.
        """
        return dict(trainer.progress_bar_metrics)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the trainer."""
        self._trainer = trainer


class _Pass:
    """One pass over the data: how many batches, in how much time without interruptions."""

    __slots__ = ("_busy_s", "_marks", "_since", "label", "position", "seen", "total")

    def __init__(self, label: str, total: int | float, now: float) -> None:
        self.label = label
        self.total = total
        self.seen = 0
        # Where in the epoch; ahead of `seen` after a restart within the epoch.
        self.position = 0
        self._busy_s = 0.0
        self._since: float | None = now
        self._marks: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=_SPEED_WINDOW)

    def pause(self, now: float) -> None:
        if self._since is not None:
            self._busy_s += now - self._since
            self._since = None

    def resume(self, now: float) -> None:
        if self._since is None:
            self._since = now

    def elapsed_s(self, now: float) -> float:
        return self._busy_s + (now - self._since if self._since is not None else 0.0)

    def bar(self, now: float, metrics: dict[str, MetricValue]) -> Bar:
        elapsed_s = self.elapsed_s(now)
        then_s, then_seen = self._marks[0]
        passed_s, done = elapsed_s - then_s, self.seen - then_seen
        if self._marks[-1][1] != self.seen:
            self._marks.append((elapsed_s, self.seen))
        rate = done / passed_s if done and passed_s > 0 else None
        return Bar(self.label, self.position, self.total, rate, metrics)

    def summary(self, now: float) -> str:
        elapsed_s = self.elapsed_s(now)
        rate = self.seen / elapsed_s if elapsed_s > 0 else None
        bar = Bar(self.label, self.position, self.total, rate, {})
        parts = [self.label, f"{bar.count} batches", duration(elapsed_s), bar.speed]
        return "  ".join(part for part in parts if part)


class RichProgressBar(ProgressBar):
    """The default: what it draws depends on where the standard output leads.

    - Terminal: a live bar with batches, speed, remaining time and metrics, another below it during
      validation, and one line that stays for each finished epoch.
    - Notebook: the same as text that is updated in place.
    - Pipe or file: one plain line for each epoch, and in long epochs one every ``line_interval_s``.

    After `validate` and `test` their metrics are shown. Between two refreshes a batch costs a counter and a
    look at the clock; no thread runs beside the training.

    Args:
        refresh_rate_s: seconds between two refreshes of a live display. Refreshes that are slow become rarer,
            so that drawing takes at most 2 % of the time.
        line_interval_s: seconds between two lines within an epoch, in a pipe or a file.
        console: the `rich.console.Console` to draw on; by default the standard output.

    Raises:
        ConfigurationError: if an interval is not positive.
    """

    def __init__(
        self, refresh_rate_s: float = 0.1, line_interval_s: float = 30.0, console: Console | None = None
    ) -> None:
        super().__init__()
        for argument, value in (("refresh_rate_s", refresh_rate_s), ("line_interval_s", line_interval_s)):
            if not value > 0:
                reject(argument, value, "a positive number of seconds")
        self.refresh_rate_s = refresh_rate_s
        self.line_interval_s = line_interval_s
        self._console = console
        self._clock = time.monotonic
        self._verb = ""
        self._view: View | None = None
        self._due_s = math.inf
        self._lines: list[str] = []
        self._lines_due_s = -math.inf
        # A pass without a label stands for none, so that counting asks no question.
        self._train = _Pass("", 0, 0.0)
        self._finished: _Pass | None = None
        self._evaluation = _Pass("", 0, 0.0)
        self._evaluation_is_shown = False

    def disable(self) -> None:
        """Show nothing, from now on."""
        super().disable()
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bars; arguments as in the builtin."""
        if self._view is None or kwargs.keys() - {"sep"}:
            print(*args, **kwargs)
        else:
            self._flush_lines(self._clock())
            separator = kwargs.get("sep")
            self._view.write((" " if separator is None else separator).join(str(argument) for argument in args))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the surface."""
        super().setup(trainer, pl_module, stage)
        self._close()
        self._verb = stage
        if self.is_enabled and trainer.is_global_zero:
            self._view = choose_view(self._console, self.refresh_rate_s, self.line_interval_s)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the terminal clean."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say where the run ended, and leave the terminal clean before the traceback is printed."""
        if self._view is not None:
            now = self._clock()
            current = self._evaluation if self._evaluation.label else self._train
            if current.label:
                self._lines.append(f"{current.summary(now)}  {type(exception).__name__}")
        self._close()

    # fit

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch's bar."""
        self._write_finished(trainer, pl_module)
        last = trainer.max_epochs
        of = f"/{last}" if last is not None and last > 0 else ""
        self._train = _Pass(f"epoch {trainer.current_epoch + 1}{of}", trainer.num_training_batches, self._clock())
        self._begin(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; draw if it is time."""
        train = self._train
        train.seen += 1
        train.position = batch_idx + 1
        if self._clock() >= self._due_s:
            self._refresh(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the epoch's line written once the module, too, has logged what it logs at an epoch's end."""
        if self._view is not None:
            self._train.pause(self._clock())
            self._finished = self._train
            trainer.at_step_boundary(lambda: self._write_finished(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is left to write, and remove the bar."""
        self._write_finished(trainer, pl_module)
        self._close()

    # validate

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the validation's bar."""
        label = "sanity check" if trainer.sanity_checking else "validation"
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._begin_evaluation(trainer, pl_module, label, batches)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count; draw if it is time."""
        self._count_evaluation(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the validation's bar; after `validate`, show the results."""
        self._end_evaluation(trainer, pl_module)

    # test and predict

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the test's bar."""
        self._begin_evaluation(trainer, pl_module, "test", trainer.num_test_batches)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count; draw if it is time."""
        self._count_evaluation(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the bar and show the results."""
        self._end_evaluation(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the prediction's bar."""
        self._begin_evaluation(trainer, pl_module, "predict", trainer.num_predict_batches)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count; draw if it is time."""
        self._count_evaluation(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the bar and write one line."""
        self._end_evaluation(trainer, pl_module)

    # what the hooks share

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        view = self._view
        if view is None:
            return
        now = self._clock()
        if not view.is_live:
            # Lines keep their interval while a validation interrupts the epoch.
            if self._verb != "fit" or not self._evaluation.label:
                self._due_s = now + view.interval_s
        elif now >= self._due_s or self._due_s == math.inf:
            self._refresh(trainer, pl_module)

    def _begin_evaluation(
        self, trainer: Trainer, pl_module: LightningModule, label: str, batches: list[int | float]
    ) -> None:
        now = self._clock()
        self._train.pause(now)
        self._evaluation = _Pass(label, sum(batches), now)
        self._begin(trainer, pl_module)

    def _count_evaluation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        evaluation = self._evaluation
        evaluation.seen += 1
        evaluation.position += 1
        if self._clock() >= self._due_s:
            self._refresh(trainer, pl_module)

    def _end_evaluation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        evaluation, self._evaluation = self._evaluation, _Pass("", 0, 0.0)
        now = self._clock()
        self._train.resume(now)
        view = self._view
        if view is None or not evaluation.label:
            return
        if self._verb == "fit":
            # A bar that was never drawn need not be removed.
            if self._evaluation_is_shown:
                self._refresh(trainer, pl_module)
            return
        view.close()
        metrics: dict[str, MetricValue] = {}
        if self._verb != "predict":
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        view.results(evaluation.summary(now), self._verb, metrics)

    def _refresh(self, trainer: Trainer, pl_module: LightningModule) -> None:
        view = self._view
        if view is None:
            self._due_s = math.inf
            return
        started = self._clock()
        self._flush_lines(started)
        metrics = self.get_metrics(trainer, pl_module)
        bars = []
        if self._verb == "fit" and self._train.label and self._finished is None:
            bars.append(self._train.bar(started, metrics))
        if self._evaluation.label:
            bars.append(self._evaluation.bar(started, {} if bars else metrics))
        view.show(bars)
        self._evaluation_is_shown = view.is_live and bool(self._evaluation.label)
        now = self._clock()
        self._due_s = now + max(view.interval_s, _PAUSE_PER_COST * (now - started))

    def _write_finished(self, trainer: Trainer, pl_module: LightningModule) -> None:
        finished, self._finished = self._finished, None
        if finished is None or self._view is None:
            return
        now = self._clock()
        metrics = metrics_text(self.get_metrics(trainer, pl_module))
        self._lines.append("  ".join(part for part in (finished.summary(now), metrics) if part))
        if not self._view.is_live or now >= self._lines_due_s:
            self._flush_lines(now)

    def _flush_lines(self, now: float) -> None:
        """Write finished lines; a live display takes milliseconds for it, which short epochs share."""
        if self._lines and self._view is not None:
            lines, self._lines = self._lines, []
            self._view.write("\n".join(lines))
            done = self._clock()
            self._lines_due_s = done + max(self._view.interval_s, _PAUSE_PER_COST * (done - now))

    def _close(self) -> None:
        if self._view is not None:
            self._flush_lines(self._clock())
            self._view.close()
        self._view = None
        self._due_s = math.inf
        self._lines = []
        self._lines_due_s = -math.inf
        self._train = _Pass("", 0, 0.0)
        self._finished = None
        self._evaluation = _Pass("", 0, 0.0)
        self._evaluation_is_shown = False
