"""Which checkpoints are kept: pure functions of the scores, without a file in sight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

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
