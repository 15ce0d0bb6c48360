"""What every reader of a loader has: passes that can be taken up again, and tickets that say where.

One iteration over a loader is a *pass*. With each batch comes a `Ticket`, which says where the pass stood after it; batches
that are fetched ahead therefore cannot confuse the position. A ticket is cheap; `Reader.position` makes plain data of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import singledispatch
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from leyden.data.generators import generator_states, owned_generators, set_generator_states

Position = dict[str, Any]
"""Where a pass stands, as plain data for a checkpoint."""


class Ticket(NamedTuple):
    """Where a pass stood after a batch.

    Attributes:
        start: what the pass began with; one object for the whole pass.
        number: of the batch in this pass, from 1.
        detail: sample indices of the batch, the loader's own state, or the tickets of several loaders.
    """

    start: dict[str, Any]
    number: int
    detail: Any


class Reader(ABC):
    """How one loader is read, pass after pass."""

    loader: Any
    only_once = False
    """Whether the loader turned out to be its own iterator, which gives its batches only once."""
    divided = False
    """Whether ranks read different parts of the loader, so that a pass stands at the same position on all of them."""
    reads_ahead = False
    """Whether the batch after the present one may be read before that is trained on: nothing of the user's could tell."""

    @abstractmethod
    def read(self, position: Position | None = None, limit: float = math.inf) -> Iterator[tuple[Any, Ticket]]:
        """Begin a pass, or go on with one.

        Args:
            position: where to go on; None begins anew.
            limit: batches of the whole pass, at most.
        """

    def position(self, ticket: Ticket) -> Position:
        """Return the ticket as plain data."""
        return {"start": ticket.start, "count": ticket.number}

    def left(self, position: Position | None) -> float | None:
        """The number of this rank's batches after ``position`` (None: of a whole pass), without a limit; None if unknown."""
        return None

    def weight(self, ticket: Ticket) -> float:
        """What the loss of the ticket's batch counts in the mean over ranks: 1 where all have as many samples."""
        return 1.0

    def indices(self, ticket: Ticket) -> list[int] | None:
        """The sample indices of the ticket's batch, if they are known."""
        return None

    def rest(self) -> dict[str, Any]:
        """What lives on from one pass to the next, as plain data: generators and states of samplers and datasets."""
        return {"generators": generator_states(owned_generators(self.loader))}

    def take_rest(self, rest: dict[str, Any]) -> None:
        """Take back what `rest` returned, between two passes."""
        set_generator_states(owned_generators(self.loader), rest.get("generators", {}))

    def shut_down(self) -> None:
        """End worker processes that outlive a pass."""


@singledispatch
def as_torch(loader: Any) -> Any:
    """torch's own loader in place of a `leyden.data.DataLoader`, which reads through a reader by itself."""
    return loader


def has_state(value: Any) -> bool:
    """Whether a loader, sampler or dataset keeps its own position."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def shut_down_workers(loader: Any) -> None:
    """End a loader's persistent workers, which would otherwise live as long as it.

    If the garbage collector finds them in a cycle, as a Trainer is, torch waits 5 s for each.
    """
    iterator: Any = getattr(loader, "_iterator", None)
    if isinstance(loader, DataLoader) and hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
        loader._iterator = None
