"""How often and how long: wall time by action."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from leyden.profilers.profiler import Profiler, not_started


class SimpleProfiler(Profiler):
    """Counts the calls of each action and adds up their time on the host.

    A device works on after the host has returned, so kernels show up where the host waits for them; for times on
    the device take `PyTorchProfiler`. An action's time includes that of the actions inside of it.

    Args:
        dirpath: see `Profiler`.
        filename: see `Profiler`.
        clock: returns the time in seconds; default `time.perf_counter`.

    Attributes:
        counts: calls of each action since the verb began.
        totals: seconds of each action.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(dirpath, filename)
        self._clock = clock
        self._begin()

    def _begin(self) -> None:
        self.counts: dict[str, int] = {}
        self.totals: dict[str, float] = {}
        self._running: dict[str, list[float]] = {}
        self._ended: float | None = None
        self._began = self._clock()

    def setup(self, stage: str, log_dir: str | None) -> None:
        """Start at zero."""
        super().setup(stage, log_dir)
        self._begin()

    def teardown(self, stage: str) -> None:
        """Note the time."""
        self._ended = self._clock()

    def start(self, action: str) -> None:
        """Note the time."""
        self._running.setdefault(action, []).append(self._clock())

    def stop(self, action: str) -> None:
        """Add the time since the action's last start."""
        now, starts = self._clock(), self._running.get(action)
        if not starts:
            raise not_started(action)
        self.totals[action] = self.totals.get(action, 0.0) + now - starts.pop()
        self.counts[action] = self.counts.get(action, 0) + 1

    def summary(self) -> str:
        """Return a table of the actions, the longest first."""
        if not self.totals:
            return ""
        whole = (self._clock() if self._ended is None else self._ended) - self._began
        width = max(len("action"), *map(len, self.totals))
        lines = [
            f"{self._stage or 'run'}: {whole:.3f} s on the host; an action includes those inside of it",
            f"{'action':<{width}}  {'calls':>8}  {'total (s)':>10}  {'mean (ms)':>10}  {'%':>6}",
        ]
        for action in sorted(self.totals, key=lambda name: -self.totals[name]):
            total, count = self.totals[action], self.counts[action]
            share = 100 * total / whole if whole > 0 else 0.0
            lines.append(f"{action:<{width}}  {count:>8}  {total:>10.3f}  {1000 * total / count:>10.3f}  {share:>6.1f}")
        return "\n".join(lines)
