"""Where ranks could go separate ways: what only one of them decides, changes, logs, or sees."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import ModelCheckpoint
from leyden.checkpoint import writer
from leyden.errors import RankError
from quiet import make_trainer
from ranks import run_trainers


def loader(ranks: int, samples: int = 64) -> DataLoader[Any]:
    x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=8 // ranks)


class Net(L.LightningModule):
    """A back and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.back, self.head = nn.Linear(6, 8), nn.Linear(8, 1)

    def loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self.head(self.back(batch[0]).tanh()), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])


def on_one_and_two(function: Callable[[int], Any]) -> tuple[Any, list[Any]]:
    """What ``function(ranks)`` gives in one process, and on each of two ranks."""
    return function(1), run_trainers(lambda rank: function(2), 2)


class Thawed(Net):
    """Trains its back in some epochs only."""

    def __init__(self, epochs: tuple[int, ...]) -> None:
        super().__init__()
        self.epochs = epochs
        self.back.requires_grad_(0 in epochs)

    def on_train_epoch_start(self) -> None:
        self.back.requires_grad_(self.current_epoch in self.epochs)


@pytest.mark.parametrize("epochs", [(1,), (0,), (0, 2)])
def test_parameters_may_be_frozen_and_unfrozen(epochs: tuple[int, ...], tmp_path: Path) -> None:
    def fit(ranks: int) -> Tensor:
        L.seed_everything(1, verbose=False)
        module = Thawed(epochs)
        make_trainer(tmp_path, max_epochs=3, accumulate_grad_batches=2).fit(module, loader(ranks))
        return weights(module)

    one, two = on_one_and_two(fit)
    assert torch.equal(*two)
    torch.testing.assert_close(two[0], one)


def test_a_plateau_watches_what_only_rank_zero_has_logged(tmp_path: Path) -> None:
    class Lone(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_rank == 0:
                self.log("lone", float(batch_idx))
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.05)
            scheduler = ReduceLROnPlateau(optimizer, patience=2)
            config = {"scheduler": scheduler, "monitor": "lone", "interval": "step", "strict": False}
            return {"optimizer": optimizer, "lr_scheduler": config}

    def fit(ranks: int) -> tuple[Tensor, float]:
        L.seed_everything(1, verbose=False)
        module, trainer = Lone(), make_trainer(tmp_path)
        trainer.fit(module, loader(ranks))
        return weights(module), trainer.optimizers[0].param_groups[0]["lr"]

    one, two = on_one_and_two(fit)
    assert one[1] == two[0][1] == two[1][1] < 0.05
    torch.testing.assert_close(two[1][0], one[0])


def test_a_validation_by_the_clock_comes_once(tmp_path: Path) -> None:
    class Slow(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            time.sleep(0.06)
            return self.loss(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch))

    class Steps(L.Callback):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.steps.append(trainer.global_step)

    def fit(rank: int) -> list[int]:
        steps = Steps()
        every = timedelta(seconds=0.5)
        trainer = make_trainer(
            tmp_path, steps, max_epochs=-1, max_steps=40, val_check_interval=every, check_val_every_n_epoch=None
        )
        trainer.fit(Slow(), loader(2), loader(2, 16))
        return steps.steps

    first, second = run_trainers(fit, 2)
    assert first == second
    assert len(first) >= 2
    assert all(later - earlier > 2 for earlier, later in pairwise(first)), first


def test_a_stop_before_the_first_step_makes_none(tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = trainer.global_rank == trainer.world_size - 1

    def fit(ranks: int) -> int:
        trainer = make_trainer(tmp_path, Stop())
        trainer.fit(Net(), loader(ranks))
        return trainer.global_step

    assert on_one_and_two(fit) == (0, [0, 0])


class ByHand(Net):
    """Steps its optimizer itself, once in ``accumulate`` batches."""

    def __init__(self, accumulate: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.accumulate = accumulate

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().minimize(self.loss(batch), accumulate_grad_batches=self.accumulate)


def test_a_smaller_last_batch_counts_by_its_size_in_manual_optimization_too(tmp_path: Path) -> None:
    def fit(ranks: int) -> Tensor:
        L.seed_everything(1, verbose=False)
        module = ByHand(1)
        make_trainer(tmp_path, max_epochs=2).fit(module, loader(ranks, 8 + 5))
        return weights(module)

    one, two = on_one_and_two(fit)
    assert torch.equal(*two)
    torch.testing.assert_close(two[0], one)


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_save_within_a_window_keeps_the_gradients_of_each_rank(by_hand: bool, tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_batch_end(
            self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 5:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    def fit(*callbacks: L.Callback, ranks: int, **options: Any) -> Tensor:
        L.seed_everything(1, verbose=False)
        module = ByHand(4) if by_hand else Net()
        trainer = make_trainer(tmp_path, *callbacks, accumulate_grad_batches=1 if by_hand else 4)
        trainer.fit(module, loader(ranks), **options)
        return weights(module)

    whole = run_trainers(lambda rank: fit(Save(), ranks=2), 2)
    again = run_trainers(lambda rank: fit(ranks=2, ckpt_path=tmp_path / "within.ckpt"), 2)
    assert torch.equal(again[0], whole[0]), "to the last bit"
    assert torch.equal(again[1], whole[0])
    alone = fit(ranks=1, ckpt_path=tmp_path / "within.ckpt")
    torch.testing.assert_close(alone, whole[0])


def test_after_fit_every_rank_finds_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = writer.write_tensors

    def slow(*args: Any) -> Any:
        time.sleep(0.5)
        return write(*args)

    monkeypatch.setattr(writer, "write_tensors", slow)

    def fit(rank: int) -> bool:
        keep = ModelCheckpoint(tmp_path / "kept")
        make_trainer(tmp_path, keep, enable_checkpointing=True).fit(Net(), loader(2))
        return os.path.exists(keep.best_model_path)

    assert run_trainers(fit, 2) == [True, True]


def test_a_failure_in_the_second_trainer_of_a_program_is_told_as_well(tmp_path: Path) -> None:
    class Faulty(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_rank == 1 and batch_idx == 3:
                raise ValueError("the culprit's own words")
            return self.loss(batch)

    def fit(rank: int) -> str:
        make_trainer(tmp_path).fit(Net(), loader(2))
        with pytest.raises((ValueError, RankError)) as raised:
            make_trainer(tmp_path).fit(Faulty(), loader(2))
        with pytest.raises(RankError, match="Start the program again"):
            make_trainer(tmp_path).fit(Net(), loader(2))
        return str(raised.value)

    first, second = run_trainers(fit, 2)
    assert first == "Rank 0 has ended, because rank 1 failed first: ValueError: the culprit's own words"
    assert second == "the culprit's own words"


def test_a_verb_that_one_rank_alone_calls_says_so(tmp_path: Path) -> None:
    def fit(rank: int) -> str:
        trainer, module = make_trainer(tmp_path), Net()
        trainer.fit(module, loader(2))
        if rank == 1:
            return ""  # the end of its program
        with pytest.raises(RankError) as raised:
            trainer.test(module, loader(2))
        return str(raised.value)

    said = run_trainers(fit, 2)[0]
    assert said.startswith("Rank 0 waits for rank 1, whose program has come to its end already.")


def test_a_save_that_others_do_not_come_to_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("leyden.ranks.WAIT_TOLD_AFTER_S", 0.3)

    def fit(rank: int) -> None:
        trainer = make_trainer(tmp_path)
        trainer.fit(Net(), loader(2))
        trainer.save_checkpoint(tmp_path / "together.ckpt")
        if rank == 1:
            time.sleep(1.0)
        trainer.save_checkpoint(tmp_path / "late.ckpt")

    run_trainers(fit, 2)
    said = capfd.readouterr().err
    assert said.count("has been in") == 1
    assert "[rank 0] has been in save_checkpoint for 0 s" in said


PROGRAM = """
import os, sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
from test_review import Net, loader
import leyden as L
from leyden.callbacks import ModelCheckpoint

class Faulty(Net):
    def training_step(self, batch, batch_idx):
        mark = Path(sys.argv[1], "suffered")
        if self.global_rank == 1 and self.global_step == 5 and not mark.exists():
            mark.touch()
            if sys.argv[2] == "exception":
                raise ValueError("the culprit's own words")
            os.kill(int(os.environ["LAUNCHER"]), 9)
        if sys.argv[2] == "orphans":
            time.sleep(0.2)
        return self.loss(batch)

def trainer(name):
    os.environ.setdefault("LAUNCHER", str(os.getpid()))
    return L.Trainer(accelerator="cpu", devices=2, max_restarts=1, max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[ModelCheckpoint(Path(sys.argv[1], name), every_n_train_steps=2)])

L.seed_everything(1, verbose=False)
if sys.argv[2] == "exception":
    trainer("first").fit(Net(), loader(2))
trainer("second").fit(Faulty(), loader(2, 64 if sys.argv[2] == "exception" else 6400))
"""


def started(folder: Path, what: str) -> subprocess.Popen[str]:
    program = folder / "program.py"
    program.write_text(PROGRAM.format(paths=[str(Path(__file__).parent), str(Path(__file__).parent.parent)]))
    return subprocess.Popen(
        [sys.executable, str(program), str(folder), what],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    """What all processes that write to the pipe have said; it is closed only when the last of them is gone."""
    try:
        return process.communicate(timeout=90)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return pytest.fail(f"not over after 90 s\n{process.communicate()[0]}")


def test_a_restart_goes_on_in_the_second_trainer_of_a_program(tmp_path: Path) -> None:
    process = started(tmp_path, "exception")
    said = ended(process)
    assert process.returncode == 0, said
    assert f"Going on from {tmp_path}/second/epoch=0-step=4.ckpt" in said


def test_no_rank_outlives_a_launcher_that_was_killed(tmp_path: Path) -> None:
    process = started(tmp_path, "orphans")
    said = ended(process)
    assert process.returncode == -signal.SIGKILL
    assert "ended, because its launcher was killed" in said
