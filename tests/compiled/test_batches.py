"""Shapes and structures of batches, what a step logs and returns, and what it reads of the Trainer."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import leyden as L
from both_ways import (
    Batches,
    Net,
    Ran,
    assert_same,
    batches,
    both,
    codes,
    fit,
    needs_tracing,
    run_as_traced,
    same_size,
    traced_only,
)
from leyden.compiled.shapes import ANY, Shapes, shape_of

pytestmark = [needs_tracing, pytest.mark.usefixtures("traced_only")]
_ = traced_only

Pair = collections.namedtuple("Pair", "x y")


def of_sizes(*sizes: int) -> Callable[[], Batches]:
    generator = torch.Generator().manual_seed(3)
    data = [(torch.randn(size, 6, generator=generator), torch.randn(size, 1, generator=generator)) for size in sizes]
    return lambda: Batches(data)


def test_four_sizes_have_graphs_of_their_own_and_all_others_share_one(tmp_path: Path) -> None:
    ran, _ = both(tmp_path, Net, of_sizes(4, 2, 3, 5, 6, 7, 8, 4, 9, 6), max_epochs=2)
    assert ran.whole, ran.line
    assert ran.compiled.compilations == 5  # 2, 3, 5, 6; and one that began with 7: the first step was eager
    assert ran.compiled.state_dict()["shapes"] == [[[size, 6], [size, 1]] for size in (2, 3, 5, 6)]
    assert not ran.warned


def test_a_batch_of_one(tmp_path: Path) -> None:
    ran, _ = both(tmp_path, Net, of_sizes(4, 2, 3, 5, 6, 1, 7, 1, 9, 8), max_epochs=2)
    assert ran.whole, ran.line
    assert ran.compiled.compilations == 6  # to torch's compiler a size of one is none that could vary


def test_shapes() -> None:
    assert shape_of({"a": torch.ones(2, 3), "b": [torch.ones(()), 3]}) == (("a", (2, 3)), ("b", ((), None)))
    shapes = Shapes()
    assert [shapes.of(torch.ones(size)) for size in (4, 2, 4, 3, 5)] == [(4,), (2,), (4,), (3,), (5,)]
    assert shapes.of(torch.ones(6)) == ANY
    assert shapes.of(torch.ones(2)) == (2,)
    again = Shapes()
    again.load(shapes.state())
    assert again.of(torch.ones(6)) == ANY
    assert again.of(torch.ones(3)) == (3,)
    assert shapes.state() == again.state() == [[4], [2], [3], [5]]


class Shaped(Net):
    """Takes its batches as they come, without batch_idx."""

    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        if isinstance(batch, dict):
            x, y, factor = batch.pop("x"), batch["y"], batch.get("factor", 1)
        else:
            x, y, factor = batch.x, batch.y, 1
        loss = nn.functional.mse_loss(self.net(x) * factor, y)
        self.log("loss", loss)
        return loss


def in_dicts() -> Batches:
    return Batches(
        [{"x": x, "y": y, "factor": 1.0 + number, "name": "a batch"} for number, (x, y) in enumerate(batches())]
    )


class Fresh:
    """A loader whose batches are made anew, because the step takes them apart."""

    def __init__(self, make: Callable[[], Batches]) -> None:
        self.make = make

    def __len__(self) -> int:
        return len(self.make())

    def __iter__(self) -> Any:
        return iter(self.make())


def test_batches_in_dicts(tmp_path: Path) -> None:
    ran, _ = both(tmp_path, Shaped, lambda: Fresh(in_dicts))
    assert ran.whole, ran.line


def test_batches_in_named_tuples(tmp_path: Path) -> None:
    ran, _ = both(tmp_path, Shaped, lambda: Batches([Pair(x, y) for x, y in batches()]))
    assert ran.whole, ran.line
    assert ran.compiled.compilations == 2


class Reads(Net):
    """Reads numbers of the Trainer and of itself that are others in each step."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        self.count, self.factor = 0, 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if "batch_idx" in self.names:
            loss = loss * (1 + batch_idx / 10) if batch_idx != 3 else loss
            self.log("idx", batch_idx)
        if "trainer" in self.names:
            loss = loss * (1 + self.current_epoch / 10) * min(1.0, (1 + self.global_step) / 10)
            self.log("epoch_now", float(self.current_epoch))
        if "count" in self.names:
            self.count += 1
            loss = loss / self.count
        if "factor" in self.names:
            self.factor *= 0.9
            loss = loss * self.factor
        self.log("loss", loss)
        return loss


@pytest.mark.parametrize(
    ("name", "most"),
    # constants in the first graph, variables of the second; one more where the condition decides
    [("batch_idx", 2), ("trainer", 3), ("count", 3)],
)
def test_numbers_that_change_are_variables(name: str, most: int, tmp_path: Path) -> None:
    ran, _ = both(tmp_path, lambda: Reads(name), same_size, max_epochs=12)
    assert ran.whole, ran.line
    assert ran.compiled.compilations <= most
    assert not ran.warned


def test_a_fraction_that_is_written_back_is_not_compiled(tmp_path: Path) -> None:
    ran, _ = both(tmp_path, lambda: Reads("factor"), same_size)
    assert codes(ran) == ["compile"]
    assert "it changes self.factor" in ran.compiled.reason
    assert "Make it a tensor" in ran.compiled.reason


class Skips(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("idx", batch_idx)
        return None if batch_idx == 2 else super().training_step(batch, batch_idx)


def test_batches_that_are_skipped(tmp_path: Path) -> None:
    ran, _ = both(tmp_path, Skips, same_size)
    assert ran.whole, ran.line
    assert ran.trainer.global_step == 16
    assert ran.trainer._run.progress.skipped_batches == 4  # type: ignore[union-attr]


@pytest.mark.parametrize("skipped", [(1,), (3, 4), (0, 1, 2)])
def test_batches_that_are_skipped_within_windows(skipped: tuple[int, ...], tmp_path: Path) -> None:
    class SkipsSome(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in skipped and self.current_epoch else super().training_step(batch, batch_idx)

    ran, _ = both(tmp_path, SkipsSome, same_size, accumulate_grad_batches=3, max_epochs=8)
    assert codes(ran) == ["compile"]
    assert "training_step skips batches, with accumulate_grad_batches" in ran.warned[0]


class Logs(Net):
    """Logs in all ways, and returns more than a loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        found = self.net(batch[0])
        loss = nn.functional.mse_loss(found, batch[1])
        self.log_dict(
            {"loss": loss, "double": 2 * loss, "three": 3}, on_step=True, on_epoch=True, prog_bar=True, reduce_fx="max"
        )
        self.log("sum", found.sum(), reduce_fx=torch.sum, on_step=False, on_epoch=True, batch_size=len(found))
        self.log("hidden", found.mean(), logger=False, prog_bar=True, on_step=True)
        self.log("nothing", torch.tensor(math.nan))
        self.log("weighted", found.mean(), on_epoch=True, batch_size=len(found) + batch_idx)
        penalized = loss * 1.0
        self.log("before", penalized)
        penalized += 1.0
        self.log("after", penalized)
        self.log("weight", self.net[0].weight.norm())
        return {"loss": penalized, "found": found.mean(), "count": len(found), "name": "a step"}


class Keeps(L.Callback):
    def __init__(self) -> None:
        self.outputs: list[Any] = []
        self.on_bar: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append({name: each.item() if isinstance(each, Tensor) else each for name, each in outputs.items()})
        assert not any(isinstance(each, Tensor) and each.requires_grad for each in outputs.values())
        self.on_bar.append(sorted(trainer.progress_bar_metrics))


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, Ran]:
    with pytest.MonkeyPatch.context() as patch:
        run_as_traced(patch)
        folder = tmp_path_factory.mktemp("logged")
        eager = fit(folder, Logs(), batches(), Keeps(), compile=False)
        ran = fit(folder, Logs(), batches(), Keeps(), compile=True)
    for _, row in eager.rows + ran.rows:
        assert math.isnan(row.pop("nothing", math.nan))
    assert_same(ran, eager, 1e-4)
    return ran, eager


def test_flags_of_logged_values_hold(logged: tuple[Ran, Ran]) -> None:
    ran, eager = logged
    assert ran.whole, ran.line
    assert [sorted(row) for _, row in ran.rows] == [sorted(row) for _, row in eager.rows]
    names = set().union(*(row for _, row in ran.rows))
    assert {"loss_step", "loss_epoch", "three_step", "three_epoch", "sum", "before", "after"} <= names
    assert "hidden" not in names
    assert ran.trainer.callback_metrics.keys() == eager.trainer.callback_metrics.keys()
    assert ran.trainer.progress_bar_metrics.keys() == eager.trainer.progress_bar_metrics.keys() >= {"hidden"}


def test_a_value_is_logged_as_it_was_when_it_was_logged(logged: tuple[Ran, Ran]) -> None:
    ran, _ = logged
    for before, after in zip(ran.of("before"), ran.of("after"), strict=True):
        assert after == pytest.approx(before + 1)


def test_callbacks_get_what_the_step_returned(logged: tuple[Ran, Ran]) -> None:
    ran, eager = logged
    mine, theirs = ran.callbacks[0], eager.callbacks[0]
    assert len(mine.outputs) == 20
    assert mine.on_bar == theirs.on_bar
    for one, other in zip(mine.outputs, theirs.outputs, strict=True):
        assert one == {**other, "loss": pytest.approx(other["loss"]), "found": pytest.approx(other["found"], abs=1e-5)}
    assert [each["loss"] for each in mine.outputs] == pytest.approx(ran.of("after"))


class Accuracy(nn.Module):
    """What torchmetrics' objects do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))
        self.update_count = 0
        self._forward_cache: Any = None

    def forward(self, value: Tensor) -> Tensor:
        self.total += value.detach().sum()
        self.count += value.numel()
        self.update_count += 1
        self._forward_cache = value.detach().mean()
        return self._forward_cache

    def compute(self) -> Tensor:
        return self.total / self.count

    def reset(self) -> None:
        self.total.zero_()
        self.count.zero_()


class Measures(Net):
    def __init__(self, metric: nn.Module) -> None:
        super().__init__()
        self.metric = metric

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.metric(loss.detach())
        self.log("metric", self.metric, on_step=True, on_epoch=True)
        self.log("loss", loss)
        return loss


def test_metric_objects(tmp_path: Path) -> None:
    ran, eager = both(tmp_path, lambda: Measures(Accuracy()))
    assert ran.whole, ran.line
    assert ran.module.metric.update_count == eager.module.metric.update_count == 20


def test_metric_objects_of_torchmetrics(tmp_path: Path) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    ran, _ = both(tmp_path, lambda: Measures(torchmetrics.MeanMetric()))
    assert ran.whole or codes(ran)[0] == "compile"
