"""The same with torch's own compiler: what the graphs compute as machine code is what eager computes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset

from both_ways import Net, batches, both, needs_cpp, needs_tracing
from leyden.compiled import shapes

pytestmark = [needs_tracing, needs_cpp]


class Drops(Net):
    """Dropouts of several sizes and other random numbers, BatchNorm, a carried state: what order matters for."""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(
            optimizer or Net().optimizer,
            *(
                nn.Linear(6, 8, bias=False),
                nn.BatchNorm1d(8),
                nn.Dropout(0.3),
                nn.Tanh(),
                nn.Linear(8, 5),
                nn.Dropout(0.5),
            ),
            nn.Linear(5, 1),
        )
        self.cell = nn.GRUCell(6, 6)
        self.hidden: Tensor | None = None
        self.embedding = nn.Embedding(3, 6)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        hidden = self.hidden if self.hidden is not None and len(self.hidden) == len(x) else torch.zeros(len(x), 6)
        x = x + 0.1 * torch.rand_like(x) + self.embedding((x[:, 0] > 0).long())
        x = self.cell(x, hidden)
        self.hidden = x.detach()
        return nn.functional.mse_loss(self.net(x), y) + 0.1 * torch.randn(3).mean() * self.net[0].weight.mean()


def cosine(net: Net) -> Any:
    optimizer = optim.AdamW(net.parameters(), lr=1e-2)
    scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_a_step_with_all_of_it(tmp_path: Path) -> None:
    ran, _ = both(
        tmp_path,
        lambda: Drops(cosine),
        lambda: batches(6, last=4),
        tolerance=1e-3,
        max_epochs=7,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
    )
    assert ran.whole, ran.line
    assert not ran.warned
    assert ran.compiled.compilations == 2  # the two places in a window
    assert ran.trainer.global_step == 21


def test_mixed_precision(tmp_path: Path) -> None:
    ran, _ = both(tmp_path, Net, lambda: batches(last=4), tolerance=5e-2, precision="16-mixed")
    assert ran.whole, ran.line


def test_a_traced_optimizer(tmp_path: Path) -> None:
    ran, _ = both(tmp_path, lambda: Net(lambda net: optim.NAdam(net.parameters(), lr=1e-2)), lambda: batches(last=4))
    assert ran.whole, ran.line


def test_sizes_that_are_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "MAX_STATIC_SHAPES", 1)
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(60, 6, generator=generator), torch.randn(60, 1, generator=generator))
    sizes = (4, 4, 4, 4, 6, 2, 7, 3, 5, 8)

    def loader() -> Any:
        return DataLoader(data, batch_sampler=[list(range(5 * n, 5 * n + size)) for n, size in enumerate(sizes)])

    ran, _ = both(tmp_path, Net, loader, max_epochs=3)
    assert ran.whole, ran.line
    assert ran.compiled.compilations == 2


def test_in_a_program_whose_warnings_are_errors_and_that_has_worker_processes(tmp_path: Path) -> None:
    program = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        import torch, leyden as L
        from pathlib import Path
        from quiet import make_trainer
        from torch.utils.data import DataLoader, TensorDataset

        class Net(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(3, 1)
            def training_step(self, batch, batch_idx):
                return self.layer(batch[0]).square().mean()
            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters())

        if __name__ == "__main__":
            data = DataLoader(TensorDataset(torch.randn(8, 3)), batch_size=2, num_workers=1)
            trainer = make_trainer(Path({str(tmp_path)!r}), compile=True, max_epochs=3)
            trainer.fit(Net(), data)
            print(trainer._run.compiled.line())
    """
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(program), encoding="utf-8")
    done = subprocess.run([sys.executable, "-W", "error", path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "the whole step is compiled: 1 graph" in done.stdout
