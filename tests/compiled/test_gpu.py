"""Steps as CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import leyden as L
from both_ways import Net, assert_same, batches, fit, needs_tracing

pytestmark = [
    needs_tracing,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


class Drops(Net):
    def __init__(self) -> None:
        super().__init__(
            lambda net: optim.AdamW(net.parameters(), lr=1e-2),
            *(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1)),
        )


class Carries(Net):
    """Carries a tensor from step to step, which CUDA graphs would write over."""

    hidden: Tensor | None = None

    def loss(self, batch: Any) -> Tensor:
        found = self.net(batch[0])
        if self.hidden is not None and len(self.hidden) == len(found):
            found = found + 0.1 * self.hidden
        self.hidden = found.detach()
        return nn.functional.mse_loss(found, batch[1])


@pytest.mark.parametrize("make", [Net, Drops, Carries])
@pytest.mark.parametrize(
    "options", [{}, {"precision": "bf16-mixed"}, {"precision": "16-mixed"}, {"accumulate_grad_batches": 2}], ids=str
)
def test_equal_to_eager(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    tolerance = 5e-2 if "precision" in options else 1e-3
    eager, ran = (
        fit(tmp_path, make(), batches(), compile=compile, accelerator="cuda", **options) for compile in (False, True)
    )
    assert ran.whole, ran.line
    assert_same(ran, eager, tolerance)


class Watches(L.Callback):
    """Lets torch raise whenever the host waits for the device, from the third epoch on."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if trainer.current_epoch >= 2 else "default")

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


def test_the_host_does_not_wait(tmp_path: Path) -> None:
    x = torch.randn(40, 6, device="cuda")
    data = [(part, part.sum(1, keepdim=True)) for part in x.split(4)]

    class Resident:
        def __len__(self) -> int:
            return len(data)

        def __iter__(self) -> Any:
            return iter(data)

    try:
        ran = fit(tmp_path, Net(), Resident(), Watches(), accelerator="cuda", logger=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ran.whole, ran.line


def test_values_that_callbacks_keep_are_not_written_over(tmp_path: Path) -> None:
    class Keeps(L.Callback):
        def __init__(self) -> None:
            self.now: list[float] = []
            self.metrics: list[Any] = []

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            self.now.append(float(outputs["loss"]))
            self.metrics.append(trainer.callback_metrics["loss_step"])

    ran = fit(tmp_path, Net(), batches(), keeps := Keeps(), accelerator="cuda")
    assert ran.whole, ran.line
    assert [float(each) for each in keeps.metrics] == keeps.now
