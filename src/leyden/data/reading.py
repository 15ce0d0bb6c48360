"""How any loader is read: torch's own by its indices, one with a state by that, any other by reading it again."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from leyden.data.combined import CombinedLoader
from leyden.data.generators import generator_states, owned_generators, set_generator_states
from leyden.data.indexed import IndexedReader, is_plain
from leyden.data.reader import Position, Reader, Ticket, as_torch, has_state, shut_down_workers
from leyden.data.seeded import WorkerInit
from leyden.data.shares import Cut, Division, Rounds, batch_seed
from leyden.data.worker import end_at_exit, signals_held_back
from leyden.errors import DataError, warn
from leyden.seed import (
    RandomStream,
    capture_random_state,
    derived_seed,
    isolated_random_state,
    restore_random_state,
    seed_all,
)


def make_reader(loader: Any, name: str, among_others: bool = False, division: Division | None = None) -> Reader:
    """Choose how a loader is read.

    Args:
        loader: a `DataLoader`, a `CombinedLoader`, or any iterable of batches.
        name: the hook that gave it, for messages.
        among_others: whether it is read together with others.
        division: among ranks; None for one process.
    """
    if isinstance(loader, CombinedLoader):
        return CombinedReader(loader, name, division)
    loader = as_torch(loader)
    if is_plain(loader):
        return IndexedReader(loader, name, division)
    if isinstance(loader, (list, tuple)):
        return ListReader(loader, division)
    rank = 0 if division is None else division.rank
    if has_state(loader):
        return StatefulReader(loader, loader, among_others, rank)
    if isinstance(loader, DataLoader) and loader.num_workers == 0 and has_state(loader.dataset):
        return StatefulReader(loader, loader.dataset, among_others, rank)
    return OpaqueReader(loader, name, rank)


class StatefulReader(Reader):
    """A loader, or the dataset in it, that has ``state_dict`` and ``load_state_dict`` and so keeps its own position.

    Its state is asked for after each batch, and copied: that is what makes reading ahead harmless.

    Args:
        loader: what is read.
        owner: the loader, or the dataset in it.
        notes_end: whether the last ticket says that the pass has ended, for which each batch waits for the next. Without
            that, nobody knows whether a dataset that goes back to its beginning there has been read or is to be read.
        rank: whose random numbers the batches are loaded with.
    """

    def __init__(self, loader: Any, owner: Any, notes_end: bool = False, rank: int = 0) -> None:
        self.loader = loader
        self._rank = rank
        self._owner = owner
        self._notes_end = notes_end

    def read(self, position: Position | None = None, limit: float = math.inf) -> Iterator[tuple[Any, Ticket]]:
        """See `Reader.read`."""
        start, count = _begin(position, self.loader), 0
        if position is None or "state" not in position:
            with isolated_random_state():  # whether it draws may depend on whether it has been put at a position
                iterator = iter(self.loader)
        else:
            count = int(position["count"])
            with isolated_random_state():
                restore_random_state(start["random"])
                try:
                    self._owner.load_state_dict(copy.deepcopy(position["state"]))
                    iterator = iter(() if position.get("ended") else self.loader)
                except AssertionError as error:  # torchdata's, for another number of workers
                    raise DataError(
                        f"{type(self._owner).__name__} does not take up the state that it had when the checkpoint was written: "
                        f"{error}. Make it as it was then, with as many workers."
                    ) from error
        return self._read(iterator, start, count, limit)

    def position(self, ticket: Ticket) -> Position:
        """Return the ticket as plain data."""
        state, ended = ticket.detail
        return {**super().position(ticket), "state": state, "ended": ended}

    def rest(self) -> dict[str, Any]:
        """See `Reader.rest`."""
        return {"state": copy.deepcopy(self._owner.state_dict())}

    def take_rest(self, rest: dict[str, Any]) -> None:
        """See `Reader.take_rest`."""
        if "state" in rest:
            self._owner.load_state_dict(copy.deepcopy(rest["state"]))

    def shut_down(self) -> None:
        """End persistent workers."""
        shut_down_workers(self.loader)

    def _read(
        self, iterator: Iterator[Any], start: dict[str, Any], count: int, limit: float
    ) -> Iterator[tuple[Any, Ticket]]:
        reading = _seeded(iterator, start["seed"], count, limit, self._rank)
        following = next(reading, None)
        while following is not None:
            number, batch = following
            state, following = copy.deepcopy(self._owner.state_dict()), None
            if self._notes_end and (following := next(reading, None)) is None:
                state = copy.deepcopy(self._owner.state_dict())
                yield batch, Ticket(start, number, (state, True))
                return
            yield batch, Ticket(start, number, (state, False))
            following = following or next(reading, None)


class ListReader(Reader):
    """Batches in a list or tuple; ranks take them in turns."""

    def __init__(self, loader: Sequence[Any], division: Division | None = None) -> None:
        self.loader = loader
        self.divided = division is not None and division.divides
        self._cut = list_cut(division)

    def read(self, position: Position | None = None, limit: float = math.inf) -> Iterator[tuple[Any, Ticket]]:
        """See `Reader.read`."""
        start = _begin(position, self.loader)
        count, used = (0, 0) if position is None else (int(position["count"]), self._used(position))
        pieces = self._cut.pieces(iter(Rounds(self.loader, self._cut.width, used)), used)
        return (
            (piece.own, Ticket(start, number, piece.used))
            for number, piece in enumerate(islice(pieces, max(0, int(min(limit, _MANY)) - count)), count + 1)
        )

    def position(self, ticket: Ticket) -> Position:
        """Return the ticket as plain data."""
        return {**super().position(ticket), "used": ticket.detail}

    def left(self, position: Position | None) -> float | None:
        """See `Reader.left`."""
        return self._cut.length(len(self.loader), 0 if position is None else self._used(position))

    def _used(self, position: Position) -> int:
        width = 1 if position.get("start") else self._cut.width  # a version that knew one process only did not note it
        return int(position.get("used", int(position["count"]) * width))


_MANY = 1 << 62


def list_cut(division: Division | None) -> Cut:
    """How a list of batches is divided."""
    if division is None or not division.divides:
        return Cut(0, 1, True, None)
    return Cut(division.rank, division.of, division.training, None)


class OpaqueReader(Reader):
    """Any other iterable of batches: to go on, it is read again from its start, which one line says."""

    def __init__(self, loader: Any, name: str, rank: int = 0) -> None:
        self.loader = loader
        self._rank = rank
        self.reads_ahead = isinstance(loader, DataLoader) and loader.num_workers > 0  # as its workers do
        if self.reads_ahead:
            self.loader = copy.copy(loader)  # the user's own stays as it is
            self.loader.worker_init_fn = WorkerInit(loader.worker_init_fn)
            self.loader._iterator = None  # and so do workers of it that live on
        self._name = name

    def read(self, position: Position | None = None, limit: float = math.inf) -> Iterator[tuple[Any, Ticket]]:
        """See `Reader.read`. Batches that were trained on are loaded again; `_fast_forward` says how exact that is."""
        start = _begin(position, self.loader)
        done = 0 if position is None else int(position["count"])
        if done:
            warn("fast-forward", self._fast_forward(done))
        with isolated_random_state() if done else nullcontext():
            if done:
                restore_random_state(start["random"])
                set_generator_states(owned_generators(self.loader), start["generators"])
            with signals_held_back():
                iterator = iter(self.loader)
            end_at_exit(iterator)
            self.only_once = iterator is self.loader
            reading = self._read(iterator, start, limit)
            next(islice(reading, done - 1, done), None) if done else None
        return reading

    def shut_down(self) -> None:
        """End persistent workers."""
        shut_down_workers(self.loader)

    def _fast_forward(self, done: int) -> str:
        workers = getattr(self.loader, "num_workers", 0)
        dataset = getattr(self.loader, "dataset", self.loader)
        inexact = (
            " Random numbers drawn in persistent workers are not those of the first time."
            if getattr(self.loader, "persistent_workers", False)
            else ""
        )
        advice = "Use torchdata's StatefulDataLoader" if workers else "Give it state_dict and load_state_dict"
        return (
            f"{self._name}: {type(dataset).__name__} cannot be put at a position, so the {done} batches before it are read again "
            f"and passed over.{inexact} {advice} to go on at once."
        )

    def _read(self, iterator: Iterator[Any], start: dict[str, Any], limit: float) -> Iterator[tuple[Any, Ticket]]:
        for number, batch in _seeded(iterator, start["seed"], 0, limit, self._rank):
            yield batch, Ticket(start, number, None)


def _seeded(iterator: Iterator[Any], seed: int, done: int, limit: float, rank: int) -> Iterator[tuple[int, Any]]:
    """Number the batches after the ``done`` first ones, each read with random numbers of its own."""
    stream = RandomStream(0)
    while done < limit:
        done += 1
        with stream.begin(batch_seed(seed, done, rank)):
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield done, batch


def _begin(position: Position | None, loader: Any) -> dict[str, Any]:
    if position is not None and position.get("start"):
        start: dict[str, Any] = position["start"]
        return start
    state = capture_random_state()
    return {
        "seed": derived_seed(bytes(state["torch"].tolist())),
        "random": state,
        "generators": generator_states(owned_generators(loader)),
    }


class CombinedReader(Reader):
    """Several loaders read together; each keeps its own place.

    A loader that is started in the middle of a pass, because it comes later or comes again, begins with random numbers of its
    own: with those of the program, its order would depend on how far ahead of training it is read.
    """

    def __init__(self, loader: CombinedLoader, name: str, division: Division | None = None) -> None:
        self.loader = loader
        self._division = division
        parts = None if division is None else division.told()
        self._readers = [make_reader(part, name, among_others=True, division=parts) for part in loader.flattened]
        self.divided = all(reader.divided for reader in self._readers)
        self.reads_ahead = all(reader.reads_ahead for reader in self._readers)
        self._first: dict[str, Any] | None = None  # random state of rank 0, on the others

    def read(self, position: Position | None = None, limit: float = math.inf) -> Iterator[tuple[Any, Ticket]]:
        """See `Reader.read`."""
        self._first = None
        if position is None:
            self._agree()
            state = torch.default_generator.get_state() if self._first is None else self._first["torch"]
            seed = derived_seed(bytes(state.tolist()))
            place = {"start": {"seed": seed}, "count": 0, "present": 0}
            place.update(ended=[False] * len(self._readers), parts=[None] * len(self._readers))
            position = place
        return (self._in_sequence if self.loader.mode == "sequential" else self._together)(position, limit)

    def _agree(self) -> None:
        """Give all ranks the random state of rank 0 for this pass: of the program, and of the loaders that are divided."""
        division = self._division
        if division is None or not division.divides or division.broadcast is None:
            return
        own = None
        if division.leads:
            own = capture_random_state(), [reader.rest() if reader.divided else None for reader in self._readers]
        state, rests = division.broadcast(own)
        if division.leads:
            return
        self._first = state
        for reader, rest in zip(self._readers, rests, strict=True):
            if rest is not None:
                reader.take_rest(rest)

    def _open(self, index: int, position: Position | None, limit: float) -> Iterator[tuple[Any, Ticket]]:
        """Begin to read one of the loaders, or go on, with the random numbers that rank 0 does it with."""
        if self._first is None:
            return self._readers[index].read(position, limit)
        with isolated_random_state():
            restore_random_state(self._first)
            reading = self._readers[index].read(position, limit)
            self._first = capture_random_state()
        return reading

    def left(self, position: Position | None) -> float | None:
        """See `Reader.left`."""
        parts: Any = [None] * len(self._readers) if position is None else position.get("parts")
        if parts is None:
            return None
        left = [reader.left(part) for reader, part in zip(self._readers, parts, strict=True)]
        known = [each for each in left if each is not None]
        if len(known) < len(left):
            return None
        if self.loader.mode == "sequential":
            present = 0 if position is None else int(position["present"])
            return sum(known[present:], 0.0)
        if self.loader.mode == "min_size":
            return min(known, default=0)
        ended = [False] * len(left) if position is None else position["ended"]
        return max((each for each, over in zip(known, ended, strict=True) if not over), default=0.0)

    def weight(self, ticket: Ticket) -> float:
        """The mean of the loaders' weights: how their batches make up the loss is not known."""
        present, ended, tickets, _ = ticket.detail
        if self.loader.mode == "sequential":
            inside: Reader = self._readers[present]
            return inside.weight(tickets[present])
        over = ended if self.loader.mode == "max_size" else [False] * len(tickets)
        weights = [
            reader.weight(part)
            for reader, part, gone in zip(self._readers, tickets, over, strict=True)
            if isinstance(part, Ticket) and not gone
        ]
        return sum(weights) / len(weights)

    def position(self, ticket: Ticket) -> Position:
        """Return the tickets of all loaders as plain data."""
        present, ended, tickets, rests = ticket.detail
        # a loader that had ended before the restart has no ticket, but still the position of then
        parts = [
            reader.position(part) if isinstance(part, Ticket) else part
            for reader, part in zip(self._readers, tickets, strict=True)
        ]
        place = {"count": ticket.number, "present": present, "ended": list(ended), "parts": parts}
        return {"start": ticket.start, **place, "rests": list(rests)}

    def rest(self) -> dict[str, Any]:
        """See `Reader.rest`."""
        return {"parts": [reader.rest() for reader in self._readers]}

    def take_rest(self, rest: dict[str, Any]) -> None:
        """See `Reader.take_rest`."""
        for reader, part in zip(self._readers, rest.get("parts", ()), strict=False):
            reader.take_rest(part)

    def shut_down(self) -> None:
        """End the persistent workers of all loaders."""
        for reader in self._readers:
            reader.shut_down()

    def _in_sequence(self, position: Position, limit: float) -> Iterator[tuple[Any, Ticket]]:
        start, count, parts = position["start"], int(position["count"]), position["parts"]
        tickets: list[Ticket | None] = [None] * len(parts)
        for reader, rest in zip(self._readers, position.get("rests", ()), strict=False):
            reader.take_rest(rest)
        rests = [reader.rest() for reader in self._readers]  # of those that are not being read
        for index in range(position["present"], len(parts)):
            inside = parts[index]
            before = count - (0 if inside is None else int(inside["count"]))
            if inside is None and index > 0:
                reading = self._apart(index, derived_seed(start["seed"], index), limit - before)
            else:
                reading = self._open(index, inside, limit - before)
            for batch, ticket in reading:
                count += 1
                tickets[index] = ticket
                yield batch, Ticket(start, count, (index, (), tuple(tickets), tuple(rests)))
            tickets[index], rests[index] = None, self._readers[index].rest()

    def _together(self, position: Position, limit: float) -> Iterator[tuple[Any, Ticket]]:
        start, count, ended = position["start"], int(position["count"]), list(position["ended"])
        whole = limit if self.loader.mode != "max_size_cycle" else math.inf  # of one loader's pass
        resumed: list[Position | None] = list(position["parts"])
        tickets: list[Any] = list(position["parts"])

        def open_part(index: int) -> Iterator[tuple[Any, Ticket]]:
            inside, resumed[index] = resumed[index], None
            before = tickets[index]
            if inside is not None or before is None:
                return self._open(index, inside, whole)
            begun = before.start if isinstance(before, Ticket) else before["start"]
            return self._apart(index, derived_seed(begun["seed"], "again"), whole)

        for items in self.loader.rounds(open_part, ended):
            count += 1
            tickets = [tickets[i] if item is None else item[1] for i, item in enumerate(items)]
            batch = self.loader.structured([None if item is None else item[0] for item in items])
            yield batch, Ticket(start, count, (0, tuple(ended), tuple(tickets), ()))

    def _apart(self, index: int, seed: int, limit: float) -> Iterator[tuple[Any, Ticket]]:
        with isolated_random_state():
            seed_all(seed)
            return self._readers[index].read(None, limit)
