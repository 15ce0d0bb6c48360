"""What a rewriting leaves to a person: a place, the reason, and what to write there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Note:
    """One place that needs a hand.

    Attributes:
        line: from 1, in the text that was given.
        what: the spelling that stands there.
        why: what became of it.
        write: what to write; may have several lines.
    """

    line: int
    what: str
    why: str
    write: str

    def shown(self, file: str) -> str:
        """The note as it is printed, lines of code indented below."""
        first, *more = self.write.split("\n")
        return "\n".join(
            [f"{file}:{self.line}: {self.what}: {self.why} Write: {first}", *(f"    {each}" for each in more)]
        )


class Notes:
    """Collects notes; each is kept once."""

    def __init__(self) -> None:
        self._found: dict[Note, None] = {}

    def add(self, line: int, what: str, why: str, write: str) -> None:
        """Note a place; the same note of the same line counts once."""
        self._found[Note(line, what, why, write)] = None

    def sorted(self) -> tuple[Note, ...]:
        """In the order of the lines."""
        return tuple(sorted(self._found))
