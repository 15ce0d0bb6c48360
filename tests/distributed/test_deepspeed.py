"""DeepSpeed: what its engine is told, with a stand-in of the library; and the library itself, where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import ModelCheckpoint
from leyden.errors import CheckpointError, ConfigurationError, LeydenWarning, RankError
from leyden.precision import Precision
from leyden.strategy.deepspeed import DeepSpeedStrategy
from quiet import make_trainer
from ranks import run_trainers

INSTALLED = importlib.util.find_spec("deepspeed") is not None
RATE, CLIP = 0.05, 0.5

real = pytest.mark.skipif(not INSTALLED, reason="needs deepspeed: pip install 'leyden[deepspeed]'")
both = pytest.mark.parametrize("stage", [0, pytest.param(1, marks=real), 2, pytest.param(3, marks=real)])


class Engine(nn.Module):
    """Does what DeepSpeed's engine promises, the plain way; shards nothing."""

    def __init__(self, model: nn.Module, optimizer: Any, config: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.config, self.skipped_steps, self.ends = model, config, 0, True
        self.inner = optimizer
        self.optimizer = optimizer if config["zero_optimization"]["stage"] == 0 else object()
        self.calls: list[str] = []

    def forward(self, *args: Any) -> Any:
        return self.module(*args)

    def set_gradient_accumulation_boundary(self, ends: bool) -> None:
        self.ends = ends

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas
        loss.backward()
        self.calls.append("last" if self.ends else "more")

    def step(self) -> None:
        assert self.ends
        self.calls.append("step")
        parameters = [parameter for group in self.inner.param_groups for parameter in group["params"]]
        for parameter in parameters:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        if "gradient_clipping" in self.config:
            nn.utils.clip_grad_norm_(parameters, self.config["gradient_clipping"])
        self.inner.step()
        self.inner.zero_grad()

    def destroy(self) -> None:
        self.calls.append("destroy")


def stand_in() -> list[Engine]:
    """Put a module in the place of the library; return the engines that it makes."""
    engines: list[Engine] = []
    library = types.ModuleType("deepspeed")

    def initialize(*, model: Any, optimizer: Any, model_parameters: Any, config: Any, dist_init_required: bool) -> Any:
        assert not dist_init_required
        assert model_parameters
        engines.append(Engine(model, optimizer, config))
        return engines[-1], optimizer, None, None

    library.initialize = initialize  # type: ignore[attr-defined]
    sys.modules["deepspeed"] = library
    return engines


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), RATE)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    return x, x.sum(1, keepdim=True)


def loader(batch_size: int) -> Any:
    return DataLoader(TensorDataset(*data()), batch_size)


def by_hand(epochs: int, dtype: torch.dtype = torch.float32) -> Net:
    """Batches of 8 in windows of 3 and 2."""
    module = Net().to(dtype)
    [optimizer], [scheduler] = module.configure_optimizers()
    for _ in range(epochs):
        batches = list(zip(*(part.to(dtype).split(8) for part in data()), strict=True))
        for window in (batches[:3], batches[3:]):
            optimizer.zero_grad()
            for batch in window:
                (module.training_step(batch, 0) / len(window)).backward()
            nn.utils.clip_grad_norm_(module.parameters(), CLIP)
            optimizer.step()
        scheduler.step()
    return module


def deepspeed(folder: Path, stage: int, world_size: int, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    settings: dict[str, Any] = {
        "strategy": DeepSpeedStrategy(stage),
        "devices": world_size,
        "accumulate_grad_batches": 3,
        "gradient_clip_val": CLIP,
        "enable_checkpointing": saves,
        "max_epochs": 3,
    }
    return make_trainer(folder, *callbacks, **(settings | options))


def fitted(rank: int, stage: int, world_size: int, folder: Path) -> dict[str, Any]:
    engines = [] if INSTALLED else stand_in()
    callback = ModelCheckpoint(dirpath=folder / "saved")
    module, trainer = Net(), deepspeed(folder, stage, world_size, callback)
    if stage and rank == 0:
        with pytest.warns(LeydenWarning, match="deepspeed-optimizer-not-saved"):
            trainer.fit(module, loader(8 // world_size), loader(8 // world_size))
    else:
        trainer.fit(module, loader(8 // world_size), loader(8 // world_size))
    again: Any = None
    other = deepspeed(folder, stage, world_size, ModelCheckpoint(dirpath=folder / "again"), max_epochs=4)
    resumed = Net()
    try:
        other.fit(resumed, loader(8 // world_size), loader(8 // world_size), ckpt_path=callback.best_model_path)
        again = {name: value.tolist() for name, value in resumed.state_dict().items()}
    except (CheckpointError, RankError) as error:  # of the rank that was first, and of the others
        again = str(error)
    return {
        "saved": {
            name: value.tolist() for name, value in L.load_checkpoint(callback.best_model_path)["state_dict"].items()
        },
        "val_loss": float(trainer.callback_metrics["val_loss"]),
        "steps": trainer.global_step,
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
        "calls": engines[0].calls if engines else None,
        "config": engines[0].config if engines else None,
        "again": again,
    }


@pytest.mark.filterwarnings("default" if INSTALLED else "error")  # those of the library
@pytest.mark.parametrize("world_size", [1, 2])
@both
def test_it_is_the_plain_loop(stage: int, world_size: int, tmp_path: Path) -> None:
    results = run_trainers(fitted, world_size, stage, world_size, tmp_path, timeout_s=900.0 if INSTALLED else 90.0)
    expected, longer = by_hand(3), by_hand(4)
    with torch.no_grad():
        loss = float(nn.functional.mse_loss(expected.net(data()[0]), data()[1]))
    for found in results:
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(torch.tensor(found["saved"][name]), value, msg=name)
        assert found["val_loss"] == pytest.approx(loss, rel=1e-5)
        assert found["steps"] == 6
        assert found["rate"] == pytest.approx(RATE / 8)
        if found["calls"] is not None:
            assert found["calls"] == ["more", "more", "last", "step", "more", "last", "step"] * 3
            assert found["config"]["gradient_clipping"] == CLIP
            assert found["config"]["gradient_accumulation_steps"] == 1
        if stage:
            assert f"DeepSpeed's stage {stage} keeps the optimizer's state in parts" in found["again"]
        else:
            for name, value in longer.state_dict().items():
                torch.testing.assert_close(torch.tensor(found["again"][name]), value, msg=name)


# What it is told


def settings(**options: Any) -> Any:
    given = {"gradient_clip_val": None, "precision": Precision("32-true")} | options
    return types.SimpleNamespace(**given)


@pytest.mark.usefixtures("library")
def test_the_config_is_the_users_and_the_trainers(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"bf16": "auto", "zero_optimization": {"overlap_comm": True}, "steps_per_print": 7}))
    strategy = DeepSpeedStrategy(3, config=path, offload_optimizer=True, offload_parameters={"device": "nvme"})
    config = strategy.full_config(settings(precision=Precision("bf16-true", torch.bfloat16), gradient_clip_val=2))
    assert config["bf16"] == {"enabled": True}
    assert config["gradient_clipping"] == 2.0
    assert config["steps_per_print"] == 7
    assert config["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "nvme"},
    }
    assert "fp16" not in config
    assert DeepSpeedStrategy().full_config(settings(precision=Precision("16-true", torch.float16)))["fp16"] == {
        "enabled": True
    }
    assert "gradient_clipping" not in DeepSpeedStrategy().full_config(settings())


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"stage": 4}, "stage=4"),
        ({"offload_parameters": True}, "offload_parameters=True"),
        ({"config": {"fp16": {"enabled": True}}}, "'fp16', which the Trainer says by precision"),
        ({"config": {"optimizer": {"type": "Adam"}}}, "'optimizer', which the Trainer says by configure_optimizers"),
        ({"config": {"gradient_accumulation_steps": 4}}, "which the Trainer says by accumulate_grad_batches"),
        ({"config": "nowhere.json"}, r"config='nowhere\.json' cannot be read"),
        ({"timeout": 3}, "timeout=3"),
    ],
)
def test_a_bad_argument_is_named(arguments: Any, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        DeepSpeedStrategy(**arguments)


@pytest.mark.skipif(INSTALLED, reason="the library is there")
def test_without_the_library_the_command_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"pip install 'leyden\[deepspeed\]'"):
        make_trainer(tmp_path, strategy="deepspeed")


class OwnBackward(Net):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()


class OwnClip(Net):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        pass


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Lbfgs(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


def refused(rank: int, kind: type[Net], options: dict[str, Any], folder: Path) -> str:
    stand_in()
    plain = {"accumulate_grad_batches": 1, "gradient_clip_val": None} | options
    try:
        deepspeed(folder, 2, 1, **plain).fit(kind(), loader(8), loader(8))
    except ConfigurationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "options", "names"),
    [
        (OwnBackward, {}, "OwnBackward.backward would not be called"),
        (OwnClip, {}, "OwnClip.configure_gradient_clipping would not be called"),
        (Manual, {}, "needs automatic optimization"),
        (Lbfgs, {}, "needs automatic optimization"),
        (Net, {"gradient_clip_val": 1, "gradient_clip_algorithm": "value"}, "gradient_clip_algorithm='value'"),
        (Net, {"nan_policy": "skip"}, "nan_policy='skip'"),
        (Net, {"precision": "16-mixed"}, "precision='16-mixed'"),
        (Net, {"precision": "64-true"}, "precision='64-true'"),
    ],
)
def test_what_the_engine_would_not_do_is_refused(kind: type[Net], options: Any, names: str, tmp_path: Path) -> None:
    assert names in run_trainers(refused, 1, kind, options, tmp_path)[0]


def two_fits(rank: int, folder: Path) -> list[list[str]]:
    engines = stand_in()
    module = Net()
    for _ in range(2):
        trainer = deepspeed(folder, 0, 1, max_epochs=1)
        trainer.fit(module, loader(8), loader(8))
    trainer.fit(module, loader(8), loader(8))
    return [engine.calls for engine in engines]


def test_a_fit_has_an_engine_of_its_own(tmp_path: Path) -> None:
    calls = run_trainers(two_fits, 1, tmp_path)[0]
    assert [call.count("step") for call in calls] == [2, 2, 2]
    assert [call.count("destroy") for call in calls] == [0, 1, 0]  # the second Trainer's first one


@pytest.mark.gpu
@pytest.mark.skipif(not (INSTALLED and torch.cuda.is_available()), reason="needs deepspeed and a CUDA device")
def test_stage_3_with_offload_on_a_gpu(tmp_path: Path) -> None:
    assert os.environ.get("CUDA_VISIBLE_DEVICES", "0") != ""
    strategy = DeepSpeedStrategy(3, offload_optimizer=True, offload_parameters=True)
    trainer = make_trainer(tmp_path, strategy=strategy, accelerator="cuda", devices=1, max_epochs=3)
    module = Net()
    trainer.fit(module, loader(8))
    assert trainer.global_step == 15
