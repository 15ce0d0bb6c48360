"""Style transfer in the manner of 0.7: a frozen feature net, an own `backward`, pictures and not data to train on."""

from __future__ import annotations

import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import leyden as pl
from quiet import Memory, make_trainer

CONTENT, STYLE = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).unbind(0)


def gram(features: Any) -> Any:
    n, c, h, w = features.shape
    flat = features.view(n, c, h * w)
    return flat @ flat.transpose(1, 2) / (c * h * w)


class StyleTransfer(pl.LightningModule):
    def __init__(self, hparams: Any) -> None:
        super().__init__()
        self.hparams = hparams
        torch.manual_seed(5)
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3))
        for parameter in self.features.parameters():
            parameter.requires_grad = False
        self.picture = nn.Parameter(CONTENT.clone())
        self.called: list[Any] = []

    def forward(self) -> Any:
        return self.picture.clamp(0, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        content, style = batch
        mine = self.features(self())
        content_loss = F.mse_loss(mine, self.features(content))
        style_loss = F.mse_loss(gram(mine), gram(self.features(style)))
        loss = content_loss + self.hparams.style_weight * style_loss
        logs = {"content": content_loss, "style": style_loss}
        return {"loss": loss, "log": logs, "progress_bar": logs}

    def backward(self, trainer: Any, loss: Any, optimizer: Any, optimizer_idx: int) -> None:  # type: ignore[override]
        self.called.append((type(trainer).__name__, optimizer_idx, isinstance(optimizer.param_groups, list)))
        loss.backward(retain_graph=True)
        self.picture.grad /= self.picture.grad.abs().mean()  # of the same size in each step, whatever the losses are

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([self.picture], lr=0.05)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(CONTENT.expand(4, -1, -1, -1), STYLE.expand(4, -1, -1, -1)), batch_size=1)


def by_hand(epochs: int, clip: float) -> tuple[StyleTransfer, list[float]]:
    model, styles = StyleTransfer(Namespace(style_weight=100.0)), []
    optimizer = model.configure_optimizers()
    for _ in range(4 * epochs):
        output = model.training_step((CONTENT, STYLE), 0)
        optimizer.zero_grad()
        output["loss"].backward()
        model.picture.grad /= model.picture.grad.abs().mean()
        nn.utils.clip_grad_norm_([model.picture], clip)
        optimizer.step()
        styles.append(output["log"]["style"].item())
    return model, styles


@pytest.mark.filterwarnings(r"ignore:\[LEY-former-name\]")
def test_the_picture_is_that_of_the_loop_by_hand(tmp_path: Path) -> None:
    memory, model = Memory(), StyleTransfer(Namespace(style_weight=100.0))
    before = [parameter.clone() for parameter in model.features.parameters()]
    trainer = make_trainer(tmp_path, max_epochs=5, logger=memory, log_every_n_steps=1, gradient_clip_val=5.0)
    trainer.fit(model)
    hand, styles = by_hand(5, 5.0)
    torch.testing.assert_close(model.picture, hand.picture, rtol=0, atol=1e-5)
    assert memory.of("style") == pytest.approx(styles, rel=1e-4)
    assert styles[-1] < 0.5 * styles[0]
    assert all(torch.equal(one, other) for one, other in zip(before, model.features.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in model.features.parameters())
    assert model.called == [("Trainer", 0, True)] * 20


def test_the_former_backward_is_told_of(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        make_trainer(tmp_path, limit_train_batches=1).fit(StyleTransfer(Namespace(style_weight=1.0)))
    written = "StyleTransfer.backward(trainer, loss, optimizer, optimizer_idx)"
    assert [each for each in told if written in str(each.message) and "def backward(self, loss)" in str(each.message)]
