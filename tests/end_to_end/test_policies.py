"""What is done when a step goes wrong, against hand-written loops that do it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import leyden
from leyden.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from leyden.errors import ConfigurationError, LeydenWarning, NonFiniteError
from leyden.policies import MAX_ROLLBACKS, MAX_SKIPS_IN_A_ROW
from quiet import make_trainer

torch.set_num_threads(1)


def data(batches: int, size: int = 4, bad: tuple[int, ...] = ()) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(batches)
    inputs = torch.randn(batches, size, 3, generator=generator)
    targets = torch.randn(batches, size, 1, generator=generator)
    for index in bad:
        inputs[index, 0, 0] = math.nan
    return list(zip(inputs, targets, strict=True))


def loader(batches: list[tuple[Tensor, Tensor]]) -> DataLoader[Any]:
    whole = TensorDataset(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
    return DataLoader(whole, batch_size=len(batches[0][0]))


class Net(leyden.LightningModule):
    """Has BatchNorm, a scheduler that counts steps, and notes each batch it trains on."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(), nn.Linear(8, 1)
        )
        self.seen: list[int] = []

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return functional.mse_loss(self.net(inputs), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch_idx)
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ByHand:
    """The same training, written out."""

    def __init__(self, module: Net) -> None:
        self.module = copy.deepcopy(module)
        made = self.module.configure_optimizers()
        self.optimizer, self.scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
        self.optimizer.param_groups[0]["fused"] = True  # as the Trainer chooses

    def step(self, *batches: Any) -> None:
        self.optimizer.zero_grad()
        for batch in batches:
            (self.module.loss(batch) / len(batches)).backward()
        self.optimizer.step()
        self.scheduler.step()

    def state(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "weights": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "lr": self.scheduler.state_dict(),
            }
        )

    def load(self, state: dict[str, Any]) -> None:
        state = copy.deepcopy(state)
        self.module.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["lr"])


def assert_same(module: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for (name, value), expected in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
        if tolerance:
            torch.testing.assert_close(value, expected, msg=name, **tolerance)
        else:
            assert torch.equal(value, expected), name


@contextmanager
def announced(code: str, times: int = 1) -> Iterator[list[str]]:
    """Collect the announcements with this code; there are to be so many, and no other warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        messages: list[str] = []
        yield messages
    messages += [str(each.message) for each in caught]
    assert len(messages) == times, messages
    assert all(message.startswith(f"[LEY-{code}]") for message in messages), messages


# nan_policy="skip"


@pytest.mark.parametrize("bad", [(0,), (3,), (7,), (0, 1, 5), (2, 3, 4)])
def test_skip_equals_a_loop_without_those_batches(bad: tuple[int, ...], tmp_path: Path) -> None:
    batches, module = data(8, bad=bad), Net()
    hand = ByHand(module)
    for index, batch in enumerate(batches):
        if index not in bad:
            hand.step(batch)
    trainer = make_trainer(tmp_path, nan_policy="skip")
    with announced("nan-skipped") as messages:
        trainer.fit(module, loader(batches))
    assert_same(module, hand.module)
    assert trainer.optimizers[0].param_groups[0]["lr"] == hand.optimizer.param_groups[0]["lr"]
    assert trainer.skipped_batches == len(bad)
    assert trainer.global_step == 8 - len(bad)
    assert module.seen == list(range(8))
    assert f"The loss is nan in epoch 0, batch_idx {bad[0]}, after {bad[0]} steps" in messages[0]


def test_skip_drops_a_whole_window_and_its_statistics(tmp_path: Path) -> None:
    batches, module = data(8, bad=(3,)), Net()
    hand = ByHand(module)
    for window in (batches[:2], batches[4:6], batches[6:]):
        hand.step(*window)
    trainer = make_trainer(tmp_path, nan_policy="skip", accumulate_grad_batches=2)
    with announced("nan-skipped") as messages:
        trainer.fit(module, loader(batches))
    assert_same(module, hand.module)
    assert (trainer.skipped_batches, trainer.global_step) == (2, 3)
    assert "batch_idx 3" in messages[0]


class BadGradient(Net):
    """The loss is finite and the gradient of the last layer's bias is not, in some batches."""

    bad = (2,)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx in self.bad:
            bias = self.net[3].bias
            loss = loss + (bias - bias.detach()).abs().sum().sqrt()  # the root of 0 has an infinite slope
        return loss


def test_skip_looks_at_gradients_too(tmp_path: Path) -> None:
    batches, module = data(6), BadGradient()
    hand = ByHand(module)
    for batch in [*batches[:2], *batches[3:]]:
        hand.step(batch)
    with announced("nan-skipped") as messages:
        make_trainer(tmp_path, nan_policy="skip").fit(module, loader(batches))
    assert_same(module, hand.module)
    assert "The loss is finite, but the gradient of net.3.bias is not, in epoch 0, batch_idx 2" in messages[0]


def test_skip_leaves_the_window_out_of_epoch_means(tmp_path: Path) -> None:
    batches, module = data(8, bad=(1, 6)), Net()
    hand, losses = ByHand(module), []
    for index, batch in enumerate(batches):
        if index not in (1, 6):
            losses.append(copy.deepcopy(hand.module).loss(batch).item())
            hand.step(batch)
    trainer = make_trainer(tmp_path, nan_policy="skip")
    with announced("nan-skipped"):
        trainer.fit(module, loader(batches))
    assert trainer.callback_metrics["loss_epoch"].item() == pytest.approx(sum(losses) / 6, rel=1e-6)
    assert math.isfinite(trainer.callback_metrics["loss_step"].item())


def test_skip_gives_up_when_nothing_but_skips_comes(tmp_path: Path) -> None:
    batches = data(MAX_SKIPS_IN_A_ROW + 20, size=2, bad=tuple(range(5, MAX_SKIPS_IN_A_ROW + 20)))
    trainer = make_trainer(tmp_path, nan_policy="skip")
    with announced("nan-skipped"), pytest.raises(NonFiniteError, match=f"{MAX_SKIPS_IN_A_ROW} steps in a row"):
        trainer.fit(Net(norm=False), loader(batches))
    assert trainer.skipped_batches == MAX_SKIPS_IN_A_ROW + 1
    assert trainer.global_step == 5


def test_under_loss_scaling_gradients_are_the_scalers_and_losses_the_policys(tmp_path: Path) -> None:
    class Line(leyden.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx == 1:
                return self.weight * math.nan
            # overflows only once it is scaled
            return self.weight * (1e35 if batch_idx == 2 else 1.0)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.25)

    module = Line()
    trainer = make_trainer(tmp_path, nan_policy="skip", precision="16-mixed")
    with announced("nan-skipped"):
        trainer.fit(module, DataLoader(torch.ones(4, 1), batch_size=1))  # type: ignore[arg-type]
    assert module.weight.item() == 0.5  # batches 0 and 3
    assert trainer.skipped_batches == 1
    assert trainer.global_step == 3


# nan_policy="raise"


def test_raise_names_the_loss_and_leaves_the_last_good_weights(tmp_path: Path) -> None:
    batches, module = data(6, bad=(4,)), Net()
    hand = ByHand(module)
    for batch in batches[:4]:
        hand.step(batch)
    trainer = make_trainer(tmp_path, nan_policy="raise")
    with pytest.raises(NonFiniteError, match=r"The loss is nan in epoch 0, batch_idx 4, after 4 steps\. .*not stepped"):
        trainer.fit(module, loader(batches))
    for ours, theirs in zip(module.parameters(), hand.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_raise_names_the_first_bad_gradient(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"gradient of net\.3\.bias is not, in epoch 0, batch_idx 2"):
        make_trainer(tmp_path, nan_policy="raise").fit(BadGradient(), loader(data(6)))


class Manual(BadGradient):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.optimizers().minimize(super().training_step(batch, batch_idx), gradient_clip_val=1.0)


class ByStep(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(BadGradient.training_step(self, batch, batch_idx))
        optimizer.step()


class OwnStep(BadGradient):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer.step(closure=optimizer_closure)


class ByClosure(BadGradient):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.net.parameters(), lr=0.1, max_iter=1, max_eval=1)


@pytest.mark.parametrize("kind", [Manual, ByStep, OwnStep, ByClosure])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_raise_works_whoever_steps(kind: type[Net], what: str, tmp_path: Path) -> None:
    module = kind()
    before: dict[str, Tensor] = {}

    class Note(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            before.update({name: value.detach().clone() for name, value in module.named_parameters()})

    batches = data(6, bad=(2,) if what == "loss" else ())
    message = (
        r"The loss is nan in epoch 0, batch_idx 2" if what == "loss" else r"gradient of net\.3\.bias .*batch_idx 2"
    )
    with pytest.raises(NonFiniteError, match=message):
        make_trainer(tmp_path, Note(), nan_policy="raise").fit(module, loader(batches))
    for name, value in module.named_parameters():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("policy", [None, "raise", "skip"])
def test_where_all_is_finite_a_policy_changes_nothing(policy: str | None, tmp_path: Path) -> None:
    batches, module = data(8), Net()
    hand = ByHand(module)
    for batch in batches:
        hand.step(batch)
    make_trainer(tmp_path, nan_policy=policy, oom_policy="raise" if policy is None else "halve").fit(
        module, loader(batches)
    )
    assert_same(module, hand.module)


# nan_policy="rollback"


def rollback_trainer(folder: Path, *callbacks: Callback, every: int = 2) -> leyden.Trainer:
    save = ModelCheckpoint(dirpath=folder, every_n_train_steps=every, save_top_k=-1)
    return make_trainer(folder, *callbacks, save, nan_policy="rollback", enable_checkpointing=None)


def test_rollback_equals_a_loop_that_reloads_and_goes_on_with_the_next_batch(tmp_path: Path) -> None:
    batches, module = data(10, bad=(5, 8)), Net()
    hand = ByHand(module)
    for batch in batches[:4]:
        hand.step(batch)
    saved = hand.state()  # of step 4
    hand.step(batches[4])
    hand.load(saved)  # batch 5 is bad, batch 4 is lost
    for batch in batches[6:8]:
        hand.step(batch)  # saved at step 6
    hand.step(batches[9])  # batch 8 is bad, nothing is lost
    trainer = rollback_trainer(tmp_path)
    with announced("nan-rollback", 2) as messages:
        trainer.fit(module, loader(batches))
    assert_same(module, hand.module)
    assert trainer.global_step == 7
    assert trainer.skipped_batches == 2
    assert module.seen == list(range(10))
    assert "from step 5 back to step 4" in messages[0]
    assert "from step 6 back to step 6" in messages[1]
    state = trainer.optimizers[0].state_dict()["state"]
    for key, entry in hand.optimizer.state_dict()["state"].items():
        assert torch.equal(state[key]["momentum_buffer"], entry["momentum_buffer"])
    assert trainer.optimizers[0].param_groups[0]["lr"] == hand.optimizer.param_groups[0]["lr"]


def test_rollback_before_the_first_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"batch_idx 1.*written no checkpoint yet.*every_n_train_steps"):
        rollback_trainer(tmp_path, every=5).fit(Net(), loader(data(6, bad=(1,))))


def test_rollback_takes_no_checkpoint_of_another_training(tmp_path: Path) -> None:
    make_trainer(
        tmp_path, ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=1), enable_checkpointing=None
    ).fit(Net(), loader(data(4)))
    trainer = rollback_trainer(tmp_path)
    with pytest.raises(NonFiniteError, match="written no checkpoint yet"):
        trainer.fit(Net(), loader(data(6, bad=(1,))))


def test_rollback_gives_up_after_three_times_to_the_same_checkpoint(tmp_path: Path) -> None:
    trainer = rollback_trainer(tmp_path, every=3)
    with (
        announced("nan-rollback", MAX_ROLLBACKS),
        pytest.raises(NonFiniteError, match="of step 3 was gone back to 3 times"),
    ):
        trainer.fit(Net(), loader(data(12, bad=(4, 6, 8, 10))))


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    batches, module = data(8, bad=(5,)), Net()
    hand = ByHand(module)
    for batch in batches[:2]:
        hand.step(batch)
    saved = hand.state()
    hand.load(saved)
    for batch in batches[6:]:
        hand.step(batch)

    class Damage(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 5:
                trainer._writer.wait()
                newest = max(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
                whole = newest.read_bytes()
                newest.write_bytes(whole[:-8] + bytes(255 - byte for byte in whole[-8:]))

    trainer = rollback_trainer(tmp_path, Damage())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader(batches))
    assert [str(each.message).partition("]")[0] for each in caught] == ["[LEY-damaged-checkpoint", "[LEY-nan-rollback"]
    assert_same(module, hand.module)


def test_averages_go_back_with_the_weights(tmp_path: Path) -> None:
    batches, module = data(8, bad=(5,)), Net(norm=False)
    hand, averages = ByHand(module), [parameter.detach().clone() for parameter in module.parameters()]

    for index in (0, 1, 2, 3, 6, 7):  # batch 4 is lost
        hand.step(batches[index])
        for mean, parameter in zip(averages, hand.module.parameters(), strict=True):
            mean.lerp_(parameter.detach(), 0.5 if index else 1.0)
    trainer = rollback_trainer(tmp_path, EMAWeightAveraging(decay=0.5))
    with announced("nan-rollback"):
        trainer.fit(module, loader(batches))
    for ours, theirs in zip(module.parameters(), averages, strict=True):
        torch.testing.assert_close(ours.detach(), theirs)


class Killed(BaseException):
    """What a test ends a run with."""


class KillAt(Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            raise Killed


@pytest.mark.parametrize("policy", ["skip", "rollback"])
@pytest.mark.parametrize("at", [3, 5, 6, 8])
def test_a_run_that_was_killed_and_goes_on_does_the_same(policy: str, at: int, tmp_path: Path) -> None:
    batches = data(10, bad=(5, 7))

    def trainer(folder: Path, *callbacks: Callback) -> leyden.Trainer:
        save = ModelCheckpoint(dirpath=folder, every_n_train_steps=2, save_top_k=-1, save_last=True)
        return make_trainer(folder, save, *callbacks, nan_policy=policy, enable_checkpointing=None)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeydenWarning)
        whole, parts = Net(), Net()
        undisturbed = trainer(tmp_path / "whole")
        undisturbed.fit(whole, loader(batches))
        with pytest.raises(Killed):
            trainer(tmp_path / "parts", KillAt(at)).fit(parts, loader(batches))
        parts, resumed = Net(), trainer(tmp_path / "parts")
        resumed.fit(parts, loader(batches), ckpt_path="last")
    assert_same(parts, whole)
    assert resumed.global_step == undisturbed.global_step
    assert resumed.skipped_batches == undisturbed.skipped_batches == 2


# What cannot be right is refused


@pytest.mark.parametrize("options", [{"nan_policy": "skip"}, {"nan_policy": "rollback"}, {"oom_policy": "halve"}])
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Manual, "automatic_optimization = False"),
        (OwnStep, "OwnStep overrides optimizer_step"),
        (ByClosure, "LBFGS evaluates the loss itself"),
    ],
)
def test_what_needs_the_loop_to_step_is_refused_where_it_does_not(
    options: dict[str, str], kind: type[Net], why: str, tmp_path: Path
) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(
        ConfigurationError, match=f"{name}='{value}' needs automatic optimization.*{why}.*{name}='raise'"
    ):
        make_trainer(tmp_path, **options).fit(kind(), loader(data(2)))


def test_policies_without_an_optimizer_are_refused(tmp_path: Path) -> None:
    class Idle(Net):
        def configure_optimizers(self) -> Any:
            return None

    with (
        pytest.warns(LeydenWarning, match="nothing is optimized"),
        pytest.raises(ConfigurationError, match="returned None"),
    ):
        make_trainer(tmp_path, nan_policy="skip").fit(Idle(), loader(data(2)))


def test_rollback_needs_a_checkpoint_that_training_can_go_on_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no ModelCheckpoint"):
        make_trainer(tmp_path, nan_policy="rollback").fit(Net(), loader(data(2)))
    save = ModelCheckpoint(dirpath=tmp_path, save_weights_only=True)
    with pytest.raises(ConfigurationError, match="save_weights_only=True"):
        make_trainer(tmp_path, save, nan_policy="rollback", enable_checkpointing=None).fit(Net(), loader(data(2)))


def test_a_trial_run_goes_with_rollback_though_it_writes_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, nan_policy="rollback", fast_dev_run=True)
    trainer.fit(Net(), loader(data(2)))
    assert trainer.global_step == 1


# oom_policy="halve"


class FailsInBackward(torch.autograd.Function):
    """Passes through, and runs out of memory on the way back if the batch is too large."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, most: int) -> Tensor:
        ctx.fails = len(value) > most
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        if ctx.fails:
            raise torch.OutOfMemoryError("CUDA out of memory. (simulated)")
        return gradient, None


class Big(Net):
    """Runs out of memory with more than ``most`` samples: in forward, or in backward after half of the gradients."""

    def __init__(self, most: int, where: str, norm: bool = False) -> None:
        super().__init__(norm)
        self.most, self.where = most, where
        self.noise: list[float] = []
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        self.seen.append(batch_idx)
        self.noise.append(torch.rand(()).item())
        self.count += len(inputs)
        self.log("size", float(len(inputs)))
        hidden = self.net[:3](inputs)
        if self.where == "forward" and len(inputs) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. (simulated)")
        if self.where == "backward":
            hidden = FailsInBackward.apply(hidden, self.most)
        loss = functional.mse_loss(self.net[3](hidden), targets)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss, "outputs": hidden.detach()}


class Outputs(Callback):
    def __init__(self) -> None:
        self.all: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.all.append(outputs)


CLOSE = {"rtol": 1e-6, "atol": 1e-8}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("most", "halvings"), [(8, 0), (4, 1), (3, 2), (2, 2), (1, 3)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_halve_gives_the_gradient_of_the_whole_batch(
    where: str, most: int, halvings: int, accumulate: int, tmp_path: Path
) -> None:
    batches, module = data(7, size=8), Big(most, where).double()
    batches = [(x.double(), y.double()) for x, y in batches]
    hand, losses = ByHand(module), []
    for start in range(0, 7, accumulate):
        losses += [copy.deepcopy(hand.module).loss(batch).item() for batch in batches[start : start + accumulate]]
        hand.step(*batches[start : start + accumulate])
    outputs = Outputs()
    trainer = make_trainer(tmp_path, outputs, oom_policy="halve", accumulate_grad_batches=accumulate)
    with announced("out-of-memory", halvings) as messages:
        trainer.fit(module, loader(batches))
    for ours, theirs in zip(module.parameters(), hand.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert trainer.global_step == math.ceil(7 / accumulate)
    assert module.count == 7 * 8  # what a failed attempt counted is undone
    parts = 2**halvings
    assert module.seen == [0] * halvings + [index for index in range(7) for _ in range(parts)] or where == "backward"
    assert trainer.callback_metrics["loss_epoch"].item() == pytest.approx(sum(losses) / 7, rel=1e-6)
    assert trainer.callback_metrics["size"].item() == 8 / parts
    assert [output["loss"].item() for output in outputs.all] == pytest.approx(losses, rel=1e-12)
    assert all(output["outputs"].shape == (8, 8) for output in outputs.all)
    if halvings:
        assert "A batch of 8 did not fit into the memory of cpu in epoch 0, batch_idx 0" in messages[0]
        assert "in 2 parts of 4" in messages[0]
        assert "BatchNorm" not in messages[0]


class Grows(Big):
    """Fits until batch ``at``, in the middle of a window."""

    def __init__(self, at: int, where: str, norm: bool = False) -> None:
        super().__init__(4, where, norm)
        self.at = at

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.most = 4 if batch_idx >= self.at else 100
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_failure_later_in_a_window_leaves_nothing_behind(where: str, at: int, tmp_path: Path) -> None:
    batches, module = data(6, size=8), Grows(at, where)
    hand = ByHand(module)
    hand.step(*batches[:3])
    hand.step(*batches[3:])
    trainer = make_trainer(tmp_path, oom_policy="halve", accumulate_grad_batches=3)
    with announced("out-of-memory"):
        trainer.fit(module, loader(batches))
    for ours, theirs in zip(module.parameters(), hand.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_halve_equals_the_loop_by_hand_with_batchnorm_and_random_numbers(
    where: str, accumulate: int, tmp_path: Path
) -> None:
    batches, module = data(6, size=8), Grows(3, where, norm=True)
    module.net[2] = nn.Sequential(nn.Tanh(), nn.Dropout(0.5))
    hand = ByHand(module)

    def parts(index: int) -> list[Any]:
        inputs, targets = batches[index]
        return [batches[index]] if index < 3 else [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]

    torch.manual_seed(1)
    for start in range(0, 6, accumulate):
        hand.optimizer.zero_grad()
        for index in range(start, start + accumulate):
            sums = [None if each.grad is None else each.grad.clone() for each in hand.module.parameters()]
            hand.optimizer.zero_grad()
            for part in parts(index):
                torch.rand(())  # the step's own draw
                (hand.module.loss(part) / accumulate * (len(part[0]) / 8)).backward()
            for parameter, before in zip(hand.module.parameters(), sums, strict=True):
                if before is not None:
                    parameter.grad = before + parameter.grad
        hand.optimizer.step()
        hand.scheduler.step()

    class Seed(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                torch.manual_seed(1)

    trainer = make_trainer(tmp_path, Seed(), oom_policy="halve", accumulate_grad_batches=accumulate)
    with announced("out-of-memory") as messages:
        trainer.fit(module, loader(batches))
    module.count.zero_()
    assert_same(module, hand.module)
    assert "BatchNorm statistics are those of the parts" in messages[0]


def test_uneven_parts_are_weighted_by_their_samples(tmp_path: Path) -> None:
    batches, module = data(3, size=7), Big(4, "backward")
    hand = ByHand(module)
    for batch in batches:
        hand.step(batch)
    with announced("out-of-memory") as messages:
        make_trainer(tmp_path, oom_policy="halve").fit(module, loader(batches))
    for ours, theirs in zip(module.parameters(), hand.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert "in 2 parts of 3 or 4" in messages[0]


def test_the_split_is_kept_and_a_short_batch_is_split_no_further_than_into_samples(tmp_path: Path) -> None:
    class Sizes(Big):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            sizes.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

    sizes: list[int] = []
    samples = data(1, size=19)[0]
    with announced("out-of-memory", 2):
        make_trainer(tmp_path, oom_policy="halve", max_epochs=2).fit(
            Sizes(2, "forward"), DataLoader(TensorDataset(*samples), batch_size=8)
        )
    epoch = [2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1]
    assert sizes == [8, 4, *epoch, *epoch]


def test_a_sample_that_does_not_fit_raises_with_a_note(tmp_path: Path) -> None:
    with announced("out-of-memory", 2), pytest.raises(torch.OutOfMemoryError) as caught:
        make_trainer(tmp_path, oom_policy="halve").fit(Big(0, "backward"), loader(data(2)))
    assert "down to single samples, and one of them does not fit" in "".join(caught.value.__notes__)


def test_a_batch_that_cannot_be_split_raises_with_a_note(tmp_path: Path) -> None:
    class Opaque:
        def __init__(self, batch: Any) -> None:
            self.batch = batch

        def __iter__(self) -> Iterator[Any]:
            return iter(self.batch)

    with pytest.raises(torch.OutOfMemoryError) as caught:
        make_trainer(tmp_path, oom_policy="halve").fit(
            Big(1, "forward"),
            DataLoader([Opaque(batch) for batch in data(2)], batch_size=None),  # type: ignore[arg-type]
        )
    assert "cannot split a batch of type Opaque" in "".join(caught.value.__notes__)


def test_an_error_in_a_part_says_that_it_was_one(tmp_path: Path) -> None:
    with announced("out-of-memory"), pytest.raises(ValueError, match="more than 1 value per channel") as caught:
        make_trainer(tmp_path, oom_policy="halve").fit(Big(2, "forward", norm=True), loader(data(2, size=3)))
    assert caught.value.__notes__ == [
        "This was in part 2 of 2 of the batch, 1 of its 3 samples, which oom_policy='halve' has split."
    ]


def test_by_default_the_error_names_the_policy(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        make_trainer(tmp_path).fit(Big(1, "forward"), loader(data(2)))
    assert "oom_policy='halve'" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("elsewhere", ["validation", "manual"])
def test_the_policy_is_not_named_where_it_does_not_help(elsewhere: str, tmp_path: Path) -> None:
    class Validates(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. (simulated)")

    class Steps(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            raise torch.OutOfMemoryError("CUDA out of memory. (simulated)")

    module = Validates() if elsewhere == "validation" else Steps()
    with pytest.raises(torch.OutOfMemoryError) as caught:
        make_trainer(tmp_path).fit(module, loader(data(2)), loader(data(2)) if elsewhere == "validation" else None)
    assert not hasattr(caught.value, "__notes__")


def test_a_resumed_run_goes_on_with_the_same_split(tmp_path: Path) -> None:
    save = ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=1)
    options: dict[str, Any] = {"oom_policy": "halve", "enable_checkpointing": None}
    with announced("out-of-memory"), pytest.raises(Killed):
        make_trainer(tmp_path, save, KillAt(3), **options).fit(Big(4, "forward"), loader(data(6, size=8)))
    module = Big(4, "forward")
    save = ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=1)
    trainer = make_trainer(tmp_path, save, **options)
    trainer.fit(module, loader(data(6, size=8)), ckpt_path="last")  # would warn if it had to split again
    assert trainer.global_step == 6
    assert module.seen in ([3, 3, 4, 4, 5, 5], [4, 4, 5, 5])


def test_hooks_and_counters_do_not_see_the_parts(tmp_path: Path) -> None:
    def run(policy: str, most: int) -> list[Any]:
        seen: list[Any] = []

        class Watch(Callback):
            def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
                seen.append(("zero_grad", trainer.global_step))

            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                seen.append(("start", batch_idx, len(batch[0])))

            def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
                seen.append(("step", trainer.global_step))

            def on_train_batch_end(
                self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
            ) -> None:
                seen.append(("end", batch_idx, len(batch[0])))

        make_trainer(tmp_path, Watch(), oom_policy=policy, accumulate_grad_batches=2).fit(
            Big(most, "backward"), loader(data(5, size=8))
        )
        return seen

    with announced("out-of-memory", 2):
        halved = run("halve", 2)
    assert halved == run("raise", 8)


@pytest.mark.parametrize("absent", [(0,), (0, 1), (0, 1, 2)])
def test_batches_without_a_loss_are_counted_once(absent: tuple[int, ...], tmp_path: Path) -> None:
    class Absent(Big):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            return None if batch_idx in absent else output

    batches, module = data(3, size=8), Absent(4, "forward")
    hand = ByHand(module)
    trained = [batch for index, batch in enumerate(batches) if index not in absent]
    if trained:
        hand.step(*trained)
    trainer = make_trainer(tmp_path, oom_policy="halve", accumulate_grad_batches=3)
    with announced("out-of-memory"):
        trainer.fit(module, loader(batches))
    for ours, theirs in zip(module.parameters(), hand.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert trainer.skipped_batches == len(absent)
    assert trainer.global_step == bool(trained)


def test_both_policies_together(tmp_path: Path) -> None:
    batches, module = data(6, size=8, bad=(2, 4)), Big(4, "backward", norm=False)
    hand = ByHand(module)
    for index in (0, 1, 3, 5):
        hand.step(batches[index])
    trainer = make_trainer(tmp_path, oom_policy="halve", nan_policy="skip")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader(batches))
    assert [str(each.message).partition("]")[0] for each in caught] == ["[LEY-out-of-memory", "[LEY-nan-skipped"]
    for ours, theirs in zip(module.parameters(), hand.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert trainer.skipped_batches == 2
    assert module.count == 4 * 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_halve_when_a_gpu_really_runs_out_of_memory(accumulate: int, tmp_path: Path) -> None:
    size, width = 64, 1 << 20

    class Wide(leyden.LightningModule):
        """Needs ``layers`` activations of 256 MiB for a whole batch."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((width,), 0.9))

        def loss(self, batch: Tensor) -> Tensor:
            for _ in range(layers):
                batch = (batch * self.scale).tanh()
            return batch.square().mean()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=100.0)

    free, total = torch.cuda.mem_get_info()
    if free < 6 * 2**30:
        pytest.skip("needs 6 GiB of GPU memory")
    layers, batches = 24, torch.randn(4 * size, 1).expand(-1, width)
    torch.cuda.set_per_process_memory_fraction(min(1.0, 5 * 2**30 / total))
    try:
        module = Wide()
        hand = copy.deepcopy(module).cuda()
        optimizer = hand.configure_optimizers()
        for start in range(0, 4, accumulate):
            optimizer.zero_grad()
            for index in range(start, start + accumulate):
                for part in batches[index * size : (index + 1) * size].split(8):
                    (hand.loss(part.cuda()) / 8 / accumulate).backward()
            optimizer.step()
        data_loader: DataLoader[Any] = DataLoader(batches, batch_size=size)  # type: ignore[arg-type]
        trainer = make_trainer(tmp_path, oom_policy="halve", accelerator="cuda", accumulate_grad_batches=accumulate)
        with pytest.warns(LeydenWarning, match="did not fit into the memory of cuda:0"):
            trainer.fit(module, data_loader)
        torch.testing.assert_close(module.scale.detach(), hand.scale.detach(), rtol=1e-4, atol=1e-6)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
