"""Loading one batch of a map-style dataset, in a worker with random numbers that are the batch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset, get_worker_info

from leyden.data.gather import gathering
from leyden.data.generators import owned_generators, seed_generators
from leyden.data.worker import ignore_preemption_signals
from leyden.seed import seed_all

Fetch = Callable[[Any], Any]


def samples_of(dataset: Any, batched: bool) -> Fetch:
    """What gives the samples of indices, as torch's own loader does: at once if the dataset has ``__getitems__``."""
    if not batched:
        load: Fetch = dataset.__getitem__
        return load
    at_once: Fetch | None = getattr(dataset, "__getitems__", None)
    return at_once or (lambda indices: [dataset[index] for index in indices])


def fetcher(dataset: Any, collate: Callable[[Any], Any], batched: bool) -> Fetch:
    """What loads and collates one batch in the pass that begins now."""
    samples = samples_of(dataset, batched)

    def fetch(indices: Any) -> Any:
        return collate(samples(indices))

    return gathering(dataset, collate, fetch) if batched else fetch


def as_loaded(batch: Any) -> Any:
    """The ``collate_fn`` over a `SeededDataset`, whose batches are collated already."""
    return batch


class SeededDataset(Dataset[Any]):
    """A dataset that is asked for a batch with the seed of it, for workers.

    Without that, what a worker draws would depend on which batches it happened to load before, and so on how many workers
    there are. Generators that the dataset owns are seeded as well: as copies they would be alike in all workers.
    """

    def __init__(self, dataset: Any, collate: Any, batched: bool) -> None:
        self.dataset = dataset
        self._collate = collate
        self._batched = batched
        self._fetch: Fetch | None = None  # made in the worker, where it is used
        self._own: dict[str, Any] = {}

    def __getitem__(self, tagged: tuple[int, Any]) -> Any:
        seed, indices = tagged
        if self._fetch is None:
            self._fetch = fetcher(self.dataset, self._collate, self._batched)
            self._own = owned_generators(self.dataset, self._collate)
        seed_all(seed)
        seed_generators(self._own, seed)
        return self._fetch(indices)

    __getitems__ = __getitem__


class WorkerInit:
    """Called once in each worker: outlives preemption signals, shows the user's own dataset, calls the user's function."""

    def __init__(self, own: Callable[[int], Any] | None) -> None:
        self._own = own

    def __call__(self, worker_id: int) -> None:
        """Called by torch in the worker ``worker_id``, before it loads anything."""
        ignore_preemption_signals()
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, SeededDataset):
            object.__setattr__(info, "dataset", info.dataset.dataset)  # it is a frozen dataclass
        if self._own is not None:
            self._own(worker_id)
