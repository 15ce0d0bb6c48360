"""What is fused, what is not and why, and that a fused run computes what it is to: torch's own fused step by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import WeightAveraging
from leyden.fused import choose_kernels, fuse, has_kernel, load_optimizer, looks_at_fused, why_not
from quiet import make_trainer

Make = Callable[[Any], Optimizer]

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class OwnInit(AdamW):
    """Only its constructor is its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)


class OwnStep(Adam):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class OwnGroups(SGD):
    def _init_group(self, *args: Any) -> Any:
        return super()._init_group(*args)


class OwnParameter(nn.Parameter):
    pass


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    source = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=source).to(dtype)) for shape in ((6, 5), (7,), (), (3, 4, 2, 2))]


def choose(optimizer: Optimizer, module: nn.Module | None = None, **options: bool) -> Any:
    settings = {"wanted": True, "scales_loss": False, "hand_made": False}
    return choose_kernels([optimizer], module or nn.Module(), **(settings | options))[0]


# What is fused

FUSED: dict[str, Make] = {
    "Adam": Adam,
    "Adam, amsgrad": lambda params: Adam(params, lr=0.1, amsgrad=True, weight_decay=0.1),
    "Adam, tensor lr": lambda params: Adam(params, lr=torch.tensor(0.1, dtype=torch.float64)),
    "AdamW": AdamW,
    "AdamW, maximize": lambda params: AdamW(params, maximize=True),
    "Adagrad": lambda params: Adagrad(params, lr_decay=0.1),
    "SGD": lambda params: SGD(params, lr=0.1),
    "SGD, momentum": lambda params: SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "SGD, dampening": lambda params: SGD(params, lr=0.1, momentum=0.9, dampening=0.5),
    "a subclass that leaves step as it is": OwnInit,
    "two groups": lambda params: Adam([{"params": params[:2], "lr": 0.1}, {"params": params[2:]}], weight_decay=0.2),
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_fused_and_steps_like_torchs_own(name: str, dtype: torch.dtype) -> None:
    ours, theirs = FUSED[name](parameters(dtype)), FUSED[name](parameters(dtype))
    if isinstance(theirs, OwnInit):
        fused = AdamW(theirs.param_groups[0]["params"], lr=0.1, fused=True)
    else:  # as its constructor would have been called with fused=True
        groups = [{**group, "fused": True} for group in theirs.param_groups]
        fused = type(theirs)(groups, **{k: v for k, v in theirs.defaults.items() if k in ("lr_decay",)}, fused=True)  # type: ignore[call-arg]
    choice = choose(ours)
    assert choice.fused
    assert choice.line()[0] == f"fused=True for {type(ours).__name__}"
    assert [group["fused"] for group in ours.param_groups] == [True] * len(ours.param_groups)
    assert ours.defaults["fused"] is True
    three_steps(ours)
    three_steps(fused)
    assert_same(ours.state_dict(), fused.state_dict())
    for one, other in zip(of(ours), of(fused), strict=True):
        assert torch.equal(one, other)


def of(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def three_steps(optimizer: Optimizer, steps: int = 3) -> None:
    source = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in of(optimizer):
            gradient = torch.randn(parameter.shape, generator=source)
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer.step()


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-6), (torch.float64, 2e-14)])
def test_a_fused_run_is_close_to_the_unfused_one(name: str, dtype: torch.dtype, tolerance: float) -> None:
    fused, plain = FUSED[name](parameters(dtype)), FUSED[name](parameters(dtype))
    choose(fused)
    three_steps(fused, 100)
    three_steps(plain, 100)
    for one, other in zip(of(fused), of(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_plain_sgd_is_the_same_to_the_bit_and_with_momentum_in_the_first_step(momentum: float) -> None:
    fused, plain = (SGD(parameters(), lr=0.1, momentum=momentum) for _ in range(2))
    choose(fused)
    for optimizer in (fused, plain):
        three_steps(optimizer, 1 if momentum else 100)
    assert all(torch.equal(one, other) for one, other in zip(of(fused), of(plain), strict=True))


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW, Adagrad])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kernel_that_is_wrong_is_not_taken(kind: Any, dtype: torch.dtype) -> None:
    """torch 2.13's fused SGD leaves whole vectors of 16-bit numbers on the CPU as they are."""
    parameter = nn.Parameter(torch.ones(64, dtype=dtype))
    parameter.grad = torch.ones(64, dtype=dtype)
    kind([parameter], lr=0.5, fused=True).step()
    right = bool((parameter < 0.6).all())  # every one of these optimizers goes to 0.5
    assert has_kernel(kind, torch.device("cpu"), dtype) is right
    optimizer = kind(parameters(dtype), lr=0.1)
    assert choose(optimizer).fused is right
    plain = kind(parameters(dtype), lr=0.1)
    three_steps(optimizer)
    three_steps(plain)
    for one, other in zip(of(optimizer), of(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.03)


# What is not


def with_gaps() -> nn.Parameter:
    return nn.Parameter(torch.randn(4, 6)[:, ::2])


NOT_FUSED: dict[str, tuple[Make, str]] = {
    "LBFGS": (LBFGS, "torch has no fused ones for it"),
    "RMSprop": (RMSprop, "torch has no fused ones for it"),
    "NAdam": (NAdam, "torch has no fused ones for it"),
    "a step of its own": (OwnStep, "torch has no fused ones for it"),
    "groups of its own": (OwnGroups, "torch has no fused ones for it"),
    "fused=False": (lambda params: AdamW(params, fused=False), "as given: fused=False"),
    "fused=True": (lambda params: AdamW(params, fused=True), "as given: fused=True"),
    "foreach=True": (lambda params: Adam(params, foreach=True), "as given: foreach=True"),
    "foreach=False": (lambda params: Adagrad(params, foreach=False), "as given: foreach=False"),
    "one group": (
        lambda params: SGD([{"params": params[:1]}, {"params": params[1:], "fused": False}], lr=0.1),
        "as given: fused=False",
    ),
    "capturable": (lambda params: Adam(params, capturable=True), "as given: capturable=True"),
    "differentiable": (lambda params: SGD(params, lr=0.1, differentiable=True), "as given: differentiable=True"),
    "tensor betas": (
        lambda params: Adam(params, betas=(torch.tensor(0.9), torch.tensor(0.99))),
        "betas is a tensor, which fused ones would read on the host",
    ),
    "complex": (
        lambda params: Adam([*params, nn.Parameter(torch.ones(3, dtype=torch.complex64))]),
        "torch has no fused ones that are right for complex64 on cpu",
    ),
    "meta": (lambda _: Adam([nn.Parameter(torch.ones(3, device="meta"))]), "right for float32 on meta"),
    "gaps": (lambda params: Adam([*params, with_gaps()]), "do not lie side by side"),
    "expanded": (lambda _: SGD([nn.Parameter(torch.ones(1).expand(3))], lr=0.1), "do not lie side by side"),
    "own parameters": (lambda _: Adam([OwnParameter(torch.ones(3))]), "a parameter is a OwnParameter"),
    "lazy": (lambda _: Adam(nn.LazyLinear(3).parameters()), "a parameter is a UninitializedParameter"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("name", NOT_FUSED)
def test_is_left_as_it_is(name: str) -> None:
    make, reason = NOT_FUSED[name]
    optimizer = make(parameters())
    before = [{**group} for group in optimizer.param_groups]
    choice = choose(optimizer)
    assert not choice.fused
    assert reason in choice.reason
    assert choice.line() == (f"kernels of {type(optimizer).__name__}", choice.reason)
    for group, old in zip(optimizer.param_groups, before, strict=True):
        assert all(group[key] is value for key, value in old.items())
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_embeddings_are_seen_beforehand(kind: Any) -> None:
    module = nn.ModuleDict({"words": kind(4, 3, sparse=True), "out": nn.Linear(3, 1)})
    assert why_not(SGD(module.parameters(), lr=0.1), module) == "stay as they are: words has sparse gradients"
    assert why_not(SGD(module["out"].parameters(), lr=0.1), module) is None  # the table is not its own
    assert why_not(SGD(module.parameters(), lr=0.1), nn.ModuleDict({"words": kind(4, 3)})) is None


def test_off_leaves_everything_as_it_is() -> None:
    optimizer = AdamW(parameters())
    assert choose_kernels([optimizer], nn.Module(), wanted=False, scales_loss=False, hand_made=True) == []
    assert optimizer.param_groups[0]["fused"] is None
    assert not optimizer._optimizer_step_pre_hooks


# In a run


class Net(L.LightningModule):
    """Convolutions in channels_last, whose weights and state are not contiguous."""

    def __init__(self, make: Make = AdamW, last: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(18, 1))
        if last:
            self.net.to(memory_format=torch.channels_last)
        self.make = make

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return functional.mse_loss(self.net(inputs), targets)

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def images(count: int = 6) -> list[Any]:
    source = torch.Generator().manual_seed(2)
    return [(torch.randn(4, 3, 5, 5, generator=source), torch.randn(4, 1, generator=source)) for _ in range(count)]


def batches(count: int = 6) -> DataLoader[Any]:
    inputs, targets = (torch.cat(part) for part in zip(*images(count), strict=True))
    return DataLoader(TensorDataset(inputs, targets), batch_size=4)


def by_hand(net: Net, fused: bool | None, epochs: int = 1) -> Net:
    optimizer = net.configure_optimizers()
    for group in (optimizer.defaults, *optimizer.param_groups):
        group["fused"] = fused
    for _ in range(epochs):
        for batch in images():
            optimizer.zero_grad()
            net.training_step(batch, 0).backward()
            optimizer.step()
    return net


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, value), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


RUNS: dict[str, Make] = {
    "AdamW": AdamW,
    "SGD": lambda params: SGD(params, lr=0.05, momentum=0.9),
    "Adagrad": lambda params: Adagrad(params, lr=0.05),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_a_run_equals_the_loop_by_hand(name: str, last: bool, fused: bool, tmp_path: Path) -> None:
    module = Net(RUNS[name], last)
    trainer = make_trainer(tmp_path, fused_optimizer=fused)
    trainer.fit(module, batches())
    assert_same_weights(module, by_hand(Net(RUNS[name], last), True if fused else None))
    assert trainer.optimizers[0].param_groups[0]["fused"] is (True if fused else None)
    assert not torch.equal(module.net[0].weight, Net().net[0].weight)


def test_fused_and_unfused_runs_differ_by_rounding_only(tmp_path: Path) -> None:
    fused, plain = by_hand(Net(), True, 5), by_hand(Net(), None, 5)
    assert any(not torch.equal(one, other) for one, other in zip(fused.parameters(), plain.parameters(), strict=True))
    for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_fused_kernels_are_deterministic_with_threads(tmp_path: Path) -> None:
    class Wide(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(300, 300)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self) -> Optimizer:
            return AdamW(self.parameters())

    found = []
    for _ in range(2):
        module = Wide()
        data = DataLoader(TensorDataset(torch.linspace(0, 1, 2400).reshape(8, 300)), batch_size=2)
        try:
            make_trainer(tmp_path, deterministic=True, max_epochs=3).fit(module, data)
        finally:
            torch.use_deterministic_algorithms(False)
        found.append(module)
    assert_same_weights(*found)


class Manual(Net):
    """Gives the parameters gradients as autograd's functions return them: with any strides."""

    def __init__(self, make: Make) -> None:
        super().__init__(make, last=True)
        self.automatic_optimization = False
        self.layouts: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss = super().training_step(batch, batch_idx) + sum(each.sum() for each in self.parameters())
        optimizer, own = self.optimizers(), list(self.parameters())
        for parameter, gradient in zip(own, torch.autograd.grad(loss, own), strict=True):
            parameter.grad = gradient.contiguous() if batch_idx % 2 else gradient.mean().expand(gradient.shape)
            self.layouts.append(parameter.grad.stride() == parameter.stride())
        optimizer.step()


@pytest.mark.parametrize("name", RUNS)
def test_gradients_in_another_layout_are_brought_into_the_parameters(name: str, tmp_path: Path) -> None:
    fused, plain = Manual(RUNS[name]), Manual(RUNS[name])
    trainer = make_trainer(tmp_path)
    trainer.fit(fused, batches())
    make_trainer(tmp_path, fused_optimizer=False).fit(plain, batches())
    assert trainer.optimizers[0].param_groups[0]["fused"]
    assert not all(fused.layouts)
    for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Late(L.LightningModule):
    """Its second layer gets a gradient from the third batch on only."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.options = options

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.first(batch[0])
        return (self.second(hidden) if batch_idx >= 2 else hidden).square().mean()

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, **self.options)


@pytest.mark.parametrize(
    ("options", "fused"),
    [({}, True), ({"nesterov": True}, True), ({"maximize": True}, True), ({"dampening": 0.5}, False)],
)
def test_a_gradient_that_comes_late_begins_its_momentum(options: dict[str, Any], fused: bool, tmp_path: Path) -> None:
    module, plain = Late(**options), Late(**options)
    data = DataLoader(TensorDataset(torch.linspace(-1, 1, 36).reshape(12, 3)), batch_size=2)
    trainer = make_trainer(tmp_path)
    trainer.fit(module, data)
    make_trainer(tmp_path, fused_optimizer=False).fit(plain, data)
    assert bool(trainer.optimizers[0].param_groups[0]["fused"]) is fused
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert ("dampening" in trainer.explain(module)) is not fused


class Table(L.LightningModule):
    def __init__(self, make: Make) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3))
        self.make = make

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.embedding(torch.tensor([batch_idx % 4]), self.weight, sparse=True).square().sum()

    def configure_optimizers(self) -> Optimizer:
        return self.make([self.weight])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")  # torch's own Adagrad
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients_of_a_function_end_fusing(name: str, tmp_path: Path) -> None:
    module, plain = Table(RUNS[name]), Table(RUNS[name])
    trainer = make_trainer(tmp_path)
    trainer.fit(module, batches())
    make_trainer(tmp_path, fused_optimizer=False).fit(plain, batches())
    assert_same_weights(module, plain)
    assert trainer.optimizers[0].param_groups[0]["fused"] is None
    assert f"kernels of {name}" in trainer.explain(module)
    assert "unfused at the first sparse gradient" in trainer.explain(module)


def test_groups_that_are_added_later() -> None:
    optimizer = AdamW(parameters()[:2])
    choice = choose(optimizer)
    three_steps(optimizer, 1)
    optimizer.add_param_group({"params": parameters()[2:]})
    assert optimizer.param_groups[1]["fused"]
    three_steps(optimizer, 1)
    assert choice.fused
    odd = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer.add_param_group({"params": [odd]})
    odd.grad = torch.ones(3, dtype=torch.complex64)
    optimizer.step()
    assert not choice.fused
    assert "complex64" in choice.reason
    assert odd[0].item() != 1
    assert [group["fused"] for group in optimizer.param_groups] == [None] * 3


def test_the_look_ends_when_every_gradient_was_seen() -> None:
    """After that a step costs one call; where gradients are made by hand the look goes on."""
    for hand_made in (False, True):
        optimizer = AdamW(parameters())
        choose(optimizer, hand_made=hand_made)
        (hook,) = optimizer._optimizer_step_pre_hooks.values()
        assert looks_at_fused(hook)
        three_steps(optimizer, 1)
        optimizer.param_groups[0]["params"][0].grad = torch.ones(5, 6).t()
        hook(optimizer, (), {})
        seen = optimizer.param_groups[0]["params"][0].grad.stride() == (5, 1)
        assert seen is hand_made
    assert not looks_at_fused(print)


def turned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in the opposite order of memory."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def four_steps(optimizer: Optimizer, change: Any) -> list[torch.Tensor]:
    """The weights after four steps; ``change`` may do something to a parameter before the last two."""
    source = torch.Generator().manual_seed(1)
    own = optimizer.param_groups[0]["params"]
    for number in range(4):
        for each in own:
            gradient = torch.randn(each.shape, generator=source)
            each.grad = torch.empty_strided(each.shape, each.stride()).copy_(gradient)
            if number > 1:
                change(each)
        optimizer.step()
    return [each.detach() for each in own]


def turn_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = turned(parameter.grad)  # type: ignore[arg-type]


def turn_parameter(parameter: nn.Parameter) -> None:
    parameter.data, parameter.grad = turned(parameter.data), turned(parameter.grad)  # type: ignore[arg-type]


def nothing(parameter: nn.Parameter) -> None:
    """Leave the parameter as it is."""


def chosen_again(optimizer: Optimizer) -> Any:
    choose(optimizer)
    return choose(optimizer, hand_made=True), turn_gradient


def with_a_hook_before_steps(optimizer: Optimizer) -> Any:
    def turn(*_: Any) -> None:
        if optimizer.state:  # in the first step all gradients are looked at
            for each in optimizer.param_groups[0]["params"]:
                turn_gradient(each)

    optimizer.register_step_pre_hook(turn)
    return choose(optimizer), nothing


def with_a_hook_of_a_parameter(optimizer: Optimizer) -> Any:
    optimizer.param_groups[0]["params"][0].register_post_accumulate_grad_hook(turn_gradient)
    return choose(optimizer), turn_gradient


def with_parameters_in_another_layout(optimizer: Optimizer) -> Any:
    return choose(optimizer), turn_parameter


@pytest.mark.parametrize(
    "case",
    [chosen_again, with_a_hook_before_steps, with_a_hook_of_a_parameter, with_parameters_in_another_layout],
    ids=lambda case: case.__name__,
)
def test_layouts_that_change_in_the_course_of_a_run(case: Any) -> None:
    """A kernel on the CPU would take the elements in another order, and say nothing."""
    plain, fused = AdamW(parameters()), AdamW(parameters())
    choice, change = case(fused)
    for one, other in zip(four_steps(fused, change), four_steps(plain, nothing), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert choice.fused


def test_an_optimizer_of_an_earlier_run_is_chosen_for_anew() -> None:
    optimizer = AdamW(parameters())
    first = choose(optimizer)
    three_steps(optimizer, 1)
    assert choose(optimizer).line() == first.line()
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_load_state_dict_post_hooks) == 1
    assert choose_kernels([optimizer], nn.Module(), wanted=False, scales_loss=False, hand_made=False) == []
    assert [group["fused"] for group in [optimizer.defaults, *optimizer.param_groups]] == [None, None]
    assert not optimizer._optimizer_step_pre_hooks


# fp16 and its loss scaler


class Overflows(Net):
    def __init__(self, make: Make) -> None:
        super().__init__(make)
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (float("inf") if batch_idx in (0, 3) else 1.0)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("given", [None, True])
@pytest.mark.parametrize("manual", [False, True])
def test_a_step_that_the_scaler_skips_is_no_step(given: bool | None, manual: bool, tmp_path: Path) -> None:
    class ByHand(Overflows):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            self.optimizers().minimize(super().training_step(batch, batch_idx))
            moved.append(self._run.moved)

    moved: list[bool] = []
    module = (ByHand if manual else Overflows)(lambda params: AdamW(params, lr=0.001, fused=given))
    module.automatic_optimization = not manual
    steps: list[int] = []

    class Average(WeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            if step_idx is not None:
                steps.append(step_idx)
            return False

    trainer = make_trainer(tmp_path, Average(), precision="16-mixed")
    trainer.fit(module, batches())
    if manual:
        assert moved == [False, True, True, False, True, True]
    else:
        assert [rate * 1000 for rate in module.rates] == [1.0, 1.0, 0.5, 0.25, 0.25, 0.125]
    assert steps == [1, 2, 4, 5]
    assert trainer.optimizers[0].state_dict()["state"][0]["step"] == 4


# Checkpoints


def saved_by(make: Make, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    optimizer = make(parameters(dtype))
    for group in optimizer.param_groups:
        group.update(options)
    three_steps(optimizer)
    return copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("name", ["AdamW", "SGD, momentum", "Adagrad"])
@pytest.mark.parametrize("of_file", [True, False, None, "missing", "foreach"])
@pytest.mark.parametrize("here", [True, False, None])
def test_a_loaded_state_leaves_the_choice_of_kernels(name: str, of_file: Any, here: bool | None) -> None:
    saved = saved_by(FUSED[name], **({"foreach": True} if of_file == "foreach" else {}))
    if of_file == "missing":
        del saved["param_groups"][0]["fused"]
    elif of_file != "foreach":
        saved["param_groups"][0]["fused"] = of_file
    before = copy.deepcopy(saved)
    optimizer = FUSED[name](parameters())
    optimizer.param_groups[0]["fused"] = here
    load_optimizer(optimizer, saved)
    assert_same(saved, before)
    assert optimizer.param_groups[0]["fused"] is here
    assert optimizer.param_groups[0]["foreach"] is None
    for index, parameter in enumerate(of(optimizer)):
        for key, value in saved["state"][index].items():
            assert torch.equal(optimizer.state[parameter][key], value)
    three_steps(optimizer)


def test_a_step_count_in_fp64_becomes_what_kernels_read() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        optimizers = Adagrad(parameters()), Adagrad(parameters())
        saved = saved_by(Adagrad)
    finally:
        torch.set_default_dtype(torch.float32)
    for index, optimizer in enumerate(optimizers):
        assert optimizer.state[of(optimizer)[0]]["step"].dtype is torch.float64
        if index:
            fuse(optimizer)
        else:
            choose(optimizer)
            load_optimizer(optimizer, saved)
        assert all(state["step"].dtype is torch.float32 for state in optimizer.state.values())
        assert optimizer.state[of(optimizer)[0]]["step"] == (0 if index else 3)
        three_steps(optimizer)


def test_a_state_that_the_users_code_loads_does_not_unfuse() -> None:
    optimizer = AdamW(parameters())
    choose(optimizer)
    three_steps(optimizer, 1)
    optimizer.load_state_dict(saved_by(AdamW))
    assert optimizer.param_groups[0]["fused"]
    plain = AdamW(parameters())
    plain.load_state_dict(saved_by(AdamW))
    for each in (optimizer, plain):
        with torch.no_grad():
            for parameter, value in zip(of(each), parameters(), strict=True):
                parameter.copy_(value)
        three_steps(each)
    for one, other in zip(of(optimizer), of(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [AdamW, Adagrad])
def test_state_that_was_read_contiguous_is_laid_out_as_its_parameter(kind: Any) -> None:
    """Fused kernels on the CPU walk through memory without looking at strides."""
    fused, plain = (kind([nn.Parameter(parameters()[3].to(memory_format=torch.channels_last))]) for _ in range(2))
    first = kind([nn.Parameter(parameters()[3].to(memory_format=torch.channels_last))])
    three_steps(first)
    saved = first.state_dict()
    for key, value in saved["state"][0].items():
        saved["state"][0][key] = value.contiguous()
    choose(fused)
    for optimizer in (fused, plain):
        load_optimizer(optimizer, copy.deepcopy(saved))
        (state,) = optimizer.state.values()
        assert all(value.stride() == of(optimizer)[0].stride() for value in state.values() if value.dim())
        three_steps(optimizer)
    torch.testing.assert_close(of(fused)[0], of(plain)[0], rtol=1e-5, atol=1e-6)


def changes_layout(module: L.LightningModule) -> None:
    module.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("hook", [None, "on_fit_start", "on_train_start"])
def test_a_run_goes_on_exactly(name: str, before: bool, after: bool, hook: str | None, tmp_path: Path) -> None:
    """One epoch with each choice; a hook may change the layout when the state has been loaded."""

    class Laid(Net):
        def __init__(self) -> None:
            super().__init__(RUNS[name], last=hook is None)

    if hook is not None:
        setattr(Laid, hook, changes_layout)
    trainer = make_trainer(tmp_path, fused_optimizer=before)
    trainer.fit(Laid(), batches())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    module = Laid()
    resumed = make_trainer(tmp_path, fused_optimizer=after, max_epochs=2)
    resumed.fit(module, batches(), ckpt_path=str(tmp_path / "one.ckpt"))
    assert resumed.optimizers[0].param_groups[0]["fused"] is (True if after else None)

    hand = Net(RUNS[name], last=True)
    optimizer = hand.configure_optimizers()
    for choice in (before, after):
        optimizer.param_groups[0]["fused"] = choice or None
        for batch in images():
            optimizer.zero_grad()
            hand.training_step(batch, 0).backward()
            optimizer.step()
    assert_same_weights(module, hand)


# What is shown


def test_explain_states_the_rule_and_then_the_fact(tmp_path: Path) -> None:
    module, trainer = Net(), make_trainer(tmp_path)
    rule = "default: torch's fused kernels for AdamW, Adam, SGD, Adagrad, where they were left open"
    assert f"fused_optimizer=True                {rule}" in trainer.explain(module)
    trainer.fit(module, batches(1))
    fact = "default: torch's fused kernels; fused_optimizer=False leaves torch's own choice"
    assert f"fused=True for AdamW                {fact}" in trainer.explain(module)
    assert rule not in trainer.explain(module)


def test_explain_says_why_not(tmp_path: Path) -> None:
    module = Net(lambda params: Adam(params, foreach=False))
    trainer = make_trainer(tmp_path)
    trainer.fit(module, batches(1))
    assert "kernels of Adam                     as given: foreach=False" in trainer.explain(module)
    off = make_trainer(tmp_path, fused_optimizer=False)
    assert "fused_optimizer=False               given" in off.explain(module)
    off.fit(module, batches(1))
    assert "kernels" not in off.explain(module)


# On a GPU


@gpu
@needs_cuda
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_a_run_on_a_gpu_is_fused(name: str, last: bool, precision: str, tmp_path: Path) -> None:
    """1x1 convolutions in channels_last have gradients whose strides are not the weights'."""
    found = []
    for fused in (True, False):
        module = Net(RUNS[name], last)
        trainer = make_trainer(tmp_path, accelerator="cuda", precision=precision, fused_optimizer=fused, max_epochs=2)
        trainer.fit(module, batches())
        found.append((module, trainer))
    (fused, trainer), (plain, _) = found
    assert trainer.optimizers[0].param_groups[0]["fused"]
    tolerance = 0.05 if precision == "bf16-true" else 2e-3
    for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@gpu
@needs_cuda
@pytest.mark.parametrize("kind", [AdamW, Adagrad])
@pytest.mark.parametrize(("before", "after"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
@pytest.mark.parametrize("fused", [True, False])
def test_step_counts_follow_the_device(kind: Any, before: str, after: str, fused: bool, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, accelerator=before)
    trainer.fit(Net(kind), batches())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = make_trainer(tmp_path, accelerator=after, max_epochs=2, fused_optimizer=fused)
    resumed.fit(Net(kind), batches(), ckpt_path=str(tmp_path / "one.ckpt"))
    for state in resumed.optimizers[0].state.values():
        assert state["step"] == 12
        assert state["step"].device.type == (after if fused else "cpu")
