"""Where checkpoints are kept: written so that a file under its name is always whole.

Writing goes to a temporary file in the same folder, which is synced, renamed over the target, and the folder
synced: a process killed at any instant leaves the old file or the new one, never a part. What a killed process leaves
behind is named ``.<name>.<random>.tmp`` and never mistaken for a checkpoint. Its writer held a lock on it, which ends with
the process; so the next process that writes into the folder can tell, and deletes it.

Paths may be URLs of remote file systems (``s3://…``, see `leyden.checkpoint.remote`); ``file://`` is the local path.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import os
import platform
import re
import secrets
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from leyden.checkpoint import remote
from leyden.checkpoint.format import encode, read_about, read_metadata, write_file
from leyden.checkpoint.remote import PathLike, is_remote, local_path
from leyden.errors import CheckpointError

fcntl: Any
try:
    fcntl = importlib.import_module("fcntl")
except ImportError:  # Windows
    fcntl = None

_OTHER_HOST_S = 3600.0
"""Age from which an unlocked temporary file of another host counts as left behind: some clusters lock per host only."""
_swept: set[tuple[int, str]] = set()  # process and folder: a child process begins anew


def write_checkpoint(path: PathLike, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint file atomically; returns when it is on the disk, or remotely, when it has arrived.

    Missing folders are made. If anything fails, what was at ``path`` stays as it was.

    Args:
        path: the file, or a URL. A link there is replaced, not followed.
        checkpoint: see `leyden.checkpoint.format.encode`.

    Raises:
        CheckpointError: the checkpoint holds what cannot be stored, or the disk refused; names the key or the file.
    """
    write_tensors(path, *encode(checkpoint))


def write_tensors(path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write what `leyden.checkpoint.format.seal` made of a checkpoint, as `write_checkpoint` does.

    Raises:
        CheckpointError: the disk refused; names the file.
    """
    if is_remote(path):
        remote.write(os.fspath(path), lambda stream: write_file(stream, tensors, metadata))
    else:
        target = local_path(path)
        _replace(target, lambda held: _filled(target, held, lambda file: write_file(file, tensors, metadata)))


def copy_checkpoint(source: PathLike, path: PathLike) -> None:
    """Put the checkpoint ``source`` under a second name, atomically.

    The two share their bytes on the disk where the file system has hard links; each can be deleted or
    replaced without touching the other.

    Raises:
        CheckpointError: it cannot be read or written.
    """
    if is_remote(path):
        remote.copy(source, str(path))
        return
    target = local_path(path)

    def copied(held: contextlib.ExitStack) -> Path:
        if not is_remote(source):
            original = local_path(source)
            _share(target.parent, held)
            temporary = _temporary(target, held)
            try:
                os.link(original, temporary)
                _share(temporary, held)  # should the original be replaced, this is its only name
                return temporary
            except FileNotFoundError:
                raise
            except OSError:  # no hard links here
                pass
        stream = held.enter_context(remote.reading(source))
        return _filled(target, held, lambda file: shutil.copyfileobj(stream, file, 1 << 20))

    _replace(target, copied)


def link_checkpoint(source: PathLike, path: PathLike) -> None:
    """Make ``path`` a relative symbolic link to the checkpoint ``source``, atomically.

    Where there are no links (remotely, or on Windows without the privilege), it becomes a copy.

    Raises:
        CheckpointError: it cannot be written.
    """
    if is_remote(source) or is_remote(path):
        copy_checkpoint(source, path)
        return
    original, target = local_path(source), local_path(path)

    def linked(held: contextlib.ExitStack) -> Path:
        _share(target.parent, held)
        temporary = _temporary(target, held)
        os.symlink(os.path.relpath(original, target.parent), temporary)
        return temporary

    try:
        _replace(target, linked)
    except CheckpointError:
        copy_checkpoint(original, target)


def remove(path: PathLike) -> None:
    """Delete a checkpoint file or link; one that is already gone is no error.

    Raises:
        CheckpointError: it cannot be deleted.
    """
    if is_remote(path):
        remote.remove(str(path))
        return
    with _refusing(path, "cannot be deleted"):
        local_path(path).unlink(missing_ok=True)


def exists(path: PathLike) -> bool:
    """Return whether there is a file, or a link to one.

    Raises:
        CheckpointError: a remote file system does not answer.
    """
    return remote.exists(str(path)) if is_remote(path) else local_path(path).exists()


def join(folder: PathLike, name: str) -> str:
    """Return the path of ``name`` within ``folder``: with ``/`` in URLs, as the system has it elsewhere."""
    if is_remote(folder):
        return f"{str(folder).rstrip('/')}/{name}"
    return os.path.join(local_path(folder), name)


def list_checkpoints(folder: PathLike, pattern: str = "*.ckpt") -> list[str]:
    """List the checkpoints in ``folder``, the last saved first; none if there is no folder.

    They are ordered by the time that is noted in them; those without, and damaged ones, by when they were written. Of equal times
    the one with more steps comes first. This reads the header of each file, which remotely is a request or two per file.

    Args:
        folder: a path or URL.
        pattern: of the names, as in `glob`. Those that begin with a dot are left out.

    Returns:
        Paths within ``folder``, damaged files included.

    Raises:
        CheckpointError: a remote file system does not answer.
    """
    if is_remote(folder):
        found = [join(folder, name) for name in remote.names(str(folder), pattern) if not name.startswith(".")]
    else:
        # a dangling link is no file
        paths = local_path(folder).glob(pattern)
        found = [str(path) for path in paths if not path.name.startswith(".") and path.is_file()]
    return sorted(found, key=_age, reverse=True)


def newest(folder: PathLike, pattern: str = "*.ckpt") -> str | None:
    """Return the last saved checkpoint in ``folder`` that is whole, or None.

    Whole means: full length and undamaged metadata. The tensors' checksums are checked when it is loaded.

    Raises:
        CheckpointError: a remote file system does not answer.
    """
    for path in list_checkpoints(folder, pattern):
        with contextlib.suppress(CheckpointError):
            read_metadata(path)
            return path
    return None


def _age(path: str) -> tuple[float, int, str]:
    """What sorts checkpoints by age, the oldest first."""
    try:
        about = read_about(path)
        return about.saved_at, about.global_step, path
    except CheckpointError:
        pass
    try:
        return (remote.modified(path) if is_remote(path) else os.stat(path).st_mtime), 0, path
    except OSError:  # deleted meanwhile
        return 0.0, 0, path


@contextlib.contextmanager
def _refusing(path: PathLike, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: {what}: {error.strerror or error}") from error
    except CheckpointError as error:  # from the file format, which does not know the name
        raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from None


def _replace(path: Path, make: Callable[[contextlib.ExitStack], Path]) -> None:
    """Let ``make`` make a temporary file beside ``path``, then put it in its place.

    What ``make`` leaves on the stack is undone last: the temporary stays locked until it has its name.
    """
    with _refusing(path, "cannot be written"), contextlib.ExitStack() as held:
        if path.is_dir() and not path.is_symlink():  # before gigabytes are written in vain
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _make_folder(path.parent)
        _sweep(path.parent)
        os.replace(make(held), path)
        _sync_folder(path.parent)


def _filled(path: Path, held: contextlib.ExitStack, fill: Callable[[BinaryIO], object]) -> Path:
    """Return a temporary file beside ``path`` that ``fill`` has written, synced, and locked where there are locks."""
    while True:
        temporary = _temporary(path, held)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(temporary, flags, 0o666), "wb")
        held.callback(_close, file)
        if _lock(file.fileno()) is not False and os.fstat(file.fileno()).st_nlink:
            break  # else another process looked for leftovers between our two calls, and deletes this one
    fill(file)
    file.flush()
    os.fsync(file.fileno())
    if os.name == "nt":  # an open file cannot be renamed there
        file.close()
    return temporary


def _temporary(path: Path, held: contextlib.ExitStack) -> Path:
    """Return a fresh name beside ``path``, which is deleted when ``held`` is left: also after Ctrl-C.

    After the rename it is gone, except that renaming onto another name of the same file leaves both names.
    """
    name = path.name.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "ignore")  # 255 bytes is the limit
    temporary = path.with_name(f".{name}.{_host()}{secrets.token_hex(4)}.tmp")

    def unlink() -> None:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)

    held.callback(unlink)
    return temporary


def _close(file: BinaryIO) -> None:
    # unlocked by hand, because a data loader's worker that was forked meanwhile holds the same lock;
    # no error counts here: what was to be kept is synced, and otherwise there is an error already
    with contextlib.suppress(OSError, ValueError):
        _unlock(file.fileno())
    with contextlib.suppress(OSError):
        file.close()


def _share(path: Path, held: contextlib.ExitStack) -> None:
    """Lock a file or folder together with others, so that nobody clears it away, or links in it, until ``held`` is left."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        held.callback(os.close, descriptor)
        if _lock(descriptor, shared=True):
            held.callback(_unlock, descriptor)


def _lock(descriptor: int, shared: bool = False) -> bool | None:
    """Lock an open file without waiting; False if another process has it, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network disks
        return None
    return True


def _unlock(descriptor: int) -> None:
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


@functools.cache
def _host() -> str:
    return f"{zlib.crc32(platform.node().encode('utf-8', 'replace')):08x}"


def _sweep(folder: Path) -> None:
    """Delete what killed processes left in ``folder``, the first time that this process writes there."""
    key = (os.getpid(), os.path.realpath(folder))
    if key in _swept or fcntl is None:
        return
    _swept.add(key)
    with contextlib.suppress(OSError), contextlib.ExitStack() as held:
        descriptor = os.open(folder, os.O_RDONLY)
        held.callback(os.close, descriptor)
        links_too = _lock(descriptor)  # links have no lock of their own: the folder's stands for them
        if links_too:
            held.callback(_unlock, descriptor)
        elif links_too is False:
            _swept.remove(key)  # one is being made: again next time
        for entry in held.enter_context(os.scandir(folder)):
            temporary = re.fullmatch(r"\..+\.([0-9a-f]{8})[0-9a-f]{8}\.tmp", entry.name, re.DOTALL)
            if temporary is not None:
                with contextlib.suppress(OSError):  # it may be gone by now
                    _remove_leftover(Path(entry.path), temporary[1], links_too is True)


def _remove_leftover(path: Path, host: str, links_too: bool) -> None:
    """Delete a temporary file if nobody holds its lock, or for links the folder's."""
    status = path.lstat()
    if host != _host() and time.time() - status.st_mtime < _OTHER_HOST_S:
        return
    if stat.S_ISLNK(status.st_mode) or status.st_nlink > 1:
        if links_too:
            path.unlink()
        return
    descriptor = os.open(path, os.O_RDWR)  # network disks lock only what is open for writing
    try:
        if _lock(descriptor):
            path.unlink()
            _unlock(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    missing = [made for made in (folder, *folder.parents) if not made.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        _sync_folder(made.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable. Windows cannot open a folder, and some network disks refuse to sync one."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
