"""Where a Trainer stands, in the words that callbacks compare with: which verb, which stage of it, and how it ended."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from leyden.run import Status


class TrainerStatus(enum.StrEnum):
    """How far the present or the last verb is."""

    INITIALIZING = "initializing"
    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"

    @property
    def stopped(self) -> bool:
        """Whether it has come to an end, a good one or not."""
        return self in (TrainerStatus.FINISHED, TrainerStatus.INTERRUPTED)


class TrainerFn(enum.StrEnum):
    """The verbs; each equals the ``stage`` that `setup` and `teardown` get."""

    FITTING = "fit"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"


class RunningStage(enum.StrEnum):
    """The stages inside of a verb: `fit` has the first three."""

    TRAINING = "train"
    SANITY_CHECKING = "sanity_check"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"

    @property
    def evaluating(self) -> bool:
        """Whether batches are evaluated: validation, the sanity check too, or test."""
        return self in (RunningStage.SANITY_CHECKING, RunningStage.VALIDATING, RunningStage.TESTING)

    @property
    def dataloader_prefix(self) -> str:
        """What the loader hook's name begins with: ``val`` of ``val_dataloader``."""
        return "val" if self in (RunningStage.SANITY_CHECKING, RunningStage.VALIDATING) else self.value


# what a verb begins with; the loop names stages by their steps
_FIRST = {"fit": "train", "validate": "validation", "test": "test", "predict": "predict"}
_STAGES = {
    "train": RunningStage.TRAINING,
    "validation": RunningStage.VALIDATING,
    "test": RunningStage.TESTING,
    "predict": RunningStage.PREDICTING,
}


class TrainerState:
    """Where a Trainer stands now; one object for its whole life.

    Attributes:
        status: of the present or the last verb.
        fn: the present or the last verb; None before the first.
    """

    def __init__(self, now: Status) -> None:
        self.status = TrainerStatus.INITIALIZING
        self.fn: TrainerFn | None = None
        self._now = now

    def begin(self, verb: str) -> None:
        """Note that a verb begins; for the Trainer, as the next two."""
        self.fn, self.status = TrainerFn(verb), TrainerStatus.RUNNING
        self._now.verb, self._now.stage = verb, None

    def interrupt(self) -> None:
        """Note that the verb ends with an exception."""
        self.status = TrainerStatus.INTERRUPTED

    def end(self) -> None:
        """Note that the verb has ended."""
        if not self.stopped:
            self.status = TrainerStatus.FINISHED
        self._now.verb = self._now.stage = None
        self._now.sanity = False

    def take_over(self, verb: str, status: str) -> None:
        """Note what became of a verb that ran in other processes."""
        self.fn, self.status = TrainerFn(verb), TrainerStatus(status)

    @property
    def stage(self) -> RunningStage | None:
        """The stage that runs, from the set-up on; None where no verb runs."""
        if self._now.verb is None:
            return None
        return RunningStage.SANITY_CHECKING if self._now.sanity else _STAGES[self._now.stage or _FIRST[self._now.verb]]

    @property
    def begun(self) -> bool:
        """Whether the set-up and the sanity check are over."""
        return self._now.stage is not None and not self._now.sanity

    @property
    def finished(self) -> bool:
        """Whether the last verb came to its regular end."""
        return self.status is TrainerStatus.FINISHED

    @property
    def stopped(self) -> bool:
        """Whether the last verb has come to an end, a good one or not."""
        return self.status.stopped

    def __repr__(self) -> str:
        return f"TrainerState(status={self.status.value!r}, fn={self.fn!s}, stage={self.stage!s})"
