"""Writing checkpoints while training goes on: a snapshot now, checksums and the disk in a thread.

What the caller waits for is the copy of the tensors into host memory, at about the machine's memory bandwidth (`Buffers`).
That memory is kept for the next checkpoint. So a writer costs one more copy of what is saved, for weights and Adam's state
three times the weights, until `Writer.release`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from leyden.checkpoint.format import flatten, seal
from leyden.checkpoint.remote import PathLike
from leyden.checkpoint.snapshot import Buffers
from leyden.checkpoint.store import write_checkpoint, write_tensors
from leyden.errors import CheckpointError, call_each

Action = Callable[[], object]


class Writer:
    """Writes one checkpoint at a time in the background. A thread lives only while it writes; it is joined at exit.

    What goes wrong in the background is raised once, as a CheckpointError, by whichever of `check`, `wait`, `submit` and
    `write` is called next. A forked child and a copy of a writer are idle and empty.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._thread: threading.Thread | None = None
        self._written = threading.Event()
        self._failure: CheckpointError | None = None
        self._buffers = Buffers()

    def __reduce__(self) -> tuple[type[Writer], tuple[()]]:
        return Writer, ()

    @property
    def busy(self) -> bool:
        """Whether a write is in flight."""
        self._see_fork()
        return self._thread is not None and self._thread.is_alive()

    def submit(
        self,
        path: PathLike,
        checkpoint: Mapping[str, Any],
        then: Iterable[Action] = (),
        on_failure: Action | None = None,
    ) -> None:
        """Take a snapshot of a checkpoint and write it in the background, after the write in flight, which is waited for.

        Args:
            path: see `leyden.checkpoint.store.write_checkpoint`.
            checkpoint: see `leyden.checkpoint.format.encode`. It may change as soon as this returns.
            then: called in order in the writing thread once the file is committed; not at all if it could not be
                written, and none after one that raises.
            on_failure: called in the writing thread when the write, or one of ``then``, has failed.

        Raises:
            CheckpointError: the checkpoint holds what cannot be stored; or an earlier write failed, and then this one is
                not begun.
        """
        self.wait()
        tensors, tree = flatten(checkpoint)
        saved_at = time.time()
        copies = self._buffers.copy(tensors)
        actions = tuple(then)
        written = self._written = threading.Event()

        def work() -> None:
            try:
                write()
            finally:
                written.set()

        def write() -> None:
            time.sleep(0.001)  # the caller goes on first; else it gets the interpreter's lock back only after 5 ms
            try:
                write_tensors(path, *seal(copies, tree, saved_at))
            except BaseException as error:  # noqa: BLE001 kept, and raised by the next call
                self._fail(_named(path, error), on_failure)
                return
            try:
                for action in actions:
                    action()
            except BaseException as error:  # noqa: BLE001 kept, and raised by the next call
                failure = CheckpointError(f"{path} is written, but what was to follow failed: {_shown(error)}")
                failure.__cause__ = error
                self._fail(failure, on_failure)

        thread = threading.Thread(target=work, name="leyden-checkpoint", daemon=False)
        try:
            self._thread = thread
            thread.start()
        except RuntimeError:  # no thread to be had, or the interpreter is ending
            self._thread = None
            work()

    def write(self, path: PathLike, checkpoint: Mapping[str, Any], then: Iterable[Action] = ()) -> None:
        """Write a checkpoint in the calling thread, from the tensors themselves: no snapshot, no memory.

        Raises:
            CheckpointError: it could not be written; or an earlier write failed, and then this one is not begun.
        """
        self.wait()
        write_checkpoint(path, checkpoint)
        for action in then:
            action()

    def wait(self) -> None:
        """Wait until nothing is in flight.

        Raises:
            CheckpointError: a write failed, and nobody raised it yet.
        """
        self._join()
        self.check()

    def check(self) -> None:
        """Raise what a write failed with, if nobody raised it yet. Does not wait for the write in flight.

        Raises:
            CheckpointError: naming the file and the reason.
        """
        self._see_fork()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def release(self) -> None:
        """Wait for the write in flight and give the snapshot's memory back. A failure stays to be raised."""
        self._join()
        self._buffers = Buffers()

    def _see_fork(self) -> None:
        if self._process != os.getpid():  # the write in flight, if any, goes on in the parent
            self._process, self._thread, self._failure, self._buffers = os.getpid(), None, None, Buffers()

    def _join(self) -> None:
        self._see_fork()
        thread = self._thread
        if thread is not None and thread.ident is None:  # Ctrl-C came while it was being started
            time.sleep(0.1)
        if thread is not None and thread.ident is not None:
            # Not by join alone: Ctrl-C in it makes Python 3.11 take the thread for ended, and nobody waits for it any more.
            self._written.wait()
            thread.join()
        self._thread = None

    def _fail(self, failure: CheckpointError, on_failure: Action | None) -> None:
        self._failure = failure
        if on_failure is not None:
            call_each((on_failure,), failure)


def _named(path: PathLike, error: BaseException) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    failure = CheckpointError(f"{path}: cannot be written: {_shown(error)}")
    failure.__cause__ = error
    return failure


def _shown(error: BaseException) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
