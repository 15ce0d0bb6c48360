"""Metrics through a checkpoint in the middle of everything: what comes after is the same to the last bit."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leyden.checkpoint.format import decode, encode
from leyden.errors import LeydenWarning, MetricError
from leyden.metrics import Metrics
from leyden.metrics_state import (
    capture_metric_objects,
    capture_metrics,
    restore_metric_objects,
    restore_metrics,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torchmetrics = pytest.importorskip("torchmetrics")
    from torchmetrics import classification as classes
    from torchmetrics.wrappers import BootStrapper, MetricTracker, MinMaxMetric, Running

torch.set_num_threads(1)

CPU = torch.device("cpu")
BATCH_SIZE = 3


def through_a_file(state: Mapping[str, Any]) -> Any:
    return decode(*encode({"metrics": state}))["metrics"]


def restored(metrics: Metrics, module: nn.Module | None = None) -> Metrics:
    fresh = Metrics()
    fresh.load_state_dict(through_a_file(metrics.state_dict(module)), module)
    return fresh


def bits(value: Any) -> Any:
    """The value with its type, so that only what is equal to the last bit is equal, NaN too."""
    if isinstance(value, Tensor):
        return ("tensor", value.dtype, tuple(value.shape), value.contiguous().view(torch.uint8).tolist() if value.ndim
                else value.reshape(1).view(torch.uint8).tolist())  # fmt: skip
    if isinstance(value, dict):
        return [(key, bits(item)) for key, item in value.items()]  # the order counts
    if isinstance(value, (list, tuple)):
        return [bits(item) for item in value]
    return (type(value), struct.pack("<d", value) if isinstance(value, float) else value)


def seen(metrics: Metrics) -> Any:
    return bits([metrics.callback_values(), metrics.logger_values(), metrics.progress_bar_values()])


def log(metrics: Metrics, name: str, value: Any, **options: Any) -> None:
    arguments: dict[str, Any] = {
        "on_step": None, "on_epoch": None, "prog_bar": False, "logger": True, "reduce_fx": "mean", "batch_size": BATCH_SIZE,
        "add_dataloader_idx": True,
    }  # fmt: skip
    metrics.log(name, value, **(arguments | options))


def end_epoch(metrics: Metrics) -> Any:
    metrics.enter_epoch_hooks()
    first = metrics.publish_epoch()
    during = seen(metrics)
    last = metrics.publish_epoch()
    metrics.reset()
    metrics.enter_batches()
    return bits([first, last]), during


def in_training() -> Metrics:
    metrics = Metrics()
    metrics.enter_batches()
    return metrics


# Any sequence of what a run does, cut anywhere

REDUCTIONS = ("mean", "avg", torch.mean, "sum", torch.sum, "min", torch.amin, "max", torch.max)
NAMES = ("loss", "acc", "$odd", "a/b.c", "épée")
options = st.fixed_dictionaries(
    {
        "on_step": st.sampled_from([None, True, False]),
        "on_epoch": st.sampled_from([None, True, False]),
        "prog_bar": st.booleans(),
        "logger": st.booleans(),
        "reduce_fx": st.sampled_from(REDUCTIONS),
    }
)
numbers = st.floats(width=32, allow_subnormal=False) | st.integers(-(2**40), 2**40) | st.booleans()
kinds = st.sampled_from(["float32", "float64", "float16", "bfloat16", "int64", "python"])
logs = st.tuples(
    st.just("log"),
    st.sampled_from(NAMES),
    kinds,
    numbers,
    st.sampled_from([1, 2, 7, 63, 64, 65, 130]),
    st.integers(1, 5),
)
others = st.tuples(st.sampled_from(["flush", "epoch", "validate", "cut"]))


def as_kind(kind: str, value: float, i: int) -> Any:
    number = value if value != value or abs(value) == float("inf") else value / (i + 3)
    if kind == "python":
        return value if i % 2 else number
    if kind == "int64":
        return torch.tensor(i * 7 - 3)
    return torch.tensor(float(number)).to(getattr(torch, kind))


def play(script: list[Any], flags: Mapping[str, Any], cut: bool) -> list[Any]:
    """Do what a run does; return all that it shows on its way."""
    metrics, shown = in_training(), []
    for what, *rest in script:
        if what == "log":
            name, kind, value, times, batch_size = rest
            for i in range(times):
                log(metrics, name, as_kind(kind, value, i), batch_size=batch_size, **flags[name])
        elif what == "flush":
            shown.append(bits(metrics.step_values()))
        elif what == "epoch":
            shown.append(end_epoch(metrics))
        elif what == "validate":
            metrics.begin_evaluation()
            metrics.enter_batches()
            log(metrics, "val", torch.tensor(len(shown) / 3), prog_bar=True)
            log(metrics, "val_float", len(shown) / 7)
            metrics.publish_epoch()
            metrics.reset()
            metrics.end_evaluation()
            metrics.enter_batches()
        elif cut:
            metrics = restored(metrics)
            metrics.enter_batches()
        shown.append(seen(metrics))
    shown.append(bits(metrics.step_values()))
    shown.append(end_epoch(metrics))
    return [*shown, seen(metrics)]


@settings(max_examples=150, deadline=None)
@given(
    script=st.lists(logs | logs | others, max_size=14),
    flags=st.fixed_dictionaries(dict.fromkeys(NAMES, options)),
    cuts=st.lists(st.integers(0, 14), min_size=1, max_size=2),
)
def test_a_cut_anywhere_changes_nothing(script: list[Any], flags: Mapping[str, Any], cuts: list[int]) -> None:
    for cut in cuts:
        script.insert(cut, ("cut",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert play(script, flags, cut=True) == play(script, flags, cut=False)


@pytest.mark.parametrize("before", [1, 63, 64, 65, 100, 128])
def test_a_mean_is_summed_in_the_same_portions(before: int) -> None:
    values = torch.rand(200, generator=torch.Generator().manual_seed(before)).pow(8)
    whole, halves = in_training(), in_training()
    for i, value in enumerate(values):
        if i == before:
            halves = restored(halves)
            halves.enter_batches()
        for metrics in (whole, halves):
            log(metrics, "x", value, on_epoch=True, batch_size=1 + i % 3)
    assert end_epoch(halves) == end_epoch(whole)


def test_what_was_logged_once_is_published_after_all() -> None:
    metrics = in_training()
    log(metrics, "early", torch.tensor(2.0), on_epoch=True)
    later = restored(metrics)
    later.enter_epoch_hooks()
    assert later.publish_epoch() == {"early_epoch": 2.0}
    assert later.callback_values()["early_step"] == 2.0


def test_what_the_loggers_got_they_do_not_get_again() -> None:
    metrics = in_training()
    log(metrics, "sent", torch.tensor(1.0))
    metrics.step_values()
    log(metrics, "waiting", torch.tensor(2.0))
    assert restored(metrics).step_values() == {"waiting": 2.0}


def test_few_tensors_for_many_values() -> None:
    metrics = in_training()
    for i in range(40):
        log(metrics, f"x{i}", torch.tensor(float(i)), on_epoch=True)
        log(metrics, f"x{i}", torch.tensor(float(i)), on_epoch=True)
    tensors, _ = encode({"metrics": metrics.state_dict()})
    assert [tuple(tensor.shape) for tensor in tensors.values()] == [(120,)]  # the latest, and two to be summed, of each


def test_the_state_can_be_taken_up_twice_and_belongs_to_nobody() -> None:
    metrics = in_training()
    log(metrics, "x", torch.tensor(1.0), on_epoch=True)
    end_epoch(metrics)
    log(metrics, "x", torch.tensor(3.0), on_epoch=True)
    state = through_a_file(metrics.state_dict())
    for _ in range(2):
        metrics.load_state_dict(state)
        log(metrics, "x", torch.tensor(5.0), on_epoch=True)  # what a hook logs before training goes on is dropped
        metrics.published["x"].zero_()  # type: ignore[union-attr]
    metrics.load_state_dict(state)
    assert metrics.published["x"] == 1.0
    metrics.enter_epoch_hooks()
    assert metrics.publish_epoch()["x_epoch"] == 3.0


def test_a_changed_flag_is_refused_after_a_resume_too() -> None:
    metrics = in_training()
    log(metrics, "x", 1.0, on_epoch=True)
    later = restored(metrics)
    later.enter_batches()
    with pytest.raises(MetricError, match=r"different arguments \(reduce_fx='mean' and 'sum'\)"):
        log(later, "x", 1.0, on_epoch=True, reduce_fx="sum")


def test_on_another_kind_of_device_sums_go_on() -> None:
    metrics = in_training()
    for i in range(3):
        log(metrics, "x", torch.tensor(float(i)), on_epoch=True)
        log(metrics, "median", torch.tensor(float(i)), on_epoch=True, reduce_fx=torch.median)
    state = metrics.state_dict(device=torch.device("cuda"))  # as if the run had been there
    later = in_training()
    later.load_state_dict(through_a_file(state))
    log(later, "x", torch.tensor(9.0), on_epoch=True)
    log(later, "median", torch.tensor(9.0), on_epoch=True, reduce_fx=torch.median)
    later.enter_epoch_hooks()
    assert later.publish_epoch() == {"x_epoch": 3.0, "median_epoch": 1.0}


# Functions, which no file can hold


def spread(values: Tensor) -> Tensor:
    return values.max() - values.min()


@pytest.mark.parametrize("function", [spread, torch.median, lambda values: values[0] * 2 + values[-1]])
@pytest.mark.parametrize("kind", ["float32", "int64", "python"])
def test_a_function_is_taken_from_the_next_call(function: Callable[[Tensor], Tensor], kind: str) -> None:
    whole, halves = in_training(), in_training()
    for i in range(150):
        if i in (20, 90):
            halves = restored(restored(halves))
            halves.enter_batches()
        for metrics in (whole, halves):
            log(metrics, "x", as_kind(kind, 5.0, i), on_epoch=True, reduce_fx=function)
    assert end_epoch(halves) == end_epoch(whole)


def test_a_function_that_never_comes_back_is_told_once() -> None:
    metrics = in_training()
    log(metrics, "x", 1.0, on_epoch=True, reduce_fx=spread)
    log(metrics, "steps", 1.0, reduce_fx=spread)  # on_epoch=False: nothing is missing
    metrics = restored(metrics)
    with pytest.warns(LeydenWarning, match=r"LEY-metric-not-restored\] 'x': logged before") as caught:
        end_epoch(metrics)
    assert len(caught) == 1
    end_epoch(metrics)


def test_a_name_where_a_function_was_is_refused() -> None:
    metrics = in_training()
    log(metrics, "x", 1.0, on_epoch=True, reduce_fx=spread)
    metrics = restored(metrics)
    metrics.enter_batches()
    with pytest.raises(MetricError, match="reduce_fx=a function and 'mean'"):
        log(metrics, "x", 1.0, on_epoch=True)


# Metric objects

CLASSES = 4


def samples(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(11 + seed % 3, CLASSES, generator=generator).softmax(-1)
    return scores, torch.randint(0, CLASSES, (len(scores),), generator=generator)


def of_classes(seed: int) -> tuple[Any, ...]:
    return samples(seed)


def of_numbers(seed: int) -> tuple[Any, ...]:
    return (samples(seed)[0].flatten()[:7] ** 3,)


def of_pairs(seed: int) -> tuple[Any, ...]:
    numbers = samples(seed)[0].flatten()
    return numbers[:20], numbers[20:40]


def collection(**options: Any) -> Any:
    several = {"acc": classes.MulticlassAccuracy(CLASSES), "f1": classes.MulticlassF1Score(CLASSES),
               "auroc": classes.MulticlassAUROC(CLASSES), "ap": classes.MulticlassAveragePrecision(CLASSES),
               "confusion": classes.MulticlassConfusionMatrix(CLASSES)}  # fmt: skip
    return torchmetrics.MetricCollection(several, **options)


METRICS: dict[str, tuple[Callable[[], Any], Callable[[int], tuple[Any, ...]]]] = {
    "accuracy": (lambda: classes.MulticlassAccuracy(CLASSES), of_classes),
    "list states": (lambda: classes.MulticlassAUROC(CLASSES), of_classes),
    "list states on the CPU": (lambda: classes.MulticlassAUROC(CLASSES, compute_on_cpu=True), of_classes),
    "binned": (lambda: classes.MulticlassAUROC(CLASSES, thresholds=7), of_classes),
    "confusion": (lambda: classes.MulticlassConfusionMatrix(CLASSES), of_classes),
    "mean": (torchmetrics.MeanMetric, of_numbers),
    "cat": (torchmetrics.CatMetric, of_numbers),
    "maximum": (torchmetrics.MaxMetric, of_numbers),
    "pearson": (torchmetrics.PearsonCorrCoef, of_pairs),
    "spearman": (torchmetrics.SpearmanCorrCoef, of_pairs),
    "r2": (torchmetrics.R2Score, of_pairs),
    "minmax": (lambda: MinMaxMetric(classes.MulticlassAccuracy(CLASSES)), of_classes),
    "running": (lambda: Running(torchmetrics.SumMetric(), window=3), of_numbers),
    "bootstrap": (lambda: BootStrapper(torchmetrics.MeanMetric(), num_bootstraps=3), of_numbers),
    "sum of two": (lambda: torchmetrics.MeanMetric() + torchmetrics.MaxMetric(), of_numbers),
    "collection": (collection, of_classes),
    "collection without groups": (lambda: collection(compute_groups=False), of_classes),
    "collection of collections": (lambda: torchmetrics.MetricCollection({"a": collection(), "b": collection()}), of_classes),
    "persistent": (lambda: persistent(classes.MulticlassAccuracy(CLASSES)), of_classes),
}  # fmt: skip


def persistent(metric: Any) -> Any:
    metric.persistent(True)
    return metric


class Holder(nn.Module):
    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.plain = make()
        self.many = nn.ModuleDict({"one": make(), "list": nn.ModuleList([make()])})

    def all(self) -> list[Any]:
        return [self.plain, self.many["one"], self.many["list"][0]]  # type: ignore[index]


def feed(holder: Holder, seed: int, data: Callable[[int], tuple[Any, ...]], by_forward: bool) -> None:
    torch.manual_seed(seed)  # for bootstrapping
    for metric in holder.all():
        if by_forward:
            metric(*data(seed))
        else:
            metric.update(*data(seed))


@pytest.mark.parametrize("by_forward", [False, True])
@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("cut", [0, 1, 4])
@pytest.mark.filterwarnings("ignore:.*compute.*before the.*update.*", "ignore:.*will save all targets and predictions")
def test_metric_objects_go_on_exactly(kind: str, by_forward: bool, cut: int) -> None:
    make, data = METRICS[kind]
    whole, halves = Holder(make), Holder(make)
    for seed in range(6):
        if seed == cut:
            state = through_a_file(capture_metric_objects(halves))
            weights = halves.state_dict()
            halves = Holder(make)
            halves.load_state_dict(weights)
            restore_metric_objects(halves, state)
        for holder in (whole, halves):
            feed(holder, seed, data, by_forward)
            if seed == 3:
                holder.plain.compute()  # looked at in between: extremes of a MinMaxMetric, caches
    for own, other in zip(halves.all(), whole.all(), strict=True):
        if not isinstance(own, Running):
            assert getattr(own, "update_count", None) == getattr(other, "update_count", None)
        assert bits(own.compute()) == bits(other.compute())
        own.reset()
        other.reset()
    for holder in (whole, halves):
        feed(holder, 9, data, by_forward)
    assert bits([metric.compute() for metric in halves.all()]) == bits([metric.compute() for metric in whole.all()])


def test_compute_groups_stay_as_they_were_formed() -> None:
    """Two metrics that were alike after the first batch by chance are one group for good: that must not be undone."""

    def make() -> Any:
        return torchmetrics.MetricCollection([classes.BinaryRecall(), classes.BinaryPrecision()])

    holder, fresh = Holder(make), Holder(make)
    holder.plain.update(torch.tensor([1, 0]), torch.tensor([1, 1]))
    restore_metric_objects(fresh, through_a_file(capture_metric_objects(holder)))
    assert fresh.plain.compute_groups == holder.plain.compute_groups
    assert len(fresh.plain.compute_groups) == 1
    recall, precision = fresh.plain._modules.values()
    assert recall.tp is precision.tp  # one state, not two that are equal
    untouched: Any = fresh.all()[1]
    assert len(untouched.compute_groups) == 2


def test_lists_of_a_compute_group_are_in_the_file_once() -> None:
    holder = nn.ModuleDict({"all": collection()})
    for seed in range(5):
        holder["all"].update(*samples(seed))  # type: ignore[operator]
    tensors, _ = encode(capture_metric_objects(holder))
    rows = sum(len(samples(seed)[1]) for seed in range(5))
    assert sum(tensor.numel() == rows * CLASSES for tensor in tensors.values()) == 1
    assert len(tensors) < 20


def test_a_tracker_gets_its_steps_back() -> None:
    def make() -> Any:
        return MetricTracker(classes.MulticlassAccuracy(CLASSES))

    whole, halves = Holder(make), Holder(make)
    for seed in range(6):
        if seed == 4:
            state = through_a_file(capture_metric_objects(halves))
            halves = Holder(make)
            halves.plain.increment()
            for _ in range(9):
                halves.many["one"].increment()  # type: ignore[operator]
            restore_metric_objects(halves, state)
            assert [metric.n_steps for metric in halves.all()] == [metric.n_steps for metric in whole.all()]
        for holder in (whole, halves):
            for metric in holder.all():
                if seed % 2 == 0:
                    metric.increment()
                metric.update(*samples(seed))
    for own, other in zip(halves.all(), whole.all(), strict=True):
        assert bits(own.compute_all()) == bits(other.compute_all())
        assert own.best_metric(return_step=True) == other.best_metric(return_step=True)


def test_settings_of_a_metric_are_those_of_the_new_run() -> None:
    holder = nn.ModuleDict({"acc": classes.BinaryAccuracy(threshold=0.5)})
    state = through_a_file(capture_metric_objects(holder))
    fresh = nn.ModuleDict({"acc": classes.BinaryAccuracy(threshold=0.9)})
    restore_metric_objects(fresh, state)
    assert fresh["acc"].threshold == 0.9


def test_objects_that_are_not_there_are_named() -> None:
    state = capture_metric_objects(nn.ModuleDict({"gone": torchmetrics.MeanMetric(), "other": torchmetrics.MeanMetric(),
                                                  "here": torchmetrics.MeanMetric()}))  # fmt: skip
    fresh = nn.ModuleDict({"other": torchmetrics.MaxMetric(), "here": torchmetrics.MeanMetric()})
    with pytest.warns(LeydenWarning, match=r"metric-not-restored.*: gone, other\. They begin anew"):
        restore_metric_objects(fresh, state)


def test_a_forged_tracker_makes_no_more_objects_than_the_file_has() -> None:
    tracker = MetricTracker(torchmetrics.MeanMetric(), maximize=True)
    holder = nn.ModuleDict({"tracker": tracker})
    state = through_a_file(capture_metric_objects(holder))
    state["trackers"]["tracker"]["steps"] = 10**12
    restore_metric_objects(holder, state)
    assert tracker.n_steps <= 1


# Logged metric objects


class Logging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"acc": classes.MulticlassAccuracy(CLASSES)})
        self.hidden = [torchmetrics.MeanMetric()]


def step(metrics: Metrics, module: Logging, seed: int, log_it: bool = True) -> None:
    accuracy: Any = module.inner["acc"]
    accuracy(*samples(seed))
    if log_it:
        log(metrics, "acc", accuracy, on_step=True, on_epoch=True)


@pytest.mark.parametrize("logged_again", [True, False])
def test_logged_objects_go_on(logged_again: bool) -> None:
    whole, module = in_training(), Logging()
    halves, other = in_training(), Logging()
    for seed in range(5):
        if seed == 2:
            state = through_a_file(capture_metrics(halves, other, CPU))
            halves, other = Metrics(), Logging()
            for _ in range(2):  # the second time after hooks that came before training went on
                restore_metrics(halves, other, state, CPU)
                halves.enter_batches()
                step(halves, other, 77)
            restore_metrics(halves, other, state, CPU)
        step(whole, module, seed, seed < 2 or logged_again)
        step(halves, other, seed, seed < 2 or logged_again)
        assert seen(halves) == seen(whole)
    assert end_epoch(halves) == end_epoch(whole)
    assert other.inner["acc"].update_count == 0  # reset with the epoch


def test_an_object_that_is_no_submodule_comes_with_the_next_call() -> None:
    metrics, module = in_training(), Logging()
    module.hidden[0].update(1.0)
    log(metrics, "hidden", module.hidden[0], on_step=False, on_epoch=True)
    state = through_a_file(capture_metrics(metrics, module, CPU))
    restore_metrics(metrics, module, state, CPU)
    module.hidden[0].update(3.0)
    log(metrics, "hidden", module.hidden[0], on_step=False, on_epoch=True)
    metrics.enter_epoch_hooks()
    assert metrics.publish_epoch() == {"hidden": 2.0}
    metrics.reset()
    restore_metrics(metrics, module, state, CPU)
    with pytest.warns(LeydenWarning, match=r"metric-not-restored\] 'hidden'"):
        end_epoch(metrics)


def test_nothing_of_torchmetrics_is_asked_of_other_modules() -> None:
    class Odd(nn.Module):
        @property
        def metric_state(self) -> Any:
            raise RuntimeError("read")

    assert capture_metric_objects(nn.Sequential(Odd(), nn.Linear(1, 1))) == {
        "objects": {}, "collections": {}, "trackers": {}
    }  # fmt: skip
