"""A run of several processes goes on after its end as if nothing had happened; also with more of them, or fewer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import ModelCheckpoint
from quiet import make_trainer
from ranks import run_trainers

SAMPLES, GLOBAL_BATCH, EPOCHS = 98, 12, 2  # nine batches per epoch, the last one of two samples
STOP_AT = 13  # in the middle of the second epoch


class Dropped(L.LightningModule):
    """Draws random numbers, and remembers which samples it has seen."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Dropout(dropout), nn.Tanh(), nn.Linear(16, 1))
        self.seen: dict[int, list[int]] = {epoch: [] for epoch in range(EPOCHS)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, which = batch
        if self._running().weight:  # 0 where a rank that has no sample of the last batch repeats one
            self.seen[self.current_epoch] += which.tolist()
        loss = F.mse_loss(self.net(x), y)
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def fit(rank: int, ranks: int, folder: Path, dropout: float, ckpt_path: Path | None = None, **options: Any) -> Any:
    L.seed_everything(7 + 10 * rank, verbose=False)
    module = Dropped(dropout)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 6, generator=generator)
    dataset = TensorDataset(x, x.sum(1, keepdim=True).sin(), torch.arange(SAMPLES))
    loader = DataLoader(dataset, batch_size=GLOBAL_BATCH // ranks, shuffle=True)
    keep = ModelCheckpoint(folder, filename="at-{step}", every_n_train_steps=STOP_AT, save_top_k=-1)
    trainer = make_trainer(folder, keep, enable_checkpointing=True, max_epochs=EPOCHS, **options)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    optimizer = [state["exp_avg_sq"].clone() for state in trainer.optimizers[0].state.values()]
    return {"weights": module.state_dict(), "optimizer": optimizer, "metrics": metrics, "seen": module.seen}


def on(ranks: int, *args: Any, **options: Any) -> list[Any]:
    if ranks == 1:
        return [fit(0, 1, *args, **options)]
    return run_trainers(lambda rank: fit(rank, ranks, *args, **options), ranks)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_as_many_ranks_go_on_to_the_last_bit(dropout: float, tmp_path: Path) -> None:
    whole = on(2, tmp_path / "whole", dropout)
    on(2, tmp_path, dropout, max_steps=STOP_AT)
    again = on(2, tmp_path / "again", dropout, tmp_path / f"at-step={STOP_AT}.ckpt")
    for undisturbed, resumed in zip(whole, again, strict=True):
        assert resumed["metrics"] == undisturbed["metrics"]
        for name, value in undisturbed["weights"].items():
            assert torch.equal(resumed["weights"][name], value), name
        for first, second in zip(undisturbed["optimizer"], resumed["optimizer"], strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (4, 1), (1, 3), (2, 4)])
def test_other_numbers_of_ranks_lose_no_sample_and_see_none_twice(before: int, after: int, tmp_path: Path) -> None:
    whole = on(1, tmp_path / "whole", 0.0)[0]
    begun = on(before, tmp_path, 0.0, max_steps=STOP_AT)
    ended = on(after, tmp_path / "again", 0.0, tmp_path / f"at-step={STOP_AT}.ckpt")
    last = EPOCHS - 1
    seen = [which for result in (*begun, *ended) for which in result["seen"][last]]
    assert sorted(seen) == list(range(SAMPLES))
    for result in ended:
        assert result["metrics"] == pytest.approx(whole["metrics"], rel=1e-4)
        for name, value in whole["weights"].items():
            torch.testing.assert_close(result["weights"][name], value, rtol=1e-4, atol=1e-5)
        for first, second in zip(whole["optimizer"], result["optimizer"], strict=True):
            torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-7)


def test_the_checkpoint_of_two_ranks_is_one_file_like_that_of_one(tmp_path: Path) -> None:
    on(2, tmp_path / "two", 0.0, max_steps=STOP_AT)
    on(1, tmp_path / "one", 0.0, max_steps=STOP_AT)
    two, one = (L.load_checkpoint(tmp_path / name / f"at-step={STOP_AT}.ckpt") for name in ("two", "one"))
    assert set(two) - set(one) == {"other_ranks"}
    assert len(two["other_ranks"]) == 1
    assert json.dumps(two["progress"]) == json.dumps(one["progress"])
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-4, atol=1e-5)
