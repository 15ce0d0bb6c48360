"""Data over ranks: what all of them read together is what one process with their batch sizes together reads."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice, product, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

import leyden as L
from leyden.checkpoint.format import decode, encode
from leyden.data import CombinedLoader
from leyden.data import DataLoader as OwnLoader
from leyden.data import indexed as indexed_module
from leyden.data.announce import describe_division
from leyden.data.loader import Source, make_source
from leyden.data.shares import Cut, Rounds, Share, batch_seed, is_rank_aware, listed
from leyden.errors import DataError, LeydenWarning
from leyden.seed import derived_seed, isolated_random_state, seed_all
from leyden.settings import Settings
from leyden.sources import Sources
from quiet import make_trainer
from ranks import run_ranks

SIZES = list(product(range(61), range(1, 6), range(1, 8), (False, True)))  # samples, ranks, batch size, drop_last


class Together:
    """Ranks that are read one after the other: each later one is told what rank 0 said."""

    def __init__(self, of: int) -> None:
        self.of = of
        self.said: list[Any] = []

    def share(self, rank: int) -> Share:
        heard = iter(self.said)

        def broadcast(value: Any) -> Any:
            if rank == 0:
                self.said.append(stored(value))
                return value
            return next(heard)

        return Share(rank, self.of, broadcast, lambda number: number)


def stored(value: Any) -> Any:
    """What comes back from a checkpoint."""
    return decode(*encode({"position": value}))["position"]


@contextmanager
def program(rank: int, seed: int = 3) -> Iterator[None]:
    """The random state of one rank's program: another one on each."""
    with isolated_random_state():
        seed_all(seed + 1000 * rank)
        yield


def pieces(
    samples: int, ranks: int, size: int | None, training: bool, drop_last: bool, used: int = 0
) -> list[list[Any]]:
    """By rank, what it reads of ``range(samples)``."""
    cuts = [Cut(rank, ranks, training, size, drop_last) for rank in range(ranks)]
    return [list(cut.pieces(iter(Rounds(range(samples), cut.width, used)), used)) for cut in cuts]


def test_together_the_ranks_train_on_one_process_s_batches_and_weigh_its_loss() -> None:
    for samples, ranks, size, drop_last in SIZES:
        wide = size * ranks
        model = [list(range(start, min(start + wide, samples))) for start in range(0, samples, wide)]
        if drop_last and model and len(model[-1]) < wide:
            model.pop()
        read = pieces(samples, ranks, size, True, drop_last)
        for rank, own in enumerate(read):
            assert len(own) == len(model) == Cut(rank, ranks, True, size, drop_last).length(samples)
            assert all(1 <= len(piece.own) <= size for piece in own)
        for number, batch in enumerate(model):
            row = [own[number] for own in read]
            assert list(chain.from_iterable(piece.own for piece in row if piece.weight)) == batch
            # what the average of the ranks' means is: the mean over the batch
            mean = sum(piece.weight * np.mean(piece.own) for piece in row) / ranks
            assert mean == pytest.approx(np.mean(batch), rel=1e-12)
            if len(batch) == wide:
                assert {piece.weight for piece in row} == {1.0}
            assert {piece.used for piece in row} == {min(samples, (number + 1) * wide)}


def test_evaluation_reads_each_sample_once_in_order_and_in_as_many_batches_on_each_rank_if_it_can() -> None:
    for samples, ranks, size, drop_last in SIZES:
        read = [[piece.own for piece in own] for own in pieces(samples, ranks, size, False, drop_last)]
        kept = samples - samples % size if drop_last else samples  # as one process evaluates
        in_turns = chain.from_iterable(zip_longest(*read, fillvalue=[]))
        assert list(chain.from_iterable(in_turns)) == list(range(kept))
        counts = [len(own) for own in read]
        assert counts == [Cut(rank, ranks, False, size, drop_last).length(samples) for rank in range(ranks)]
        assert all(1 <= len(batch) <= size for own in read for batch in own)
        assert counts == sorted(counts, reverse=True)
        assert counts[0] - counts[-1] <= 1
        if kept >= ranks and size > 1:
            assert len(set(counts)) == 1, (samples, ranks, size)


def test_whole_batches_are_taken_in_turns() -> None:
    for batches, ranks in product(range(20), range(1, 6)):
        training = [[piece.own for piece in own] for own in pieces(batches, ranks, None, True, False)]
        rounds = batches // ranks
        assert training == [list(range(rank, rounds * ranks, ranks)) for rank in range(ranks)]
        evaluation = [[piece.own for piece in own] for own in pieces(batches, ranks, None, False, False)]
        assert evaluation == [list(range(rank, batches, ranks)) for rank in range(ranks)]
        for rank in range(ranks):
            assert Cut(rank, ranks, True, None).length(batches) == rounds
            assert Cut(rank, ranks, False, None).length(batches) == len(evaluation[rank])


class Noisy(Dataset[Any]):
    """Samples with random numbers of their own."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> list[float]:
        return [float(index), torch.rand(()).item(), random.random()]


class Drawing(Sampler[int]):
    """A user's sampler, which draws by all generators and one of its own."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.rng = random.Random(5)

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[int]:
        left = list(range(self.samples))
        while left:
            draw = int(torch.randint(10**6, ())) + random.randrange(10**6) + int(np.random.randint(10**6))
            yield left.pop((draw + self.rng.randrange(10**6)) % len(left))


class Buckets(Sampler[list[int]]):
    """A user's batch sampler, with batches of several sizes."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(list(self._cut(list(range(self.samples)))))

    def __iter__(self) -> Iterator[list[int]]:
        yield from self._cut(torch.randperm(self.samples).tolist())

    def _cut(self, order: list[int]) -> Iterator[list[int]]:
        order = list(order)
        for size in chain.from_iterable([[2, 3, 1]] * self.samples):
            if order:
                yield [order.pop() for _ in range(min(size, len(order)))]


def load(samples: int = 23, size: int | None = 3, data: Any = None, **options: Any) -> DataLoader[Any]:
    data = TensorDataset(torch.arange(float(samples))) if data is None else data
    return DataLoader(data, **({"batch_sampler": options["batch_sampler"]} if "batch_sampler" in options else
                               {"batch_size": size, **options}))  # fmt: skip


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(8)


LOADERS: dict[str, Callable[[int, int], Any]] = {
    "in order": lambda n, b: load(n, b),
    "shuffled": lambda n, b: load(n, b, shuffle=True),
    "generator": lambda n, b: load(n, b, shuffle=True, generator=seeded()),
    "subset": lambda n, b: load(n, b, sampler=SubsetRandomSampler(range(n))),
    "with replacement": lambda n, b: load(n, b, sampler=RandomSampler(range(n), True, n, seeded())),
    "weighted": lambda n, b: load(n, b, sampler=WeightedRandomSampler([1.0] * n, n, False)),
    "own sampler": lambda n, b: load(n, b, sampler=Drawing(n)),
    "a list as sampler": lambda n, b: load(n, b, sampler=list(range(n))[::-1]),
    "own loader": lambda n, b: OwnLoader(TensorDataset(torch.arange(float(n))), b, shuffle=True),
}


def source_of(loader: Any, share: Share | None = None, limit: Any = 1.0, training: bool = True) -> Source:
    return make_source(loader, "train_dataloader", limit, "limit_train_batches", share, training)


def samples_of(batch: Any) -> list[int]:
    return [int(value) for value in (batch[0] if isinstance(batch, (list, tuple)) else batch)]


def epoch_of(
    make: Callable[[], Any], ranks: int, *, position: Any = None, batches: int | None = None, **options: Any
) -> tuple[list[list[list[int]]], list[Any]]:
    """Read one epoch, or its rest, or its first ``batches``; by rank what it read, and the positions after it."""
    together, read, positions = Together(ranks), [], []
    for rank in range(ranks):
        with program(rank):
            share = together.share(rank) if ranks > 1 else None
            source = source_of(make(), share, **options)
            start = 0 if position is None else position["count"]
            given = list(islice(source.batches(None, start=start, position=position), batches))
            assert batches is not None or not given or given[-1][1] == 0  # it knew how many follow
            whole = [following for _, following in given]
            assert whole == sorted(whole, reverse=True)
            read.append([samples_of(batch) for batch, _ in given])
            positions.append(source.position())
        source.shut_down()
    return read, positions


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_loader_s_ranks_read_what_one_process_reads(kind: str, ranks: int) -> None:
    for samples, size in ((23, 3), (24, 2), (7, 4), (2, 1)):
        read, positions = epoch_of(partial(LOADERS[kind], samples, size), ranks)
        one, _ = epoch_of(partial(LOADERS[kind], samples, size * ranks), 1)
        assert len({len(own) for own in read}) == 1
        for number, batch in enumerate(one[0]):
            row = list(chain.from_iterable(own[number] for own in read))
            assert row[: len(batch)] == batch
            assert set(row[len(batch) :]) <= {batch[-1]}  # a rank without a sample reads one again
        assert all(stored(position) == stored(positions[0]) for position in positions)


def test_orders_that_are_drawn_at_once_are_those_of_torch_s_samplers() -> None:
    makes: list[Callable[[], Sampler[int]]] = [
        lambda: SequentialSampler(range(11)),
        lambda: RandomSampler(range(11)),
        lambda: RandomSampler(range(11), generator=seeded()),
        lambda: RandomSampler(range(11), num_samples=7, generator=seeded()),
        lambda: RandomSampler(range(11), num_samples=25, generator=seeded()),
        lambda: RandomSampler(range(11), True, generator=seeded()),
    ]
    for make, width, asked in product(makes, (1, 3, 11, 12), (1, 2, 100)):
        found = []
        for cut in (Rounds, lambda sampler, width: BatchSampler(sampler, width, False)):
            with program(0):
                sampler = make()
                batches = [listed(batch) for batch in islice(iter(cut(sampler, width)), asked)]
                own = getattr(sampler, "generator", None)
                found.append((batches, torch.default_generator.get_state().tolist(), own and own.get_state().tolist()))
        assert found[0] == found[1], (make(), width, asked)


@pytest.mark.parametrize("sampler", [SequentialSampler, RandomSampler])
def test_an_order_at_once_is_passed_over_alike(sampler: Any) -> None:
    for skip in range(12):
        with program(0):
            order = list(sampler(range(11)))
        with program(0):
            rounds = Rounds(sampler(range(11)), 3, skip, 4)
            assert list(chain.from_iterable(map(listed, rounds))) == order[skip:]
            assert list(rounds.passed) == order[max(0, skip - 4) : skip]


def test_the_random_state_of_rank_0_moves_on_as_one_process_s_and_the_others_stay() -> None:
    def after(ranks: int, rank: int) -> tuple[Any, Any]:
        together = Together(ranks)
        for each in range(ranks):
            with program(each):
                before = torch.default_generator.get_state()
                source = source_of(load(shuffle=True), together.share(each) if ranks > 1 else None)
                next(iter(source.batches(None)))
                if each == rank:
                    return before, torch.default_generator.get_state()
        raise AssertionError

    assert after(3, 0)[1].equal(after(1, 0)[1])
    assert not after(3, 0)[1].equal(after(3, 0)[0])
    assert after(3, 2)[1].equal(after(3, 2)[0])


def test_generators_of_samplers_are_alike_on_all_ranks_from_then_on() -> None:
    together, orders = Together(2), []
    for rank in range(2):
        with program(rank):
            source = source_of(load(sampler=Drawing(12), size=2), together.share(rank))
            source.loader.sampler.rng.seed(rank)
            orders.append([[samples_of(batch) for batch, _ in source.batches(None)] for _ in range(3)])
    for first, second in zip(*orders, strict=True):
        assert sorted(chain(*first, *second)) == list(range(12))
    assert orders[0][0] != orders[0][1]


@pytest.mark.parametrize("kind", [kind for kind in LOADERS if kind != "with replacement"])
def test_an_epoch_goes_on_at_the_next_sample_with_other_ranks_and_other_batch_sizes(kind: str) -> None:
    make, choose = LOADERS[kind], random.Random(kind)
    for _ in range(25):
        samples = choose.randrange(1, 61)
        before, after, then = choose.randrange(1, 5), choose.randrange(1, 5), choose.randrange(1, 4)
        sizes = [choose.randrange(1, 6) for _ in range(3)]
        whole, _ = epoch_of(partial(make, samples, sizes[0]), before)
        done = choose.randrange(1, len(whole[0]) + 1)
        read, positions = epoch_of(partial(make, samples, sizes[0]), before, batches=done)
        weighed = [row_of(read, number) for number in range(done)]
        assert positions[0]["used"] == sum(map(len, weighed))
        more, positions = epoch_of(partial(make, samples, sizes[1]), after, position=stored(positions[0]),
                                   batches=2)  # fmt: skip
        weighed += [row_of(more, number) for number in range(len(more[0]))]
        if positions[0] is not None and positions[0]["used"] < samples:
            rest, _ = epoch_of(partial(make, samples, sizes[2]), then, position=stored(positions[0]))
            weighed += [row_of(rest, number) for number in range(len(rest[0]))]
        order, _ = epoch_of(partial(make, samples, samples), 1)
        assert list(chain.from_iterable(weighed)) == order[0][0], (samples, before, after, then, sizes, done)


def row_of(read: list[list[list[int]]], number: int) -> list[int]:
    """A global batch, without the sample that ranks without one read again: the last one, which comes again at the end."""
    row = list(chain.from_iterable(own[number] for own in read))
    while len(row) > 1 and row[-1] == row[-2]:
        row.pop()
    return row


def test_positions_without_ranks_know_how_many_samples_were_used() -> None:
    _, positions = epoch_of(lambda: load(23, 3, shuffle=True), 1, batches=4)
    assert positions[0]["used"] == 12
    _, positions = epoch_of(lambda: load(23, 3, shuffle=True), 1)
    assert positions[0]["used"] == 23


def test_a_position_of_a_version_without_ranks_goes_on_with_them() -> None:
    read, positions = epoch_of(lambda: load(23, 3, shuffle=True), 1, batches=2)
    old = {key: positions[0][key] for key in ("start", "count", "last")}
    for ranks in (1, 2):
        rest, _ = epoch_of(lambda: load(23, 3, shuffle=True), ranks, position=stored(old))
        assert sorted(chain(*read[0], *chain(*rest))) == list(range(23))


def test_another_order_is_noticed_with_other_ranks() -> None:
    _, positions = epoch_of(lambda: load(23, 3, shuffle=True), 3, batches=2)
    with pytest.warns(LeydenWarning, match="data-order"):
        epoch_of(lambda: load(25, 3, shuffle=True), 2, position=stored(positions[0]))
    _, positions = epoch_of(lambda: load(23, 3, sampler=Drawing(23)), 1, batches=2)
    with pytest.warns(LeydenWarning, match="data-order"):
        epoch_of(lambda: load(22, 3, sampler=Drawing(22)), 2, position=stored(positions[0]))


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_differs_between_ranks_and_goes_on_alike(workers: int) -> None:
    def noise(rank: int, position: Any = None, batches: int | None = None) -> tuple[list[Any], Any]:
        together = Together(2)
        for each in range(rank + 1):
            with program(each):
                loader = load(size=2, data=Noisy(12), shuffle=True, num_workers=workers)
                source = source_of(loader, together.share(each))
                start = 0 if position is None else position["count"]
                reading = source.batches(None, start=start, position=position)
                read = [[part.tolist() for part in batch] for batch, _ in islice(reading, batches)]
                place = source.position()
                source.shut_down()
        return read, place

    first, second = noise(0)[0], noise(1)[0]
    assert not {draw for batch in first for draw in batch[1]} & {draw for batch in second for draw in batch[1]}
    for rank, whole in enumerate((first, second)):
        read, place = noise(rank, batches=2)
        assert read == whole[:2]
        assert noise(rank, stored(place))[0] == whole[2:]
    # rank 0 draws what one process draws for the same number
    assert batch_seed(7, 3) == derived_seed(7, 3) == batch_seed(7, 3, 0)
    assert len({batch_seed(7, number, rank) for number in range(9) for rank in range(9)}) == 81


@pytest.mark.parametrize("workers", [0, 2])
def test_divided_loaders_read_tensors_at_once(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    class Refusing(TensorDataset):
        def __init__(self) -> None:
            super().__init__(torch.arange(23.0))

    def one_by_one(*_: Any) -> Any:
        raise AssertionError("sample by sample")

    monkeypatch.setattr("leyden.data.seeded.samples_of", lambda *_: one_by_one)
    for make in (DataLoader, OwnLoader):
        read, _ = epoch_of(partial(make, Refusing(), 3, shuffle=True, num_workers=workers), 2)
        assert sorted(chain(*read[0], *read[1])) == list(range(23))


def test_workers_read_divided_loaders_in_order() -> None:
    direct, _ = epoch_of(lambda: load(23, 3, shuffle=True), 2)
    assert epoch_of(lambda: load(23, 3, shuffle=True, num_workers=2, in_order=False), 2)[0] == direct


def test_whole_batches_of_own_batch_samplers_and_unbatched_loaders_are_divided() -> None:
    for make in (
        lambda: load(29, batch_sampler=Buckets(29)),
        lambda: load(29, None, data=[torch.full((2,), float(i)) for i in range(29)], shuffle=True),
        lambda: [torch.full((2,), float(i)) for i in range(29)],
    ):
        one, _ = epoch_of(make, 1)
        whole = one[0]
        for ranks in (2, 3, 4):
            read, _ = epoch_of(make, ranks)
            rounds = len(whole) // ranks
            assert read == [whole[rank : rounds * ranks : ranks] for rank in range(ranks)]
            if rounds > 2:
                _, positions = epoch_of(make, ranks, batches=2)
                assert positions[0]["used"] == 2 * ranks
                for then in (1, 2, 3):
                    rest, _ = epoch_of(make, then, position=stored(positions[0]))
                    left = whole[2 * ranks :]
                    left = left[: len(left) - len(left) % then]
                    assert [batch for row in zip(*rest, strict=True) for batch in row] == left


def test_evaluation_of_whole_batches_keeps_all_of_them() -> None:
    for make in (lambda: load(29, batch_sampler=Buckets(29)), lambda: [torch.full((2,), float(i)) for i in range(14)]):
        one, _ = epoch_of(make, 1)
        for ranks in (2, 3, 4):
            together, read = Together(ranks), []
            for rank in range(ranks):
                with program(rank):
                    source = source_of(make(), together.share(rank), training=False)
                    read.append([samples_of(batch) for batch, _ in source.batches(None)])
                    assert len(read[-1]) == source.total
            assert [batch for row in zip_longest(*read) for batch in row if batch] == one[0]


def test_limits_count_the_batches_of_a_rank() -> None:
    for limit, batches in ((3, 3), (0.5, 3), (1.0, 6), (100, 6)):
        read, _ = epoch_of(lambda: load(36, 2), 3, limit=limit)
        assert [len(own) for own in read] == [batches] * 3
        assert sorted(chain(*chain(*read))) == list(range(batches * 6))
    with pytest.raises(DataError, match="less than one batch"):
        epoch_of(lambda: load(36, 2), 3, limit=0.1)


def test_a_limited_epoch_goes_on_to_the_same_sample_with_other_ranks() -> None:
    read, positions = epoch_of(lambda: load(48, 2), 4, limit=0.5, batches=2)
    rest, _ = epoch_of(lambda: load(48, 2), 2, limit=0.5, position=stored(positions[0]))
    assert sorted(chain(*chain(*read), *chain(*rest))) == list(range(24))
    source = source_of(load(48, 2), Together(2).share(0), limit=0.5)
    assert (source.total, source.epoch_total(stored(positions[0])), source.epoch_total(None)) == (6, 4, 6)


def test_a_loader_without_a_batch_for_every_rank_is_refused_in_training() -> None:
    with pytest.raises(DataError, match=r"5 samples, batch_size=2 and drop_last=True, among 3 ranks"):
        source_of(load(5, 2, drop_last=True), Together(3).share(0))
    with pytest.raises(DataError, match="without batches, among 3 ranks"):
        source_of([1, 2], Together(3).share(2))
    assert source_of([1, 2], Together(3).share(2), training=False).total == 0


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size", "sequential"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_parts_of_a_combined_loader_are_divided_each(mode: str, ranks: int) -> None:
    def make(size: int) -> CombinedLoader:
        parts = {"a": load(23, size, shuffle=True), "b": load(9, size, sampler=Drawing(9))}
        return CombinedLoader(parts, mode)

    def flat(batch: Any) -> list[list[int]]:
        parts = [batch] if mode == "sequential" else [batch["a"], batch["b"]]
        return [[] if part is None else samples_of(part) for part in parts]

    def read(ranks: int, size: int, position: Any = None, batches: int | None = None) -> tuple[list[Any], list[Any]]:
        together, found, places = Together(ranks), [], []
        for rank in range(ranks):
            with program(rank):
                source = source_of(make(size), together.share(rank) if ranks > 1 else None)
                start = 0 if position is None else position["count"]
                reading = source.batches(None, start=start, position=position)
                found.append([flat(batch) for batch, _ in islice(reading, batches)])
                places.append(source.position())
                assert batches is not None or start + len(found[-1]) == source.epoch_total(position)
        return [joined(row) for row in zip(*found, strict=True)], places

    def joined(row: Sequence[list[list[int]]]) -> list[list[int]]:
        parts = [list(chain.from_iterable(part)) for part in zip(*row, strict=True)]
        for part in parts:
            while len(part) > 1 and part[-1] == part[-2]:
                part.pop()
        return parts

    one = read(1, 2 * ranks)[0]
    assert read(ranks, 2)[0] == one
    for cut in range(1, len(one)):
        begun, places = read(ranks, 2, batches=cut)
        assert begun + read(ranks, 2, stored(places[0]))[0] == one
        if mode != "max_size_cycle":
            rest = read(1, 2 * ranks, stored(places[0]))[0]
            assert begun + rest == one, cut


def test_weights_of_a_combined_loader_are_the_mean_of_its_parts() -> None:
    for mode, expected in (("min_size", [1.0, 4 / 3]), ("sequential", [1.0, 1.0, 1.0, 4 / 3])):
        with program(0):
            loader = CombinedLoader([load(8, 2), load(7, 2)], mode)
            source = source_of(loader, Together(2).share(0))
            weights = [source.weight for _ in source.batches(None)]
        if mode == "min_size":
            expected[-1] = (1 + expected[-1]) / 2
        assert weights == pytest.approx(expected)


def test_a_part_that_has_ended_has_no_weight() -> None:
    with program(0):
        source = source_of(CombinedLoader([load(8, 2), load(3, 2)], "max_size"), Together(2).share(0))
        assert [source.weight for _ in source.batches(None)] == pytest.approx([(1 + 4 / 3) / 2, 1.0])


def test_parts_that_own_generators_are_alike_on_all_ranks() -> None:
    together, read = Together(2), []
    for rank in range(2):
        with program(rank):
            parts: list[Any] = [load(12, 2, sampler=Drawing(12)), load(12, 2, shuffle=True, generator=seeded())]
            parts[0].sampler.rng.seed(rank)
            parts[1].generator.manual_seed(rank)
            source = source_of(CombinedLoader(parts, "min_size"), together.share(rank))
            read.append([[samples_of(part) for part in batch] for batch, _ in source.batches(None)])
    for part in range(2):
        assert sorted(chain(*(batch[part] for own in read for batch in own))) == list(range(12))


def test_weights_are_those_of_the_batch_that_is_trained_on() -> None:
    for ranks, weights in ((2, [[1, 1, 4 / 3], [1, 1, 2 / 3]]), (4, [[1, 4 / 3], [1, 4 / 3], [1, 4 / 3], [1, 0]])):
        together = Together(ranks)
        for rank in range(ranks):
            with program(rank):
                source = source_of(load(11, 2), together.share(rank))
                assert source.weight == 1.0
                found = [source.weight for _ in source.batches(None)]
            assert found == pytest.approx(weights[rank])
    source = source_of(load(11, 2))
    assert [source.weight for _ in source.batches(None)] == [1.0] * 6


class Shards(BatchSampler):
    """A user's batch sampler that knows about ranks."""

    world_size = 2


@pytest.mark.parametrize(
    "loader",
    [
        lambda: load(12, 2, sampler=DistributedSampler(range(12), 2, 1, shuffle=False)),  # type: ignore[arg-type]
        lambda: load(12, batch_sampler=Shards(range(1, 12, 2), 2, False)),
    ],
)
def test_samplers_that_know_about_ranks_are_left_alone(loader: Callable[[], Any]) -> None:
    with program(1):
        source = source_of(loader(), Together(2).share(1))
        read = [samples_of(batch) for batch, _ in source.batches(None)]
    assert read == [[1, 3], [5, 7], [9, 11]]
    assert not source.divided
    assert "own sampler" in describe_division(loader(), "train_dataloader", Together(2).share(0), True, True)


def test_a_position_of_rank_0_fits_the_own_samplers_of_others() -> None:
    def of_rank(rank: int) -> Source:
        loader = load(12, 2, sampler=DistributedSampler(range(12), 2, rank, shuffle=False))  # type: ignore[arg-type]
        return source_of(loader, Together(2).share(rank))

    source = of_rank(0)
    list(islice(source.batches(None), 2))
    rest = of_rank(1).batches(None, start=2, position=stored(source.position()))
    assert [samples_of(batch) for batch, _ in rest] == [[9, 11]]


def test_ranks_are_seen_in_samplers_that_wrap_others() -> None:
    inner: Any = DistributedSampler(range(12), 2, 1)  # type: ignore[arg-type]
    wrapped: Any = BatchSampler(inner, 2, False)
    assert is_rank_aware(BatchSampler(wrapped, 2, False))
    assert not is_rank_aware(BatchSampler(RandomSampler(range(3)), 2, False))
    assert not is_rank_aware(None)


def test_use_distributed_sampler_false_leaves_all_loaders_alone() -> None:
    for loader in (load(6, 2), [1, 2, 3], CombinedLoader([load(6, 2), load(6, 2)])):
        source = make_source(loader, "train_dataloader", 1.0, "limit", Together(2).share(0), True, divides=False)
        assert source.total == 3
        assert not source.divided
        assert len(list(source.batches(None))) == 3


class Stream(IterableDataset[Any]):
    def __init__(self, samples: int = 6) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        yield from (float(index) for index in range(self.samples))


def test_what_cannot_be_divided_is_read_by_each_rank_which_a_warning_says() -> None:
    share = Together(2).share(0)
    for loader in (DataLoader(Stream(), 2), iter([1, 2])):
        with pytest.warns(LeydenWarning, match=r"LEY-undivided\] train_dataloader.*each of 2 ranks reads all"):
            assert "not divided" in describe_division(loader, "train_dataloader", share, True, True)
        describe_division(loader, "train_dataloader", Together(2).share(1), True, True)  # the others are silent
        describe_division(loader, "train_dataloader", share, True, False)
    assert not source_of(DataLoader(Stream(), 2), share).divided


def test_a_change_of_ranks_is_said_where_an_epoch_cannot_go_on_exactly() -> None:
    def make() -> Any:
        return load(12, 2, sampler=DistributedSampler(range(12), 2, 0))  # type: ignore[arg-type]

    source = source_of(make(), Together(2).share(0))
    list(islice(source.batches(None), 1))
    position = stored(source.position())
    assert position["ranks"] == 2
    again = source_of(make(), Together(2).share(1))
    assert len(list(again.batches(None, start=1, position=position))) == 2  # of the same ranks: nothing to say
    with pytest.warns(LeydenWarning, match=r"ranks-changed.*by 2 ranks.*with 3"):
        list(source_of(make(), Together(3).share(0)).batches(None, start=1, position=position))


def test_an_evaluation_that_is_padded_and_other_numbers_of_ranks_are_warned_of() -> None:
    share = Together(2).share(0)
    odd = load(7, 2, sampler=DistributedSampler(range(7), 2, 0, shuffle=False))  # type: ignore[arg-type]
    with pytest.warns(LeydenWarning, match="padded-evaluation.*1 of 7 samples twice"):
        describe_division(odd, "val_dataloader", share, False, True)
    describe_division(odd, "train_dataloader", share, True, True)
    even = load(8, 2, sampler=DistributedSampler(range(8), 2, 0, shuffle=False))  # type: ignore[arg-type]
    describe_division(even, "val_dataloader", share, False, True)
    with pytest.warns(LeydenWarning, match="sampler-ranks.*by 2, but 3 ranks"):
        describe_division(even, "train_dataloader", Together(3).share(0), True, True)


def test_batches_that_are_trimmed_are_said() -> None:
    with pytest.warns(LeydenWarning, match="trimmed-batches.*5 batches.*2 ranks.*last 1 of"):
        describe_division([1] * 5, "train_dataloader", Together(2).share(0), True, True)
    describe_division([1] * 4, "train_dataloader", Together(2).share(0), True, True)
    describe_division([1] * 5, "val_dataloader", Together(2).share(0), False, True)


class Net(L.LightningModule):
    def training_step(self, batch: Any) -> None:
        pass


def test_sources_say_once_how_they_are_divided(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings()
    before = len(settings.reasons)
    sources = Sources(
        Net(), None, {"train": load(23, 3), "val": [load(9, 2), load(9, 2)]}, settings, None, Together(2).share(0)
    )
    for _ in range(2):
        assert sources.train().total == 4
        assert [source.total for source in sources.evaluation("val")] == [3, 3]
        sources.reload()
    assert [name for name, _ in settings.reasons[before:]] == ["train_dataloaders", "val_dataloaders"]
    out = capsys.readouterr().out
    assert out == "train_dataloaders: divided among 2 ranks: their batches of 3 make up one process's batch of 6.\n"


def test_one_rank_is_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings()
    sources = Sources(Net(), None, {"train": load(23, 3)}, settings, None, Together(1).share(0))
    assert sources.train().share is None
    assert capsys.readouterr().out == ""


def test_without_ranks_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("cut")

    monkeypatch.setattr(Cut, "pieces", refuse)
    monkeypatch.setattr(indexed_module, "Rounds", refuse)
    for make in LOADERS.values():
        source = source_of(make(11, 2))
        assert len(list(source.batches(None))) == 6


def test_a_trainer_goes_on_where_ranks_left_off(tmp_path: Path) -> None:
    seen: list[int] = []

    class Seeing(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.extend(samples_of(batch))
            return self.layer(batch[0][:, None]).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    read, positions = epoch_of(lambda: load(23, 2, shuffle=True), 3, batches=2)
    path = tmp_path / "two.ckpt"

    class Saving(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1 and not path.exists():
                trainer.save_checkpoint(path)

    make_trainer(tmp_path, Saving()).fit(Seeing(), load(23, 2, shuffle=True))
    seen.clear()

    class Exchanging(L.Callback):
        def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint["loader_states"]["position"] = stored(positions[0])

    trainer = make_trainer(tmp_path, Exchanging())
    trainer.fit(Seeing(), load(23, 2, shuffle=True), ckpt_path=path)
    assert sorted([*chain(*chain(*read)), *seen]) == list(range(23))


# Real processes


def _share(rank: int) -> Share:
    import torch.distributed as dist

    def broadcast(value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def lowest(number: int) -> int:
        given = torch.tensor(number)
        dist.all_reduce(given, dist.ReduceOp.MIN)
        return int(given)

    return Share(rank, dist.get_world_size(), broadcast, lowest)


def _shuffled(rank: int, workers: int) -> Any:
    seed_all(11 + rank)
    source = source_of(load(23, 3, shuffle=True, num_workers=workers), _share(rank))
    epochs = [[samples_of(batch) for batch, _ in source.batches(None)] for _ in range(2)]
    source.shut_down()
    return epochs, source.total, source.even


def test_processes_shuffle_alike_and_differ_in_what_they_read() -> None:
    for workers in (0, 1):
        read = run_ranks(_shuffled, 2, workers)
        with isolated_random_state():
            seed_all(11)
            source = source_of(load(23, 6, shuffle=True))
            one = [[samples_of(batch) for batch, _ in source.batches(None)] for _ in range(2)]
        for epoch in range(2):
            rows = zip(read[0][0][epoch], read[1][0][epoch], strict=True)
            assert [[*first, *second] for first, second in rows] == one[epoch]
        assert [each[1:] for each in read] == [(4, True)] * 2


class Uneven:
    """An iterable whose length nobody knows."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield from range(self.batches)


def _uneven(rank: int, lengths: list[int], sized: bool, ahead: int) -> Any:
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader: Any = [0] * lengths[rank] if sized else Uneven(lengths[rank])
        source = make_source(loader, "train_dataloader", 1.0, "limit", _share(rank), True, divides=not sized)
        read = [[following for _, following in source.batches(None, ahead=lambda: ahead)] for _ in range(2)]
    return read, source.total, [str(each.message) for each in caught if "LEY" in str(each.message)]


@pytest.mark.parametrize("lengths", [[5, 3], [3, 5], [4, 4], [5, 0]])
@pytest.mark.parametrize("ahead", [1, 3])
def test_training_ends_in_the_same_batch_on_all_ranks(lengths: list[int], ahead: int) -> None:
    read = run_ranks(_uneven, 2, lengths, False, ahead)
    expected = [min(ahead, left) for left in reversed(range(min(lengths)))]
    assert [each[0] for each in read] == [[expected, expected]] * 2
    said = [message for message in read[0][2] if "uneven-ranks" in message]
    assert len(said) == (lengths[0] != lengths[1])
    assert read[1][2] == []


def test_known_lengths_are_trimmed_to_the_shortest_at_the_beginning() -> None:
    for lengths in ([5, 3], [3, 5], [4, 4]):
        read = run_ranks(_uneven, 2, lengths, True, 1)
        shortest = min(lengths)
        assert [each[0] for each in read] == [[list(reversed(range(shortest)))] * 2] * 2
        assert [each[1] for each in read] == [shortest] * 2
        assert len(read[0][2]) == (lengths[0] != lengths[1])
        assert read[1][2] == []


def _evaluated(rank: int, samples: int, size: int) -> Any:
    source = source_of(load(samples, size), _share(rank), training=False)
    read = [(samples_of(batch), source.indices()) for batch, _ in source.batches(None)]
    return read, (source.total, source.least, source.most, source.even), source.limited(1).most


def test_evaluation_by_processes_says_whether_ranks_have_as_many_batches() -> None:
    for samples, size, least, most in ((103, 4, 13, 13), (9, 4, 2, 2), (1, 4, 0, 1), (5, 1, 2, 3)):
        read = run_ranks(_evaluated, 2, samples, size)
        in_turns = [batch for row in zip_longest(*[each[0] for each in read]) for batch in row if batch]
        assert list(chain.from_iterable(batch for batch, _ in in_turns)) == list(range(samples))
        assert all(batch == indices for batch, indices in in_turns)
        assert {each[1][1:] for each in read} == {(least, most, least == most)}
        assert [each[1][0] for each in read] == [len(each[0]) for each in read]
        assert {each[2] for each in read} == {1}
