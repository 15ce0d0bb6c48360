"""Saying once, for each former spelling, what is written today."""

from __future__ import annotations

from leyden.errors import warn
from leyden.rank_zero import rank_zero_only

_told: set[str] = set()


def tell(former: str, today: str, key: str | None = None, several: bool = False) -> None:
    """Warn that a spelling is a former one; once for each in a process, and only in the first process.

    Args:
        former: what was written.
        today: what to write instead, or why nothing needs to be written any more.
        key: what is told once; ``former`` by default.
        several: whether ``former`` has several such spellings in it.
    """
    key = former if key is None else key
    if key not in _told:
        _told.add(key)
        if rank_zero_only.rank == 0:
            has = "has former spellings" if several else "is a former spelling"
            warn("former-name", f"{former} {has}. Today: {today}.")


def forget() -> None:
    """Say everything again; for tests."""
    _told.clear()
