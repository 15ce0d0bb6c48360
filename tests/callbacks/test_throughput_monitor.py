"""What is logged against closed forms: the time is a clock that only the steps move."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import ModelCheckpoint, ThroughputMonitor, throughput_monitor
from leyden.errors import ConfigurationError, MetricError
from quiet import Memory, make_trainer

torch.set_num_threads(1)

WIDTH, LENGTH = 7, 3
FLOPS = 2 * (2 * LENGTH * WIDTH)  # of a sample: forward, and the gradient of the weights


class Clock:
    """Seconds that pass only where somebody lets them."""

    def __init__(self) -> None:
        self.now = 100.0
        self.reads = 0

    def __call__(self) -> float:
        self.reads += 1
        return self.now


class Net(L.LightningModule):
    """Training takes 2 s per batch, every third batch 5 s, and evaluation 16 s per batch."""

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(LENGTH, WIDTH)
        self.dropout = torch.nn.Dropout()
        self.clock = clock or Clock()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.clock.now += 5.0 if batch_idx % 3 == 2 else 2.0
        loss = self.dropout(self.layer(batch[0])).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.clock.now += 16.0
        self.log("val", self.layer(batch[0]).mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        self.clock.now += 16.0
        return self.layer(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(samples: int, batch_size: int = 4) -> DataLoader[Any]:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(samples, LENGTH)), batch_size)


def train(
    folder: Path, samples: int = 48, val: int | None = None, callbacks: Any = (), module: Any = None, **options: Any
) -> tuple[Memory, ThroughputMonitor, Clock]:
    mine = {name: options.pop(name) for name in list(options) if name in MONITOR}
    clock, memory = Clock(), Memory()
    monitor = ThroughputMonitor(clock=clock, **mine)
    settings = {
        "log_every_n_steps": 3,
        "logger": memory,
        **({"limit_val_batches": 0} if val is None else {}),
        **options,
    }
    path = settings.pop("ckpt_path", None)
    net = Net(clock)
    if module is not None:
        net = module(clock)
    trainer = make_trainer(folder, monitor, *callbacks, **settings)
    trainer.fit(net, loader(samples), None if val is None else loader(val), ckpt_path=path)
    return memory, monitor, clock


MONITOR = ("batch_size_fn", "length_fn", "window_size", "separator", "flops", "peak_flops")


def rows(memory: Memory, stage: str = "train") -> list[tuple[int | None, dict[str, float]]]:
    return [(step, row) for step, row in memory.rows if f"{stage}/time" in row]


def test_rates_and_totals(tmp_path: Path) -> None:
    memory, monitor, _ = train(tmp_path, length_fn=lambda batch: batch[0].numel(), peak_flops=1e3)
    found = rows(memory)
    assert [step for step, _ in found] == [3, 6, 9, 12]
    assert found[0][1] == {"train/time": 9, "train/batches": 3, "train/samples": 12, "train/lengths": 36}
    for index, (_, row) in enumerate(found[1:], start=2):
        assert row == {
            "train/device/batches_per_sec": pytest.approx(3 / 9),
            "train/device/samples_per_sec": pytest.approx(12 / 9),
            "train/device/items_per_sec": pytest.approx(36 / 9),
            "train/device/flops_per_sec": pytest.approx(12 * FLOPS / 9),
            "train/device/mfu": pytest.approx(12 * FLOPS / 9 / 1e3),
            "train/time": 9 * index,
            "train/batches": 3 * index,
            "train/samples": 12 * index,
            "train/lengths": 36 * index,
        }
    assert monitor.values == found[-1][1]


def test_a_short_last_batch_counts_as_what_it_is(tmp_path: Path) -> None:
    memory, *_ = train(tmp_path, samples=23)  # 5 batches of 4 and one of 3
    _, row = rows(memory)[-1]
    assert row["train/samples"] == 23
    assert row["train/device/samples_per_sec"] == pytest.approx(11 / 9)
    assert row["train/device/flops_per_sec"] == pytest.approx(11 * FLOPS / 9)


def test_the_window_slides(tmp_path: Path) -> None:
    memory, *_ = train(tmp_path, window_size=1, log_every_n_steps=1)
    rates = [row["train/device/batches_per_sec"] for _, row in rows(memory)[1:]]
    assert rates == pytest.approx([1 / 2, 1 / 5, *([1 / 2, 1 / 2, 1 / 5] * 3)])


@pytest.mark.parametrize(("accumulate", "steps"), [(2, [3, 6]), (4, [3])])
def test_accumulated_batches_are_counted_one_by_one(accumulate: int, steps: list[int], tmp_path: Path) -> None:
    memory, *_ = train(tmp_path, accumulate_grad_batches=accumulate)
    found = rows(memory)
    assert [step for step, _ in found] == steps
    assert [row["train/batches"] for _, row in found] == [accumulate * step for step in steps]
    assert [row["train/samples"] for _, row in found] == [4 * accumulate * step for step in steps]
    for _, row in found[1:]:
        assert row["train/device/batches_per_sec"] == pytest.approx(6 / 18)
        assert row["train/device/flops_per_sec"] == pytest.approx(24 * FLOPS / 18)


def test_validation_has_a_clock_of_its_own(tmp_path: Path) -> None:
    memory, *_ = train(tmp_path, val=20, val_check_interval=4, num_sanity_val_steps=2, max_epochs=2)
    validations = rows(memory, "validate")
    assert [step for step, _ in validations] == [4, 8, 12, 16, 20, 24]
    for index, (_, row) in enumerate(validations, start=1):
        assert row == {
            "validate/device/batches_per_sec": pytest.approx(1 / 16),
            "validate/device/samples_per_sec": pytest.approx(4 / 16),
            "validate/time": 80 * index,
            "validate/batches": 5 * index,
            "validate/samples": 20 * index,
        }
    found = rows(memory)
    assert [row["train/time"] for _, row in found] == [9 * index for index in range(1, 9)]
    assert all(row["train/device/batches_per_sec"] == pytest.approx(3 / 9) for _, row in found[1:])


@pytest.mark.parametrize("verb", ["test", "predict", "validate"])
def test_the_other_verbs_are_measured_too(verb: str, tmp_path: Path) -> None:
    clock, memory = Clock(), Memory()
    trainer = make_trainer(tmp_path, ThroughputMonitor(clock=clock), logger=memory)
    getattr(trainer, verb)(Net(clock), loader(10))
    assert rows(memory, verb) == [
        (
            0,
            {
                f"{verb}/device/batches_per_sec": pytest.approx(1 / 16),
                f"{verb}/device/samples_per_sec": pytest.approx(10 / 48),
                f"{verb}/time": 48,
                f"{verb}/batches": 3,
                f"{verb}/samples": 10,
            },
        )
    ]


def test_totals_go_on_after_a_resume_and_begin_anew_without_one(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=7, save_top_k=-1, filename="{step}")
    options: dict[str, Any] = {"enable_checkpointing": True, "peak_flops": 1e3}
    whole, *_ = train(tmp_path, callbacks=[saver], **options)
    files = sorted((tmp_path / "saved").glob("*.ckpt"))
    again = ModelCheckpoint(tmp_path / "again", every_n_train_steps=7)
    resumed, monitor, _ = train(tmp_path, callbacks=[again], ckpt_path=files[0], **options)
    found, expected = rows(resumed), rows(whole)[2:]
    assert [step for step, _ in found] == [step for step, _ in expected] == [9, 12]
    for (_, row), (_, other) in zip(found, expected, strict=True):
        for key in ("train/time", "train/batches", "train/samples"):
            assert row[key] == other[key]
    assert found[1][1]["train/device/mfu"] == expected[1][1]["train/device/mfu"]
    assert not monitor._workload.counts_next
    memory = Memory()
    trainer = make_trainer(tmp_path, monitor, logger=memory, log_every_n_steps=3, limit_val_batches=0)
    trainer.fit(Net(), loader(48))
    assert rows(memory)[0][1]["train/batches"] == 3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_monitoring_changes_no_bit(accumulate: int, tmp_path: Path) -> None:
    def weights(monitored: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = Net()
        monitors = [ThroughputMonitor()] if monitored else []
        options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "max_epochs": 2, "limit_val_batches": 0}
        trainer = make_trainer(tmp_path, *monitors, logger=Memory(), **options)
        trainer.fit(module, loader(48))
        return [*module.state_dict().values(), torch.get_rng_state()]

    assert all(itertools.starmap(torch.equal, zip(weights(True), weights(False), strict=True)))


@pytest.mark.parametrize("knows", [True, False])
def test_a_run_that_goes_on_is_still_exact(knows: bool, tmp_path: Path) -> None:
    def weights(monitored: bool, path: Path | None = None) -> list[torch.Tensor]:
        module = Net()
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1, filename="{step}")
        monitors = [ThroughputMonitor()] if monitored else []
        options: dict[str, Any] = {"enable_checkpointing": True, "limit_val_batches": 0, "logger": Memory()}
        make_trainer(tmp_path, *monitors, saver, **options).fit(module, loader(48), ckpt_path=path)
        return [*module.state_dict().values(), torch.get_rng_state()]

    torch.manual_seed(0)
    whole = weights(knows)  # a checkpoint without the monitor's state lets it count after the resume
    torch.manual_seed(5)
    resumed = weights(True, tmp_path / "step=7.ckpt")
    assert all(itertools.starmap(torch.equal, zip(whole, resumed, strict=True)))


def test_between_log_steps_no_clock_is_read_and_no_device_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[torch.device] = []
    monkeypatch.setattr(throughput_monitor, "wait_for", waits.append)

    def reads(samples: int, val: int | None) -> int:
        *_, clock = train(tmp_path, samples=samples, val=val, log_every_n_steps=10)
        return clock.reads

    at_the_edges = reads(4, None)
    assert reads(4 * 9, None) == at_the_edges
    assert reads(4 * 39, None) == at_the_edges + 3
    assert not waits
    reads(4 * 39, 4 * 3)
    assert len(waits) == 2  # where the validation begins, and where it ends


def test_the_first_batch_that_is_trained_on_is_counted(tmp_path: Path) -> None:
    class Skips(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> Any:
            return -1 if trainer.current_epoch == 0 and batch_idx == 0 else None

    memory, *_ = train(tmp_path, callbacks=[Skips()], max_epochs=2)
    assert rows(memory)[-1][1]["train/batches"] == 12
    assert rows(memory)[-1][1]["train/device/flops_per_sec"] == pytest.approx(12 * FLOPS / 9)


def test_an_error_leaves_no_counter_behind(tmp_path: Path) -> None:
    class Broken(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        train(tmp_path, module=Broken)
    assert not torch.utils._python_dispatch._get_current_dispatch_mode()


@pytest.mark.parametrize("given", [300.0, lambda batch: 75.0 * len(batch[0]), "of the module"])
def test_flops_may_be_given(given: Any, tmp_path: Path) -> None:
    class Knowing(Net):
        flops_per_batch = 300.0

    options: dict[str, Any] = {"module": Knowing} if given == "of the module" else {"flops": given}
    memory, *_ = train(tmp_path, **options)
    assert rows(memory)[-1][1]["train/device/flops_per_sec"] == pytest.approx(3 * 300 / 9)


def test_flops_may_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory, *_ = train(tmp_path, flops=False)
    assert not [key for _, row in rows(memory) for key in row if "flops" in key or "mfu" in key]
    assert capsys.readouterr().out == ""


def test_an_unknown_peak_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory, monitor, _ = train(tmp_path)
    trainer = make_trainer(tmp_path, monitor, logger=Memory(), log_every_n_steps=3, limit_val_batches=0)
    trainer.fit(Net(), loader(48))
    assert not [key for _, row in rows(memory) for key in row if "mfu" in key]
    assert capsys.readouterr().out == (
        "ThroughputMonitor: the peak of CPU in float32 is not known, so there is no mfu. Pass peak_flops=, in FLOP/s.\n"
    )


def test_keys_have_the_separator(tmp_path: Path) -> None:
    memory, *_ = train(tmp_path, separator="-", flops=False)
    keys = {key for _, row in memory.rows for key in row if key.startswith("train-")}
    assert keys == {
        "train-device-batches_per_sec", "train-device-samples_per_sec", "train-time", "train-batches", "train-samples"
    }  # fmt: skip


def test_training_without_a_logger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere to log to"):
        train(tmp_path, logger=False)
    train(tmp_path, fast_dev_run=True)


def test_batches_of_unknown_size_need_a_function(tmp_path: Path) -> None:
    class Opaque(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(torch.ones(2, LENGTH)).mean()

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {"rows": object()}

    with pytest.raises(MetricError, match="batch_size_fn="):
        train(tmp_path, module=Opaque)
    memory, *_ = train(tmp_path, module=Opaque, batch_size_fn=lambda batch: 5, flops=False)
    assert rows(memory)[-1][1]["train/samples"] == 12 * 5


@pytest.mark.parametrize("options", [{"window_size": 0}, {"peak_flops": -1}, {"flops": "auto"}, {"length_fn": 3}])
def test_wrong_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        ThroughputMonitor(**options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_utilisation_of_a_gpu(tmp_path: Path) -> None:
    size = 4096

    class Wide(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(*(torch.nn.Linear(size, size) for _ in range(4)))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.net(batch[0]).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    memory, monitor = Memory(), ThroughputMonitor()
    data = DataLoader(TensorDataset(torch.randn(size, size)), size)
    trainer = make_trainer(
        tmp_path,
        monitor,
        logger=memory,
        accelerator="cuda",
        precision="bf16-mixed",
        max_epochs=40,
        log_every_n_steps=10,
    )
    trainer.fit(Wide(), data)
    last = rows(memory)[-1][1]
    if "train/device/mfu" not in last:
        pytest.skip(f"the peak of {torch.cuda.get_device_name()} is not in the table")
    per_batch = last["train/device/flops_per_sec"] / last["train/device/batches_per_sec"]
    assert per_batch == pytest.approx((3 * 4 - 1) * 2 * size**3)
    assert 0.01 < last["train/device/mfu"] < 1.0
