"""The file format: what is saved comes back equal, and what is wrong with a file is named."""

from __future__ import annotations

import collections
import datetime
import enum
import json
import math
import pathlib
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leyden.checkpoint import load_checkpoint, read_metadata, write_checkpoint
from leyden.checkpoint.format import decode, encode
from leyden.errors import CheckpointError, ConfigurationError
from same_values import same

torch.set_num_threads(1)


def round_trip(value: Any, tmp_path: pathlib.Path) -> Any:
    write_checkpoint(tmp_path / "a.ckpt", {"value": value})
    return load_checkpoint(tmp_path / "a.ckpt")["value"]


# plain data

keys = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["$tensor", "$dict", "$", "", "__metadata__", "state_dict", "a.b", "\ud800"]),
    st.integers(),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False),
    st.tuples(st.integers(), st.text(max_size=3)),
    st.binary(max_size=4),
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=2**60, max_value=2**200),
    st.floats(),
    st.complex_numbers(),
    st.text(alphabet=st.characters()),
    st.binary(max_size=16),
    st.timedeltas(),
    st.lists(st.integers(0, 5), max_size=3).map(torch.Size),
    st.sampled_from(
        [torch.float32, torch.bfloat16, torch.device("cpu"), torch.device("cuda", 1), torch.device("meta")]
    ),
    st.sampled_from([torch.zeros(0, 3), torch.tensor(1.5), torch.arange(3), torch.tensor([1 + 2j]), torch.ones(2) > 0]),
    st.frozensets(st.integers(), max_size=4),
    st.sets(st.text(max_size=3), max_size=4),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.lists(inner, max_size=4).map(lambda items: collections.deque(items, maxlen=4)),
        st.dictionaries(keys, inner, max_size=4),
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=8), values, max_size=5))
def test_whatever_is_plain_comes_back(checkpoint: dict[str, Any]) -> None:
    tensors, metadata = encode(checkpoint)
    assert all(type(value) is str for value in metadata.values())
    assert same(decode(tensors, metadata), checkpoint)


@settings(max_examples=40, deadline=None)
@given(checkpoint=st.dictionaries(st.text(max_size=8), values, max_size=5))
def test_whatever_is_plain_comes_back_from_a_file(
    checkpoint: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("plain") / "a.ckpt"
    write_checkpoint(path, checkpoint)
    assert same(load_checkpoint(path), checkpoint)
    with safetensors.safe_open(path, framework="pt") as file:  # the library agrees that it is such a file
        assert set(file.keys()) == set(encode(checkpoint)[0])


def test_a_dict_that_looks_like_a_placeholder(tmp_path: pathlib.Path) -> None:
    value = {"$tensor": "module.weight", "b": {"$dict": [[1, 2]]}, "c": {"$float": "nan"}, "d": [{"$": 1}]}
    assert same(round_trip(value, tmp_path), value)


def test_values_that_change_type_on_purpose(tmp_path: pathlib.Path) -> None:
    class Color(enum.Enum):
        RED = "red"

    class Level(enum.IntEnum):
        LOW = 3

    value = {
        "path": pathlib.PurePosixPath("a/b"),
        "ordered": collections.OrderedDict(b=1, a=2),
        "default": collections.defaultdict(list, x=[1]),
        "enum": Color.RED,
        "int enum": Level.LOW,
        "torch": torch.__version__,
        "array": bytearray(b"ab"),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    expected = {
        "path": "a/b",
        "ordered": {"b": 1, "a": 2},
        "default": {"x": [1]},
        "enum": "red",
        "int enum": 3,
        "torch": str(torch.__version__),
        "array": b"ab",
        "parameter": torch.ones(2),
    }
    loaded = round_trip(value, tmp_path)
    assert same(loaded, expected)
    assert not loaded["parameter"].requires_grad


def test_integers_and_bytes_of_any_size(tmp_path: pathlib.Path) -> None:
    value = [7**20_000, -(2**63), 2**63, -(2**64), bytes(range(256)) * 100, b"", collections.Counter({3: 2})]
    assert same(round_trip(value, tmp_path), value)


def test_numpy_values(tmp_path: pathlib.Path) -> None:
    value = [
        np.random.RandomState(3).get_state(),
        np.random.default_rng(3).bit_generator.state,
        np.float32(0.1),
        np.float64(math.nan),
        np.int8(-3),
        np.bool_(True),
        np.uint64(2**64 - 1),
        np.complex64(1 + 2j),
        np.str_("x"),
        np.arange(6).reshape(2, 3)[:, ::-1],
        np.zeros((0, 2)),
        np.zeros((0, 2), ">f4"),
        np.array(2.5),
        np.array([1.5, 2.5], ">f8"),
        np.array(["a", "bc"]),
        np.array([1 + 1j]),
        np.array([1, 2], "datetime64[D]"),
        np.array([True, False]),
        np.broadcast_to(np.float16(2), (3,)),
    ]
    assert same(round_trip(value, tmp_path), value)


def test_every_random_state(tmp_path: pathlib.Path) -> None:
    rng = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    write_checkpoint(tmp_path / "a.ckpt", {"random_state": rng})
    expected = (random.random(), np.random.rand(), torch.rand(()).item())
    loaded = load_checkpoint(tmp_path / "a.ckpt", map_location="meta")["random_state"]  # stays on the CPU nevertheless
    random.setstate(loaded["python"])
    np.random.set_state(loaded["numpy"])
    torch.set_rng_state(loaded["torch"])
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


# tensors


@pytest.mark.parametrize(
    "dtype",
    sorted(
        (d for d in vars(torch).values() if isinstance(d, torch.dtype) and not str(d).startswith("torch.q")),
        key=str,
    ),
    ids=str,
)
@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_tensors_of_every_dtype(dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    if dtype.itemsize > 1 and str(dtype).startswith("torch.bits"):
        pytest.skip("has no values")
    data = torch.randint(0, 2, (4 * dtype.itemsize,), dtype=torch.uint8)
    try:
        tensor = data.view(dtype).reshape(2, 2)
    except RuntimeError:
        pytest.skip("this torch cannot make one")
    value = {"a": tensor, "empty": tensor[:0], "scalar": tensor[0, 0]}
    assert same(round_trip(value, tmp_path), value)


def test_views(tmp_path: pathlib.Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    z = torch.tensor([1 + 2j, 3 - 1j])
    value = [base.t(), base[1:, ::2], base[0].expand(5, 4), z.conj(), z.conj().imag, base[:, 1], torch.empty(0, 3, 0)]
    loaded = round_trip(value, tmp_path)
    assert same(loaded, value)
    assert all(tensor.is_contiguous() for tensor in loaded)


def test_a_small_view_of_a_large_tensor_is_small(tmp_path: pathlib.Path) -> None:
    round_trip(torch.zeros(1_000_000)[:10], tmp_path)
    assert (tmp_path / "a.ckpt").stat().st_size < 3000


def test_tied_tensors_are_written_once_and_stay_tied(tmp_path: pathlib.Path) -> None:
    module = torch.nn.ModuleDict({"embed": torch.nn.Embedding(500, 100), "head": torch.nn.Linear(100, 500)})
    module["head"].weight = module["embed"].weight
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, {"state_dict": module.state_dict()})
    assert path.stat().st_size < 500 * 100 * 4 * 1.1
    loaded = load_checkpoint(path)["state_dict"]
    assert list(loaded) == ["embed.weight", "head.weight", "head.bias"]
    assert loaded["embed.weight"] is loaded["head.weight"]
    assert same(dict(loaded), {name: tensor.detach() for name, tensor in module.state_dict().items()})


def test_tensors_made_on_the_fly_do_not_become_one(tmp_path: pathlib.Path) -> None:
    # conversions free and reuse memory while encoding
    value = [np.full(100, i) for i in range(20)] + [bytes([i]) * 5000 for i in range(20)]
    assert same(round_trip(value, tmp_path), value)


@pytest.mark.parametrize(
    "optimizer_class", [torch.optim.AdamW, torch.optim.SGD, torch.optim.LBFGS, torch.optim.Adagrad]
)
def test_optimizer_state_loads_into_the_optimizer(
    optimizer_class: type[torch.optim.Optimizer], tmp_path: pathlib.Path
) -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 2)
        return module, optimizer_class(module.parameters(), lr=0.1)  # type: ignore[call-arg]

    def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = module(torch.ones(4, 3)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    module, optimizer = make()
    step(module, optimizer)
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]})
    step(module, optimizer)

    again, its_optimizer = make()
    loaded = load_checkpoint(path)
    again.load_state_dict(loaded["state_dict"])
    its_optimizer.load_state_dict(loaded["optimizer_states"][0])
    step(again, its_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


def test_scheduler_states_round_trip(tmp_path: pathlib.Path) -> None:
    from torch.optim import lr_scheduler as lr

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    schedulers = [
        lr.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
        lr.MultiStepLR(optimizer, [1, 3, 3]),
        lr.OneCycleLR(optimizer, 0.1, total_steps=10),
        lr.CyclicLR(optimizer, 0.01, 0.1),
        lr.CosineAnnealingWarmRestarts(optimizer, 5),
        lr.ReduceLROnPlateau(optimizer),
        lr.SequentialLR(optimizer, [lr.ConstantLR(optimizer), lr.ExponentialLR(optimizer, 0.9)], [2]),
    ]
    states = [scheduler.state_dict() for scheduler in schedulers]
    assert same(round_trip(states, tmp_path), states)


def test_module_state_keeps_its_format_versions(tmp_path: pathlib.Path) -> None:
    state = torch.nn.BatchNorm1d(3).state_dict()
    loaded = round_trip(state, tmp_path)
    assert loaded._metadata == dict(state._metadata)
    assert loaded._metadata[""] == {"version": 2}


def test_names_in_the_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.ckpt"
    checkpoint = {
        "state_dict": {"layer.weight": torch.ones(2)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}],
        "callbacks": {"EMA": {"weights": [torch.full((2,), 2.0)]}},
        "module.layer.weight": torch.full((2,), 3.0),
        "__metadata__": torch.tensor(4),
        "epoch": 3,
    }
    write_checkpoint(path, checkpoint)
    tensors = safetensors.torch.load_file(path)
    assert {name: tensor.reshape(-1)[0].item() for name, tensor in tensors.items()} == {
        "module.layer.weight": 1,
        "optimizer.0.state.0.exp_avg": 0,
        "callbacks.EMA.weights.0": 2,
        "module.layer.weight#2": 3,
        "__metadata__#2": 4,
    }
    assert same(load_checkpoint(path), checkpoint)
    tree = json.loads(read_metadata(path)["leyden_checkpoint"])
    assert tree["epoch"] == 3
    assert tree["state_dict"] == {"layer.weight": {"$tensor": "module.layer.weight"}}
    assert read_metadata(path)["format"] == "pt"


def test_weights_only_leaves_the_run_state(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.ckpt"
    checkpoint = {"state_dict": {"w": torch.ones(2)}, "epoch": 1, "mine": [1], "hyper_parameters": {"lr": 0.1}}
    write_checkpoint(path, {**checkpoint, "optimizer_states": [{}], "callbacks": {}, "rng": {}, "lr_schedulers": []})
    assert same(load_checkpoint(path, weights_only=True), checkpoint)


def test_weights_of_other_tools(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.safetensors"
    weights = {"a": torch.ones(2, dtype=torch.complex64), "b": torch.zeros(0)}
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file(weights, path, metadata=metadata)
        assert same(load_checkpoint(path), {"state_dict": weights})


def test_map_location(tmp_path: pathlib.Path) -> None:
    write_checkpoint(tmp_path / "a.ckpt", {"state_dict": {"w": torch.ones(2)}})
    assert load_checkpoint(tmp_path / "a.ckpt", map_location="meta")["state_dict"]["w"].is_meta
    assert load_checkpoint(tmp_path / "a.ckpt", map_location=None)["state_dict"]["w"].device.type == "cpu"
    with pytest.raises(ConfigurationError, match="map_location='cupboard'"):
        load_checkpoint(tmp_path / "a.ckpt", map_location="cupboard")


def test_loaded_tensors_are_independent_of_the_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, {"w": torch.ones(1000)})
    loaded = load_checkpoint(path)["w"]
    with path.open("r+b") as file:
        file.truncate(10)  # under a memory map, reading on would kill the process
    assert torch.equal(loaded, torch.ones(1000))


# refused when saving


class Custom:
    pass


class Pair(NamedTuple):
    a: int


def four_bits() -> torch.Tensor:
    return torch.quantize_per_channel(torch.ones(2, 4), torch.ones(2), torch.zeros(2), 0, torch.quint4x2)


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda: lambda: 1, "look the function up"),
        (lambda: Custom(), "numbers and strings"),
        (lambda: Custom, "class Custom"),
        (lambda: torch.nn.Linear(1, 1), r"module.state_dict\(\)"),
        (lambda: torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), r"value.state_dict\(\)"),
        (lambda: Pair(1), "_asdict"),
        (lambda: range(3), r"list\(value\)"),
        (lambda: datetime.datetime(2026, 1, 1), "isoformat"),
        (lambda: torch.Generator(), "get_state"),
        (lambda: np.array([object()]), "object is not plain"),
        (lambda: np.array([(1, 2)], "i4,i4"), "not plain"),
        (lambda: np.datetime64("2026-01-01"), "ISO string"),
        (lambda: torch.ones(3, 3).to_mkldnn(), r"mkldnn.*to_dense\(\)"),
        (lambda: four_bits(), r"quint4x2.*dequantize"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "unbind"),
        (lambda: torch.ones(2, device="meta"), "meta device"),
        (lambda: torch.nn.LazyLinear(2).weight, "lazy"),
        (lambda: {torch.ones(1): 1}, "cannot be a key"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_cannot_be_stored_is_refused_by_its_key(make: Callable[[], Any], hint: str) -> None:
    value = make()
    with pytest.raises(CheckpointError, match=rf"^callbacks\.MyCallback\.fn\b.*{hint}"):
        encode({"callbacks": {"MyCallback": {"fn": value}}})


def test_a_list_that_contains_itself() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match=r"^mine\.0.*contains itself"):
        encode({"mine": loop})


def test_keys_that_are_not_strings() -> None:
    with pytest.raises(CheckpointError, match="must be strings, got 3"):
        encode({3: 1})  # type: ignore[dict-item]


def test_too_much_plain_data_names_its_key(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leyden.checkpoint.container.MAX_HEADER_BYTES", 1000)
    with pytest.raises(CheckpointError, match=r"big: .*store large lists as tensors"):
        write_checkpoint(tmp_path / "a.ckpt", {"small": 1, "big": list(range(1000))})
    assert list(tmp_path.iterdir()) == []


def test_numpy_is_not_needed(tmp_path: pathlib.Path) -> None:
    saved = tmp_path / "a.ckpt"
    write_checkpoint(saved, {"state_dict": {"w": torch.arange(100.0)}, "epoch": 3, "rng": np.arange(3)})
    program = """
import sys, warnings
class NoNumpy:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "numpy":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoNumpy())
warnings.simplefilter("ignore")
import torch
from leyden.checkpoint import load_checkpoint, write_checkpoint
from leyden.errors import CheckpointError
value = {"state_dict": {"w": torch.ones(3), "h": torch.ones(2, dtype=torch.bfloat16)}, "b": bytes(5000), "c": 1j}
write_checkpoint(sys.argv[1] + ".new", value)
loaded = load_checkpoint(sys.argv[1] + ".new")
assert torch.equal(loaded["state_dict"]["w"], torch.ones(3)) and loaded["b"] == bytes(5000)
assert load_checkpoint(sys.argv[1], weights_only=True)["epoch"] == 3
try:
    load_checkpoint(sys.argv[1])
except CheckpointError as error:
    assert "numpy is not installed" in str(error), error
else:
    raise AssertionError("numpy values need numpy")
"""
    subprocess.run([sys.executable, "-c", program, str(saved)], check=True)
