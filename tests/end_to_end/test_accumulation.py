"""Windows of accumulated batches: changing by epoch, of unknown length, with gaps, with lengths that lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import leyden
from leyden.callbacks import GradientAccumulationScheduler
from leyden.errors import StepError

torch.set_num_threads(1)


def make_trainer(folder: Path, **options: Any) -> leyden.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "max_epochs": 1,
    }
    return leyden.Trainer(**(settings | options))


class Line(leyden.LightningModule):
    """The loss is w·x, so that the gradient of a window is the mean of its inputs, whatever w is."""

    def __init__(self, absent: set[float] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.absent = absent or set()
        self.seen: list[float] = []
        self.gradients: list[float] = []
        self.last: list[bool] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        self.seen.append(batch.item())
        self.last.append(self.trainer.is_last_batch)
        return None if batch.item() in self.absent else (self.weight * batch).sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.weight.grad is not None
        self.gradients.append(self.weight.grad.item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class OwnStep(Line):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer.step(closure=optimizer_closure)


class ByClosure(Line):
    """An optimizer that needs a closure, with one evaluation: plain gradient descent."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=1.0, max_iter=1, max_eval=1)


def numbers(count: int) -> Tensor:
    return torch.arange(1.0, count + 1)[:, None]


def batches(count: int) -> DataLoader[Any]:
    return DataLoader(numbers(count), batch_size=1)  # type: ignore[arg-type]


def means(values: list[float], sizes: list[int]) -> list[float]:
    found, start = [], 0
    for size in sizes:
        part = values[start : start + size]
        found.append(sum(part) / size)
        start += size
    assert start == len(values)
    return found


class Stream(IterableDataset[Tensor]):
    """Without a length; notes how far it was read."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.read = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.read = 0
        for row in numbers(self.count):
            self.read += 1
            yield row


class Iterable:
    """Any object with `__iter__`."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        return iter(numbers(self.count))


class Lying:
    """A batch sampler of single rows whose length is not what it gives."""

    def __init__(self, count: int, says: int) -> None:
        self.count, self.says = count, says

    def __len__(self) -> int:
        return self.says

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[index] for index in range(self.count)])


# Short last windows, however the length is known


@pytest.mark.parametrize("kind", [Line, OwnStep, ByClosure])
@pytest.mark.parametrize(
    ("count", "accumulate", "sizes"),
    [(7, 3, [3, 3, 1]), (8, 3, [3, 3, 2]), (6, 3, [3, 3]), (2, 4, [2]), (3, 1, [1] * 3)],
)
@pytest.mark.parametrize("source", ["sized", "stream", "iterable", "liar"])
def test_the_last_window_is_divided_by_its_real_size(
    kind: type[Line], count: int, accumulate: int, sizes: list[int], source: str, tmp_path: Path
) -> None:
    loader: Any = {
        "sized": lambda: batches(count),  # type: ignore[arg-type]
        "stream": lambda: DataLoader(Stream(count), batch_size=1),
        "iterable": lambda: Iterable(count),
        "liar": lambda: DataLoader(numbers(count), batch_sampler=Lying(count, says=count + 5)),  # type: ignore[arg-type]
    }[source]()
    module = kind()
    trainer = make_trainer(tmp_path, accumulate_grad_batches=accumulate, max_epochs=2)
    trainer.fit(module, loader)
    values = [float(i + 1) for i in range(count)]
    assert module.seen == values * 2
    assert module.gradients == pytest.approx(means(values, sizes) * 2)
    if kind is not ByClosure:  # which evaluates a whole window at its last batch
        assert module.last == ([False] * (count - 1) + [True]) * 2
    assert trainer.global_step == 2 * len(sizes)


def test_a_length_is_a_limit_also_for_a_sampler_that_would_give_more(tmp_path: Path) -> None:
    """An endless sampler with a length is how people say how long an epoch is."""
    module = Line()
    loader = DataLoader(numbers(7), batch_sampler=Lying(7, says=5))  # type: ignore[arg-type]
    make_trainer(tmp_path, accumulate_grad_batches=3).fit(module, loader)
    assert module.seen == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert module.gradients == pytest.approx([2.0, 4.5])


def test_limit_train_batches_cuts_the_window_short_too(tmp_path: Path) -> None:
    for loader in (batches(9), DataLoader(Stream(9), batch_size=1)):  # type: ignore[arg-type]
        module = Line()
        make_trainer(tmp_path, accumulate_grad_batches=3, limit_train_batches=5).fit(module, loader)
        assert module.gradients == pytest.approx([2.0, 4.5])


def test_a_stream_is_read_ahead_by_one_window_and_no_more(tmp_path: Path) -> None:
    stream, ahead = Stream(20), []

    class Watch(leyden.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            ahead.append(stream.read - (batch_idx + 1))

    make_trainer(tmp_path, accumulate_grad_batches=3, callbacks=[Watch()]).fit(Line(), DataLoader(stream, batch_size=1))
    assert max(ahead) == 3
    sized: list[int] = []

    class Rows(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Tensor:
            sized.append(index)
            return numbers(6)[index]

    class Watch2(leyden.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            assert sized == list(range(batch_idx + 1))  # where the length is known nothing is read ahead

    make_trainer(tmp_path, accumulate_grad_batches=3, callbacks=[Watch2()]).fit(
        Line(), DataLoader(Rows(), batch_size=1)
    )
    assert sized == list(range(6))


# Changing by epoch


@pytest.mark.parametrize("stream", [False, True])
def test_accumulation_by_epoch(stream: bool, tmp_path: Path) -> None:
    module, per_epoch = Line(), []

    class Watch(leyden.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            per_epoch.append((trainer.accumulate_grad_batches, trainer.global_step))

    trainer = make_trainer(
        tmp_path, max_epochs=4, callbacks=[GradientAccumulationScheduler({0: 1, 1: 3, 3: 4}), Watch()]
    )
    loader: Any = DataLoader(Stream(5) if stream else numbers(5), batch_size=1)  # type: ignore[arg-type]
    trainer.fit(module, loader)
    assert per_epoch == [(1, 5), (3, 7), (3, 9), (4, 11)]
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    expected = [*values, *means(values, [3, 2]), *means(values, [3, 2]), *means(values, [4, 1])]
    assert module.gradients == pytest.approx(expected)


def test_setting_the_trainers_number_takes_effect_at_the_next_window(tmp_path: Path) -> None:
    for loader in (batches(10), DataLoader(Stream(10), batch_size=1)):  # type: ignore[arg-type]

        class Growing(Line):
            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                if batch_idx == 3:
                    self.trainer.accumulate_grad_batches = 4

        module = Growing()
        make_trainer(tmp_path, accumulate_grad_batches=2).fit(module, loader)
        values = [float(i + 1) for i in range(10)]
        assert module.gradients == pytest.approx(means(values, [2, 2, 4, 2]))


# Batches without a loss


@pytest.mark.parametrize(
    ("kind", "precision"),
    [(Line, "32-true"), (Line, "16-mixed"), (OwnStep, "32-true"), (OwnStep, "16-mixed"), (ByClosure, "32-true")],
)
@pytest.mark.parametrize("absent", [{1.0}, {2.0}, {4.0}, {2.0, 4.0, 5.0}, {5.0}])
def test_batches_without_loss_leave_the_mean_of_the_others(
    kind: type[Line], precision: str, absent: set[float], tmp_path: Path
) -> None:
    module = kind(absent)
    trainer = make_trainer(tmp_path, accumulate_grad_batches=4, precision=precision)
    trainer.fit(module, batches(6))
    windows = [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0]]
    kept = [[value for value in window if value not in absent] for window in windows]
    assert module.gradients == pytest.approx([sum(window) / len(window) for window in kept])
    assert trainer.skipped_batches == len(absent)
    assert trainer.global_step == 2


@pytest.mark.parametrize("kind", [Line, OwnStep])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_window_without_any_loss_makes_no_step(kind: type[Line], precision: str, tmp_path: Path) -> None:
    module = kind({1.0, 2.0, 5.0})
    trainer = make_trainer(tmp_path, accumulate_grad_batches=2, precision=precision)
    trainer.fit(module, batches(5))
    assert trainer.global_step == 1
    assert trainer.skipped_batches == 3
    assert module.weight.item() == -3.5
    assert module.weight.grad is None  # the last window's


def test_lbfgs_needs_some_loss_in_each_window(tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"training_step returned None, but LBFGS needs a loss in every window"):
        make_trainer(tmp_path, accumulate_grad_batches=2).fit(ByClosure({1.0, 2.0}), batches(2))


# Ends in the middle of a window


@pytest.mark.parametrize("kind", [Line, OwnStep, ByClosure])
def test_skipping_the_rest_of_an_epoch_drops_its_unfinished_window(kind: type[Line], tmp_path: Path) -> None:
    class Skipping(kind):  # type: ignore[misc, valid-type]
        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    module = Skipping()
    trainer = make_trainer(tmp_path, accumulate_grad_batches=2, max_epochs=2)
    trainer.fit(module, batches(5))
    assert module.gradients == pytest.approx([1.5, 1.5])
    assert trainer.global_step == 2


def test_a_stop_waits_for_the_windows_end(tmp_path: Path) -> None:
    class Stopping(Line):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                self.trainer.should_stop = True

    module = Stopping()
    trainer = make_trainer(tmp_path, accumulate_grad_batches=3, max_epochs=5)
    trainer.fit(module, batches(9))
    assert module.seen == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert module.gradients == pytest.approx([2.0, 5.0])


def test_validation_waits_for_the_windows_end_and_keeps_the_gradients_right(tmp_path: Path) -> None:
    class Validated(Line):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            at.append(len(self.seen))

    at: list[int] = []
    module = Validated()
    make_trainer(tmp_path, accumulate_grad_batches=3, val_check_interval=2, num_sanity_val_steps=0).fit(
        module, batches(7), [torch.zeros(1)]  # type: ignore[arg-type]
    )  # fmt: skip
    # due after batches 2, 4 and 6; windows end after 3, 6 and 7
    assert at == [3, 6]
    assert module.gradients == pytest.approx([2.0, 5.0, 7.0])
