"""Read torch's `DataLoader` over a map-style dataset: the same samples, in the same order, augmented alike, after any restart.

A pass is a function of the random state at its start and of the number of its batch:

- **Order.** On resume the sampler is started again from the state of then, and passed over without loading a sample.
- **Augmentation.** Each batch is loaded with random numbers of its own, seeded by the pass and the batch's number, in the
  main process or in any worker. Nothing that training draws depends on how many workers load.
"""

from __future__ import annotations

import copy
import itertools
import math
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    default_convert,
)
from torch.utils.data.distributed import DistributedSampler

from leyden.data.generators import generator_states, owned_generators, seed_generators, set_generator_states
from leyden.data.reader import Position, Reader, Ticket, as_torch, has_state, shut_down_workers
from leyden.data.seeded import Fetch, SeededDataset, WorkerInit, as_loaded, fetcher
from leyden.data.shares import Cut, Division, Piece, Rounds, batch_seed, is_rank_aware, listed
from leyden.data.worker import end_at_exit, signals_held_back
from leyden.errors import warn
from leyden.seed import (
    RandomStream,
    capture_random_state,
    derived_seed,
    exchange_numpy_generator,
    isolated_random_state,
    restore_random_state,
)

_END = object()
TORCH_SAMPLERS = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)


def is_plain(loader: Any) -> bool:
    """Whether it is torch's `DataLoader` over a map-style dataset, or a subclass that reads as that does.

    Those are subclasses that change only how they are made, and torchdata's ``StatefulDataLoader``: it gives the same batches,
    but its state lacks the random numbers that workers draw. `leyden.data.DataLoader` is one as well.
    """
    loader = as_torch(loader)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    kind = type(loader)
    if kind.__module__.partition(".")[0] == "torchdata":
        return True
    return all(getattr(kind, name) is getattr(DataLoader, name) for name in ("__iter__", "_get_iterator"))


def draws_nothing(dataset: Any, collate: Any) -> bool:
    """Whether loading surely draws no random number: tensors, lists and ranges, and parts of them."""
    if collate is not default_collate and collate is not default_convert:
        return False
    while type(dataset) is Subset:
        dataset = dataset.dataset
    if type(dataset) is ConcatDataset:
        return all(draws_nothing(part, collate) for part in dataset.datasets)
    return isinstance(dataset, torch.Tensor) or type(dataset) in (TensorDataset, list, tuple, range)


def knows_ranks(loader: DataLoader[Any]) -> bool:
    """Whether one of the loader's samplers divides the data by itself, such as a `DistributedSampler`."""
    return is_rank_aware(loader.batch_sampler) or is_rank_aware(loader.sampler)


def size_of(loader: DataLoader[Any]) -> int | None:
    """Samples in a batch, where the sampler's order can be cut anew; None where it comes in whole batches."""
    batches = loader.batch_sampler
    if not isinstance(batches, BatchSampler):
        return None
    # torchdata's is torch's with a state
    own = type(batches) is not BatchSampler and type(batches).__module__.partition(".")[0] != "torchdata"
    return None if own else int(batches.batch_size)


def cut_of(loader: DataLoader[Any], division: Division | None) -> Cut:
    """How the loader's order is cut."""
    size = size_of(loader)
    drop_last = size is not None and bool(loader.batch_sampler.drop_last)  # type: ignore[union-attr]
    if division is None:
        return Cut(0, 1, True, size, drop_last)
    return Cut(division.rank, division.of, division.training, size, drop_last)


def order_to_cut(loader: DataLoader[Any]) -> Any:
    """The sampler whose order is cut: of single samples if possible, else of batches."""
    batches: Any = loader.batch_sampler
    if batches is None:
        return loader.sampler
    return batches if size_of(loader) is None else batches.sampler


def items_of(loader: DataLoader[Any]) -> int | None:
    """The length of the order that is cut; None if it is not known."""
    order = order_to_cut(loader)
    try:
        return len(order)
    except (TypeError, NotImplementedError):
        return None


class IndexedReader(Reader):
    """A `DataLoader` over a map-style dataset.

    Args:
        loader: what is read.
        name: the hook that gave it, for messages.
        division: among ranks; None for one process.
    """

    def __init__(self, loader: DataLoader[Any], name: str, division: Division | None = None) -> None:
        self.loader = loader
        self._name = name
        self._division = division
        self._rank = 0 if division is None else division.rank
        self.divided = division is not None and division.divides and not knows_ranks(loader)
        self._cut = cut_of(loader, division if self.divided else None)
        self._batched = loader.batch_sampler is not None
        self._sampler: Any = loader.batch_sampler if self._batched else loader.sampler
        inner = getattr(self._sampler, "sampler", None) if type(self._sampler) is BatchSampler else self._sampler
        self._items = order_to_cut(loader)
        self._known = type(inner) in TORCH_SAMPLERS
        self._draws = not draws_nothing(loader.dataset, loader.collate_fn)
        # workers read ahead by themselves; without them a dataset or a sampler might look at what has been trained
        self.reads_ahead = loader.num_workers > 0 or (self._known and not self._draws)
        self._own = owned_generators(loader.dataset, loader.collate_fn) if self._draws else {}
        self._samplers: dict[str, Any] = {
            name: owner for name, owner in (("outer", self._sampler), ("inner", inner)) if has_state(owner)
        }
        pinned = loader.pin_memory and torch.accelerator.is_available()
        self._direct = loader.num_workers == 0 and not pinned
        self._feed = _Feed()
        self._workers: DataLoader[Any] | None = None  # torch's loader, reading from the feed

    def read(self, position: Position | None = None, limit: float = math.inf) -> Iterator[tuple[Any, Ticket]]:
        """See `Reader.read`. Passing over batches loads no samples."""
        cuts = self.divided or self._is_odd(position)
        if position is None:
            start, count = self._begin(), 0
            with self._as_first(start):
                order = (
                    self._cut.pieces(self._order(start, self._rounds())) if cuts else self._order(start, self._sampler)
                )
        else:
            start, count = position.get("start") or self._begin(), int(position["count"])
            with isolated_random_state():
                order = self._resumed(start, position, cuts)
        if limit != math.inf:
            order = islice(order, max(0, int(limit) - count))  # workers must not draw indices beyond the limit
        return (self._load_here if self._direct else self._load_in_workers)(order, start, count, cuts)

    def position(self, ticket: Ticket) -> Position:
        """Return the ticket as plain data.

        In it are how many items of the sampler's order have been used of the epoch, by all ranks together, and a check number of
        the last of them, by which a resumed order is known.
        """
        place, detail, size = super().position(ticket), ticket.detail, self._cut.size
        if isinstance(detail, Piece):
            checked = listed(detail.checked)
            last = _check_number(checked if size else checked[-1])
            return {**place, "last": last, **_used(detail.used, size and len(checked))}
        used = ticket.number * (size or 1)
        if size and detail is not None:
            used += len(detail) - size
        if self._division is not None and not self.divided:  # each rank has samples of its own
            return place
        return {**place, "last": _check_number(detail), **_used(used, size and len(detail or ()))}

    def left(self, position: Position | None) -> float | None:
        """See `Reader.left`."""
        items = items_of(self.loader)
        return None if items is None else self._cut.length(items, self._used_before(position))

    def weight(self, ticket: Ticket) -> float:
        """See `Reader.weight`."""
        return ticket.detail.weight if isinstance(ticket.detail, Piece) else 1.0

    def indices(self, ticket: Ticket) -> list[int] | None:
        """The sample indices of the ticket's batch."""
        own = _own(ticket.detail)
        return None if own is None or not self._batched else list(own)

    def rest(self) -> dict[str, Any]:
        """See `Reader.rest`. The dataset's generators are not in it: they are seeded for each batch."""
        samplers = {name: copy.deepcopy(sampler.state_dict()) for name, sampler in self._samplers.items()}
        return {"generators": generator_states(self._order_generators()), "samplers": samplers}

    def take_rest(self, rest: dict[str, Any]) -> None:
        """See `Reader.take_rest`."""
        set_generator_states(self._order_generators(), rest.get("generators", {}))
        for name, state in rest.get("samplers", {}).items():
            if name in self._samplers:
                self._samplers[name].load_state_dict(copy.deepcopy(state))

    def _order_generators(self) -> dict[str, Any]:
        return owned_generators(self.loader.generator, self._sampler, but=self.loader.dataset)

    def shut_down(self) -> None:
        """End persistent workers."""
        if self._workers is not None:
            shut_down_workers(self._workers)
        self._workers = None

    def _begin(self) -> dict[str, Any]:
        """What a pass over this loader depends on."""
        division = self._division if self.divided else None
        if division is None or division.broadcast is None:
            return self._present()
        start: dict[str, Any] = division.broadcast(self._present() if division.leads else None)
        return start

    def _present(self) -> dict[str, Any]:
        state = torch.default_generator.get_state()
        own = self.loader.generator  # the loader draws from it instead, so that the other may stand still
        return {
            "seed": derived_seed(bytes((state if own is None else own.get_state()).tolist())),
            # torch's own samplers draw from torch alone, which saves 5 KB in a checkpoint
            "random": {"torch": state} if self._known else capture_random_state(),
            **self.rest(),
        }

    @contextmanager
    def _as_first(self, start: dict[str, Any]) -> Iterator[None]:
        """Draw what rank 0 draws; that rank's random state moves on, as that of one process, the others' stay."""
        if not self.divided or self._division is None or self._division.leads:
            yield
            return
        with isolated_random_state():
            restore_random_state(start["random"])
            self.take_rest(start)
            yield

    def _order(self, start: dict[str, Any], sampler: Any) -> Iterator[Any]:
        """Start the sampler; it draws what it draws under torch's own iterator (of workers that are not persistent)."""
        torch.empty((), dtype=torch.int64).random_(generator=self.loader.generator)  # torch's seed for workers
        order = iter(sampler) if self._known else _apart(sampler, derived_seed(start["seed"], "order"))
        for first in order:  # now, for workers would ask for it before training draws anything
            return chain([first], order)
        return order

    def _rounds(self, used: int = 0, remembered: int = 1) -> Rounds:
        return Rounds(self._items, self._cut.width, used, remembered)

    def _used_before(self, position: Position | None) -> int:
        """Items of the order that had been used."""
        if position is None:
            return 0
        if "used" not in position and position.get("start"):  # of a version that knew one process only
            return int(position["count"]) * (self._cut.size or 1)
        return int(position.get("used", int(position["count"]) * self._cut.width))

    def _is_odd(self, position: Position | None) -> bool:
        """Whether the epoch was begun by other ranks, or in batches of another size, and goes on within one of ours."""
        return position is not None and self._used_before(position) != int(position["count"]) * self._cut.width

    def _resumed(self, start: dict[str, Any], position: Position, cuts: bool) -> Iterator[Any]:
        """Start the sampler as it was started then, and pass over what was trained on."""
        restore_random_state(start["random"])
        self.take_rest(start)
        last: Any = None
        if cuts:
            used, size = self._used_before(position), self._cut.size
            rounds = self._rounds(used, position.get("checked") or size or 1)
            order = self._cut.pieces(self._order(start, rounds), used)
            passed = list(rounds.passed)
            last = passed if size else passed[-1] if passed else None
        else:
            order = self._order(start, self._sampler)
            for last in islice(order, int(position["count"])):  # noqa: B007
                pass
        if position.get("last") not in (None, _check_number(last)):
            warn(
                "data-order",
                f"{self._name}: batch {position['count']} of the present epoch has other samples than when the checkpoint was "
                f"written, so the order of the rest differs as well. Either the dataset has changed, or "
                f"{type(self._sampler).__name__} depends on more than set_epoch, the global random state and the generators "
                "among its attributes: give it state_dict and load_state_dict.",
            )
        return order

    def _load_here(
        self, order: Iterator[Any], start: dict[str, Any], count: int, cuts: bool
    ) -> Iterator[tuple[Any, Ticket]]:
        fetch = fetcher(self.loader.dataset, self.loader.collate_fn, self._batched)
        if cuts:
            fetch = _of_pieces(fetch)
        if not self._draws:
            for number, indices in enumerate(order, count + 1):
                yield fetch(indices), Ticket(start, number, indices)
            return
        stream = RandomStream(0)
        for number, indices in enumerate(order, count + 1):
            seed = batch_seed(start["seed"], number, self._rank)
            with stream.begin(seed):
                seed_generators(self._own, seed)
                batch = fetch(indices)
            yield batch, Ticket(start, number, indices)

    def _load_in_workers(
        self, order: Iterator[Any], start: dict[str, Any], count: int, cuts: bool
    ) -> Iterator[tuple[Any, Ticket]]:
        given: deque[Any] = deque()

        def tagged() -> Iterator[tuple[int, Any]]:
            for number, indices in enumerate(order, count + 1):
                given.append(indices)
                yield batch_seed(start["seed"], number, self._rank), _own(indices)

        if self._workers is None:
            self._workers = _fed(self.loader, self._feed, self._batched, self.divided)
        self._feed.order = tagged()
        in_order = cuts or getattr(self.loader, "in_order", True)
        with signals_held_back():  # until the workers know what to do with them
            batches = iter(self._workers)
        end_at_exit(batches)
        # without workers torch loads here, to pin memory
        apart = nullcontext() if self.loader.num_workers else RandomStream(0)
        for number in itertools.count(count + 1):
            with apart:
                batch = next(batches, _END)
            if batch is _END:
                return
            if self._draws and self.loader.num_workers:
                exchange_numpy_generator()
            indices = given.popleft()
            yield batch, Ticket(start, number, indices if in_order else None)


class _Feed:
    """A batch sampler that gives what it was given for the present pass."""

    order: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.order


def _fed(loader: DataLoader[Any], feed: _Feed, batched: bool, divided: bool) -> DataLoader[Any]:
    """A loader like ``loader`` whose workers load what ``feed`` says, seeded for each batch."""
    order: dict[str, Any] = {"batch_sampler": feed} if batched else {"batch_size": None, "sampler": feed}
    if divided and not getattr(loader, "in_order", True):
        order["in_order"] = True  # all ranks train on parts of the same global batch
    return rebuilt(
        loader,
        **order,
        dataset=SeededDataset(loader.dataset, loader.collate_fn, batched),
        collate_fn=as_loaded,
        worker_init_fn=WorkerInit(loader.worker_init_fn) if loader.num_workers else None,
        generator=torch.Generator(),  # its draw must not be one of the program's
    )


ARGUMENTS = (
    "dataset", "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
    "generator", "prefetch_factor", "persistent_workers", "in_order",
)  # fmt: skip
"""The arguments of a `DataLoader` but for those that say in which order it reads."""


def rebuilt(loader: DataLoader[Any], **changed: Any) -> DataLoader[Any]:
    """Return a DataLoader like ``loader``, but for the order and what else is ``changed``.

    Args:
        loader: also of a subclass that lacks newer options, such as ``in_order``.
        **changed: arguments of `DataLoader`, a ``batch_sampler`` or a ``sampler`` among them.
    """
    arguments = {name: getattr(loader, name) for name in ARGUMENTS if hasattr(loader, name)} | changed
    if arguments["num_workers"] == 0:  # set later on, when the loader may have what is refused without workers
        arguments.update(persistent_workers=False, prefetch_factor=None)
    return DataLoader(**arguments)


def order_of(loader: DataLoader[Any]) -> dict[str, Any]:
    """The arguments that say in which order ``loader`` reads."""
    if isinstance(loader.dataset, IterableDataset):
        return {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    if loader.batch_sampler is None:
        return {"batch_size": None, "sampler": loader.sampler}
    return {"batch_sampler": loader.batch_sampler}


def _apart(sampler: Any, seed: int) -> Iterator[Any]:
    """Iterate over a user's sampler with random numbers of its own, whoever draws in between."""
    stream = RandomStream(seed)
    with stream:
        iterator = iter(sampler)
    while True:
        with stream:
            try:
                indices = next(iterator)
            except StopIteration:
                return
        yield indices


def _of_pieces(fetch: Fetch) -> Fetch:
    return lambda piece: fetch(piece.own)


def _own(detail: Any) -> Any:
    return detail.own if isinstance(detail, Piece) else detail


def _used(used: int, checked: int | None) -> dict[str, int]:
    """How many items of the order have been used, and how many of the last ones the check number is of."""
    return {"used": used, "checked": checked} if checked else {"used": used}


def _check_number(indices: Any) -> int | None:
    return None if indices is None else zlib.crc32(repr(indices).encode())
