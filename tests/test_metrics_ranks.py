"""Logged values over ranks: equal on all of them, and equal to what NumPy makes of all samples at once."""

from __future__ import annotations

import math
import pickle
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.checkpoint.format import decode, encode
from leyden.errors import LeydenWarning, MetricError
from leyden.metrics import Metrics
from leyden.metrics_state import capture_metrics, emptied, merged, restore_metrics
from quiet import Memory, make_trainer
from ranks import run_ranks, run_trainers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torchmetrics = pytest.importorskip("torchmetrics")
    from torchmetrics import aggregation
    from torchmetrics import classification as classes
    from torchmetrics.wrappers import MinMaxMetric

torch.set_num_threads(1)

CPU = torch.device("cpu")
WORLDS = (1, 2, 3, 4)


class Group:
    """A gather among threads: what is gathered goes through pickle, as between processes."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size)
        self.slots: list[bytes] = [b""] * world_size
        self.calls = [0] * world_size
        self.sent: list[list[Any]] = [[] for _ in range(world_size)]

    def gather_of(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            self.calls[rank] += 1
            self.sent[rank].append(value)
            self.slots[rank] = pickle.dumps(value)
            self.barrier.wait(20)
            values = [pickle.loads(slot) for slot in self.slots]
            self.barrier.wait(20)
            return values

        return gather


def on_ranks(world_size: int, function: Callable[[int, Metrics], Any], modules: Sequence[nn.Module] = ()) -> Any:
    """Call ``function(rank, metrics)`` on as many threads; return what they returned, and the group."""
    group = Group(world_size)
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            metrics = Metrics(group.gather_of(rank), modules[rank] if modules else None)
            metrics.enter_batches()
            results[rank] = function(rank, metrics)
        except BaseException as error:  # noqa: BLE001 raised below
            errors.append(error)
            group.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    assert len(set(group.calls)) == 1, f"the ranks gathered {group.calls} times"
    return results, group


def log(metrics: Metrics, name: str, value: Any, **options: Any) -> None:
    arguments: dict[str, Any] = {
        "on_step": None, "on_epoch": None, "prog_bar": False, "logger": True, "reduce_fx": "mean", "batch_size": None,
        "add_dataloader_idx": True,
    }  # fmt: skip
    metrics.log(name, value, **(arguments | options))


def bits(value: Any) -> Any:
    """The value with its type and its bits, so that only what is equal to the last bit is equal."""
    if isinstance(value, Tensor):
        return (value.dtype, value.device.type, value.reshape(1).view(torch.uint8).tolist())
    if isinstance(value, dict):
        return [(key, bits(item)) for key, item in value.items()]  # the order counts
    if isinstance(value, (list, tuple)):
        return [bits(item) for item in value]
    return (type(value), value.hex() if isinstance(value, float) else value)


def same_on_all(results: Sequence[Any]) -> Any:
    for other in results[1:]:
        assert bits(other) == bits(results[0])
    return results[0]


def end(metrics: Metrics) -> dict[str, Any]:
    metrics.enter_epoch_hooks()
    values = metrics.publish_epoch()
    metrics.reset()
    return values


# Any values on any ranks

numbers = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
entries = st.tuples(
    st.sampled_from(["a", "b", "c", "d"]),
    numbers,
    st.integers(1, 9),
    st.sampled_from(["tensor", "half", "int", "python"]),
)
scripts = st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(entries, max_size=70), min_size=n, max_size=n))
KINDS: dict[str, Any] = {"a": "mean", "b": "sum", "c": "min", "d": "max"}


def as_kind(kind: str, value: float) -> Any:
    if kind == "python":
        return value
    if kind == "int":
        return torch.tensor(int(value))
    return torch.tensor(value / 100).half() if kind == "half" else torch.tensor(value)


@settings(max_examples=60, deadline=None)
@given(scripts)
def test_any_values_are_reduced_as_numpy_does_and_alike_on_all_ranks(script: list[list[Any]]) -> None:
    def play(rank: int, metrics: Metrics) -> Any:
        for i, (name, value, size, kind) in enumerate(script[rank]):
            metrics.begin_batch(torch.zeros(size, 1), i)
            log(metrics, name, as_kind(kind, value), reduce_fx=KINDS[name], on_epoch=True, on_step=False)
        return end(metrics), dict(metrics.published)

    results, group = on_ranks(len(script), play)
    values, published = same_on_all(results)
    assert group.calls[0] == 1
    held: dict[str, list[tuple[float, int]]] = {}
    as_tensor = set()
    for rank in script:
        for name, value, size, kind in rank:
            held.setdefault(name, []).append((float(as_kind(kind, value)), size))
            if kind != "python":
                as_tensor.add(name)
    assert list(values) == list(published) == list(dict.fromkeys(name for rank in script for name, *_ in rank))
    for name, logged in held.items():
        array, sizes = np.array(logged).T
        expected = {
            "mean": lambda a, s: np.average(a, weights=s), "sum": lambda a, s: a.sum(), "min": lambda a, s: a.min(),
            "max": lambda a, s: a.max(),
        }[KINDS[name]](array, sizes)  # fmt: skip
        assert float(values[name]) == pytest.approx(expected, rel=1e-6, abs=1e-6 * np.abs(array).max())
        assert isinstance(values[name], Tensor) == (name in as_tensor)
        if name in as_tensor:
            assert values[name].dtype is torch.get_default_dtype()
            assert values[name].shape == ()


@pytest.mark.parametrize("world_size", WORLDS)
def test_103_samples_give_the_same_numbers_on_any_number_of_ranks(world_size: int) -> None:
    samples = torch.randn(103, generator=torch.Generator().manual_seed(1))

    def play(rank: int, metrics: Metrics) -> Any:
        metrics.begin_evaluation()
        metrics.enter_batches()
        own = samples[rank::world_size]
        for i, batch in enumerate(own.split(8)):
            metrics.begin_batch(batch, i)
            log(metrics, "mean", batch.mean())
            log(metrics, "right", (batch > 0).sum(), reduce_fx="sum")
            log(metrics, "least", batch.min(), reduce_fx="min")
            log(metrics, "most", float(batch.max()), reduce_fx=torch.max)
            log(metrics, "count", len(batch), reduce_fx="sum")
        metrics.enter_epoch_hooks()
        metrics.publish_epoch()
        return metrics.evaluation_results(1)

    results, _ = on_ranks(world_size, play)
    [values] = same_on_all(results)
    array = samples.double().numpy()
    assert values["mean"] == pytest.approx(array.mean(), rel=1e-6)
    assert values["right"] == (array > 0).sum()
    assert (values["least"], values["most"]) == (array.min(), array.max())
    assert values["count"] == 103


def test_python_numbers_stay_what_they_are() -> None:
    def play(rank: int, metrics: Metrics) -> Any:
        metrics.begin_batch(torch.zeros(2), 0)
        log(metrics, "count", 2**60 + rank, reduce_fx="sum")  # more than a float64 holds
        log(metrics, "mean", 0.5 + rank, on_epoch=True, on_step=False)
        return end(metrics), dict(metrics.published)

    results, _ = on_ranks(3, lambda rank, metrics: (metrics.enter_epoch_hooks(), play(rank, metrics))[1])
    values, _ = same_on_all(results)
    assert values == {"count": 3 * 2**60 + 3, "mean": 1.5}
    assert type(values["count"]) is int


def test_nan_on_any_rank_is_seen() -> None:
    def play(rank: int, metrics: Metrics) -> Any:
        metrics.begin_batch(torch.zeros(1), 0)
        for reduction in ("mean", "sum", "min", "max"):
            log(metrics, reduction, torch.tensor(math.nan if rank == 1 else 1.0), reduce_fx=reduction, on_epoch=True)
        return end(metrics)

    results, _ = on_ranks(3, play)
    assert all(math.isnan(value) for value in same_on_all(results).values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduce_fx": "sum"}, "reduce_fx='mean' on rank 0 and reduce_fx='sum' on rank 2"),
        ({"reduce_fx": lambda v: v.sum()}, "reduce_fx='mean' on rank 0 and reduce_fx='a function' on rank 2"),
        ({"on_step": True}, "on_step=False on rank 0 and on_step=True on rank 2"),
    ],
)
def test_one_key_logged_in_two_ways_is_refused_on_every_rank(options: dict[str, Any], words: str) -> None:
    def play(rank: int, metrics: Metrics) -> str:
        metrics.begin_batch(torch.zeros(1), 0)
        log(metrics, "x", 1.0, **({"on_step": False, "on_epoch": True} | (options if rank == 2 else {})))
        with pytest.raises(MetricError) as caught:
            end(metrics)
        return str(caught.value)

    results, _ = on_ranks(3, play)
    assert words in same_on_all(results)


def test_the_bar_and_the_loggers_get_a_key_if_one_rank_says_so() -> None:
    def play(rank: int, metrics: Metrics) -> Any:
        metrics.begin_batch(torch.zeros(1), 0)
        log(metrics, "x", float(rank), on_step=False, on_epoch=True, prog_bar=rank == 1, logger=rank == 2)
        return end(metrics), metrics.progress_bar_values(), metrics.logger_values()

    results, _ = on_ranks(3, play)
    assert same_on_all(results) == ({"x": 1.0}, {"x": 1.0}, {"x": 1.0})


# What is reduced already


def test_a_second_publish_sends_nothing_again_and_reduces_nothing_twice() -> None:
    def play(rank: int, metrics: Metrics) -> Any:
        metrics.begin_batch(torch.zeros(4), 0)
        log(metrics, "loss", torch.tensor(1.0 + rank), on_step=True, on_epoch=True)
        log(metrics, "seen", 4, reduce_fx="sum", on_step=False, on_epoch=True)
        metrics.enter_epoch_hooks()
        first = metrics.publish_epoch()
        second = metrics.publish_epoch()
        if rank == 1:
            log(metrics, "late", 5.0)
        log(metrics, "seen", 100, reduce_fx="sum", on_step=False, on_epoch=True)
        third = metrics.publish_epoch()
        metrics.reset()
        metrics.enter_batches()
        metrics.begin_batch(torch.zeros(4), 0)
        log(metrics, "seen", 1, reduce_fx="sum", on_step=False, on_epoch=True)
        return first, second, third, end(metrics)

    results, group = on_ranks(2, play)
    first, second, third, next_epoch = same_on_all(results)
    assert first == second == {"loss_epoch": 1.5, "seen": 8}
    assert third == {"loss_epoch": 1.5, "seen": 208, "late": 5.0}
    assert next_epoch == {"seen": 2}
    assert group.calls == [4, 4]
    assert group.sent[0][1] == {"loss": None, "seen": None}
    assert [key for key, part in group.sent[0][2].items() if part is not None] == ["seen"]


def test_a_rank_that_logs_nothing_takes_part() -> None:
    def play(rank: int, metrics: Metrics) -> Any:
        metrics.begin_batch(torch.zeros(2), 0)
        if rank == 1:
            log(metrics, "x", torch.tensor(3.0), on_step=True, on_epoch=True, prog_bar=True)
        steps = metrics.step_values()
        during = metrics.callback_values()
        epoch = end(metrics)
        return steps, during, epoch, metrics.published, metrics.progress_bar_values()

    results, _ = on_ranks(3, play)
    steps, during, epoch, published, bar = same_on_all(results)
    assert during == {"x": 3.0, "x_step": 3.0}
    assert (steps, epoch) == ({"x_step": 3.0}, {"x_epoch": 3.0})
    assert published == {"x": 3.0, "x_step": 3.0, "x_epoch": 3.0}
    assert bar == {"x_step": 3.0, "x_epoch": 3.0}


def test_nothing_logged_anywhere_gathers_once_too() -> None:
    results, group = on_ranks(3, lambda rank, metrics: (metrics.step_values(), end(metrics)))
    assert results == [({}, {})] * 3
    assert group.calls == [2] * 3


def test_the_device_is_read_once_for_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics(lambda value: [value])
    metrics.enter_batches()
    for i in range(100):
        metrics.begin_batch(torch.zeros(2), i)
        for name, reduction in KINDS.items():
            log(metrics, name, torch.tensor(float(i)), reduce_fx=reduction, on_step=True, on_epoch=True)
    reads = []
    original = Tensor.tolist
    for name in ("item", "__float__", "__bool__", "numpy"):
        monkeypatch.setattr(Tensor, name, lambda *_, name=name: pytest.fail(name))
    monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append(1) or original(self))
    metrics.step_values()
    assert len(reads) == 1
    metrics.enter_epoch_hooks()
    metrics.publish_epoch()
    assert len(reads) == 2
    metrics.publish_epoch()
    assert len(reads) == 2


# Steps


@pytest.mark.parametrize("world_size", WORLDS)
def test_step_values_are_those_of_the_global_batch(world_size: int) -> None:
    samples = torch.randn(103, generator=torch.Generator().manual_seed(2))

    def play(rank: int, metrics: Metrics) -> Any:
        rows = []
        for i, whole in enumerate(samples.split(12)):
            own = whole.tensor_split(world_size)[rank]
            metrics.begin_batch(own, i, len(own) * world_size / len(whole))  # as the loss is weighted; sizes are known
            log(metrics, "loss", own.mean())
            log(metrics, "right", (own > 0).sum(), reduce_fx="sum")
            log(metrics, "most", own.max(), reduce_fx="max", on_epoch=True)
            rows.append(metrics.step_values())
            assert metrics.step_values() == {}
            assert {
                "loss": rows[-1]["loss"],
                "most": rows[-1]["most_step"],
            }.items() <= metrics.callback_values().items()
        return rows, end(metrics), metrics.callback_values()

    results, _ = on_ranks(world_size, play)
    rows, _, values = same_on_all(results)
    for whole, row in zip(samples.double().split(12), rows, strict=True):
        assert row["loss"] == pytest.approx(whole.mean().item(), rel=1e-5)
        assert row["right"] == (whole > 0).sum()
        assert row["most_step"] == whole.max()
    assert float(values["loss"]) == pytest.approx(rows[-1]["loss"])
    assert float(values["most"]) == samples.max()


def test_between_log_steps_the_bar_shows_this_ranks_value_and_at_the_epochs_end_everybodys() -> None:
    def play(rank: int, metrics: Metrics) -> Any:
        seen = []
        for i in range(2):
            metrics.begin_batch(torch.zeros(1 + rank), i)
            log(metrics, "loss", torch.tensor(rank + 10.0 * i), prog_bar=True)
            seen.append(metrics.progress_bar_values()["loss"])
            if i == 0:
                metrics.step_values()
                seen.append(metrics.progress_bar_values()["loss"])
        metrics.enter_epoch_hooks()
        metrics.publish_epoch()
        seen.append(float(metrics.callback_values()["loss"]))
        seen.append(float(metrics.logger_values()["loss"]))
        return seen

    results, _ = on_ranks(2, play)
    for rank in (0, 1):
        assert results[rank] == pytest.approx([rank, 2 / 3, rank + 10, 10 + 2 / 3, 10 + 2 / 3])


def test_a_value_of_an_earlier_batch_does_not_mix_with_the_latest() -> None:
    def play(rank: int, metrics: Metrics) -> Any:
        for i in range(3):
            metrics.begin_batch(torch.zeros(1), i)
            if i < 2 or rank == 1:
                log(metrics, "x", float(10 * rank + i))
        return metrics.step_values()

    results, _ = on_ranks(2, play)
    assert same_on_all(results) == {"x": 12.0}


def test_a_step_value_needs_no_size() -> None:
    def play(rank: int, metrics: Metrics) -> Any:
        metrics.begin_batch(object(), 0)
        log(metrics, "x", float(rank))
        return metrics.step_values()

    results, _ = on_ranks(2, play)
    assert same_on_all(results) == {"x": 0.5}


def test_a_step_value_is_shown_until_its_epoch_is_over() -> None:
    def play(rank: int, metrics: Metrics) -> Any:
        metrics.begin_batch(torch.zeros(1), 0)
        log(metrics, "x", 1.0)
        metrics.step_values()
        end(metrics)
        metrics.begin_evaluation()
        log(metrics, "x", 2.0)
        metrics.publish_epoch()
        return metrics.callback_values()["x"], metrics.logger_values()["x"]

    results, _ = on_ranks(2, play)
    assert same_on_all(results) == (2.0, 2.0)


# Evaluation


@pytest.mark.parametrize("world_size", WORLDS)
def test_an_evaluations_history_has_global_batches(world_size: int) -> None:
    loaders = [torch.arange(103.0), torch.arange(7.0) * -1]

    def play(rank: int, metrics: Metrics) -> Any:
        metrics.begin_evaluation()
        metrics.enter_batches()
        for index, samples in enumerate(loaders):
            metrics.begin_dataloader(index)
            for i, whole in enumerate(samples.split(12)):
                own = whole[rank * 3 : rank * 3 + 3] if world_size == 4 else whole.tensor_split(world_size)[rank]
                if len(own):  # the last batch is too short for the last rank
                    metrics.begin_batch(own, i)
                    log(metrics, "x", own.mean(), on_step=True, on_epoch=True)
        metrics.begin_dataloader(None)
        metrics.enter_epoch_hooks()
        metrics.publish_epoch()
        metrics.publish_epoch()
        results, history = metrics.evaluation_results(2), metrics.evaluation_history()
        metrics.reset()
        metrics.end_evaluation()
        return results, history

    returned, _ = on_ranks(world_size, play)
    results, history = same_on_all(returned)
    assert [row for pair in results for row in pair.items()] == [
        ("x_epoch/dataloader_idx_0", 51.0),
        ("x_epoch/dataloader_idx_1", -3.0),
    ]
    expected = [
        (i, f"x_step/dataloader_idx_{index}", whole.mean().item())
        for index, samples in enumerate(loaders)
        for i, whole in enumerate(samples.split(12))
    ]
    assert [(i, name, pytest.approx(value)) for i, row in history for name, value in row.items()] == expected


def test_an_evaluation_leaves_the_series_of_training_alone() -> None:
    def play(rank: int, metrics: Metrics) -> Any:
        metrics.begin_batch(torch.zeros(1), 0)
        log(metrics, "x", float(rank), on_step=False, on_epoch=True)
        metrics.begin_evaluation()
        log(metrics, "y", 1.0 + rank)
        evaluated = metrics.publish_epoch()
        metrics.reset()
        metrics.end_evaluation()
        metrics.enter_batches()
        metrics.begin_batch(torch.zeros(1), 1)
        log(metrics, "x", float(rank), on_step=False, on_epoch=True)
        return evaluated, end(metrics)

    results, _ = on_ranks(2, play)
    assert same_on_all(results) == ({"y": 1.5}, {"x": 0.5})


# Batches that do not count, values of the first rank only


def test_a_batch_of_weight_0_counts_nothing() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.total, self.values = aggregation.SumMetric(), aggregation.CatMetric()

    modules = [Holder() for _ in range(2)]
    reductions: list[Any] = ["mean", "sum", "min", "max", lambda values: values.median()]

    def play(rank: int, metrics: Metrics) -> Any:
        module, seen = modules[rank], []
        for i in range(3):
            repeats = rank == 1 and i == 2
            value = torch.tensor(math.nan if repeats else float(i + 10 * rank))
            metrics.begin_batch(torch.zeros(2), i, 0.0 if repeats else 1.0)
            for number, reduction in enumerate(reductions):
                log(metrics, str(number), value, reduce_fx=reduction, on_step=True, on_epoch=True)
            for name in ("total", "values"):
                metric = getattr(module, name)
                metric.update(torch.tensor(100.0) if repeats else value)
            log(metrics, "total", module.total, on_step=False, on_epoch=True)
            if i == 2:
                seen.append(metrics.step_values())
        return seen[0], end(metrics)

    results, _ = on_ranks(2, play, modules)
    steps, epoch = same_on_all(results)
    assert steps == {f"{number}_step": 2.0 for number in range(5)}
    values = [0.0, 1.0, 2.0, 10.0, 11.0]
    assert {name: float(value) for name, value in epoch.items()} == {
        "0_epoch": pytest.approx(np.mean(values)), "1_epoch": 24.0, "2_epoch": 0.0, "3_epoch": 11.0, "4_epoch": 2.0,
        "total": 24.0,
    }  # fmt: skip
    assert modules[1].values.compute().tolist() == [10.0, 11.0]


def test_only_the_first_ranks_value_counts_where_that_is_asked_for() -> None:
    def play(rank: int, metrics: Metrics) -> Any:
        for i in range(2):
            metrics.begin_batch(torch.zeros(1), i)
            for name, reduction in [("sum", "sum"), ("function", lambda values: values.sum())]:
                log(metrics, name, torch.tensor(rank + 1.0), on_step=True, on_epoch=True, reduce_fx=reduction,
                    rank_zero_only=True)  # fmt: skip
            if rank > 0:
                log(metrics, "nobody's", 1.0, rank_zero_only=True)
        return metrics.step_values(), end(metrics)

    results, _ = on_ranks(3, play)
    steps, epoch = same_on_all(results)
    assert (steps, epoch) == ({"sum_step": 1.0, "function_step": 1.0}, {"sum_epoch": 2.0, "function_epoch": 2.0})


# Functions


def test_a_function_gets_the_values_in_one_process_order() -> None:
    seen = []

    def play(rank: int, metrics: Metrics) -> Any:
        for i in range(4 - rank):
            metrics.begin_batch(torch.zeros(1), i)
            value = torch.tensor(10 * i + rank, dtype=torch.float16 if rank else torch.int64)
            log(metrics, "x", value, reduce_fx=lambda v: seen.append(v) or v[-1] - v[0], on_step=False, on_epoch=True)
        return end(metrics)

    results, group = on_ranks(3, play)
    assert bits(same_on_all(results)["x"]) == bits(torch.tensor(30.0))
    for values in seen:
        assert values.tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 30]
        assert values.dtype is torch.float32
    assert group.calls == [2] * 3  # a rank may not have logged it, and so not have the function


def test_a_function_is_not_called_again_for_the_same_values() -> None:
    calls = []

    def play(rank: int, metrics: Metrics) -> Any:
        metrics.begin_batch(torch.zeros(1), 0)
        log(metrics, "x", 1.0 + rank, reduce_fx=lambda v: calls.append(rank) or v.sum(), on_step=False, on_epoch=True)
        return metrics.publish_epoch(), metrics.publish_epoch()

    results, group = on_ranks(2, play)
    assert same_on_all(results) == ({"x": 3.0}, {"x": 3.0})
    assert sorted(calls) == [0, 1]
    assert group.calls == [3, 3]


def test_a_function_that_a_rank_does_not_have_gives_it_its_value() -> None:
    def play(rank: int, metrics: Metrics) -> Any:
        metrics.begin_batch(torch.zeros(1), 0)
        if rank:
            log(metrics, "x", torch.tensor(float(rank)), reduce_fx=torch.median, on_step=False, on_epoch=True)
        return end(metrics), metrics.published

    results, _ = on_ranks(3, play)
    assert same_on_all(results) == ({"x": 1.0}, {"x": 1.0})


# Metric objects


def scores(n: int, of: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    logits = torch.randn(n, of, generator=generator)
    return logits.softmax(-1), torch.randint(0, of, (n,), generator=generator)


METRICS: dict[str, Callable[[], Any]] = {
    "accuracy": lambda: classes.MulticlassAccuracy(3),
    "auroc": lambda: classes.MulticlassAUROC(3),
    "mean": lambda: aggregation.MeanMetric(),
    "extremes": lambda: MinMaxMetric(classes.MulticlassF1Score(3, average="micro")),
    "twice": lambda: classes.MulticlassAccuracy(3) + classes.MulticlassAccuracy(3),
    "pearson": lambda: torchmetrics.PearsonCorrCoef(),
}


def feed(metric: Any, kind: str, predictions: Tensor, targets: Tensor) -> None:
    if kind == "mean":
        metric.update(predictions[:, 0], weight=1.0 + targets)
    elif kind == "pearson":
        metric.update(predictions[:, 0], targets.float())
    else:
        metric.update(predictions, targets)


def value_of(metric: Any, kind: str) -> float:
    value = metric.compute()
    return float(value["raw"] if kind == "extremes" else value)


class Raw(nn.Module):
    """A metric object of one's own around one of torchmetrics."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def compute(self) -> Tensor:
        raw: Tensor = self.inner.compute()["raw"]
        return raw

    def reset(self) -> None:
        self.inner.reset()


class Holder(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        metric = METRICS[kind]()
        self.metric = Raw(metric) if kind == "extremes" else metric

    @property
    def inner(self) -> Any:
        return self.metric.inner if isinstance(self.metric, Raw) else self.metric


# torchmetrics says of a rank without data that compute() came before update()
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_metric_objects_see_all_ranks_with_103_samples_and_ranks_without_any(kind: str, world_size: int) -> None:
    predictions, targets = scores(103)
    whole = METRICS[kind]()
    feed(whole, kind, predictions, targets)
    expected = value_of(whole, kind)
    modules = [Holder(kind) for _ in range(world_size)]

    def play(rank: int, metrics: Metrics) -> Any:
        busy = max(1, world_size - 1)  # the last of several ranks has no data
        mine = [(predictions[i::busy].split(10), targets[i::busy].split(10)) for i in range(busy)][rank:][:1]
        values = []
        for _ in range(2):  # epochs
            metrics.begin_evaluation()
            metrics.enter_batches()
            for pairs in mine:
                for i, (p, t) in enumerate(zip(*pairs, strict=True)):
                    metrics.begin_batch(p, i)
                    feed(modules[rank].inner, kind, p, t)
                    log(metrics, "x", modules[rank].metric)
            metrics.enter_epoch_hooks()
            metrics.publish_epoch()
            values.append(metrics.publish_epoch()["x"])
            # whoever asks again gets the same value, and waits for nobody
            if kind != "twice":
                assert value_of(modules[rank].inner, kind) == pytest.approx(expected, abs=1e-6)
            metrics.reset()
            metrics.end_evaluation()
        return values

    results, _ = on_ranks(world_size, play, modules)
    assert [float(value) for value in same_on_all(results)] == pytest.approx([expected] * 2, abs=1e-6)


def test_a_metric_object_that_is_updated_after_a_publish_is_asked_again() -> None:
    modules = [nn.ModuleDict({"m": aggregation.SumMetric()}) for _ in range(2)]

    def play(rank: int, metrics: Metrics) -> Any:
        metric: Any = modules[rank]["m"]
        metrics.begin_batch(torch.zeros(1), 0)
        metric.update(1.0)
        log(metrics, "x", metric, on_step=False, on_epoch=True)
        metrics.enter_epoch_hooks()
        first = metrics.publish_epoch()
        if rank == 1:
            metric.update(5.0)
        second = metrics.publish_epoch()
        assert metrics.publish_epoch() == second
        assert metric.sum_value == (6.0 if rank else 1.0)  # its own again
        return first, second

    results, _ = on_ranks(2, play, modules)
    assert same_on_all(results) == ({"x": 2.0}, {"x": 7.0})


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_collections_see_all_ranks_also_where_metrics_share_their_states() -> None:
    def made() -> Any:
        parts = [classes.MulticlassAccuracy(3), classes.MulticlassPrecision(3), classes.MulticlassAUROC(3)]
        return torchmetrics.MetricCollection(parts, prefix="val_")

    predictions, targets = scores(103)
    whole = made()
    whole.update(predictions, targets)
    expected = {name: pytest.approx(float(value), abs=1e-6) for name, value in whole.compute().items()}
    modules = [nn.ModuleDict({"all": made()}) for _ in range(3)]

    def play(rank: int, metrics: Metrics) -> Any:
        collection: Any = modules[rank]["all"]
        for _ in range(2):
            metrics.begin_evaluation()
            metrics.enter_batches()
            if rank < 2:
                for i, (p, t) in enumerate(zip(predictions[rank::2].split(9), targets[rank::2].split(9), strict=True)):
                    metrics.begin_batch(p, i)
                    collection.update(p, t)
                    for name, metric in collection.items():
                        log(metrics, name, metric)
            metrics.enter_epoch_hooks()
            values = metrics.publish_epoch()
            again = {name: float(value) for name, value in collection.compute().items()}
            metrics.reset()
            metrics.end_evaluation()
        return {name: float(value) for name, value in values.items()}, again

    results, _ = on_ranks(3, play, modules)
    values, again = same_on_all(results)
    assert values == again == expected


def test_states_are_sent_without_what_lies_beside_them() -> None:
    def play(rank: int, metrics: Metrics) -> Any:
        metric = Sums(*(aggregation.SumMetric() for _ in range(50)), aggregation.CatMetric())
        metric.parts[-1].update(torch.zeros(10_000))
        metrics.begin_batch(torch.zeros(1), 0)
        log(metrics, "x", metric, on_step=False, on_epoch=True)
        return end(metrics)

    _, group = on_ranks(2, play)
    assert len(pickle.dumps(group.sent[0][0])) < 40_000 + 51 * 1000


class Sums(nn.Module):
    def __init__(self, *parts: Any) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def compute(self) -> float:
        return 0.0

    def reset(self) -> None:
        pass


def test_what_a_rank_does_not_log_does_not_count_and_is_reset_with_the_others() -> None:
    modules = [nn.ModuleDict({"m": aggregation.SumMetric()}) for _ in range(2)]

    def play(rank: int, metrics: Metrics) -> Any:
        metric: Any = modules[rank]["m"]
        metrics.begin_batch(torch.zeros(1), 0)
        metric.update(1.0 + rank)
        if rank == 0:
            log(metrics, "x", metric, on_step=False, on_epoch=True)
        return end(metrics), metric.update_count, metric.sum_value

    results, _ = on_ranks(2, play, modules)
    assert same_on_all(results) == ({"x": 1.0}, 0, 0.0)


class RunningMean(torchmetrics.Metric):  # type: ignore[misc]
    """A state that torchmetrics puts together as the mean over ranks."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("mean", torch.tensor(0.0), "mean")

    def update(self, value: float) -> None:
        self.mean = self.mean + (value - self.mean) / self.update_count

    def compute(self) -> Tensor:
        return self.mean


def test_a_mean_over_updates_is_right_for_uneven_ranks() -> None:
    modules = [nn.ModuleDict({"m": RunningMean()}) for _ in range(3)]

    def play(rank: int, metrics: Metrics) -> Any:
        metric: Any = modules[rank]["m"]
        for i in range(1 + 3 * rank):
            metrics.begin_batch(torch.zeros(1), i)
            metric.update(float(i + rank))
            log(metrics, "x", metric, on_step=False, on_epoch=True)
        metrics.enter_epoch_hooks()
        return metrics.publish_epoch()

    results, _ = on_ranks(3, play, modules)
    assert float(same_on_all(results)["x"]) == pytest.approx(
        np.mean([i + r for r in range(3) for i in range(1 + 3 * r)])
    )


class Own:
    """A metric object that says what it was made to, and counts."""

    def __init__(self, value: Any) -> None:
        self.value, self.computed = value, 0

    def compute(self) -> Any:
        self.computed += 1
        return self.value

    def reset(self) -> None:
        self.value = 0.0


def test_an_object_of_which_nothing_is_known_gives_the_first_ranks_value_with_a_warning() -> None:
    seen: list[str] = []

    def play(rank: int, metrics: Metrics) -> Any:
        values = []
        for _ in range(2):
            metrics.begin_batch(torch.zeros(1), 0)
            log(metrics, "x", Own(1.0 + rank), on_step=False, on_epoch=True)
            log(metrics, "alike", Own(torch.tensor(4)), on_step=False, on_epoch=True)
            values.append(end(metrics))
        return values

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results, _ = on_ranks(2, play)
    seen = [str(each.message) for each in caught]
    assert same_on_all(results) == [{"x": 1.0, "alike": 4}] * 2
    assert len(seen) == 2  # once on each rank
    assert all("metric-not-synchronised" in each and "'x'" in each and "1, 2" in each for each in seen)


def test_an_object_that_one_rank_alone_has_gives_all_its_value() -> None:
    def play(rank: int, metrics: Metrics) -> Any:
        metrics.begin_batch(torch.zeros(1), 0)
        if rank == 1:
            log(metrics, "x", Own(2.0), on_step=False, on_epoch=True)
        return end(metrics)

    results, _ = on_ranks(3, play)
    assert same_on_all(results) == {"x": 2.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_values_of_a_gpu_stay_there() -> None:
    device = torch.device("cuda")
    modules = [nn.ModuleDict({"m": classes.MulticlassAUROC(3).to(device)}) for _ in range(2)]
    predictions, targets = scores(40)

    def play(rank: int, metrics: Metrics) -> Any:
        metric: Any = modules[rank]["m"]
        for i in range(2):
            own = slice(20 * rank + 10 * i, 20 * rank + 10 * i + 10)
            metrics.begin_batch(predictions[own], i)
            metric.update(predictions[own].to(device), targets[own].to(device))
            log(metrics, "auroc", metric, on_step=False, on_epoch=True)
            log(metrics, "mean", predictions[own, 0].mean().to(device), on_step=True, on_epoch=True)
            log(
                metrics,
                "middle",
                predictions[own, 0].mean().to(device),
                on_step=False,
                on_epoch=True,
                reduce_fx=torch.median,
            )
        return metrics.publish_epoch()

    results, _ = on_ranks(2, play, modules)
    values = same_on_all(results)
    assert {value.device.type for value in values.values()} == {"cuda"}
    assert values["mean_epoch"].item() == pytest.approx(predictions[:, 0].mean().item())
    assert values["auroc"].item() == pytest.approx(float(classes.MulticlassAUROC(3)(predictions, targets)), abs=1e-6)
    assert modules[0]["m"].preds[0].device.type == "cuda"  # type: ignore[union-attr]


# Real processes


def _evaluate(rank: int, world_size: int) -> Any:
    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * world_size
        dist.all_gather_object(values, value)
        return values

    module = nn.ModuleDict(
        {"auroc": classes.MulticlassAUROC(3), "accuracy": classes.MulticlassAccuracy(3), "n": aggregation.SumMetric()}
    )
    metrics = Metrics(gather, module)
    metrics.begin_evaluation()
    metrics.enter_batches()
    predictions, targets = scores(103)
    own = slice(rank * 50, (rank + 1) * 50)  # the fourth rank has nothing
    for i, (p, t) in enumerate(zip(predictions[own].split(8), targets[own].split(8), strict=True)):
        if not len(p):
            break
        metrics.begin_batch(p, i)
        log(metrics, "right", (p.argmax(-1) == t).float().mean(), on_step=True, on_epoch=True)
        for name in ("auroc", "accuracy", "n") if rank == 0 else ("n", "accuracy", "auroc"):
            metric: Any = module[name]
            metric.update(*((len(p),) if name == "n" else (p, t)))
            log(metrics, name, metric)
        log(metrics, "middle", p[0, 0], reduce_fx=lambda values: values.median())
    metrics.enter_epoch_hooks()
    metrics.publish_epoch()
    again = float(module["auroc"].compute())  # type: ignore[operator]
    metrics.publish_epoch()
    [values] = metrics.evaluation_results(1)
    history = metrics.evaluation_history()
    metrics.reset()
    metrics.end_evaluation()
    metrics.leave()
    return values, history, again


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("world_size", [2, 4])
def test_with_processes(world_size: int) -> None:
    predictions, targets = scores(103)
    if world_size == 2:
        predictions, targets = predictions[:100], targets[:100]
    values, history, again = same_on_all(run_ranks(_evaluate, world_size, world_size))
    assert values["right_epoch"] == pytest.approx((predictions.argmax(-1) == targets).double().mean().item())
    assert values["auroc"] == pytest.approx(float(classes.MulticlassAUROC(3)(predictions, targets)), abs=1e-6) == again
    assert values["accuracy"] == pytest.approx(float(classes.MulticlassAccuracy(3)(predictions, targets)), abs=1e-6)
    assert values["n"] == len(targets)
    assert [i for i, _ in history] == list(range(7))


class Classifier(L.LightningModule):
    """Logs metric objects in training and validation, and computes one itself at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.seen, self.auroc, self.own = aggregation.SumMetric(), classes.MulticlassAUROC(3), aggregation.MeanMetric()
        self.computed: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.seen.update(len(x))
        self.log("seen", self.seen, on_step=False, on_epoch=True)
        self.log("middle", x[:, 0].mean(), on_step=False, on_epoch=True, reduce_fx=lambda v: v.max())
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.auroc.update(self.net(x).softmax(-1), y)
        self.own.update(x.mean(), weight=len(x))
        self.log("auroc", self.auroc)
        self.log("loss", nn.functional.cross_entropy(self.net(x), y), on_step=True, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        self.computed += [float(self.auroc.compute()), float(self.own.compute())]
        self.own.reset()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def _fit(rank: int, ranks: int, folder: Path) -> Any:
    L.seed_everything(3, verbose=False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(61, 4, generator=generator)
    dataset = TensorDataset(x, x.argmax(1) % 3)
    module, memory = Classifier(), Memory()
    trainer = make_trainer(folder, max_epochs=2, logger=memory, log_every_n_steps=1)
    # the last global batch has one sample: in training the others repeat one
    trainer.fit(module, DataLoader(dataset, batch_size=12 // ranks, shuffle=True), DataLoader(dataset, 12 // ranks))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}, module.computed, memory.rows


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_trainers_ranks_log_what_one_process_does(ranks: int, tmp_path: Path) -> None:
    metrics, computed, rows = _fit(0, 1, tmp_path)
    assert metrics["seen"] == 61
    several = run_trainers(_fit, ranks, ranks, tmp_path)
    # what depends on how the data is cut: means of fewer samples, and the last batches of validation
    cut = ("middle", "loss_step")
    for other, own, _ in several:
        assert other["middle"] >= metrics["middle"]
        assert [other[name] for name in cut] == [several[0][0][name] for name in cut]
        assert other == pytest.approx(metrics | {name: other[name] for name in cut}, rel=1e-5)
        assert own == pytest.approx(computed, rel=1e-5)
    assert len([row for _, row in rows if "loss_step" in row]) == 12
    for (step, row), (expected_step, expected) in zip(several[0][2], rows, strict=True):
        assert (step, row.keys()) == (expected_step, expected.keys())
        differs = cut if "middle" in row or step >= 4 else ()
        assert row == pytest.approx(expected | {name: row[name] for name in differs if name in row}, rel=1e-5)


# Checkpoints: N ranks go on as one, or as another number


class Logging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy, self.auroc = classes.MulticlassAccuracy(3), classes.MulticlassAUROC(3)
        self.mean = aggregation.MeanMetric()


def train_on(metrics: Metrics, module: Logging, i: int, p: Tensor, t: Tensor) -> None:
    metrics.begin_batch(p, i)
    right = (p.argmax(-1) == t).float()
    log(metrics, "mean", right.mean(), on_step=True, on_epoch=True)
    log(metrics, "sum", right.sum(), reduce_fx="sum", on_epoch=True)
    log(metrics, "most", p.max(), reduce_fx="max", on_epoch=True)
    log(metrics, "least", float(p.min()), reduce_fx="min", on_epoch=True)
    log(metrics, "count", len(p), reduce_fx="sum", on_epoch=True)
    log(metrics, "spread", p[0, 0], reduce_fx=lambda values: values.max() - values.min(), on_epoch=True)
    for name in ("accuracy", "auroc", "mean"):
        metric = getattr(module, name)
        metric.update(*((p[:, 0],) if name == "mean" else (p, t)))
        log(metrics, f"{name}_object", metric, on_step=False, on_epoch=True)


def through_a_file(state: Any) -> Any:
    return decode(*encode({"metrics": state}))["metrics"]


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 90), st.integers(1, 3))
@example(3, 2, 64, 1)
@example(2, 4, 63, 2)
@example(4, 1, 70, 3)
def test_a_run_goes_on_with_another_number_of_ranks(before: int, after: int, batches: int, more: int) -> None:
    predictions, targets = scores((batches + more) * 13)
    pieces = list(zip(predictions.split(13), targets.split(13), strict=True))

    def own(rank: int, world_size: int, i: int) -> tuple[Tensor, Tensor]:
        p, t = pieces[i]
        return p.tensor_split(world_size)[rank], t.tensor_split(world_size)[rank]

    def first(rank: int, metrics: Metrics) -> Any:
        module = Logging()
        log(metrics, "published", float(rank), on_step=False, on_epoch=True, batch_size=1)
        end(metrics)
        metrics.enter_batches()
        for i in range(batches):
            train_on(metrics, module, i, *own(rank, before, i))
        return through_a_file(capture_metrics(metrics, module, CPU))

    states, _ = on_ranks(before, first)
    kept = bits([state["logged"]["tensors"][0]["values"].sum() for state in states if state["logged"]["tensors"]])
    whole = through_a_file(merged(states))
    assert kept == bits(
        [state["logged"]["tensors"][0]["values"].sum() for state in states if state["logged"]["tensors"]]
    )

    modules = [Logging() for _ in range(after)]

    def second(rank: int, metrics: Metrics) -> Any:
        module = modules[rank]
        for metric in module.children():  # something to forget
            metric.update(*((torch.ones(1),) if metric is module.mean else scores(5)))
        restore_metrics(metrics, module, whole if rank == 0 else emptied(whole), CPU)
        for i in range(batches, batches + more):
            train_on(metrics, module, i, *own(rank, after, i))
        return end(metrics), metrics.published["published"]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results, _ = on_ranks(after, second, modules)
    values, published = same_on_all(results)
    assert published == sum(range(before)) / before
    right = (predictions.argmax(-1) == targets).double()
    expected = {
        "mean_epoch": right.mean(), "sum_epoch": right.sum(), "most_epoch": predictions.max(),
        "least_epoch": predictions.min(), "count_epoch": len(right),
        "accuracy_object": classes.MulticlassAccuracy(3)(predictions, targets),
        "auroc_object": classes.MulticlassAUROC(3)(predictions, targets), "mean_object": predictions[:, 0].mean(),
    }  # fmt: skip
    for name, value in expected.items():
        assert float(values[name]) == pytest.approx(float(value), rel=1e-5), name
    firsts = torch.cat(
        [own(rank, n, i)[0][:1, 0] for n, r in ((before, range(batches)), (after, range(batches, batches + more)))
         for i in r for rank in range(n)]
    )  # fmt: skip
    assert float(values["spread_epoch"]) == pytest.approx(float(firsts.max() - firsts.min()))


def test_of_one_rank_the_merged_state_says_the_same() -> None:
    module, metrics = Logging(), Metrics()
    metrics.enter_batches()
    for i in range(5):
        train_on(metrics, module, i, *scores(7 + i))
    state = capture_metrics(metrics, module, CPU)
    other, fresh = Logging(), Metrics()
    restore_metrics(fresh, other, merged([state]), CPU)
    for each, part in ((metrics, module), (fresh, other)):
        each.enter_batches()
        train_on(each, part, 5, *scores(3))
    assert bits(end(fresh)) == bits(end(metrics))


def test_values_not_summed_yet_take_turns() -> None:
    def play(rank: int, metrics: Metrics) -> Any:
        for i in range(3 - rank):
            metrics.begin_batch(torch.zeros(1), i)
            log(metrics, "x", torch.tensor(10.0 * i + rank), reduce_fx=lambda v: v[0], on_step=False, on_epoch=True)
        return capture_metrics(metrics, nn.Module(), CPU)

    states, _ = on_ranks(3, play)
    metrics, seen = Metrics(), []
    restore_metrics(metrics, nn.Module(), merged(states), CPU)
    metrics.enter_batches()
    metrics.begin_batch(torch.zeros(1), 3)
    log(metrics, "x", torch.tensor(99.0), reduce_fx=lambda v: seen.append(v) or v[0], on_step=False, on_epoch=True)
    end(metrics)
    assert seen[0].tolist() == [0, 1, 2, 10, 11, 20, 99]


@pytest.mark.parametrize(("uneven", "expected"), [(False, [0, 10, 20, 1, 11, 21]), (True, [0, 1, 10, 11, 20, 21, 22])])
def test_lists_with_an_entry_for_each_update_take_turns(uneven: bool, expected: list[int]) -> None:
    class Pairs(torchmetrics.Metric):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.add_state("a", [], "cat")
            self.add_state("b", [], "cat")

        def update(self, value: float, twice: bool) -> None:
            self.a.append(torch.tensor([value]))
            self.b += [torch.tensor([value])] * (1 + twice)

        def compute(self) -> None:
            pass

    modules = [nn.ModuleDict({"m": Pairs()}) for _ in range(3)]
    for rank, module in enumerate(modules):
        metric: Any = module["m"]
        for i in range(3 if uneven and rank == 2 else 2):
            metric.update(10.0 * rank + i, uneven)
    state = merged([capture_metrics(Metrics(), module, CPU) for module in modules])
    restore_metrics(Metrics(), modules[0], state, CPU)
    assert torch.cat(modules[0]["m"].a).tolist() == expected  # type: ignore[arg-type]


def test_what_cannot_be_merged_begins_anew_with_a_warning() -> None:
    modules = [nn.ModuleDict({"r": torchmetrics.PearsonCorrCoef()}) for _ in range(2)]
    states = []
    for rank, module in enumerate(modules):
        module["r"].update(torch.arange(4.0) + rank, torch.tensor([1.0, 3.0, 2.0, 5.0]))  # type: ignore[operator]
        states.append(capture_metrics(Metrics(), module, CPU))
    with pytest.warns(LeydenWarning, match="cannot be made one, so they begin anew: r"):
        state = merged(states)
    restore_metrics(Metrics(), modules[0], state, CPU)
    assert modules[0]["r"].update_count == 0
    # what one rank alone has updated goes on
    empty: Any = nn.ModuleDict({"r": torchmetrics.PearsonCorrCoef()})
    state = merged([capture_metrics(Metrics(), empty, CPU), states[1]])
    restore_metrics(Metrics(), empty, state, CPU)
    assert empty["r"].compute() == pytest.approx(float(modules[1]["r"].compute()))  # type: ignore[operator]


def test_only_the_first_ranks_values_are_merged_where_that_was_asked_for() -> None:
    def play(rank: int, metrics: Metrics) -> Any:
        metrics.begin_batch(torch.zeros(1), 0)
        log(metrics, "x", 1.0 + rank, reduce_fx="sum", on_step=False, on_epoch=True, rank_zero_only=True)
        return capture_metrics(metrics, nn.Module(), CPU)

    states, _ = on_ranks(3, play)
    metrics = Metrics()
    restore_metrics(metrics, nn.Module(), merged(states), CPU)
    assert end(metrics) == {"x": 1.0}


def test_states_of_different_reductions_are_not_merged() -> None:
    def play(rank: int, metrics: Metrics) -> Any:
        metrics.begin_batch(torch.zeros(1), 0)
        log(metrics, "x", 1.0, reduce_fx="sum" if rank else "max", on_step=False, on_epoch=True)
        return capture_metrics(metrics, nn.Module(), CPU)

    states, _ = on_ranks(2, play)
    with pytest.raises(MetricError, match="'max' and 'sum'"):
        merged(states)
