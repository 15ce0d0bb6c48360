"""How fast: samples and tokens per second, time per batch, and what share of the device's peak that is."""

from __future__ import annotations

import os
import time
from array import array
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch

from leyden.errors import reject
from leyden.flops import Flops, Load, Workload, begins_as_graph
from leyden.profilers.profiler import Profiler
from leyden.throughput import Rates, check_peak, compute_dtype, device_name, make_rates, peak_flops

_LEFT_OUT = ("validation", "sanity_check")
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


class _HostClock:
    """Marks are times of the host."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.mark: Callable[[], Any] = now

    def is_reached(self, mark: Any) -> bool:
        return True

    def between(self, first: Any, last: Any) -> float:
        return float(last - first)


class _DeviceClock:
    """Marks are events in the device's queue, which are read once it has passed them: the loop waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def is_reached(self, mark: Any) -> bool:
        return bool(mark.query())

    def between(self, first: Any, last: Any) -> float:
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000


class _Span(NamedTuple):
    """From the end of one batch to the end of the next."""

    first: Any
    last: Any
    pauses: list[tuple[Any, Any]]


class ThroughputProfiler(Profiler):
    """Measures rates: batches, samples and tokens per second, FLOP/s, model FLOP utilisation (MFU), and the time per batch.

    Nothing is wrapped but the beginning and end of batches. The time of a batch goes from the end of the one before to its own
    end, so waiting for data, logging and saving are in it; validation within `fit` is not. On a CUDA device the times are those
    of events in its queue, so they are the device's own, and nothing waits for it. FLOPs are those of training, and counted
    while the first batch is trained on; see `leyden.callbacks.ThroughputMonitor` for what counts. That callback logs the
    same rates while the run goes on.

    Args:
        dirpath: see `Profiler`.
        filename: see `Profiler`.
        batch_size_fn: samples of a batch; default: the size of dim 0 of its first tensor (`batch_size_of`).
        length_fn: tokens, or other items, of a whole batch.
        flops: floating point operations of a training batch, forward and backward: a number, a function of the batch, None
            to take the module's attribute ``flops_per_batch`` or else to count, or False to do without.
        peak_flops: of the device, in FLOP/s; None looks it up (`leyden.throughput.peak_flops`).
        warmup: how many batches at the beginning are left out, ≥ 1: the first one has no batch before it.
        clock: returns the time in seconds, for devices other than CUDA's; default `time.perf_counter`.

    Attributes:
        batch_times: seconds of each batch after the warm-up, in order.

    Raises:
        ConfigurationError: for arguments of another kind.
    """

    wants_actions: ClassVar[bool] = False

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        length_fn: Callable[[Any], int] | None = None,
        flops: Flops = None,
        peak_flops: float | None = None,
        warmup: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(dirpath, filename)
        check_peak(peak_flops)
        if type(warmup) is not int or warmup < 1:
            reject("warmup", warmup, "a number of batches, an integer ≥ 1")
        self._workload = Workload(batch_size_fn, length_fn, flops)
        self._given_peak = peak_flops
        self._warmup = warmup
        self._host = clock
        self._begin()

    def _begin(self) -> None:
        self.batch_times = array("d")  # 8 bytes per batch
        self._clock: _HostClock | _DeviceClock = _HostClock(self._host)
        self._peak, self._device = self._given_peak, ""
        self._trainer: Any = None
        self._batches = 0
        self._timed: _Sum = _Sum()
        self._last: Any = None
        self._pauses: list[tuple[Any, Any]] = []
        self._pause: Any = None
        self._open: deque[_Span] = deque()

    def setup(self, stage: str, log_dir: str | None) -> None:
        """Forget what was measured before."""
        super().setup(stage, log_dir)
        self._begin()
        self._workload.flops_per_unit = None

    def begin(self, module: Any) -> None:
        """Find out where the run computes, and the peak of that device."""
        device, dtype = module.trainer.device, compute_dtype(module, module.trainer.precision)
        if device.type == "cuda":
            self._clock = _DeviceClock(device)
        self._trainer = module.trainer
        self._device = f"{device_name(device)}, {str(dtype).removeprefix('torch.')}"
        if self._peak is None:
            self._peak = peak_flops(device, dtype)
        if self._stage == "fit":
            self._workload.prepare(module)

    def begin_batch(self, batch: Any) -> None:
        """Count the operations of the first batch."""
        if self._workload.counts_next:
            self._workload.before_batch(begins_as_graph(self._trainer))

    def end_batch(self, batch: Any) -> None:
        """Note what was done, and when."""
        load, mark = self._workload.after_batch(batch, trained=self._stage == "fit"), self._clock.mark()
        self._batches += 1
        if self._batches > self._warmup:
            self._timed.add(load)
            self._open.append(_Span(self._last, mark, self._pauses))
        self._last, self._pauses = mark, []
        while self._open and self._clock.is_reached(self._open[0].last):
            self._settle()

    def start(self, action: str) -> None:
        """Halt the clock where validation interrupts training."""
        if self._stage == "fit" and action in _LEFT_OUT:
            self._pause = self._clock.mark()

    def stop(self, action: str) -> None:
        """Let the clock go on."""
        if self._pause is not None and action in _LEFT_OUT:
            self._pauses.append((self._pause, self._clock.mark()))
            self._pause = None

    def teardown(self, stage: str) -> None:
        """Wait for the times of the last batches."""
        self._workload.abandon()
        self._trainer = None
        while self._open:
            self._settle()

    def _settle(self) -> None:
        span, between = self._open.popleft(), self._clock.between
        self.batch_times.append(between(span.first, span.last) - sum(between(*pause) for pause in span.pauses))

    def rates(self) -> Rates | None:
        """Return the rates since the verb began, without the warm-up; None if nothing was measured."""
        seconds = sum(self.batch_times)
        if not seconds > 0:
            return None
        done = self._timed
        return make_rates(seconds, done.batches, done.samples, done.tokens, done.flops, self._peak)

    def summary(self) -> str:
        """Return a table of the rates."""
        rates, done = self.rates(), self._timed
        if rates is None:
            return (
                f"ThroughputProfiler: {self._batches} batches ran, the first {self._warmup} of which are left out."
                if self._batches
                else ""
            )
        times = torch.tensor(self.batch_times, dtype=torch.float64) * 1000
        median, p95 = (float(times.quantile(share)) for share in (0.5, 0.95))
        rows = [("batches/s", f"{rates.batches_per_sec:,.2f}"), ("samples/s", f"{rates.samples_per_sec:,.1f}")]
        if rates.items_per_sec is not None:
            rows.append(("tokens/s", f"{rates.items_per_sec:,.1f}"))
        rows.append(("time per batch", f"median {median:,.3f} ms, 95 % below {p95:,.3f} ms"))
        if rates.flops_per_sec is not None and done.flops:
            rows.append(("FLOPs per sample", f"{_short(done.flops / done.samples)}, forward and backward"))
            rows.append(("FLOP/s", _short(rates.flops_per_sec)))
            rows.append(("MFU", self._utilisation(rates.mfu)))
        elif self._workload.why_not:
            rows.append(("FLOPs", self._workload.why_not))
        left_out = "without validation and the first" if self._stage == "fit" else "without the first"
        first = "batch" if self._warmup == 1 else f"{self._warmup} batches"
        head = f"{self._stage or 'run'}: {done.batches} batches in {sum(self.batch_times):.3f} s, {left_out} {first}"
        return "\n".join([head, *(f"{name:<16}  {value}" for name, value in rows)])

    def _utilisation(self, mfu: float | None) -> str:
        if mfu is None or self._peak is None:
            return f"the peak is not known ({self._device}); pass peak_flops=, in FLOP/s"
        return f"{100 * mfu:.1f} % of {_short(self._peak)}FLOP/s ({self._device})"


class _Sum:
    """What timed batches amount to together."""

    def __init__(self) -> None:
        self.batches = self.samples = 0
        self.tokens: int | None = 0
        self.flops: float | None = 0.0

    def add(self, load: Load) -> None:
        self.batches += 1
        self.samples += load.samples
        self.tokens = None if self.tokens is None or load.tokens is None else self.tokens + load.tokens
        self.flops = None if self.flops is None or load.flops is None else self.flops + load.flops


def _short(number: float) -> str:
    """``1.23 G`` for 1 230 000 000."""
    size, prefix = next((each for each in _PREFIXES if number >= each[0]), _PREFIXES[-1])
    return f"{number / size:.3g} {prefix}".rstrip() if number < 999.5e15 else f"{number:.3g}"
