"""Where checkpoints are kept: written so that a file under its name is always whole.

Writing goes to a temporary file in the same folder, which is synced, renamed over the target, and the folder
synced: a process killed at any instant leaves the old file or the new one, never a part. What a killed process leaves
behind is named ``.<name>.<random>.tmp``, is never mistaken for a checkpoint, and may be deleted.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from leyden.checkpoint.format import encode, read_metadata, write_file
from leyden.errors import CheckpointError

PathLike = str | os.PathLike[str]


def write_checkpoint(path: PathLike, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint file atomically; returns when it is on the disk.

    Missing folders are made. If anything fails, what was at ``path`` stays as it was.

    Args:
        path: the file. A link there is replaced, not followed.
        checkpoint: see `leyden.checkpoint.format.encode`.

    Raises:
        CheckpointError: the checkpoint holds what cannot be stored, or the disk refused; names the key or the file.
    """
    tensors, metadata = encode(checkpoint)

    def write(temporary: Path) -> None:
        with _create(temporary) as file:
            write_file(file, tensors, metadata)
            _sync(file)

    _replace(Path(path), write)


def copy_checkpoint(source: PathLike, path: PathLike) -> None:
    """Put the checkpoint ``source`` under a second name, atomically.

    The two share their bytes on the disk where the file system has hard links; each can be deleted or
    replaced without touching the other.

    Raises:
        CheckpointError: it cannot be read or written.
    """
    source = Path(source)

    def write(temporary: Path) -> None:
        try:
            os.link(source, temporary)
        except FileNotFoundError:
            raise
        except OSError:  # no hard links here
            with source.open("rb") as original, _create(temporary) as file:
                shutil.copyfileobj(original, file, 1 << 20)
                _sync(file)

    _replace(Path(path), write)


def link_checkpoint(source: PathLike, path: PathLike) -> None:
    """Make ``path`` a relative symbolic link to the checkpoint ``source``, atomically.

    Where links are not allowed (Windows without the privilege), it becomes a copy.

    Raises:
        CheckpointError: it cannot be written.
    """
    source, path = Path(source), Path(path)
    target = os.path.relpath(source, path.parent)
    try:
        _replace(path, lambda temporary: os.symlink(target, temporary))
    except CheckpointError:
        copy_checkpoint(source, path)


def remove(path: PathLike) -> None:
    """Delete a checkpoint file or link; one that is already gone is no error.

    Raises:
        CheckpointError: it cannot be deleted.
    """
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be deleted: {error.strerror or error}") from error


def list_checkpoints(folder: PathLike, pattern: str = "*.ckpt") -> list[Path]:
    """List the files and links in ``folder`` that match ``pattern``, last written first; none if there is no folder."""
    found = []
    for path in Path(folder).glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # a dangling link, or deleted meanwhile
            if not path.name.startswith("."):
                found.append((path.stat().st_mtime_ns, path.name, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def newest(folder: PathLike, pattern: str = "*.ckpt") -> Path | None:
    """Return the last written checkpoint in ``folder`` that is whole, or None.

    Whole means: full length and undamaged metadata. The tensors' checksums are checked when it is loaded.
    """
    for path in list_checkpoints(folder, pattern):
        with contextlib.suppress(CheckpointError):
            read_metadata(path)
            return path
    return None


def _create(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666), "wb")


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a temporary file beside ``path``, then put it in its place."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:  # also after Ctrl-C; and renaming onto another name of the same file leaves both names
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


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
