"""What leyden asks of torch_xla, without it: a stand-in that counts, on the CPU; `test_tpu` has the real one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import leyden as L
from leyden import xla
from leyden.buffers import copy_values
from leyden.device import resolve_device
from leyden.errors import ConfigurationError
from quiet import make_trainer


class FakeXla(ModuleType):
    """The calls of torch_xla that leyden makes, and how often it made them."""

    def __init__(self) -> None:
        super().__init__("torch_xla")
        self.syncs: list[int] = []
        self.seeds: list[int] = []
        self.steps = 0
        self.error: Exception | None = None
        self.compile_ns = 0.0

    def device(self) -> torch.device:
        if self.error is not None:
            raise self.error
        return torch.device("xla", 0)

    def sync(self) -> None:
        self.syncs.append(self.steps)

    def manual_seed(self, seed: int) -> None:
        self.seeds.append(seed)

    def metric_data(self, name: str) -> Any:
        assert name == "CompileTime"
        return (1, self.compile_ns, ()) if self.compile_ns else None


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeXla]:
    module = FakeXla()
    for name in ("torch_xla", "torch_xla.debug.metrics", "torch_xla.core.xla_model", "torch_xla.runtime"):
        monkeypatch.setitem(sys.modules, name, module)
    xla.started.cache_clear()
    yield module
    xla.started.cache_clear()


@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is not None, reason="torch_xla is installed")
@pytest.mark.parametrize("pjrt", [None, "TPU", "CPU"])
def test_without_torch_xla_the_error_says_how_to_get_it(pjrt: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    if pjrt is not None:
        monkeypatch.setenv("PJRT_DEVICE", pjrt)
    with pytest.raises(
        ConfigurationError, match=r"accelerator='tpu' was asked for, but.*torch_xla is not installed.*pip install"
    ):
        L.Trainer(accelerator="tpu")
    assert resolve_device("auto", 1).accelerator != "tpu"


@pytest.mark.parametrize("error", [RuntimeError("no TPU"), ImportError("undefined symbol"), OSError("libtpu")])
def test_a_torch_xla_that_does_not_work_is_named_with_its_error(error: Exception, fake: FakeXla) -> None:
    fake.error = error
    with pytest.raises(ConfigurationError, match=rf"gives no device \({type(error).__name__}: {error}\).*PJRT_DEVICE"):
        resolve_device("tpu", 1)


def test_a_tpu_is_chosen_by_itself_only_where_the_environment_names_it(
    fake: FakeXla, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("these come first")
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    assert resolve_device("auto", "auto").device == torch.device("cpu")
    monkeypatch.setenv("PJRT_DEVICE", "TPU")
    assert resolve_device("auto", "auto").device == torch.device("xla", 0)
    with pytest.raises(ConfigurationError, match="accelerator='gpu' was asked for, but there is none"):
        resolve_device("gpu", 1)


def test_the_device_is_seeded_as_torch_when_it_is_begun_with_and_by_seed_everything_after(
    fake: FakeXla, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    L.seed_everything(5, verbose=False)
    assert fake.seeds == []  # nobody has asked for the device
    resolve_device("tpu", 1)
    resolve_device("tpu", 1)
    assert fake.seeds == [5]
    L.seed_everything(6, verbose=False)
    assert fake.seeds == [5, 6]


class Net(L.LightningModule):
    def __init__(self, fake: FakeXla, compile_ns: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.fake, self.compile_ns = fake, compile_ns

    def on_fit_start(self) -> None:
        run = self.trainer._run
        assert run is not None
        if not getattr(self, "synced", False):
            xla.sync_each_step(run)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert len(self.fake.syncs) <= self.fake.steps + 10
        loss: Tensor = self.layer(batch).square().mean()
        self.log("loss", loss, on_epoch=True)
        self.fake.compile_ns += self.compile_ns
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.fake.steps += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(batches: int) -> DataLoader[Any]:
    return DataLoader(torch.ones(batches, 2))  # type: ignore[arg-type]


def test_every_optimizer_step_and_every_epochs_start_ends_a_graph(fake: FakeXla, tmp_path: Path) -> None:
    module = Net(fake)
    make_trainer(tmp_path, max_epochs=2, accumulate_grad_batches=3).fit(module, loader(7))
    # windows of 3, 3 and 1 batches; the start of an epoch runs what the last one's end has left
    assert fake.syncs == [0, 1, 2, 3, 3, 4, 5, 6]


def test_what_was_logged_is_summed_between_steps_in_a_graph_of_its_own(fake: FakeXla, tmp_path: Path) -> None:
    module = Net(fake)
    trainer = make_trainer(tmp_path)
    trainer.fit(module, loader(70))
    twice = [step for step in range(1, 71) if fake.syncs.count(step) == 2]
    assert twice == [xla.COMPACT_AT, 2 * xla.COMPACT_AT]
    assert fake.syncs.count(1) == 1


def test_compilation_is_counted_apart(fake: FakeXla, tmp_path: Path) -> None:
    module = Net(fake, compile_ns=0.0)
    trainer = make_trainer(tmp_path)
    real_sync = fake.sync

    def slow_sync() -> None:
        real_sync()
        fake.compile_ns += 2e6

    fake.sync = slow_sync  # type: ignore[method-assign]
    trainer.fit(module, loader(10))
    assert trainer.time_account.seconds()["compilation"] == pytest.approx(10 * 2e-3)


def test_every_batch_of_an_evaluation_ends_a_graph(fake: FakeXla) -> None:
    class Hooks:
        batch_end: tuple[Any, ...] = (lambda *_: fake.syncs.append(-1),)
        end: tuple[Any, ...] = ()

    class Metrics:
        def compact(self, at: int) -> bool:
            return False

    class Evaluation:
        hooks, metrics, no_grad = Hooks(), Metrics(), torch.inference_mode

    evaluation: Any = Evaluation()
    xla.sync_each_batch(evaluation)
    for hook in evaluation.hooks.batch_end:
        hook(None, None, 0)
    assert fake.syncs == [0, -1]  # before the others look at what the batch gave
    for hook in evaluation.hooks.end:
        hook()
    assert fake.syncs == [0, -1, 0]
    assert evaluation.no_grad is torch.no_grad


def test_moving_a_module_keeps_its_parameters_and_torchs_switch() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    before = list(module.parameters())
    switch = torch.__future__.get_swap_module_params_on_conversion()
    xla.move_module(module, torch.device("meta"))
    assert all(mine is old for mine, old in zip(module.parameters(), before, strict=True))
    assert module[0].weight is module[1].weight
    assert module[0].weight.device.type == "meta"
    assert torch.__future__.get_swap_module_params_on_conversion() is switch


def test_values_are_copied(tmp_path: Path) -> None:
    target, source = torch.zeros(3), torch.tensor([1.0, float("nan"), -0.0])
    copy_values([target], [source])
    assert torch.equal(target.nan_to_num(7), source.nan_to_num(7))
