"""Which checkpoints are kept: pure functions of the scores and plain books, without a file in sight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Mode = Literal["min", "max"]
Saved = tuple[float, str]
"""A score and the path it was saved under."""


def ranked(history: Sequence[Saved], mode: Mode) -> list[Saved]:
    """Return ``history``, given in order of time, best first.

    Of equal scores the earlier is the better: a tie is no reason to write again. NaN is worse than any number.
    """
    sign = 1.0 if mode == "min" else -1.0
    return sorted(history, key=lambda saved: (math.isnan(saved[0]), 0.0 if math.isnan(saved[0]) else sign * saved[0]))


def to_delete(history: Sequence[Saved], save_top_k: int, mode: Mode) -> list[str]:
    """Return the paths beyond the best ``save_top_k``, worst last. -1 keeps all, 0 none.

    Args:
        history: what was saved, in order of time.
        save_top_k: how many to keep.
        mode: whether low (``"min"``) or high (``"max"``) scores are good.
    """
    if save_top_k == -1:
        return []
    return [path for _, path in ranked(history, mode)[save_top_k:]]


def is_kept(history: Sequence[Saved], score: float, save_top_k: int, mode: Mode) -> bool:
    """Return whether a checkpoint with this score, saved now, would be among the kept."""
    return "" not in to_delete([*history, (score, "")], save_top_k, mode)


@dataclass(frozen=True)
class Books:
    """What a policy remembers: replaced as a whole by each save, and put back as a whole if the save fails.

    Attributes:
        history: the kept checkpoints, in order of time.
        inherited: the best of the folder that the run was resumed from, if it was another.
        last: path of the last checkpoint, or ``""``.
        current: the monitored value at the latest trigger.
        step_saved: the step of the latest trigger.
        displaced: what the latest save displaced, to be deleted once its own file is on the disk.
    """

    history: tuple[Saved, ...] = ()
    inherited: Saved | None = None
    last: str = ""
    current: float | None = None
    step_saved: int | None = None
    displaced: tuple[str, ...] = ()

    @property
    def known(self) -> tuple[Saved, ...]:
        """The kept checkpoints, the inherited one first."""
        return self.history if self.inherited is None else (self.inherited, *self.history)

    @property
    def held(self) -> set[str]:
        """Every path that stays."""
        return {self.last, *(path for _, path in self.known)} - {""}

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {
            "history": [list(saved) for saved in self.history],
            "inherited": None if self.inherited is None else list(self.inherited),
            "last_model_path": self.last,
            "current_score": self.current,
            "step_saved": self.step_saved,
            "displaced": list(self.displaced),
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Books:
        """Return what `state_dict` was made of."""

        def saved(pair: Sequence[Any]) -> Saved:
            return float(pair[0]), str(pair[1])

        return cls(
            tuple(map(saved, state["history"])),
            None if state["inherited"] is None else saved(state["inherited"]),
            state["last_model_path"],
            state["current_score"],
            state["step_saved"],
            tuple(map(str, state.get("displaced", ()))),
        )
