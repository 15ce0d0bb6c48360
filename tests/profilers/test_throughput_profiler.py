"""Rates and times against closed forms: the time is a clock that only the steps move."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.errors import ConfigurationError
from leyden.profilers import ThroughputProfiler
from leyden.profilers import throughput as module_under_test
from leyden.profilers.throughput import _DeviceClock
from leyden.throughput import Rates
from profiled import make_trainer

torch.set_num_threads(1)

FLOPS = 2 * (2 * 3 * 7)  # of a sample


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Net(L.LightningModule):
    """The first batch takes 1000 s, the others 2, 3, 4 ... s; an evaluation batch 500 s."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 7)
        self.clock = clock
        self.trained = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trained += 1
        self.clock.now += 1000.0 if self.trained == 1 else float(self.trained)
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.clock.now += 500.0

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.clock.now += 500.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(samples: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(samples, 3)), 4)


def profile(folder: Path, samples: int = 24, val: int | None = None, **options: Any) -> ThroughputProfiler:
    clock = Clock()
    trainer = {name: options.pop(name) for name in ("max_epochs", "accumulate_grad_batches") if name in options}
    profiler = ThroughputProfiler(clock=clock, **options)
    make_trainer(
        folder, profiler=profiler, **({"max_epochs": 1, "limit_val_batches": 1.0 if val else 0} | trainer)
    ).fit(Net(clock), loader(samples), None if val is None else loader(val))
    return profiler


def test_rates_are_those_after_the_warm_up(tmp_path: Path) -> None:
    profiler = profile(tmp_path, peak_flops=1e4, length_fn=lambda batch: batch[0].numel())
    assert list(profiler.batch_times) == [2, 3, 4, 5, 6]
    rates = profiler.rates()
    assert rates is not None
    assert rates == Rates(*(pytest.approx(count / 20) for count in (5, 20, 60, 20 * FLOPS, 20 * FLOPS / 1e4)))  # type: ignore[arg-type]


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile(tmp_path, peak_flops=1e4, length_fn=lambda batch: batch[0].numel())
    assert capsys.readouterr().out.splitlines() == [
        "fit: 5 batches in 20.000 s, without validation and the first batch",
        "batches/s         0.25",
        "samples/s         1.0",
        "tokens/s          3.0",
        "time per batch    median 4,000.000 ms, 95 % below 5,800.000 ms",
        "FLOPs per sample  84, forward and backward",
        "FLOP/s            84",
        "MFU               0.8 % of 10 kFLOP/s (CPU, float32)",
    ]


def test_a_longer_warm_up(tmp_path: Path) -> None:
    assert list(profile(tmp_path, warmup=3).batch_times) == [4, 5, 6]


def test_validation_is_left_out(tmp_path: Path) -> None:
    profiler = profile(tmp_path, samples=12, val=8, max_epochs=3)
    assert list(profiler.batch_times) == [2, 3, 4, 5, 6, 7, 8, 9]


def test_every_batch_of_a_window_counts(tmp_path: Path) -> None:
    rates = profile(tmp_path, accumulate_grad_batches=3).rates()
    assert rates is not None
    assert rates.samples_per_sec == pytest.approx(20 / 20)
    assert rates.flops_per_sec == pytest.approx(20 * FLOPS / 20)


def test_evaluations_are_measured_without_flops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    profiler = ThroughputProfiler(clock=clock)
    make_trainer(tmp_path, profiler=profiler).test(Net(clock), loader(14))
    assert list(profiler.batch_times) == [500, 500, 500]
    assert capsys.readouterr().out.splitlines() == [
        "test: 3 batches in 1500.000 s, without the first batch",
        "batches/s         0.00",
        "samples/s         0.0",
        "time per batch    median 500,000.000 ms, 95 % below 500,000.000 ms",
    ]


def test_an_unknown_peak_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile(tmp_path)
    assert (
        "MFU               the peak is not known (CPU, float32); pass peak_flops=, in FLOP/s" in capsys.readouterr().out
    )


def test_a_run_that_is_too_short_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile(tmp_path, samples=4)
    assert capsys.readouterr().out == "ThroughputProfiler: 1 batches ran, the first 1 of which are left out.\n"


def test_the_report_is_written(tmp_path: Path) -> None:
    profile(tmp_path, filename="rates")
    assert (tmp_path / "fit-rates.txt").read_text(encoding="utf-8").startswith("fit: 5 batches")


def test_every_verb_begins_at_zero(tmp_path: Path) -> None:
    clock = Clock()
    profiler = ThroughputProfiler(clock=clock)
    trainer = make_trainer(tmp_path, profiler=profiler, max_epochs=1, limit_val_batches=0)
    for samples in (24, 12):
        trainer.fit(Net(clock), loader(samples))
        assert profiler.batch_times[0] == 2
        assert len(profiler.batch_times) == samples // 4 - 1
        assert profiler._timed.flops == (samples - 4) * FLOPS


def test_nothing_is_wrapped_but_batches(tmp_path: Path) -> None:
    clock, profiler = Clock(), ThroughputProfiler()
    module = Net(clock)
    trainer = make_trainer(tmp_path, profiler=profiler, max_epochs=1)
    trainer.fit(module, loader(8), loader(4))
    run = trainer._run
    assert run is not None
    assert run.validation is not None
    assert run.training_step == module.training_step
    assert run.validation.step == module.validation_step
    assert run.source.around is None
    assert (len(run.hooks.on_train_batch_start), len(run.hooks.on_train_batch_end)) == (1, 1)
    assert run.validation.hooks.batch_end == ()
    hooks = run.handles[0].optimizer._optimizer_step_pre_hooks.values()
    assert not [hook for hook in hooks if hook.__module__.startswith("leyden.profilers")]


def test_profiling_changes_no_bit(tmp_path: Path) -> None:
    def weights(profiler: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = Net(Clock())
        make_trainer(tmp_path, profiler=profiler, limit_val_batches=0).fit(module, loader(24))
        return [*module.state_dict().values()]

    assert all(map(torch.equal, weights("throughput"), weights(None)))


def test_an_error_leaves_no_counter_behind(tmp_path: Path) -> None:
    class Broken(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        make_trainer(tmp_path, profiler="throughput", limit_val_batches=0).fit(Broken(Clock()), loader(8))
    assert not torch.utils._python_dispatch._get_current_dispatch_mode()


@pytest.mark.parametrize("options", [{"warmup": 0}, {"warmup": 1.5}, {"peak_flops": 0}, {"flops": "auto"}])
def test_wrong_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        ThroughputProfiler(**options)


# An asynchronous device


class FakeEvent:
    """An event of a device that is three events behind the host; event n is passed at n² ms."""

    made: ClassVar[deque[FakeEvent]] = deque()
    waits = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.number = -1

    def record(self, stream: Any) -> None:
        self.number = len(FakeEvent.made)
        FakeEvent.made.append(self)

    def query(self) -> bool:
        return self.number < len(FakeEvent.made) - 3

    def synchronize(self) -> None:
        FakeEvent.waits += not self.query()

    def elapsed_time(self, last: FakeEvent) -> float:
        return float(last.number**2 - self.number**2)


def test_a_devices_times_are_read_once_it_has_passed_them(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEvent.made, FakeEvent.waits = deque(), 0
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    profiler = ThroughputProfiler(flops=False)
    profiler.setup("fit", None)
    profiler._clock = _DeviceClock(torch.device("cuda", 0))
    batch = torch.ones(4, 3)
    for number in range(10):
        profiler.begin_batch(batch)
        profiler.end_batch(batch)
        assert len(profiler.batch_times) == max(0, number - 3)
    with profiler.profile("validation"):
        assert FakeEvent.waits == 0
    profiler.end_batch(batch)
    assert FakeEvent.waits == 0
    profiler.teardown("fit")
    assert FakeEvent.waits > 0
    times = [(n + 1) ** 2 - n**2 for n in range(9)]
    # events 10 and 11 are those around validation
    assert list(profiler.batch_times) == pytest.approx(
        [*(each / 1000 for each in times), (12**2 - 9**2 - (11**2 - 10**2)) / 1000]
    )


def test_numbers_are_short() -> None:
    short = module_under_test._short
    assert [short(number) for number in (0.5, 84, 1e3, 818_176, 1.234e12, 9.895e14)] == [
        "0.5", "84", "1 k", "818 k", "1.23 T", "990 T"
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_utilisation_of_a_gpu(tmp_path: Path) -> None:
    size = 4096

    class Wide(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(*(torch.nn.Linear(size, size) for _ in range(4)))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    profiler = ThroughputProfiler(warmup=5)
    data = DataLoader(TensorDataset(torch.randn(size, size)), size)
    make_trainer(tmp_path, profiler=profiler, accelerator="cuda", precision="bf16-mixed", max_epochs=40).fit(
        Wide(), data
    )
    rates = profiler.rates()
    assert rates is not None
    assert profiler._timed.flops == 35 * (3 * 4 - 1) * 2 * size**3
    if rates.mfu is None:
        pytest.skip(f"the peak of {torch.cuda.get_device_name()} is not in the table")
    assert 0.01 < rates.mfu < 1.0
