"""How long a GPU works at a step: a few steps of each log interval are sampled, and nobody waits for the answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from leyden.errors import LeydenError

if TYPE_CHECKING:
    from leyden.run import Run

# After a flush the device has nothing to do, and its first batches measure how fast the host hands them over.
SKIPPED_BATCHES = 4
SAMPLED_BATCHES = 2  # per interval: with 50 steps in each, about 4 % of all


class Event(Protocol):
    """What is needed of `torch.cuda.Event`."""

    def record(self) -> None:
        """Note the time at which the device gets here."""

    def query(self) -> bool:
        """Whether it did."""

    def elapsed_time(self, end: Event, /) -> float:
        """Milliseconds from here to there."""


class DeviceTime:
    """Samples of the device's time, from forward's first operation to backward's last, and from there to the step's end.

    For the batches that are sampled, and only for them, it listens to the run's hooks. Between two events the device may have
    been idle, where the host is slower than it: then the time is that of the host.

    Args:
        run: whose hooks to listen to.
        make_event: makes an event that can be timed; default: one of CUDA.
    """

    __slots__ = (
        "_events", "_make_event", "_pending", "_run", "_seen", "_step", "batches", "compute_s", "optimizer_s", "steps",
    )  # fmt: skip

    def __init__(self, run: Run, make_event: Callable[[], Any] | None = None) -> None:
        self._run = run
        self._make_event: Callable[[], Any] = make_event or partial(torch.cuda.Event, enable_timing=True)
        self._seen = self._step = 0
        self._events: list[Event] = []  # of the present batch: its start, the end of backward
        self._pending: list[tuple[Event, Event, Event, bool]] = []
        self.batches = self.steps = 0
        """Batches and steps that were sampled."""
        self.compute_s = self.optimizer_s = 0.0
        """Seconds of forward and backward over these batches; of the optimizer over these steps."""

    def sample(self) -> None:
        """Sample some of the batches to come, unless that is under way."""
        hooks = self._run.hooks
        if self._begin in hooks.on_train_batch_start or self._pending:
            return
        self._seen, self._events = 0, []
        hooks.on_train_batch_start = (*hooks.on_train_batch_start, self._begin)
        hooks.on_after_backward = (self._computed, *hooks.on_after_backward)
        hooks.on_train_batch_end = (self._end, *hooks.on_train_batch_end)

    def collect(self) -> None:
        """Read the samples that the device has passed; the others stay for the next time."""
        while self._pending and self._pending[0][2].query():
            began, computed, ended, stepped = self._pending.pop(0)
            self.batches += 1
            self.compute_s += began.elapsed_time(computed) / 1e3
            if stepped:
                self.steps += 1
                self.optimizer_s += computed.elapsed_time(ended) / 1e3

    def estimate(self, batches: int, steps: int) -> float:
        """Estimate the device's seconds in a number of batches and steps; 0 if nothing was sampled."""
        compute_s = batches * self.compute_s / self.batches if self.batches else 0.0
        return compute_s + (steps * self.optimizer_s / self.steps if self.steps else 0.0)

    def __str__(self) -> str:
        if not self.batches:
            raise LeydenError("Nothing was sampled on the device.")
        text = f"on the device: {self.compute_s / self.batches * 1e3:.3g} ms forward and backward per batch"
        if self.steps:
            text += f", {self.optimizer_s / self.steps * 1e3:.3g} ms optimizer per step"
        return f"{text} ({self.batches} batches sampled)"

    def _begin(self, batch: Any, batch_idx: int) -> None:
        self._seen += 1
        if self._seen > SKIPPED_BATCHES:
            self._events = [self._recorded()]
            self._step = self._run.progress.global_step

    def _computed(self) -> None:
        if self._events:
            self._events = [self._events[0], self._recorded()]

    def _end(self, output: Any, batch: Any, batch_idx: int) -> None:
        stepped = self._run.progress.global_step > self._step
        if len(self._events) == 2:
            self._pending.append((self._events[0], self._events[1], self._recorded(), stepped))
        elif self._events and stepped:  # a step that is one graph: its backward has no end of its own
            ended = self._recorded()
            self._pending.append((self._events[0], ended, ended, stepped))
        self._events = []
        if self._seen >= SKIPPED_BATCHES + SAMPLED_BATCHES:
            self._leave()

    def _leave(self) -> None:
        hooks = self._run.hooks
        hooks.on_train_batch_start = tuple(hook for hook in hooks.on_train_batch_start if hook != self._begin)
        hooks.on_after_backward = tuple(hook for hook in hooks.on_after_backward if hook != self._computed)
        hooks.on_train_batch_end = tuple(hook for hook in hooks.on_train_batch_end if hook != self._end)

    def _recorded(self) -> Event:
        event: Event = self._make_event()
        event.record()
        return event
