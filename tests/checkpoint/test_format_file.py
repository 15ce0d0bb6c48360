"""What is read of a file and in which order, what it says about itself, its versions, and files at URLs."""

from __future__ import annotations

import io
import json
import os
import pathlib
import subprocess
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from leyden.checkpoint import container, load_checkpoint, read_metadata, write_checkpoint
from leyden.checkpoint import format as file_format
from leyden.checkpoint.format import About, encode, read_about, write_file
from leyden.errors import CheckpointError
from same_values import same, same_tensor

torch.set_num_threads(1)


class Counting(io.BytesIO):
    """A stream that notes which of its bytes are read."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.ranges: list[tuple[int, int]] = []

    def readinto(self, buffer: Any) -> int:
        begin = self.tell()
        count = super().readinto(buffer)
        self.ranges.append((begin, begin + count))
        return count

    def read(self, size: int | None = -1) -> bytes:
        raise AssertionError("bytes are read into their place")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[pathlib.Path], Counting]]:
    """Make the next load of a path go through a counting stream."""

    def count(path: pathlib.Path) -> Counting:
        stream = Counting(path.read_bytes())
        monkeypatch.setattr(file_format, "open_stream", lambda _: stream)
        return stream

    return count


def full_checkpoint() -> dict[str, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.BatchNorm1d(40))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 30)).sum().backward()
    optimizer.step()
    return {
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "callbacks": {"EMA": {"weights": torch.ones(40, 30)}},
        "rng": torch.get_rng_state(),
        "epoch": 2,
        "global_step": 7,
        "run_id": "c0ffee",
    }


def test_weights_only_reads_those_bytes_and_no_others(
    tmp_path: pathlib.Path, counted: Callable[[pathlib.Path], Counting]
) -> None:
    path = tmp_path / "a.ckpt"
    checkpoint = full_checkpoint()
    write_checkpoint(path, checkpoint)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    stream = counted(path)
    loaded = load_checkpoint(path, weights_only=True)
    assert same(dict(loaded["state_dict"]), dict(checkpoint["state_dict"]))
    assert loaded.keys() == {"state_dict", "epoch", "global_step", "run_id"}
    weights = sum(tensor.nbytes for tensor in checkpoint["state_dict"].values())
    assert sum(end - begin for begin, end in stream.ranges) == header + weights
    assert stream.ranges == sorted(stream.ranges)  # from front to back, as disks and object stores like it
    assert stream.ranges[:2] == [(0, 8), (8, header)]

    for reader in (read_metadata, read_about):
        stream = counted(path)
        reader(path)
        assert stream.ranges == [(0, 8), (8, header)]

    stream = counted(path)
    load_checkpoint(path)
    covered = 0
    for begin, end in stream.ranges:
        assert begin == covered  # each byte once, in order
        covered = end
    assert covered == path.stat().st_size


def test_streams_that_give_and_take_little_at_a_time() -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size or 0, 7))

        def write(self, data: Any) -> int:
            return super().write(bytes(data)[:5])

        readinto = None  # type: ignore[assignment]

    stream = Slow()
    tensors, metadata = encode({"w": torch.arange(50.0), "e": torch.empty(0, 3)})
    write_file(stream, tensors, metadata)
    file = container.Reader(stream)
    assert file.metadata == metadata
    assert all(same_tensor(file.read(name), tensor) for name, tensor in tensors.items())
    safetensors.torch.load(stream.getvalue())


def test_the_library_and_other_files(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.ckpt"
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "c": torch.tensor(True),
        "d": torch.ones(0, 2),
    }
    write_checkpoint(path, {"state_dict": tensors})
    theirs = safetensors.torch.load_file(path)
    assert {name.removeprefix("module."): tensor for name, tensor in theirs.items()}.keys() == tensors.keys()
    assert all(same_tensor(theirs[f"module.{name}"], tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == read_metadata(path)
        assert all(same_tensor(file.get_tensor(f"module.{name}"), tensor) for name, tensor in tensors.items())
    size = int.from_bytes(path.read_bytes()[:8], "little")
    assert size % 8 == 0  # so that every tensor is aligned to its elements under a memory map

    safetensors.torch.save_file(tensors, path)
    assert same(load_checkpoint(path), {"state_dict": safetensors.torch.load_file(path)})
    assert read_metadata(path) == {}
    about = read_about(path)
    assert about == About(saved_at=path.stat().st_mtime)


def test_the_library_is_not_needed(tmp_path: pathlib.Path) -> None:
    program = """
import sys
sys.modules["safetensors"] = None
import torch
from leyden.checkpoint import load_checkpoint, write_checkpoint
write_checkpoint(sys.argv[1], {"state_dict": {"w": torch.ones(3)}})
assert torch.equal(load_checkpoint(sys.argv[1])["state_dict"]["w"], torch.ones(3))
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.ckpt")], check=True)


# what a file says about itself


def test_about(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.ckpt"
    before = time.time()
    write_checkpoint(path, full_checkpoint())
    about = read_about(path)
    assert before <= about.saved_at <= time.time()
    assert about == About(epoch=2, global_step=7, run_id="c0ffee", saved_at=about.saved_at, resumable=True)
    os.utime(path, (0, 0))
    assert read_about(str(path)) == about  # a copy of the file keeps what it says
    written = json.loads(read_metadata(path)["leyden_about"])
    assert written == {"epoch": 2, "global_step": 7, "run_id": "c0ffee", "saved_at": about.saved_at, "resumable": True}

    write_checkpoint(path, {"state_dict": {}, "epoch": "third", "global_step": True, "run_id": 5})  # hooks may do that
    about = read_about(path)
    assert about == About(saved_at=about.saved_at)


# versions


def version_1(path: pathlib.Path, checkpoint: dict[str, Any]) -> None:
    """Write a file as the first version did: by the metadata's description then, with a reader's tools of today."""
    tensors, metadata = encode(checkpoint)
    old = {key: metadata[key] for key in ("format", "leyden_version", "leyden_checkpoint", "leyden_checksums")}
    old["leyden_format"] = "1"
    parts = (old["leyden_version"], old["leyden_checkpoint"], old["leyden_checksums"])
    old["leyden_checksum"] = f"{zlib.crc32(chr(10).join(parts).encode()):08x}"
    with path.open("wb") as file:
        write_file(file, tensors, old)


def test_files_of_version_1_are_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.ckpt"
    checkpoint = full_checkpoint()
    version_1(path, checkpoint)
    assert same(load_checkpoint(path), checkpoint)
    assert "leyden_about" not in read_metadata(path)
    os.utime(path, (5, 5))
    assert read_about(path) == About(epoch=2, global_step=7, run_id="c0ffee", saved_at=5.0, resumable=True)

    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'\\"epoch\\":2', b'\\"epoch\\":3'))
    with pytest.raises(CheckpointError, match=r"a\.ckpt: its metadata are damaged"):
        load_checkpoint(path)
    path.write_bytes(whole.replace(b'"leyden_format":"1"', b'"leyden_format":"2"'))
    with pytest.raises(CheckpointError, match=r"a\.ckpt: its metadata lack 'leyden_about'"):
        load_checkpoint(path)


def test_older_versions_are_migrated_step_by_step(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def step(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def migrate(tree: dict[str, Any]) -> dict[str, Any]:
            steps.append(name)
            return {**tree, "steps": [*tree.get("steps", []), name]}

        return migrate

    path = tmp_path / "a.ckpt"
    version_1(path, {"epoch": 2})
    monkeypatch.setattr(file_format, "FORMAT_VERSION", "4")
    monkeypatch.setattr(file_format, "MIGRATIONS", {"1": step("1 to 2"), "2": step("2 to 3"), "3": step("3 to 4")})
    assert load_checkpoint(path) == {"epoch": 2, "steps": ["1 to 2", "2 to 3", "3 to 4"]}

    monkeypatch.setattr(file_format, "FORMAT_VERSION", "2")
    write_checkpoint(path, {"epoch": 2})
    monkeypatch.setattr(file_format, "FORMAT_VERSION", "4")
    assert load_checkpoint(path) == {"epoch": 2, "steps": ["2 to 3", "3 to 4"]}
    write_checkpoint(path, {"epoch": 2})
    assert load_checkpoint(path) == {"epoch": 2}


def test_every_older_version_has_a_migration() -> None:
    assert list(file_format.MIGRATIONS) == [str(n) for n in range(1, int(file_format.FORMAT_VERSION))]


@pytest.mark.parametrize("version", ["3", "10", "", "0", "-1", "2.0", "two", "9" * 100])
def test_other_versions_are_refused(version: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    monkeypatch.setattr(file_format, "FORMAT_VERSION", version)
    write_checkpoint(path, {"epoch": 2})
    monkeypatch.undo()
    for reader in (load_checkpoint, read_metadata, read_about):
        with pytest.raises(
            CheckpointError, match=r"a\.ckpt: it has format version .*reads versions 1 to 2.*newer leyden"
        ) as error:
            reader(path)
        assert f"format version {version[:20]!r}" in str(error.value)
        assert len(str(error.value)) < 500


# URLs


def test_a_url_of_memory_and_of_a_file(tmp_path: pathlib.Path) -> None:
    checkpoint = {"state_dict": {"w": torch.arange(5.0)}, "epoch": 3, "array": np.arange(3)}
    url = f"memory://{uuid.uuid4().hex}/a.ckpt"
    write_checkpoint(url, checkpoint)
    assert same(load_checkpoint(url), checkpoint)
    assert read_metadata(url)["leyden_format"] == "2"
    assert read_about(url).epoch == 3

    import fsspec

    content = fsspec.filesystem("memory").cat_file(url)
    path = tmp_path / "b.ckpt"
    path.write_bytes(content)
    assert same(load_checkpoint(f"file://{path}"), checkpoint)
    fsspec.filesystem("memory").pipe_file(url, content[:-1])
    with pytest.raises(CheckpointError, match=rf"^{url}: the file is cut short: 1 of"):
        load_checkpoint(url)
    safetensors.torch.save_file({"w": torch.ones(1)}, path)
    fsspec.filesystem("memory").pipe_file(url, path.read_bytes())
    assert time.time() - 60 < read_about(url).saved_at < time.time() + 60


def test_urls_that_cannot_be_read(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=r"^memory://nowhere/a\.ckpt: no such file\."):
        load_checkpoint("memory://nowhere/a.ckpt")
    with pytest.raises(CheckpointError, match=r"^nothing://a/b\.ckpt: .*nothing"):
        load_checkpoint("nothing://a/b.ckpt")
    (tmp_path / "a.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"b\.ckpt: no such file. Did you mean 'a\.ckpt'"):
        load_checkpoint(f"file://{tmp_path}/b.ckpt")
