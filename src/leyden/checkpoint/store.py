"""Where checkpoints are kept: written so that a file under its name is always whole, listed, copied and deleted.

Paths may be URLs of remote file systems (``s3://…``, see `leyden.checkpoint.remote`); ``file://`` is the local path.
How a local file or folder gets its name is in `leyden.checkpoint.atomic`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from leyden.checkpoint import remote
from leyden.checkpoint.atomic import (
    beside,
    copied_folder,
    discard,
    filled,
    is_real_folder,
    put_back,
    refuse_other_folder,
    refusing,
    replace,
    share,
    temporary,
)
from leyden.checkpoint.folder import is_sharded
from leyden.checkpoint.format import encode, read_about, read_metadata, write_file
from leyden.checkpoint.remote import PathLike, is_remote, local_path
from leyden.errors import CheckpointError


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
        replace(target, lambda held: filled(target, held, lambda file: write_file(file, tensors, metadata)))


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
            if is_sharded(original):
                return copied_folder(original, target, held)
            share(target.parent, held)
            second = temporary(target, held)
            try:
                os.link(original, second)
                share(second, held)  # should the original be replaced, this is its only name
                return second
            except FileNotFoundError:
                raise
            except OSError:  # no hard links here
                pass
        stream = held.enter_context(remote.reading(source))
        return filled(target, held, lambda file: shutil.copyfileobj(stream, file, 1 << 20))

    replace(target, copied)


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
        share(target.parent, held)
        link = temporary(target, held)
        os.symlink(os.path.relpath(original, target.parent), link)
        return link

    try:
        replace(target, linked)
    except CheckpointError:
        copy_checkpoint(original, target)


def remove(path: PathLike) -> None:
    """Delete a checkpoint, which is a file or the folder of a sharded one, or a link; one that is already gone is no error.

    A folder is renamed first: what a kill leaves of it is not taken for a checkpoint, and is deleted by the next writer.

    Raises:
        CheckpointError: it cannot be deleted, or is a folder that is no checkpoint.
    """
    if is_remote(path):
        remote.remove(str(path))
        return
    local = local_path(path)
    with refusing(path, "cannot be deleted"):
        if is_real_folder(local):
            refuse_other_folder(local)
            discard(local, beside(local, "tmp"))
        else:
            local.unlink(missing_ok=True)


def exists(path: PathLike) -> bool:
    """Return whether there is a file, a folder, or a link to one.

    Raises:
        CheckpointError: a remote file system does not answer.
    """
    if is_remote(path):
        return remote.exists(str(path))
    local = local_path(path)
    if not local.exists():
        put_back(local.parent)
    return local.exists()


def join(folder: PathLike, name: str) -> str:
    """Return the path of ``name`` within ``folder``: with ``/`` in URLs, as the system has it elsewhere."""
    if is_remote(folder):
        return f"{str(folder).rstrip('/')}/{name}"
    return os.path.join(local_path(folder), name)


def list_checkpoints(folder: PathLike, pattern: str = "*.ckpt") -> list[str]:
    """List the checkpoints in ``folder``, files and folders of shards, the last saved first; none if there is no folder.

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
        put_back(local_path(folder))
        # a dangling link is no file
        paths = (path for path in local_path(folder).glob(pattern) if not path.name.startswith("."))
        found = [str(path) for path in paths if path.is_file() or is_sharded(path)]
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
