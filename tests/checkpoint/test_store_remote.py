"""Remote file systems: the same promises, as far as each of them can keep them."""

from __future__ import annotations

import contextlib
import gc
import io
import pathlib
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from leyden.checkpoint import copy_checkpoint, link_checkpoint, load_checkpoint, newest, remove, write_checkpoint
from leyden.checkpoint.store import exists, list_checkpoints
from leyden.errors import CheckpointError


class FakeFileSystem(AbstractFileSystem):
    """Files in a dict; writing fails once ``room`` bytes are used up."""

    files: ClassVar[dict[str, bytes]] = {}
    room: ClassVar[float] = float("inf")
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return (path.partition("://")[2] or path).rstrip("/")

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        if path not in self.files:
            raise FileNotFoundError(path)
        return {"name": path, "type": "file", "size": len(self.files[path])}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        return [self.info(name) for name in self.files if name.rpartition("/")[0] == path]

    def rm_file(self, path: str) -> None:
        self.info(path)
        del self.files[path]

    def take(self, size: int) -> None:
        type(self).room -= size
        if self.room < 0:
            raise OSError(28, "No space left on device")

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if mode == "rb":
            return io.BytesIO(self.files[path])
        return self.writer(path)

    def writer(self, path: str) -> Any:
        raise NotImplementedError


class Disk(FakeFileSystem):
    """Like sftp: what is written is there at once, under its name; and a file can be moved over another."""

    protocol = "disk"

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        self.files[path2] = self.files.pop(path1)

    def writer(self, path: str) -> Any:
        fs = self
        fs.files[path] = b""

        class File(io.RawIOBase):
            def writable(self) -> bool:
                return True

            def write(self, data: Any) -> int:
                fs.take(len(data))
                fs.files[path] += data
                return len(data)

        return File()


class Share(Disk):
    """Like smb: a move onto a file is refused."""

    protocol = "share"

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        if path2 in self.files:
            raise FileExistsError(17, "File exists")
        self.files[path2] = self.files.pop(path1)


class Bucket(FakeFileSystem):
    """Like s3: parts are sent while it is written, and closing the file publishes what there is so far."""

    protocol = "r2"
    discarded: ClassVar[int] = 0

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        self.files[path2] = self.files[path1]

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        raise AssertionError("it would make a bucket")

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        raise AssertionError("a move is a copy there")

    def writer(self, path: str) -> Any:
        fs = self

        class File(AbstractBufferedFile):
            def _initiate_upload(self) -> None:
                self.parts = b""

            def _upload_chunk(self, final: bool = False) -> bool:
                data = self.buffer.getvalue()
                fs.take(len(data))
                self.parts += data
                if final:
                    fs.files[path] = self.parts
                return True

            def discard(self) -> None:
                type(fs).discarded += 1

        return File(fs, path, "wb", block_size=1000)


SYSTEMS: dict[str, type[FakeFileSystem]] = {"disk": Disk, "share": Share, "r2": Bucket}


@pytest.fixture(autouse=True)
def file_systems(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, system in SYSTEMS.items():
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, name, system)
        system.files, system.room = {}, float("inf")
    Bucket.discarded = 0
    MemoryFileSystem.store.clear()
    yield
    MemoryFileSystem.store.clear()


URLS = ["memory://run/a", "disk://run/a", "share://run/a", "r2://run/a"]


def listed(url: str) -> list[str]:
    fs, path = fsspec.core.url_to_fs(url)
    return sorted(name.rpartition("/")[2] for name in fs.find(path))


@pytest.mark.parametrize("url", URLS)
def test_written_and_read(url: str) -> None:
    for n in range(3):
        write_checkpoint(f"{url}/x.ckpt", {"n": n, "w": torch.full((5000,), float(n))})
        loaded = load_checkpoint(f"{url}/x.ckpt")
        assert loaded["n"] == n
        assert torch.equal(loaded["w"], torch.full((5000,), float(n)))
        assert listed(url) == ["x.ckpt"]
    assert exists(f"{url}/x.ckpt")
    remove(f"{url}/x.ckpt")
    remove(f"{url}/x.ckpt")
    assert not exists(f"{url}/x.ckpt")


@pytest.mark.parametrize("url", URLS[1:])
@pytest.mark.parametrize("room", [0, 900, 5000, 20_000])
@pytest.mark.parametrize("old", [True, False])
def test_a_failure_in_the_middle_leaves_what_was_there(url: str, room: int, old: bool) -> None:
    """Also when the driver's file is collected later: one that is not closed would be closed then, and published."""
    system = SYSTEMS[url.partition(":")[0]]
    if old:
        write_checkpoint(f"{url}/x.ckpt", {"n": 1})
    system.room = room
    with pytest.raises(CheckpointError, match=r"x\.ckpt: cannot be written: No space left on device"):
        write_checkpoint(f"{url}/x.ckpt", {"n": 2, "w": torch.ones(5000)})
    system.room = float("inf")
    gc.collect()
    assert list(system.files) == (["run/a/x.ckpt"] if old else [])
    if old:
        assert load_checkpoint(f"{url}/x.ckpt") == {"n": 1}
    if system is Bucket:
        assert Bucket.discarded == 1  # parts that were sent and are never put together would be paid for


@pytest.mark.parametrize("url", URLS[1:])
def test_interrupted_by_the_keyboard(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system = SYSTEMS[url.partition(":")[0]]
    write_checkpoint(f"{url}/x.ckpt", {"n": 1})

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(system, "take", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(f"{url}/x.ckpt", {"n": 2, "w": torch.ones(5000)})
    gc.collect()
    assert list(system.files) == ["run/a/x.ckpt"]
    assert load_checkpoint(f"{url}/x.ckpt") == {"n": 1}


@pytest.mark.parametrize("url", URLS[1:])
def test_bytes_that_got_lost_on_the_way(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system = SYSTEMS[url.partition(":")[0]]
    info = system.info
    monkeypatch.setattr(system, "info", lambda *args, **kwargs: {**info(*args, **kwargs), "size": 7})
    with pytest.raises(CheckpointError, match=r"x\.ckpt: cannot be written: 7 of \d+ bytes have arrived"):
        write_checkpoint(f"{url}/x.ckpt", {"n": 1})


def test_where_a_move_does_not_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old version is moved aside, and back if the new one cannot take its place."""
    write_checkpoint("share://run/x.ckpt", {"n": 1})
    real, moves = Share.mv, []

    def move(fs: Any, source: str, target: str, **_: Any) -> None:
        moves.append(target)
        if len(moves) == 3:
            raise OSError(5, "Input/output error")
        real(fs, source, target)

    monkeypatch.setattr(Share, "mv", move)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write_checkpoint("share://run/x.ckpt", {"n": 2})
    assert list(Share.files) == ["run/x.ckpt"]
    assert load_checkpoint("share://run/x.ckpt") == {"n": 1}


@pytest.mark.parametrize("url", URLS)
def test_copies_and_links_are_copies(url: str, tmp_path: pathlib.Path) -> None:
    local = tmp_path / "local.ckpt"
    write_checkpoint(f"{url}/x.ckpt", {"n": 1, "w": torch.arange(5000)})
    copy_checkpoint(f"{url}/x.ckpt", f"{url}/copy.ckpt")
    link_checkpoint(f"{url}/x.ckpt", f"{url}/last.ckpt")
    copy_checkpoint(f"{url}/x.ckpt", local)
    copy_checkpoint(local, f"{url}/back.ckpt")
    copy_checkpoint(f"file://{local}", "memory://other/x.ckpt")
    link_checkpoint("memory://other/x.ckpt", f"{url}/far.ckpt")
    remove(f"{url}/x.ckpt")
    names = ["back.ckpt", "copy.ckpt", "far.ckpt", "last.ckpt"]
    assert listed(url) == names
    for path in (local, *(f"{url}/{name}" for name in names)):
        assert torch.equal(load_checkpoint(path)["w"], torch.arange(5000))
    with pytest.raises(CheckpointError, match=r"y\.ckpt"):
        copy_checkpoint(f"{url}/x.ckpt", f"{url}/y.ckpt")
    with pytest.raises(CheckpointError, match=r"x\.ckpt"):
        copy_checkpoint(f"{url}/x.ckpt", tmp_path / "y.ckpt")
    assert listed(url) == names
    assert [path.name for path in tmp_path.iterdir()] == ["local.ckpt"]


@pytest.mark.parametrize("url", URLS)
def test_the_newest(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list_checkpoints(url) == []
    assert newest(url) is None
    for saved_at, name, step in [(5.0, "b", 1), (7.0, "a", 2), (9.0, "c", 3), (7.0, "d", 1)]:
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda now=saved_at: now)
            write_checkpoint(f"{url}/{name}.ckpt", {"global_step": step})
    write_checkpoint(f"{url}/deeper/e.ckpt", {"n": 1})
    fs, path = fsspec.core.url_to_fs(url)
    with contextlib.closing(fs.open(f"{path}/.f.ckpt.0123.tmp", "wb")) as file:
        file.write(b"x")
    assert list_checkpoints(url) == [f"{url}/{name}.ckpt" for name in "cadb"]
    assert list_checkpoints(f"{url}/") == [f"{url}/{name}.ckpt" for name in "cadb"]
    with contextlib.closing(fs.open(f"{path}/c.ckpt", "wb")) as file:
        file.write(b"damaged")
    assert newest(url) == f"{url}/a.ckpt"


def test_a_damaged_file_is_dated_by_its_file_system() -> None:
    write_checkpoint("memory://run/x.ckpt", {"n": 1})
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/run/damaged.ckpt", b"damaged")
    fs.store["/run/damaged.ckpt"].modified = datetime(2000, 1, 1, tzinfo=UTC)
    assert list_checkpoints("memory://run") == ["memory://run/x.ckpt", "memory://run/damaged.ckpt"]
    fs.store["/run/damaged.ckpt"].modified = datetime(2100, 1, 1, tzinfo=UTC)
    assert list_checkpoints("memory://run") == ["memory://run/damaged.ckpt", "memory://run/x.ckpt"]


def test_names_that_are_patterns() -> None:
    """fsspec's own move would look for what matches them."""
    for n in range(2):
        write_checkpoint("memory://run/a[1]*?.ckpt", {"n": n})
    assert listed("memory://run") == ["a[1]*?.ckpt"]
    assert load_checkpoint("memory://run/a[1]*?.ckpt") == {"n": 1}


def test_file_urls_are_local(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leyden.checkpoint.remote.filesystem", None)
    url = f"file://{tmp_path}/a/x.ckpt"
    write_checkpoint(url, {"n": 1})
    copy_checkpoint(url, f"file://{tmp_path}/a/y.ckpt")
    assert (tmp_path / "a" / "x.ckpt").stat().st_ino == (tmp_path / "a" / "y.ckpt").stat().st_ino
    link_checkpoint(url, f"file://{tmp_path}/a/last.ckpt")
    assert (tmp_path / "a" / "last.ckpt").is_symlink()
    remove(url)
    assert [pathlib.Path(path).name for path in list_checkpoints(f"file://{tmp_path}/a")] == ["y.ckpt"]


# What cannot be reached


@pytest.mark.parametrize(
    ("url", "package"), [("s3://b/x.ckpt", "s3fs"), ("gs://b/x.ckpt", "gcsfs"), ("az://b/x.ckpt", "adlfs")]
)
def test_a_driver_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, url: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for action in (lambda: write_checkpoint(url, {"n": 1}), lambda: exists(url), lambda: list_checkpoints(url)):
        with pytest.raises(
            CheckpointError, match=rf"^{url}: what reads \w+:// is not installed: pip install {package}"
        ):
            action()


def test_a_scheme_that_nobody_knows() -> None:
    with pytest.raises(CheckpointError, match=r"^memry://x\.ckpt: Protocol not known: memry.* Did you mean 'memory'\?"):
        write_checkpoint("memry://x.ckpt", {"n": 1})


@pytest.mark.parametrize("url", URLS[1:])
def test_a_file_system_that_does_not_answer(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not look as if there were no files: whoever believes that forgets them."""
    system = SYSTEMS[url.partition(":")[0]]

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    for name in ("info", "ls", "open", "rm_file"):
        monkeypatch.setattr(system, name, unreachable)
    path = f"{url}/x.ckpt"
    for action, what in [
        (lambda: exists(path), "cannot be looked up"),
        (lambda: list_checkpoints(url), "cannot be listed"),
        (lambda: remove(path), "cannot be deleted"),
        (lambda: write_checkpoint(path, {"n": 1}), "cannot be written"),
    ]:
        with pytest.raises(CheckpointError, match=f"{what}: Connection reset by peer"):
            action()
