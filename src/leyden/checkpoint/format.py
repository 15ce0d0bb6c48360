"""The checkpoint file: one safetensors file that any tool can open.

Weights are its tensors ``module.<name>``, optimizer state ``optimizer.<i>.<path>``, other tensors their dotted path.
The rest of the checkpoint is a JSON tree (see `leyden.checkpoint.plain`) among the file's metadata:

======================  ==========================================================================
``format``              ``pt``, which tools of other libraries look for
``leyden_format``       the version of this layout, `FORMAT_VERSION`
``leyden_version``      the leyden that wrote it
``leyden_checkpoint``   the JSON tree, with the tensors' names in their places
``leyden_checksums``    JSON: the CRC-32 of each tensor's dtype, shape and bytes, by name
``leyden_checksum``     the CRC-32 of the three entries above
======================  ==========================================================================

CRC-32 finds torn writes and flipped bits, not forgery; a forged file can only hold wrong numbers, for nothing in it is
run. It costs one pass over the bytes when saving and one when loading, at 1 to 4 GB/s per core, several times
faster than most disks.

The writer is a dozen lines here rather than ``safetensors.torch.save_file`` because that needs numpy and a second
copy in memory, and opens the file itself, so that it cannot be synced. Reading goes through the library.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from leyden.checkpoint.plain import NATIVE_DTYPES, Encoder, Fetch, raw_bytes, strict_json
from leyden.checkpoint.plain import decode as decode_node
from leyden.errors import CheckpointError, did_you_mean, reject

FORMAT_VERSION = "1"
RANDOM_STATE_KEYS = frozenset({"random_state", "rng"})
"""What stays on the CPU wherever a checkpoint is loaded to: torch takes random states from there only."""
RUN_STATE_KEYS = RANDOM_STATE_KEYS | {"optimizer_states", "lr_schedulers", "scaler", "callbacks", "loops", "progress"}
"""What ``load_checkpoint(…, weights_only=True)`` leaves in the file."""
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_ENTRY = "leyden_checkpoint"


def encode(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a checkpoint into the tensors and the metadata of its file.

    What comes back from `decode` is equal, except that paths become strings, enum members their values, subclasses of
    ``str``, ``int``, ``float`` and ``dict`` the plain type (``Counter`` and module state dicts stay),
    parameters plain tensors. Tensors that are the same view of the same memory are one tensor in the file.

    Args:
        checkpoint: string keys; tensors on any device, and plain data.

    Returns:
        Contiguous CPU tensors by name (those that were such already are not copied), and the metadata.

    Raises:
        CheckpointError: something is neither a tensor nor plain data; names its key.
    """
    encoder = Encoder()
    for key in checkpoint:
        if not isinstance(key, str):
            raise CheckpointError(f"A checkpoint's keys must be strings, got {key!r} ({type(key).__name__}).")
    tree = {key: encoder.encode(value, (key,)) for key, value in checkpoint.items()}
    checksums = {name: _checksum(tensor) for name, tensor in encoder.tensors.items()}
    metadata = {
        "format": "pt",
        "leyden_format": FORMAT_VERSION,
        "leyden_version": _version(),
        _ENTRY: _json(tree),
        "leyden_checksums": _json(checksums),
    }
    metadata["leyden_checksum"] = _metadata_checksum(metadata)
    return encoder.tensors, metadata


def decode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Put together what `encode` split. Without leyden's metadata: ``{"state_dict": tensors}``.

    Raises:
        CheckpointError: another format version, a wrong checksum, a missing tensor, or a malformed tree.
    """
    return _assemble(tensors.__getitem__, list(tensors), metadata, torch.device("cpu"), weights_only=False)


def load_checkpoint(
    path: str | os.PathLike[str],
    map_location: str | torch.device | None = "cpu",
    weights_only: bool = False,
) -> dict[str, Any]:
    """Read a checkpoint file into the dict that was saved. Nothing in the file is ever executed or imported.

    A safetensors file that leyden did not write gives ``{"state_dict": its tensors}``. Parts are read and
    checked one tensor at a time, so the peak in memory is the result.

    Args:
        path: the file.
        map_location: the device of the tensors; None means the CPU. Random states
            (`RANDOM_STATE_KEYS`) stay on the CPU.
        weights_only: leave the run's state (`RUN_STATE_KEYS`) in the file, unread.

    Raises:
        CheckpointError: no such file, not a checkpoint, cut short, damaged, or of another format version; names the
            file and the reason.
    """
    path = Path(path)
    header = _read_header(path)
    names = [name for name in header if name != "__metadata__"]
    metadata = header.get("__metadata__", {})
    try:
        device = torch.device("cpu" if map_location is None else map_location)
    except (RuntimeError, TypeError):
        reject("map_location", map_location, "a device, such as 'cpu' or 'cuda:0', or None for the CPU")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # the library maps the file into memory: a copy stays right whatever happens to the file later
            return _assemble(lambda name: file.get_tensor(name).clone(), names, metadata, device, weights_only)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a valid safetensors file: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{path}: its data is nested too deeply") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a file's metadata only, whatever its size; empty for a plain safetensors file without any.

    Checks that the file has its full length and that the metadata is what was written; the tensors' checksums are
    checked by `load_checkpoint`.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    path = Path(path)
    metadata: dict[str, str] = _read_header(path).get("__metadata__", {})
    try:
        if _is_ours(metadata):
            _check_metadata(metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return metadata


def write_file(stream: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file to an open stream, one tensor after the other.

    Args:
        stream: open for writing bytes.
        tensors: contiguous CPU tensors, of the dtypes in `NATIVE_DTYPES`.
        metadata: any strings.

    Raises:
        CheckpointError: the metadata are larger than a safetensors header may be (100 MB).
    """
    if sys.byteorder != "little":
        raise CheckpointError("safetensors is a little-endian format, and this machine is big-endian")
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # widest first keeps all aligned
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NATIVE_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    raw = _json(header).encode("ascii")
    raw += b" " * (-len(raw) % 8)
    if len(raw) > _MAX_HEADER_BYTES:
        raise CheckpointError(_too_much_plain_data(len(raw), metadata))
    stream.write(len(raw).to_bytes(8, "little"))
    stream.write(raw)
    for name in order:
        stream.write(raw_bytes(tensors[name]))


def _too_much_plain_data(size: int, metadata: Mapping[str, str]) -> str:
    tree = json.loads(metadata.get(_ENTRY, "{}"))
    key = max(tree, key=lambda key: len(_json(tree[key])), default="")
    return (
        f"{key}: the checkpoint's plain data takes {size / 1e6:.0f} MB, and a safetensors header has room for "
        f"{_MAX_HEADER_BYTES / 1e6:.0f} MB. Most of it is under {key!r}: store large lists as tensors."
    )


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(_why_no_header(start, size, length))
            header = strict_json(file.read(length).decode("utf-8"))
        _check_header(header, size - 8 - length)
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: not a checkpoint: its header is not text") from None
    except FileNotFoundError:
        close = did_you_mean(path.name, (other.name for other in path.parent.glob("*.*")))
        raise CheckpointError(f"{path}: no such file.{close}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return header  # type: ignore[no-any-return]  # checked above


def _why_no_header(start: bytes, size: int, length: int) -> str:
    if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return (
            "this is a pickle, as torch.save writes it, and leyden does not read pickles, because loading one can run "
            "code. For weights: torch.load(path, weights_only=True), then module.load_state_dict(…)"
        )
    if length <= _MAX_HEADER_BYTES:
        return f"the file is cut short: it has {size} bytes, less than its header"
    return "not a checkpoint: it does not begin like a safetensors file"


def _check_header(header: Any, data_size: int) -> None:
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("not a checkpoint: its header is not that of a safetensors file")
    end = 0
    for name, entry in header.items():
        if name != "__metadata__":
            try:
                end = max(end, int(entry["data_offsets"][1]))
            except (TypeError, KeyError, IndexError, ValueError):
                raise CheckpointError(f"its header's entry for {name} is malformed") from None
    if data_size < end:
        raise CheckpointError(f"the file is cut short: {end - data_size} of {end} bytes of tensors are missing")
    if data_size > end:
        raise CheckpointError(f"the file has {data_size - end} bytes more than its header announces")


def _assemble(
    read: Callable[[str], Tensor],
    names: list[str],
    metadata: Mapping[str, str],
    device: torch.device,
    weights_only: bool,
) -> dict[str, Any]:
    """Build the checkpoint from its tensors, each read, checked and moved once."""
    if not _is_ours(metadata):
        return {"state_dict": {name: read(name).to(device) for name in names}}
    tree, checksums = _check_metadata(metadata)

    def fetch_to(device: torch.device) -> Fetch:
        @functools.cache  # tied tensors stay tied
        def fetch(name: str) -> Tensor:
            if name not in known:
                raise CheckpointError(f"the tensor {name} is missing")
            tensor = read(name)
            if _checksum(tensor) != checksums.get(name):
                raise CheckpointError(f"the tensor {name} is damaged: its checksum is not the one that was written")
            return tensor.to(device)

        return fetch

    known = set(names)
    move, stay = fetch_to(device), fetch_to(torch.device("cpu"))
    return {
        key: decode_node(node, stay if key in RANDOM_STATE_KEYS else move)
        for key, node in tree.items()
        if not (weights_only and key in RUN_STATE_KEYS)
    }


def _is_ours(metadata: Mapping[str, str]) -> bool:
    return any(key.startswith("leyden_") for key in metadata)  # any: one may be damaged


def _check_metadata(metadata: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tree and the tensors' checksums, once the version and the checksum are right."""
    version = metadata.get("leyden_format", "")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"it has format version {version[:20]!r} (written by leyden {metadata.get('leyden_version', '?')[:20]}), "
            f"and this leyden, {_version()}, reads version {FORMAT_VERSION}. A newer leyden may read it"
        )
    for key in (_ENTRY, "leyden_version", "leyden_checksums", "leyden_checksum"):
        if key not in metadata:
            raise CheckpointError(f"its metadata lack {key!r}")
    tree, checksums = strict_json(metadata[_ENTRY]), strict_json(metadata["leyden_checksums"])
    if metadata["leyden_checksum"] != _metadata_checksum(metadata):
        raise CheckpointError("its metadata are damaged: their checksum is not the one that was written")
    if not isinstance(tree, dict) or not isinstance(checksums, dict):
        raise CheckpointError("its metadata do not hold a checkpoint")
    return tree, checksums


def _checksum(tensor: Tensor) -> str:
    dtype = NATIVE_DTYPES.get(tensor.dtype, "?")
    start = zlib.crc32(f"{dtype}{list(tensor.shape)}".encode("ascii"))
    return f"{zlib.crc32(raw_bytes(tensor.contiguous()), start):08x}"


def _metadata_checksum(metadata: Mapping[str, str]) -> str:
    parts = (metadata["leyden_version"], metadata[_ENTRY], metadata["leyden_checksums"])
    return f"{zlib.crc32(chr(10).join(parts).encode('utf-8', 'surrogatepass')):08x}"


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


@functools.cache
def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("leyden")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
