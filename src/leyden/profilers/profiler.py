"""What every profiler has: actions that start and stop, and a summary of them."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.hooks import RemovableHandle

from leyden.errors import LeydenError


class Profiler(ABC):
    """Measures named actions. Write `start`, `stop` and `summary`.

    The Trainer profiles the user's steps and hooks (``[LightningModule]Net.training_step``,
    ``[Callback]Ema.on_train_batch_end``), ``backward``, ``optimizer_step``, ``next_batch``, ``batch_to_device`` (where batches
    are moved at all), ``sanity_check``, ``validation``, ``test``, ``predict`` and ``save_checkpoint``. Your code adds to them:
    ``with self.trainer.profiler.profile("my part"):``. Actions may lie inside of each other.

    Args:
        dirpath: the folder of the report; default: the run's log folder.
        filename: its name without ending, preceded by the verb: ``fit-{filename}.txt``. If neither is given, the report
            is printed.
    """

    wants_actions: ClassVar[bool] = True
    """Whether steps and hooks are wrapped. If not, `start` and `stop` are called for whole evaluations and saves only."""

    _dirpath: str | os.PathLike[str] | None = None
    _filename: str | None = None
    _stage: str | None = None
    _log_dir: str | None = None
    rank: int = 0
    """Of this process; set by the Trainer. Each writes a file of its own, and the first one prints."""

    @property
    def wired(self) -> list[RemovableHandle]:
        """What is to be removed from the optimizers when the verb ends; the engine's."""
        # Not made in __init__: subclasses may forget to call super().__init__().
        found: list[RemovableHandle] = self.__dict__.setdefault("_wired", [])
        return found

    def __init__(self, dirpath: str | os.PathLike[str] | None = None, filename: str | None = None) -> None:
        self._dirpath = dirpath
        self._filename = filename

    @abstractmethod
    def start(self, action: str) -> None:
        """Begin to measure ``action``."""

    @abstractmethod
    def stop(self, action: str) -> None:
        """End the measurement of ``action`` that was begun last."""

    @abstractmethod
    def summary(self) -> str:
        """Return the report; an empty string if there is nothing to tell."""

    @contextmanager
    def profile(self, action: str) -> Iterator[str]:
        """Measure the body of a ``with`` as ``action``, also if it raises."""
        self.start(action)
        try:
            yield action
        finally:
            self.stop(action)

    def begin(self, module: Any) -> None:
        """Called when a verb's steps are set up, before its first batch; ``module.trainer`` is the Trainer."""

    def begin_batch(self, batch: Any) -> None:
        """Called with each batch on the device, before its step: of training in `fit`, else of the evaluation."""

    def end_batch(self, batch: Any) -> None:
        """Called with each batch when it is done; goes on to `step`."""
        self.step()

    def step(self) -> None:
        """Called at the end of each batch: of training in `fit`, else of the evaluation."""

    def setup(self, stage: str, log_dir: str | None) -> None:
        """Called when a verb begins: forget what was measured before.

        Args:
            stage: fit, validate, test or predict.
            log_dir: the run's folder; None if nothing is to be written.
        """
        self._stage, self._log_dir = stage, log_dir

    def teardown(self, stage: str) -> None:
        """Called when a verb ends, also after an error: stop measuring."""

    def describe(self) -> None:
        """Write `summary` to the file that was asked for, else print it; called after `teardown`."""
        text = self.summary()
        folder = self._dirpath if self._dirpath is not None else self._log_dir
        if not text:
            return
        if (self._dirpath is None and self._filename is None) or folder is None:
            if self.rank == 0:
                print(text)
            return
        path = Path(folder, self._file("txt"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")

    def _file(self, ending: str, default: str = "profile") -> str:
        """The name of a file of this verb, and of this process unless it is the first."""
        of_rank = f"-rank{self.rank}" if self.rank else ""
        return f"{self._stage or 'run'}-{self._filename or default}{of_rank}.{ending}"


class PassThroughProfiler(Profiler):
    """Measures nothing: what ``trainer.profiler`` is if none was asked for."""

    def start(self, action: str) -> None:
        """Do nothing."""

    def stop(self, action: str) -> None:
        """Do nothing."""

    def summary(self) -> str:
        """Return an empty string."""
        return ""


def not_started(action: str) -> LeydenError:
    """The error for a `stop` without `start`."""
    return LeydenError(f"profiler.stop({action!r}): it was not started. Use `with profiler.profile({action!r}):`.")
