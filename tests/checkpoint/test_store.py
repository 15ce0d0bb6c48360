"""Writing: a file under its name is always whole."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import signal
import stat
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from leyden.checkpoint import (
    copy_checkpoint,
    link_checkpoint,
    load_checkpoint,
    newest,
    remove,
    write_checkpoint,
)
from leyden.checkpoint.store import list_checkpoints
from leyden.errors import CheckpointError


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folders_are_made_and_nothing_else_is_left(tmp_path: pathlib.Path) -> None:
    write_checkpoint(tmp_path / "a" / "b" / "x.ckpt", {"epoch": 1})
    write_checkpoint(str(tmp_path / "a" / "b" / "x.ckpt"), {"epoch": 2})
    assert load_checkpoint(tmp_path / "a" / "b" / "x.ckpt") == {"epoch": 2}
    assert names(tmp_path / "a" / "b") == ["x.ckpt"]


def test_the_order_of_events(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write, sync the file, rename, sync the folder: any other order can lose the file in a power cut."""
    events: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        events.append("sync folder" if stat.S_ISDIR(status.st_mode) else f"sync {status.st_size} bytes")
        real_sync(descriptor)

    def replace(source: Any, target: Any) -> None:
        assert pathlib.Path(source).parent == tmp_path
        events.append(f"rename to {pathlib.Path(target).name}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    write_checkpoint(tmp_path / "x.ckpt", {"w": torch.ones(5000)})
    size = (tmp_path / "x.ckpt").stat().st_size
    assert events == [f"sync {size} bytes", "rename to x.ckpt", "sync folder"]


@pytest.mark.parametrize("where", ["encode", "write_file", "os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_file_alone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    path = tmp_path / "x.ckpt"
    write_checkpoint(path, {"epoch": 1})

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(where if "." in where else f"leyden.checkpoint.store.{where}", fail)
    expected = (CheckpointError, OSError) if isinstance(error, OSError) else (KeyboardInterrupt,)
    with pytest.raises(expected, match="No space left" if isinstance(error, OSError) else None):
        write_checkpoint(path, {"epoch": 2})
    assert names(tmp_path) == ["x.ckpt"]
    assert load_checkpoint(path) == {"epoch": 1}


def test_the_error_names_the_file_and_the_reason(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"x\.ckpt: cannot be written: (File exists|Not a directory)"):
        write_checkpoint(tmp_path / "file" / "x.ckpt", {"epoch": 1})
    (tmp_path / "folder.ckpt").mkdir()
    with pytest.raises(CheckpointError, match=r"folder\.ckpt: cannot be written: Is a directory"):
        write_checkpoint(tmp_path / "folder.ckpt", {"epoch": 1})
    with pytest.raises(CheckpointError, match=r"folder\.ckpt: cannot be deleted"):
        remove(tmp_path / "folder.ckpt")
    assert names(tmp_path) == ["file", "folder.ckpt"]


def test_a_full_disk(tmp_path: pathlib.Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "x.ckpt"
    write_checkpoint(path, {"epoch": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails with EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot be written: File too large"):
            write_checkpoint(path, {"w": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert names(tmp_path) == ["x.ckpt"]
    assert load_checkpoint(path) == {"epoch": 1}


def test_killed_at_random_instants(tmp_path: pathlib.Path) -> None:
    """Whenever the process dies, the file is whole, and the newest whole one is found."""
    program = """
import sys, torch
from leyden.checkpoint import write_checkpoint
for n in range(10**6):
    write_checkpoint(sys.argv[1] + "/same.ckpt", {"n": n, "w": torch.full((300_000,), float(n))})
    write_checkpoint(f"{sys.argv[1]}/{n % 3}.ckpt", {"n": n, "w": torch.full((300_000,), float(n))})
    print(n, flush=True)
"""
    rng = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()  # the first was written
        time.sleep(rng.random() * 0.05)
        process.kill()
        done = [int(line) for line in process.stdout if line.endswith("\n")]
        process.wait()
        process.stdout.close()
        loaded = load_checkpoint(tmp_path / "same.ckpt")
        assert loaded["n"] >= max(done, default=0)
        assert torch.equal(loaded["w"], torch.full((300_000,), float(loaded["n"])))
        found = newest(tmp_path)
        assert found is not None
        assert load_checkpoint(found)["n"] in (loaded["n"], loaded["n"] - 1)


def test_newest_is_the_last_written_that_is_whole(tmp_path: pathlib.Path) -> None:
    assert newest(tmp_path / "nowhere") is None
    for i, name in enumerate(["b.ckpt", "a.ckpt", "c.ckpt"]):
        write_checkpoint(tmp_path / name, {"i": i})
        os.utime(tmp_path / name, (i, i))
    (tmp_path / ".d.ckpt.0123.tmp").write_bytes(b"")
    (tmp_path / "dangling.ckpt").symlink_to("nothing.ckpt")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["c.ckpt", "a.ckpt", "b.ckpt"]
    assert newest(tmp_path) == tmp_path / "c.ckpt"
    with (tmp_path / "c.ckpt").open("r+b") as file:
        file.truncate(100)
    assert newest(tmp_path) == tmp_path / "a.ckpt"
    assert newest(tmp_path, "c*") is None


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_copy_is_independent(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool) -> None:
    if not hard_links:

        def link(source: Any, target: Any) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    a, b = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    write_checkpoint(a, {"n": 1})
    write_checkpoint(b, {"n": 0})
    copy_checkpoint(a, b)
    copy_checkpoint(a, b)  # again, which with hard links is a rename onto the same file
    assert (a.stat().st_ino == b.stat().st_ino) is hard_links
    write_checkpoint(a, {"n": 2})
    assert load_checkpoint(b) == {"n": 1}
    remove(a)
    remove(a)
    assert load_checkpoint(b) == {"n": 1}
    assert names(tmp_path) == ["b.ckpt"]
    with pytest.raises(CheckpointError, match=r"b\.ckpt: cannot be written"):
        copy_checkpoint(a, b)
    assert names(tmp_path) == ["b.ckpt"]


def test_a_link_moves_with_its_folder_and_is_replaced_not_followed(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    write_checkpoint(folder / "a.ckpt", {"n": 1})
    link_checkpoint(folder / "a.ckpt", folder / "last.ckpt")
    folder = folder.rename(tmp_path / "moved")
    assert load_checkpoint(folder / "last.ckpt") == {"n": 1}
    write_checkpoint(folder / "last.ckpt", {"n": 2})
    assert load_checkpoint(folder / "a.ckpt") == {"n": 1}
    assert not (folder / "last.ckpt").is_symlink()
    link_checkpoint(folder / "a.ckpt", folder / "last.ckpt")
    remove(folder / "last.ckpt")
    assert names(folder) == ["a.ckpt"]


def test_where_links_are_not_allowed_it_is_a_copy(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def symlink(*_: Any) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(os, "symlink", symlink)
    write_checkpoint(tmp_path / "a.ckpt", {"n": 1})
    link_checkpoint(tmp_path / "a.ckpt", tmp_path / "last.ckpt")
    remove(tmp_path / "a.ckpt")
    assert load_checkpoint(tmp_path / "last.ckpt") == {"n": 1}


def test_a_failed_link_leaves_the_old_one(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "last.ckpt", {"n": 0})

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    write_checkpoint(tmp_path / "a.ckpt", {"n": 1})
    monkeypatch.setattr(os, "replace", fail)
    with contextlib.suppress(CheckpointError):
        link_checkpoint(tmp_path / "a.ckpt", tmp_path / "last.ckpt")
        pytest.fail("must raise")
    assert load_checkpoint(tmp_path / "last.ckpt") == {"n": 0}
    assert names(tmp_path) == ["a.ckpt", "last.ckpt"]
