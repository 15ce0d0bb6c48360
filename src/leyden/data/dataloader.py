"""A `DataLoader` that can be taken up after any batch, also without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import Dataset, Sampler

from leyden.data.indexed import ARGUMENTS, order_of, rebuilt
from leyden.data.reader import Position, Reader, Ticket, as_torch
from leyden.data.reading import make_reader
from leyden.errors import DataError

Sample = TypeVar("Sample", covariant=True)


class DataLoader(TorchDataLoader[Sample]):
    """torch's `DataLoader`, faster for tensors in memory, and with a state: iteration goes on after the batch given last.

    It takes the arguments of torch's and gives the same batches in the same order. Differences:

    - ``persistent_workers`` is on where there are workers: they are started once and not in each epoch.
    - ``pin_memory`` is on where there is an accelerator whose copies are faster for it (all but MPS).
    - Batches of a map-style dataset are loaded with random numbers of their own, as in a Trainer (docs/resume.md).
    - ``state_dict`` and ``load_state_dict``. What order and random numbers of a pass follow from is in the state. Those of
      later passes follow from ``generator``, which is in the state as well; without one from torch's global random state,
      which is yours to save.

    A Trainer reads it like torch's, and keeps its place in its own checkpoints.

    Example:
        >>> loader = DataLoader(dataset, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
        >>> for batch in loader:
        ...     train_on(batch)
        ...     torch.save({"model": model.state_dict(), "data": loader.state_dict()}, path)

    Args:
        dataset: map-style or iterable. An iterable one goes on at once if it has ``state_dict`` and ``load_state_dict`` and
            there are no workers; else it is read again up to its place, which the warning ``fast-forward`` says.
        batch_size: see torch's documentation, as for all others.
        shuffle: likewise.
        sampler: likewise.
        batch_sampler: likewise.
        num_workers: likewise.
        collate_fn: likewise.
        pin_memory: None is True where there is an accelerator other than MPS.
        drop_last: see torch's documentation.
        timeout: likewise; in seconds.
        worker_init_fn: likewise.
        multiprocessing_context: likewise.
        generator: likewise.
        persistent_workers: None is True where there are workers. False starts them in each epoch: for a dataset that the
            program changes in between, for persistent workers keep the copy that they began with.
        **options: ``prefetch_factor``, ``in_order`` and what else torch's takes.
    """

    _torch: TorchDataLoader[Sample] | None
    _made_of: tuple[Any, ...]
    _reader: Reader | None
    _resumed: Position | None  # where the next pass is to go on
    _begun: Position | None  # where the present one did
    _ticket: Ticket | None  # of the batch that was given last
    _pass: object  # another one for each; of workers that live on, only the present pass can be read

    def __init__(
        self,
        dataset: Dataset[Sample],
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Sampler[Any] | Iterable[Any] | None = None,
        batch_sampler: Sampler[list[Any]] | Iterable[list[Any]] | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool | None = None,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: torch.Generator | None = None,
        *,
        persistent_workers: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            dataset, batch_size, shuffle, sampler, batch_sampler, num_workers, collate_fn,
            _pinning_helps() if pin_memory is None else pin_memory,
            drop_last, timeout, worker_init_fn, multiprocessing_context, generator,
            persistent_workers=num_workers > 0 if persistent_workers is None else persistent_workers,
            **options,
        )  # fmt: skip
        self._forget()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Begin a pass; after `load_state_dict` go on with the one of then, which may have no batch left."""
        reader = self._present_reader()
        self._begun, self._resumed, self._ticket, self._pass = self._resumed, None, None, object()
        return self._given(reader.read(self._begun), self._pass)

    def state_dict(self) -> dict[str, Any]:
        """Where the present pass stands after the batch that was given last, as plain data and tensors."""
        reader = self._present_reader()
        position = self._resumed or self._begun if self._ticket is None else reader.position(self._ticket)
        return {"position": position, "rest": reader.rest() if position is None else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on, in the next pass, where `state_dict` was called.

        Raises:
            DataError: if it is not the state of such a loader.
        """
        if set(state_dict) != {"position", "rest"}:
            raise DataError(
                f"This is not the state of a leyden.data.DataLoader: it has {sorted(map(str, state_dict))}, not position and "
                "rest. Pass what its state_dict() returned."
            )
        self._present_reader().take_rest(state_dict["rest"] or {})
        self._resumed, self._begun, self._ticket = state_dict["position"], None, None

    def _given(self, reading: Iterator[tuple[Any, Ticket]], present: object) -> Iterator[Any]:
        while True:
            if self.persistent_workers and self._pass is not present:
                raise DataError(
                    "This pass over the DataLoader has ended, for another has begun, and both have the same workers. To read it "
                    "twice at a time, say persistent_workers=False or make two of it."
                )
            batch, ticket = next(reading, (None, None))
            if ticket is None:
                break
            self._ticket = ticket
            yield batch
        if self._pass is present:
            self._begun = self._ticket = None

    def _present_reader(self) -> Reader:
        loader = self._as_torch()
        if self._reader is None:
            self._reader = make_reader(loader, type(self).__name__)
        return self._reader

    def _as_torch(self) -> TorchDataLoader[Sample]:
        """A loader apart: a reader of this one would hold it in a cycle, which delays the end of its workers."""
        made_of = tuple(getattr(self, name) for name in ARGUMENTS)  # some of them may be changed at any time
        if self._torch is None or any(now is not then for now, then in zip(made_of, self._made_of, strict=True)):
            if self._reader is not None:
                self._reader.shut_down()
            self._torch, self._made_of, self._reader = rebuilt(self, **order_of(self)), made_of, None
        return self._torch

    def _forget(self) -> None:
        self._torch, self._made_of, self._reader = None, (), None
        self._resumed = self._begun = self._ticket = self._pass = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy and another process get: not the pass in progress, nor its workers."""
        return {name: value for name, value in vars(self).items() if name not in _OF_A_PASS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()


_OF_A_PASS = frozenset(("_torch", "_made_of", "_reader", "_resumed", "_begun", "_ticket", "_pass"))


@as_torch.register(DataLoader)
def _(loader: DataLoader[Any]) -> TorchDataLoader[Any]:
    """torch's loader with the same dataset and samplers; itself where a subclass iterates in its own way."""
    own = any(getattr(type(loader), name) is not getattr(DataLoader, name) for name in ("__iter__", "_get_iterator"))
    return loader if own else loader._as_torch()


def _pinning_helps() -> bool:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator is not None and accelerator.type != "mps"
