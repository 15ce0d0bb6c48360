"""LightningModule is an ordinary nn.Module: what people know of PyTorch stays true, with a Trainer and after it."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import leyden
from leyden.errors import ConfigurationError, LeydenError

torch.set_num_threads(1)

BATCHES, SIZE = 4, 2


class Model(leyden.LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.BatchNorm1d(width), torch.nn.Dropout(0.5))
        self.head = torch.nn.Linear(width, 1)
        self.example_input_array = torch.ones(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(batches: int = BATCHES) -> DataLoader[Any]:
    return DataLoader(torch.arange(batches * SIZE * 2.0).reshape(-1, 2) / 10, batch_size=SIZE)  # type: ignore[arg-type]


def fit(model: leyden.LightningModule, **options: Any) -> leyden.Trainer:
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "max_epochs": 1}
    quiet |= {f"enable_{name}": False for name in ("checkpointing", "progress_bar", "model_summary")}
    trainer = leyden.Trainer(**(quiet | options))
    trainer.fit(model, loader())
    return trainer


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# Modes and places


def test_freeze_and_unfreeze() -> None:
    model = Model()
    model.freeze()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert not model(torch.ones(2, 2)).requires_grad
    model.unfreeze()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_a_frozen_part_stays_as_it_is_through_training() -> None:
    model = Model()
    model.body.requires_grad_(False)
    model.body.eval()
    before = copy.deepcopy(model.body)
    head = model.head.weight.clone()
    model.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    model.val_dataloader = loader  # type: ignore[method-assign]
    fit(model, max_epochs=2)
    assert same(model.body, before), "the BatchNorm's statistics have moved"
    assert not torch.equal(model.head.weight, head)
    assert (model.training, model.body.training, model.head.training) == (True, False, True)


def test_device_and_dtype_follow_the_parameters() -> None:
    model = Model()
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    model.double()
    assert model.dtype is torch.float64
    model.to(torch.bfloat16)
    assert model.dtype is torch.bfloat16
    model.to("meta")
    assert model.device == torch.device("meta")
    model.to_empty(device="cpu")
    assert model.device == torch.device("cpu")
    assert not model.on_gpu


def test_device_follows_a_move_of_the_module_that_holds_it() -> None:
    model = Model()
    assert model.device == torch.device("cpu")
    torch.nn.Sequential(model).to("meta")
    assert model.device == torch.device("meta")


def test_device_and_dtype_without_parameters() -> None:
    class Bare(leyden.LightningModule):
        pass

    assert (Bare().device, Bare().dtype) == (torch.device("cpu"), torch.get_default_dtype())
    buffered = Bare()
    buffered.register_buffer("numbers", torch.ones(1, dtype=torch.int64, device="meta"))
    assert (buffered.device, buffered.dtype) == (torch.device("meta"), torch.get_default_dtype())


def test_dtype_is_that_of_the_first_floating_point_parameter() -> None:
    class Mixed(leyden.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.codes = torch.nn.Parameter(torch.ones(1, dtype=torch.int8), requires_grad=False)
            self.layer = torch.nn.Linear(1, 1, dtype=torch.float64)

    assert Mixed().dtype is torch.float64


# Copies


def attached_copy(make_copy: Any) -> tuple[Model, Any, leyden.Trainer]:
    """A copy of a module that is made while a Trainer runs it."""
    model, made = Model(), []
    model.on_train_epoch_end = lambda: made.append(make_copy(model))  # type: ignore[method-assign]
    trainer = fit(model)
    return model, made[0], trainer


def pickled(model: Any) -> Any:
    hook = model.__dict__.pop("on_train_epoch_end")  # a function that is made in a test cannot be pickled
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    model.on_train_epoch_end = hook
    buffer.seek(0)
    return pickle.load(buffer)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, copy.copy, pickled])
def test_a_copy_does_not_take_the_trainer_along(make_copy: Any) -> None:
    model, copied, trainer = attached_copy(make_copy)
    assert type(copied) is Model
    assert same(copied, model)
    assert model.trainer is trainer
    with pytest.raises(LeydenError, match="Model is not run by a Trainer now"):
        _ = copied.trainer
    with pytest.raises(LeydenError, match="during fit only"):
        copied.optimizers()
    assert dict(copied.hparams) == {"width": 3}
    assert torch.equal(copied.eval()(torch.ones(2, 2)), model.eval()(torch.ones(2, 2)))


def test_a_deep_copy_has_weights_of_its_own_and_can_be_trained() -> None:
    model, copied, _ = attached_copy(copy.deepcopy)
    copied.on_train_epoch_end = lambda: None
    before = copy.deepcopy(model)
    fit(copied)
    assert same(model, before)
    assert not same(model, copied)


def test_pickling_takes_little_more_than_the_weights() -> None:
    model, copied, _ = attached_copy(pickled)
    weights = io.BytesIO()
    torch.save(model.state_dict(), weights)
    assert len(pickle.dumps(copied)) < 3 * len(weights.getvalue())


def test_state_dict_has_the_users_keys_and_no_other() -> None:
    model = Model()
    names = [*(f"body.0.{name}" for name in ("weight", "bias"))]
    names += [f"body.1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    names += ["head.weight", "head.bias"]
    assert list(model.state_dict()) == names
    fit(model)
    assert list(model.state_dict()) == names
    plain = torch.nn.Sequential(copy.deepcopy(model.body), copy.deepcopy(model.head))
    plain.load_state_dict(dict(zip(plain.state_dict(), model.state_dict().values(), strict=True)))
    assert torch.equal(plain.eval()(torch.ones(2, 2)), model.eval()(torch.ones(2, 2)))


def test_only_the_users_parts_are_children() -> None:
    model = Model()
    fit(model)
    assert [name for name, _ in model.named_children()] == ["body", "head"]


# Out of leyden


INPUTS = torch.tensor([[0.5, -1.0], [2.0, 0.25], [1.0, 1.0]])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["script", "trace"])
@pytest.mark.parametrize("trained", [False, True])
def test_torchscript_computes_the_same(method: str, trained: bool, tmp_path: Path) -> None:
    model = Model()
    if trained:
        fit(model)
    model.head.eval()
    modes = [module.training for module in model.modules()]
    made = model.to_torchscript(tmp_path / "model.pt", method=method)
    assert [module.training for module in model.modules()] == modes
    expected = copy.deepcopy(model).eval()(INPUTS)
    torch.testing.assert_close(made(INPUTS), expected)
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(INPUTS), expected)
    if not trained:
        with pytest.raises(LeydenError, match="not run by a Trainer"):
            _ = model.trainer


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_needs_a_known_method_and_an_input_to_trace() -> None:
    model = Model()
    with pytest.raises(ConfigurationError, match=r"method='onnx' is not valid. Allowed: 'script', 'trace'"):
        model.to_torchscript(method="onnx")
    model.example_input_array = None
    with pytest.raises(
        ConfigurationError, match=r"to_torchscript needs an input: pass one, or set self.example_input_array"
    ):
        model.to_torchscript(method="trace")
    assert torch.equal(model.to_torchscript(method="trace", example_inputs=INPUTS)(INPUTS), model.eval()(INPUTS))


@pytest.mark.parametrize("trained", [False, True])
def test_torch_export_computes_the_same(trained: bool) -> None:
    model = Model()
    if trained:
        fit(model)
    model.eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (torch.ones(4, 2),), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(INPUTS), model(INPUTS))


def test_torch_compile_with_the_eager_backend_computes_the_same() -> None:
    model = Model()
    fit(model)
    model.eval()
    torch.testing.assert_close(torch.compile(model, backend="eager")(INPUTS), model(INPUTS))


@pytest.mark.skipif(
    importlib.util.find_spec("onnxscript") is None, reason="onnxscript, which torch.onnx.export needs, is not installed"
)
def test_onnx_file_is_written(tmp_path: Path) -> None:
    model = Model()
    model.to_onnx(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size > 0
    assert all(module.training for module in model.modules())


def test_onnx_needs_an_input(tmp_path: Path) -> None:
    model = Model()
    model.example_input_array = None
    with pytest.raises(ConfigurationError, match=r"to_onnx needs an input: pass one, or set self.example_input_array"):
        model.to_onnx(tmp_path / "model.onnx")


# Things that PyTorch programs do


class Growing(Model):
    """Gets another layer before the second epoch, and loses it before the third."""

    def __init__(self) -> None:
        super().__init__()
        self.extra: torch.nn.Module = torch.nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(self.extra(inputs))

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            layer = torch.nn.Linear(2, 2)
            self.extra, self.first = layer, layer.weight.clone()
            self.optimizers().add_param_group({"params": layer.parameters(), "lr": 0.5})
        elif self.current_epoch == 2:
            self.removed, self.extra = self.extra, torch.nn.Identity()


def test_layers_may_come_and_go_between_epochs() -> None:
    model = Growing()
    trainer = fit(model, max_epochs=2)
    assert isinstance(model.extra, torch.nn.Linear)
    assert not torch.equal(model.extra.weight, model.first), "the new layer was not trained"
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.1, 0.5]
    again = Growing()
    fit(again, max_epochs=3)
    assert list(again.extra.parameters()) == []


def test_layers_may_be_chosen_at_each_step() -> None:
    class Branches(leyden.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 1) for _ in range(3))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = torch.zeros(())
            for layer in self.layers[: batch_idx % 2 + 1]:
                loss = loss + layer(batch).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Branches()
    before = copy.deepcopy(model.layers)
    fit(model)
    assert [torch.equal(old.weight, new.weight) for old, new in zip(before, model.layers, strict=True)] == [
        False,
        False,
        True,
    ]


def test_buffers_can_be_registered_and_changed_in_place() -> None:
    class Counting(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
            self.register_buffer("scratch", torch.zeros(1), persistent=False)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.seen += len(batch)
            self.scratch = self.scratch + 1
            return super().training_step(batch, batch_idx)

    model = Counting()
    fit(model)
    assert model.state_dict()["seen"] == BATCHES * SIZE
    assert "scratch" not in model.state_dict()
    assert model.scratch.tolist() == [BATCHES]


def test_hooks_on_modules_and_tensors_run() -> None:
    model = Model()
    forward: list[torch.Size] = []
    backward: list[torch.Size] = []
    grads: list[Tensor] = []
    handle = model.head.register_forward_hook(lambda module, args, output: forward.append(output.shape))
    model.head.register_full_backward_hook(lambda module, into, out: backward.append(out[0].shape))
    model.head.weight.register_hook(grads.append)
    steps: list[int] = []

    def on_fit_start() -> None:
        model.trainer.optimizers[0].register_step_post_hook(lambda *_: steps.append(model.global_step))

    model.on_fit_start = on_fit_start  # type: ignore[method-assign]
    fit(model)
    assert forward == backward == [torch.Size([SIZE, 1])] * BATCHES
    assert len(grads) == BATCHES
    assert steps == [0, 1, 2, 3]
    handle.remove()
    fit(model)
    assert len(forward) == BATCHES


def test_a_forward_hook_on_the_module_itself_runs() -> None:
    model = Model()
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(model.global_step))
    fit(model)
    assert seen == [0, 1, 2, 3]


def test_a_recurrent_state_is_carried_from_step_to_step_as_in_the_hand_written_loop() -> None:
    class Recurrent(leyden.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = torch.nn.GRU(2, 3)
            self.state: Tensor | None = None

        def on_train_epoch_start(self) -> None:
            self.state = None

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            output, state = self.rnn(batch, self.state)
            self.state = state.detach()  # truncated back-propagation through time
            return output.square().sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Recurrent()
    by_hand = copy.deepcopy(model)
    fit(model, max_epochs=2)

    optimizer = by_hand.configure_optimizers()
    for _ in range(2):
        state = None
        for batch in loader():
            optimizer.zero_grad()
            output, state = by_hand.rnn(batch, state)
            state = state.detach()
            output.square().sum().backward()
            optimizer.step()
    assert same(model, by_hand)
    assert model.state is not None
    assert torch.equal(model.state, state)


def test_a_custom_autograd_function_runs_backward() -> None:
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, inputs: Tensor) -> Tensor:
            return inputs.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return -grad

    class Reversed(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return Reverse.apply(self.head.bias).sum()

    model = Reversed()
    before = model.head.bias.item()
    fit(model)
    assert model.head.bias.item() == pytest.approx(before + 0.1 * BATCHES, abs=1e-6)


def test_printing_in_forward_is_seen_at_each_step(capsys: pytest.CaptureFixture[str]) -> None:
    class Talking(Model):
        def forward(self, inputs: Tensor) -> Tensor:
            print("shape", tuple(inputs.shape))
            return super().forward(inputs)

    fit(Talking())
    assert capsys.readouterr().out.splitlines() == ["shape (2, 2)"] * BATCHES


def test_print_writes_with_and_without_a_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model()
    model.print("alone", 1, sep="-")
    model.on_train_start = lambda: model.print("running")  # type: ignore[method-assign]
    fit(model)
    assert capsys.readouterr().out.splitlines() == ["alone-1", "running"]


def test_several_inputs_and_losses() -> None:
    class Pair(Model):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
            first, (second, third) = batch["first"], batch["rest"]
            losses = [self(part).square().mean() for part in (first, second, third)]
            return {"loss": sum(losses), "parts": torch.stack(losses)}  # type: ignore[dict-item]

    rows = [{"first": torch.ones(2), "rest": (torch.zeros(2), torch.ones(2))} for _ in range(8)]
    model = Pair()
    before = copy.deepcopy(model)
    trainer = leyden.Trainer(
        accelerator="cpu", logger=False, max_epochs=1, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(rows, batch_size=2))  # type: ignore[arg-type]
    assert trainer.global_step == 4
    assert not same(model, before)


# On its own


def test_without_a_trainer_it_stands_at_the_beginning() -> None:
    model = Model()
    assert (model.current_epoch, model.global_step, model.global_rank, model.local_rank) == (0, 0, 0, 0)
    assert (model.logger, model.loggers) == (None, [])
    assert model(torch.ones(2, 2)).shape == (2, 1)


def test_it_can_be_trained_by_a_hand_written_loop_to_the_same_weights() -> None:
    torch.manual_seed(1)
    model = Model()
    by_hand = copy.deepcopy(model)
    torch.manual_seed(2)
    fit(model, max_epochs=2)
    torch.manual_seed(2)
    optimizer = by_hand.configure_optimizers()
    for _ in range(2):
        for batch in loader():
            optimizer.zero_grad()
            by_hand(batch).square().mean().backward()
            optimizer.step()
    assert same(model, by_hand)


def test_after_fit_it_still_knows_its_trainer() -> None:
    model = Model()
    trainer = fit(model, max_epochs=3)
    assert model.trainer is trainer
    assert (model.current_epoch, model.global_step) == (3, 3 * BATCHES)


def test_all_gather_of_one_process_adds_a_dimension() -> None:
    model = Model()
    seen: list[Any] = []
    data = {"a": torch.ones(2), "b": [torch.zeros(()), "text"], "c": (1,)}
    model.on_train_start = lambda: seen.append(model.all_gather(data))  # type: ignore[method-assign]
    fit(model)
    assert seen[0]["a"].tolist() == [[1.0, 1.0]]
    assert (seen[0]["b"][0].tolist(), seen[0]["b"][1], seen[0]["c"]) == ([0.0], "text", (1,))


def test_toggling_lets_one_optimizer_learn_and_sets_everything_back() -> None:
    class Two(leyden.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.one, self.two, self.never = (torch.nn.Linear(2, 1) for _ in range(3))
            self.never.requires_grad_(False)
            self.seen: list[list[bool]] = []

        def flags(self) -> list[bool]:
            return [layer.weight.requires_grad for layer in (self.one, self.two, self.never)]

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            first, second = self.optimizers()
            self.toggle_optimizer(first)
            self.seen.append(self.flags())
            self.untoggle_optimizer(first)
            self.seen.append(self.flags())
            with second.toggle_model():
                self.seen.append(self.flags())
            self.seen.append(self.flags())

        def configure_optimizers(self) -> Any:
            both = [*self.two.parameters(), *self.never.parameters()]
            return torch.optim.SGD(self.one.parameters(), lr=0.1), torch.optim.SGD(both, lr=0.1)

    model = Two()
    fit(model, limit_train_batches=1)
    assert model.seen == [[True, False, False], [True, True, False], [False, True, False], [True, True, False]]
