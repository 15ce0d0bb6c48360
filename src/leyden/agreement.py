"""What one rank asks for, all ranks do, at the same step boundary: stops, saves at a signal, validations by the clock.

Ranks that train in step cannot act alone: one that leaves the loop, or saves, leaves the others waiting in a collective. So
wishes are kept, and compared at boundaries that all ranks have in common: at the end of an epoch, after a validation, and
within an epoch about four times a second, counted in batches, so that all ranks come to the same boundary. One small
collective over the host's own group does it; no device is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from leyden.run import Run
    from leyden.strategy import Strategy

_EVERY_S = 0.25
_MOST_BATCHES = 100  # fast batches may turn slow, and a scheduler that takes a machine away waits for seconds


class Agreement:
    """The wishes of one rank, and the comparing.

    Args:
        strategy: by which the ranks talk.
        requests: what can be asked for, in the same order on each rank; more can be added.
    """

    def __init__(self, strategy: Strategy, requests: list[Callable[[], None]]) -> None:
        self._strategy = strategy
        self._requests = requests
        self._asked: set[int] = set()
        self.stop_wished = False
        self._due_at: float = 1 if strategy.in_step else float("inf")
        self._last = (0, 0.0)  # batches, and the time then

    def add(self, request: Callable[[], None]) -> Callable[[], None]:
        """Return what asks for ``request`` on all ranks; to be called by all of them, in the same order."""
        self._requests.append(request)
        return partial(self.ask, len(self._requests) - 1)

    def ask(self, index: int) -> None:
        """Wish that all ranks serve a request at the next boundary where they compare."""
        self._asked.add(index)

    def is_due(self, batches: int) -> bool:
        """Whether wishes are to be compared after so many batches; the same on each rank."""
        return batches >= self._due_at

    def reach(self, run: Run) -> None:
        """Compare wishes with the other ranks, and take over what any of them has asked for. A collective."""
        batches, now = run.progress.total_batches, time.monotonic()
        before, then = self._last
        per_batch_ns = int((now - then) / (batches - before) * 1e9) if then and batches > before else 0
        mine = [
            int(self.stop_wished),
            per_batch_ns,
            *(int(index in self._asked) for index in range(len(self._requests))),
        ]
        stop, slowest_ns, *asked = self._strategy.highest(mine)
        self._asked.clear()
        if self._strategy.in_step:
            # nothing is known at first: the next but one boundary tells how long a batch takes
            ahead = int(_EVERY_S * 1e9 / slowest_ns) if slowest_ns else 1
            self._due_at = batches + max(1, min(_MOST_BATCHES, ahead))
        self._last = batches, now
        run.should_stop = run.should_stop or bool(stop)
        self.stop_wished = False
        run.requests += [self._requests[index] for index, wanted in enumerate(asked) if wanted]

    def any(self, answer: bool) -> bool:
        """Whether any rank says yes. A collective."""
        return bool(self._strategy.highest([int(answer)])[0])
