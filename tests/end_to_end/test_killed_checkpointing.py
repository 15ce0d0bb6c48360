"""A run that is killed and goes on from "last" ends with the files and the callback states of one that was not."""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import ModelCheckpoint
from leyden.checkpoint.format import load_checkpoint, read_about
from leyden.errors import CheckpointError, LeydenWarning
from quiet import make_trainer

BATCHES, EPOCHS = 4, 3
VALUES = (3.0, 1.0, 2.0, 0.5, 4.0, 0.25)  # of the validations, two in each epoch


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", VALUES[(self.trainer.global_step - 1) // 2])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Break(L.Callback):
    """Stops the run in the n-th call of a hook."""

    def __init__(self, hook: str, n: int, stop: Callable[[], None]) -> None:
        self.left, self.stop = n, stop
        setattr(self, hook, self.count)

    def count(self, *arguments: Any, **named: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.stop()


def power_cut() -> None:
    raise RuntimeError("power cut")


def gone() -> None:
    os._exit(9)


POLICIES: dict[str, list[dict[str, Any]]] = {
    "best and last": [{"monitor": "val", "save_top_k": 2, "save_last": True}],
    "link": [{"monitor": "val", "mode": "max", "save_last": "link", "filename": "{val}"}],
    "one name": [
        {"monitor": "val", "filename": "best", "save_top_k": 2},
        {"save_top_k": 0, "save_last": True, "every_n_train_steps": 1},
    ],
    "two": [
        {"monitor": "loss", "every_n_train_steps": 1, "filename": "{step}"},
        {"save_top_k": -1, "every_n_train_steps": 3, "filename": "{step}"},
    ],
    "weights": [
        {"monitor": "val", "save_weights_only": True, "filename": "w-{step}"},
        {"every_n_train_steps": 1},
    ],
    "in the foreground": [{"monitor": "val", "save_top_k": 2, "save_last": True, "background": False}],
    "all": [{"save_top_k": -1, "every_n_train_steps": 2, "filename": "{step}"}],
}


def fit(folder: Path, policy: str, *callbacks: L.Callback, ckpt_path: Any = None) -> tuple[dict[str, int], Any]:
    """Train; return the step in each file, and the states of the callbacks."""
    torch.manual_seed(1)
    checkpoints = [ModelCheckpoint(folder, **arguments) for arguments in POLICIES[policy]]
    loader = DataLoader(TensorDataset(torch.linspace(-1, 1, 2 * BATCHES).reshape(-1, 2)))
    trainer = make_trainer(
        folder,
        *callbacks,
        *checkpoints,
        max_epochs=EPOCHS,
        enable_checkpointing=None,
        limit_val_batches=1,
        val_check_interval=2,
    )
    trainer.fit(Net(), loader, loader, ckpt_path=ckpt_path)
    return listing(folder), [callback.state_dict() for callback in checkpoints]


def listing(folder: Path) -> dict[str, int]:
    return {path.name: read_about(path).global_step for path in sorted(folder.iterdir())}


def assert_goes_on(folder: Path, policy: str, undisturbed: Any) -> None:
    folder.mkdir(exist_ok=True)
    assert fit(folder, policy, ckpt_path="last") == undisturbed
    shutil.rmtree(folder)


def undisturbed_run(folder: Path, policy: str) -> Any:
    """What is to come out; the folder is empty again afterwards, and must be the same, for its path is in the states."""
    expected = fit(folder, policy)
    shutil.rmtree(folder)
    return expected


HOOKS = [
    ("on_train_batch_end", [1, 2, 3, 4, 5, 7, 8, 11, 12]),
    ("on_validation_batch_end", [1, 2, 3, 4, 6]),
    ("on_validation_end", [1, 2, 4]),
    ("on_train_epoch_end", [1, 2, 3]),
    ("on_save_checkpoint", [1, 2, 3, 4, 6]),
    ("on_train_end", [1]),
    ("on_fit_end", [1]),
]


@pytest.mark.parametrize("hook", [hook for hook, _ in HOOKS])
@pytest.mark.parametrize("policy", POLICIES)
def test_an_exception_in_a_hook(policy: str, hook: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    undisturbed = undisturbed_run(folder, policy)
    for n in dict(HOOKS)[hook]:
        try:
            fit(folder, policy, Break(hook, n, power_cut))
        except RuntimeError as error:
            assert str(error) == "power cut"  # noqa: PT017 a save may come less often than n
        assert_goes_on(folder, policy, undisturbed)


def in_a_child(work: Callable[[], object]) -> int:
    """Do it in a process of its own, which is thrown away; return its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 nobody else tells of it
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def assert_a_child_goes_on(folder: Path, policy: str, undisturbed: Any) -> None:
    """As above, in another process than any before, which also clears away what killed ones have left half-written."""
    assert in_a_child(lambda: assert_goes_on(folder, policy, undisturbed)) == 0


def killed_at_operation(n: int, folder: Path, policy: str, ckpt_path: Any = None) -> bool:
    """Train in a child that is gone right before its n-th operation on files in the folder; whether it came to that."""
    done = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        watched = event in ("open", "os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir")
        if watched and any(str(folder) in str(argument) for argument in arguments[:2]):
            done[0] += 1
            if done[0] == n:
                os._exit(9)

    def work() -> None:
        sys.addaudithook(hook)
        fit(folder, policy, ckpt_path=ckpt_path)

    return in_a_child(work) == 9


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
quiet_forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@forks
@quiet_forks
@pytest.mark.parametrize("policy", POLICIES)
def test_a_process_that_is_gone_in_the_middle_of_its_file_operations(policy: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    undisturbed = undisturbed_run(folder, policy)
    n, kills = 1, 0
    while killed_at_operation(n, folder, policy):
        kills += 1
        if kills % 3 == 0:  # and once more, in the middle of going on
            killed_at_operation(n // 2 + 1, folder, policy, ckpt_path="last")
        assert_a_child_goes_on(folder, policy, undisturbed)
        n += 1 + n // 4
    assert kills >= 8


@forks
@quiet_forks
@pytest.mark.parametrize("policy", ["best and last", "two"])
def test_a_process_that_is_gone_in_a_hook(policy: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    undisturbed = undisturbed_run(folder, policy)
    for hook, n in (("on_train_batch_end", 7), ("on_validation_end", 3), ("on_save_checkpoint", 3)):
        assert in_a_child(lambda hook=hook, n=n: fit(folder, policy, Break(hook, n, gone))) == 9  # type: ignore[misc]
        assert_a_child_goes_on(folder, policy, undisturbed)


# what else goes wrong


def test_another_runs_files_are_left_alone(tmp_path: Path) -> None:
    first, _ = fit(tmp_path, "best and last")
    before = {name: (tmp_path / name).read_bytes() for name in first if name != "last.ckpt"}
    again, _ = fit(tmp_path, "best and last")
    assert set(again) == {*first, *(name.replace(".ckpt", "-v1.ckpt") for name in before)}
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_damaged_newest_is_passed_over_and_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    undisturbed = undisturbed_run(folder, "all")
    with pytest.raises(RuntimeError, match="power cut"):
        fit(folder, "all", Break("on_train_batch_end", 7, power_cut))
    newest = folder / "step=6.ckpt"
    raw = bytearray(newest.read_bytes())
    raw[-1] ^= 1
    newest.write_bytes(raw)
    with pytest.warns(LeydenWarning, match=r"LEY-damaged-checkpoint.*step=6\.ckpt: .*Instead, .*step=4\.ckpt is used"):
        assert_goes_on(folder, "all", undisturbed)


def test_a_failed_write_in_the_background_ends_fit_and_the_books_are_right(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "kept", monitor="val", save_last=True)

    class Full(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 3:  # after the save at step 2: no room for the next, at step 4
                trainer._writer.wait()
                self.kept = checkpoint.state_dict()
                (tmp_path / "kept").rename(tmp_path / "moved")
                (tmp_path / "kept").write_text("a file in the folder's place")

    full = Full()
    loader = DataLoader(TensorDataset(torch.ones(BATCHES, 2)))
    trainer = make_trainer(
        tmp_path, full, checkpoint, max_epochs=2, enable_checkpointing=None, limit_val_batches=1, val_check_interval=2
    )
    with pytest.raises(CheckpointError, match="kept"):
        trainer.fit(Net(), loader, loader)
    assert trainer.global_step <= 6  # at the next boundary after the write has failed, and before another is begun
    assert checkpoint.state_dict() == full.kept
    assert checkpoint.best_model_path == str(tmp_path / "kept" / "epoch=0-step=2.ckpt")
    assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == ["epoch=0-step=2.ckpt", "last.ckpt"]


@pytest.mark.parametrize("root", ["memory://kept/run", "file://{}"])
def test_a_remote_folder(root: str, tmp_path: Path) -> None:
    import fsspec

    root = root.format(tmp_path)
    loader = DataLoader(TensorDataset(torch.ones(BATCHES, 2)))

    def train(epochs: int, ckpt_path: Any = None) -> ModelCheckpoint:
        checkpoint = ModelCheckpoint(f"{root}/ckpts/", monitor="val", save_last=True)
        trainer = make_trainer(
            tmp_path,
            checkpoint,
            max_epochs=epochs,
            enable_checkpointing=None,
            limit_val_batches=1,
            val_check_interval=2,
        )
        trainer.fit(Net(), loader, loader, ckpt_path=ckpt_path)
        return checkpoint

    def names() -> list[str]:
        fs, folder = fsspec.core.url_to_fs(f"{root}/ckpts")
        return sorted(path.rpartition("/")[2] for path in fs.ls(folder, detail=False))

    checkpoint = train(1)
    assert names() == ["epoch=0-step=4.ckpt", "last.ckpt"]
    checkpoint = train(2, "last")
    assert names() == ["epoch=1-step=8.ckpt", "last.ckpt"]
    where = f"{root}/ckpts".removeprefix("file://")
    assert checkpoint.best_model_path == f"{where}/epoch=1-step=8.ckpt"
    assert checkpoint.last_model_path == f"{where}/last.ckpt"
    assert load_checkpoint(checkpoint.best_model_path)["global_step"] == 8


# a fit that ends without a file


@pytest.mark.parametrize("arguments", [{"monitor": "val"}, {}])
def test_training_that_ends_before_a_validation_says_that_nothing_was_saved(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    loader = DataLoader(TensorDataset(torch.ones(BATCHES, 2)))
    trainer = make_trainer(tmp_path, ModelCheckpoint(tmp_path, **arguments), max_steps=3, enable_checkpointing=None)
    with pytest.warns(
        LeydenWarning, match=r"LEY-checkpoint-none-saved.*at step 3, in epoch 0, before.*save_last=True"
    ) as record:
        trainer.fit(Net(), loader, loader)
    assert len(record) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({"monitor": "val", "save_last": True}, {"max_steps": 3}),
        ({"monitor": "val"}, {"max_steps": 3, "val_check_interval": 2}),
        ({"monitor": "val"}, {"max_steps": 6}),
        ({"save_on_train_epoch_end": True}, {"max_steps": 3}),
        ({"every_n_train_steps": 5}, {"max_steps": 3}),
        ({"monitor": "val", "save_top_k": 0}, {"max_steps": 3}),
        ({"monitor": "val"}, {"max_epochs": 0}),
    ],
)
def test_it_says_so_only_then(arguments: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(torch.ones(BATCHES, 2)))
    trainer = make_trainer(tmp_path, ModelCheckpoint(tmp_path, **arguments), enable_checkpointing=None, **options)
    trainer.fit(Net(), loader, loader)  # a warning is an error
