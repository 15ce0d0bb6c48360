"""Which device a run uses; and, where there is a GPU, that runs on it equal loops by hand and never wait for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import leyden
from leyden import device as device_module
from leyden.device import ACCELERATORS, resolve_device
from leyden.errors import ConfigurationError
from leyden.loggers.logger import Logger

torch.set_num_threads(1)


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that the machine has the given numbers of devices."""

    def pretend(cuda: int = 0, mps: int = 0) -> None:
        counts = {"cuda": cuda, "mps": mps, "tpu": 0, "cpu": 1}
        made = {name: replace(kind, count=lambda n=counts[name]: n) for name, kind in ACCELERATORS.items()}  # type: ignore[misc]
        monkeypatch.setattr(device_module, "ACCELERATORS", made)

    return pretend


@pytest.mark.parametrize(
    ("here", "accelerator", "expected"),
    [
        ({}, "auto", "cpu"),
        ({}, "cpu", "cpu"),
        ({"cuda": 2}, "auto", "cuda:0"),
        ({"cuda": 2}, "gpu", "cuda:0"),
        ({"cuda": 2}, "cuda", "cuda:0"),
        ({"cuda": 2}, "CUDA", "cuda:0"),
        ({"cuda": 2}, "cpu", "cpu"),
        ({"mps": 1}, "auto", "mps:0"),
        ({"mps": 1}, "gpu", "mps:0"),
        ({"mps": 1}, "mps", "mps:0"),
    ],
)
def test_the_accelerator_that_is_here(
    here: dict[str, int], accelerator: str, expected: str, present: Callable[..., None]
) -> None:
    present(**here)
    choice = resolve_device(accelerator, "auto")
    assert choice.device == torch.device(expected)
    assert choice.accelerator == expected.partition(":")[0]
    assert accelerator.lower() in choice.reason


@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "mps"])
def test_an_absent_accelerator_is_refused_with_the_reason_and_the_mend(
    accelerator: str, present: Callable[..., None]
) -> None:
    present()
    with pytest.raises(
        ConfigurationError, match=rf"accelerator='{accelerator}' was asked for, but there is none.*is False.*'auto'"
    ):
        resolve_device(accelerator, "auto")


@pytest.mark.parametrize(
    ("accelerator", "hint"),
    [("cud", r" Did you mean 'cuda'\?"), (None, ""), (0, ""), ("hpu", ""), (["cpu"], "")],
)
def test_an_unknown_accelerator_is_refused(accelerator: Any, hint: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError,
        match=rf"accelerator=.* is not valid\. Allowed: 'auto', 'gpu', 'cuda', 'mps', .*'cpu'.*{hint}",
    ):
        leyden.Trainer(accelerator=accelerator, default_root_dir=tmp_path, logger=False)


@pytest.mark.parametrize(
    ("devices", "index"),
    [("auto", 0), (1, 0), ("1", 0), ([0], 0), ([2], 2), ((1,), 1), ("2,", 2), ("0,", 0), (" 1 ,", 1)],
)
def test_one_device_in_every_form(devices: Any, index: int, present: Callable[..., None]) -> None:
    present(cuda=3)
    choice = resolve_device("cuda", devices, ranks=1 if devices == "auto" else None)
    assert choice.devices == (torch.device("cuda", index),)


def test_all_devices_where_there_is_one(present: Callable[..., None]) -> None:
    present(cuda=1)
    assert resolve_device("cuda", -1).device == torch.device("cuda", 0)
    assert resolve_device("cuda", "-1").device == torch.device("cuda", 0)
    assert resolve_device("cpu", -1).device == torch.device("cpu")


@pytest.mark.parametrize(
    ("devices", "indices"),
    [
        (2, [0, 1]),
        ("2", [0, 1]),
        (-1, [0, 1, 2]),
        ("-1", [0, 1, 2]),
        ("auto", [0, 1, 2]),
        ([0, 1], [0, 1]),
        ((0, 2), [0, 2]),
        ("0,1", [0, 1]),
        ("2, 0", [2, 0]),
    ],
)
def test_several_devices_in_every_form(devices: Any, indices: list[int], present: Callable[..., None]) -> None:
    present(cuda=3)
    choice = resolve_device("cuda", devices)
    assert choice.devices == tuple(torch.device("cuda", index) for index in indices)
    assert choice.given == (None if devices == "auto" else len(indices))


def test_the_cpu_has_as_many_processes_as_are_asked_for() -> None:
    assert resolve_device("cpu", 3).devices == (torch.device("cpu"),) * 3
    assert resolve_device("cpu", "auto").devices == (torch.device("cpu"),)
    assert resolve_device("cpu", "auto", ranks=4).devices == (torch.device("cpu"),) * 4


@pytest.mark.parametrize("devices", [4, "4"])
def test_more_devices_than_there_are_are_refused(devices: Any, present: Callable[..., None]) -> None:
    present(cuda=3)
    with pytest.raises(ConfigurationError, match=r"devices=.* Allowed: 1 to 3"):
        resolve_device("cuda", devices)


@pytest.mark.parametrize("devices", [0, "0", -2, True, False, 1.0, [], "", "one", "a,b", [True], ["0"], None, {0}])
def test_other_forms_of_devices_are_refused(devices: Any, present: Callable[..., None]) -> None:
    present(cuda=3)
    with pytest.raises(
        ConfigurationError, match=r"devices=.* is not valid\. Allowed: 'auto', a number of devices, -1 for all"
    ):
        resolve_device("cuda", devices)


@pytest.mark.parametrize("devices", [[3], [-1], "3,", (7,), [0, 0], [0, 3]])
def test_an_index_that_does_not_exist_is_refused(devices: Any, present: Callable[..., None]) -> None:
    present(cuda=3)
    with pytest.raises(
        ConfigurationError, match=r"devices=.* Allowed: indices from 0 to 2, each once, for accelerator 'cuda'"
    ):
        resolve_device("cuda", devices)


def test_the_trainer_and_the_module_say_where_they_are(tmp_path: Path) -> None:
    class Where(leyden.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            assert batch.device == self.device == self.trainer.device == torch.device("cpu")
            loss: Tensor = self.layer(batch).sum()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = leyden.Trainer(accelerator="cpu", fast_dev_run=True, logger=False, default_root_dir=tmp_path,
                             enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(Where(), DataLoader(torch.ones(2, 1)))  # type: ignore[arg-type]
    assert trainer.device == torch.device("cpu")
    assert (trainer.num_devices, trainer.world_size, trainer.num_nodes) == (1, 1, 1)
    assert (trainer.is_global_zero, trainer.global_rank, trainer.local_rank) == (True, 0, 0)


@pytest.mark.parametrize("strategy", ["dpp", "zero", None, 3])
def test_an_unknown_strategy_is_refused(strategy: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"strategy=.* is not valid\. Allowed: 'auto', 'single_device'"):
        leyden.Trainer(accelerator="cpu", strategy=strategy, default_root_dir=tmp_path, logger=False)


# On a GPU

gpu = pytest.mark.gpu
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BATCHES, EPOCHS = 20, 2


def make_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def make_loader(pin_memory: bool = False) -> DataLoader[Any]:
    source = torch.Generator().manual_seed(11)
    samples = BATCHES * 4 - 2
    data = TensorDataset(torch.randn(samples, 5, generator=source), torch.randint(0, 3, (samples,), generator=source))
    return DataLoader(data, batch_size=4, shuffle=True, generator=source, pin_memory=pin_memory)


class Classifier(leyden.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        assert inputs.device.type == targets.device.type == self.device.type
        loss = F.cross_entropy(self.net(inputs), targets)
        self.losses.append(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("one", 1.0, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * BATCHES)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Memory(Logger):
    name = "memory"
    version = 0

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics))

    def log_hyperparams(self, params: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        pass


def make_cuda_trainer(folder: Path, **options: Any) -> leyden.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cuda",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "max_epochs": EPOCHS,
    }
    return leyden.Trainer(**(settings | options))


def by_hand(precision: str, accumulate: int) -> tuple[list[Tensor], nn.Module]:
    net, loader, losses = make_net().cuda(), make_loader(), []
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * BATCHES)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "16-mixed")
    torch.manual_seed(5)
    for _ in range(EPOCHS):
        batches = list(loader)
        for start in range(0, BATCHES, accumulate):
            window = batches[start : start + accumulate]
            optimizer.zero_grad()
            for inputs, targets in window:
                context: Any = contextlib.nullcontext()
                if precision in dtypes:
                    context = torch.autocast("cuda", dtype=dtypes[precision])
                with context:
                    loss = F.cross_entropy(net(inputs.cuda()), targets.cuda())
                losses.append(loss.detach())
                scaler.scale(loss / len(window)).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() >= before:
                scheduler.step()
    return losses, net


@gpu
@no_gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("pin_memory", [False, True])
def test_training_on_a_gpu_equals_the_loop_by_hand(
    precision: str, accumulate: int, pin_memory: bool, tmp_path: Path
) -> None:
    losses, net = by_hand(precision, accumulate)
    module = Classifier()
    trainer = make_cuda_trainer(
        tmp_path, precision=precision, accumulate_grad_batches=accumulate, gradient_clip_val=0.1, log_every_n_steps=3
    )
    torch.manual_seed(5)
    trainer.fit(module, make_loader(pin_memory))
    assert len(losses) == BATCHES * EPOCHS
    assert all(torch.equal(one, other) for one, other in zip(module.losses, losses, strict=True))
    for key, value in net.state_dict().items():
        assert torch.equal(module.net.state_dict()[key], value), key


class NoWaiting(leyden.Callback):
    """Let torch refuse whatever waits for the device, from the second batch to the last."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch or batch_idx:  # the first step allocates and initialises
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_last_batch:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def normal_sync_mode() -> Any:
    yield
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


@gpu
@no_gpu
@pytest.mark.usefixtures("normal_sync_mode")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_nothing_waits_for_the_gpu_between_log_steps(precision: str, accumulate: int, tmp_path: Path) -> None:
    memory = Memory()
    trainer = make_cuda_trainer(
        tmp_path,
        precision=precision,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.1,
        log_every_n_steps=1000,
        logger=memory,
        callbacks=[NoWaiting()],
    )
    trainer.fit(Classifier(), make_loader(pin_memory=True))
    assert [sorted(row) for row in memory.rows] == [["epoch", "loss_epoch", "one_epoch"]] * EPOCHS


@gpu
@no_gpu
@pytest.mark.usefixtures("normal_sync_mode")
def test_the_watch_for_waiting_would_notice_one(tmp_path: Path) -> None:
    class Waiting(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            loss.item()
            return loss

    with pytest.raises(RuntimeError, match="synchroniz"):
        make_cuda_trainer(tmp_path, callbacks=[NoWaiting()]).fit(Waiting(), make_loader(pin_memory=True))


@gpu
@no_gpu
def test_validation_and_prediction_run_on_the_gpu_and_training_goes_on_the_same(tmp_path: Path) -> None:
    class Validated(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert batch[0].device == self.device
            self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            output: Tensor = self.net(batch[0])
            return output

    losses, _ = by_hand("32-true", 1)
    module = Validated()
    trainer = make_cuda_trainer(tmp_path, gradient_clip_val=0.1)
    torch.manual_seed(5)
    trainer.fit(module, make_loader(), make_loader())
    assert all(torch.equal(one, other) for one, other in zip(module.losses, losses, strict=True))
    predictions = trainer.predict(module, make_loader())
    assert predictions is not None
    assert sum(map(len, predictions)) == BATCHES * 4 - 2
    assert all(output.device.type == "cuda" for output in predictions)
