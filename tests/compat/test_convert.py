"""``leyden convert`` in both directions, and what Lightning does with the files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import leyden as L
from leyden.__main__ import COMMANDS, main
from leyden.checkpoint.format import read_metadata
from leyden.compat.convert import convert
from leyden.errors import CheckpointError
from lightning_files import BATCHES, difference, leyden_fit, lightning_fit, net, saver, without_remarks

RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Adam": ({}, {}),
    "SGD with momentum, StepLR by epoch": ({"optimizer": "SGD", "momentum": 0.9, "schedule": "StepLR"}, {}),
    "OneCycleLR by step": ({"schedule": "OneCycleLR"}, {}),
    "accumulated": ({"schedule": "OneCycleLR"}, {"accumulate_grad_batches": 3}),
    "clipped": ({"lr": 0.1}, {"gradient_clip_val": 0.05}),
    "validated": ({"optimizer": "AdamW", "schedule": "StepLR"}, {"validate": True}),
}


def keeps(folder: Path, **options: Any) -> L.callbacks.ModelCheckpoint:
    return L.callbacks.ModelCheckpoint(folder, filename="{step}", **({"save_top_k": -1, "monitor": "step"} | options))


@pytest.mark.parametrize("name", RUNS)
def test_lightning_goes_on_from_leyden(name: str, lightning: Any, tmp_path: Path) -> None:
    hparams, options = RUNS[name]
    validates = bool(options.get("validate"))
    theirs, ours = net(lightning.LightningModule, validates), net(L.LightningModule, validates)
    trainer = leyden_fit(tmp_path, ours(**hparams), keeps(tmp_path / "saved"), max_epochs=2, **options)
    trainer.save_checkpoint(tmp_path / "saved" / "after.ckpt")
    whole = ours(**hparams)
    steps = leyden_fit(tmp_path, whole, max_epochs=4, **options).global_step
    files = list((tmp_path / "saved").iterdir())
    assert len(files) == 3
    for file in files:
        out = tmp_path / f"of {file.name}"
        convert(file, out)
        model = theirs(**hparams)
        done = lightning_fit(tmp_path, model, ckpt_path=out, max_epochs=4, **options)
        assert (done.global_step, done.current_epoch) == (steps, 4)
        assert difference(model, whole) == 0.0  # bit-equal: the kernels are noted in the optimizer's state
        again = tmp_path / f"back {file.name}"
        convert(out, again)
        model = ours(**hparams)
        done = leyden_fit(tmp_path, model, keeps(tmp_path / "new"), ckpt_path=again, max_epochs=4, **options)
        assert (done.global_step, done.current_epoch) == (steps, 4)
        assert difference(model, whole) == 0.0


def test_in_the_middle_of_an_epoch_lightning_has_the_counters_of_its_own_files(lightning: Any, tmp_path: Path) -> None:
    # Lightning reads the epoch's data from its beginning then, so its weights are other ones than without a break
    theirs, ours = net(lightning.LightningModule), net(L.LightningModule)
    lightning_fit(tmp_path, theirs(), saver(tmp_path / "theirs", every_n_train_steps=4), max_epochs=2)
    leyden_fit(tmp_path, ours(), keeps(tmp_path / "ours", every_n_train_steps=4), max_epochs=2)
    for name in ("step=4.ckpt", "step=8.ckpt"):
        done = convert(tmp_path / "ours" / name, tmp_path / name)
        assert any("order of the data" in sentence for sentence in done.left_out)
        own = torch.load(tmp_path / "theirs" / name, weights_only=True)["loops"]["fit_loop"]
        made = torch.load(tmp_path / name, weights_only=True)["loops"]["fit_loop"]
        progress = ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.state_dict")
        assert {key: made[key] for key in progress} == {key: own[key] for key in progress}
        total = "epoch_loop.automatic_optimization.optim_progress"
        assert made[total]["optimizer"]["step"]["total"] == own[total]["optimizer"]["step"]["total"]
        models = [theirs(), theirs()]
        for model, file in zip(models, (tmp_path / "theirs" / name, tmp_path / name), strict=True):
            assert lightning_fit(tmp_path, model, ckpt_path=file, max_epochs=3).global_step == 3 * BATCHES
        assert difference(*models) < 1e-6


def test_lightning_takes_weights_hyperparameters_and_callbacks(lightning: Any, tmp_path: Path) -> None:
    theirs, ours = net(lightning.LightningModule, True), net(L.LightningModule, True)
    best = keeps(tmp_path / "saved", monitor="val_loss", save_top_k=2, save_last=True)
    stops = L.callbacks.EarlyStopping("val_loss", patience=7, min_delta=100.0)
    model = ours(hidden=7)
    leyden_fit(tmp_path, model, best, stops, max_epochs=3, validate=True)
    convert(tmp_path / "saved" / "last.ckpt", tmp_path / "x.ckpt")
    with without_remarks():
        from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

        made = theirs.load_from_checkpoint(tmp_path / "x.ckpt")
    assert difference(made, model) == 0.0
    assert made.hparams.hidden == 7
    there = ModelCheckpoint(tmp_path / "saved", filename="{step}", monitor="val_loss", save_top_k=2)
    stopping = EarlyStopping("val_loss", patience=7, min_delta=100.0)
    lightning_fit(tmp_path, made, there, stopping, ckpt_path=tmp_path / "x.ckpt", max_epochs=3, validate=True)
    assert there.best_model_path == best.best_model_path
    assert float(there.best_model_score) == pytest.approx(float(best.best_model_score))
    assert {path: pytest.approx(float(score)) for path, score in there.best_k_models.items()} == {
        path: float(score) for path, score in best.best_k_models.items()
    }
    assert (stopping.wait_count, stopping.patience) == (stops.wait_count, 7)


def test_several_optimizers_and_what_users_add(lightning: Any, tmp_path: Path) -> None:
    def two(base: Any) -> Any:
        class Two(base):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False
                self.a, self.b = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)

            def training_step(self, batch: Any, batch_idx: int) -> None:
                for part, optimizer in zip((self.a, self.b), self.optimizers(), strict=True):
                    optimizer.zero_grad()
                    self.manual_backward((part(batch[0]) - batch[1]).square().mean())
                    optimizer.step()

            def configure_optimizers(self) -> Any:
                return [torch.optim.Adam(part.parameters(), 0.1) for part in (self.a, self.b)]

            def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                checkpoint["mine"] = [1, "ä"]

        return Two

    torch.manual_seed(0)
    model = two(L.LightningModule)()
    trainer = leyden_fit(tmp_path, model, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    convert(tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    assert torch.load(tmp_path / "b.ckpt", weights_only=True)["mine"] == [1, "ä"]
    theirs = two(lightning.LightningModule)()
    done = lightning_fit(tmp_path, theirs, ckpt_path=tmp_path / "b.ckpt", max_epochs=3)
    assert done.global_step == 2 * 3 * BATCHES  # Lightning counts each optimizer
    whole = two(L.LightningModule)()
    whole.load_state_dict(L.load_checkpoint(tmp_path / "a.ckpt")["state_dict"])
    leyden_fit(tmp_path, whole, ckpt_path=tmp_path / "a.ckpt", max_epochs=3)
    assert difference(theirs, whole) < 1e-6


# The command


def test_the_command_says_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = net(L.LightningModule)
    trainer = leyden_fit(tmp_path, ours(schedule="StepLR"), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    first, second, third = (str(tmp_path / name) for name in ("a.ckpt", "b.ckpt", "c.ckpt"))
    capsys.readouterr()
    assert main(["convert", first, second]) == 0
    said = capsys.readouterr().out
    assert f"{first}: a checkpoint of leyden, of epoch 1, step 6" in said
    assert f"{second}: a checkpoint of Lightning 2.x, with " in said
    assert "left out: The random state" in said
    assert main(["convert", second, third]) == 0
    said = capsys.readouterr().out
    assert f"{second}: a checkpoint of Lightning 2.0.0, of epoch 1, step 6" in said
    assert f"{third}: a checkpoint of leyden, with " in said
    assert read_metadata(third)["leyden_format"]
    before, after = L.load_checkpoint(first), L.load_checkpoint(third)
    assert before["hyper_parameters"] == after["hyper_parameters"]
    assert before["lr_schedulers"] == after["lr_schedulers"]
    assert before["progress"] == after["progress"]


def test_nothing_is_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(net(L.LightningModule)().state_dict(), tmp_path / "w.pt")
    (tmp_path / "there.ckpt").write_text("mine")
    source, target = str(tmp_path / "w.pt"), str(tmp_path / "there.ckpt")
    assert main(["convert", source, target]) == 1
    assert f"leyden convert: {target} is there already" in capsys.readouterr().err
    assert (tmp_path / "there.ckpt").read_text() == "mine"
    assert main(["convert", source, source, "--force"]) == 1
    assert "is the source itself" in capsys.readouterr().err
    assert main(["convert", source, target, "--force"]) == 0
    assert f"{source}: weights" in capsys.readouterr().out
    assert L.load_checkpoint(target)["state_dict"].keys() == net(L.LightningModule)().state_dict().keys()


def test_errors_name_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out.ckpt")
    (tmp_path / "x.ckpt").write_bytes(b"no checkpoint at all")
    torch.save({"state_dict": {}, "global_step": 1, "mine": os.system}, tmp_path / "y.ckpt")
    torch.save({"state_dict": {}, "global_step": 1, "mine": slice(1)}, tmp_path / "z.ckpt")
    for name, reason in (
        ("gone.ckpt", "no such file"),
        ("x.ckpt", "does not begin like"),
        ("y.ckpt", "names (posix|nt).system"),
        ("z.ckpt", "builtins.slice"),
    ):
        assert main(["convert", str(tmp_path / name), out]) == 1
        said = capsys.readouterr().err
        assert name in said
        assert re.search(reason, said)
    assert not Path(out).exists()
    (tmp_path / "file").write_text("no folder")
    torch.save(net(L.LightningModule)().state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"file.*w\.ckpt: cannot be written"):
        convert(tmp_path / "w.pt", tmp_path / "file" / "w.ckpt")


def test_the_module_is_a_program(tmp_path: Path) -> None:
    torch.save(net(L.LightningModule)().state_dict(), tmp_path / "w.pt")
    command = [sys.executable, "-W", "error", "-m", "leyden", "convert", "w.pt", "w.ckpt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("w.pt: weights\nw.ckpt: a checkpoint of leyden, with 7 weights of 29 numbers")
    done = subprocess.run([*command[:5], "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert all(name in done.stdout for name in COMMANDS)
    done = subprocess.run([*command[:5], "convrt"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "invalid choice" in done.stderr


def test_urls(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec", reason="URLs are read with fsspec")
    trainer = leyden_fit(tmp_path, net(L.LightningModule)(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for source, target in ((tmp_path / "a.ckpt", "memory://x/b.ckpt"), ("memory://x/b.ckpt", "memory://x/c.ckpt")):
        convert(source, target)
    before, after = L.load_checkpoint(tmp_path / "a.ckpt"), L.load_checkpoint("memory://x/c.ckpt")
    assert before["progress"] == after["progress"] == L.load_checkpoint("memory://x/b.ckpt")["progress"]
    assert all(torch.equal(before["state_dict"][name], after["state_dict"][name]) for name in before["state_dict"])
    with pytest.raises(CheckpointError, match="is there already"):
        convert(tmp_path / "a.ckpt", "memory://x/b.ckpt")
    fsspec.filesystem("memory").rm("/x", recursive=True)


def test_folders_of_weights_become_one_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = net(L.LightningModule)()
    (tmp_path / "hub").mkdir()
    save_file(model.state_dict(), tmp_path / "hub" / "model.safetensors")
    done = convert(tmp_path / "hub", tmp_path / "w.ckpt")
    assert (done.source, done.left_out) == ("weights", ())
    assert difference(net(L.LightningModule).load_from_checkpoint(str(tmp_path / "w.ckpt")), model) == 0.0


# What is refused, and what is told


def test_the_source_stays(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "hub").mkdir()
    file = tmp_path / "hub" / "model.safetensors"
    save_file(net(L.LightningModule)().state_dict(), file)
    (tmp_path / "link").symlink_to(tmp_path / "hub")
    before = file.read_bytes()
    for source, target in (
        (tmp_path / "hub", file),
        (tmp_path / "hub", tmp_path / "hub" / "new.ckpt"),
        (tmp_path / "hub", tmp_path / "link" / "model.safetensors"),
        (tmp_path / "link", file),
        (file, tmp_path / "hub"),
    ):
        with pytest.raises(CheckpointError, match="lie one within the other"):
            convert(source, target, force=True)
    assert file.read_bytes() == before
    assert [each.name for each in (tmp_path / "hub").iterdir()] == ["model.safetensors"]
    convert(file, tmp_path / "hub" / "new.ckpt")  # beside a file is not within it


def nested(levels: int) -> list[Any]:
    made: list[Any] = [1]
    for _ in range(levels):
        made = [made, made]
    return made


def test_a_small_file_does_not_become_a_large_one(tmp_path: Path) -> None:
    source, target = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    one, base = torch.ones(1), torch.ones(2**20)
    indices = torch.zeros(1, 1).long().expand(1, 2**26)
    sparse = torch.sparse_coo_tensor(indices, one.expand(2**26), (1,), check_invariants=False)
    for weights, pattern in (
        ({"w": one.expand(200_000_000)}, "its tensors share memory.* 800 MB or more instead of 0.0 MB"),
        ({"w": sparse}, "its tensors share memory"),
        ({f"w{i}": base[: 2**20 - i] for i in range(200)}, "its tensors share memory"),
    ):
        torch.save({"state_dict": weights, "global_step": 1}, source)
        assert source.stat().st_size < 5_000_000
        with pytest.raises(CheckpointError, match=rf"a\.ckpt: {pattern}"):
            convert(source, target)
    for levels in (18, 40, 60):
        torch.save({"state_dict": {}, "global_step": 1, "hyper_parameters": {"a": nested(levels)}}, source)
        with pytest.raises(CheckpointError, match=r"a\.ckpt: its plain data share memory"):
            convert(source, target)
    torch.save({"state_dict": {}, "global_step": 1, "mine": ["x" * 100_000] * 1000}, source)
    with pytest.raises(CheckpointError, match="its plain data share memory"):
        convert(source, target)
    assert not target.exists()


def test_what_is_large_or_shared_in_measure_is_converted(tmp_path: Path) -> None:
    source, target = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    tied = torch.randn(1000, 1000)
    weights = {"a": tied, "b": tied, "half": tied[:500], "mask": torch.ones(1).expand(1000)}
    mine = {"many": [0] * 600_000, "nested": nested(8), "names": ["a"] * 100_000}
    torch.save({"state_dict": weights, "global_step": 1, "mine": mine}, source)
    convert(source, target)
    found = L.load_checkpoint(target)
    assert all(torch.equal(found["state_dict"][name], weights[name]) for name in weights)
    assert found["mine"] == mine


class Weight(net(L.LightningModule)):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.ones(2))
        self.strict_loading = False


@pytest.mark.parametrize("more", [{"left_out": "val", "global_step": 1}, {"left_out": 5, "added_keys": 5}])
def test_a_users_word_is_not_what_was_left_out(more: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}, **more}, tmp_path / "a.ckpt")
    done = convert(tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    assert done.left_out == ()
    assert ("'left_out'" in done.kept) is ("global_step" in more)
    with pytest.raises(CheckpointError, match="holds weights only"):
        leyden_fit(tmp_path, Weight(), ckpt_path=tmp_path / "a.ckpt")
    assert L.load_checkpoint(tmp_path / "b.ckpt")["left_out"] == more["left_out"]


def test_what_lightning_has_no_place_for_is_told(lightning: Any, tmp_path: Path) -> None:
    from argparse import Namespace

    class Stops(L.callbacks.EarlyStopping):
        seen = 0

        def state_dict(self) -> dict[str, Any]:
            return super().state_dict() | {"seen": 7}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            self.seen = state_dict["seen"]

    ours = net(L.LightningModule, True)
    keeps_all = L.callbacks.ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1)
    model = ours(more=Namespace(a=1))
    trainer = leyden_fit(tmp_path, model, keeps_all, Stops("val_loss"), max_epochs=3, validate=True)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    done = convert(tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    assert any("Which 2 checkpoints ModelCheckpoint keeps beside the newest" in sentence for sentence in done.left_out)
    assert len(done.remarks) == 1
    assert "argparse.Namespace" in done.remarks[0]
    states = torch.load(tmp_path / "b.ckpt", weights_only=False)["callbacks"]
    [stops] = [state for state in states.values() if "wait_count" in state]
    assert stops.keys() == {"wait_count", "stopped_epoch", "best_score", "patience", "seen"}
    convert(tmp_path / "b.ckpt", tmp_path / "c.ckpt")
    again = Stops("val_loss")
    leyden_fit(tmp_path, ours(), keeps_all, again, ckpt_path=tmp_path / "c.ckpt", max_epochs=4, validate=True)
    assert again.seen == 7
    with without_remarks():
        with pytest.raises(Exception, match=r"argparse\.Namespace"):
            lightning_fit(tmp_path, net(lightning.LightningModule)(), ckpt_path=tmp_path / "b.ckpt", max_epochs=4)
        made = net(lightning.LightningModule).load_from_checkpoint(tmp_path / "b.ckpt", weights_only=False)
    assert made.hparams.more.a == 1


def test_the_command_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"leyden {L.__version__}\n"
