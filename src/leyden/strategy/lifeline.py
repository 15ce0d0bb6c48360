"""How a rank learns that another one has failed, and why; so that nobody waits for a rank that will never come.

A rank that fails says so on a board that all can read (a key of the group's store) before it leaves. Others then find out in
two ways: a collective breaks because its other end is gone, or, where it would wait on (NCCL), a thread that looks at the
board twice a second ends the process. Ranks of one machine also look whether the others' processes are still there: one that
was killed cannot say anything.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass

from torch.distributed import Store  # type: ignore[attr-defined]

_BOARD = "failure"
_LOOK_EVERY_S = 0.5
_GRACE_S = 4.0
"""What a rank has, once another one has failed, to end by itself: its teardown. Then its process is ended."""


@dataclass(frozen=True)
class Failure:
    """What the first rank to fail said.

    Attributes:
        rank: which one.
        error: the type and message of its exception, or that it was killed.
        host: its machine.
        pid: its process there; 0 if the process is known to be gone.
    """

    rank: int
    error: str
    host: str
    pid: int

    def is_gone(self) -> bool:
        """Whether its process has ended, as far as this machine can tell."""
        return self.pid == 0 or (self.host == socket.gethostname() and not _is_alive(self.pid))


class Lifeline:
    """One rank's view of the board, and the thread that looks at it.

    Args:
        store: a client of its own: a thread uses it, and one that waits for a key blocks all who use the same.
        rank: of this process.
        world_size: how many there are.
        launcher: the process that has started this one, without which it is not to go on; None if that may end before.
    """

    def __init__(self, store: Store, rank: int, world_size: int, launcher: int | None = None) -> None:
        self._store = store
        self._launcher = launcher
        self._world_size = world_size
        self._rank = rank
        self._host = socket.gethostname()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.seen: Failure | None = None  # of another rank, by the thread
        store.set(f"process/{rank}", json.dumps([self._host, os.getpid()]))
        store.wait([f"process/{other}" for other in range(world_size)])
        found = {other: json.loads(store.get(f"process/{other}")) for other in range(world_size)}
        self._siblings = {other: pid for other, (host, pid) in found.items() if host == self._host and other != rank}
        self._thread = threading.Thread(target=self._watch, name="leyden-lifeline", daemon=True)
        self._thread.start()
        atexit.register(self._end_thread)

    def report(self, error: BaseException) -> Failure:
        """Say that this rank fails, unless another one was first; return what the first one said."""
        text = f"{type(error).__name__}: {error}"
        return self._put(Failure(self._rank, text, self._host, os.getpid()))

    def first_failure(self, wait_s: float = 0.0) -> Failure | None:
        """What the first rank to fail said; None if none has failed.

        Args:
            wait_s: how long to wait for it: of a rank that was killed it is known a moment later.
        """
        until = time.monotonic() + wait_s
        while True:
            found = self._read()
            if found is not None or time.monotonic() >= until:
                return found
            time.sleep(0.1)

    def ended_well(self) -> list[int]:
        """The ranks that have come to the end of their program."""
        try:
            with self._lock:
                others = [rank for rank in range(self._world_size) if rank != self._rank]
                return [rank for rank in others if self._store.check([f"left/{rank}"])]
        except RuntimeError:
            return []

    def leave(self) -> None:
        """Say that this rank has ended well, and look no more."""
        self._over.set()
        with contextlib.suppress(RuntimeError), self._lock:  # the store may have gone with the rank that kept it
            self._store.set(f"left/{self._rank}", "")

    def _end_thread(self) -> None:
        """End the thread before the interpreter does: cut off within a call of the store, it would take the process along."""
        self._over.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)

    def stop_watching(self) -> None:
        """Look no more; the rank has its own reason to end."""
        self._over.set()

    def _read(self) -> Failure | None:
        try:
            with self._lock:
                return Failure(**json.loads(self._store.get(_BOARD))) if self._store.check([_BOARD]) else None
        except RuntimeError:  # torch's DistError and its subclasses: whoever kept the store is gone
            return None

    def _put(self, failure: Failure) -> Failure:
        try:
            with self._lock:
                return Failure(**json.loads(self._store.compare_set(_BOARD, "", json.dumps(asdict(failure)))))
        except RuntimeError:
            return failure

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_EVERY_S):
            # one that was not killed ends its ranks before it ends itself
            if self._launcher is not None and os.getppid() != self._launcher:
                self._end("its launcher was killed")
            self._look_after_siblings()
            failure = self._read()
            if failure is not None and failure.rank != self._rank:
                self.seen = failure
                if self._over.wait(_GRACE_S):
                    return
                self._end(describe(failure))

    def _end(self, why: str) -> None:
        sys.stderr.write(f"[rank {self._rank}] ended, because {why}\n")
        sys.stderr.flush()
        os._exit(1)  # the main thread may wait within a collective, where no exception reaches it

    def _look_after_siblings(self) -> None:
        for other, pid in self._siblings.items():
            if not _is_alive(pid) and not self._has_left(other):
                self._put(Failure(other, "its process was killed, or ended without a word", self._host, 0))

    def _has_left(self, rank: int) -> bool:
        try:
            with self._lock:
                return bool(self._store.check([f"left/{rank}"]) or self._store.check([_BOARD]))
        except RuntimeError:
            return True


def describe(failure: Failure) -> str:
    """One line on who failed first and with what."""
    return f"rank {failure.rank} failed first: {failure.error}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
