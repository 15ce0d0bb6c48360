"""A sharded checkpoint: a folder of safetensors files, read like one file.

``leyden.safetensors``
    has the metadata and the tensors of a checkpoint file (see `leyden.checkpoint.format`), except those that were shared
    out among ranks; ``leyden_shards`` among its metadata is JSON: ``files`` has name, size in bytes and checksum of each
    of the others, ``tensors`` the dtype and the whole shape of each tensor that is in them.

``shard-00000-of-00004.safetensors``, …
    one per rank that had something to write: its chunks of those tensors, under the tensors' names. ``leyden_chunks``
    among its metadata has, for each, the tensor's name, the offsets of the chunk within it and the CRC-32 of each 16 MB of it;
    that file's checksum is this entry's. ``DCP_SHARDING_INFO`` says where chunks lie in the words of torch's
    ``HuggingFaceStorageReader``, which can therefore read such a folder.

The file with the metadata is the last to be written, and the folder gets its name when all is on the disk. Nothing in any
file is executed; names of files are compared with a pattern and never lead elsewhere. `leyden.checkpoint.sharded` writes
these folders and reads parts of them; what is here needs no process group.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import stat
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from leyden.checkpoint.container import (
    BLOCK_BYTES,
    NATIVE_DTYPES,
    Entry,
    Reader,
    block_checksums,
    compact_json,
    raw_bytes,
    shown,
    strict_json,
)
from leyden.errors import CheckpointError

MAIN = "leyden.safetensors"
_SHARD = re.compile(r"shard-[0-9]{5,9}-of-[0-9]{5,9}\.safetensors")
_DTYPES = {name: dtype for dtype, name in NATIVE_DTYPES.items()}
_MAX_OPEN = 64  # files at once: some systems allow a process 256


def is_sharded(path: Path) -> bool:
    """Return whether a path is a folder that is a sharded checkpoint, or a link to one; a damaged one counts."""
    if not path.is_dir():
        return False
    with contextlib.suppress(OSError):
        return (path / MAIN).exists() or any(_SHARD.fullmatch(name) for name in os.listdir(path))
    return False


def shard_name(rank: int, world_size: int) -> str:
    """Return the name of the file that a rank writes."""
    return f"shard-{rank:05d}-of-{world_size:05d}.safetensors"


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor, as one rank wrote it."""

    file: str
    key: str
    """Its name in that file."""
    offsets: tuple[int, ...]
    """Where it begins within the whole tensor."""
    shape: tuple[int, ...]
    checksums: tuple[Any, ...]


def chunk_metadata(chunks: Mapping[str, tuple[str, Sequence[int], Tensor]]) -> tuple[dict[str, str], str]:
    """Return the metadata of a shard file, and its checksum.

    Args:
        chunks: by key in the file: the tensor's name, the offsets within it, and the chunk, contiguous and on the CPU.
    """
    entries = {
        key: [name, list(offsets), block_checksums(raw_bytes(chunk), chunk.dtype, chunk.shape)]
        for key, (name, offsets, chunk) in chunks.items()
    }
    text = compact_json(entries)
    places = compact_json({key: {"saved_offsets": list(offsets)} for key, (_, offsets, _) in chunks.items()})
    return {"format": "pt", "DCP_SHARDING_INFO": places, "leyden_chunks": text}, _checksum(text)


class Folder:
    """An open sharded checkpoint, with what a `Reader` of one file has. The shards' headers are read when first needed.

    Args:
        path: the folder.
        held: closes the files.

    Raises:
        CheckpointError: a file is missing, has another size than noted, or is malformed; the reason, without the folder's name.
        OSError: a file cannot be read.
    """

    def __init__(self, path: Path, held: contextlib.ExitStack) -> None:
        self._path = path
        self._readers: dict[str, tuple[Reader, BinaryIO]] = {}
        held.callback(self._close)
        self._main = Reader(held.enter_context(self._open(MAIN)))
        self._chunks: dict[str, list[Chunk]] | None = None
        self.metadata: dict[str, str] = self._main.metadata
        self._files, self.sharded = _table(self.metadata.get("leyden_shards"))
        """``sharded``: of each tensor that is in shards the dtype and the whole shape."""
        self.entries: dict[str, Any] = {**self._main.entries, **self.sharded}
        if twice := self._main.entries.keys() & self.sharded.keys():
            raise CheckpointError(f"malformed: the tensor {shown(min(twice))} is there twice")
        for name, (size, _) in self._files.items():
            try:
                found = (path / name).stat().st_size
            except FileNotFoundError:
                raise CheckpointError(f"{name} is missing") from None
            if found != size:
                raise CheckpointError(f"{name} has {found} bytes and not the {size} that were written")

    def shape_of(self, name: str) -> tuple[tuple[int, ...], torch.dtype | None]:
        """Return a tensor's whole shape, and its dtype."""
        entry: Entry = self.entries[name]
        return entry.shape, entry.dtype

    def chunks(self, name: str) -> list[Chunk]:
        """Return the chunks of a tensor that is in shards; they fill it without a gap or an overlap.

        Raises:
            CheckpointError: they do not, or a shard file is damaged.
        """
        if self._chunks is None:
            found: dict[str, list[Chunk]] = {each: [] for each in self.sharded}
            for file, (_, checksum) in self._files.items():
                self._read_header(file, checksum, found)
            for each, chunks in found.items():
                if not _fill(self.sharded[each].shape, chunks):
                    raise CheckpointError(f"malformed: the chunks of the tensor {shown(each)} do not make it up")
            self._chunks = found
        return self._chunks[name]

    def read(self, name: str) -> Tensor:
        """Read a whole tensor to the CPU. Of those in `sharded` the checksums are verified.

        Raises:
            CheckpointError: a file is damaged.
        """
        if name not in self.sharded:
            return self._main.read(name)
        chunks = self.chunks(name)  # checked before memory is taken
        tensor = torch.empty(self.sharded[name].shape, dtype=self.sharded[name].dtype)
        for chunk in chunks:
            place = tuple(
                slice(start, start + length) for start, length in zip(chunk.offsets, chunk.shape, strict=True)
            )
            self.read_part(name, chunk, [0] * len(chunk.shape), tensor[place])
        return tensor

    def read_part(self, name: str, chunk: Chunk, start: Sequence[int], target: Tensor) -> None:
        """Read the part of a chunk that begins at ``start`` within it and has the shape of ``target``, and verify it.

        What is read is rows along the first dimension, to whole blocks of 16 MB: for tensors sharded along it,
        little more than what is asked for.

        Raises:
            CheckpointError: the file is damaged.
        """
        dtype = self.sharded[name].dtype
        assert dtype is not None
        whole = math.prod(chunk.shape) * dtype.itemsize
        direct = target.is_cpu and target.is_contiguous() and target.dtype == dtype and target.shape == chunk.shape
        if direct:
            begin, memory = 0, raw_bytes(target)
        else:
            row = whole // chunk.shape[0] if chunk.shape else whole
            first, count = (start[0], target.shape[0]) if chunk.shape else (0, 1)
            begin = first * row // BLOCK_BYTES * BLOCK_BYTES
            end = min(-(-(first + count) * row // BLOCK_BYTES) * BLOCK_BYTES, whole)
            buffer = torch.empty(end - begin, dtype=torch.uint8)
            memory = raw_bytes(buffer)
        self._reader(chunk.file).read_into(chunk.key, memory, begin)
        block = begin // BLOCK_BYTES
        sums = block_checksums(memory, dtype, chunk.shape, block)
        if sums != list(chunk.checksums[block : block + len(sums)]):
            raise CheckpointError(
                f"the tensor {shown(name)} is damaged: its checksum in {chunk.file} is not the one that was written"
            )
        if not direct:
            rows = buffer[first * row - begin :][: count * row].view(dtype).view(count, *chunk.shape[1:])
            part = rows if chunk.shape else rows[0]
            for dim in range(1, len(chunk.shape)):
                part = part.narrow(dim, start[dim], target.shape[dim])
            target.copy_(part)

    def _read_header(self, file: str, checksum: str, found: dict[str, list[Chunk]]) -> None:
        reader = self._reader(file)
        text = reader.metadata.get("leyden_chunks", "")
        if _checksum(text) != checksum:
            raise CheckpointError(f"{file} is damaged: its header's checksum is not the one that was written")
        table = strict_json(text)
        if not isinstance(table, dict) or table.keys() != reader.entries.keys():
            raise CheckpointError(f"{file} is malformed: it does not hold the chunks that it names")
        for key, fields in table.items():
            entry = reader.entries[key]
            try:
                name, offsets, checksums = fields
                whole = self.sharded[name]
            except (TypeError, ValueError, KeyError):
                raise CheckpointError(f"{file} is malformed: {shown(key)} is a chunk of no tensor") from None
            if entry.dtype is not whole.dtype:
                raise CheckpointError(f"{file} is malformed: {shown(key)} has the dtype {entry.dtype_name}")
            if not _is_shape(offsets) or not isinstance(checksums, list):
                raise CheckpointError(f"{file} is malformed: offsets are whole numbers")
            found[name].append(Chunk(file, key, tuple(offsets), entry.shape, tuple(checksums)))

    def _reader(self, file: str) -> Reader:
        if file not in self._readers:
            if len(self._readers) >= _MAX_OPEN:
                self._close()
            stream = self._open(file)
            try:
                self._readers[file] = Reader(stream), stream
            except CheckpointError as error:
                stream.close()
                raise CheckpointError(f"{file}: {error}") from None
        return self._readers[file][0]

    def _close(self) -> None:
        for _, stream in self._readers.values():
            stream.close()
        self._readers.clear()

    def _open(self, name: str) -> BinaryIO:
        # O_NONBLOCK: a named pipe in a file's place would be waited for
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            descriptor = os.open(self._path / name, flags)
        except FileNotFoundError:
            raise CheckpointError(f"{name} is missing") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise CheckpointError(f"{name} is no file")
        return os.fdopen(descriptor, "rb", buffering=0)


def _table(text: str | None) -> tuple[dict[str, tuple[int, str]], dict[str, Entry]]:
    """Return the shard files with size and checksum, and the tensors that are in them."""
    if text is None:
        return {}, {}
    table = strict_json(text)
    try:
        files = {name: (size, checksum) for name, size, checksum in table["files"]}
        tensors = {name: (kind, shape) for name, (kind, shape) in table["tensors"].items()}
    except (TypeError, ValueError, KeyError, AttributeError):
        raise CheckpointError("malformed leyden_shards") from None
    for name, (size, checksum) in files.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name) or type(size) is not int:
            raise CheckpointError(f"malformed leyden_shards: {name!r:.80} is not the name of a shard")
        if not isinstance(checksum, str):
            raise CheckpointError("malformed leyden_shards")
    sharded = {}
    for name, (kind, shape) in tensors.items():
        if not isinstance(kind, str) or kind not in _DTYPES or not _is_shape(shape) or 0 in shape:
            raise CheckpointError(f"malformed leyden_shards: the tensor {shown(name)}")
        sharded[name] = Entry(kind, _DTYPES[kind], tuple(shape), 0, 0)
    return files, sharded


def shards_json(files: Sequence[tuple[str, int, str]], tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> str:
    """Return ``leyden_shards``: the shard files with size and checksum, and the dtype and whole shape of their tensors."""
    named = {name: [NATIVE_DTYPES[dtype], list(shape)] for name, (dtype, shape) in tensors.items()}
    return compact_json({"files": [list(file) for file in sorted(files)], "tensors": named})


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 2**63 for each in value)


def _fill(shape: Sequence[int], chunks: Sequence[Chunk]) -> bool:
    """Whether chunks make up the whole: as shards do, they form a grid, each dimension divided for itself."""
    if any(len(chunk.offsets) != len(shape) or len(chunk.shape) != len(shape) for chunk in chunks):
        return False
    cells = 1
    for dim, length in enumerate(shape):
        position = 0
        intervals = {(chunk.offsets[dim], chunk.shape[dim]) for chunk in chunks}
        for begin, size in sorted(intervals):
            if begin != position or not size:
                return False
            position += size
        if position != length:
            return False
        cells *= len(intervals)
    return len(chunks) == cells == len({chunk.offsets for chunk in chunks})


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}"
