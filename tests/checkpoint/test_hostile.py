"""Files that are damaged, forged, or something else: an error names the file and the reason, and nothing else happens."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import pickle
import random
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from leyden.checkpoint import container, load_checkpoint, read_metadata, write_checkpoint
from leyden.checkpoint.format import encode, read_about, write_file
from leyden.errors import CheckpointError
from same_values import same, same_tensor

torch.set_num_threads(1)

READERS: tuple[Callable[[pathlib.Path], Any], ...] = (load_checkpoint, read_metadata, read_about)


def rich_checkpoint() -> dict[str, Any]:
    """Something of everything, small."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
        channels = torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.quint8)
        csr = torch.eye(2).to_sparse_csr()
    return {
        "state_dict": {"w": torch.arange(4.0), "s": torch.eye(2).to_sparse(), "c": csr, "q": quantized, "p": channels},
        "epoch": 3,
        "mine": [(1, {2}), float("nan"), 2**70, b"x", 1j, torch.float16, torch.device("cpu"), {3: 4}, torch.Size([1])],
        "rng": [np.arange(3), np.float32(1), np.array(["a"]), torch.tensor([1j])],
    }


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, {"state_dict": {"w": torch.arange(100.0)}, "epoch": 3, "rng": np.arange(3)})
    return path


@pytest.fixture
def small(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, {"state_dict": {"w": torch.tensor([1.0, 2.0]), "s": torch.eye(1).to_sparse()}, "epoch": 3})
    return path


@pytest.fixture(autouse=True)
def modest(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[None]:
    """No file, whatever it claims, makes the reader allocate a tensor larger than the file."""
    real, made = torch.empty, [0]

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = real(*args, **kwargs)
        made.append(result.nbytes)
        return result

    monkeypatch.setattr(container.torch, "empty", empty)
    yield
    assert max(made) < 1_000_000


# damage


def test_cut_short_anywhere(small: pathlib.Path) -> None:
    whole = small.read_bytes()
    for size in range(len(whole)):
        small.write_bytes(whole[:size])
        for reader in READERS:
            with pytest.raises(CheckpointError, match=r"a\.ckpt: .*(cut short|does not begin)"):
                reader(small)
    small.write_bytes(whole + b"\0")
    for reader in READERS:
        with pytest.raises(CheckpointError, match="1 bytes more"):
            reader(small)


def test_any_flipped_byte_is_found(small: pathlib.Path) -> None:
    whole, original = small.read_bytes(), load_checkpoint(small)
    rng = random.Random(0)
    harmless, reasons = 0, []
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)])
        small.write_bytes(damaged)
        try:
            loaded = load_checkpoint(small)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        assert same(loaded, original)  # allowed only where nothing is lost, such as in the padding
        harmless += 1
    assert harmless < 0.02 * len(whole)
    assert all(reason.startswith(f"{small}: ") for reason in reasons)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_mutation_is_found(data: st.DataObject) -> None:
    stream = io.BytesIO()
    write_file(stream, *encode(rich_checkpoint()))
    whole = bytearray(stream.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(whole)))
        match data.draw(st.sampled_from(["insert", "delete", "replace", "swap"])):
            case "insert":
                whole[position:position] = data.draw(st.binary(min_size=1, max_size=8))
            case "delete":
                del whole[position : position + data.draw(st.integers(1, 8))]
            case "replace":
                piece = data.draw(st.binary(min_size=1, max_size=8))
                whole[position : position + len(piece)] = piece
            case "swap":
                other = data.draw(st.integers(0, len(whole)))
                whole[position : position + 8], whole[other : other + 8] = (
                    whole[other : other + 8],
                    whole[position : position + 8],
                )
    from leyden.checkpoint.format import decode

    with contextlib.suppress(CheckpointError):
        file = container.Reader(io.BytesIO(bytes(whole)))
        tensors = {name: file.read(name) for name in file.entries}
        if any(key.startswith("leyden_") for key in file.metadata):
            assert same(decode(tensors, file.metadata), rich_checkpoint())


def test_damage_is_told_apart(saved: pathlib.Path) -> None:
    whole = saved.read_bytes()
    tensor = torch.arange(100.0)
    swapped = tensor.clone()
    swapped[3] = 7
    saved.write_bytes(whole.replace(tensor.numpy().tobytes(), swapped.numpy().tobytes()))
    with pytest.raises(CheckpointError, match=r"a\.ckpt: the tensor module\.w is damaged"):
        load_checkpoint(saved)
    assert read_metadata(saved)  # which does not read tensors
    saved.write_bytes(whole.replace(b'\\"epoch\\":3', b'\\"epoch\\":4'))
    for reader in READERS:
        with pytest.raises(CheckpointError, match=r"a\.ckpt: its metadata are damaged"):
            reader(saved)
    saved.write_bytes(whole.replace(b'"shape":[100]', b'"shape":[10]' + b" "))
    with pytest.raises(CheckpointError, match=r"a\.ckpt: the tensor module\.w has offsets for 400 bytes; .* make 40$"):
        load_checkpoint(saved)


def test_a_file_that_shrinks_while_it_is_read(saved: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = container.Reader.read

    def read(self: container.Reader, name: str) -> torch.Tensor:
        os.truncate(saved, saved.stat().st_size - 8)
        return real(self, name)

    monkeypatch.setattr(container.Reader, "read", read)
    with pytest.raises(CheckpointError, match=r"a\.ckpt: the file is cut short: it ended \d+ bytes too early"):
        load_checkpoint(saved)


# something else


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


def pickles() -> dict[str, bytes]:
    made = {}
    for legacy in (False, True):
        stream = io.BytesIO()
        torch.save({"state_dict": {"w": torch.ones(2)}, "x": Bomb()}, stream, _use_new_zipfile_serialization=not legacy)
        made[f"torch {'legacy' if legacy else 'zip'}"] = stream.getvalue()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        made[f"protocol {protocol}"] = pickle.dumps({"a": Bomb(), "b": list(range(100))}, protocol)
    return made


@pytest.mark.parametrize("name", list(pickles()))
def test_pickles_are_not_loaded(name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.ckpt"
    path.write_bytes(pickles()[name])
    pattern = r"(this is a pickle|it names (posix|nt)\.system)"
    if name in ("protocol 0", "protocol 1"):  # text, or without a mark of its own
        pattern = "does not begin like a safetensors file"
    for reader in READERS:
        with pytest.raises(CheckpointError, match=rf"a\.ckpt: .*{pattern}"):
            reader(path)
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_not_there(saved: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=r"b\.ckpt: no such file. Did you mean 'a.ckpt'"):
        load_checkpoint(saved.parent / "b.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        load_checkpoint(saved.parent)
    saved.write_bytes(b"GIF89a, this is a picture")
    with pytest.raises(CheckpointError, match="does not begin like a safetensors file"):
        load_checkpoint(saved)


# forged headers


def packed(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


DATA = b"abcd"
FORGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes, less than its header"),
    "no header": (bytes(8), "JSON is malformed"),
    "huge header": ((2**64 - 1).to_bytes(8, "little") + b"{}", "does not begin like"),
    "header of a terabyte": ((10**12).to_bytes(8, "little") + b"{}", "does not begin like"),
    "header beyond the file": ((99_000_000).to_bytes(8, "little") + b"{}", "cut short"),
    "not UTF-8": (packed(b'{"\xff":1}'), "not text"),
    "half a surrogate pair": (packed(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}", DATA), "not text"),
    "half a surrogate in the metadata": (packed(b'{"__metadata__":{"a":"\\ud800"}}'), "not text"),
    "deep JSON": (packed(b"[" * 100_000), "nested too deeply"),
    "deep entry": (packed(b'{"a":' * 100_000), "nested too deeply"),
    "a list": (packed([]), "not that of a safetensors file"),
    "NaN": (packed(b'{"a":NaN}'), "literal NaN"),
    "Infinity": (packed(b'{"a":-Infinity}'), "literal -Infinity"),
    "too large for a double": (packed(b'{"a":1e999}'), "number 1e999"),
    "enormous int": (packed(b'{"a":' + b"9" * 100_000 + b"}"), "malformed"),
    "metadata twice": (packed(b'{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' twice"),
    "a name twice": (packed(b'{"a":1,"a":2}'), "'a' twice"),
    "a field twice": (packed(b'{"a":{"dtype":"U8","dtype":"I8"}}'), "'dtype' twice"),
    "numbers as metadata": (packed({"__metadata__": {"a": 1}}), "not that of a safetensors file"),
    "a list as metadata": (packed({"__metadata__": []}), "not that of a safetensors file"),
    "no entry": (packed({"a": 3}), "entry for a is malformed"),
    "no shape": (packed({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, DATA), "malformed"),
    "three offsets": (packed({"a": entry(offsets=[0, 4, 4])}, DATA), "malformed"),
    "offsets in a string": (packed({"a": entry(offsets="04")}, DATA), "malformed"),
    "no list as shape": (packed({"a": entry(shape=4)}, DATA), "malformed"),
    "true as length": (packed({"a": entry(shape=[True, 4])}, DATA), "whole numbers"),
    "a fraction as length": (packed({"a": entry(shape=[4.0])}, DATA), "whole numbers"),
    "negative length": (packed({"a": entry(shape=[-2, -2])}, DATA), "whole numbers"),
    "negative offset": (packed({"a": entry(offsets=[-4, 0])}, DATA), "whole numbers"),
    "true as offset": (packed({"a": entry(shape=[1], offsets=[False, True])}, b"a"), "whole numbers"),
    "offsets of 64 bits": (packed({"a": entry(offsets=[2**64, 2**64 + 4])}, DATA), "whole numbers"),
    "reversed offsets": (packed({"a": entry(offsets=[4, 0])}, DATA), "offsets for -4 bytes"),
    "wrong shape": (packed({"a": entry(shape=[3])}, DATA), "offsets for 4 bytes; its dtype and shape make 3"),
    "wrong dtype": (packed({"a": entry("F32")}, DATA), "make 16"),
    "elements beyond 64 bits": (packed({"a": entry(shape=[2**40, 2**40])}, DATA), "impossible shape"),
    "a product that wraps to 4": (packed({"a": entry(shape=[2**62, 2**62, 4])}, DATA), "impossible shape"),
    "strides beyond 64 bits": (packed({"a": entry(shape=[0, 2**40, 2**40], offsets=[0, 0])}), "impossible shape"),
    "a million huge lengths": (packed({"a": entry(shape=[2**60] * 100_000)}, DATA), "impossible shape"),
    "a terabyte": (packed({"a": entry(shape=[10**12], offsets=[0, 10**12])}, DATA), "cut short: 999999999996 of"),
    "a gap": (
        packed({"a": entry(shape=[1], offsets=[0, 1]), "b": entry(shape=[2], offsets=[2, 4])}, DATA),
        "b leaves a gap",
    ),
    "a gap at the start": (packed({"a": entry(shape=[3], offsets=[1, 4])}, DATA), "a leaves a gap"),
    "an overlap": (
        packed({"a": entry(shape=[3], offsets=[0, 3]), "b": entry(shape=[2], offsets=[2, 4])}, DATA),
        "b overlaps",
    ),
    "the same bytes twice": (packed({"a": entry(), "b": entry()}, DATA), "overlaps the one before"),
    "empty inside another": (packed({"a": entry(), "b": entry(shape=[0], offsets=[2, 2])}, DATA), "overlaps"),
    "bytes left over": (packed({"a": entry()}, DATA + b"e"), "1 bytes more"),
    "data without tensors": (packed({}, DATA), "4 bytes more"),
    "unknown dtype": (packed({"a": entry("C128", [1], [0, 16])}, DATA * 4), "unknown dtype 'C128'"),
    "dtype that is no text": (packed({"a": entry(["U8"])}, DATA), "unknown dtype"),
    "6-bit floats": (packed({"a": entry("F6_E2M3", [4], [0, 3])}, b"abc"), "F6_E2M3, which this torch lacks"),
    "a third of a byte": (packed({"a": entry("F4", [3], [0, 2])}, b"ab"), "make 2$"),
    "odd pairs": (packed({"a": entry("F4", [2, 3], [0, 3])}, b"abc"), "odd last dimension"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_headers(name: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.ckpt"
    content, reason = FORGED[name]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"a\.ckpt: .*{reason}"):
        load_checkpoint(path)


@pytest.mark.parametrize("header", [{}, {"__metadata__": None}, {"a": entry(shape=[0], offsets=[0, 0])}])
def test_what_the_library_accepts_without_data(header: Any, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(packed(header))
    assert same(load_checkpoint(path), {"state_dict": safetensors.torch.load(packed(header))})


@pytest.mark.parametrize(
    ("dtype", "torchs", "shape"),
    [
        ("F8_E8M0", torch.float8_e8m0fnu, [4]),
        ("F8_E4M3FNUZ", torch.float8_e4m3fnuz, [2, 2]),
        ("F8_E5M2FNUZ", torch.float8_e5m2fnuz, [4]),
        ("C64", torch.complex64, [2]),
        ("F4", torch.float4_e2m1fn_x2, [2, 4]),
    ],
)
def test_dtypes_of_other_writers(dtype: str, torchs: torch.dtype, shape: list[int], tmp_path: pathlib.Path) -> None:
    data = bytes(range(1, 17))[: 16 if dtype == "C64" else 4]
    path = tmp_path / "a.safetensors"
    path.write_bytes(
        packed({"a": entry(dtype, shape, [0, len(data)], note="fields of newer versions do not matter")}, data)
    )
    ours = load_checkpoint(path)["state_dict"]["a"]
    assert ours.dtype is torchs
    with safetensors.safe_open(path, framework="pt") as file:
        assert same_tensor(ours, file.get_tensor("a"))


HOSTILE_NAMES = [
    "../x",
    "/etc/x",
    "..\\x",
    "C:\\x",
    "a\0b",
    "\x1b[2J",
    "~/x",
    "file:///tmp/x",
    "__class__",
    "$tensor",
    "",
    "x" * 10_000,
]


def test_names_are_only_names(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    header = {name: entry(shape=[1], offsets=[i, i + 1]) for i, name in enumerate(HOSTILE_NAMES)}
    (inside / "a.ckpt").write_bytes(packed(header, bytes(range(len(HOSTILE_NAMES)))))
    loaded = load_checkpoint("a.ckpt")["state_dict"]
    assert {name: tensor.item() for name, tensor in loaded.items()} == {name: i for i, name in enumerate(HOSTILE_NAMES)}

    checkpoint = {
        "state_dict": {name: torch.tensor(i) for i, name in enumerate(HOSTILE_NAMES)},
        "../y": {"../z": torch.ones(1)},
    }
    write_checkpoint("a.ckpt", checkpoint)
    assert same(load_checkpoint("a.ckpt"), checkpoint)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [inside / "a.ckpt"]

    (inside / "a.ckpt").write_bytes(packed({"\x1b[2J" + "x" * 10_000: entry(shape=[9])}, DATA))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint("a.ckpt")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 500


field = st.one_of(
    st.sampled_from(
        ["U8", "F32", "BF16", "I64", "BOOL", "F4", "C64", "X", None, 0, 1, 2, 4, -1, 2**63, 2**64, 1.0, True, [], {}]
    ),
    st.lists(st.one_of(st.integers(-1, 5), st.sampled_from([2**32, 2**63, 2**64, True, 1.5, "1", None])), max_size=3),
)
entries = st.one_of(
    st.builds(
        entry, st.sampled_from(["U8", "F32", "I8", "F16"]), st.lists(st.integers(0, 3), max_size=3), st.just([0, 0])
    ),
    st.fixed_dictionaries({}, optional={"dtype": field, "shape": field, "data_offsets": field}),
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.text(max_size=3), entries, max_size=3), st.booleans(), st.binary(max_size=12))
@example({"a": entry()}, False, DATA)
def test_what_the_library_refuses_is_refused_here(header: dict[str, Any], fitting: bool, data: bytes) -> None:
    """The library's parser is the second opinion on what a valid file is."""
    if fitting:  # otherwise hardly any is valid
        end = 0
        for item in header.values():
            with contextlib.suppress(Exception):
                size = int(np.prod(item["shape"])) * {"U8": 1, "I8": 1, "F16": 2, "F32": 4}[item["dtype"]]
                item["data_offsets"] = [end, end + size]
                end += size
        data = bytes(end) if 0 <= end < 1000 else data
    content = packed(header, data)
    try:
        theirs = safetensors.torch.load(content)
    except (
        safetensors.SafetensorError,
        KeyError,
        TypeError,
        RuntimeError,
    ):  # the last two are from torch, of huge shapes
        theirs = None
    try:
        file = container.Reader(io.BytesIO(content))
        ours = {name: file.read(name) for name in file.entries}
    except CheckpointError:
        ours = None
    assert (ours is None) == (theirs is None) or "F4" in str(header)  # the library's two readers differ on F4
    if ours is not None and theirs is not None:
        assert ours.keys() == theirs.keys()
        assert all(same_tensor(ours[name], theirs[name]) for name in ours)


# forged trees


def forge(path: pathlib.Path, **changes: str) -> None:
    """Rewrite the metadata, with a right checksum."""
    tensors, metadata = encode(load_checkpoint(path))
    metadata.update(changes)
    parts = (metadata[f"leyden_{key}"] for key in ("format", "version", "about", "checkpoint", "checksums"))
    metadata["leyden_checksum"] = f"{zlib.crc32(chr(10).join(parts).encode()):08x}"
    with path.open("wb") as file:
        write_file(file, tensors, metadata)


W, RNG = {"$tensor": "module.w"}, {"$tensor": "rng"}


def tree_of(tag: str, *argument: Any) -> str:
    return json.dumps({"a": {tag: argument}})


TREES: list[tuple[str, str]] = [
    ('{"a": NaN}', "literal NaN"),
    ('{"a": -Infinity}', "literal -Infinity"),
    ('{"a": 1e400}', "number 1e400"),
    (f'{{"a": {"9" * 5000}}}', "malformed"),
    ('{"a": 1, "a": 2}', "'a' twice"),
    ('{"x": {"b": 1, "b": 2}}', "'b' twice"),
    ('{"a": ', "malformed"),
    ("[1]", "do not hold a checkpoint"),
    ("[" * 100_000, "nested too deeply"),
    ('{"a":' + "[" * 900 + "]" * 900 + "}", "nested too deeply"),
    ('{"a": {"$pickle": "x"}}', r"unknown entry '\$pickle'"),
    ('{"a": {"$int": "0x1", "b": 1}}', "unknown entry"),
    ('{"a": {"$tensor": "nothing"}}', "tensor nothing is missing"),
    ('{"a": {"$tensor": "../../etc/passwd"}}', "tensor ../../etc/passwd is missing"),
    ('{"a": {"$tensor": ["x"]}}', "is not a name"),
    ('{"a": {"$int": "zz"}}', r"malformed \$int"),
    ('{"a": {"$int": 3}}', r"malformed \$int"),
    ('{"a": {"$float": "1"}}', r"malformed \$float"),
    ('{"a": {"$set": [[1]]}}', r"malformed \$set"),
    ('{"a": {"$dict": [[1, 2], [1, 3]]}}', "twice"),
    ('{"a": {"$dict": [[[], 2]]}}', r"malformed \$dict"),
    ('{"a": {"$dtype": "compiler"}}', "no dtype 'compiler'"),
    ('{"a": {"$dtype": "nn"}}', "no dtype 'nn'"),
    ('{"a": {"$dtype": []}}', r"malformed \$dtype"),
    ('{"a": {"$device": "nowhere"}}', r"malformed \$device"),
    ('{"a": {"$bytes": "é"}}', r"malformed \$bytes"),
    ('{"a": {"$namespace": [1]}}', r"malformed \$namespace"),
    ('{"a": {"$deque": [-1, []]}}', r"malformed \$deque"),
    ('{"a": {"$state_dict": [1]}}', r"malformed \$state_dict"),
    (tree_of("$size", "x"), r"malformed \$size"),
    ('{"a": {"$ndarray": ["module.w", "|O", [100]]}}', "not a numpy dtype"),
    ('{"a": {"$ndarray": ["module.w", "<f4", [10]]}}', "announced as"),
    ('{"a": {"$ndarray": ["module.w", "<i8", [100]]}}', "announced as"),
    ('{"a": {"$ndarray": ["rng", "|S0", [9]]}}', r"malformed \$ndarray"),
    ('{"a": {"$ndarray": ["rng", "<U999999999999", [9]]}}', r"malformed \$ndarray"),
    ('{"a": {"$ndarray": ["rng", "<M8[fortnight]", [3]]}}', r"malformed \$ndarray"),
    ('{"a": {"$ndarray": ["rng"]}}', r"malformed \$ndarray"),
    ('{"a": [{"$blob": "rng"}, {"$blob": "rng"}]}', "used twice"),
    ('{"a": [{"$blob": "rng"}, {"$tensor": "rng"}]}', "used twice"),
    ('{"a": {"$numpy": ["|O", 1]}}', "not a numpy dtype"),
    ('{"a": {"$view": ["module.w", "complex64"]}}', r"malformed \$view"),
    ('{"a": {"$view": ["module.w", "float64"]}}', "cannot be seen as"),
    ('{"a": {"$view": ["module.w", "quint8"]}}', "cannot be seen as"),
    ('{"a": {"$view": [["module.w"], "float64"]}}', "is not a name"),
    ('{"a": {"$timedelta": [1e300]}}', r"malformed \$timedelta"),
    (tree_of("$sparse_coo", W, W, [9], True), r"malformed \$sparse_coo"),
    (tree_of("$sparse_coo", RNG, W, [9], True), r"malformed \$sparse_coo"),
    (tree_of("$sparse_coo", 1, 2, [9], True), "must be dense tensors"),
    (tree_of("$sparse_coo", {"$sparse_coo": [W, W, [9], True]}, W, [9], True), r"malformed \$sparse_coo"),
    (tree_of("$sparse_compressed", RNG, RNG, W, [2, 2], "strided"), "not a layout"),
    (tree_of("$sparse_compressed", RNG, RNG, W, [2, 2], "nn"), "not a layout"),
    (tree_of("$sparse_compressed", RNG, RNG, W, [2, 2], []), r"malformed \$sparse_compressed"),
    (tree_of("$sparse_compressed", RNG, RNG, W, [2, 2], "sparse_csr"), r"malformed \$sparse_compressed"),
    (tree_of("$quantized", W, 0.1, 3), r"malformed \$quantized"),
    (tree_of("$quantized", 1, 0.1, 3), "must be dense tensors"),
    (tree_of("$quantized"), r"malformed \$quantized"),
]


@pytest.mark.parametrize(("tree", "reason"), TREES, ids=[tree[:60] for tree, _ in TREES])
def test_malformed_trees(saved: pathlib.Path, tree: str, reason: str) -> None:
    write_checkpoint(saved, {"state_dict": {"w": torch.arange(100.0)}, "epoch": 3, "rng": torch.arange(3)})
    forge(saved, leyden_checkpoint=tree)
    with pytest.raises(CheckpointError, match=rf"a\.ckpt: .*{reason}"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("key", "before", "after", "reason"),
    [
        ("coo", "[2,2],true", "[1,2],true", "size is inconsistent with indices"),  # reads beyond its memory if taken
        ("coo", "[2,2],true", "[2,2],1", "true or false"),
        ("coo", "[2,2],true", "[2,2]", "malformed"),
        ("twice", "false]", "true]", "is_coalesced"),
        ("csr", "[2,2]", "[2,1]", "malformed"),
        ("csr", "[2,2]", "[9,2]", "malformed"),
        ("csr", "sparse_csr", "sparse_coo", "not a layout"),
        ("tensorwise", ",3]", ",300]", "zero point 300"),
        ("tensorwise", ",3]", ",1.5]", "zero point 1.5"),
        ("channelwise", ",0]}", ",1]}", "for each of 3 channels"),
        ("channelwise", ",0]}", ",-2]}", "for each of 2 channels"),
        ("channelwise", ",0]}", ",7]}", "malformed"),
    ],
)
def test_parts_that_do_not_fit(key: str, before: str, after: str, reason: str, tmp_path: pathlib.Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = {
            "coo": torch.eye(2).to_sparse(),
            "twice": torch.sparse_coo_tensor(torch.tensor([[1, 1], [0, 0]]), torch.ones(2), (2, 2)),
            "csr": torch.eye(2).to_sparse_csr(),
            "tensorwise": torch.quantize_per_tensor(torch.ones(2), 0.5, 3, torch.qint8),
            "channelwise": torch.quantize_per_channel(torch.ones(2, 3), torch.ones(2), torch.zeros(2), 0, torch.qint8),
        }[key]
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, {"v": value})
    tree = read_metadata(path)["leyden_checkpoint"]
    assert before in tree
    forge(path, leyden_checkpoint=tree.replace(before, after))
    with pytest.raises(CheckpointError, match=rf"a\.ckpt: .*{reason}"):
        load_checkpoint(path)


def test_malformed_about(saved: pathlib.Path) -> None:
    about = json.loads(read_metadata(saved)["leyden_about"])
    for changes in ({"epoch": "3"}, {"epoch": True}, {"resumable": 1}, {"saved_at": None}, {"run_id": 3}):
        forge(saved, leyden_about=json.dumps(about | changes))
        with pytest.raises(CheckpointError, match=r"a\.ckpt: malformed leyden_about"):
            read_about(saved)
    for text in ("[]", "{}", "NaN", "{", '{"epoch":1,"epoch":2}'):
        forge(saved, leyden_about=text)
        with pytest.raises(CheckpointError, match=r"a\.ckpt: "):
            read_about(saved)


# nothing happens


AUDIT = """
import os, pathlib, sys
from leyden.checkpoint import load_checkpoint, read_metadata
from leyden.checkpoint.format import read_about
from leyden.errors import CheckpointError

FORBIDDEN = {
    "exec", "compile", "import", "code.__new__", "marshal.loads", "pickle.find_class", "ctypes.dlopen", "os.system",
    "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.mkdir", "os.rmdir",
    "os.link", "os.symlink", "os.chmod", "os.truncate", "os.putenv", "shutil.rmtree", "shutil.move",
}
seen, active = [], [False]

def hook(event, arguments):
    if not active[0]:
        return
    if event in FORBIDDEN or event.startswith(("socket.", "urllib.", "http.", "webbrowser.")):
        seen.append((event, str(arguments)[:200]))
    if event == "open":
        path, mode, flags = arguments
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
        if set(mode or "") & set("wax+") or (flags or 0) & writing:
            seen.append((event, str(arguments)[:200]))

sys.addaudithook(hook)
honest, hostile = pathlib.Path(sys.argv[1]), sorted(pathlib.Path(sys.argv[2]).iterdir())
load_checkpoint(honest)  # what numbers and tensors need is now imported
import leyden.compat.foreign  # what reads the files of others
b"a".decode("cp437")  # the names in archives
read_about(honest)
before = set(sys.modules)
counts = {"loaded": 0, "refused": 0}
active[0] = True
for path in [honest, *hostile]:
    for read in (load_checkpoint, read_metadata, read_about):
        try:
            read(path)
            counts["loaded"] += 1
        except CheckpointError:
            counts["refused"] += 1
active[0] = False
assert not seen, seen
assert set(sys.modules) == before, set(sys.modules) - before
if len(sys.argv) > 3:  # the hook itself: it does see such things
    active[0] = True
    import this_module_is_new
print(counts["loaded"], counts["refused"])
"""


def test_nothing_happens_while_files_are_read(tmp_path: pathlib.Path) -> None:
    honest, hostile = tmp_path / "honest.ckpt", tmp_path / "hostile"
    write_checkpoint(honest, rich_checkpoint())
    hostile.mkdir()
    contents = [content for content, _ in FORGED.values()] + list(pickles().values())
    contents.append(
        packed({name: entry(shape=[1], offsets=[i, i + 1]) for i, name in enumerate(HOSTILE_NAMES)}, bytes(12))
    )
    whole, rng = honest.read_bytes(), random.Random(1)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] = rng.randrange(256)
        contents.append(bytes(damaged))
    contents += [whole[: len(whole) * i // 50] for i in range(50)]
    for i, content in enumerate(contents):
        (hostile / f"{i:03}.ckpt").write_bytes(content)
    for i, (tree, _) in enumerate(TREES):
        path = hostile / f"tree{i}.ckpt"
        write_checkpoint(path, {"state_dict": {"w": torch.arange(100.0)}, "rng": torch.arange(3)})
        forge(path, leyden_checkpoint=tree)
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-W", "error", "-c", AUDIT, str(honest), str(hostile)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded, refused = map(int, done.stdout.split())
    assert loaded + refused == 3 * (1 + len(contents) + len(TREES))
    assert loaded >= 3
    assert refused > 1000
    assert sorted(tmp_path.rglob("*")) == before


def test_the_audit_sees_an_import(tmp_path: pathlib.Path) -> None:
    write_checkpoint(tmp_path / "a.ckpt", {"epoch": 1})
    (tmp_path / "none").mkdir()
    (tmp_path / "this_module_is_new.py").write_text("assert not seen_by_hook if False else True")
    program = AUDIT + "\nassert [event for event, _ in seen if event == 'import'], seen"
    arguments = [str(tmp_path / "a.ckpt"), str(tmp_path / "none"), "new"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
