"""Freed host memory: kept for the next step instead of being given back to the system after each."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from typing import Any

KEPT_BYTES = 512 * 2**20
"""Freed memory that the process keeps at the top of its heap while a verb runs."""
ON_HEAP_BYTES = 32 * 2**20
"""Blocks up to this size come from the heap; glibc allows no more."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h


def keep_freed_memory() -> bool:
    """Let glibc keep memory that a step frees, for the next step; nothing happens with other allocators.

    By default glibc gives memory back to the system when 128 KB or a little more are free at the heap's end. Whether that
    happens in every step depends on where the last small block lies; if it does, each step gets its memory anew, page by page:
    a third of the time of a small model. It cannot be set back in a process, and lives on after the verb.

    Returns:
        Whether it is so. False without glibc, and if ``MALLOC_…`` variables or ``GLIBC_TUNABLES`` say how memory is handled.
    """
    if not can_be_kept():
        return False
    library = _glibc()
    return bool(library.mallopt(_MMAP_THRESHOLD, ON_HEAP_BYTES)) and bool(library.mallopt(_TRIM_THRESHOLD, KEPT_BYTES))


def give_back_freed_memory() -> None:
    """Return all free memory to the system, after a verb."""
    if can_be_kept():
        _glibc().malloc_trim(0)


def can_be_kept() -> bool:
    """Whether the allocator is glibc's, and no variable of the environment tells it how to handle memory."""
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
    user_decides = any(name in os.environ for name in names) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    return not user_decides and _glibc() is not None


@cache
def _glibc() -> Any:
    """The C library, if it is glibc and memory comes from it; with a preloaded allocator its own settings mean nothing."""
    if sys.platform != "linux" or os.environ.get("LD_PRELOAD"):
        return None
    try:
        version = os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):  # musl does not know the name
        return None
    return ctypes.CDLL(None) if version else None
