"""Where a Trainer meets arguments of former days, which `leyden.compat` translates."""

from __future__ import annotations

import os
from typing import Any

_FORMER_VALUES = (
    ("max_steps", None),
    ("profiler", True),
    ("profiler", False),
    *(("strategy", name) for name in ("dp", "ddp2", "ddp_cpu")),
    *(("accelerator", name) for name in ("dp", "ddp", "ddp2", "ddp_cpu", "ddp_spawn")),
)


def in_words_of_today(
    asked: dict[str, Any], others: dict[str, Any]
) -> tuple[dict[str, Any], str | os.PathLike[str] | None, int | None]:
    """Translate what a Trainer was asked for in words of former days.

    Args:
        asked: the arguments of today, of which some had other values once.
        others: arguments that there are none of today.

    Returns:
        The arguments of today; ``resume_from_checkpoint``; ``truncated_bptt_steps``.

    Raises:
        ConfigurationError: for names that no Trainer ever had, and for contradictions.
    """
    former = [name for name, value in _FORMER_VALUES if asked[name] is value or asked[name] == value]
    if not others and not former and not isinstance(asked["accumulate_grad_batches"], dict):
        return asked, None, None
    from leyden.compat.arguments import modernise

    modern = modernise(asked, others)
    return modern.arguments, modern.ckpt_path, modern.truncated_bptt_steps
