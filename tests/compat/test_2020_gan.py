"""A GAN with two optimizers in automatic optimization, as of 0.7, against a loop by hand."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import leyden as pl
from leyden.errors import HookError
from quiet import Memory, make_trainer

pytestmark = pytest.mark.filterwarnings(r"ignore:\[LEY-former-name\]")

REAL = torch.randn(48, 2, generator=torch.Generator().manual_seed(1)) * 0.5 + 2
SIZE = 8


class GAN(pl.LightningModule):
    def __init__(self, hparams: Any) -> None:
        super().__init__()
        self.hparams = hparams
        self.generator = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        self.discriminator = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        self.turns: list[tuple[int, int]] = []

    def noise(self, batch_idx: int) -> Any:
        return torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(100 + batch_idx))

    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
        (real,) = batch
        self.turns.append((batch_idx, optimizer_idx))
        fake = self.generator(self.noise(batch_idx))
        if optimizer_idx == 0:
            assert not any(parameter.requires_grad for parameter in self.discriminator.parameters())
            loss = F.binary_cross_entropy_with_logits(self.discriminator(fake), torch.ones(SIZE, 1))
            return {"loss": loss, "progress_bar": {"g_loss": loss}, "log": {"g_loss": loss}}
        assert not any(parameter.requires_grad for parameter in self.generator.parameters())
        on_real = F.binary_cross_entropy_with_logits(self.discriminator(real), torch.ones(SIZE, 1))
        on_fake = F.binary_cross_entropy_with_logits(self.discriminator(fake.detach()), torch.zeros(SIZE, 1))
        loss = (on_real + on_fake) / 2
        return {"loss": loss, "progress_bar": {"d_loss": loss}, "log": {"d_loss": loss}}

    def configure_optimizers(self) -> Any:
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=self.hparams.lr, betas=(0.5, 0.9))
        opt_d = torch.optim.SGD(self.discriminator.parameters(), lr=0.1, momentum=0.9)
        return [opt_g, opt_d], [torch.optim.lr_scheduler.StepLR(opt_d, step_size=1, gamma=0.5)]

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(REAL), batch_size=SIZE)


def made() -> GAN:
    torch.manual_seed(3)
    return GAN(Namespace(lr=0.02))


def by_hand(epochs: int = 2, accumulate: int = 1, clip: float | None = None) -> tuple[GAN, list[float], list[float]]:
    gan = made()
    (opt_g, opt_d), (scheduler,) = gan.configure_optimizers()
    g_losses, d_losses = [], []
    for _ in range(epochs):
        for batch_idx in range(6):
            last = (batch_idx + 1) % accumulate == 0
            for index, (optimizer, frozen) in enumerate(((opt_g, gan.discriminator), (opt_d, gan.generator))):
                frozen.requires_grad_(False)
                loss = gan.training_step((REAL[batch_idx * SIZE : (batch_idx + 1) * SIZE],), batch_idx, index)["loss"]
                (loss / accumulate).backward()
                frozen.requires_grad_(True)
                (g_losses, d_losses)[index].append(loss.item())
                if last:
                    if clip is not None:
                        torch.nn.utils.clip_grad_norm_(
                            [p for group in optimizer.param_groups for p in group["params"]], clip
                        )
                    optimizer.step()
                    optimizer.zero_grad()
        scheduler.step()
    return gan, g_losses, d_losses


def assert_same_weights(one: Any, other: Any, atol: float = 1e-6) -> None:
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (1, 0.05), (2, None), (3, 0.05)])
def test_the_optimizers_take_turns_as_in_the_loop_by_hand(tmp_path: Path, accumulate: int, clip: float | None) -> None:
    memory, gan = Memory(), made()
    trainer = make_trainer(
        tmp_path,
        max_epochs=2,
        logger=memory,
        log_every_n_steps=1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
    )
    trainer.fit(gan)
    hand, g_losses, d_losses = by_hand(2, accumulate, clip)
    assert gan.turns == hand.turns == [(batch, turn) for _ in range(2) for batch in range(6) for turn in (0, 1)]
    assert_same_weights(gan, hand)
    assert memory.of("g_loss") == pytest.approx(g_losses[accumulate - 1 :: accumulate], rel=1e-5)
    assert memory.of("d_loss") == pytest.approx(d_losses[accumulate - 1 :: accumulate], rel=1e-5)
    assert trainer.global_step == 12 // accumulate  # a step is one window, however many optimizers step in it
    assert trainer.optimizers[1].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)
    assert gan.automatic_optimization
    assert "training_step" not in vars(gan)


def test_the_last_short_window_is_divided_by_its_size(tmp_path: Path) -> None:
    gan = made()
    make_trainer(tmp_path, accumulate_grad_batches=4).fit(gan)  # six batches: windows of four and two
    hand = made()
    (opt_g, opt_d), _ = hand.configure_optimizers()
    for window in (range(4), range(4, 6)):
        for batch_idx in window:
            for index, frozen in ((0, hand.discriminator), (1, hand.generator)):
                frozen.requires_grad_(False)
                loss = hand.training_step((REAL[batch_idx * SIZE : (batch_idx + 1) * SIZE],), batch_idx, index)["loss"]
                (loss / len(window)).backward()
                frozen.requires_grad_(True)
                if batch_idx == window[-1]:
                    optimizer = (opt_g, opt_d)[index]
                    optimizer.step()
                    optimizer.zero_grad()
    assert_same_weights(gan, hand)


class Frequent(GAN):
    def configure_optimizers(self) -> Any:
        (opt_g, opt_d), _ = super().configure_optimizers()
        return {"optimizer": opt_g, "frequency": 1}, {"optimizer": opt_d, "frequency": 2}


def test_frequencies_give_batches_in_a_row(tmp_path: Path) -> None:
    torch.manual_seed(3)
    gan = Frequent(Namespace(lr=0.02))
    make_trainer(tmp_path).fit(gan)
    assert gan.turns == [(0, 0), (1, 1), (2, 1), (3, 0), (4, 1), (5, 1)]


class Alternating(GAN):
    """Steps the generator on every second batch; its gradients pile up meanwhile, as they did."""

    def optimizer_step(
        self, current_epoch: int, batch_nb: int, optimizer: Any, optimizer_i: int, second_order_closure: Any = None
    ) -> None:
        if optimizer_i == 1 or batch_nb % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()


def test_an_optimizer_step_of_0_7_finds_the_gradients_there(tmp_path: Path) -> None:
    torch.manual_seed(3)
    gan = Alternating(Namespace(lr=0.02))
    trainer = make_trainer(tmp_path)
    trainer.fit(gan)
    hand = made()
    (opt_g, opt_d), _ = hand.configure_optimizers()
    for batch_idx in range(6):
        for index, frozen in ((0, hand.discriminator), (1, hand.generator)):
            frozen.requires_grad_(False)
            hand.training_step((REAL[batch_idx * SIZE : (batch_idx + 1) * SIZE],), batch_idx, index)["loss"].backward()
            frozen.requires_grad_(True)
            if index == 1 or batch_idx % 2 == 1:
                (opt_g, opt_d)[index].step()
                (opt_g, opt_d)[index].zero_grad()
    assert_same_weights(gan, hand)
    assert trainer.global_step == 6


class OfOneX(GAN):
    """The signature of 1.x: the closure computes, and `step` calls it."""

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_idx: int,
        optimizer_closure: Any,
        on_tpu: bool = False,
        using_native_amp: bool = False,
        using_lbfgs: bool = False,
    ) -> None:
        optimizer.step(closure=optimizer_closure)


def test_an_optimizer_step_of_1_x_calls_its_closure(tmp_path: Path) -> None:
    torch.manual_seed(3)
    gan = OfOneX(Namespace(lr=0.02))
    make_trainer(tmp_path, max_epochs=2).fit(gan)
    hand, *_ = by_hand(2)
    assert_same_weights(gan, hand)
    assert gan.turns == hand.turns


def test_several_optimizers_without_a_place_for_their_index_are_refused(tmp_path: Path) -> None:
    class Blind(GAN):
        def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
            return {"loss": self.generator(self.noise(0)).mean(), "log": {}}

    with pytest.raises(HookError, match=r"Blind\.training_step\(batch, batch_idx\).*no place for optimizer_idx"):
        make_trainer(tmp_path).fit(Blind(Namespace(lr=0.02)))


def test_it_goes_on_from_a_checkpoint_as_if_nothing_had_happened(tmp_path: Path) -> None:
    straight = made()
    make_trainer(tmp_path, max_epochs=4).fit(straight)
    first = made()
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(first)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = made()
    make_trainer(tmp_path, max_epochs=4).fit(second, ckpt_path=tmp_path / "half.ckpt")
    assert_same_weights(second, straight, atol=0)


def by_its_closure(self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_idx: int, closure: Any, on_tpu: bool = False,
                   using_native_amp: bool = False, using_lbfgs: bool = False) -> None:  # fmt: skip
    optimizer.step(closure=closure)


def by_itself(self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_idx: int, opt_closure: Any, on_tpu: bool,
              using_native_amp: bool, using_lbfgs: bool) -> None:  # fmt: skip
    optimizer.step()


def of_0_7(
    self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_idx: int, second_order_closure: Any = None
) -> None:
    optimizer.step()  # and no zero_grad


def by_super(
    self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_idx: int, closure: Any, *flags: bool
) -> None:
    pl.LightningModule.optimizer_step(self, epoch, batch_idx, optimizer, optimizer_idx, closure, *flags)  # type: ignore[call-arg]


def by_super_and_names(
    self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_idx: int, optimizer_closure: Any
) -> None:
    pl.LightningModule.optimizer_step(
        self, epoch, batch_idx, optimizer, optimizer_idx=optimizer_idx, optimizer_closure=optimizer_closure
    )


@pytest.mark.parametrize("step", [by_its_closure, by_itself, of_0_7, by_super, by_super_and_names])
def test_every_form_of_optimizer_step_is_the_loop_by_hand(tmp_path: Path, step: Any) -> None:
    torch.manual_seed(3)
    gan = type("Stepping", (GAN,), {"optimizer_step": step})(Namespace(lr=0.02))
    make_trainer(tmp_path, max_epochs=2).fit(gan)
    hand, *_ = by_hand(2)
    assert_same_weights(gan, hand)


def test_gradients_of_a_skipped_batch_are_gone_since_0_8(tmp_path: Path) -> None:
    def step(self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_idx: int, optimizer_closure: Any) -> None:
        if optimizer_idx == 1 or batch_idx % 2 == 1:
            optimizer.step(closure=optimizer_closure)

    torch.manual_seed(3)
    gan = type("Skipping", (GAN,), {"optimizer_step": step})(Namespace(lr=0.02))
    make_trainer(tmp_path).fit(gan)
    hand = made()
    (opt_g, opt_d), _ = hand.configure_optimizers()
    for batch_idx in range(6):
        for index, frozen in ((0, hand.discriminator), (1, hand.generator)):
            frozen.requires_grad_(False)
            (opt_g, opt_d)[index].zero_grad()
            hand.training_step((REAL[batch_idx * SIZE : (batch_idx + 1) * SIZE],), batch_idx, index)["loss"].backward()
            frozen.requires_grad_(True)
            if index == 1 or batch_idx % 2 == 1:
                (opt_g, opt_d)[index].step()
    assert_same_weights(gan, hand)
