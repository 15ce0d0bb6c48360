"""Loaders as the loop sees them: a length that can be trusted, a limit, and how many batches follow."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
from leyden.data.indexed import TORCH_SAMPLERS, cut_of, is_plain, items_of, knows_ranks, rebuilt
from leyden.data.prefetch import copies_for, one_ahead
from leyden.data.reader import Position, Reader, Ticket, as_torch
from leyden.data.reading import list_cut, make_reader
from leyden.data.shares import Division, Share
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
        share: of which rank; None for one process.
        training: whether all ranks end in the same batch; else each reads to its end.
        whole: batches per epoch before the limit, as far as they are known.
        least: the least of all ranks' ``total``.
        most: the greatest of them.
    """

    loader: Any
    name: str
    total: float
    exact: bool
    around: Callable[[Iterator[Any]], Iterator[Any]] | None = None
    reader: Reader | None = None
    share: Share | None = None
    training: bool = False
    whole: float = math.inf
    least: float | None = None
    most: float | None = None

    def __post_init__(self) -> None:
        self.least = self.total if self.least is None else self.least
        self.most = self.total if self.most is None else self.most
        self._announced = False
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
        self._check_ranks(position)
        total = self.epoch_total(position)
        reader, self._begun, self._ticket, self._before = self._reader, position, None, None
        reading = reader.read(position, total)
        reading = reading if self.around is None else self.around(reading)
        if total != math.inf and self.exact:
            following = max(0, int(total) - start)  # a restart may find fewer batches than there were
            reading = islice(reading, following)
            copies = copies_for(move, reader, index)
            if copies is not None:
                reading, move = one_ahead(reading, copies), None
            for batch, ticket in reading:
                self._ticket, self._before = ticket, self._ticket
                following -= 1
                yield (batch if move is None else move(batch, index)), following
            return
        if total != math.inf:
            reading = islice(reading, max(0, int(total) - start))  # without asking once more for the end
        read = deque(islice(reading, ahead() + 1))
        if reader.only_once and not read and total and not start:
            raise DataError(
                f"{self.name} gave no batch. A generator can be read only once: return an object whose __iter__ starts "
                "anew, such as a DataLoader."
            )
        while known := self._agreed(len(read)):
            self._before = self._ticket
            batch, self._ticket = read.popleft()
            yield (batch if move is None else move(batch, index)), known - 1
            read.extend(islice(reading, max(0, ahead() + 1 - len(read))))

    @property
    def divided(self) -> bool:
        """Whether ranks read different parts of the loader by its indices, so that `position` is the same on all of them."""
        return self._reader.divided

    @property
    def even(self) -> bool:
        """Whether all ranks surely have the same number of batches."""
        return self.share is None or self.training or (self.exact and self.least == self.most)

    @property
    def weight(self) -> float:
        """What the loss of the batch that was given last counts in the mean over ranks; 0 for one that only fills a gap."""
        return 1.0 if self._ticket is None else self._reader.weight(self._ticket)

    def limited(self, batches: int) -> Source:
        """The same, of at most so many batches."""
        assert self.least is not None
        assert self.most is not None
        return replace(
            self, total=min(self.total, batches), least=min(self.least, batches), most=min(self.most, batches)
        )

    def epoch_total(self, position: Position | None) -> float:
        """Batches of an epoch that goes on at ``position``, those before it included.

        It is ``total``, except where the epoch was begun by another number of ranks or in batches of another size.
        """
        left = None if position is None or self.total == math.inf else self._reader.left(position)
        if position is None or left is None or self.whole == math.inf:
            return self.total
        done = max(0, self.whole - left)  # as many of our batches as have been used
        return int(position["count"]) + max(0, self.total - done)

    def _check_ranks(self, position: Position | None) -> None:
        if position is None or self.divided or self._announced:
            return
        before, now = position.get("ranks", 1), 1 if self.share is None else self.share.of
        if before == now:
            return
        self._announced = True
        if self.share is None or self.share.rank == 0:
            warn(
                "ranks-changed",
                f"{self.name}: the present epoch was begun by {before} ranks and goes on with {now}. This loader is not "
                "divided by leyden, so in the rest of this epoch samples may come twice or be left out; later epochs are whole.",
            )

    def _agreed(self, known: int) -> int:
        """How many batches all ranks know to come, of the ``known`` ones here; a collective per batch."""
        if self.share is None or not self.training:
            return known
        least = self.share.lowest(known)
        if least == 0:
            most = -self.share.lowest(-known)
            if most and self.share.rank == 0 and not self._announced:
                self._announced = True
                warn(
                    "uneven-ranks",
                    f"{self.name}: one rank has run out of batches before the others, so the epoch ends for all ranks, and what "
                    "the others have left is not trained on. Give each rank as many batches.",
                )
        return least

    def position(self, done: int | None = None) -> Position | None:
        """Where the loader stood after ``done`` batches of this epoch, as plain data; None before the first.

        Args:
            done: all that were given, or all but the one that is being trained on; None for all.
        """
        for ticket in (self._ticket, self._before):
            if ticket is not None and (done is None or ticket.number <= done):
                place = self._reader.position(ticket)
                return place if self.share is None or self.divided else {**place, "ranks": self.share.of}
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


def length_of(loader: Any, division: Division | None = None) -> float:
    """The number of batches of a pass, on the rank of ``division``; inf if it is not known."""
    if division is not None and division.divides:
        if isinstance(loader, CombinedLoader):
            return _combined_length(loader, division)
        if isinstance(loader, (list, tuple)):
            return list_cut(division).length(len(loader))
        plain = as_torch(loader)
        if is_plain(plain) and not knows_ranks(plain):
            items = items_of(plain)
            return math.inf if items is None else cut_of(plain, division).length(items)
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, IterableDataset) and not hasattr(dataset, "__len__"):
        return math.inf
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return math.inf


def _combined_length(loader: CombinedLoader, division: Division | None) -> float:
    lengths = [length_of(part, division) for part in loader.flattened]
    if math.inf in lengths:  # as len() of it
        return math.inf
    if loader.mode == "sequential":
        return sum(lengths)
    return (min if loader.mode == "min_size" else max)(lengths, default=0)


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


def make_source(
    loader: Any,
    name: str,
    limit: int | float,
    limit_name: str,
    share: Share | None = None,
    training: bool = False,
    divides: bool = True,
) -> Source:
    """Check one loader and apply the limit.

    Args:
        loader: a `DataLoader` or any iterable of batches.
        name: the hook that gave it.
        limit: batches of each rank (int), or a fraction of them (float from 0 to 1).
        limit_name: the Trainer's argument that set the limit.
        share: of which rank; None for one process. With it, this is a collective.
        training: whether all ranks are to have the same number of batches.
        divides: whether to divide the loader among ranks.

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
    division = None if share is None else Division(share.rank, share.of, training, divides, share.broadcast)
    own = length_of(loader, division)
    length = own if division is None else length_of(loader, replace(division, rank=0))  # no rank has more
    if length == 0:
        ranks = f", among {share.of} ranks" if share is not None and divides else ""
        raise DataError(f"{name} gave a loader without batches{_why_empty(loader)}{ranks}.")
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
    reader = make_reader(loader, name, division=division)
    source = Source(loader, name, min(own, total), has_exact_length(loader), None, reader, share, training, length)
    return source if share is None else _agreed_on(source, share)


def _agreed_on(source: Source, share: Share) -> Source:
    """The same source, with what all ranks must know of it alike."""
    numbers = share.range(int(min(source.total, _ENDLESS)))
    least, most = (math.inf if number == _ENDLESS else number for number in numbers)
    exact = bool(share.lowest(int(source.exact)))
    if not source.training:
        return replace(source, exact=exact, least=least, most=most)
    if least < most and share.rank == 0:
        more = "no length" if most == math.inf else f"{most}"
        warn(
            "uneven-ranks",
            f"{source.name}: one rank has {least} batches per epoch and another {more}. An epoch ends for all ranks after "
            f"{least}; what the others have left is not trained on. Give each rank as many batches.",
        )
    return replace(source, total=least, exact=exact, least=least, most=most)


_ENDLESS = 1 << 62


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
