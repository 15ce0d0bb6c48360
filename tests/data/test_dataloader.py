"""`leyden.data.DataLoader`: torch's batches, a place that can be taken up again, workers that are kept, the same in a Trainer."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import random
import subprocess
import sys
import weakref
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, Dataset, IterableDataset, RandomSampler, SequentialSampler, TensorDataset
from torch.utils.data import DataLoader as TorchDataLoader

import leyden as L
from leyden.checkpoint.format import decode, encode
from leyden.data import CombinedLoader, DataLoader, dataloader
from leyden.data.indexed import IndexedReader, is_plain
from leyden.data.loader import has_exact_length, without_shuffle
from leyden.data.reading import OpaqueReader, StatefulReader, make_reader
from leyden.errors import DataError, LeydenWarning
from leyden.seed import seed_everything
from quiet import make_trainer

SAMPLES = 11
DATA = TensorDataset(torch.arange(float(SAMPLES)), torch.arange(SAMPLES).view(-1, 1))


class Noisy(Dataset[Any]):
    """Samples with noise of torch and python, and the process that loaded them."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> list[float]:
        return [float(index), torch.rand(()).item(), random.random()]


class WhoLoads(Noisy):
    def __getitem__(self, index: int) -> Any:
        return os.getpid()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(SAMPLES))


class StreamWithState(IterableDataset[Any]):
    def __init__(self) -> None:
        self.index = 0

    def __iter__(self) -> Iterator[int]:
        while self.index < SAMPLES:
            self.index += 1
            yield self.index
        self.index = 0

    def state_dict(self) -> dict[str, int]:
        return {"index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.index = state["index"]


def plain(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    return [plain(part) for part in batch] if isinstance(batch, list) else batch


def stored(state: Any) -> Any:
    """What comes back from a checkpoint."""
    return decode(*encode({"state": state}))["state"]


OPTIONS: dict[str, dict[str, Any]] = {
    "in order": {"batch_size": 2},
    "shuffled": {"batch_size": 2, "shuffle": True},
    "drop_last": {"batch_size": 4, "shuffle": True, "drop_last": True},
    "unbatched": {"batch_size": None, "shuffle": True},
    "batch sampler": {"batch_sampler": BatchSampler(RandomSampler(range(SAMPLES)), 3, False)},
    "generator": {"batch_size": 2, "shuffle": True, "generator": torch.Generator()},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_torch(name: str, workers: int) -> None:
    def two_epochs(kind: Any, workers: int) -> Any:
        options = copy.deepcopy(OPTIONS[name])
        seed_everything(4, verbose=False)
        loader = kind(DATA, num_workers=workers, **options)
        return len(loader), [plain(batch) for _ in range(2) for batch in loader], torch.rand(1).item()

    assert two_epochs(DataLoader, workers) == two_epochs(TorchDataLoader, 0)


@pytest.mark.parametrize("data", [DATA, Noisy()], ids=["tensors", "noisy"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_pass_is_taken_up_after_any_batch(name: str, data: Any) -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(data, **copy.deepcopy(OPTIONS[name]))

    seed_everything(4, verbose=False)
    loader, states = make(), []
    list(loader)
    passed = []
    for batch in loader:
        passed.append(plain(batch))
        states.append(stored(loader.state_dict()))
    for number, state in enumerate(states, 1):
        seed_everything(77, verbose=False)
        fresh = make()
        fresh.load_state_dict(state)
        assert stored(fresh.state_dict())["position"]["count"] == number
        drawn = random.Random(77).random()
        assert [plain(batch) for batch in fresh] == passed[number:]
        assert random.random() == drawn  # the program's own random numbers are left alone


@pytest.mark.parametrize("cut", [0, 2, 6])
@pytest.mark.parametrize("workers", [0, 2])
def test_with_a_generator_all_later_passes_go_on_as_well(workers: int, cut: int) -> None:
    def make(workers: int) -> DataLoader[Any]:
        return DataLoader(Noisy(), 2, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(1))

    seed_everything(1, verbose=False)
    loader = make(workers)
    list(loader)
    reading = iter(loader) if cut else iter(())
    assert len(list(islice(reading, cut))) == cut
    state = stored(loader.state_dict())
    expected = [plain(batch) for batch in reading] + [plain(batch) for _ in range(2) for batch in loader]
    assert expected[-6:] != expected[-12:-6]
    seed_everything(99, verbose=False)
    fresh = make(0)
    fresh.load_state_dict(state)
    passes = 3 if cut else 2
    assert [plain(batch) for _ in range(passes) for batch in fresh] == expected


def test_noise_is_another_in_each_pass_though_the_program_draws_nothing() -> None:
    loader = DataLoader(Noisy(), generator=torch.Generator())
    first, second = ([plain(batch) for batch in loader] for _ in range(2))
    assert [index for index, *_ in first] == [index for index, *_ in second]
    assert all(one != other for (_, *one), (_, *other) in zip(first, second, strict=True))


def test_a_pass_that_was_left_is_not_gone_on_with() -> None:
    loader = DataLoader(DATA, 2)
    state = (next(iter(loader)), loader.state_dict())[1]
    assert len(list(loader)) == 6
    loader.load_state_dict(state)
    next(iter(loader))
    assert loader.state_dict()["position"]["count"] == 2
    assert len(list(loader)) == 6
    assert loader.state_dict()["position"] is None


@pytest.mark.parametrize(("cut", "rest"), [(1, 4), (5, 0)])
def test_a_stream_with_state_goes_on_at_once(cut: int, rest: int) -> None:
    loader = DataLoader(StreamWithState(), 2, drop_last=True)
    reading = iter(loader)
    list(islice(reading, cut))
    state = stored(loader.state_dict())
    fresh = DataLoader(StreamWithState(), 2, drop_last=True)
    fresh.load_state_dict(state)
    batches = [plain(batch) for batch in fresh]
    assert batches == [plain(batch) for batch in reading]
    assert len(batches) == rest


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_without_state_is_read_again(workers: int) -> None:
    loader = DataLoader(Stream(), 2, num_workers=workers)
    reading = iter(loader)
    list(islice(reading, 4))
    state = stored(loader.state_dict())
    fresh = DataLoader(Stream(), 2, num_workers=workers)
    fresh.load_state_dict(state)
    with pytest.warns(LeydenWarning, match="fast-forward.*DataLoader: Stream cannot be put at a position"):
        assert [plain(batch) for batch in fresh] == [[8, 9], [10]]


def test_another_state_is_refused() -> None:
    with pytest.raises(DataError, match=r"not the state of a leyden.data.DataLoader: it has \['epoch'\]"):
        DataLoader(DATA).load_state_dict({"epoch": 1})


# Workers, memory


def test_workers_live_on_from_one_pass_to_the_next_and_end_with_the_loader() -> None:
    loader = DataLoader(WhoLoads(), num_workers=2)
    first, second = ({int(batch) for batch in loader} for _ in range(2))
    assert first == second
    assert len(first) == 2
    assert os.getpid() not in first
    gone = weakref.ref(loader)
    gc.disable()
    try:
        del loader
        assert gone() is None  # no cycle holds it, so its workers end at once
    finally:
        gc.enable()
    for process in first:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("dataset", ["TensorDataset(torch.arange(99))", "Stream()"])
def test_a_program_ends_though_its_loader_still_has_workers(dataset: str, persistent: bool) -> None:
    code = f"""
import torch
from torch.utils.data import IterableDataset, TensorDataset
from leyden.data import DataLoader
class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(99))
loader = DataLoader({dataset}, num_workers=1, persistent_workers={persistent})
batches = iter(loader)
next(batches)
print("end")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_of_the_program_ends_though_its_loader_still_has_workers(method: str, tmp_path: Path) -> None:
    """Such a process ends without atexit."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import multiprocessing
import torch
from torch.utils.data import TensorDataset
from leyden.data import DataLoader
loader = DataLoader(TensorDataset(torch.arange(8)), num_workers=1)
def read():
    print(len(list(loader)), flush=True)
if __name__ == "__main__":
    process = multiprocessing.get_context({method!r}).Process(target=read)
    process.start()
    process.join()
    print(process.exitcode)
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "8\n0\n", "")


def test_a_fork_that_ends_leaves_the_workers_alone() -> None:
    code = """
import atexit, os, torch
from leyden.data import DataLoader
loader = DataLoader(torch.arange(99), num_workers=1)
batches = iter(loader)
next(batches)
child = os.fork()
if child == 0:
    atexit._run_exitfuncs()
    os._exit(0)
os.waitpid(child, 0)
print(len(list(batches)), len(list(loader)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "98 99\n"), done.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_two_passes_at_a_time(workers: int) -> None:
    loader = DataLoader(DATA, 4, num_workers=workers, persistent_workers=False)
    assert [len(list(loader)) for _ in loader] == [3, 3, 3]
    assert len(list(zip(loader, loader, strict=True))) == 3


def test_two_passes_at_a_time_over_workers_that_live_on_are_refused() -> None:
    """torch ends the outer one without a word."""
    loader = DataLoader(DATA, 4, num_workers=1)
    outer = iter(loader)
    next(outer)
    assert len(list(loader)) == 3
    with pytest.raises(DataError, match=r"another has begun.*persistent_workers=False"):
        next(outer)
    assert len(list(loader)) == 3


def test_workers_that_are_not_to_live_on_see_what_the_program_has_changed() -> None:
    class Marked(Noisy):
        mark = 1

        def __getitem__(self, index: int) -> Any:
            return self.mark

    dataset = Marked()
    loader = DataLoader(dataset, SAMPLES, num_workers=1, persistent_workers=False)
    assert next(iter(loader)).sum() == SAMPLES
    dataset.mark = 2
    assert next(iter(loader)).sum() == 2 * SAMPLES


def test_defaults_that_differ_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert DataLoader(DATA, num_workers=1).persistent_workers
    assert DataLoader(DATA, num_workers=1).prefetch_factor == 2
    assert not DataLoader(DATA).persistent_workers
    assert not DataLoader(DATA, num_workers=1, persistent_workers=False).persistent_workers
    for kind, pins in (("cuda", True), ("xpu", True), ("mps", False), (None, False)):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda kind=kind: kind is not None)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda kind=kind: torch.device(kind))
        assert DataLoader(DATA).pin_memory is pins
        assert DataLoader(DATA, pin_memory=True).pin_memory
        assert not DataLoader(DATA, pin_memory=False).pin_memory


def test_what_torch_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match="prefetch_factor"):
        DataLoader(DATA, prefetch_factor=3)
    with pytest.raises(ValueError, match="mutually exclusive"):
        DataLoader(DATA, shuffle=True, sampler=SequentialSampler(DATA))


def test_an_argument_may_be_changed_between_two_passes() -> None:
    loader = DataLoader(WhoLoads(), num_workers=1)
    worker = int(next(iter(loader)))
    loader.num_workers = 0
    loader.collate_fn = lambda samples: samples
    assert worker != os.getpid()
    assert next(iter(loader)) == [os.getpid()]


def test_copies_are_loaders_of_their_own() -> None:
    loader = DataLoader(DATA, 2)
    reading = iter(loader)
    next(reading)
    for other in (copy.copy(loader), copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))):
        assert other.state_dict()["position"] is None
        assert len(list(other)) == 6
    assert loader.state_dict()["position"]["count"] == 1


# In a Trainer, and beside others


class Own(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (7 for _ in super().__iter__())


def test_it_is_read_as_torch_s_is() -> None:
    loader = DataLoader(DATA, 2, shuffle=True)
    assert is_plain(loader)
    assert has_exact_length(loader)
    reader = make_reader(loader, "loader")
    assert isinstance(reader, IndexedReader)
    assert type(reader.loader) is TorchDataLoader
    assert isinstance(make_reader(DataLoader(Stream()), "loader"), OpaqueReader)
    with_state = make_reader(DataLoader(StreamWithState()), "loader")
    assert isinstance(with_state, StatefulReader)
    assert type(with_state.loader) is TorchDataLoader
    assert [plain(batch) for batch, _ in make_reader(CombinedLoader([loader, loader]), "loader").read()]


def test_a_subclass_that_iterates_in_its_own_way_is_read_so() -> None:
    own = Own(DATA, 2)
    assert not is_plain(own)
    assert [batch for batch, _ in make_reader(own, "loader").read()] == [7] * 6


def test_a_loader_of_the_user_that_wraps_torch_s_is_read_by_itself() -> None:
    class Doubled:
        def __init__(self) -> None:
            self.torch_loader = TorchDataLoader(torch.arange(4), 2)  # type: ignore[arg-type]

        def __iter__(self) -> Iterator[Any]:
            return (2 * batch for batch in self.torch_loader)

    assert [plain(batch) for batch, _ in make_reader(Doubled(), "loader").read()] == [[0, 2], [4, 6]]


def test_it_is_read_without_shuffling_to_overfit() -> None:
    with pytest.warns(LeydenWarning, match="read in order instead of being shuffled"):
        in_order = without_shuffle(DataLoader(torch.arange(4), 2, shuffle=True), "x")  # type: ignore[arg-type]
    assert [plain(batch) for batch in in_order] == [[0, 1], [2, 3]]


class Seen(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 1)
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(plain(batch))
        return self.net(batch[0].view(-1, 1)).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_trainer_reads_the_same_batches_out_of_it_and_keeps_its_place(workers: int, tmp_path: Path) -> None:
    def fit(kind: Any, workers: int, resumed: Path | None = None, **options: Any) -> Any:
        seed_everything(2, verbose=False)
        module, loader = Seen(), kind(DATA, 2, shuffle=True, num_workers=workers)
        trainer = make_trainer(tmp_path, max_epochs=2, **options)
        trainer.fit(module, loader, ckpt_path=resumed)
        return trainer, module.seen

    _, expected = fit(TorchDataLoader, 0)
    assert fit(DataLoader, workers)[1] == expected
    trainer, _ = fit(DataLoader, workers, max_steps=8)
    trainer.save_checkpoint(tmp_path / "middle.ckpt")
    assert fit(DataLoader, workers, tmp_path / "middle.ckpt")[1] == expected[8:]


def own(loader: Any) -> dict[str, Any]:
    """The attributes of a loader, but what a pass keeps, and Lightning's notes, if other tests have run it in this process."""
    passing = dataloader._OF_A_PASS
    return {name: each for name, each in vars(loader).items() if name not in passing and not name.startswith("__pl_")}


def test_the_loader_of_the_user_is_left_as_it_was(tmp_path: Path) -> None:
    for kind in (TorchDataLoader, DataLoader):
        loader = kind(DATA, 2, shuffle=True)
        before = own(loader)
        make_trainer(tmp_path).fit(Seen(), loader)
        assert own(loader) == before
