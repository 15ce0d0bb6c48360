"""SLURM's short forms: lists of hosts such as ``gpu[01-03,7],login2``, and counts per node such as ``4(x3),2``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

# Literal text, or the ranges of one pair of brackets as (first, last, digits).
_Part = str | list[tuple[int, int, int]]


def expand_hostlist(text: str) -> Iterator[str]:
    """Give the hosts of a hostlist one by one, in SLURM's order: the rightmost brackets count fastest.

    The text is checked as a whole before the first host is given; the hosts themselves are made as they are asked for,
    since a list of a few characters can stand for millions.

    Source: https://slurm.schedmd.com/hostlist.html

    Raises:
        ValueError: the text is no hostlist; says where.
    """
    entries = [_parts(entry) for entry in _split(text)]
    return (host for entry in entries for host in _hosts(entry))


def expand_counts(text: str) -> tuple[int, ...]:
    """The number of tasks of each node, from SLURM's ``2(x3),1``: (2, 2, 2, 1).

    Raises:
        ValueError: the text is no such list, or is longer than any cluster.
    """
    counts: list[int] = []
    for entry in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,6})\))?", entry.strip(), re.ASCII)
        if match is None:
            raise ValueError(f"{entry!r} is not a count such as 2 or 2(x3)")
        counts += [int(match[1])] * int(match[2] or 1)
        if len(counts) > 1_000_000:
            raise ValueError("there are more than a million nodes")
    return tuple(counts)


def _split(text: str) -> list[str]:
    """The entries between commas that are not inside of brackets."""
    entries, depth, begin = [], 0, 0
    for position, character in enumerate(text):
        if character == "[":
            depth += 1
        elif character == "]":
            depth -= 1
        elif character == "," and depth == 0:
            entries.append(text[begin:position])
            begin = position + 1
        if depth not in (0, 1):
            raise ValueError(f"the bracket at character {position + 1} has no partner")
    if depth:
        raise ValueError("a bracket is not closed")
    return [*entries, text[begin:]]


def _parts(entry: str) -> list[_Part]:
    if not entry or entry != entry.strip() or re.search(r"\s", entry):
        raise ValueError(f"{entry!r} is not the name of a host")
    parts: list[_Part] = []
    for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", entry):
        parts.append(literal or [_range(piece) for piece in ranges.split(",")])
    return parts


def _range(piece: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", piece, re.ASCII)
    if match is None:
        raise ValueError(f"{piece!r} is not a number or a range of numbers")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError(f"the range {piece!r} runs backwards")
    return first, last, len(match[1])  # 08-11: as many digits as the first has


def _hosts(parts: Sequence[_Part]) -> Iterator[str]:
    if not parts:
        yield ""
        return
    head, rest = parts[0], parts[1:]
    if isinstance(head, str):
        for tail in _hosts(rest):
            yield head + tail
        return
    for first, last, digits in head:
        for number in range(first, last + 1):
            for tail in _hosts(rest):
                yield f"{number:0{digits}d}{tail}"
