"""Checkpoints on remote file systems, through fsspec, which is imported when the first URL is met.

Object stores publish an object only once its upload is complete, so they are written under the final name. Everything
else gets a temporary name beside it, ``.<name>.<random>.tmp``, and a move. Either way a failure in the middle leaves
what was there before. What a killed process leaves on a remote disk stays there: nothing tells that its writer is dead.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from leyden.errors import CheckpointError, did_you_mean

PathLike = str | os.PathLike[str]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[A-Za-z][A-Za-z0-9+.-]+)*://")  # two letters or more: c:// is a drive
_LOCAL = re.compile(r"(?:file|local)://", re.IGNORECASE)
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "obs", "cos", "r2"})
_PIECE_BYTES = 8 << 20


def is_remote(path: PathLike) -> bool:
    """Return whether ``path`` is a URL of a remote file system; ``file://`` and `pathlib` paths are local."""
    return isinstance(path, str) and bool(_URL.match(path)) and not _LOCAL.match(path)


def local_path(path: PathLike) -> Path:
    """Return a path that is not remote as a `pathlib.Path`, without ``file://``."""
    text = os.fspath(path)
    match = _LOCAL.match(text)
    if match is None:
        return Path(path)
    text = text[match.end() :]
    return Path(text[1:] if re.match(r"/[A-Za-z]:", text) else text)  # file:///C:/…


def filesystem(path: PathLike) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path within it.

    Raises:
        CheckpointError: the URL's scheme is unknown, or the package that reads it is not installed.
    """
    url = os.fspath(path)
    scheme = url.partition("://")[0].rpartition("::")[2]
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]
        from fsspec.registry import known_implementations as known  # type: ignore[import-untyped]
    except ImportError as error:
        raise CheckpointError(f"{path}: a URL needs fsspec: pip install fsspec") from error
    try:
        return url_to_fs(url)  # type: ignore[no-any-return]
    except ImportError as error:
        module = known.get(scheme, {}).get("class", "fsspec").partition(".")[0]
        package = f": pip install {module}" if module != "fsspec" else ""
        raise CheckpointError(f"{path}: what reads {scheme}:// is not installed{package} ({error})") from error
    except ValueError as error:
        hint = did_you_mean(scheme, known) if "Protocol not known" in str(error) else ""
        raise CheckpointError(f"{path}: {error}.{hint}") from error
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be reached: {_reason(error)}") from error


def write(path: str, fill: Callable[[Any], None]) -> None:
    """Let ``fill`` write the file at ``path``; if anything fails, what was there stays.

    Raises:
        CheckpointError: naming the path and the reason.
    """
    with _refusing(path, "cannot be written"):
        fs, target = filesystem(path)
        if _publishes_when_complete(fs):
            _upload(fs, target, fill)
            return
        folder, _, name = target.rpartition("/")
        if folder:
            fs.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/.{name}.{secrets.token_hex(4)}.tmp" if "/" in target else f".{name}.tmp"
        try:
            _upload(fs, temporary, fill)
            _move(fs, temporary, target)
        except BaseException:
            with contextlib.suppress(Exception):
                fs.rm_file(temporary)
            raise


def copy(source: PathLike, path: str) -> None:
    """Copy a local or remote file to ``path``: within an object store it is the store that copies, else it is read here.

    Raises:
        CheckpointError: naming the path and the reason.
    """
    if is_remote(source):
        here, inner = filesystem(str(source))
        fs, target = filesystem(path)
        if here is fs and _publishes_when_complete(fs):
            with _refusing(path, "cannot be written"):
                fs.cp_file(inner, target)
            return

    def fill(stream: Any) -> None:
        with reading(source) as original:
            shutil.copyfileobj(original, stream, _PIECE_BYTES)

    write(path, fill)


@contextlib.contextmanager
def reading(path: PathLike) -> Iterator[IO[bytes]]:
    """Open a local or remote file for reading bytes.

    Raises:
        CheckpointError: naming the path and the reason, also for what fails while it is read.
    """
    if not is_remote(path):
        with local_path(path).open("rb") as file:
            yield file
        return
    with _refusing(path, "cannot be read"):
        fs, inner = filesystem(str(path))
        file = fs.open(inner, "rb")
    try:
        yield file
    finally:
        file.close()


def remove(path: str) -> None:
    """Delete a file; one that is gone is no error.

    Raises:
        CheckpointError: naming the path and the reason.
    """
    with _refusing(path, "cannot be deleted"), contextlib.suppress(FileNotFoundError):
        fs, inner = filesystem(path)
        fs.rm_file(inner)


def exists(path: str) -> bool:
    """Return whether there is a file.

    Raises:
        CheckpointError: the file system does not answer. fsspec's own ``exists`` would say no.
    """
    with _refusing(path, "cannot be looked up"):
        fs, inner = filesystem(path)
        fs.invalidate_cache()  # listings that are kept do not know of what other processes did
        try:
            fs.info(inner)
        except FileNotFoundError:
            return False
        return True


def open_stream(path: PathLike) -> BinaryIO:
    """Open a local file or a URL for reading bytes, able to seek."""
    if not is_remote(path):
        return local_path(path).open("rb", buffering=0)  # tensors are read into their own memory, without a second copy
    system, inside = filesystem(str(path))
    system.invalidate_cache()  # a length that was remembered is that of the file before, if it was replaced
    try:
        return system.open(inside, "rb")  # type: ignore[no-any-return]
    except OSError:
        raise
    except Exception as error:  # every driver has exceptions of its own
        raise CheckpointError(f"cannot be read: {type(error).__name__}: {error}") from error


def close_names(path: PathLike) -> str:
    """Which file beside a local ``path``, which is not there, may have been meant: a sentence, or an empty string."""
    if is_remote(path):
        return ""
    local = local_path(path)
    return did_you_mean(local.name, (other.name for other in local.parent.glob("*.*")))


def modified(path: PathLike) -> float:
    """Return when a file was last written, in seconds since 1970; 0 where a remote file system does not say."""
    if not is_remote(path):
        return local_path(path).stat().st_mtime
    path = os.fspath(path)
    with contextlib.suppress(Exception):
        fs, inner = filesystem(path)
        return float(fs.modified(inner).timestamp())
    return 0.0


def names(folder: str, pattern: str) -> list[str]:
    """List the names of the files in ``folder`` that match ``pattern``; none if there is no folder.

    Raises:
        CheckpointError: the file system does not answer.
    """
    with _refusing(folder, "cannot be listed"):
        fs, inner = filesystem(folder)
        fs.invalidate_cache()
        try:
            entries = fs.ls(inner, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        files = (entry["name"] for entry in entries if entry["type"] != "directory" and entry["name"] != inner)
        return [name for name in (file.rpartition("/")[2] for file in files) if fnmatch.fnmatchcase(name, pattern)]


@contextlib.contextmanager
def _refusing(path: PathLike, what: str) -> Iterator[None]:
    """Turn whatever a driver raises, and each has exceptions of its own, into a CheckpointError."""
    try:
        yield
    except CheckpointError as error:  # from the file format, which does not know the name
        raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from None
    except Exception as error:
        raise CheckpointError(f"{path}: {what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"


def _publishes_when_complete(fs: Any) -> bool:
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return not _OBJECT_STORES.isdisjoint(protocols)


class _Counting:
    """A stream that counts what is written to it."""

    def __init__(self, file: Any) -> None:
        self.written = 0
        self._file = file

    def write(self, data: Any) -> int:
        piece = bytes(data)  # not every driver takes a memoryview
        self._file.write(piece)
        self.written += len(piece)
        return len(piece)

    def flush(self) -> None:
        """Leave it to the close, which sends all."""


def _upload(fs: Any, path: str, fill: Callable[[Any], None]) -> None:
    """Write one file and see that all of it has arrived.

    Never ``with fs.open(…)``: leaving that block because of an error closes the file, and closing publishes the part that
    was written.
    """
    file = fs.open(path, "wb")
    try:
        counting = _Counting(file)
        fill(counting)
        file.close()
    except BaseException:
        _abandon(file)
        raise
    fs.invalidate_cache()
    size = fs.info(path)["size"]
    if size is not None and size != counting.written:
        raise OSError(errno.EIO, f"{size} of {counting.written} bytes have arrived")


def _abandon(file: Any) -> None:
    """Make an upload void: give up the parts that were sent, and see that nothing closes, and so publishes, it later."""
    from fsspec.spec import AbstractBufferedFile  # type: ignore[import-untyped]

    with contextlib.suppress(Exception):
        file.discard() if hasattr(file, "discard") else file.close()
    if isinstance(file, AbstractBufferedFile):
        file.closed = True  # the garbage collector would close it


def _move(fs: Any, source: str, target: str) -> None:
    from fsspec.spec import AbstractFileSystem

    def move(source: str, target: str) -> None:
        if type(fs).mv is AbstractFileSystem.mv:  # copies and deletes, and takes [ and * in names for patterns
            fs.cp_file(source, target)
            fs.rm_file(source)
        else:
            fs.mv(source, target)

    try:
        move(source, target)
    except OSError as error:
        if error.errno != errno.EEXIST and not isinstance(error, FileExistsError):
            raise
        aside = f"{source}.old"  # this file system's move does not replace: both versions are whole all the time
        move(target, aside)
        try:
            move(source, target)
        except BaseException:
            move(aside, target)
            raise
        fs.rm_file(aside)
