"""Loaders as the loop sees them: a length that can be trusted, a limit, and how many batches follow."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from leyden.data.combined import CombinedLoader
from leyden.data.indexed import TORCH_SAMPLERS, is_plain, rebuilt
from leyden.data.prefetch import copies_for, one_ahead
from leyden.data.reader import Position, Reader, Ticket, as_torch
from leyden.data.reading import make_reader
from leyden.errors import DataError, warn

Move = Callable[[Any, int], Any]


@dataclass
class Source:
    """One loader of one stage.

    Attributes:
        loader: what the user gave.
        name: the hook that gave it, for messages.
        total: batches that are read per epoch, after the limit; inf if the loader has no length.
        exact: whether the loader's length can be trusted, so that no batch need be read ahead.
        around: what the loader's iterator is wrapped in when a profiler watches.
        reader: how the loader is read; by default what suits it.
    """

    loader: Any
    name: str
    total: float
    exact: bool
    around: Callable[[Iterator[Any]], Iterator[Any]] | None = None
    reader: Reader | None = None

    def __post_init__(self) -> None:
        self._reader = self.reader = self.reader or make_reader(self.loader, self.name)
        self._begun: Position | None = None  # where the present epoch was taken up
        self._ticket: Ticket | None = None  # of the batch that was given last
        self._before: Ticket | None = None  # of the one before it

    def batches(
        self,
        move: Move | None,
        index: int = 0,
        start: int = 0,
        position: Position | None = None,
        ahead: Callable[[], int] = lambda: 1,
    ) -> Iterator[tuple[Any, int]]:
        """Iterate over ``(batch, following)`` of one epoch.

        Args:
            move: what brings a batch to the device; None leaves it.
            index: the number of this loader among several.
            start: batches of this epoch that were trained on before a restart.
            position: where the loader stood then, from `position`.
            ahead: how far ahead to read where the length cannot be trusted, asked before each batch: a window of
                accumulated batches must know its size from its first batch on.

        Yields:
            The batch, and how many are known to follow it: all of them, or up to ``ahead``.
        """
        position = position or ({"count": start} if start else None)
        reader, self._begun, self._ticket, self._before = self._reader, position, None, None
        reading = reader.read(position, self.total)
        reading = reading if self.around is None else self.around(reading)
        if self.total != math.inf and self.exact:
            following = max(0, int(self.total) - start)  # a restart may find fewer batches than there were
            reading = islice(reading, following)
            copies = copies_for(move, reader, index)
            if copies is not None:
                reading, move = one_ahead(reading, copies), None
            for batch, ticket in reading:
                self._ticket, self._before = ticket, self._ticket
                following -= 1
                yield (batch if move is None else move(batch, index)), following
            return
        if self.total != math.inf:
            reading = islice(reading, max(0, int(self.total) - start))  # without asking once more for the end
        read = deque(islice(reading, ahead() + 1))
        if reader.only_once and not read and self.total and not start:
            raise DataError(
                f"{self.name} gave no batch. A generator can be read only once: return an object whose __iter__ starts "
                "anew, such as a DataLoader."
            )
        while read:
            self._before = self._ticket
            batch, self._ticket = read.popleft()
            yield (batch if move is None else move(batch, index)), len(read)
            read.extend(islice(reading, max(0, ahead() + 1 - len(read))))

    def position(self, done: int | None = None) -> Position | None:
        """Where the loader stood after ``done`` batches of this epoch, as plain data; None before the first.

        Args:
            done: all that were given, or all but the one that is being trained on; None for all.
        """
        for ticket in (self._ticket, self._before):
            if ticket is not None and (done is None or ticket.number <= done):
                return self._reader.position(ticket)
        return self._begun

    def is_within_batch(self, done: int) -> bool:
        """Whether a batch was given of which ``done`` does not know yet."""
        return self._ticket is not None and self._ticket.number > done

    def rest(self) -> dict[str, Any]:
        """What of the loader lives on from one epoch to the next, as plain data."""
        return self._reader.rest()

    def take_rest(self, rest: dict[str, Any]) -> None:
        """Take back what `rest` returned, between two epochs."""
        self._reader.take_rest(rest)

    def indices(self) -> list[int] | None:
        """The sample indices of the batch that was given last; None if they cannot be known."""
        return None if self._ticket is None else self._reader.indices(self._ticket)

    def shut_down(self) -> None:
        """End worker processes that outlive an epoch."""
        self._reader.shut_down()


def length_of(loader: Any) -> float:
    """The loader's number of batches; inf if it has no length."""
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, IterableDataset) and not hasattr(dataset, "__len__"):
        return math.inf
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return math.inf


def has_exact_length(loader: Any) -> bool:
    """Whether the loader surely gives as many batches as its length says: torch's own samplers do."""
    if isinstance(loader, (list, tuple)):
        return True
    if isinstance(loader, CombinedLoader):
        return all(has_exact_length(part) for part in loader.flattened)
    if not is_plain(loader):
        return False
    if loader.batch_sampler is None:
        return type(loader.sampler) in TORCH_SAMPLERS
    return type(loader.batch_sampler) is BatchSampler and type(loader.batch_sampler.sampler) in TORCH_SAMPLERS


def make_source(loader: Any, name: str, limit: int | float, limit_name: str) -> Source:
    """Check one loader and apply the limit.

    Args:
        loader: a `DataLoader` or any iterable of batches.
        name: the hook that gave it.
        limit: batches (int), or a fraction of them (float from 0 to 1).
        limit_name: the Trainer's argument that set the limit.

    Raises:
        DataError: if it is not iterable, has no batches, or has no length that a fraction could be taken of.
    """
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise DataError(f"{name} gave {loader!r}, which cannot be iterated over. Return a DataLoader.")
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise DataError(
            f"{name} gave a {type(loader).__name__}, which is a dataset: it would be read sample by sample. Wrap it: "
            "DataLoader(dataset, batch_size=…)."
        )
    length = length_of(loader)
    if length == 0:
        raise DataError(f"{name} gave a loader without batches{_why_empty(loader)}.")
    if isinstance(limit, int):
        total: float = min(length, limit)
    elif length == math.inf:
        if limit not in (0.0, 1.0):
            raise DataError(
                f"{limit_name}={limit} is a fraction, but the loader of {name} has no length. Give a number of batches."
            )
        total = 0 if limit == 0.0 else math.inf
    else:
        total = int(length * limit)
        if total == 0 and limit > 0:
            raise DataError(
                f"{limit_name}={limit} of the {int(length)} batches of {name} is less than one batch. "
                f"Use at least {1 / length:.3g}, or {limit_name}=1 for one batch."
            )
    return Source(loader, name, total, has_exact_length(loader))


def _why_empty(loader: Any) -> str:
    if not isinstance(loader, DataLoader):
        return ""
    samples = len(loader.dataset)  # type: ignore[arg-type]
    dropped = " and drop_last=True" if loader.drop_last else ""
    return f": its dataset has {samples} samples, batch_size={loader.batch_size}{dropped}"


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the loader's samplers the epoch, where they want to know it to shuffle anew."""
    parts = loader.flattened if isinstance(loader, CombinedLoader) else [loader]
    for part in parts:
        batch_sampler = getattr(part, "batch_sampler", None)
        owners = (part, getattr(part, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
        for owner in {id(owner): owner for owner in owners}.values():  # a sampler may be a list, which has no hash
            set_it = getattr(owner, "set_epoch", None)
            if callable(set_it):
                set_it(epoch)


def without_shuffle(loader: Any, name: str) -> Any:
    """Return a loader over the same data in order, as ``overfit_batches`` wants: each epoch the same batches."""
    if isinstance(loader, CombinedLoader):
        return loader.with_loaders([without_shuffle(part, name) for part in loader.flattened])
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    sampler = loader.sampler if loader.batch_sampler is None else getattr(loader.batch_sampler, "sampler", None)
    if type(sampler) is SequentialSampler:
        return loader
    in_order: Any = None
    if type(sampler) is RandomSampler:
        in_order = SequentialSampler(sampler.data_source)
    elif type(sampler) is SubsetRandomSampler:
        in_order = sampler.indices  # of no other sample: the rest may be what is validated on
    if type(as_torch(loader)) is not DataLoader or type(loader.batch_sampler) is not BatchSampler or in_order is None:
        warn(
            "overfit-shuffle",
            f"overfit_batches: the loader of {name} has a sampler or batch sampler of its own, so it goes on drawing batches "
            "in its own order. Return a loader with shuffle=False to overfit on the same batches.",
        )
        return loader
    warn("overfit-shuffle", f"overfit_batches: the loader of {name} is read in order instead of being shuffled.")
    own = loader.batch_sampler
    return rebuilt(loader, batch_sampler=BatchSampler(in_order, own.batch_size, own.drop_last))
