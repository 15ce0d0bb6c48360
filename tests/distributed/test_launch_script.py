"""An ordinary script starts its processes by itself, or joins those that torchrun has started; the same results either way."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
import leyden as L
from leyden.strategy import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

class Sum(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - batch[1]).square().mean()
    def test_step(self, batch, batch_idx):
        self.log("error", (self.layer(batch[0]) - batch[1]).abs().mean())
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

L.seed_everything(1, verbose=False)
x = torch.randn(48, 4)
data = TensorDataset(x, x.sum(1, keepdim=True))
devices, batch_size, logs = int(sys.argv[1]), int(sys.argv[2]), (sys.argv + [None])[3]
model = Sum()
trainer = L.Trainer(accelerator="cpu", devices=devices, strategy=DDPStrategy(log_dir=logs) if logs else "auto", max_epochs=2,
                    logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(model, DataLoader(data, batch_size=batch_size, shuffle=True))
trainer.print("printed once")
print(f"rank {trainer.global_rank} of {trainer.world_size} comes to its end")
results = trainer.test(model, DataLoader(data, batch_size=5))
trainer.print(f"error {results[0]['error']:.5f}")
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def run(tmp_path: Path, *arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return subprocess.run(
        [sys.executable, *launcher, str(path), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def error(done: subprocess.CompletedProcess[str]) -> float:
    assert done.returncode == 0, done.stderr
    [value] = re.findall(r"^error (\S+)$", done.stdout, re.MULTILINE)
    return float(value)


def test_a_script_starts_its_ranks_and_is_one_process(tmp_path: Path) -> None:
    one, two = run(tmp_path, 1, 12), run(tmp_path, 2, 6)
    assert error(two) == pytest.approx(error(one), abs=2e-5)
    assert two.stdout.count("printed once") == 1
    for rank in (0, 1):
        assert f"rank {rank} of 2 comes to its end" in two.stdout


def test_the_same_script_under_torchrun(tmp_path: Path) -> None:
    by_itself, by_torchrun = run(tmp_path, 2, 6), run(tmp_path, 2, 6, launcher=TORCHRUN)
    assert error(by_torchrun) == error(by_itself)


def test_other_devices_than_torchrun_are_an_error_on_each_rank(tmp_path: Path) -> None:
    done = run(tmp_path, 3, 4, launcher=TORCHRUN)
    assert done.returncode != 0
    messages = re.findall(r"ConfigurationError: (.*)", done.stderr)
    assert len(messages) >= 2
    assert all("devices=3" in message and "2" in message for message in messages[:2])


def test_each_rank_writes_a_log_if_asked(tmp_path: Path) -> None:
    done = run(tmp_path, 2, 6, tmp_path / "logs")
    assert done.returncode == 0, done.stderr
    texts = {path.parent.name: path.read_text() for path in (tmp_path / "logs").rglob("stdout.log")}
    assert sorted(texts) == ["0", "1"]
    for rank in ("0", "1"):
        assert f"rank {rank} of 2 comes to its end" in texts[rank]
    assert "rank 1 of 2 comes to its end" in done.stdout, "and on the terminal"


def test_a_program_from_standard_input_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-", "2", "6"],
        input=SCRIPT, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Python was started without one" in done.stderr
