"""Precisions: the dtype of parameters, of what a step computes and of what it gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import leyden
from leyden.errors import ConfigurationError
from leyden.precision import PRECISIONS, LossScaler, Precision, default_dtype, resolve_precision

torch.set_num_threads(1)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# parameters, the output of a linear layer in a step, its floating input, a new tensor in a step
DTYPES = {
    "32-true": (F32, F32, F32, F32),
    "64-true": (F64, F64, F64, F64),
    "16-true": (F16, F16, F16, F16),
    "bf16-true": (BF16, BF16, BF16, BF16),
    "16-mixed": (F32, F16, F32, F32),
    "bf16-mixed": (F32, BF16, F32, F32),
}


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


class Watching(leyden.LightningModule):
    """Notes dtypes in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.seen: dict[str, tuple[torch.dtype, ...]] = {}

    def watch(self, where: str, batch: Any) -> Tensor:
        inputs, labels = batch
        output = self.layer(inputs)
        assert labels.dtype == torch.long
        assert self.count.dtype == torch.long
        assert self.scale.dtype == self.layer.weight.dtype == self.dtype
        self.seen[where] = (self.layer.weight.dtype, output.dtype, inputs.dtype, torch.ones(1).dtype)
        return output.float().sum()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.watch("train", batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.watch("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.watch("predict", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Validated(Watching):
    def __init__(self) -> None:
        super().__init__()
        self.gradients: list[torch.dtype] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.layer.weight.grad is not None
        self.gradients.append(self.layer.weight.grad.dtype)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.watch("val", batch))


def loader() -> DataLoader[Any]:
    return DataLoader([(torch.ones(2), torch.tensor(1)) for _ in range(4)], batch_size=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_of_parameters_inputs_and_outputs_in_every_verb(name: str, tmp_path: Path) -> None:
    module = Validated()
    trainer = make_trainer(tmp_path, precision=name)
    trainer.fit(module, loader(), loader())
    trainer.validate(module, loader())
    trainer.test(module, loader())
    trainer.predict(module, loader())
    assert module.seen == dict.fromkeys(("train", "val", "test", "predict"), DTYPES[name])
    assert trainer.precision == name
    assert module.layer.weight.dtype == DTYPES[name][0]
    assert module.gradients == [DTYPES[name][0]] * 2
    assert torch.get_default_dtype() == F32
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (32, "32-true"), ("32", "32-true"), (64, "64-true"), ("64", "64-true"), (16, "16-mixed"), ("16", "16-mixed"),
        ("bf16", "bf16-mixed"), *((name, name) for name in DTYPES),
    ],
)  # fmt: skip
def test_names_and_short_forms(given: Any, name: str, tmp_path: Path) -> None:
    assert resolve_precision(given) is PRECISIONS[name]
    assert make_trainer(tmp_path, precision=given).precision == name


def test_32_true_is_the_default(tmp_path: Path) -> None:
    assert make_trainer(tmp_path).precision == "32-true"


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("bf16-mix", r" Did you mean 'bf16-mixed'\?"), ("fp16", ""), (8, ""), (True, ""), ("transformer-engine", ""),
        (torch.float16, ""), (32.5, ""), ("", ""), ("16_true", r" Did you mean '16-true'\?"),
    ],
)  # fmt: skip
def test_unknown_precisions_are_refused(given: Any, hint: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"precision=.* is not valid\. Allowed: '32-true', .*'bf16' for short\.{hint}"
    ):
        make_trainer(tmp_path, precision=given)


def test_a_precision_of_ones_own_goes_into_plugins_and_excludes_the_argument(tmp_path: Path) -> None:
    own = Precision("half-and-half", parameter_dtype=BF16)
    trainer = make_trainer(tmp_path, plugins=[own])
    module = Watching()
    trainer.fit(module, loader())
    assert trainer.precision == "half-and-half"
    assert module.seen["train"] == (BF16, BF16, BF16, BF16)
    with pytest.raises(ConfigurationError, match=r"precision='32-true' and a Precision in plugins contradict"):
        make_trainer(tmp_path, plugins=own, precision="32-true")
    with pytest.raises(ConfigurationError, match=r"plugins='half' is not valid"):
        make_trainer(tmp_path, plugins="half")


@pytest.mark.parametrize("name", ["64-true", "bf16-true", "bf16-mixed", "16-mixed"])
def test_an_error_in_a_step_leaves_no_dtype_or_autocast_behind(name: str, tmp_path: Path) -> None:
    class Failing(Watching):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path, precision=name).fit(Failing(), loader())
    assert torch.get_default_dtype() == F32
    assert not torch.is_autocast_enabled("cpu")


def test_the_default_dtype_is_the_users_outside_of_steps(tmp_path: Path) -> None:
    class Outside(Watching):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            outside.append(torch.get_default_dtype())

        def on_train_epoch_end(self) -> None:
            outside.append(torch.get_default_dtype())

    outside: list[torch.dtype] = []
    make_trainer(tmp_path, precision="64-true").fit(Outside(), loader())
    assert outside == [F32, F32, F32]


def test_configure_model_makes_layers_in_the_parameters_dtype(tmp_path: Path) -> None:
    class Late(leyden.LightningModule):
        def configure_model(self) -> None:
            self.layer = nn.Linear(2, 1)
            made.append(self.layer.weight.dtype)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = self.layer(batch[0]).sum()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    made: list[torch.dtype] = []
    make_trainer(tmp_path, precision="bf16-true").fit(Late(), loader())
    assert made == [BF16]


def test_inputs_are_cast_wherever_they_are_in_the_batch(tmp_path: Path) -> None:
    class Nested(Watching):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            dtypes.append((batch["a"][0].dtype, batch["a"][1].dtype, batch["b"].dtype))
            return self.layer(batch["a"][0]).sum()

    dtypes: list[Any] = []
    data: list[Any] = [{"a": (torch.ones(2), torch.tensor(1)), "b": torch.tensor(True)}]
    make_trainer(tmp_path, precision="64-true").fit(Nested(), DataLoader(data))
    assert dtypes == [(F64, torch.long, torch.bool)]


def test_own_transfer_is_cast_too_and_own_hook_after_it_has_the_last_word(tmp_path: Path) -> None:
    class Own(Watching):
        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            assert batch[0].dtype == F32
            return [part.to(device) for part in batch]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            assert batch[0].dtype == BF16
            return [batch[0] * 2, batch[1]]

    module = Own()
    make_trainer(tmp_path, precision="bf16-true").fit(module, loader())
    assert module.seen["train"] == (BF16,) * 4


def test_backward_of_a_manual_step_runs_outside_of_autocast(tmp_path: Path) -> None:
    class Manual(Watching):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = self.watch("train", batch)
            loss.register_hook(lambda _: enabled.append(torch.is_autocast_enabled("cpu")))
            enabled.append(torch.is_autocast_enabled("cpu"))
            self.optimizers().minimize(loss)
            enabled.append(torch.is_autocast_enabled("cpu"))

    enabled: list[bool] = []
    make_trainer(tmp_path, precision="bf16-mixed", max_steps=1).fit(Manual(), loader())
    assert enabled == [True, False, True]


def test_logged_means_of_half_precision_values_are_summed_widely(tmp_path: Path) -> None:
    class Logging(Watching):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("big", torch.tensor(60000.0, dtype=F16), on_step=False, on_epoch=True)
            return self.watch("train", batch)

    trainer = make_trainer(tmp_path, precision="16-true")
    trainer.fit(Logging(), loader())
    assert trainer.callback_metrics["big"].item() == 60000.0  # the sum over the epoch would overflow in fp16


def test_default_dtype_restores_what_was_there() -> None:
    def failing() -> None:
        with default_dtype(F64):
            assert torch.get_default_dtype() == F64
            with default_dtype(None):
                assert torch.get_default_dtype() == F64
            with default_dtype(F16):
                assert torch.get_default_dtype() == F16
            assert torch.get_default_dtype() == F64
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert torch.get_default_dtype() == F32


# Loss scaling


def parameter(gradient: float | None) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(()))
    made.grad = None if gradient is None else torch.tensor(gradient)
    return made


def scaled(scale: float = 8.0) -> tuple[LossScaler, torch.amp.GradScaler]:
    inner = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    return LossScaler(inner), inner


def test_a_step_says_whether_it_was_taken_and_the_scale_follows() -> None:
    scaler, inner = scaled()
    weight = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    taken, scales = [], []
    for factor in (1.0, float("inf"), 1.0, 1.0, 1.0, 1.0):
        optimizer.zero_grad()
        scaler.scale(weight * factor).backward()  # type: ignore[no-untyped-call]
        taken.append(scaler.step(optimizer))
        scaler.update()
        scales.append(inner.get_scale())
    assert taken == [True, False, True, True, True, True]
    assert scales == [8.0, 4.0, 4.0, 8.0, 8.0, 16.0]
    assert weight.item() == -5.0


def test_unscaling_twice_divides_once() -> None:
    scaler, _ = scaled()
    weight = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale(weight * 3).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert weight.grad.item() == 24.0
    scaler.unscale(optimizer)
    scaler.unscale(optimizer)
    assert weight.grad.item() == 3.0
    assert scaler.step(optimizer)
    assert weight.item() == -3.0


def test_without_gradients_nothing_is_stepped_or_asked_of_the_scaler() -> None:
    scaler, inner = scaled()
    optimizer = torch.optim.SGD([parameter(None)], lr=1.0)
    scaler.unscale(optimizer)
    assert not scaler.step(optimizer)
    scaler.update()
    scaler.end_batch()
    assert inner.get_scale() == 8.0


def test_the_scale_does_not_change_between_two_optimizers_losses_and_their_steps() -> None:
    scaler, inner = scaled()
    weights = [nn.Parameter(torch.zeros(())) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=1.0) for weight in weights]
    for weight, factor in zip(weights, (float("inf"), 1.0), strict=True):
        scaler.scale(weight * factor).backward()  # type: ignore[no-untyped-call]
    assert [scaler.step(optimizer) for optimizer in optimizers] == [False, True]
    assert weights[1].item() == -1.0
    scaler.end_batch()
    assert inner.get_scale() == 4.0


# On a GPU

gpu = pytest.mark.gpu
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@gpu
@no_gpu
@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_on_a_gpu(name: str, tmp_path: Path) -> None:
    module = Validated()
    make_trainer(tmp_path, precision=name, accelerator="cuda", devices=1).fit(module, loader(), loader())
    assert module.seen == dict.fromkeys(("train", "val"), DTYPES[name])
    assert module.device.type == "cuda"
    assert torch.get_default_dtype() == F32
    assert not torch.is_autocast_enabled("cuda")
