"""Where a Trainer meets arguments of former days, which `leyden.compat` translates."""

from __future__ import annotations

import os
from typing import Any


def in_words_of_today(
    asked: dict[str, Any], others: dict[str, Any]
) -> tuple[dict[str, Any], str | os.PathLike[str] | None, int | None]:
    """Translate what a Trainer was asked for in words of former days.

    Args:
        asked: the arguments of today; some had other values once: ``{epoch: n}`` to accumulate, ``profiler=True``.
        others: arguments that there are none of today.

    Returns:
        The arguments of today; ``resume_from_checkpoint``; ``truncated_bptt_steps``.

    Raises:
        ConfigurationError: for names that no Trainer ever had, and for contradictions.
    """
    if (
        not others
        and not isinstance(asked["accumulate_grad_batches"], dict)
        and not isinstance(asked["profiler"], bool)
    ):
        return asked, None, None
    from leyden.compat.arguments import modernise

    modern = modernise(asked, others)
    return modern.arguments, modern.ckpt_path, modern.truncated_bptt_steps
