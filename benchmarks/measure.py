"""How it is measured: contestants take turns, each in a process of its own; their calls are counted in this one.

Only one of them runs at any time: before a step it hands over, and goes on when it is its turn again. So they are compared
a fraction of a second after each other, each compiles once, and none finds the memory, the caches or the switches of torch
as another has left them. That matters: whether the allocator has to ask the system for memory in every step, which may
take half of it, depends on what else the process has allocated.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import itertools
import logging
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from contestants import Contestant, Run, own_contestants
from peers import peers
from workloads import WORKLOADS, Task, Workload

CALL_STEPS = (20, 100)
"""Two lengths of run: the slope of the number of calls between them leaves out what happens once."""
COMPILED_WARM_UP = 80
"""Steps after which compilers have compiled, and compile="auto" has chosen."""
_TAIL = 2
"""Steps after the last turn."""


class StepReachedError(Exception):
    """Raised by a step, to end a run of which only that one matters."""


class LaneError(Exception):
    """A run that failed, or ended before it should."""


class Screen(io.StringIO):
    """A terminal that nobody looks at: bars draw on it as they would for a user."""

    def write(self, text: str) -> int:
        return len(text)

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def off_screen() -> Iterator[None]:
    """Let bars and messages be made, but not shown."""
    with contextlib.redirect_stdout(Screen()), contextlib.redirect_stderr(Screen()):
        yield


def quiet_process() -> None:
    """One thread, no warnings, and a terminal of known width."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("COLUMNS", "120")
    os.environ.setdefault("TERM", "xterm-256color")


# In the process of a contestant


class Turns:
    """The clock of a task that waits before a step until it may make some more."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._left = 0
        self._went = 0.0

    def wait(self) -> None:
        """Wait for the number of steps of the next turn; a negative one means all that are left."""
        self._left = self._connection.recv()
        self._went = time.perf_counter()

    def end(self, message: str) -> None:
        """Say how many seconds it was since the last wait."""
        self._connection.send((message, time.perf_counter() - self._went))

    def tick(self) -> None:
        if self._left == 0:
            self.end("at")
            self.wait()
        self._left -= 1


def serve(connection: Connection, build: Callable[[Callable[[], None]], Run]) -> None:
    """Train in turns.

    Args:
        connection: to the `Lane`.
        build: prepares the run with the clock that it gets.
    """
    turns = Turns(connection)
    try:
        connection.send(("ready", 0.0))
        turns.wait()
        build(turns.tick)()
    except BaseException as error:  # noqa: BLE001  # who asks names it
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        with contextlib.suppress(OSError):
            connection.send(("failed", text))
        return
    turns.end("over")


def serve_contestant(connection: Connection, name: str, kind: str, steps: int, folder: Path) -> None:
    """What a contestant's process does."""
    quiet_process()
    os.chdir(folder)
    workload = WORKLOADS[kind]
    [contestant] = [one for one in (*own_contestants(), *peers()) if one.name == name]
    if contestant.package:
        os.environ.setdefault("KERAS_BACKEND", "torch")
        importlib.import_module(contestant.package)
    importlib.import_module("torch._dynamo")  # the first step of an optimizer imports it, in seconds
    data, task = workload.data(steps), workload.task()

    def build(tick: Callable[[], None]) -> Run:
        task.tick = tick
        return contestant.make(task, workload.loader(data), folder)

    with off_screen():
        serve(connection, build)


# In this process


class Lane:
    """A run that stops before a step until it is told to go on.

    Args:
        connection: to `serve`.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def wait_until_ready(self) -> None:
        """Wait until it could begin."""
        self._receive("ready")

    def advance(self, steps: int) -> float:
        """Let it make that many steps; return the seconds that they took.

        Raises:
            LaneError: if the run ended before, or failed.
        """
        self._connection.send(steps)
        return self._receive("at")

    def finish(self) -> float:
        """Let it run to its end; return the seconds that it took."""
        self._connection.send(-1)
        return self._receive("over")

    def _receive(self, expected: str) -> float:
        try:
            message, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise LaneError("its process ended") from error
        if message == expected:
            return float(value)
        raise LaneError(value if message == "failed" else "the run ended too early")


class OpenLane(Protocol):
    """Starts a contestant's run of that many steps, with its files in the folder."""

    def __call__(self, contestant: Contestant, steps: int, folder: Path) -> Lane: ...


@contextlib.contextmanager
def processes(kind: str) -> Iterator[OpenLane]:
    """Give what starts a fresh process for a contestant; the processes end with the context."""
    context = multiprocessing.get_context("spawn")
    started: list[Any] = []

    def open_lane(contestant: Contestant, steps: int, folder: Path) -> Lane:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve_contestant, args=(theirs, contestant.name, kind, steps, folder))
        started.append(process)
        process.start()
        theirs.close()
        return Lane(ours)

    try:
        yield open_lane
        for process in started:
            process.join(timeout=30)
    finally:
        for process in started:
            if process.is_alive():
                process.terminate()
            process.join()


def warm_compiler() -> None:
    """Let torch's compiler find out about the machine, which takes seconds, once and not for the first that compiles."""
    process = multiprocessing.get_context("spawn").Process(target=_compile_something)
    process.start()
    process.join()


def _compile_something() -> None:
    quiet_process()
    with off_screen(), contextlib.suppress(Exception):  # who compiles will say what is wrong
        torch.compile(torch.nn.Linear(2, 2))(torch.ones(2, 2)).sum().backward()


@dataclass
class Result:
    """What was measured of one contestant on one workload.

    Attributes:
        steps_per_s: one number for each round.
        set_up_s: what the run took beside its steps: its beginning, compilation, the checkpoint at its end.
        failed: the error, if there was one.
    """

    steps_per_s: list[float] = field(default_factory=list)
    set_up_s: float = 0.0
    failed: str | None = None


@dataclass
class _Entry:
    lane: Lane
    result: Result
    warm_up: int
    begun_s: float = 0.0


class Race:
    """The contestants on one workload, in turns whose order rotates from round to round.

    Args:
        workload: what they train.
        contestants: who trains.
        repeats: rounds that count, after one that does not.
        folder: where their files go.
        shorten: divides the number of steps of a turn and of the warm-up.
    """

    def __init__(
        self, workload: Workload, contestants: Sequence[Contestant], repeats: int, folder: Path, shorten: int = 1
    ) -> None:
        self.contestants = contestants
        self.repeats = repeats
        self.folder = folder
        self.warm_up, self.turn = max(5, workload.warm_up // shorten), max(3, workload.turn // shorten)
        self.results = {contestant.name: Result() for contestant in contestants}
        self._entries: dict[str, _Entry] = {}

    def run(self, open_lane: OpenLane) -> dict[str, Result]:
        """Measure everyone."""
        self._open(open_lane)
        for name, entry in list(self._entries.items()):
            with self._failures(name):
                entry.begun_s = entry.lane.advance(entry.warm_up)
        for number in range(self.repeats + 1):
            names = list(self._entries)
            start = number % max(1, len(names))
            for name in names[start:] + names[:start]:
                with self._failures(name):
                    rate = self.turn / self._entries[name].lane.advance(self.turn)
                    if number > 0:
                        self.results[name].steps_per_s.append(rate)
        for name, entry in list(self._entries.items()):
            with self._failures(name):
                per_step = sum(1 / rate for rate in entry.result.steps_per_s) / self.repeats
                rest_s = entry.begun_s + entry.lane.finish() - (entry.warm_up + _TAIL) * per_step
                entry.result.set_up_s = max(0.0, rest_s)  # noise may be more than a short set-up
        return self.results

    def _open(self, open_lane: OpenLane) -> None:
        """Start everyone, as many at a time as there are cores."""
        cores = os.cpu_count() or 1
        for first in range(0, len(self.contestants), cores):
            names = []
            for number, contestant in enumerate(self.contestants[first : first + cores], first):
                own, name = self.folder / f"{number}", contestant.name
                own.mkdir(parents=True)
                warm_up = max(self.warm_up, COMPILED_WARM_UP if contestant.compiled else 0)
                lane = open_lane(contestant, warm_up + (self.repeats + 1) * self.turn + _TAIL, own)
                self._entries[name] = _Entry(lane, self.results[name], warm_up)
                names.append(name)
            for name in names:
                with self._failures(name):
                    self._entries[name].lane.wait_until_ready()

    @contextlib.contextmanager
    def _failures(self, name: str) -> Iterator[None]:
        """Leave out who fails, and go on with the others."""
        try:
            yield
        except LaneError as error:
            self._entries.pop(name).result.failed = str(error)


def train_once(contestant: Contestant, workload: Workload, steps: int, folder: Path) -> Task:
    """Train without a clock, and return what was trained."""
    task = workload.task()
    with off_screen():
        contestant.make(task, workload.loader(workload.data(steps)), folder)()
    return task


# Calls and frames


def python_calls(run: Run) -> int:
    """The Python functions that are called, by this thread."""
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        if event == "call":
            count += 1

    gc.collect()
    gc.disable()  # a collection may call finalizers
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def calls_per_step(contestant: Contestant, workload: Workload, folder: Path) -> float:
    """Calls of Python functions in a step, without what happens once in a run."""
    counts = []
    with off_screen():
        for steps in (2, *CALL_STEPS):  # the first for imports and caches of the first time
            task, batches = workload.task(), workload.loader(workload.data(steps))
            own = folder / f"{steps}"
            own.mkdir(parents=True)
            counts.append(python_calls(contestant.make(task, batches, own)))
    return (counts[2] - counts[1]) / (CALL_STEPS[1] - CALL_STEPS[0])


def frames(contestant: Contestant, workload: Workload, folder: Path) -> int:
    """The frames between the call of the trainer and the user's step."""
    own, found = str(Path(__file__).parent), []

    def tick() -> None:
        between = itertools.takewhile(lambda at: at[0].f_code is not frames.__code__, traceback.walk_stack(None))
        found.append(sum(not frame.f_code.co_filename.startswith(own) for frame, _ in between))
        raise StepReachedError

    task = workload.task()
    task.tick = tick
    with off_screen():
        run = contestant.make(task, workload.loader(workload.data(2)), folder)
        with contextlib.suppress(Exception):  # some replace the error by one of their own
            run()
    return found[0]
