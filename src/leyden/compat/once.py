"""Saying once, for each former spelling, what is written today."""

from __future__ import annotations

from leyden.errors import warn

_told: set[str] = set()


def tell(former: str, today: str, *, stacklevel: int = 3) -> None:
    """Warn that a spelling is a former one; once for each in a process.

    Args:
        former: what was written.
        today: what to write instead, or why nothing needs to be written any more.
        stacklevel: as in `warnings.warn`, counted from here.
    """
    if former not in _told:
        _told.add(former)
        warn("former-name", f"{former} is a former spelling. Today: {today}.", stacklevel=stacklevel + 1)


def forget() -> None:
    """Say everything again; for tests."""
    _told.clear()
