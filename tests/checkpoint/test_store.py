"""Writing: a file under its name is always whole."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import stat
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
from leyden.checkpoint.remote import is_remote, local_path
from leyden.checkpoint.store import exists, join, list_checkpoints
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


def test_a_disk_that_is_full_in_the_middle(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full takes the file's place: there it is the kernel that says ENOSPC."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    path = tmp_path / "x.ckpt"
    write_checkpoint(path, {"epoch": 1})
    real_open = os.open

    def full(name: Any, flags: int, *mode: Any) -> int:
        return real_open("/dev/full", os.O_WRONLY) if flags & os.O_CREAT else real_open(name, flags, *mode)

    for size in (1, 100_000):  # fails when it is flushed, and at once
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", full)
            with pytest.raises(CheckpointError, match=r"x\.ckpt: cannot be written: No space left on device"):
                write_checkpoint(path, {"w": torch.ones(size)})
        assert names(tmp_path) == ["x.ckpt"]
        assert load_checkpoint(path) == {"epoch": 1}


def test_a_read_only_folder(tmp_path: pathlib.Path) -> None:
    if not hasattr(os, "geteuid") or os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    path = tmp_path / "x.ckpt"
    write_checkpoint(path, {"epoch": 1})
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match=r"x\.ckpt: cannot be written: Permission denied"):
            write_checkpoint(path, {"epoch": 2})
        assert load_checkpoint(path) == {"epoch": 1}
    finally:
        tmp_path.chmod(0o700)


def test_a_read_only_file_system(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.ckpt"
    write_checkpoint(path, {"epoch": 1})
    real_open = os.open

    def refuse(name: Any, flags: int, *mode: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(30, "Read-only file system")
        return real_open(name, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=r"x\.ckpt: cannot be written: Read-only file system"):
        write_checkpoint(path, {"epoch": 2})
    assert load_checkpoint(path) == {"epoch": 1}


def test_a_folder_that_vanishes_while_writing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "x.ckpt"
    real_sync = os.fsync

    def vanish(descriptor: int) -> None:
        real_sync(descriptor)
        if path.parent.exists() and stat.S_ISREG(os.fstat(descriptor).st_mode):
            shutil.rmtree(path.parent)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", vanish)
        with pytest.raises(CheckpointError, match=r"x\.ckpt: cannot be written: No such file or directory"):
            write_checkpoint(path, {"epoch": 1})
    assert names(tmp_path) == []
    write_checkpoint(path, {"epoch": 2})  # the next one makes it again
    assert load_checkpoint(path) == {"epoch": 2}


def test_long_names(tmp_path: pathlib.Path) -> None:
    """A name may have 255 bytes, and the temporary one must not need more."""
    path = tmp_path / f"{'ä' * 125}.ckpt"
    write_checkpoint(path, {"epoch": 1})
    assert names(tmp_path) == [path.name]
    with pytest.raises(CheckpointError, match="File name too long"):
        write_checkpoint(tmp_path / f"{'x' * 300}.ckpt", {"epoch": 1})


def test_a_failure_of_the_format_names_the_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise CheckpointError("its header takes 200 MB")

    monkeypatch.setattr("leyden.checkpoint.store.write_file", refuse)
    with pytest.raises(CheckpointError, match=r"x\.ckpt: its header takes 200 MB"):
        write_checkpoint(tmp_path / "x.ckpt", {"epoch": 1})


def test_paths(tmp_path: pathlib.Path) -> None:
    write_checkpoint(f"file://{tmp_path}/a.ckpt", {"epoch": 1})
    assert load_checkpoint(tmp_path / "a.ckpt") == {"epoch": 1}
    assert exists(f"file://{tmp_path}/a.ckpt")
    assert not exists(tmp_path / "b.ckpt")
    assert join(tmp_path, "b.ckpt") == join(str(tmp_path), "b.ckpt") == join(f"file://{tmp_path}", "b.ckpt")
    assert join(tmp_path, "b.ckpt") == str(tmp_path / "b.ckpt")
    assert join("s3://bucket/run/", "b.ckpt") == join("s3://bucket/run", "b.ckpt") == "s3://bucket/run/b.ckpt"
    remote = ["s3://b/x", "memory://x", "simplecache::s3://b/x", "abfs://c@a/x", "hf://datasets/x"]
    local = [
        "x",
        "/x",
        "a/b:c/x",
        "C:\\x",
        "c://x",
        "file:///x",
        "FILE:///x",
        "local://x",
        pathlib.Path("s3://b/x"),
        "",
    ]
    assert [is_remote(path) for path in (*remote, *local)] == [True] * len(remote) + [False] * len(local)
    assert local_path("file:///C:/x") == pathlib.Path("C:/x")


def test_a_limit_on_file_sizes(tmp_path: pathlib.Path) -> None:
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


def about(step: int) -> dict[str, Any]:
    return {"epoch": 0, "global_step": step}


def test_the_newest_is_the_last_saved_that_is_whole(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is the time that is noted in the file: a copy, or a sync from elsewhere, gives files new times."""
    assert newest(tmp_path / "nowhere") is None
    assert list_checkpoints(tmp_path / "nowhere") == []
    for saved_at, name, step in [(5.0, "b", 1), (7.0, "a", 2), (9.0, "c", 3), (7.0, "d", 1)]:
        monkeypatch.setattr(time, "time", lambda now=saved_at: now)
        write_checkpoint(tmp_path / f"{name}.ckpt", about(step))
        os.utime(tmp_path / f"{name}.ckpt", (100 - saved_at, 100 - saved_at))
    (tmp_path / ".d.ckpt.0123.tmp").write_bytes(b"")
    (tmp_path / "dangling.ckpt").symlink_to("nothing.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    assert list_checkpoints(tmp_path) == [str(tmp_path / f"{name}.ckpt") for name in "cadb"]  # d has fewer steps than a
    assert newest(f"file://{tmp_path}") == str(tmp_path / "c.ckpt")
    with (tmp_path / "c.ckpt").open("r+b") as file:
        file.truncate(100)
    assert newest(tmp_path) == str(tmp_path / "a.ckpt")
    assert newest(tmp_path, "c*") is None


def test_without_a_noted_time_the_files_time_counts(tmp_path: pathlib.Path) -> None:
    write_checkpoint(tmp_path / "x.ckpt", about(1))
    now = time.time()
    for name, mtime in [("older", now - 1000), ("newer", now + 1000)]:
        (tmp_path / f"{name}.ckpt").write_bytes(b"damaged")
        os.utime(tmp_path / f"{name}.ckpt", (mtime, mtime))
    assert [pathlib.Path(path).stem for path in list_checkpoints(tmp_path)] == ["newer", "x", "older"]
    assert newest(tmp_path) == str(tmp_path / "x.ckpt")


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
