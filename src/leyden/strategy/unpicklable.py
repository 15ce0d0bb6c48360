"""Find what of a verb's arguments cannot be sent to a new process, to name it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from multiprocessing import reduction
from typing import Any

_DEEPEST = 8


def first_unpicklable(named: Mapping[str, Any]) -> tuple[str, str] | None:
    """The innermost thing that cannot be pickled, as a dotted path, and why; None if all can.

    Costs a pickling on each level of nesting; nothing of it is kept.

    Args:
        named: what is to be sent, by name.
    """
    seen: set[int] = set()
    for name, value in named.items():
        found = _innermost(name, value, seen, _DEEPEST)
        if found is not None:
            return found
    return None


def _innermost(path: str, value: Any, seen: set[int], deeper: int) -> tuple[str, str] | None:
    if id(value) in seen:
        return None
    problem = _problem(value)
    if problem is None:
        return None
    seen.add(id(value))
    for name, part in _parts(path, value) if deeper else ():
        found = _innermost(name, part, seen, deeper - 1)
        if found is not None:
            return found
    return path, problem


def _problem(value: Any) -> str | None:
    try:
        reduction.ForkingPickler(_Nowhere()).dump(value)
    except Exception as error:  # noqa: BLE001 the object's own __reduce__ may raise anything
        return f"{type(error).__name__}: {error}"
    return None


def _parts(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield f"{path}[{key!r}]", part
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield f"{path}[{number}]", part
    elif not hasattr(type(value), "__reduce_ex__") or hasattr(value, "__dict__"):
        for name, part in vars(value).items():
            yield f"{path}.{name}", part


class _Nowhere:
    """A file that keeps nothing, so that a data set is not held in memory twice."""

    def write(self, data: Any) -> int:
        return len(data)
