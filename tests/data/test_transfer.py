from __future__ import annotations

import warnings
from collections import Counter, OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Iterator, Mapping
from dataclasses import FrozenInstanceError, dataclass, field
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from leyden.data import transfer
from leyden.data.transfer import batch_size_of, move_to_device
from leyden.errors import DataError, LeydenWarning, MetricError

META = torch.device("meta")  # a second device that every machine has


def on_meta(batch: Any) -> Any:
    return move_to_device(batch, META)


Pair = namedtuple("Pair", "x name")


class AttrDict(dict):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Tagged(dict):
    tag = "none"


class ReadOnly(Mapping):
    def __init__(self, *, items: dict[str, Any]) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    name: str
    derived: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "derived", self.x * 2)


@dataclass
class Partly:
    x: Tensor
    later: Tensor = field(init=False)


class TestMove:
    def test_tensors_in_every_builtin_container(self) -> None:
        x = torch.ones(2)
        batch = {"a": [x, (x, {"b": x})], "text": "abc", "none": None, "n": 3}
        moved = on_meta(batch)
        assert moved["a"][0].device == moved["a"][1][0].device == moved["a"][1][1]["b"].device == META
        assert (moved["text"], moved["none"], moved["n"]) == ("abc", None, 3)
        assert isinstance(moved["a"][1], tuple)
        assert batch["a"][0] is x  # the original is as it was

    @pytest.mark.parametrize(
        "batch",
        [
            torch.ones(2),
            [torch.ones(2), "a"],
            {"a": (torch.ones(2), None)},
            Pair(torch.ones(1), "n"),
            Frozen(torch.ones(1), "n"),
            pack_sequence([torch.ones(2)]),
            AttrDict(a=torch.ones(1)),
            "text",
            b"bytes",
            None,
            3,
            torch.Size([2, 3]),
            torch.float32,
            {1, 2},
            object(),
            dict,
            Frozen,
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_same_object_when_nothing_changes(self, batch: Any) -> None:
        assert move_to_device(batch, "cpu") is batch
        assert move_to_device(batch, "cpu", torch.float32) is batch

    def test_untouched_branches_keep_their_identity(self) -> None:
        texts = ["a", "b"]
        done = {"x": torch.ones(1, device=META)}
        moved = on_meta({"x": torch.ones(1), "texts": texts, "done": done})
        assert moved["texts"] is texts
        assert moved["done"] is done

    def test_only_floating_tensors_are_cast(self) -> None:
        batch = {"f": torch.ones(2), "i": torch.ones(2, dtype=torch.int64), "b": torch.ones(2, dtype=torch.bool)}
        moved = move_to_device({**batch, "c": torch.ones(1, dtype=torch.complex64)}, "cpu", torch.bfloat16)
        assert {key: value.dtype for key, value in moved.items()} == {
            "f": torch.bfloat16,
            "i": torch.int64,
            "b": torch.bool,
            "c": torch.complex64,
        }
        assert moved["i"] is batch["i"]
        assert on_meta(torch.ones(2, dtype=torch.float64)).dtype == torch.float64

    def test_mappings_keep_their_type(self) -> None:
        x = torch.ones(1)
        assert type(on_meta(OrderedDict(b=x, a=1))) is OrderedDict
        assert list(on_meta(OrderedDict(b=x, a=1))) == ["b", "a"]
        default = on_meta(defaultdict(list, a=x))
        assert (default.default_factory, default["new"]) == (list, [])
        user = UserDict(a=x)
        assert type(on_meta(user)) is UserDict
        assert user["a"] is x
        assert type(on_meta(MappingProxyType({"a": x}))) is MappingProxyType
        assert type(on_meta(Counter({"a": x}))) is Counter
        tagged = Tagged(a=x)
        tagged.tag = "train"
        assert on_meta(tagged).tag == "train"
        attributes = on_meta(AttrDict(a=x))
        assert attributes.a is attributes["a"]
        assert attributes.a.device == META

    def test_mapping_that_cannot_be_rebuilt_becomes_a_dict(self) -> None:
        moved = on_meta(ReadOnly(items={"a": torch.ones(1)}))
        assert type(moved) is dict
        assert moved["a"].device == META

    def test_sequences_keep_their_type(self) -> None:
        class Rows(list):
            pass

        class Point(tuple):
            def __new__(cls, x: Any, y: Any) -> Point:
                return super().__new__(cls, (x, y))

        x = torch.ones(3)
        assert type(on_meta(Rows([x]))) is Rows
        assert type(on_meta(Pair(x, "n"))) is Pair
        assert on_meta(Pair(x, "n")).x.device == META
        assert type(on_meta(torch.max(torch.ones(2, 2), 0))) is torch.return_types.max
        assert type(on_meta(Point(x, 1))) is tuple  # its constructor does not take an iterable

    def test_frozen_dataclass_with_a_field_outside_init(self) -> None:
        before = Frozen(torch.ones(2), "n")
        moved = on_meta(before)
        assert type(moved) is Frozen
        assert moved.x.device == moved.derived.device == META
        assert moved.name == "n"
        assert before.x.device.type == before.derived.device.type == "cpu"
        with pytest.raises(FrozenInstanceError):
            moved.name = "m"  # type: ignore[misc]

    def test_dataclass_with_a_field_not_set_yet(self) -> None:
        moved = on_meta(Partly(torch.ones(1)))
        assert moved.x.device == META
        assert not hasattr(moved, "later")

    def test_packed_sequence(self) -> None:
        packed = pack_sequence([torch.ones(1), torch.ones(3)], enforce_sorted=False)
        moved = on_meta(packed)
        assert moved.data.device == moved.sorted_indices.device == META
        assert moved.batch_sizes.device.type == "cpu"
        ids = pack_sequence([torch.tensor([1, 2])])
        assert move_to_device(ids, "cpu", torch.float16) is ids
        assert move_to_device(packed, "cpu", torch.float16).data.dtype == torch.float16

    def test_objects_that_move_themselves(self) -> None:
        class Returns:
            def __init__(self, device: Any = "cpu") -> None:
                self.device = device

            def to(self, device: Any) -> Returns:
                return Returns(device)

        class InPlace(Returns):
            def to(self, device: Any) -> None:  # type: ignore[override]
                self.device = device

        assert on_meta([Returns()])[0].device == META
        in_place = InPlace()
        assert on_meta(in_place) is in_place
        assert in_place.device == META

    def test_mapping_that_moves_itself_is_cast_too(self) -> None:
        class Encoding(UserDict):
            def to(self, device: Any) -> Encoding:
                self.data = {key: value.to(device) for key, value in self.data.items()}
                return self

        encoding = Encoding(ids=torch.ones(2, dtype=torch.int64), pixels=torch.ones(2))
        assert move_to_device(encoding, "cpu", torch.float16) is encoding
        assert (encoding["ids"].dtype, encoding["pixels"].dtype) == (torch.int64, torch.float16)

    def test_sparse_tensors(self) -> None:
        sparse = torch.eye(2).to_sparse()
        assert on_meta({"s": sparse})["s"].device == META

    def test_a_batch_that_contains_itself(self) -> None:
        batch: list[Any] = [torch.ones(1)]
        batch.append(batch)
        with pytest.raises(DataError, match="contains itself"):
            on_meta(batch)

    @pytest.mark.parametrize("dtype", [None, torch.float16])
    def test_pinned_tensors_are_not_waited_for(
        self, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []
        to = Tensor.to

        def spy(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls.append(kwargs.get("non_blocking", False))
            return to(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, "to", spy)
        move_to_device(torch.ones(1), META, dtype)
        assert not any(calls)
        monkeypatch.setattr(Tensor, "is_pinned", lambda self: True)
        moved = move_to_device(torch.ones(1), META, dtype)
        assert any(calls)
        assert (moved.device, moved.dtype) == (META, dtype or torch.float32)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_pinned_tensors_arrive_whole(self) -> None:
        batch = {"x": torch.arange(1000.0).pin_memory(), "n": torch.arange(3)}
        moved = move_to_device(batch, "cuda", torch.float64)
        assert torch.equal(moved["x"].cpu(), torch.arange(1000.0, dtype=torch.float64))
        assert torch.equal(moved["n"].cpu(), torch.arange(3))
        assert move_to_device(moved, "cuda", torch.float64) is moved


leaves = st.sampled_from([torch.ones(2), torch.ones(1, dtype=torch.int32), "s", 1, None])
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=12,
)


def same_shape(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor):
        return isinstance(after, Tensor) and after.device == META and after.dtype == before.dtype
    if type(before) is not type(after):
        return False
    if isinstance(before, dict):
        return list(before) == list(after) and all(same_shape(before[key], after[key]) for key in before)
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(map(same_shape, before, after))
    return before is after


@given(trees)
def test_any_tree_keeps_its_shape(batch: Any) -> None:
    assert same_shape(batch, on_meta(batch))
    assert move_to_device(batch, "cpu") is batch


class TestBatchSize:
    @pytest.fixture(autouse=True)
    def _no_warning_yet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(transfer, "_warned_of_sizes", False)

    @pytest.mark.parametrize(
        ("batch", "size"),
        [
            (torch.ones(4, 2), 4),
            (torch.ones(0, 2), 0),
            (torch.tensor(1.0), 1),
            ({"a": "text", "b": [None, (torch.ones(3), 1)]}, 3),
            ({"temperature": torch.tensor(1.0), "x": torch.ones(5, 1)}, 5),
            (["a", "b", "c"], 3),
            (("a", "b"), 2),
            ({"names": ["encoder", "decoder"], "x": torch.ones(7)}, 7),
            ((["a", "b"], torch.tensor(0.0)), 2),
            (Partly(torch.ones(6)), 6),
            (UserDict(a=torch.ones(2)), 2),
            (pack_sequence([torch.ones(5), torch.ones(3)]), 2),
        ],
    )
    def test_size(self, batch: Any, size: int) -> None:
        assert batch_size_of(batch) == size

    @pytest.mark.parametrize("batch", [None, 3, "abc", [], {}, [1, 2], object()])
    def test_nothing_to_count(self, batch: Any) -> None:
        with pytest.raises(MetricError, match=r"Pass batch_size= to self\.log"):
            batch_size_of(batch)

    def test_disagreement_warns_once(self) -> None:
        batch = (torch.ones(4), torch.ones(3))
        with pytest.warns(LeydenWarning, match=r"\[LEY-batch-size-ambiguous\].*4 and 3"):
            assert batch_size_of(batch) == 4
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert batch_size_of(batch) == 4
            assert batch_size_of(batch[::-1]) == 3
