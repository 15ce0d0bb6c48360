"""The checkpoint file: one safetensors file that any tool can open.

Weights are its tensors ``module.<name>``, optimizer state ``optimizer.<i>.<path>``, other tensors their dotted path.
The rest of the checkpoint is a JSON tree (see `leyden.checkpoint.plain`) among the file's metadata:

======================  ==========================================================================
``format``              ``pt``, which tools of other libraries look for
``leyden_format``       the version of this layout, `FORMAT_VERSION`
``leyden_version``      the leyden that wrote it
``leyden_about``        JSON: what a search for checkpoints wants to know, see `About`
``leyden_checkpoint``   the JSON tree, with the tensors' names in their places
``leyden_checksums``    JSON: the CRC-32 of each tensor's dtype, shape and bytes, by name
``leyden_checksum``     the CRC-32 of the five entries above
======================  ==========================================================================

``docs/checkpoint_format.md`` is the whole specification. CRC-32 finds torn writes and flipped bits, not forgery; a
forged file can only hold wrong numbers, for nothing in it is run. It costs one pass over the bytes when saving and one
when loading, at 1 to 4 GB/s per core, several times faster than most disks.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from leyden.checkpoint import container, from_plain
from leyden.checkpoint.container import (
    ForeignFileError,
    Reader,
    checksum,
    compact_json,
    is_hub_folder,
    shown,
    strict_json,
    write_file,
)
from leyden.checkpoint.folder import Folder, is_sharded
from leyden.checkpoint.plain import Encoder, storable
from leyden.checkpoint.remote import close_names, is_remote, local_path, modified, open_stream
from leyden.errors import CheckpointError, CheckpointNotFoundError, reject

__all__ = [
    "FORMAT_VERSION",
    "MIGRATIONS",
    "RANDOM_STATE_KEYS",
    "RUN_STATE_KEYS",
    "About",
    "decode",
    "encode",
    "flatten",
    "load_checkpoint",
    "read_about",
    "read_metadata",
    "seal",
    "write_file",
]

FORMAT_VERSION = "2"
RANDOM_STATE_KEYS = frozenset({"random_state", "rng"})
"""What stays on the CPU wherever a checkpoint is loaded to: torch takes random states from there only."""
RUN_STATE_KEYS = RANDOM_STATE_KEYS | {
    "optimizer_states", "lr_schedulers", "scaler", "callbacks", "loops", "progress", "metrics", "loader_states",
    "should_stop", "optimizer_windows", "loggers", "current_model_state", "left_out",
}  # fmt: skip
"""What ``load_checkpoint(…, weights_only=True)`` leaves in the file."""
_ENTRY = "leyden_checkpoint"
_CHECKED = ("leyden_format", "leyden_version", "leyden_about", _ENTRY, "leyden_checksums")
_CHECKED_1 = ("leyden_version", _ENTRY, "leyden_checksums")
_SHARDS = "leyden_shards"

Tree = dict[str, Any]


def _from_1(tree: Tree) -> Tree:
    """Version 2 added tags (sparse and quantized tensors) and ``leyden_about``; every tree of version 1 is one of 2."""
    return tree


MIGRATIONS: dict[str, Callable[[Tree], Tree]] = {"1": _from_1}
"""For each older version what makes of its tree one of the next version; applied one after the other when reading."""


@dataclasses.dataclass(frozen=True)
class About:
    """What a file says about its checkpoint in a few bytes; the defaults for what it does not say."""

    epoch: int = 0
    global_step: int = 0
    run_id: str | None = None
    """The training that wrote it; a resumed training keeps its name."""
    saved_at: float = 0.0
    """When it was taken, in seconds since 1970; when the file was written, if it does not say; 0.0 if nothing does."""
    resumable: bool = False
    """Whether it has the optimizers' states, so that training can go on from it."""


def encode(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a checkpoint into the tensors and the metadata of its file.

    What comes back from `decode` is equal, except that paths become strings, enum members their values, subclasses of
    ``str``, ``int``, ``float`` and ``dict`` the plain type (``Counter`` and module state dicts stay),
    parameters plain tensors, strided tensors contiguous. Tensors that are the same view of the same memory are one tensor
    in the file.

    Args:
        checkpoint: string keys; tensors on any device, and plain data.

    Returns:
        Contiguous CPU tensors by name (those that were such already are not copied), and the metadata.

    Raises:
        CheckpointError: something is neither a tensor nor plain data, or there is too much of the latter; names its key.
    """
    return seal(*flatten(checkpoint))


def flatten(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tree]:
    """Split a checkpoint into its tensors and a JSON tree, without copying, moving or reading a tensor's values.

    This and a copy of the tensors is all that training has to wait for; `seal` may run while it goes on.

    Returns:
        The tensors by their names in the file, as references: on any device, with any strides, lazily conjugated or
        negated ones included, all dense and each such that ``torch.empty(t.shape, dtype=t.dtype).copy_(t)`` copies it;
        and the tree, which shares nothing mutable with the checkpoint.

    Raises:
        CheckpointError: something is neither a tensor nor plain data; names its key.
    """
    encoder = Encoder()
    return encoder.tensors, _tree(encoder, checkpoint)


def flatten_sharded(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any], Tree]:
    """Split a checkpoint as `flatten` does, with the DTensors apart from the other tensors: names and references.

    Raises:
        CheckpointError: as `flatten`; or a DTensor is of a dtype that the file format lacks, or holds partial sums.
    """
    encoder = Encoder(sharded=True)
    tree = _tree(encoder, checkpoint)
    return encoder.tensors, encoder.shards, tree


def _tree(encoder: Encoder, checkpoint: Mapping[str, Any]) -> Tree:
    for key in checkpoint:
        if not isinstance(key, str):
            raise CheckpointError(f"A checkpoint's keys must be strings, got {key!r} ({type(key).__name__}).")
    return {key: encoder.encode(value, (key,)) for key, value in checkpoint.items()}


def seal(
    tensors: Mapping[str, Tensor], tree: Mapping[str, Any], saved_at: float | None = None, shards: str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Make of what `flatten` returned what `write_file` takes; this is where the checksums are computed.

    The checksums take one pass over the bytes, without the interpreter's lock.

    Args:
        tensors: those of `flatten`, or copies of them; contiguous ones on the CPU are not copied again.
        tree: that of `flatten`.
        saved_at: when the checkpoint was taken, in seconds since 1970 (`time.time`); now by default.
        shards: of a sharded checkpoint, what `leyden.checkpoint.folder.shards_json` made.

    Returns:
        Contiguous CPU tensors by name, and the metadata.

    Raises:
        CheckpointError: the plain data are larger than a safetensors header may be (100 MB); names the key that has most.
    """
    stored = {name: storable(tensor) for name, tensor in tensors.items()}
    about = _about(tree, time.time() if saved_at is None else saved_at)
    metadata = {
        "format": "pt",
        "leyden_format": FORMAT_VERSION,
        "leyden_version": _version(),
        "leyden_about": compact_json(dataclasses.asdict(about)),
        _ENTRY: compact_json(tree),
        "leyden_checksums": compact_json({name: checksum(tensor) for name, tensor in stored.items()}),
    }
    if shards is not None:
        metadata[_SHARDS] = shards
    metadata["leyden_checksum"] = _metadata_checksum(metadata, _checked(metadata))
    if (size := len(compact_json(metadata))) > container.MAX_HEADER_BYTES:
        raise CheckpointError(_too_much_plain_data(size, tree))
    return stored, metadata


def decode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Put together what `encode` split. Without leyden's metadata: ``{"state_dict": tensors}``.

    Raises:
        CheckpointError: another format version, a wrong checksum, a missing tensor, or a malformed tree.
    """
    return assemble(_Given(tensors, dict(metadata)), torch.device("cpu"), weights_only=False)


def load_checkpoint(
    path: str | os.PathLike[str],
    map_location: str | torch.device | None = "cpu",
    weights_only: bool = False,
) -> dict[str, Any]:
    """Read a checkpoint into the dict that was saved. Nothing in it is ever executed or imported.

    A sharded checkpoint, a folder, gives the same dict with whole tensors, in one process and without a group.

    Weights that leyden did not write, a safetensors file, a folder of them with an index, or what ``torch.save`` made of
    a state dict, give ``{"state_dict": its tensors}``; a checkpoint of Lightning gives what `leyden.compat.foreign` makes of it.
    Of leyden's own, only the parts that are asked for are read, one tensor at a time and in the order of the file, so the
    peak in memory is the result and one tensor.

    Args:
        path: the file, or its URL (``file://``, ``memory://``, ``s3://``…, whatever fsspec has a driver for); or the folder.
        map_location: the device of the tensors; None means the CPU. Random states
            (`RANDOM_STATE_KEYS`) stay on the CPU.
        weights_only: leave the run's state (`RUN_STATE_KEYS`) in the file, unread.

    Raises:
        CheckpointError: no such file, not a checkpoint, cut short, damaged, or of a newer format version; names the
            file and the reason.
    """
    try:
        device = torch.device("cpu" if map_location is None else map_location)
    except (RuntimeError, TypeError):
        reject("map_location", map_location, "a device, such as 'cpu' or 'cuda:0', or None for the CPU")
    try:
        with opened(path) as file:
            return assemble(file, device, weights_only)
    except ForeignFileError:
        from leyden.compat.foreign import load_foreign

        return load_foreign(path, device, weights_only)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a file's metadata only, whatever its size; empty for a plain safetensors file without any.

    Checks that the file has its full length and that the metadata is what was written; the tensors' checksums are
    checked by `load_checkpoint`. Of a folder, those of its main file; all files have to be there in full length.

    Args:
        path: the file, or its URL; or the folder of a sharded checkpoint.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    with opened(path) as file:
        if _is_ours(file.metadata):
            _check_metadata(file.metadata)
        return file.metadata


def read_about(path: str | os.PathLike[str]) -> About:
    """Read what a file says about its checkpoint, whatever its size, with the checks of `read_metadata`.

    A file of format version 1 says when it was written only by its time in the file system; a plain safetensors file
    says nothing else.

    Args:
        path: the file, or its URL.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    try:
        with opened(path) as file:
            metadata = file.metadata
            if not _is_ours(metadata):
                return About(saved_at=modified(path))
            tree, _ = _check_metadata(metadata)
            if "leyden_about" not in metadata:
                return _about(tree, modified(path))
            about = strict_json(metadata["leyden_about"])
            kinds = {"epoch": int, "global_step": int, "run_id": str | None, "saved_at": int | float, "resumable": bool}
            if not isinstance(about, dict) or not all(_is(about.get(key), kind) for key, kind in kinds.items()):
                raise CheckpointError("malformed leyden_about")
            return About(**{key: about[key] for key in kinds})
    except ForeignFileError:
        from leyden.compat.foreign import about_foreign

        return about_foreign(path)


def _about(tree: Mapping[str, Any], saved_at: float) -> About:
    def known(key: str, kind: Any, default: Any) -> Any:
        value = tree.get(key)  # hooks may have put anything there
        return value if _is(value, kind) else default

    return About(
        epoch=known("epoch", int, 0),
        global_step=known("global_step", int, 0),
        run_id=known("run_id", str, None),
        saved_at=saved_at,
        resumable="optimizer_states" in tree,
    )


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Reader | Folder]:
    """Open a checkpoint for as long as the block lasts; what is wrong with it is raised with its name in front."""
    local = None if is_remote(path) else local_path(path)
    sharded = local is not None and is_sharded(local)
    try:
        with contextlib.ExitStack() as held:
            if local is not None and sharded:
                yield Folder(local, held)
            elif local is not None and is_hub_folder(local):
                raise ForeignFileError("this is a folder of weights as model hubs have it. Here, a file is wanted")
            else:
                yield Reader(held.enter_context(open_stream(path)))
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"{path}: no such file.{close_names(path)}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise CheckpointError(f"{path}: its data is nested too deeply") from None
    except CheckpointError as error:
        kind = CheckpointError if sharded else type(error)  # a foreign file in it is damage
        raise kind(str(error) if str(error).startswith(f"{path}: ") else f"{path}: {error}") from None


def _too_much_plain_data(size: int, tree: Mapping[str, Any]) -> str:
    key = max(tree, key=lambda key: len(compact_json(tree[key])), default="")
    return (
        f"{key}: the checkpoint's plain data takes {size / 1e6:.0f} MB, and a safetensors header has room for "
        f"{container.MAX_HEADER_BYTES / 1e6:.0f} MB. Most of it is under {key!r}: store large lists as tensors."
    )


class _File(Protocol):
    """What a checkpoint is put together from: `Reader` and `Folder`."""

    metadata: dict[str, str]

    @property
    def entries(self) -> Mapping[str, Any]: ...
    def read(self, name: str) -> Tensor: ...


@dataclasses.dataclass
class _Given:
    """Tensors in memory, as a file."""

    entries: Mapping[str, Tensor]
    metadata: dict[str, str]

    def read(self, name: str) -> Tensor:
        return self.entries[name].contiguous()


def assemble(
    file: _File, device: torch.device, weights_only: bool, given: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Build the checkpoint from its tensors, which are read in the order of the file.

    Args:
        file: an open checkpoint.
        device: the place of its tensors, except random states.
        weights_only: leave the run's state unread.
        given: tensors that have been read already, by name.

    Raises:
        CheckpointError: damaged, malformed, or of another format version.
    """
    if not _is_ours(file.metadata):
        return {"state_dict": {name: file.read(name).to(device) for name in file.entries}}
    tree, checksums = contents(file.metadata, weights_only)
    places = {key: torch.device("cpu") if key in RANDOM_STATE_KEYS else device for key in tree}
    tensors = _Tensors(tree, places, given or {})
    for name in file.entries:
        tensors.load(name, file, checksums)
    return {key: from_plain.decode(node, functools.partial(tensors.fetch, places[key])) for key, node in tree.items()}


def contents(metadata: Mapping[str, str], weights_only: bool) -> tuple[Tree, dict[str, Any]]:
    """Return the tree, of weights only if asked, and the tensors' checksums; nothing for a file that is not ours.

    Raises:
        CheckpointError: damaged, malformed, or of another format version.
    """
    if not _is_ours(metadata):
        return {}, {}
    tree, checksums = _check_metadata(metadata)
    return {key: node for key, node in tree.items() if not (weights_only and key in RUN_STATE_KEYS)}, checksums


class _Tensors:
    """The tensors that a tree refers to, each read once and kept for as long as somebody still asks for it.

    Tied tensors stay tied. What becomes an array or a string of bytes is let go when that has been made.
    """

    def __init__(self, tree: Tree, places: Mapping[str, torch.device], given: Mapping[str, Tensor]) -> None:
        self._given = given
        self._uses: dict[str, collections.Counter[torch.device]] = {}
        self._loaded: dict[tuple[str, torch.device], Tensor] = {}
        for key, node in tree.items():
            for name, as_bytes in from_plain.tensor_names(node):
                place = torch.device("cpu") if as_bytes else places[key]
                self._uses.setdefault(name, collections.Counter())[place] += 1

    def load(self, name: str, file: _File, checksums: Mapping[str, Any]) -> None:
        places = self._uses.get(name)
        if not places or name in self._given:
            return
        tensor = file.read(name)
        if not (isinstance(file, Folder) and name in file.sharded):
            verify(name, tensor, checksums)
        for place in places:
            self._loaded[name, place] = tensor.to(place)

    def fetch(self, place: torch.device, name: str, as_bytes: bool = False) -> Tensor:
        if name in self._given and not as_bytes:
            return self._given[name]
        if as_bytes:
            place = torch.device("cpu")
        if (name, place) not in self._loaded:
            raise CheckpointError(f"the tensor {shown(name)} is missing")
        if not as_bytes:
            self._uses[name][place] -= 1
            return self._loaded[name, place] if self._uses[name][place] else self._loaded.pop((name, place))
        if self._uses[name].total() != 1:  # each would be a copy, and a small file could fill the memory
            raise CheckpointError(f"malformed: the bytes of the tensor {shown(name)} are used twice")
        return self._loaded.pop((name, place))


def verify(name: str, tensor: Tensor, checksums: Mapping[str, Any]) -> None:
    """Compare a tensor with the checksum that was written.

    Raises:
        CheckpointError: it is another.
    """
    if checksum(tensor) != checksums.get(name):
        raise CheckpointError(f"the tensor {shown(name)} is damaged: its checksum is not the one that was written")


def _is_ours(metadata: Mapping[str, str]) -> bool:
    return any(key.startswith("leyden_") for key in metadata)  # any: one may be damaged


def _check_metadata(metadata: Mapping[str, str]) -> tuple[Tree, dict[str, Any]]:
    """Return the tree, in today's layout, and the tensors' checksums, once the version and the checksum are right."""
    version = metadata.get("leyden_format", "")
    if version != FORMAT_VERSION and version not in MIGRATIONS:
        raise CheckpointError(
            f"it has format version {version[:20]!r} (written by leyden {metadata.get('leyden_version', '?')[:20]!r}), "
            f"and this leyden, {_version()}, reads versions {min([*MIGRATIONS, FORMAT_VERSION], key=int)} to "
            f"{FORMAT_VERSION}. A newer leyden may read it: pip install --upgrade leyden"
        )
    checked = _checked(metadata)
    for key in (*checked, "leyden_checksum"):
        if key not in metadata:
            raise CheckpointError(f"its metadata lack {key!r}")
    if metadata["leyden_checksum"] != _metadata_checksum(metadata, checked):
        raise CheckpointError("its metadata are damaged: their checksum is not the one that was written")
    tree, checksums = strict_json(metadata[_ENTRY]), strict_json(metadata["leyden_checksums"])
    if not isinstance(tree, dict) or not isinstance(checksums, dict):
        raise CheckpointError("its metadata do not hold a checkpoint")
    while version != FORMAT_VERSION:
        tree = MIGRATIONS[version](tree)
        version = str(int(version) + 1)
    return tree, checksums


def _checked(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The entries that ``leyden_checksum`` covers."""
    checked = _CHECKED_1 if metadata["leyden_format"] == "1" else _CHECKED
    return (*checked, _SHARDS) if _SHARDS in metadata else checked


def _metadata_checksum(metadata: Mapping[str, str], keys: Iterable[str]) -> str:
    text = "\n".join(metadata[key] for key in keys)
    return f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}"


@functools.cache
def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("leyden")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
