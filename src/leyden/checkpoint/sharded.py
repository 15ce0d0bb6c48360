"""Writing and reading sharded checkpoints through torch.distributed.checkpoint (DCP), without pickles in any file.

DCP plans who writes and who reads which part of a DTensor, drops copies that several ranks have, and reshards when a
checkpoint is read by other ranks than wrote it. Its own storage layers pickle what belongs to the whole, or
(``HuggingFaceStorageWriter``) have no checksums, no notion of a missing file, and nothing beside the tensors; so `_Writer` and
`_Reader` are ours, on its public interfaces. What they write is described in `leyden.checkpoint.folder`.

Every function here is a collective of the group it is given, and imports torch.distributed.checkpoint: import this module
where it is used.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.optim import Optimizer

from leyden.checkpoint.atomic import commit_folder, draft_folder, refusing
from leyden.checkpoint.container import NATIVE_DTYPES, Reader, write_file
from leyden.checkpoint.folder import Chunk, Folder, chunk_metadata, shard_name, shards_json
from leyden.checkpoint.format import assemble, contents, flatten_sharded, load_checkpoint, opened, seal, verify
from leyden.checkpoint.from_plain import tensor_names
from leyden.checkpoint.plain import storable, tensor_name
from leyden.checkpoint.remote import PathLike, is_remote, local_path
from leyden.checkpoint.snapshot import Buffers
from leyden.errors import CheckpointError

Group = dist.ProcessGroup | None
Templates = Callable[[str, torch.Size], Tensor | None] | Mapping[str, Tensor]
"""Says for the name and the shape of a tensor how it shall be sharded: as that DTensor; whole if there is none."""


@dataclass(frozen=True)
class Parts:
    """A checkpoint taken apart on one rank: what `write_parts` writes."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """The tensors that are whole; those of rank 0 are written."""
    shards: Mapping[str, DTensor] = field(default_factory=dict)
    """The DTensors: shapes and placements."""
    local: Mapping[str, Tensor] = field(default_factory=dict)
    """This rank's part of each of them."""
    tree: Mapping[str, Any] = field(default_factory=dict)
    saved_at: float = 0.0
    problem: str = ""
    """Why this rank could not take it apart. All ranks raise it together, in `write_parts`."""

    def copied(self, buffers: Buffers, is_writer: bool) -> Parts:
        """Return the same with copies of its tensors in host memory, so that training may go on.

        Args:
            buffers: whose memory is used; the next copy overwrites it.
            is_writer: whether this is rank 0 of the group, which writes the whole tensors; others do not copy them.
        """
        whole = dict(self.tensors) if is_writer else {}
        copies = buffers.copy({**whole, **self.local})
        return replace(
            self, tensors={name: copies[name] for name in whole}, local={name: copies[name] for name in self.local}
        )


def split(checkpoint: Mapping[str, Any]) -> Parts:
    """Take a checkpoint apart, without copying anything. Never raises a CheckpointError: see `Parts.problem`."""
    try:
        tensors, shards, tree = flatten_sharded(checkpoint)
    except CheckpointError as error:
        return Parts(problem=str(error))
    local = {name: part for name, shard in shards.items() if (part := shard.to_local()).numel()}
    return Parts(tensors, shards, local, tree, time.time())


def save_sharded(path: PathLike, checkpoint: Mapping[str, Any], group: Group = None) -> None:
    """Write a checkpoint into the folder ``path``, all ranks together; returns when it is on the disk, whole.

    Each rank writes its part of the DTensors. Rank 0 writes what is not sharded: its tensors and plain data count, those of
    other ranks are not looked at. The folder is made beside ``path`` and renamed when all is synced; a checkpoint
    of that name is replaced then, and stays as it was if anything fails.

    Args:
        path: on a disk that all ranks see.
        checkpoint: as for `leyden.checkpoint.write_checkpoint`, and with DTensors; the same DTensors on all ranks.
        group: the ranks; by default all. Every rank of it calls this. Without a process group, one process alone.

    Raises:
        CheckpointError: on every rank, if one of them failed: it names that rank and the reason.
    """
    write_parts(path, split(checkpoint), group)


def write_parts(path: PathLike, parts: Parts, group: Group = None) -> None:
    """Write what `split` took apart, as `save_sharded`. It may run in a thread, with a group that nothing else uses.

    Raises:
        CheckpointError: as `save_sharded`.
    """
    if is_remote(path):
        raise CheckpointError(
            f"{path}: sharded checkpoints are written to local or shared disks only, for now. Give a path on a disk that all "
            "ranks see, and copy the folder afterwards."
        )
    target = local_path(path)
    with contextlib.ExitStack() as held:
        draft: tuple[Path, BinaryIO] | None = None
        problem = parts.problem
        if _rank(group) == 0 and not problem:
            try:
                draft = draft_folder(target, held)
            except CheckpointError as error:
                problem = str(error)
        notes = _agree(path, "written", group, problem, (_signature(parts), draft[0].name if draft else ""))
        signatures, name = [signature for signature, _ in notes], notes[0][1]
        if len(set(signatures)) > 1:
            odd = next(rank for rank, signature in enumerate(signatures) if signature != signatures[0])
            raise CheckpointError(f"{path}: cannot be written: rank {odd} has other sharded tensors than rank 0")
        writer = _Writer(target, target.with_name(name), parts, draft[1] if draft else None, _rank(group), _size(group))
        if not _is_distributed():
            writer.finish(Metadata({}), [writer.write([])])
            return
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with _together(path, "written", group):
            save(dict(parts.shards), storage_writer=writer, planner=planner, process_group=group)


def load_sharded(
    path: PathLike, templates: Templates | None = None, group: Group = None, weights_only: bool = False
) -> dict[str, Any]:
    """Read a checkpoint, a folder or a file, into the dict that was saved, of which each rank may read a part.

    Args:
        path: the same on all ranks. A URL of one file is read, too.
        templates: the DTensors, by the names that tensors have in the checkpoint, after which a tensor of that shape is
            sharded; see `templates_for`. All others are whole, on the CPU.
        group: the ranks; by default all. Every rank of it calls this. Without templates no group is needed.
        weights_only: leave the run's state unread.

    Raises:
        CheckpointError: on every rank, if one of them failed; see `leyden.load_checkpoint`.
    """
    if templates is None or not _is_distributed():
        return load_checkpoint(path, weights_only=weights_only)
    with contextlib.ExitStack() as held:
        wanted: dict[str, DTensor] = {}
        reader: _Reader | None = None
        problem = ""
        try:
            file = held.enter_context(opened(path))
            tree, checksums = contents(file.metadata, weights_only)
            wanted = _wanted(file, tree, templates)
            reader = _Reader(file, wanted, checksums)
        except CheckpointError as error:
            problem = str(error)
        _agree(path, "read", group, problem)
        assert reader is not None
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with _together(path, "read", group):
            load(wanted, storage_reader=reader, planner=planner, process_group=group)
        checkpoint: dict[str, Any] = {}
        try:
            checkpoint = assemble(file, torch.device("cpu"), weights_only, wanted)
        except CheckpointError as error:
            problem = str(error)
        _agree(path, "read", group, problem)
    return checkpoint


def templates_for(
    module: nn.Module, optimizers: Iterable[Optimizer] = ()
) -> Callable[[str, torch.Size], Tensor | None]:
    """Return the templates of a run: its weights, and the optimizers' state and gradients, sharded as the weights are.

    What has the shape of its parameter is sharded like it; a number such as ``step`` stays one. On the meta device
    the parameters say how, and their mesh where.

    Args:
        module: whose ``state_dict()`` has the DTensors.
        optimizers: in the order in which the checkpoint has them.
    """
    weights = {tensor_name(("state_dict", name)): tensor for name, tensor in module.state_dict().items()}
    parameters = [[each for group in one.param_groups for each in group["params"]] for one in optimizers]
    pattern = re.compile(r"(?:optimizer\.(\d+)\.state|optimizer_windows\.(\d+)\.gradients)\.(\d+)(?:\..+)?")

    def find(name: str, shape: torch.Size) -> Tensor | None:
        tensor = weights.get(name)
        match = pattern.fullmatch(name)
        if tensor is None and match is not None:
            i, j = int(match[1] or match[2]), int(match[3])
            tensor = parameters[i][j] if i < len(parameters) and j < len(parameters[i]) else None
        return tensor

    return find


class _Writer(StorageWriter):
    """Writes a rank's chunks into one file, and as rank 0 at the end the main file, which makes the folder a checkpoint."""

    def __init__(
        self, target: Path, folder: Path, parts: Parts, main: BinaryIO | None, rank: int, world_size: int
    ) -> None:
        self._target, self._folder, self._parts, self._main = target, folder, parts, main
        self._file = shard_name(rank, world_size)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: one object writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: the folder is there."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """DCP never chooses this class by itself."""
        return False

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leave out empty chunks, which ranks have when there are fewer rows than ranks."""
        return replace(plan, items=[item for item in plan.items if 0 not in _chunk(item).sizes])

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As planned."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file."""
        result: Future[list[WriteResult]] = Future()
        result.set_result(self.write([(item.index.fqn, tuple(_chunk(item).offsets)) for item in plan.items]))
        return result

    def write(self, places: Sequence[tuple[str, tuple[int, ...]]]) -> list[WriteResult]:
        """Write the chunks, given as names and offsets; return name, size and checksum of the file."""
        if not places:
            return []
        chunks: dict[str, tuple[str, tuple[int, ...], Tensor]] = {}
        for name, offsets in places:
            assert name not in chunks  # a DTensor has one local tensor
            chunks[name] = name, offsets, storable(self._parts.local[name])
        metadata, checksum = chunk_metadata(chunks)
        with refusing(self._target / self._file, "cannot be written"):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            with os.fdopen(os.open(self._folder / self._file, flags, 0o666), "wb") as stream:
                write_file(stream, {key: chunk for key, (_, _, chunk) in chunks.items()}, metadata)
                stream.flush()
                os.fsync(stream.fileno())
                size = stream.tell()
        return [WriteResult(MetadataIndex(self._file), size, (self._file, size, checksum))]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the main file and give the folder its name; DCP calls this on rank 0, when all ranks have written."""
        assert self._main is not None
        files = [each.storage_data for result in results for each in result]
        for name, size, _ in files:
            with refusing(self._target, "cannot be written"):
                found = (self._folder / name).stat().st_size if (self._folder / name).exists() else None
            if found != size:
                raise CheckpointError(
                    f"{self._target}: cannot be written: {name} did not arrive ({found} of {size} bytes). Is the folder on a "
                    "disk that all ranks see?"
                )
        parts = self._parts
        shards = shards_json(files, {name: (shard.dtype, shard.shape) for name, shard in parts.shards.items()})
        tensors, entries = seal(parts.tensors, parts.tree, parts.saved_at, shards)
        with refusing(self._target, "cannot be written"):
            write_file(self._main, tensors, entries)
        commit_folder(self._folder, self._main, self._target)


class _Reader(StorageReader):
    """Reads the chunks that the plan names, from a folder, or whole tensors from a file of one process."""

    def __init__(self, file: Reader | Folder, wanted: Mapping[str, DTensor], checksums: Mapping[str, Any]) -> None:
        self._file, self._checksums = file, checksums
        self._chunks: dict[tuple[str, tuple[int, ...]], Chunk] = {}
        tensors: dict[str, Any] = {}
        for name in wanted:
            entry = file.entries[name]
            assert entry.dtype is not None
            found = file.chunks(name) if isinstance(file, Folder) and name in file.sharded else []
            places = [(chunk.offsets, chunk.shape) for chunk in found] or [((0,) * len(entry.shape), entry.shape)]
            self._chunks.update({(name, chunk.offsets): chunk for chunk in found})
            tensors[name] = TensorStorageMetadata(
                TensorProperties(dtype=entry.dtype),
                torch.Size(entry.shape),
                [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in places],
            )
        self._metadata = Metadata(tensors)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: one object reads one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what is in the checkpoint, which has been read."""
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: the files are open."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """DCP never chooses this class by itself."""
        return False

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As planned."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read, verify and hand over each part."""
        for item in plan.items:
            if 0 not in item.lengths:
                self._read(item, planner)
        result: Future[None] = Future()
        result.set_result(None)
        return result

    def _read(self, item: ReadItem, planner: LoadPlanner) -> None:
        name, offset = item.storage_index.fqn, item.storage_index.offset
        assert offset is not None
        target = planner.resolve_tensor(item).detach()
        chunk = self._chunks.get((name, tuple(offset)))
        if chunk is not None:
            assert isinstance(self._file, Folder)
            self._file.read_part(name, chunk, item.storage_offsets, target)
        else:  # whole for a moment: its checksum is one for all of it
            part = self._file.read(name)
            verify(name, part, self._checksums)
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dim, start, length)
            target.copy_(part)
        planner.commit_tensor(item, target)


def _wanted(file: Reader | Folder, tree: Any, templates: Templates) -> dict[str, DTensor]:
    """Make the DTensors to be filled, without values, after the templates, with the dtypes of the checkpoint."""
    uses = Counter(name for name, _ in tensor_names(tree))
    wanted: dict[str, Any] = {}
    for name, count in Counter(_as_they_are(tree)).items():
        if count != uses[name]:
            continue
        entry = file.entries.get(name)
        if entry is None or entry.dtype not in NATIVE_DTYPES:
            continue
        shape = torch.Size(entry.shape)
        template = templates.get(name) if isinstance(templates, Mapping) else templates(name, shape)
        if not isinstance(template, DTensor) or template.shape != shape:
            continue
        device = template.device_mesh.device_type if template.is_meta else template.device
        wanted[name] = torch.empty_like(template, dtype=entry.dtype, device=device, requires_grad=False).detach()
    return wanted


def _as_they_are(node: Any) -> Iterator[str]:
    """Yield the names of the tensors that stand for themselves, not for a part or the bytes of something else."""
    if isinstance(node, dict):
        if isinstance(node.get("$tensor"), str):
            yield node["$tensor"]
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _as_they_are(item)


def _chunk(item: Any) -> ChunkStorageMetadata:
    assert item.tensor_data is not None
    chunk: ChunkStorageMetadata = item.tensor_data.chunk
    return chunk


def _signature(parts: Parts) -> int:
    """What must be the same on all ranks."""
    text = repr([(name, tuple(shard.shape), shard.dtype) for name, shard in parts.shards.items()])
    return zlib.crc32(text.encode("utf-8", "backslashreplace"))


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank(group: Group) -> int:
    return dist.get_rank(group) if _is_distributed() else 0


def _size(group: Group) -> int:
    return dist.get_world_size(group) if _is_distributed() else 1


def _agree(path: PathLike, what: str, group: Group, problem: str, note: Any = None) -> list[Any]:
    """Raise on every rank what went wrong on one; else return the notes of all ranks."""
    if not _is_distributed():
        if problem:
            raise CheckpointError(problem if str(path) in problem else f"{path}: cannot be {what}: {problem}")
        return [note]
    notes: list[Any] = [None] * _size(group)
    with _together(path, what, group):
        dist.all_gather_object(notes, (problem, note), group=group)
    _raise_first({rank: each for rank, (each, _) in enumerate(notes) if each}, path, what)
    return [each for _, each in notes]


@contextlib.contextmanager
def _together(path: PathLike, what: str, group: Group) -> Iterator[None]:
    """Turn what DCP raises on every rank, when one has failed, into a CheckpointError that names that rank."""
    try:
        yield
    except CheckpointException as error:
        failures = {rank: failure for rank, (failure, _) in error.failures.items()}
        own = failures.get(_rank(group))
        if isinstance(own, KeyboardInterrupt | SystemExit):
            raise own from None
        told = {
            rank: str(each) if isinstance(each, CheckpointError) else f"{type(each).__name__}: {each}"
            for rank, each in failures.items()
        }
        _raise_first(told, path, what)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: cannot be {what}: the ranks have lost touch: {error}") from error


def _raise_first(problems: Mapping[int, str], path: PathLike, what: str) -> None:
    """Raise the problems of ranks, if there are any."""
    if problems:
        first = min(problems)
        others = f" (and {len(problems) - 1} other ranks)" if len(problems) > 1 else ""
        reason = problems[first].removeprefix(f"{path}: ").removeprefix(f"cannot be {what}: ")
        raise CheckpointError(f"{path}: cannot be {what}: rank {first}{others}: {reason}") from None
