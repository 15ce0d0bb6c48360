"""Reading a loader: the order and the random numbers of torch's own, and taking it up again at any batch."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)
from torch.utils.data.distributed import DistributedSampler

from leyden.checkpoint.format import decode, encode
from leyden.data import CombinedLoader
from leyden.data.indexed import IndexedReader, draws_nothing, is_plain
from leyden.data.loader import Source, make_source
from leyden.data.reading import OpaqueReader, StatefulReader, make_reader
from leyden.errors import LeydenWarning
from leyden.seed import capture_random_state, restore_random_state, seed_everything

SAMPLES = 11


class Noisy(Dataset[Any]):
    """Samples augmented by every kind of random number."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples
        self.loaded: list[int] = []
        self.rng = np.random.default_rng(0)
        self.transform = {"steps": [random.Random(1)]}

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> list[float]:
        self.loaded.append(index)
        own = [float(self.rng.random()), self.transform["steps"][0].random()]
        return [float(index), torch.rand(()).item(), float(np.random.randn()), random.gauss(0, 1), *own]


class Drawing(Sampler[int]):
    """A user's sampler that draws each index when it is asked for."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(SAMPLES):
            yield int(torch.randint(SAMPLES, ())) if random.random() < 0.5 else int(np.random.randint(SAMPLES))

    def __len__(self) -> int:
        return SAMPLES


class Remembering(Sampler[list[int]]):
    """A user's batch sampler whose order depends on how often it was read, which it keeps."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[list[int]]:
        self.passes += 1
        for index in range(6):
            yield [(index * self.passes) % SAMPLES, self.passes]

    def state_dict(self) -> dict[str, int]:
        return {"passes": self.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.passes = state["passes"]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from ([float(index), torch.rand(()).item(), random.random()] for index in range(SAMPLES))


class StreamWithState(Stream):
    def __init__(self) -> None:
        self.index = 0

    def __iter__(self) -> Iterator[Any]:
        while self.index < SAMPLES:
            self.index += 1
            yield [float(self.index), torch.rand(()).item()]
        self.index = 0

    def state_dict(self) -> dict[str, int]:
        return {"index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.index = state["index"]


def load(data: Any = None, **options: Any) -> DataLoader[Any]:
    options = options if "batch_sampler" in options or "batch_size" in options else {"batch_size": 2, **options}
    return DataLoader(Noisy() if data is None else data, **options)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


LOADERS: dict[str, Callable[[int], Any]] = {
    "in order": lambda workers: load(num_workers=workers),
    "shuffled": lambda workers: load(num_workers=workers, shuffle=True),
    "generator": lambda workers: load(num_workers=workers, shuffle=True, generator=generator()),
    "unbatched": lambda workers: load(num_workers=workers, shuffle=True, batch_size=None),
    "drop_last": lambda workers: load(num_workers=workers, shuffle=True, drop_last=True),
    "replacement": lambda workers: load(num_workers=workers, sampler=RandomSampler(range(SAMPLES), True, 40)),
    "weighted": lambda workers: load(num_workers=workers, sampler=WeightedRandomSampler([1.0, 2, 3, 4], 13)),
    "subset": lambda workers: load(num_workers=workers, sampler=SubsetRandomSampler([1, 3, 5, 7, 9])),
    "distributed": lambda workers: load(num_workers=workers, sampler=DistributedSampler(range(SAMPLES), 2, 1)),  # type: ignore[arg-type]
    "own sampler": lambda workers: load(num_workers=workers, sampler=Drawing()),
    "own batches": lambda workers: load(num_workers=workers, batch_sampler=BatchSampler(Drawing(), 3, False)),
    "own with state": lambda workers: load(num_workers=workers, batch_sampler=Remembering()),
    "persistent": lambda workers: load(num_workers=workers, shuffle=True, persistent_workers=workers > 0),
    "min_size": lambda workers: both("min_size", workers),
    "max_size": lambda workers: both("max_size", workers),
    "max_size_cycle": lambda workers: both("max_size_cycle", workers),
    "sequential": lambda workers: both("sequential", workers),
    "stream with state": lambda workers: load(StreamWithState()),
    "stream": lambda workers: load(Stream()),
}


def both(mode: str, workers: int) -> CombinedLoader:
    short = load(Noisy(5), shuffle=True, num_workers=workers)
    return CombinedLoader({"a": [load(shuffle=True, num_workers=workers)], "b": short}, mode)


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def train(reading: Iterator[Any], batches: int | None = None) -> list[Any]:
    """Read, drawing from every generator in between as training does; what was read, drawn, and the tickets."""
    return [
        (plain(batch), torch.rand(()).item(), float(np.random.rand()), random.random(), ticket)
        for batch, ticket in islice(reading, batches)
    ]


def stored(value: Any) -> Any:
    """What comes back from a checkpoint."""
    return decode(*encode({"position": value}))["position"]


def without_tickets(rows: list[Any]) -> list[Any]:
    return [row[:-1] for row in rows]


def two_passes(make: Callable[[int], Any], workers: int) -> tuple[Any, list[Any], list[Any]]:
    seed_everything(1, verbose=False)
    reader = make_reader(make(workers), "loader")
    return reader, train(reader.read()), train(reader.read())


@pytest.mark.filterwarnings("ignore:.*fast-forward")
@pytest.mark.parametrize("kind", LOADERS)
def test_a_pass_is_taken_up_at_any_batch_in_a_new_process_s_reader(kind: str) -> None:
    make = LOADERS[kind]
    reader, first, second = two_passes(make, 0)
    assert without_tickets(first) != without_tickets(second) or kind == "in order"
    for cut in range(1, len(second)):
        seed_everything(1, verbose=False)
        again = make_reader(make(0), "loader")
        train(again.read())
        train(again.read(), cut)  # to bring the program's own random numbers to the same place
        position = stored(reader.position(second[cut - 1][-1]))
        fresh = make_reader(make(0), "loader")
        assert without_tickets(train(fresh.read(position))) == without_tickets(second[cut:]), cut


@pytest.mark.filterwarnings("ignore:.*fast-forward")
@pytest.mark.parametrize("stream", [Stream, StreamWithState])
@pytest.mark.parametrize("mode", ["max_size_cycle", "sequential"])
def test_a_loader_that_is_opened_while_reading_ahead_of_training_goes_on_alike(mode: str, stream: Any) -> None:
    def make() -> Source:
        short = load(Noisy(5), shuffle=True)
        return make_source(CombinedLoader([load(stream()), short, load(stream())], mode), "loader", 1.0, "limit")

    def row(batch: Any) -> Any:
        return plain(batch), torch.rand(()).item(), random.random()

    seed_everything(1, verbose=False)
    whole, rows, cuts = make(), [], []
    for batch, _ in whole.batches(None, ahead=lambda: 3):
        rows.append(row(batch))
        cuts.append((stored(whole.position()), capture_random_state()))
    assert len(rows) >= 6
    for number, (position, state) in enumerate(cuts, 1):
        rest = make().batches(None, start=number, position=position, ahead=lambda: 3)
        restore_random_state(state)
        assert [row(batch) for batch, _ in rest] == rows[number:], number


@pytest.mark.parametrize("kind", [kind for kind in LOADERS if not kind.startswith("stream")])
def test_the_number_of_workers_changes_nothing(kind: str) -> None:
    make = LOADERS[kind]
    _, first, second = two_passes(make, 0)
    reader, first_by_workers, second_by_workers = two_passes(make, 2)
    assert without_tickets(first_by_workers) == without_tickets(first)
    assert without_tickets(second_by_workers) == without_tickets(second)
    cut = len(second) // 2
    seed_everything(1, verbose=False)
    again = make_reader(make(0), "loader")
    train(again.read())
    train(again.read(), cut)
    fresh = make_reader(make(1), "loader")
    position = stored(reader.position(second_by_workers[cut - 1][-1]))
    assert without_tickets(train(fresh.read(position))) == without_tickets(second[cut:])
    reader.shut_down()
    fresh.shut_down()


@pytest.mark.parametrize(
    "options", [{}, {"shuffle": True}, {"sampler": SubsetRandomSampler([4, 2, 0])}, {"batch_size": None}]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_the_numbers_drawn_afterwards_are_those_under_torch_s_own_iterator(
    options: Any, workers: int
) -> None:
    data = TensorDataset(torch.arange(9.0))
    seed_everything(5, verbose=False)
    expected = [([plain(batch), torch.rand(()).item()]) for _ in range(2) for batch in load(data, **options)]
    seed_everything(5, verbose=False)
    reader = make_reader(load(data, num_workers=workers, **options), "loader")
    found = [[plain(batch), torch.rand(()).item()] for _ in range(2) for batch, _ in reader.read()]
    assert found == expected


def test_memory_that_is_pinned_without_workers_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    seed_everything(1, verbose=False)
    expected = without_tickets(train(make_reader(load(shuffle=True), "loader").read()))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # as on a machine with a GPU
    reader = make_reader(load(shuffle=True, pin_memory=True), "loader")
    monkeypatch.undo()
    assert not reader._direct  # type: ignore[attr-defined]
    seed_everything(1, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there is nothing to pin for
        assert without_tickets(train(reader.read())) == expected


def test_passing_over_batches_loads_no_sample() -> None:
    loader = load(shuffle=True)
    reader = make_reader(loader, "loader")
    rows = train(reader.read(), 4)
    position = stored(reader.position(rows[-1][-1]))
    loader.dataset.loaded.clear()  # type: ignore[attr-defined]
    next(reader.read(position))
    assert len(loader.dataset.loaded) == 2  # type: ignore[attr-defined]


def test_each_batch_is_augmented_otherwise_and_alike_in_no_two_workers() -> None:
    rows = [batch for batch, *_ in train(make_reader(load(num_workers=2), "loader").read())]
    noise = [value for columns in rows for column in columns[1:] for value in column]
    assert len(set(noise)) == len(noise)


def test_workers_take_no_indices_beyond_the_limit() -> None:
    taken: list[int] = []

    class Counting(Drawing):
        def __iter__(self) -> Iterator[int]:
            for index in range(SAMPLES):
                taken.append(index)
                yield index

    reader = make_reader(load(sampler=Counting(), num_workers=2), "loader")
    assert len(train(reader.read(limit=2))) == 2
    assert taken == [0, 1, 2, 3]


def test_another_order_is_noticed() -> None:
    class Forgetful(Sampler[list[int]]):
        passes = 0

        def __iter__(self) -> Iterator[list[int]]:
            Forgetful.passes += 1
            yield from ([index, Forgetful.passes] for index in range(6))

    reader = make_reader(load(batch_sampler=Forgetful()), "train_dataloader")
    position = stored(reader.position(train(reader.read(), 3)[-1][-1]))
    with pytest.warns(LeydenWarning, match=r"train_dataloader: batch 3 .* other samples .* Forgetful depends on more"):
        reader.read(position)


def test_a_stream_without_state_is_read_again_and_says_so() -> None:
    reader = make_reader(load(Stream()), "train_dataloader")
    position = stored(reader.position(train(reader.read(), 3)[-1][-1]))
    with pytest.warns(LeydenWarning, match=r"Stream cannot be put at a position, so the 3 batches .* state_dict"):
        reader.read(position)


def test_batches_in_a_list_are_passed_over_in_silence() -> None:
    reader = make_reader([1, 2, 3, 4], "loader")
    position = stored(reader.position(train(reader.read(), 2)[-1][-1]))
    assert [batch for batch, _ in reader.read(position)] == [3, 4]
    assert [batch for batch, _ in reader.read(position, limit=3)] == [3]


def test_a_loader_with_state_goes_on_by_itself_even_where_batches_were_read_ahead() -> None:
    class Own:
        def __init__(self) -> None:
            self.place = [0]

        def __iter__(self) -> Iterator[int]:
            while self.place[0] < 6:
                self.place[0] += 1
                yield self.place[0]
            self.place[0] = 0

        def state_dict(self) -> Any:
            return {"place": self.place}  # not a copy

        def load_state_dict(self, state: Any) -> None:
            self.place = state["place"]

    reader = make_reader(Own(), "loader")
    assert isinstance(reader, StatefulReader)
    rows = train(reader.read(), 5)
    fresh = make_reader(Own(), "loader")
    assert [batch for batch, _ in fresh.read(stored(reader.position(rows[2][-1])))] == [4, 5, 6]


def test_which_loader_is_read_how() -> None:
    class Renamed(DataLoader[Any]):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, batch_size=2)

    class Other(DataLoader[Any]):
        def __iter__(self) -> Any:
            return super().__iter__()

    assert isinstance(make_reader(Renamed(range(3)), "x"), IndexedReader)
    assert isinstance(make_reader(Other(range(3)), "x"), OpaqueReader)  # type: ignore[arg-type]
    assert isinstance(make_reader(load(StreamWithState()), "x"), StatefulReader)
    assert isinstance(make_reader(load(StreamWithState(), num_workers=1), "x"), OpaqueReader)
    assert isinstance(make_reader(iter([1]), "x"), OpaqueReader)
    assert not is_plain(load(Stream()))


def test_a_stream_s_workers_that_the_user_has_started_stay_the_user_s() -> None:
    loader = load(Stream(), num_workers=1, persistent_workers=True)
    before = len(list(loader))
    reader = make_reader(loader, "x")
    assert len(list(reader.read())) == before
    reader.shut_down()
    assert len(list(loader)) == before
    del loader  # its workers end with it


def test_data_that_cannot_draw_is_loaded_without_exchanging_random_states() -> None:
    from torch.utils.data import default_collate

    tensors = TensorDataset(torch.zeros(3))
    for data in (
        tensors,
        torch.zeros(3),
        [1, 2],
        range(3),
        Subset(tensors, [0]),
        ConcatDataset([tensors, Subset(tensors, [1])]),
    ):
        assert draws_nothing(data, default_collate)
    for data in (Noisy(), Subset(Noisy(), [0]), ConcatDataset([tensors, Noisy()])):
        assert not draws_nothing(data, default_collate)
    assert not draws_nothing(tensors, list)


def test_workers_see_the_user_s_own_dataset_and_init_function() -> None:
    seen = list(make_reader(load(Informed(), num_workers=1, worker_init_fn=mark), "loader").read())
    assert [batch.tolist() for batch, _ in seen] == [[7, 7], [7, 7]]


class Informed(Dataset[Any]):
    mark = 0

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return self.mark


def mark(worker_id: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.mark = 7  # type: ignore[attr-defined]


def test_a_shared_order_object_is_not_a_list_that_grows(tmp_path: Any) -> None:
    """A position is of bounded size: random states, counters, nothing per batch."""
    reader = make_reader(load(Noisy(2000), shuffle=True, batch_size=1), "loader")
    rows = train(reader.read(), 1500)
    tensors, metadata = encode({"position": reader.position(rows[-1][-1])})
    size = sum(tensor.nbytes for tensor in tensors.values()) + sum(map(len, metadata.values()))
    assert size < 10_000


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize(("stream", "workers"), [(False, 0), (False, 2), (True, 0)])
def test_torchdata_s_stateful_loader_is_taken_up_where_it_stood(stream: bool, workers: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")

    def make() -> Any:
        data = StreamWithState() if stream else Noisy()
        return stateful.StatefulDataLoader(data, batch_size=2, num_workers=workers, shuffle=None if stream else True)

    reader, fresh, at_the_end, other = (make_reader(make(), "loader") for _ in range(4))
    seed_everything(1, verbose=False)
    train(reader.read())
    rest, random_state = stored(reader.rest()), capture_random_state()
    second = train(reader.read())
    position = stored(reader.position(second[2][-1]))
    restore_random_state(random_state)
    at_the_end.take_rest(rest)
    assert without_tickets(train(at_the_end.read())) == without_tickets(second)
    restore_random_state(random_state)
    train(other.read(), 3)  # to bring the program's own random numbers to the same place
    assert without_tickets(train(fresh.read(position))) == without_tickets(second[3:])
