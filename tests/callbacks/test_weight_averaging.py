"""Averages of the weights: against hand-written loops, closed forms and runs without them, bit by bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quiet import make_trainer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import leyden as L
from leyden.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from leyden.errors import ConfigurationError, LeydenWarning

torch.set_num_threads(1)
State = dict[str, Tensor]


class Net(L.LightningModule):
    """A small network; `history` has its state after each optimizer step, `validated` the one each validation saw."""

    def __init__(self, norm: bool = False, frozen: int = 0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()
        self.last = nn.Linear(4, 1)
        self.frozen = nn.ParameterList(nn.Parameter(torch.randn(2), requires_grad=False) for _ in range(frozen))
        self.history: list[State] = []
        self.validated: list[State] = []
        self.raising = False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.first(x)).tanh())
        return y

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return (self(batch) - batch.sum(1, keepdim=True)).square().mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step > len(self.history):
            self.history.append(snapshot(self))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 0:
            self.validated.append(snapshot(self))
        if self.raising:
            raise RuntimeError("validation broke")
        self.log("val", (self(batch) - batch.sum(1, keepdim=True)).square().mean())

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("tested", self(batch).mean())

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def snapshot(module: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def loader(batches: int = 4) -> DataLoader[Any]:
    data: Any = torch.randn(batches * 2, 3, generator=torch.Generator().manual_seed(1))
    return DataLoader(data, batch_size=2)


def fit(folder: Path, net: L.LightningModule, *callbacks: L.Callback, path: Any = None, **options: Any) -> L.Trainer:
    trainer = make_trainer(folder, *callbacks, **options)
    trainer.fit(net, loader(), loader(1), ckpt_path=path)
    return trainer


def ema_of(states: Sequence[State], decay: float) -> State:
    """The recursion, written out."""
    average = dict(states[0])
    for state in states[1:]:
        for name, value in state.items():
            if value.is_floating_point():
                average[name] = torch.lerp(average[name], value, 1 - decay)
            else:
                average[name] = value
    return average


def mean_of(states: Sequence[State]) -> State:
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(value.dtype)
        for name, value in states[0].items()
    }


def assert_equal(first: Any, second: Any) -> None:
    """Bit by bit."""
    assert list(first) == list(second)
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


def assert_close(first: State, second: State) -> None:
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], msg=lambda text, name=name: f"{name}: {text}")


class Copies(TorchDispatchMode):
    """Counts the copies into tensors, and how many tensors they went into."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "_foreach_copy_" in name:
            self.tensors += len(args[0])
        elif "copy_" in name:
            self.tensors += 1
        return func(*args, **(kwargs or {}))


class CountValidation(L.Callback):
    """Counts the copies that swapping in makes: comes first and last around the averaging callback."""

    def __init__(self, averaging: WeightAveraging) -> None:
        self.averaging, self.copied = averaging, []
        swap_in = averaging.on_validation_start

        def counted(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            with Copies() as copies:
                swap_in(trainer, pl_module)
            self.copied.append(copies.tensors)

        averaging.on_validation_start = counted  # type: ignore[method-assign]

    copied: list[int]


# What is averaged


def test_ema_is_the_closed_form(tmp_path: Path) -> None:
    net = Net()
    fit(tmp_path, net, EMAWeightAveraging(decay=0.8), max_epochs=2)
    assert len(net.history) == 8
    weights = [0.8**7, *(0.2 * 0.8 ** (7 - i) for i in range(1, 8))]
    assert sum(weights) == pytest.approx(1)
    for name, value in net.state_dict().items():
        expected = sum(w * state[name].double() for w, state in zip(weights, net.history, strict=True))
        torch.testing.assert_close(value, expected.float())
    assert_equal(net.state_dict(), ema_of(net.history, 0.8))


def test_the_default_is_the_mean(tmp_path: Path) -> None:
    net = Net()
    fit(tmp_path, net, WeightAveraging(), max_epochs=2)
    assert_close(net.state_dict(), mean_of(net.history))


@pytest.mark.parametrize(
    "kwargs", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.7)}, {"avg_fn": lambda a, v, n: a * 0.5 + v * 0.5}]
)
def test_it_is_what_torchs_averaged_model_gives(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    class Beside(L.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            twin = Net(norm=True)
            twin.load_state_dict(pl_module.state_dict())
            self.averaged = AveragedModel(twin, use_buffers=True, **kwargs)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.averaged.update_parameters(pl_module)

    beside, net = Beside(), Net(norm=True)
    fit(tmp_path, net, WeightAveraging(**kwargs), beside, max_epochs=2)
    mine, theirs = net.state_dict(), beside.averaged.module.state_dict()
    for name in mine:
        if mine[name].is_floating_point():  # theirs averages the counter of batches as well
            torch.testing.assert_close(mine[name], theirs[name])
    assert mine["norm.num_batches_tracked"] == 8


def test_the_second_argument_is_how_many_values_are_averaged(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    fit(tmp_path, Net(), WeightAveraging(multi_avg_fn=lambda a, v, n: seen.append((len(a), n))))
    assert seen == [(4, 1), (4, 2), (4, 3)]  # the first update copies; then one call for all tensors


@pytest.mark.parametrize("use_buffers", [True, False])
def test_batch_norm(tmp_path: Path, use_buffers: bool) -> None:
    net = Net(norm=True)
    fit(tmp_path, net, EMAWeightAveraging(decay=0.8, use_buffers=use_buffers), max_epochs=2)
    expected = ema_of(net.history, 0.8)
    if not use_buffers:
        expected |= {name: net.history[-1][name] for name, _ in net.named_buffers()}
    assert_equal(net.state_dict(), expected)
    assert_equal(net.validated[-1], expected)


def test_infinite_integer_and_8_bit_buffers_are_the_modules_own(tmp_path: Path) -> None:
    class Masked(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
            self.register_buffer("validations", torch.tensor(0))
            self.register_buffer("eight_bits", torch.ones(2).to(torch.float8_e4m3fn))

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.validations += 1

    net = Masked()
    fit(tmp_path, net, EMAWeightAveraging(decay=0.5), max_epochs=3)
    assert net.mask.tolist() == [0.0, -torch.inf]
    assert net.validations == 3


def test_buffers_that_are_assigned_anew(tmp_path: Path) -> None:
    class Assigning(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))
            self.register_buffer("scratch", torch.zeros(0))

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.seen = self.seen + 1
            return super().training_step(batch, batch_idx)

    net = Assigning()
    fit(tmp_path, net, WeightAveraging())
    assert net.seen.item() == pytest.approx((1 + 2 + 3 + 4) / 4)

    class Growing(Assigning):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.scratch = torch.ones(batch_idx)
            return super().training_step(batch, batch_idx)

    net = Growing()
    with pytest.warns(LeydenWarning, match=r"averages of scratch are dropped: they changed their shape") as caught:
        fit(tmp_path, net, WeightAveraging())
    assert len(caught) == 1
    assert net.scratch.shape == (3,)
    assert net.seen.item() == pytest.approx(2.5)


def test_tied_weights_are_averaged_once_and_stay_tied(tmp_path: Path) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.alias = self.first

    net, calls = Tied(), []
    averaging = WeightAveraging(multi_avg_fn=lambda a, v, n: calls.append(len(a)))
    trainer = fit(tmp_path, net, averaging)
    assert calls == [4, 4, 4]
    assert net.alias.weight is net.first.weight
    net, trainer = Tied(), make_trainer(tmp_path, EMAWeightAveraging(decay=0.5), SaveAt(tmp_path, 3))
    trainer.fit(net, loader(), loader(1))
    for key, expected in (("state_dict", ema_of(net.history[:3], 0.5)), ("current_model_state", net.history[2])):
        assert_equal(L.load_checkpoint(tmp_path / "3.ckpt")[key], expected)


def test_frozen_parameters_are_left_alone(tmp_path: Path) -> None:
    net, averaging = Net(frozen=16), EMAWeightAveraging(decay=0.5)
    before = snapshot(net)
    versions = [parameter._version for parameter in net.frozen]
    counting = CountValidation(averaging)
    fit(tmp_path, net, averaging, max_epochs=3)
    assert counting.copied == [4, 4, 4]
    assert [parameter._version for parameter in net.frozen] == versions
    assert_equal(
        {name: value for name, value in net.state_dict().items() if "frozen" in name},
        {name: value for name, value in before.items() if "frozen" in name},
    )


@pytest.mark.parametrize("average", ["ema", "mean"])
def test_unfrozen_later_it_is_averaged_as_if_it_had_been_from_the_start(tmp_path: Path, average: str) -> None:
    class Unfreezing(Net):
        def __init__(self) -> None:
            super().__init__()
            self.first.requires_grad_(False)

        def on_train_epoch_start(self) -> None:  # after the callbacks' own
            self.first.requires_grad_(self.trainer.current_epoch > 0)

    net = Unfreezing()
    fit(tmp_path, net, EMAWeightAveraging(decay=0.8) if average == "ema" else WeightAveraging(), max_epochs=2)
    assert_close(net.state_dict(), ema_of(net.history, 0.8) if average == "ema" else mean_of(net.history))


def test_parameters_come_and_go_between_epochs(tmp_path: Path) -> None:
    class Changing(Net):
        def on_train_epoch_start(self) -> None:
            if self.trainer.current_epoch == 1:
                self.added = nn.Linear(1, 1)
                self.trainer.optimizers[0].add_param_group({"params": list(self.added.parameters())})
                self.frozen = nn.ParameterList()

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss + self.added(batch[:, :1]).square().mean() if hasattr(self, "added") else loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.history.append(snapshot(self))

    net = Changing(frozen=1)
    net.frozen[0].requires_grad_(True)
    with pytest.warns(LeydenWarning, match=r"averages of frozen\.0 are dropped: they are no longer in the module"):
        fit(tmp_path, net, WeightAveraging(), max_epochs=2)
    late = [name for name in net.history[-1] if name.startswith("added")]
    assert late
    finished = net.state_dict()
    new = [{name: state[name] for name in late} for state in net.history[4:]]
    assert_close({name: finished[name] for name in late}, mean_of(new))
    old = [{name: state[name] for name in finished if name not in late} for state in net.history]
    assert_close({name: value for name, value in finished.items() if name not in late}, mean_of(old))


# When


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    net = Net()
    fit(tmp_path, net, EMAWeightAveraging(decay=0.8), max_epochs=2, accumulate_grad_batches=3)
    assert len(net.history) == 4
    assert_equal(net.state_dict(), ema_of(net.history, 0.8))


def test_a_step_that_the_loss_scaler_skips_is_not_averaged(tmp_path: Path) -> None:
    class Overflowing(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * torch.inf if batch_idx == 1 else loss

    net = Overflowing()
    states = [snapshot(net)]
    fit(tmp_path, net, WeightAveraging(), precision="16-mixed", max_epochs=2)
    states += net.history
    moved = [new for old, new in pairwise(states) if not torch.equal(old["last.bias"], new["last.bias"])]
    assert len(net.history) == 8
    assert 2 <= len(moved) <= 6
    assert_close(net.state_dict(), mean_of(moved))


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            if batch_idx == 2:
                return  # no optimizer steps, so this is no step
            for optimizer in self.optimizers():
                with optimizer.toggle_model():
                    optimizer.minimize(super().training_step(batch, batch_idx))

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(each.parameters(), 0.1) for each in (self.first, self.last)]

    net = Manual()
    fit(tmp_path, net, EMAWeightAveraging(decay=0.8), max_epochs=2)
    assert len(net.history) == 6
    assert_equal(net.state_dict(), ema_of(net.history, 0.8))


def test_own_should_update_by_step_and_by_epoch(tmp_path: Path) -> None:
    asked: list[tuple[int | None, int | None]] = []

    class Mine(WeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            asked.append((step_idx, epoch_idx))
            return epoch_idx is not None

    net = Net()
    fit(tmp_path, net, Mine(), max_epochs=2)
    assert asked == [*((i, None) for i in range(4)), (None, 0), *((i, None) for i in range(4, 8)), (None, 1)]
    assert_close(net.state_dict(), mean_of([net.history[3], net.history[7]]))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, range(12)),
        ({"update_every_n_steps": 3}, [0, 3, 6, 9]),
        ({"update_starting_at_step": 5}, range(5, 12)),
        ({"update_starting_at_epoch": 1}, range(4, 12)),
        ({"update_starting_at_epoch": 1, "update_starting_at_step": 6, "update_every_n_steps": 4}, [8]),
        ({"update_every_n_steps": 0}, [3, 7, 11]),
        ({"update_every_n_steps": 0, "update_starting_at_epoch": 1}, [7, 11]),
        ({"update_every_n_steps": 0, "update_starting_at_step": 5}, [7, 11]),
    ],
)
def test_which_steps_ema_averages(tmp_path: Path, options: dict[str, int], steps: Sequence[int]) -> None:
    net = Net()
    fit(tmp_path, net, EMAWeightAveraging(decay=0.8, **options), max_epochs=3)
    assert_equal(net.state_dict(), ema_of([net.history[step] for step in steps], 0.8))


@pytest.mark.parametrize("options", [{"update_starting_at_step": 8}, {"update_starting_at_epoch": 2}])
def test_before_the_first_update_nothing_is_swapped(tmp_path: Path, options: dict[str, int]) -> None:
    net, averaging = Net(), EMAWeightAveraging(decay=0.8, **options)
    counting = CountValidation(averaging)
    fit(tmp_path, net, averaging, max_epochs=4)
    assert counting.copied == [0, 0, 4, 4]
    for epoch in (0, 1):
        assert_equal(net.validated[epoch], net.history[4 * epoch + 3])
    assert_equal(net.validated[2], ema_of(net.history[8:12], 0.8))


def test_without_an_update_the_module_keeps_its_weights(tmp_path: Path) -> None:
    net, averaging = Net(), EMAWeightAveraging(update_starting_at_step=100)
    trainer = fit(tmp_path, net, averaging)
    assert_equal(net.state_dict(), net.history[-1])
    trainer.save_checkpoint(tmp_path / "raw.ckpt")
    checkpoint = L.load_checkpoint(tmp_path / "raw.ckpt")
    assert "current_model_state" not in checkpoint
    assert_equal(checkpoint["state_dict"], net.history[-1])


# Training is what it would be without


@pytest.mark.parametrize(
    "options", [{}, {"val_check_interval": 2, "accumulate_grad_batches": 2}, {"precision": "bf16-true"}]
)
def test_training_is_what_it_is_without_the_callback(tmp_path: Path, options: dict[str, Any]) -> None:
    plain, averaged = Net(norm=True), Net(norm=True)
    fit(tmp_path, plain, max_epochs=3, **options)
    fit(tmp_path, averaged, EMAWeightAveraging(decay=0.5), max_epochs=3, **options)
    assert len(plain.history) == len(averaged.history)
    for first, second in zip(plain.history, averaged.history, strict=True):
        assert_equal(first, second)
    assert_equal(averaged.state_dict(), ema_of(averaged.history, 0.5))  # in the parameters' own dtype


@pytest.mark.parametrize("raising", ["validation_step", "on_validation_end"])
def test_the_raw_weights_come_back_when_validation_raises(tmp_path: Path, raising: str) -> None:
    class Raises(L.Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1 and raising == "on_validation_end":
                raise RuntimeError("validation broke")

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.raising = trainer.current_epoch == 1 and raising == "validation_step"

    net, averaging = Net(norm=True), EMAWeightAveraging(decay=0.5)
    trainer = make_trainer(tmp_path, averaging, Raises(), max_epochs=3)
    with pytest.raises(RuntimeError, match="validation broke"):
        trainer.fit(net, loader(), loader(1))
    assert_equal(net.validated[-1], ema_of(net.history, 0.5))
    assert_equal(net.state_dict(), net.history[-1])
    assert not any(parameter.is_inference() for parameter in net.parameters())
    net.raising = False
    fit(tmp_path, net, EMAWeightAveraging(decay=0.5))  # and it can be trained on


def test_the_sanity_check_swaps_nothing(tmp_path: Path) -> None:
    net, averaging = Net(), EMAWeightAveraging(decay=0.5)
    before, counting = snapshot(net), CountValidation(averaging)
    fit(tmp_path, net, averaging, num_sanity_val_steps=1)
    assert counting.copied == [0, 4]
    assert_equal(net.validated[0], before)
    assert_equal(net.validated[1], net.state_dict())


# Checkpoints


class SaveAt(L.Callback):
    """Saves `<step>.ckpt` at the boundaries after the given steps; weights only if asked to."""

    def __init__(self, folder: Path, *steps: int, weights_only: bool = False) -> None:
        self.folder, self.steps, self.weights_only = folder, steps, weights_only

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step in self.steps:
            path = self.folder / f"{step}.ckpt"
            trainer.at_step_boundary(lambda: trainer.save_checkpoint(path, self.weights_only))


def make_ema() -> WeightAveraging:
    return EMAWeightAveraging(decay=0.8)


@pytest.mark.parametrize("make", [make_ema, WeightAveraging], ids=["ema", "mean"])
@pytest.mark.parametrize("step", range(1, 9))
def test_resume_is_exact(tmp_path: Path, make: Callable[[], WeightAveraging], step: int) -> None:
    whole = Net(norm=True)
    fit(tmp_path, whole, make(), SaveAt(tmp_path, step, 12), max_epochs=3)
    resumed, averaging = Net(norm=True), make()
    nn.init.zeros_(resumed.first.weight)
    resumed.history = whole.history[:step]
    (tmp_path / "12.ckpt").rename(tmp_path / "whole.ckpt")
    fit(tmp_path, resumed, averaging, SaveAt(tmp_path, 12), path=tmp_path / f"{step}.ckpt", max_epochs=3)
    for first, second in zip(whole.history, resumed.history, strict=True):
        assert_equal(first, second)
    for first, second in zip(reversed(whole.validated), reversed(resumed.validated), strict=False):
        assert_equal(first, second)
    assert_equal(whole.state_dict(), resumed.state_dict())
    one, other = (L.load_checkpoint(tmp_path / name) for name in ("whole.ckpt", "12.ckpt"))
    for key in ("state_dict", "current_model_state"):
        assert_equal(one[key], other[key])
    one, other = one["callbacks"]["WeightAveraging"], other["callbacks"]["WeightAveraging"]
    assert_equal(one.pop("averages"), other.pop("averages"))
    assert one == other
    assert one["updates"] == 12


def test_a_checkpoint_of_after_fit_goes_on_exactly(tmp_path: Path) -> None:
    whole, first, second = Net(), Net(), Net()
    fit(tmp_path, whole, make_ema(), max_epochs=4)
    trainer = fit(tmp_path, first, make_ema(), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert_equal(L.load_checkpoint(tmp_path / "end.ckpt")["state_dict"], first.state_dict())
    fit(tmp_path, second, make_ema(), path=tmp_path / "end.ckpt", max_epochs=4)
    assert_equal(whole.state_dict(), second.state_dict())
    third = Net()
    fit(tmp_path, third, make_ema(), path=tmp_path / "end.ckpt", max_epochs=2)  # nothing is left to train
    assert_equal(first.state_dict(), third.state_dict())


def test_a_checkpoint_of_after_a_failure_goes_on_exactly(tmp_path: Path) -> None:
    class Fails(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            if self.trainer.current_epoch == 1:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    whole, failed, resumed = Net(), Fails(), Net()
    fit(tmp_path, whole, make_ema(), max_epochs=2)
    trainer = make_trainer(tmp_path, make_ema(), SaveAt(tmp_path, 4), max_epochs=2)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(failed, loader(), loader(1))
    assert_equal(failed.state_dict(), whole.history[3])
    fit(tmp_path, resumed, make_ema(), path=tmp_path / "4.ckpt", max_epochs=2)
    assert_equal(resumed.state_dict(), whole.state_dict())


def test_a_rollback_takes_the_averages_back_too(tmp_path: Path) -> None:
    class Diverging(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * torch.nan if (self.trainer.current_epoch, batch_idx) == (1, 2) else loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.history.append(snapshot(self))

    net = Diverging()
    keep = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=4, save_top_k=-1)
    with pytest.warns(LeydenWarning, match="from step 6 back to step 4"):
        fit(tmp_path, net, make_ema(), keep, max_epochs=2, enable_checkpointing=True, nan_policy="rollback")
    assert_equal(net.history[6], net.history[3])
    assert_equal(net.state_dict(), ema_of([*net.history[:4], net.history[7]], 0.8))


def test_unfreezing_after_a_resume(tmp_path: Path) -> None:
    class Unfreezing(Net):
        def on_train_epoch_start(self) -> None:
            self.first.requires_grad_(self.trainer.current_epoch > 0)

    whole, resumed = Unfreezing(), Unfreezing()
    fit(tmp_path, whole, WeightAveraging(), SaveAt(tmp_path, 4), max_epochs=2)
    fit(tmp_path, resumed, WeightAveraging(), path=tmp_path / "4.ckpt", max_epochs=2)
    assert_equal(whole.state_dict(), resumed.state_dict())
    assert_close(whole.state_dict(), mean_of(whole.history))


def test_a_save_while_the_averages_are_in_the_module(tmp_path: Path) -> None:
    class SaveInValidation(L.Callback):
        def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"swapped-{trainer.current_epoch}.ckpt")

    net = Net(norm=True)
    fit(tmp_path, net, make_ema(), SaveInValidation(), max_epochs=2)
    checkpoint = L.load_checkpoint(tmp_path / "swapped-0.ckpt")
    assert_equal(checkpoint["state_dict"], ema_of(net.history[:4], 0.8))
    assert_equal(checkpoint["current_model_state"], net.history[3])
    averages = checkpoint["callbacks"]["WeightAveraging"]["averages"]
    assert_equal(averages, {name: checkpoint["state_dict"][name] for name in averages})


def test_what_files_hold(tmp_path: Path) -> None:
    net = Net(norm=True, frozen=16)
    saves = SaveAt(tmp_path, 3, weights_only=True)
    fit(tmp_path, net, make_ema(), SaveAt(tmp_path, 2), saves, max_epochs=1)
    weights, whole = L.load_checkpoint(tmp_path / "3.ckpt"), L.load_checkpoint(tmp_path / "2.ckpt")
    assert_equal(weights["state_dict"], ema_of(net.history[:3], 0.8))
    assert "current_model_state" not in weights
    assert "callbacks" not in weights
    assert_equal(whole["state_dict"], ema_of(net.history[:2], 0.8))
    assert_equal(whole["current_model_state"], net.history[1])
    assert whole["state_dict"]._metadata == whole["current_model_state"]._metadata == net.state_dict()._metadata

    from safetensors import safe_open

    with safe_open(tmp_path / "2.ckpt", "pt") as file:
        names = [name for name in file.keys() if not name.startswith(("optimizer.", "random_state"))]  # noqa: SIM118
    averaged = [name for name, value in net.named_parameters() if value.requires_grad]
    averaged += ["norm.running_mean", "norm.running_var"]
    assert sorted(name for name in names if name.startswith("module.")) == sorted(
        f"module.{name}" for name in net.state_dict()
    )
    assert sorted(name.removeprefix("current_model_state.") for name in names if "current" in name) == sorted(averaged)
    assert not [name for name in names if "callbacks" in name]  # the averages are those of state_dict


def test_averaged_buffers_that_are_not_in_the_state_dict_survive_a_resume(tmp_path: Path) -> None:
    class Hidden(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("hidden", torch.zeros(1), persistent=False)
            self.shown: list[float] = []

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.hidden.fill_(self.trainer.global_step)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.shown.append(self.hidden.item())

    whole, resumed = Hidden(), Hidden()
    fit(tmp_path, whole, WeightAveraging(), SaveAt(tmp_path, 6), max_epochs=2)
    assert whole.shown == [pytest.approx(1.5), pytest.approx(3.5)]
    fit(tmp_path, resumed, WeightAveraging(), path=tmp_path / "6.ckpt", max_epochs=2)
    assert resumed.shown == whole.shown[1:]


def test_load_from_checkpoint_and_the_other_verbs_use_the_averages(tmp_path: Path) -> None:
    net = Net(norm=True)
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", monitor="val", save_top_k=1)
    averaging = make_ema()
    trainer = make_trainer(tmp_path, keep, averaging, max_epochs=3, enable_checkpointing=True)
    assert trainer.callbacks[0] is averaging
    assert trainer.callbacks[-1] is keep
    trainer.fit(net, loader(), loader(1))
    finished = snapshot(net)
    best = min(range(3), key=lambda epoch: validated_loss(net.validated[epoch]))
    expected = net.validated[best]
    assert_equal(expected, ema_of(net.history[: 4 * best + 4], 0.8))
    assert_equal(Net.load_from_checkpoint(keep.best_model_path, norm=True).state_dict(), expected)

    trainer.validate(net, loader(1), verbose=False)
    assert_equal(net.validated[-1], finished)
    assert_equal(net.state_dict(), finished)
    trainer.test(net, loader(1), ckpt_path="best", verbose=False)
    assert_equal(net.state_dict(), expected)
    [prediction] = trainer.predict(net, loader(1), ckpt_path="best") or []
    twin = Net(norm=True).eval()
    twin.load_state_dict(expected)
    assert torch.equal(prediction, twin(next(iter(loader(1)))).detach())

    other = make_trainer(tmp_path, make_ema())  # a Trainer that never trained evaluates a file
    fresh = Net(norm=True)
    other.validate(fresh, loader(1), ckpt_path=keep.best_model_path, verbose=False)
    assert_equal(fresh.state_dict(), expected)
    other.save_checkpoint(tmp_path / "again.ckpt")
    assert_equal(L.load_checkpoint(tmp_path / "again.ckpt")["state_dict"], expected)


def validated_loss(state: State) -> float:
    net = Net(norm=True).eval()
    net.load_state_dict(state)
    batch = next(iter(loader(1)))
    with torch.no_grad():
        return float((net(batch) - batch.sum(1, keepdim=True)).square().mean())


def test_a_file_written_without_the_callback(tmp_path: Path) -> None:
    net, resumed = Net(), Net()
    fit(tmp_path, net, SaveAt(tmp_path, 4), max_epochs=2)
    with pytest.warns(LeydenWarning, match="without EMAWeightAveraging, so it holds no averages"):
        fit(tmp_path, resumed, make_ema(), path=tmp_path / "4.ckpt", max_epochs=2)
    assert_equal(resumed.state_dict(), ema_of(net.history[4:], 0.8))


def test_a_file_read_without_the_callback(tmp_path: Path) -> None:
    net, resumed = Net(), Net()
    fit(tmp_path, net, make_ema(), SaveAt(tmp_path, 4), max_epochs=1)
    with pytest.warns(
        LeydenWarning, match="has the state of callbacks that this Trainer does not have: WeightAveraging"
    ):
        fit(tmp_path, resumed, path=tmp_path / "4.ckpt", max_epochs=1)
    assert resumed.global_step == 4


def test_a_second_fit_starts_anew(tmp_path: Path) -> None:
    averaging, first, second = make_ema(), Net(), Net()
    trainer = make_trainer(tmp_path, averaging, max_epochs=2)
    trainer.fit(first, loader(), loader(1))
    trainer.fit(second, loader(), loader(1))
    assert_equal(first.state_dict(), second.state_dict())
    again = copy.deepcopy(second.state_dict())
    second.history.clear()
    trainer.fit(second, loader(), loader(1))
    assert_equal(second.state_dict(), ema_of(second.history, 0.8))
    assert not torch.equal(second.state_dict()["first.weight"], again["first.weight"])
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


# Set-up


class Sync(TorchDispatchMode):
    """Refuses what would wait for a device, and counts the calls that change averages."""

    def __init__(self) -> None:
        super().__init__()
        self.lerps = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func)
        assert "_to_copy" not in str(func)
        self.lerps += "lerp" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [make_ema, WeightAveraging], ids=["ema", "mean"])
def test_an_update_is_one_call_and_reads_nothing_from_the_device(
    tmp_path: Path, make: Callable[[], WeightAveraging]
) -> None:
    net, averaging = Net(norm=True), make()
    update, lerps = averaging.on_train_batch_end, []

    def counted(*arguments: Any) -> None:
        with Sync() as sync:
            update(*arguments)
        lerps.append(sync.lerps)

    averaging.on_train_batch_end = counted  # type: ignore[method-assign]
    fit(tmp_path, net, averaging)
    assert lerps == [0, 1, 1, 1]


def test_averages_may_be_kept_elsewhere(tmp_path: Path) -> None:
    net, averaging = Net(), EMAWeightAveraging(device="meta")
    with pytest.raises(NotImplementedError):  # there is one device here; this one shows that it is used
        fit(tmp_path, net, averaging)
    kept = Net()
    fit(tmp_path, kept, EMAWeightAveraging(device="cpu", decay=0.8))
    assert_equal(kept.state_dict(), ema_of(kept.history, 0.8))


def test_modules_built_by_configure_model_and_lazy_ones(tmp_path: Path) -> None:
    class Built(Net):
        def configure_model(self) -> None:
            if not hasattr(self, "built"):
                torch.manual_seed(5)
                self.built = nn.LazyLinear(1)

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) + self.built(batch).square().mean()

        def on_fit_start(self) -> None:
            self.history = []

    net = Built()
    fit(tmp_path, net, make_ema(), max_epochs=2)
    assert "built.weight" in net.state_dict()
    assert_equal(net.state_dict(), ema_of(net.history, 0.8))


def test_two_parameter_groups_and_mixed_dtypes(tmp_path: Path) -> None:
    class Mixed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.last.double()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.first(x).double()).float()
            return y

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(
                [{"params": self.first.parameters(), "lr": 0.1}, {"params": self.last.parameters(), "lr": 0.01}]
            )

    net = Mixed()
    fit(tmp_path, net, make_ema(), max_epochs=2)
    assert_equal(net.state_dict(), ema_of(net.history, 0.8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightAveraging(avg_fun=print), r"no argument 'avg_fun'. Did you mean 'avg_fn'\?"),
        (lambda: WeightAveraging(avg_fn=print, multi_avg_fn=print), "both avg_fn and multi_avg_fn"),
        (lambda: WeightAveraging(avg_fn=0.9), "avg_fn=0.9 is not valid"),
        (lambda: WeightAveraging(device="gpu0"), "device='gpu0' is not valid"),
        (lambda: EMAWeightAveraging(decay=1.5), "decay=1.5 is not valid. Allowed: a number from 0 to 1"),
        (lambda: EMAWeightAveraging(decay=True), "decay=True"),
        (lambda: EMAWeightAveraging(update_every_n_steps=-1), "update_every_n_steps=-1"),
        (lambda: EMAWeightAveraging(update_starting_at_step=1.5), "update_starting_at_step=1.5"),
        (lambda: EMAWeightAveraging(update_starting_at_epoch=-2), "update_starting_at_epoch=-2"),
        (lambda: EMAWeightAveraging(avg_fn=print), "for avg_fn, use WeightAveraging"),
        (lambda: EMAWeightAveraging(decya=0.9), "no argument 'decya'. Did you mean 'decay'"),
    ],
)  # fmt: skip
def test_wrong_arguments(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_two_of_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="state_key"):
        make_trainer(tmp_path, make_ema(), WeightAveraging())

    class Other(WeightAveraging):
        @property
        def state_key(self) -> str:
            return "Other"

    with pytest.raises(ConfigurationError, match="There are two callbacks that average weights"):
        fit(tmp_path, Net(), make_ema(), Other())
