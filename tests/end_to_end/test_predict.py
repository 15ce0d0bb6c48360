"""predict: what it returns, and which samples a writer is told that a prediction belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler

import leyden as L
from leyden.callbacks import BasePredictionWriter
from leyden.data import CombinedLoader
from leyden.errors import DataError, HookError, MetricError

torch.set_num_threads(1)


class Doubling(L.LightningModule):
    """The simplest model: no step at all, only forward."""

    def forward(self, x: Any) -> Any:
        return 2 * x


class WithIndex(Doubling):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 9) -> Any:
        return (batch.flatten().tolist(), batch_idx, dataloader_idx)


def dataset(samples: int, offset: float = 0.0) -> Any:
    return torch.arange(float(samples)).unsqueeze(1) + offset


def data(samples: int, offset: float = 0.0, **options: Any) -> Any:
    return DataLoader(dataset(samples, offset), **({"batch_size": 2} | options))


def make_trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
        "default_root_dir": folder,
    }
    return L.Trainer(callbacks=list(callbacks), **(settings | options))


# What is returned


def test_without_predict_step_the_module_is_called(tmp_path: Path) -> None:
    outputs = make_trainer(tmp_path).predict(Doubling(), data(3))
    assert outputs is not None
    assert [output.flatten().tolist() for output in outputs] == [[0, 2], [4]]


def test_predict_step_gets_batch_and_index(tmp_path: Path) -> None:
    assert make_trainer(tmp_path).predict(WithIndex(), data(3)) == [([0, 1], 0, 9), ([2], 1, 9)]


@pytest.mark.parametrize("several", [list, tuple, dict, CombinedLoader])
def test_several_loaders_give_a_list_for_each(tmp_path: Path, several: Any) -> None:
    loaders: Any = [data(3), data(2, offset=10)]
    if several is dict:
        loaders = {"a": loaders[0], "b": loaders[1]}
    elif several is CombinedLoader:
        loaders = CombinedLoader(loaders, "sequential")
    outputs = make_trainer(tmp_path).predict(WithIndex(), loaders)
    assert outputs == [[([0, 1], 0, 0), ([2], 1, 0)], [([10, 11], 0, 1)]]


def test_one_loader_in_a_list_gives_a_flat_list(tmp_path: Path) -> None:
    assert make_trainer(tmp_path).predict(WithIndex(), [data(2)]) == [([0, 1], 0, 9)]


def test_predictions_need_not_be_kept(tmp_path: Path) -> None:
    seen: list[int] = []

    class Noting(WithIndex):
        def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(outputs[1])
            assert self.trainer.predictions == []

    assert make_trainer(tmp_path).predict(Noting(), data(3), return_predictions=False) is None
    assert seen == [0, 1]


@pytest.mark.parametrize("keep", [None, True])
def test_predictions_are_kept_by_default_and_visible_meanwhile(tmp_path: Path, keep: Any) -> None:
    lengths: list[int] = []

    class Noting(WithIndex):
        def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            lengths.append(len(self.trainer.predictions))

    trainer = make_trainer(tmp_path)
    outputs = trainer.predict(Noting(), data(3), return_predictions=keep)
    assert lengths == [1, 2]
    assert outputs == trainer.predictions == [([0, 1], 0, 9), ([2], 1, 9)]


def test_none_is_a_prediction_too(tmp_path: Path) -> None:
    class Silent(Doubling):
        def predict_step(self, batch: Any) -> Any:
            return None

    assert make_trainer(tmp_path).predict(Silent(), data(3)) == [None, None]


def test_the_module_s_and_the_datamodule_s_loaders_are_taken(tmp_path: Path) -> None:
    class Own(WithIndex):
        def predict_dataloader(self) -> Any:
            return data(1)

    class Data(L.LightningDataModule):
        def predict_dataloader(self) -> Any:
            return data(2)

    trainer = make_trainer(tmp_path)
    assert trainer.predict(Own()) == [([0], 0, 9)]
    assert trainer.predict(Own(), datamodule=Data()) == [([0, 1], 0, 9)]
    assert trainer.predict(Own(), Data()) == [([0, 1], 0, 9)]
    with pytest.raises(DataError, match="There is no predict_dataloader"):
        trainer.predict(WithIndex())


def test_a_second_call_starts_anew(tmp_path: Path) -> None:
    trainer, module = make_trainer(tmp_path), WithIndex()
    assert trainer.predict(module, data(2)) == [([0, 1], 0, 9)]
    assert trainer.predict(dataloaders=data(2, offset=5)) == [([5, 6], 0, 9)]


def test_predictions_made_in_inference_mode_carry_no_graph(tmp_path: Path) -> None:
    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def forward(self, x: Any) -> Any:
            return self.layer(x)

    outputs = make_trainer(tmp_path).predict(Model(), data(2))
    assert outputs is not None
    assert not outputs[0].requires_grad


# Logging


@pytest.mark.parametrize(
    "hook", ["predict_step", "on_predict_start", "on_predict_batch_end", "on_predict_epoch_end", "on_predict_end"]
)
def test_logging_while_predicting_is_refused(tmp_path: Path, hook: str) -> None:
    def log(self: Any, *args: Any) -> None:
        self.log("x", 1.0)

    cls: Any = type("Logging", (Doubling,), {hook: log})
    with pytest.raises(MetricError, match=r"self.log\('x', …\) was called .*where nothing can be logged"):
        make_trainer(tmp_path).predict(cls(), data(2))


# Writers


class Writer(BasePredictionWriter):
    def __init__(self, interval: Any) -> None:
        super().__init__(interval)
        self.batches: list[Any] = []
        self.epochs: list[Any] = []

    def write_on_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        self.batches.append((batch.flatten().tolist(), batch_indices, batch_idx, dataloader_idx))

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.epochs.append((list(predictions), batch_indices))


class Reversed(Sampler[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(reversed(range(self.size)))


class Uneven(Sampler[list[int]]):
    """A batch sampler of its own kind: batches of 1, 2, 3, … samples."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[list[int]]:
        start, length = 0, 1
        while start < self.size:
            yield list(range(start, min(self.size, start + length)))
            start, length = start + length, length + 1


LOADERS: dict[str, Any] = {
    "in order": {"batch_size": 3},
    "shuffled": {"batch_size": 3, "shuffle": True},
    "drop_last": {"batch_size": 3, "shuffle": True, "drop_last": True},
    "sampler": {"batch_size": 3, "sampler": Reversed(10)},
    "list as sampler": {"batch_size": 3, "sampler": [7, 7, 0, 2]},
    "batch sampler": {"batch_sampler": BatchSampler(RandomSampler(range(10)), 4, False)},
    "own batch sampler": {"batch_sampler": Uneven(10)},
    "subset": {"batch_sampler": BatchSampler(SequentialSampler(range(5)), 2, False)},
}


@pytest.mark.parametrize(
    ("kind", "workers"), [*((kind, 0) for kind in LOADERS), ("shuffled", 2), ("own batch sampler", 2)]
)
def test_a_writer_is_told_the_samples_of_each_batch(tmp_path: Path, kind: str, workers: int) -> None:
    writer = Writer("batch_and_epoch")
    loader = DataLoader(dataset(10), num_workers=workers, **LOADERS[kind])
    outputs = make_trainer(tmp_path, writer).predict(WithIndex(), loader)
    assert len(writer.batches) == len(outputs or []) >= 2
    for values, indices, _, dataloader_idx in writer.batches:
        assert values == indices  # sample i of the data set is i
        assert dataloader_idx == 0
    assert [batch_idx for _, _, batch_idx, _ in writer.batches] == list(range(len(writer.batches)))
    assert writer.epochs == [(outputs, [[indices for _, indices, _, _ in writer.batches]])]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_writer_of_several_loaders_under_a_limit(tmp_path: Path, workers: int) -> None:
    writer = Writer("batch_and_epoch")
    loaders = [data(10, shuffle=True, num_workers=workers), data(6, shuffle=True, num_workers=workers)]
    make_trainer(tmp_path, writer, limit_predict_batches=2).predict(WithIndex(), loaders)
    assert [(idx, loader) for _, _, idx, loader in writer.batches] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert all(values == indices for values, indices, _, _ in writer.batches)
    [(predictions, indices)] = writer.epochs
    assert [[values for values, _, _ in each] for each in predictions] == indices
    assert [len(each) for each in indices] == [2, 2]


def test_indices_are_right_again_in_a_second_call(tmp_path: Path) -> None:
    writer, loader = Writer("batch"), data(7, shuffle=True, num_workers=2, persistent_workers=True)
    trainer = make_trainer(tmp_path, writer, limit_predict_batches=3)
    for _ in range(2):
        trainer.predict(WithIndex(), loader, return_predictions=False)
    assert len(writer.batches) == 6
    assert all(values == indices for values, indices, _, _ in writer.batches)
    assert trainer.predict_dataloaders is loader


def test_indices_that_cannot_be_known_are_none(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(dataset(3))

    class OwnLoader(DataLoader[Any]):
        def __iter__(self) -> Any:
            return super().__iter__()

    for loader in (DataLoader(Stream(), batch_size=2), [dataset(2), dataset(1)], OwnLoader(dataset(3), batch_size=2)):
        writer = Writer("batch_and_epoch")
        given: Any = iter(loader) if isinstance(loader, list) else loader
        make_trainer(tmp_path, writer).predict(WithIndex(), given)
        assert [indices for _, indices, _, _ in writer.batches] == [None, None]
        assert writer.epochs[0][1] == [[[], []]]


def test_a_writer_of_epochs_is_called_once(tmp_path: Path) -> None:
    writer = Writer("epoch")
    make_trainer(tmp_path, writer).predict(WithIndex(), data(3))
    assert writer.batches == []
    assert writer.epochs == [([([0, 1], 0, 9), ([2], 1, 9)], [[[0, 1], [2]]])]


def test_without_a_writer_no_loader_is_rebuilt(tmp_path: Path) -> None:
    loader = data(3, shuffle=True)

    class Looking(Doubling):
        def on_predict_start(self) -> None:
            evaluation = self.trainer._evaluation
            assert evaluation is not None
            assert evaluation.sources[0].loader is loader

    make_trainer(tmp_path).predict(Looking(), loader)


def test_shuffled_predictions_come_in_the_same_order_with_and_without_a_writer(tmp_path: Path) -> None:
    orders = []
    for callbacks in ([], [Writer("batch")]):
        loader = data(9, shuffle=True, generator=torch.Generator().manual_seed(4))
        orders.append(
            [values for values, _, _ in make_trainer(tmp_path, *callbacks).predict(WithIndex(), loader) or []]
        )
    assert orders[0] == orders[1]
    assert orders[0] != [[0, 1], [2, 3], [4, 5], [6, 7], [8]]


def test_a_writer_that_misses_its_method_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    class Never(Doubling):
        def predict_step(self, batch: Any) -> Any:
            raise AssertionError

    with pytest.raises(HookError, match="calls write_on_batch_end: implement it"):
        make_trainer(tmp_path, BasePredictionWriter("batch")).predict(Never(), data(2))


def test_a_module_with_nothing_to_predict_with_is_refused(tmp_path: Path) -> None:
    class Mute(L.LightningModule): ...

    loader: DataLoader[Any] = DataLoader([torch.zeros(1)])  # type: ignore[arg-type]
    with pytest.raises(HookError, match="Mute has neither predict_step nor forward"):
        make_trainer(tmp_path).predict(Mute(), loader)
