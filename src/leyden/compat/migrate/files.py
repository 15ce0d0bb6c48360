"""Files as they are found, read and written: nothing but the rewritten text changes, not the encoding, line ends or mode."""

from __future__ import annotations

import codecs
import io
import os
import stat
import tempfile
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from leyden.errors import ConfigurationError

SKIPPED = frozenset(
    {".git", ".hg", ".venv", "venv", "site-packages", "__pycache__", "node_modules", ".ipynb_checkpoints"}
)
"""Folders that hold nobody's own code."""
ENDINGS = (".py", ".ipynb")


@dataclass(frozen=True)
class File:
    """A text as it was read.

    Attributes:
        path: of the file.
        text: decoded, line ends as they are.
        encoding: to write it with.
        mark: the byte order mark that it begins with, if any.
    """

    path: Path
    text: str
    encoding: str
    mark: bytes = b""


def find(paths: Iterable[str]) -> Iterator[Path]:
    """Every Python file and notebook below the paths; a file that is named is taken whatever its ending.

    Raises:
        ConfigurationError: for a path that does not exist.
    """
    seen = set()
    for given in paths:
        path = Path(given)
        if not path.exists():
            raise ConfigurationError(f"There is no {given}. Give files (.py, .ipynb) or folders that exist.")
        for each in [path] if path.is_file() else _below(path):
            if each.resolve() not in seen:
                seen.add(each.resolve())
                yield each


def _below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in SKIPPED)
        for name in sorted(names):
            if name.endswith(ENDINGS) and (path := Path(parent, name)).is_file():
                yield path


def read(path: Path) -> File:
    """Read a file in the encoding that it declares.

    Raises:
        SyntaxError: if the declared encoding does not exist.
        UnicodeDecodeError: if the bytes are not in it.
        OSError: if it cannot be read.
    """
    data = path.read_bytes()
    mark = codecs.BOM_UTF8 if data.startswith(codecs.BOM_UTF8) else b""
    encoding = "utf-8"
    if path.suffix != ".ipynb":
        encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0].removesuffix("-sig")
    return File(path, data[len(mark) :].decode(encoding), encoding, mark)


def write(file: File, text: str) -> None:
    """Put another text into the place of a file: all of it or nothing, with the mode that the file had.

    Raises:
        UnicodeEncodeError: if the file's encoding cannot hold it.
        OSError: if it cannot be written.
    """
    target = file.path.resolve()  # a link stays a link
    data = file.mark + text.encode(file.encoding)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(name, stat.S_IMODE(target.stat().st_mode))
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
