"""Files and folders that get their name when they are whole.

Writing goes to a temporary file in the same folder, which is synced, renamed over the target, and the folder
synced: a process killed at any instant leaves the old file or the new one, never a part. What a killed process leaves
behind is named ``.<name>.<random>.tmp`` and never mistaken for a checkpoint. Its writer held a lock on it, which ends with
the process; so the next process that writes into the folder can tell, and deletes it.

A sharded checkpoint is a folder and goes the same way, but a folder cannot be renamed over another: that one is renamed
away first, to ``.<name>.<random>.old``, and back by whoever looks next if the process was killed between the two.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from leyden.checkpoint.folder import MAIN, is_sharded
from leyden.checkpoint.remote import PathLike
from leyden.errors import CheckpointError

fcntl: Any
try:
    fcntl = importlib.import_module("fcntl")
except ImportError:  # Windows
    fcntl = None

_OTHER_HOST_S = 3600.0
"""Age from which an unlocked temporary file of another host counts as left behind: some clusters lock per host only."""
_swept: set[tuple[int, str]] = set()  # process and folder: a child process begins anew


@contextlib.contextmanager
def refusing(path: PathLike, what: str) -> Iterator[None]:
    """Turn an OSError into a CheckpointError that names the path."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: {what}: {error.strerror or error}") from error
    except CheckpointError as error:  # from the file format, which does not know the name
        raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from None


def replace(path: Path, make: Callable[[contextlib.ExitStack], Path]) -> None:
    """Let ``make`` make a temporary file beside ``path``, then put it in its place.

    What ``make`` leaves on the stack is undone last: the temporary stays locked until it has its name.
    """
    with refusing(path, "cannot be written"), contextlib.ExitStack() as held:
        _prepare(path)
        _put(make(held), path)


def _prepare(path: Path) -> None:
    if is_real_folder(path):  # before gigabytes are written in vain
        refuse_other_folder(path)
    _make_folder(path.parent)
    _sweep(path.parent)


def _put(temporary: Path, path: Path) -> None:
    """Give a temporary file or folder its name, in place of what has it."""
    if not (os.path.lexists(path) and (is_real_folder(path) or is_real_folder(temporary))):
        os.replace(temporary, path)
        _sync_folder(path.parent)
        return
    aside = beside(path, "old")
    with contextlib.ExitStack() as held:
        share(path / MAIN if is_real_folder(path) else path, held)  # nobody puts it back meanwhile
        os.rename(path, aside)
        try:
            os.rename(temporary, path)
        except BaseException:
            os.rename(aside, path)
            raise
        _sync_folder(path.parent)
    discard(aside, beside(path, "tmp"))


def discard(path: Path, aside: Path) -> None:
    """Delete a folder, under another name, or a file."""
    if not is_real_folder(path):
        path.unlink()
        return
    os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)  # another process may be clearing up as well
    if aside.exists():
        raise OSError(errno.ENOTEMPTY, f"a part of it is left in {aside}")


def is_real_folder(path: Path) -> bool:
    """Return whether it is a folder itself, not a link to one."""
    return path.is_dir() and not path.is_symlink()


def refuse_other_folder(path: Path) -> None:
    """Raise an OSError if a folder is no checkpoint."""
    if not is_sharded(path):
        raise IsADirectoryError(errno.EISDIR, f"{os.strerror(errno.EISDIR)}, and no checkpoint")


def draft_folder(path: Path, held: contextlib.ExitStack) -> tuple[Path, BinaryIO]:
    """Make a temporary folder beside ``path``, for `commit_folder`; it is deleted when ``held`` is left without that.

    Returns:
        The folder, and its main file, open for writing and locked.

    Raises:
        CheckpointError: there can be none.
    """
    with refusing(path, "cannot be written"):
        _prepare(path)
        share(path.parent, held)
        while True:
            temporary = beside(path, "tmp")
            temporary.mkdir()
            held.callback(shutil.rmtree, temporary, ignore_errors=True)
            file = _locked_file(temporary / MAIN, held)
            if file is not None:
                return temporary, file


def commit_folder(temporary: Path, main: BinaryIO, path: Path) -> None:
    """Sync a folder that `draft_folder` made, and put it in the place of ``path``. Its other files are synced already.

    Raises:
        CheckpointError: naming the path and the reason.
    """
    with refusing(path, "cannot be written"):
        main.flush()
        os.fsync(main.fileno())
        if os.name == "nt":  # a folder with open files cannot be renamed there
            main.close()
        _sync_folder(temporary)
        _put(temporary, path)


def copied_folder(source: Path, target: Path, held: contextlib.ExitStack) -> Path:
    """Return a temporary folder beside ``target`` that shares its files with ``source``, or has copies of them."""
    share(target.parent, held)
    temporary = beside(target, "tmp")
    temporary.mkdir()
    held.callback(shutil.rmtree, temporary, ignore_errors=True)
    for name in sorted(
        os.listdir(source), key=lambda name: name != MAIN
    ):  # the main file first: its lock keeps the rest
        try:
            os.link(source / name, temporary / name)
        except FileNotFoundError:
            raise
        except OSError:  # no hard links here
            with (source / name).open("rb") as original, (temporary / name).open("xb") as copy:
                shutil.copyfileobj(original, copy, 1 << 20)
                copy.flush()
                os.fsync(copy.fileno())
        if name == MAIN:
            share(temporary / name, held)
    _sync_folder(temporary)
    return temporary


def filled(path: Path, held: contextlib.ExitStack, fill: Callable[[BinaryIO], object]) -> Path:
    """Return a temporary file beside ``path`` that ``fill`` has written, synced, and locked where there are locks."""
    while True:
        made = temporary(path, held)
        file = _locked_file(made, held)
        if file is not None:
            break
    fill(file)
    file.flush()
    os.fsync(file.fileno())
    if os.name == "nt":  # an open file cannot be renamed there
        file.close()
    return made


def _locked_file(path: Path, held: contextlib.ExitStack) -> BinaryIO | None:
    """Make a file and lock it; None if another process looked for leftovers between our two calls, and deletes it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, flags, 0o666), "wb")
    held.callback(_close, file)
    return file if _lock(file.fileno()) is not False and os.fstat(file.fileno()).st_nlink else None


def beside(path: Path, ending: str) -> Path:
    """Return a fresh name beside ``path``."""
    # 255 bytes is the limit; what is renamed away keeps its name, to be found again
    name = path.name if ending == "old" else os.fsdecode(os.fsencode(path.name)[:200])
    return path.with_name(f".{name}.{_host()}{secrets.token_hex(4)}.{ending}")


def temporary(path: Path, held: contextlib.ExitStack) -> Path:
    """Return a fresh name beside ``path``, which is deleted when ``held`` is left: also after Ctrl-C.

    After the rename it is gone, except that renaming onto another name of the same file leaves both names.
    """
    made = beside(path, "tmp")

    def unlink() -> None:
        with contextlib.suppress(OSError):
            made.unlink(missing_ok=True)

    held.callback(unlink)
    return made


def _close(file: BinaryIO) -> None:
    # unlocked by hand, because a data loader's worker that was forked meanwhile holds the same lock;
    # no error counts here: what was to be kept is synced, and otherwise there is an error already
    with contextlib.suppress(OSError, ValueError):
        _unlock(file.fileno())
    with contextlib.suppress(OSError):
        file.close()


def share(path: Path, held: contextlib.ExitStack) -> None:
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
    put_back(folder)
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
    """Delete what is temporary if nobody holds its lock; for links and folders, neither that of the folder they are in."""
    status = path.lstat()
    if stat.S_ISDIR(status.st_mode):
        if links_too and _is_abandoned(path, host):
            shutil.rmtree(path, ignore_errors=True)
        return
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


def put_back(folder: Path) -> None:
    """Give back its name to a checkpoint whose replacement was killed between two renames; delete it if it was replaced."""
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir(folder) if name.endswith(".old")]
        for match in filter(None, (re.fullmatch(r"\.(.+)\.([0-9a-f]{8})[0-9a-f]{8}\.old", each) for each in names)):
            aside, path = folder / match[0], folder / match[1]
            with contextlib.suppress(OSError):
                if aside.is_symlink() or _is_abandoned(aside, match[2]):
                    discard(aside, beside(path, "tmp")) if os.path.lexists(path) else os.rename(aside, path)


def _is_abandoned(path: Path, host: str) -> bool:
    """Whether no living process is at work on a temporary file or folder: its lock, for a folder its main file's, is free."""
    inside = [path / MAIN, *path.iterdir()] if path.is_dir() else [path]
    age = time.time() - max(each.stat().st_mtime for each in (path, *inside) if each.exists())
    if host != _host() and age < _OTHER_HOST_S:
        return False
    try:
        descriptor = os.open(inside[0], os.O_RDWR)  # network disks lock only what is open for writing
    except FileNotFoundError:  # killed before there was one, or while it was deleted
        return True
    try:
        if _lock(descriptor):
            _unlock(descriptor)
            return True
    finally:
        os.close(descriptor)
    return False


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
