"""Training gives the bits that a loop written by hand in plain PyTorch gives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import leyden
from leyden.callbacks import LearningRateMonitor, ModelCheckpoint
from leyden.errors import ConfigurationError
from leyden.loggers import CSVLogger

torch.set_num_threads(1)

EPOCHS = 2
SAMPLES, BATCH = 30, 4  # 8 batches, the last of 2 samples; by threes the last window has 2 batches
BATCHES = 8
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


@dataclass
class Case:
    optimizer: str = "sgd"
    accumulate: int = 1
    clip: str | None = None
    scheduler: str | None = None
    precision: str = "32-true"
    overflows: tuple[int, ...] = ()  # of all training batches, those whose loss is infinite
    fused: bool = True  # what the Trainer chooses, and the loop by hand writes into its optimizer

    @property
    def steps(self) -> int:
        return EPOCHS * -(-BATCHES // self.accumulate)


@dataclass
class Outcome:
    losses: list[Tensor] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    lrs: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)


CLIP = {"norm": 0.05, "value": 0.01}


def make_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def make_loader(seed: int = 11, shuffle: bool = True, own_generator: bool = True) -> DataLoader[Any]:
    source = torch.Generator().manual_seed(seed)
    inputs = torch.randn(SAMPLES, 5, generator=source)
    targets = torch.randint(0, 3, (SAMPLES,), generator=source)
    generator = source if own_generator else None
    return DataLoader(TensorDataset(inputs, targets), batch_size=BATCH, shuffle=shuffle, generator=generator)


def make_optimizer(case: Case, net: nn.Module, fused: bool | None = None) -> torch.optim.Optimizer:
    if case.optimizer == "sgd":
        return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, fused=fused)
    if case.optimizer == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=0.01, fused=fused)
    return torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3, history_size=4)


def make_scheduler(case: Case, optimizer: torch.optim.Optimizer) -> Any:
    if case.scheduler == "epoch":
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    if case.scheduler == "step" and case.optimizer == "lbfgs":  # OneCycleLR wants a momentum
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, case.steps)
    if case.scheduler == "step":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=case.steps)
    return None


def loss_of(net: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(net(inputs), targets)


def clip_by_hand(case: Case, net: nn.Module) -> None:
    if case.clip == "norm":
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP["norm"])
    elif case.clip == "value":
        torch.nn.utils.clip_grad_value_(net.parameters(), CLIP["value"])


def autocast(case: Case) -> Callable[[], Any]:
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    if case.precision not in dtypes:
        return contextlib.nullcontext
    return lambda: torch.autocast("cpu", dtype=dtypes[case.precision])


def by_hand(case: Case, validation: DataLoader[Any] | None = None) -> Outcome:
    """The loop as one writes it without a framework."""
    found, net, loader, context = Outcome(), make_net(), make_loader(), autocast(case)
    optimizer = make_optimizer(case, net, fused=case.fused or None)
    scheduler = make_scheduler(case, optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=case.precision == "16-mixed")
    torch.manual_seed(5)
    seen = 0
    for _ in range(EPOCHS):
        net.train()
        batches = list(loader)
        for start in range(0, len(batches), case.accumulate):
            window = batches[start : start + case.accumulate]

            def gradients(window: list[Any] = window, start: int = seen) -> Tensor:
                optimizer.zero_grad()
                total = torch.zeros(())
                for number, batch in enumerate(window, start):
                    with context():
                        loss = loss_of(net, batch)
                    if number in case.overflows:
                        loss = loss * float("inf")
                    found.losses.append(loss.detach())
                    loss = loss / len(window)
                    scaler.scale(loss).backward()
                    total = total + loss.detach()
                scaler.unscale_(optimizer)
                clip_by_hand(case, net)
                return total

            seen += len(window)
            before = scaler.get_scale()
            if case.optimizer == "lbfgs":
                optimizer.step(gradients)
            else:
                gradients()
                scaler.step(optimizer)
                scaler.update()
            if scheduler is not None and case.scheduler == "step" and scaler.get_scale() >= before:
                scheduler.step()
            found.lrs.append(optimizer.param_groups[0]["lr"])
            found.scales.append(scaler.get_scale())
        if scheduler is not None and case.scheduler == "epoch":
            scheduler.step()
        if validation is not None:
            net.eval()
            with torch.no_grad():
                for batch in validation:
                    loss_of(net, batch)
    found.state, found.optimizer = net.state_dict(), optimizer.state_dict()
    return found


class Module(leyden.LightningModule):
    def __init__(self, case: Case, logs: bool = False) -> None:
        super().__init__()
        self.net = make_net()
        self.case, self.logs, self.seen, self.found = case, logs, 0, Outcome()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = loss_of(self.net, batch)
        if self.seen in self.case.overflows:
            loss = loss * float("inf")
        self.seen += 1
        self.found.losses.append(loss.detach())
        if self.logs:
            self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.case, self.net)
        scheduler = make_scheduler(self.case, optimizer)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.case.scheduler}}


class Validated(Module):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", loss_of(self.net, batch), prog_bar=True)


class StepWatch(leyden.Callback):
    """Note what the learning rate and the loss scale are after each step."""

    def __init__(self, found: Outcome) -> None:
        self.found = found
        self.steps = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.steps:
            return
        self.steps = trainer.global_step
        self.found.lrs.append(trainer.optimizers[0].param_groups[0]["lr"])
        scaler = pl_module._run.scaler
        self.found.scales.append(1.0 if scaler is None else scaler.scaler.get_scale())


def fit(module: Module, folder: Path, val: DataLoader[Any] | None = None, **options: Any) -> Outcome:
    case = module.case
    settings = QUIET | {
        "default_root_dir": folder,
        "max_epochs": EPOCHS,
        "accumulate_grad_batches": case.accumulate,
        "gradient_clip_val": None if case.clip is None else CLIP[case.clip],
        "gradient_clip_algorithm": case.clip,
        "precision": case.precision,
        "fused_optimizer": case.fused,
    }
    trainer = leyden.Trainer(**(settings | options))
    torch.manual_seed(5)
    trainer.fit(module, make_loader(), val)
    assert trainer.global_step == case.steps
    module.found.state, module.found.optimizer = module.net.state_dict(), trainer.optimizers[0].state_dict()
    return module.found


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal to the last bit, tensors and containers of them."""
    assert type(found) is type(expected), where
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(torch.nan_to_num(found), torch.nan_to_num(expected)), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    else:
        assert found == expected, where


def assert_same_training(found: Outcome, expected: Outcome) -> None:
    assert_same(found.losses, expected.losses, "losses")
    assert_same(found.state, expected.state, "state")
    assert_same(found.optimizer, expected.optimizer, "optimizer")


ALL = [
    Case(*combination)
    for combination in product(
        ("sgd", "adamw", "lbfgs"), (1, 3), (None, "norm", "value"), (None, "epoch", "step"), ("32-true", "bf16-mixed")
    )
]


def name_of(case: Case) -> str:
    return f"{case.optimizer}-acc{case.accumulate}-clip_{case.clip}-sched_{case.scheduler}-{case.precision}"


@pytest.mark.parametrize("case", ALL, ids=name_of)
def test_equals_the_loop_by_hand(case: Case, tmp_path: Path) -> None:
    expected = by_hand(case)
    assert_same_training(fit(Module(case), tmp_path), expected)
    initial = make_net().state_dict()
    assert not torch.equal(expected.state["0.weight"], initial["0.weight"])  # something was trained at all


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_without_fused_kernels_equals_the_loop_that_has_none(optimizer: str, precision: str, tmp_path: Path) -> None:
    case = Case(optimizer, 3, "norm", "step", precision, fused=False)
    expected = by_hand(case)
    assert_same_training(fit(Module(case), tmp_path), expected)
    assert expected.optimizer["param_groups"][0]["fused"] is None


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lbfgs"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_validation_logging_bar_and_checkpoints_change_no_bit(
    optimizer: str, accumulate: int, precision: str, tmp_path: Path
) -> None:
    case = Case(optimizer, accumulate, "norm", "step", precision)
    # without a generator of its own the validation loader draws a seed, in both loops
    validation = make_loader(seed=7, shuffle=False, own_generator=False)
    expected = by_hand(case, validation)
    found = fit(
        Validated(case, logs=True),
        tmp_path,
        make_loader(seed=7, shuffle=False, own_generator=False),
        logger=CSVLogger(tmp_path),
        enable_progress_bar=True,
        enable_model_summary=True,
        enable_checkpointing=True,
        callbacks=[
            ModelCheckpoint(tmp_path / "kept", monitor="val_loss", save_top_k=2, save_last=True),
            LearningRateMonitor(),
        ],
        log_every_n_steps=1,
    )
    assert_same_training(found, expected)
    assert len(list((tmp_path / "kept").glob("*.ckpt"))) == 3
    assert (tmp_path / "lightning_logs/version_0/metrics.csv").is_file()


def test_validation_in_mid_epoch_changes_no_bit(tmp_path: Path) -> None:
    case = Case("adamw", 3, "norm", "step")
    quiet_loader = make_loader(seed=7, shuffle=False)  # draws from its own generator, so that nothing is disturbed
    found = fit(Validated(case), tmp_path, quiet_loader, val_check_interval=2)
    assert_same_training(found, by_hand(case))


def test_no_callback_logger_or_bar_is_needed(tmp_path: Path) -> None:
    case = Case("adamw", 3, "value", "epoch")
    found = fit(
        Module(case), tmp_path, barebones=True, logger=None, enable_progress_bar=None, enable_model_summary=None,
        enable_checkpointing=None,
    )  # fmt: skip
    assert_same_training(found, by_hand(case))


def test_anomaly_detection_changes_no_bit(tmp_path: Path) -> None:
    case = Case("sgd", 3, "norm")
    assert_same_training(fit(Module(case), tmp_path, detect_anomaly=True), by_hand(case))


def test_two_fits_give_the_same_bits(tmp_path: Path) -> None:
    case = Case("adamw", 3, "norm", "step", "bf16-mixed")
    assert_same_training(fit(Module(case), tmp_path), fit(Module(case), tmp_path))


# fp16 autocast with loss scaling


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [None, "norm", "value"])
@pytest.mark.parametrize("scheduler", [None, "epoch", "step"])
def test_fp16_equals_the_loop_with_grad_scaler(
    optimizer: str, accumulate: int, clip: str | None, scheduler: str | None, tmp_path: Path
) -> None:
    case = Case(optimizer, accumulate, clip, scheduler, "16-mixed")
    assert_same_training(fit(Module(case), tmp_path), by_hand(case))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [None, "norm"])
def test_fp16_overflow_skips_the_step_and_the_scheduler(accumulate: int, clip: str | None, tmp_path: Path) -> None:
    case = Case("adamw", accumulate, clip, "step", "16-mixed", overflows=(3, 4, 10))
    module = Module(case)
    found = fit(module, tmp_path, callbacks=[StepWatch(module.found)])
    expected = by_hand(case)
    assert_same_training(found, expected)
    assert found.lrs == expected.lrs
    assert found.scales == expected.scales
    # batches 3, 4 and 10 spoil 3 steps of one batch, or 2 of three: each halves the scale
    assert found.scales[-1] == 65536.0 / (8 if accumulate == 1 else 4)
    assert sum(one == other for one, other in zip(found.lrs, found.lrs[1:], strict=False)) == (
        3 if accumulate == 1 else 2
    )


class DefaultStep(Module):
    """Overrides optimizer_step with what the default does."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer.step(closure=optimizer_closure)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_own_optimizer_step_equals_the_loop_by_hand(precision: str, accumulate: int, tmp_path: Path) -> None:
    case = Case("adamw", accumulate, "norm", "step", precision)
    assert_same_training(fit(DefaultStep(case), tmp_path), by_hand(case))


def test_own_optimizer_step_with_lbfgs_equals_the_loop_by_hand(tmp_path: Path) -> None:
    case = Case("lbfgs", 3, "norm", "step")
    assert_same_training(fit(DefaultStep(case), tmp_path), by_hand(case))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_own_optimizer_step_heeds_overflow_like_the_default(accumulate: int, tmp_path: Path) -> None:
    case = Case("adamw", accumulate, "norm", "step", "16-mixed", overflows=(3, 10))
    module = DefaultStep(case)
    found = fit(module, tmp_path, callbacks=[StepWatch(module.found)])
    expected = by_hand(case)
    assert_same_training(found, expected)
    assert found.lrs == expected.lrs
    assert found.scales == expected.scales


def test_fp16_refuses_lbfgs_before_the_first_batch(tmp_path: Path) -> None:
    case = Case("lbfgs", precision="16-mixed")
    module = Module(case)
    with pytest.raises(ConfigurationError, match=r"precision='16-mixed' scales the loss.*LBFGS.*'bf16-mixed' or '32-"):
        fit(module, tmp_path)
    assert module.found.losses == []


# The gradient of a window


class Regression(leyden.LightningModule):
    """Plain least squares, which notes the gradient that each step sees; weights never move."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layer = nn.Linear(size, 1)
        self.gradients: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return F.mse_loss(self.layer(inputs).squeeze(1), targets)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.layer.weight.grad is not None
        self.gradients.append(self.layer.weight.grad.clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def mean_gradient(weight: Tensor, bias: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """d/dw of mean((xw + b - y)²), in closed form."""
    error = inputs @ weight.T + bias - targets[:, None]
    return (2 * error * inputs).mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("batches", "accumulate", "windows"), [(8, 3, [3, 3, 2]), (7, 3, [3, 3, 1]), (2, 5, [2]), (6, 3, [3, 3])]
)
def test_gradient_of_a_window_is_the_mean_over_all_its_samples(
    batches: int, accumulate: int, windows: list[int], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(batches * 4, 3, generator=generator, dtype=torch.float64)
    targets = torch.randn(batches * 4, generator=generator, dtype=torch.float64)
    module = Regression()
    trainer = leyden.Trainer(
        **QUIET, default_root_dir=tmp_path, max_epochs=1, accumulate_grad_batches=accumulate, precision="64-true"
    )
    trainer.fit(module, DataLoader(TensorDataset(inputs, targets), batch_size=4))
    weight, bias = module.layer.weight.detach(), module.layer.bias.detach()
    assert len(module.gradients) == len(windows) == trainer.global_step
    start = 0
    for gradient, window in zip(module.gradients, windows, strict=True):
        part = slice(start * 4, (start + window) * 4)
        torch.testing.assert_close(gradient, mean_gradient(weight, bias, inputs[part], targets[part]))
        start += window


def test_short_batches_count_like_full_ones_within_a_window(tmp_path: Path) -> None:
    """The mean of the batches' means, as the loop by hand has it: the last batch's samples weigh more."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    targets = torch.randn(10, generator=generator, dtype=torch.float64)
    module = Regression()
    trainer = leyden.Trainer(
        **QUIET, default_root_dir=tmp_path, max_epochs=1, accumulate_grad_batches=3, precision="64-true"
    )
    trainer.fit(module, DataLoader(TensorDataset(inputs, targets), batch_size=4))
    weight, bias = module.layer.weight.detach(), module.layer.bias.detach()
    parts = [mean_gradient(weight, bias, inputs[a:b], targets[a:b]) for a, b in ((0, 4), (4, 8), (8, 10))]
    torch.testing.assert_close(module.gradients, [sum(parts) / 3])
