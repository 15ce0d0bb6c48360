"""Files of ``torch.save``, read without running or importing anything that they name.

A pickle is a program: it names functions and classes, and calls them. Here every name is looked up in a table, of tensors,
numbers, containers and a few more, and what is in the table is inert: it checks its arguments and notes them. Nothing is
imported for a name, and a name that is not in the table ends in a `CheckpointError` that says which one. Tensors stay in the
file until they are asked for, so that reading weights leaves the rest of a training's state on the disk.

`torch.load(weights_only=True)` has the same aim, and it does not do for what people have: it knows protocol 2 only, sets
items of no subclass of dict (Lightning's hyperparameters are one), refuses NumPy's numbers, allows whatever any library has
added to one list of the process, and takes memory for a tensor of any size that a file claims.

Both layouts are read: the zip archive (torch 1.6 and later), and the pickles one after the other of before.
"""

from __future__ import annotations

import argparse
import collections
import io
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from leyden.checkpoint.container import fill, raw_bytes
from leyden.compat.inert import (
    Deferred,
    DType,
    Namespace,
    Sealed,
    StandIn,
    Storage,
    StorageType,
    array_of,
    known,
    stand_in,
)
from leyden.compat.scan import said, scan
from leyden.errors import CheckpointError
from leyden.hparams import AttributeDict

__all__ = ["Pickled", "write"]

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the layout before the zip archive
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # protocol 2 writes the names of then
_PYTHON_2_BUILTINS = {"long": "int", "unicode": "str", "xrange": "range"}
_ATTACKS = frozenset({
    "code", "codecs", "commands", "ctypes", "importlib", "marshal", "multiprocessing", "nt", "operator", "os", "pickle", "pip",
    "posix", "pty", "runpy", "shutil", "socket", "subprocess", "sys", "webbrowser",
})  # fmt: skip
_ATTACKING_BUILTINS = frozenset({
    "__import__", "apply", "breakpoint", "compile", "delattr", "eval", "exec", "execfile", "filter", "getattr", "globals",
    "input", "locals", "map", "open", "setattr", "vars",
})  # fmt: skip
"""Where the names are that no training writes and every attack does."""
_MAX_UNKNOWN, _MAX_STAND_INS = 100, 10_000  # names; a training writes some dozens


@dataclass(frozen=True)
class _Place:
    """Where a storage is in its file, in bytes; ``crc`` is 0 where the writer noted none."""

    offset: int
    size: int
    crc: int = 0


class Pickled:
    """An unpickled file whose tensors are still in it.

    Args:
        stream: open for reading bytes, buffered and able to seek, for as long as `load` is called.
        allow: classes and functions that the file may name beside the table; a pair of one and a full name, such as
            ``(Stub, "project.config.Config")``, lets one stand for another. They are run. What was given to
            `torch.serialization.add_safe_globals` counts as well.

    Attributes:
        tree: what was saved, with placeholders in it: give it, or a part of it, to `load`.

    Raises:
        CheckpointError: damaged, not such a file, or it names what is not allowed; the reason, without the file's name.
    """

    def __init__(self, stream: BinaryIO, allow: Iterable[Any] = ()) -> None:
        self._stream = stream
        self._allowed = _by_name([*torch.serialization.get_safe_globals(), *allow])
        self._stand_ins: dict[str, Any] = {}
        self._unknown: dict[str, None] = {}
        self._legacy: dict[str, Storage] = {}  # by key, until their places are known
        self._places: dict[str, _Place] = {}
        self._storages: dict[str, Tensor] = {}
        self._tensors: dict[tuple[Any, ...], Tensor] = {}
        self._swapped = False
        self._stream.seek(0)
        with_zip = self._stream.read(2) == b"PK"
        self._stream.seek(0)
        try:
            self.tree: Any = self._read_zip() if with_zip else self._read_legacy()
        except CheckpointError:
            self._refuse_unknown()
            raise
        except (MemoryError, RecursionError) as error:
            raise CheckpointError(f"damaged, or made to do harm: reading it ends in a {type(error).__name__}") from None
        self._refuse_unknown()

    def load(self, part: Any, device: torch.device | None = None) -> Any:
        """Return a part of `tree` as plain data and tensors of its own.

        Dicts, lists and tuples are plain ones, except ordered dicts; `argparse.Namespace` stays one; a dict with attributes
        is a `leyden.hparams.AttributeDict`; enum members and classes of Lightning are their values and names; parameters are
        plain tensors. Tensors that were the same view of the same memory are one.

        Args:
            part: `tree`, or anything in it.
            device: of the tensors; by default the CPU.

        Raises:
            CheckpointError: damaged, or it holds what cannot be made plain.
        """
        try:
            return _Loading(self, device or torch.device("cpu")).value(part)
        except RecursionError:
            raise CheckpointError("its data is nested too deeply") from None
        except MemoryError:
            raise CheckpointError("damaged, made to do harm, or larger than the memory that is left") from None
        except (TypeError, ValueError, IndexError, RuntimeError, OverflowError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"damaged, or made to do harm: {type(error).__name__}: {error!s:.200}") from error

    def tensor(self, storage: Storage, offset: int, size: Any, stride: Any, dtype: torch.dtype | None) -> Tensor:
        """Return one tensor, with its bounds checked, before memory is taken, against what the file holds."""
        dtype = dtype or storage.dtype
        wrong = f"malformed: a tensor of size {said(size)} and stride {said(stride)}"
        if not isinstance(size, (list, tuple)) or not isinstance(
            stride, (list, tuple)
        ):  # a range would fill the memory
            raise CheckpointError(wrong)
        size, stride = tuple(size), tuple(stride)
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or not all(type(each) is int and 0 <= each < 2**63 for each in numbers):
            raise CheckpointError(wrong)
        key = (storage.key, storage.start, offset, size, stride, dtype)
        if key not in self._tensors:
            memory = self._memory(storage)
            last = 0 if 0 in size else offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
            begin = storage.start * storage.dtype.itemsize
            if begin + last * dtype.itemsize > memory.numel():
                raise CheckpointError("damaged: a tensor is larger than its data")
            offset = 0 if 0 in size else offset + begin // dtype.itemsize
            self._tensors[key] = torch.empty(0, dtype=dtype).set_(memory.untyped_storage(), offset, size, stride)
        return self._tensors[key]

    # The two layouts

    def _read_zip(self) -> Any:
        try:
            entries = zipfile.ZipFile(self._stream).infolist()
        except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError) as error:
            raise CheckpointError(f"the file is cut short or damaged: {error}") from None
        self._stream.seek(0, 2)
        if sum(entry.file_size for entry in entries) > self._stream.tell() or any(
            entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries
        ):
            raise CheckpointError(
                "not a file of torch.save: its parts are compressed, encrypted or overlap, which torch never writes"
            )
        names = {entry.filename.partition("/")[2]: entry for entry in entries}
        if "constants.pkl" in names:
            raise CheckpointError(
                "this is a TorchScript archive, a program. Its weights: torch.jit.load(path).state_dict()"
            )
        if "data.pkl" not in names:
            raise CheckpointError("not a file of torch.save: there is no data.pkl in the archive")
        for name, entry in names.items():
            if name.startswith("data/"):
                self._places[name.removeprefix("data/")] = self._place(entry)
        if "byteorder" in names:
            self._swapped = self._bytes(self._place(names["byteorder"])) != sys.byteorder.encode()
        data = self._bytes(self._place(names["data.pkl"]))
        scan(io.BytesIO(data))
        return self._unpickle(data)

    def _place(self, entry: zipfile.ZipInfo) -> _Place:
        self._stream.seek(entry.header_offset)
        header = self._stream.read(30)
        if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
            raise CheckpointError("the file is damaged: a part of it is not where its directory says")
        name, extra = struct.unpack("<HH", header[26:30])
        return _Place(entry.header_offset + 30 + name + extra, entry.file_size, entry.CRC)

    def _read_legacy(self) -> Any:
        for mark in (_MAGIC, _PROTOCOL):
            if self._next_pickle() != mark:
                raise CheckpointError("this is a pickle, but not one of torch.save")
        system = self._next_pickle()
        self._swapped = isinstance(system, dict) and system.get("little_endian") is (sys.byteorder != "little")
        tree, keys = self._next_pickle(), self._next_pickle()
        position = self._stream.tell()
        end = self._stream.seek(0, 2)
        for key in keys if isinstance(keys, list) else ():
            self._stream.seek(position)
            count = int.from_bytes(self._stream.read(8), "little")
            size = count * self._legacy[key].dtype.itemsize if key in self._legacy else -1
            if not 0 <= size <= end - position - 8:
                raise CheckpointError("the file is cut short or damaged: data of a tensor is missing")
            self._places[key] = _Place(position + 8, size)
            position += 8 + size
        return tree

    def _next_pickle(self) -> Any:
        start = self._stream.tell()
        scan(self._stream)
        end = self._stream.tell()
        self._stream.seek(start)
        return self._unpickle(self._stream.read(end - start))

    def _bytes(self, place: _Place) -> bytes:
        return bytes(raw_bytes(self._block(place)))

    def _block(self, place: _Place) -> Tensor:
        block = torch.empty(place.size, dtype=torch.uint8)
        self._stream.seek(place.offset)
        fill(self._stream, raw_bytes(block))
        if place.crc and zlib.crc32(raw_bytes(block)) != place.crc:
            raise CheckpointError("the file is damaged: the checksum of a part of it is not the one that was written")
        return block

    def _memory(self, storage: Storage) -> Tensor:
        """The bytes of a storage, read once."""
        place = self._places.get(storage.key)
        if place is None or storage.numel < 0 or (storage.start + storage.numel) * storage.dtype.itemsize > place.size:
            raise CheckpointError("the file is cut short or damaged: data of a tensor is missing")
        if storage.key not in self._storages:
            block = self._block(place)
            if self._swapped:
                block.untyped_storage().byteswap(storage.dtype)  # type: ignore[no-untyped-call]
            self._storages[storage.key] = block
        return self._storages[storage.key]

    # Unpickling

    def _unpickle(self, data: bytes) -> Any:
        import pickle

        find, stored = self._find, self._stored

        class Restricted(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> Any:
                return find(module, name)

            def persistent_load(self, pid: Any) -> Any:
                return stored(pid)

        try:
            return Restricted(io.BytesIO(data), encoding="utf-8").load()
        except (CheckpointError, MemoryError, RecursionError):
            raise
        except Exception as error:  # a malformed pickle ends in any; it is named in ours
            raise CheckpointError(f"damaged, or made to do harm: {type(error).__name__}: {error!s:.200}") from error

    def _find(self, module: str, name: str) -> Any:
        if module == "__builtin__":
            name = _PYTHON_2_BUILTINS.get(name, name)
        module = _PYTHON_2.get(module, module)
        full = f"{module}.{name}"
        if full in self._allowed:
            return self._allowed[full]
        found = known(module, name)
        if found is not None:
            return found
        if full not in self._stand_ins:
            if len(self._stand_ins) == _MAX_STAND_INS:
                raise CheckpointError(f"made to do harm: it names more than {_MAX_STAND_INS:,} classes")
            made = self._stand_ins[full] = stand_in(full)
            if not made.tolerated:
                self._unknown[full] = None
                if len(self._unknown) > _MAX_UNKNOWN:
                    self._refuse_unknown()
        return self._stand_ins[full]

    def _stored(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise CheckpointError(f"malformed: a reference to {said(pid)}")
        _, kind, key, _, numel, *view = pid
        if not isinstance(kind, StorageType) or not isinstance(key, str) or type(numel) is not int:
            raise CheckpointError(f"malformed: a reference to {said(pid)}")
        self._legacy.setdefault(key, Storage(key, kind.dtype, 0, numel))
        if view and view[0] is not None:  # a storage that is a part of another
            if not isinstance(view[0], tuple) or len(view[0]) != 3:
                raise CheckpointError(f"malformed: a reference to a part of a storage, {said(view[0])}")
            _, start, numel = view[0]
            if not all(type(number) is int and number >= 0 for number in (start, numel)):
                raise CheckpointError(f"malformed: a reference to {said(pid)}")
            return Storage(key, kind.dtype, start, numel)
        return Storage(key, kind.dtype, 0, numel)

    def _refuse_unknown(self) -> None:
        if not self._unknown:
            return
        unknown = [full[:200] for full in self._unknown]
        names = ", ".join(unknown[:20])
        if attacks := [full for full in unknown if _is_attack(*full.split(".", 1))]:
            raise CheckpointError(
                f"it names {', '.join(attacks[:20])}, which no checkpoint needs and harmful files use to run code. Nothing of it "
                "was run. Do not load it with torch.load(weights_only=False) or pickle either"
            )
        classes = ", ".join(full.rpartition(".")[2] for full in unknown[:20])
        raise CheckpointError(
            f"it names {names}, which leyden does not know to be harmless, so nothing of it was run. If you trust the file: "
            f"import what it names and load it within «with torch.serialization.safe_globals([{classes}]):». If a class "
            "is gone, a pair lets another stand for it: (Stub, 'its.full.Name')"
        )


class _Loading:
    """One walk from placeholders to plain data; what was one object stays one."""

    def __init__(self, file: Pickled, device: torch.device) -> None:
        self._file = file
        self._device = device
        self._done: dict[int, Any] = {}
        self._open: set[int] = set()

    def value(self, given: Any) -> Any:
        if given is None or type(given) in (bool, int, float, str, bytes, complex):
            return given
        if id(given) in self._open:
            raise CheckpointError("malformed: a part of it contains itself")
        if id(given) not in self._done:
            self._open.add(id(given))
            self._done[id(given)] = self._made(given)
            self._open.remove(id(given))
        return self._done[id(given)]

    def _made(self, given: Any) -> Any:
        if isinstance(given, dict):
            return self._mapping(given)
        if isinstance(given, (list, tuple, set, frozenset)) and not isinstance(given, torch.Size):
            parts = map(self.value, given)
            return next(kind(parts) for kind in (list, tuple, set, frozenset) if isinstance(given, kind))
        if isinstance(given, collections.deque):
            return collections.deque(map(self.value, given), given.maxlen)
        if isinstance(given, Deferred):
            return self._tensor(given).to(self._device)
        if isinstance(given, DType):
            return given.name
        if (array := array_of(given)) is not None:
            return array
        if isinstance(given, Namespace):
            state = self.value(given.state)
            if not all(isinstance(name, str) for name in state):
                raise CheckpointError("malformed: a Namespace with attributes whose names are no strings")
            return argparse.Namespace(**state)
        if isinstance(given, StandIn) or (isinstance(given, type) and issubclass(given, StandIn)):
            return self._stand_in(given)
        if isinstance(given, Sealed):
            raise CheckpointError(f"malformed, or a bare storage, which is no tensor: a {type(given).__name__}")
        if hasattr(given, "__dict__") and not isinstance(given, type):  # of a class that the user allowed
            vars(given).update({name: self.value(each) for name, each in vars(given).items()})
        return given

    def _mapping(self, given: dict[Any, Any]) -> dict[Any, Any]:
        pairs = {self.value(key): self.value(each) for key, each in dict.items(given)}
        if isinstance(given, collections.OrderedDict):
            ordered = collections.OrderedDict(pairs)
            metadata = vars(given).get("_metadata")
            if isinstance(metadata, dict):  # the versions of modules, for load_state_dict
                ordered._metadata = self.value(metadata)  # type: ignore[attr-defined]
            return ordered
        if isinstance(given, collections.Counter):
            return collections.Counter(pairs)
        return pairs if type(given) is dict else AttributeDict(pairs)

    def _tensor(self, given: Any) -> Tensor:
        if not isinstance(given, Deferred):
            raise CheckpointError(f"malformed: a {type(given).__name__} where a tensor should be")
        return given.make(self._file, self._tensor)

    def _stand_in(self, given: Any) -> Any:
        """What an inert object means: a class its name, an enum member its value, a configuration of OmegaConf its content."""
        if isinstance(given, type):
            return given.__name__
        state = given.state if isinstance(given.state, dict) else {}
        if "_content" in state:
            return self.value(state["_content"])
        if "_val" in state:
            return self.value(state["_val"])
        if len(given.args) == 1 and isinstance(given.args[0], (str, int)):
            return given.args[0]
        raise CheckpointError(
            f"it holds an object of {given.full}, of which leyden knows no plain form. Save without it"
        )


def write(stream: BinaryIO, value: Mapping[str, Any]) -> None:
    """Write plain data and tensors as ``torch.save`` does; what this writes, `Pickled` reads."""
    torch.save(value, stream)


def _is_attack(package: str, name: str) -> bool:
    return package in _ATTACKS or (package == "builtins" and name in _ATTACKING_BUILTINS)


def _by_name(allow: Iterable[Any]) -> dict[str, Any]:
    allowed = {}
    for each in allow:
        made, name = each if isinstance(each, tuple) else (each, f"{each.__module__}.{each.__qualname__}")
        allowed[name] = made
    return allowed
