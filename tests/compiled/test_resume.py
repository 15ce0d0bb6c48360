"""A compiled run that goes on from a checkpoint makes the same steps, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from both_ways import Net, Ran, batches, codes, fit, needs_cpp, needs_tracing, run_as_traced, traced_only
from leyden.checkpoint.format import load_checkpoint
from same_values import same

pytestmark = needs_tracing
_ = traced_only


class Saves(L.Callback):
    """Saves after each step, under the step's number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step, batch = trainer.global_step, trainer._run.progress.total_batches  # type: ignore[union-attr]
        if trainer._run.progress.micro_batch == 0:  # type: ignore[union-attr]
            trainer.at_step_boundary(lambda: trainer.save_checkpoint(self.folder / f"{step}.ckpt"))
        else:
            trainer.save_checkpoint(self.folder / f"within-{batch}.ckpt")


class Drops(Net):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(
            Net().optimizer,
            *(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1)),
        )


class InParts(Drops):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        print(end="")
        return loss * 1.5


class Tires(Drops):
    """Cannot be traced any more from its tenth step on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.current_epoch >= 1 and batch_idx >= 4:
            print(end="")
        return loss


def many_sizes() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(60, 6, generator=generator), torch.randn(60, 1, generator=generator))
    sizes = (4, 2, 3, 5, 4, 6, 2, 7, 4, 6)
    return DataLoader(data, batch_sampler=[list(range(5 * n, 5 * n + size)) for n, size in enumerate(sizes)])


def assert_goes_on(ran: Ran, again: Ran) -> None:
    assert same(dict(ran.module.state_dict()), dict(again.module.state_dict()))
    assert same(ran.optimizer_state, again.optimizer_state)
    assert 0 < len(again.rows) < len(ran.rows)
    assert ran.rows[-len(again.rows) :] == again.rows


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any], tuple[int, ...], dict[str, Any]]] = {
    "a last batch of another size": (Drops, batches, (1, 2, 7), {}),
    "more than four sizes": (Drops, many_sizes, (14,), {}),
    "in parts": (InParts, many_sizes, (7,), {}),
    "windows": (Drops, batches, (1, 2), {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
    "given up later": (Tires, batches, (2, 12), {}),
}


@needs_cpp
@pytest.mark.parametrize("name", CASES)
def test_the_rest_is_the_same_to_the_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, loader, stops, options = CASES[name]
    if name != "a last batch of another size":
        run_as_traced(monkeypatch)
    ran = fit(tmp_path, make(), loader(), Saves(tmp_path), max_epochs=3, **options)
    assert ran.whole == (name not in ("in parts", "given up later")), ran.line
    for step in stops:
        again = fit(tmp_path, make(), loader(), ckpt_path=tmp_path / f"{step}.ckpt", max_epochs=3, **options)
        assert_goes_on(ran, again)
        assert again.whole == ran.whole
        assert codes(again) == codes(ran)[: len(codes(again))]


@pytest.mark.usefixtures("traced_only")
def test_within_a_window(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "max_epochs": 3}
    ran = fit(tmp_path, Net(), batches(6), Saves(tmp_path), **options)
    again = fit(tmp_path, Net(), batches(6), ckpt_path=tmp_path / "within-8.ckpt", **options)
    assert load_checkpoint(tmp_path / "within-8.ckpt")["progress"]["micro_batch"] == 2
    # the window that was begun ends in eager, which is another way of rounding
    for one, other in zip(ran.module.parameters(), again.module.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert again.trainer.global_step == ran.trainer.global_step == 6


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("compiled_first", [True, False])
def test_eager_runs_go_on_compiled_and_the_other_way_round(compiled_first: bool, tmp_path: Path) -> None:
    ran = fit(tmp_path, Drops(), batches(), Saves(tmp_path), compile=compiled_first, max_epochs=3)
    again = fit(tmp_path, Drops(), batches(), ckpt_path=tmp_path / "7.ckpt", compile=not compiled_first, max_epochs=3)
    for one, other in zip(ran.module.state_dict().values(), again.module.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert (again if not compiled_first else ran).whole
    assert again.trainer.global_step == 15


def test_what_a_checkpoint_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_as_traced(monkeypatch)
    fit(tmp_path, Net(), batches(), Saves(tmp_path), max_epochs=2)
    assert load_checkpoint(tmp_path / "1.ckpt")["compiled"] == {"shapes": [], "given_up": None, "entirely": False}
    assert load_checkpoint(tmp_path / "2.ckpt")["compiled"]["shapes"] == [[[4, 6], [4, 1]]]
    assert load_checkpoint(tmp_path / "7.ckpt")["compiled"]["shapes"] == [[[4, 6], [4, 1]], [[2, 6], [2, 1]]]
