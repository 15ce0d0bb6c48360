"""Which operations and kernels: torch's profiler, with a trace to look at."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from leyden.errors import ConfigurationError, did_you_mean, reject
from leyden.profilers.profiler import Profiler, not_started

_OWN = ("activities", "schedule", "on_trace_ready")
_COLUMNS = tuple(
    f"{own}{device}_{what}"
    for what in ("time_total", "memory_usage")
    for own in ("", "self_")
    for device in ("cpu", "device", "cuda", "xpu")
)
_SORTABLE = (*_COLUMNS, "cpu_time", "device_time", "cuda_time", "xpu_time", "count", "flops")


class PyTorchProfiler(Profiler):
    """Runs `torch.profiler.profile`: operations, device kernels and the Trainer's actions on one time line.

    A step of the schedule is a batch: of training in `fit`, else of the evaluation. Each recorded cycle gives a Chrome trace,
    ``{verb}-trace.{n}.pt.trace.json`` in the log folder, for https://ui.perfetto.dev or chrome://tracing. The ending is that
    which TensorBoard's profiler plugin (torch-tb-profiler) looks for in ``--logdir``; the cycles of one verb are then the
    spans of one worker.

    Args:
        dirpath: the folder of traces and report; default: the run's log folder.
        filename: see `Profiler`; also of the traces, instead of ``trace``.
        schedule: what torch's profiler does at each step; default: one batch passed over, one to warm up, three
            recorded, once.
        activities: default: the CPU, and CUDA where it is there.
        sort_by: the column of torch's table that the report is sorted by; default: time on the device, or the CPU.
        row_limit: rows of the report; -1 for all.
        on_trace_ready: called with torch's profiler after each recorded cycle, when its trace is written.
        **torch_options: further arguments of `torch.profiler.profile`, such as ``record_shapes``, ``profile_memory``,
            ``with_flops`` and ``with_stack``; the report has columns for memory and FLOPs then.

    Attributes:
        traces: the files written since the verb began.

    Raises:
        ConfigurationError: for an option that `torch.profiler.profile` does not know, a column that its table does not have, and
            other arguments that would only fail when the trace is there.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        schedule: Callable[[int], Any] | None = None,
        activities: list[ProfilerActivity] | None = None,
        sort_by: str | None = None,
        row_limit: int = 20,
        on_trace_ready: Callable[[profile], object] | None = None,
        **torch_options: Any,
    ) -> None:
        super().__init__(dirpath, filename)
        known = [name for name in inspect.signature(profile.__init__).parameters if name not in ("self", *_OWN)]
        for option in torch_options:
            if option not in known:
                raise ConfigurationError(
                    f"PyTorchProfiler({option}=…): torch.profiler.profile has no such option. "
                    f"Allowed: {', '.join(known)}.{did_you_mean(option, known)}"
                )
        if sort_by is not None and sort_by not in _SORTABLE:
            reject("sort_by", sort_by, ", ".join(map(repr, _SORTABLE)), did_you_mean(str(sort_by), _SORTABLE))
        if type(row_limit) is not int or row_limit < -1:
            reject("row_limit", row_limit, "an integer ≥ 0, or -1 for all rows")
        for name, value in (("schedule", schedule), ("on_trace_ready", on_trace_ready)):
            if value is not None and not callable(value):
                reject(
                    name,
                    value,
                    "a function; torch.profiler.schedule(...) makes a schedule" if name == "schedule" else "a function",
                )
        self._on_trace_ready = on_trace_ready
        self._schedule = schedule or _one_cycle()
        self._activities = activities or [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if _has_cuda() else [])]
        self._sort_by = sort_by or ("device_time_total" if _has_cuda() else "cpu_time_total")
        self._row_limit = row_limit
        self._options = torch_options
        self._torch: profile | None = None
        self._begin()

    def _begin(self) -> None:
        self.traces: list[Path] = []
        self._tables: list[str] = []
        self._open: list[tuple[str, record_function]] = []
        self._steps = 0
        self._failure: Exception | None = None

    def setup(self, stage: str, log_dir: str | None) -> None:
        """Start torch's profiler, at step 0 of its schedule."""
        super().setup(stage, log_dir)
        self._begin()
        self._torch = profile(
            activities=self._activities, schedule=self._schedule, on_trace_ready=self._keep, **self._options
        )
        self._torch.start()

    def teardown(self, stage: str) -> None:
        """Stop torch's profiler; a cycle that is not complete is kept as well."""
        while self._open:
            self._open.pop()[1].__exit__(None, None, None)
        torch_profiler, self._torch = self._torch, None
        if torch_profiler is not None:
            torch_profiler.stop()
            self._raise_failure()

    def start(self, action: str) -> None:
        """Open a range in the trace."""
        opened = record_function(action)
        opened.__enter__()  # type: ignore[no-untyped-call]
        self._open.append((action, opened))

    def stop(self, action: str) -> None:
        """Close the range, and those that an error left open inside of it."""
        if all(name != action for name, _ in self._open):
            raise not_started(action)
        name = ""
        while name != action:
            name, opened = self._open.pop()
            opened.__exit__(None, None, None)

    def step(self) -> None:
        """Go on to the next step of the schedule."""
        torch_profiler, self._torch = self._torch, None
        if torch_profiler is None:
            return
        self._steps += 1
        with warnings.catch_warnings():
            # torch forgets a cycle when the next begins; by then it is kept here
            warnings.filterwarnings("ignore", message=".*clears events at the end of each cycle")
            torch_profiler.step()
        self._torch = torch_profiler  # not if it raised: stopping it in that state can crash the process
        self._raise_failure()

    def summary(self) -> str:
        """Return torch's table of each cycle, and where its trace is."""
        if self._stage is not None and not self._tables and self._torch is None:
            return f"PyTorchProfiler: {self._steps} batches ran, of which the schedule recorded none."
        return "\n\n".join(self._tables)

    def _keep(self, torch_profiler: profile) -> None:
        try:
            self._write(torch_profiler)
            if self._on_trace_ready is not None:
                self._on_trace_ready(torch_profiler)
        except Exception as error:  # noqa: BLE001 nothing is swallowed
            self._failure = error  # raised when torch's profiler is in a state that it can go on from

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write(self, torch_profiler: profile) -> None:
        table = torch_profiler.key_averages().table(sort_by=self._sort_by, row_limit=self._row_limit)
        folder = self._dirpath if self._dirpath is not None else self._log_dir
        if folder is not None:
            path = Path(folder, self._file(f"{len(self.traces)}.pt.trace.json", "trace"))
            path.parent.mkdir(parents=True, exist_ok=True)
            torch_profiler.export_chrome_trace(str(path))
            self.traces.append(path)
            table += f"Trace: {path}"
        self._tables.append(table)


def _one_cycle() -> Callable[[int], Any]:
    return schedule(wait=1, warmup=1, active=3, repeat=1)


def _has_cuda() -> bool:
    return torch.cuda.is_available()
