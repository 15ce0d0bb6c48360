"""Log how much is trained per second, and what share of the device's peak that is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from leyden.callbacks.callback import Callback
from leyden.errors import ConfigurationError
from leyden.flops import Flops, Load, Workload, begins_as_graph
from leyden.throughput import Throughput, check_peak, compute_dtype, device_name, make_rates, peak_flops, wait_for

if TYPE_CHECKING:
    from leyden.module import LightningModule
    from leyden.trainer import Trainer


@dataclass
class _Totals:
    """What a stage has done."""

    time: float = 0.0
    batches: int = 0
    samples: int = 0
    lengths: int = 0

    def add(self, load: Load) -> None:
        self.batches += 1
        self.samples += load.samples
        self.lengths += load.tokens or 0


@dataclass
class _Stage:
    """A stage's totals, those of its part that was not logged yet, and its clock."""

    totals: _Totals = field(default_factory=_Totals)
    since: _Totals = field(default_factory=_Totals)
    flops: float | None = 0.0
    began: float | None = None

    def begin(self, now: float) -> None:
        self.since, self.flops, self.began = _Totals(), 0.0, now

    def add(self, load: Load) -> None:
        self.totals.add(load)
        self.since.add(load)
        self.flops = None if self.flops is None or load.flops is None else self.flops + load.flops

    def elapsed(self, now: float) -> float:
        return self.totals.time + (0.0 if self.began is None else now - self.began)

    def halt(self, now: float) -> float:
        """Stop the clock; return for how long it ran."""
        ran = 0.0 if self.began is None else now - self.began
        self.totals.time, self.began = self.totals.time + ran, None
        return ran


class ThroughputMonitor(Callback):
    """Log batches, samples and tokens per second, FLOP/s and model FLOP utilisation (MFU) to every logger of the trainer.

    The keys are those of Lightning's callback of this name. Rates, at each log step from the second on:
    ``train/device/batches_per_sec``, ``train/device/samples_per_sec``, ``train/device/items_per_sec`` (with ``length_fn``),
    ``train/device/flops_per_sec`` and ``train/device/mfu``. Totals: ``train/time`` (seconds of training, without validation),
    ``train/batches``, ``train/samples`` and ``train/lengths``; they go on after a resume. Validation, test and prediction have
    the same under ``validate/``, ``test/`` and ``predict/``, logged once at their end, without FLOPs. A batch of an accumulated
    window counts as a batch.

    **The clock.** It is read at log steps only, and nothing waits for the device in the loop: an asynchronous device works
    on after the host has returned, but at each log step the flush of logged values waits for it. Two readings just before a
    flush are therefore late by the same amount, and what lies between them is the true rate. Where the step logs no value
    there is no such flush, and the device's queue bounds the error. The first log step opens the window, so warming up is
    left out. The device is waited for where an evaluation begins and ends, twice per evaluation.

    **FLOPs** are counted while the first batch is trained on, by operation, and change nothing of it: a multiplication and
    an addition are two, and what is done element by element counts nothing. What an activation checkpoint computes again is
    counted too; to leave it out, pass ``flops``. MFU is FLOP/s divided by the device's peak (`leyden.throughput.peak_flops`).

    Args:
        batch_size_fn: samples of a batch; default: the size of dim 0 of its first tensor (`batch_size_of`).
        length_fn: tokens, or other items, of a whole batch.
        window_size: how many batches rates are taken over, at least; longer where log steps are further apart.
        separator: between the parts of a key.
        flops: floating point operations of a batch, forward and backward: a number, a function of the batch, None to take the
            module's attribute ``flops_per_batch`` or else to count, or False to do without.
        peak_flops: of the device, in FLOP/s; None looks it up. Where it is not known MFU is left out, and that is said once.
        clock: returns seconds; to be replaced in tests.

    Attributes:
        values: what was logged last, by key.

    Raises:
        ConfigurationError: for arguments of another kind, and when training starts without a logger.
        MetricError: if the number of samples in a batch cannot be found and there is no ``batch_size_fn``.
    """

    def __init__(
        self,
        batch_size_fn: Callable[[Any], int] | None = None,
        length_fn: Callable[[Any], int] | None = None,
        window_size: int = 100,
        separator: str = "/",
        flops: Flops = None,
        peak_flops: float | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        check_peak(peak_flops)
        self.separator = separator
        self.values: dict[str, float] = {}
        self._workload = Workload(batch_size_fn, length_fn, flops)
        self._has_lengths = length_fn is not None
        self._meter = Throughput(window_size)
        self._peak = peak_flops
        self._clock = clock
        self._stages: dict[str, _Stage] = {}
        self._dtype = torch.float32
        self._step = 0
        self._pauses = False  # whether the evaluation that runs now interrupts training
        self._said: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """The totals of each stage, and the operations that were counted."""
        now = self._clock()
        stages = {name: vars(stage.totals) | {"time": stage.elapsed(now)} for name, stage in self._stages.items()}
        return {"stages": stages, "flops_per_unit": self._workload.flops_per_unit}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the totals, and do not count operations again."""
        self._stages = {name: _Stage(_Totals(**totals)) for name, totals in state_dict["stages"].items()}
        self._workload.flops_per_unit = state_dict["flops_per_unit"]

    def start_anew(self) -> None:
        """Begin at zero."""
        self._stages = {}
        self._workload.flops_per_unit = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop what an error left running."""
        self._workload.abandon()
        for each in self._stages.values():
            each.halt(self._clock())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End counting before others clean up."""
        self._workload.abandon()

    # Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out the device's peak, and start the clock."""
        # fast_dev_run drops the loggers; it should still run the whole script
        if not trainer.loggers and not trainer.fast_dev_run:
            raise ConfigurationError(
                "ThroughputMonitor has nowhere to log to: the Trainer has no logger. "
                "Leave logger=False out, pass logger=[...], or remove the callback."
            )
        self._workload.prepare(pl_module)
        self._dtype = compute_dtype(pl_module, trainer.precision)
        peak = peak_flops(trainer.device, self._dtype) if self._peak is None else self._peak
        self._meter = Throughput(self._meter.window_size, peak)
        self._step, self._pauses = trainer.global_step, False
        self._stages.setdefault("train", _Stage()).begin(self._clock())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the operations of the first batch."""
        if self._workload.counts_next:
            self._workload.before_batch(begins_as_graph(trainer))
            if self._workload.why_not:
                self._say(trainer, f"FLOPs are {self._workload.why_not}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and log if this is the end of a step that is logged."""
        stage = self._stages["train"]
        stage.add(self._workload.after_batch(batch))
        step = trainer.global_step
        if step == self._step:  # a window of accumulated batches goes on
            return
        self._step = step
        if trainer.log_every_n_steps and step % trainer.log_every_n_steps == 0:
            self._log_training(trainer, stage)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stages["train"].halt(self._clock())

    def _log_training(self, trainer: Trainer, stage: _Stage) -> None:
        elapsed, since = stage.elapsed(self._clock()), stage.since
        lengths = since.lengths if self._has_lengths else None
        self._meter.add(elapsed, since.samples, lengths, stage.flops, since.batches)
        if stage.flops and self._meter.peak_flops is None:
            what = f"{device_name(trainer.device)} in {str(self._dtype).removeprefix('torch.')}"
            self._say(trainer, f"the peak of {what} is not known, so there is no mfu. Pass peak_flops=, in FLOP/s")
        stage.since, stage.flops = _Totals(), 0.0
        rates = self._meter.rates()
        self._log(trainer, "train", elapsed, {} if rates is None else rates.known())

    # Evaluation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of ``validate``, and stop that of training."""
        if not trainer.sanity_checking:
            self._begin("validate", trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch."""
        if not trainer.sanity_checking:
            self._stages["validate"].add(self._workload.after_batch(batch, trained=False))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, and let the clock of training go on."""
        if not trainer.sanity_checking:
            self._end("validate", trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of ``test``."""
        self._begin("test", trainer)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch."""
        self._stages["test"].add(self._workload.after_batch(batch, trained=False))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        self._end("test", trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of ``predict``."""
        self._begin("predict", trainer)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch."""
        self._stages["predict"].add(self._workload.after_batch(batch, trained=False))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        self._end("predict", trainer)

    def _begin(self, name: str, trainer: Trainer) -> None:
        wait_for(trainer.device)  # what it still has to do belongs to the training before
        now, training = self._clock(), self._stages.get("train")
        self._pauses = training is not None and training.began is not None
        if training is not None:
            training.halt(now)
        self._stages.setdefault(name, _Stage()).begin(now)

    def _end(self, name: str, trainer: Trainer) -> None:
        wait_for(trainer.device)  # the values of this evaluation are read next, which would wait as well
        now, stage = self._clock(), self._stages[name]
        since, seconds = stage.since, stage.halt(now)
        rates: dict[str, float] = {}
        if seconds > 0:
            lengths = since.lengths if self._has_lengths else None
            rates = make_rates(seconds, since.batches, since.samples, lengths, None, None).known()
        self._log(trainer, name, stage.totals.time, rates)
        if self._pauses:
            self._stages["train"].began = now

    def _log(self, trainer: Trainer, name: str, elapsed: float, rates: dict[str, float]) -> None:
        totals = self._stages[name].totals
        values = {f"device{self.separator}{key}": value for key, value in rates.items()}
        values |= {"time": elapsed, "batches": totals.batches, "samples": totals.samples}
        if self._has_lengths:
            values["lengths"] = totals.lengths
        self.values = {f"{name}{self.separator}{key}": value for key, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(self.values, trainer.global_step)

    def _say(self, trainer: Trainer, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            trainer.print(f"ThroughputMonitor: {what}.")
