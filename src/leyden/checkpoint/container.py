"""The safetensors container: a header in JSON, then the bytes of the tensors, one after the other.

Eight bytes little-endian: the length of the header. The header: an object with an entry per tensor (``dtype``, ``shape``,
``data_offsets`` from the end of the header) and ``__metadata__``, an object of strings. Then the tensors, without a gap.

Reader and writer are ours: `Reader` takes the ranges it is asked for from any stream that can seek, a file or an object in
a store, straight into the tensor's memory, so that weights cost their own bytes once and a file that is replaced
or cut short meanwhile cannot hurt what was read (under a memory map it would kill the process). The library's ``save_file``
needs numpy and opens the file itself, so that it cannot be synced.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import json
import math
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from leyden.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library, in bytes."""
NATIVE_DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The dtypes written as they are, with their safetensors names: those that every reader since 2023 knows."""
_READ_DTYPES: dict[str, tuple[int, torch.dtype | None]] = {
    name: (8 * dtype.itemsize, dtype) for dtype, name in NATIVE_DTYPES.items()
} | {
    "F8_E8M0": (8, torch.float8_e8m0fnu),
    "F8_E4M3FNUZ": (8, torch.float8_e4m3fnuz),
    "F8_E5M2FNUZ": (8, torch.float8_e5m2fnuz),
    "C64": (64, torch.complex64),
    "F4": (4, torch.float4_e2m1fn_x2),  # torch counts pairs
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
}
_DTYPE_NAMES = {dtype: name for name, (_, dtype) in _READ_DTYPES.items() if dtype is not None}
_MAX_ELEMENTS = 2**63 - 1  # torch counts elements and strides in 64 bits
HUB_FILES = ("model.safetensors.index.json", "model.safetensors")
BLOCK_BYTES = 1 << 24
"""What of a sharded tensor has a checksum of its own."""
_CHUNK_BYTES = 1 << 24  # per call of a stream: some systems move no more than 2 GB at once


class ForeignFileError(CheckpointError):
    """Not a safetensors file, and perhaps one of those that `leyden.compat.foreign` reads."""


def is_hub_folder(path: Path) -> bool:
    """Whether a path is a folder as model hubs have it: ``model.safetensors``, or shards of it and their index."""
    return path.is_dir() and any((path / name).is_file() for name in HUB_FILES)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor is in its file. Offsets are in bytes from the end of the header."""

    dtype_name: str
    dtype: torch.dtype | None
    """None: this torch has no such dtype."""
    shape: tuple[int, ...]
    begin: int
    end: int


class Reader:
    """An open safetensors file: its header, read and checked, and its tensors, read when asked for.

    Names are keys of a dict and nothing else: what looks like a path in one touches no file.

    Args:
        stream: open for reading bytes, and able to seek.

    Raises:
        CheckpointError: it is not such a file, or a part of it is missing; the reason, without the file's name.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        size = stream.seek(0, 2)
        stream.seek(0)
        start = _read(stream, min(size, 8))
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _no_header(start, size, length)
        self._data = 8 + length
        header = _parse_header(_read(stream, length))
        self.metadata: dict[str, str] = _metadata(header.pop("__metadata__", None))
        self.entries: dict[str, Entry] = {name: _entry(name, fields) for name, fields in header.items()}
        """The tensors in the order of their bytes."""
        self.entries = dict(sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].end)))
        _check_ranges(self.entries, size - self._data)

    def read(self, name: str) -> Tensor:
        """Read one tensor to the CPU, into memory of its own and no more than that.

        Raises:
            CheckpointError: torch has no such dtype, or the file ends too early.
        """
        entry = self.entries[name]
        if entry.dtype is None:
            raise CheckpointError(f"the tensor {shown(name)} has the dtype {entry.dtype_name}, which this torch lacks")
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(name, raw_bytes(tensor))
        return tensor

    def read_into(self, name: str, memory: memoryview, start: int = 0) -> None:
        """Fill ``memory`` with a tensor's bytes from ``start`` on.

        Raises:
            CheckpointError: the file ends too early.
        """
        entry = self.entries[name]
        assert start + len(memory) <= entry.end - entry.begin
        self._stream.seek(self._data + entry.begin + start)
        fill(self._stream, memory)


def write_file(stream: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file to an open stream, one tensor after the other.

    Args:
        stream: open for writing bytes; need not seek.
        tensors: contiguous CPU tensors, of the dtypes in `NATIVE_DTYPES`.
        metadata: any strings.

    Raises:
        CheckpointError: the header is larger than a safetensors header may be (100 MB).
    """
    if sys.byteorder != "little":
        raise CheckpointError("safetensors is a little-endian format, and this machine is big-endian")
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # widest first keeps all aligned
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        dtype, shape = NATIVE_DTYPES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    raw = compact_json(header).encode("ascii")
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"its header takes {len(raw) / 1e6:.0f} MB, and a safetensors header has room for "
            f"{MAX_HEADER_BYTES / 1e6:.0f} MB: too many tensors, or too much plain data beside them"
        )
    _write_all(stream, memoryview(len(raw).to_bytes(8, "little") + raw))
    for name in order:
        _write_all(stream, raw_bytes(tensors[name]))


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, without a copy or numpy. It keeps the tensor alive."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:  # the pointer may be null
        return memoryview(b"")
    array = (ctypes.c_char * size).from_address(tensor.data_ptr())
    array._owner = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


def checksum(tensor: Tensor) -> str:
    """Return the CRC-32 of a contiguous CPU tensor's dtype, shape and bytes in eight hex digits.

    It runs without the interpreter's lock, at 1 to 4 GB/s per core.
    """
    return f"{zlib.crc32(raw_bytes(tensor), _checksum_start(tensor.dtype, tensor.shape)):08x}"


def block_checksums(memory: memoryview, dtype: torch.dtype, shape: Sequence[int], first: int = 0) -> list[str]:
    """Return a CRC-32 as that of `checksum` for each `BLOCK_BYTES` of a tensor, so that a part of it can be verified.

    Args:
        memory: whole blocks of the tensor's bytes; the last may be shorter.
        dtype: the tensor's.
        shape: the tensor's.
        first: the number of the first of these blocks, which counts as a part of what is summed.
    """
    start = _checksum_start(dtype, shape)
    blocks = enumerate(range(0, len(memory), BLOCK_BYTES), first)
    return [f"{zlib.crc32(memory[at : at + BLOCK_BYTES], zlib.crc32(b'%d' % i, start)):08x}" for i, at in blocks]


def _checksum_start(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return zlib.crc32(f"{_DTYPE_NAMES[dtype]}{list(shape)}".encode("ascii"))


def strict_json(text: str) -> Any:
    """Parse JSON, refusing what the standard refuses and what would be lost: see Raises.

    Raises:
        CheckpointError: malformed, a key twice in one object, NaN or Infinity, a number beyond the range of doubles,
            an integer of more than 4300 digits, nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise CheckpointError("its JSON is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"its JSON is malformed: {error}") from None


def compact_json(value: Any) -> str:
    """Return the value as JSON in ASCII, without spaces."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def shown(name: str) -> str:
    """Return a name from a file as a message may show it: no control characters, not endless."""
    return name if name.isprintable() and len(name) <= 200 else ascii(name[:200])


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, n in collections.Counter(key for key, _ in pairs).items() if n > 1)
        raise CheckpointError(f"its JSON has the key {twice[:200]!r} twice in one object")
    return result


def _no_constant(literal: str) -> NoReturn:
    raise CheckpointError(f"its JSON holds the literal {literal}, which is not JSON")


def _finite(literal: str) -> float:
    number = float(literal)
    if math.isinf(number):
        raise CheckpointError(f"its JSON holds the number {literal[:40]}, which no double can hold")
    return number


def _no_header(start: bytes, size: int, length: int) -> CheckpointError:
    if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return ForeignFileError(
            "this is a pickle, as torch.save writes it, which cannot be read in parts as is wanted here. Convert it: leyden "
            "convert old.ckpt new.ckpt"
        )
    if length <= MAX_HEADER_BYTES:
        return CheckpointError(f"the file is cut short: it has {size} bytes, less than its header")
    return CheckpointError("not a checkpoint: it does not begin like a safetensors file")


def _parse_header(raw: bytes) -> dict[str, Any]:
    try:
        header = strict_json(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise CheckpointError("not a checkpoint: its header is not text") from None
    if not isinstance(header, dict):
        raise CheckpointError("not a checkpoint: its header is not that of a safetensors file")
    return header


def _metadata(metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("not a checkpoint: its header is not that of a safetensors file")
    _check_text(metadata)
    _check_text(metadata.values())
    return metadata


def _check_text(strings: Iterable[str]) -> None:
    try:
        for text in strings:
            text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which no other reader takes for text
        raise CheckpointError("not a checkpoint: its header is not text") from None


def _entry(name: str, fields: Any) -> Entry:
    """Check one tensor's entry by itself."""
    _check_text([name])
    try:
        dtype_name, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"its header's entry for {shown(name)} is malformed") from None
    if not isinstance(dtype_name, str) or dtype_name not in _READ_DTYPES:
        raise CheckpointError(f"the tensor {shown(name)} has the unknown dtype {dtype_name!r:.40}")
    numbers = (*shape, begin, end) if isinstance(shape, list) else (None,)
    if not all(type(number) is int and 0 <= number <= _MAX_ELEMENTS for number in numbers):
        raise CheckpointError(
            f"its header's entry for {shown(name)} is malformed: a shape and offsets are whole numbers"
        )
    bits, dtype = _READ_DTYPES[dtype_name]
    elements = strides = 1
    for length in shape:
        strides *= max(length, 1)
        elements *= length
        if strides > _MAX_ELEMENTS:
            raise CheckpointError(f"the tensor {shown(name)} has an impossible shape")
    if end - begin != (size := -(-elements * bits // 8)) or elements * bits % 8:
        raise CheckpointError(
            f"the tensor {shown(name)} has offsets for {end - begin} bytes; its dtype and shape make {size}"
        )
    if dtype_name == "F4":
        if not shape or shape[-1] % 2:
            raise CheckpointError(f"the tensor {shown(name)} has an odd last dimension, and F4 comes in pairs")
        shape = [*shape[:-1], shape[-1] // 2]
    return Entry(dtype_name, dtype, tuple(shape), begin, end)


def _check_ranges(entries: Mapping[str, Entry], data_size: int) -> None:
    """Check that the tensors, in the order of their bytes, fill the data without a gap or an overlap."""
    position = 0
    for name, entry in entries.items():
        if entry.begin != position:
            fault = "overlaps the one before" if entry.begin < position else "leaves a gap before it"
            raise CheckpointError(f"its header is wrong: the tensor {shown(name)} {fault}")
        position = entry.end
    if data_size < position:
        missing = position - data_size
        raise CheckpointError(f"the file is cut short: {missing} of {position} bytes of tensors are missing")
    if data_size > position:
        raise CheckpointError(f"the file has {data_size - position} bytes more than its header announces")


def _read(stream: BinaryIO, size: int) -> bytes:
    buffer = bytearray(size)
    fill(stream, memoryview(buffer))
    return bytes(buffer)


def fill(stream: BinaryIO, memory: memoryview) -> None:
    """Fill ``memory`` with the bytes that come next.

    Raises:
        CheckpointError: the stream ends too early.
    """
    readinto = getattr(stream, "readinto", None)
    done = 0
    while done < len(memory):
        part = memory[done : done + _CHUNK_BYTES]
        if readinto is not None:
            count = readinto(part)
        else:
            data = stream.read(len(part))
            count = len(data)
            part[:count] = data
        if not count:
            raise CheckpointError(f"the file is cut short: it ended {len(memory) - done} bytes too early")
        done += count


def _write_all(stream: BinaryIO, data: memoryview) -> None:
    done = 0
    while done < len(data):
        part = data[done : done + _CHUNK_BYTES]
        count = stream.write(part)
        done += len(part) if count is None else count  # None: some remote files write all and do not say so
