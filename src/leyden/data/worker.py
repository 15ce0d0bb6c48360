"""What a loader's worker process does with the signals that a scheduler sends to all processes of a job, and how it ends."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any

from leyden.errors import reject

# What schedulers warn with before they kill. SIGTERM is also how torch ends a worker that hangs.
PREEMPTION_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU")


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Keep `PREEMPTION_SIGNALS` waiting in this thread, and in the processes that it starts meanwhile.

    For starting workers that call `ignore_preemption_signals`: from birth until then a signal would end them. That function
    lets the signals in again in the worker; this one does so here at its end.
    """
    if os.name != "posix":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _numbers())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_preemption_signals() -> None:
    """Let this worker process live through the first SIGTERM, and through all others of `PREEMPTION_SIGNALS`.

    A scheduler, `timeout` and a service manager signal every process of a job. By default a worker then dies, and the
    main process raises «DataLoader worker exited unexpectedly» before it has come to a step boundary and saved. The
    main process alone decides; when it ends, torch ends the workers.

    The second SIGTERM ends the worker at once, as it ends the main process, and as torch ends a worker that hangs. A
    thread sees to that, so that it also happens where the worker is stuck in a library that never gives control back.

    Call it in the worker, from its main thread, before the user's ``worker_init_fn``. The handler is a function, for what
    is ignored (``SIG_IGN``) would stay ignored in every program that the dataset starts. A signal that is ignored
    already (``nohup``) stays so. Does nothing on Windows, which has no such signals.
    """
    if os.name != "posix" or threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()  # neither is inherited by programs that the dataset starts
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _numbers():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _pass_over)
            signal.siginterrupt(number, False)  # a read within a C library goes on instead of failing with EINTR
    threading.Thread(target=_end_at_second_term, args=(reader,), daemon=True, name="leyden_signals").start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _numbers())  # see signals_held_back


def end_at_exit(iterator: Any) -> None:
    """Shut down the workers of torch's ``iterator`` when this process ends, unless that has been done before.

    At exit multiprocessing sends each of its processes one SIGTERM, and waits. Those that outlive it would be waited for
    for ever.
    """
    if hasattr(iterator, "_shutdown_workers"):
        _shut_down_at_exit(os.getpid())
        _started.setdefault(iterator, os.getpid())


_started: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


@cache
def _shut_down_at_exit(process: int) -> None:
    # Not on import: what is registered later runs earlier, and torch must not have seen the end of the program yet.
    atexit.register(_shut_down, process)
    # A process that multiprocessing has started ends without atexit. `Finalize` alone comes too late in the first one.
    Finalize(None, _shut_down, (process,), exitpriority=0)


def _shut_down(process: int) -> None:
    if process != os.getpid():  # a fork, whose parent the workers belong to
        return
    for iterator, owner in list(_started.items()):
        if owner == process:
            iterator._shutdown_workers()


def _numbers() -> list[signal.Signals]:
    return [signal.Signals[name] for name in PREEMPTION_SIGNALS]


def _pass_over(number: int, frame: FrameType | None) -> None:
    """Handle a signal by doing nothing."""


def _end_at_second_term(reader: int) -> None:
    seen = 0
    while seen < 2:
        seen += os.read(reader, 64).count(signal.SIGTERM)
    os._exit(128 + signal.SIGTERM)


def suggested_max_num_workers(local_world_size: int) -> int:
    """How many workers each loader may have so that processes do not crowd the cores, of which each keeps one for itself.

    Args:
        local_world_size: processes on this machine.

    Raises:
        ConfigurationError: if there are none.
    """
    if local_world_size < 1:
        reject("local_world_size", local_world_size, "an integer ≥ 1")
    # the cores that this process may use, which in a container or job are fewer
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world_size - 1)
