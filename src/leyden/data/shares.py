"""Which part of a loader's data each rank reads.

Global batch k is the batch that one process with all ranks' batch sizes together would have: the sampler's order, cut. Each rank
takes a contiguous part of it. Loaders whose batches cannot be cut are divided by whole batches, in turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import RandomSampler, SequentialSampler

from leyden.seed import derived_seed

# What samplers that know about ranks call the number of these, or their own: torch's, torchvision's, those of other trainers.
_NAMES_OF_RANKS = ("num_replicas", "world_size", "rank", "num_shards", "data_parallel_size")
_MAX_DEPTH = 4  # of samplers that wrap samplers


@dataclass(frozen=True)
class Share:
    """Which of the ranks that read different data this one is, and how these agree.

    Attributes:
        rank: of this process among them, from 0.
        of: their number.
        broadcast: gives the object of rank 0 to all. A collective: all ranks call it, in the same order.
        lowest: gives the least of all ranks' numbers to all. A collective as well.
    """

    rank: int
    of: int
    broadcast: Callable[[Any], Any]
    lowest: Callable[[int], int]

    def range(self, number: int) -> tuple[int, int]:
        """The least and the greatest of all ranks' numbers; two collectives."""
        return self.lowest(number), -self.lowest(-number)


@dataclass(frozen=True)
class Division:
    """How one loader is to be divided.

    Attributes:
        rank: of this process, from 0.
        of: number of ranks.
        training: whether all ranks must have the same number of batches; else each sample is read once, and none repeated.
        divides: whether to divide at all, from ``use_distributed_sampler``.
        broadcast: see `Share`; None where whoever reads has given all ranks the same random state already.
    """

    rank: int
    of: int
    training: bool
    divides: bool = True
    broadcast: Callable[[Any], Any] | None = None

    @property
    def leads(self) -> bool:
        """Whether this rank draws from its own random state, and not from that of rank 0."""
        return self.rank == 0 or self.broadcast is None

    def told(self) -> Division:
        """The same for a part of a loader, whose reader has seen to the random state."""
        return replace(self, broadcast=None)


Items = list[Any] | range | Tensor
"""A part of a sampler's order."""


class Piece(NamedTuple):
    """What one rank reads of one global batch.

    Attributes:
        own: indices of samples, or one item of a sampler of batches.
        checked: indices of the whole global batch, or in a list its last item: by it an order is known again.
        used: items of the sampler's order that all ranks have used of this epoch after this batch.
        weight: what the rank's loss counts in the mean over ranks: 1 where all ranks have as many samples.
    """

    own: Any
    checked: Items
    used: int
    weight: float = 1.0


class Rounds:
    """A sampler's order, as many items at a time as all ranks together take.

    torch's own samplers are not asked for index after index where their order can be had at once: with many ranks most indices
    are of others, and only this rank's become Python's integers.

    Args:
        order: the sampler.
        width: items at a time.
        skip: items at the beginning to pass over.
        remembered: how many of these to keep in ``passed``.
    """

    def __init__(self, order: Iterable[Any], width: int, skip: int = 0, remembered: int = 1) -> None:
        self.passed: deque[Any] = deque(maxlen=remembered)
        self._order = order
        self._width = width
        self._skip = skip

    def __iter__(self) -> Iterator[Items]:
        """Begin anew."""
        at_once = _order_at_once(self._order)
        if at_once is not None:
            yield from self._sliced(*at_once)
            return
        order = iter(self._order)
        self.passed.extend(islice(order, self._skip))
        while whole := list(islice(order, self._width)):
            yield whole

    def _sliced(self, order: Items, find_end: Callable[[], object]) -> Iterator[Items]:
        skip = min(self._skip, len(order))
        self.passed.extend(listed(order[max(0, skip - (self.passed.maxlen or 1)) : skip]))
        for start in range(skip, len(order) + 1, self._width):
            whole = order[start : start + self._width]
            if len(whole) < self._width:
                find_end()
            if len(whole):
                yield whole


def _order_at_once(sampler: Any) -> tuple[Items, Callable[[], object]] | None:
    """What iterating over a sampler gives, drawn as it draws it, and what it does when it is asked for more."""
    if type(sampler) is SequentialSampler:
        return range(len(sampler.data_source)), lambda: None
    if type(sampler) is not RandomSampler or sampler.replacement or sampler.num_samples != len(sampler.data_source):
        return None
    generator = sampler.generator
    if generator is None:
        generator = torch.Generator()
        generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
    samples = sampler.num_samples
    # a user's generator is drawn from once more where the sampler finds its end
    return torch.randperm(samples, generator=generator), lambda: torch.randperm(samples, generator=generator)


def listed(items: Items) -> list[Any]:
    """The items in a list, of Python's integers where they are indices."""
    found: list[Any] = items.tolist() if isinstance(items, Tensor) else list(items)
    return found


@dataclass(frozen=True)
class Cut:
    """How a sampler's order is cut into batches, and these are given to ranks.

    Attributes:
        rank: of this process, from 0.
        of: number of ranks.
        training: see `Division`.
        size: samples in a batch of one rank; None where the order's items are whole batches.
        drop_last: whether the last global batch is left out if it is smaller. In evaluation, what one process would leave out.
    """

    rank: int
    of: int
    training: bool
    size: int | None
    drop_last: bool = False

    @property
    def width(self) -> int:
        """Items of the order that all ranks use together for one batch each."""
        return self.of * (self.size or 1)

    def length(self, items: int, used: int = 0) -> int:
        """The number of this rank's batches.

        Args:
            items: the order's length.
            used: how many of them have been used.
        """
        items -= items % self.size if self.size and self.drop_last and not self.training else 0
        full, rest = divmod(max(0, items - used), self.width)
        if self.training:
            return full + (rest > 0 and self.size is not None and not self.drop_last)
        return full + (self.rank < rest or (rest > 0 and self._balances(full)))

    def pieces(self, rounds: Iterator[Items], used: int = 0) -> Iterator[Piece]:
        """Cut what `Rounds` gives, ``used`` items of the epoch having been used before."""
        if self.size is None:
            return self._whole(rounds, used)
        return self._divided(rounds if self.training else self._evened(rounds), used)

    def _whole(self, rounds: Iterator[Items], used: int) -> Iterator[Piece]:
        for whole in rounds:
            if len(whole) < self.of and (self.training or self.rank >= len(whole)):
                return
            used += len(whole)
            yield Piece(listed(whole[self.rank : self.rank + 1])[0], whole[-1:], used)

    def _divided(self, rounds: Iterator[Items], used: int) -> Iterator[Piece]:
        for whole in rounds:
            samples = len(whole)
            if self.training and self.drop_last and samples < self.width:
                return
            small, larger = divmod(samples, self.of)
            start = self.rank * small + min(self.rank, larger)
            size = small + (self.rank < larger)
            used += samples
            if size:
                weight = size * self.of / samples if self.training else 1.0
                yield Piece(listed(whole[start : start + size]), whole, used, weight)
            elif self.training:  # one sample again, so that this rank too has a batch; it counts nothing
                yield Piece(listed(whole[-1:]), whole, used, 0.0)

    def _evened(self, rounds: Iterator[Items]) -> Iterator[Items]:
        """Give the last global batch a sample for each rank, from the one before it."""
        rounds = map(self._kept, rounds)
        present: Items = next(rounds, [])
        while len(present):
            following = next(rounds, [])
            missing = self.of - len(following)
            if len(following) and missing > 0 and self._balances(1):
                both = listed(present) + listed(following)
                present, following = both[: len(both) - self.of], both[len(both) - self.of :]
            yield present
            present = following

    def _kept(self, whole: Items) -> Items:
        """Leave out of the last global batch what one process would leave out."""
        assert self.size is not None
        return whole[: len(whole) - len(whole) % self.size] if self.drop_last else whole

    def _balances(self, full: int) -> bool:
        """Whether a last global batch with fewer samples than ranks can be helped by one of the ``full`` ones before it."""
        return full > 0 and self.size is not None and self.size > 1


def batch_seed(seed: int, number: int, rank: int = 0) -> int:
    """The seed of a batch's own random numbers: of the pass, the batch's number and, but for the first, the rank."""
    return derived_seed(seed, number) if rank == 0 else derived_seed(seed, number, rank)


def is_rank_aware(sampler: Any) -> bool:
    """Whether a sampler, a batch sampler, or one that it wraps, knows about ranks: by the names of its attributes."""
    for _ in range(_MAX_DEPTH):
        if sampler is None:
            return False
        if any(hasattr(sampler, name) for name in _NAMES_OF_RANKS):
            return True
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
    return False
