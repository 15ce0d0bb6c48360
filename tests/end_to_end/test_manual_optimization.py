"""Manual optimization equals loops written by hand: a GAN, an actor-critic, accumulation, clipping."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

import leyden
from leyden.errors import ConfigurationError, LeydenError, StepError

torch.set_num_threads(1)

PRECISIONS = ["32-true", "bf16-mixed", "16-mixed"]
LATENT, WIDTH, BATCHES, EPOCHS = 3, 4, 5, 2
CLIP = 0.02


def make_trainer(folder: Path, **options: Any) -> leyden.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "max_epochs": EPOCHS,
    }
    return leyden.Trainer(**(settings | options))


def autocast(precision: str) -> Callable[[], Any]:
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    if precision not in dtypes:
        return contextlib.nullcontext
    return lambda: torch.autocast("cpu", dtype=dtypes[precision])


def make_scaler(precision: str) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=precision == "16-mixed")


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    one, other = found.state_dict(), expected.state_dict()
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


# A GAN


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.generator = nn.Sequential(nn.Linear(LATENT, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, WIDTH))
        self.discriminator = nn.Sequential(nn.Linear(WIDTH, 8), nn.LeakyReLU(0.2), nn.Dropout(0.2), nn.Linear(8, 1))

    def generator_loss(self, real: Tensor) -> Tensor:
        fake = self.generator(torch.randn(len(real), LATENT))
        return F.binary_cross_entropy_with_logits(self.discriminator(fake), torch.ones(len(real), 1))

    def discriminator_loss(self, real: Tensor) -> Tensor:
        fake = self.generator(torch.randn(len(real), LATENT)).detach()
        on_real = F.binary_cross_entropy_with_logits(self.discriminator(real), torch.ones(len(real), 1))
        on_fake = F.binary_cross_entropy_with_logits(self.discriminator(fake), torch.zeros(len(real), 1))
        return (on_real + on_fake) / 2

    def make_optimizers(self, fused: bool | None = None) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=0.01, betas=(0.5, 0.999), fused=fused),
            torch.optim.Adam(self.discriminator.parameters(), lr=0.02, betas=(0.5, 0.999), fused=fused),
        ]


def gan_loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(8)
    real = torch.randn(BATCHES * 4 - 1, WIDTH, generator=generator)
    return DataLoader(real, batch_size=4, shuffle=True, generator=generator)  # type: ignore[arg-type]


def gan_by_hand(precision: str, clip: bool, losses: list[Tensor]) -> Gan:
    gan = Gan()
    gan.train()
    optimizer_g, optimizer_d = gan.make_optimizers(fused=True)
    context, scaler, loader = autocast(precision), make_scaler(precision), gan_loader()
    torch.manual_seed(6)
    for _ in range(EPOCHS):
        for real in loader:
            gan.discriminator.requires_grad_(False)
            with context():
                loss = gan.generator_loss(real)
            losses.append(loss.detach())
            optimizer_g.zero_grad()
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer_g)
                torch.nn.utils.clip_grad_norm_(gan.generator.parameters(), CLIP)
            scaler.step(optimizer_g)
            scaler.update()
            gan.discriminator.requires_grad_(True)

            gan.generator.requires_grad_(False)
            with context():
                loss = gan.discriminator_loss(real)
            losses.append(loss.detach())
            optimizer_d.zero_grad()
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer_d)
                torch.nn.utils.clip_grad_norm_(gan.discriminator.parameters(), CLIP)
            scaler.step(optimizer_d)
            scaler.update()
            gan.generator.requires_grad_(True)
    return gan


class GanModule(leyden.LightningModule):
    def __init__(self, clip: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.gan = Gan()
        self.clip = clip
        self.losses: list[Tensor] = []

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return self.gan.make_optimizers()

    def turns(self) -> list[tuple[Any, Callable[[Tensor], Tensor]]]:
        optimizer_g, optimizer_d = self.optimizers()
        return [(optimizer_g, self.gan.generator_loss), (optimizer_d, self.gan.discriminator_loss)]


class ToggleOptimizer(GanModule):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer, compute in self.turns():
            self.toggle_optimizer(optimizer)
            loss = compute(batch)
            self.losses.append(loss.detach())
            optimizer.zero_grad()
            self.manual_backward(loss)
            if self.clip:
                self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)


class ToggleModel(GanModule):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer, compute in self.turns():
            with optimizer.toggle_model():
                loss = compute(batch)
                self.losses.append(loss.detach())
                optimizer.zero_grad()
                self.manual_backward(loss)
                if self.clip:
                    self.clip_gradients(optimizer, gradient_clip_val=CLIP)
                optimizer.step()


class Minimize(GanModule):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer, compute in self.turns():
            with optimizer.toggle_model():
                loss = compute(batch)
                self.losses.append(loss.detach())
                optimizer.minimize(loss, gradient_clip_val=CLIP if self.clip else None)


class ByClosure(GanModule):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer, compute in self.turns():

            def closure(optimizer: Any = optimizer, compute: Any = compute) -> Tensor:
                loss: Tensor = compute(batch)
                self.losses.append(loss.detach())
                optimizer.zero_grad()
                self.manual_backward(loss)
                if self.clip:
                    self.clip_gradients(optimizer, gradient_clip_val=CLIP)
                return loss

            with optimizer.toggle_model():
                optimizer.step(closure=closure)


@pytest.mark.parametrize("kind", [ToggleOptimizer, ToggleModel, Minimize, ByClosure])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("clip", [False, True])
def test_gan_equals_its_loop_by_hand(kind: type[GanModule], precision: str, clip: bool, tmp_path: Path) -> None:
    losses: list[Tensor] = []
    expected = gan_by_hand(precision, clip, losses)
    module = kind(clip)
    trainer = make_trainer(tmp_path, precision=precision)
    torch.manual_seed(6)
    trainer.fit(module, gan_loader())
    assert len(losses) == 2 * BATCHES * EPOCHS
    assert all(torch.equal(one, other) for one, other in zip(module.losses, losses, strict=True))
    assert_same(module.gan, expected)
    assert trainer.global_step == BATCHES * EPOCHS
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_minimize_fills_no_gradients_but_its_own(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Untoggled(GanModule):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer_g, _ = self.optimizers()
            optimizer_g.minimize(self.gan.generator_loss(batch))
            seen.append(self.gan.discriminator[0].weight.grad is not None)
            self.manual_backward(self.gan.generator_loss(batch))  # as in PyTorch, this one fills all
            seen.append(self.gan.discriminator[0].weight.grad is not None)

    make_trainer(tmp_path, max_steps=1).fit(Untoggled(), gan_loader())
    assert seen == [False, True]


def test_toggle_freezes_exactly_the_others_and_restores_what_was_frozen(tmp_path: Path) -> None:
    class Toggling(GanModule):
        def fail_in_the_turn_of(self, optimizer: Any) -> None:
            with optimizer.toggle_model():
                assert [parameter.requires_grad for parameter in self.parameters()] == [False] * 6 + [True] * 4
                raise ZeroDivisionError

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer_g, optimizer_d = self.optimizers()
            frozen = self.gan.discriminator[0].weight.requires_grad_(False)  # the user's own, from before
            self.toggle_optimizer(optimizer_g)
            during = [parameter.requires_grad for parameter in self.parameters()]
            self.untoggle_optimizer(optimizer_g)
            assert during == [True] * 6 + [False] * 4
            assert [parameter.requires_grad for parameter in self.parameters()] == [True] * 6 + [False] + [True] * 3
            frozen.requires_grad_(True)
            with pytest.raises(ZeroDivisionError):
                self.fail_in_the_turn_of(optimizer_d)
            assert all(parameter.requires_grad for parameter in self.parameters())
            with pytest.raises(StepError, match="was not toggled"):
                self.untoggle_optimizer(optimizer_g)

    make_trainer(tmp_path, fast_dev_run=True).fit(Toggling(), gan_loader())


def test_toggle_leaves_parameters_that_two_optimizers_share(tmp_path: Path) -> None:
    class Shared(GanModule):
        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [
                torch.optim.SGD(self.gan.parameters(), lr=0.1),
                torch.optim.SGD(self.gan.generator.parameters(), lr=0.1),
            ]

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            of_both, of_one = self.optimizers()
            with of_both.toggle_model():
                assert all(parameter.requires_grad for parameter in self.parameters())
            with of_one.toggle_model():
                assert [parameter.requires_grad for parameter in self.parameters()] == [True] * 6 + [False] * 4

    make_trainer(tmp_path, fast_dev_run=True).fit(Shared(), gan_loader())


# An actor-critic

STATES, ACTIONS, HORIZON, EPISODES = 4, 2, 6, 8


class Corridor:
    """Walk right to the last state for a reward; every step costs a little."""

    def __init__(self) -> None:
        self.position = 0

    def step(self, action: int) -> float:
        self.position = min(STATES - 1, max(0, self.position + (1 if action == 1 else -1)))
        return 1.0 if self.position == STATES - 1 else -0.1


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.actor = nn.Sequential(nn.Linear(STATES, 8), nn.Tanh(), nn.Linear(8, ACTIONS))
        self.critic = nn.Sequential(nn.Linear(STATES, 8), nn.Tanh(), nn.Linear(8, 1))

    def episode(self) -> tuple[Tensor, Tensor, Tensor]:
        """The states, the actions and the returns of one episode under the present policy."""
        walk, states, actions, rewards = Corridor(), [], [], []
        for _ in range(HORIZON):
            state = F.one_hot(torch.tensor(walk.position), STATES).float()
            with torch.no_grad():
                action = torch.distributions.Categorical(logits=self.actor(state).float()).sample()
            states.append(state)
            actions.append(action)
            rewards.append(walk.step(int(action)))
        returns = [sum(0.9**ahead * reward for ahead, reward in enumerate(rewards[i:])) for i in range(HORIZON)]
        return torch.stack(states), torch.stack(actions), torch.tensor(returns)

    def losses(self, states: Tensor, actions: Tensor, returns: Tensor) -> tuple[Tensor, Tensor]:
        values = self.critic(states).float().squeeze(1)
        log_probabilities = torch.log_softmax(self.actor(states).float(), dim=1)
        taken = log_probabilities.gather(1, actions[:, None]).squeeze(1)
        return -(taken * (returns - values.detach())).mean(), F.mse_loss(values, returns)

    def make_optimizers(self, fused: bool | None = None) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(self.actor.parameters(), lr=0.02, fused=fused),
            torch.optim.SGD(self.critic.parameters(), lr=0.05, fused=fused),
        ]


class Episodes(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(EPISODES))


class ActorCriticModule(leyden.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = ActorCritic()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return self.net.make_optimizers()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer_a, optimizer_c = self.optimizers()
        policy_loss, value_loss = self.net.losses(*self.net.episode())
        optimizer_a.minimize(policy_loss, gradient_clip_val=0.1)
        optimizer_c.minimize(value_loss)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_actor_critic_equals_its_loop_by_hand(precision: str, tmp_path: Path) -> None:
    net, context, scaler = ActorCritic(), autocast(precision), make_scaler(precision)
    optimizer_a, optimizer_c = net.make_optimizers(fused=True)
    torch.manual_seed(6)
    for _ in range(EPISODES):
        with context():
            policy_loss, value_loss = net.losses(*net.episode())
        optimizer_a.zero_grad()
        scaler.scale(policy_loss).backward()
        scaler.unscale_(optimizer_a)
        torch.nn.utils.clip_grad_norm_(net.actor.parameters(), 0.1)
        scaler.step(optimizer_a)
        scaler.update()
        optimizer_c.zero_grad()
        scaler.scale(value_loss).backward()
        scaler.step(optimizer_c)
        scaler.update()

    module = ActorCriticModule()
    trainer = make_trainer(tmp_path, precision=precision, max_epochs=1)
    torch.manual_seed(6)
    trainer.fit(module, DataLoader(Episodes(), batch_size=None, generator=torch.Generator()))
    assert_same(module.net, net)
    assert trainer.global_step == EPISODES


# Steps, windows, clipping


class Line(leyden.LightningModule):
    """y = w·x with the loss w·x, so that the gradient is the input; subclasses say what a step does."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = nn.Parameter(torch.zeros(2))
        self.other = nn.Parameter(torch.zeros(2))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.weight], lr=1.0)

    def loss(self, batch: Tensor) -> Tensor:
        return (self.weight * batch).sum()


def rows(count: int) -> DataLoader[Any]:
    """Batches [1, 0], [2, 0], … of one sample, without the batch dimension."""
    data = torch.stack([torch.tensor([float(i + 1), 0.0]) for i in range(count)])
    return DataLoader(data, batch_size=None)  # type: ignore[arg-type]


class EveryThird(Line):
    """Accumulates by hand: steps after every third batch of all."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        if batch_idx % 3 == 0:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch) / 3)
        if batch_idx % 3 == 2:
            optimizer.step()


class MinimizeByThrees(Line):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        stepped = self.optimizers().minimize(self.loss(batch), accumulate_grad_batches=3)
        assert stepped == (batch_idx % 3 == 2)


@pytest.mark.parametrize("kind", [EveryThird, MinimizeByThrees])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_manual_accumulation_survives_validation_in_between(kind: type[Line], precision: str, tmp_path: Path) -> None:
    class Validated(kind):  # type: ignore[misc, valid-type]
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            validated.append(float(self.loss(batch)))

    module, steps, validated = Validated(), [], []

    class Watch(leyden.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            steps.append(trainer.global_step)

    trainer = make_trainer(tmp_path, max_epochs=1, val_check_interval=1, callbacks=[Watch()], precision=precision)
    trainer.fit(module, rows(6), rows(2))
    # means of 1, 2, 3 and of 4, 5, 6
    torch.testing.assert_close(module.weight.detach(), torch.tensor([-7.0, 0.0]))
    assert steps == [0, 0, 1, 1, 1, 2]
    assert len(validated) == 2 + 6 * 2  # the sanity check's, and two after each batch


def test_global_step_counts_batches_in_which_some_optimizer_stepped(tmp_path: Path) -> None:
    class Several(Line):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([self.weight], lr=1.0), torch.optim.SGD([self.other], lr=1.0)]

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            first, second = self.optimizers()
            steps.append(self.global_step)
            for optimizer in {0: [], 1: [first], 2: [second], 3: [first, second], 4: [second, second]}[batch_idx]:
                optimizer.step()

    steps: list[int] = []
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(Several(), rows(5))
    assert steps == [0, 0, 1, 2, 3, 4, 4, 5, 6, 7]
    assert trainer.global_step == 8


def test_max_steps_counts_the_same_steps(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=-1, max_steps=3)
    trainer.fit(EveryThird(), rows(6))
    assert trainer.global_step == 3
    assert trainer.current_epoch == 1  # 6 batches make 2 steps; the third is in the middle of the second epoch


def test_plain_optimizers_are_torchs_own_and_their_steps_are_not_counted(tmp_path: Path) -> None:
    class Plain(Line):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            assert type(optimizer) is torch.optim.SGD
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    module = Plain()
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, rows(3))
    assert torch.equal(module.weight.detach(), torch.tensor([-6.0, 0.0]))
    assert trainer.global_step == 0


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("way", ["clip_gradients", "minimize"])
def test_clipping_acts_on_gradients_of_real_size(precision: str, way: str, tmp_path: Path) -> None:
    class Clipped(Line):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            if way == "minimize":
                optimizer.minimize(self.loss(batch), gradient_clip_val=2.5, gradient_clip_algorithm="value")
            else:
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                self.clip_gradients(optimizer, gradient_clip_val=2.5, gradient_clip_algorithm="value")
                optimizer.step()

    module = Clipped()
    make_trainer(tmp_path, max_epochs=1, precision=precision).fit(module, rows(4))
    assert torch.equal(module.weight.detach(), torch.tensor([-(1 + 2 + 2.5 + 2.5), 0.0]))


@pytest.mark.parametrize("way", ["none", "zero", "module"])
def test_gradients_that_were_clipped_but_not_used_spoil_no_later_step(way: str, tmp_path: Path) -> None:
    """Under loss scaling, unscaling belongs to one backward: the next one's gradients are scaled again."""

    class Undecided(Line):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            if way == "module":
                self.zero_grad()
            else:
                optimizer.zero_grad(set_to_none=way == "none")
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, gradient_clip_val=2.5, gradient_clip_algorithm="value")
            if batch_idx % 2:
                optimizer.step()

    module = Undecided()
    make_trainer(tmp_path, max_epochs=1, precision="16-mixed").fit(module, rows(4))
    assert torch.equal(module.weight.detach(), torch.tensor([-(2 + 2.5), 0.0]))


def test_clipping_before_accumulating_more_is_refused_under_loss_scaling(tmp_path: Path) -> None:
    class ClipsAlways(Line):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, gradient_clip_val=2.5)
            if batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()

    with pytest.raises(StepError, match=r"gradients of SGD were unscaled \(clipped\) in an earlier batch.*zero_grad"):
        make_trainer(tmp_path, precision="16-mixed").fit(ClipsAlways(), rows(4))


def test_both_optimizers_may_be_clipped_before_either_steps(tmp_path: Path) -> None:
    class Late(Line):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([self.weight], lr=1.0), torch.optim.SGD([self.other], lr=1.0)]

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizers = self.optimizers()
            for optimizer, weight in zip(optimizers, (self.weight, self.other), strict=True):
                optimizer.zero_grad()
                self.manual_backward((weight * batch).sum())
                self.clip_gradients(optimizer, gradient_clip_val=2.5, gradient_clip_algorithm="value")
            for optimizer in optimizers:
                optimizer.step()

    module = Late()
    make_trainer(tmp_path, max_epochs=1, precision="16-mixed").fit(module, rows(4))
    for weight in (module.weight, module.other):
        assert torch.equal(weight.detach(), torch.tensor([-(1 + 2 + 2.5 + 2.5), 0.0]))


def test_a_clipped_optimizer_that_pauses_does_not_disturb_the_other(tmp_path: Path) -> None:
    class Pausing(Line):
        """Steps the second optimizer in every other batch only, though it clips in each."""

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([self.weight], lr=1.0), torch.optim.SGD([self.other], lr=1.0)]

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            first, second = self.optimizers()
            first.minimize(self.loss(batch), gradient_clip_val=2.5, gradient_clip_algorithm="value")
            second.zero_grad()
            self.manual_backward((self.other * batch).sum())
            self.clip_gradients(second, gradient_clip_val=2.5, gradient_clip_algorithm="value")
            if batch_idx % 2:
                second.step()

    module = Pausing()
    make_trainer(tmp_path, max_epochs=1, precision="16-mixed").fit(module, rows(4))
    assert torch.equal(module.weight.detach(), torch.tensor([-(1 + 2 + 2.5 + 2.5), 0.0]))
    assert torch.equal(module.other.detach(), torch.tensor([-(2 + 2.5), 0.0]))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_optimizer_may_step_several_times_in_a_batch(precision: str, tmp_path: Path) -> None:
    class Critic(Line):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            for _ in range(3):
                self.optimizers().minimize(self.loss(batch), gradient_clip_val=2.5, gradient_clip_algorithm="value")

    module = Critic()
    trainer = make_trainer(tmp_path, max_epochs=1, precision=precision)
    trainer.fit(module, rows(4))
    assert torch.equal(module.weight.detach(), torch.tensor([-3 * (1 + 2 + 2.5 + 2.5), 0.0]))
    assert trainer.global_step == 4


def test_overflow_of_one_optimizer_skips_its_step_only(tmp_path: Path) -> None:
    class Overflowing(Line):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([self.weight], lr=1.0), torch.optim.SGD([self.other], lr=1.0)]

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            first, second = self.optimizers()
            factor = float("inf") if batch_idx == 1 else 1.0
            first.minimize(self.loss(batch) * factor)
            second.minimize((self.other * batch).sum())

    module = Overflowing()
    trainer = make_trainer(tmp_path, max_epochs=1, precision="16-mixed")
    trainer.fit(module, rows(3))
    assert torch.equal(module.weight.detach(), torch.tensor([-(1.0 + 3.0), 0.0]))
    assert torch.equal(module.other.detach(), torch.tensor([-(1.0 + 2.0 + 3.0), 0.0]))
    assert trainer.global_step == 3


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_stepping_an_optimizer_without_gradients_does_nothing(precision: str, tmp_path: Path) -> None:
    class Idle(Line):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.optimizers().step()

    module = Idle()
    make_trainer(tmp_path, max_epochs=1, precision=precision).fit(module, rows(2))
    assert torch.equal(module.weight.detach(), torch.zeros(2))


def test_both_backwards_before_both_steps_equals_the_loop_by_hand(tmp_path: Path) -> None:
    class Late(Line):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([self.weight], lr=1.0), torch.optim.SGD([self.other], lr=1.0)]

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            self.manual_backward((self.other * batch).sum())
            for optimizer in optimizers:
                optimizer.step()

    module = Late()
    make_trainer(tmp_path, max_epochs=1, precision="16-mixed").fit(module, rows(3))
    assert torch.equal(module.weight.detach(), torch.tensor([-6.0, 0.0]))
    assert torch.equal(module.other.detach(), torch.tensor([-6.0, 0.0]))


def test_schedulers_are_the_users_to_step(tmp_path: Path) -> None:
    class Scheduled(Line):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD([self.weight], lr=1.0)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.minimize(self.loss(batch))
            if batch_idx == 2:
                self.lr_schedulers().step()

    module = Scheduled()
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, rows(3))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25
    assert torch.equal(module.weight.detach(), torch.tensor([-6.0 - 3.0, 0.0]))


def test_lbfgs_by_closure_equals_the_loop_by_hand(tmp_path: Path) -> None:
    class Fitting(leyden.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            torch.manual_seed(1)
            self.layer = nn.Linear(2, 1)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.layer.parameters(), lr=0.3, max_iter=4)

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = (self.layer(batch) - 1).square().mean()
                self.manual_backward(loss)
                return loss

            optimizer.step(closure)

    module = Fitting()
    layer = copy.deepcopy(module.layer)
    make_trainer(tmp_path, max_epochs=1).fit(module, rows(3))

    plain = torch.optim.LBFGS(layer.parameters(), lr=0.3, max_iter=4)
    for batch in rows(3):

        def closure(batch: Tensor = batch) -> Tensor:
            plain.zero_grad()
            loss = (layer(batch) - 1).square().mean()
            loss.backward()
            return loss

        plain.step(closure)
    assert_same(module.layer, layer)


def test_hooks_of_backward_and_step_are_called_in_order_before_clipping(tmp_path: Path) -> None:
    class Hooked(Line):
        def on_before_backward(self, loss: Tensor) -> None:
            seen.append(("before_backward", float(loss.detach())))

        def on_after_backward(self) -> None:
            seen.append(("after_backward", float(self.weight.grad[0])))

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            assert type(optimizer) is torch.optim.SGD
            seen.append(("before_step", float(self.weight.grad[0])))

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.optimizers().minimize(self.loss(batch) + 7, gradient_clip_val=0.5, gradient_clip_algorithm="value")

    seen: list[tuple[str, float]] = []
    module = Hooked()
    make_trainer(tmp_path, fast_dev_run=True).fit(module, rows(1))
    assert seen == [("before_backward", 7.0), ("after_backward", 1.0), ("before_step", 1.0)]
    assert torch.equal(module.weight.detach(), torch.tensor([-0.5, 0.0]))


def test_own_backward_is_what_manual_backward_calls(tmp_path: Path) -> None:
    class OwnBackward(Line):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            (loss * 2).backward()

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.optimizers().minimize(self.loss(batch))

    module = OwnBackward()
    make_trainer(tmp_path, max_epochs=1).fit(module, rows(3))
    assert torch.equal(module.weight.detach(), torch.tensor([-12.0, 0.0]))


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"gradient_clip_val": 0.5},
            r"gradient_clip_val=0\.5 needs automatic optimization.*minimize\(loss, gradient_c",
        ),
        (
            {"accumulate_grad_batches": 4},
            r"accumulate_grad_batches=4 needs automatic optimization.*minimize\(loss, acc",
        ),
    ],
)
def test_engine_settings_are_refused_with_what_to_write_instead(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(tmp_path, **options).fit(EveryThird(), rows(3))


def test_lbfgs_is_refused_under_loss_scaling(tmp_path: Path) -> None:
    class Fitting(Line):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS([self.weight])

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.optimizers().step(lambda: self.loss(batch))

    with pytest.raises(ConfigurationError, match=r"LBFGS evaluates its closure several times.*bf16-mixed"):
        make_trainer(tmp_path, precision="16-mixed").fit(Fitting(), rows(1))


def test_minimize_refuses_an_optimizer_that_needs_a_closure(tmp_path: Path) -> None:
    class Fitting(Line):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS([self.weight])

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.optimizers().minimize(self.loss(batch))

    with pytest.raises(ConfigurationError, match=r"LBFGS.*closure.*optimizer\.step\(closure\)"):
        make_trainer(tmp_path).fit(Fitting(), rows(1))


def test_manual_backward_is_refused_in_automatic_optimization(tmp_path: Path) -> None:
    class Mixed(Line):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = True

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))

    with pytest.raises(StepError, match=r"automatic_optimization = False in __init__"):
        make_trainer(tmp_path).fit(Mixed(), rows(1))


def test_optimizers_are_there_during_fit_only() -> None:
    with pytest.raises(LeydenError, match="during fit only"):
        EveryThird().optimizers()
