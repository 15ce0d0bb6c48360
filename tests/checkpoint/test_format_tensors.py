"""Tensors of every kind come back to the bit, are not copied while training waits, and cost little beside their bytes."""

from __future__ import annotations

import io
import math
import pathlib
import subprocess
import sys
import threading
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leyden.checkpoint import container, load_checkpoint, write_checkpoint
from leyden.checkpoint.format import decode, encode, flatten, seal, write_file
from leyden.errors import CheckpointError
from same_values import same, same_tensor

torch.set_num_threads(1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel"),
    pytest.mark.filterwarnings("ignore:Sparse [A-Z]* tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support"),
]


def quietly(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    with warnings.catch_warnings():  # torch warns of what it will drop when a test makes one
        warnings.simplefilter("ignore")
        return make()


SPARSE: dict[str, Callable[[], torch.Tensor]] = {
    "coo": lambda: torch.eye(3).to_sparse(),
    "coo uncoalesced": lambda: torch.sparse_coo_tensor(torch.tensor([[2, 0, 2], [1, 0, 1]]), torch.ones(3), (3, 4)),
    "coo sorted, not coalesced": lambda: torch.sparse_coo_tensor(torch.tensor([[0, 1]]), torch.ones(2), (3,)),
    "coo with dense columns": lambda: torch.sparse_coo_tensor(
        torch.tensor([[1, 3]]), torch.arange(6.0).view(2, 3), (5, 3)
    ),
    "coo without entries": lambda: torch.zeros(2, 3).to_sparse(),
    "coo without entries or flag": lambda: torch.zeros(2, 3).to_sparse()._coalesced_(False),
    "coo without size": lambda: torch.zeros(0, 3).to_sparse(),
    "coo 0-d": lambda: torch.tensor(3.0).to_sparse(),
    "coo complex": lambda: torch.tensor([0, 1 + 2j]).to_sparse(),
    "coo bfloat16": lambda: torch.eye(3, dtype=torch.bfloat16).to_sparse(),
    "coo integers": lambda: torch.eye(3, dtype=torch.int8).to_sparse(),
    "csr": lambda: torch.eye(3)[:, :2].to_sparse_csr(),
    "csr with 32-bit indices": lambda: torch.sparse_csr_tensor(
        torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32), torch.ones(2), (2, 2)
    ),
    "csr batch": lambda: torch.eye(3).expand(2, 3, 3).to_sparse_csr(),
    "csr without entries": lambda: torch.zeros(2, 3).to_sparse_csr(),
    "csc": lambda: torch.eye(3)[:2].to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 1)),
    "bsc": lambda: torch.eye(4, dtype=torch.float64).to_sparse_bsc((1, 2)),
}
QUANTIZED: dict[str, Callable[[], torch.Tensor]] = {
    "qint8": lambda: torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 3, torch.qint8),
    "quint8": lambda: torch.quantize_per_tensor(torch.randn(3, 4), 0.3, 128, torch.quint8),
    "qint32": lambda: torch.quantize_per_tensor(torch.randn(5), 1e-5, -7, torch.qint32),
    "0-d": lambda: torch.quantize_per_tensor(torch.tensor(1.0), 0.1, 0, torch.qint8),
    "empty": lambda: torch.quantize_per_tensor(torch.zeros(0, 3), 0.1, 0, torch.qint8),
    "transposed": lambda: torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 0, torch.qint8).t(),
    "per channel": lambda: torch.quantize_per_channel(
        torch.randn(3, 4), torch.rand(4) + 0.1, torch.arange(4), 1, torch.qint8
    ),
    "per channel, float zero points": lambda: torch.quantize_per_channel(
        torch.randn(3, 4), torch.rand(3) + 0.1, torch.rand(3), 0, torch.quint8
    ),
}


@pytest.mark.parametrize("name", [*SPARSE, *QUANTIZED])
def test_sparse_and_quantized_tensors(name: str, tmp_path: pathlib.Path) -> None:
    tensor = quietly((SPARSE | QUANTIZED)[name])
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, {"state_dict": {"w": tensor}, "list": [tensor, {"again": tensor}]})
    loaded = load_checkpoint(path)
    assert same_tensor(loaded["state_dict"]["w"], tensor)
    assert same(loaded["list"], [tensor, {"again": tensor}])
    parts = safetensors.torch.load_file(path)  # written once, and none of them a surprise for other tools
    assert 1 <= len({name.removesuffix("#2") for name in parts if name.startswith("module.w.")}) <= 3


def test_loading_them_warns_of_nothing(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, {name: quietly(make) for name, make in (SPARSE | QUANTIZED).items()})
    program = (
        "import sys; from leyden.checkpoint import load_checkpoint as load; load(sys.argv[1]); load(sys.argv[1], 'cpu')"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program, str(path)], check=True)


def test_the_meta_device_has_shapes_only(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.ckpt"
    tensors = {name: quietly(make) for name, make in SPARSE.items()}
    write_checkpoint(path, {**tensors, "array": np.arange(3), "bytes": bytes(5000)})
    loaded = load_checkpoint(path, map_location="meta")
    assert np.array_equal(loaded.pop("array"), np.arange(3))
    assert loaded.pop("bytes") == bytes(5000)
    for name, tensor in tensors.items():
        assert loaded[name].is_meta
        assert (loaded[name].shape, loaded[name].layout, loaded[name].dtype) == (
            tensor.shape,
            tensor.layout,
            tensor.dtype,
        )
    write_checkpoint(path, {"q": quietly(QUANTIZED["qint8"])})
    with pytest.raises(CheckpointError, match="no quantized tensors on the meta device"):
        load_checkpoint(path, map_location="meta")


DTYPES = sorted(
    (
        d
        for d in vars(torch).values()
        if isinstance(d, torch.dtype) and not str(d).startswith(("torch.q", "torch.bits"))
    ),
    key=str,
)


@st.composite
def dense(draw: st.DrawFn) -> torch.Tensor:
    """A dense tensor of any dtype, shape up to three dimensions, seen directly or through a view."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = math.prod(shape) * dtype.itemsize
    data = draw(st.binary(min_size=count, max_size=count))
    if dtype is torch.bool:
        data = bytes(byte & 1 for byte in data)
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    tensor = flat.view(dtype).reshape(shape)
    kinds = ["itself", "transposed"] + (["conj", "imaginary"] if dtype.is_complex else [])
    match draw(st.sampled_from(kinds)):
        case "transposed":
            return tensor.permute(tuple(reversed(range(tensor.dim()))))
        case "conj":
            return tensor.conj()
        case "imaginary" if dtype is not torch.complex32:
            return tensor.conj().imag
    return tensor


@st.composite
def layouts(draw: st.DrawFn) -> torch.Tensor:
    if draw(st.booleans()):
        return quietly(draw(st.sampled_from([*SPARSE.values(), *QUANTIZED.values()])))
    rows, columns, entries = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 4))
    indices = [[draw(st.integers(0, size - 1)) for _ in range(entries)] for size in (rows, columns)]
    values = torch.tensor(draw(st.lists(st.floats(width=32), min_size=entries, max_size=entries)))
    where = torch.tensor(indices, dtype=torch.int64).reshape(2, entries)
    return torch.sparse_coo_tensor(where, values, (rows, columns), check_invariants=True)


nested = st.recursive(
    st.one_of(dense(), dense(), layouts(), st.floats(), st.text(max_size=4), st.integers()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers()), inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=5), nested, max_size=4))
def test_any_nest_of_any_tensors(checkpoint: dict[str, Any]) -> None:
    stream = io.BytesIO()
    tensors, metadata = encode(checkpoint)
    write_file(stream, tensors, metadata)
    file = container.Reader(stream)
    assert same(decode({name: file.read(name) for name in file.entries}, file.metadata), checkpoint)
    if all(name.isprintable() for name in tensors):  # the library's own reader sees the same tensors
        theirs = safetensors.torch.load(stream.getvalue())
        assert theirs.keys() == tensors.keys()
        assert all(same_tensor(theirs[name], tensors[name]) for name in tensors)


# what training waits for


class NoWork(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails on whatever makes or moves values; looking at parts and metadata is allowed."""

    ALLOWED = ("detach", "alias", "view", "set_", "_indices", "_values", "crow_indices", "ccol_indices", "values")
    ALLOWED += ("col_indices", "row_indices", "q_", "empty.", "is_coalesced", "qscheme", "lift_fresh")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if not name.startswith(self.ALLOWED):
            raise AssertionError(f"{name} while training waits")
        result = func(*args, **(kwargs or {}))
        assert not name.startswith("empty.") or result.numel() == 0
        return result


def test_flatten_copies_nothing() -> None:
    base, z = torch.arange(12.0).reshape(3, 4), torch.tensor([1 + 2j, 3 - 1j])
    state = {
        "w": base,
        "t": base.t(),
        "z": z,
        "conj": z.conj(),
        "neg": z.conj().imag,
        "f8": base.to(torch.float8_e8m0fnu),
    }
    array = np.arange(4.0)
    layouts = {name: quietly(make) for name, make in (SPARSE | QUANTIZED).items()}
    with NoWork():
        tensors, tree = flatten({"state_dict": state, "layouts": layouts, "array": array})
    for name, tensor in state.items():
        assert tensors[f"module.{name}"].data_ptr() == tensor.data_ptr()
    assert tensors["array"].data_ptr() == array.ctypes.data
    assert tensors["layouts.qint8.int_repr"].data_ptr() == layouts["qint8"].data_ptr()
    assert tensors["layouts.csr.values"].data_ptr() == layouts["csr"].values().data_ptr()
    assert all(tensor.layout is torch.strided and not tensor.is_quantized for tensor in tensors.values())

    copies = {name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor) for name, tensor in tensors.items()}
    base.fill_(-1)  # training goes on
    stored, metadata = seal(copies, tree, saved_at=5.0)
    assert decode(stored, metadata)["state_dict"]["w"].tolist() == torch.arange(12.0).reshape(3, 4).tolist()
    assert same_tensor(decode(stored, metadata)["state_dict"]["conj"], z.conj())
    assert '"saved_at":5.0' in metadata["leyden_about"]


def test_what_flatten_returns_is_not_the_checkpoints_own() -> None:
    inner = {"values": [1, 2], "size": torch.Size([3])}
    _, tree = flatten({"mine": inner, "epoch": 3})
    before = container.compact_json(tree)
    inner["values"].append(3)  # type: ignore[attr-defined]
    inner["new"] = 1  # type: ignore[assignment]
    assert container.compact_json(tree) == before


def test_sealing_does_not_copy_what_can_be_written_as_it_is() -> None:
    tensors = {"w": torch.ones(3), "z": torch.zeros(2, dtype=torch.complex64)}
    stored, _ = seal(*flatten(tensors))
    assert stored["w"].data_ptr() == tensors["w"].data_ptr()
    assert stored["z"].data_ptr() == tensors["z"].data_ptr()
    assert stored["z"].shape == (2, 2)


def test_checksums_leave_the_interpreter_to_others() -> None:
    tensor = torch.zeros(50_000_000, dtype=torch.uint8)

    def runs_meanwhile() -> bool:
        started, done = threading.Event(), threading.Event()
        thread = threading.Thread(target=lambda: (started.set(), container.checksum(tensor), done.set()))
        thread.start()
        started.wait()
        meanwhile = not done.is_set()
        thread.join()
        return meanwhile

    before = sys.getswitchinterval()
    sys.setswitchinterval(100)  # the lock changes hands only where it is given away
    try:
        assert any(runs_meanwhile() for _ in range(20))  # any: the system may be late to wake this thread
    finally:
        sys.setswitchinterval(before)


def test_the_checksum_is_what_the_specification_says() -> None:
    data = torch.arange(3.0)
    assert container.checksum(data) == f"{zlib.crc32(data.numpy().tobytes(), zlib.crc32(b'F32[3]')):08x}"


# size and memory


def trained_model() -> dict[str, Any]:
    """A model of 10 MB after one step of AdamW."""
    model = torch.nn.Sequential(*[torch.nn.Linear(400, 400) for _ in range(16)])
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 400)).sum().backward()
    optimizer.step()
    return {
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "epoch": 1,
        "global_step": 1,
    }


def test_a_file_is_as_large_as_its_tensors(tmp_path: pathlib.Path) -> None:
    checkpoint = trained_model()
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, checkpoint)
    tensors, _ = flatten(checkpoint)
    payload = sum(tensor.nbytes for tensor in tensors.values())
    assert payload > 30e6  # weights and AdamW's two moments
    assert payload < path.stat().st_size < 1.01 * payload
    assert same(load_checkpoint(path)["optimizer_states"], checkpoint["optimizer_states"])


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Sums the bytes of every tensor that torch makes, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and "empty" in str(func):
            self.total += result.nbytes
        elif isinstance(result, torch.Tensor):
            sources = [a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)]
            if result.untyped_storage().data_ptr() not in sources:
                self.total += result.nbytes
        return result


def test_loading_allocates_the_result_and_no_more(tmp_path: pathlib.Path) -> None:
    checkpoint = trained_model()
    payload = sum(tensor.nbytes for tensor in flatten(checkpoint)[0].values())
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, checkpoint)
    del checkpoint
    load_checkpoint(path)
    tracemalloc.start()  # what Python allocates: the header, the tree, and never a tensor's bytes
    try:
        with Allocations() as torchs:
            load_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert torchs.total == payload


def test_arrays_are_let_go_one_by_one(tmp_path: pathlib.Path) -> None:
    size = 1_000_000
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, {"arrays": [np.full(size, i, dtype=np.uint8) for i in range(10)]})
    load_checkpoint(path)
    tracemalloc.start()  # numpy tells it of its arrays
    try:
        loaded = load_checkpoint(path)["arrays"]
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(array.nbytes for array in loaded) == 10 * size
    assert held >= 10 * size
    assert peak < 11 * size + 200_000
