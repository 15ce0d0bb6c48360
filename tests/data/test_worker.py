"""What a loader's worker does with a scheduler's signals, in processes of their own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from leyden.data.worker import PREEMPTION_SIGNALS, ignore_preemption_signals, signals_held_back

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals")

OTHERS = [name for name in PREEMPTION_SIGNALS if name != "SIGTERM"]
TIMEOUT_S = 30.0


class Worker:
    """A forked process that has called `ignore_preemption_signals` and then does ``work``."""

    def __init__(self, work: Callable[[int], object]) -> None:
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            for name in PREEMPTION_SIGNALS:
                signal.signal(signal.Signals[name], signal.SIG_DFL)
            ignore_preemption_signals()
            os.write(writer, b"ready\n")
            work(writer)
            os._exit(0)
        os.close(writer)
        assert self.line() == "ready"

    def line(self) -> str:
        found = b""
        while not found.endswith(b"\n"):
            found += os.read(self.reader, 1) or b"\n"
        return found.decode().strip()

    def send(self, *names: str) -> None:
        for name in names:
            os.kill(self.pid, signal.Signals[name])
            time.sleep(0.05)  # two of a kind that are both waiting are one

    def code(self) -> int:
        os.close(self.reader)
        end = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError("the worker did not end")


def work_for_a_second(writer: int) -> None:
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        time.sleep(0.01)
    os.write(writer, b"worked\n")


def hang_in_a_library(writer: int) -> None:
    """A call of a C library that never comes back: a read of a pipe that nobody writes to."""
    reader, _ = os.pipe()
    os.write(writer, b"hangs\n")
    ctypes.CDLL(None).read(reader, ctypes.create_string_buffer(1), 1)
    os.write(writer, b"woken\n")


def test_a_worker_lives_through_the_first_of_every_signal() -> None:
    worker = Worker(work_for_a_second)
    worker.send(*OTHERS, "SIGTERM", *OTHERS)
    assert worker.line() == "worked"
    assert worker.code() == 0


def test_the_second_sigterm_ends_it() -> None:
    worker = Worker(work_for_a_second)
    worker.send("SIGTERM", "SIGTERM")
    assert worker.code() == 143


def test_it_also_ends_a_worker_that_hangs_in_a_library() -> None:
    worker = Worker(hang_in_a_library)
    assert worker.line() == "hangs"
    worker.send("SIGUSR1", "SIGTERM", "SIGTERM")
    assert worker.line() == "", "the library's call was not interrupted"
    assert worker.code() == 143


def test_programs_that_a_dataset_starts_can_be_ended() -> None:
    def work(writer: int) -> None:
        program = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        time.sleep(0.1)
        program.terminate()
        os.write(writer, f"{program.wait(20)}\n".encode())

    worker = Worker(work)
    assert worker.line() == str(-signal.SIGTERM)
    assert worker.code() == 0


def test_signals_that_come_while_a_worker_starts_wait_until_it_can_live_through_them() -> None:
    reader, writer = os.pipe()
    for name in PREEMPTION_SIGNALS:
        assert signal.getsignal(signal.Signals[name]) in (signal.SIG_DFL, signal.SIG_IGN)
    with signals_held_back():
        pid = os.fork()
        if pid == 0:
            for name in PREEMPTION_SIGNALS:
                os.kill(os.getpid(), signal.Signals[name])
            ignore_preemption_signals()
            os.write(writer, b"alive\n")
            os.kill(os.getpid(), signal.SIGTERM)  # the second
            time.sleep(TIMEOUT_S)
            os._exit(0)
    os.close(writer)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 143
    assert os.read(reader, 100) == b"alive\n"
    os.close(reader)


def test_what_is_ignored_stays_ignored() -> None:
    def work(writer: int) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        ignore_preemption_signals()
        os.write(writer, f"{signal.getsignal(signal.SIGHUP) is signal.SIG_IGN}\n".encode())

    worker = Worker(work)
    assert worker.line() == "True"
    assert worker.code() == 0
