"""Saying once, for each former spelling, what is written today."""

from __future__ import annotations

from leyden.errors import warn
from leyden.rank_zero import rank_zero_only

_told: set[str] = set()


def tell(former: str, today: str) -> None:
    """Warn that a spelling is a former one; once for each in a process, and only in the first process.

    Args:
        former: what was written.
        today: what to write instead, or why nothing needs to be written any more.
    """
    if former not in _told:
        _told.add(former)
        if rank_zero_only.rank == 0:
            warn("former-name", f"{former} is a former spelling. Today: {today}.")


def forget() -> None:
    """Say everything again; for tests."""
    _told.clear()
