"""Pickles that would do harm are refused, and nothing that they name is run, imported or made."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import os
import pathlib
import pickle
import random
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from leyden.checkpoint import load_checkpoint
from leyden.checkpoint.format import read_about
from leyden.compat.foreign import read
from leyden.compat.pickles import Pickled
from leyden.errors import CheckpointError


class Calls:
    """Pickles as a call of a function with arguments."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


_audited: list[tuple[str, Any]] | None = None
_STARTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.",
    "shutil.",
    "urllib.",
    "ctypes.dlopen",
)


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _audited is None:
        return
    if event in ("import", "exec", "compile", "os.remove", "os.rename", "os.mkdir") or event.startswith(_STARTS):
        _audited.append((event, args[:1]))
    elif event == "open" and any(letter in str(args[1]) for letter in "wax+"):
        _audited.append((event, args[:2]))


sys.addaudithook(_audit)  # cannot be taken away again; it notes only within `audited`


@contextmanager
def audited() -> Iterator[list[tuple[str, Any]]]:
    """Every import, compilation, process, connection and file for writing in the block."""
    global _audited
    events: list[tuple[str, Any]] = []
    _audited = events
    try:
        yield events
    finally:
        _audited = None


def packed(value: Any, legacy: bool = False, protocol: int = 2) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    return stream.getvalue()


def with_pickle(raw: bytes) -> bytes:
    """An archive of torch.save with another pickle in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(packed({"a": torch.ones(2)}))) as good, zipfile.ZipFile(stream, "w") as made:
        for entry in good.infolist():
            made.writestr(entry.filename, raw if entry.filename.endswith("data.pkl") else good.read(entry))
    return stream.getvalue()


def checkpoint(value: Any) -> dict[str, Any]:
    """A checkpoint as of Lightning, with something under hyper_parameters."""
    return {"state_dict": {"w": torch.ones(2)}, "global_step": 3, "epoch": 1, "hyper_parameters": {"x": value}}


ATTACKS: dict[str, tuple[Any, str]] = {
    "os.system": (Calls(os.system, "touch pwned"), r"(posix|nt)\.system"),
    "eval": (Calls(eval, "__import__('os').system('touch pwned')"), r"builtins\.eval"),
    "exec": (Calls(exec, "open('pwned', 'w')"), r"builtins\.exec"),
    "open": (Calls(open, "pwned", "w"), r"io\.open|_io\.open"),
    "import": (Calls(__import__, "antigravity"), r"builtins\.__import__"),
    "getattr": (Calls(getattr, collections.OrderedDict, "fromkeys"), r"builtins\.getattr"),
    "getattr of a string": (Calls(getattr, "x", "format"), r"builtins\.getattr"),
    "subprocess": (Calls(subprocess.check_output, ["touch", "pwned"]), r"(subprocess|commands)\.check_output"),
    "torch.load": (Calls(torch.load, "other.ckpt"), r"torch\.serialization\.load"),
    "hub": (Calls(torch.hub.load, "a/b", "c"), r"torch\.hub\.load"),
    "compile": (Calls(compile, "1", "f", "eval"), r"builtins\.compile"),
    "a chain": (Calls(map, os.system, Calls(list, ["touch pwned"])), r"(posix|nt)\.system"),
    "codecs": (Calls(__import__("_codecs").encode, "x", "zlib_codec"), "encoding"),
    "a bytearray of a terabyte": (Calls(bytearray, 10**12), "bytearray"),
    "a set of a range": (Calls(set, range(10**12)), "range"),
}


@pytest.fixture
def place(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tmp_path / "warm.ckpt").write_bytes(packed(checkpoint(np.float64(1.0))))
        load_checkpoint(tmp_path / "warm.ckpt")  # what leyden itself imports when it reads one
        (tmp_path / "warm.ckpt").unlink()
        b"a".decode("cp437")  # the interpreter's own codec for names in archives
    return tmp_path


def refused(path: pathlib.Path, pattern: str) -> None:
    """Every reader refuses the file, and nothing happens meanwhile."""
    before = set(sys.modules)
    for reader in (load_checkpoint, read_about, read):
        with audited() as events, pytest.raises(CheckpointError, match=pattern) as error:
            reader(path)
        assert str(error.value).startswith(str(path))
        assert events == []
    assert set(sys.modules) == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("layout", ["zip", "legacy", "protocol 4"])
def test_attacks_are_refused(name: str, layout: str, place: pathlib.Path) -> None:
    attack, pattern = ATTACKS[name]
    path = place / "a.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path.write_bytes(packed(checkpoint(attack), layout == "legacy", 4 if layout == "protocol 4" else 2))
    refused(path, pattern)


def test_the_audit_sees_what_it_is_there_to_see(place: pathlib.Path) -> None:
    raw = pickle.dumps(Calls(exec, "open('pwned', 'w').close()"))
    with audited() as events:
        pickle.loads(raw)
    assert {"exec", "open"} <= {event for event, _ in events}
    assert (place / "pwned").exists()


def test_all_names_are_in_one_message_with_the_mend(place: pathlib.Path) -> None:
    path = place / "a.ckpt"
    path.write_bytes(packed(checkpoint([Stranger(1), argparse.ArgumentParser])))
    with pytest.raises(
        CheckpointError, match=r"Stranger, argparse\.ArgumentParser.*safe_globals\(\[Stranger, ArgumentParser\]\)"
    ):
        load_checkpoint(path)


class Stranger:
    made = 0

    def __init__(self, value: Any) -> None:
        self.value = value

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).made += 1
        vars(self).update(state)


def test_a_class_that_the_user_allows_is_made(place: pathlib.Path) -> None:
    path = place / "a.ckpt"
    path.write_bytes(packed(checkpoint(Stranger(torch.ones(2)))))
    Stranger.made = 0
    with pytest.raises(CheckpointError, match="Stranger"):
        load_checkpoint(path)
    assert Stranger.made == 0
    with torch.serialization.safe_globals([Stranger]):
        found = load_checkpoint(path)["hyper_parameters"]["x"]
    assert isinstance(found, Stranger)
    assert torch.equal(found.value, torch.ones(2))
    name = f"{Stranger.__module__}.Stranger"
    assert isinstance(read(path, allow=[(Other, name)])["hyper_parameters"]["x"], Other)
    with pytest.raises(CheckpointError, match="Stranger"):
        load_checkpoint(path)


class Other:
    pass


# Pickles that no library writes


def raw_pickle(*operations: bytes) -> bytes:
    return with_pickle(b"\x80\x02" + b"".join(operations) + b".")


def fetched_again() -> bytes:
    """A frozenset in a frozenset, and so on, each by way of a list that was noted when it was empty."""
    level = b"cbuiltins\nfrozenset\n]r\x01\x00\x00\x00(h\x00e0j\x01\x00\x00\x00\x85Rq\x000"
    return b"Nq\x000" + level * 5000 + b"h\x00"


def shared(levels: int) -> bytes:
    """A tuple of two that are one tuple of two, and so on: 2 ** levels parts in 5 bytes for each level."""
    return b")" + b"".join(b"q%ch%c\x86" % (level, level) for level in range(levels))


def shared_sets(levels: int) -> bytes:
    """The same of frozensets, each made by a call with a list of one tuple."""
    level = b"q\x00cbuiltins\nfrozenset\n]h\x00h\x00\x86a\x85R"
    return b")" + level * levels


def large(count: int) -> bytes:
    """``range(count)``."""
    return b"c__builtin__\nxrange\n\x8a\x06" + count.to_bytes(6, "little") + b"\x85R"


def text(written: str) -> bytes:
    return b"X" + len(written).to_bytes(4, "little") + written.encode()


def tensor_of_size(size: bytes) -> bytes:
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x02tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + size + b")\x89}tR"


def names(package: str, count: int) -> bytes:
    return b"".join(b"c%s\n%x\n0" % (package.encode(), number) for number in range(count)) + b"N"


HUGE = large(3 * 10**9)
FORGED: dict[str, tuple[bytes, str]] = {
    # a state for a class or a function that stays: torch's own must not change
    "state of a function": (raw_pickle(b"ctorch._utils\n_rebuild_tensor_v2\n", b"}", b"b"), "sets the state"),
    "slots of a function": (
        raw_pickle(b"ctorch._utils\n_rebuild_tensor_v2\n", b"N}X\x01\x00\x00\x00aK\x01s\x86", b"b"),
        "sets the",
    ),
    "slots of a class": (raw_pickle(b"cargparse\nNamespace\n", b"N}X\x04\x00\x00\x00argsK\x01s\x86", b"b"), "harm"),
    "slots of an unknown class": (raw_pickle(b"cabc\nxyz\n", b"N}X\x04\x00\x00\x00fullK\x01s\x86", b"b"), r"abc\.xyz"),
    "the extension registry": (raw_pickle(b"\x82\x01"), "operation EXT1"),
    "an old instance": (raw_pickle(b"(ios\nsystem\n"), "operation INST"),
    "a memo beyond the file": (raw_pickle(b"Nr\xff\xff\xff\x7f"), "beyond all that it has"),
    "a list in itself": (raw_pickle(b"]q\x00h\x00a"), "contains itself"),
    "ten thousand levels": (raw_pickle(b"]" * 100_000, b"a" * 99_999), "nested too deeply"),
    "a key of three million levels": (raw_pickle(b"}N", b"\x85" * 3_000_000, b"Ns"), "nested too deeply"),
    "sets in lists that are fetched again": (raw_pickle(fetched_again(), b"."), "nested too deeply"),
    "levels by turns": (raw_pickle(b"}Nq\x01", b"h\x01\x86q\x01h\x01h\x01" * 200_000, b"Ns"), "shared over and over"),
    "a tensor of another's data": (
        raw_pickle(
            b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n",
            b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQK\x00(M\xff\x7fM\xff\x7ft(M\xff\x7fK\x01t\x89NtR",
        ),
        "larger than its data",
    ),
    "a negative stride": (
        raw_pickle(
            b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n",
            b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQK\x01K\x02\x85J\xff\xff\xff\xff\x85\x89NtR",
        ),
        "malformed: a tensor of size",
    ),
    "a shared key": (raw_pickle(b"}", shared(60), b"Ns"), "shared over and over"),
    "a shared reference": (raw_pickle(shared(60), b"Q"), "shared over and over"),
    "a shared reference of fewer levels": (raw_pickle(shared(18), b"Q"), "malformed: a reference to a tuple of 2"),
    "a shared key, hashed often": (
        raw_pickle(shared(18), b"q\x140}", b"h\x14Ns" * 100),
        "shared over and over",
    ),
    "shared sets": (raw_pickle(shared_sets(60)), "shared over and over"),
    "a path of tuples": (raw_pickle(b"cpathlib\nPosixPath\n", shared(18), b"\x85R"), "malformed: a path of"),
    "a device of tuples": (raw_pickle(b"ctorch\ndevice\n", shared(18), b"\x85R"), "malformed: the device"),
    "a layout of tuples": (
        raw_pickle(b"ctorch.serialization\n_get_layout\n", shared(18), b"\x85R"),
        "malformed: the layout a tuple of 2",
    ),
    "a size that is a range": (raw_pickle(tensor_of_size(HUGE)), "malformed: a tensor of size a range"),
    "a torch.Size of a range": (raw_pickle(b"ctorch\nSize\n", HUGE, b"\x85R"), "a range instead of whole numbers"),
    "arguments that are a range": (
        raw_pickle(b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_parameter\nN", HUGE, b"NtR"),
        "made by something else",
    ),
    "a sparse tensor of a range": (
        raw_pickle(b"ctorch._utils\n_rebuild_sparse_tensor\nN", HUGE, b"\x86R"),
        "a sparse tensor of a range",
    ),
    "a counter of a range": (raw_pickle(b"ccollections\nCounter\n", HUGE, b"\x85R"), "made of a range"),
    "many names": (raw_pickle(names("a", 60_000)), r"it names a\.0, a\.1"),
    "many names that are no harm": (raw_pickle(names("typing", 60_000)), "more than 10,000 classes"),
    "cut short": (packed({"a": torch.ones(9)})[:-80], "cut short or damaged"),
    "cut in the middle": (packed({"a": torch.ones(900)})[:1500], "cut short or damaged"),
    "no operation": (with_pickle(b"\x80\x02\xff"), "cut short or damaged"),
    "no archive": (b"PK\x03\x04" + bytes(60), "cut short or damaged"),
    "another program's pickle": (pickle.dumps({"a": 1}, 2), "not one of torch.save"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_files_are_refused(name: str, place: pathlib.Path) -> None:
    raw, pattern = FORGED[name]
    path = place / "a.ckpt"
    path.write_bytes(raw)
    with audited() as events, pytest.raises(CheckpointError, match=pattern):
        read(path)
    assert events == []
    assert torch._utils._rebuild_tensor_v2.__dict__ == {}
    assert not hasattr(argparse.Namespace, "args")


def test_long_lists_are_not_deep(place: pathlib.Path) -> None:
    path = place / "a.ckpt"
    path.write_bytes(raw_pickle(b"]", b"K\x01a" * 5000, b"(K\x02e" * 5000))
    assert read(path) == [1] * 5000 + [2] * 5000


def test_what_is_shared_a_little_or_large_without_sharing_is_read(place: pathlib.Path) -> None:
    path = place / "a.ckpt"
    path.write_bytes(packed({"state": tuple(range(1_010_000)), "set": {(i, i) for i in range(9_000)}}))
    assert sum(map(len, read(path).values())) == 1_019_000
    graph: list[Any] = []
    for _ in range(60):  # a graph whose nodes know each other, as those of OmegaConf do
        graph = [graph, graph, {"same": graph}]
    path.write_bytes(packed(graph))
    assert read(path)[0] is not None


def test_memory_that_is_not_there_is_an_error_of_the_file(place: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place / "a.ckpt"
    path.write_bytes(packed({"a": torch.ones(2)}))

    def none_left(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Pickled, "tensor", none_left)
    with pytest.raises(CheckpointError, match=r"a\.ckpt: damaged, made to do harm, or larger than the memory"):
        read(path)


def test_compressed_parts_are_refused_before_they_are_expanded(place: pathlib.Path) -> None:
    path = place / "a.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(50_000_000))
    assert path.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match="compressed"):
        read(path)


def test_flipped_bits_are_found(place: pathlib.Path) -> None:
    whole = packed({"a": torch.arange(100.0)})
    at = whole.index(torch.arange(100.0).numpy().tobytes())
    path = place / "a.ckpt"
    path.write_bytes(whole[: at + 7] + bytes([whole[at + 7] ^ 4]) + whole[at + 8 :])
    with pytest.raises(CheckpointError, match="checksum"):
        read(path)


def test_a_truncated_file_of_any_length_is_refused(place: pathlib.Path) -> None:
    path = place / "a.ckpt"
    for legacy in (False, True):
        whole = packed({"state_dict": {"w": torch.arange(5.0)}, "global_step": 1}, legacy)
        for length in range(2, len(whole) - 1, 7 if legacy else 41):
            path.write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match=r"a\.ckpt"):
                read(path)


# What is no harm is read


VALUES: dict[str, Callable[[], Any]] = {
    "numbers": lambda: [1, -(2**70), 1.5, True, None, 1j, "text", "\u00fc", b"bytes", b"\xff"],
    "containers": lambda: {"a": [(1, 2), {3}, frozenset([4]), collections.deque([5], 3)], 1: {(1, 2): 3}},
    "counter": lambda: collections.Counter("abca"),
    "times": lambda: [datetime.timedelta(1, 2), datetime.datetime(2020, 3, 4, 5), datetime.date(2021, 1, 1)],
    "numpy numbers": lambda: [np.float64(1.5), np.int32(7), np.bool_(True), np.str_("ab")],
    "torch": lambda: [torch.float16, torch.Size([2, 3]), torch.device("cuda", 1), torch.strided],
    "namespace": lambda: argparse.Namespace(a=1, b={"c": [2]}),
    "path": lambda: pathlib.Path("a/b"),
    "bytearray": lambda: b"abc",
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("layout", ["zip", "legacy", "protocol 5"])
def test_plain_data_comes_back_equal(name: str, layout: str, place: pathlib.Path) -> None:
    value = VALUES[name]()
    path = place / "a.ckpt"
    path.write_bytes(packed([value], layout == "legacy", 5 if layout == "protocol 5" else 2))
    found = read(path)[0]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_come_back_equal(legacy: bool, place: pathlib.Path) -> None:
    tied = torch.nn.Parameter(torch.randn(3, 4))
    base = torch.arange(20.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it beta
        rows = torch.eye(3).to_sparse_csr()
    given = {
        **{str(dtype): torch.ones(3, dtype=dtype) for dtype in (torch.bfloat16, torch.int8, torch.bool, torch.complex64)},
        "view": base[3:17:2], "transposed": base.view(4, 5).t(), "scalar": torch.tensor(2.0), "empty": torch.empty(0, 3),
        "conjugate": torch.complex(base, base).conj(), "tied": tied, "tied too": tied.detach(),
        "sparse": torch.eye(3).to_sparse(), "rows": rows, "float8": torch.ones(2).to(torch.float8_e5m2),
    }  # fmt: skip
    path = place / "a.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path.write_bytes(packed(given, legacy))
        found = read(path)
    assert list(found) == list(given)
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        if tensor.layout is torch.strided:
            assert torch.equal(
                found[name].float() if "8" in name else found[name], tensor.float() if "8" in name else tensor
            )
        else:
            assert found[name].layout is tensor.layout
            assert torch.equal(found[name].to_dense(), tensor.to_dense())
    assert found["tied"] is found["tied too"]


def test_arrays_come_back_equal(place: pathlib.Path) -> None:
    given = [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.array(["ab", "c"]), np.zeros((0, 2)),
             np.arange(3, dtype=">i4")]  # fmt: skip
    path = place / "a.ckpt"
    path.write_bytes(packed(given))
    for found, array in zip(read(path), given, strict=True):
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)
    path.write_bytes(packed(np.array([Stranger(1)])))
    with pytest.raises(CheckpointError, match="Stranger"):
        read(path)


def test_versions_of_modules_stay_with_a_state_dict(place: pathlib.Path) -> None:
    path = place / "a.ckpt"
    state = torch.nn.BatchNorm1d(2).state_dict()
    path.write_bytes(packed(state))
    assert read(path)._metadata == state._metadata  # type: ignore[attr-defined]


def test_the_method_in_schedulers_of_older_versions(place: pathlib.Path) -> None:
    # torch before 2.0 saved the method itself, which protocol 2 writes as a look-up by name
    cycle = torch.optim.lr_scheduler.OneCycleLR
    path = place / "a.ckpt"
    path.write_bytes(packed(Calls(getattr, cycle, "_annealing_cos")))
    assert read(path) == "OneCycleLR._annealing_cos"
    path.write_bytes(packed(Calls(getattr, cycle, "__init__")))
    with pytest.raises(CheckpointError, match="__init__"):
        read(path)


def test_files_without_checksums_are_read(place: pathlib.Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(5.0)}, place / "a.ckpt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(read(place / "a.ckpt")["a"], torch.arange(5.0))


def test_weights_alone_leave_the_rest_unread(place: pathlib.Path) -> None:
    given = {
        "state_dict": {"w": torch.ones(2)},
        "global_step": 1,
        "optimizer_states": [{"state": {0: torch.full((500,), 7.0)}}],
    }
    whole = packed(given)
    at = whole.index(torch.full((500,), 7.0).numpy().tobytes())
    path = place / "a.ckpt"
    path.write_bytes(whole[:at] + bytes(2000) + whole[at + 2000 :])
    found = load_checkpoint(path, weights_only=True)
    assert torch.equal(found["state_dict"]["w"], torch.ones(2))
    assert "optimizer_states" not in found
    with pytest.raises(CheckpointError, match="checksum"):
        load_checkpoint(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_whatever_is_changed_in_a_file_it_is_read_or_refused(legacy: bool, place: pathlib.Path) -> None:
    given = checkpoint([argparse.Namespace(a=1), np.arange(3.0), collections.Counter("ab"), torch.ones(2).to_sparse()])
    with zipfile.ZipFile(io.BytesIO(packed(given))) as archive:
        whole = packed(given, True) if legacy else archive.read("archive/data.pkl")
    path, chance = place / "a.ckpt", random.Random(5)
    outcomes: collections.Counter[str] = collections.Counter()
    for _ in range(300):
        raw = bytearray(whole)
        for _ in range(chance.choice((1, 1, 3))):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        path.write_bytes(bytes(raw) if legacy else with_pickle(bytes(raw)))
        for reader in (load_checkpoint, read_about, read):
            try:
                reader(path)
                outcomes["read"] += 1
            except CheckpointError:
                outcomes["refused"] += 1
    assert outcomes.total() == 900
    assert min(outcomes["read"], outcomes["refused"]) > 10
