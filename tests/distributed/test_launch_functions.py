"""Verbs whose ranks are new processes of the program that called them: at a prompt, in a notebook, within a function."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import ModelCheckpoint
from leyden.errors import ConfigurationError, LeydenWarning, RankError
from leyden.loggers import CSVLogger
from leyden.strategy.own_memory import take_out_of_shared_memory
from leyden.strategy.unpicklable import first_unpicklable
from quiet import make_trainer

pytestmark = [
    # of forking where there are threads, which Python 3.12 and later say
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LEY-no-val-loader"),
]
RATE = 0.05


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += len(batch[0])
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"y": self.net(batch[0])[:, 0], "pid": os.getpid()}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), RATE, momentum=0.9)


def data(samples: int = 16) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 3, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True))


def loader(batch_size: int, samples: int = 16) -> Any:
    return DataLoader(data(samples), batch_size)


def forked(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    settings: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2, "max_epochs": 2, "enable_checkpointing": saves}
    return make_trainer(folder, *callbacks, **(settings | options))


def by_hand(epochs: int, batch_size: int) -> Net:
    module = Net()
    optimizer = torch.optim.SGD(module.parameters(), RATE, momentum=0.9)
    for _ in range(epochs):
        for x, y in loader(batch_size):
            optimizer.zero_grad()
            nn.functional.mse_loss(module.net(x), y).backward()
            optimizer.step()
    return module


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_the_parent_goes_on_as_if_fit_had_run_in_it(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(monitor="val_loss", dirpath=tmp_path / "saved")
    module, trainer = Net(), forked(tmp_path, checkpoint)
    trainer.fit(module, loader(4), loader(4))
    expected = by_hand(2, 8)
    assert_same_weights(module, expected)
    assert int(module.seen) == 16  # rank 0's half of two epochs
    assert (trainer.global_step, trainer.current_epoch, trainer.world_size) == (4, 2, 2)
    x, y = data().tensors
    with torch.no_grad():
        loss = nn.functional.mse_loss(expected.net(x), y)
    torch.testing.assert_close(trainer.callback_metrics["val_loss"], loss)
    saved = L.load_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert trainer.checkpoint_callback is checkpoint
    assert float(checkpoint.best_model_score) == pytest.approx(float(loss))
    for name, value in saved["state_dict"].items():
        assert torch.equal(value, module.state_dict()[name]), name
    assert module.trainer is trainer
    assert not trainer.interrupted
    assert not torch.distributed.is_initialized()


def test_results_come_back_whole_and_in_order(tmp_path: Path) -> None:
    module, trainer = Net(), forked(tmp_path, ModelCheckpoint(dirpath=tmp_path))
    trainer.fit(module, loader(4))
    x, y = data(13).tensors  # neither 2 nor 4 divides it
    with torch.no_grad():
        predicted = module.net(x)[:, 0]
        loss = float(nn.functional.mse_loss(module.net(x), y))
    assert trainer.validate(module, loader(4, 13)) == [{"val_loss": pytest.approx(loss)}]
    assert trainer.test(module, loader(4, 13)) == [{"test_loss": pytest.approx(loss)}]
    outputs = trainer.predict(module, loader(4, 13))
    assert outputs is not None
    torch.testing.assert_close(torch.cat([output["y"] for output in outputs]), predicted)
    assert len({output["pid"] for output in outputs} - {os.getpid()}) == 2


def test_a_verb_without_a_model_takes_the_best_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trainer = forked(tmp_path, ModelCheckpoint(monitor="val_loss", dirpath=tmp_path))
    module = Net()
    trainer.fit(module, loader(4), loader(4))
    with torch.no_grad():
        loss = float(nn.functional.mse_loss(module.net(data().tensors[0]), data().tensors[1]))
        for parameter in module.parameters():
            parameter.zero_()
    assert trainer.test(dataloaders=loader(4)) == [{"test_loss": pytest.approx(loss)}]
    assert capfd.readouterr().out.count("its best checkpoint is taken") == 1
    assert any(parameter.any() for parameter in module.parameters())


class Late(Net):
    """Makes its layers in the ranks."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            torch.manual_seed(7)
            self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


class Own(Late):
    def configure_model(self) -> None:
        pass

    def setup(self, stage: str) -> None:
        Late.configure_model(self)


def test_layers_of_configure_model_come_back(tmp_path: Path) -> None:
    module, trainer = Late(), forked(tmp_path)
    trainer.fit(module, loader(4))
    assert_same_weights(module, by_hand(2, 8))


def test_layers_of_setup_stay_behind_and_that_is_said(tmp_path: Path) -> None:
    module = Own()
    with pytest.warns(LeydenWarning, match=r"weights-left-in-ranks.*net\.0\.bias"):
        forked(tmp_path).fit(module, loader(4))
    assert int(module.seen) == 16


class Brings(Net):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def configure_callbacks(self) -> Any:
        return ModelCheckpoint(dirpath=self.folder)


def test_callbacks_that_the_module_brings_come_back(tmp_path: Path) -> None:
    trainer = forked(tmp_path, enable_checkpointing=None)
    trainer.fit(Brings(tmp_path / "brought"), loader(4))
    assert Path(trainer.checkpoint_callback.best_model_path).exists()


def test_more_tensors_than_a_process_may_have_files(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, files[1]))
    try:
        outputs: Any = forked(tmp_path).predict(Net(), loader(1, 600))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
    assert len(outputs) == 600


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader(4)

    def test_dataloader(self) -> Any:
        return loader(4)


def test_a_datamodule_is_known_afterwards(tmp_path: Path) -> None:
    trainer, datamodule, module = forked(tmp_path), Data(), Net()
    trainer.fit(module, datamodule)
    assert trainer.datamodule is datamodule
    assert len(trainer.test()) == 1
    trainer = forked(tmp_path)
    trainer.fit(module, datamodule=datamodule)
    assert trainer.datamodule is datamodule


def test_random_numbers_go_on_where_rank_0_was(tmp_path: Path) -> None:
    class Draws(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            torch.rand(1)
            return super().training_step(batch, batch_idx)

    def drawn_after(trainer: L.Trainer, batch_size: int) -> Tensor:
        module = Draws()
        torch.manual_seed(3)
        trainer.fit(module, DataLoader(data(), batch_size, shuffle=True))
        return torch.rand(1)

    alone = drawn_after(make_trainer(tmp_path), 8)
    assert torch.equal(drawn_after(forked(tmp_path, max_epochs=1), 4), alone)
    torch.manual_seed(3)
    assert not torch.equal(torch.rand(1), alone)


def test_the_next_verb_logs_to_the_same_folder(tmp_path: Path) -> None:
    module, trainer = Net(), forked(tmp_path, logger=CSVLogger(tmp_path))
    trainer.fit(module, loader(4), loader(4))
    trainer.test(module, loader(4))
    folders = list((tmp_path / "lightning_logs").iterdir())
    assert [folder.name for folder in folders] == ["version_0"]
    rows = (folders[0] / "metrics.csv").read_text().splitlines()
    assert "test_loss" in rows[0]
    assert "val_loss" in rows[0]
    assert len(rows) == 1 + 2 * 2 + 1  # train and val of two epochs, and the test


# Failures


class Fails(Net):
    def __init__(self, rank: int, how: str, once: Path | None = None) -> None:
        super().__init__()
        self.rank, self.how, self.once = rank, how, once

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_rank != self.rank or self.trainer.global_step < 3:
            return
        if self.once is not None:
            if self.once.exists():
                return
            self.once.write_text("")
        if self.how == "raise":
            raise ValueError("the flux capacitor is empty")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_in_a_rank_is_named_and_its_traceback_seen(
    rank: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    module, before = Fails(rank, "raise"), by_hand(0, 8)
    with pytest.raises(RankError, match=f"fit has failed in rank {rank}, .*ValueError: the flux capacitor is empty"):
        forked(tmp_path).fit(module, loader(4))
    said = capfd.readouterr().err
    assert f"[rank {rank}] Traceback" in said
    assert "in on_train_batch_start" in said
    assert "torch/distributed/elastic" not in said
    assert_same_weights(module, before)


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"rank 1, .*exit code -9"):
        forked(tmp_path).fit(Fails(1, "kill"), loader(4))


def test_another_verb_works_after_a_failure(tmp_path: Path) -> None:
    trainer = forked(tmp_path)
    with pytest.raises(RankError):
        trainer.fit(Fails(1, "raise"), loader(4))
    module = Net()
    trainer.fit(module, loader(4))
    assert_same_weights(module, by_hand(2, 8))


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_max_restarts_goes_on_from_the_checkpoint(how: str, tmp_path: Path) -> None:
    module = Fails(1, how, tmp_path / "failed")
    trainer = forked(tmp_path, ModelCheckpoint(dirpath=tmp_path / "saved", save_last=True), max_restarts=1)
    trainer.fit(module, loader(4))
    assert (tmp_path / "failed").exists()
    assert trainer.global_step == 4
    assert_same_weights(module, by_hand(2, 8))


def test_signals_have_their_handlers_afterwards(tmp_path: Path) -> None:
    def mine(*_: Any) -> None:
        pass

    before = signal.signal(signal.SIGTERM, mine)
    try:
        forked(tmp_path).validate(Net(), loader(4))
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_cuda_that_was_used_before_a_fork_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = forked(tmp_path)
    trainer.strategy.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigurationError, match="has used CUDA already"):
        trainer.fit(Net(), loader(4))


# What must be sent


def test_the_innermost_culprit_is_named() -> None:
    def local() -> None:
        pass

    loaders = [loader(4), DataLoader(data(), 4, collate_fn=local)]
    path, reason = first_unpicklable({"model": Net(), "train_dataloaders": {"b": loaders}}) or ("", "")
    assert path == "train_dataloaders['b'][1].collate_fn"
    assert "local" in reason
    assert first_unpicklable({"model": Net(), "train_dataloaders": loaders[:1]}) is None


def test_what_cannot_be_sent_is_refused_by_name(tmp_path: Path) -> None:
    module = Net()
    module.transform = threading.Lock()
    with pytest.raises(ConfigurationError, match=r"model\.transform cannot be sent .*ddp_fork"):
        forked(tmp_path, strategy="ddp_spawn").fit(module, loader(4))


def test_sent_weights_become_this_processs_own() -> None:
    flat = torch.arange(6.0).share_memory_()
    one, two, alone = flat[:4].view(2, 2), flat[2:], torch.ones(2)
    address = alone.data_ptr()
    take_out_of_shared_memory([one, two, alone])
    flat.zero_()
    assert one.tolist() == [[0, 1], [2, 3]]
    assert two.tolist() == [2, 3, 4, 5]
    two[0] = 9
    assert one[1, 0] == 9  # still views of one memory
    assert not one.is_shared()
    assert alone.data_ptr() == address


SCRIPT = """
    import os, sys, time, torch, leyden as L
    sys.path[:0] = {paths!r}
    from test_launch_functions import Net, by_hand, loader, assert_same_weights
    from quiet import make_trainer

    class Slow(Net):
        def training_step(self, batch, batch_idx):
            if {slow}:
                if self.global_rank == 0:
                    print("training", flush=True)
                time.sleep(0.1)
            if {busy}:
                torch.randn(600, 600) @ torch.randn(600, 600)
            return super().training_step(batch, batch_idx)

    if __name__ == "__main__":
        {before}
        module = Slow()
        trainer = make_trainer({folder!r}, strategy={strategy!r}, devices=2, max_epochs={epochs})
        try:
            trainer.fit(module, loader(4))
        except KeyboardInterrupt:
            print("KeyboardInterrupt", trainer.interrupted, flush=True)
            raise SystemExit(7)
        assert_same_weights(module, by_hand(2, 8))
        print("equal", trainer.global_step)
"""


def program(folder: Path, **given: Any) -> subprocess.Popen[str]:
    here = Path(__file__).parent
    values = {
        "paths": [str(here), str(here.parent)],
        "slow": False,
        "busy": False,
        "before": "",
        "epochs": 2,
        "folder": str(folder),
    }
    path = folder / "program.py"
    path.write_text(textwrap.dedent(SCRIPT.format(**(values | given))))
    return subprocess.Popen(
        [sys.executable, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # signals go to it and its ranks, as from a terminal
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_spawned_ranks_train_weights_of_their_own(tmp_path: Path) -> None:
    process = program(tmp_path, strategy="ddp_spawn")
    said, _ = process.communicate(timeout=120)
    assert "equal 4" in said, said
    assert process.returncode == 0


def test_forked_ranks_do_not_wait_for_the_parents_threads(tmp_path: Path) -> None:
    before = "torch.set_num_threads(2); torch.randn(600, 600) @ torch.randn(600, 600)"
    process = program(tmp_path, strategy="ddp_fork", busy=True, before=before)
    try:
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert "equal 4" in said, said


@pytest.mark.parametrize("to_all", [True, False])
@pytest.mark.parametrize(
    ("sent", "prompt", "code"),
    [(signal.SIGINT, False, 130), (signal.SIGINT, True, 7), (signal.SIGTERM, False, 143)],
)
def test_a_signal_ends_all_ranks(sent: signal.Signals, prompt: bool, code: int, to_all: bool, tmp_path: Path) -> None:
    before = "sys.ps1 = '>>> '" if prompt else ""
    process = program(tmp_path, strategy="ddp_fork", slow=True, epochs=1000, before=before)
    assert process.stdout is not None
    for line in process.stdout:
        if "training" in line:
            break
    if to_all:
        os.killpg(process.pid, sent)
    else:
        os.kill(process.pid, sent)
    said, _ = process.communicate(timeout=60)  # ends only when the ranks have closed it as well
    assert process.returncode == code, said
    assert ("KeyboardInterrupt True" in said) is prompt
    until = time.monotonic() + 5
    while time.monotonic() < until and _group_is_there(process.pid):
        time.sleep(0.05)
    assert not _group_is_there(process.pid)


def _group_is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# Which method is taken


@pytest.mark.parametrize(
    ("name", "method"),
    [("ddp", "script"), ("ddp_spawn", "spawn"), ("ddp_fork", "fork"), ("ddp_notebook", "fork")],
)
def test_names_stand_for_start_methods(name: str, method: str, tmp_path: Path) -> None:
    assert make_trainer(tmp_path, strategy=name, devices=2).strategy.start_method == method


@pytest.mark.parametrize("where", ["prompt", "notebook"])
def test_fork_is_taken_where_no_program_can_be_run_again(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "prompt":
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert make_trainer(tmp_path, strategy="ddp", devices=2).strategy.start_method == "fork"


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'ddp_fork'"):
        make_trainer(tmp_path, strategy="ddp_frok", devices=2)
